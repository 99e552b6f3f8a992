# SPDX-License-Identifier: Apache-2.0
"""Float islands in half precision, for strongly typed networks: a Cast in front of each run of islands and one behind it, float32 elsewhere."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SUFFIX = "/float16"


def with_half_islands(model: onnx.ModelProto, islands: Collection[str]) -> onnx.ModelProto:
    """`islands` names nodes. Int8 layers keep their float32 scales and biases: their numbers stay."""
    typed = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    single = {value.name for value in (*typed.graph.value_info, *typed.graph.input, *typed.graph.output) if _is_float(value)}
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    inside = [node for node in model.graph.node if node.name in islands]
    written = {name for node in inside for name in node.output if name in single}
    held = {id(node) for node in inside}
    outside = {name for node in model.graph.node if id(node) not in held for name in node.input} | {value.name for value in model.graph.output}
    nodes: list[onnx.NodeProto] = []
    halves: dict[str, onnx.TensorProto] = {}
    cast: set[str] = set()
    for node in model.graph.node:
        if id(node) not in held:
            nodes.append(node)
            continue
        scales = set(node.input[1:3]) if node.op_type == "Resize" else set()
        for name in node.input:
            if name in constants and constants[name].data_type == TensorProto.FLOAT and name not in scales:
                halves[name] = numpy_helper.from_array(_limited(constants[name]), name + SUFFIX)
            elif name in single and name not in written and name not in cast:
                cast.add(name)
                nodes.append(helper.make_node("Cast", [name], [name + SUFFIX], f"{name}_to_float16", to=TensorProto.FLOAT16))
        nodes.append(_in_half(node, written | cast | set(halves)))
        for name in node.output:
            if name in written and name in outside:
                nodes.append(helper.make_node("Cast", [name + SUFFIX], [name], f"{name}_to_float32", to=TensorProto.FLOAT))
    body = helper.make_graph(nodes, model.graph.name, list(model.graph.input), list(model.graph.output), [*_still_read(constants, nodes), *halves.values()])
    return helper.make_model(body, opset_imports=list(model.opset_import), ir_version=model.ir_version, producer_name=model.producer_name)


def _is_float(value: onnx.ValueInfoProto) -> bool:
    return bool(value.type.tensor_type.elem_type == TensorProto.FLOAT)


def _limited(tensor: onnx.TensorProto) -> np.ndarray:
    largest = float(np.finfo(np.float16).max)
    limited: np.ndarray = np.clip(numpy_helper.to_array(tensor), -largest, largest).astype(np.float16)
    return limited


def _in_half(node: onnx.NodeProto, renamed: Collection[str]) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    scales = set(node.input[1:3]) if node.op_type == "Resize" else set()
    copy.input[:] = [name + SUFFIX if name in renamed and name not in scales else name for name in node.input]
    copy.output[:] = [name + SUFFIX if name in renamed else name for name in node.output]
    for attribute in copy.attribute:
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
            attribute.i = TensorProto.FLOAT16
    return copy


def _still_read(constants: dict[str, onnx.TensorProto], nodes: list[onnx.NodeProto]) -> list[onnx.TensorProto]:
    read = {name for node in nodes for name in node.input}
    return [tensor for name, tensor in constants.items() if name in read]
