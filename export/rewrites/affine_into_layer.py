# SPDX-License-Identifier: Apache-2.0
"""A constant factor or shift behind a Conv, ConvTranspose or Gemm (also written as BatchNormalization) goes into its weights and bias.

ONNX Runtime does it for Conv and most of the time, and for a BatchNormalization behind a ConvTranspose; not behind a Gemm with a bias.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from isthmus.export.rewrites._edit import NodeRewrite, add_constant, affine, attributes_of, constant, input_at, new_node, only_reader, replace
from isthmus.export.rewrites.linear_as_gemm import NORMAL


class AffineIntoLayer(NodeRewrite):
    def rewrite(self, graph: ir.Graph, node: ir.Node) -> bool:
        weight, bias = constant(input_at(node, 1)), constant(input_at(node, 2))
        reader = only_reader(node.outputs[0]) if takes_affine(node) else None
        found = affine(reader) if reader is not None else None
        if weight is None or reader is None or found is None or found[0] is not node.outputs[0]:
            return False
        _, factor, shift = found
        scaled = weight.astype(np.float64) * _per_weight(node, weight, factor)
        moved = (0.0 if bias is None else bias.astype(np.float64) * factor) + (0.0 if shift is None else shift)
        label = node.name or node.outputs[0].name
        inputs = [node.inputs[0], add_constant(graph, f"{label}_weight", scaled.astype(np.float32))]
        if bias is not None or shift is not None:
            inputs.append(add_constant(graph, f"{label}_bias", np.asarray(moved, np.float32)))
        replace(graph, [node, reader], [new_node(node.op_type, inputs, attributes_of(node), node.name)])
        return True


def takes_affine(node: ir.Node) -> bool:
    """Whether `node` is a layer whose weights, and bias if it has one, are constants."""
    plain = node.op_type in ("Conv", "ConvTranspose") or (node.op_type == "Gemm" and attributes_of(node) == NORMAL)
    held = [value for value in (input_at(node, 1), input_at(node, 2)) if value is not None]
    return plain and bool(held) and all(constant(value) is not None for value in held)


def _per_weight(node: ir.Node, weight: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """The factor of each output channel in a shape that broadcasts over the weight: [out, ...], of a ConvTranspose [in, out / group, ...]."""
    if node.op_type != "ConvTranspose":
        return factor.reshape(-1, *[1] * (weight.ndim - 1))
    group = attributes_of(node).get("group", 1)
    rows = np.repeat(factor.reshape(group, -1), weight.shape[0] // group, axis=0)
    return rows.reshape(weight.shape[0], weight.shape[1], *[1] * (weight.ndim - 2))
