# SPDX-License-Identifier: Apache-2.0
"""A BatchNormalization that no layer in front can take (ONNX Runtime folded the others): a depthwise 1x1 Conv, an int8 operator."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from isthmus.export.rewrites._edit import NodeRewrite, add_constant, attributes_of, constant, new_node, replace, static_shape


class BatchNormToConv(NodeRewrite):
    def rewrite(self, graph: ir.Graph, node: ir.Node) -> bool:
        shape = static_shape(node.inputs[0]) if node.inputs else None
        given = attributes_of(node)
        if node.op_type != "BatchNormalization" or shape is None or len(shape) not in (3, 4) or given.get("training_mode", 0):
            return False
        parameters = [constant(value) for value in node.inputs[1:5]]
        if len(parameters) != 4 or any(array is None for array in parameters) or any(output.uses() for output in node.outputs[1:]):
            return False
        gamma, beta, mean, variance = (np.asarray(array, np.float64) for array in parameters)
        factor = gamma / np.sqrt(variance + given.get("epsilon", 1e-5))
        channels, rank = shape[1], len(shape) - 2
        label = node.name or node.outputs[0].name
        inputs = [
            node.inputs[0],
            add_constant(graph, f"{label}_weight", factor.astype(np.float32).reshape(channels, *[1] * (rank + 1))),
            add_constant(graph, f"{label}_bias", (beta - mean * factor).astype(np.float32)),
        ]
        attributes = {"kernel_shape": [1] * rank, "strides": [1] * rank, "dilations": [1] * rank, "pads": [0] * (2 * rank), "group": channels}
        replace(graph, [node], [new_node("Conv", inputs, attributes, node.name)])
        return True
