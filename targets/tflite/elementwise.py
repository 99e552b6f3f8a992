# SPDX-License-Identifier: Apache-2.0
"""Add, Relu, Clip, Requantize, Concat, Flatten, Reshape, Softmax and the quantisers at the border."""

from __future__ import annotations

import numpy as np

from isthmus.graph import QuantNode
from isthmus.targets.tflite.flatbuffer import Quantisation
from isthmus.targets.tflite.lowering import ALONE, Lowering, Order, Placed, shape_in
from isthmus.targets.tflite.rounding import is_power_of_two, ratio_is_whole, scale_and_zero
from isthmus.targets.tflite.weighted import emit_depthwise
from isthmus.targets.tflite.windows import Windows

# XNNPACK's ADD takes input / output scale ratios in [2^-10, 2^8), its int8 QUANTIZE in [2^-8, 2^7].
ADD_RATIOS = (2.0**-10, 2.0**8)
QUANTIZE_RATIO_LIMIT = 2.0**7
LAST_AXES = {3: (0, 3, 2), 4: (0, 3, 1, 2)}  # form axis -> axis in the file, channels last, by rank


def lower_add(lowering: Lowering, node: QuantNode) -> None:
    """ADD where no tie can occur or nothing could be exact; else in float32, which holds sums of powers of two exactly and whose
    QUANTIZE rounds halves to even. Both ways are whole in XNNPACK."""
    order = _common_order(lowering, node)
    sources = [_operand(lowering, name, node, order) for name in node.inputs]
    whole = all(ratio_is_whole(lowering.graph, name, node.output) and _add_ratio(lowering, name, node) < ADD_RATIOS[1] for name in node.inputs)
    powers = all(is_power_of_two(scale_and_zero(lowering.graph, name)[0]) for name in (*node.inputs, node.output))
    detour = lowering.exact and powers and not whole
    lowering.declare(node, whole or (detour and _sum_fits_float32(lowering, node)))
    target = lowering.write(node.output, order)
    if detour:
        _add_in_float(lowering, node, sources, target)
        return
    inputs = [source.index for source in sources]
    lowering.emit_clamped(node, target, lambda out, act: lowering.writer.operator("ADD", 2, inputs, [out.index], "AddOptions", fusedActivationFunction=act))


def _add_ratio(lowering: Lowering, name: str, node: QuantNode) -> float:
    return scale_and_zero(lowering.graph, name)[0] / scale_and_zero(lowering.graph, node.output)[0]


def _sum_fits_float32(lowering: Lowering, node: QuantNode) -> bool:
    """Both addends are 9-bit integers on a grid of powers of two: their sum has at most 10 bits more than the grids lie apart."""
    (a, _), (b, _) = (scale_and_zero(lowering.graph, name) for name in node.inputs)
    return abs(np.log2(a) - np.log2(b)) <= 24 - 10


def _add_in_float(lowering: Lowering, node: QuantNode, sources: list[Placed], target: Placed) -> None:
    writer = lowering.writer
    reals = [lowering.dequantise(source, f"{node.name}/real") for source in sources]
    activation, bounds = lowering.activation(node.clamp, node.output)
    current = lowering.scratch_float(f"{node.name}/sum", target.shape)
    fused = writer.enum("ActivationFunctionType", activation)
    writer.operator("ADD", 1, [real.index for real in reals], [current.index], "AddOptions", fusedActivationFunction=fused)
    step, zero = scale_and_zero(lowering.graph, node.output)
    for op, bound in bounds:
        limit = writer.constant("bound", np.array([(bound - zero) * step], np.float32))
        after = lowering.scratch_float(f"{node.name}/bounded", target.shape)
        writer.operator(op, 1, [current.index, limit], [after.index], "MaximumMinimumOptions")
        current = after
    lowering.quantise(current, target)


def _common_order(lowering: Lowering, node: QuantNode) -> Order:
    """Channels last where one of the operands lies so; the form's order else."""
    orders = [lowering.order(name) for name in node.inputs]
    return Order.LAST if Order.LAST in orders and len(lowering.spec(node.output).shape) in LAST_AXES else Order.FORM


def _operand(lowering: Lowering, name: str, node: QuantNode, order: Order) -> Placed:
    """An operand in the result's order; one of lower rank gets the leading ones that broadcasting gives it."""
    shape, rank = lowering.spec(name).shape, len(lowering.spec(node.output).shape)
    if len(shape) == rank:
        return lowering.read(name, order)
    full = (*([1] * (rank - len(shape))), *shape)
    widened = lowering.reshape(lowering.read(name, Order.FORM), f"{name}/widened", full, like=name)
    if order is not Order.LAST:
        return widened
    _, channels, *space = full
    if channels == 1 or int(np.prod(space)) == 1:
        return lowering.reshape(widened, f"{name}/{order.value}", shape_in(order, full), like=name)
    moved = lowering.transpose(widened, f"{name}/nhwc", (0, *range(2, rank), 1), (full[0], *space, channels), like=name)
    return lowering.reshape(moved, f"{name}/{order.value}", shape_in(order, full), like=name)


