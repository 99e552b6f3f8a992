# SPDX-License-Identifier: Apache-2.0
"""What keeps its values and moves them: the reference's own operator, run on the places instead of the values, says from where."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from isthmus.ops import OPS
from isthmus.targets.hls4ml.kernels import constant_source, join_kernel
from isthmus.targets.hls4ml.layout import RANKS, hls_axis, hls_shape, hls_sources, same_order
from isthmus.targets.hls4ml.lowering import Lowering
from isthmus.targets.hls4ml.tail import fpga_outputs

if TYPE_CHECKING:
    from isthmus.graph import QuantGraph, QuantNode

FIRST_PLACE = 1000  # places count from here: what a Pad fills in is an int8 value, below
SHAPES_ONLY = frozenset({"Flatten", "Reshape", "Squeeze", "Unsqueeze"})


def feeds_products(node: QuantNode, graph: QuantGraph) -> bool:
    """Whether only matrix products read a flattened tensor: then its elements may stay in HLS order and the weights move instead."""
    readers = graph.consumers(node.output)
    flat = len(graph.tensors[node.output].shape) == 2 and node.output not in fpga_outputs(graph)
    return flat and bool(readers) and all(reader.op in ("Gemm", "MatMul") for reader in readers)


def joins_natively(node: QuantNode, graph: QuantGraph, streams: bool) -> bool:
    """Whether hls4ml's own concatenation is right: along the channels, and in io_parallel along any axis that has a name."""
    rank = len(graph.tensors[node.output].shape)
    stored = any(producer is not None and producer.op == "Constant" for producer in map(graph.producer, node.inputs))
    return rank in RANKS and not stored and (not streams or node.attributes["axis"] % rank == 1)


def move(low: Lowering, node: QuantNode, name: str) -> str | list[str]:
    """Transpose, Slice, Split, Pad, Expand, Gather, DepthToSpace, SpaceToDepth, ResizeNearest."""
    found = OPS[node.op].integer(node, [low.numbers(node.inputs[0]) + FIRST_PLACE], low.graph.tensors)
    parts = found if isinstance(found, list) else [found]
    values = []
    for index, (places, tensor) in enumerate(zip(parts, node.outputs, strict=True)):
        sources = np.where(places < FIRST_PLACE, constant_source(places), places - FIRST_PLACE)
        source, target = low.spec(node.inputs[0]).shape, low.spec(tensor).shape
        moved = hls_sources(sources, source, target)
        read = tensor in fpga_outputs(low.graph) or bool(low.graph.consumers(tensor))
        part = name if len(parts) == 1 else f"{name}_{index}"
        # A part that nobody reads gets no layer.
        values.append(low.move(low.values[node.inputs[0]], part, int(np.prod(source[1:])), moved, hls_shape(target), low.type(tensor)) if read else "")
    return values


def reshape(low: Lowering, node: QuantNode, name: str) -> str:
    source, target = low.spec(node.inputs[0]).shape, low.spec(node.output).shape
    value, of = low.values[node.inputs[0]], low.type(node.output)
    flat = feeds_products(node, low.graph)
    if flat:
        low.leave_in_hls_order(node)
    elif not same_order(source, target):
        sources = hls_sources(low.numbers(node.output), source, target)
        return low.move(value, name, sources.size, sources, hls_shape(target), of)
    return low.reshaped(value, name, hls_shape(target), of, flat)


def concat(low: Lowering, node: QuantNode, name: str) -> str:
    """Two at a time: hls4ml joins no more, and the first with a constant beside it that is none spreads the constant."""
    spec, of = low.spec(node.output), low.type(node.output)
    axis = int(node.attributes["axis"]) % len(spec.shape)
    shapes = [low.spec(tensor).shape for tensor in node.inputs]
    values = [low.placed(node, position, low.numbers(tensor), shapes[position], f"{name}_operand{position}") for position, tensor in enumerate(node.inputs)]
    native = joins_natively(node, low.graph, low.streams)
    value, joined = values[0], list(shapes[0])
    for position in range(1, len(values)):
        before = [*joined]
        joined[axis] += shapes[position][axis]
        part = f"{name}_{position - 1}"
        if native:
            value = low.writer.node("Concat", [value, values[position]], part, hls_shape(joined), axis=hls_axis(axis, len(spec.shape)))
            low.writer.layer(part, result=of)
        else:
            kernel = join_kernel(_joined(before, shapes[position], joined, axis), int(np.prod(before[1:])), int(np.prod(shapes[position][1:])))
            value = low.writer.kernel(kernel, [value, values[position]], part, hls_shape(joined), of)
    return value


def _joined(first: list[int], second: tuple[int, ...], joined: list[int], axis: int) -> np.ndarray:
    """HLS places of the result: those of the first, then those of the second."""
    sizes = [int(np.prod(shape[1:])) for shape in (first, second)]
    places = [np.arange(size).reshape(1, *shape[1:]) for size, shape in zip(sizes, (first, second), strict=True)]
    both = np.concatenate([places[0], places[1] + sizes[0]], axis=axis)
    of_first = hls_sources(np.where(both < sizes[0], both, -1), first, joined)
    of_second = hls_sources(np.where(both >= sizes[0], both - sizes[0], -1), second, joined)
    return np.where(of_first >= 0, of_first, of_second + sizes[0])
