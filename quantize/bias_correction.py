# SPDX-License-Identifier: Apache-2.0
"""Bias correction: int8 weights and inputs shift the mean of what a layer computes; its bias takes that shift back.

Layer by layer in order, so that each layer sees the inputs that the corrected layers before it give. What is compared, a channel, is the
layer's sum in front of its activation: the mean in the float model against the mean in the integer program, on the same samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx

from isthmus import reference
from isthmus.errors import IsthmusError
from isthmus.graph import QuantGraph, QuantNode
from isthmus.kernels import conv_accumulate
from isthmus.quantize.onnx_ptq import Arrays, CalibrationRuns, checked_data, input_shapes, open_with_outputs, tensor_values
from isthmus.recipe import Recipe

CORRECTED = frozenset({"Conv", "Gemm"})  # a MatMul has no bias to correct
SAMPLES = 64
VALUES = 2**27  # int8 activations held at once: fewer samples of a large network


def bias_corrections(model: onnx.ModelProto, graph: QuantGraph, data: Arrays, recipe: Recipe) -> dict[str, np.ndarray]:
    """What to add to the bias of each int8 Conv and Gemm, by layer name, one real number an output channel: whole steps of that bias.

    `model` is the prepared float model that `graph` was made of by `recipe`, `data` its calibration samples, of which at most `SAMPLES` are used.
    """
    shapes = input_shapes(model)
    size = sum(spec.size for spec in graph.tensors.values()) // graph.inputs[0].shape[0]
    count = min(SAMPLES, max(1, VALUES // max(1, size)), recipe.calibration_samples)
    runs = CalibrationRuns(shapes, checked_data(shapes, data), replace(recipe, calibration_samples=max(count, graph.inputs[0].shape[0])))
    feeds = list(runs)
    layers = _layers(model, graph)
    wanted = _means(model, [layer.output[0] for layer in layers.values()], feeds)
    samples = {name: np.concatenate([feed[name] for feed in feeds]) for name in shapes}
    return _walk(graph, samples, {node: wanted[layer.output[0]] for node, layer in layers.items()}, {node: layer.name for node, layer in layers.items()})


def _layers(model: onnx.ModelProto, graph: QuantGraph) -> dict[str, onnx.NodeProto]:
    """The float layer behind each int8 one, by the int8 node's name (which has '.int8' behind it where the plain name was taken)."""
    by_name = {node.name: node for node in model.graph.node}
    found = {}
    for node in graph.nodes:
        if node.kind == "int8" and node.op in CORRECTED:
            name = node.name
            while name not in by_name and name.endswith(".int8"):
                name = name.removesuffix(".int8")
            if name not in by_name:
                raise IsthmusError(f"bias correction: int8 layer {node.name!r} has no layer of that name in the float model; report this with the model")
            found[node.name] = by_name[name]
    return found


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


def _walk(graph: QuantGraph, samples: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray], names: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Runs the integer program once over all samples, correcting each layer before anything reads it."""
    last = {name: index for index, node in enumerate(graph.nodes) for name in node.inputs}
    values: dict[str, np.ndarray] = dict(samples)
    corrections: dict[str, np.ndarray] = {}
    for index, node in enumerate(graph.nodes):
        if node.name in wanted:
            steps, real = _correction(node, graph, values[node.inputs[0]], wanted[node.name])
            corrections[names[node.name]] = real
            bias = np.zeros(len(steps), np.int64) if node.bias is None else node.bias.astype(np.int64)
            node = replace(node, bias=(bias + steps).astype(np.int32))
        values |= _one(graph, node, values)
        for name in [name for name in node.inputs if last[name] == index]:
            values.pop(name, None)
    return corrections


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


def _one(graph: QuantGraph, node: QuantNode, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What one node writes: the reference on a program of this one node."""
    read = tuple(graph.tensors[name] for name in dict.fromkeys(node.inputs)) or graph.inputs[:1]
    single = replace(graph, nodes=(node,), inputs=read, outputs=())
    done = reference.run_all(single, {spec.name: values[spec.name] for spec in read})
    return {name: done[name] for name in node.outputs}
