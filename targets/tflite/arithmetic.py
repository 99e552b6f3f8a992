# SPDX-License-Identifier: Apache-2.0
"""Add, Sub, Mul and BatchMatMul: in int8 where XNNPACK rounds like the reference, else in float32, which holds sums and products of powers of two exactly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from isthmus import kernels
from isthmus.graph import QuantNode
from isthmus.targets.tflite.lowering import Lowering, Order, Placed, moves_nothing, shape_in
from isthmus.targets.tflite.rounding import EXACT_FLOAT32, all_powers_of_two, ratio_is_whole, scale_and_zero

# XNNPACK's int8 ADD and SUB take input / output scale ratios in [2^-10, 2^8), its MUL a ratio of products in [2^-16, 2^8).
SUM_RATIOS = (2.0**-10, 2.0**8)
PRODUCT_RATIOS = (2.0**-16, 2.0**8)
SUM_OPTIONS = {"Add": ("ADD", "AddOptions"), "Sub": ("SUB", "SubOptions")}


def lower_sum(lowering: Lowering, node: QuantNode) -> None:
    """Add and Sub: in int8 where no tie can occur or nothing could be exact; else in float32, whose QUANTIZE rounds halves to even."""
    op, options = SUM_OPTIONS[node.op]
    order = lowering.common_order(node)
    sources = [operand(lowering, name, node, order) for name in node.inputs]
    ratios = [scale_and_zero(lowering.graph, name)[0] / scale_and_zero(lowering.graph, node.output)[0] for name in node.inputs]
    whole = all(ratio_is_whole(lowering.graph, name, node.output) for name in node.inputs) and max(ratios) < SUM_RATIOS[1]
    powers = all_powers_of_two(lowering.graph, node)
    outside = not all(SUM_RATIOS[0] <= ratio < SUM_RATIOS[1] for ratio in ratios)
    detour = lowering.exact and ((powers and not whole) or outside)
    lowering.declare(node, whole or (detour and powers and _sum_fits_float32(lowering, node)))
    target = lowering.write(node.output, order)
    if detour:
        _in_float(lowering, node, op, options, sources, target)
        return
    inputs = [source.index for source in sources]
    lowering.emit_clamped(node, target, lambda out, act: lowering.writer.operator(op, 2, inputs, [out.index], options, fusedActivationFunction=act))


def lower_product(lowering: Lowering, node: QuantNode) -> None:
    """Mul: XNNPACK's int8 MUL multiplies the product by one float32 factor and rounds halves to even, as the reference does for powers of two."""
    order = lowering.common_order(node)
    sources = [operand(lowering, name, node, order) for name in node.inputs]
    (a, _), (b, _), (out, _) = (scale_and_zero(lowering.graph, name) for name in (*node.inputs, node.output))
    taken = PRODUCT_RATIOS[0] <= a * b / out < PRODUCT_RATIOS[1]
    lowering.declare(node, all_powers_of_two(lowering.graph, node) and (taken or lowering.exact))
    target = lowering.write(node.output, order)
    if not taken and lowering.exact:
        _in_float(lowering, node, "MUL", "MulOptions", sources, target)
        return
    inputs = [source.index for source in sources]
    lowering.emit_clamped(node, target, lambda out, act: lowering.writer.operator("MUL", 2, inputs, [out.index], "MulOptions", fusedActivationFunction=act))


def lower_batch_matmul(lowering: Lowering, node: QuantNode) -> None:
    """In float32: XNNPACK has no int8 product of two activations, and TFLite's own rounds halves away from zero."""
    sources = [lowering.read(name, Order.FORM) for name in node.inputs]
    zeros = [scale_and_zero(lowering.graph, name)[1] for name in node.inputs]
    limit = kernels.product_limit(lowering.spec(node.inputs[0]).shape[-1], zeros)
    lowering.declare(node, all_powers_of_two(lowering.graph, node) and limit <= EXACT_FLOAT32)
    target = lowering.write(node.output, Order.FORM)
    reals = [lowering.real(source, f"{node.name}/real").index for source in sources]
    product = lowering.float_operator("BATCH_MATMUL", reals, target.shape, "BatchMatMulOptions")
    activation, _ = lowering.activation(node.clamp, node.output)
    if activation != "NONE":  # BATCH_MATMUL fuses none
        product = lowering.float_operator(activation, [product.index], target.shape)
    lowering.quantise_bounded(node, product, target)


def _sum_fits_float32(lowering: Lowering, node: QuantNode) -> bool:
    """Both addends are 9-bit integers on a grid of powers of two: their sum has at most 10 bits more than the grids lie apart."""
    (a, _), (b, _) = (scale_and_zero(lowering.graph, name) for name in node.inputs)
    return bool(abs(np.log2(a) - np.log2(b)) <= 24 - 10)


def _in_float(lowering: Lowering, node: QuantNode, op: str, options: str, sources: Sequence[Placed], target: Placed) -> None:
    reals = [lowering.real(source, f"{node.name}/real").index for source in sources]
    activation, _ = lowering.activation(node.clamp, node.output)
    fused = lowering.writer.enum("ActivationFunctionType", activation)
    result = lowering.float_operator(op, reals, target.shape, options, fusedActivationFunction=fused)
    lowering.quantise_bounded(node, result, target)


def operand(lowering: Lowering, name: str, node: QuantNode, order: Order) -> Placed:
    """An operand in the result's order; one of lower rank gets the leading ones that broadcasting gives it."""
    shape, rank = lowering.spec(name).shape, len(lowering.spec(node.output).shape)
    if len(shape) == rank:
        return lowering.read(name, order)
    full = (*([1] * (rank - len(shape))), *shape)
    if lowering.is_constant(name):
        return lowering.widened_constant(name, full, order)
    widened = lowering.reshape(lowering.read(name, Order.FORM), f"{name}/widened", full, like=name)
    if order is not Order.LAST:
        return widened
    _, channels, *space = full
    if moves_nothing(full):
        return lowering.reshape(widened, f"{name}/{order.value}", shape_in(order, full), like=name)
    moved = lowering.transpose(widened, f"{name}/nhwc", (0, *range(2, rank), 1), (full[0], *space, channels), like=name)
    return lowering.reshape(moved, f"{name}/{order.value}", shape_in(order, full), like=name)
