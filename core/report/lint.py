# SPDX-License-Identifier: Apache-2.0
"""The lint table: which layers a board would run otherwise than in int8, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from isthmus.lint import LintRow, totals
from isthmus.report import figures
from isthmus.report.markup import Child, Html, element
from isthmus.report.parts import Column, section, table


def linted(found: Mapping[str, Sequence[LintRow]]) -> Html | None:
    """A table a profile, of the layers that have something to say; boards that say the same share one."""
    if not found:
        return None
    alike: dict[tuple[LintRow, ...], list[str]] = {}
    for profile, rows in found.items():
        alike.setdefault(tuple(rows), []).append(profile)
    intro = element("p", "Predicted from the graph alone, before any engine is built; what the board's compiler really did is the board's to tell.")
    return section("lint", "What runs in int8", intro, [_table(", ".join(profiles), rows) for rows, profiles in alike.items()])


def _table(profiles: str, rows: Sequence[LintRow]) -> Html:
    t = totals(rows)
    share = figures.percent(t.int8_macs / t.macs) if t.macs else figures.DASH
    said = [row for row in rows if row.why or row.fix or row.reformats or (row.runs != "int8" and row.macs)]
    caption = (
        f"{profiles}: {figures.whole(t.int8_macs)} of {figures.whole(t.macs)} MACs ({share}) in int8, {t.int8_layers} of {t.layers} layers,"
        f" {t.reformats} changes of type. {'The layers with a remark:' if said else 'No layer has a remark.'}"
    )
    columns = [Column("Layer"), Column("Operator"), Column("Runs in"), Column("MACs", numeric=True), Column("Changes of type", numeric=True)]
    body: list[Sequence[Child]] = [
        [row.node, row.op, row.runs, figures.whole(row.macs) if row.macs else figures.DASH, row.reformats or figures.DASH, row.why, row.fix] for row in said
    ]
    return table(caption, [*columns, Column("Why", wide=True), Column("What to change", wide=True)], body, name="lint-table", cards=True)
