# SPDX-License-Identifier: Apache-2.0
"""Attention over one token. Softmax over one element is 1, so the product with the values is the values: no query, no key.

Where a linear layer makes the values and one reads the result, with nothing but moved elements between them, the two become one Gemm.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from isthmus.export.rewrites._edit import NodeRewrite, add_constant, attributes_of, constant, input_at, label_of, new_node, only_reader, replace, static_shape
from isthmus.export.rewrites.linear_as_gemm import NORMAL

RESHAPES = ("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity")


class Linear(NamedTuple):
    """x [..., in] times weight [in, out] plus bias [out], whose result is `result`."""

    x: ir.Value
    weight: np.ndarray
    bias: np.ndarray
    result: ir.Value


class SingleTokenAttention(NodeRewrite):
    def rewrite(self, graph: ir.Graph, node: ir.Node) -> bool:
        if node.op_type != "MatMul" or not _is_softmax_of_one(node.inputs[0]):
            return False
        values, shape = node.inputs[1], static_shape(node.outputs[0])
        if values is None or shape is None or static_shape(values) != shape:
            return False  # several queries would each get the one value: a broadcast, no identity
        if not _one_layer(graph, node, values):
            written = add_constant(graph, f"{label_of(node)}_shape", np.array(shape, np.int64))
            replace(graph, [node], [new_node("Reshape", [values, written], {}, node.name)])
        return True


def _is_softmax_of_one(value: ir.Value | None) -> bool:
    node, shape = (None, None) if value is None else (value.producer(), static_shape(value))
    if node is None or node.op_type != "Softmax" or not shape:
        return False
    return shape[-1] == 1 and attributes_of(node).get("axis", -1) % len(shape) == len(shape) - 1


def _one_layer(graph: ir.Graph, node: ir.Node, values: ir.Value) -> bool:
    path: list[tuple[ir.Node, ir.Value]] = []  # movements from the first layer to the second, each with the result that is taken on
    start: ir.Value | None = values
    while start is not None and (producer := start.producer()) is not None and _moves(producer):
        path.insert(0, (producer, start))
        start = producer.inputs[0]
    first = None if start is None else _linear_of(start)
    end, reader = node.outputs[0], only_reader(node.outputs[0])
    while reader is not None and reader.inputs[0] is end and _moves(reader) and len(reader.outputs) == 1:
        end = reader.outputs[0]
        path.append((reader, end))
        reader = only_reader(end)
    second = _linear_from(end, reader)
    if first is None or second is None:
        return False
    columns = _columns(first, second, path)
    shape = static_shape(second.result)
    if columns is None or shape is None:
        return False
    weight = first.weight[:, columns] @ second.weight
    bias = first.bias[columns] @ second.weight + second.bias
    last = second.result.producer()
    if last is None:
        return False
    label, rows = label_of(last), int(np.prod(shape[:-1]))
    flat = add_constant(graph, f"{label}_rows", np.array([rows, len(weight)], np.int64))
    whole = add_constant(graph, f"{label}_shape", np.array(shape, np.int64))
    inputs = new_node("Reshape", [first.x, flat], {}, f"{label}_tokens", (rows, len(weight)))
    written = add_constant(graph, f"{label}_weight", np.array(weight.T, np.float32, order="C"))
    added = add_constant(graph, f"{label}_bias", bias.astype(np.float32))
    gemm = new_node("Gemm", [inputs.outputs[0], written, added], NORMAL, last.name, (rows, shape[-1]))
    replace(graph, [last], [inputs, gemm, new_node("Reshape", [gemm.outputs[0], whole], {}, f"{label}_shaped")])
    return True


def _columns(first: Linear, second: Linear, path: list[tuple[ir.Node, ir.Value]]) -> np.ndarray | None:
    """Which results of the first layer are the inputs of the second, in order; None unless it is the same ones in every row.

    Every element gets a number and is moved as the graph moves it.
    """
    shape, width = static_shape(first.result), len(second.weight)
    if shape is None:
        return None
    numbers = np.arange(int(np.prod(shape))).reshape(shape)
    for node, result in path:
        moved = _moved(node, result, numbers)
        if moved is None:
            return None
        numbers = moved
    rows = numbers.reshape(-1, width)
    columns = rows[0]
    if len(rows) != int(np.prod(shape[:-1])) or (columns >= shape[-1]).any() or (rows != columns + shape[-1] * np.arange(len(rows))[:, None]).any():
        return None
    return columns


def _moves(node: ir.Node) -> bool:
    return node.op_type in (*RESHAPES, "Transpose", "Gather", "Split")


def _moved(node: ir.Node, result: ir.Value, numbers: np.ndarray) -> np.ndarray | None:
    """What the node makes of `numbers` at its output `result`; None where that is not known from constants."""
    given, shape = attributes_of(node), static_shape(result)
    if node.op_type in RESHAPES:
        return None if shape is None else numbers.reshape(shape)
    if node.op_type == "Transpose":
        return numbers.transpose(given.get("perm"))
    if node.op_type == "Gather":
        picked = constant(node.inputs[1])
        return None if picked is None else np.take(numbers, picked, axis=given.get("axis", 0))
    axis, extents = given.get("axis", 0), [static_shape(output) for output in node.outputs]
    begin = 0
    for output, extent in zip(node.outputs, extents, strict=True):
        if extent is None:
            return None
        if output is result:
            return np.take(numbers, np.arange(begin, begin + extent[axis]), axis=axis)
        begin += extent[axis]
    return None


def _linear_of(result: ir.Value) -> Linear | None:
    """The linear layer that writes `result`."""
    node = result.producer()
    if node is None:
        return None
    if node.op_type == "Add":
        for position in (0, 1):
            addend, product = constant(node.inputs[position]), node.inputs[1 - position]
            inner = None if addend is None or product is None else _linear_of(product)
            if addend is not None and inner is not None and static_shape(product) == static_shape(result) and addend.shape[-1:] == (addend.size,):
                return inner._replace(bias=inner.bias + addend.reshape(-1).astype(np.float64), result=result)
        return None
    weight, addend = constant(input_at(node, 1)), constant(input_at(node, 2))
    if weight is None or weight.ndim != 2 or node.inputs[0] is None or constant(node.inputs[0]) is not None:
        return None
    if node.op_type == "MatMul":
        return Linear(node.inputs[0], weight.astype(np.float64), np.zeros(weight.shape[1]), result)
    if node.op_type != "Gemm" or attributes_of(node) != NORMAL or (addend is None and input_at(node, 2) is not None):
        return None
    bias = np.zeros(len(weight)) if addend is None else addend.astype(np.float64)
    return None if bias.shape != (len(weight),) else Linear(node.inputs[0], weight.T.astype(np.float64), bias, result)


def _linear_from(value: ir.Value, reader: ir.Node | None) -> Linear | None:
    """The linear layer that `reader`, the only one, makes of `value`, its bias Add with it."""
    found = None if reader is None or reader.op_type == "Add" else _linear_of(reader.outputs[0])
    if found is None or found.x is not value:
        return None
    behind = only_reader(found.result)
    with_bias = _linear_of(behind.outputs[0]) if behind is not None and behind.op_type == "Add" else None
    return with_bias if with_bias is not None and with_bias.x is value else found
