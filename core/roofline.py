# SPDX-License-Identifier: Apache-2.0
"""A model as the kernels a GPU starts, each with what it multiplies and what it moves: what a roofline needs.

Two ways to run a graph: `op_by_op`, a framework's, one kernel an operator; and `fused`, a compiling engine's: element-wise operators are computed by
the kernel in front of them, views and concatenations cost nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx
from onnx import inliner, shape_inference

from isthmus.cost import ACTIVATIONS, VIEWS, cost_of_graph, cost_of_onnx
from isthmus.graph import QuantGraph

POINTWISE = ACTIVATIONS | {"Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Neg", "Log", "Reciprocal", "BatchNormalization", "Requantize"}
FUSING = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "BatchMatMul"})
FREE = VIEWS | {"Constant", "Shape", "QuantizeLinear", "DequantizeLinear"}


@dataclass(frozen=True)
class Kernel:
    """What one kernel multiplies and moves, counted in elements. `floating`: it has no int8 arithmetic even where the engine is int8."""

    macs: int
    read: int
    weights: int
    written: int
    floating: bool = False

    @property
    def moved(self) -> int:
        return self.read + self.weights + self.written


@dataclass(frozen=True)
class Operator:
    """One node of a graph: `reads` and `writes` name activations, whose sizes are in the `Program`; `weights` counts constants."""

    op: str
    macs: int
    reads: tuple[str, ...]
    weights: int
    writes: tuple[str, ...]
    floating: bool = False


@dataclass(frozen=True)
class Program:
    """A graph's operators in order; `sizes` in elements; `fused_already` where activations and batch normalisation are no operators of their own."""

    operators: tuple[Operator, ...]
    sizes: Mapping[str, int]
    outputs: frozenset[str]
    fused_already: bool = False


def program_of_onnx(model: onnx.ModelProto) -> Program:
    """A float model's. Raises `IsthmusError` where a shape is not static or cannot be inferred."""
    cost = cost_of_onnx(model)
    graph = _with_shapes(model)
    constants = {tensor.name: math.prod(tensor.dims) for tensor in graph.initializer}
    nodes = []
    for node in graph.node:
        if node.op_type == "Constant":
            constants[node.output[0]] = max((math.prod(a.t.dims) for a in node.attribute if a.name == "value"), default=1)
        else:
            nodes.append(node)
    sizes = {value.name: math.prod(axis.dim_value for axis in value.type.tensor_type.shape.dim) for value in (*graph.input, *graph.value_info, *graph.output)}
    operators = [
        Operator(
            node.op_type,
            row.macs,
            tuple(name for name in node.input if name and name not in constants),
            sum(constants[name] for name in node.input if name in constants),
            tuple(name for name in node.output if name),
        )
        for node, row in zip(nodes, cost.per_node, strict=True)
    ]
    return Program(tuple(operators), sizes, frozenset(value.name for value in graph.output))


def _with_shapes(model: onnx.ModelProto) -> onnx.GraphProto:
    flat = inliner.inline_local_functions(model) if model.functions else model
    return shape_inference.infer_shapes(flat, strict_mode=True, data_prop=True).graph


def program_of_graph(graph: QuantGraph, floating: Iterable[str] = ()) -> Program:
    """The form's; `floating` names nodes that the target multiplies in float (its lint says which)."""
    macs = {row.name: row.macs for row in cost_of_graph(graph).per_node}
    apart = set(floating)
    operators = []
    for node in graph.nodes:
        if node.kind == "border":
            continue
        arrays = [array for array in (node.weight, node.bias, *node.constants.values()) if array is not None]
        weights = sum(array.size for array in arrays)
        operators.append(Operator(node.op, macs.get(node.name, 0), node.inputs, weights, node.outputs, node.kind == "float" or node.name in apart))
    outputs = {graph.raw_output(index) for index in range(len(graph.outputs))}
    return Program(tuple(operators), {name: spec.size for name, spec in graph.tensors.items()}, frozenset(outputs), fused_already=True)


def op_by_op(program: Program) -> list[Kernel]:
    """One kernel an operator; views cost nothing."""
    return [
        Kernel(o.macs, _elements(o.reads, program.sizes), o.weights, _elements(o.writes, program.sizes), o.floating)
        for o in program.operators
        if o.op not in FREE
    ]


def fused(program: Program) -> list[Kernel]:
    """One kernel a group: an operator with the element-wise ones behind it that need nothing computed after it. Concatenations write in place."""
    aliases: dict[str, tuple[str, ...]] = {}
    made_by: dict[str, int] = {}
    groups: list[list[Operator]] = []
    parents: list[set[int]] = []
    for o in program.operators:
        reads = tuple(name for read in o.reads for name in aliases.get(read, (read,)))
        if o.op in FREE or o.op == "Concat":
            aliases.update(dict.fromkeys(o.writes, reads))
            continue
        resolved = replace(o, reads=reads)
        index = _joined(resolved, program, groups, parents, made_by) if o.op in POINTWISE else None
        if index is None:
            index = len(groups)
            groups.append([])
            parents.append(set())
        groups[index].append(resolved)
        parents[index] |= {made_by[name] for name in reads if name in made_by} - {index}
        made_by.update(dict.fromkeys(o.writes, index))
    outside = {name for output in program.outputs for name in aliases.get(output, (output,))}
    readers: dict[str, set[int]] = {}
    for index, group in enumerate(groups):
        for o in group:
            for name in o.reads:
                readers.setdefault(name, set()).add(index)
    return [_kernel(index, group, program.sizes, readers, outside) for index, group in enumerate(groups)]


def _joined(o: Operator, program: Program, groups: Sequence[Sequence[Operator]], parents: Sequence[set[int]], made_by: Mapping[str, int]) -> int | None:
    """The group that can compute `o` too: it makes an input of the same size, and no other input is computed from what it makes."""
    size = program.sizes.get(o.writes[0], 0)
    makers = {made_by[name]: program.sizes.get(name, 0) for name in o.reads if name in made_by}
    for index in sorted(makers, reverse=True):
        first = groups[index][0].op
        if makers[index] == size and (first in FUSING or first in POINTWISE) and not any(_reaches(other, index, parents) for other in makers if other != index):
            return index
    return None


def _reaches(start: int, wanted: int, parents: Sequence[set[int]]) -> bool:
    seen, waiting = set[int](), [start]
    while waiting:
        index = waiting.pop()
        if index == wanted:
            return True
        if index not in seen:
            seen.add(index)
            waiting += parents[index]
    return False


def _kernel(index: int, group: Sequence[Operator], sizes: Mapping[str, int], readers: Mapping[str, set[int]], outside: set[str]) -> Kernel:
    made = {name for o in group for name in o.writes}
    read = {name for o in group for name in o.reads} - made
    written = {name for name in made if name in outside or readers.get(name, set()) - {index}}
    # Batch normalisation is folded into the weights in front of it.
    weights = sum(o.weights for o in group if o.op != "BatchNormalization")
    return Kernel(sum(o.macs for o in group), _elements(read, sizes), weights, _elements(written, sizes), all(o.floating for o in group))


def _elements(names: Iterable[str], sizes: Mapping[str, int]) -> int:
    return sum(sizes.get(name, 0) for name in names)
