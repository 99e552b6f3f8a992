# SPDX-License-Identifier: Apache-2.0
"""The range of one activation, out of the values it takes on calibration data. numpy only.

Minimum and maximum are exact. What needs the distribution (percentiles, squared error, the choice between two powers of two) reads a
histogram of a regular sample of the values, in memory that does not grow with the data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from isthmus.recipe import Recipe

BINS = 2048
VALUES_PER_RUN = 2**16  # of one tensor: more would not move a percentile, and counting them costs more than the model itself
NARROWEST_SHARE = 0.3  # of the full range: the "mse" observer looks no lower
POWERS_TRIED = 4


class Calibration(dict[str, tuple[float, float]]):
    """The range of each tensor by name; `warnings` are sentences on tensors without a usable one, `samples` how many were really used."""

    def __init__(self, ranges: Mapping[str, tuple[float, float]], warnings: Sequence[str], samples: int) -> None:
        super().__init__(ranges)
        self.warnings = tuple(warnings)
        self.samples = samples


@dataclass
class RangeCollector:
    """Sees every value twice: `measure` for the extremes, then `count` for the distribution inside them."""

    low: float = math.inf
    high: float = -math.inf
    counts: np.ndarray = field(default_factory=lambda: np.zeros(BINS, np.int64))

    def measure(self, values: np.ndarray) -> None:
        self.low = min(self.low, float(values.min()))
        self.high = max(self.high, float(values.max()))

    def count(self, values: np.ndarray) -> None:
        width = self.high - self.low
        if not 0 < width < math.inf:
            return
        flat = values.reshape(-1)
        stride = -(-flat.size // VALUES_PER_RUN) | 1  # odd: an even stride would see only some columns of an image
        seen = flat[::stride].astype(np.float64)
        position = np.clip(((seen - self.low) * (BINS / width)).astype(np.int64), 0, BINS - 1)
        self.counts += np.bincount(position, minlength=BINS)

    @property
    def centres(self) -> np.ndarray:
        return self.low + (np.arange(BINS) + 0.5) * ((self.high - self.low) / BINS)

    def range(self, recipe: Recipe) -> tuple[float, float]:
        """The range the recipe's observer takes. For "power_of_two" it is cut so that the scale which clips nothing in it is the chosen one."""
        low, high = self.low, self.high
        if not self.counts.any():
            return low, high
        if recipe.observer == "percentile":
            low, high = self._percentile(recipe.percentile)
            return low, high
        if recipe.scheme == "power_of_two":
            return self._best_power(POWERS_TRIED if recipe.observer == "mse" else 2)
        return self._best_share(recipe.scheme) if recipe.observer == "mse" else (low, high)

    def _percentile(self, percent: float) -> tuple[float, float]:
        """The range that holds `percent` of the values; what lies outside is cut on the sides that leave zero."""
        outside = 1.0 - percent / 100.0
        sides = (self.low < 0) + (self.high > 0)
        share = np.cumsum(self.counts) / self.counts.sum()
        cut = outside / max(sides, 1)
        edges = np.linspace(self.low, self.high, BINS + 1)
        low = float(edges[int(np.searchsorted(share, cut, side="right"))]) if self.low < 0 else self.low
        high = float(edges[min(int(np.searchsorted(share, 1.0 - cut)) + 1, BINS)]) if self.high > 0 else self.high
        return min(low, 0.0), max(high, 0.0)

    def _best_power(self, tried: int) -> tuple[float, float]:
        mantissa, exponent = math.frexp(max(self.high / 127, -self.low / 128))
        above = math.ldexp(1.0, exponent - 1 if mantissa == 0.5 else exponent)
        scale = min((above / 2**halvings for halvings in range(tried)), key=lambda step: self._error(step, 0.0))
        return max(self.low, -128 * scale), min(self.high, 127 * scale)

    def _best_share(self, scheme: str) -> tuple[float, float]:
        limits = np.linspace(1.0, NARROWEST_SHARE, 36) * max(-self.low, self.high)
        ranges = [(max(self.low, -float(limit)), min(self.high, float(limit))) for limit in limits]
        return min(ranges, key=lambda edges: self._error(*_grid(edges[0], edges[1], scheme)))

    def _error(self, scale: float, lowest: float) -> float:
        """Sum of squared errors of int8 with this scale; `lowest` is the real value of -128, 0.0 for zero point 0."""
        offset = lowest or -128 * scale
        rounded = np.clip(np.rint((self.centres - offset) / scale), 0, 255) * scale + offset
        return float((np.square(rounded - self.centres) * self.counts).sum())


def _grid(low: float, high: float, scheme: str) -> tuple[float, float]:
    low, high = min(low, 0.0), max(high, 0.0)
    if scheme == "asymmetric":
        scale = (high - low) / 255
        return scale, round(low / scale) * scale or -math.ulp(0.0)
    return max(-low, high) / 127, 0.0
