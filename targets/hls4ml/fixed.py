# SPDX-License-Identifier: Apache-2.0
"""`Fixed`: one ap_fixed type of the HLS code, and the widths that hold a range of integers exactly. Nothing here rounds by accident."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from isthmus.graph import QuantNode


INT8_LOW, INT8_HIGH = -128, 127
# Narrower than this, hls4ml picks other multipliers (binary, ternary) whose result types it does not derive from ours.
SMALLEST_BITS = 3


def fraction_bits(scale: float) -> int:
    """n where scale == 2^-n. Raises `ValueError` where there is none."""
    mantissa, exponent = math.frexp(scale)
    if mantissa != 0.5:
        raise ValueError(f"scale {scale!r} is not a power of two")
    return 1 - exponent


@dataclass(frozen=True)
class Fixed:
    """`bits` in all, `fraction` of them behind the point (negative: steps larger than one). `rounds`: convergent rounding and saturation.

    AP_RND_CONV is round half to even, AP_SAT saturates at [-2^(bits-1), 2^(bits-1) - 1]: what the integer reference does. AP_SAT_SYM,
    which would lose -128, is never used. Without `rounds` the type has the defaults AP_TRN and AP_WRAP and must never need either.
    """

    bits: int
    fraction: int
    rounds: bool = False

    @property
    def integer(self) -> int:
        return self.bits - self.fraction

    def __str__(self) -> str:
        return f"ap_fixed<{self.bits},{self.integer}{',AP_RND_CONV,AP_SAT' if self.rounds else ''}>"


def holding(low: int, high: int, fraction: int) -> Fixed:
    """The narrowest exact type for the integers low..high in steps of 2^-fraction."""
    magnitude = max(high, -low - 1, 0)
    return Fixed(max(magnitude.bit_length() + 1, SMALLEST_BITS), fraction)


def widened(exact: Fixed, final: Fixed) -> Fixed:
    """`exact`, with sign bits in front where a rounding to `final` drops more bits than it has.

    The ap_fixed headers of the C simulation read the highest dropped bit at its place, even behind the sign: an assertion then ends
    the process.
    """
    return Fixed(max(exact.bits, exact.fraction - final.fraction + 1), exact.fraction, exact.rounds)


def activation_type(scale: float) -> Fixed:
    """The type of an int8 activation: eight bits, rounding and saturating as the form does."""
    return Fixed(8, fraction_bits(scale), rounds=True)


@dataclass(frozen=True)
class Weights:
    """Weights and bias of one layer on one common step each: integers, their types, and the accumulator that holds every partial sum.

    `values` keeps the shape of the form's weight; `bias` is int64 [out], zeros where the form has none.
    """

    values: np.ndarray
    bias: np.ndarray
    weight_type: Fixed
    bias_type: Fixed
    accumulator: Fixed


def exact_weights(node: QuantNode, input_scale: float) -> Weights:
    """Per-channel power-of-two scales are brought to the finest one (a shift, exact); widths follow from the weights themselves."""
    assert node.weight is not None and node.weight_scale is not None
    channel = 1 if node.op == "MatMul" else 0
    outputs = node.weight.shape[channel]
    fractions = np.array([fraction_bits(float(scale)) for scale in node.weight_scale.reshape(-1)])
    finest = int(fractions.max())
    shifts = np.broadcast_to(np.left_shift(1, finest - fractions), (outputs,)).astype(np.int64)
    along = [1] * node.weight.ndim
    along[channel] = outputs
    values = node.weight.astype(np.int64) * shifts.reshape(along)
    bias = np.zeros(outputs, np.int64) if node.bias is None else node.bias.astype(np.int64) * shifts
    fraction = fraction_bits(input_scale) + finest
    weight_type = holding(int(values.min()), int(values.max()), finest)
    return Weights(values, bias, weight_type, holding(int(bias.min()), int(bias.max()), fraction), _accumulator(values, bias, channel, fraction))


def _accumulator(values: np.ndarray, bias: np.ndarray, channel: int, fraction: int) -> Fixed:
    """Holds bias plus any partial sum of products, whichever order the strategy adds in: [sum of negative terms, sum of positive terms]."""
    rows = np.moveaxis(values, channel, 0).reshape(values.shape[channel], -1)
    products = np.stack([rows * INT8_LOW, rows * INT8_HIGH])
    high = np.maximum(products.max(axis=0), 0).sum(axis=1) + np.maximum(bias, 0)
    low = np.minimum(products.min(axis=0), 0).sum(axis=1) + np.minimum(bias, 0)
    return holding(int(low.min()), int(high.max()), fraction)


def sum_type(*scales: float) -> Fixed:
    """Holds the exact sum, and any difference, of int8 activations of these scales."""
    fractions = [fraction_bits(scale) for scale in scales]
    finest = max(fractions)
    steps = sum(1 << (finest - fraction) for fraction in fractions)
    return holding(INT8_LOW * steps, -INT8_LOW * steps - 1, finest)


def product_type(terms: int, first: float, second: float) -> Fixed:
    """Holds any sum of up to `terms` products of int8 activations of these two scales."""
    return holding(INT8_LOW * INT8_HIGH * terms, INT8_LOW * INT8_LOW * terms, fraction_bits(first) + fraction_bits(second))


def average_type(cells: int, input_scale: float, output_scale: float) -> Fixed:
    """The type in which hls4ml sums `cells` values and divides: `sum / count`, cut off, is rounded once more to the output.

    The cut keeps the rounding right where it leaves enough bits: v = sum * ratio / count is a multiple of 1 / (count * 2^m), so a v
    that is no tie is at least 1 / (2 * count * 2^m) away from one, and cutting off less than that cannot move it onto or across a tie.
    """
    source, target = fraction_bits(input_scale), fraction_bits(output_scale)
    guard = 1 + max(source - target, 0) + (cells - 1).bit_length()
    fraction = max(target + guard, source)
    total = holding(INT8_LOW * cells, INT8_HIGH * cells, source)
    return widened(Fixed(total.bits + fraction - source, fraction), activation_type(output_scale))
