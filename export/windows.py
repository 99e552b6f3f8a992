# SPDX-License-Identifier: Apache-2.0
"""Pools of which a window would see padding alone."""

from __future__ import annotations

import onnx
from onnx import helper

from isthmus.errors import Problem, ProblemsError
from isthmus.export.accept import node_label


def require_windows(model: onnx.ModelProto) -> None:
    """Raises `ProblemsError` naming each pool whose last window, which ceil_mode adds, starts behind the input.

    ONNX's shape inference counts that window and engines do not agree on its value; PyTorch leaves it out. `model` has shapes.
    """
    shapes = {value.name: _extents(value) for value in (*model.graph.input, *model.graph.value_info, *model.graph.output)}
    problems = []
    for node in model.graph.node:
        given = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        before, after = shapes.get(node.input[0] if node.input else "", []), shapes.get(node.output[0] if node.output else "", [])
        if node.op_type not in ("MaxPool", "AveragePool", "LpPool") or not given.get("ceil_mode") or len(before) != len(after):
            continue
        rank = len(before) - 2
        strides, pads = given.get("strides", [1] * rank), given.get("pads", [0] * (2 * rank))
        for axis in range(rank):
            start = (after[axis + 2] - 1) * strides[axis]
            if before[axis + 2] and start >= before[axis + 2] + pads[axis]:
                found = f"with ceil_mode its window {after[axis + 2]} along axis {axis + 2} starts {start - pads[axis]} into an input of {before[axis + 2]}"
                fix = "leave ceil_mode out, pad less, or choose an input size that the strides divide"
                problems.append(Problem(node_label(node), "pool-window", f"{found}: it would see padding alone", fix))
    if problems:
        raise ProblemsError("the ONNX model cannot be taken", problems)


def _extents(value: onnx.ValueInfoProto) -> list[int]:
    return [dim.dim_value for dim in value.type.tensor_type.shape.dim]
