# SPDX-License-Identifier: Apache-2.0
"""What a project will take before anyone waits for synthesis: DSP, LUT, FF, block RAM, cycles and interval, by layer, each with an interval.

An estimate, never a measurement: the factors and how wide the intervals are come from the published reports of `published.toml`. A tool's own
report replaces it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from isthmus.errors import IsthmusError
from isthmus.target import Estimate
from isthmus.targets.hls4ml import calibration
from isthmus.targets.hls4ml.calibration import QUANTITIES, Design, Factors, Work
from isthmus.targets.hls4ml.design import Layer
from isthmus.targets.hls4ml.stream import MAX_TOKENS, Edge, Stage, edges, fifo_depths, simulate

if TYPE_CHECKING:
    from isthmus.graph import QuantGraph
    from isthmus.profile import Profile

RESOURCES = ("dsp", "lut", "ff", "bram_18k")
BRAM_BITS = 18432
# A fifo or buffer below this lies in LUTs (shift registers), above it in block RAM: Vitis HLS's own default for streams.
SHIFT_REGISTER_BITS = 1024
BITS_A_LUT = 32  # SRL32
INSIDE = 0.8  # the share of the published designs, left out of the fit, that an interval holds
PAPER_LIMIT_MB = 34.0  # spec of the MedMNIST ensembles: float32 megabytes that become 8.5 MB of int8


@dataclass(frozen=True)
class LayerEstimate:
    """One layer with its folding."""

    name: str
    kind: str
    strategy: str
    reuse: int
    dsp: float
    lut: float
    ff: float
    bram_18k: float
    latency_cycles: int
    interval_cycles: int

    def to_json(self) -> dict[str, str | int]:
        """Counts as whole numbers."""
        strategy = self.strategy if self.kind in ("dense", "conv") else ""
        counts = {name: round(getattr(self, name)) for name in ("reuse", *RESOURCES, "latency_cycles", "interval_cycles")}
        return {"layer": self.name, "kind": self.kind, "strategy": strategy, **counts}


@dataclass(frozen=True)
class FpgaEstimate:
    """The whole design. `intervals`: quantity -> (low, high), where the published designs say that a result is likely to lie.

    `source` is the word that stands beside the figures.
    """

    part: str
    io_type: str
    clock_ns: float
    totals: Mapping[str, float]
    latency_cycles: int
    interval_cycles: int
    intervals: Mapping[str, tuple[float, float]]
    available: Mapping[str, float]
    layers: tuple[LayerEstimate, ...] = ()
    fifos: Mapping[str, int] = field(default_factory=dict)
    source: str = "estimated"

    @property
    def latency_us(self) -> float:
        return self.latency_cycles * self.clock_ns / 1000

    @property
    def frames_a_second(self) -> float:
        return 1e9 / (max(self.interval_cycles, 1) * self.clock_ns)

    def over(self) -> dict[str, tuple[float, float]]:
        """The resources that do not fit: name -> (needed, there)."""
        return {name: (self.totals[name], there) for name, there in self.available.items() if self.totals.get(name, 0) > there}

    @property
    def share(self) -> float:
        """Of the part, by the scarcest resource."""
        return max(self.totals[name] / max(there, 1) for name, there in self.available.items())

    @property
    def fits(self) -> bool:
        return not self.over()

    def to_json(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "part": self.part,
            "io_type": self.io_type,
            "clock_ns": self.clock_ns,
            "latency_cycles": self.latency_cycles,
            "interval_cycles": self.interval_cycles,
            "latency_us": round(self.latency_us, 3),
            **{name: round(value) for name, value in self.totals.items()},
            "intervals": {name: [round(low), round(high)] for name, (low, high) in self.intervals.items()},
            "available": {name: round(value) for name, value in self.available.items()},
            "fits": self.fits,
            "estimated_layers": [one.to_json() for one in self.layers],
        }

    def sentence(self) -> str:
        """One line for a note."""
        figures = [f"{self.totals[name]:.0f} {label}{_between(self.intervals.get(name))}" for name, label in LABELS.items()]
        cycles = f"{self.latency_cycles} cycles{_between(self.intervals.get('latency_cycles'))}, {self.latency_us:.1f} us at {self.clock_ns:g} ns"
        return f"{self.source}: {', '.join(figures)}; latency {cycles}; one sample every {self.interval_cycles} cycles"

    def as_shown(self) -> Estimate:
        """As `isthmus cost --on` shows it."""
        low, high = self.intervals.get("latency_cycles", (self.latency_cycles, self.latency_cycles))
        second = self.clock_ns * 1e-9
        counted = {name: float(round(value)) for name, value in self.totals.items()}
        within = ", ".join(f"{LABELS[name]} {low:.2f} to {high:.2f}" for name, (low, high) in ratios().items() if name in LABELS)
        basis = f"published synthesis reports of hls4ml projects; eight of ten of them, left out of the fit, have so many times the estimate: {within}"
        return Estimate(
            f"{self.part}, {self.io_type}, {self.clock_ns:g} ns{'' if self.fits else ', does not fit'}",
            (low * second, self.latency_cycles * second, high * second),
            counted | {"latency_cycles": float(self.latency_cycles), "interval_cycles": float(self.interval_cycles)},
            basis,
            layers=tuple(one.to_json() for one in self.layers),
        )


LABELS = {"dsp": "DSP", "lut": "LUT", "ff": "FF", "bram_18k": "BRAM halves of 18 Kb"}


def _between(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f" ({interval[0]:.0f} to {interval[1]:.0f})"


# ---- calibration
@functools.cache
def factors() -> Factors:
    return calibration.fit(calibration.published())


def left_out(design: Design) -> Factors:
    """The factors without the network of `design`."""
    return calibration.fit([other for other in calibration.published() if other.network != design.network])


def of_published(design: Design, fitted: Factors) -> dict[str, float]:
    """The published design as estimated: the same sums as for a graph, its fifos and what isthmus does not make left aside."""
    works = [work for work, _ in design.layers]
    found = {name: sum(_predicted(work, name, fitted, design) for work in works) for name in RESOURCES}
    cycles = [_predicted(work, "latency_cycles", fitted, design) for work in works]
    # In io_parallel each call hands its result over in a register.
    found["latency_cycles"] = sum(cycles) + len(cycles) if design.io_type == "io_parallel" else _streamed([work.kind for work in works], cycles)
    return found


def _predicted(work: Work, quantity: str, fitted: Factors, design: Design) -> float:
    return calibration.predicted(work, quantity, fitted, design.clock_ns, design.io_type, design.multipliers, design.tool)


def _streamed(kinds: Sequence[str], cycles: Sequence[float]) -> float:
    """Stages of a stream overlap; a dense layer begins when all has arrived."""
    dense = [count for kind, count in zip(kinds, cycles, strict=True) if kind == "dense"]
    others = [count for kind, count in zip(kinds, cycles, strict=True) if kind != "dense"]
    return max(others) + sum(dense) if others and max(others) > 2 * max([0, *dense]) else max([*others, *dense, 0]) + len(cycles)


def wanted_of(design: Design) -> dict[str, int]:
    """What the report says, without the layers that isthmus does not make."""
    if not design.whole:
        return {name: sum(measured[name] for _, measured in design.layers) for name in RESOURCES}
    overlapping = {"latency_cycles"} if design.io_type == "io_stream" else set()
    return {name: design.total[name] - (0 if name in overlapping else design.elsewhere.get(name, 0)) for name in QUANTITIES}


@functools.cache
def ratios() -> Mapping[str, tuple[float, float]]:
    """published / estimated, the quantiles that hold `INSIDE` of the designs, each estimated without its own network."""
    found: dict[str, list[float]] = {}
    by_network = {design.network: left_out(design) for design in calibration.published()}
    for design in calibration.published():
        estimated = of_published(design, by_network[design.network])
        for name, wanted in wanted_of(design).items():
            if wanted > 0 and estimated[name] > 0:
                found.setdefault(name, []).append(wanted / estimated[name])
    tail = (1 - INSIDE) / 2
    return {name: (float(np.quantile(values, tail)), float(np.quantile(values, 1 - tail))) for name, values in found.items()}


# ---- a graph
def available_of(profile: Profile) -> dict[str, float]:
    """What the part has. Raises `IsthmusError` where the profile does not say."""
    missing = [name for name in ("lut", "ff", "dsp", "block_ram_bits") if not isinstance(profile.facts.get(name), int)]
    if missing:
        raise IsthmusError(f"profile {profile.name}: the estimate needs facts.{' and facts.'.join(missing)} (numbers)")
    facts = profile.facts
    return {"dsp": facts["dsp"], "lut": facts["lut"], "ff": facts["ff"], "bram_18k": facts["block_ram_bits"] // BRAM_BITS}


def layer_estimate(layer: Layer, clock_ns: float, io_type: str) -> LayerEstimate:
    """One layer with the folding it has."""
    work = layer.work
    known = {name: _layer_quantity(work, name, clock_ns, io_type) for name in QUANTITIES}
    cycles = round(known.pop("latency_cycles"))
    interval = cycles if io_type == "io_stream" else _parallel_interval(work)
    return LayerEstimate(layer.name, work.kind, work.strategy, work.reuse, **known, latency_cycles=cycles, interval_cycles=max(interval, 1))


def _parallel_interval(work: Work) -> int:
    return work.reuse * (work.pixels if work.kind == "conv" else 1) if work.kind in ("dense", "conv") else 1


@functools.lru_cache(maxsize=65536)
def _layer_quantity(work: Work, quantity: str, clock_ns: float, io_type: str) -> float:
    bare = replace(work, name="")
    if work.kind == "source":
        return float(work.pixels) if quantity == "latency_cycles" and io_type == "io_stream" else 0.0
    if work.kind == "buffer":
        # Never published: what its arrays hold, and two loops over all of it.
        bits = work.depth_pixels * work.in_bits
        in_bram = bits > SHIFT_REGISTER_BITS
        plain = {"bram_18k": -(-bits // BRAM_BITS) * in_bram, "lut": work.filters * work.in_bits * 4, "ff": work.filters * work.in_bits * 2}
        return float(work.pixels if quantity == "latency_cycles" else plain.get(quantity, 0))
    return calibration.predicted(bare, quantity, factors(), clock_ns, io_type)


def estimate(layers: Sequence[Layer], profile: Profile, io_type: str, clock_ns: float) -> FpgaEstimate:
    """The design that these layers make, with fifo depths from the cycle model where it streams."""
    part = str(profile.toolchain.get("part", profile.name))
    estimates = tuple(layer_estimate(layer, clock_ns, io_type) for layer in layers)
    totals = {name: sum(getattr(one, name) for one in estimates) for name in RESOURCES}
    fifos: dict[str, int] = {}
    if io_type == "io_stream":
        timed = [replace(layer.stage, cycles=pixel_cycles(layer, one), delay=_delay(layer, one)) for layer, one in zip(layers, estimates, strict=True)]
        depths, latency = stream_depths(timed)
        interval = max(one.latency_cycles for one in estimates)
        for name, amount in fifo_resources(layers, depths).items():
            totals[name] += amount
        fifos = named_depths(layers, depths)
    else:
        latency = sum(one.latency_cycles for one in estimates) + len(estimates)
        interval = max(one.interval_cycles for one in estimates)
    spread = ratios()
    values = {**totals, "latency_cycles": float(latency)}
    intervals = {name: (value * spread[name][0], value * spread[name][1]) for name, value in values.items() if name in spread}
    return FpgaEstimate(part, io_type, clock_ns, totals, latency, interval, intervals, available_of(profile), estimates, fifos)


def stream_depths(stages: Sequence[Stage]) -> tuple[dict[Edge, int], int]:
    """(fifo depths, cycles of one sample). A stream too long for the cycle model keeps whole tensors, which never deadlocks."""
    if sum(stage.count() for stage in stages) <= MAX_TOKENS:
        depths = fifo_depths(stages)
        return depths, simulate(stages, depths).cycles
    slowest = max(stage.count() * stage.cycles for stage in stages)
    return {edge: max(1, stages[edge[0]].tokens_out) for edge in edges(stages)}, slowest + sum(stage.delay for stage in stages)


def pixel_cycles(layer: Layer, one: LayerEstimate) -> int:
    """Cycles between two reads."""
    return max(1, round(one.latency_cycles / max(layer.work.pixels, 1))) if layer.work.kind == "conv" else 1


def _delay(layer: Layer, one: LayerEstimate) -> int:
    """Cycles from the last read to the first result: of a dense layer all of it, else a pixel."""
    if layer.work.kind == "dense":
        return max(1, one.latency_cycles)
    return pixel_cycles(layer, one) if layer.work.kind == "conv" else layer.stage.delay


def fifo_resources(layers: Sequence[Layer], depths: Mapping[Edge, int]) -> dict[str, float]:
    """What the fifos take: shift registers where they are small, block RAM where they are not."""
    found = {"lut": 0.0, "ff": 0.0, "bram_18k": 0.0}
    for edge in edges([layer.stage for layer in layers]):
        width = layers[edge[0]].work.filters * layers[edge[0]].work.out_bits
        depth = depths[edge]
        found["ff"] += 12
        if width * depth <= SHIFT_REGISTER_BITS or depth <= BITS_A_LUT:
            found["lut"] += width * -(-depth // BITS_A_LUT) + 16
        else:
            found["bram_18k"] += -(-width // calibration.BRAM_WIDTH) * -(-depth // calibration.BRAM_DEPTH)
            found["lut"] += 40
    return found


def named_depths(layers: Sequence[Layer], depths: Mapping[Edge, int]) -> dict[str, int]:
    """By layer that writes: the deepest of its fifos, as hls4ml gives its copies one depth."""
    found: dict[str, int] = {}
    for edge, depth in depths.items():
        name = layers[edge[0]].name
        found[name] = max(depth, found.get(name, 0))
    return found


# ---- the budget of the paper
def budget(graph: QuantGraph, profile: Profile) -> dict[str, Any]:
    """Spec of the MedMNIST ensembles: whether weights, biases, scales and activations fit the on-chip memory, and the paper's own rule.

    `paper_rule`: the float32 weights are at most 34 MB (8.5 MB as int8), whatever the board; it forgets everything but the weights.
    """
    there = profile.facts.get("on_chip_bytes")
    if not isinstance(there, int):
        raise IsthmusError(f"profile {profile.name}: the budget needs facts.on_chip_bytes (a number)")
    weights = sum(node.weight.size for node in graph.nodes if node.weight is not None)
    biases = sum(node.bias.size for node in graph.nodes if node.bias is not None)
    scales = sum(node.weight_scale.size for node in graph.nodes if node.weight_scale is not None)
    batch = graph.inputs[0].shape[0] if graph.inputs else 1
    # Two live tensors of one sample: what a layer reads and what it writes.
    live = [
        sum(graph.tensors[name].size for name in (*node.inputs, *node.outputs) if graph.tensors[name].is_quantised) // batch
        for node in graph.nodes
        if node.kind == "int8"
    ]
    needed = weights + 4 * biases + 4 * scales + max(live, default=0)
    fp32_mb = 4 * (weights + biases) / 2**20  # as the paper's tables count
    fits, rule = bool(needed <= there), bool(fp32_mb <= PAPER_LIMIT_MB)
    return {"needed_bytes": int(needed), "on_chip_bytes": there, "memory_fits": fits, "fp32_mb": fp32_mb, "paper_rule": rule}
