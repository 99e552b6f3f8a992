# SPDX-License-Identifier: Apache-2.0
"""ReduceMean and the two Resizes. Means over space are pools; what else is divided is divided in float32.

Why that is exact: the sum of whole numbers on a grid of powers of two fits float32, IEEE 754 rounds a division correctly, and a quotient that
is no tie lies further from one than the last bit of float32 as long as the divisor stays below 2^15.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from isthmus.graph import QuantNode
from isthmus.resampling import Taps, linear_taps, nearest_indices
from isthmus.targets.tflite.lowering import Lowering, Order, Placed, axis_in
from isthmus.targets.tflite.pools import emit_global_average
from isthmus.targets.tflite.rounding import EXACT_FLOAT32, all_powers_of_two, scale_and_zero

LARGEST_DIVISOR = 2**15
HALF_PIXEL = frozenset({"half_pixel", "half_pixel_symmetric", "pytorch_half_pixel"})


# ---- means
def lower_reduce_mean(lowering: Lowering, node: QuantNode) -> None:
    shape, axes = lowering.spec(node.inputs[0]).shape, list(node.attributes["axes"])
    if len(shape) in (3, 4) and axes == list(range(2, len(shape))) and lowering.order(node.inputs[0]) is Order.LAST:
        _over_space(lowering, node)
        return
    placed = reduction(lowering, node)
    target = lowering.write(node.output, placed.order)
    count = int(np.prod([shape[axis] for axis in axes]))
    lowering.declare(node, all_powers_of_two(lowering.graph, node) and count <= LARGEST_DIVISOR)
    real = lowering.dequantise(placed.source, f"{node.name}/real")
    total = lowering.scratch_float("sum", target.shape)
    emit_reduction(lowering, "SUM", placed.of(real), total)
    lowering.quantise(_divided(lowering, total, count), target)


@dataclass(frozen=True)
class Reduction:
    """A reduction in the file: over axes `places` of `source`, to a result that lies in `order`."""

    source: Placed
    places: tuple[int, ...]
    keepdims: bool
    order: Order

    def of(self, source: Placed) -> Reduction:
        """The same of another tensor of those extents."""
        return replace(self, source=source)


def reduction(lowering: Lowering, node: QuantNode) -> Reduction:
    """Channels last stays so where the axes stay, and where those that are left follow each other as in the form."""
    name, axes, keep = node.inputs[0], node.attributes["axes"], bool(node.attributes["keepdims"])
    rank = len(lowering.spec(name).shape)
    order = lowering.order(name)
    if not keep and order is Order.LAST:
        left = [axis for axis in (0, *range(2, rank), 1) if axis not in axes]
        order = order if left == sorted(left) else Order.FORM
    source = lowering.read(name, order)
    places = [axis_in(order, rank, axis) for axis in axes]
    if order is Order.LAST and rank == 3 and not keep:
        places.append(1)  # the height of 1 that a line of pixels has in the file
    return Reduction(source, tuple(sorted(places)), keep, order if keep else Order.FORM)


def emit_reduction(lowering: Lowering, op: str, placed: Reduction, target: Placed) -> None:
    axes = lowering.writer.constant("axes", np.array(placed.places, np.int32))
    lowering.writer.operator(op, 1, [placed.source.index, axes], [target.index], "ReducerOptions", keepDims=placed.keepdims)


def _over_space(lowering: Lowering, node: QuantNode) -> None:
    batch, channels, *_ = lowering.spec(node.inputs[0]).shape
    order = Order.LAST if node.attributes["keepdims"] else Order.FORM
    target = lowering.write(node.output, order)
    pooled = target if len(target.shape) == 4 else lowering.scratch(f"{node.name}/pooled", (batch, 1, 1, channels), node.output)
    emit_global_average(lowering, node, pooled)
    if pooled is not target:
        lowering.emit_reshape(pooled, target)


def _divided(lowering: Lowering, total: Placed, divisor: int) -> Placed:
    none = lowering.writer.enum("ActivationFunctionType", "NONE")
    return lowering.float_operator("DIV", [total.index, lowering.number(divisor)], total.shape, "DivOptions", fusedActivationFunction=none)


# ---- resizing
def lower_resize_nearest(lowering: Lowering, node: QuantNode) -> None:
    """RESIZE_NEAREST_NEIGHBOR where its float32 coordinates pick the form's cells, else one GATHER an axis."""
    name, target = node.inputs[0], lowering.write(node.output, Order.LAST)
    source = lowering.read(name, Order.LAST)
    transform, mode = node.attributes["coordinate_transformation_mode"], node.attributes["nearest_mode"]
    wanted = [nearest_indices(source.shape[axis], target.shape[axis], transform, mode) for axis in (1, 2)]
    for align, half in ((False, False), (False, True), (True, False)):
        if all(np.array_equal(wanted[axis - 1], _picked(source.shape[axis], target.shape[axis], align, half)) for axis in (1, 2)):
            options = {"alignCorners": align, "halfPixelCenters": half}
            _resize(lowering, "RESIZE_NEAREST_NEIGHBOR", 3, source, target, "ResizeNearestNeighborOptions", options)
            return
    shape = (source.shape[0], target.shape[1], *source.shape[2:])
    rows = lowering.scratch(f"{node.name}/rows", shape, name)
    lowering.gather(source, rows, wanted[0], 1)
    lowering.gather(rows, target, wanted[1], 2)


