# SPDX-License-Identifier: Apache-2.0
"""Where TensorFlow Lite's arithmetic equals the integer reference, proven per node from its numbers; where not, by how much.

The engine is LiteRT with XNNPACK, its default: convolutions and fully connected layers requantise as round_half_even(float32(sum) *
float32(multiplier)) on every CPU, so with scales that are powers of two they are exact as long as the sum fits float32's 24 bits.
Averages divide by a count, which float32 cannot always hold: for those every sum that can occur is tried.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from isthmus.graph import QuantGraph, QuantNode
from isthmus.kernels import conv_like_weight

EXACT_FLOAT32 = 2**24
INT8_MIN, INT8_MAX = -128, 127
MAX_TRIED_CELLS = 2**16  # 256 x 256: what one pool can sum up to is tried, 16 million sums at most; a larger pool is declared
WEIGHTS = range(1, 128)


@dataclass(frozen=True)
class Difference:
    """What an operator may differ from the reference, in steps of its output, and why."""

    max_lsb: int
    why: str


_FLOAT32 = "XNNPACK multiplies the sum by a float32 scale; the reference by a float64 one: they part where the product lies next to a half"
_DETOUR = "worked out in float32, the reference in float64: they part where the result lies next to a half"
_FIXED_POINT = "XNNPACK adds with 21-bit fixed-point multipliers and rounds halves up; the reference rounds halves to even"
ROUNDING: Mapping[str, Difference] = {
    **{op: Difference(1, _FLOAT32) for op in ("Conv", "ConvTranspose", "Gemm", "MatMul", "Mul", "Requantize", "AveragePool", "GlobalAveragePool")},
    **{op: Difference(1, _DETOUR) for op in ("BatchMatMul", "ReduceMean", "ResizeLinear")},
    **{op: Difference(1, _FIXED_POINT) for op in ("Add", "Sub")},
    **{op: Difference(1, "TFLite's own kernel rounds by fixed-point multipliers") for op in ("LeakyRelu", "Sigmoid", "Tanh")},
    "QuantizeLinear": Difference(1, "behind a float island: another library's last bits decide where the value lies next to a half"),
}


def is_power_of_two(value: float) -> bool:
    return value > 0 and bool(np.isfinite(value)) and bool(np.frexp(value)[0] == 0.5)


def scale_and_zero(graph: QuantGraph, name: str) -> tuple[float, int]:
    spec = graph.tensors[name]
    return float(spec.scale or 1.0), int(spec.zero_point or 0)


def all_powers_of_two(graph: QuantGraph, node: QuantNode) -> bool:
    """The scales of everything that the node reads and writes."""
    return all(is_power_of_two(scale_and_zero(graph, name)[0]) for name in (*node.inputs, *node.outputs))


def weighted_is_exact(graph: QuantGraph, node: QuantNode) -> bool:
    """Conv, ConvTranspose, Gemm, MatMul: powers of two, and no sum beyond 2^24 that is not saturated anyway."""
    if node.kind == "float":
        return True  # it rounds nothing to int8: that is said of the quantiser behind it
    assert node.weight is not None and node.weight_scale is not None
    (source, zero), (target, target_zero) = scale_and_zero(graph, node.inputs[0]), scale_and_zero(graph, node.output)
    if not all(is_power_of_two(float(scale)) for scale in (source, target, *node.weight_scale)):
        return False
    weight = conv_like_weight(node.weight, int(node.attributes["group"])) if node.op == "ConvTranspose" else node.weight
    axis = 1 if node.op == "MatMul" else 0
    sums = np.abs(weight.astype(np.int64)).sum(axis=tuple(a for a in range(weight.ndim) if a != axis)) * max(127 - zero, 128 + zero)
    multiplier = np.resize(source * node.weight_scale.astype(np.float64) / target, len(sums))
    if node.bias is not None:
        sums = sums + np.abs(node.bias.astype(np.int64))
    saturated = EXACT_FLOAT32 * multiplier >= INT8_MAX + 1 + abs(target_zero)
    return bool(np.all((sums <= EXACT_FLOAT32) | saturated))


def ratio_is_whole(graph: QuantGraph, source: str, target: str) -> bool:
    """No rounding at all: the input's step is a whole power-of-two multiple of the output's."""
    ratio = scale_and_zero(graph, source)[0] / scale_and_zero(graph, target)[0]
    return is_power_of_two(ratio) and ratio >= 1


@dataclass(frozen=True)
class Average:
    """An average over `count` cells from (scale, zero point) to (scale, zero point)."""

    count: int
    source: tuple[float, int]
    target: tuple[float, int]

    def _sums(self) -> np.ndarray:
        zero = self.source[1]
        return np.arange(self.count * (INT8_MIN - zero), self.count * (INT8_MAX - zero) + 1, dtype=np.int64)

    def _reference(self, sums: np.ndarray) -> np.ndarray:
        ratio = self.source[0] / self.target[0]
        return np.clip(np.rint(sums.astype(np.float64) * ratio / self.count) + self.target[1], INT8_MIN, INT8_MAX)

    def _is_exact(self, product: np.ndarray, sums: np.ndarray, zero: int) -> bool:
        return bool(np.array_equal(np.clip(np.rint(product) + zero, INT8_MIN, INT8_MAX), self._reference(sums)))

    def _is_portable(self) -> bool:
        return is_power_of_two(self.source[0]) and is_power_of_two(self.target[0]) and self.count <= MAX_TRIED_CELLS

    def convolution_weight(self) -> int | None:
        """The constant weight of a depthwise convolution, its scale 1 / (count * weight), that rounds every sum as the reference does.

        A weight of 1 where the count is a power of two; else another may meet a kinder float32. None where no weight does, or the
        scales are no powers of two and none can.
        """
        return next((weight for weight in WEIGHTS if self._exact_by_convolution(weight)), None) if self._is_portable() else None

    def _exact_by_convolution(self, weight: int) -> bool:
        if self.count * weight * 255 > EXACT_FLOAT32:
            return False
        sums = self._sums()
        multiplier = np.float32(self.source[0]) * self.share(weight) / np.float32(self.target[0])
        return self._is_exact((sums * weight).astype(np.float32) * multiplier, sums, self.target[1])

    def share(self, weight: int) -> np.float32:
        """What one cell counts for, with that constant weight on every cell."""
        return np.float32(1.0) / np.float32(self.count * weight)

    def exact_by_mean(self) -> bool:
        """XNNPACK's MEAN: the zero points go into one float32 offset in front of the rounding (reduce-nd.c)."""
        if not self._is_portable() or self.count * 128 > EXACT_FLOAT32:
            return False
        sums = self._sums()
        scale = np.float32(self.source[0]) / np.float32(self.target[0]) * (np.float32(1.0) / np.float32(self.count))
        offset = np.float32(self.target[1]) - np.float32(self.source[1] * self.count) * scale
        quantised = (sums + self.source[1] * self.count).astype(np.float32)  # what XNNPACK adds up: q, not q - zero point
        return self._is_exact(quantised * scale + offset, sums, 0)

    def exact_in_float(self, weight: int) -> bool:
        """Float32 values, each times `weight`, summed, times `share`, quantised."""
        if not self._is_portable() or self.count * weight * 255 > EXACT_FLOAT32:
            return False
        sums = self._sums()
        mean = ((sums * weight).astype(np.float32) * np.float32(self.source[0])) * self.share(weight)
        return self._is_exact(mean * (np.float32(1.0) / np.float32(self.target[0])), sums, self.target[1])
