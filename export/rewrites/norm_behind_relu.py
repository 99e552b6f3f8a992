# SPDX-License-Identifier: Apache-2.0
"""Layer, ReLU, BatchNormalization: into the layer in front and the one behind, so that in int8 no layer of its own is left.

A ReLU and a positive factor commute, so do a max pool and a factor or shift. Each side takes the square root of the factor: a channel that is nearly always
0 has a factor hundreds of times the others', which on one side alone would leave those few int8 steps where one scale serves all weights of a layer.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from isthmus.export.rewrites._edit import NodeRewrite, add_constant, affine, attributes_of, label_of, new_node, only_reader, replace, static_shape
from isthmus.export.rewrites.affine_into_layer import takes_affine
from isthmus.export.rewrites.scale_into_weights import can_take


class NormBehindRelu(NodeRewrite):
    """Leaves a Mul in front of the ReLU, a Mul and an Add at the end, which `AffineIntoLayer` and `ScaleIntoWeights` fold."""

    def rewrite(self, graph: ir.Graph, node: ir.Node) -> bool:
        found = affine(node) if node.op_type == "BatchNormalization" else None
        relu = found[0].producer() if found is not None else None
        layer = relu.inputs[0].producer() if relu is not None and relu.op_type == "Relu" and relu.inputs[0] is not None else None
        if found is None or relu is None or layer is None or not takes_affine(layer):
            return False
        if only_reader(layer.outputs[0]) is not relu or only_reader(relu.outputs[0]) is not node:
            return False
        _, factor, shift = found
        between = _crossed(node)
        end = (between or [node])[-1].outputs[0]
        reader, shape, after = only_reader(end), static_shape(node.outputs[0]), static_shape(end)
        if shift is None or not (factor > 0).all() or reader is None or not can_take(reader, end, True) or shape is None or after is None:
            return False
        label = label_of(node)
        half = np.sqrt(factor).astype(np.float32)
        per_channel = add_constant(graph, f"{label}_in_front", half.reshape(1, -1, *[1] * (len(shape) - 2)))
        moved = [new_node("Mul", [layer.outputs[0], per_channel], {}, f"{label}_in_front", shape)]
        for step in (relu, *between):
            moved.append(new_node(step.op_type, [moved[-1].outputs[0], *step.inputs[1:]], attributes_of(step), step.name, static_shape(step.outputs[0])))
        for op, of_channel in (("Mul", factor / half), ("Add", shift)):
            of_column = np.repeat(of_channel, after[1] // shape[1])  # a flatten keeps the elements of a channel together
            behind = add_constant(graph, f"{label}_{op.lower()}", of_column.astype(np.float32).reshape(1, -1, *[1] * (len(after) - 2)))
            moved.append(new_node(op, [moved[-1].outputs[0], behind], {}, f"{label}_{op.lower()}", after))
        replace(graph, [relu, node, *between], moved)
        return True


def _crossed(node: ir.Node) -> list[ir.Node]:
    """The max pools and flattens that alone read the result of `node`, one behind the other."""
    steps: list[ir.Node] = []
    while (reader := only_reader((steps or [node])[-1].outputs[0])) is not None and (_is_max_pool(reader) or _is_flatten(reader)):
        steps.append(reader)
    return steps


def _is_max_pool(node: ir.Node) -> bool:
    return node.op_type == "MaxPool" and len(node.outputs) == 1


def _is_flatten(node: ir.Node) -> bool:
    before, after = static_shape(node.inputs[0]), static_shape(node.outputs[0])
    return node.op_type in ("Flatten", "Reshape") and before is not None and len(before) > 1 and after == (before[0], math.prod(before[1:]))
