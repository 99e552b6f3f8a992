# SPDX-License-Identifier: Apache-2.0
"""Relu, Clip, Requantize and stored operands."""

from __future__ import annotations

import numpy as np

from isthmus.graph import QuantNode
from isthmus.targets.tflite.flatbuffer import Quantisation
from isthmus.targets.tflite.lowering import ALONE, Lowering
from isthmus.targets.tflite.rounding import is_power_of_two, ratio_is_whole, scale_and_zero
from isthmus.targets.tflite.weighted import emit_depthwise
from isthmus.targets.tflite.windows import Windows

# XNNPACK's int8 QUANTIZE takes ratios in [2^-8, 2^7].
QUANTIZE_RATIO_LIMIT = 2.0**7


def lower_constant(lowering: Lowering, node: QuantNode) -> None:
    lowering.place_constant(node.output, node.constants[0])


def lower_clamp(lowering: Lowering, node: QuantNode) -> None:
    """Relu and Clip that stand alone; nothing where the clamp is the whole range."""
    order = lowering.elementwise_order(node)
    source = lowering.read(node.inputs[0], order)
    if lowering.clamp(node, ALONE) == ("NONE", []):
        lowering.place(node.output, order, source)
    else:
        lowering.emit_clamp(source, lowering.write(node.output, order), node)


def lower_requantise(lowering: Lowering, node: QuantNode) -> None:
    """QUANTIZE where nothing is rounded; else a depthwise 1x1 convolution by one: XNNPACK's int8 QUANTIZE has an 8-bit multiplier
    and rounds halves up."""
    name = node.inputs[0]
    order = lowering.elementwise_order(node)
    source = lowering.read(name, order)
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
