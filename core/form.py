# SPDX-License-Identifier: Apache-2.0
"""Reads an ONNX model as the int8 form: the list of integer nodes, or every rule it breaks and where. Never raises on a bad model.

Rules have names (`RULES`); each has a test that breaks exactly it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from isthmus.errors import IsthmusError, Problem
from isthmus.form_values import bounds_of, constant_of, given, is_power_of_two, label_of, name_of, short
from isthmus.form_weights import ACCUMULATOR_LIMIT, Held, Layer, Weights, read_weights
from isthmus.graph import IR_VERSION, OPSET, QuantGraph, QuantNode
from isthmus.islands import Island
from isthmus.kernels import product_limit
from isthmus.op_attributes import Call, IllegalCallError, resolve
from isthmus.ops import OPS, TAKE_CONSTANTS, Op, row_name
from isthmus.recipe import Recipe
from isthmus.spec import FORM_LAYOUTS, TensorSpec

RECIPE_KEY = "isthmus.recipe"
ISLANDS_KEY = "isthmus.float_islands"
FLOAT32_MAX = float(np.finfo(np.float32).max)
# Float operators whose work is too long for a trial at every reading; onnx's checker has seen their shapes.
WINDOWED = frozenset({"Conv", "ConvTranspose", "AveragePool", "MaxPool", "LpPool", "DeformConv", "RoiAlign"})

RULES: dict[str, str] = {
    "onnx-checker": "the file is a valid ONNX model with inferable shapes",
    "version": f"opset {OPSET} of the default domain, IR version {IR_VERSION}",
    "metadata": "the model carries its recipe and its list of float islands",
    "domain": "only operators of the default ONNX domain",
    "subgraph": "no control flow",
    "static-shape": "every activation has a static shape and at least one axis, the batch",
    "border-dtype": "graph inputs and outputs are float32",
    "quantiser-dtype": "QuantizeLinear and DequantizeLinear carry an explicit int8 zero point",
    "quantiser-scale": "an activation's scale is one finite positive float32 constant, and so are its largest values",
    "scheme": "zero points and scales fit the recipe's scheme",
    "dequantiser": "a DequantizeLinear uses the scale and zero point its tensor was quantised with",
    "weight": "weights are int8 constants behind a DequantizeLinear with zero point 0 and one scale a tensor or an output channel",
    "bias": "a bias is an int32 constant behind a DequantizeLinear with scale input x weight",
    "accumulator-overflow": "no sum of products can leave int32",
    "operand": "an int8 operator's activations are int8 tensors, its other inputs constants of a shape and a place that it takes",
    "attributes": "attributes and constant inputs are those the form lists for the operator, and nothing works along the batch",
    "passes-scale": "an operator that does no arithmetic keeps scale and zero point",
    "float-island": "an operator that stays float is in the list, onnx's reference can compute it, and the list holds nothing else",
}


def read_form(model: ir.Model | onnx.ModelProto) -> tuple[QuantGraph | None, list[Problem]]:
    """The graph and the broken rules: exactly one of them is non-empty."""
    try:
        proto = model if isinstance(model, onnx.ModelProto) else ir.serde.serialize_model(model)
        problems = _model_rules(proto)
        if problems:
            return None, problems
        onnx.checker.check_model(proto)
        inferred = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
        # Only what the checker has passed goes on: onnx-ir's reader takes broken files for granted.
        inside, given = ir.serde.deserialize_model(inferred), ir.serde.deserialize_model(proto)
    except Exception as error:  # noqa: BLE001  # the checker's C++ exceptions have several unrelated types
        return None, [Problem("model", "onnx-checker", _first_line(error), "export the model again with a current exporter")]
    try:
        reader = _Reader(inside)
    except IsthmusError as error:
        return None, [Problem("model", "metadata", str(error), "compile the model with isthmus, which writes both")]
    reader.read()
    if reader.problems:
        return None, reader.problems
    return reader.graph(given), []


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


def _model_rules(proto: onnx.ModelProto) -> list[Problem]:
    problems = []
    domains = {entry.domain: entry.version for entry in proto.opset_import}
    if domains.get("", domains.get("ai.onnx")) != OPSET or proto.ir_version != IR_VERSION:
        found = f"opset {domains.get('', domains.get('ai.onnx'))}, IR version {proto.ir_version}"
        problems.append(Problem("model", "version", found, f"convert to opset {OPSET}, IR version {IR_VERSION} ('isthmus compile' does)"))
    for node in proto.graph.node:
        if node.domain not in ("", "ai.onnx"):
            problems.append(Problem(node.name or node.op_type, "domain", f"{node.op_type} is of domain {node.domain!r}", "replace it by standard operators"))
        if any(attribute.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for attribute in node.attribute):
            problems.append(Problem(node.name or node.op_type, "subgraph", f"{node.op_type} holds a subgraph", "export without control flow"))
    if proto.functions:
        problems.append(Problem(proto.functions[0].name, "domain", "the model defines functions of its own", "inline them (onnx.inliner)"))
    return problems


def _metadata(model: ir.Model) -> tuple[Recipe, tuple[str, ...]]:
    try:
        recipe = Recipe.from_json(model.metadata_props[RECIPE_KEY])
        islands = json.loads(model.metadata_props[ISLANDS_KEY])
    except KeyError as error:
        raise IsthmusError(f"metadata {error.args[0]!r} is missing") from None
    except (json.JSONDecodeError, RecursionError, TypeError) as error:
        raise IsthmusError(f"metadata is not JSON: {error}") from None
    if not isinstance(islands, list) or not all(isinstance(name, str) for name in islands):
        raise IsthmusError(f"metadata {ISLANDS_KEY!r} is not a list of node names")
    return recipe, tuple(islands)


@dataclass(frozen=True)
class _Group:
    """DequantizeLinear -> operator -> (Relu | Clip)? -> QuantizeLinear: the operator's row, and the nodes that belong to it beside the operator."""

    row: Op
    label: str
    quantisers: tuple[ir.Node, ...]
    activation: ir.Node | None = None
    others: tuple[ir.Node, ...] = ()

    @property
    def nodes(self) -> tuple[ir.Node, ...]:
        return (*self.quantisers, *self.others, *([] if self.activation is None else [self.activation]))


