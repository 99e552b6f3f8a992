# SPDX-License-Identifier: Apache-2.0
"""Bias correction: int8 weights and inputs shift the mean of what a layer computes; its bias takes that shift back.

Layer by layer in order, so that each layer sees the inputs that the corrected layers before it give. What is compared, a channel, is the
layer's sum in front of its activation: the mean in the float model against the mean in the integer program, on the same samples.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx

from isthmus.graph import QuantGraph, QuantNode
from isthmus.kernels import conv_accumulate
from isthmus.quantize.onnx_ptq import Arrays, open_with_outputs, tensor_values
from isthmus.quantize.program_walk import feeds_for_walk, float_layers, walk
from isthmus.recipe import Recipe

CORRECTED = frozenset({"Conv", "Gemm"})
SAMPLES = 64


def bias_corrections(model: onnx.ModelProto, graph: QuantGraph, data: Arrays, recipe: Recipe) -> dict[str, np.ndarray]:
    """What to add to the bias of each int8 Conv and Gemm, by layer name, one real number an output channel: whole steps of that bias.

    `model` is the prepared float model that `graph` was made of by `recipe`, `data` its calibration samples, of which at most `SAMPLES` are used.
    """
    feeds = feeds_for_walk(model, graph, data, recipe, SAMPLES)
    layers = float_layers(model, graph, CORRECTED)
    wanted = _means(model, [layer.output[0] for layer in layers.values()], feeds)
    corrections: dict[str, np.ndarray] = {}

    def corrected(node: QuantNode, x: np.ndarray) -> QuantNode:
        steps, real = _correction(node, graph, x, wanted[layers[node.name].output[0]])
        corrections[layers[node.name].name] = real
        bias = np.zeros(len(steps), np.int64) if node.bias is None else node.bias.astype(np.int64)
        return replace(node, bias=(bias + steps).astype(np.int32))

    walk(graph, feeds, layers, corrected)
    return corrections


def _means(model: onnx.ModelProto, tensors: list[str], feeds: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The mean of each tensor a channel (axis 1) over all samples and places, in the float model."""
    session = open_with_outputs(model, tensors)
    sums: dict[str, np.ndarray] = {}
    for feed in feeds:
        for name, values in tensor_values(session, tensors, feed).items():
            sums[name] = sums.get(name, 0.0) + _channel_means(values)
    return {name: total / len(feeds) for name, total in sums.items()}


def _channel_means(values: np.ndarray) -> np.ndarray:
    means: np.ndarray = np.asarray(values, np.float64).mean(axis=tuple(axis for axis in range(values.ndim) if axis != 1))
    return means


def _correction(node: QuantNode, graph: QuantGraph, x: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """In whole steps of the bias, and as real numbers."""
    assert node.weight is not None and node.weight_scale is not None  # rule "weight" of the form
    source = graph.tensors[node.inputs[0]]
    zero = int(source.zero_point or 0)
    if node.op == "Conv":
        given = {key: node.attributes[key] for key in ("strides", "pads", "dilations", "group")}
        found = conv_accumulate(x, zero, node.weight, node.bias, **given)
    else:
        found = (x.astype(np.float64) - zero) @ node.weight.astype(np.float64).T + (0 if node.bias is None else node.bias)
    # The same float32 product as the scale that the form writes for this bias.
    scale = (np.float32(source.scale) * node.weight_scale.astype(np.float32)).astype(np.float64)
    steps = np.rint(wanted / scale - _channel_means(found))
    limit = np.iinfo(np.int32).max // 2
    steps = np.clip(steps, -limit, limit).astype(np.int64)
    return steps, steps * scale
