# SPDX-License-Identifier: Apache-2.0
"""The graph as the lowerings want it: every float island with resolved attributes, as an int8 row has them, so that both kinds share their lowerings.

A float island of the form keeps ONNX's own attributes and constant inputs. Here its weights become `weight` and `bias` in float32, its constant
operands "Constant" nodes, a Relu or Clip behind it part of it, and what TFLite has no operator for is put in operators that it has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from isthmus.errors import Problem
from isthmus.graph import QuantGraph, QuantNode
from isthmus.islands import Island
from isthmus.op_attributes import Call, IllegalCallError, resolve
from isthmus.ops import row_name
from isthmus.spec import FORM_LAYOUTS, TensorSpec
from isthmus.tables import FUNCTIONS
from isthmus.targets.tflite.island_attributes import free_of_the_batch, gemm_parts, pad_mode

WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
BINARY = frozenset({"Add", "Sub", "Mul", "Div"})
FUSES = WEIGHTED | BINARY | {"BatchMatMul"}
COMPARISONS = frozenset({"Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"})
LOGIC = frozenset({"And", "Or", "Not"})
OPERANDS = BINARY | COMPARISONS | LOGIC | {"Pow", "Max", "Min", "Sum", "Where"}
REDUCTIONS = frozenset({"ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL2"})
RESHAPES = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze"})
CUTS = frozenset({"Split", "Slice", "Transpose", "Gather"})
SAME_VALUES = frozenset({"Identity", "Dropout"})
MATHS = frozenset({
    "Exp", "Log", "Sqrt", "Abs", "Neg", "Floor", "Ceil", "Round", "Sign", "Sin", "Cos", "Erf", "Reciprocal", "Softsign", "Selu", "Celu",
})  # fmt: skip
WINDOWS = frozenset({"MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"})
# Their own lowerings read ONNX's attributes; `islands` and `sampling` say what of them TFLite has not.
AS_THEY_ARE = frozenset({"Softmax", "LogSoftmax", "LayerNormalization", "ArgMax", "ArgMin", "Cast", "GridSample"})
FLOAT_OPS = (
    WEIGHTED | OPERANDS | REDUCTIONS | RESHAPES | CUTS | SAME_VALUES | MATHS | WINDOWS | AS_THEY_ARE | (frozenset(FUNCTIONS) - {"Silu"})
    | {"PRelu", "Relu", "Clip", "Concat", "Pad", "Expand", "Tile", "Resize", "DepthToSpace", "SpaceToDepth", "BatchNormalization", "InstanceNormalization"}
)  # fmt: skip
ANY_TYPE = frozenset({"float32", "int32", "int64", "bool"})
MOVES = RESHAPES | CUTS | SAME_VALUES | {"Concat", "Expand", "Tile"}


def float_form(graph: QuantGraph) -> tuple[QuantGraph, list[Problem]]:
    """The graph with its float islands resolved, and what is wrong with those that stay as they were. Islands that are not in `FLOAT_OPS` stay, too."""
    if all(node.kind != "float" for node in graph.nodes):
        return graph, []
    return _Resolver(graph).run()


class _Resolver:
    def __init__(self, graph: QuantGraph) -> None:
        self.graph = graph
        self.tensors = dict(graph.tensors)
        self.nodes: list[QuantNode] = []
        self.outputs = {spec.name for spec in graph.outputs}
        self.readers: dict[str, list[QuantNode]] = {}
        for node in graph.nodes:
            for name in node.inputs:
                self.readers.setdefault(name, []).append(node)

    def run(self) -> tuple[QuantGraph, list[Problem]]:
        problems, fused = [], set()
        for node in self.graph.nodes:
            if node.output in fused:
                continue
            if node.kind != "float" or node.op not in FLOAT_OPS:
                self.nodes.append(node)
                continue
            try:
                made = self._fused(self._resolved(node))
            except IllegalCallError as illegal:
                problems.append(Problem(node.name, "tflite-island", illegal.found, illegal.fix))
                made = [node]
            self.nodes += made
            fused.add(made[-1].output)
        return replace(self.graph, nodes=tuple(self.nodes), tensors=self.tensors), problems

    # ---- one island
    def _resolved(self, node: QuantNode) -> list[QuantNode]:
        if not node.inputs:
            return [self.constant(name, values) for name, values in zip(node.outputs, Island(node).run([]), strict=True)]
        self._check_types(node)
        rule = _RULES.get(node.op)
        return [node] if rule is None else rule(self, node)

    def _check_types(self, node: QuantNode) -> None:
        inside = [self.tensors[name].dtype for name in node.inputs] + [str(array.dtype) for array in node.constants.values() if node.op in OPERANDS]
        written = [self.tensors[name].dtype for name in node.outputs]
        if node.op == "Cast":
            return
        allowed, gives = {"float32"}, {"float32"}
        if node.op in MOVES:
            allowed = gives = set(ANY_TYPE)
        elif node.op in COMPARISONS:
            gives = {"bool"}
        elif node.op in LOGIC:
            allowed = gives = {"bool"}
        elif node.op == "Where":
            allowed = {"bool", "float32"}
        elif node.op in ("ArgMax", "ArgMin"):
            gives = {"int64"}
        if not set(inside) <= allowed or not set(written) <= gives:
            raise IllegalCallError(f"{node.op} from {', '.join(inside)} to {', '.join(written)}", f"compute it on {' or '.join(sorted(allowed))}")

    def call(self, node: QuantNode, op: str = "") -> Call:
        shapes = tuple(tuple(self.tensors[name].shape for name in names) for names in (node.inputs, node.outputs))
        return Call(op or node.op, node.attributes, shapes[0], node.constants, shapes[1])

    def one_input(self, node: QuantNode) -> None:
        """Raises unless the first input alone is computed."""
        if len(node.inputs) != 1 or 0 in node.constants:
            raise IllegalCallError(f"{node.op} by a computed {'table' if 0 in node.constants else 'setting'}", "make every input but the first a constant")
        if len(node.outputs) != 1 and node.op != "Split":
            raise IllegalCallError(f"{node.op} with {len(node.outputs)} outputs", "use the first alone")

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    # ---- constants
    def constant(self, name: str, values: np.ndarray) -> QuantNode:
        """A stored tensor; a single number gets an axis."""
        values = np.atleast_1d(values)
        self.tensors[name] = TensorSpec(name, values.shape, str(values.dtype), FORM_LAYOUTS.get(values.ndim, ""))
        return QuantNode(name, "Constant", "float", (), (name,), constants={0: values})

    def operands(self, node: QuantNode) -> tuple[list[QuantNode], tuple[str, ...]]:
        """The node's inputs by position, constants among them as nodes of their own."""
        made, names, computed = [], [], iter(node.inputs)
        for position in range(len(node.inputs) + len(node.constants)):
            if position in node.constants:
                made.append(self.constant(f"{node.output}/operand_{position}", node.constants[position]))
                names.append(made[-1].output)
            else:
                names.append(next(computed))
        return made, tuple(names)

    def between(self, name: str, like: str, shape: tuple[int, ...] | None = None) -> str:
        """A float tensor between two nodes that one island becomes."""
        extents = self.shape(like) if shape is None else shape
        self.tensors[name] = replace(self.tensors[like], name=name, shape=extents, layout=FORM_LAYOUTS.get(len(extents), ""))
        return name

    # ---- activations
    def _fused(self, nodes: list[QuantNode]) -> list[QuantNode]:
        """The last of them takes the Relu or Clip that alone reads it."""
        last = nodes[-1]
        readers = self.readers.get(last.output, [])
        if last.op not in FUSES or len(readers) != 1 or last.output in self.outputs:
            return nodes
        follower = readers[0]
        bounds = bounds_of(follower) if follower.kind == "float" else None
        if bounds is None:
            return nodes
        return [*nodes[:-1], replace(last, outputs=follower.outputs, activation=follower.op, activation_range=bounds)]


