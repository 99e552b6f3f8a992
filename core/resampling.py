# SPDX-License-Identifier: Apache-2.0
"""Where the samples of a resized axis come from, in whole numbers: a coordinate is a fraction, so a tie is a tie on every engine."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

# half_pixel_symmetric differs from half_pixel only where the scale does not give whole extents, which the form refuses.
TRANSFORMS = ("half_pixel", "half_pixel_symmetric", "pytorch_half_pixel", "align_corners", "asymmetric")
NEAREST_MODES = ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")


class Taps(NamedTuple):
    """Output i is (x[lower[i]] * (denominator - weight[i]) + x[upper[i]] * weight[i]) / denominator."""

    lower: np.ndarray
    upper: np.ndarray
    weight: np.ndarray
    denominator: int


def _coordinates(source: int, target: int, transform: str) -> tuple[np.ndarray, int]:
    """The place of each output element on the input's axis: numerators and their denominator (ONNX Resize)."""
    index = np.arange(target, dtype=np.int64)
    if transform == "align_corners":
        return index * (source - 1), max(1, target - 1)
    if transform == "asymmetric":
        return index * source, target
    if transform == "pytorch_half_pixel" and target == 1:
        return index * 0, 1
    return (2 * index + 1) * source - target, 2 * target


def nearest_indices(source: int, target: int, transform: str, mode: str) -> np.ndarray:
    """The input element each output element copies."""
    place, unit = _coordinates(source, target, transform)
    rounded = {
        "floor": place // unit,
        "ceil": -(-place // unit),
        "round_prefer_ceil": (2 * place + unit) // (2 * unit),
        "round_prefer_floor": -((unit - 2 * place) // (2 * unit)),
    }[mode]
    inside: np.ndarray = np.clip(rounded, 0, source - 1)
    return inside


def linear_taps(source: int, target: int, transform: str) -> Taps:
    """The two input elements each output element lies between; beyond the ends, the end itself."""
    place, unit = _coordinates(source, target, transform)
    place = np.clip(place, 0, (source - 1) * unit)
    lower = place // unit
    weight = place - lower * unit
    shared = int(np.gcd.reduce(weight, initial=unit))
    return Taps(lower, np.minimum(lower + 1, source - 1), weight // shared, unit // shared)
