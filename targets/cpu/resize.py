# SPDX-License-Identifier: Apache-2.0
"""Resize. Measured with ONNX Runtime 1.32 (ms, one thread, 32x28x28 to 56x56 between two 1x1 convolutions):

- nearest: Resize on uint8 0.32, on float 0.30, Gather along rows and columns 1.01, the same Gathers channels last 0.13;
- linear: Resize on float 0.15, two matrix products 0.22, Gathers with weights 2.1; Resize on uint8 0.30, and one step off.

ONNX Runtime computes linear coordinates in float32. Where those are not exactly the reference's fractions (a factor of 3, say), a tie may fall the other
way; in the power-of-two scheme the products with whole weights are taken there, divided last, as the reference does.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from isthmus.graph import QuantNode
from isthmus.kernels import EXACT_FLOAT32
from isthmus.resampling import Taps, linear_taps, nearest_indices
from isthmus.targets.cpu.lowering import Lowering


def resize_nearest(w: Lowering, node: QuantNode) -> None:
    a, source = node.attributes, w.spec(node.inputs[0]).shape
    moved = w.channels_last(node.inputs[0], len(source))
    for axis, size in enumerate(a["sizes"], 1):
        if source[axis + 1] != size:
            indices = nearest_indices(source[axis + 1], size, a["coordinate_transformation_mode"], a["nearest_mode"])
            places = w.whole_numbers(f"{node.output}_indices_{axis}", indices)
            moved = w.emit("Gather", [moved, places], w.fresh(f"{node.output}_gathered"), f"{node.name}_{axis}", axis=axis)
    w.channels_first(moved, len(source), node.output, node.name)


def resize_linear(w: Lowering, node: QuantNode) -> None:
    a, source = node.attributes, w.spec(node.inputs[0]).shape[2:]
    transform = a["coordinate_transformation_mode"]
    taps = {axis: linear_taps(extent, size, transform) for axis, (extent, size) in enumerate(zip(source, a["sizes"], strict=True)) if extent != size}
    exact = len(source) == 2 and all(_engine_agrees(source[axis], a["sizes"][axis], transform, taps[axis]) for axis in taps)
    value = w.in_steps(node.inputs[0], node.output)
    if not taps:
        w.quantise_unfused(value, w.steps_of(node.output), node.output)
    elif exact or (w.graph.recipe.scheme != "power_of_two" and len(source) == 2):
        sizes = w.whole_numbers(f"{node.output}_sizes", w.spec(node.output).shape)
        attributes = {"mode": "linear", "coordinate_transformation_mode": transform}
        w.quantise(w.emit("Resize", [value, "", "", sizes], w.fresh(f"{node.output}_value"), node.name, **attributes), w.steps_of(node.output), node.output)
    else:
        divisor = 1
        for axis, taps_of_axis in taps.items():
            value, divisor = _product(w, node, value, axis - len(source), source[axis], taps_of_axis), divisor * taps_of_axis.denominator
        w.quantise(value, w.steps_of(node.output, divisor), node.output)


def largest_divisor(node: QuantNode, source: tuple[int, ...]) -> int:
    """What the weights of one output add up to."""
    transform = node.attributes["coordinate_transformation_mode"]
    pairs = zip(source[2:], node.attributes["sizes"], strict=True)
    return int(np.prod([linear_taps(extent, size, transform).denominator for extent, size in pairs if extent != size], dtype=np.int64))


def _product(w: Lowering, node: QuantNode, value: str, axis: int, extent: int, taps: Taps) -> str:
    """`value` along one axis (-1 the last, ...) times a matrix of whole weights; any other axis is brought to the end and back."""
    matrix = np.zeros((extent, len(taps.lower)), np.float32)
    columns = np.arange(len(taps.lower))
    np.add.at(matrix, (taps.lower, columns), taps.denominator - taps.weight)
    np.add.at(matrix, (taps.upper, columns), taps.weight)
    name, output = f"{node.output}_weights_{-axis}", w.fresh(f"{node.output}_product")
    if axis == -1:
        return w.emit("MatMul", [value, w.constant(name, matrix)], output, f"{node.name}_{-axis}")
    if axis == -2:
        return w.emit("MatMul", [w.constant(name, matrix.T), value], output, f"{node.name}_{-axis}")
    rank = len(w.spec(node.output).shape)
    swapped = list(range(rank))
    swapped[axis], swapped[-1] = swapped[-1], swapped[axis]
    last = w.emit("Transpose", [value], w.fresh(f"{node.output}_turned"), perm=swapped)
    product = w.emit("MatMul", [last, w.constant(name, matrix)], w.fresh(f"{node.output}_product"), f"{node.name}_{-axis}")
    return w.emit("Transpose", [product], output, perm=swapped)


def _engine_agrees(source: int, target: int, transform: str, taps: Taps) -> bool:
    """Whether ONNX Runtime's float32 coordinates (upsample.h, GetOriginalCoordinateFunc) are exactly the fractions of `taps`."""
    index, scale, half = np.arange(target, dtype=np.float32), np.float32(target) / np.float32(source), np.float32(0.5)
    if transform == "asymmetric":
        place = index / scale
    elif transform == "align_corners":
        place = index * np.float32(source - 1) / np.float32(target - 1) if target > 1 else index * 0
    elif transform == "pytorch_half_pixel" and target == 1:
        place = index * 0
    else:
        place = (index + half) / scale - half
    place = np.clip(place, np.float32(0), np.float32(source - 1))
    wanted = [Fraction(int(low)) + Fraction(int(weight), taps.denominator) for low, weight in zip(taps.lower, taps.weight, strict=True)]
    small = taps.denominator * taps.denominator * 256 < EXACT_FLOAT32  # so that products of weights and their sums stay exact, too
    return small and all(Fraction(float(found)) == right for found, right in zip(place, wanted, strict=True))
