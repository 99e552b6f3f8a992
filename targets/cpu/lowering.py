# SPDX-License-Identifier: Apache-2.0
"""The form as ONNX Runtime's CPU kernels compute it exactly: uint8 inside, int8 at the border, QuantizeLinear/DequantizeLinear around each operator.

Why uint8, when the form is int8. Measured with ONNX Runtime 1.32 on x86 with AVX2 and without VNNI:

- int8 activations: the graph optimiser fuses no operator; everything runs in float, slower than a float model.
- uint8 activations, int8 weights: fused, but the kernel adds pairs of products in 16 bits and saturates: up to 77 steps off.
- uint8 activations, uint8 weights: fused, and exact for every input.

The second is the fastest, and exact where no weight of a layer passes +-64 (`weighted.SIGNED_LIMIT`): such layers are written so, all others as uint8.

Adding 128 to a value and to its zero point changes no number, so that is what is written here. ONNX Runtime's own switch for the second
case (`session.x64quantprecision`) computes the same, but only in a session that sets it; the file here is exact in any session.

Why channels last around some moves of values. ONNX Runtime turns its convolutions to channels last and moves the Transposes this takes as far as they
go. Where an operator copies whole pixels there, it is written so: between two convolutions both Transposes vanish, and bytes move in runs, not one by one.
An image that is flattened for matrix products stays channels last to the end; else the Transpose would stand in front of the last pools.
"""

from __future__ import annotations

from collections.abc import Sequence
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
# Islands that no fusion of ONNX Runtime 1.32 knows. Any other may turn into a table or an integer kernel between two quantisers, or have its
# constant weights quantised (Conv, ConvTranspose, Gemm: several steps off).
UNFUSED_ISLANDS = frozenset({"LayerNormalization", "GridSample"})
_ONNX_TYPES = {"int8": TensorProto.INT8, "float32": TensorProto.FLOAT}


