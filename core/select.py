# SPDX-License-Identifier: Apache-2.0
"""Which candidate to deploy: Pareto fronts of performance against each cost, joined; then the weighted area of a radar chart. numpy only.

Stage 1, for each kind of candidate by itself: one front of (performance, cost) for each cost, and `q` = those on every front. Stage 2, over all
kinds: each candidate of `q` is a polygon whose corners are its metrics and the complements of its costs; the largest area wins. A budget takes
what is too large out of `q` and ranks what is left anew, because maxima and means are those of the set that is ranked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from isthmus.errors import IsthmusError

METRICS = ("wS", "wP", "BA", "AUC")
COSTS = ("size_mb", "flops_m", "time_s")
LONGEST = ("time_s", "time_ms", "latency_ms")  # members run side by side: the slowest decides; every other cost adds up
TIE_TOLERANCE = 1e-3  # in area: metrics with three decimals decide no more than that
MAX_SUBSET_OF = 16
OVERALL = "overall"


@dataclass(frozen=True)
class Candidate:
    """A model, or an ensemble of `members`. Larger metrics are better, smaller costs.

    `rank` orders candidates whose rounded metrics are equal, where the unrounded order is known (1 is the best), else None.
    """

    name: str
    kind: str
    metrics: Mapping[str, float]
    costs: Mapping[str, float]
    members: tuple[str, ...] = ()
    rank: int | None = None

    @property
    def is_single(self) -> bool:
        return len(self.members) < 2


@dataclass(frozen=True)
class KindSelection:
    """One kind: `fronts` by cost, `q` on all of them, `u` on any, in the order of the table."""

    fronts: Mapping[str, tuple[str, ...]]
    q: tuple[str, ...]
    u: tuple[str, ...]


@dataclass(frozen=True)
class Ranking:
    """A set by area, the largest first; `best` by kind, and `OVERALL`; `tied`: all whose area is within the tolerance of that best."""

    areas: Mapping[str, float]
    best: Mapping[str, str]
    tied: Mapping[str, tuple[str, ...]]
    radii: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class Selection:
    """`f`: the ranking of all that passed stage 1; `within`: of those of them that the budget allows, None where none was given."""

    performance: str
    metrics: tuple[str, ...]
    costs: tuple[str, ...]
    kinds: Mapping[str, KindSelection]
    f: Ranking
    budget: Mapping[str, float] = field(default_factory=dict)
    within: Ranking | None = None

    @property
    def choice(self) -> str:
        """The best within the budget; of all where there is none."""
        return (self.within or self.f).best[OVERALL]

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"choice": self.choice}


def select(
    candidates: Sequence[Candidate],
    *,
    performance: str = METRICS[0],
    metrics: Sequence[str] = METRICS,
    costs: Sequence[str] = COSTS,
    budget: Mapping[str, float] | None = None,
    weighted: bool = True,
    tolerance: float = TIE_TOLERANCE,
) -> Selection:
    """Both stages. Raises `IsthmusError` where there is nothing to choose from, a figure is missing, or the budget allows none."""
    limits = dict(budget or {})
    _check(candidates, [performance, *metrics], [*costs, *limits])
    kinds = {}
    for kind in dict.fromkeys(candidate.kind for candidate in candidates):
        kinds[kind] = select_kind([candidate for candidate in candidates if candidate.kind == kind], performance, costs)
    passed = {name for selection in kinds.values() for name in selection.q}
    chosen = [candidate for candidate in candidates if candidate.name in passed]
    if not chosen:
        raise IsthmusError(f"no candidate is on every front of {performance} against {', '.join(costs)}: choose fewer costs (--costs)")
    f = rank(chosen, metrics, costs, weighted, tolerance)
    within = None
    if limits:
        small = [candidate for candidate in chosen if all(candidate.costs[cost] <= limit for cost, limit in limits.items())]
        if not small:
            raise IsthmusError(_nothing_fits(candidates, chosen, limits))
        within = rank(small, metrics, costs, weighted, tolerance)
    return Selection(performance, tuple(metrics), tuple(costs), kinds, f, limits, within)


def _nothing_fits(candidates: Sequence[Candidate], chosen: Sequence[Candidate], limits: Mapping[str, float]) -> str:
    asked = ", ".join(f"{cost} <= {limit:g}" for cost, limit in limits.items())
    least = ", ".join(f"{cost} {min(candidate.costs[cost] for candidate in chosen):g}" for cost in limits)
    fitting = [candidate.name for candidate in candidates if all(candidate.costs[cost] <= limit for cost, limit in limits.items())]
    advice = "raise it, or add smaller candidates"
    if fitting:
        advice = f"{', '.join(fitting[:3])}{' and others' if len(fitting) > 3 else ''} would fit and did not pass: raise it, or choose fewer --costs"
    return f"no candidate fits the budget ({asked}): the smallest that passed the fronts have {least}; {advice}"


# ---- stage 1
def select_kind(candidates: Sequence[Candidate], performance: str, costs: Sequence[str]) -> KindSelection:
    """Fronts, what they share, and what lies on any."""
    level = _levels(candidates, performance)
    masks = {cost: pareto_front(level, np.array([candidate.costs[cost] for candidate in candidates])) for cost in costs}
    fronts = {cost: tuple(c.name for c, kept in zip(candidates, mask, strict=True) if kept) for cost, mask in masks.items()}
    on_all, on_any = np.logical_and.reduce(list(masks.values())), np.logical_or.reduce(list(masks.values()))
    names = [candidate.name for candidate in candidates]
    return KindSelection(fronts, tuple(np.array(names, object)[on_all]), tuple(np.array(names, object)[on_any]))


def pareto_front(performance: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """Mask of what nothing dominates: nothing is at least as good in both and better in one. Equal pairs stay together."""
    front = np.zeros(len(cost), bool)
    cheapest = math.inf
    for level in np.unique(performance)[::-1]:
        at_level = performance == level
        least = cost[at_level].min()
        if least < cheapest:
            front |= at_level & (cost == least)
            cheapest = least
    return front


def _levels(candidates: Sequence[Candidate], performance: str) -> np.ndarray:
    """Performance as whole numbers, the larger the better; equal figures are told apart by rank where every candidate has one."""
    ranked = all(candidate.rank is not None for candidate in candidates)
    keys = [(candidate.metrics[performance], -(candidate.rank or 0) if ranked else 0) for candidate in candidates]
    order = {key: position for position, key in enumerate(sorted(set(keys)))}
    return np.array([order[key] for key in keys])


# ---- stage 2
def rank(candidates: Sequence[Candidate], metrics: Sequence[str], costs: Sequence[str], weighted: bool = True, tolerance: float = TIE_TOLERANCE) -> Ranking:
    """By radar area, the largest first; on equal areas the table's order."""
    radii = radar_radii(candidates, metrics, costs, weighted)
    areas = radar_areas(radii)
    order = np.argsort(-areas, kind="stable")
    ordered = {candidates[index].name: float(areas[index]) for index in order}
    best, tied = {}, {}
    for kind in (OVERALL, *dict.fromkeys(candidate.kind for candidate in candidates)):
        names = [candidates[index].name for index in order if kind in (OVERALL, candidates[index].kind)]
        best[kind] = names[0]
        tied[kind] = tuple(name for name in names if ordered[name] >= ordered[names[0]] - tolerance)
    return Ranking(ordered, best, tied, {candidates[index].name: tuple(map(float, radii[index])) for index in order})


