# SPDX-License-Identifier: Apache-2.0
"""Scales: of an activation from its range, of a weight from its values. Always float32, finite and positive."""

from __future__ import annotations

import math

import numpy as np

from isthmus.errors import IsthmusError
from isthmus.export.draft import Step, Weight
from isthmus.recipe import Recipe

# -128 stays unused in weights: TensorFlow Lite's specification asks for it, and |w| <= 127 keeps the negative of a weight a weight.
WEIGHT_LIMIT = 127
BIAS_LIMIT = 2**30  # half of int32: the other half is for the sum of products
SMALLEST_RANGE = 2.0**-40  # below it a tensor counts as constant zero: scales multiply, and their product must stay a normal float32
DEFAULT_SCALE = 2.0**-7  # for a tensor that is always zero: any scale is right


def step_from_range(low: float, high: float, scheme: str) -> Step:
    """Scale and zero point of an activation that lies in [low, high]; zero is always representable. Raises `IsthmusError` on a range
    that is not finite. "power_of_two" takes the smallest 2^-n that clips nothing.
    """
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise IsthmusError(f"its range [{low}, {high}] cannot be quantised; calibrate with data on which the model stays finite")
    low, high = min(low, 0.0), max(high, 0.0)
    if high - low < SMALLEST_RANGE:
        return Step(DEFAULT_SCALE, 0)
    if scheme == "asymmetric":
        scale = float(np.float32((high - low) / 255))
        return Step(scale, int(np.clip(round(-128 - low / scale), -128, 127)))
    if scheme == "symmetric":
        return Step(float(np.float32(max(-low, high) / 127)), 0)
    return Step(power_of_two_above(max(high / 127, -low / 128)), 0)


def power_of_two_above(value: float) -> float:
    """The smallest power of two that is at least `value`; exact, unlike ceil(log2())."""
    mantissa, exponent = math.frexp(value)
    return math.ldexp(1.0, exponent - 1 if mantissa == 0.5 else exponent)


def is_power_of_two(scale: float) -> bool:
    return math.isfinite(scale) and scale > 0 and math.frexp(scale)[0] == 0.5


def quantise_weight(weight: np.ndarray, axis: int, recipe: Recipe, bias: np.ndarray | None = None, input_scale: float = 1.0) -> Weight:
    """int8 in [-127, 127] (or the fewer steps of `recipe.weight_bits`), per tensor or per output channel (`axis`) as the recipe says.

    Where a bias would not fit int32 at scale input x weight (a channel whose weights are nearly zero), the weight's scale is widened
    until it does. Power-of-two scales are the better of two neighbours by squared error.
    """
    rows = np.moveaxis(np.asarray(weight, np.float64), axis, 0).reshape(weight.shape[axis], -1)
    if not recipe.per_channel:
        rows = rows.reshape(1, -1)
    limit = min(WEIGHT_LIMIT, 2 ** (recipe.weight_bits - 1) - 1)
    peak = np.abs(rows).max(axis=1, initial=0.0)
    scale = peak / limit
    if recipe.scheme == "power_of_two":
        scale = np.array([_better_power(row, step, limit) for row, step in zip(rows, scale, strict=True)])
    usable = scale[peak > SMALLEST_RANGE]
    scale = np.where(peak > SMALLEST_RANGE, scale, usable.max() if usable.size else DEFAULT_SCALE)
    if bias is not None:
        floor = np.abs(np.asarray(bias, np.float64)) / (input_scale * BIAS_LIMIT)
        floor = floor if recipe.per_channel else floor.max(initial=0.0, keepdims=True)
        if recipe.scheme == "power_of_two":
            floor = np.array([power_of_two_above(least) if least > 0 else 0.0 for least in floor])
        scale = np.maximum(scale, floor)
    scale = scale.astype(np.float32)
    shape = [1] * weight.ndim
    shape[axis] = scale.size
    steps = np.rint(np.asarray(weight, np.float64) / scale.astype(np.float64).reshape(shape if scale.size > 1 else ()))
    return Weight(np.clip(steps, -limit, limit).astype(np.int8), scale)


def _better_power(row: np.ndarray, scale: float, limit: int) -> float:
    """The power of two that clips nothing, or half of it where clipping a few large weights costs less than the coarser steps."""
    if scale <= 0:
        return 0.0
    above = power_of_two_above(scale)
    return min((above, above / 2), key=lambda step: float(np.square(np.clip(np.rint(row / step), -limit, limit) * step - row).sum()))
