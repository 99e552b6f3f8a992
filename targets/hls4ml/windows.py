# SPDX-License-Identifier: Apache-2.0
"""Kernels and pooling windows as hls4ml computes them rightly: always 2-D, no dilation, no groups, no ceil_mode. Every rewrite is exact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

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
