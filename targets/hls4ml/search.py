# SPDX-License-Identifier: Apache-2.0
"""Strategy and reuse factor of every layer: the smallest latency whose estimate fits the part, or the smallest area that is fast enough."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from isthmus.errors import Problem, ProblemsError
from isthmus.profile import Profile, load_profile, profile_names
from isthmus.targets.hls4ml.design import Layer
from isthmus.targets.hls4ml.estimate import LABELS, RESOURCES, FpgaEstimate, LayerEstimate, available_of, estimate, layer_estimate
from isthmus.targets.hls4ml.folding import UNROLL_LIMIT, reuse_factors

Choice = Mapping[str, Any]  # hls4ml's: Strategy, ReuseFactor
# How much each resource counts when a layer chooses among its foldings: evenly, and each in turn as the scarce one.
WEIGHTINGS = (dict.fromkeys(RESOURCES, 1.0), *({name: 1.0 if name == scarce else 0.05 for name in RESOURCES} for scarce in RESOURCES))
EXCHANGE_RATES = tuple(10.0 ** (step / 4) for step in range(-8, 33))  # cycles that a whole part is worth, in io_parallel


@dataclass(frozen=True)
class Goal:
    """What is asked for: 0 is no bound."""

    max_latency_us: float = 0.0
    min_fps: float = 0.0

    def met_by(self, latency_us: float, frames_a_second: float) -> bool:
        return (not self.max_latency_us or latency_us <= self.max_latency_us) and (not self.min_fps or frames_a_second >= self.min_fps)

    @property
    def bounded(self) -> bool:
        return bool(self.max_latency_us or self.min_fps)


@dataclass(frozen=True)
class Configuration:
    """A folding by layer and what it is estimated to take. `share`: of the part, the scarcest resource."""

    choices: Mapping[str, Choice]
    estimate: FpgaEstimate

    @property
    def share(self) -> float:
        return self.estimate.share


def choices_of(layer: Layer) -> list[Choice]:
    """The foldings hls4ml computes rightly: fully unrolled with the weights in the logic, or a divisor of the terms with them in block RAM."""
    product = layer.product
    if product is None:
        return []
    found: list[Choice] = []
    if product.products <= UNROLL_LIMIT and not product.activations:
        found.append({"Strategy": "latency", "ReuseFactor": 1})
    if product.depthwise:
        return found or [{"Strategy": "latency", "ReuseFactor": 1}]
    smallest = 1 if product.activations else 2
    factors = [factor for factor in reuse_factors(product) if factor >= smallest and product.products // factor <= UNROLL_LIMIT]
    return found + [{"Strategy": "resource", "ReuseFactor": factor} for factor in factors]


def front(layers: Sequence[Layer], profile: Profile, io_type: str, clock_ns: float) -> list[Configuration]:
    """The Pareto front, fastest first: none of them is both slower and larger than another."""
    return merged(list(_configurations(layers, profile, io_type, clock_ns)))


def merged(configurations: Sequence[Configuration]) -> list[Configuration]:
    """Those that no other beats in both, fastest first."""
    return [configurations[place] for place in _pareto([(one.estimate.latency_cycles, one.share) for one in configurations])]


def rank(one: FpgaEstimate, goal: Goal) -> tuple[float, ...]:
    """Least is best: what fits before what does not; the smallest where there is a bound, which all of them keep, or where nothing fits; else the fastest."""
    if not one.fits:
        return 1.0, one.share
    return (0.0, one.share, one.latency_cycles) if goal.bounded else (0.0, one.latency_cycles, one.share)


def found(layers: Sequence[Layer], profile: Profile, io_type: str, clock_ns: float, goal: Goal) -> Configuration:
    """The one that `goal` asks for, as `chosen` from the front, but without the rest of it where the first that fits will do."""
    made: list[Configuration] = []
    for one in _configurations(layers, profile, io_type, clock_ns):
        made.append(one)
        # The stream was not simulated when they were put in order: the next two may still be a little faster.
        if not goal.bounded and sum(other.estimate.fits for other in made) > 2:
            break
    return chosen(made, goal, profile)


def _configurations(layers: Sequence[Layer], profile: Profile, io_type: str, clock_ns: float) -> Iterator[Configuration]:
    """What is on the front before the fifos are counted, fastest first."""
    available = available_of(profile)
    candidates = _candidates(layers, available, io_type, clock_ns)
    rough = [_rough(layers, picked, available, io_type, clock_ns) for picked in candidates]
    for place in _pareto(rough):
        yield configuration(layers, candidates[place], profile, io_type, clock_ns)


def configuration(layers: Sequence[Layer], picked: Sequence[Choice], profile: Profile, io_type: str, clock_ns: float) -> Configuration:
    """The estimate of one choice a layer, {} for layers without a folding."""
    folded = [layer.folded(choice) for layer, choice in zip(layers, picked, strict=True)]
    named = {layer.name: choice for layer, choice in zip(layers, picked, strict=True) if layer.product is not None}
    return Configuration(named, estimate(folded, profile, io_type, clock_ns))


def chosen(configurations: Sequence[Configuration], goal: Goal, profile: Profile) -> Configuration:
    """The one that is asked for. Raises `ProblemsError` saying what fails, by how much, and what would help, where a bound cannot be met.

    Without a bound and where none fits: the smallest, whose estimate says so. An estimate is no reason to leave out the C simulation.
    """
    fitting = [one for one in configurations if one.estimate.fits]
    if not fitting and not goal.bounded:
        return min(configurations, key=lambda one: one.share)
    if not fitting:
        raise ProblemsError("hls4ml", [too_large(min(configurations, key=lambda one: one.share), profile)])
    if not goal.bounded:
        return min(fitting, key=lambda one: (one.estimate.latency_cycles, one.share))
    fast = [one for one in fitting if goal.met_by(one.estimate.latency_us, one.estimate.frames_a_second)]
    if not fast:
        fastest = min(fitting, key=lambda one: one.estimate.latency_cycles).estimate
        wanted = " and ".join(
            [*([f"{goal.max_latency_us:g} us"] if goal.max_latency_us else []), *([f"{goal.min_fps:g} samples a second"] if goal.min_fps else [])]
        )
        speed = f"{fastest.latency_us:.1f} us, {fastest.frames_a_second:.0f} samples a second"
        fact = f"the fastest in {fastest.io_type} that fits {profile.board} is estimated at {speed}, not {wanted}"
        raise ProblemsError("hls4ml", [Problem("model", "too-slow", fact, "ask for less, use fewer channels, a shorter --set clock_ns, or a larger part")])
    return min(fast, key=lambda one: (one.share, one.estimate.latency_cycles))


# ---- candidates
def _candidates(layers: Sequence[Layer], available: Mapping[str, float], io_type: str, clock_ns: float) -> list[list[Choice]]:
    """One choice a layer, many times: as cheap as possible within a bound on the cycles of each, and by an exchange rate of cycles for area."""
    options = [[(choice, layer_estimate(layer.folded(choice), clock_ns, io_type)) for choice in choices_of(layer) or [{}]] for layer in layers]
    bounds = sorted({one.latency_cycles for tried in options if len(tried) > 1 for _, one in tried})
    found: dict[tuple[int, ...], list[Choice]] = {}
    for weighting in WEIGHTINGS:
        areas = [[_area(one, available, weighting) for _, one in tried] for tried in options]
        for bound in bounds or [1]:
            picked = [_cheapest(tried, area, bound) for tried, area in zip(options, areas, strict=True)]
            found.setdefault(tuple(picked), [tried[place][0] for tried, place in zip(options, picked, strict=True)])
        for rate in EXCHANGE_RATES if io_type == "io_parallel" else ():
            picked = [
                min(range(len(tried)), key=lambda place, tried=tried, area=area: tried[place][1].latency_cycles + rate * area[place])  # type: ignore[misc]
                for tried, area in zip(options, areas, strict=True)
            ]
            found.setdefault(tuple(picked), [tried[place][0] for tried, place in zip(options, picked, strict=True)])
    return list(found.values())


def _cheapest(tried: Sequence[tuple[Choice, LayerEstimate]], areas: Sequence[float], bound: int) -> int:
    """The place of the smallest that keeps the bound, else of the fastest."""
    within = [place for place, (_, one) in enumerate(tried) if one.latency_cycles <= bound]
    return min(within, key=lambda place: areas[place]) if within else min(range(len(tried)), key=lambda place: tried[place][1].latency_cycles)


def _area(one: LayerEstimate, available: Mapping[str, float], weighting: Mapping[str, float]) -> float:
    return sum(weighting[name] * getattr(one, name) / max(there, 1) for name, there in available.items())


def _rough(layers: Sequence[Layer], picked: Sequence[Choice], available: Mapping[str, float], io_type: str, clock_ns: float) -> tuple[float, float]:
    """(cycles, share of the part) without fifos."""
    ones = [layer_estimate(layer.folded(choice), clock_ns, io_type) for layer, choice in zip(layers, picked, strict=True)]
    share = max(sum(getattr(one, name) for one in ones) / max(there, 1) for name, there in available.items())
    if io_type == "io_parallel":
        return sum(one.latency_cycles for one in ones), share
    return max(one.latency_cycles for one in ones) + sum(one.latency_cycles for one in ones if one.kind == "dense"), share


def _pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """The places of the points that no other beats in both, by the first."""
    best, kept = float("inf"), []
    for place in sorted(range(len(points)), key=lambda place: points[place]):
        if points[place][1] < best:
            best = points[place][1]
            kept.append(place)
    return kept


# ---- nothing fits
def too_large(smallest: Configuration, profile: Profile) -> Problem:
    """Which resource fails, by how much, and what would help. `smallest` does not fit."""
    over = smallest.estimate.over()
    wanted = ", ".join(
        f"{LABELS[name]}: {needed:.0f} of {there:.0f} ({100 * (needed / max(there, 1) - 1):.0f} % too many)" for name, (needed, there) in over.items()
    )
    worst = max(over, key=lambda name: over[name][0] / max(over[name][1], 1))
    largest = max(smallest.estimate.layers, key=lambda one: float(getattr(one, worst)))
    share = (over[worst][1] / over[worst][0]) ** 0.5
    fact = f"even the smallest folding in {smallest.estimate.io_type}, with the largest reuse factors, is estimated not to fit {profile.board}: {wanted}"
    parts = _larger_parts(smallest, profile)
    fixes = [f"use about {100 * share:.0f} % of the channels (most is in {largest.name})"]
    fixes += [f"take a larger part ({', '.join(parts)})"] if parts else []
    return Problem("model", "too-large", fact, " or ".join(fixes))


def _larger_parts(smallest: Configuration, profile: Profile) -> list[str]:
    """Profiles of the same backend on which the configuration fits."""
    found = []
    for name in profile_names():
        other = load_profile(name)
        alike = other.target == profile.target and other.toolchain.get("backend") == profile.toolchain.get("backend")
        if alike and name != profile.name and replace(smallest.estimate, available=available_of(other)).fits:
            found.append(name)
    return found


def table(configurations: Sequence[Configuration]) -> list[str]:
    """The front as lines of a report, fastest first."""
    return [
        f"{one.estimate.io_type}, {one.estimate.latency_us:.1f} us, one sample every {one.estimate.interval_cycles} cycles, "
        + ", ".join(f"{one.estimate.totals[name]:.0f} {LABELS[name]}" for name in RESOURCES)
        + ("" if one.estimate.fits else " (does not fit)")
        for one in configurations
    ]
