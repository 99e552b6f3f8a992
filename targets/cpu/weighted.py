# SPDX-License-Identifier: Apache-2.0
"""Sums of products: the integer kernels QLinearConv, QGemm and QLinearMatMul, which ONNX Runtime makes of DequantizeLinear, operator, QuantizeLinear."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from isthmus.graph import QuantNode
from isthmus.spec import TensorSpec
from isthmus.targets.cpu.lowering import SHIFT, Lowering

# x86 without VNNI adds two products in 16 bits: 2 * 255 * 64 = 32,640 still fits. Weights of 7 bits keep to it.
SIGNED_LIMIT = 64


def conv(w: Lowering, node: QuantNode) -> None:
    _weighted(w, node, 0, dict(node.attributes))


def gemm(w: Lowering, node: QuantNode) -> None:
    _weighted(w, node, 0, {"transB": 1})


def matmul(w: Lowering, node: QuantNode) -> None:
    """With a bias it is a Gemm over all rows: of MatMul and Add ONNX Runtime (1.32) makes no integer kernel."""
    if node.bias is None:
        _weighted(w, node, 1, {})
        return
    assert node.weight is not None  # rule "weight" of the form
    source, result = w.spec(node.inputs[0]), w.spec(node.output)
    if len(source.shape) == 2:
        w.group("Gemm", operands(w, node, source, columns(w, node, 0), weight_scale(node), node.bias, 1), node, result)
        return
    rows = w.reshaped(source.name, [source.size // source.shape[-1], source.shape[-1]])
    inputs = operands(w, node, replace(source, name=rows), node.weight, weight_scale(node), node.bias, 1)
    value = w.emit("Gemm", inputs, w.fresh(f"{node.output}_value"), node.name)
    steps, place = w.fresh(f"{node.output}_rows"), w.unclamped(node)
    w.quantise(value, result, steps)
    w.reshaped(steps, result.shape, place)
    w.clamp(node, place)


def batch_matmul(w: Lowering, node: QuantNode) -> None:
    w.group("MatMul", [w.dequantise(w.spec(name)) for name in node.inputs], node, w.spec(node.output))


def _weighted(w: Lowering, node: QuantNode, axis: int, attributes: dict[str, Any]) -> None:
    inputs = operands(w, node, w.spec(node.inputs[0]), columns(w, node, 1 - axis), weight_scale(node), node.bias, axis)
    w.group(node.op, inputs, node, w.spec(node.output), **attributes)


def columns(w: Lowering, node: QuantNode, axis: int) -> np.ndarray:
    """The weight, its input elements along `axis` in the order in which the input lies in the file."""
    weight = node.weight
    assert weight is not None  # rule "weight" of the form
    image = w.flattened_last.get(node.inputs[0])
    if image is None:
        return weight
    order = np.moveaxis(np.arange(weight.shape[axis]).reshape(image[1:]), 0, -1).reshape(-1)
    return np.take(weight, order, axis)


def weight_scale(node: QuantNode) -> np.ndarray:
    """One number, or one an output channel."""
    assert node.weight_scale is not None
    return node.weight_scale.reshape(()) if node.weight_scale.size == 1 else node.weight_scale


def operands(w: Lowering, node: QuantNode, source: TensorSpec, weight: np.ndarray, scale: np.ndarray, bias: np.ndarray | None, axis: int) -> list[str]:
    """Activation, weight and bias, each behind its DequantizeLinear. `scale` is one number or one a filter, along `axis` of the weight.

    Weights that cannot saturate the kernel for int8 weights (`SIGNED_LIMIT`) stay int8: it takes 0.6 to 0.8 times as long as the one for uint8.

    Of a grouped ConvTranspose that axis is one group's filters, which share their scales with those of the other groups.
    """
    signed = int(np.abs(weight.astype(np.int16)).max(initial=0)) <= SIGNED_LIMIT
    values, zero = (weight.astype(np.int8), 0) if signed else ((weight.astype(np.int16) + SHIFT).astype(np.uint8), SHIFT)
    along = scale[: weight.shape[axis]] if scale.ndim else scale
    inputs = [w.dequantise(source), w.real_constant(f"{node.output}_weight", values, along, zero, axis)]
    if bias is not None:
        inputs.append(w.real_constant(f"{node.output}_bias", bias, np.float32(source.scale) * scale, 0, 0))
    return inputs
