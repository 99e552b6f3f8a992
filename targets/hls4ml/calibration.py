# SPDX-License-Identifier: Apache-2.0
"""What a layer of the HLS code costs: features that follow from how hls4ml's code is built, and factors fitted to published reports.

The factors are no constants of this file: they are fitted, to `published.toml`, the reports that the
repository holds with their sources. How wide the estimate is comes from leaving out one network at a time.
"""

from __future__ import annotations

import functools
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import numpy as np

QUANTITIES = ("dsp", "lut", "ff", "bram_18k", "latency_cycles")
# HLS makes a multiplier of logic where both factors are narrow: 10 x 10 bits still took none of the DSPs in the reports, 15 x 10 took one.
FABRIC_PRODUCT_BITS = 100
BRAM_WIDTH, BRAM_DEPTH = 36, 512  # a half of 18 Kb
# A ROM with fewer bits than this lies in LUTs: the reports have none in block RAM below it.
SMALLEST_ROM_BITS = 1024
DEFAULT_CLOCK_NS = 5.0
ROUNDS = 30
# Added to both sides: a layer of one DSP or ten LUTs is not worth an error of a factor.
FLOORS = {"dsp": 2.0, "lut": 32.0, "ff": 32.0, "latency_cycles": 1.0}
FIRST_VITIS = 2021  # the year of the first version whose pixels do not overlap within a convolution of the Latency strategy


