# SPDX-License-Identifier: Apache-2.0
"""Where a convolution's or a pool's windows lie, and how TensorFlow Lite says so: SAME, VALID, or an explicit PAD in front of VALID."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from isthmus.graph import QuantNode

Pair = tuple[int, int]


@dataclass(frozen=True)
class Windows:
    """Two space axes (height, width); a 1-D operator has height 1. `begins` and `ends` are the cells that the windows really reach
    beyond the input: what ceil_mode adds is in, what no window touches is out."""

    kernel: Pair
    strides: Pair
    dilations: Pair
    begins: Pair
    ends: Pair
    padding: str  # "SAME", "VALID", or "EXPLICIT": pad first, then VALID


def plane(extents: Sequence[int], fill: int = 1) -> Pair:
    """One or two space extents as (height, width)."""
    height, width = (fill, *extents) if len(extents) == 1 else extents
    return int(height), int(width)


def windows(node: QuantNode, space: Sequence[int], out: Sequence[int]) -> Windows:
    """The windows of a Conv or pool node from input extents `space` to output extents `out`."""
    attributes = node.attributes
    rank = len(attributes["kernel_shape"])
    kernel, strides, dilations = (plane(attributes[name]) for name in ("kernel_shape", "strides", "dilations"))
    begins = plane(attributes["pads"][:rank], 0)
    before, after = plane(space), plane(out)
    reach = [(after[a] - 1) * strides[a] + (kernel[a] - 1) * dilations[a] + 1 for a in (0, 1)]
    height, width = (max(reach[a] - before[a] - begins[a], 0) for a in (0, 1))
    ends = (height, width)
    if not any(begins) and not any(ends):
        padding = "VALID"
    else:
        padding = "SAME" if all(_is_same(before[a], after[a], reach[a], strides[a], begins[a], ends[a]) for a in (0, 1)) else "EXPLICIT"
    return Windows(kernel, strides, dilations, begins, ends, padding)


def _is_same(before: int, after: int, reach: int, stride: int, begin: int, end: int) -> bool:
    """TensorFlow's SAME: ceil(input / stride) outputs, the padding split in halves, the odd cell at the end."""
    total = max(reach - before, 0)
    return after == -(-before // stride) and begin == total // 2 and end == total - total // 2