def radar_radii(candidates: Sequence[Candidate], metrics: Sequence[str], costs: Sequence[str], weighted: bool = True) -> np.ndarray:
    """One row a candidate: its metrics as they are, then 1 - w * cost / max(cost), with w = 1 / mean(cost), or 1 where not weighted.

    Mean and maximum are those of `candidates`. Raises `IsthmusError` where a corner would lie beyond the centre, or a metric is no share.
    """
    columns = [np.array([candidate.metrics[name] for candidate in candidates]) for name in metrics]
    for name, column in zip(metrics, columns, strict=True):
        if column.min() < 0 or column.max() > 1:
            worst = column.max() if column.max() > 1 else column.min()
            raise IsthmusError(f"metric {name!r} reaches {worst:g}, and a corner of the radar is a share: give metrics between 0 and 1")
    for name in costs:
        column = np.array([candidate.costs[name] for candidate in candidates])
        largest, mean = column.max(), column.mean()
        share = column / largest if largest > 0 else np.zeros(len(column))
        weight = 1.0 / mean if weighted and mean > 0 else 1.0
        if weight * share.max() > 1:
            raise IsthmusError(f"cost {name!r} has the mean {mean:g}, and the weighted radar divides by it: give it in a smaller unit, or pass --unweighted")
        columns.append(1 - weight * share)
    return np.stack(columns, axis=1)


