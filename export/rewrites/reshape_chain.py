# SPDX-License-Identifier: Apache-2.0
"""A Reshape of a Reshape is one Reshape; a Transpose beside one that only moves axes of extent 1 is a Reshape as well."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from isthmus.export.rewrites._edit import NodeRewrite, add_constant, attributes_of, label_of, new_node, only_reader, replace, static_shape


class ReshapeChain(NodeRewrite):
    def rewrite(self, graph: ir.Graph, node: ir.Node) -> bool:
        source, after = (node.inputs[0] if node.inputs else None), static_shape(node.outputs[0])
        if source is None or after is None:
            return False
        if node.op_type == "Transpose":
            return keeps_order(node) and _has_reshape_beside(node) and _reshaped(graph, node, source, after)
        inner = source.producer()
        if node.op_type != "Reshape" or inner is None or inner.op_type != "Reshape" or inner.inputs[0] is None or source.is_graph_output():
            return False
        return _reshaped(graph, node, inner.inputs[0], after)


def keeps_order(node: ir.Node) -> bool:
    """Whether the Transpose leaves the elements in memory as they are: it moves axes of extent 1 only."""
    shape = static_shape(node.inputs[0])
    if shape is None:
        return False
    order = attributes_of(node).get("perm", list(range(len(shape)))[::-1])
    kept = [axis for axis in order if shape[axis] != 1]
    return kept == sorted(kept)


def _has_reshape_beside(node: ir.Node) -> bool:
    before = None if node.inputs[0] is None else node.inputs[0].producer()
    behind = only_reader(node.outputs[0])
    return any(other is not None and other.op_type == "Reshape" for other in (before, behind))


def _reshaped(graph: ir.Graph, node: ir.Node, source: ir.Value, shape: tuple[int, ...]) -> bool:
    written = add_constant(graph, f"{label_of(node)}_shape", np.array(shape, np.int64))
    replace(graph, [node], [new_node("Reshape", [source, written], {}, node.name)])
    return True
