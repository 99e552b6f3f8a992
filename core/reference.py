# SPDX-License-Identifier: Apache-2.0
"""The integer reference: what every artifact is compared with. int8 in, int32 accumulate, round half to even, saturate; numpy only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from isthmus.errors import IsthmusError
from isthmus.graph import QuantGraph, QuantNode
from isthmus.islands import Island
from isthmus.ops import OPS

CHUNK_BYTES = 32 * 2**20  # small enough for a processor's cache: four times as fast as 256 MiB on networks of 28x28


def run(graph: QuantGraph, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The graph's raw outputs (int8 where the border is int8, float32 behind a float tail), by output name.

    `feeds` holds, by input name, raw int8 or float32 arrays (N, ...) in the form's layout; N is any multiple of the graph's own batch
    and is worked through in chunks. Raises `IsthmusError` on a missing name or a wrong shape.
    """
    batch = _batch(graph, feeds)
    times = batch // graph.inputs[0].shape[0]
    widest = max((spec.size for spec in graph.tensors.values()), default=1)
    step = max(1, CHUNK_BYTES // (widest * 8 * 8))
    own = {spec.name: spec.shape[0] for spec in graph.inputs}
    parts = []
    for start in range(0, times, step):
        values = run_all(graph, {name: feeds[name][start * extent : (start + step) * extent] for name, extent in own.items()})
        parts.append({spec.name: values[graph.raw_output(index)] for index, spec in enumerate(graph.outputs)})
    return {spec.name: np.concatenate([part[spec.name] for part in parts]) for spec in graph.outputs}


def run_all(graph: QuantGraph, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every activation of the graph, by tensor name (int8 tensors as int8): to find the layer where an engine first differs."""
    times = _batch(graph, feeds) // graph.inputs[0].shape[0]
    values: dict[str, np.ndarray] = {}
    for index, spec in enumerate(graph.inputs):
        array = np.asarray(feeds[spec.name])
        if array.dtype == np.int8 and spec.dtype == "int8":
            values[graph.raw_input(index)] = array
        else:
            values[spec.name] = array.astype(np.float32)
    for node in graph.nodes:
        if node.outputs[0] not in values:
            values.update(_step(node, graph, values, times))
    return values


def run_nodes(graph: QuantGraph, nodes: Sequence[QuantNode], values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What `nodes` (in the graph's order) compute from tensors that are known, by tensor name: a layer alone, given an engine's own inputs to it."""
    known = dict(values)
    own = [(known[name], graph.tensors[name].shape[0]) for node in nodes for name in node.inputs if name in known]
    times = len(own[0][0]) // own[0][1] if own else 1
    for node in nodes:
        known.update(_step(node, graph, known, times))
    return {name: known[name] for node in nodes for name in node.outputs}


def _step(node: QuantNode, graph: QuantGraph, values: Mapping[str, np.ndarray], times: int) -> dict[str, np.ndarray]:
    inputs = [values[name] for name in node.inputs]
    if node.op == "QuantizeLinear":
        return {node.output: graph.tensors[node.output].quantise(inputs[0])}
    if node.op == "DequantizeLinear":
        return {node.output: graph.tensors[node.inputs[0]].dequantise(inputs[0])}
    if node.op == "Constant":  # written for the graph's own batch
        return {node.output: np.concatenate([node.constants[0]] * times)}
    if node.kind == "int8":
        result = OPS[node.op].integer(node, inputs, graph.tensors)
        return dict(zip(node.outputs, result if isinstance(result, list) else [result], strict=True))
    return _float_island(node, graph, inputs, times)


def _float_island(node: QuantNode, graph: QuantGraph, inputs: list[np.ndarray], times: int) -> dict[str, np.ndarray]:
    """One float node, the graph's own batch at a time; one that reads constants alone is computed once and repeated."""
    island = Island(node)
    if not inputs:
        return {name: np.concatenate([value] * times) for name, value in zip(node.outputs, island.run([]), strict=True)}
    own = [graph.tensors[name].shape[0] for name in node.inputs]
    parts = [island.run([array[index * extent : (index + 1) * extent] for array, extent in zip(inputs, own, strict=True)]) for index in range(times)]
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
