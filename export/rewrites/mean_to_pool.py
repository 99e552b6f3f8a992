# SPDX-License-Identifier: Apache-2.0
"""ReduceMean and ReduceMax over all space axes, and GlobalMaxPool, as the pools they are."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from isthmus.export.rewrites._edit import NodeRewrite, add_constant, attributes_of, constant, input_at, new_node, replace, static_shape


class ReductionsToPools(NodeRewrite):
    def rewrite(self, graph: ir.Graph, node: ir.Node) -> bool:
        shape = static_shape(node.inputs[0]) if node.inputs else None
        if shape is None or len(shape) not in (3, 4) or not (node.op_type == "GlobalMaxPool" or _reduces_space(node, len(shape))):
            return False
        keeps = node.op_type == "GlobalMaxPool" or attributes_of(node).get("keepdims", 1) == 1
        rank = len(shape) - 2
        if node.op_type == "ReduceMean":
            pool = new_node("GlobalAveragePool", [node.inputs[0]], {}, node.name)
        else:
            window = {"kernel_shape": list(shape[2:]), "strides": [1] * rank, "dilations": [1] * rank, "pads": [0] * (2 * rank)}
            pool = new_node("MaxPool", [node.inputs[0]], window, node.name)
        if keeps:
            replace(graph, [node], [pool])
            return True
        pool.outputs[0].shape = ir.Shape((*shape[:2], *[1] * rank))
        pool.outputs[0].type = node.outputs[0].type
        flat = add_constant(graph, f"{node.name or node.outputs[0].name}_shape", np.array(shape[:2], np.int64))
        replace(graph, [node], [pool, new_node("Reshape", [pool.outputs[0], flat], {}, f"{node.name or node.outputs[0].name}_flat")])
        return True


def _reduces_space(node: ir.Node, rank: int) -> bool:
    if node.op_type not in ("ReduceMean", "ReduceMax"):
        return False
    axes = constant(input_at(node, 1))
    return axes is not None and sorted(int(axis) % rank for axis in axes.reshape(-1)) == list(range(2, rank))
