# SPDX-License-Identifier: Apache-2.0
"""What values a tensor can hold, as far as the graph alone tells."""

from __future__ import annotations

import numpy as np

from isthmus.graph import QuantGraph, QuantNode
from isthmus.kernels import conv_like_weight
from isthmus.targets.tflite.rounding import INT8_MIN, scale_and_zero

PASSES_ON = frozenset({
    "MaxPool", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Concat", "Split", "Slice", "Transpose", "Expand", "DepthToSpace", "SpaceToDepth", "Gather",
    "ResizeNearest",
})  # fmt: skip


def lower_bound(graph: QuantGraph, name: str) -> int:
    """No value of the int8 tensor lies below."""
    node = graph.producer(name)
    if node is None or node.kind != "int8":
        return INT8_MIN
    if node.op in PASSES_ON:
        return min(lower_bound(graph, source) for source in node.inputs)
    if node.op in ("AveragePool", "GlobalAveragePool"):
        (_, source), (_, target) = scale_and_zero(graph, node.inputs[0]), scale_and_zero(graph, node.output)
        return target if lower_bound(graph, node.inputs[0]) >= source else INT8_MIN
    return node.clamp[0]


def pairs_overflow(graph: QuantGraph, node: QuantNode) -> int:
    """How many weights of -128 stand in one output channel, where that is two or more and the input can be -128 too; else 0.

    XNNPACK's ARM kernels without dot product add two int8 products in int16: 2 * (-128 * -128) wraps round. TensorFlow Lite's own
    quantiser never makes -128; every other pair of products fits.
    """
    if node.weight is None or lower_bound(graph, node.inputs[0]) > INT8_MIN:
        return 0
    weight = conv_like_weight(node.weight, int(node.attributes["group"])) if node.op == "ConvTranspose" else node.weight
    axis = 1 if node.op == "MatMul" else 0
    lowest = (weight == INT8_MIN).sum(axis=tuple(other for other in range(weight.ndim) if other != axis))
    return int(np.max(lowest, initial=0)) if np.max(lowest, initial=0) > 1 else 0
