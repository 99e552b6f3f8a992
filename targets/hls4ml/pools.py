# SPDX-License-Identifier: Apache-2.0
"""Pools, means over any axes, and linear interpolation: many values in, one rounding out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from isthmus.resampling import Taps, linear_taps
from isthmus.targets.hls4ml.fixed import INT8_LOW, Fixed, average_type, fraction_bits
from isthmus.targets.hls4ml.kernels import constant_source, interpolate_kernel
from isthmus.targets.hls4ml.layout import hls_shape, hls_sources
from isthmus.targets.hls4ml.lowering import Lowering
from isthmus.targets.hls4ml.moves import SHAPES_ONLY, feeds_products
from isthmus.targets.hls4ml.tail import fpga_outputs
from isthmus.targets.hls4ml.windows import PoolWindow, pool_window, streams_natively
from isthmus.targets.hls4ml.writer import CHANNELS_LAST, GLOBAL_MEAN, KERNEL_DOMAIN

if TYPE_CHECKING:
    from isthmus.graph import QuantNode


def max_pool(low: Lowering, node: QuantNode, name: str) -> str:
    of = low.type(node.output)
    low.writer.layer(name, result=of, accum=of)
    return _pool(low, "MaxPool", node, name)


def average_pool(low: Lowering, node: QuantNode, name: str) -> str:
    window = pool_window(node, low.spec(node.inputs[0]).shape, low.spec(node.output).shape)
    exact = average_type(int(np.prod(window.kernel)), low.scale(node.inputs[0]), low.scale(node.output))
    low.writer.layer(name, result=low.type(node.output), accum=exact)
    if low.streams and _is_global(low, node, window) and _flattened(low, node):
        # One sum a channel; the windowed pool of a stream keeps the whole tensor in registers. Its result is flat, so nothing else may read it.
        value = low.writer.node(GLOBAL_MEAN, [low.values[node.inputs[0]]], name, low.shape(node.output), domain=KERNEL_DOMAIN)
    else:
        value = _pool(low, "AveragePool", node, name)
    return low.writer.quant(value, f"{name}_quant", low.type(node.output), low.shape(node.output))


def _is_global(low: Lowering, node: QuantNode, window: PoolWindow) -> bool:
    return window.kernel == low.shape(node.inputs[0])[1:3] and not any(window.pads)


def _flattened(low: Lowering, node: QuantNode) -> bool:
    readers = low.graph.consumers(node.output)
    shaped = bool(readers) and all(reader.op in SHAPES_ONLY and feeds_products(reader, low.graph) for reader in readers)
    return shaped and node.output not in fpga_outputs(low.graph)


def _pool(low: Lowering, op: str, node: QuantNode, name: str) -> str:
    window = pool_window(node, low.spec(node.inputs[0]).shape, low.spec(node.output).shape)
    value, pads, strides = low.values[node.inputs[0]], window.pads, window.strides
    if low.streams and not streams_natively(window):
        value, pads, strides = _side_by_side(low, node, window, value, f"{name}_windows"), [0, 0, 0, 0], window.kernel
    elif window.counts_padding:
        # hls4ml's ONNX front end does not read count_include_pad and averages over the cells inside: zeros written out are inside.
        value, pads = _pad(low, value, f"{name}_pad", low.shape(node.inputs[0]), pads, low.type(node.inputs[0])), [0, 0, 0, 0]
    return low.writer.node(op, [value], name, low.shape(node.output), domain=CHANNELS_LAST, kernel_shape=window.kernel, strides=strides, pads=pads)


def _side_by_side(low: Lowering, node: QuantNode, window: PoolWindow, value: str, name: str) -> str:
    """Every window written out behind the one before it, padding included: what io_stream's pools, which know no overlap, compute rightly."""
    _, height, width, channels = low.shape(node.inputs[0])
    _, out_height, out_width, _ = low.shape(node.output)
    lines = []
    for axis, (extent, out) in enumerate(((height, out_height), (width, out_width))):
        place = (np.arange(out)[:, None] * window.strides[axis] + np.arange(window.kernel[axis]) - window.pads[axis]).reshape(-1)
        lines.append(np.where((place >= 0) & (place < extent), place, -1))
    rows, columns = lines[0][:, None, None], lines[1][None, :, None]
    # The lowest value never wins a maximum; a mean counts its padding as zeros.
    fill = constant_source(np.array(INT8_LOW if node.op == "MaxPool" else 0))
    places = np.where((rows >= 0) & (columns >= 0), (rows * width + columns) * channels + np.arange(channels), fill)
    return low.move(value, name, height * width * channels, places, [1, *places.shape], low.type(node.inputs[0]))


def _pad(low: Lowering, value: str, name: str, shape: list[int], pads: list[int], of: Fixed) -> str:
    top, left, bottom, right = pads
    padded = [1, shape[1] + top + bottom, shape[2] + left + right, shape[3]]
    amounts = low.writer.constant(f"{name}_amounts", [0, top, left, 0, 0, bottom, right, 0], np.int64)
    low.writer.layer(name, result=of)
    return low.writer.node("Pad", [value, amounts], name, padded, mode="constant")


def reduce_mean(low: Lowering, node: QuantNode, name: str) -> str:
    """The mean of each row: what is kept becomes the channels, what is reduced the window of a pool."""
    tensor = node.inputs[0]
    reduced = sorted(int(axis) for axis in node.attributes["axes"])
    numbers = low.numbers(tensor)
    kept = [axis for axis in range(1, numbers.ndim) if axis not in reduced]
    cells = int(np.prod([numbers.shape[axis] for axis in reduced]))
    gathered = numbers.transpose(0, *kept, *reduced).reshape(-1, cells)
    channels = len(gathered)
    # As a form tensor (1, kept, reduced), whose HLS shape is [1, 1, reduced, kept].
    sources = hls_sources(gathered, low.spec(tensor).shape, (1, channels, cells))
    value = low.move(low.values[tensor], f"{name}_rows", numbers.size, sources, [1, 1, cells, channels], low.type(tensor))
    of, target = low.type(node.output), low.spec(node.output).shape
    low.writer.layer(name, result=of, accum=average_type(cells, low.scale(tensor), low.scale(node.output)))
    window = {"kernel_shape": [1, cells], "strides": [1, cells], "pads": [0, 0, 0, 0]}
    value = low.writer.node("AveragePool", [value], name, [1, 1, 1, channels], domain=CHANNELS_LAST, **window)
    value = low.writer.quant(value, f"{name}_quant", of, [1, 1, 1, channels])
    places = hls_sources(np.arange(channels), (1, channels), target)
    return value if hls_shape(target) == [1, 1, 1, channels] else low.move(value, f"{name}_placed", channels, places, hls_shape(target), of)


def resize_linear(low: Lowering, node: QuantNode, name: str) -> str:
    tensor = node.inputs[0]
    source, target = low.shape(tensor), low.shape(node.output)
    transform = node.attributes["coordinate_transformation_mode"]
    rows, columns = (_taps(source[axis], target[axis], transform) for axis in (1, 2))
    shift = fraction_bits(low.scale(node.output)) - fraction_bits(low.scale(tensor))
    return low.writer.kernel(interpolate_kernel(rows, columns, source, shift), [low.values[tensor]], name, target, low.type(node.output))


def _taps(source: int, target: int, transform: str) -> Taps:
    """As the reference: an axis that keeps its extent is not resized, whatever the transform."""
    if source != target:
        return linear_taps(source, target, transform)
    places = np.arange(source)
    return Taps(places, places, np.zeros_like(places), 1)
