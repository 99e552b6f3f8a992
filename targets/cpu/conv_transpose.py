# SPDX-License-Identifier: Apache-2.0
"""ConvTranspose: one integer convolution a phase of the output, their results interleaved; or ONNX Runtime's float one on whole numbers.

Output t * stride + phase sees input t + j through kernel element (phase + pad - j * stride) / dilation, where that is a whole number in the kernel:
a convolution of stride 1 for each phase. ONNX Runtime 1.32 has no integer ConvTranspose. Measured (ms, one thread, between two 1x1 convolutions):

| input, kernel, stride | float | a convolution a phase, channels last | one convolution of all phases, channels last |
|---|---|---|---|
| 64x28x28 to 32 channels, 2x2, 2 | 0.54 | 0.47 | 0.43 |
| 64x28x28 to 32 channels, 4x4, 2 | 1.02 | 0.66 | 1.06 |
| 128x14x14 to 64 channels, 4x4, 2 | 0.96 | 0.57 | 1.01 |
| 32x28x28 to 32 channels, 3x3, 2 | 0.46 | 0.36 | 0.43 |
| 56x32x32 to 1 channel, 9x9, 4 | 0.69 | 2.75 | 0.71 |

So: phases, as one convolution where all see the same inputs (kernel = stride), unless channels are few or phases many. Float sums are exact up to 2^24.
"""

from __future__ import annotations

import math
from itertools import product
from typing import NamedTuple

import numpy as np

from isthmus.graph import QuantNode
from isthmus.kernels import EXACT_FLOAT32, conv_like_weight
from isthmus.spec import TensorSpec
from isthmus.targets.cpu.lowering import Lowering
from isthmus.targets.cpu.moves import blocks_apart
from isthmus.targets.cpu.weighted import operands, weight_scale

FEWEST_CHANNELS, MOST_PHASES = 8, 4


class _Window(NamedTuple):
    """One phase along one axis: a dense kernel over inputs first..last, and the element of the given kernel at each place (-1: none, a zero)."""

    first: int
    last: int
    elements: tuple[int, ...]


def conv_transpose(w: Lowering, node: QuantNode) -> None:
    assert node.weight is not None  # rule "weight" of the form
    filters, phases = w.spec(node.output).shape[1], math.prod(node.attributes["strides"])
    if largest_sum(node, w.spec(node.inputs[0])) > EXACT_FLOAT32 or (filters >= FEWEST_CHANNELS and phases <= MOST_PHASES):
        _in_phases(w, node, filters)
        return
    inputs = operands(w, node, w.spec(node.inputs[0]), node.weight, weight_scale(node), node.bias, 1)
    w.group("ConvTranspose", inputs, node, w.spec(node.output), **node.attributes)


def largest_sum(node: QuantNode, source: TensorSpec) -> int:
    """The largest accumulator any input can give, bias and all."""
    assert node.weight is not None
    rows = conv_like_weight(node.weight, node.attributes["group"]).astype(np.int64)
    zero = int(source.zero_point or 0)
    bias = 0 if node.bias is None else np.abs(node.bias.astype(np.int64))
    sums = np.abs(rows).sum(axis=tuple(range(1, rows.ndim))) * max(127 - zero, zero + 128)
    return int((sums + bias).max())


def _in_phases(w: Lowering, node: QuantNode, filters: int) -> None:
    assert node.weight is not None
    a, source, result = node.attributes, w.spec(node.inputs[0]), w.spec(node.output)
    strides, group, rank = a["strides"], a["group"], len(a["strides"])
    turns = [-(-extent // stride) for extent, stride in zip(result.shape[2:], strides, strict=True)]
    windows = [[_window(node, source, axis, phase, turns[axis]) for phase in range(strides[axis])] for axis in range(rank)]
    phases = list(product(*windows))
    place = w.unclamped(node)
    if group == 1 and all(len({(window.first, window.last) for window in of_axis}) == 1 for of_axis in windows):
        parts = [phases]  # all see the same inputs: one convolution, phase after phase in its outputs
    else:
        parts = [[phase] for phase in phases]
    whole = place if len(phases) == 1 else w.fresh(f"{node.output}_phases")
    names = [whole] if len(parts) == 1 else [w.fresh(f"{node.output}_phase") for _ in parts]
    for name, part in zip(names, parts, strict=True):
        _phase_conv(w, node, part, turns, name)
    if len(parts) > 1:
        w.emit("Concat", names, whole, axis=1)
    if len(phases) > 1:
        _interleaved(w, whole, (result.shape[0], *turns, filters), result.shape[2:], tuple(strides), place)
    w.clamp(node, place)


def _window(node: QuantNode, source: TensorSpec, axis: int, phase: int, turns: int) -> _Window:
    """Grown over zeros where it must be: ONNX pads by 0 or more, and an output has a place for every turn."""
    a, extent = node.attributes, source.shape[2 + axis]
    stride, dilation, kernel, pad = a["strides"][axis], a["dilations"][axis], a["kernel_shape"][axis], a["pads"][axis]
    found = {(phase + pad - dilation * k) // stride: k for k in range(kernel) if (phase + pad - dilation * k) % stride == 0}
    first, last = min([0, *found]), max([0, extent - turns, *found])
    return _Window(first, last, tuple(found.get(place, -1) for place in range(first, last + 1)))


def _phase_conv(w: Lowering, node: QuantNode, phases: list[tuple[_Window, ...]], turns: list[int], output: str) -> None:
    assert node.weight is not None
    group, extents, windows = node.attributes["group"], w.spec(node.inputs[0]).shape[2:], phases[0]
    rows = conv_like_weight(node.weight, group)
    weight = np.concatenate([_picked(rows, phase) for phase in phases])
    scale = weight_scale(node)
    scale = np.tile(scale, len(phases)) if scale.ndim else scale
    bias = None if node.bias is None else np.tile(node.bias, len(phases))
    attributes = {
        "kernel_shape": list(weight.shape[2:]),
        "pads": [
            *(-window.first for window in windows),
            *(turn - 1 + window.last - (extent - 1) for window, turn, extent in zip(windows, turns, extents, strict=True)),
        ],
        "group": group,
    }
    inputs = operands(w, node, w.spec(node.inputs[0]), weight, scale, bias, 0)
    value = w.emit("Conv", inputs, w.fresh(f"{output}_value"), f"{node.name}_phase", **attributes)
    w.quantise(value, w.spec(node.output), output)


def _picked(rows: np.ndarray, phase: tuple[_Window, ...]) -> np.ndarray:
    """The kernel's elements of one phase; an index of -1 finds the zero behind the last."""
    weight = np.pad(rows, [(0, 0), (0, 0), *((0, 1) for _ in phase)])
    for axis, window in enumerate(phase, 2):
        weight = np.take(weight, np.array(window.elements), axis=axis)
    return weight


def _interleaved(w: Lowering, phases: str, shape: tuple[int, ...], extents: tuple[int, ...], strides: tuple[int, ...], output: str) -> None:
    """`shape` is (N, *turns, C); what the last turn has beyond the output is cut off."""
    grown = [turn * stride for turn, stride in zip(shape[1:-1], strides, strict=True)]
    if tuple(grown) == tuple(extents):
        blocks_apart(w, phases, shape, strides, output)
        return
    whole = w.fresh(f"{output}_whole")
    blocks_apart(w, phases, shape, strides, whole)
    axes = list(range(2, 2 + len(extents)))
    bounds = [w.whole_numbers(f"{output}_{part}", values) for part, values in (("starts", [0] * len(axes)), ("ends", extents), ("axes", axes))]
    w.emit("Slice", [whole, *bounds], output)
