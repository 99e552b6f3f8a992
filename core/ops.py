# SPDX-License-Identifier: Apache-2.0
"""The int8 operators: one row each, with its shape of constants, MAC rule and integer reference. What is not here is a float island.

A new operator is one row, one tiny model in `tests/models`, and a line in the table of each target that really has it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from isthmus import kernels
from isthmus.spec import TensorSpec

if TYPE_CHECKING:
    from isthmus.graph import QuantNode

Tensors = Mapping[str, TensorSpec]
Integer = Callable[["QuantNode", Sequence[np.ndarray], Tensors], np.ndarray]


@dataclass(frozen=True)
class Op:
    """One int8 operator.

    - `weight_axis`: the output-channel axis of its constant weight in the ONNX operator; None where it has no weight.
    - `passes_scale`: output scale and zero point equal the input's (no arithmetic on values).
    - `fuses`: a Relu or Clip right behind it belongs to it (one rounding for both).
    - `macs`: multiply-accumulates for one run, from node and tensors.
    - `integer`: int8 inputs -> int8 output. Any batch size: only the leading axis may differ from the specs.
    """

    name: str
    integer: Integer
    macs: Callable[[QuantNode, Tensors], int]
    weight_axis: int | None = None
    passes_scale: bool = False
    fuses: bool = False


def _no_macs(node: QuantNode, tensors: Tensors) -> int:
    """Nothing multiplied: pools and additions count as FLOPs, not as MACs."""
    return 0


def _weighted_macs(node: QuantNode, tensors: Tensors) -> int:
    """Outputs x weights that feed one output (Conv: in/groups x kernel; Gemm, MatMul: in)."""
    assert node.weight is not None
    filters = node.weight.shape[1 if node.op == "MatMul" else 0]
    return tensors[node.output].size * int(node.weight.size // filters)


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


def _add(node: QuantNode, inputs: Sequence[np.ndarray], tensors: Tensors) -> np.ndarray:
    out = _scale(tensors, node.output)
    real = [(x.astype(np.float64) - _zero(tensors, name)) * (_scale(tensors, name) / out) for x, name in zip(inputs, node.inputs, strict=True)]
    return kernels.requantise(real[0] + real[1], 1.0, _zero(tensors, node.output), node.clamp)


def _max_pool(node: QuantNode, inputs: Sequence[np.ndarray], tensors: Tensors) -> np.ndarray:
    a = node.attributes
    return kernels.max_pool(inputs[0], tensors[node.output].shape[2:], a["kernel_shape"], a["strides"], a["pads"], a["dilations"])


def _average_pool(node: QuantNode, inputs: Sequence[np.ndarray], tensors: Tensors) -> np.ndarray:
    a, x = node.attributes, inputs[0]
    if node.op == "GlobalAveragePool":
        space = x.shape[2:]
        rank = len(space)
        total, count = kernels.average_pool(x, _zero(tensors, node.inputs[0]), [1] * rank, space, [1] * rank, [0] * (2 * rank), [1] * rank, False)
    else:
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
    # The division comes last: sum * (sx / sy) is exact for powers of two, so a tie stays a tie.
    ratio = _scale(tensors, node.inputs[0]) / _scale(tensors, node.output)
    return kernels.requantise(total * ratio / count, 1.0, _zero(tensors, node.output), node.clamp)


def _reshape(node: QuantNode, inputs: Sequence[np.ndarray], tensors: Tensors) -> np.ndarray:
    return inputs[0].reshape(len(inputs[0]), *tensors[node.output].shape[1:])


def _concat(node: QuantNode, inputs: Sequence[np.ndarray], tensors: Tensors) -> np.ndarray:
    return np.concatenate(inputs, axis=node.attributes["axis"])


def _clip(node: QuantNode, inputs: Sequence[np.ndarray], tensors: Tensors) -> np.ndarray:
    clipped: np.ndarray = np.clip(inputs[0], node.clamp[0], node.clamp[1]).astype(np.int8)
    return clipped


def _requantise(node: QuantNode, inputs: Sequence[np.ndarray], tensors: Tensors) -> np.ndarray:
    ratio = _scale(tensors, node.inputs[0]) / _scale(tensors, node.output)
    return kernels.requantise(inputs[0].astype(np.float64) - _zero(tensors, node.inputs[0]), ratio, _zero(tensors, node.output), node.clamp)


OPS: dict[str, Op] = {
    op.name: op
    for op in (
        Op("Conv", _conv, _weighted_macs, weight_axis=0, fuses=True),
        Op("Gemm", _gemm, _weighted_macs, weight_axis=0, fuses=True),
        Op("MatMul", _gemm, _weighted_macs, weight_axis=1, fuses=True),
        Op("Add", _add, _no_macs, fuses=True),
        Op("MaxPool", _max_pool, _no_macs, passes_scale=True),
        Op("AveragePool", _average_pool, _no_macs),
        Op("GlobalAveragePool", _average_pool, _no_macs),
        Op("Relu", _clip, _no_macs, passes_scale=True),
        Op("Clip", _clip, _no_macs, passes_scale=True),
        Op("Flatten", _reshape, _no_macs, passes_scale=True),
        Op("Reshape", _reshape, _no_macs, passes_scale=True),
        Op("Concat", _concat, _no_macs, passes_scale=True),
        Op("Requantize", _requantise, _no_macs),
    )
}
