# SPDX-License-Identifier: Apache-2.0
"""The integer reference: what every artifact is compared with. int8 in, int32 accumulate, round half to even, saturate; numpy only."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from isthmus.errors import IsthmusError
from isthmus.graph import OPSET, QuantGraph, QuantNode
from isthmus.ops import OPS

CHUNK_BYTES = 256 * 2**20


def run(graph: QuantGraph, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The graph's raw outputs (int8 where the border is int8, float32 behind a float tail), by output name.

    `feeds` holds, by input name, raw int8 or float32 arrays (N, ...) in the form's layout; N is any multiple of the graph's own batch
    and is worked through in chunks. Raises `IsthmusError` on a missing name or a wrong shape.
    """
    batch = _batch(graph, feeds)
    own = graph.inputs[0].shape[0] if graph.inputs[0].shape else 1
    widest = max((spec.size for spec in graph.tensors.values()), default=1)
    step = max(1, CHUNK_BYTES // (widest * 8 * 8)) * own
    parts = []
    for start in range(0, batch, step):
        values = run_all(graph, {name: array[start : start + step] for name, array in feeds.items()})
        parts.append({spec.name: values[graph.raw_output(index)] for index, spec in enumerate(graph.outputs)})
    return {spec.name: np.concatenate([part[spec.name] for part in parts]) for spec in graph.outputs}


def run_all(graph: QuantGraph, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every activation of the graph, by tensor name (int8 tensors as int8): to find the layer where an engine first differs."""
    _batch(graph, feeds)
    values: dict[str, np.ndarray] = {}
    for index, spec in enumerate(graph.inputs):
        array = np.asarray(feeds[spec.name])
        if array.dtype == np.int8 and spec.dtype == "int8":
            values[graph.raw_input(index)] = array
        else:
            values[spec.name] = array.astype(np.float32)
    for node in graph.nodes:
        if node.outputs[0] not in values:
            values.update(_step(node, graph, values))
    return values


def _step(node: QuantNode, graph: QuantGraph, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    inputs = [values[name] for name in node.inputs]
    if node.op == "QuantizeLinear":
        return {node.output: graph.tensors[node.output].quantise(inputs[0])}
    if node.op == "DequantizeLinear":
        return {node.output: graph.tensors[node.inputs[0]].dequantise(inputs[0])}
    if node.kind == "int8":
        return {node.output: OPS[node.op].integer(node, inputs, graph.tensors)}
    return _float_island(node, graph, inputs)


def _float_island(node: QuantNode, graph: QuantGraph, inputs: list[np.ndarray]) -> dict[str, np.ndarray]:
    """One float node by onnx's own reference evaluator, sample by sample where the batch is larger than the graph's."""
    count = len(node.inputs) + len(node.constants)
    names = [f"c{position}" if position in node.constants else "" for position in range(count)]
    free = iter(range(len(node.inputs)))
    names = [name or f"x{next(free)}" for name in names]
    proto = onnx.helper.make_node(node.op, names, list(node.outputs), **dict(node.attributes))
    evaluator = ReferenceEvaluator(
        onnx.helper.make_model(
            onnx.helper.make_graph(
                [proto],
                "island",
                [onnx.helper.make_tensor_value_info(f"x{i}", onnx.TensorProto.FLOAT, None) for i in range(len(inputs))],
                [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in node.outputs],
                [onnx.numpy_helper.from_array(array, f"c{position}") for position, array in node.constants.items()],
            ),
            opset_imports=[onnx.helper.make_opsetid("", OPSET)],
        )
    )
    own = graph.tensors[node.inputs[0]].shape[0] if graph.tensors[node.inputs[0]].shape else len(inputs[0])
    parts: list[list[np.ndarray]] = []
    for start in range(0, len(inputs[0]), own):
        parts.append([np.asarray(value) for value in evaluator.run(None, {f"x{i}": array[start : start + own] for i, array in enumerate(inputs)})])
    return {name: np.concatenate([part[index] for part in parts]) for index, name in enumerate(node.outputs)}


def _batch(graph: QuantGraph, feeds: Mapping[str, np.ndarray]) -> int:
    batches = set()
    for spec in graph.inputs:
        if spec.name not in feeds:
            raise IsthmusError(f"input {spec.name!r} is missing: found {sorted(feeds)}")
        shape = tuple(np.shape(feeds[spec.name]))
        if len(shape) != len(spec.shape) or shape[1:] != spec.shape[1:] or shape[0] == 0 or shape[0] % spec.shape[0]:
            raise IsthmusError(f"input {spec.name!r}: expected shape {list(spec.shape)} (any multiple of its batch), found {list(shape)}")
        batches.add(shape[0] // spec.shape[0])
    if len(batches) != 1:
        raise IsthmusError(f"inputs disagree in their batch: {sorted(batches)} times the graph's own")
    return int(next(iter(batches))) * graph.inputs[0].shape[0]
