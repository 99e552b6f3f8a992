# SPDX-License-Identifier: Apache-2.0
"""Integer arithmetic in numpy: exact accumulators, one rounding. What the reference computes with; shapes are NC + any number of space axes.

int8 products are summed in float32 where the sum provably stays below 2^24 and in float64 otherwise: both are exact integers
there, and matrix products in floating point run on BLAS, which integer ones do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np

from isthmus.resampling import linear_taps, nearest_indices

EXACT_FLOAT32 = 2**24
COLUMNS_BYTES = 32 * 2**20
INT8_MIN, INT8_MAX = -128, 127


def requantise(accumulator: np.ndarray, multiplier: np.ndarray | float, zero_point: int, clamp: tuple[int, int]) -> np.ndarray:
    """int8 = clamp(round_half_even(accumulator * multiplier) + zero_point), in float64: exact where the multiplier is a power of two.

    A float32 accumulator (whole numbers below 2^24) stays float32 for powers of two, which is as exact and half the memory.
    """
    factor = np.asarray(multiplier, np.float64)
    narrow = accumulator.dtype == np.float32 and bool((np.frexp(factor)[0] == 0.5).all()) and bool((factor < 2.0**64).all())
    dtype = np.float32 if narrow else np.float64
    steps = np.atleast_1d(np.multiply(accumulator, factor.astype(dtype), dtype=dtype))
    np.rint(steps, out=steps)
    steps += dtype(zero_point)
    np.clip(steps, clamp[0], clamp[1], out=steps)
    return steps.astype(np.int8).reshape(np.broadcast_shapes(np.shape(accumulator), np.shape(multiplier)))


def _worst(weight: np.ndarray, axis: int, zero_point: int) -> int:
    """The largest sum of products any input can give; `axis` is the weight's output axis."""
    others = tuple(other for other in range(weight.ndim) if other != axis)
    return int(np.abs(weight.astype(np.int64)).sum(axis=others).max(initial=0)) * max(INT8_MAX - zero_point, zero_point - INT8_MIN)


