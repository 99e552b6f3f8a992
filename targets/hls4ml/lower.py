# SPDX-License-Identifier: Apache-2.0
"""The form as QONNX for hls4ml: one rounding a layer, at the type of its output; everything before it in a type that holds it exactly."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from isthmus import tables
from isthmus.targets.hls4ml import elementwise, moves, pools, weighted
from isthmus.targets.hls4ml.fixed import INT8_HIGH, INT8_LOW
from isthmus.targets.hls4ml.folding import Product
from isthmus.targets.hls4ml.lowering import Lowering
from isthmus.targets.hls4ml.moves import SHAPES_ONLY
from isthmus.targets.hls4ml.tail import fpga_output

if TYPE_CHECKING:
    from isthmus.graph import QuantGraph, QuantNode


@dataclass(frozen=True)
class Lowered:
    """The QONNX file; hls4ml's layer section; the products to be folded; HLS layer -> node of the form."""

    model: bytes
    layers: Mapping[str, Mapping[str, Any]]
    products: tuple[Product, ...]
    nodes: Mapping[str, str]


def lower(graph: QuantGraph, io_type: str = "io_parallel") -> Lowered:
    """`graph` must have passed the target's `check`."""
    low = Lowering(graph, io_type)
    for index, spec in enumerate(graph.inputs):
        _input(low, safe_name("in", index, spec.name), graph.raw_input(index))
    for index, node in enumerate(graph.nodes):
        if node.kind == "int8" and node.op != "Constant":
            name = safe_name("n", index, node.name)
            low.nodes[name] = node.name
            made = _OPERATORS[node.op](low, node, name)
            low.values |= zip(node.outputs, [made] if isinstance(made, str) else made, strict=True)
    taken = {origin(graph.raw_input(index), graph) for index in range(len(graph.inputs))}
    for index, spec in enumerate(graph.outputs):
        name, raw = safe_name("out", index, spec.name), fpga_output(graph, index)
        value, shape, of = low.values[raw], low.shape(raw), low.type(raw)
        if origin(raw, graph) in taken or (low.streams and reads(graph, raw)):
            value = low.copied(value, f"{name}_copy", shape, of)
        taken.add(origin(raw, graph))
        low.writer.output(value, name, shape, of)
    return Lowered(low.writer.model("isthmus"), low.writer.layers, tuple(low.products), low.nodes)


def safe_name(prefix: str, index: int, name: str) -> str:
    """A C identifier that no other layer has: hls4ml writes layer names into the code, and compares them without case."""
    return f"{prefix}{index}_{re.sub(r'[^a-z0-9]+', '_', name.lower()).strip('_')[:40].rstrip('_') or 'x'}"


def origin(tensor: str, graph: QuantGraph) -> str:
    """The tensor whose values `tensor` may have, all and in order: hls4ml removes what lies between, and then cannot tell two outputs apart."""
    node = graph.producer(tensor)
    while node is not None and node.kind == "int8" and (node.op in _PASSES or (node.op == "Clip" and node.clamp == (INT8_LOW, INT8_HIGH))):
        tensor = node.inputs[0]
        node = graph.producer(tensor)
    return tensor


def _input(low: Lowering, name: str, raw: str) -> None:
    value, of = low.writer.input(name, low.shape(raw), low.type(raw)), low.type(raw)
    low.values[raw] = low.copied(value, f"{name}_copy", low.shape(raw), of) if low.streams and reads(low.graph, raw) > 1 else value


def reads(graph: QuantGraph, tensor: str) -> int:
    """How many layers read an int8 tensor: a Split has one a part, and beside a constant a tensor is read once more."""
    reads = 0
    for node in graph.nodes:
        if node.kind == "int8" and tensor in node.inputs:
            stored = sum(1 for name in node.inputs if (producer := graph.producer(name)) is not None and producer.op == "Constant")
            reads += node.inputs.count(tensor) * len(node.outputs) + stored
    return reads


_Operator = Callable[[Lowering, "QuantNode", str], "str | list[str]"]
_MOVES = ("Transpose", "Slice", "Split", "Pad", "Expand", "Gather", "DepthToSpace", "SpaceToDepth", "ResizeNearest")
_OPERATORS: dict[str, _Operator] = {
    "Conv": weighted.conv,
    "ConvTranspose": weighted.conv_transpose,
    "Gemm": weighted.gemm,
    "MatMul": weighted.gemm,
    "BatchMatMul": weighted.batch_matmul,
    "Add": elementwise.merge,
    "Sub": elementwise.merge,
    "Mul": elementwise.merge,
    "Relu": elementwise.relu,
    "Clip": elementwise.clip,
    "Requantize": elementwise.requantise,
    "MaxPool": pools.max_pool,
    "AveragePool": pools.average_pool,
    "GlobalAveragePool": pools.average_pool,
    "ReduceMean": pools.reduce_mean,
    "ResizeLinear": pools.resize_linear,
    "Concat": moves.concat,
    **dict.fromkeys(SHAPES_ONLY, moves.reshape),
    **dict.fromkeys(_MOVES, moves.move),
    **dict.fromkeys((*tables.FUNCTIONS, "PRelu"), elementwise.function),
}
OPERATORS = frozenset(_OPERATORS) | {"Constant"}
_PASSES = frozenset({*SHAPES_ONLY, *_MOVES, "Requantize", "Concat"})
