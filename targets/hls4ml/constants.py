# SPDX-License-Identifier: Apache-2.0
"""Products by constants, as HLS makes them in the Latency strategy: a shift, one addition, or a multiplier that equal constants share.

Counted from the weight files of published projects, the products that need a multiplier are, to the unit, the DSP blocks of their reports.
"""

from __future__ import annotations

import numpy as np

MULTIPLIED_DIGITS = 3  # a constant with this many signed digits gets a multiplier; with two it is one addition of shifted values


def signed_digits(values: np.ndarray) -> np.ndarray:
    """How many digits each integer has that are not 0, in canonical signed digit form (as few as any sum of signed powers of two has)."""
    magnitudes = np.abs(values.astype(np.int64))
    return np.bitwise_count(magnitudes ^ (3 * magnitudes))


def products_of(weights: np.ndarray) -> tuple[int, int]:
    """(multipliers, additions) for integer `weights` (terms, filters): equal constants of one term are one product."""
    digits = signed_digits(weights)
    multiplied = shifted = 0
    for row, counts in zip(weights, digits, strict=True):
        distinct, first = np.unique(row, return_index=True)
        found = counts[first][distinct != 0]
        multiplied += int((found >= MULTIPLIED_DIGITS).sum())
        shifted += int((found == MULTIPLIED_DIGITS - 1).sum())
    return multiplied, shifted