@dataclass(frozen=True)
class Work:
    """One layer of an HLS project. `kind`: dense, conv, pool, pad, activation (or a table), buffer (a whole tensor is kept and moved).

    `terms` x `filters` weights (`zeros` of them 0), read at `pixels` positions of a stream (1: all at once); bits of input, weight, result.
    """

    kind: str
    pixels: int
    filters: int
    in_bits: int
    terms: int = 1
    weight_bits: int = 8
    out_bits: int = 8
    zeros: int = 0
    strategy: str = "latency"
    reuse: int = 1
    depthwise: bool = False
    name: str = ""
    depth_pixels: int = 0  # a buffer's length
    multiplied: int = -1  # products by constants that need a multiplier, and those that are one addition; -1: the weights are not known
    shifted: int = 0

    @property
    def weights(self) -> int:
        return self.terms * (1 if self.depthwise else self.filters)

    @property
    def used(self) -> int:
        return self.weights - self.zeros

    @property
    def limit(self) -> int:
        """hls4ml's own limit of multipliers: with the Resource strategy exactly what there is, with Latency what HLS may allocate."""
        return max(1, -(-self.weights // self.reuse) - (self.zeros // self.reuse if self.strategy == "latency" else 0))

    @property
    def constants(self) -> int:
        """Products that need a multiplier where all are computed at once; most do where the weights are not known."""
        return self.multiplied if self.multiplied >= 0 else round(0.75 * self.used)

    @property
    def multipliers(self) -> int:
        """Multipliers that are there."""
        if self.kind not in ("dense", "conv"):
            return 0
        known = self.strategy == "latency" or self.reuse == 1  # the weights are constants in the logic
        return min(self.limit, self.constants) if known else self.limit


@dataclass(frozen=True)
class Design:
    """A published project: what it is, what the report says of the whole and of each layer."""

    name: str
    network: str
    repository: str
    commit: str
    document: str
    tool: str
    part: str
    clock_ns: float
    io_type: str
    total: Mapping[str, int]
    layers: tuple[tuple[Work, Mapping[str, int]], ...]
    multipliers: str = "auto"
    whole: bool = True
    note: str = ""
    elsewhere: Mapping[str, int] = field(default_factory=dict)


@functools.cache
def published() -> tuple[Design, ...]:
    """`published.toml`."""
    data = tomllib.loads((resources.files("isthmus.targets.hls4ml") / "published.toml").read_text(encoding="utf-8"))
    return tuple(_design(entry) for entry in data["design"])


def _design(entry: Mapping[str, Any]) -> Design:
    layers = []
    for layer in entry["layers"]:
        measured = {name: value for name, value in layer.items() if name in (*QUANTITIES, "interval_cycles")}
        layers.append((Work(**{name: value for name, value in layer.items() if name not in measured}), measured))
    return Design(**{**entry, "layers": tuple(layers)})


# ---- what is known without a fit
def uses_dsp(work: Work, multipliers: str = "auto") -> bool:
    """Whether HLS puts a product of these widths into a DSP block."""
    return multipliers == "dsp" or (multipliers == "auto" and work.in_bits * work.weight_bits > FABRIC_PRODUCT_BITS)


def weight_memory(work: Work) -> int:
    """Halves of 18 Kb for the weights: the Resource strategy reads one word of all multipliers a cycle, as wide as they are many."""
    if work.kind not in ("dense", "conv") or work.strategy != "resource" or work.reuse == 1:
        return 0
    bits = work.multipliers * work.weight_bits
    if bits * work.reuse < SMALLEST_ROM_BITS:
        return 0
    if work.reuse <= BRAM_DEPTH:
        return -(-bits // BRAM_WIDTH)
    deepest, width = 16384, 1
    while deepest > BRAM_DEPTH and deepest // 2 >= work.reuse:
        deepest, width = deepest // 2, width * 2
    return -(-bits // width) * -(-work.reuse // 16384)


# ---- features
def group_of(work: Work) -> str:
    """Layers that share their factors. With a reuse factor of 1 the Resource strategy has its weights in the logic, too."""
    if work.kind not in ("dense", "conv"):
        return work.kind
    return "latency" if work.strategy == "latency" or work.reuse == 1 else "resource"


def features(work: Work, quantity: str, clock_ns: float, multipliers: str = "auto") -> list[float]:
    """What the quantity is a sum of, for layers of this group."""
    speed = DEFAULT_CLOCK_NS / clock_ns
    if quantity == "latency_cycles":
        return [math.log2(work.terms + 1) * speed, speed**2, 1.0] if work.kind in ("dense", "conv") else [1.0]
    fabric = float(not uses_dsp(work, multipliers))
    if work.kind not in ("dense", "conv"):
        taps = work.terms if work.kind == "pool" else 1
        return [work.filters * work.in_bits, work.filters * work.in_bits * (taps - 1), 1.0]
    many = work.multipliers
    if quantity == "dsp":
        return [(1 - fabric) * many]
    line_buffer = work.terms * work.in_bits if work.kind == "conv" else 0
    products = many * work.in_bits * work.weight_bits * fabric / 8
    if group_of(work) == "latency":
        return [
            products,
            float(work.shifted * (work.in_bits + work.weight_bits)),
            float(work.used * work.out_bits),
            line_buffer + work.filters * work.out_bits,
            1.0,
        ]
    return [products, float(many * work.in_bits), float(work.terms * work.in_bits + work.filters * work.out_bits), 1.0]


def depth_group(work: Work, io_type: str) -> str:
    """Layers whose pipelines are alike: a convolution of a stream, whatever its strategy, and dense layers by strategy."""
    return "conv" if work.kind == "conv" and io_type == "io_stream" else group_of(work)


def loop_cycles(work: Work, io_type: str) -> int:
    """What the loops of hls4ml's code take, without the depth of their pipelines."""
    if work.kind not in ("dense", "conv"):
        return work.pixels if io_type == "io_stream" else 0
    calls = work.pixels if work.kind == "conv" else 1
    if work.strategy == "resource":
        return calls * work.reuse
    if work.constants > work.limit:  # fewer multipliers than products: they take turns
        return calls * -(-work.constants // work.limit)
    # In io_parallel the loop over the pixels is one pipeline, whose depth is paid once.
    return calls if work.kind == "conv" else 0


def passes(work: Work, io_type: str, tool: str = "") -> int:
    """How often the depth is paid: a convolution of a stream is one call a pixel, which does not overlap the next; in Vivado HLS it did."""
    overlaps = work.strategy == "latency" and tool[:4].isdecimal() and int(tool[:4]) < FIRST_VITIS
    return work.pixels if work.kind == "conv" and io_type == "io_stream" and not overlaps else 1


# ---- the fit
Factors = Mapping[tuple[str, str], np.ndarray]


def fit(designs: Sequence[Design]) -> Factors:
    """Factors by (group, quantity): see `_solved`."""
    rows: dict[tuple[str, str], list[tuple[list[float], float]]] = {}
    for design in designs:
        for work, measured in design.layers:
            for quantity in ("dsp", "lut", "ff", "latency_cycles") if work.kind in ("dense", "conv") else ("lut", "ff", "latency_cycles"):
                wanted = float(measured[quantity])
                group = group_of(work)
                if quantity == "latency_cycles":
                    wanted = (wanted - loop_cycles(work, design.io_type)) / passes(work, design.io_type, design.tool)
                    group = depth_group(work, design.io_type)
                rows.setdefault((group, quantity), []).append((features(work, quantity, design.clock_ns, design.multipliers), wanted))
    return {key: _solved(np.array([row for row, _ in found]), np.array([wanted for _, wanted in found]), key[1]) for key, found in rows.items()}


def _solved(matrix: np.ndarray, wanted: np.ndarray, quantity: str) -> np.ndarray:
    """Factors, none below 0, with the least absolute errors of the logarithm: twice as much and half as much are as far off."""
    floor = FLOORS[quantity]
    scale = np.abs(matrix).max(axis=0)
    kept = np.flatnonzero(scale)
    if not kept.size:
        return np.zeros(matrix.shape[1])
    inside, target = matrix[:, kept] / scale[kept], np.log(np.maximum(wanted, 0) + floor)
    logarithms = np.full(kept.size, math.log(max(float(np.median(wanted)), floor)))
    for _ in range(ROUNDS):
        factors = np.exp(logarithms)
        estimated = inside @ factors + floor
        slopes = inside * factors / estimated[:, None]
        rest = target - np.log(estimated)
        weight = 1 / np.sqrt(np.maximum(np.abs(rest), 0.05))
        normal = (slopes * weight[:, None]).T @ (slopes * weight[:, None]) + 1e-3 * np.eye(kept.size)
        logarithms = np.clip(logarithms + np.clip(np.linalg.solve(normal, (slopes * weight[:, None]).T @ (rest * weight)), -1, 1), -20, 30)
    factors = np.zeros(matrix.shape[1])
    factors[kept] = np.exp(logarithms) / scale[kept]
    return factors


def predicted(work: Work, quantity: str, factors: Factors, clock_ns: float, io_type: str, multipliers: str = "auto", tool: str = "") -> float:
    """One quantity of one layer. `tool`: the version of HLS, "" for the newest."""
    if quantity == "bram_18k":
        return float(weight_memory(work))
    if quantity == "dsp" and work.kind not in ("dense", "conv"):
        return 0.0
    latency = quantity == "latency_cycles"
    found = factors.get((depth_group(work, io_type) if latency else group_of(work), quantity))
    total = 0.0 if found is None else float(np.dot(features(work, quantity, clock_ns, multipliers), found))
    return loop_cycles(work, io_type) + passes(work, io_type, tool) * round(total) if latency else total
