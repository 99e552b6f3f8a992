# SPDX-License-Identifier: Apache-2.0
"""What a graph costs before anything runs: multiply-accumulates, FLOPs, parameters, bytes. A figure without its convention means nothing.

Conventions (`CONVENTIONS`): "mac" counts multiply-accumulates of convolutions and matrix products. "flop" counts 2 a MAC, and 1 an element
for each bias, activation and addition, the kernel's size an output for pools, 2 an element for batch normalisation, 5 for softmax. "keras" is
what TensorFlow's profiler reports (tensorflow/python/profiler/internal/flops_registry.py, read by keras-flops): like "flop", but no
activation counts, and batch normalisation is 2 an element and 6 a channel, as Keras 3 runs it: several operators that each have a rule. "keras2"
is what the same profiler reports of a Keras 2 model, where batch normalisation is one fused operator (FusedBatchNormV3) without a rule: it counts 0.
The graph cannot tell which Keras a paper used; its text or its figures can. All count one run of the graph at its own batch size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper, inliner, numpy_helper, shape_inference

from isthmus.best_order import Step, least_peak_bytes
from isthmus.errors import IsthmusError
from isthmus.graph import QuantGraph, QuantNode
from isthmus.ops import OPS

CONVENTIONS = {
    "mac": "multiply-accumulates of convolutions and matrix products",
    "flop": "2 a MAC, 1 an element for bias, activation and addition, kernel size an output for pools",
    "keras": "TensorFlow profiler: 2 a MAC, 1 an element for bias and addition, kernel size an output for pools, activations 0",
    "keras2": "as keras, but batch normalisation 0: in Keras 2 it is one fused operator, for which the profiler has no rule",
}

Shape = tuple[int, ...]


@dataclass(frozen=True)
class NodeCost:
    """One operator. `parameters` are trained numbers, `buffers` those only kept (running statistics); `share` is of the graph's MACs."""

    name: str
    op: str
    output_shape: Shape
    parameters: int
    buffers: int
    macs: int
    flops: int
    keras_flops: int
    weight_bytes: int
    output_bytes: int
    share: float = 0.0

    def count(self, convention: str) -> int:
        """The figure in one of `CONVENTIONS`. Raises `IsthmusError` on an unknown one."""
        if convention not in CONVENTIONS:
            raise IsthmusError(f"unknown convention {convention!r}: there are {', '.join(CONVENTIONS)}")
        fused = 0 if self.op == "BatchNormalization" else self.keras_flops
        return {"mac": self.macs, "flop": self.flops, "keras": self.keras_flops, "keras2": fused}[convention]


@dataclass(frozen=True)
class Cost:
    """Sums over `per_node`.

    `weight_bytes` is every constant the operators read (int8 weights and int32 biases in the form; scales are not counted).
    `activation_bytes` is the peak of live activations when the operators run in the graph's order: reshapes share their input's buffer, and
    an element-wise operator writes over an input nobody else reads. `best_order_bytes` is the same in the order that needs the least, None where
    there are too many orders to search. `uncounted` names operators without a rule: their work is in no sum.
    """

    macs: int
    flops: int
    keras_flops: int
    weight_bytes: int
    activation_bytes: int
    parameters: int
    buffers: int
    per_node: tuple[NodeCost, ...]
    uncounted: tuple[str, ...] = ()
    best_order_bytes: int | None = None

    def count(self, convention: str) -> int:
        """The figure in one of `CONVENTIONS`. Raises `IsthmusError` on an unknown one."""
        if convention not in CONVENTIONS:
            raise IsthmusError(f"unknown convention {convention!r}: there are {', '.join(CONVENTIONS)}")
        return sum(row.count(convention) for row in self.per_node)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Cost:
        nodes = tuple(NodeCost(**{**node, "output_shape": tuple(node["output_shape"])}) for node in data["per_node"])
        return cls(**{**data, "per_node": nodes, "uncounted": tuple(data["uncounted"])})


