# SPDX-License-Identifier: Apache-2.0
"""Writes a `Draft` as the int8 form."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from isthmus.errors import Problem, ProblemsError
from isthmus.export.draft import REQUANTISE, Draft, activations, bounds
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
        """The int8 tensor of a value; a float one (graph input, result of an island) is quantised here."""
        name = str(value.name)
        if name not in self.int8:
            step = self.draft.steps[name]
            self.int8[name] = self.quantise(name, scale=step.scale, zero_point=step.zero_point, name=self._base(f"{name}_quantised"))
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
        attributes = {name: _proto(value) for name, value in attributes_of(node).items()}
        self.float_node(node.op_type, inputs, [str(value.name or "") for value in node.outputs], str(node.name), **attributes)

    def _int8_node(self, node: ir.Node) -> None:
        name = str(node.name)
        reader = self.draft.fused.get(name)
        result = str((reader or node).outputs[0].name)
        step = self.draft.steps[result]
        given, label = attributes_of(node), self._base(name)
        if node.op_type == REQUANTISE:
            self.int8[result] = self._requantised(activations(node)[0], step.scale, step.zero_point, label)
            return
        tensors = [self._tensor(value) for value in activations(node)]
        arithmetic: dict[str, Any] = {"scale": step.scale, "zero_point": step.zero_point, "name": label}
        fused = arithmetic | {"activation": _activation(reader)}
        match node.op_type:
            case "Conv" | "Gemm" | "MatMul":
                out = self._linear(node, tensors[0], given, fused)
            case "Add":
                out = self.add(tensors[0], tensors[1], **fused)
            case "MaxPool":
                window = (given["kernel_shape"], given.get("strides"), given.get("pads"))
                out = self.max_pool(tensors[0], *_window(*window), given.get("ceil_mode", 0), given.get("dilations"), label)
            case "AveragePool":
                window = (given["kernel_shape"], given.get("strides"), given.get("pads"))
                out = self.average_pool(tensors[0], *_window(*window), given.get("ceil_mode", 0), given.get("count_include_pad", 0), **arithmetic)
            case "GlobalAveragePool":
                out = self.global_average_pool(tensors[0], **arithmetic)
            case "Relu":
                out = self.relu(tensors[0], label)
            case "Clip":
                low, high = bounds(node) or (-np.inf, np.inf)
                out = self.clip(tensors[0], low, high, label)
            case "Flatten":
                out = self.flatten(tensors[0], given.get("axis", 1), label)
            case "Reshape":
                out = self.reshape(tensors[0], static_shape(node.outputs[0]) or (), label)
            case "Concat":
                out = self.concat(tensors, given["axis"], label)
            case _:
                raise AssertionError(f"{node.op_type} was placed in int8, but has no row here")
        self.int8[result] = out

    def _requantised(self, source: ir.Value, scale: float, zero_point: int, label: str) -> str:
        name = str(source.name)
        if name in self.int8:
            return self.requantize(self.int8[name], scale=scale, zero_point=zero_point, name=label)
        return self.quantise(name, scale=scale, zero_point=zero_point, name=self._base(f"{name}_quantised"))

    def _linear(self, node: ir.Node, x: str, given: dict[str, Any], fused: dict[str, Any]) -> str:
        weight = self.draft.weights[str(node.name)]
        if node.op_type == "MatMul":
            return self.matmul(x, weight.values, weight.scale, **fused)
        bias = self._bias(node, weight.scale)
        if node.op_type == "Gemm":
            return self.gemm(x, weight.values, weight.scale, bias, **fused)
        window: dict[str, Any] = {key: given.get(key) for key in ("strides", "pads", "dilations")}
        return self.conv(x, weight.values, weight.scale, bias, group=given.get("group", 1), **window, **fused)

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


def _window(kernel: list[int], strides: list[int] | None, pads: list[int] | None) -> tuple[list[int], list[int], list[int]]:
    """ONNX's defaults: stride 1, no padding."""
    return kernel, strides or [1] * len(kernel), pads or [0] * (2 * len(kernel))


def _proto(value: Any) -> Any:
    return ir.serde.serialize_tensor(value) if isinstance(value, ir.TensorProtocol) else value
