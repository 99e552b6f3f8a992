# SPDX-License-Identifier: Apache-2.0
"""The form dequantised: weights as float32 numbers, no quantisers. What an FP16 engine is built from, and all that a board without int8 can load.

Its numbers are not those of the int8 form: nothing is rounded to int8, and nothing saturates but where the form has an activation.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from isthmus.graph import QuantGraph, QuantNode
from isthmus.targets.jetson.dialects import Dialect
from isthmus.targets.jetson.lower import Lowering

LARGEST_FP16 = float(np.finfo(np.float16).max)


def float_onnx_from_graph(graph: QuantGraph, dialect: Dialect, half: bool = True) -> bytes:
    """The ONNX file, float32 border. With `half` strongly typed dialects get float16 inside; the others get float32 and the builder's flag FP16."""
    model = _FloatLowering(graph, dialect).model()
    if dialect.strongly_typed and half:
        model = _halved(model)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString(deterministic=True)


def ranges_from_graph(graph: QuantGraph, dialect: Dialect) -> dict[str, float]:
    """The largest value of each tensor of the float32 file: what TensorRT asks for where int8 comes without quantisers (127 steps, zero point 0)."""
    lowering = _FloatLowering(graph, dialect)
    lowering.model()
    return {real: 127 * float(graph.tensors[name].scale or 0) for name, real in lowering.reals.items()}


def beyond_fp16(graph: QuantGraph) -> list[str]:
    """The int8 tensors whose real values float16 cannot hold."""
    return [spec.name for spec in graph.tensors.values() if spec.is_quantised and 128 * float(spec.scale or 0) > LARGEST_FP16]


class _FloatLowering(Lowering):
    """Quantisers and dequantisers write nothing: an int8 tensor of the form is the float value in front of its quantiser."""

    def quantise(self, value: str, tensor: str) -> None:
        self.reals[tensor] = value

    def real(self, tensor: str) -> str:
        return self.reals[tensor]

    def dequantise_border(self, node: QuantNode) -> None:
        self.emit("Identity", [self.reals[node.inputs[0]]], node.output, node.name)

    def stored(self, name: str, steps: np.ndarray, scale: np.ndarray, axis: int) -> str:
        shape = [-1 if place == axis else 1 for place in range(steps.ndim)]
        return self.constant(f"{name}_float", steps.astype(np.float32) * (scale.reshape(shape) if scale.ndim else scale))


def _halved(model: onnx.ModelProto) -> onnx.ModelProto:
    """float16 inside: constants converted, one Cast behind every input and in front of every output."""
    body = model.graph
    renamed = {value.name: f"{value.name}/float16" for value in (*body.input, *body.output)}
    scales = {name for node in body.node if node.op_type == "Resize" for name in node.input[1:3]}  # ONNX has them in float32 alone
    constants = [tensor if tensor.name in scales else _half(tensor) for tensor in body.initializer]
    nodes = [helper.make_node("Cast", [value.name], [renamed[value.name]], f"{value.name}_to_float16", to=TensorProto.FLOAT16) for value in body.input]
    for node in body.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                attribute.i = TensorProto.FLOAT16
        nodes.append(node)
    nodes += [helper.make_node("Cast", [renamed[value.name]], [value.name], f"{value.name}_to_float32", to=TensorProto.FLOAT) for value in body.output]
    graph = helper.make_graph(nodes, body.name, list(body.input), list(body.output), constants)
    return helper.make_model(graph, opset_imports=list(model.opset_import), ir_version=model.ir_version, producer_name=model.producer_name)


def _half(tensor: onnx.TensorProto) -> onnx.TensorProto:
    if tensor.data_type != TensorProto.FLOAT:
        return tensor
    limited = np.clip(numpy_helper.to_array(tensor), -LARGEST_FP16, LARGEST_FP16)  # the far end of a Clip, or of a scale that `beyond_fp16` names
    return numpy_helper.from_array(limited.astype(np.float16), tensor.name)
