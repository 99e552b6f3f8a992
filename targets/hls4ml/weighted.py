# SPDX-License-Identifier: Apache-2.0
"""Sums of products: convolutions of every kind as hls4ml's dense or depthwise one, matrix products by constants and by activations."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from isthmus.targets.hls4ml.constants import products_of
from isthmus.targets.hls4ml.fixed import Fixed, Weights, exact_weights, product_type
from isthmus.targets.hls4ml.folding import Product
from isthmus.targets.hls4ml.kernels import product_kernel
from isthmus.targets.hls4ml.layout import hls_shape, hls_sources
from isthmus.targets.hls4ml.lowering import Lowering
from isthmus.targets.hls4ml.windows import as_convolution, dense_kernel, is_depthwise, stuffed_places, two_axes
from isthmus.targets.hls4ml.writer import CHANNELS_LAST

if TYPE_CHECKING:
    from isthmus.graph import QuantNode


def conv(low: Lowering, node: QuantNode, name: str) -> str:
    return _conv(low, node, name, low.values[node.inputs[0]], low.shape(node.output))


def _conv(low: Lowering, node: QuantNode, name: str, value: str, shape: list[int]) -> str:
    """The convolution of `value` into an HLS array of `shape`, and everything behind it."""
    found = exact_weights(node, low.scale(node.inputs[0]))
    attributes = two_axes(node.attributes)
    depthwise = is_depthwise(node)
    values = found.values if found.values.ndim == 4 else found.values[:, :, None, :]
    kernel = dense_kernel(values, attributes["dilations"], 1 if depthwise else attributes["group"])
    filters, depth, *window = kernel.shape
    weight = low.writer.weights(f"{name}_weight", np.moveaxis(kernel, 1, -1), found.weight_type)
    bias = low.writer.weights(f"{name}_bias", found.bias, found.bias_type)
    value = low.writer.node(
        "Conv", [value, weight, bias], name, shape, domain=CHANNELS_LAST,
        kernel_shape=window, strides=attributes["strides"], pads=attributes["pads"], dilations=[1, 1], group=filters if depthwise else 1,
    )  # fmt: skip
    low.writer.layer(name, weight=found.weight_type, bias=found.bias_type, accum=found.accumulator, result=low.exact_or_final(node, found.accumulator))
    terms = int(np.prod(window)) * (filters if depthwise else depth)
    low.products.append(_product(Product(name, node.name, terms, filters, int(np.prod(shape[1:3])), depthwise), found, kernel))
    return low.finish(node, value, name, found.accumulator, shape)


def _product(product: Product, found: Weights, values: np.ndarray) -> Product:
    """With what the estimate needs to know of the weights."""
    multiplied, shifted = products_of(values.reshape(len(values), -1).T if product.depthwise or values.ndim == 4 else values)
    return replace(
        product,
        weight_bits=found.weight_type.bits,
        accumulator_bits=found.accumulator.bits,
        zeros=int((values == 0).sum()),
        multiplied=multiplied,
        shifted=shifted,
    )


def conv_transpose(low: Lowering, node: QuantNode, name: str) -> str:
    """Zeros between and around the input's values, then a convolution by the kernel turned around."""
    places = stuffed_places(node, low.spec(node.inputs[0]).shape, low.spec(node.output).shape)
    size, shape = low.spec(node.inputs[0]).size // low.spec(node.inputs[0]).shape[0], [1, *places.shape]
    stuffed = low.move(low.values[node.inputs[0]], f"{name}_stuffed", size, places, shape, low.type(node.inputs[0]))
    return _conv(low, as_convolution(node), name, stuffed, low.shape(node.output))


