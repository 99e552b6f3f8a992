# SPDX-License-Identifier: Apache-2.0
"""What the reader of the form takes out of single ONNX nodes and values."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir


def name_of(value: ir.Value | None) -> str:
    return value.name or "" if value is not None else ""


def label_of(node: ir.Node) -> str:
    return node.name or f"{node.op_type}_{name_of(node.outputs[0])}"


def constant_of(value: ir.Value | None) -> np.ndarray | None:
    """The array of an initialiser (one that is not also a graph input), else None."""
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    return value.const_value.numpy()


def short(array: np.ndarray | None) -> str:
    if array is None:
        return "no constant"
    return str(array.reshape(-1)[0]) if array.size == 1 else f"{array.dtype}{list(array.shape)}"


def is_power_of_two(step: float) -> bool:
    return step > 0 and math.isfinite(step) and math.frexp(step)[0] == 0.5


def given(node: ir.Node) -> dict[str, Any]:
    """The attributes the file has, as Python values."""
    return {name: python_value(attribute) for name, attribute in node.attributes.items()}


def python_value(attribute: ir.Attr) -> Any:
    value = attribute.value
    if isinstance(value, tuple | list):
        return list(value)
    return value


def bounds_of(node: ir.Node) -> tuple[float, float] | None:
    """Real bounds of a Relu or Clip; None where they are no constants or in the wrong order."""
    if node.op_type == "Relu":
        return (0.0, math.inf)
    bounds = [-math.inf, math.inf]
    for position in (1, 2):
        value = node.inputs[position] if len(node.inputs) > position else None
        if value is not None:
            array = constant_of(value)
            if array is None or array.size != 1 or np.isnan(array).any():
                return None
            bounds[position - 1] = float(array.reshape(-1)[0])
    return (bounds[0], bounds[1]) if bounds[0] <= bounds[1] else None
