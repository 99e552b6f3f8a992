# SPDX-License-Identifier: Apache-2.0
"""The pieces every section is made of: headings, tables, lists of facts, badges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from isthmus.report.figures import DASH
from isthmus.report.markup import Child, Html, element, join

# What a status means; the word itself is always shown, the colour only repeats it.
KINDS = {
    "done": "good",
    "passed": "good",
    "verified": "good",
    "failed": "bad",
    "not valid": "bad",
    "skipped": "warn",
    "planned": "warn",
    "needs the board": "warn",
}


@dataclass(frozen=True)
class Column:
    """A column's heading; `numeric` cells stand to the right in figures of equal width."""

    heading: Child
    numeric: bool = False
    wide: bool = False


def section(name: str, heading: str, *children: Child) -> Html:
    return element("section", element("h2", heading, id=f"{name}-heading"), *children, id=name, aria_labelledby=f"{name}-heading")


def table(
    caption: Child,
    columns: Sequence[Column],
    rows: Sequence[Sequence[Child]],
    foot: Sequence[Child] | None = None,
    name: str | None = None,
    cards: bool = False,
) -> Html:
    """A table in a frame of its own that scrolls sideways on a narrow screen; the first cell of a row is its heading.

    With `cards` each row becomes a card there instead: roles and labels are written out for it.
    """
    role = (lambda text: text) if cards else (lambda text: None)
    head = element("tr", [element("th", c.heading, scope="col", class_=_class(c), role=role("columnheader")) for c in columns], role=role("row"))
    body = [_row(columns, row, cards) for row in rows]
    end = element("tfoot", _row(columns, foot, cards)) if foot else None
    parts = [element("caption", caption), element("thead", head, role=role("rowgroup")), element("tbody", body, role=role("rowgroup")), end]
    inner = element("table", parts, id=name, class_="cards" if cards else None, role=role("table"))
    label = f"Table: {name.replace('-', ' ')}" if name else "Table"
    return element("div", inner, class_="scroll", role="region", aria_label=label, tabindex="0")


def _row(columns: Sequence[Column], cells: Sequence[Child], cards: bool) -> Html:
    first, *others = cells
    rest = [
        element("td", cell, class_=_class(column), role="cell" if cards else None, data_label=column.heading if cards else None)
        for column, cell in zip(columns[1:], others, strict=True)
    ]
    return element("tr", element("th", first, scope="row", class_=_class(columns[0]), role="rowheader" if cards else None), rest, role="row" if cards else None)


def _class(column: Column) -> str | None:
    return " ".join(name for name, set_ in (("number", column.numeric), ("wide", column.wide)) if set_) or None


def facts(pairs: Sequence[tuple[Child, Child]]) -> Html:
    """Names and values; a pair without a value is left out."""
    return element("dl", [element("div", element("dt", name), element("dd", value)) for name, value in pairs if value not in (None, "", [])], class_="facts")


def tiles(pairs: Sequence[tuple[Child, Child, Child]]) -> Html:
    """Key figures: value, name, remark."""
    cells = [element("div", element("dt", name), element("dd", value, element("small", remark)), class_="tile") for value, name, remark in pairs]
    return element("dl", cells, class_="tiles")


def badge(text: str) -> Html:
    return element("span", text, class_=f"badge {KINDS.get(text, '')}".strip())


def bullets(items: Sequence[Child]) -> Html | None:
    return element("ul", [element("li", item) for item in items]) if items else None


def code(text: object) -> Html:
    return element("code", text)


def fold(summary: Child, *children: Child) -> Html:
    return element("details", element("summary", summary), *children)


def stacked(main: Child, below: Child) -> Html:
    """Two lines in one cell, the second in small print."""
    return join(main, element("span", below, class_="below") if below else None)


def plain(value: object) -> str:
    """A value of a manifest as text: nothing for None, words for a list or table."""
    if value is None or value == "":
        return DASH
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(inner)}" for key, inner in value.items()) or DASH
    if isinstance(value, list | tuple):
        return ", ".join(plain(inner) for inner in value) or DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)
