# SPDX-License-Identifier: Apache-2.0
"""Element by element: sums, differences and products of two tensors, functions of one number as tables, clips and roundings."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from isthmus import tables
from isthmus.targets.hls4ml.fixed import Fixed, product_type, sum_type
from isthmus.targets.hls4ml.kernels import table_kernel
from isthmus.targets.hls4ml.lowering import Lowering

if TYPE_CHECKING:
    from isthmus.graph import QuantNode


def merge(low: Lowering, node: QuantNode, name: str) -> str:
    """Both operands in the result's shape, then hls4ml's Add, Sub or Mul in the type that holds every result exactly."""
    target = low.spec(node.output).shape
    values = []
    for position, tensor in enumerate(node.inputs):
        sources = np.broadcast_to(low.numbers(tensor), (1, *target[1:]))
        values.append(low.placed(node, position, sources, target, f"{name}_operand{position}"))
    exact = _exact(low, node)
    value = low.writer.node(node.op, values, name, low.shape(node.output))
    low.writer.layer(name, result=low.exact_or_final(node, exact))
    return low.finish(node, value, name, exact)


def _exact(low: Lowering, node: QuantNode) -> Fixed:
    scales = [low.scale(tensor) for tensor in node.inputs]
    return product_type(1, *scales) if node.op == "Mul" else sum_type(*scales)


def function(low: Lowering, node: QuantNode, name: str) -> str:
    entries = tables.table(node, low.graph.tensors)
    shape = low.shape(node.output)
    kernel = table_kernel(entries, int(np.prod(shape[1:])))
    return low.writer.kernel(kernel, [low.values[node.inputs[0]]], name, shape, low.type(node.output))


def relu(low: Lowering, node: QuantNode, name: str) -> str:
    value = low.relu(low.values[node.inputs[0]], f"{name}_relu", low.shape(node.output), low.type(node.output))
    return low.clamp(value, name, node)


def clip(low: Lowering, node: QuantNode, name: str) -> str:
    return relu(low, node, name) if node.clamp[0] == 0 else low.clamp(low.values[node.inputs[0]], name, node)


def requantise(low: Lowering, node: QuantNode, name: str) -> str:
    return low.finish(node, low.values[node.inputs[0]], name, low.type(node.inputs[0]))
