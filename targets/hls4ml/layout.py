# SPDX-License-Identifier: Apache-2.0
"""Where an element of a form tensor stands in the HLS arrays: one sample at a time, channels last, 1-D as 2-D of height 1."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# The form's layout of a border tensor, as the artifact has it.
BORDER_LAYOUTS = {2: "NC", 3: "NWC", 4: "NHWC"}
RANKS = frozenset(BORDER_LAYOUTS)


def hls_shape(shape: Sequence[int]) -> list[int]:
    """NCHW -> [1, H, W, C], NCW -> [1, 1, W, C] (hls4ml's ONNX front end mixes up the axes of 1-D pools), NC -> [1, C]."""
    if len(shape) == 4:
        return [1, shape[2], shape[3], shape[1]]
    return [1, 1, shape[2], shape[1]] if len(shape) == 3 else [1, shape[1]]


def border_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape in the order of `BORDER_LAYOUTS`, whole batch."""
    return (shape[0], *shape[2:], shape[1])


def element_order(shape: Sequence[int]) -> np.ndarray:
    """Position in the HLS array -> position in the form's tensor (both flat, one sample)."""
    numbers = np.arange(int(np.prod(shape[1:]))).reshape(tuple(shape[1:]))
    return np.moveaxis(numbers, 0, -1).reshape(-1)


def keeps_order(shape: Sequence[int]) -> bool:
    """Whether the HLS array holds one sample in the form's own order."""
    order = element_order(shape)
    return bool((order == np.arange(order.size)).all())


def hls_axis(axis: int, rank: int) -> int:
    """A form axis (1..rank-1) as an axis of `hls_shape`."""
    if rank == 2:
        return axis
    return 3 if axis == 1 else axis - 1 + (4 - rank)
