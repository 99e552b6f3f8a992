# SPDX-License-Identifier: Apache-2.0
"""The page of `isthmus sensitivity`: a drawing and the table behind it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from isthmus.report import page
from isthmus.report.charts import Axis, drawing
from isthmus.report.markup import Html, element, join
from isthmus.report.parts import Column, section, table

WIDTH, ROW, TOP, NAMES = 640.0, 24.0, 8.0, 176.0
LONGEST_NAME = 24  # characters that fit into NAMES


def render_sensitivity(model: str, result: Mapping[str, Any]) -> str:
    """One self-contained page out of `Sensitivity.to_json()`."""
    layers, metric = result["layers"], result["metric"]
    key, unit = ("sqnr_db", "dB") if metric == "sqnr" else ("top1", "top-1" if result["labelled"] else "agreement with float")
    header = element("header", element("h1", model), element("p", f"What each of {len(layers)} layers costs in int8, on {result['samples']} samples"))
    legend = "Dot: this layer alone in int8, the others float. Ring: this layer alone float, the others int8. Further left is worse for a dot; a ring far"
    parts = [
        (
            "Drawing",
            section(
                "drawing",
                "Most sensitive first",
                element("p", f"{legend} right of the line (all int8) is a layer worth keeping float."),
                _chart(result, key, unit),
            ),
        ),
        ("Layers", section("layers", "The figures", _table(result))),
    ]
    return page(f"{model}: sensitivity", header, parts, "Made by isthmus. This page loads nothing and runs no script.")


def _chart(result: Mapping[str, Any], key: str, unit: str) -> Html:
    layers: Sequence[Mapping[str, Any]] = result["layers"]
    values = [side[key] for row in layers for side in (row["alone"], row["spared"]) if side is not None and side[key] is not None]
    everything = result["int8"][key]
    values += [everything] if everything is not None else []
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    room = (high - low) * 0.06 or 1.0
    x = Axis(low - room, high + room, NAMES, WIDTH - 6)
    height = TOP + ROW * len(layers) + 24
    ticks = [
        join(
            element("line", x1=x.at(tick), x2=x.at(tick), y1=TOP, y2=height - 20, class_="grid"),
            element("text", f"{tick:.6g}" + (f" {unit}" if unit == "dB" else ""), x=x.at(tick), y=height - 6, class_="middle"),
        )
        for tick in x.ticks(6)
    ]
    line = [element("line", x1=x.at(everything), x2=x.at(everything), y1=TOP, y2=height - 20, class_="reach")] if everything is not None else []
    rows = [_row(row, key, x, TOP + 12 + ROW * index) for index, row in enumerate(layers)]
    worst = ", ".join(f"{row['name']} {_shown(row['alone'], key)}" for row in layers[:5])
    return drawing(f"Sensitivity of each layer ({unit})", f"most sensitive: {worst}", [*ticks, *line, *rows], WIDTH, height)


def _row(row: Mapping[str, Any], key: str, x: Axis, y: float) -> Html:
    marks = []
    for side, drawn in ((row["spared"], "none"), (row["alone"], None)):
        if side is not None:
            place = x.at(side[key]) if side[key] is not None else x.end
            ring = {"fill": "none", "stroke": "currentColor", "stroke_width": 1.5} if drawn else {"class_": "dot"}
            marks.append(element("circle", element("title", f"{row['name']}: {_shown(side, key)}"), cx=place, cy=y, r=4.5, **ring))
    name = row["name"] if len(row["name"]) <= LONGEST_NAME else f"…{row['name'][1 - LONGEST_NAME :]}"
    return element("g", element("text", element("title", row["name"]), name, x=NAMES - 10, y=y + 4, class_="end"), marks)


def _table(result: Mapping[str, Any]) -> Html:
    top1 = "top-1" if result["labelled"] else "agreement"
    headings = ["SQNR, it alone int8", f"{top1}, it alone int8", "SQNR, it alone float", f"{top1}, it alone float"]
    rows = []
    for row in result["layers"]:
        rows.append([row["name"], *(_shown(side, key) for side in (row["alone"], row["spared"]) for key in ("sqnr_db", "top1"))])
    foot = ["all layers int8", _shown(result["int8"], "sqnr_db"), _shown(result["int8"], "top1"), "", ""]
    note = f"{top1} of the float model: {result['float_top1']:.4f}" if result["labelled"] else "agreement: share of samples with the float model's decision"
    return table(note, [Column("layer"), *(Column(heading, numeric=True) for heading in headings)], rows, foot, name="layer-sensitivity")


def _shown(side: Mapping[str, Any] | None, key: str) -> str:
    if side is None:
        return ""
    value = side[key]
    if value is None or not math.isfinite(value):
        return "exact"
    return f"{value:.1f} dB" if key == "sqnr_db" else f"{value:.4f}"