# ---- rules, on shapes alone, so that the float model and the form share them
@dataclass(frozen=True)
class _Operator:
    """What a rule sees: `inputs` are the shapes by position, constants included, () for one left out."""

    op: str
    inputs: tuple[Shape, ...]
    output: Shape
    attributes: Mapping[str, Any] = field(default_factory=dict)
    has_bias: bool = False


# MACs, what "flop" counts beside 2 a MAC, what "keras" counts beside 2 a MAC.
Counts = tuple[int, int, int]


def _conv(o: _Operator) -> Counts:
    return math.prod(o.output) * math.prod(o.inputs[1][1:]), *_bias(o)


def _conv_transpose(o: _Operator) -> Counts:
    """Every input element is multiplied with every weight of its channel: [in, out/group, *kernel]."""
    return math.prod(o.inputs[0]) * math.prod(o.inputs[1][1:]), *_bias(o)


def _gemm(o: _Operator) -> Counts:
    return math.prod(o.output) * o.inputs[0][0 if o.attributes.get("transA") else -1], *_bias(o)


def _bias(o: _Operator) -> tuple[int, int]:
    return (math.prod(o.output), math.prod(o.output)) if o.has_bias else (0, 0)


def _batch_normalisation(o: _Operator) -> Counts:
    return 0, 2 * math.prod(o.output), 2 * math.prod(o.output) + 6 * o.output[1]


def _pool(o: _Operator) -> Counts:
    compared = math.prod(o.output) * math.prod(o.attributes["kernel_shape"])
    return 0, compared, compared


def _reduction(o: _Operator) -> Counts:
    return 0, math.prod(o.inputs[0]), math.prod(o.inputs[0])


def _softmax(o: _Operator) -> Counts:
    return 0, 5 * math.prod(o.output), 5 * math.prod(o.output)


def _resize(o: _Operator) -> Counts:
    """Linear interpolation weighs 2 values along each resized axis; nearest copies."""
    resized = sum(before != after for before, after in zip(o.inputs[0], o.output, strict=False))
    return 0, math.prod(o.output) * 2**resized if o.attributes.get("mode") in ("linear", b"linear") else 0, 0


def _grid_sample(o: _Operator) -> Counts:
    """Four neighbours an output."""
    return 0, 4 * math.prod(o.output), 0


def _layer_normalisation(o: _Operator) -> Counts:
    """Mean, variance, normalise, scale and shift: 8 an element, as much in both conventions that count it."""
    return 0, 8 * math.prod(o.output), 8 * math.prod(o.output)


def _activation(o: _Operator) -> Counts:
    return 0, math.prod(o.output), 0


def _elementwise(o: _Operator) -> Counts:
    done = math.prod(o.output) * max(1, len(o.inputs) - 1)
    return 0, done, done


def _nothing(o: _Operator) -> Counts:
    return 0, 0, 0


WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm"})  # input 2 is a bias
VIEWS = frozenset({"Flatten", "Reshape", "Squeeze", "Unsqueeze", "Identity", "Dropout"})
# fmt: off
ACTIVATIONS = frozenset({
    "Relu", "Clip", "Sigmoid", "Tanh", "LeakyRelu", "PRelu", "Elu", "Selu", "Celu", "HardSigmoid", "HardSwish", "Gelu", "Mish", "Softplus", "Softsign",
    "ThresholdedRelu", "Erf", "Exp", "Sqrt", "Abs", "Silu",
})
MOVES = frozenset({"Transpose", "Concat", "Split", "Slice", "Pad", "Gather", "Cast", "Expand", "Tile", "Shape", "DepthToSpace", "SpaceToDepth"})
# fmt: on
IN_PLACE = ACTIVATIONS | {"BatchNormalization", "Softmax", "LogSoftmax", "Neg", "Log", "Reciprocal"}

