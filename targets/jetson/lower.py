# SPDX-License-Identifier: Apache-2.0
"""The form as TensorRT's ONNX parser takes it: explicit QuantizeLinear/DequantizeLinear, float border, the same integers.

- Opset 20, IR version 9: the parser of TensorRT 10.0 reads opset 9 to 20 (onnx-tensorrt, docs/operators.md of branch 10.0-GA), JetPack 6 brings 10.3.
- Weights stay int8 initialisers behind their DequantizeLinear: the parser takes those since 10.0; 8.0 and 8.2 wanted float weights.
- Biases become float32 initialisers: the parser refuses a DequantizeLinear on int32. int32 x scale is exact in the power-of-two scheme.
- Every zero point is written out, is 0 and has the size of its scale: the parser asks for all three.
- `kernel_shape` is always there (convolutions with a weight that is computed, as one behind a DequantizeLinear is, are refused without).
- ceil_mode becomes padding at the end: what TensorRT counts in a window that hangs over is documented nowhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from isthmus.graph import QuantGraph, QuantNode
from isthmus.kernels import pads_to_fill
from isthmus.onnx_writer import OnnxWriter
from isthmus.spec import TensorSpec

TENSORRT_OPSET = 20


def onnx_from_graph(graph: QuantGraph) -> bytes:
    """The ONNX file: float32 inputs and outputs with the graph's own names."""
    return _Lowering(graph).model().SerializeToString(deterministic=True)


def end_pads(graph: QuantGraph, node: QuantNode) -> list[int]:
    """The pads of a pool without ceil_mode: every begin, then every end, grown so that the last window lies inside."""
    a = node.attributes
    space, out = graph.tensors[node.inputs[0]].shape[2:], graph.tensors[node.output].shape[2:]
    return pads_to_fill(space, out, a["kernel_shape"], a["strides"], a["pads"], a["dilations"])


