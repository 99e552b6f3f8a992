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


def new_node(op: str, inputs: Sequence[ir.Value | None], attributes: Mapping[str, Any], name: str | None) -> ir.Node:
    return ir.node(op, list(inputs), dict(attributes), name=name)


def replace(graph: ir.Graph, old: Sequence[ir.Node], new: Sequence[ir.Node]) -> None:
    """`new` takes the place of `old`; the result of the last new node takes name, shape and readers of the last old one's."""
    ir.convenience.replace_nodes_and_values(graph, old[-1], old, new, [old[-1].outputs[0]], [new[-1].outputs[0]])
