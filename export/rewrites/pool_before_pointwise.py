# SPDX-License-Identifier: Apache-2.0
"""A 1x1 Conv in front of an average pool or of a cut in space moves behind it, where fewer pixels are left to compute.

A mean of W x + b is W times the mean of x, plus b. Padding that counts as zero breaks that where there is a bias: b would be averaged away.
"""

from __future__ import annotations

import onnx_ir as ir

from isthmus.export.rewrites._edit import NodeRewrite, attributes_of, constant, input_at, label_of, new_node, only_reader, replace, static_shape


class PoolBeforePointwise(NodeRewrite):
    def rewrite(self, graph: ir.Graph, node: ir.Node) -> bool:
        conv = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
        if conv is None or not _is_pointwise(conv) or only_reader(conv.outputs[0]) is not node or not _commutes(node, conv):
            return False
        before, after = static_shape(conv.inputs[0]), static_shape(node.outputs[0])
        if before is None or after is None:
            return False
        moved = new_node(node.op_type, [conv.inputs[0], *node.inputs[1:]], attributes_of(node), node.name or label_of(node), (*before[:2], *after[2:]))
        replace(graph, [conv, node], [moved, new_node("Conv", [moved.outputs[0], *conv.inputs[1:]], attributes_of(conv), conv.name)])
        return True


def _is_pointwise(node: ir.Node) -> bool:
    weight, given = constant(input_at(node, 1)), attributes_of(node)
    if node.op_type != "Conv" or weight is None or any(extent != 1 for extent in weight.shape[2:]):
        return False
    padded = any(given.get("pads", [])) or given.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    return not padded and all(stride == 1 for stride in given.get("strides", []))


def _commutes(node: ir.Node, conv: ir.Node) -> bool:
    given = attributes_of(node)
    if node.op_type == "AveragePool":
        counts_zeros = given.get("count_include_pad", 0) and (any(given.get("pads", [])) or given.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"))
        return input_at(conv, 2) is None or not counts_zeros
    if node.op_type == "Slice":
        axes = constant(input_at(node, 3))
        rank = len(static_shape(node.inputs[0]) or ())
        return axes is not None and all(int(axis) % rank >= 2 for axis in axes)
    return node.op_type == "GlobalAveragePool"
