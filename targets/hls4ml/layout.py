# SPDX-License-Identifier: Apache-2.0
"""Where an element of a form tensor stands in the HLS arrays: one sample at a time, channels last, 1-D as 2-D of height 1."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# The form's layout of a border tensor, as the artifact has it. Tensors of other ranks keep the form's order.
BORDER_LAYOUTS = {2: "NC", 3: "NWC", 4: "NHWC"}
# Ranks whose second axis is the channels.
RANKS = frozenset(BORDER_LAYOUTS)


def hls_shape(shape: Sequence[int]) -> list[int]:
    """NCHW -> [1, H, W, C], NCW -> [1, 1, W, C] (hls4ml's ONNX front end mixes up the axes of 1-D pools), NC -> [1, C].

    More axes than four have no names: [1, 1, all but the last, the last].
    """
    if len(shape) == 4:
        return [1, shape[2], shape[3], shape[1]]
    if len(shape) == 3:
        return [1, 1, shape[2], shape[1]]
    return [1, shape[1]] if len(shape) == 2 else [1, 1, int(np.prod(shape[1:-1])), shape[-1] if len(shape) > 1 else 1]


def grid(shape: Sequence[int]) -> tuple[int, int, int]:
    """(rows, columns, channels) of an HLS shape [1, H, W, C] or [1, C]."""
    rows, columns, channels = ([1, 1, *shape[1:]])[-3:]
    return rows, columns, channels


def border_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape in the order of `BORDER_LAYOUTS`, whole batch."""
    return (shape[0], *shape[2:], shape[1]) if len(shape) in RANKS else tuple(shape)


def element_order(shape: Sequence[int]) -> np.ndarray:
    """Position in the HLS array -> position in the form's tensor (both flat, one sample)."""
    numbers = np.arange(int(np.prod(shape[1:]))).reshape(tuple(shape[1:]))
    return (np.moveaxis(numbers, 0, -1) if len(shape) in RANKS else numbers).reshape(-1)


def keeps_order(shape: Sequence[int]) -> bool:
    """Whether the HLS array holds one sample in the form's own order."""
    order = element_order(shape)
    return bool((order == np.arange(order.size)).all())


def same_order(first: Sequence[int], second: Sequence[int]) -> bool:
    """Whether tensors of these shapes, the same values in the form's order, are the same HLS array."""
    return bool((element_order(first) == element_order(second)).all())


def hls_sources(sources: np.ndarray, source: Sequence[int], target: Sequence[int]) -> np.ndarray:
    """Places by form position (below 0: no place, kept) as places by HLS position: (rows, columns, channels) of `target`."""
    places = np.argsort(element_order(source))
    flat = sources.reshape(-1)
    moved = np.where(flat >= 0, places[np.maximum(flat, 0)], flat)
    return moved[element_order(target)].reshape(grid(hls_shape(target)))


def hls_axis(axis: int, rank: int) -> int:
    """A form axis (1..rank-1) as an axis of `hls_shape`."""
    if rank == 2:
        return axis
    return 3 if axis == 1 else axis - 1 + (4 - rank)
