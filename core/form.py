# SPDX-License-Identifier: Apache-2.0
"""Reads an ONNX model as the int8 form: the list of integer nodes, or every rule it breaks and where. Never raises on a bad model.

Rules have names (`RULES`); each has a test that breaks exactly it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from isthmus.errors import IsthmusError, Problem
from isthmus.graph import IR_VERSION, OPSET, QuantGraph, QuantNode
from isthmus.ops import OPS
from isthmus.recipe import Recipe
from isthmus.spec import FORM_LAYOUTS, TensorSpec

RECIPE_KEY = "isthmus.recipe"
ISLANDS_KEY = "isthmus.float_islands"
ACCUMULATOR_LIMIT = 2**31 - 1

RULES: dict[str, str] = {
    "onnx-checker": "the file is a valid ONNX model with inferable shapes",
    "version": f"opset {OPSET} of the default domain, IR version {IR_VERSION}",
    "metadata": "the model carries its recipe and its list of float islands",
    "domain": "only operators of the default ONNX domain",
    "subgraph": "no control flow",
    "static-shape": "every activation has a static shape",
    "border-dtype": "graph inputs and outputs are float32",
    "quantiser-dtype": "QuantizeLinear and DequantizeLinear carry an explicit int8 zero point",
    "quantiser-scale": "an activation's scale is one finite positive float32 constant",
    "scheme": "zero points and scales fit the recipe's scheme",
    "dequantiser": "a DequantizeLinear uses the scale and zero point its tensor was quantised with",
    "weight": "weights are int8 constants behind a DequantizeLinear with zero point 0 and one scale a tensor or an output channel",
    "bias": "a bias is an int32 constant behind a DequantizeLinear with scale input x weight",
    "accumulator-overflow": "no sum of products can leave int32",
    "operand": "an int8 operator's activations are int8 tensors, its other inputs constants",
    "attributes": "auto_pad is resolved, kernel_shape written, Gemm is transB=1 alpha=beta=1",
    "passes-scale": "an operator that does no arithmetic keeps scale and zero point",
    "float-island": "an operator that stays float is in the list, and the list holds nothing else",
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


class _Constant:
    """A constant behind a DequantizeLinear: a weight or a bias."""

    def __init__(self, values: np.ndarray, scale: np.ndarray, axis: int, zero: bool) -> None:
        self.values, self.scale, self.axis, self.zero = values, scale, axis, zero


class _Reader:
    """One pass over the nodes in their order; fills `nodes`, `tensors`, `problems`."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.recipe, self.islands = _metadata(model)
        self.problems: list[Problem] = []
        self.nodes: list[QuantNode] = []
        self.tensors: dict[str, TensorSpec] = {}
        self.constants: dict[str, _Constant] = {}
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
        for node in self.model.graph:
            if id(node) not in self.absorbed:
                self._node(node)
        for value in self.model.graph.outputs:
            self._border(value)
            if value.producer() is None:
                self._say(_name(value), "float-island", "an output that no node writes", "remove it")
        absent = [name for name in self.islands if name not in self.seen_islands]
        for name in absent:
            self._say(name, "float-island", "listed as a float island, but no such float node", "remove it from the list")

    def graph(self, model: ir.Model) -> QuantGraph:
        graph = QuantGraph(model, (), (), tuple(self.nodes), self.tensors, self.islands, self.recipe)
        names = [[_name(value) for value in values] for values in (self.model.graph.inputs, self.model.graph.outputs)]
        float_border = [tuple(self.tensors[name] for name in side) for side in names]
        graph = QuantGraph(model, float_border[0], float_border[1], graph.nodes, self.tensors, self.islands, self.recipe)
        inputs = tuple(_border_spec(self.tensors, graph.raw_input(i), spec) for i, spec in enumerate(graph.inputs))
        outputs = tuple(_border_spec(self.tensors, graph.raw_output(i), spec) for i, spec in enumerate(graph.outputs))
        return QuantGraph(model, inputs, outputs, graph.nodes, self.tensors, self.islands, self.recipe)

    def _say(self, node: str, rule: str, found: str, fix: str) -> None:
        self.problems.append(Problem(node, rule, found, fix))

    def _border(self, value: ir.Value) -> None:
        if value.dtype != ir.DataType.FLOAT:
            self._say(_name(value), "border-dtype", f"is {value.dtype}", "make it float32: the form quantises inside")

    def _node(self, node: ir.Node) -> None:
        if node.op_type == "DequantizeLinear":
            self._dequantise(node)
        elif node.op_type == "QuantizeLinear":
            self._quantise_alone(node)
        else:
            self._operator(node)

    # ---- quantisers
    def _scale_and_zero(self, node: ir.Node) -> tuple[np.ndarray | None, np.ndarray | None]:
        scale = _constant(node.inputs[1])
        zero = _constant(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else None
        return scale, zero

    def _activation_quantiser(self, node: ir.Node) -> tuple[float, int] | None:
        """Scale and zero point of an activation's Q or DQ; None after saying what is wrong."""
        label = _label(node)
        scale, zero = self._scale_and_zero(node)
        if zero is None or zero.dtype != np.int8 or zero.size != 1:
            found = "no constant zero point" if zero is None else f"a zero point of {zero.dtype}{list(zero.shape)}"
            self._say(label, "quantiser-dtype", found, "give one int8 zero point: activations are int8, one scale a tensor")
            return None
        if scale is None or scale.dtype != np.float32 or scale.size != 1 or not np.isfinite(scale).all() or float(scale.reshape(-1)[0]) <= 0:
            self._say(label, "quantiser-scale", f"a scale of {_short(scale)}", "give one finite positive float32 constant")
            return None
        step, offset = float(scale.reshape(-1)[0]), int(zero.reshape(-1)[0])
        if self.recipe.scheme != "asymmetric" and offset != 0:
            self._say(label, "scheme", f"zero point {offset} in scheme {self.recipe.scheme}", "use zero point 0, or the asymmetric scheme")
        if self.recipe.scheme == "power_of_two" and not _power_of_two(step):
            self._say(label, "scheme", f"scale {step!r} is not a power of two", "round it to 2^-n, or use another scheme")
        return step, offset

    def _int8_tensor(self, value: ir.Value, step: float, offset: int) -> None:
        shape = self._shape(value)
        self.tensors[_name(value)] = TensorSpec(_name(value), shape, "int8", FORM_LAYOUTS.get(len(shape), ""), step, offset)

    def _float_tensor(self, value: ir.Value) -> None:
        shape = self._shape(value)
        self.tensors[_name(value)] = TensorSpec(_name(value), shape, "float32", FORM_LAYOUTS.get(len(shape), ""))

    def _shape(self, value: ir.Value) -> tuple[int, ...]:
        extents = [extent for extent in value.shape or () if isinstance(extent, int) and extent > 0]
        if value.shape is None or len(extents) != len(value.shape):
            self._say(_name(value), "static-shape", f"shape {value.shape}", "fix every dimension (--shape NAME=1,3,224,224)")
            return ()
        return tuple(extents)

    def _dequantise(self, node: ir.Node) -> None:
        source, out = node.inputs[0], node.outputs[0]
        if source is None:
            self._say(_label(node), "dequantiser", "no input", "connect it")
            return
        if _constant(source) is not None:
            self._constant_dequantiser(node, source, out)
            return
        found = self._activation_quantiser(node)
        if found is None:
            return
        spec = self.tensors.get(_name(source))
        if spec is None or spec.scale is None:
            self._say(_label(node), "dequantiser", f"reads {_name(source)}, which no QuantizeLinear wrote", "quantise it first")
            return
        if (spec.scale, spec.zero_point) != found:
            self._say(
                _label(node),
                "dequantiser",
                f"scale, zero point {found}, but the tensor has {(spec.scale, spec.zero_point)}",
                "use the same; to change scale, dequantise and quantise",
            )
            return
        self.dequantised[_name(out)] = _name(source)
        if _name(out) in self.outputs or any(self._is_float_consumer(use) for use in out.consumers()):
            self._float_tensor(out)
            self.nodes.append(QuantNode(_label(node), "DequantizeLinear", "border", (_name(source),), (_name(out),)))

    def _is_float_consumer(self, node: ir.Node) -> bool:
        return node.op_type != "QuantizeLinear" and (self._group(node) is None or _label(node) in self.islands)

    def _constant_dequantiser(self, node: ir.Node, source: ir.Value, out: ir.Value) -> None:
        values = _constant(source)
        scale, zero = self._scale_and_zero(node)
        if values is None or scale is None or scale.dtype != np.float32 or scale.ndim > 1 or not np.isfinite(scale).all() or not (scale > 0).all():
            self._say(_label(node), "weight", f"a constant with scale {_short(scale)}", "give finite positive float32 scales, one or one an output channel")
            return
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
        self.constants[_name(out)] = _Constant(values, scale, axis + values.ndim if axis < 0 else axis, zero is None or not zero.any())

    def _quantise_alone(self, node: ir.Node) -> None:
        """A QuantizeLinear outside any group: at the border, behind a float island, or a change of scale."""
        found = self._activation_quantiser(node)
        source, out = node.inputs[0], node.outputs[0]
        if found is None or source is None:
            return
        self._int8_tensor(out, *found)
        if _name(source) in self.dequantised:
            self.nodes.append(QuantNode(_label(node), "Requantize", "int8", (self.dequantised[_name(source)],), (_name(out),)))
        elif _name(source) in self.tensors:
            self.nodes.append(QuantNode(_label(node), "QuantizeLinear", "border", (_name(source),), (_name(out),)))
        else:
            self._say(_label(node), "operand", f"quantises {_name(source)}, which is a constant", "store the constant as int8 behind a DequantizeLinear")

    # ---- operators
    def _group(self, node: ir.Node) -> tuple[ir.Node | None, ir.Node] | None:
        """(fused activation or None, QuantizeLinear) where `node` has the shape of an int8 group, else None."""
        op = OPS.get(node.op_type)
        if op is None or len(node.outputs) != 1:
            return None
        follower = self._only_use(node.outputs[0])
        activation = None
        if follower is not None and op.fuses and follower.op_type in ("Relu", "Clip"):
            activation, follower = follower, self._only_use(follower.outputs[0])
        if follower is None or follower.op_type != "QuantizeLinear":
            return None
        return activation, follower

    def _only_use(self, value: ir.Value) -> ir.Node | None:
        uses = value.consumers()
        return uses[0] if len(uses) == 1 and _name(value) not in self.outputs and len(list(value.uses())) == 1 else None

    def _operator(self, node: ir.Node) -> None:
        label = _label(node)
        group = self._group(node)
        activations = [value for value in node.inputs if value is not None and _constant(value) is None and _name(value) not in self.constants]
        if group is None or label in self.islands:
            self._island(node, activations)
            return
        activation, quantiser = group
        self.absorbed.add(id(quantiser))
        if activation is not None:
            self.absorbed.add(id(activation))
        floats = [_name(value) for value in activations if _name(value) not in self.dequantised]
        found = self._activation_quantiser(quantiser)
        if found is None:
            return
        self._int8_tensor(quantiser.outputs[0], *found)
        if floats or not activations:
            self._say(label, "operand", f"{node.op_type} reads {floats or 'no activation'}", "put QuantizeLinear and DequantizeLinear in front of it")
            return
        self._int8_node(node, label, activation, tuple(self.dequantised[_name(value)] for value in activations), _name(quantiser.outputs[0]))

    def _int8_node(self, node: ir.Node, label: str, activation: ir.Node | None, inputs: tuple[str, ...], output: str) -> None:
        op = OPS[node.op_type]
        spec = self.tensors[output]
        attributes = self._attributes(node, label)
        bounds = _bounds(activation) if activation is not None else _bounds(node) if node.op_type in ("Relu", "Clip") else (-math.inf, math.inf)
        if attributes is None or bounds is None:
            if bounds is None:
                self._say(label, "attributes", "Clip with bounds that are no constants, or in the wrong order", "give constant bounds, the lower first")
            return
        weight = scale = bias = None
        if op.weight_axis is not None:
            read = self._weights(node, label, op.weight_axis, inputs)
            if read is None:
                return
            weight, scale, bias = read
            depth = self.tensors[inputs[0]].shape[1] if node.op_type == "Conv" else 0
            if node.op_type == "Conv" and (
                list(weight.shape[2:]) != attributes["kernel_shape"] or weight.shape[1] * attributes["group"] != depth or weight.shape[0] % attributes["group"]
            ):
                self._say(
                    label,
                    "weight",
                    f"a weight of shape {list(weight.shape)} for {depth} channels in {attributes['group']} groups",
                    "give [out, in/group, *kernel]",
                )
                return
        elif len(inputs) != sum(value is not None for value in node.inputs) and node.op_type not in ("Reshape", "Clip"):
            self._say(label, "operand", f"{node.op_type} has a constant operand", "fold it into the layer before, or list the node as a float island")
            return
        if op.passes_scale:
            for name in inputs:
                if (self.tensors[name].scale, self.tensors[name].zero_point) != (spec.scale, spec.zero_point):
                    self._say(
                        label,
                        "passes-scale",
                        f"{node.op_type} turns scale {self.tensors[name].scale!r} into {spec.scale!r}",
                        "keep the scale, or put a quantiser of its own in front",
                    )
                    return
        name = activation.op_type if activation is not None else ""
        clamp = _clamp(bounds, spec)
        self.nodes.append(QuantNode(label, node.op_type, "int8", inputs, (output,), attributes, weight, scale, bias, clamp, name, bounds))

    def _island(self, node: ir.Node, activations: list[ir.Value]) -> None:
        label = _label(node)
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
            plain = _constant(value)
            if plain is not None:
                constants[position] = plain
            elif _name(value) in self.constants:
                held = self.constants[_name(value)]
                constants[position] = _dequantised(held)
            elif _name(value) not in self.tensors:
                self._say(label, "operand", f"reads {_name(value)}, which is not known", "connect it")
                return
        for out in node.outputs:
            self._float_tensor(out)
        attributes = {name: _python(attribute) for name, attribute in node.attributes.items()}
        names = tuple(_name(value) for value in activations)
        self.nodes.append(QuantNode(label, node.op_type, "float", names, tuple(_name(out) for out in node.outputs), attributes, constants=constants))

    # ---- weights and attributes
    def _weights(self, node: ir.Node, label: str, axis: int, inputs: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray | None] | None:
        held = self.constants.get(_name(node.inputs[1])) if len(node.inputs) > 1 and node.inputs[1] is not None else None
        if len(inputs) != 1 or held is None or held.values.dtype != np.int8 or not held.zero:
            found = "two activations" if len(inputs) != 1 else "no int8 constant behind a DequantizeLinear with zero point 0"
            self._say(label, "weight", f"{node.op_type} has {found}", "store the weight as int8 behind a DequantizeLinear")
            return None
        weight = held.values
        channels = weight.shape[axis] if weight.ndim > axis else 0
        if held.scale.size not in (1, channels) or (held.scale.size > 1 and held.axis != axis) or (node.op_type == "MatMul" and weight.ndim != 2):
            self._say(
                label,
                "weight",
                f"{held.scale.size} scales along axis {held.axis} for a weight of shape {list(weight.shape)}",
                f"give one, or one an output channel (axis {axis})",
            )
            return None
        if self.recipe.scheme == "power_of_two" and not all(_power_of_two(float(step)) for step in held.scale.reshape(-1)):
            self._say(label, "scheme", "a weight scale that is not a power of two", "round it to 2^-n, or use another scheme")
            return None
        scale = held.scale.reshape(-1)
        bias: np.ndarray | None = None
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            bias = self._bias(node, label, channels, float(self.tensors[inputs[0]].scale or 0), scale)
            if bias is None:
                return None
        source = self.tensors[inputs[0]]
        worst = _worst_accumulator(weight, axis, bias, int(source.zero_point or 0))
        if worst > ACCUMULATOR_LIMIT:
            self._say(label, "accumulator-overflow", f"a sum can reach {worst}, int32 ends at {ACCUMULATOR_LIMIT}", "split the layer or use smaller weights")
            return None
        return weight, scale, bias

    def _bias(self, node: ir.Node, label: str, channels: int, input_scale: float, weight_scale: np.ndarray) -> np.ndarray | None:
        held = self.constants.get(_name(node.inputs[2]))
        if held is None or held.values.dtype != np.int32 or held.values.size != channels or not held.zero:
            self._say(label, "bias", f"the bias is not {channels} int32 constants behind a DequantizeLinear", "store it as int32 with scale input x weight")
            return None
        expected = np.float32(input_scale) * weight_scale.astype(np.float32)
        if held.scale.size not in (1, channels) or not np.allclose(held.scale, expected, rtol=1e-6, atol=0):
            self._say(label, "bias", f"the bias has scale {_short(held.scale)}, expected {_short(expected)}", "use scale input x weight")
            return None
        return held.values.reshape(-1)

    def _attributes(self, node: ir.Node, label: str) -> dict[str, Any] | None:
        given = {name: _python(attribute) for name, attribute in node.attributes.items()}
        if given.get("auto_pad", "NOTSET") != "NOTSET":
            self._say(label, "attributes", f"auto_pad {given['auto_pad']!r}", "write explicit pads")
            return None
        given.pop("auto_pad", None)
        if node.op_type == "Gemm" and (given.get("transB", 0), given.get("transA", 0), given.get("alpha", 1.0), given.get("beta", 1.0)) != (1, 0, 1.0, 1.0):
            self._say(label, "attributes", f"Gemm with {given}", "transB=1, transA=0, alpha=beta=1")
            return None
        if node.op_type in ("Conv", "MaxPool", "AveragePool"):
            if "kernel_shape" not in given:
                self._say(label, "attributes", "no kernel_shape", "write it: TensorRT's parser asks for it")
                return None
            rank = len(given["kernel_shape"])
            defaults: Mapping[str, Any] = {"strides": [1] * rank, "dilations": [1] * rank, "pads": [0] * (2 * rank)}
            given = {**defaults, **given}
            if node.op_type == "Conv":
                given.setdefault("group", 1)
            else:
                given.setdefault("ceil_mode", 0)
            if node.op_type == "AveragePool":
                given.setdefault("count_include_pad", 0)
            if given.pop("storage_order", 0) != 0:
                self._say(label, "attributes", "storage_order 1", "use row-major pooling")
                return None
            wrong = _wrong_window(given, self._shape(node.outputs[0]), self._shape(node.inputs[0]) if node.inputs[0] is not None else ())
            if wrong:
                self._say(label, "attributes", wrong, "export the model again")
                return None
        if node.op_type == "Concat":
            rank = len(self._shape(node.outputs[0]))
            given["axis"] = given["axis"] % rank if rank else 0
        if node.op_type in ("Reshape", "Flatten"):
            before, after = node.inputs[0].shape if node.inputs[0] is not None else None, node.outputs[0].shape
            if before is None or after is None or not len(before) or not len(after) or before[0] != after[0]:
                self._say(label, "attributes", f"{node.op_type} from {before} to {after} moves the batch", "keep the first axis")
                return None
        if node.op_type == "Concat" and given["axis"] == 0:
            self._say(label, "attributes", "Concat along the batch", "join along another axis")
            return None
        return given


def _wrong_window(given: Mapping[str, Any], output: tuple[int, ...], source: tuple[int, ...]) -> str:
    """What is impossible in a window's attributes; onnx's own checker lets some of it through."""
    rank = len(output) - 2
    for name, length, least in (("kernel_shape", rank, 1), ("strides", rank, 1), ("dilations", rank, 1), ("pads", 2 * rank, 0)):
        values = given[name]
        if len(values) != length or any(value < least for value in values):
            return f"{name} {values} for {rank} space axes"
    if given.get("group", 1) < 1:
        return f"group {given['group']}"
    if "group" not in given and any(pad >= given["kernel_shape"][axis % rank] for axis, pad in enumerate(given["pads"])):
        return f"pads {given['pads']} as large as the kernel {given['kernel_shape']}: a window of padding alone"
    for axis in range(rank):
        # onnx 1.23's shape inference counts such a window under ceil_mode, engines do not.
        if given.get("ceil_mode") and (output[axis + 2] - 1) * given["strides"][axis] >= source[axis + 2] + given["pads"][axis]:
            return f"ceil_mode with pads {given['pads']}: the last window lies in the padding alone"
    return ""


def _border_spec(tensors: Mapping[str, TensorSpec], raw: str, border: TensorSpec) -> TensorSpec:
    spec = tensors[raw]
    return TensorSpec(border.name, border.shape, spec.dtype, border.layout, spec.scale, spec.zero_point)


def _name(value: ir.Value | None) -> str:
    return value.name or "" if value is not None else ""


def _label(node: ir.Node) -> str:
    return node.name or f"{node.op_type}_{_name(node.outputs[0])}"


def _constant(value: ir.Value | None) -> np.ndarray | None:
    """The array of an initialiser (one that is not also a graph input), else None."""
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    return value.const_value.numpy()


def _dequantised(held: _Constant) -> np.ndarray:
    shape = [1] * held.values.ndim
    if held.scale.size > 1:
        shape[held.axis] = held.scale.size
    real: np.ndarray = held.values.astype(np.float32) * held.scale.reshape(shape)
    return real


def _short(array: np.ndarray | None) -> str:
    if array is None:
        return "no constant"
    return str(array.reshape(-1)[0]) if array.size == 1 else f"{array.dtype}{list(array.shape)}"


def _power_of_two(step: float) -> bool:
    return step > 0 and math.isfinite(step) and math.frexp(step)[0] == 0.5


def _python(attribute: ir.Attr) -> Any:
    value = attribute.value
    if isinstance(value, tuple | list):
        return list(value)
    return value


def _bounds(node: ir.Node) -> tuple[float, float] | None:
    """Real bounds of a Relu or Clip; None where they are no constants or in the wrong order."""
    if node.op_type == "Relu":
        return (0.0, math.inf)
    bounds = [-math.inf, math.inf]
    for position in (1, 2):
        value = node.inputs[position] if len(node.inputs) > position else None
        if value is not None:
            array = _constant(value)
            if array is None or array.size != 1 or np.isnan(array).any():
                return None
            bounds[position - 1] = float(array.reshape(-1)[0])
    return (bounds[0], bounds[1]) if bounds[0] <= bounds[1] else None


def _clamp(bounds: tuple[float, float], spec: TensorSpec) -> tuple[int, int]:
    """Bounds in steps of the output: rounding is monotone, so clipping before or after it is the same."""
    low, high = (int(spec.quantise(np.array([bound], np.float32))[0]) for bound in bounds)
    return low, high


def _worst_accumulator(weight: np.ndarray, axis: int, bias: np.ndarray | None, zero_point: int) -> int:
    """The largest magnitude a sum of products and bias can reach for any int8 input."""
    others = tuple(other for other in range(weight.ndim) if other != axis)
    sums = np.abs(weight.astype(np.int64)).sum(axis=others) * max(127 - zero_point, 128 + zero_point)
    if bias is not None:
        sums = sums + np.abs(bias.astype(np.int64))
    return int(sums.max(initial=0))
