# SPDX-License-Identifier: Apache-2.0
"""A constant factor or shift in front of linear layers (x / 255, x - mean) goes into their weights, so that the border can be int8.

A factor passes padding, as zero stays zero. A shift does not: it is folded only where no reader pads.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from isthmus.export.rewrites._edit import NodeRewrite, add_constant, affine, attributes_of, constant, input_at, new_node, replace, static_shape

LINEAR = ("Conv", "Gemm", "MatMul")


class ScaleIntoWeights(NodeRewrite):
    def rewrite(self, graph: ir.Graph, node: ir.Node) -> bool:
        found = affine(node)
        if found is None:
            return False
        source, factor, shift = found
        result = node.outputs[0]
        readers = [use.node for use in result.uses()]
        if result.is_graph_output() or not readers or not all(can_take(reader, result, shift is not None) for reader in readers):
            return False
        for reader in readers:
            _fold(graph, reader, source, factor, shift)
        graph.remove(node, safe=True)
        return True


def can_take(reader: ir.Node, value: ir.Value, shifts: bool) -> bool:
    """Whether a factor of `value`, and with `shifts` a shift, can go into the constant weights of `reader`."""
    if reader.op_type not in LINEAR or reader.inputs[0] is not value or constant(input_at(reader, 1)) is None:
        return False
    if any(position > 0 and held is value for position, held in enumerate(reader.inputs)):
        return False
    bias = input_at(reader, 2)
    given = attributes_of(reader)
    if reader.op_type == "Conv":
        padded = any(given.get("pads", [])) or given.get("auto_pad", "NOTSET") != "NOTSET"
        return not shifts or (not padded and (bias is None or constant(bias) is not None))
    rank = len(static_shape(value) or ())
    if reader.op_type == "MatMul":
        return rank == 2 and not shifts
    return bool(given.get("transB") == 1 and not given.get("transA") and given.get("alpha", 1.0) == 1.0 and given.get("beta", 1.0) == 1.0) and (
        not shifts or bias is None or constant(bias) is not None
    )


def _fold(graph: ir.Graph, reader: ir.Node, source: ir.Value, factor: np.ndarray, shift: np.ndarray | None) -> None:
    weight = np.asarray(constant(reader.inputs[1]), np.float64)
    label = reader.name or reader.outputs[0].name
    if reader.op_type == "Conv":
        group = attributes_of(reader).get("group", 1)
        per_filter = np.repeat(factor.reshape(group, -1), weight.shape[0] // group, axis=0)  # the channels each filter sees
        scaled = weight * per_filter.reshape(weight.shape[0], weight.shape[1], *[1] * (weight.ndim - 2))
        seen = None if shift is None else np.repeat(shift.reshape(group, -1), weight.shape[0] // group, axis=0)
        moved = None if seen is None else (weight.sum(axis=tuple(range(2, weight.ndim))) * seen).sum(axis=1)
    elif reader.op_type == "Gemm":
        scaled, moved = weight * factor, None if shift is None else weight @ shift
    else:
        scaled, moved = weight * factor[:, None], None
    inputs = [source, add_constant(graph, f"{label}_weight", scaled.astype(np.float32)), *reader.inputs[2:]]
    if moved is not None:
        held = constant(input_at(reader, 2))
        bias = (moved if held is None else held.astype(np.float64) + moved).astype(np.float32)
        inputs = [*inputs[:2], add_constant(graph, f"{label}_bias", bias)]
    replace(graph, [reader], [new_node(reader.op_type, inputs, attributes_of(reader), reader.name)])