_RULES: dict[str, Callable[[_Operator], Counts]] = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "MatMul": _gemm,
    "BatchMatMul": _gemm,
    **dict.fromkeys(("Resize", "ResizeNearest", "ResizeLinear"), _resize),
    "GridSample": _grid_sample,
    "LayerNormalization": _layer_normalisation,
    "BatchNormalization": _batch_normalisation,
    **dict.fromkeys(("MaxPool", "AveragePool", "LpPool"), _pool),
    **dict.fromkeys(("GlobalAveragePool", "GlobalMaxPool", "ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ArgMax", "ArgMin"), _reduction),
    **dict.fromkeys(("Softmax", "LogSoftmax"), _softmax),
    **dict.fromkeys(ACTIVATIONS, _activation),
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Sum", "Mean", "Equal", "Greater", "Less", "Neg", "Log", "Reciprocal"), _elementwise),
    # Moves and conversions: bytes, no arithmetic that any of the conventions counts.
    **dict.fromkeys(VIEWS, _nothing),
    **dict.fromkeys(MOVES, _nothing),
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear", "Requantize", "Constant"), _nothing),
}


# ---- the form
def cost_of_graph(graph: QuantGraph) -> Cost:
    """The form's cost: int8 weights, int32 biases, int8 activations (a float island's in float32). Quantisers at the border count nothing."""
    rows, uncounted = [], []
    for node in graph.nodes:
        if node.kind == "border":
            continue
        shape = graph.tensors[node.output].shape
        counts = _counts_of_node(node, graph)
        if counts is None:
            uncounted.append(f"{node.op} ({node.name})")
            counts = (0, 0, 0)
        stored = node.op == "Constant"
        constants = [array for array in (node.weight, node.bias) if array is not None] + (
            list(node.constants.values()) if stored else _trained(node.constants.values())
        )
        extra = math.prod(shape) if node.activation else 0
        rows.append(
            NodeCost(
                node.name,
                node.op,
                shape,
                sum(array.size for array in constants),
                0,
                counts[0],
                2 * counts[0] + counts[1] + extra,
                2 * counts[0] + counts[2],
                sum(array.nbytes for array in constants),
                0 if stored else sum(_activation_bytes(graph, name) for name in node.outputs),
            )
        )
    return _summed(rows, uncounted, _peaks_of_graph(graph))


def _counts_of_node(node: QuantNode, graph: QuantGraph) -> Counts | None:
    rule = _RULES.get(node.op)
    if rule is None:
        return None
    shapes = {position: array.shape for position, array in node.constants.items()}
    activations = iter(graph.tensors[name].shape for name in node.inputs)
    inputs = [shapes[index] if index in shapes else next(activations, ()) for index in range(len(node.inputs) + len(shapes))]
    if node.weight is not None:
        inputs.insert(1, node.weight.shape)
    has_bias = node.bias is not None or (node.op in WEIGHTED and 2 in node.constants)
    seen = _Operator(node.op, tuple(inputs), graph.tensors[node.output].shape, node.attributes, has_bias)
    macs, flops, keras = rule(seen)
    return (OPS[node.op].macs(node, graph.tensors) if node.kind == "int8" else macs), flops, keras


def _trained(arrays: Iterable[np.ndarray]) -> list[np.ndarray]:
    """Float constants with axes: a scalar is a setting (a clip's bound), whole numbers are shapes and indices."""
    return [array for array in arrays if array.ndim > 0 and array.dtype.kind == "f"]


def _activation_bytes(graph: QuantGraph, tensor: str) -> int:
    spec = graph.tensors[tensor]
    return spec.size * np.dtype(spec.dtype).itemsize


