# SPDX-License-Identifier: Apache-2.0
"""A tensor repeated along the channels in front of a Conv (a grey image as RGB): the Conv reads it once, with its weights summed over the repeats."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from isthmus.export.rewrites._edit import NodeRewrite, add_constant, attributes_of, constant, input_at, label_of, new_node, replace, static_shape


class GrayscaleIntoConv(NodeRewrite):
    def rewrite(self, graph: ir.Graph, node: ir.Node) -> bool:
        source = repeated(node.inputs[0].producer()) if node.op_type == "Conv" and node.inputs[0] is not None else None
        weight = constant(input_at(node, 1))
        if source is None or weight is None or attributes_of(node).get("group", 1) != 1:
            return False
        channels = (static_shape(source) or ())[1]
        summed = weight.astype(np.float64).reshape(weight.shape[0], -1, channels, *weight.shape[2:]).sum(axis=1)
        inputs = [source, add_constant(graph, f"{label_of(node)}_weight", summed.astype(np.float32)), *node.inputs[2:]]
        replace(graph, [node], [new_node("Conv", inputs, attributes_of(node), node.name)])
        return True


def repeated(node: ir.Node | None) -> ir.Value | None:
    """The tensor that the node repeats, whole and in order, along axis 1 (Concat, Expand or Tile); None where it does anything else."""
    if node is None or node.op_type not in ("Concat", "Expand", "Tile"):
        return None
    source = node.inputs[0]
    before, after = static_shape(source), static_shape(node.outputs[0])
    if source is None or constant(source) is not None or before is None or after is None or len(before) != len(after) or len(before) < 3:
        return None
    if before[:1] + before[2:] != after[:1] + after[2:] or after[1] == before[1]:
        return None
    return source if node.op_type != "Concat" or all(value is source for value in node.inputs) else None
