# SPDX-License-Identifier: Apache-2.0
"""Constants behind a DequantizeLinear as the reader of the form takes them: the weight and bias of a layer, checked against its input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from isthmus.errors import Problem
from isthmus.form_values import is_power_of_two, name_of, short
from isthmus.kernels import conv_like_weight
from isthmus.spec import TensorSpec

ACCUMULATOR_LIMIT = 2**31 - 1


@dataclass(frozen=True)
class Held:
    """A constant behind a DequantizeLinear: real = (values - zero) * scale, `scale` and `zero` with one number or one along `axis`."""

    name: str
    values: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    axis: int
    reader: ir.Node

    @property
    def real(self) -> np.ndarray:
        """float32, as ONNX dequantises it."""
        scale, zero = (array.reshape(self._along(array)) for array in (self.scale, self.zero.astype(np.int64)))
        real: np.ndarray = (self.values.astype(np.int64) - zero).astype(np.float32) * scale
        return real

    def _along(self, array: np.ndarray) -> list[int]:
        shape = [1] * self.values.ndim
        if array.size > 1:
            shape[self.axis] = array.size
        return shape


@dataclass(frozen=True)
class Layer:
    """What a layer's constants are read against: its bias by name, its output axis in the weight, its input, its attributes, the recipe's scheme."""

    node: ir.Node
    bias: str
    label: str
    weight_axis: int
    source: TensorSpec
    attributes: Mapping[str, Any]
    scheme: str


Weights = tuple[np.ndarray, np.ndarray, np.ndarray | None]  # weight, its scales one an output channel or one, bias


def read_weights(layer: Layer, constants: Mapping[str, Held]) -> Weights | Problem:
    """Weight, scale and bias of a layer, or the first rule that they break."""
    node, axis = layer.node, layer.weight_axis
    held = constants.get(name_of(node.inputs[1])) if len(node.inputs) > 1 and node.inputs[1] is not None else None
    if held is None or held.values.dtype != np.int8 or held.zero.any():
        found = f"{node.op_type} has no int8 constant behind a DequantizeLinear with zero point 0"
        return Problem(layer.label, "weight", found, "store the weight as int8 behind a DequantizeLinear")
    weight = held.values
    channels = weight.shape[axis] if weight.ndim > axis else 0
    if held.scale.size not in (1, channels) or (held.scale.size > 1 and held.axis != axis) or (node.op_type == "MatMul" and weight.ndim != 2):
        found = f"{held.scale.size} scales along axis {held.axis} for a weight of shape {list(weight.shape)}"
        return Problem(layer.label, "weight", found, f"give one, or one an output channel (axis {axis})")
    if layer.scheme == "power_of_two" and not all(is_power_of_two(float(step)) for step in held.scale.reshape(-1)):
        return Problem(layer.label, "scheme", "a weight scale that is not a power of two", "round it to 2^-n, or use another scheme")
    if problem := _kernel_problem(layer, weight):
        return problem
    group = layer.attributes["group"] if node.op_type == "ConvTranspose" else 1
    scale = held.scale.reshape(-1)
    scale = np.tile(scale, group) if scale.size > 1 else scale  # ConvTranspose's groups share the scales along axis 1
    bias: np.ndarray | None = None
    if layer.bias:
        found_bias = _bias(layer, constants.get(layer.bias), channels * group, scale)
        if isinstance(found_bias, Problem):
            return found_bias
        bias = found_bias
    rows = conv_like_weight(weight, group) if node.op_type == "ConvTranspose" else np.moveaxis(weight, axis, 0)
    worst = _worst_accumulator(rows, bias, int(layer.source.zero_point or 0))
    if worst > ACCUMULATOR_LIMIT:
        found = f"a sum can reach {worst}, int32 ends at {ACCUMULATOR_LIMIT}"
        return Problem(layer.label, "accumulator-overflow", found, "split the layer or use smaller weights")
    return weight, scale, bias


def _kernel_problem(layer: Layer, weight: np.ndarray) -> Problem | None:
    op = layer.node.op_type
    if op not in ("Conv", "ConvTranspose"):
        return None
    transposed, group, depth = op == "ConvTranspose", layer.attributes["group"], layer.source.shape[1]
    fits = weight.shape[0] == depth and depth % group == 0 if transposed else weight.shape[1] * group == depth and weight.shape[0] % group == 0
    if list(weight.shape[2:]) == layer.attributes["kernel_shape"] and fits:
        return None
    found = f"a weight of shape {list(weight.shape)} for {depth} channels in {group} groups"
    return Problem(layer.label, "weight", found, "give [in, out/group, *kernel]" if transposed else "give [out, in/group, *kernel]")


def _bias(layer: Layer, held: Held | None, channels: int, weight_scale: np.ndarray) -> np.ndarray | Problem:
    if held is None or held.values.dtype != np.int32 or held.values.size != channels or held.values.shape[-1:] != (channels,) or held.zero.any():
        found = f"the bias is not {channels} int32 constants behind a DequantizeLinear"
        return Problem(layer.label, "bias", found, "store it as int32 with scale input x weight")
    expected = np.float32(layer.source.scale or 0) * weight_scale.astype(np.float32)
    if held.scale.size not in (1, channels) or not np.allclose(held.scale, expected, rtol=1e-6, atol=0):
        found = f"the bias has scale {short(held.scale)}, expected {short(expected)}"
        return Problem(layer.label, "bias", found, "use scale input x weight")
    return held.values.reshape(-1)


def _worst_accumulator(rows: np.ndarray, bias: np.ndarray | None, zero_point: int) -> int:
    """The largest magnitude a sum of products and bias can reach for any int8 input; `rows` [out, ...]."""
    sums = np.abs(rows.astype(np.int64)).sum(axis=tuple(range(1, rows.ndim))) * max(127 - zero_point, 128 + zero_point)
    if bias is not None:
        sums = sums + np.abs(bias.astype(np.int64))
    return int(sums.max(initial=0))
