# SPDX-License-Identifier: Apache-2.0
"""Linear layers in one spelling: Gemm with weight [out, in] (transB=1), alpha=beta=1, bias [out]. MatMul + Add of rank 2 becomes one too."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from isthmus.export.rewrites._edit import NodeRewrite, add_constant, attributes_of, constant, input_at, new_node, only_reader, replace, static_shape

NORMAL = {"transA": 0, "transB": 1, "alpha": 1.0, "beta": 1.0}


class GemmNormalForm(NodeRewrite):
    def rewrite(self, graph: ir.Graph, node: ir.Node) -> bool:
        if node.op_type != "Gemm":
            return False
        given = {"transA": 0, "transB": 0, "alpha": 1.0, "beta": 1.0} | attributes_of(node)
        weight, addend = constant(input_at(node, 1)), constant(input_at(node, 2))
        if weight is None or given["transA"] or (addend is None and input_at(node, 2) is not None):
            return False
        filters = weight.shape[0] if given["transB"] else weight.shape[1]
        bias = None if addend is None else as_bias(addend, filters)
        if (addend is not None and bias is None) or (attributes_of(node) == NORMAL and (addend is None or addend.shape == (filters,))):
            return False
        weight = (weight if given["transB"] else weight.T) * np.float32(given["alpha"])
        inputs = [node.inputs[0], add_constant(graph, f"{node.inputs[1].name}_normal", np.array(weight, np.float32, order="C"))]  # type: ignore[union-attr]  # constant: not None
        if bias is not None:
            inputs.append(add_constant(graph, f"{node.inputs[2].name}_normal", (bias * np.float32(given["beta"])).astype(np.float32)))  # type: ignore[union-attr]  # as above
        replace(graph, [node], [new_node("Gemm", inputs, NORMAL, node.name)])
        return True


class MatMulAddToGemm(NodeRewrite):
    def rewrite(self, graph: ir.Graph, node: ir.Node) -> bool:
        if node.op_type != "MatMul" or len(static_shape(node.inputs[0]) or ()) != 2:
            return False
        weight, add = constant(node.inputs[1]), only_reader(node.outputs[0])
        if weight is None or weight.ndim != 2 or add is None or add.op_type != "Add":
            return False
        if static_shape(add.outputs[0]) != static_shape(node.outputs[0]):
            return False
        addend = constant(add.inputs[1] if add.inputs[0] is node.outputs[0] else add.inputs[0])
        bias = None if addend is None else as_bias(addend, weight.shape[1])
        if bias is None:
            return False
        label = node.name or node.outputs[0].name
        inputs = [node.inputs[0], add_constant(graph, f"{label}_weight", np.array(weight.T, order="C")), add_constant(graph, f"{label}_bias", bias)]
        replace(graph, [node, add], [new_node("Gemm", inputs, NORMAL, node.name)])
        return True


def as_bias(addend: np.ndarray, filters: int) -> np.ndarray | None:
    """An addend that is the same in every row, as a vector [filters]; None where it is not."""
    if addend.ndim > 2 or addend.size not in (1, filters) or (addend.ndim == 2 and addend.shape[0] != 1):
        return None
    return np.array(np.broadcast_to(addend.reshape(-1), (filters,)), order="C")