def _exact_dtype(weight: np.ndarray, axis: int, zero_point: int) -> type[np.floating]:
    """float32 where no partial sum of products, whatever the input, reaches 2^24."""
    return np.float32 if _worst(weight, axis, zero_point) < EXACT_FLOAT32 else np.float64


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
    """x int8 (N, C, *space), weight int8 (M, C/group, *kernel), bias int32 (M) -> accumulators (N, M, *out), exact whole numbers in floating point.

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
    result = np.empty((len(x), filters, *out), dtype)
    for start in range(0, len(x), step):
        part = padded[start : start + step]
        total = np.matmul(grouped, _columns(part, kernel, out, strides, dilations, group))
        result[start : start + step] = total.reshape(filters, len(part), *out).swapaxes(0, 1)
    return _with_bias(result, weight, 0, zero_point, None if bias is None else bias.reshape(1, -1, *([1] * len(out))))


def _with_bias(total: np.ndarray, weight: np.ndarray, axis: int, zero_point: int, bias: np.ndarray | None) -> np.ndarray:
    """Adds the bias in float32 where the sum still stays below 2^24, in float64 otherwise."""
    if bias is None:
        return total
    if total.dtype == np.float32 and _worst(weight, axis, zero_point) + int(np.abs(bias.astype(np.int64)).max(initial=0)) < EXACT_FLOAT32:
        total += bias.astype(np.float32)
        return total
    wide: np.ndarray = total.astype(np.float64) + bias
    return wide


def _columns(padded: np.ndarray, kernel: Sequence[int], out: Sequence[int], strides: Sequence[int], dilations: Sequence[int], group: int) -> np.ndarray:
    """What each output position sees (group, depth * kernel, samples * positions): a convolution becomes one matrix product a group.

    One product for all samples: small ones lose their time in BLAS's threads waiting for each other.
    """
    batch, channels = padded.shape[:2]
    columns = np.empty((group, channels // group, int(np.prod(kernel)), batch, int(np.prod(out))), padded.dtype)
    for index, offset in enumerate(product(*(range(extent) for extent in kernel))):
        seen = _window(padded, offset, out, strides, dilations).reshape(batch, group, channels // group, -1)
        columns[:, :, index] = seen.transpose(1, 2, 0, 3)
    return columns.reshape(group, -1, batch * columns.shape[-1])


def conv_like_weight(weight: np.ndarray, group: int) -> np.ndarray:
    """ConvTranspose's weight [in, out/group, *kernel] with the axes of Conv's, [out, in/group, *kernel]: one row an output channel."""
    depth, filters = weight.shape[0] // group, weight.shape[1]
    return weight.reshape(group, depth, filters, *weight.shape[2:]).swapaxes(1, 2).reshape(group * filters, depth, *weight.shape[2:])


def conv_transpose_accumulate(
    x: np.ndarray,
    zero_point: int,
    weight: np.ndarray,
    bias: np.ndarray | None,
    out: Sequence[int],
    *,
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
    group: int,
) -> np.ndarray:
    """x int8 (N, C, *space), weight int8 (C, M/group, *kernel), bias int32 (M) -> accumulators (N, M, *out), exact, as float64 integers.

    Each input value times the whole kernel is added into the output at its own place; `pads` are then cut off. Source: ONNX ConvTranspose.
    """
    rows = conv_like_weight(weight, group)
    dtype = _exact_dtype(rows, 0, zero_point)
    kernel, space, filters = weight.shape[2:], x.shape[2:], rows.shape[0]
    grouped = rows.reshape(group, filters // group, rows.shape[1], -1).transpose(0, 1, 3, 2).reshape(group, -1, rows.shape[1]).astype(dtype)
    reach = [(n - 1) * s + (k - 1) * d + 1 for n, k, s, d in zip(space, kernel, strides, dilations, strict=True)]
    full = [max(extent, begin + n) for extent, begin, n in zip(reach, pads, out, strict=False)]
    step = max(1, COLUMNS_BYTES // max(1, grouped.shape[1] * group * int(np.prod(space)) * np.dtype(dtype).itemsize))
    parts = []
    for start in range(0, len(x), step):
        part = x[start : start + step]
        values = (part.astype(dtype) - dtype(zero_point)).reshape(len(part), group, rows.shape[1], -1)
        products = np.matmul(grouped, values).reshape(len(part), filters, -1, *space)
        total = np.zeros((len(part), filters, *full), dtype)
        for index, offset in enumerate(product(*(range(extent) for extent in kernel))):
            place = _window(total, offset, space, strides, dilations)
            place += products[:, :, index]
        parts.append(total[(slice(None), slice(None), *(slice(begin, begin + n) for begin, n in zip(pads, out, strict=False)))].astype(np.float64))
    result = np.concatenate(parts)
    return result if bias is None else result + bias.reshape(1, -1, *([1] * len(out)))


def product_limit(depth: int, zero_points: Sequence[int]) -> int:
    """The largest magnitude a sum of `depth` products of two int8 activations can reach."""
    return depth * int(np.prod([max(INT8_MAX - zero, zero - INT8_MIN) for zero in zero_points], dtype=np.int64))


def batch_matmul_accumulate(a: np.ndarray, b: np.ndarray, zero_points: Sequence[int]) -> np.ndarray:
    """a int8 (N, ..., R, K), b int8 (N, ..., K, M) -> accumulators (N, ..., R, M), exact, as float64 integers."""
    dtype: type[np.floating] = np.float32 if product_limit(a.shape[-1], zero_points) < EXACT_FLOAT32 else np.float64
    total: np.ndarray = np.matmul(a.astype(dtype) - dtype(zero_points[0]), b.astype(dtype) - dtype(zero_points[1])).astype(np.float64)
    return total


def matmul_accumulate(x: np.ndarray, zero_point: int, weight: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    """x int8 (..., K), weight int8 (K, M), bias int32 (M) -> accumulators (..., M), exact, as float64 integers."""
    dtype = _exact_dtype(weight, 1, zero_point)
    total: np.ndarray = np.matmul(x.astype(dtype) - dtype(zero_point), weight.astype(dtype)).astype(np.float64)
    return total if bias is None else total + bias


def max_pool(x: np.ndarray, out: Sequence[int], kernel: Sequence[int], strides: Sequence[int], pads: Sequence[int], dilations: Sequence[int]) -> np.ndarray:
    """x int8 (N, C, *space) -> int8 (N, C, *out). Padding lies below every input, so it never wins. `out` decides ceil_mode."""
    padded = _pad(x, pads_to_fill(x.shape[2:], out, kernel, strides, pads, dilations), INT8_MIN)
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
    filled = pads_to_fill(x.shape[2:], out, kernel, strides, pads, dilations)
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


def pads_to_fill(
    space: Sequence[int], out: Sequence[int], kernel: Sequence[int], strides: Sequence[int], pads: Sequence[int], dilations: Sequence[int]
) -> list[int]:
    """`pads` with the ends grown so that the last window lies inside (ceil_mode lets it hang over)."""
    rank = len(kernel)
    needed = [(n - 1) * s + (k - 1) * d + 1 for n, k, s, d in zip(out, kernel, strides, dilations, strict=True)]
    ends = [max(pads[axis + rank], needed[axis] - space[axis] - pads[axis]) for axis in range(rank)]
    return [*pads[:rank], *ends]


def resize_nearest(x: np.ndarray, sizes: Sequence[int], transform: str, mode: str) -> np.ndarray:
    """x int8 (N, C, *space) -> int8 (N, C, *sizes)."""
    for axis, size in enumerate(sizes, 2):
        if x.shape[axis] != size:
            x = np.take(x, nearest_indices(x.shape[axis], size, transform, mode), axis=axis)
    return x


def resize_linear(x: np.ndarray, zero_point: int, sizes: Sequence[int], transform: str) -> tuple[np.ndarray, int]:
    """x int8 (N, C, *space) -> (weighted sums of q - zero_point as float64 integers (N, C, *sizes), what to divide them by)."""
    total, divisor = x.astype(np.float64) - zero_point, 1
    for axis, size in enumerate(sizes, 2):
        if x.shape[axis] != size:
            taps = linear_taps(x.shape[axis], size, transform)
            weight = taps.weight.astype(np.float64).reshape(-1, *([1] * (x.ndim - 1 - axis)))
            total = np.take(total, taps.lower, axis=axis) * (taps.denominator - weight) + np.take(total, taps.upper, axis=axis) * weight
            divisor *= taps.denominator
    return total, divisor


def depth_to_space(x: np.ndarray, block: int, mode: str) -> np.ndarray:
    """x (N, C, H, W) -> (N, C / block^2, H * block, W * block). DCR: the block's place is the outer part of the channel, CRD: the inner one."""
    batch, depth, height, width = x.shape
    channels = depth // (block * block)
    if mode == "DCR":
        moved = x.reshape(batch, block, block, channels, height, width).transpose(0, 3, 4, 1, 5, 2)
    else:
        moved = x.reshape(batch, channels, block, block, height, width).transpose(0, 1, 4, 2, 5, 3)
    return moved.reshape(batch, channels, height * block, width * block)


def space_to_depth(x: np.ndarray, block: int) -> np.ndarray:
    """x (N, C, H, W) -> (N, C * block^2, H / block, W / block): the inverse of DCR."""
    batch, channels, height, width = x.shape
    moved = x.reshape(batch, channels, height // block, block, width // block, block).transpose(0, 3, 5, 1, 2, 4)
    return moved.reshape(batch, channels * block * block, height // block, width // block)
