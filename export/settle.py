# SPDX-License-Identifier: Apache-2.0
"""The last step before quantisers are placed: what the form reads as one operator becomes one node, and every constant operand stands for itself.

Changes no value but for the last bit of a division. What it writes is a `Draft`'s graph, no longer ONNX: `emit` spells it out where it stays float.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import numpy as np
import onnx_ir as ir

from isthmus.export.draft import SILU
from isthmus.export.rewrites._edit import NodeRewrite, add_constant, constant, input_at, label_of, new_node, only_reader, replace, static_shape
from isthmus.ops import TAKE_CONSTANTS

KEEP_BATCH = frozenset({"Concat", "MatMul"})  # whose operands must all have the batch: they do not broadcast along the first axis


def settle(model: ir.Model, held: MutableMapping[str, Any] | None = None) -> None:
    """In place. `held` knows the integers behind constants by name (`Held`); a constant that gets a new name keeps them."""
    for rewrite in (_FoldSilu(), _FoldBias(), _DivisionAsProduct(exactly=held is not None), _OwnOperands({} if held is None else held)):
        rewrite(model)


class _FoldSilu(NodeRewrite):
    def rewrite(self, graph: ir.Graph, node: ir.Node) -> bool:
        """x * Sigmoid(x) with nothing between: one table."""
        gate = only_reader(node.outputs[0]) if node.op_type == "Sigmoid" else None
        if gate is None or gate.op_type != "Mul" or not any(value is node.inputs[0] for value in gate.inputs):
            return False
        replace(graph, [node, gate], [new_node(SILU, [node.inputs[0]], {}, gate.name)])
        return True


class _FoldBias(NodeRewrite):
    def rewrite(self, graph: ir.Graph, node: ir.Node) -> bool:
        """MatMul by a weight and Add of one constant a column: the layer with its bias."""
        weight = constant(input_at(node, 1)) if node.op_type == "MatMul" and len(node.inputs) == 2 else None
        add = only_reader(node.outputs[0]) if weight is not None and weight.ndim == 2 else None
        if add is None or weight is None or add.op_type != "Add" or static_shape(add.outputs[0]) != static_shape(node.outputs[0]):
            return False
        bias = next((value for value in add.inputs if constant(value) is not None), None)
        if bias is None or not _is_bias(np.asarray(constant(bias)), weight.shape[1]):
            return False
        if (static_shape(bias) or ()) != (weight.shape[1],):
            bias = add_constant(graph, f"{label_of(node)}_bias", np.array(np.broadcast_to(np.asarray(constant(bias)).reshape(-1), weight.shape[1:])))
        replace(graph, [node, add], [new_node("MatMul", [*node.inputs, bias], {}, node.name)])
        return True


def _is_bias(addend: np.ndarray, filters: int) -> bool:
    return addend.size in (1, filters) and (addend.ndim == 0 or addend.size == addend.shape[-1])


class _DivisionAsProduct(NodeRewrite):
    """Division by a constant, and Neg, as a Mul, which the form has: to the last bit for powers of two, and for others unless `exactly`."""

    def __init__(self, *, exactly: bool) -> None:
        super().__init__()
        self.exactly = exactly

    def rewrite(self, graph: ir.Graph, node: ir.Node) -> bool:
        if node.op_type not in ("Div", "Neg") or node.inputs[0] is None or node.inputs[0].dtype != ir.DataType.FLOAT or constant(node.inputs[0]) is not None:
            return False
        divisor = constant(input_at(node, 1)) if node.op_type == "Div" else np.array([-1.0], np.float32)
        if divisor is None or not np.isfinite(divisor).all() or not (np.abs(divisor) > np.finfo(np.float32).tiny).all():
            return False
        if self.exactly and not (np.abs(np.frexp(divisor)[0]) == 0.5).all():
            return False
        factor = add_constant(graph, f"{label_of(node)}_factor", np.asarray(np.float32(1.0) / divisor, np.float32))
        replace(graph, [node], [new_node("Mul", [node.inputs[0], factor], {}, node.name)])
        return True


class _OwnOperands(NodeRewrite):
    """Each constant operand of an operator that may be int8 becomes a constant of its own, with all axes of the result."""

    def __init__(self, held: MutableMapping[str, Any]) -> None:
        super().__init__()
        self.held = held

    def rewrite(self, graph: ir.Graph, node: ir.Node) -> bool:
        result = static_shape(node.outputs[0]) if node.op_type in TAKE_CONSTANTS else None
        if not result or all(constant(value) is not None for value in node.inputs):
            return False
        changed = False
        for position, value in enumerate(node.inputs):
            values = constant(value)
            weight = node.op_type == "MatMul" and (position > 1 or (position == 1 and values is not None and values.ndim == 2))
            if values is None or value is None or weight or values.ndim > len(result) or values.dtype != np.float32:
                continue
            shape = (1,) * (len(result) - values.ndim) + values.shape
            if node.op_type in KEEP_BATCH and shape[0] == 1:
                shape = (result[0], *shape[1:])
            if shape == values.shape and len(value.uses()) == 1:
                continue
            spread = np.broadcast_to(values.reshape((1,) * (len(result) - values.ndim) + values.shape), shape)
            own = add_constant(graph, f"{label_of(node)}.operand{position}", np.array(spread))
            kept = self.held.get(str(value.name))
            if kept is not None:
                self.held[str(own.name)] = kept
            node.replace_input_with(position, own)
            changed = True
        return changed
