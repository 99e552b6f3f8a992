# SPDX-License-Identifier: Apache-2.0
"""ConvTranspose: TRANSPOSE_CONV and a SLICE for the padding; in groups, which TFLite's has not, a convolution over the input with zeros put in between."""

from __future__ import annotations

import numpy as np

from isthmus.graph import QuantNode
from isthmus.kernels import conv_like_weight
from isthmus.targets.tflite.lowering import Lowering, Order, Placed
from isthmus.targets.tflite.rounding import weighted_is_exact
from isthmus.targets.tflite.weighted import bias_constant, emit_conv, emit_depthwise, kernel_constant
from isthmus.targets.tflite.windows import Windows, plane


def lower_conv_transpose(lowering: Lowering, node: QuantNode) -> None:
    assert node.weight is not None
    source = lowering.read(node.inputs[0], Order.LAST)
    lowering.declare(node, weighted_is_exact(lowering.graph, node))
    target = lowering.write(node.output, Order.LAST)
    if int(node.attributes["group"]) == 1:
        _transposed(lowering, node, source, target)
    else:
        _with_zeros_between(lowering, node, source, target)


def _kernel(node: QuantNode) -> np.ndarray:
    """[out, in/group, height, width], its dilation written out as zeros."""
    assert node.weight is not None
    weight = conv_like_weight(node.weight, int(node.attributes["group"]))
    weight = weight if weight.ndim == 4 else weight[:, :, np.newaxis, :]
    spread = plane(node.attributes["dilations"])
    kernel = [(extent - 1) * step + 1 for extent, step in zip(weight.shape[2:], spread, strict=True)]
    dilated = np.zeros((*weight.shape[:2], *kernel), weight.dtype)
    dilated[:, :, :: spread[0], :: spread[1]] = weight
    return dilated


def _transposed(lowering: Lowering, node: QuantNode, source: Placed, target: Placed) -> None:
    """The whole reach of the kernel, then the part that the pads leave. Zeros behind the kernel reach as far as output_padding asks."""
    writer = lowering.writer
    weight = _kernel(node)
    strides, begins = plane(node.attributes["strides"]), plane(node.attributes["pads"][: len(node.attributes["strides"])], 0)
    reach = [(source.shape[1 + axis] - 1) * strides[axis] + weight.shape[2 + axis] for axis in (0, 1)]
    missing = [max(begins[axis] + target.shape[1 + axis] - reach[axis], 0) for axis in (0, 1)]
    weight = np.pad(weight, ((0, 0), (0, 0), (0, missing[0]), (0, missing[1])))
    full = (source.shape[0], reach[0] + missing[0], reach[1] + missing[1], len(weight))
    kernel, bias = kernel_constant(lowering, node, weight.transpose(0, 2, 3, 1), axis=0), bias_constant(lowering, node, len(weight))
    cut, clamped = full == target.shape, lowering.clamp(node) != ("NONE", [])
    whole = target if cut and not clamped else lowering.scratch(f"{node.name}/whole", full, node.output)
    writer.operator(
        "TRANSPOSE_CONV", 3, [writer.constant("extents", np.array(full, np.int32)), kernel, source.index, bias], [whole.index], "TransposeConvOptions",
        padding=writer.enum("Padding", "VALID"), strideH=strides[0], strideW=strides[1],
    )  # fmt: skip
    if not cut:
        part = lowering.scratch(f"{node.name}/part", target.shape, node.output) if clamped else target
        lowering.slice(whole, part, [0, *begins, 0])
        whole = part
    if clamped:
        lowering.emit_clamp(whole, target, node)


def _with_zeros_between(lowering: Lowering, node: QuantNode, source: Placed, target: Placed) -> None:
    """Input cells `stride` apart, real zero between them and around, and the kernel turned round."""
    weight = _kernel(node)[:, :, ::-1, ::-1]
    strides, begins = plane(node.attributes["strides"]), plane(node.attributes["pads"][: len(node.attributes["strides"])], 0)
    spread = _spread(lowering, node, source, strides)
    before = [weight.shape[2 + axis] - 1 - begins[axis] for axis in (0, 1)]
    after = [target.shape[1 + axis] + weight.shape[2 + axis] - 1 - spread.shape[1 + axis] - before[axis] for axis in (0, 1)]
    if any(cells < 0 for cells in (*before, *after)):  # the pads take more than the kernel gives
        kept = [spread.shape[1 + axis] + min(before[axis], 0) + min(after[axis], 0) for axis in (0, 1)]
        part = lowering.scratch(f"{node.name}/kept", (spread.shape[0], *kept, spread.shape[3]), node.inputs[0])
        lowering.slice(spread, part, [0, max(-before[0], 0), max(-before[1], 0), 0])
        spread = part
    around = [max(cells, 0) for cells in before], [max(cells, 0) for cells in after]
    if any(around[0]) or any(around[1]):
        spread = lowering.pad(spread, f"{node.name}/padded", *around, like=node.inputs[0])
    filters, channels, group = len(weight), spread.shape[-1], int(node.attributes["group"])
    bias = bias_constant(lowering, node, filters)
    point = Windows((weight.shape[2], weight.shape[3]), (1, 1), (1, 1), (0, 0), (0, 0), "VALID")
    depthwise = group == channels
    axes, axis = ((1, 2, 3, 0), 3) if depthwise else ((0, 2, 3, 1), 0)
    kernel = kernel_constant(lowering, node, weight.transpose(axes), axis)
    inputs = [spread.index, kernel, bias]
    if depthwise:
        lowering.emit_clamped(node, target, lambda out, act: emit_depthwise(lowering, inputs, out, point, filters // channels, act))
    else:
        lowering.emit_clamped(node, target, lambda out, act: emit_conv(lowering, inputs, out, point, group, act))


def _spread(lowering: Lowering, node: QuantNode, source: Placed, strides: tuple[int, int]) -> Placed:
    """A row of zeros behind each cell, axis by axis: a PAD of an axis of its own."""
    batch, height, width, channels = source.shape
    name = node.inputs[0]
    if strides[0] > 1:
        source = _padded_behind(lowering, source, name, (batch * height, 1, width * channels), strides[0])
    if strides[1] > 1:
        source = _padded_behind(lowering, source, name, (batch * height * strides[0] * width, 1, channels), strides[1])
    extents = (batch, height * strides[0], width * strides[1], channels)
    return source if source.shape == extents else lowering.reshape(source, f"{node.name}/spread", extents, like=name)


def _padded_behind(lowering: Lowering, source: Placed, name: str, shape: tuple[int, int, int], times: int) -> Placed:
    rows = lowering.reshape(source, f"{name}/rows", shape, like=name)
    padded = lowering.scratch(f"{name}/spaced", (shape[0], times, shape[2]), name)
    amounts = lowering.writer.constant("paddings", np.array([[0, 0], [0, times - 1], [0, 0]], np.int32))
    lowering.writer.operator("PAD", 2, [rows.index, amounts], [padded.index], "PadOptions")
    return padded
