# SPDX-License-Identifier: Apache-2.0
"""Transposes that bring another axis in front of the batch, where it need not be: the form keeps the batch in front.

Attention with one layer for queries, keys and values is written so: (batch, tokens, 3, heads, depth) with the 3 in front, then one of the three,
as a Gather of one place or (by ONNX Runtime's optimiser) a Slice in front.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from isthmus.export.rewrites._edit import NodeRewrite, add_constant, attributes_of, constant, input_at, label_of, new_node, replace, static_shape


class BatchInFront(NodeRewrite):
    def rewrite(self, graph: ir.Graph, node: ir.Node) -> bool:
        return _gather_first(graph, node) or _skip_ones(graph, node)


def _gather_first(graph: ir.Graph, node: ir.Node) -> bool:
    """Gather of one place along the first axis of a Transpose: picked before, the other axes moved behind."""
    source = node.inputs[0] if node.op_type == "Gather" else None
    transpose = source.producer() if source is not None else None
    place = constant(input_at(node, 1))
    if transpose is None or transpose.op_type != "Transpose" or place is None or place.ndim != 0 or attributes_of(node).get("axis", 0) != 0:
        return False
    shape, order = static_shape(transpose.inputs[0]), _order(transpose)
    if shape is None or order is None or order[0] == 0:
        return False
    axis, rest = order[0], [kept - (kept > order[0]) for kept in order[1:]]
    picked = new_node("Gather", [transpose.inputs[0], node.inputs[1]], {"axis": axis}, node.name, [*shape[:axis], *shape[axis + 1 :]])
    replace(graph, [node], [picked, new_node("Transpose", [picked.outputs[0]], {"perm": rest}, f"{label_of(node)}_order")])
    return True


def _skip_ones(graph: ir.Graph, node: ir.Node) -> bool:
    """Axes of extent 1 that a Transpose brings in front of the batch: brought right behind it, which a Reshape (or nothing) puts right."""
    if node.op_type != "Transpose":
        return False
    shape, order = static_shape(node.inputs[0]), _order(node)
    if not shape or order is None or order[0] == 0 or any(shape[axis] != 1 for axis in order[: order.index(0)]):
        return False
    kept = [0, *(axis for axis in order if axis != 0)]
    after = static_shape(node.outputs[0])
    if after == tuple(shape[axis] for axis in kept):
        replace(graph, [node], [new_node("Transpose", [node.inputs[0]], {"perm": kept}, node.name)])
        return True
    moved = new_node("Transpose", [node.inputs[0]], {"perm": kept}, node.name, [shape[axis] for axis in kept])
    written = add_constant(graph, f"{label_of(node)}_shape", np.array(after, np.int64))
    replace(graph, [node], [moved, new_node("Reshape", [moved.outputs[0], written], {}, f"{label_of(node)}_shape")])
    return True


def _order(node: ir.Node) -> list[int] | None:
    rank = len(static_shape(node.inputs[0]) or ())
    return list(attributes_of(node).get("perm", range(rank)[::-1])) if rank else None
