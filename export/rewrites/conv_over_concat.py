# SPDX-License-Identifier: Apache-2.0
"""A Conv over a Concat of channels is the sum of a Conv over each part: no wide tensor, no common scale for parts of different range.

`MergeSplitConvs` is the way back, for targets that have no wide accumulator to sum in.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import onnx_ir as ir

from isthmus.export.rewrites._edit import NodeRewrite, add_constant, attributes_of, constant, input_at, label_of, new_node, only_reader, replace, static_shape


class SplitConvOverConcat(NodeRewrite):
    def rewrite(self, graph: ir.Graph, node: ir.Node) -> bool:
        weight = constant(input_at(node, 1)) if node.op_type == "Conv" else None
        concat = node.inputs[0].producer() if weight is not None and node.inputs[0] is not None else None
        if weight is None or concat is None or concat.op_type != "Concat" or attributes_of(node).get("group", 1) != 1:
            return False
        shapes, after = [static_shape(value) for value in concat.inputs], static_shape(node.outputs[0])
        if only_reader(concat.outputs[0]) is not node or attributes_of(concat)["axis"] % weight.ndim != 1 or None in shapes or len(shapes) < 2 or after is None:
            return False
        label, given = label_of(node), attributes_of(node)
        borders = np.cumsum([0, *(shape[1] for shape in shapes if shape is not None)])
        new: list[ir.Node] = []
        for index, (value, (begin, end)) in enumerate(zip(concat.inputs, pairwise(borders), strict=True)):
            part = add_constant(graph, f"{label}_weight_{index}", np.array(weight[:, begin:end], order="C"))
            bias = [] if index else node.inputs[2:]  # once
            new.append(new_node("Conv", [value, part, *bias], given, f"{label}_{index}", after))
        total = new[0]
        for index, conv in enumerate(new[1:], 1):
            total = new_node("Add", [total.outputs[0], conv.outputs[0]], {}, f"{label}_sum_{index}", after)
            new.append(total)
        replace(graph, [concat, node], new)
        return True


class MergeSplitConvs(NodeRewrite):
    def rewrite(self, graph: ir.Graph, node: ir.Node) -> bool:
        if node.op_type != "Add":
            return False
        convs = [None if value is None else value.producer() for value in node.inputs]
        first, second = convs
        if first is None or second is None or first is second or not _mergeable(first, second):
            return False
        if any(only_reader(conv.outputs[0]) is not node for conv in (first, second)):
            return False
        weights = [np.asarray(constant(conv.inputs[1])) for conv in (first, second)]
        biases = [bias for conv in (first, second) if (bias := constant(input_at(conv, 2))) is not None]
        shapes = [static_shape(conv.inputs[0]) or () for conv in (first, second)]
        label = label_of(node)
        joined = (shapes[0][0], shapes[0][1] + shapes[1][1], *shapes[0][2:])
        concat = new_node("Concat", [first.inputs[0], second.inputs[0]], {"axis": 1}, f"{label}_joined", joined)
        inputs = [concat.outputs[0], add_constant(graph, f"{label}_weight", np.concatenate(weights, axis=1))]
        if biases:
            inputs.append(add_constant(graph, f"{label}_bias", np.sum(np.asarray(biases, np.float64), axis=0).astype(np.float32)))
        replace(graph, [first, second, node], [concat, new_node("Conv", inputs, attributes_of(first), first.name)])
        return True


def _mergeable(first: ir.Node, second: ir.Node) -> bool:
    """Equal Convs over tensors of equal extent: the same windows, the same filters, each of one group."""
    given = attributes_of(first)
    if first.op_type != "Conv" or second.op_type != "Conv" or given != attributes_of(second) or given.get("group", 1) != 1:
        return False
    shapes = [static_shape(conv.inputs[0]) for conv in (first, second)]
    weights = [constant(input_at(conv, 1)) for conv in (first, second)]
    constant_biases = all(input_at(conv, 2) is None or constant(input_at(conv, 2)) is not None for conv in (first, second))
    if not constant_biases or any(shape is None for shape in shapes) or any(weight is None for weight in weights):
        return False
    (a, b), (v, w) = shapes, weights
    same_space = a is not None and b is not None and a[:1] + a[2:] == b[:1] + b[2:]
    return bool(same_space and v is not None and w is not None and v.shape[0] == w.shape[0] and v.shape[2:] == w.shape[2:])
