# SPDX-License-Identifier: Apache-2.0
"""Float islands of several operands: arithmetic, comparisons, choices, products of matrices, reductions, instance normalisation."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from isthmus.graph import QuantNode
from isthmus.targets.tflite.arithmetic import operand
from isthmus.targets.tflite.islands import normalised
from isthmus.targets.tflite.lowering import LAST_AXES, Lowering, Order, Placed
from isthmus.targets.tflite.means import emit_reduction, reduction

FUSING = {"Add": "ADD", "Sub": "SUB", "Mul": "MUL", "Div": "DIV"}
CHAINED = {"Max": ("MAXIMUM", "MaximumMinimumOptions"), "Min": ("MINIMUM", "MaximumMinimumOptions"), "Sum": ("ADD", "AddOptions")}
PLAIN = {
    "Pow": ("POW", "PowOptions"),
    "Equal": ("EQUAL", "EqualOptions"),
    "Greater": ("GREATER", "GreaterOptions"),
    "GreaterOrEqual": ("GREATER_EQUAL", "GreaterEqualOptions"),
    "Less": ("LESS", "LessOptions"),
    "LessOrEqual": ("LESS_EQUAL", "LessEqualOptions"),
    "And": ("LOGICAL_AND", "LogicalAndOptions"),
    "Or": ("LOGICAL_OR", "LogicalOrOptions"),
    "Not": ("LOGICAL_NOT", "LogicalNotOptions"),
    "Where": ("SELECT_V2", "SelectV2Options"),
}
REDUCED = {"ReduceMean": "MEAN", "ReduceSum": "SUM", "ReduceMax": "REDUCE_MAX", "ReduceMin": "REDUCE_MIN", "ReduceProd": "REDUCE_PROD"}
# Exponents of which XNNPACK has an operator of its own.
POWERS = {2.0: "SQUARE", 0.5: "SQRT", -0.5: "RSQRT"}


def _operands(lowering: Lowering, node: QuantNode) -> tuple[Order, list[Placed]]:
    order = lowering.common_order(node)
    return order, [operand(lowering, name, node, order) for name in node.inputs]


def lower_fusing(lowering: Lowering, node: QuantNode) -> None:
    order, sources = _operands(lowering, node)
    op, options = FUSING[node.op], f"{node.op}Options"
    inputs = [source.index for source in sources]

    def emit(out: Placed, activation: int) -> None:
        lowering.writer.operator(op, 1, inputs, [out.index], options, fusedActivationFunction=activation)

    lowering.emit_clamped(node, lowering.write(node.output, order), emit)


def lower_chain(lowering: Lowering, node: QuantNode) -> None:
    """Any number of operands, two by two."""
    order, sources = _operands(lowering, node)
    op, options = CHAINED[node.op]
    if len(sources) == 1:
        lowering.place(node.output, order, sources[0])
        return
    target, total = lowering.write(node.output, order), sources[0]
    for position, source in enumerate(sources[1:], start=2):
        shape = np.broadcast_shapes(total.shape, source.shape)
        after = target if position == len(sources) else lowering.scratch(f"{node.name}/joined", shape, node.output)
        lowering.writer.operator(op, 1, [total.index, source.index], [after.index], options)
        total = after


def lower_plain(lowering: Lowering, node: QuantNode) -> None:
    order, sources = _operands(lowering, node)
    target = lowering.write(node.output, order)
    exponent = lowering.constant_number(node.inputs[1]) if node.op == "Pow" else None
    if exponent in POWERS and sources[0].shape == target.shape:
        lowering.writer.operator(POWERS[exponent], 1, [sources[0].index], [target.index])
        return
    op, options = PLAIN[node.op]
    lowering.writer.operator(op, 1, [source.index for source in sources], [target.index], options)


def lower_product(lowering: Lowering, node: QuantNode) -> None:
    """BATCH_MATMUL, which fuses no activation."""
    left, right = (_matrix(lowering, name, node) for name in node.inputs)
    target = lowering.write(node.output, Order.FORM)
    bounded = lowering.clamp(node) != ("NONE", [])
    product = lowering.scratch(f"{node.name}/product", target.shape, node.output) if bounded else target
    lowering.writer.operator("BATCH_MATMUL", 1, [left.index, right.index], [product.index], "BatchMatMulOptions")
    if bounded:
        lowering.emit_clamp(product, target, node)


def _matrix(lowering: Lowering, name: str, node: QuantNode) -> Placed:
    return operand(lowering, name, node, Order.FORM)


# ---- over axes
def lower_reduction(lowering: Lowering, node: QuantNode) -> None:
    placed = reduction(lowering, node)
    target = lowering.write(node.output, placed.order)
    if node.op != "ReduceL2":
        emit_reduction(lowering, REDUCED[node.op], placed, target)
        return
    squares = lowering.float_operator("SQUARE", [placed.source.index], placed.source.shape)
    total = lowering.scratch_float(f"{node.name}/sum", target.shape)
    emit_reduction(lowering, "SUM", placed.of(squares), total)
    lowering.writer.operator("SQRT", 1, [total.index], [target.index])


def lower_instance_norm(lowering: Lowering, node: QuantNode) -> None:
    """Each channel by its own mean and variance over space."""
    rank = len(lowering.spec(node.inputs[0]).shape)
    order = Order.LAST if rank in LAST_AXES else Order.FORM
    source = lowering.read(node.inputs[0], order)
    space = range(1, len(source.shape) - 1) if order is Order.LAST else range(2, rank)
    along = (1,) * (len(source.shape) - 2) + (-1,) if order is Order.LAST else (-1, *[1] * (rank - 2))
    gain, shift = (node.constants[place].astype(np.float32).reshape(along) for place in (1, 2))
    lowering.settle(node.output, order, normalised(lowering, node, source, space, gain, shift))


LOWERINGS: Mapping[str, Callable[[Lowering, QuantNode], None]] = {
    **dict.fromkeys(FUSING, lower_fusing),
    **dict.fromkeys(CHAINED, lower_chain),
    **dict.fromkeys(PLAIN, lower_plain),
    "BatchMatMul": lower_product,
    **dict.fromkeys((*REDUCED, "ReduceL2"), lower_reduction),
    "InstanceNormalization": lower_instance_norm,
}
