# SPDX-License-Identifier: Apache-2.0
"""Reshape with its whole shape written (no 0, no -1); Squeeze, Unsqueeze and unusual Flattens as Reshape; what changes nothing
(Identity, Dropout outside training) goes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from isthmus.export.rewrites._edit import NodeRewrite, add_constant, constant, input_at, new_node, replace, static_shape

RESHAPES = ("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Dropout")


class StaticReshape(NodeRewrite):
    def rewrite(self, graph: ir.Graph, node: ir.Node) -> bool:
        if node.op_type not in RESHAPES:
            return False
        before, after = static_shape(node.inputs[0]), static_shape(node.outputs[0])
        if before is None or after is None or 0 in after or any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
            return False
        if node.op_type == "Dropout" and _trains(node):
            return False
        if before == after:
            return _remove(node, graph)
        if node.op_type == "Flatten" and before[0] == after[0] and len(after) == 2:
            return False  # axis 1: the usual one
        shape = constant(input_at(node, 1)) if node.op_type == "Reshape" else None
        if shape is not None and tuple(shape) == after:
            return False
        written = add_constant(graph, f"{node.name or node.outputs[0].name}_shape", np.array(after, np.int64))
        replace(graph, [node], [new_node("Reshape", [node.inputs[0], written], {}, node.name)])
        return True


def _trains(node: ir.Node) -> bool:
    mode = input_at(node, 2)
    held = constant(mode)
    return mode is not None and (held is None or bool(held.any()))


def _remove(node: ir.Node, graph: ir.Graph) -> bool:
    """Readers take the input itself. A node that names a graph output hands its name to the producer, where that has no other border."""
    source, result = node.inputs[0], node.outputs[0]
    if source is None:
        return False
    if result.is_graph_output():
        if source.producer() is None or source.is_graph_output():
            return False
        name = result.name
        result.replace_all_uses_with(source, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        source.name = name
        return True
    result.replace_all_uses_with(source)
    graph.remove(node, safe=True)
    return True
