# SPDX-License-Identifier: Apache-2.0
"""Pools. MAX_POOL_2D as it is; averages as what rounds like the reference: a depthwise convolution, MEAN, or a float detour.

TFLite's own int8 AVERAGE_POOL_2D rounds halves away from zero, cannot change the scale, and XNNPACK does not take it.
"""

from __future__ import annotations

import numpy as np

from isthmus import kernels
from isthmus.graph import QuantNode
from isthmus.targets.tflite.flatbuffer import Quantisation
from isthmus.targets.tflite.lowering import Lowering, Order, Placed
from isthmus.targets.tflite.ranges import lower_bound
from isthmus.targets.tflite.rounding import INT8_MIN, WEIGHTS, Average, scale_and_zero
from isthmus.targets.tflite.weighted import emit_depthwise, padded
from isthmus.targets.tflite.windows import Windows, plane, windows

# XNNPACK's depthwise kernels end at 5 x 5; a larger window runs as one small matrix product a channel, where MEAN is faster.
DEPTHWISE_CELLS = 25


def lower_max_pool(lowering: Lowering, node: QuantNode) -> None:
    name = node.inputs[0]
    seen = windows(node, lowering.spec(name).shape[2:], lowering.spec(node.output).shape[2:])
    source = lowering.read(name, Order.LAST)
    if seen.padding == "EXPLICIT":
        # Padding must never win. XNNPACK has PAD (with real zero) but not PADV2: behind a Relu real zero never wins either.
        value = None if _never_negative(lowering, name) else -np.inf if node.kind == "float" else INT8_MIN
        source = lowering.pad(source, f"{node.name}/padded", seen.begins, seen.ends, like=name, value=value)
    target = lowering.write(node.output, Order.LAST)
    writer = lowering.writer
    writer.operator(
        "MAX_POOL_2D", 2, [source.index], [target.index], "Pool2DOptions", padding=writer.enum("Padding", "SAME" if seen.padding == "SAME" else "VALID"),
        filterHeight=seen.kernel[0], filterWidth=seen.kernel[1], strideH=seen.strides[0], strideW=seen.strides[1],
    )  # fmt: skip


def _never_negative(lowering: Lowering, name: str) -> bool:
    """No value of the tensor lies below real zero, as far as the graph tells."""
    spec, maker = lowering.spec(name), lowering.graph.producer(name)
    if spec.is_quantised:
        return lower_bound(lowering.graph, name) >= int(spec.zero_point or 0)
    if maker is not None and maker.op == "DequantizeLinear":
        return _never_negative(lowering, maker.inputs[0])
    return maker is not None and maker.kind == "float" and maker.activation_range[0] >= 0


def lower_average_pool(lowering: Lowering, node: QuantNode) -> None:
    space, out = lowering.spec(node.inputs[0]).shape[2:], lowering.spec(node.output).shape[2:]
    seen = windows(node, space, out)
    if seen.kernel == plane(space) and seen.padding == "VALID":
        lower_global_average_pool(lowering, node)
        return
    a = node.attributes
    nothing, padding_counts = np.zeros((1, 1, *space), np.int8), bool(a["count_include_pad"])
    _, count = kernels.average_pool(nothing, 0, out, a["kernel_shape"], a["strides"], a["pads"], a["dilations"], padding_counts)
    if node.kind == "float":
        _real_average(lowering, node, seen, count)
        return
    averages = [_average(lowering, node, cells) for cells in sorted({int(cells) for cells in count.reshape(-1)})]
    if len(averages) == 1:
        weight = averages[0].convolution_weight()
        lowering.declare(node, weight is not None)
        _by_convolution(lowering, node, seen, averages[0], weight or 1, lowering.write(node.output, Order.LAST))
        return
    exact = next((weight for weight in WEIGHTS if all(average.exact_in_float(weight) for average in averages)), None)
    lowering.declare(node, exact is not None)
    _in_float(lowering, node, seen, count, exact or 1)


def lower_global_average_pool(lowering: Lowering, node: QuantNode) -> None:
    """Also an AveragePool over everything."""
    emit_global_average(lowering, node, lowering.write(node.output, Order.LAST))


def emit_global_average(lowering: Lowering, node: QuantNode, target: Placed) -> None:
    """MEAN over height and width; a depthwise convolution where XNNPACK's MEAN would round otherwise or the window is small."""
    source = lowering.read(node.inputs[0], Order.LAST)
    _, height, width, _ = source.shape
    if node.kind == "float":
        _emit_mean(lowering, source, target)
        return
    average = _average(lowering, node, height * width)
    small, mean_is_exact = average.count <= DEPTHWISE_CELLS, average.exact_by_mean()
    weight = average.convolution_weight() if small or not mean_is_exact else None
    lowering.declare(node, weight is not None or (mean_is_exact and not small))
    if weight is not None or small:
        _by_convolution(lowering, node, Windows((height, width), (1, 1), (1, 1), (0, 0), (0, 0), "VALID"), average, weight or 1, target)
        return
    _emit_mean(lowering, source, target)