def gemm(low: Lowering, node: QuantNode, name: str) -> str:
    if len(low.spec(node.inputs[0]).shape) != 2:
        return _many_rows(low, node, name)
    found = exact_weights(node, low.scale(node.inputs[0]))
    values = found.values if node.op == "MatMul" else found.values.T
    order = low.ordered(node.inputs[0])
    values = values if order is None else values[order]
    terms, filters = values.shape
    shape = low.shape(node.output)
    weight = low.writer.weights(f"{name}_weight", values, found.weight_type)
    bias = low.writer.weights(f"{name}_bias", found.bias, found.bias_type)
    value = low.writer.node("MatMul", [low.values[node.inputs[0]], weight], name, shape)
    value = low.writer.node("Add", [value, bias], f"{name}_add", shape)
    # "auto" lets hls4ml put the bias, and a rounding right behind it, into the Dense layer; convert checks the type it derived.
    low.writer.layer(name, weight=found.weight_type, bias=found.bias_type, accum=found.accumulator, result="auto")
    low.writer.layer(f"{name}_add", scale=Fixed(2, 0), bias=found.bias_type, result=found.accumulator)
    low.products.append(_product(Product(name, node.name, terms, filters, 1), found, values))
    return low.finish(node, value, name, found.accumulator)


def _many_rows(low: Lowering, node: QuantNode, name: str) -> str:
    """A matrix product along the last axis of three or more: a 1x1 convolution over the rows."""
    assert node.weight is not None
    weight = node.weight.T if node.op == "MatMul" else node.weight
    tensor, target = node.inputs[0], low.spec(node.output).shape
    filters, depth = weight.shape
    numbers = low.numbers(tensor)
    rows = numbers.size // depth
    # (1, rows, depth) as the HLS array [1, 1, rows, depth]: what is last here is the channels there.
    sources = hls_sources(numbers.reshape(rows, depth).T, low.spec(tensor).shape, (1, depth, rows))
    value = low.move(low.values[tensor], f"{name}_rows", numbers.size, sources, [1, 1, rows, depth], low.type(tensor))
    attributes = {"strides": [1, 1], "pads": [0, 0, 0, 0], "dilations": [1, 1], "group": 1}
    value = _conv(low, replace(node, op="Conv", weight=weight.reshape(filters, depth, 1, 1), attributes=attributes), name, value, [1, 1, rows, filters])
    return _rows_placed(low, node, value, name, rows, filters, target)


def _rows_placed(low: Lowering, node: QuantNode, value: str, name: str, rows: int, columns: int, target: tuple[int, ...]) -> str:
    """The HLS array [1, 1, rows, columns], whose order is the form's, as a tensor of form shape `target`."""
    places = hls_sources(np.arange(rows * columns), (1, 1, 1, 1, rows * columns), target)
    shape = hls_shape(target)
    if shape == [1, 1, rows, columns] and np.array_equal(places.reshape(-1), np.arange(rows * columns)):
        return value
    return low.move(value, f"{name}_placed", rows * columns, places, shape, low.type(node.output))


def batch_matmul(low: Lowering, node: QuantNode, name: str) -> str:
    """(batches, rows, depth) x (batches, depth, columns), both laid out in the form's order; batch axes are spread where they are shared."""
    shapes = [low.spec(tensor).shape for tensor in node.inputs]
    target = low.spec(node.output).shape
    rows, depth, columns = target[-2], shapes[0][-1], target[-1]
    batches = int(np.prod(target[1:-2]))
    operands = []
    for position, (tensor, extents) in enumerate(zip(node.inputs, ((rows, depth), (depth, columns)), strict=True)):
        spread = np.broadcast_to(low.numbers(tensor), (1, *target[1:-2], *extents))
        # Five axes: a tensor whose HLS array has the form's order.
        flat = (1, 1, 1, batches * extents[0], extents[1])
        operands.append(low.placed(node, position, spread.reshape(flat), flat, f"{name}_operand{position}"))
    exact = product_type(depth, *(low.scale(tensor) for tensor in node.inputs))
    shape = [1, 1, batches * rows, columns]
    kernel = product_kernel(batches, rows, depth, columns, exact)
    value = low.writer.kernel(kernel, operands, name, shape, low.exact_or_final(node, exact))
    low.products.append(Product(name, node.name, depth, columns, batches * rows, accumulator_bits=exact.bits, activations=True))
    return _rows_placed(low, node, low.finish(node, value, name, exact, shape), name, batches * rows, columns, target)
