# SPDX-License-Identifier: Apache-2.0
"""How many multipliers each layer gets: hls4ml's strategy and reuse factors, planned for the DSP blocks of the board.

A plan, not a measurement: what a design really takes only synthesis can say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from isthmus.errors import IsthmusError, Problem, ProblemsError

IO_TYPES = ("auto", "io_parallel", "io_stream")
STRATEGIES = ("auto", "latency", "resource")
# project.tcl's `maximum_size`, and the size at which Vitis HLS stops unrolling: one array element, one register.
UNROLL_LIMIT = 4096


@dataclass(frozen=True)
class Product:
    """One matrix-vector product in the HLS code: `terms` x `filters` products for each of `pixels` output positions."""

    layer: str
    node: str
    terms: int
    filters: int
    pixels: int
    depthwise: bool = False
    weight_bits: int = 8
    accumulator_bits: int = 24
    zeros: int = 0  # weights that are 0: no multiplier in the Latency strategy
    multiplied: int = -1  # of the others, those that need a multiplier and those that are one addition (`constants`)
    shifted: int = 0
    activations: bool = False  # both factors are activations: nothing is stored

    @property
    def products(self) -> int:
        return self.terms * (1 if self.depthwise else self.filters)


@dataclass(frozen=True)
class Folding:
    """Strategy and reuse factor by layer, and the multipliers they amount to."""

    layers: Mapping[str, Mapping[str, Any]]
    multipliers: int
    cycles: int
    notes: tuple[str, ...] = ()


def fold(products: Sequence[Product], strategy: str, reuse_factor: int, dsp: int) -> Folding:
    """The plan. `reuse_factor` 0 chooses one a layer so that all multipliers together fit `dsp` and the slowest layer is as fast as possible.

    "auto" takes Latency (weights as constants in the logic) where every product fits a DSP of its own, and Resource (weights in block
    RAM, multipliers used again and again) where not. Raises `ProblemsError` where a layer would be unrolled beyond `UNROLL_LIMIT`.
    """
    if strategy == "auto":
        strategy = "latency" if reuse_factor in (0, 1) and sum(product.products for product in products) <= dsp else "resource"
    factors, notes = [1] * len(products), tuple[str, ...]()
    if strategy == "resource":
        factors = [_nearest(product, reuse_factor) for product in products] if reuse_factor else _within(products, dsp)
        notes = _other_factors(products, factors, reuse_factor)
    elif reuse_factor:
        factors = [reuse_factor] * len(products)
    problems = [
        Problem(
            product.node,
            "unroll-limit",
            f"{product.products // factor} multiplications at once, HLS unrolls at most {UNROLL_LIMIT}",
            "use --set strategy=resource and a larger --set reuse_factor (0 chooses one)",
        )
        for product, factor in zip(products, factors, strict=True)
        if product.products // factor > UNROLL_LIMIT
    ]
    if problems:
        raise ProblemsError("hls4ml", problems)
    layers = {}
    for product, factor in zip(products, factors, strict=True):
        # hls4ml 1.3.0 has no Resource strategy for depthwise convolutions: its code stops at an assertion.
        alone = product.depthwise and strategy == "resource"
        layers[product.layer] = {"Strategy": "latency" if alone else strategy, "ReuseFactor": factor}
    return Folding(
        layers,
        sum(-(-product.products // factor) for product, factor in zip(products, factors, strict=True)),
        max((product.pixels * factor for product, factor in zip(products, factors, strict=True)), default=0),
        notes,
    )


def _other_factors(products: Sequence[Product], factors: Sequence[int], wanted: int) -> tuple[str, ...]:
    """Which layers got another reuse factor than the one asked for. Raises `IsthmusError` where all of them did."""
    others = [f"{product.node} {factor}" for product, factor in zip(products, factors, strict=True) if wanted and factor != wanted]
    if others and len(others) == len(products) and not all(product.depthwise for product in products):
        valid = sorted({factor for product in products for factor in reuse_factors(product)})
        listed = ", ".join(str(factor) for factor in valid[:24]) + (", ..." if len(valid) > 24 else "")
        raise IsthmusError(
            f"option reuse_factor of target hls4ml: {wanted} divides the terms of no layer; these divide at least one: {listed} (0 chooses one a layer)"
        )
    return (f"reuse factor {wanted} does not divide the terms of every layer, the next that does was taken for: {', '.join(others)}",) if others else ()


def reuse_factors(product: Product) -> list[int]:
    """Reuse factors that hls4ml's Resource code computes rightly with: divisors of `terms`.

    hls4ml 1.3.0 also takes multiples of `terms` as valid, but its io_parallel convolution then gives wrong sums, without a word.
    """
    if product.depthwise:
        return [1]
    return [factor for factor in range(1, product.terms + 1) if product.terms % factor == 0]


def _nearest(product: Product, wanted: int) -> int:
    """The smallest valid factor that is at least `wanted`, else the largest."""
    valid = reuse_factors(product)
    return next((factor for factor in valid if factor >= wanted), valid[-1])


def _within(products: Sequence[Product], dsp: int) -> list[int]:
    """Starts fully folded, then gives the slowest layer more multipliers while all of them together stay within `dsp`."""
    valid = [reuse_factors(product) for product in products]
    chosen = [factors[-1] for factors in valid]
    while products:
        used = sum(product.products // factor for product, factor in zip(products, chosen, strict=True))
        slowest = max(range(len(products)), key=lambda i: products[i].pixels * chosen[i])
        faster = [factor for factor in valid[slowest] if factor < chosen[slowest]]
        if not faster:
            break
        more = products[slowest].products // faster[-1] - products[slowest].products // chosen[slowest]
        if used + more > dsp:
            break
        chosen[slowest] = faster[-1]
    return chosen


def checked_choices(options: Mapping[str, Any]) -> None:
    """Raises `IsthmusError` for an option value outside its choices."""
    for name, choices in (("io_type", IO_TYPES), ("strategy", STRATEGIES)):
        if options[name] not in choices:
            raise IsthmusError(f"option {name} of target hls4ml: {options[name]!r} is not one of {', '.join(choices)}")
    if options["reuse_factor"] < 0:
        raise IsthmusError(f"option reuse_factor of target hls4ml: {options['reuse_factor']} is below 0 (0 chooses one a layer)")
    if (options["max_latency_us"] or options["min_fps"] or options["pareto"]) and (options["strategy"] != "auto" or options["reuse_factor"]):
        raise IsthmusError("target hls4ml: max_latency_us, min_fps and pareto belong to the search, which an explicit strategy or reuse_factor switches off")
    for name in ("max_latency_us", "min_fps"):
        if not 0 <= options[name] < float("inf"):
            raise IsthmusError(f"option {name} of target hls4ml: {options[name]} is not a number from 0 on (0: no bound)")
    if not options["clock_ns"] > 0:
        raise IsthmusError(f"option clock_ns of target hls4ml: {options['clock_ns']} is not above 0")