def _peaks_of_graph(graph: QuantGraph) -> tuple[int, int | None]:
    """The float side of a quantised border is the caller's: an artifact takes and gives the raw int8 tensor."""
    inputs = {graph.raw_input(index) for index in range(len(graph.inputs))}
    outputs = {graph.raw_output(index) for index in range(len(graph.outputs))}
    outside = {spec.name for spec in (*graph.inputs, *graph.outputs)} - inputs - outputs
    stored = {name for node in graph.nodes if node.op == "Constant" for name in node.outputs}  # weight bytes
    nodes = [node for node in graph.nodes if node.op != "Constant" and not (set(node.inputs) | set(node.outputs)) & outside]
    steps = [(node.op, tuple(name for name in node.inputs if name not in stored), node.outputs) for node in nodes]
    return _peaks(steps, {name: _activation_bytes(graph, name) for name in graph.tensors}, inputs, outputs)


# ---- a float model
def cost_of_onnx(model: onnx.ModelProto) -> Cost:
    """The cost of a float model, its constants at their own width. Raises `IsthmusError` where a shape is not static or cannot be inferred."""
    graph = _inferred(model).graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    constants |= {node.output[0]: _constant_value(node) for node in graph.node if node.op_type == "Constant"}
    shapes: dict[str, Shape] = {name: tuple(array.shape) for name, array in constants.items()}
    widths: dict[str, int] = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        if value.name not in constants:
            shapes[value.name] = _static_shape(value)
            widths[value.name] = math.prod(shapes[value.name]) * _itemsize(value)
    rows, uncounted, seen = [], [], set[str]()
    for index, node in enumerate(graph.node):
        if node.op_type == "Constant":
            continue
        name = node.name or f"{node.op_type}_{index}"
        unknown = [output for output in node.output if output and output not in shapes]
        if unknown:
            raise IsthmusError(f"node {name!r} ({node.op_type}): the shape of its output {unknown[0]!r} cannot be inferred; simplify the model")
        new = [tensor for tensor in node.input if tensor in constants and tensor not in seen]
        seen.update(new)
        row = _row_of_onnx(node, name, shapes, [constants[tensor] for tensor in new], widths)
        if row is None:
            uncounted.append(f"{node.op_type} ({name})")
            row = _uncounted_row(node, name, shapes, _trained(constants[tensor] for tensor in new), widths)
        rows.append(row)
    names = {value.name for value in graph.input} - set(constants)
    steps = [(node.op_type, tuple(name for name in node.input if name in widths), tuple(name for name in node.output if name in widths)) for node in graph.node]
    return _summed(rows, uncounted, _peaks(steps, widths, names, {value.name for value in graph.output}))


def _row_of_onnx(node: onnx.NodeProto, name: str, shapes: Mapping[str, Shape], new: Sequence[np.ndarray], widths: Mapping[str, int]) -> NodeCost | None:
    """`new` are the constants no node before has read: a shared weight is counted once."""
    rule = _RULES.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    if rule is None:
        return None
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    output = shapes[node.output[0]]
    has_bias = node.op_type in WEIGHTED and len(node.input) > 2 and bool(node.input[2])
    macs, flops, keras = rule(_Operator(node.op_type, tuple(shapes.get(tensor, ()) for tensor in node.input), output, attributes, has_bias))
    if node.op_type == "Clip":
        new = []
    # Running mean and variance are the last two of BatchNormalization's constants: kept, never trained.
    kept = list(new[2:]) if node.op_type == "BatchNormalization" and len(new) == 4 else []
    trained = _trained(new[:2] if kept else new)
    return NodeCost(
        name,
        node.op_type,
        output,
        sum(array.size for array in trained),
        sum(array.size for array in kept),
        macs,
        2 * macs + flops,
        2 * macs + keras,
        sum(array.nbytes for array in (*trained, *kept)),
        widths.get(node.output[0], 0),
    )


def _uncounted_row(node: onnx.NodeProto, name: str, shapes: Mapping[str, Shape], trained: Sequence[np.ndarray], widths: Mapping[str, int]) -> NodeCost:
    parameters, stored = sum(array.size for array in trained), sum(array.nbytes for array in trained)
    return NodeCost(name, node.op_type, shapes[node.output[0]], parameters, 0, 0, 0, 0, stored, widths.get(node.output[0], 0))


