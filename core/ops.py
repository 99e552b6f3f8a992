# SPDX-License-Identifier: Apache-2.0
"""The int8 operators: one row each, with its shape of constants, MAC rule and integer reference. What is not here is a float island.

A new operator is one row, one tiny model in `tests/models`, and a line in the table of each target that really has it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from isthmus import kernels, tables
from isthmus.spec import TensorSpec

if TYPE_CHECKING:
    from isthmus.graph import QuantNode

Tensors = Mapping[str, TensorSpec]
Integer = Callable[["QuantNode", Sequence[np.ndarray], Tensors], np.ndarray | list[np.ndarray]]


@dataclass(frozen=True)
class Op:
    """One int8 operator.

    - `weight_axis`: the output-channel axis of its constant weight in the ONNX operator; None where it has no weight.
    - `passes_scale`: output scale and zero point equal the input's (no arithmetic on values).
    - `fuses`: a Relu or Clip right behind it belongs to it (one rounding for both).
    - `macs`: multiply-accumulates for one run, from node and tensors.
    - `integer`: int8 inputs -> int8 output (a list where there are several). Any batch size: only the leading axis may differ from the specs.
    - `activations`: how many int8 tensors it reads, at its first inputs; None for any number.
    - `constants`: the positions of its constant inputs, beside a weight and its bias; their values end in `QuantNode.attributes`.
    - `takes_constants`: an int8 tensor it reads may be a "Constant", an initialiser behind a DequantizeLinear, where another is not.
    """

    name: str
    integer: Integer
    macs: Callable[[QuantNode, Tensors], int]
    weight_axis: int | None = None
    passes_scale: bool = False
    fuses: bool = False
    activations: int | None = 1
    constants: frozenset[int] = frozenset()
    takes_constants: bool = False


def row_name(op_type: str, given: Mapping[str, Any], activations: int) -> str:
    """The row of `OPS` that an ONNX operator is read as, whether there is one or not.

    Two operators have two rows, as engines treat them as two: MatMul of two activations is "BatchMatMul", Resize is "ResizeNearest" or
    "ResizeLinear". Three rows are no ONNX operators: "Requantize" (a quantiser right behind a dequantiser), "Silu" (x * Sigmoid(x)), and
    "Constant" (an int8 operand that is an initialiser, read through a DequantizeLinear).
    """
    if op_type == "MatMul" and activations == 2:
        return "BatchMatMul"
    if op_type == "Resize":
        return "ResizeLinear" if given.get("mode") == "linear" else "ResizeNearest"
    return op_type


def _no_macs(node: QuantNode, tensors: Tensors) -> int:
    """Nothing multiplied: pools and additions count as FLOPs, not as MACs."""
    return 0


def _weighted_macs(node: QuantNode, tensors: Tensors) -> int:
    """Outputs x weights that feed one output (Conv: in/groups x kernel; Gemm, MatMul: in)."""
    assert node.weight is not None
    filters = node.weight.shape[1 if node.op == "MatMul" else 0]
    return tensors[node.output].size * int(node.weight.size // filters)


def _transposed_macs(node: QuantNode, tensors: Tensors) -> int:
    """Every input element meets every weight of its channel."""
    assert node.weight is not None
    return tensors[node.inputs[0]].size * int(node.weight.size // node.weight.shape[0])


def _product_macs(node: QuantNode, tensors: Tensors) -> int:
    return tensors[node.output].size * tensors[node.inputs[0]].shape[-1]


def _scale(tensors: Tensors, name: str) -> float:
    return float(tensors[name].scale or 1.0)


def _zero(tensors: Tensors, name: str) -> int:
    return int(tensors[name].zero_point or 0)


def _multiplier(node: QuantNode, tensors: Tensors, channel_rank: int) -> np.ndarray:
    """input_scale * weight_scale / output_scale in float64, shaped to broadcast along the channels (`channel_rank` axes behind them)."""
    assert node.weight_scale is not None
    product = _scale(tensors, node.inputs[0]) * node.weight_scale.astype(np.float64) / _scale(tensors, node.output)
    return product.reshape(-1, *([1] * channel_rank)) if product.size > 1 else product.reshape(())


def _conv(node: QuantNode, inputs: Sequence[np.ndarray], tensors: Tensors) -> np.ndarray:
    assert node.weight is not None
    a = node.attributes
    total = kernels.conv_accumulate(
        inputs[0], _zero(tensors, node.inputs[0]), node.weight, node.bias, strides=a["strides"], pads=a["pads"], dilations=a["dilations"], group=a["group"]
    )
    return kernels.requantise(total, _multiplier(node, tensors, total.ndim - 2), _zero(tensors, node.output), node.clamp)


def _gemm(node: QuantNode, inputs: Sequence[np.ndarray], tensors: Tensors) -> np.ndarray:
    assert node.weight is not None
    weight = node.weight if node.op == "MatMul" else node.weight.T
    total = kernels.matmul_accumulate(inputs[0], _zero(tensors, node.inputs[0]), weight, node.bias)
    return kernels.requantise(total, _multiplier(node, tensors, 0), _zero(tensors, node.output), node.clamp)


def _conv_transpose(node: QuantNode, inputs: Sequence[np.ndarray], tensors: Tensors) -> np.ndarray:
    assert node.weight is not None
    a = node.attributes
    total = kernels.conv_transpose_accumulate(
        inputs[0],
        _zero(tensors, node.inputs[0]),
        node.weight,
        node.bias,
        tensors[node.output].shape[2:],
        strides=a["strides"],
        pads=a["pads"],
        dilations=a["dilations"],
        group=a["group"],
    )
    return kernels.requantise(total, _multiplier(node, tensors, total.ndim - 2), _zero(tensors, node.output), node.clamp)


def _batch_matmul(node: QuantNode, inputs: Sequence[np.ndarray], tensors: Tensors) -> np.ndarray:
    total = kernels.batch_matmul_accumulate(inputs[0], inputs[1], [_zero(tensors, name) for name in node.inputs])
    return kernels.requantise(total, _product_multiplier(node, tensors), _zero(tensors, node.output), node.clamp)


def _product_multiplier(node: QuantNode, tensors: Tensors) -> float:
    return _scale(tensors, node.inputs[0]) * _scale(tensors, node.inputs[1]) / _scale(tensors, node.output)


def _by_batch(operator: Integer) -> Integer:
    """Numpy's broadcasting pairs axes from the last one: an operand whose first axis is not the result's batch goes through one batch at a time."""

    def integer(node: QuantNode, inputs: Sequence[np.ndarray], tensors: Tensors) -> np.ndarray | list[np.ndarray]:
        shapes, out = [tensors[name].shape for name in node.inputs], tensors[node.output].shape
        times = len(inputs[0]) // shapes[0][0]
        if times == 1 or all(len(shape) == len(out) and shape[0] == out[0] for shape in shapes):
            return operator(node, inputs, tensors)
        parts = [operator(node, [np.split(x, times)[index] for x in inputs], tensors) for index in range(times)]
        return np.concatenate([np.asarray(part) for part in parts])

    return integer


def _add(node: QuantNode, inputs: Sequence[np.ndarray], tensors: Tensors) -> np.ndarray:
    out = _scale(tensors, node.output)
    real = [(x.astype(np.float64) - _zero(tensors, name)) * (_scale(tensors, name) / out) for x, name in zip(inputs, node.inputs, strict=True)]
    total = real[0] - real[1] if node.op == "Sub" else real[0] + real[1]
    return kernels.requantise(total, 1.0, _zero(tensors, node.output), node.clamp)


def _mul(node: QuantNode, inputs: Sequence[np.ndarray], tensors: Tensors) -> np.ndarray:
    a, b = (x.astype(np.float64) - _zero(tensors, name) for x, name in zip(inputs, node.inputs, strict=True))
    return kernels.requantise(a * b, _product_multiplier(node, tensors), _zero(tensors, node.output), node.clamp)


def _max_pool(node: QuantNode, inputs: Sequence[np.ndarray], tensors: Tensors) -> np.ndarray:
    a = node.attributes
    return kernels.max_pool(inputs[0], tensors[node.output].shape[2:], a["kernel_shape"], a["strides"], a["pads"], a["dilations"])


def _average_pool(node: QuantNode, inputs: Sequence[np.ndarray], tensors: Tensors) -> np.ndarray:
    a, x = node.attributes, inputs[0]
    if node.op == "GlobalAveragePool":
        cells = int(np.prod(x.shape[2:]))
        sums = x.sum(axis=tuple(range(2, x.ndim)), keepdims=True, dtype=np.int64) - cells * _zero(tensors, node.inputs[0])
        return _averaged(node, sums.astype(np.float64), cells, tensors)
    total, count = kernels.average_pool(
        x,
        _zero(tensors, node.inputs[0]),
        tensors[node.output].shape[2:],
        a["kernel_shape"],
        a["strides"],
        a["pads"],
        a["dilations"],
        bool(a["count_include_pad"]),
    )
    return _averaged(node, total, count, tensors)


def _reduce_mean(node: QuantNode, inputs: Sequence[np.ndarray], tensors: Tensors) -> np.ndarray:
    axes = tuple(node.attributes["axes"])
    values = inputs[0].astype(np.float64) - _zero(tensors, node.inputs[0])
    count = int(np.prod([values.shape[axis] for axis in axes]))
    return _averaged(node, values.sum(axis=axes, keepdims=bool(node.attributes["keepdims"])), count, tensors)


def _averaged(node: QuantNode, total: np.ndarray, count: np.ndarray | int, tensors: Tensors) -> np.ndarray:
    """The division comes last: sum * (sx / sy) is exact for powers of two, so a tie stays a tie."""
    ratio = _scale(tensors, node.inputs[0]) / _scale(tensors, node.output)
    return kernels.requantise(total * ratio / count, 1.0, _zero(tensors, node.output), node.clamp)


def _resize_nearest(node: QuantNode, inputs: Sequence[np.ndarray], tensors: Tensors) -> np.ndarray:
    a = node.attributes
    return kernels.resize_nearest(inputs[0], a["sizes"], a["coordinate_transformation_mode"], a["nearest_mode"])


def _resize_linear(node: QuantNode, inputs: Sequence[np.ndarray], tensors: Tensors) -> np.ndarray:
    a = node.attributes
    total, divisor = kernels.resize_linear(inputs[0], _zero(tensors, node.inputs[0]), a["sizes"], a["coordinate_transformation_mode"])
    return _averaged(node, total, divisor, tensors)


def _function(node: QuantNode, inputs: Sequence[np.ndarray], tensors: Tensors) -> np.ndarray:
    return tables.look_up(tables.table(node, tensors), inputs[0])


def _split(node: QuantNode, inputs: Sequence[np.ndarray], tensors: Tensors) -> list[np.ndarray]:
    ends = np.cumsum(node.attributes["sizes"])[:-1]
    return list(np.split(inputs[0], ends, axis=node.attributes["axis"]))


def _slice(node: QuantNode, inputs: Sequence[np.ndarray], tensors: Tensors) -> np.ndarray:
    a, cut = node.attributes, inputs[0]
    for axis, start, end, step in zip(a["axes"], a["starts"], a["ends"], a["steps"], strict=True):
        cut = np.take(cut, range(start, end, step), axis=axis)
    return cut


def _pad(node: QuantNode, inputs: Sequence[np.ndarray], tensors: Tensors) -> np.ndarray:
    pads, rank = node.attributes["pads"], inputs[0].ndim
    value = tensors[node.output].quantise(np.array(node.attributes["value"], np.float32))
    return np.pad(inputs[0], [(pads[axis], pads[axis + rank]) for axis in range(rank)], constant_values=value)


def _transpose(node: QuantNode, inputs: Sequence[np.ndarray], tensors: Tensors) -> np.ndarray:
    return inputs[0].transpose(node.attributes["perm"])


def _expand(node: QuantNode, inputs: Sequence[np.ndarray], tensors: Tensors) -> np.ndarray:
    return np.broadcast_to(inputs[0], (len(inputs[0]), *tensors[node.output].shape[1:]))


def _depth_to_space(node: QuantNode, inputs: Sequence[np.ndarray], tensors: Tensors) -> np.ndarray:
    return kernels.depth_to_space(inputs[0], node.attributes["blocksize"], node.attributes["mode"])


def _space_to_depth(node: QuantNode, inputs: Sequence[np.ndarray], tensors: Tensors) -> np.ndarray:
    return kernels.space_to_depth(inputs[0], node.attributes["blocksize"])


def _gather(node: QuantNode, inputs: Sequence[np.ndarray], tensors: Tensors) -> np.ndarray:
    return np.take(inputs[0], np.asarray(node.attributes["indices"], np.intp), axis=node.attributes["axis"])


def _reshape(node: QuantNode, inputs: Sequence[np.ndarray], tensors: Tensors) -> np.ndarray:
    return inputs[0].reshape(len(inputs[0]), *tensors[node.output].shape[1:])


def _constant(node: QuantNode, inputs: Sequence[np.ndarray], tensors: Tensors) -> np.ndarray:
    return node.constants[0]


def _concat(node: QuantNode, inputs: Sequence[np.ndarray], tensors: Tensors) -> np.ndarray:
    return np.concatenate(inputs, axis=node.attributes["axis"])


def _clip(node: QuantNode, inputs: Sequence[np.ndarray], tensors: Tensors) -> np.ndarray:
    clipped: np.ndarray = np.clip(inputs[0], node.clamp[0], node.clamp[1]).astype(np.int8)
    return clipped


def _requantise(node: QuantNode, inputs: Sequence[np.ndarray], tensors: Tensors) -> np.ndarray:
    ratio = _scale(tensors, node.inputs[0]) / _scale(tensors, node.output)
    return kernels.requantise(inputs[0].astype(np.float64) - _zero(tensors, node.inputs[0]), ratio, _zero(tensors, node.output), node.clamp)


_SETTINGS = frozenset({1, 2, 3, 4})

OPS: dict[str, Op] = {
    op.name: op
    for op in (
        # Sums of products.
        Op("Conv", _conv, _weighted_macs, weight_axis=0, fuses=True),
        Op("ConvTranspose", _conv_transpose, _transposed_macs, weight_axis=1, fuses=True),
        Op("Gemm", _gemm, _weighted_macs, weight_axis=0, fuses=True),
        Op("MatMul", _gemm, _weighted_macs, weight_axis=1, fuses=True),
        Op("BatchMatMul", _batch_matmul, _product_macs, fuses=True, activations=2, takes_constants=True),
        # Element by element, and means.
        Op("Add", _by_batch(_add), _no_macs, fuses=True, activations=2, takes_constants=True),
        Op("Sub", _by_batch(_add), _no_macs, fuses=True, activations=2, takes_constants=True),
        Op("Mul", _by_batch(_mul), _no_macs, fuses=True, activations=2, takes_constants=True),
        Op("AveragePool", _average_pool, _no_macs),
        Op("GlobalAveragePool", _average_pool, _no_macs),
        Op("ReduceMean", _reduce_mean, _no_macs, constants=_SETTINGS),
        Op("ResizeLinear", _resize_linear, _no_macs, constants=_SETTINGS),
        Op("Requantize", _requantise, _no_macs),
        Op("Constant", _constant, _no_macs, activations=0),
        # Functions of one number.
        *(Op(name, _function, _no_macs) for name in tables.FUNCTIONS),
        Op("PRelu", _function, _no_macs, constants=frozenset({1})),
        # What keeps scale and zero point.
        Op("MaxPool", _max_pool, _no_macs, passes_scale=True),
        Op("Relu", _clip, _no_macs, passes_scale=True),
        Op("Clip", _clip, _no_macs, passes_scale=True, constants=_SETTINGS),
        Op("Flatten", _reshape, _no_macs, passes_scale=True),
        Op("Reshape", _reshape, _no_macs, passes_scale=True, constants=_SETTINGS),
        Op("Squeeze", _reshape, _no_macs, passes_scale=True, constants=_SETTINGS),
        Op("Unsqueeze", _reshape, _no_macs, passes_scale=True, constants=_SETTINGS),
        Op("Concat", _concat, _no_macs, passes_scale=True, activations=None, takes_constants=True),
        Op("Split", _split, _no_macs, passes_scale=True, constants=_SETTINGS),
        Op("Slice", _slice, _no_macs, passes_scale=True, constants=_SETTINGS),
        Op("Pad", _pad, _no_macs, passes_scale=True, constants=_SETTINGS),
        Op("Transpose", _transpose, _no_macs, passes_scale=True),
        Op("Expand", _expand, _no_macs, passes_scale=True, constants=_SETTINGS),
        Op("DepthToSpace", _depth_to_space, _no_macs, passes_scale=True),
        Op("SpaceToDepth", _space_to_depth, _no_macs, passes_scale=True),
        Op("Gather", _gather, _no_macs, passes_scale=True, constants=_SETTINGS),
        Op("ResizeNearest", _resize_nearest, _no_macs, passes_scale=True, constants=_SETTINGS),
    )
}

# ONNX operators of which an int8 constant may be an operand.
TAKE_CONSTANTS = frozenset("MatMul" if name == "BatchMatMul" else name for name, op in OPS.items() if op.takes_constants)