class _Lowering(OnnxWriter):
    """One pass over the nodes; tensors keep their names, `<name>_real` is the float value of an int8 tensor."""

    def __init__(self, graph: QuantGraph) -> None:
        super().__init__(graph.tensors)
        self.graph = graph
        self.real: dict[str, str] = {}  # int8 tensor -> its float value

    def model(self) -> onnx.ModelProto:
        for node in self.graph.nodes:
            if node.kind == "float":
                self._float(node)
            else:
                LOWERINGS[node.op](self, node)
        inputs, outputs = (
            [helper.make_tensor_value_info(spec.name, TensorProto.FLOAT, list(spec.shape)) for spec in side] for side in (self.graph.inputs, self.graph.outputs)
        )
        return self.finish("isthmus_jetson", inputs, outputs, TENSORRT_OPSET)

    # ---- border and float islands
    def quantise_border(self, node: QuantNode) -> None:
        self._quantise(node.inputs[0], node.output)

    def dequantise_border(self, node: QuantNode) -> None:
        """A DequantizeLinear of its own: the border's name is fixed."""
        self.emit("DequantizeLinear", [node.inputs[0], *self._scale_and_zero(self.graph.tensors[node.inputs[0]])], node.output, node.name)

    def _float(self, node: QuantNode) -> None:
        inputs = self.float_inputs(node, node.inputs)
        self.node(node.op, inputs, node.outputs, node.name, node.attributes)

    # ---- int8 operators: DequantizeLinear -> operator -> (Relu | Clip) -> QuantizeLinear
    def conv(self, node: QuantNode) -> None:
        self._weighted(node, 0, dict(node.attributes))

    def gemm(self, node: QuantNode) -> None:
        self._weighted(node, 0, {"transB": 1})

    def matmul(self, node: QuantNode) -> None:
        self._weighted(node, 1, {})

    def _weighted(self, node: QuantNode, axis: int, attributes: dict[str, Any]) -> None:
        assert node.weight is not None and node.weight_scale is not None  # rule "weight" of the form
        scale = node.weight_scale.reshape(()) if node.weight_scale.size == 1 else node.weight_scale
        inputs = [self._real(node.inputs[0]), self.real_constant(f"{node.output}_weight", node.weight, scale, 0, axis)]
        if node.bias is not None:
            step = np.float32(self.graph.tensors[node.inputs[0]].scale) * scale
            inputs.append(self.constant(f"{node.output}_bias", (node.bias * step.astype(np.float64)).astype(np.float32)))
        self._group(node, inputs, attributes)

    def pool(self, node: QuantNode) -> None:
        attributes = {"kernel_shape": node.attributes["kernel_shape"], "strides": node.attributes["strides"], "pads": end_pads(self.graph, node)}
        if set(node.attributes["dilations"]) != {1}:
            attributes["dilations"] = node.attributes["dilations"]  # `check` has refused it; dropping it here would change the numbers
        if node.op == "AveragePool":
            attributes["count_include_pad"] = node.attributes["count_include_pad"]
        self._group(node, [self._real(node.inputs[0])], attributes)

    def plain(self, node: QuantNode) -> None:
        """Add, Concat, GlobalAveragePool: the operator on real values, with its attributes."""
        self._group(node, [self._real(name) for name in node.inputs], dict(node.attributes))

    def reshape(self, node: QuantNode) -> None:
        shape = self.constant(f"{node.output}_shape", np.array(self.graph.tensors[node.output].shape, np.int64))
        value = self.emit("Reshape", [self._real(node.inputs[0]), shape], self.fresh(f"{node.output}_value"), node.name)
        self._quantise(value, node.output)

    def clip(self, node: QuantNode) -> None:
        self._quantise(self._activation(self._real(node.inputs[0]), node, node.op, node.name), node.output)

    def requantize(self, node: QuantNode) -> None:
        self._quantise(self._real(node.inputs[0]), node.output)

    # ---- parts
    def _group(self, node: QuantNode, inputs: list[str], attributes: dict[str, Any]) -> None:
        value = self.emit(node.op, inputs, self.fresh(f"{node.output}_value"), node.name, **attributes)
        if node.activation:
            value = self._activation(value, node, node.activation, f"{node.name}_{node.activation}")
        self._quantise(value, node.output)

    def _activation(self, value: str, node: QuantNode, kind: str, name: str) -> str:
        bounds = []
        if kind == "Clip":
            given = enumerate(node.activation_range)
            bounds = [self.constant(f"{node.output}_bound_{i}", np.array(bound, np.float32)) if np.isfinite(bound) else "" for i, bound in given]
            bounds = bounds[: max((i + 1 for i, bound in enumerate(bounds) if bound), default=0)]  # no empty inputs at the end
        return self.emit(kind, [value, *bounds], self.fresh(f"{node.output}_active"), name)

    def _quantise(self, value: str, tensor: str) -> None:
        self.emit("QuantizeLinear", [value, *self._scale_and_zero(self.graph.tensors[tensor])], tensor)

    def _real(self, tensor: str) -> str:
        """The float value of an int8 tensor: one DequantizeLinear, shared by its readers."""
        if tensor not in self.real:
            self.real[tensor] = self.emit("DequantizeLinear", [tensor, *self._scale_and_zero(self.graph.tensors[tensor])], self.fresh(f"{tensor}_real"))
        return self.real[tensor]

    def _scale_and_zero(self, spec: TensorSpec) -> tuple[str, str]:
        return self.constant(f"{spec.name}_scale", np.array(spec.scale, np.float32)), self.constant("zero", np.array(0, np.int8))


# The operator table of the target: what stands here is what `check` accepts.
LOWERINGS: dict[str, Callable[[_Lowering, QuantNode], None]] = {
    "QuantizeLinear": _Lowering.quantise_border,
    "DequantizeLinear": _Lowering.dequantise_border,
    "Conv": _Lowering.conv,
    "Gemm": _Lowering.gemm,
    "MatMul": _Lowering.matmul,
    "Add": _Lowering.plain,
    "Concat": _Lowering.plain,
    "GlobalAveragePool": _Lowering.plain,
    "AveragePool": _Lowering.pool,
    "MaxPool": _Lowering.pool,
    "Relu": _Lowering.clip,
    "Clip": _Lowering.clip,
    "Flatten": _Lowering.reshape,
    "Reshape": _Lowering.reshape,
    "Requantize": _Lowering.requantize,
}
