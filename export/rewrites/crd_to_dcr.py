# SPDX-License-Identifier: Apache-2.0
"""DepthToSpace of mode CRD (PyTorch's PixelShuffle) as DCR, the only one TFLite has: the Conv in front writes its channels in the other order.

Channel (i * r + j) * C + c then holds what was c * r * r + i * r + j. With one output channel the two modes are the same.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from isthmus.export.rewrites._edit import NodeRewrite, add_constant, attributes_of, constant, input_at, label_of, new_node, only_reader, replace, static_shape

# One value in, one value out, the same in every channel.
ELEMENTWISE = ("Relu", "LeakyRelu", "Clip", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "Elu", "Gelu", "Mish", "Softplus", "Identity")


class DepthToSpaceAsDcr(NodeRewrite):
    def rewrite(self, graph: ir.Graph, node: ir.Node) -> bool:
        shape = static_shape(node.inputs[0]) if node.op_type == "DepthToSpace" else None
        if shape is None or attributes_of(node).get("mode", "DCR") != "CRD":
            return False
        block = attributes_of(node)["blocksize"]
        channels = shape[1] // block**2
        if channels > 1 and not _permute(graph, node, dcr_order(channels, block)):
            return False
        node.attributes["mode"] = ir.AttrString("mode", "DCR")
        return True


def dcr_order(channels: int, block: int) -> np.ndarray:
    """For each channel that DCR reads, the channel of the CRD layout that it must hold."""
    return np.arange(channels * block**2).reshape(channels, block**2).T.reshape(-1)


def _permute(graph: ir.Graph, node: ir.Node, order: np.ndarray) -> bool:
    """Reorders the channels that `node` reads, in the Conv that made them; False where there is none or others see its order."""
    value, reader = node.inputs[0], node
    while value is not None and only_reader(value) is reader and (producer := value.producer()) is not None:
        if producer.op_type in ELEMENTWISE:
            value, reader = producer.inputs[0], producer
            continue
        weight, bias = constant(input_at(producer, 1)), constant(input_at(producer, 2))
        plain = producer.op_type == "Conv" and attributes_of(producer).get("group", 1) == 1
        if not plain or weight is None or (bias is None and input_at(producer, 2) is not None):
            return False
        inputs = [producer.inputs[0], add_constant(graph, f"{label_of(producer)}_weight", np.array(weight[order], order="C"))]
        if bias is not None:
            inputs.append(add_constant(graph, f"{label_of(producer)}_bias", bias[order]))
        replace(graph, [producer], [new_node("Conv", inputs, attributes_of(producer), producer.name)])
        return True
    return False
