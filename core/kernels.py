# SPDX-License-Identifier: Apache-2.0
"""Integer arithmetic in numpy: exact accumulators, one rounding. What the reference computes with; shapes are NC + any number of space axes.

int8 products are summed in float32 where the sum provably stays below 2^24 and in float64 otherwise: both are exact integers
there, and matrix products in floating point run on BLAS, which integer ones do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np

EXACT_FLOAT32 = 2**24
COLUMNS_BYTES = 32 * 2**20
INT8_MIN, INT8_MAX = -128, 127


def requantise(accumulator: np.ndarray, multiplier: np.ndarray | float, zero_point: int, clamp: tuple[int, int]) -> np.ndarray:
    """int8 = clamp(round_half_even(accumulator * multiplier) + zero_point), in float64: exact where the multiplier is a power of two."""
    steps = np.rint(np.asarray(accumulator, np.float64) * multiplier) + zero_point
    rounded: np.ndarray = np.clip(steps, clamp[0], clamp[1]).astype(np.int8)
    return rounded


def _exact_dtype(weight: np.ndarray, axis: int, zero_point: int) -> type[np.floating]:
    """float32 where no partial sum of products, whatever the input, reaches 2^24; `axis` is the weight's output axis."""
    others = tuple(other for other in range(weight.ndim) if other != axis)
    worst = int(np.abs(weight.astype(np.int64)).sum(axis=others).max(initial=0)) * max(INT8_MAX - zero_point, zero_point - INT8_MIN)
    return np.float32 if worst < EXACT_FLOAT32 else np.float64


def _pad(x: np.ndarray, pads: Sequence[int], value: float) -> np.ndarray:
    """Pads the space axes; `pads` in ONNX order: every begin, then every end."""
    rank = len(pads) // 2
    if not any(pads):
        return x
    return np.pad(x, ((0, 0), (0, 0), *((pads[axis], pads[axis + rank]) for axis in range(rank))), constant_values=value)


def _window(x: np.ndarray, offset: Sequence[int], out: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> np.ndarray:
    """The values that kernel element `offset` sees, one per output position: a view."""
    slices = tuple(slice(o * d, o * d + (n - 1) * s + 1, s) for o, n, s, d in zip(offset, out, strides, dilations, strict=True))
    return x[(slice(None), slice(None), *slices)]


def conv_accumulate(
    x: np.ndarray,
    zero_point: int,
    weight: np.ndarray,
    bias: np.ndarray | None,
    *,
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
    group: int,
) -> np.ndarray:
    """x int8 (N, C, *space), weight int8 (M, C/group, *kernel), bias int32 (M) -> accumulators (N, M, *out), exact, as float64 integers.

    Padding is real zero, that is the zero point. Source of the operator: ONNX Conv.
    """
    kernel = weight.shape[2:]
    dtype = _exact_dtype(weight, 0, zero_point)
    padded = _pad(x.astype(dtype) - dtype(zero_point), pads, 0.0)
    out = [(extent - ((k - 1) * d + 1)) // s + 1 for extent, k, s, d in zip(padded.shape[2:], kernel, strides, dilations, strict=True)]
    filters, depth = weight.shape[:2]
    grouped = weight.reshape(group, filters // group, depth * int(np.prod(kernel))).astype(dtype)
    per_sample = group * grouped.shape[2] * int(np.prod(out)) * np.dtype(dtype).itemsize
    step = max(1, COLUMNS_BYTES // max(1, per_sample))
    parts = [np.matmul(grouped, _columns(padded[start : start + step], kernel, out, strides, dilations, group)) for start in range(0, len(x), step)]
    result = np.concatenate(parts).reshape(len(x), filters, *out).astype(np.float64)
    return result if bias is None else result + bias.reshape(1, -1, *([1] * len(out)))


def _columns(padded: np.ndarray, kernel: Sequence[int], out: Sequence[int], strides: Sequence[int], dilations: Sequence[int], group: int) -> np.ndarray:
    """What each output position sees (N, group, depth * kernel, positions): a convolution becomes one matrix product a sample and group."""
    batch, channels = padded.shape[:2]
    depth = channels // group
    columns = np.empty((batch, group, depth, int(np.prod(kernel)), int(np.prod(out))), padded.dtype)
    for index, offset in enumerate(product(*(range(extent) for extent in kernel))):
        columns[:, :, :, index] = _window(padded, offset, out, strides, dilations).reshape(batch, group, depth, -1)
    return columns.reshape(batch, group, -1, columns.shape[-1])


def matmul_accumulate(x: np.ndarray, zero_point: int, weight: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    """x int8 (..., K), weight int8 (K, M), bias int32 (M) -> accumulators (..., M), exact, as float64 integers."""
    dtype = _exact_dtype(weight, 1, zero_point)
    total: np.ndarray = np.matmul(x.astype(dtype) - dtype(zero_point), weight.astype(dtype)).astype(np.float64)
    return total if bias is None else total + bias


def max_pool(x: np.ndarray, out: Sequence[int], kernel: Sequence[int], strides: Sequence[int], pads: Sequence[int], dilations: Sequence[int]) -> np.ndarray:
    """x int8 (N, C, *space) -> int8 (N, C, *out). Padding lies below every input, so it never wins. `out` decides ceil_mode."""
    padded = _pad(x, _pads_to_fill(x.shape[2:], out, kernel, strides, pads, dilations), INT8_MIN)
    windows = (_window(padded, offset, out, strides, dilations) for offset in product(*(range(extent) for extent in kernel)))
    result = next(windows).copy()
    for window in windows:
        np.maximum(result, window, out=result)
    return result


def average_pool(
    x: np.ndarray,
    zero_point: int,
    out: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
    count_include_pad: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """x int8 (N, C, *space) -> (sums of q - zero_point (N, C, *out), cells counted (1, 1, *out)).

    A cell that only ceil_mode added beyond the padding is never counted; a padded one is where `count_include_pad` says so.
    """
    rank = len(kernel)
    filled = _pads_to_fill(x.shape[2:], out, kernel, strides, pads, dilations)
    values = _pad(x.astype(np.float64) - zero_point, filled, 0.0)
    cells = np.ones((1, 1, *x.shape[2:]))
    if count_include_pad:
        cells = _pad(_pad(cells, pads, 1.0), [*([0] * rank), *(full - given for full, given in zip(filled[rank:], pads[rank:], strict=True))], 0.0)
    else:
        cells = _pad(cells, filled, 0.0)
    total, count = np.zeros((*x.shape[:2], *out)), np.zeros((1, 1, *out))
    for offset in product(*(range(extent) for extent in kernel)):
        total += _window(values, offset, out, strides, dilations)
        count += _window(cells, offset, out, strides, dilations)
    return total, count


def _pads_to_fill(
    space: Sequence[int], out: Sequence[int], kernel: Sequence[int], strides: Sequence[int], pads: Sequence[int], dilations: Sequence[int]
) -> list[int]:
    """`pads` with the ends grown so that the last window lies inside (ceil_mode lets it hang over)."""
    rank = len(kernel)
    needed = [(n - 1) * s + (k - 1) * d + 1 for n, k, s, d in zip(out, kernel, strides, dilations, strict=True)]
    ends = [max(pads[axis + rank], needed[axis] - space[axis] - pads[axis]) for axis in range(rank)]
    return [*pads[:rank], *ends]