def bounds_of(node: QuantNode) -> tuple[float, float] | None:
    """The real bounds of a Relu, or of a Clip by constants; None of anything else."""
    if node.op == "Relu":
        return 0.0, np.inf
    if node.op != "Clip" or len(node.inputs) != 1:
        return None
    low, high = (float(node.constants[place].reshape(-1)[0]) if place in node.constants else bound for place, bound in ((1, -np.inf), (2, np.inf)))
    return (low, high) if low <= high else None


# ---- rules: an island -> what is lowered instead of it
Rule = Callable[[_Resolver, QuantNode], list[QuantNode]]


def _weighted(resolver: _Resolver, node: QuantNode) -> list[QuantNode]:
    """Conv and ConvTranspose."""
    if len(node.inputs) != 1 or 1 not in node.constants:
        raise IllegalCallError(f"{node.op} by a computed weight or bias", "make weight and bias constants")
    weight, bias = node.constants[1], node.constants.get(2)
    given = {"kernel_shape": list(weight.shape[2:]), **node.attributes}
    call = Call(node.op, given, (resolver.shape(node.inputs[0]),), {}, (resolver.shape(node.output),))
    return [replace(node, attributes=resolve(call), weight=weight, bias=bias, constants={})]


def _gemm(resolver: _Resolver, node: QuantNode) -> list[QuantNode]:
    if len(node.inputs) != 1 or 1 not in node.constants:
        raise IllegalCallError("Gemm of two computed matrices, or with a computed bias", "write it as MatMul and Add")
    weight, bias = gemm_parts(node.attributes, node.constants)
    return [replace(node, attributes={}, weight=weight, bias=bias, constants={})]


