# SPDX-License-Identifier: Apache-2.0
"""`Draft`: a float graph without quantisers, and beside it everything that is int8. Both roads into the form end here; `emit` writes it.

The graph may hold one operator that is not ONNX: `REQUANTISE` (one int8 tensor in, the same values at another scale out).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from isthmus.export.rewrites._edit import attributes_of, constant, input_at, only_reader, static_shape
from isthmus.ops import OPS

REQUANTISE = "Requantize"


class Step(NamedTuple):
    """How an activation is quantised: real = (q - zero_point) * scale."""

    scale: float
    zero_point: int


@dataclass(frozen=True)
class Weight:
    """int8 values in the operator's own ONNX shape, and float32 scales, [1] or one an output channel."""

    values: np.ndarray
    scale: np.ndarray


@dataclass
class Draft:
    """`int8_nodes` names the nodes computed in int8, `fused` the Relu or Clip each takes with it, `steps` the quantisation of each
    value (by name) an int8 node reads or writes; `biases` are real numbers. Every other node is a float island.
    """

    model: ir.Model
    int8_nodes: set[str] = field(default_factory=set)
    fused: dict[str, ir.Node] = field(default_factory=dict)
    steps: dict[str, Step] = field(default_factory=dict)
    weights: dict[str, Weight] = field(default_factory=dict)
    biases: dict[str, np.ndarray] = field(default_factory=dict)


def is_weighted(node: ir.Node) -> bool:
    return node.op_type in _FITS and OPS[node.op_type].weight_axis is not None


def passes_scale(node: ir.Node) -> bool:
    return node.op_type in _FITS and OPS[node.op_type].passes_scale


def activations(node: ir.Node) -> list[ir.Value]:
    """The inputs that are no constants."""
    return [value for value in node.inputs if value is not None and constant(value) is None]


def bounds(node: ir.Node) -> tuple[float, float] | None:
    """Real bounds of a Relu or a Clip; None for another operator and for bounds that are no constants, NaN, or in the wrong order."""
    if node.op_type == "Relu":
        return 0.0, math.inf
    if node.op_type != "Clip":
        return None
    found = [-math.inf, math.inf]
    for position in (1, 2):
        value = input_at(node, position)
        if value is None:
            continue
        held = constant(value)
        if held is None or held.size != 1:
            return None
        found[position - 1] = float(held.reshape(-1)[0])
    return (found[0], found[1]) if found[0] <= found[1] else None


def follower(node: ir.Node) -> ir.Node | None:
    """The Relu or Clip that belongs to a node that fuses one: its only reader."""
    if node.op_type not in _FITS or not OPS[node.op_type].fuses:
        return None
    reader = only_reader(node.outputs[0])
    return reader if reader is not None and reader.inputs[0] is node.outputs[0] and bounds(reader) is not None else None


def fits_int8(node: ir.Node) -> bool:
    """Whether the int8 form has this operator with these attributes, shapes and constants."""
    if node.op_type == REQUANTISE:
        return True
    if node.op_type not in _FITS or node.domain not in ("", "ai.onnx") or len([value for value in node.outputs if value.uses() or value.is_graph_output()]) > 1:
        return False
    values = activations(node)
    shapes = [static_shape(value) for value in (*values, node.outputs[0])]
    if not values or any(shape is None for shape in shapes) or any(value.dtype != ir.DataType.FLOAT for value in (*values, node.outputs[0])):
        return False
    return _FITS[node.op_type](node, attributes_of(node), tuple(shapes[0] or ()))


def _weight_fits(node: ir.Node, ranks: tuple[int, ...]) -> bool:
    """One activation in front, a constant weight of that rank, a bias that is absent or a constant vector."""
    weight, bias = constant(input_at(node, 1)), input_at(node, 2)
    held = constant(bias)
    return len(activations(node)) == 1 and weight is not None and weight.ndim in ranks and (bias is None or (held is not None and held.ndim == 1))


def _conv(node: ir.Node, given: Mapping[str, object], shape: tuple[int, ...]) -> bool:
    return len(shape) in (3, 4) and _weight_fits(node, (len(shape),)) and given.get("auto_pad", "NOTSET") == "NOTSET" and "kernel_shape" in given


def _gemm(node: ir.Node, given: Mapping[str, object], shape: tuple[int, ...]) -> bool:
    normal = (given.get("transA", 0), given.get("transB", 0), given.get("alpha", 1.0), given.get("beta", 1.0)) == (0, 1, 1.0, 1.0)
    return normal and len(shape) == 2 and _weight_fits(node, (2,))


def _matmul(node: ir.Node, given: Mapping[str, object], shape: tuple[int, ...]) -> bool:
    return len(shape) >= 2 and _weight_fits(node, (2,))


def _no_constants(node: ir.Node, given: Mapping[str, object], shape: tuple[int, ...]) -> bool:
    return len(activations(node)) == len(node.inputs)


def _pool(node: ir.Node, given: Mapping[str, object], shape: tuple[int, ...]) -> bool:
    plain = given.get("auto_pad", "NOTSET") == "NOTSET" and "kernel_shape" in given and not given.get("storage_order", 0)
    spread = given.get("dilations", [])
    dilated = node.op_type == "AveragePool" and isinstance(spread, list) and any(extent != 1 for extent in spread)
    return plain and len(shape) in (3, 4) and not dilated


def _global_pool(node: ir.Node, given: Mapping[str, object], shape: tuple[int, ...]) -> bool:
    return len(shape) in (3, 4)


def _bounded(node: ir.Node, given: Mapping[str, object], shape: tuple[int, ...]) -> bool:
    return bounds(node) is not None


def _keeps_batch(node: ir.Node, given: Mapping[str, object], shape: tuple[int, ...]) -> bool:
    after = static_shape(node.outputs[0]) or ()
    return bool(shape and after and shape[0] == after[0])


def _concat(node: ir.Node, given: Mapping[str, object], shape: tuple[int, ...]) -> bool:
    axis = given.get("axis", 0)
    return _no_constants(node, given, shape) and isinstance(axis, int) and len(shape) > 1 and axis % len(shape) != 0


# Every int8 operator that `emit` writes. Of one that is in the form's table and not yet here, the float node is kept as an island.
_FITS = {
    "Conv": _conv,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Add": _no_constants,
    "MaxPool": _pool,
    "AveragePool": _pool,
    "GlobalAveragePool": _global_pool,
    "Relu": _bounded,
    "Clip": _bounded,
    "Flatten": _keeps_batch,
    "Reshape": _keeps_batch,
    "Concat": _concat,
}