class _Reader:
    """One pass over the nodes in their order; fills `nodes`, `tensors`, `problems`."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.recipe, self.islands = _metadata(model)
        self.problems: list[Problem] = []
        self.nodes: list[QuantNode] = []
        self.tensors: dict[str, TensorSpec] = {}
        self.constants: dict[str, Held] = {}  # by the float value behind their DequantizeLinear
        self.dequantised: dict[str, str] = {}  # float value -> the int8 tensor it stands for
        self.absorbed: set[int] = set()  # ids of nodes that belong to a group already read
        self.bordered: set[str] = set()  # int8 tensors that already have their border DequantizeLinear
        self.outputs = {value.name for value in model.graph.outputs}
        self.seen_islands: set[str] = set()

    # ---- the pass
    def read(self) -> None:
        for value in self.model.graph.inputs:
            self._border(value)
            self._float_tensor(value)
        constants = [node for node in self.model.graph if node.op_type == "DequantizeLinear" and constant_of(node.inputs[0]) is not None]
        self.absorbed.update(id(node) for node in constants)
        for node in constants:  # first: they stand anywhere in front of their readers, and decide what belongs to a group
            self._constant_dequantiser(node)
        for node in self.model.graph:
            if id(node) not in self.absorbed:
                self._node(node)
        for value in self.model.graph.outputs:
            self._border(value)
            if value.producer() is None or name_of(value) in self.constants:
                self._say(name_of(value), "float-island", "an output that no node computes", "remove it")
        absent = [name for name in self.islands if name not in self.seen_islands]
        for name in absent:
            self._say(name, "float-island", "listed as a float island, but no such float node", "remove it from the list")
        if not self.problems:
            self._try_islands()

    def _try_islands(self) -> None:
        """Every short float island runs once, on zeros: the checker accepts more than onnx's reference can compute."""
        for node in self.nodes:
            if node.kind != "float":
                continue
            try:
                island = Island(node)
                if node.op in WINDOWED:
                    continue
                found = [value.shape for value in island.run([np.zeros(self.tensors[name].shape, self.tensors[name].dtype) for name in node.inputs])]
            except IsthmusError as error:
                self._say(node.name, "float-island", str(error), "replace the operator by one that onnx's reference evaluator has")
                continue
            expected = [self.tensors[name].shape for name in node.outputs]
            if found != expected:
                self._say(node.name, "float-island", f"gives shapes {found}, the graph says {expected}", "export the model again")

    def graph(self, model: ir.Model) -> QuantGraph:
        graph = QuantGraph(model, (), (), tuple(self.nodes), self.tensors, self.islands, self.recipe)
        names = [[name_of(value) for value in values] for values in (self.model.graph.inputs, self.model.graph.outputs)]
        float_border = [tuple(self.tensors[name] for name in side) for side in names]
        graph = QuantGraph(model, float_border[0], float_border[1], graph.nodes, self.tensors, self.islands, self.recipe)
        inputs = tuple(_border_spec(self.tensors, graph.raw_input(i), spec) for i, spec in enumerate(graph.inputs))
        outputs = tuple(_border_spec(self.tensors, graph.raw_output(i), spec) for i, spec in enumerate(graph.outputs))
        return QuantGraph(model, inputs, outputs, graph.nodes, self.tensors, self.islands, self.recipe)

    def _say(self, node: str, rule: str, found: str, fix: str) -> None:
        self.problems.append(Problem(node, rule, found, fix))

    def _border(self, value: ir.Value) -> None:
        if value.dtype != ir.DataType.FLOAT:
            self._say(name_of(value), "border-dtype", f"is {value.dtype}", "make it float32: the form quantises inside")

    def _node(self, node: ir.Node) -> None:
        if node.op_type == "DequantizeLinear":
            self._dequantise(node)
        elif node.op_type == "QuantizeLinear":
            self._quantise_alone(node)
        else:
            self._operator(node)

    # ---- quantisers
    def _scale_and_zero(self, node: ir.Node) -> tuple[np.ndarray | None, np.ndarray | None]:
        scale = constant_of(node.inputs[1])
        zero = constant_of(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else None
        return scale, zero

    def _activation_quantiser(self, node: ir.Node) -> tuple[float, int] | None:
        """Scale and zero point of an activation's Q or DQ; None after saying what is wrong."""
        label = label_of(node)
        scale, zero = self._scale_and_zero(node)
        if zero is None or zero.dtype != np.int8 or zero.size != 1:
            found = "no constant zero point" if zero is None else f"a zero point of {zero.dtype}{list(zero.shape)}"
            self._say(label, "quantiser-dtype", found, "give one int8 zero point: activations are int8, one scale a tensor")
            return None
        if scale is None or scale.dtype != np.float32 or scale.size != 1 or not 0 < float(scale.reshape(-1)[0]) * 255 <= FLOAT32_MAX:
            self._say(label, "quantiser-scale", f"a scale of {short(scale)}", "give one finite positive float32 constant")
            return None
        step, offset = float(scale.reshape(-1)[0]), int(zero.reshape(-1)[0])
        if self.recipe.scheme != "asymmetric" and offset != 0:
            self._say(label, "scheme", f"zero point {offset} in scheme {self.recipe.scheme}", "use zero point 0, or the asymmetric scheme")
        if self.recipe.scheme == "power_of_two" and not is_power_of_two(step):
            self._say(label, "scheme", f"scale {step!r} is not a power of two", "round it to 2^-n, or use another scheme")
        return step, offset

    def _int8_tensor(self, value: ir.Value, step: float, offset: int) -> None:
        shape = self._shape(value)
        self.tensors[name_of(value)] = TensorSpec(name_of(value), shape, "int8", FORM_LAYOUTS.get(len(shape), ""), step, offset)

    def _float_tensor(self, value: ir.Value) -> None:
        shape = self._shape(value)
        dtype = value.dtype.numpy().name if value.dtype is not None else "float32"
        self.tensors[name_of(value)] = TensorSpec(name_of(value), shape, dtype, FORM_LAYOUTS.get(len(shape), ""))

    def _shape(self, value: ir.Value) -> tuple[int, ...]:
        extents = [extent for extent in value.shape or () if isinstance(extent, int) and extent > 0]
        if value.shape is None or not extents or len(extents) != len(value.shape):
            self._say(name_of(value), "static-shape", f"shape {value.shape}", "fix every dimension (--shape NAME=1,3,224,224), keep the batch axis")
            return ()
        return tuple(extents)

    def _dequantise(self, node: ir.Node) -> None:
        source, out = node.inputs[0], node.outputs[0]
        if source is None:
            self._say(label_of(node), "dequantiser", "no input", "connect it")
            return
        found = self._activation_quantiser(node)
        if found is None:
            return
        spec = self.tensors.get(name_of(source))
        if spec is None or spec.scale is None:
            self._say(label_of(node), "dequantiser", f"reads {name_of(source)}, which no QuantizeLinear wrote", "quantise it first")
            return
        if (spec.scale, spec.zero_point) != found:
            self._say(
                label_of(node),
                "dequantiser",
                f"scale, zero point {found}, but the tensor has {(spec.scale, spec.zero_point)}",
                "use the same; to change scale, dequantise and quantise",
            )
            return
        self.dequantised[name_of(out)] = name_of(source)
        if name_of(out) in self.outputs or any(self._is_float_consumer(use) for use in out.consumers()):
            self._float_tensor(out)
            self.nodes.append(QuantNode(label_of(node), "DequantizeLinear", "border", (name_of(source),), (name_of(out),)))

    def _is_float_consumer(self, node: ir.Node) -> bool:
        return node.op_type != "QuantizeLinear" and (self._group(node) is None or label_of(node) in self.islands)

    def _constant_dequantiser(self, node: ir.Node) -> None:
        source, out = node.inputs[0], node.outputs[0]
        values = constant_of(source)
        scale, zero = self._scale_and_zero(node)
        if values is None or scale is None or scale.dtype != np.float32 or scale.ndim > 1 or not np.isfinite(scale).all() or not (scale > 0).all():
            self._say(label_of(node), "weight", f"a constant with scale {short(scale)}", "give finite positive float32 scales, one or one an output channel")
            return
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
        zero = np.zeros((), values.dtype) if zero is None else zero
        self.constants[name_of(out)] = Held(name_of(source), values, scale, zero, axis + values.ndim if axis < 0 else axis, node)

    def _quantise_alone(self, node: ir.Node) -> None:
        """A QuantizeLinear outside any group: at the border, behind a float island, or a change of scale."""
        found = self._activation_quantiser(node)
        source, out = node.inputs[0], node.outputs[0]
        if found is None or source is None:
            return
        self._int8_tensor(out, *found)
        if name_of(source) in self.dequantised:
            self.nodes.append(QuantNode(label_of(node), "Requantize", "int8", (self.dequantised[name_of(source)],), (name_of(out),)))
        elif name_of(source) in self.tensors:
            self.nodes.append(QuantNode(label_of(node), "QuantizeLinear", "border", (name_of(source),), (name_of(out),)))
        else:
            self._say(label_of(node), "operand", f"quantises {name_of(source)}, which is a constant", "store the constant as int8 behind a DequantizeLinear")

    # ---- operators
    def _row(self, node: ir.Node) -> Op | None:
        return OPS.get(row_name(node.op_type, given(node), len(self._operands(node))))

    def _activations(self, node: ir.Node) -> list[ir.Value]:
        return [value for value in node.inputs if value is not None and constant_of(value) is None and name_of(value) not in self.constants]

    def _operands(self, node: ir.Node) -> list[ir.Value]:
        """What an int8 operator reads as int8 tensors: activations, and int8 constants where its row takes them (a MatMul's of two axes is a weight)."""
        if node.op_type not in TAKE_CONSTANTS:
            return self._activations(node)
        values = [value for position, value in enumerate(node.inputs) if not (node.op_type == "MatMul" and position == 1 and self._is_weight(value))]
        return [value for value in values if value is not None and constant_of(value) is None and self._is_int8(value)]

    def _is_weight(self, value: ir.Value | None) -> bool:
        held = self.constants.get(name_of(value))
        return held is not None and held.values.ndim == 2

    def _is_int8(self, value: ir.Value) -> bool:
        held = self.constants.get(name_of(value))
        return held is None or held.values.dtype == np.int8

    def _group(self, node: ir.Node) -> _Group | None:
        """`node` and what belongs to it, where it has the shape of an int8 group."""
        if node.op_type == "Sigmoid" and (silu := self._silu(node)) is not None:
            return silu
        row = self._row(node)
        if row is None or not node.outputs or (len(node.outputs) > 1 and row.name != "Split"):
            return None
        followers = [self._only_use(value) for value in node.outputs]
        activation, others = None, tuple[ir.Node, ...]()
        if row.name == "MatMul" and self._adds_bias(node, followers[0]) and followers[0] is not None:
            others, followers = (followers[0],), [self._only_use(followers[0].outputs[0])]
        if row.fuses and followers[0] is not None and followers[0].op_type in ("Relu", "Clip"):
            activation, followers = followers[0], [self._only_use(followers[0].outputs[0])]
        quantisers = tuple(follower for follower in followers if follower is not None and follower.op_type == "QuantizeLinear")
        return _Group(row, label_of(node), quantisers, activation, others) if len(quantisers) == len(followers) else None

    def _adds_bias(self, node: ir.Node, add: ir.Node | None) -> bool:
        """Whether `add` is the bias of a MatMul: int32 constants behind the product, as ONNX's MatMul has no third input."""
        if add is None or add.op_type != "Add" or label_of(add) in self.islands:
            return False
        held = [self.constants[name_of(value)] for value in add.inputs if name_of(value) in self.constants]
        return len(held) == 1 and held[0].values.dtype == np.int32

    def _silu(self, node: ir.Node) -> _Group | None:
        """x * Sigmoid(x), which opset 20 has no operator for: named after its Mul."""
        gate = self._only_use(node.outputs[0])
        if gate is None or gate.op_type != "Mul" or not any(value is node.inputs[0] for value in gate.inputs) or label_of(gate) in self.islands:
            return None
        quantiser = self._only_use(gate.outputs[0])
        if quantiser is None or quantiser.op_type != "QuantizeLinear":
            return None
        return _Group(OPS["Silu"], label_of(gate), (quantiser,), None, (gate,))

    def _only_use(self, value: ir.Value) -> ir.Node | None:
        uses = value.consumers()
        return uses[0] if len(uses) == 1 and name_of(value) not in self.outputs and len(list(value.uses())) == 1 else None

    def _operator(self, node: ir.Node) -> None:
        group = self._group(node)
        activations = self._activations(node)
        if group is None or label_of(node) in self.islands:
            self._island(node, activations)
            return
        operands = self._operands(node)
        self.absorbed.update(id(other) for other in group.nodes)
        label = group.label
        found = [self._activation_quantiser(quantiser) for quantiser in group.quantisers]
        if None in found:
            return
        for quantiser, step in zip(group.quantisers, found, strict=True):
            if step is not None:
                self._int8_tensor(quantiser.outputs[0], *step)
        floats = [name_of(value) for value in activations if name_of(value) not in self.dequantised]
        if floats or not activations:
            self._say(label, "operand", f"{node.op_type} reads {floats or 'no activation'}", "put QuantizeLinear and DequantizeLinear in front of it")
            return
        inputs = tuple(self._constant_operand(group.label, value) or self.dequantised.get(name_of(value), "") for value in operands)
        if all(inputs):
            self._int8_node(node, group, inputs)

    def _constant_operand(self, label: str, value: ir.Value) -> str:
        """The int8 tensor of a constant operand, a node of its own where it is first read; "" for an activation, or after saying what is wrong."""
        held = self.constants.get(name_of(value))
        if held is None:
            return ""
        found = self._activation_quantiser(held.reader)
        if found is None:
            return ""
        if held.name not in self.tensors:
            shape = tuple(held.values.shape)
            if not shape or 0 in shape:
                self._say(label, "operand", f"reads the constant {held.name} of shape {list(shape)}", "give it as many axes as the result has")
                return ""
            self.tensors[held.name] = TensorSpec(held.name, shape, "int8", FORM_LAYOUTS.get(len(shape), ""), *found)
            self.nodes.append(QuantNode(label_of(held.reader), "Constant", "int8", (), (held.name,), constants={0: held.values}))
        elif (self.tensors[held.name].scale, self.tensors[held.name].zero_point) != found:
            self._say(label, "dequantiser", f"the constant {held.name} is read with two scales or zero points", "store it once for each")
            return ""
        return held.name

    def _int8_node(self, node: ir.Node, group: _Group, inputs: tuple[str, ...]) -> None:
        op, label, activation = group.row, group.label, group.activation
        outputs = tuple(name_of(quantiser.outputs[0]) for quantiser in group.quantisers)
        spec = self.tensors[outputs[0]]
        if not self._operands_fit(node, group):
            return
        attributes = self._attributes(node, group)
        bounds = bounds_of(activation) if activation is not None else bounds_of(node) if node.op_type in ("Relu", "Clip") else (-math.inf, math.inf)
        if attributes is None or bounds is None:
            if bounds is None:
                self._say(label, "attributes", "Clip with bounds that are no constants, or in the wrong order", "give constant bounds, the lower first")
            return
        weight = scale = bias = None
        if op.weight_axis is not None:
            read = self._weights(node, group, inputs, attributes)
            if read is None:
                return
            weight, scale, bias = read
        elif not self._sums_fit(op, label, inputs, attributes):
            return
        constants = {1: slope} if op.name == "PRelu" and (slope := constant_of(node.inputs[1])) is not None else {}
        if op.passes_scale and not self._scales_equal(op, label, inputs, outputs):
            return
        name = activation.op_type if activation is not None else ""
        clamp = _clamp(bounds, spec)
        self.nodes.append(QuantNode(label, op.name, "int8", inputs, outputs, attributes, weight, scale, bias, clamp, name, bounds, constants))

    def _operands_fit(self, node: ir.Node, group: _Group) -> bool:
        """Activations first, constants only where the row has them."""
        op = group.row
        operands = self._operands(node)
        positions = [index for index, value in enumerate(node.inputs) if value is not None and any(value is other for other in operands)]
        rest = {index for index, value in enumerate(node.inputs) if value is not None} - set(positions)
        if op.weight_axis is not None:
            return True  # a second activation, or a constant in the wrong place, is what rule "weight" names
        held = sorted(index for index in rest - op.constants) + sorted(index for index in rest & op.constants if constant_of(node.inputs[index]) is None)
        if held or positions != list(range(len(positions))):
            fix = (
                "store it as int8 behind a DequantizeLinear"
                if op.name in TAKE_CONSTANTS
                else "fold it into the layer before, or list the node as a float island"
            )
            self._say(group.label, "operand", f"{node.op_type} has a constant operand", fix)
            return False
        if op.activations is not None and len(positions) != op.activations:
            self._say(
                group.label, "operand", f"{node.op_type} reads {len(positions)} activations, expected {op.activations}", "make its other inputs constants"
            )
            return False
        return self._constants_broadcast(node, group, operands)

    def _constants_broadcast(self, node: ir.Node, group: _Group, operands: list[ir.Value]) -> bool:
        """A constant operand has the axes of the result, and changes neither them nor the batch of the others."""
        shapes, result = [self._shape(value) for value in operands], self._shape(node.outputs[0])
        constants = [name_of(value) in self.constants for value in operands]
        if () in (*shapes, result) or not any(constants):
            return True  # an open shape is said where it is resolved
        for shape, constant in zip(shapes, constants, strict=True):
            if len(shape) != len(result) or (shape[0] != result[0] and not (constant and shape[0] == 1)):
                found = f"{node.op_type} of {' and '.join(str(list(shape)) for shape in shapes)}, {sum(constants)} of them constant, to {list(result)}"
                self._say(group.label, "operand", found, "give all as many axes as the result, and its batch (a constant: 1)")
                return False
        return True

    def _scales_equal(self, op: Op, label: str, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> bool:
        spec = self.tensors[inputs[0]]
        for name in (*inputs[1:], *outputs):
            other = self.tensors[name]
            if (other.scale, other.zero_point) != (spec.scale, spec.zero_point):
                found = (
                    f"{op.name} turns scale {spec.scale!r} into {other.scale!r}"
                    if name in outputs
                    else f"{op.name} joins scales {spec.scale!r} and {other.scale!r}"
                )
                self._say(label, "passes-scale", found, "keep the scale, or put a quantiser of its own in front")
                return False
        return True

    def _sums_fit(self, op: Op, label: str, inputs: tuple[str, ...], attributes: dict[str, Any]) -> bool:
        """Sums without weights: two activations multiplied, and means."""
        shape = self.tensors[inputs[0]].shape
        zeros = [int(self.tensors[name].zero_point or 0) for name in inputs]
        if op.name == "BatchMatMul":
            worst = product_limit(shape[-1], zeros)
        elif op.name in ("AveragePool", "GlobalAveragePool", "ReduceMean"):
            window = attributes.get("kernel_shape", [shape[axis] for axis in attributes.get("axes", range(2, len(shape)))])
            worst = product_limit(math.prod(window), zeros)
        else:
            return True
        if worst > ACCUMULATOR_LIMIT:
            self._say(label, "accumulator-overflow", f"a sum can reach {worst}, int32 ends at {ACCUMULATOR_LIMIT}", "split the operator")
            return False
        return True

    def _island(self, node: ir.Node, activations: list[ir.Value]) -> None:
        label = label_of(node)
        if label not in self.islands:
            reason = "is no int8 operator" if node.op_type not in OPS else "has no QuantizeLinear of its own behind it"
            self._say(
                label,
                "float-island",
                f"{node.op_type} {reason} and is not in the list of float islands",
                "quantise its output, or list it (isthmus.float_islands)",
            )
            return
        self.seen_islands.add(label)
        constants: dict[int, np.ndarray] = {}
        for position, value in enumerate(node.inputs):
            if value is None:
                continue
            plain = constant_of(value)
            if plain is not None:
                constants[position] = plain
            elif name_of(value) in self.constants:
                constants[position] = self.constants[name_of(value)].real
            elif name_of(value) not in self.tensors:
                self._say(label, "operand", f"reads {name_of(value)}, which is not known", "connect it")
                return
        results = [out for out in node.outputs if name_of(out)]
        if any(out is not given for out, given in zip(results, node.outputs, strict=False)):
            self._say(label, "float-island", "leaves an output out between others", "give it a name")
            return
        for out in results:
            self._float_tensor(out)
        names = tuple(name_of(value) for value in activations)
        absent = tuple(position for position, value in enumerate(node.inputs) if value is None)
        self.nodes.append(
            QuantNode(label, node.op_type, "float", names, tuple(name_of(out) for out in results), given(node), constants=constants, absent=absent)
        )

    # ---- weights and attributes
    def _weights(self, node: ir.Node, group: _Group, inputs: tuple[str, ...], attributes: dict[str, Any]) -> Weights | None:
        if len(inputs) != 1:
            self._say(group.label, "weight", f"{node.op_type} has two activations", "store the weight as int8 behind a DequantizeLinear")
            return None
        beside = (value for add in group.others for value in add.inputs if name_of(value) in self.constants)
        bias = next(beside, node.inputs[2] if len(node.inputs) > 2 else None)
        layer = Layer(node, name_of(bias), group.label, group.row.weight_axis or 0, self.tensors[inputs[0]], attributes, self.recipe.scheme)
        read = read_weights(layer, self.constants)
        if isinstance(read, Problem):
            self.problems.append(read)
            return None
        return read

    def _attributes(self, node: ir.Node, group: _Group) -> dict[str, Any] | None:
        operands = self._operands(node)
        constants = {index: array for index in group.row.constants if index < len(node.inputs) and (array := constant_of(node.inputs[index])) is not None}
        shapes = tuple(self._shape(value) for value in operands)
        outputs = tuple(self._shape(value) for value in node.outputs)
        if () in (*shapes, *outputs):
            return None  # the shape's own problem is said
        try:
            return resolve(Call(group.row.name, given(node), shapes, constants, outputs))
        except IllegalCallError as illegal:
            self._say(group.label, "attributes", illegal.found, illegal.fix)
            return None


def _border_spec(tensors: Mapping[str, TensorSpec], raw: str, border: TensorSpec) -> TensorSpec:
    spec = tensors[raw]
    return TensorSpec(border.name, border.shape, spec.dtype, border.layout, spec.scale, spec.zero_point)


def _clamp(bounds: tuple[float, float], spec: TensorSpec) -> tuple[int, int]:
    """Bounds in steps of the output: rounding is monotone, so clipping before or after it is the same."""
    low, high = (int(spec.quantise(np.array([bound], np.float32))[0]) for bound in bounds)
    return low, high
