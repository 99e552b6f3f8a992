# SPDX-License-Identifier: Apache-2.0
"""What a host does around a denoiser: pixels in, pixels out, images of any size, large ones in tiles. numpy alone, as a device has no torch.

The rule of the exact seam. A network of convolutions and 2x2 pools whose sizes are multiples of `multiple` gives the same numbers wherever it starts, as
long as it starts at a multiple; so an output pixel is that of the whole image if it lies at least `margin` pixels (what it sees to each side) from every
edge of the tile that is no edge of the image. `tiled` keeps exactly these. In integers the result is equal; in float32 up to the order of sums.
Networks that see further than a tile reaches (U2Net, ResU2Net) have no such rule: `blended` fades their tiles into each other.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np

from isthmus.errors import IsthmusError

Run = Callable[[np.ndarray], np.ndarray]  # (1, 1, tile, tile) in 0..1 as the same
OVERLAP = 32  # pixels that two blended tiles share


def network_input(pixels: np.ndarray) -> np.ndarray:
    """uint8 (H, W), or (H, W, 3) as luma (Rec. 601), as float32 (H, W) in 0..1."""
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] != 3) or 0 in pixels.shape:
        raise IsthmusError(f"an image is uint8 (height, width) or (height, width, 3), found {pixels.dtype}{list(pixels.shape)}")
    grey = pixels if pixels.ndim == 2 else pixels @ np.array([0.299, 0.587, 0.114])
    return (grey / 255).astype(np.float32)


def pixels_of(image: np.ndarray) -> np.ndarray:
    """A network's output, float (H, W), as uint8: clipped to 0..1, rounded."""
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)


def padded(image: np.ndarray, multiple: int, least: int = 1) -> np.ndarray:
    """(H, W) enlarged to the right and below, to multiples and at least `least`, by its mirror image; crop the result with `[:H, :W]`."""
    target = [-(-max(extent, least) // multiple) * multiple for extent in image.shape]
    return np.pad(image, [(0, wanted - extent) for wanted, extent in zip(target, image.shape, strict=True)], mode="symmetric")


def tiled(image: np.ndarray, run: Run, tile: int, margin: int, multiple: int) -> np.ndarray:
    """`run` on the whole of an image (H, W), tile by tile, without a seam: see the rule above. An image that fits one tile is one.

    Raises `IsthmusError` where a tile is no multiple, or has no pixel that is right on all sides.
    """
    if tile % multiple or 2 * margin + multiple > tile:
        raise IsthmusError(
            f"tiles of {tile} pixels: expected a multiple of {multiple} of at least {-(-(2 * margin + multiple) // multiple) * multiple},"
            f" as the network sees {margin} pixels to each side; take a larger tile, or blend tiles"
        )
    whole = padded(image, multiple, tile)
    result = np.empty_like(whole)
    for (top, first_row, last_row), (left, first_column, last_column) in product(*(_spans(extent, tile, margin, multiple) for extent in whole.shape)):
        found = _run(run, whole[top : top + tile, left : left + tile])
        result[first_row:last_row, first_column:last_column] = found[first_row - top : last_row - top, first_column - left : last_column - left]
    return result[: image.shape[0], : image.shape[1]]


def blended(image: np.ndarray, run: Run, tile: int, overlap: int = OVERLAP) -> np.ndarray:
    """`run` tile by tile, neighbours fading into each other over `overlap` pixels by a raised cosine: near to the whole image's result, not equal to it.

    Raises `IsthmusError` where the overlap is no less than half a tile.
    """
    if not 0 < 2 * overlap < tile:
        raise IsthmusError(f"tiles of {tile} pixels cannot overlap by {overlap}: expected 1 to {(tile - 1) // 2}")
    whole = padded(image, 1, tile)
    total, weight = np.zeros(whole.shape), np.zeros(whole.shape)
    ramp = np.sin((np.arange(overlap) + 0.5) / overlap * np.pi / 2) ** 2
    window = np.concatenate([ramp, np.ones(tile - 2 * overlap), ramp[::-1]])
    fading = np.outer(window, window)
    for top, left in product(*(_starts(extent, tile, tile - overlap) for extent in whole.shape)):
        area = slice(top, top + tile), slice(left, left + tile)
        total[area] += fading * _run(run, whole[area])
        weight[area] += fading
    return (total / weight).astype(image.dtype)[: image.shape[0], : image.shape[1]]


def _run(run: Run, tile: np.ndarray) -> np.ndarray:
    return np.asarray(run(np.ascontiguousarray(tile[None, None]))).reshape(tile.shape)


def _starts(extent: int, tile: int, step: int) -> list[int]:
    """The last tile ends at the image's edge."""
    return [*range(0, extent - tile, step), extent - tile]


def _spans(extent: int, tile: int, margin: int, multiple: int) -> list[tuple[int, int, int]]:
    """Along one axis: where a tile starts, and the first and the last (exclusive) pixel that is taken from it."""
    starts = _starts(extent, tile, (tile - 2 * margin) // multiple * multiple)
    firsts = [0, *(start + margin for start in starts[1:])]
    return list(zip(starts, firsts, [*firsts[1:], extent], strict=True))
