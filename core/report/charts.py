# SPDX-License-Identifier: Apache-2.0
"""Latency drawn as inline SVG: distribution, course over time, and all profiles on one axis. Colours and fonts come from the style sheet."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from isthmus.measurement import Measurement
from isthmus.report.figures import duration, time_unit, whole
from isthmus.report.markup import Html, element, join

WIDTH, HEIGHT = 440.0, 236.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 12.0, 50.0, 36.0
BINS = 48
COLUMNS = 160
MARKS = ((50.0, "p50"), (90.0, "p90"), (99.0, "p99"))


class Axis:
    """Values to drawing units, linear or logarithmic, with ticks at round numbers."""

    def __init__(self, low: float, high: float, start: float, end: float, logarithmic: bool = False) -> None:
        self.logarithmic = logarithmic
        self.low, self.high = low, high if high > low else low + max(abs(low) * 0.01, 1.0)
        self.start, self.end = start, end

    def at(self, value: float) -> float:
        """The place of a value; one beyond an end is drawn at that end."""
        value = min(max(value, self.low), self.high)
        low, high, value = (math.log(v) for v in (self.low, self.high, value)) if self.logarithmic else (self.low, self.high, value)
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, wanted: int = 5) -> list[float]:
        if self.logarithmic:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            factors = (1,) if self.high / self.low > 1000 else (1, 2, 5)
            return [factor * 10.0**decade for decade in decades for factor in factors if self.low <= factor * 10.0**decade <= self.high]
        span = (self.high - self.low) / wanted
        power = 10.0 ** math.floor(math.log10(span))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= span * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [index * step for index in range(first, math.floor(self.high / step + 1e-9) + 1)]


def histogram(profile: str, measurement: Measurement) -> Html:
    """How often which latency occurred, with p50, p90 and p99 marked. The slowest samples beyond the axis are counted in words."""
    samples = measurement.samples_ns
    low, high = _drawn_range(measurement)
    logarithmic = low > 0 and high / low > 20
    x = Axis(low, high, LEFT, WIDTH - RIGHT, logarithmic)
    edges = np.geomspace(low, x.high, BINS + 1) if logarithmic else np.linspace(low, x.high, BINS + 1)
    counts, _ = np.histogram(samples, edges)
    y = Axis(0, counts.max(initial=1) * 1.1, HEIGHT - BOTTOM, TOP)
    bars = [
        element(
            "rect",
            element("title", f"{whole(int(count))} samples from {duration(first)} to {duration(second)}"),
            x=x.at(first),
            y=y.at(count),
            width=max(x.at(second) - x.at(first) - 0.6, 0.4),
            height=y.start - y.at(count),
        )
        for count, first, second in zip(counts, edges[:-1], edges[1:], strict=True)
        if count
    ]
    beyond = int(np.count_nonzero(samples > x.high))
    described = f"{whole(measurement.count)} samples; " + ", ".join(f"{name} {duration(measurement.percentile_ns(p))}" for p, name in MARKS)
    tail = element("text", f"+ {whole(beyond)} slower, up to {duration(int(samples.max()))} →", x=WIDTH - RIGHT, y=TOP + 12, class_="end") if beyond else None
    label = "latency, logarithmic" if logarithmic else "latency"
    body = [_y_counts(y), element("g", bars, class_="bars"), _marks(measurement, x), _x_ticks(x, label), tail]
    return drawing(f"Latency histogram of {profile}", described, body)


def timeline(profile: str, measurement: Measurement) -> Html:
    """The samples in the order they were taken: the range of each slice, and its median as a line."""
    samples = measurement.samples_ns
    _, high = _drawn_range(measurement)
    elapsed = np.cumsum(samples, dtype=np.float64)
    x = Axis(0, float(elapsed[-1]), LEFT, WIDTH - RIGHT)
    y = Axis(0, high * 1.05, HEIGHT - BOTTOM, 14)
    slices = np.array_split(np.arange(samples.size), min(COLUMNS, samples.size))
    width = max((WIDTH - RIGHT - LEFT) / len(slices) - 0.3, 0.6)
    bars, line = [], []
    for part in slices:
        values, centre = samples[part], x.at(float(elapsed[part[len(part) // 2]]))
        top, bottom = y.at(float(values.max())), y.at(float(values.min()))
        bars.append(element("rect", x=centre - width / 2, y=top, width=width, height=max(bottom - top, 0.8)))
        line.append(f"{centre:.1f},{y.at(float(np.median(values))):.1f}")
    beyond = int(np.count_nonzero(samples > y.high))
    described = f"{whole(measurement.count)} samples over {duration(float(elapsed[-1]))} in the engine"
    note = element("text", f"{whole(beyond)} reach above", x=WIDTH - RIGHT, y=11, class_="end") if beyond else None
    median = element("polyline", points=" ".join(line), class_="median")
    body = [_y_times(y), element("g", bars, class_="bars range"), median, _x_ticks(x, "time in the engine"), note]
    return drawing(f"Course of latency of {profile}", described, body)


def overview(measurements: Mapping[str, Measurement]) -> Html:
    """All profiles on one axis: p50 as a dot, a line to p99."""
    low = min(m.p50_ns for m in measurements.values()) / 1.6
    high = max(m.p99_ns for m in measurements.values()) * 1.6
    row = 42.0
    height = row * len(measurements) + 26
    x = Axis(max(low, 0.5), high, 4, WIDTH - 4, logarithmic=True)
    ticks = [
        join(
            element("line", x1=x.at(t), x2=x.at(t), y1=2, y2=height - 20, class_="grid"),
            element("text", re.sub(r"\.0+(?= )", "", duration(t)), x=x.at(t), y=height - 6, class_="middle"),
        )
        for t in x.ticks()
        if x.start + 16 < x.at(t) < x.end - 16
    ]
    rows = [_reach(profile, m, x, 16 + row * index) for index, (profile, m) in enumerate(measurements.items())]
    described = ", ".join(f"{profile}: {_in_words(m)}" for profile, m in measurements.items())
    return drawing("Latency of all measured profiles, logarithmic axis", described, [*ticks, *rows], WIDTH, height)


def _reach(profile: str, m: Measurement, x: Axis, y: float) -> Html:
    name = profile if len(profile) < 24 else profile[:22] + "…"
    return element(
        "g",
        element("text", element("tspan", name, class_="name"), f"  {_in_words(m)}", x=4, y=y),
        element("line", x1=x.at(m.p50_ns), x2=x.at(m.p99_ns), y1=y + 13, y2=y + 13, class_="reach"),
        element("line", x1=x.at(m.p99_ns), x2=x.at(m.p99_ns), y1=y + 8, y2=y + 18, class_="reach"),
        element("circle", cx=x.at(m.p50_ns), cy=y + 13, r=4.5, class_="dot"),
    )


def _in_words(m: Measurement) -> str:
    return f"p50 {duration(m.p50_ns)}, p99 {duration(m.p99_ns)}" + ("" if m.valid else " (not valid)")


def share_bar(share: float) -> Html:
    """A bar for a table cell; the number stands beside it, so it is hidden from screen readers."""
    return element(
        "svg",
        element("rect", x=0, y=0, width=100, height=8, class_="track"),
        element("rect", x=0, y=0, width=max(share * 100, 0.5 if share else 0.0), height=8, class_="fill"),
        viewBox="0 0 100 8",
        preserveAspectRatio="none",
        class_="share",
        aria_hidden="true",
    )


def _drawn_range(measurement: Measurement) -> tuple[float, float]:
    """From the fastest sample to a little beyond p99; to the slowest where that is near."""
    low, slowest = float(measurement.samples_ns.min()), float(measurement.samples_ns.max())
    reach = max(measurement.p99_ns * 1.2, measurement.p50_ns * 1.5)
    high = slowest if slowest <= reach * 1.25 else reach
    return low, max(high, low * 1.02, low + 1)


def _marks(measurement: Measurement, x: Axis) -> Html:
    """One row of text a mark, so that near percentiles do not write over each other."""
    marks = []
    for row, (percentile, name) in enumerate(MARKS):
        value = measurement.percentile_ns(percentile)
        place, height = x.at(value), 12 + row * 14.0
        right = place > WIDTH * 0.66
        text = f"{name} {duration(value)}" + ("" if measurement.supports(percentile) else " (too few samples)")
        marks.append(
            element(
                "g",
                element("line", x1=place, x2=place, y1=height - 8, y2=HEIGHT - BOTTOM),
                element("text", text, x=place + (-5 if right else 5), y=height, class_="end" if right else None),
                class_=f"mark {name}",
            )
        )
    return join(marks)


def _x_ticks(axis: Axis, label: str) -> Html:
    divisor, unit = time_unit(axis.high)
    ticks = axis.ticks()
    # Round numbers at most: a tick of 0.5 in a row of 0, 0.5, 1 needs one digit, one of 25 none.
    drawn = [
        join(
            element("line", x1=axis.at(t), x2=axis.at(t), y1=HEIGHT - BOTTOM, y2=HEIGHT - BOTTOM + 4, class_="tick"),
            element("text", f"{t / divisor:.6g}", x=axis.at(t), y=HEIGHT - BOTTOM + 16, class_="middle"),
        )
        for t in ticks
    ]
    base = element("line", x1=axis.start, x2=axis.end, y1=HEIGHT - BOTTOM, y2=HEIGHT - BOTTOM, class_="tick")
    return join(base, drawn, element("text", f"{label} ({unit})", x=(axis.start + axis.end) / 2, y=HEIGHT - 4, class_="middle label"))


def _y_counts(axis: Axis) -> Html:
    return _y_ticks(axis, [(t, f"{t:,.0f}") for t in axis.ticks(4) if t == round(t)], "samples")


def _y_times(axis: Axis) -> Html:
    divisor, unit = time_unit(axis.high)
    return _y_ticks(axis, [(t, f"{t / divisor:.6g}") for t in axis.ticks(4)], unit)


def _y_ticks(axis: Axis, ticks: Sequence[tuple[float, str]], label: str) -> Html:
    drawn = [
        join(
            element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=axis.at(t), y2=axis.at(t), class_="grid") if t else None,
            element("text", text, x=LEFT - 6, y=axis.at(t) + 4, class_="end"),
        )
        for t, text in ticks
    ]
    return join(drawn, element("text", label, x=4, y=axis.end - 4 if axis.end > 30 else 11, class_="label"))


def drawing(title: str, described: str, body: Sequence[object], width: float = WIDTH, height: float = HEIGHT) -> Html:
    """An SVG with its title and a description for those who do not see it."""
    return element(
        "svg",
        element("title", title),
        element("desc", described),
        *body,
        viewBox=f"0 0 {width:g} {height:g}",
        role="img",
        aria_label=f"{title}: {described}",
        class_="chart",
    )