def _picked(before: int, after: int, align: bool, half: bool) -> np.ndarray:
    """The cells that TFLite's kernel copies (kernels/internal/reference/resize_nearest_neighbor.h), in its float32."""
    step = np.float32(before - 1) / np.float32(after - 1) if align and after > 1 else np.float32(before) / np.float32(after)
    place = (np.arange(after).astype(np.float32) + np.float32(0.5 if half else 0)) * step
    cell = np.floor(place + np.float32(0.5)) if align else np.floor(place)
    return np.clip(cell, 0, before - 1).astype(np.int64)


def _resize(lowering: Lowering, op: str, version: int, source: Placed, target: Placed, table: str, options: dict[str, bool]) -> None:
    size = lowering.writer.constant("size", np.array(target.shape[1:3], np.int32))
    lowering.writer.operator(op, version, [source.index, size], [target.index], table, **options)


def lower_resize_linear(lowering: Lowering, node: QuantNode) -> None:
    """In float32: RESIZE_BILINEAR where its weights are whole shares of a power of two, else whole weights and one division.

    The int8 RESIZE_BILINEAR has weights of 11 bits and rounds halves up: `rounding=native` takes it.
    """
    name = node.inputs[0]
    source, target = lowering.read(name, Order.LAST), lowering.write(node.output, Order.LAST)
    transform = node.attributes["coordinate_transformation_mode"]
    taps = [linear_taps(source.shape[axis], target.shape[axis], transform) for axis in (1, 2)]
    divisor = taps[0].denominator * taps[1].denominator
    known = transform != "pytorch_half_pixel" or all(target.shape[axis] > 1 or source.shape[axis] == 1 for axis in (1, 2))
    options = {"alignCorners": transform == "align_corners", "halfPixelCenters": transform in HALF_PIXEL}
    powers = all_powers_of_two(lowering.graph, node)
    if known and not lowering.exact and scale_and_zero(lowering.graph, name) == scale_and_zero(lowering.graph, node.output):
        lowering.declare(node, False)
        _resize(lowering, "RESIZE_BILINEAR", 3, source, target, "ResizeBilinearOptions", options)
        return
    shares = divisor & (divisor - 1) == 0
    if node.kind == "float":
        _resize_real(lowering, node, source, taps, options if known and shares else None, target)
        return
    lowering.declare(node, powers and divisor <= (EXACT_FLOAT32 // 256 if shares else LARGEST_DIVISOR))
    if known and (shares or not powers):
        real = lowering.dequantise(source, f"{node.name}/real")
        result = lowering.scratch_float(f"{node.name}/resized", target.shape)
        _resize(lowering, "RESIZE_BILINEAR", 3, real, result, "ResizeBilinearOptions", options)
        lowering.quantise(result, target)
        return
    real = lowering.dequantise(source, f"{node.name}/real")
    for axis, tap in zip((1, 2), taps, strict=True):
        real = _weighted(lowering, real, tap, axis)
    lowering.quantise(_divided(lowering, real, divisor), target)


def _resize_real(lowering: Lowering, node: QuantNode, source: Placed, taps: list[Taps], options: dict[str, bool] | None, target: Placed) -> None:
    """A float island: by RESIZE_BILINEAR where its coordinates are exact in float32, as `options` says; else with whole weights and one division."""
    if options is not None:
        _resize(lowering, "RESIZE_BILINEAR", 3, source, target, "ResizeBilinearOptions", options)
        return
    for axis, tap in zip((1, 2), taps, strict=True):
        source = _weighted(lowering, source, tap, axis)
    none = lowering.writer.enum("ActivationFunctionType", "NONE")
    divisor = lowering.number(taps[0].denominator * taps[1].denominator)
    lowering.writer.operator("DIV", 1, [source.index, divisor], [target.index], "DivOptions", fusedActivationFunction=none)


def _weighted(lowering: Lowering, x: Placed, taps: Taps, axis: int) -> Placed:
    """x[lower] * (denominator - weight) + x[upper] * weight along one axis."""
    shape = tuple(len(taps.lower) if place == axis else extent for place, extent in enumerate(x.shape))
    none = lowering.writer.enum("ActivationFunctionType", "NONE")
    parts = []
    for places, weight in ((taps.lower, taps.denominator - taps.weight), (taps.upper, taps.weight)):
        indices = lowering.writer.constant("indices", places.astype(np.int32))
        cells = lowering.float_operator("GATHER", [x.index, indices], shape, "GatherOptions", axis=axis)
        factors = lowering.writer.constant("factors", weight.astype(np.float32).reshape(-1, *([1] * (len(shape) - 1 - axis))))
        parts.append(lowering.float_operator("MUL", [cells.index, factors], shape, "MulOptions", fusedActivationFunction=none).index)
    return lowering.float_operator("ADD", parts, shape, "AddOptions", fusedActivationFunction=none)
