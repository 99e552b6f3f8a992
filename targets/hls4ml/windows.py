# SPDX-License-Identifier: Apache-2.0
"""Kernels and pooling windows as hls4ml computes them rightly: always 2-D, no dilation, no groups, no ceil_mode. Every rewrite is exact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from isthmus.kernels import conv_like_weight
from isthmus.targets.hls4ml.kernels import constant_source

if TYPE_CHECKING:
    from isthmus.graph import QuantNode


def two_axes(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """strides, pads, dilations, kernel_shape of a 1-D operator as those of a 2-D one of height 1; 2-D ones as they are."""
    result = dict(attributes)
    for name in ("strides", "dilations", "kernel_shape"):
        values = [int(value) for value in attributes.get(name) or []]
        result[name] = [1, *values] if len(values) == 1 else values
    pads = [int(value) for value in attributes.get("pads") or []]
    result["pads"] = [0, pads[0], 0, pads[1]] if len(pads) == 2 else pads
    return result


def is_depthwise(node: QuantNode) -> bool:
    """One filter a channel: what hls4ml has as DepthwiseConv2D. Other groups become a dense kernel with zeros."""
    assert node.weight is not None
    group = int(node.attributes["group"])
    return group > 1 and node.weight.shape[0] == group and node.weight.shape[1] == 1


def dense_kernel(values: np.ndarray, dilations: Sequence[int], group: int) -> np.ndarray:
    """Filters [out, in/group, h, w] -> [out, in, h', w'] with zeros between dilated elements and outside each filter's group.

    hls4ml's ONNX front end rejects groups; dilation it reads but then generates line buffers without it.
    """
    filters, depth, height, width = values.shape
    spread = np.zeros((filters, depth, (height - 1) * dilations[0] + 1, (width - 1) * dilations[1] + 1), values.dtype)
    spread[:, :, :: dilations[0], :: dilations[1]] = values
    if group == 1:
        return spread
    dense = np.zeros((filters, depth * group, *spread.shape[2:]), values.dtype)
    share = filters // group
    for index in range(group):
        dense[index * share : (index + 1) * share, index * depth : (index + 1) * depth] = spread[index * share : (index + 1) * share]
    return dense


def as_convolution(node: QuantNode) -> QuantNode:
    """A ConvTranspose as the Conv, without stride and padding, that reads `stuffed_places`: the kernel turned around, a scale a filter."""
    assert node.weight is not None and node.weight_scale is not None
    group = int(node.attributes["group"])
    rows = conv_like_weight(node.weight, group)
    scale = np.tile(node.weight_scale, group) if node.weight_scale.size > 1 else node.weight_scale
    rank = node.weight.ndim - 2
    attributes = {"strides": [1] * rank, "pads": [0] * (2 * rank), "dilations": node.attributes["dilations"], "group": group}
    return replace(node, op="Conv", weight=np.flip(rows, axis=tuple(range(2, 2 + rank))), weight_scale=scale, attributes=attributes)


def stuffed_places(node: QuantNode, source: Sequence[int], target: Sequence[int]) -> np.ndarray:
    """What that Conv reads, as places (rows, columns, channels) in the HLS array of `source`: zeros between its values and around them."""
    attributes = two_axes(node.attributes)
    assert node.weight is not None
    spaces = [[1] * (4 - len(shape)) + [int(extent) for extent in shape[2:]] for shape in (source, target)]
    kernel = [1] * (4 - node.weight.ndim) + [int(extent) for extent in node.weight.shape[2:]]
    lines = []
    for axis in range(2):
        reach = (kernel[axis] - 1) * attributes["dilations"][axis]
        position = np.arange(spaces[1][axis] + reach) - (reach - attributes["pads"][axis])
        index, rest = position // attributes["strides"][axis], position % attributes["strides"][axis]
        lines.append(np.where((rest == 0) & (index >= 0) & (index < spaces[0][axis]), index, -1))
    rows, columns, channels = lines[0][:, None, None], lines[1][None, :, None], np.arange(source[1])[None, None, :]
    places = (rows * spaces[0][1] + columns) * source[1] + channels
    return np.where((rows >= 0) & (columns >= 0), places, constant_source(np.array(0)))


@dataclass(frozen=True)
class PoolWindow:
    """A 2-D pool without ceil_mode: `pads` reach as far as the last window does."""

    kernel: list[int]
    strides: list[int]
    pads: list[int]
    counts_padding: bool
    overhang: bool  # ceil_mode hangs the last window over the padding: those cells exist only here


def pool_window(node: QuantNode, source: Sequence[int], target: Sequence[int]) -> PoolWindow:
    """The window of a MaxPool, AveragePool or GlobalAveragePool from `source` to `target` shape (the form's, NCHW or NCW)."""
    if node.op == "GlobalAveragePool":
        kernel = [1] * (4 - len(source)) + [int(extent) for extent in source[2:]]
        return PoolWindow(kernel, list(kernel), [0, 0, 0, 0], False, False)
    attributes = two_axes(node.attributes)
    kernel, strides, pads = attributes["kernel_shape"], attributes["strides"], list(attributes["pads"])
    space = [[1] * (4 - len(shape)) + [int(extent) for extent in shape[2:]] for shape in (source, target)]
    overhang = False
    for axis in range(2):
        needed = (space[1][axis] - 1) * strides[axis] + kernel[axis] - space[0][axis] - pads[axis]
        overhang = overhang or needed > pads[axis + 2]
        pads[axis + 2] = max(pads[axis + 2], needed)
    return PoolWindow(kernel, strides, pads, bool(attributes.get("count_include_pad", 0)) and any(pads), overhang)


def streams_natively(window: PoolWindow) -> bool:
    """Whether hls4ml's own pool of a stream is right: with overlap or padding it stops at an assertion or computes something else."""
    return not any(window.pads) and window.kernel == window.strides
