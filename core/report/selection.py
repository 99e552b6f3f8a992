# SPDX-License-Identifier: Apache-2.0
"""The page of `isthmus select`: the fronts of each kind, the radar of the best, and the tables behind them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from isthmus.report import page
from isthmus.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, WIDTH, Axis, drawing
from isthmus.report.markup import Html, element, join
from isthmus.report.parts import Column, section, table
from isthmus.select import Candidate, Ranking, Selection

RADAR = 390.0
RADIUS = 140.0
RINGS = (0.25, 0.5, 0.75, 1.0)
# Told apart without colour: solid, dashed, dotted, dash and dot.
DASHES = (None, "6 3", "2 3", "8 3 2 3")
FIGURES_TOP = 14.0


def render_selection(title: str, results: Mapping[str, tuple[Sequence[Candidate], Selection]]) -> str:
    """One self-contained page; `results` by data set ("" where there is none): the candidates and what was chosen of them."""
    chosen = ", ".join(f"{dataset}: {selection.choice}" if dataset else selection.choice for dataset, (_, selection) in results.items())
    header = element("header", element("h1", title), element("p", f"The choice: {chosen}."))
    parts = []
    for number, (dataset, (candidates, selection)) in enumerate(results.items(), 1):
        parts.append((dataset or "Selection", _section(f"set-{number}", dataset or "Selection", candidates, selection)))
    return page(f"{title}: selection", header, parts, "Made by isthmus. This page loads nothing and runs no script.")


def _section(name: str, heading: str, candidates: Sequence[Candidate], selection: Selection) -> Html:
    blocks: list[object] = []
    for kind, found in selection.kinds.items():
        own = [candidate for candidate in candidates if candidate.kind == kind]
        charts = [element("figure", front_chart(own, selection.performance, cost, front)) for cost, front in found.fronts.items()]
        blocks.append(
            element("div", element("h3", f"{kind}: on every front {', '.join(found.q) or 'none'}"), element("div", charts, class_="pair"), class_="card")
        )
    rankings = [("All that are on every front", selection.f)]
    if selection.within is not None:
        limits = ", ".join(f"{cost} at most {limit:g}" for cost, limit in selection.budget.items())
        rankings.append((f"Within the budget ({limits})", selection.within))
    for title, ranking in rankings:
        corners = (*selection.metrics, *selection.costs)
        best = list(dict.fromkeys(ranking.best.values()))
        drawn = element("div", element("figure", radar_chart(best, ranking, corners)), _areas(ranking), class_="pair")
        blocks.append(element("div", element("h3", title), drawn, class_="card"))
    return section(name, heading, *blocks)


def front_chart(candidates: Sequence[Candidate], performance: str, cost: str, front: Sequence[str]) -> Html:
    """Every candidate as a point, performance upwards and cost to the right; those on the front are filled, and joined."""
    xs, ys = [candidate.costs[cost] for candidate in candidates], [candidate.metrics[performance] for candidate in candidates]
    x = Axis(*_room(xs), LEFT, WIDTH - RIGHT)
    y = Axis(*_room(ys), HEIGHT - BOTTOM, FIGURES_TOP)
    on_front = sorted((candidate for candidate in candidates if candidate.name in front), key=lambda candidate: candidate.costs[cost])
    line = " ".join(f"{x.at(candidate.costs[cost]):.1f},{y.at(candidate.metrics[performance]):.1f}" for candidate in on_front)
    points = []
    for candidate in candidates:
        words = f"{candidate.name}: {performance} {candidate.metrics[performance]:g}, {cost} {candidate.costs[cost]:g}"
        place = {"cx": x.at(candidate.costs[cost]), "cy": y.at(candidate.metrics[performance]), "r": 4.0}
        drawn = {"class_": "dot"} if candidate.name in front else {"fill": "none", "stroke": "currentColor", "stroke_width": 1.2}
        points.append(element("circle", element("title", words), **place, **drawn))
    described = ", ".join(candidate.name for candidate in on_front)
    body = [_grid(x, y), element("polyline", points=line, class_="median"), points, element("text", performance, x=4, y=11, class_="label")]
    axis = element("text", cost, x=(x.start + x.end) / 2, y=HEIGHT - 4, class_="middle label")
    return drawing(f"{performance} against {cost}", f"on the front: {described}", [*body, axis])


def radar_chart(names: Sequence[str], ranking: Ranking, corners: Sequence[str]) -> Html:
    """At most four polygons on one radar."""
    shown, centre = names[: len(DASHES)], RADAR / 2
    angles = [2 * math.pi * position / len(corners) for position in range(len(corners))]

    def points(radii: Sequence[float]) -> str:
        return " ".join(f"{centre + RADIUS * r * math.sin(a):.1f},{centre - RADIUS * r * math.cos(a):.1f}" for r, a in zip(radii, angles, strict=True))

    rings = [element("polygon", points=points([share] * len(corners)), fill="none", class_="grid") for share in RINGS]
    labels = []
    for corner, angle in zip(corners, angles, strict=True):
        sine, cosine = math.sin(angle), math.cos(angle)
        side = "middle" if abs(sine) < 0.2 else "end" if sine < 0 else None
        labels.append(element("text", corner, x=centre + (RADIUS + 9) * sine, y=centre - (RADIUS + 11) * cosine + 4, class_=side))
    polygons, legend = [], []
    for position, (name, dash) in enumerate(zip(shown, DASHES, strict=False)):
        look = {"fill": "none", "class_": "median", "stroke_dasharray": dash}
        polygons.append(element("polygon", element("title", f"{name}: area {ranking.areas[name]:.4f}"), points=points(ranking.radii[name]), **look))
        height = RADAR + 14 + 16 * position
        legend.append(element("line", x1=8, x2=40, y1=height - 4, y2=height - 4, **look))
        legend.append(element("text", f"{name}, area {ranking.areas[name]:.4f}", x=48, y=height))
    described = ", ".join(f"{name} {ranking.areas[name]:.4f}" for name in shown)
    return drawing("Radar of the best", described, [*rings, *labels, *polygons, *legend], RADAR, RADAR + 8 + 16 * len(shown))


def _areas(ranking: Ranking) -> Html:
    best = {name: [kind for kind, winner in ranking.best.items() if winner == name] for name in ranking.best.values()}
    rows = [[name, f"{area:.5f}", ", ".join(best.get(name, []))] for name, area in ranking.areas.items()]
    return table("Areas, the largest first", [Column("candidate"), Column("area", numeric=True), Column("best of")], rows)


def _grid(x: Axis, y: Axis) -> Html:
    across = [
        join(
            element("line", x1=x.at(tick), x2=x.at(tick), y1=y.end, y2=y.start, class_="grid"),
            element("text", f"{tick:.6g}", x=x.at(tick), y=y.start + 16, class_="middle"),
        )
        for tick in x.ticks()
    ]
    upwards = [
        join(
            element("line", x1=x.start, x2=x.end, y1=y.at(tick), y2=y.at(tick), class_="grid"),
            element("text", f"{tick:.6g}", x=x.start - 6, y=y.at(tick) + 4, class_="end"),
        )
        for tick in y.ticks(4)
    ]
    return join(across, upwards)


def _room(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = (high - low) * 0.05 or max(abs(high) * 0.05, 1e-6)
    return low - room, high + room
