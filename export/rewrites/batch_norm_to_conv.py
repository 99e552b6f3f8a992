# SPDX-License-Identifier: Apache-2.0
"""A BatchNormalization that no layer before or behind it can take (`affine_into_layer` and `scale_into_weights` come first): a depthwise 1x1 Conv."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from isthmus.export.rewrites._edit import NodeRewrite, add_constant, affine, label_of, new_node, replace, static_shape


class BatchNormToConv(NodeRewrite):
    def rewrite(self, graph: ir.Graph, node: ir.Node) -> bool:
        found = affine(node) if node.op_type == "BatchNormalization" else None
        shape = static_shape(node.inputs[0]) if found is not None else None
        if found is None or shape is None or len(shape) not in (3, 4):
            return False
        source, factor, shift = found
        channels, rank, label = shape[1], len(shape) - 2, label_of(node)
        inputs = [
            source,
            add_constant(graph, f"{label}_weight", factor.astype(np.float32).reshape(channels, *[1] * (rank + 1))),
            add_constant(graph, f"{label}_bias", np.asarray(shift, np.float32)),
        ]
        attributes = {"kernel_shape": [1] * rank, "strides": [1] * rank, "dilations": [1] * rank, "pads": [0] * (2 * rank), "group": channels}
        replace(graph, [node], [new_node("Conv", inputs, attributes, node.name)])
        return True
