# SPDX-License-Identifier: Apache-2.0
"""`isthmus select` on the MedMNIST paper's own tables (benchmarks/data/medmnist_ensembles.csv) against what the paper chose.

    python benchmarks/select_papers.py [--json]

Exit code 1 where a pick differs. The paper's radar works on unrounded figures, so an area within 1e-3 of the largest counts as the largest.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from isthmus.candidates import candidates_of, read_table
from isthmus.console import grid
from isthmus.select import OVERALL, Candidate, Ranking, Selection, recomputed, select

TABLE = Path(__file__).parent / "data" / "medmnist_ensembles.csv"
BUDGET = {"size_mb": 34.0}  # 8.5 MB of on-chip memory at a quarter of float32
# Candidates on all three fronts, tables 5 to 7 (those of the DNNs are shading, confirmed by the sizes of F and F').
Q = {
    "Path": {
        "CNN": "A_B4_C2_C3 A_C2",
        "DNN": "Dense121_MobNetV2 MobNetV2_MobV3",
        "HYBRID": "Dense121_Res50_C2_C3 MobNetV2_MobV3_C2_D2 MobNetV2_B2",
    },
    "OrganA": {
        "CNN": "C3_D3 B1_C1",
        "DNN": "Dense121_Res50_EffB0 Dense121_EffB0 MobNetV2_MobV3_EffB0 MobNetV2_MobV3",
        "HYBRID": "EffB0_Dense121_D3 EffB0_Dense121_C4 MobV2_MobV3_C2 MobV2_C2",
    },
    "OCT": {
        "CNN": "C3_D3 C2_D2 B3_C2",
        "DNN": "MobNetV2_Dense121_Res50 MobNetV2_Res50 MobNetV2_MobV3",
        "HYBRID": "MobNetV2_C3_D2 MobNetV2_D2 MobNetV2_C2",
    },
}
SIZES = {"Path": (7, 5), "OrganA": (10, 5), "OCT": (9, 7)}
# The radar's best of each kind and of all: without a budget, and within it.
BEST = {
    "Path": (
        {"CNN": "A_C2", "DNN": "Dense121_MobNetV2", "HYBRID": "MobNetV2_MobV3_C2_D2", OVERALL: "MobNetV2_MobV3_C2_D2"},
        {"CNN": "A_C2", "DNN": "MobNetV2_MobV3", "HYBRID": "MobNetV2_MobV3_C2_D2", OVERALL: "MobNetV2_MobV3_C2_D2"},
    ),
    "OrganA": (
        {"CNN": "C3_D3", "DNN": "Dense121_EffB0", "HYBRID": "EffB0_Dense121_C4", OVERALL: "EffB0_Dense121_C4"},
        {"CNN": "C3_D3", "DNN": "MobNetV2_MobV3", "HYBRID": "MobV2_C2", OVERALL: "MobV2_C2"},
    ),
    "OCT": (
        {"CNN": "C2_D2", "DNN": "MobNetV2_Dense121_Res50", "HYBRID": "MobNetV2_D2", OVERALL: "C2_D2"},
        {"CNN": "C2_D2", "DNN": "MobNetV2_MobV3", "HYBRID": "MobNetV2_D2", OVERALL: "C2_D2"},
    ),
}


@dataclass(frozen=True)
class Check:
    """One thing the paper says: `found` is what `select` gives, the alternatives within the tolerance included."""

    dataset: str
    what: str
    published: str
    found: str
    agrees: bool


def selections(corrected: bool = False) -> dict[str, tuple[Sequence[Candidate], Selection]]:
    """By data set; `corrected`: an ensemble's costs are the sums and maxima of its members, not what the paper prints."""
    results = {}
    for dataset, rows in read_table(TABLE).datasets.items():
        candidates = candidates_of(rows, include_singles=False)
        if corrected:
            candidates = recomputed(candidates, {row.name: row for row in rows if row.is_single})
        results[dataset] = candidates, select(candidates, budget=BUDGET)
    return results


def misprints(tolerances: Mapping[str, float]) -> list[tuple[str, str, str, float, float]]:
    """(data set, ensemble, cost, printed, from its members) where the two differ by more than rounding."""
    found = []
    for dataset, rows in read_table(TABLE).datasets.items():
        ensembles = candidates_of(rows, include_singles=False)
        for printed, summed in zip(ensembles, recomputed(ensembles, {row.name: row for row in rows if row.is_single}), strict=True):
            for cost, tolerance in tolerances.items():
                if abs(printed.costs[cost] - summed.costs[cost]) > tolerance:
                    found.append((dataset, printed.name, cost, printed.costs[cost], round(summed.costs[cost], 3)))
    return found


def checks() -> Iterator[Check]:
    """Everything the paper picks, from its own tables."""
    for dataset, (_, selection) in selections().items():
        for kind, names in Q[dataset].items():
            found = selection.kinds[kind].q
            yield Check(dataset, f"on every front, {kind}", ", ".join(names.split()), ", ".join(found), set(found) == set(names.split()))
        assert selection.within is not None
        sizes = len(selection.f.areas), len(selection.within.areas)
        yield Check(dataset, "sizes of F and F'", str(SIZES[dataset]), str(sizes), sizes == SIZES[dataset])
        for label, ranking, best in zip(("F", "F'"), (selection.f, selection.within), BEST[dataset], strict=True):
            for kind, name in best.items():
                yield Check(dataset, f"best of {label}, {kind}", name, _near(ranking, kind), name in ranking.tied[kind])


def _near(ranking: Ranking, kind: str) -> str:
    return " ~ ".join(f"{name} {ranking.areas[name]:.5f}" for name in ranking.tied[kind])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = list(checks())
    different = [check for check in found if not check.agrees]
    printed_wrong = misprints({"size_mb": 0.015, "flops_m": 0.0015, "time_s": 0.5})
    corrected = selections(corrected=True)
    changes = [
        (dataset, kind, before.kinds[kind].q, corrected[dataset][1].kinds[kind].q)
        for dataset, (_, before) in selections().items()
        for kind in before.kinds
        if set(before.kinds[kind].q) != set(corrected[dataset][1].kinds[kind].q)
    ]
    if arguments.json:
        print(json.dumps({"checks": [asdict(check) for check in found], "misprints": printed_wrong, "changes": changes}, indent=1))
        return 1 if different else 0
    print(
        grid(
            ["data set", "what", "the paper", "isthmus select", "agrees"],
            [[c.dataset, c.what, c.published, c.found, "yes" if c.agrees else "NO"] for c in found],
        )
    )
    print(f"\n{len(found) - len(different)} of {len(found)} picks agree.\n")
    print(
        grid(
            ["data set", "ensemble", "cost", "printed", "sum or maximum of its members"],
            [[d, name, cost, f"{printed:g}", f"{summed:g}"] for d, name, cost, printed, summed in printed_wrong],
        )
    )
    for dataset, kind, before, after in changes:
        print(f"\nWith these corrected, {kind} of {dataset} on every front: {', '.join(after)} (printed: {', '.join(before)}).")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
