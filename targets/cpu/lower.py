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
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from isthmus.graph import OPSET, QuantGraph, QuantNode
from isthmus.onnx_writer import OnnxWriter
from isthmus.spec import TensorSpec

SHIFT = 128  # int8 value + 128 = uint8 value
FULL_RANGE = (-128, 127)
_ONNX_TYPES = {"int8": TensorProto.INT8, "float32": TensorProto.FLOAT}


def onnx_from_graph(graph: QuantGraph) -> bytes:
    """The ONNX file: inputs and outputs have the names, dtypes and shapes of `graph.inputs` and `graph.outputs`."""
    return _Lowering(graph).model().SerializeToString(deterministic=True)


class _Lowering(OnnxWriter):
    """One pass over the nodes. Every int8 tensor of the form becomes a uint8 tensor of the same name."""

    def __init__(self, graph: QuantGraph) -> None:
        super().__init__({*graph.tensors, *(spec.name for spec in (*graph.inputs, *graph.outputs))})
        self.graph = graph
        self.raw_inputs = {spec.name: spec for spec in graph.inputs if spec.is_quantised}
        self.raw_outputs = {spec.name: spec for spec in graph.outputs if spec.is_quantised}
        self.float_names: dict[str, str] = {}

    def model(self) -> onnx.ModelProto:
        for node in self.graph.nodes:
            if node.kind == "float":
                self._float(node)
            else:
                LOWERINGS[node.op](self, node)
        inputs, outputs = ([_value(spec) for spec in side] for side in (self.graph.inputs, self.graph.outputs))
        return self.finish("isthmus_cpu", inputs, outputs, OPSET)

    # ---- border and float islands
    def quantise_border(self, node: QuantNode) -> None:
        source = node.inputs[0]
        if source in self.raw_inputs:  # the graph input is int8 already: only its dtype changes
            source = self.emit("DequantizeLinear", [source, *self._scale_and_zero(self.raw_inputs[source], np.int8)], self.fresh(f"{source}_real"))
        self.emit("QuantizeLinear", [self._float_name(source), *self._scale_and_zero(self.graph.tensors[node.output], np.uint8)], node.output)

    def dequantise_border(self, node: QuantNode) -> None:
        source = node.inputs[0]
        real = self.emit("DequantizeLinear", [source, *self._scale_and_zero(self.graph.tensors[source], np.uint8)], self._float_name(node.output))
        if node.output in self.raw_outputs:
            self.emit("QuantizeLinear", [real, *self._scale_and_zero(self.raw_outputs[node.output], np.int8)], node.output)

    def _float(self, node: QuantNode) -> None:
        inputs = self.float_inputs(node, [self._float_name(name) for name in node.inputs])
        self.node(node.op, inputs, node.outputs, node.name, node.attributes)

    def _float_name(self, name: str) -> str:
        """Where a float value of the form is found: its name, unless an int8 output of the artifact has taken that."""
        if name in self.raw_outputs and name not in self.float_names:
            self.float_names[name] = self.fresh(f"{name}_real")
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
        inputs = [self._dequantise(source), self.real_constant(f"{node.output}_weight", weight, scale, SHIFT, axis)]
        if node.bias is not None:
            inputs.append(self.real_constant(f"{node.output}_bias", node.bias, np.float32(source.scale) * scale, 0, 0))
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
            self._quantise_unfused(self.emit(node.op, inputs, self.fresh(f"{node.output}_mean"), node.name, **attributes), node.output)

    def requantize(self, node: QuantNode) -> None:
        """Not fused either: of two quantisers in a row ONNX Runtime (1.32) removes one, and with it a rounding."""
        self._quantise_unfused(self._in_steps(node.inputs[0], node.output), node.output)

    def _quantise_unfused(self, steps: str, output: str) -> None:
        """A Mul by 2, undone by the scale behind it, is what keeps a QuantizeLinear from being fused."""
        doubled = self.emit("Mul", [steps, self.constant("two", np.array(2, np.float32))], self.fresh(f"{output}_doubled"))
        self.emit("QuantizeLinear", [doubled, *self._scale_and_zero(replace(self.graph.tensors[output], scale=2.0), np.uint8)], output)

    def _in_steps(self, tensor: str, output: str) -> str:
        """The tensor's real values, in steps of `output`."""
        source, target = self.graph.tensors[tensor], self.graph.tensors[output]
        return self._dequantise(replace(source, scale=float(source.scale or 0) / float(target.scale or 1)))

    def _steps_of(self, output: str) -> TensorSpec:
        return replace(self.graph.tensors[output], scale=1.0)

    # ---- operators that move or compare values: on uint8 as it is
    def max_pool(self, node: QuantNode) -> None:
        self.emit("MaxPool", [node.inputs[0]], node.output, node.name, **node.attributes)

    def clip(self, node: QuantNode) -> None:
        self._clamp(node.inputs[0], node)

    def reshape(self, node: QuantNode) -> None:
        shape = self.constant(f"{node.output}_shape", np.array(self.graph.tensors[node.output].shape, np.int64))
        self.emit("Reshape", [node.inputs[0], shape], node.output, node.name)

    def concat(self, node: QuantNode) -> None:
        self.emit("Concat", list(node.inputs), node.output, node.name, axis=node.attributes["axis"])

    # ---- parts
    def _rounded(self, node: QuantNode, inputs: list[str], attributes: dict[str, Any], result: TensorSpec) -> None:
        """Operator, QuantizeLinear by `result`, and the fused activation as a Clip on uint8: in front of the QuantizeLinear it would prevent the fusion."""
        value = self.emit(node.op, inputs, self.fresh(f"{node.output}_value"), node.name, **attributes)
        free = node.clamp == FULL_RANGE
        name = node.output if free else self.fresh(f"{node.output}_unclamped")
        steps = self.emit("QuantizeLinear", [value, *self._scale_and_zero(result, np.uint8)], name)
        if not free:
            self._clamp(steps, node)

    def _clamp(self, source: str, node: QuantNode) -> None:
        bounds = [self.constant(f"uint8_{bound + SHIFT}", np.array(bound + SHIFT, np.uint8)) for bound in node.clamp]
        self.emit("Clip", [source, *bounds], node.output)

    def _dequantise(self, spec: TensorSpec) -> str:
        """A DequantizeLinear for each reader: ONNX Runtime fuses one only where nothing else reads it."""
        return self.emit("DequantizeLinear", [spec.name, *self._scale_and_zero(spec, np.uint8)], self.fresh(f"{spec.name}_real"))

    def _scale_and_zero(self, spec: TensorSpec, dtype: type[np.int8] | type[np.uint8]) -> tuple[str, str]:
        zero = int(spec.zero_point or 0) + (SHIFT if dtype is np.uint8 else 0)
        scale = np.array(spec.scale, np.float32)
        return self.constant(f"scale_{float(scale).hex()}", scale), self.constant(f"{np.dtype(dtype).name}_{zero}", np.array(zero, dtype))


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
