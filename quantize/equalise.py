# SPDX-License-Identifier: Apache-2.0
"""Cross-layer equalisation of a prepared float model: moves a factor a channel from one layer with weights into the next.

Between the two stand only operators for which f(s * x) = s * f(x) holds for every s > 0, channel by channel (Relu, LeakyRelu, pools): the model
computes the same function, and the weights of both layers use their int8 range more evenly, which one scale a tensor needs most. A Clip
(ReLU6) between them ends the chain, as it is not such an operator.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper

HOMOGENEOUS = frozenset({"Relu", "LeakyRelu", "MaxPool", "AveragePool", "GlobalAveragePool"})
ROUNDS = 20
SETTLED = 1e-3  # largest change of a factor (relative to 1) below which another round brings nothing
LARGEST_FACTOR = 1e4  # of a channel that is nearly dead on one side


@dataclass(frozen=True)
class _Layer:
    """A Conv or Gemm whose weight is a constant that nobody else reads."""

    node: onnx.NodeProto
    weight: str
    bias: str | None
    group: int


def equalise(model: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    """An equal model with evened ranges, and how many pairs of layers were evened; the argument is not changed."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    weights = {tensor.name: numpy_helper.to_array(tensor).astype(np.float64) for tensor in result.graph.initializer}
    pairs = _pairs(result)
    for _ in range(ROUNDS):
        if not pairs or max(_even(first, second, weights) for first, second in pairs) < SETTLED:
            break
    for tensor in result.graph.initializer:
        if any(tensor.name in (layer.weight, layer.bias) for pair in pairs for layer in pair):
            tensor.CopyFrom(numpy_helper.from_array(weights[tensor.name].astype(np.float32), tensor.name))
    return result, len(pairs)


def _pairs(model: onnx.ModelProto) -> list[tuple[_Layer, _Layer]]:
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    outputs = {value.name for value in model.graph.output}
    layers = {node.output[0]: layer for node in model.graph.node if (layer := _layer(node, shapes, readers)) is not None}
    found = []
    for first in layers.values():
        reader: onnx.NodeProto | None = first.node
        while reader is not None:
            name = reader.output[0]
            following = readers.get(name, [])
            reader = following[0] if len(following) == 1 and name not in outputs and following[0].input[0] == name else None
            if reader is None or reader.op_type not in HOMOGENEOUS:
                break
        second = layers.get(reader.output[0]) if reader is not None else None
        if second is not None and _fit(first, second, shapes):
            found.append((first, second))
    return found


def _layer(node: onnx.NodeProto, shapes: dict[str, tuple[int, ...]], readers: dict[str, list[onnx.NodeProto]]) -> _Layer | None:
    constants = [name for name in node.input[1:] if name]
    if node.op_type not in ("Conv", "Gemm") or not constants or any(name not in shapes or len(readers[name]) != 1 for name in constants):
        return None
    if node.op_type == "Gemm" and (len(shapes[constants[0]]) != 2 or next((a.i for a in node.attribute if a.name == "transB"), 0) != 1):
        return None
    if len(constants) == 2 and shapes[constants[1]] != shapes[constants[0]][:1]:
        return None
    group = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
    return _Layer(node, constants[0], constants[1] if len(constants) == 2 else None, group)


def _fit(first: _Layer, second: _Layer, shapes: dict[str, tuple[int, ...]]) -> bool:
    """Whether output channel c of the first is input channel c of the second: not where the channels were flattened with height and width."""
    return shapes[first.weight][0] == shapes[second.weight][1] * second.group


def _even(first: _Layer, second: _Layer, weights: dict[str, np.ndarray]) -> float:
    """One round on one pair; how far the largest factor is from 1."""
    before = weights[first.weight]
    after = _by_input_channel(weights[second.weight], second.group)  # a view: [group, filters, channels, kernel] -> changed in place
    out_range = np.abs(before.reshape(len(before), -1)).max(axis=1)
    in_range = np.abs(after).max(axis=(1, 3)).reshape(-1)
    alive = (out_range > 0) & (in_range > 0)
    factor = np.ones(len(before))
    # first / factor and second * factor then have the same range in each channel: the geometric mean of the two.
    factor[alive] = np.clip(np.sqrt(out_range[alive] / in_range[alive]), 1 / LARGEST_FACTOR, LARGEST_FACTOR)
    before /= factor.reshape(-1, *([1] * (before.ndim - 1)))
    if first.bias is not None:
        weights[first.bias] /= factor
    after *= factor.reshape(after.shape[0], 1, after.shape[2], 1)
    return float(np.abs(factor - 1).max())


def _by_input_channel(weight: np.ndarray, group: int) -> np.ndarray:
    filters, channels = weight.shape[:2]
    return weight.reshape(group, filters // group, channels, -1)