def _matmul(resolver: _Resolver, node: QuantNode) -> list[QuantNode]:
    weight = node.constants.get(1)
    if weight is not None and weight.ndim == 2 and len(resolver.shape(node.inputs[0])) >= 2:
        return [replace(node, weight=weight, constants={})]
    made, names = resolver.operands(node)
    if min(len(resolver.shape(name)) for name in names) < 2:
        raise IllegalCallError("MatMul by a vector", "give it a second axis of extent 1")
    return [*made, replace(node, op="BatchMatMul", inputs=names, constants={})]


def _with_operands(resolver: _Resolver, node: QuantNode) -> list[QuantNode]:
    made, names = resolver.operands(node)
    return [*made, replace(node, inputs=names, constants={})]


def _clamp(resolver: _Resolver, node: QuantNode) -> list[QuantNode]:
    bounds = bounds_of(node)
    if bounds is None:
        raise IllegalCallError("Clip with bounds that are computed, or in the wrong order", "give constant bounds, the lower first")
    return [replace(node, activation_range=bounds, constants={})]


def _one_input(resolver: _Resolver, node: QuantNode) -> list[QuantNode]:
    """Everything whose attributes the form resolves as well, under the name of its row."""
    resolver.one_input(node)
    op = row_name(node.op, node.attributes, 1)
    return [replace(node, op=op, attributes=resolve(resolver.call(node, op)))]


def _any_axis(resolver: _Resolver, node: QuantNode) -> list[QuantNode]:
    """As `_one_input`, but the batch is an axis as any other."""
    resolver.one_input(node)
    return [replace(node, attributes=free_of_the_batch(resolver.call(node)), constants={})]


def _reduction(resolver: _Resolver, node: QuantNode) -> list[QuantNode]:
    resolver.one_input(node)
    axes = node.constants.get(1)
    if axes is None or not axes.size:
        if node.attributes.get("noop_with_empty_axes", 0):
            return [replace(node, op="Identity", attributes={}, constants={})]
        axes = np.arange(len(resolver.shape(node.inputs[0])))
    attributes = free_of_the_batch(replace(resolver.call(node, "ReduceMean"), constants={1: axes}))
    return [replace(node, attributes=attributes, constants={})]


def _concat(resolver: _Resolver, node: QuantNode) -> list[QuantNode]:
    made, names = resolver.operands(node)
    joined = replace(node, inputs=names, constants={})
    return [*made, replace(joined, attributes=free_of_the_batch(resolver.call(joined)))]


