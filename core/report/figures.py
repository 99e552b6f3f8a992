# SPDX-License-Identifier: Apache-2.0
"""Numbers as a reader wants them: with a unit, never rounded to something better than they are."""

from __future__ import annotations

import math
from collections.abc import Sequence

from isthmus.report.markup import Html, element, join

DASH = "–"
TIMES = ((1e9, "s"), (1e6, "ms"), (1e3, "µs"), (1.0, "ns"))


def duration(ns: float) -> str:
    """Three significant digits: 871 ns, 12.3 µs, 1.20 ms."""
    divisor, unit = time_unit(ns)
    return f"{significant(ns / divisor)} {unit}"


def time_unit(ns: float) -> tuple[float, str]:
    return next(((divisor, unit) for divisor, unit in TIMES if ns >= divisor), TIMES[-1])


def significant(value: float, digits: int = 3) -> str:
    """Fixed point with that many digits, zeros kept; whole where the number is larger."""
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(decimals, 12)}f}"


def size(count: int) -> str:
    if count < 1024:
        return f"{count} B"
    return f"{count / 1024:,.1f} KiB" if count < 1024**2 else f"{count / 1024**2:,.2f} MiB"


def whole(count: int) -> str:
    return f"{count:,}"


def short(count: float) -> str:
    """1,185,584 -> 1.19 M."""
    for divisor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= divisor:
            return f"{significant(count / divisor)} {unit}"
    return significant(count) if isinstance(count, float) else str(count)


def percent(share: float) -> str:
    """Cut, not rounded: 100 % is all of them."""
    if share == 1:
        return "100 %"
    return f"{math.floor(share * 100_000) / 1000:.3f} %"


def portion(share: float) -> str:
    """A part of a whole, to one decimal; what is there but small is not shown as nothing."""
    return "< 0.1 %" if 0 < share < 0.001 else f"{100 * share:.1f} %"


def threads(count: object) -> str:
    return f"{count} thread" if count == 1 else f"{count} threads"


def accuracy(share: float | None) -> str:
    return DASH if share is None else f"{share:.4f}"


def shape(extents: Sequence[int]) -> str:
    return " × ".join(str(extent) for extent in extents) or "scalar"


def scale(value: float | None) -> Html:
    """A power of two as one (2 to the -5), any other scale as a number."""
    if not value:
        return join(DASH)
    mantissa, exponent = math.frexp(value)
    if mantissa == 0.5:
        return join("2", element("sup", str(exponent - 1).replace("-", "−")))
    return join(f"{value:.6g}")