def radar_areas(radii: np.ndarray) -> np.ndarray:
    """Area of each polygon, by the shoelace formula on its corners."""
    count = radii.shape[1]
    if count < 3:
        raise IsthmusError(f"a radar of {count} corners has no area: give at least three metrics and costs together")
    angles = 2 * np.pi * np.arange(count) / count
    x, y = radii * np.cos(angles), radii * np.sin(angles)
    areas: np.ndarray = np.abs((x * np.roll(y, -1, axis=1) - np.roll(x, -1, axis=1) * y).sum(axis=1)) / 2
    return areas


# ---- ensembles
def combined_cost(cost: str, values: Sequence[float], serial: bool = False) -> float:
    """Of an ensemble whose members have `values`: times run side by side (their maximum) unless `serial`; everything else adds up."""
    return max(values) if cost in LONGEST and not serial else math.fsum(values)


def recomputed(candidates: Sequence[Candidate], singles: Mapping[str, Candidate], serial: bool = False) -> list[Candidate]:
    """The same candidates with every ensemble's costs worked out from its members. Raises `IsthmusError` where a member is not among `singles`."""
    renewed = []
    for candidate in candidates:
        if candidate.is_single:
            renewed.append(candidate)
            continue
        missing = [member for member in candidate.members if member not in singles]
        if missing:
            raise IsthmusError(f"{candidate.name}: its member {missing[0]!r} is not in the table, so its costs cannot be worked out; add a row for it")
        costs = {}
        for cost in candidate.costs:
            unknown = [member for member in candidate.members if cost not in singles[member].costs]
            if unknown:
                raise IsthmusError(f"{candidate.name}: its member {unknown[0]!r} has no {cost}; give it one")
            costs[cost] = combined_cost(cost, [singles[member].costs[cost] for member in candidate.members], serial)
        renewed.append(Candidate(candidate.name, candidate.kind, candidate.metrics, costs, candidate.members, candidate.rank))
    return renewed


def subsets(names: Sequence[str], least: int = 1) -> list[tuple[str, ...]]:
    """Every subset of at least `least` names, in the order of the names. Raises `IsthmusError` beyond 16 of them: 65,536 subsets."""
    if len(names) > MAX_SUBSET_OF:
        raise IsthmusError(f"{len(names)} members have too many subsets: choose at most {MAX_SUBSET_OF} of them")
    masks = range(1, 1 << len(names))
    return [tuple(name for bit, name in enumerate(names) if mask >> bit & 1) for mask in masks if mask.bit_count() >= least]


def similar_ensembles(depths: Mapping[str, int], spread: int = 1) -> list[tuple[str, ...]]:
    """Ensembles of at least two members whose depths (numbers of layers) differ by at most `spread`."""
    return [chosen for chosen in subsets(list(depths), 2) if max(depths[name] for name in chosen) - min(depths[name] for name in chosen) <= spread]


def hybrid_ensembles(first: Sequence[str], second: Sequence[str]) -> list[tuple[str, ...]]:
    """At least one member of each side."""
    return [(*one, *other) for one in subsets(first) for other in subsets(second)]


def _check(candidates: Sequence[Candidate], metrics: Sequence[str], costs: Sequence[str]) -> None:
    if not costs:
        raise IsthmusError("no costs to choose by: name at least one (--costs)")
    if not candidates:
        raise IsthmusError("no candidates: a table needs at least one row (rows of single models count with --include-singles)")
    for candidate in candidates:
        if candidate.kind == OVERALL:
            raise IsthmusError(f"candidate {candidate.name!r} is of kind {OVERALL!r}, the name of the best of all kinds; call it otherwise")
        for what, needed, given in (("metric", metrics, candidate.metrics), ("cost", costs, candidate.costs)):
            missing = [name for name in needed if name not in given]
            if missing:
                raise IsthmusError(f"candidate {candidate.name!r} has no {what} {missing[0]!r}: it has {', '.join(given) or 'none'}")