def lower_clamp(lowering: Lowering, node: QuantNode) -> None:
    """Relu and Clip that stand alone: one of TFLite's four, or MAXIMUM and MINIMUM; nothing where the clamp is the whole range."""
    order = lowering.order(node.inputs[0])
    source = lowering.read(node.inputs[0], order)
    if order is Order.FLAT:
        lowering.flat_source[node.output] = lowering.flat_source[node.inputs[0]]
    activation, bounds = lowering.activation(node.clamp, node.output, ALONE)
    if activation == "NONE" and not bounds:
        lowering.place(node.output, order, source)
        return
    target = lowering.write(node.output, order)
    if activation != "NONE":
        middle = target if not bounds else lowering.scratch(f"{node.output}/unbounded", target.shape, node.output)
        lowering.writer.operator(activation, 2 if activation in ("RELU", "RELU6") else 1, [source.index], [middle.index])
        source = middle
    lowering.emit_bounds(source, target, bounds, node.output)


def lower_requantise(lowering: Lowering, node: QuantNode) -> None:
    """QUANTIZE where nothing is rounded; else a depthwise 1x1 convolution by one: XNNPACK's int8 QUANTIZE has an 8-bit multiplier
    and rounds halves up."""
    name = node.inputs[0]
    order = lowering.order(name)
    source = lowering.read(name, order)
    if order is Order.FLAT:
        lowering.flat_source[node.output] = lowering.flat_source[name]
    (step, _), (out_step, _) = scale_and_zero(lowering.graph, name), scale_and_zero(lowering.graph, node.output)
    whole = ratio_is_whole(lowering.graph, name, node.output) and step / out_step <= QUANTIZE_RATIO_LIMIT
    powers = is_power_of_two(step) and is_power_of_two(out_step)
    lowering.declare(node, whole or (lowering.exact and powers))
    target = lowering.write(node.output, order)
    if whole or not lowering.exact:
        lowering.quantise(source, target)
        return
    channels = source.shape[-1]
    image = source if len(source.shape) == 4 else lowering.reshape(source, f"{node.name}/rows", (int(np.prod(source.shape[:-1])), 1, 1, channels), like=name)
    result = target if len(source.shape) == 4 else lowering.scratch(f"{node.name}/rescaled", image.shape, node.output)
    kernel = lowering.writer.constant(f"{node.name}/one", np.ones((1, 1, 1, channels), np.int8), Quantisation.per_channel(np.float32(1.0), channels, axis=3))
    bias = lowering.writer.constant(f"{node.name}/bias", np.zeros(channels, np.int32), Quantisation.per_channel(np.float32(step), channels, axis=0))
    point = Windows((1, 1), (1, 1), (1, 1), (0, 0), (0, 0), "VALID")
    emit_depthwise(lowering, [image.index, kernel, bias], result, point, 1, lowering.writer.enum("ActivationFunctionType", "NONE"))
    if result is not target:
        lowering.emit_reshape(result, target)


def lower_concat(lowering: Lowering, node: QuantNode) -> None:
    shape = lowering.spec(node.output).shape
    orders = [lowering.order(name) for name in node.inputs]
    order = Order.LAST if Order.LAST in orders and len(shape) in LAST_AXES else Order.FORM
    sources = [lowering.read(name, order).index for name in node.inputs]
    axis = int(node.attributes["axis"])
    axis = LAST_AXES[len(shape)][axis] if order is Order.LAST else axis
    target = lowering.write(node.output, order)
    lowering.writer.operator("CONCATENATION", 2, sources, [target.index], "ConcatenationOptions", axis=axis)


def lower_reshape(lowering: Lowering, node: QuantNode) -> None:
    """Flatten and Reshape. An image flattened for layers with weights stays channels last (they permute their weights); else it is
    turned to the form's order first."""
    name, shape = node.inputs[0], lowering.spec(node.output).shape
    image = lowering.spec(name).shape
    flattens = lowering.order(name) is Order.LAST and len(shape) == 2 and shape[0] == image[0]
    moves = image[1] > 1 and int(np.prod(image[2:])) > 1
    if flattens and moves and _feeds_only_weights(lowering, node.output):
        source = lowering.read(name, Order.LAST)
        lowering.flat_source[node.output] = image
        target = lowering.write(node.output, Order.FLAT)
    else:
        source = lowering.read(name, Order.LAST) if flattens and not moves else lowering.read(name, Order.FORM)
        target = lowering.write(node.output, Order.FORM)
    lowering.emit_reshape(source, target)


def _feeds_only_weights(lowering: Lowering, name: str) -> bool:
    """Every reader is a Gemm or MatMul, or passes elements through to such ones."""
    readers = lowering.graph.consumers(name)
    return bool(readers) and all(
        reader.op in ("Gemm", "MatMul") or (reader.op in ("Relu", "Clip", "Requantize") and _feeds_only_weights(lowering, reader.output)) for reader in readers
    )


def lower_softmax(lowering: Lowering, node: QuantNode) -> None:
    """TFLite's SOFTMAX runs along the file's last axis: the form's last, or the channels of an image."""
    rank = len(lowering.spec(node.inputs[0]).shape)
    axis = int(node.attributes.get("axis", -1)) % rank
    order = Order.LAST if axis == 1 and rank in LAST_AXES else Order.FORM
    source, target = lowering.read(node.inputs[0], order), lowering.write(node.output, order)
    lowering.writer.operator("SOFTMAX", 1, [source.index], [target.index], "SoftmaxOptions", beta=1.0)


def lower_quantise(lowering: Lowering, node: QuantNode) -> None:
    """A QuantizeLinear or DequantizeLinear that stays in the file."""
    order = lowering.order(node.inputs[0])
    source, target = lowering.read(node.inputs[0], order), lowering.write(node.output, order)
    if node.op == "QuantizeLinear":
        lowering.quantise(source, target)
    else:
        lowering.writer.operator("DEQUANTIZE", 2, [source.index], [target.index], "DequantizeOptions")
