# SPDX-License-Identifier: Apache-2.0
"""What the rewrites share: reading constants, replacing one node by a few."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir


class NodeRewrite(ir.passes.InPlacePass):
    """A pass that offers every node, in order, to `rewrite`; a subclass fills that. The function of the model stays."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if node.graph is model.graph and self.rewrite(model.graph, node):
                modified = True
        return ir.passes.PassResult(model, modified)

    def rewrite(self, graph: ir.Graph, node: ir.Node) -> bool:
        """Changes the graph around `node` and says whether it did."""
        raise NotImplementedError


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The array behind a value that is a constant, else None."""
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    return value.const_value.numpy()


def input_at(node: ir.Node, position: int) -> ir.Value | None:
    return node.inputs[position] if len(node.inputs) > position else None


def static_shape(value: ir.Value | None) -> tuple[int, ...] | None:
    if value is None or value.shape is None or not all(isinstance(extent, int) for extent in value.shape):
        return None
    return tuple(int(extent) for extent in value.shape)  # type: ignore[arg-type]  # every extent is an int, just checked


def only_reader(value: ir.Value) -> ir.Node | None:
    """The one node that reads `value`, once; None where others do or where it is a graph output."""
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def attributes_of(node: ir.Node) -> dict[str, Any]:
    """Attributes as plain Python values."""
    return {name: list(attribute.value) if isinstance(attribute.value, tuple | list) else attribute.value for name, attribute in node.attributes.items()}


def add_constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """A new initialiser under `name`, or `name` with a number where that is taken."""
    taken = set(graph.initializers) | {value.name for value in graph.inputs}
    fresh, count = name, 1
    while fresh in taken:
        count += 1
        fresh = f"{name}_{count}"
    value = ir.val(fresh, dtype=ir.DataType.from_numpy(array.dtype), shape=ir.Shape(array.shape), const_value=ir.tensor(array, name=fresh))
    graph.register_initializer(value)
    return value


def new_node(op: str, inputs: Sequence[ir.Value | None], attributes: Mapping[str, Any], name: str | None, shape: Sequence[int] | None = None) -> ir.Node:
    """A node not yet in a graph. `shape`, of a float32 result, is for a result that no old value hands its own shape to (see `replace`)."""
    node = ir.node(op, list(inputs), dict(attributes), name=name)
    if shape is not None:
        node.outputs[0].shape = ir.Shape(shape)
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    return node


def label_of(node: ir.Node) -> str:
    """What the constants made for a node are named after."""
    return node.name or node.outputs[0].name or node.op_type


def replace(graph: ir.Graph, old: Sequence[ir.Node], new: Sequence[ir.Node]) -> None:
    """`new` takes the place of `old`; the result of the last new node takes name, shape and readers of the last old one's."""
    ir.convenience.replace_nodes_and_values(graph, old[-1], old, new, [old[-1].outputs[0]], [new[-1].outputs[0]])


def affine(node: ir.Node) -> tuple[ir.Value, np.ndarray, np.ndarray | None] | None:
    """(x, factor [C], shift [C] or None) where the node computes x * factor + shift with constants along axis 1; else None.

    A BatchNormalization outside training is one too.
    """
    if node.op_type == "BatchNormalization":
        return _normalisation(node)
    if node.op_type not in ("Mul", "Div", "Add", "Sub") or len(node.inputs) != 2:
        return None
    position = 1 if constant(node.inputs[1]) is not None else 0
    held, source = constant(node.inputs[position]), node.inputs[1 - position]
    shape = static_shape(source)
    if held is None or source is None or constant(source) is not None or shape is None or len(shape) < 2 or static_shape(node.outputs[0]) != shape:
        return None
    values = _along_channels(held, shape)
    if values is None or (position == 0 and node.op_type == "Div"):
        return None
    one = np.ones_like(values)
    if node.op_type == "Mul":
        return source, values, None
    if node.op_type == "Div":
        return (source, 1.0 / values, None) if values.all() else None
    if node.op_type == "Add":
        return source, one, values
    return (source, one, -values) if position == 1 else (source, -one, values)


def _normalisation(node: ir.Node) -> tuple[ir.Value, np.ndarray, np.ndarray] | None:
    given, shape = attributes_of(node), static_shape(node.inputs[0])
    parameters = [constant(value) for value in node.inputs[1:5]]
    if shape is None or len(shape) < 2 or given.get("training_mode", 0) or any(output.uses() for output in node.outputs[1:]):
        return None
    if len(parameters) != 4 or any(array is None for array in parameters):
        return None
    gamma, beta, mean, variance = (np.asarray(array, np.float64) for array in parameters)
    factor = gamma / np.sqrt(variance + given.get("epsilon", 1e-5))
    return node.inputs[0], factor, beta - mean * factor  # type: ignore[return-value]  # the input of a BatchNormalization is not optional


def _along_channels(held: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    """A constant that differs along axis 1 only, as float64 [C]; None where it differs elsewhere."""
    if held.ndim > len(shape):
        return None
    extents = (1,) * (len(shape) - held.ndim) + held.shape
    if any(extent != 1 for axis, extent in enumerate(extents) if axis != 1):
        return None
    return np.array(np.broadcast_to(held.astype(np.float64).reshape(-1), (shape[1],)))