def _emit_mean(lowering: Lowering, source: Placed, target: Placed) -> None:
    axes = lowering.writer.constant("axes", np.array([1, 2], np.int32))
    lowering.writer.operator("MEAN", 2, [source.index, axes], [target.index], "ReducerOptions", keepDims=True)


def _average(lowering: Lowering, node: QuantNode, count: int) -> Average:
    return Average(count, scale_and_zero(lowering.graph, node.inputs[0]), scale_and_zero(lowering.graph, node.output))


def _by_convolution(lowering: Lowering, node: QuantNode, seen: Windows, average: Average, weight: int, target: Placed) -> None:
    source = padded(lowering, lowering.read(node.inputs[0], Order.LAST), node, seen)
    channels = source.shape[-1]
    scale = average.share(weight)
    kernel = lowering.writer.constant(
        f"{node.name}/weight", np.full((1, *seen.kernel, channels), weight, np.int8), Quantisation.per_channel(scale, channels, axis=3)
    )
    bias_scale = np.float32(average.source[0]) * scale
    bias = lowering.writer.constant(f"{node.name}/bias", np.zeros(channels, np.int32), Quantisation.per_channel(bias_scale, channels, axis=0))
    emit_depthwise(lowering, [source.index, kernel, bias], target, seen, 1, lowering.writer.enum("ActivationFunctionType", "NONE"))


def _in_float(lowering: Lowering, node: QuantNode, seen: Windows, count: np.ndarray, weight: int) -> None:
    """Windows that count differently at the edge: float sums (exact), times a constant map of 1 / (count * weight), quantised."""
    source = padded(lowering, lowering.read(node.inputs[0], Order.LAST), node, seen)
    real = lowering.dequantise(source, f"{node.name}/real")
    target = lowering.write(node.output, Order.LAST)
    mean = lowering.scratch_float(f"{node.name}/mean", target.shape)
    _emit_shares(lowering, node, seen, real, count * weight, weight, mean)
    lowering.quantise(mean, target)


def _real_average(lowering: Lowering, node: QuantNode, seen: Windows, count: np.ndarray) -> None:
    """AVERAGE_POOL_2D leaves padding out of its counts and knows no dilation; what else a float island asks for is a weighted sum."""
    cells, target = seen.kernel[0] * seen.kernel[1], lowering.write(node.output, Order.LAST)
    plain = seen.padding == "VALID" or (seen.padding == "SAME" and not node.attributes["count_include_pad"])
    if seen.dilations == (1, 1) and (plain or (seen.padding == "EXPLICIT" and bool(np.all(count == cells)))):
        source, writer = padded(lowering, lowering.read(node.inputs[0], Order.LAST), node, seen), lowering.writer
        writer.operator(
            "AVERAGE_POOL_2D", 1, [source.index], [target.index], "Pool2DOptions",
            padding=writer.enum("Padding", "SAME" if seen.padding == "SAME" else "VALID"),
            filterHeight=seen.kernel[0], filterWidth=seen.kernel[1], strideH=seen.strides[0], strideW=seen.strides[1],
        )  # fmt: skip
        return
    _emit_shares(lowering, node, seen, padded(lowering, lowering.read(node.inputs[0], Order.LAST), node, seen), count, 1, target)


def _emit_shares(lowering: Lowering, node: QuantNode, seen: Windows, real: Placed, count: np.ndarray, weight: int, mean: Placed) -> None:
    """The sum over each window of `weight` times its cells, over a constant map of counts."""
    channels = real.shape[-1]
    kernel = lowering.writer.constant(f"{node.name}/weight", np.full((1, *seen.kernel, channels), weight, np.float32))
    bias = lowering.writer.constant(f"{node.name}/bias", np.zeros(channels, np.float32))
    total = lowering.scratch_float(f"{node.name}/sum", mean.shape)
    none = lowering.writer.enum("ActivationFunctionType", "NONE")
    emit_depthwise(lowering, [real.index, kernel, bias], total, seen, 1, none, version=2)
    share = lowering.writer.constant(f"{node.name}/share", (np.float32(1.0) / count.astype(np.float32)).reshape(1, *mean.shape[1:3], 1))
    lowering.writer.operator("MUL", 1, [total.index, share], [mean.index], "MulOptions", fusedActivationFunction=none)
