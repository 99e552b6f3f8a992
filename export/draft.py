# SPDX-License-Identifier: Apache-2.0
"""`Draft`: a float graph without quantisers, and beside it everything that is int8. Both roads into the form end here; `emit` writes it.

The graph may hold operators that are not ONNX: `REQUANTISE` (one int8 tensor in, the same values at another scale out) and what `settle` writes
(`SILU`, x * Sigmoid(x), and MatMul with a bias as its third input).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from isthmus.export.rewrites._edit import attributes_of, constant, input_at, only_reader, static_shape
from isthmus.op_attributes import Call, IllegalCallError, resolve
from isthmus.ops import OPS, TAKE_CONSTANTS, Op, row_name

REQUANTISE = "Requantize"
SILU = "Silu"


class Step(NamedTuple):
    """How an activation is quantised: real = (q - zero_point) * scale."""

    scale: float
    zero_point: int

    def integers(self, real: np.ndarray) -> np.ndarray:
        """int8, each the nearest (a tie to the even one) that is there."""
        steps = np.rint(np.asarray(real, np.float64) / self.scale) + self.zero_point
        return np.clip(steps, -128, 127).astype(np.int8)

    def holds(self, real: np.ndarray) -> bool:
        """Whether every one of these numbers is one that the integers stand for."""
        back = (self.integers(real).astype(np.float64) - self.zero_point) * self.scale
        return bool(np.allclose(back, real, rtol=1e-6, atol=0))


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


def row_of(node: ir.Node) -> Op | None:
    """The row of the form's table that a node is read as, whether its attributes fit or not; None where the form has no such operator."""
    if node.domain not in ("", "ai.onnx"):
        return None
    return OPS.get(row_name(node.op_type, attributes_of(node), len(operands(node))))


def is_weighted(node: ir.Node) -> bool:
    row = row_of(node)
    return row is not None and row.weight_axis is not None


def passes_scale(node: ir.Node) -> bool:
    row = row_of(node)
    return row is not None and row.passes_scale


def activations(node: ir.Node) -> list[ir.Value]:
    """The inputs that are no constants."""
    return [value for value in node.inputs if value is not None and constant(value) is None]


def operands(node: ir.Node) -> list[ir.Value]:
    """What is an int8 tensor where the node is int8: its activations, and constants that stand where an activation could (see `settle`)."""
    if node.op_type not in TAKE_CONSTANTS:
        return activations(node)
    if node.op_type == "MatMul" and len(node.inputs) > 1 and (weight := constant(node.inputs[1])) is not None and weight.ndim == 2:
        return activations(node)
    return [value for value in node.inputs if value is not None]


def results(node: ir.Node) -> list[ir.Value]:
    """What a node writes for others to read: of most operators one value."""
    return list(node.outputs) if node.op_type == "Split" else [node.outputs[0]]


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
    row = row_of(node)
    if row is None or not row.fuses:
        return None
    reader = only_reader(node.outputs[0])
    return reader if reader is not None and reader.inputs[0] is node.outputs[0] and bounds(reader) is not None else None


def fits_int8(node: ir.Node) -> bool:
    """Whether the int8 form has this operator with these attributes, shapes and constants. What does not fit stays float."""
    if node.op_type == REQUANTISE:
        return True
    row = row_of(node)
    if row is None or row.activations == 0 or any(value.uses() or value.is_graph_output() for value in node.outputs if value not in results(node)):
        return False
    read, written = operands(node), results(node)
    shapes = [[static_shape(value) for value in side] for side in (read, written)]
    if not activations(node) or any(not shape for side in shapes for shape in side) or any(value.dtype != ir.DataType.FLOAT for value in (*read, *written)):
        return False
    before, after = (tuple(shape or () for shape in side) for side in shapes)
    call = Call(row.name, attributes_of(node), before, _settings(node, row), after)
    return _inputs_fit(node, row) and _shapes_fit(node, row, call) and _resolves(call)


def _settings(node: ir.Node, row: Op) -> dict[int, np.ndarray]:
    return {position: held for position in row.constants if (held := constant(input_at(node, position))) is not None}


def _resolves(call: Call) -> bool:
    try:
        resolve(call)
    except IllegalCallError:
        return False
    return True


def _inputs_fit(node: ir.Node, row: Op) -> bool:
    """int8 tensors in front, as many as the row has, and behind them only constants that it has a place for."""
    read = operands(node)
    count = len(read)
    if row.weight_axis is not None:
        return count == 1 and _weight_fits(node, row)
    present = [position for position, value in enumerate(node.inputs) if value is not None]
    behind = set(present) - set(range(count))
    fits = present[:count] == list(range(count)) and count == (row.activations or count) and behind <= row.constants
    return fits and all(constant(node.inputs[position]) is not None for position in behind) and all(_is_finite(value) for value in read)


def _is_finite(value: ir.Value) -> bool:
    held = constant(value)
    return held is None or bool(np.isfinite(held).all())


def _weight_fits(node: ir.Node, row: Op) -> bool:
    """A constant weight, and a bias that is absent or a constant vector."""
    weight, bias = constant(input_at(node, 1)), input_at(node, 2)
    held = constant(bias)
    return (
        weight is not None
        and weight.ndim == WEIGHT_RANKS.get(row.name, len(static_shape(node.inputs[0]) or ()))
        and (bias is None or (held is not None and held.ndim == 1))
    )


def _shapes_fit(node: ir.Node, row: Op, call: Call) -> bool:
    """What the form's attributes say nothing of: space axes that targets have, constants that keep the batch, bounds of a Clip."""
    if row.name in ON_IMAGES and call.rank not in (3, 4):
        return False
    if row.name == "AveragePool" and any(spread != 1 for spread in call.given.get("dilations", [])):
        return False
    if row.name in ("Relu", "Clip"):
        return bounds(node) is not None
    result = call.outputs[0]
    stored = [constant(value) is not None for value in operands(node)]
    same_axes = all(len(shape) == len(result) and (shape[0] == result[0] or (held and shape[0] == 1)) for shape, held in zip(call.inputs, stored, strict=True))
    return same_axes or not any(stored)


# How many axes a weight has, where it is not as many as the input.
WEIGHT_RANKS = {"Gemm": 2, "MatMul": 2}
ON_IMAGES = frozenset({"Conv", "ConvTranspose", "MaxPool", "AveragePool", "GlobalAveragePool", "ResizeNearest", "ResizeLinear"})
