# SPDX-License-Identifier: Apache-2.0
"""The integer program, run layer by layer over all samples at once, so that each layer can be changed before anything reads it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

import numpy as np
import onnx

from isthmus import reference
from isthmus.errors import IsthmusError
from isthmus.graph import QuantGraph, QuantNode
from isthmus.quantize.onnx_ptq import Arrays, CalibrationRuns, checked_data, input_shapes
from isthmus.recipe import Recipe

VALUES = 2**27  # int8 activations held at once: fewer samples of a large network

Change = Callable[[QuantNode, np.ndarray], QuantNode]  # a layer and its int8 input -> the layer as it shall run


def feeds_for_walk(model: onnx.ModelProto, graph: QuantGraph, data: Arrays, recipe: Recipe, most: int) -> list[dict[str, np.ndarray]]:
    """At most `most` calibration samples, as runs of the model: fewer where all activations of so many would not fit in memory."""
    shapes = input_shapes(model)
    size = sum(spec.size for spec in graph.tensors.values()) // graph.inputs[0].shape[0]
    count = min(most, max(1, VALUES // max(1, size)), recipe.calibration_samples)
    return list(CalibrationRuns(shapes, checked_data(shapes, data), replace(recipe, calibration_samples=max(count, graph.inputs[0].shape[0]))))


def float_layers(model: onnx.ModelProto, graph: QuantGraph, ops: Collection[str]) -> dict[str, onnx.NodeProto]:
    """The float layer behind each int8 one of `ops`, by the int8 node's name (which has '.int8' behind it where the plain name was taken)."""
    by_name = {node.name: node for node in model.graph.node}
    found = {}
    for node in graph.nodes:
        if node.kind == "int8" and node.op in ops and node.weight is not None:
            name = node.name
            while name not in by_name and name.endswith(".int8"):
                name = name.removesuffix(".int8")
            if name not in by_name:
                raise IsthmusError(f"int8 layer {node.name!r} has no layer of that name in the float model; report this with the model")
            found[node.name] = by_name[name]
    return found


def walk(graph: QuantGraph, feeds: list[dict[str, np.ndarray]], changed: Collection[str], change: Change) -> None:
    """Runs the program once over all samples; the nodes named in `changed` run as `change` gives them."""
    last = {name: index for index, node in enumerate(graph.nodes) for name in node.inputs}
    values: dict[str, np.ndarray] = {name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]}
    times = len(next(iter(values.values()))) // graph.inputs[0].shape[0]
    for index, node in enumerate(graph.nodes):
        running = change(node, values[node.inputs[0]]) if node.name in changed else node
        values |= _one(graph, running, values, times)
        for name in [name for name in node.inputs if last[name] == index]:
            values.pop(name, None)


def _one(graph: QuantGraph, node: QuantNode, values: Mapping[str, np.ndarray], times: int) -> dict[str, np.ndarray]:
    """What one node writes: the reference on a program of this one node."""
    read = tuple(graph.tensors[name] for name in dict.fromkeys(node.inputs)) or graph.inputs[:1]
    single = replace(graph, nodes=(node,), inputs=read, outputs=())
    # A constant reads nothing: whatever stands in front of it will do, in as many samples.
    feeds = {spec.name: values[spec.name] if node.inputs else np.zeros((times * spec.shape[0], *spec.shape[1:]), spec.dtype) for spec in read}
    done = reference.run_all(single, feeds)
    return {name: done[name] for name in node.outputs}