def _pad(resolver: _Resolver, node: QuantNode) -> list[QuantNode]:
    resolver.one_input(node)
    mode, constant = pad_mode(resolver.call(node))
    return [replace(node, attributes=free_of_the_batch(constant) | {"mode": mode}, constants={})]


def _reshape(resolver: _Resolver, node: QuantNode) -> list[QuantNode]:
    resolver.one_input(node)
    return [replace(node, attributes={}, constants={})]


def _expand(resolver: _Resolver, node: QuantNode) -> list[QuantNode]:
    resolver.one_input(node)
    before, after = resolver.shape(node.inputs[0]), resolver.shape(node.output)
    if len(before) == len(after):
        return [replace(node, constants={})]
    widened = resolver.between(f"{node.output}/widened", node.inputs[0], (*[1] * (len(after) - len(before)), *before))
    first = replace(node, name=f"{node.name}/widened", op="Reshape", outputs=(widened,), constants={})
    return [first, replace(node, inputs=(widened,), constants={})]


def _tile(resolver: _Resolver, node: QuantNode) -> list[QuantNode]:
    resolver.one_input(node)
    return [replace(node, attributes={"repeats": [int(times) for times in node.constants[1].reshape(-1)]}, constants={})]


def _same(resolver: _Resolver, node: QuantNode) -> list[QuantNode]:
    resolver.one_input(node)
    if node.op == "Dropout" and 2 in node.constants and bool(node.constants[2].reshape(-1)[0]):
        raise IllegalCallError("Dropout in training mode", "export the model for inference")
    return [replace(node, op="Identity", attributes={}, constants={})]


def _global_max_pool(resolver: _Resolver, node: QuantNode) -> list[QuantNode]:
    axes = list(range(2, len(resolver.shape(node.inputs[0]))))
    return [replace(node, op="ReduceMax", attributes={"axes": axes, "keepdims": 1})]


def _batch_norm(resolver: _Resolver, node: QuantNode) -> list[QuantNode]:
    """x * factor + shift, a number each a channel: worked out in float64."""
    resolver.one_input(node)
    if node.attributes.get("training_mode", 0):
        raise IllegalCallError("BatchNormalization in training mode", "export the model for inference")
    gain, offset, mean, variance = (node.constants[place].astype(np.float64) for place in (1, 2, 3, 4))
    factor = gain / np.sqrt(variance + float(node.attributes.get("epsilon", 1e-5)))
    shape = (1, -1, *[1] * (len(resolver.shape(node.inputs[0])) - 2))
    held = [
        resolver.constant(f"{node.output}/{label}", values.astype(np.float32).reshape(shape))
        for label, values in (("factor", factor), ("shift", offset - mean * factor))
    ]
    scaled = resolver.between(f"{node.output}/scaled", node.output)
    product = QuantNode(f"{node.name}/scaled", "Mul", "float", (node.inputs[0], held[0].output), (scaled,))
    return [*held, product, QuantNode(node.name, "Add", "float", (scaled, held[1].output), node.outputs)]


_RULES: Mapping[str, Rule] = {
    **dict.fromkeys(("Conv", "ConvTranspose"), _weighted),
    "Gemm": _gemm,
    "MatMul": _matmul,
    **dict.fromkeys(OPERANDS, _with_operands),
    **dict.fromkeys(("Relu", "Clip"), _clamp),
    **dict.fromkeys((*FUNCTIONS, "PRelu", *MATHS, "MaxPool", "AveragePool", "GlobalAveragePool", "Resize", "DepthToSpace", "SpaceToDepth"), _one_input),
    **dict.fromkeys(CUTS, _any_axis),
    **dict.fromkeys(REDUCTIONS, _reduction),
    "InstanceNormalization": _one_input,
    "Concat": _concat,
    "Pad": _pad,
    **dict.fromkeys(RESHAPES, _reshape),
    "Expand": _expand,
    "Tile": _tile,
    **dict.fromkeys(SAME_VALUES, _same),
    "GlobalMaxPool": _global_max_pool,
    "BatchNormalization": _batch_norm,
}

__all__ = ["FLOAT_OPS", "REDUCTIONS", "float_form"]