class Lowering(OnnxWriter):
    """Border, float islands, and the parts that operators are put together from. Every int8 tensor of the form becomes a uint8 tensor of the same name."""

    def __init__(self, graph: QuantGraph, raw_border: bool = True) -> None:
        super().__init__({*graph.tensors, *(spec.name for spec in (*graph.inputs, *graph.outputs))})
        self.graph = graph
        self.raw_border = raw_border
        self.raw_inputs = {spec.name: spec for spec in graph.inputs if raw_border and spec.is_quantised}
        self.raw_outputs = {spec.name: spec for spec in graph.outputs if raw_border and spec.is_quantised}
        self.float_names: dict[str, str] = {}
        self.flattened_last: dict[str, tuple[int, ...]] = {}  # flattened channels last, against the form: the image's shape in the form

    def finished(self) -> onnx.ModelProto:
        inputs, outputs = (
            [helper.make_tensor_value_info(spec.name, _ONNX_TYPES[spec.dtype if self.raw_border else "float32"], list(spec.shape)) for spec in side]
            for side in (self.graph.inputs, self.graph.outputs)
        )
        return self.finish("isthmus_cpu", inputs, outputs, OPSET)

    def spec(self, tensor: str) -> TensorSpec:
        return self.graph.tensors[tensor]

    # ---- border and float islands
    def quantise_border(self, node: QuantNode) -> None:
        source = node.inputs[0]
        if source in self.raw_inputs:  # the graph input is int8 already: only its dtype changes
            source = self.emit("DequantizeLinear", [source, *self.scale_and_zero(self.raw_inputs[source], np.int8)], self.fresh(f"{source}_real"))
        island = self.graph.producer(node.inputs[0])
        if island is not None and island.op not in UNFUSED_ISLANDS:
            self.quantise_unfused(self._float_name(source), self.spec(node.output), node.output)
        else:
            self.quantise(self._float_name(source), self.spec(node.output), node.output)

    def dequantise_border(self, node: QuantNode) -> None:
        source = node.inputs[0]
        real = self.emit("DequantizeLinear", [source, *self.scale_and_zero(self.spec(source), np.uint8)], self._float_name(node.output))
        if node.output in self.raw_outputs:
            self.emit("QuantizeLinear", [real, *self.scale_and_zero(self.raw_outputs[node.output], np.int8)], node.output)

    def island(self, node: QuantNode) -> None:
        inputs = self.float_inputs(node, [self._float_name(name) for name in node.inputs])
        self.node(node.op, inputs, node.outputs, node.name, node.attributes)

    def _float_name(self, name: str) -> str:
        """Where a float value of the form is found: its name, unless an int8 output of the artifact has taken that."""
        if name in self.raw_outputs and name not in self.float_names:
            self.float_names[name] = self.fresh(f"{name}_real")
        return self.float_names.get(name, name)

    # ---- parts
    def group(self, op: str, inputs: Sequence[str], node: QuantNode, result: TensorSpec, **attributes: Any) -> None:
        """Operator, QuantizeLinear by `result`, and the fused activation as a Clip on uint8: in front of the QuantizeLinear it would prevent the fusion."""
        value = self.emit(op, inputs, self.fresh(f"{node.output}_value"), node.name, **attributes)
        place = self.unclamped(node)
        self.quantise(value, result, place)
        self.clamp(node, place)

    def unclamped(self, node: QuantNode) -> str:
        """Where the result belongs before `clamp`: the output itself where nothing is clamped."""
        return node.output if node.clamp == FULL_RANGE else self.fresh(f"{node.output}_unclamped")

    def clamp(self, node: QuantNode, source: str) -> None:
        """From `source` to the output, nothing where they are one."""
        if source != node.output:
            bounds = [self.constant(f"uint8_{bound + SHIFT}", np.array(bound + SHIFT, np.uint8)) for bound in node.clamp]
            self.emit("Clip", [source, *bounds], node.output)

    def quantise(self, value: str, result: TensorSpec, output: str) -> None:
        self.emit("QuantizeLinear", [value, *self.scale_and_zero(result, np.uint8)], output)

    def quantise_unfused(self, value: str, result: TensorSpec, output: str) -> None:
        """A Div by 0.5, undone by the scale behind it, keeps a QuantizeLinear from being fused; a Mul would become part of a Conv's weights first."""
        doubled = self.emit("Div", [value, self.constant("half", np.array(0.5, np.float32))], self.fresh(f"{output}_doubled"))
        self.quantise(doubled, replace(result, scale=2.0 * float(result.scale or 0)), output)

    def dequantise(self, spec: TensorSpec) -> str:
        """A DequantizeLinear for each reader: ONNX Runtime fuses one only where nothing else reads it."""
        return self.emit("DequantizeLinear", [spec.name, *self.scale_and_zero(spec, np.uint8)], self.fresh(f"{spec.name}_real"))

    def in_steps(self, tensor: str, output: str, sign: float = 1.0) -> str:
        """The tensor's real values, in steps of `output`: where the ratio is exact in float32, a tie stays a tie, whatever the two scales are."""
        source, target = self.spec(tensor), self.spec(output)
        return self.dequantise(replace(source, scale=sign * float(source.scale or 0) / float(target.scale or 1)))

    def steps_of(self, output: str, divisor: int = 1) -> TensorSpec:
        """The quantiser behind `in_steps`. A divisor in it is a true division of a whole number: the reference's last step."""
        return replace(self.spec(output), scale=float(divisor))

    def scale_and_zero(self, spec: TensorSpec, dtype: type[np.int8] | type[np.uint8]) -> tuple[str, str]:
        zero = int(spec.zero_point or 0) + (SHIFT if dtype is np.uint8 else 0)
        scale = np.array(spec.scale, np.float32)
        return self.constant(f"scale_{float(scale).hex()}", scale), self.constant(f"{np.dtype(dtype).name}_{zero}", np.array(zero, dtype))

    def whole_numbers(self, name: str, values: Sequence[int] | np.ndarray) -> str:
        return self.constant(name, np.array(values, np.int64))

    # ---- shapes
    def reshaped(self, source: str, shape: Sequence[int], output: str = "", name: str = "") -> str:
        output = output or self.fresh(f"{source}_reshaped")
        return self.emit("Reshape", [source, self.whole_numbers(f"{output}_shape", shape)], output, name)

    def channels_last(self, source: str, rank: int) -> str:
        return self.emit("Transpose", [source], self.fresh(f"{source}_channels_last"), perm=[0, *range(2, rank), 1])

    def channels_first(self, source: str, rank: int, output: str, name: str = "") -> str:
        return self.emit("Transpose", [source], output, name, perm=[0, rank - 1, *range(1, rank - 1)])
