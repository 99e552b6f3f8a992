# SPDX-License-Identifier: Apache-2.0
"""`LintRow`: what a target says of one layer of a graph, from the graph alone, and the sums over layers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class LintRow:
    """One layer as a target would run it. `runs` names its arithmetic ("int8", "float"); `macs` of one run; `reformats` the changes of type at its
    inputs and outputs; `why` and `fix` are sentences, empty where there is nothing to say."""

    node: str
    op: str
    runs: str
    macs: int
    reformats: int
    why: str = ""
    fix: str = ""


@dataclass(frozen=True)
class LintTotals:
    layers: int
    int8_layers: int
    macs: int
    int8_macs: int
    reformats: int


def totals(rows: Iterable[LintRow]) -> LintTotals:
    """Sums; `layers` counts those with MACs."""
    listed = list(rows)
    multiplying = [row for row in listed if row.macs]
    inside = [row for row in multiplying if row.runs == "int8"]
    reformats = sum(row.reformats for row in listed)
    return LintTotals(len(multiplying), len(inside), sum(row.macs for row in multiplying), sum(row.macs for row in inside), reformats)