def _inferred(model: onnx.ModelProto) -> onnx.ModelProto:
    try:
        flat = inliner.inline_local_functions(model) if model.functions else model
        return shape_inference.infer_shapes(flat, strict_mode=True, data_prop=True)
    except Exception as error:  # onnx's C++ exceptions have several unrelated types
        raise IsthmusError(f"the model's shapes cannot be inferred: {str(error).strip().splitlines()[0][:300]}; check it with onnx.checker") from error


def _constant_value(node: onnx.NodeProto) -> np.ndarray:
    value = helper.get_attribute_value(node.attribute[0])
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value)


def _static_shape(value: onnx.ValueInfoProto) -> Shape:
    tensor = value.type.tensor_type
    shown = [extent.dim_value if extent.HasField("dim_value") else (extent.dim_param or "?") for extent in tensor.shape.dim]
    if not tensor.HasField("shape") or not all(isinstance(extent, int) for extent in shown):
        raise IsthmusError(f"tensor {value.name!r} has the shape {shown}, which is not static; give the input's shape (--shape)")
    return tuple(int(extent) for extent in shown)


def _itemsize(value: onnx.ValueInfoProto) -> int:
    return int(helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).itemsize)


# ---- both
def _summed(rows: Sequence[NodeCost], uncounted: Sequence[str], peaks: tuple[int, int | None]) -> Cost:
    total = sum(row.macs for row in rows)
    per_node = tuple(NodeCost(**{**asdict(row), "output_shape": row.output_shape, "share": row.macs / total if total else 0.0}) for row in rows)
    sums = {name: sum(getattr(row, name) for row in rows) for name in ("flops", "keras_flops", "weight_bytes", "parameters", "buffers")}
    return Cost(macs=total, activation_bytes=peaks[0], best_order_bytes=peaks[1], per_node=per_node, uncounted=tuple(uncounted), **sums)


def _peaks(
    steps: Sequence[tuple[str, Sequence[str], Sequence[str]]], sizes: Mapping[str, int], inputs: Collection[str], outputs: Collection[str]
) -> tuple[int, int | None]:
    """(in the graph's order, in the best order)."""
    free = [Step(tuple(reads), tuple(writes), op in VIEWS, op in IN_PLACE) for op, reads, writes in steps]
    return _peak_bytes(steps, sizes, inputs, outputs), least_peak_bytes(free, sizes, sorted(inputs), sorted(outputs))


def _peak_bytes(steps: Sequence[tuple[str, Sequence[str], Sequence[str]]], sizes: Mapping[str, int], inputs: Iterable[str], outputs: Iterable[str]) -> int:
    """The largest sum of buffers alive at one step (see `Cost`). Inputs live from the start and are never written over, outputs to the end."""
    last_read = {name: index for index, (_, reads, _) in enumerate(steps) for name in reads} | dict.fromkeys(outputs, len(steps))
    buffer_of = {name: name for name in inputs}
    first = dict.fromkeys(buffer_of, 0)
    last = {name: last_read.get(name, 0) for name in buffer_of}
    kept = set(buffer_of)
    for index, (op, reads, writes) in enumerate(steps):
        for position, name in enumerate(writes):
            buffer = buffer_of.get(reads[0]) if reads and position == 0 else None
            fits = buffer is not None and sizes[name] <= sizes[buffer]
            if buffer is not None and fits and (op in VIEWS or (op in IN_PLACE and buffer not in kept and last[buffer] <= index)):
                buffer_of[name] = buffer
                last[buffer] = max(last[buffer], last_read.get(name, index))
            else:
                buffer_of[name] = name
                first[name], last[name] = index, last_read.get(name, index)
    change = [0] * (len(steps) + 2)
    for name, start in first.items():
        change[start] += sizes[name]
        change[last[name] + 1] -= sizes[name]
    peak = alive = 0
    for step in change:
        alive += step
        peak = max(peak, alive)
    return peak
