# SPDX-License-Identifier: Apache-2.0
"""Writes a `Draft` as the int8 form."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from isthmus.errors import Problem, ProblemsError
from isthmus.export.draft import REQUANTISE, SILU, Draft, activations, bounds, operands, results, row_of
from isthmus.export.rewrites._edit import attributes_of, constant, static_shape
from isthmus.form_writer import Activation, FormWriter
from isthmus.graph import QuantGraph
from isthmus.recipe import Recipe

INT32 = np.iinfo(np.int32)


def emit(draft: Draft, recipe: Recipe) -> QuantGraph:
    """The verified graph. Raises `ProblemsError` naming every node that breaks a rule of the form."""
    return _Emitter(draft, recipe).emitted()


class _Emitter(FormWriter):
    def __init__(self, draft: Draft, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.draft = draft
        self.problems: list[Problem] = []
        self.int8: dict[str, str] = {}  # value of the draft -> int8 tensor of the form
        graph = draft.model.graph
        self.kept = {str(value.name) for value in (*graph.inputs, *graph.outputs)}
        self.kept |= {str(value.name) for node in graph if self._is_island(node) for value in node.outputs}
        self._taken |= self.kept

    def _is_island(self, node: ir.Node) -> bool:
        return node.name not in self.draft.int8_nodes and not any(reader is node for reader in self.draft.fused.values())

    def emitted(self) -> QuantGraph:
        graph = self.draft.model.graph
        for value in graph.inputs:
            self.float_input(str(value.name), static_shape(value) or ())
        for node in graph:
            if str(node.name) in self.draft.int8_nodes:
                self._int8_node(node)
            elif self._is_island(node):
                self._island(node)
        for value in graph.outputs:
            name = str(value.name)
            if self._is_written_in_int8(value):
                self.output(self.int8[name], name)
            else:
                self.float_output(name)
        if self.problems:
            raise ProblemsError("the model cannot be written in int8 form", self.problems)
        return self.graph()

    # ---- operands
    def _tensor(self, value: ir.Value) -> str:
        """The int8 tensor of a value; a float one (graph input, result of an island) is quantised here, a constant is stored."""
        name, held = str(value.name), constant(value)
        if name not in self.int8:
            step = self.draft.steps[name]
            if held is None:
                self.int8[name] = self.quantise(name, scale=step.scale, zero_point=step.zero_point, name=self._base(f"{name}_quantised"))
            else:
                self.int8[name] = self.constant_int8(self._base(name), step.integers(held), scale=step.scale, zero_point=step.zero_point)
        return self.int8[name]

    def _real(self, value: ir.Value) -> str:
        """The float value, dequantised where an int8 node wrote it."""
        name = str(value.name)
        return self.dequantise(self.int8[name]) if self._is_written_in_int8(value) else name

    def _is_written_in_int8(self, value: ir.Value) -> bool:
        """False also for a float value that an int8 node reads quantised: its float side is the exact one."""
        producer = value.producer()
        return producer is not None and not self._is_island(producer)

    def _base(self, name: str) -> str:
        """A node name from which no name that must stay (a graph input, a float tensor) can be derived by a suffix."""
        while any(kept == name or kept.startswith(f"{name}_") for kept in self.kept):
            name += ".int8"
        return name

    # ---- nodes
    def _island(self, node: ir.Node) -> None:
        inputs = []
        for position, value in enumerate(node.inputs):
            held = constant(value)
            if value is None:
                inputs.append("")
            elif held is not None:
                inputs.append(self.constant(f"{node.name}.constant{position}", held))
            else:
                inputs.append(self._real(value))
        name, outputs = str(node.name), [str(value.name or "") for value in node.outputs]
        inside = f"{outputs[0]}.inside"
        if node.op_type == SILU:  # spelled out again
            self.float_node("Sigmoid", inputs, [inside], f"{name}.sigmoid")
            self.float_node("Mul", [*inputs, inside], outputs, name)
        elif node.op_type == "MatMul" and len(inputs) > 2:
            self.float_node("MatMul", inputs[:2], [inside], name)
            self.float_node("Add", [inside, inputs[2]], outputs, f"{name}.add")
        else:
            self.float_node(node.op_type, inputs, outputs, name, **{key: _proto(value) for key, value in attributes_of(node).items()})

    def _int8_node(self, node: ir.Node) -> None:
        name = str(node.name)
        reader = self.draft.fused.get(name)
        result = str((reader or node).outputs[0].name)
        step = self.draft.steps[result]
        given, label = attributes_of(node), self._base(name)
        if node.op_type == REQUANTISE:
            self.int8[result] = self._requantised(activations(node)[0], step.scale, step.zero_point, label)
            return
        row = row_of(node)
        if row is None:
            raise AssertionError(f"{node.op_type} was placed in int8, but the form has no row for it")
        tensors = [self._tensor(value) for value in operands(node)]
        arithmetic: dict[str, Any] = {"scale": step.scale, "zero_point": step.zero_point, "name": label}
        fused = arithmetic | {"activation": _activation(reader)}
        match row.name:
            case "Conv" | "ConvTranspose" | "Gemm" | "MatMul":
                written = [self._linear(node, tensors[0], given, fused)]
            case "Silu":
                written = [self.silu(tensors[0], **arithmetic)]
            case "Flatten":
                written = [self.flatten(tensors[0], given.get("axis", 1), label)]
            case "Reshape":
                written = [self.reshape(tensors[0], static_shape(node.outputs[0]) or (), label)]
            case "Split":
                written = self.split(tensors[0], [(static_shape(part) or ())[given.get("axis", 0)] for part in results(node)], given.get("axis", 0), label)
            case _:
                inputs = [*(self.dequantise(tensor) for tensor in tensors), *self._settings(node, label, len(tensors))]
                written = [self._group(node.op_type, inputs, step.scale, step.zero_point, fused["activation"], self._fresh(label), self._given(node))]
        self.int8 |= {str(value.name): tensor for value, tensor in zip(results(reader or node), written, strict=True)}

    def _settings(self, node: ir.Node, label: str, first: int) -> list[str]:
        """The constant inputs from position `first` on, under names of their own."""
        held = [constant(value) for value in node.inputs[first:]]
        return ["" if array is None else self.constant(self._fresh(f"{label}_constant{position}"), array) for position, array in enumerate(held, first)]

    def _given(self, node: ir.Node) -> dict[str, Any]:
        """Attributes as the file has them, and ONNX's defaults where the form wants them written."""
        given = attributes_of(node)
        if node.op_type in ("MaxPool", "AveragePool"):
            rank = len(given["kernel_shape"])
            given = {"strides": [1] * rank, "pads": [0] * (2 * rank), "ceil_mode": 0} | given
        return {name: _proto(value) for name, value in given.items()}

    def _requantised(self, source: ir.Value, scale: float, zero_point: int, label: str) -> str:
        name = str(source.name)
        if name in self.int8:
            return self.requantize(self.int8[name], scale=scale, zero_point=zero_point, name=label)
        return self.quantise(name, scale=scale, zero_point=zero_point, name=self._base(f"{name}_quantised"))

    def _linear(self, node: ir.Node, x: str, given: dict[str, Any], fused: dict[str, Any]) -> str:
        weight = self.draft.weights[str(node.name)]
        group = int(given.get("group", 1))
        scales = np.tile(weight.scale, group) if node.op_type == "ConvTranspose" and weight.scale.size > 1 else weight.scale
        bias = self._bias(node, scales)
        if node.op_type in ("MatMul", "Gemm"):
            return (self.matmul if node.op_type == "MatMul" else self.gemm)(x, weight.values, weight.scale, bias, **fused)
        window: dict[str, Any] = {key: given.get(key) for key in ("strides", "pads", "dilations")}
        if node.op_type == "Conv":
            return self.conv(x, weight.values, weight.scale, bias, group=group, **window, **fused)
        extra = given.get("output_padding")
        return self.conv_transpose(x, weight.values, weight.scale, bias, group=group, output_padding=extra, **window, **fused)

    def _bias(self, node: ir.Node, weight_scale: np.ndarray) -> np.ndarray | None:
        real = self.draft.biases.get(str(node.name))
        if real is None:
            return None
        step = self.draft.steps[str(activations(node)[0].name)]
        scale = (np.float32(step.scale) * weight_scale.astype(np.float32)).astype(np.float64)
        steps = np.rint(np.asarray(real, np.float64) / scale)
        worst = float(np.abs(steps).max(initial=0.0))
        if not worst <= INT32.max:
            found = f"a bias of {worst:.3g} steps of input x weight scale does not fit int32"
            self.problems.append(Problem(str(node.name), "bias-overflow", found, "use larger scales for its input or weight, or a smaller bias"))
            steps = np.zeros_like(steps)
        return steps.astype(np.int32)


def _activation(reader: ir.Node | None) -> Activation:
    if reader is None:
        return ""
    low, high = bounds(reader) or (-np.inf, np.inf)
    return "Relu" if reader.op_type == "Relu" else ("Clip", low, high)


def _proto(value: Any) -> Any:
    return ir.serde.serialize_tensor(value) if isinstance(value, ir.TensorProtocol) else value
