# SPDX-License-Identifier: Apache-2.0
"""Conv, Gemm and MatMul: CONV_2D, DEPTHWISE_CONV_2D and FULLY_CONNECTED with int32 bias and scales per output channel."""

from __future__ import annotations

import numpy as np

from isthmus.graph import QuantNode
from isthmus.targets.tflite.flatbuffer import Quantisation
from isthmus.targets.tflite.folding import fold, worth_folding
from isthmus.targets.tflite.lowering import Lowering, Order, Placed
from isthmus.targets.tflite.rounding import weighted_is_exact
from isthmus.targets.tflite.windows import Windows, plane, windows


def lower_conv(lowering: Lowering, node: QuantNode) -> None:
    assert node.weight is not None
    source_spec, target_spec = lowering.spec(node.inputs[0]), lowering.spec(node.output)
    seen = windows(node, source_spec.shape[2:], target_spec.shape[2:])
    source = lowering.read(node.inputs[0], Order.LAST)
    weight = node.weight if node.weight.ndim == 4 else node.weight[:, :, np.newaxis, :]
    lowering.declare(node, weighted_is_exact(lowering.graph, node))
    out = plane(target_spec.shape[2:])
    if worth_folding(node, seen, source, out):
        source, weight_last, seen = fold(lowering, node, source, weight.transpose(0, 2, 3, 1), seen, out)
        weight = weight_last.transpose(0, 3, 1, 2)
    source = padded(lowering, source, node, seen)
    target = lowering.write(node.output, Order.LAST)
    channels, group = source_spec.shape[1], int(node.attributes["group"])
    bias = bias_constant(lowering, node, len(weight))
    if group == channels > 1:  # one input channel a filter: OIHW [C*m, 1, h, w] -> [1, h, w, C*m]
        kernel = kernel_constant(lowering, node, weight.transpose(1, 2, 3, 0), axis=3)
        lowering.emit_clamped(node, target, lambda out, act: emit_depthwise(lowering, [source.index, kernel, bias], out, seen, len(weight) // channels, act))
        return
    kernel = kernel_constant(lowering, node, weight.transpose(0, 2, 3, 1), axis=0)
    lowering.emit_clamped(node, target, lambda out, act: emit_conv(lowering, [source.index, kernel, bias], out, seen, group, act))


def padded(lowering: Lowering, source: Placed, node: QuantNode, seen: Windows) -> Placed:
    """The input, behind a PAD with real zero where TFLite has no name for the padding. XNNPACK merges that PAD into the convolution."""
    if seen.padding != "EXPLICIT":
        return source
    return lowering.pad(source, f"{node.name}/padded", seen.begins, seen.ends, like=node.inputs[0])


def kernel_constant(lowering: Lowering, node: QuantNode, weight: np.ndarray, axis: int, per_channel: bool = True) -> int:
    """Weights with their output channels along `axis`: int8 with a scale each, float32 in a float island."""
    if node.weight_scale is None:
        return lowering.writer.constant(f"{node.name}/weight", weight.astype(np.float32))
    channels, scales = weight.shape[axis], node.weight_scale
    scales = np.resize(scales, channels) if scales.size > 1 else scales  # a ConvTranspose's groups share theirs
    quantisation = Quantisation.per_channel(scales, channels, axis) if per_channel else Quantisation((float(scales[0]),))
    return lowering.writer.constant(f"{node.name}/weight", weight, quantisation)


def bias_constant(lowering: Lowering, node: QuantNode, channels: int, per_channel: bool = True) -> int:
    """XNNPACK takes no convolution without a bias: where the form has none it is zero."""
    if node.weight_scale is None:
        return lowering.writer.constant(f"{node.name}/bias", np.zeros(channels, np.float32) if node.bias is None else node.bias.astype(np.float32))
    bias = node.bias if node.bias is not None else np.zeros(channels, np.int32)
    scales = np.float32(lowering.spec(node.inputs[0]).scale or 1.0) * node.weight_scale.astype(np.float32)
    scales = np.resize(scales, channels) if per_channel and scales.size > 1 else scales  # a ConvTranspose's groups share theirs
    quantisation = Quantisation.per_channel(scales, channels, axis=0) if per_channel else Quantisation((float(scales[0]),))
    return lowering.writer.constant(f"{node.name}/bias", bias.astype(np.int32), quantisation)


def emit_conv(lowering: Lowering, inputs: list[int], out: Placed, seen: Windows, group: int, activation: int) -> None:
    writer = lowering.writer
    writer.operator(
        "CONV_2D", 3 if group == 1 else 6, inputs, [out.index], "Conv2DOptions",
        padding=writer.enum("Padding", "SAME" if seen.padding == "SAME" else "VALID"),
        strideH=seen.strides[0], strideW=seen.strides[1], dilationHFactor=seen.dilations[0], dilationWFactor=seen.dilations[1],
        fusedActivationFunction=activation,
    )  # fmt: skip


def emit_depthwise(lowering: Lowering, inputs: list[int], out: Placed, seen: Windows, multiplier: int, activation: int, version: int = 3) -> None:
    writer = lowering.writer
    writer.operator(
        "DEPTHWISE_CONV_2D", version, inputs, [out.index], "DepthwiseConv2DOptions",
        padding=writer.enum("Padding", "SAME" if seen.padding == "SAME" else "VALID"),
        strideH=seen.strides[0], strideW=seen.strides[1], dilationHFactor=seen.dilations[0], dilationWFactor=seen.dilations[1],
        depthMultiplier=multiplier, fusedActivationFunction=activation,
    )  # fmt: skip


def lower_gemm(lowering: Lowering, node: QuantNode) -> None:
    """Gemm [out, in] and MatMul [in, out]. A flattened image comes channels last: the weight's columns move, not the data."""
    assert node.weight is not None
    weight = node.weight if node.op == "Gemm" else node.weight.T
    name = node.inputs[0]
    if lowering.order(name) is Order.FLAT:
        image = lowering.flat_source[name]
        weight = weight.reshape(len(weight), *image[1:]).transpose(0, *range(2, len(image)), 1).reshape(weight.shape)
        source = lowering.read(name, Order.FLAT)
    else:
        source = lowering.read(name, Order.FORM)
    lowering.declare(node, weighted_is_exact(lowering.graph, node))
    target = lowering.write(node.output, Order.FORM)
    if node.weight_scale is not None and np.unique(node.weight_scale).size > 1:
        _as_convolution(lowering, node, source, target, weight)
        return
    kernel, bias = kernel_constant(lowering, node, weight, 0, per_channel=False), bias_constant(lowering, node, len(weight), per_channel=False)
    keep = len(target.shape) > 2

    def emit(out: Placed, activation: int) -> None:
        inputs, version = [source.index, kernel, bias], 5 if keep else 4
        options = {"keepNumDims": keep, "fusedActivationFunction": activation}
        lowering.writer.operator("FULLY_CONNECTED", version, inputs, [out.index], "FullyConnectedOptions", **options)

    lowering.emit_clamped(node, target, emit)


def _as_convolution(lowering: Lowering, node: QuantNode, source: Placed, target: Placed, weight: np.ndarray) -> None:
    """Scales per output channel: a 1x1 CONV_2D. tflite-runtime 2.14 has no FULLY_CONNECTED with them and would take the first for all."""
    rows = int(np.prod(source.shape[:-1]))
    image = lowering.reshape(source, f"{node.name}/rows", (rows, 1, 1, source.shape[-1]), like=node.inputs[0])
    result = lowering.scratch(f"{node.name}/columns", (rows, 1, 1, len(weight)), node.output)
    kernel, bias = kernel_constant(lowering, node, weight[:, np.newaxis, np.newaxis, :], axis=0), bias_constant(lowering, node, len(weight))
    point = Windows((1, 1), (1, 1), (1, 1), (0, 0), (0, 0), "VALID")
    lowering.emit_clamped(node, result, lambda out, activation: emit_conv(lowering, [image.index, kernel, bias], out, point, 1, activation))
    lowering.emit_reshape(result, target)
