# SPDX-License-Identifier: Apache-2.0
"""The form as ONNX Runtime's CPU kernels compute it exactly: uint8 inside, int8 at the border, QuantizeLinear/DequantizeLinear around each operator.

Why uint8, when the form is int8. Measured with ONNX Runtime 1.32 on x86 with AVX2 and without VNNI:

- int8 activations: the graph optimiser fuses no operator; everything runs in float, slower than a float model.
- uint8 activations, int8 weights: fused, but the kernel adds pairs of products in 16 bits and saturates: up to 77 steps off.
- uint8 activations, uint8 weights: fused, and exact for every input.

Adding 128 to a value and to its zero point changes no number, so that is what is written here. ONNX Runtime's own switch for the second
case (`session.x64quantprecision`) computes the same, but only in a session that sets it; the file here is exact in any session.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from isthmus.graph import IR_VERSION, OPSET, QuantGraph, QuantNode
from isthmus.spec import TensorSpec

SHIFT = 128  # int8 value + 128 = uint8 value
FULL_RANGE = (-128, 127)
_ONNX_TYPES = {"int8": TensorProto.INT8, "float32": TensorProto.FLOAT}


def onnx_from_graph(graph: QuantGraph) -> bytes:
    """The ONNX file: inputs and outputs have the names, dtypes and shapes of `graph.inputs` and `graph.outputs`."""
    return _Lowering(graph).model().SerializeToString(deterministic=True)


class _Lowering:
    """One pass over the nodes. Every int8 tensor of the form becomes a uint8 tensor of the same name."""

    def __init__(self, graph: QuantGraph) -> None:
        self.graph = graph
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self.node_names: set[str] = set()
        self.raw_inputs = {spec.name: spec for spec in graph.inputs if spec.is_quantised}
        self.raw_outputs = {spec.name: spec for spec in graph.outputs if spec.is_quantised}
        self.taken = {*graph.tensors, *(spec.name for spec in (*graph.inputs, *graph.outputs))}
        self.float_names: dict[str, str] = {}

    def model(self) -> onnx.ModelProto:
        for node in self.graph.nodes:
            if node.kind == "float":
                self._float(node)
            else:
                LOWERINGS[node.op](self, node)
        inputs, outputs = ([_value(spec) for spec in side] for side in (self.graph.inputs, self.graph.outputs))
        body = helper.make_graph(self.nodes, "isthmus_cpu", inputs, outputs, list(self.constants.values()))
        model = helper.make_model(body, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="isthmus")
        onnx.checker.check_model(model)
        return model

    # ---- border and float islands
    def quantise_border(self, node: QuantNode) -> None:
        source = node.inputs[0]
        if source in self.raw_inputs:  # the graph input is int8 already: only its dtype changes
            source = self._emit("DequantizeLinear", [source, *self._scale_and_zero(self.raw_inputs[source], np.int8)], self._fresh(f"{source}_real"))
        self._emit("QuantizeLinear", [self._float_name(source), *self._scale_and_zero(self.graph.tensors[node.output], np.uint8)], node.output)

    def dequantise_border(self, node: QuantNode) -> None:
        source = node.inputs[0]
        real = self._emit("DequantizeLinear", [source, *self._scale_and_zero(self.graph.tensors[source], np.uint8)], self._float_name(node.output))
        if node.output in self.raw_outputs:
            self._emit("QuantizeLinear", [real, *self._scale_and_zero(self.raw_outputs[node.output], np.int8)], node.output)

    def _float(self, node: QuantNode) -> None:
        inputs = [self._float_name(name) for name in node.inputs]
        for position in sorted(node.constants):
            inputs.extend([""] * (position - len(inputs)))  # an optional input that is left out
            inputs.insert(position, self._constant(f"{node.output}_constant_{position}", node.constants[position]))
        self._node(node.op, inputs, node.outputs, node.name, node.attributes)

    def _float_name(self, name: str) -> str:
        """Where a float value of the form is found: its name, unless an int8 output of the artifact has taken that."""
        if name in self.raw_outputs and name not in self.float_names:
            self.float_names[name] = self._fresh(f"{name}_real")
        return self.float_names.get(name, name)

    # ---- operators with weights
    def conv(self, node: QuantNode) -> None:
        self._weighted(node, 0, dict(node.attributes))

    def gemm(self, node: QuantNode) -> None:
        self._weighted(node, 0, {"transB": 1})

    def matmul(self, node: QuantNode) -> None:
        self._weighted(node, 1, {})

    def _weighted(self, node: QuantNode, axis: int, attributes: dict[str, Any]) -> None:
        assert node.weight is not None and node.weight_scale is not None  # rule "weight" of the form
        scale = node.weight_scale.reshape(()) if node.weight_scale.size == 1 else node.weight_scale
        weight = (node.weight.astype(np.int16) + SHIFT).astype(np.uint8)
        source = self.graph.tensors[node.inputs[0]]
        inputs = [self._dequantise(source), self._real_constant(f"{node.output}_weight", weight, scale, SHIFT, axis)]
        if node.bias is not None:
            inputs.append(self._real_constant(f"{node.output}_bias", node.bias, np.float32(source.scale) * scale, 0, 0))
        self._rounded(node, inputs, attributes, self.graph.tensors[node.output])

    # ---- additions, pools, changes of scale count in steps of their output (DequantizeLinear by input scale / output scale, QuantizeLinear by 1):
    # where that ratio is exact in float32, a tie stays a tie, whatever the two scales are.
    def add(self, node: QuantNode) -> None:
        self._rounded(node, [self._in_steps(name, node.output) for name in node.inputs], {}, self._steps_of(node.output))

    def average_pool(self, node: QuantNode) -> None:
        a = dict(node.attributes)
        if set(a["dilations"]) == {1}:
            del a["dilations"]  # ONNX Runtime's fused average pool refuses the attribute, even where it says nothing
        uneven = bool(a["ceil_mode"]) or (any(a["pads"]) and not a["count_include_pad"])
        self._average(node, a, 0 if uneven or "dilations" in a else math.prod(a["kernel_shape"]))

    def global_average_pool(self, node: QuantNode) -> None:
        self._average(node, {}, math.prod(self.graph.tensors[node.inputs[0]].shape[2:]))

    def _average(self, node: QuantNode, attributes: dict[str, Any], cells: int) -> None:
        """`cells` is the number every window divides by, 0 where windows differ.

        ONNX Runtime's fused average pools multiply by the reciprocal, so with 7 or 14 cells a tie is no longer a tie (1 step off, 1.32);
        the float pool divides and is exact. Only a power of two may be fused.
        """
        inputs = [self._in_steps(node.inputs[0], node.output)]
        if cells and cells & (cells - 1) == 0:
            self._rounded(node, inputs, attributes, self._steps_of(node.output))
        else:
            self._quantise_unfused(self._emit(node.op, inputs, self._fresh(f"{node.output}_mean"), node.name, **attributes), node.output)

    def requantize(self, node: QuantNode) -> None:
        """Not fused either: of two quantisers in a row ONNX Runtime (1.32) removes one, and with it a rounding."""
        self._quantise_unfused(self._in_steps(node.inputs[0], node.output), node.output)

    def _quantise_unfused(self, steps: str, output: str) -> None:
        """A Mul by 2, undone by the scale behind it, is what keeps a QuantizeLinear from being fused."""
        doubled = self._emit("Mul", [steps, self._constant("two", np.array(2, np.float32))], self._fresh(f"{output}_doubled"))
        self._emit("QuantizeLinear", [doubled, *self._scale_and_zero(replace(self.graph.tensors[output], scale=2.0), np.uint8)], output)

    def _in_steps(self, tensor: str, output: str) -> str:
        """The tensor's real values, in steps of `output`."""
        source, target = self.graph.tensors[tensor], self.graph.tensors[output]
        return self._dequantise(replace(source, scale=float(source.scale or 0) / float(target.scale or 1)))

    def _steps_of(self, output: str) -> TensorSpec:
        return replace(self.graph.tensors[output], scale=1.0)

    # ---- operators that move or compare values: on uint8 as it is
    def max_pool(self, node: QuantNode) -> None:
        self._emit("MaxPool", [node.inputs[0]], node.output, node.name, **node.attributes)

    def clip(self, node: QuantNode) -> None:
        self._clamp(node.inputs[0], node)

    def reshape(self, node: QuantNode) -> None:
        shape = self._constant(f"{node.output}_shape", np.array(self.graph.tensors[node.output].shape, np.int64))
        self._emit("Reshape", [node.inputs[0], shape], node.output, node.name)

    def concat(self, node: QuantNode) -> None:
        self._emit("Concat", list(node.inputs), node.output, node.name, axis=node.attributes["axis"])

    # ---- parts
    def _rounded(self, node: QuantNode, inputs: list[str], attributes: dict[str, Any], result: TensorSpec) -> None:
        """Operator, QuantizeLinear by `result`, and the fused activation as a Clip on uint8: in front of the QuantizeLinear it would prevent the fusion."""
        value = self._emit(node.op, inputs, self._fresh(f"{node.output}_value"), node.name, **attributes)
        free = node.clamp == FULL_RANGE
        name = node.output if free else self._fresh(f"{node.output}_unclamped")
        steps = self._emit("QuantizeLinear", [value, *self._scale_and_zero(result, np.uint8)], name)
        if not free:
            self._clamp(steps, node)

    def _clamp(self, source: str, node: QuantNode) -> None:
        bounds = [self._constant(f"uint8_{bound + SHIFT}", np.array(bound + SHIFT, np.uint8)) for bound in node.clamp]
        self._emit("Clip", [source, *bounds], node.output)

    def _dequantise(self, spec: TensorSpec) -> str:
        """A DequantizeLinear for each reader: ONNX Runtime fuses one only where nothing else reads it."""
        return self._emit("DequantizeLinear", [spec.name, *self._scale_and_zero(spec, np.uint8)], self._fresh(f"{spec.name}_real"))

    def _scale_and_zero(self, spec: TensorSpec, dtype: type[np.int8] | type[np.uint8]) -> tuple[str, str]:
        zero = int(spec.zero_point or 0) + (SHIFT if dtype is np.uint8 else 0)
        scale = np.array(spec.scale, np.float32)
        return self._constant(f"scale_{float(scale).hex()}", scale), self._constant(f"{np.dtype(dtype).name}_{zero}", np.array(zero, dtype))

    def _real_constant(self, name: str, values: np.ndarray, scale: np.ndarray, zero: int, axis: int) -> str:
        zeros = np.full(scale.shape, zero, values.dtype)
        parts = [self._constant(f"{name}_{part}", array) for part, array in (("steps", values), ("scale", scale), ("zero", zeros))]
        attributes: dict[str, Any] = {"axis": axis} if scale.ndim else {}
        return self._emit("DequantizeLinear", parts, self._fresh(f"{name}_real"), **attributes)

    def _constant(self, name: str, array: np.ndarray) -> str:
        """An initialiser, one for all that ask for the same name."""
        unique = f"constant/{name}"
        if unique not in self.constants:
            self.taken.add(unique)
            self.constants[unique] = numpy_helper.from_array(np.asarray(array, order="C"), unique)
        return unique

    def _fresh(self, name: str) -> str:
        return _unique(name, self.taken)

    def _emit(self, op: str, inputs: Sequence[str], output: str, name: str = "", **attributes: Any) -> str:
        self._node(op, inputs, [output], name or f"{output}_{op}", attributes)
        return output

    def _node(self, op: str, inputs: Sequence[str], outputs: Sequence[str], name: str, attributes: Mapping[str, Any]) -> None:
        """Node names are made unique: ONNX does not ask for it, ONNX Runtime does."""
        self.nodes.append(helper.make_node(op, list(inputs), list(outputs), _unique(name, self.node_names), **attributes))


def _unique(name: str, taken: set[str]) -> str:
    candidate, count = name, 1
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    taken.add(candidate)
    return candidate


# The operator table of the target: what stands here is what `check` accepts.
LOWERINGS: dict[str, Callable[[_Lowering, QuantNode], None]] = {
    "QuantizeLinear": _Lowering.quantise_border,
    "DequantizeLinear": _Lowering.dequantise_border,
    "Conv": _Lowering.conv,
    "Gemm": _Lowering.gemm,
    "MatMul": _Lowering.matmul,
    "Add": _Lowering.add,
    "AveragePool": _Lowering.average_pool,
    "GlobalAveragePool": _Lowering.global_average_pool,
    "Requantize": _Lowering.requantize,
    "MaxPool": _Lowering.max_pool,
    "Relu": _Lowering.clip,
    "Clip": _Lowering.clip,
    "Flatten": _Lowering.reshape,
    "Reshape": _Lowering.reshape,
    "Concat": _Lowering.concat,
}


def _value(spec: TensorSpec) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(spec.name, _ONNX_TYPES[spec.dtype], list(spec.shape))
