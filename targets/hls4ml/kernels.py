# SPDX-License-Identifier: Apache-2.0
"""One call of a function of `hls_code`: its name and the struct that says what this layer's tables, places or weights are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from isthmus.resampling import Taps
from isthmus.targets.hls4ml.fixed import INT8_HIGH, INT8_LOW, Fixed
from isthmus.targets.hls4ml.layout import grid

NUMBERS_A_LINE = 24
NOWHERE = -(2**29)  # three of them still fit an int
INT32_LIMIT = 2**31


@dataclass(frozen=True)
class Kernel:
    """`function` of the HLS code; `body`: the members of its config struct."""

    function: str
    body: str


def constant_source(steps: np.ndarray) -> np.ndarray:
    """How a source array says "this constant": below 0."""
    coded: np.ndarray = -129 - steps.astype(np.int64)
    return coded


def table_kernel(entries: np.ndarray, size: int) -> Kernel:
    """`entries` int8 (256,) or (channels, 256), entry q + 128 for input q, as `isthmus.tables` gives them."""
    by_bits = np.roll(np.atleast_2d(entries), 128, axis=1)  # the input's bits, read without a sign, are the address
    channels = len(by_bits)
    look_up = _function("int", "entry", "unsigned channel, unsigned bits", [_array("signed char", "entries", by_bits)], "entries[channel * 256 + bits]")
    return Kernel("isthmus_table", _sizes(n_in=size, n_channels=channels) + look_up)


def copy_kernel(size: int) -> Kernel:
    return Kernel("isthmus_copy", _sizes(n_in=size))


def move_kernel(sources: np.ndarray, size: int) -> Kernel:
    """`sources` (rows, columns, channels): for each value of the result its place in the data, or a `constant_source`."""
    return Kernel("isthmus_move", _sizes(n_in=size, n_out=sources.size) + _grid(sources) + _source(sources))


def join_kernel(sources: np.ndarray, first: int, second: int) -> Kernel:
    """As `move_kernel`, from two tensors: places count on through the second."""
    return Kernel("isthmus_join", _sizes(n_in1=first, n_in2=second, n_out=sources.size) + _grid(sources) + _source(sources))


def product_kernel(batches: int, rows: int, depth: int, columns: int, accumulator: Fixed) -> Kernel:
    sizes = _sizes(n_in1=batches * rows * depth, n_in2=batches * depth * columns, n_out=batches * rows * columns)
    extents = _sizes(batches=batches, rows=rows, depth=depth, columns=columns)
    return Kernel("isthmus_product", f"{sizes}{extents}    typedef {accumulator} accum_t;\n")


def interpolate_kernel(rows: Taps, columns: Taps, in_shape: Sequence[int], shift: int) -> Kernel:
    """Linear in both axes; `shift`: the result has 2^shift times the input's steps to a unit."""
    _, in_columns, channels = grid(in_shape)
    factor, divisor = 2 ** max(shift, 0), rows.denominator * columns.denominator * 2 ** max(-shift, 0)
    largest = max(INT8_HIGH, -INT8_LOW) * rows.denominator * columns.denominator * factor + 2 * divisor
    sizes = _sizes(
        n_in=int(np.prod(in_shape[1:])),
        n_out=len(rows.lower) * len(columns.lower) * channels,
        rows=len(rows.lower),
        columns=len(columns.lower),
        channels=channels,
        in_columns=in_columns,
    )
    body = f"{sizes}    typedef {'int' if largest < INT32_LIMIT else 'long long'} accum_t;\n"
    body += f"    static const accum_t factor = {factor};\n    static const accum_t divisor = {divisor};\n"
    for name, taps in (("row", rows), ("column", columns)):
        places = np.stack([taps.lower, taps.upper], axis=1)
        weights = np.stack([taps.denominator - taps.weight, taps.weight], axis=1)
        body += _function("unsigned", f"{name}_source", "unsigned place, unsigned side", [_array("unsigned", "sources", places)], "sources[place * 2 + side]")
        body += _function("int", f"{name}_weight", "unsigned place, unsigned side", [_array("int", "weights", weights)], "weights[place * 2 + side]")
    return Kernel("isthmus_interpolate", body)


def _sizes(**numbers: int) -> str:
    return "".join(f"    static const unsigned {name} = {number};\n" for name, number in numbers.items())


def _grid(sources: np.ndarray) -> str:
    rows, columns, channels = sources.shape
    return _sizes(rows=rows, columns=columns, channels=channels)


def _source(sources: np.ndarray) -> str:
    """source(row, column, channel): a sum of one number an axis where that says it all, else one table of every place."""
    parameters = "unsigned row, unsigned column, unsigned channel"
    parts = _separated(sources)
    if parts is None:
        _, columns, channels = sources.shape
        everywhere = f"places[(row * {columns} + column) * {channels} + channel]"
        return _function("int", "source", parameters, [_array("int", "places", sources)], everywhere)
    axes, fill = parts
    arrays = [_array("int", name, values) for name, values in zip(("rows_", "columns_", "channels_"), axes, strict=True)]
    total = "rows_[row] + columns_[column] + channels_[channel]"
    return _function("int", "source", parameters, arrays, total if fill is None else f"{total} < 0 ? {fill} : {total}")


def _separated(sources: np.ndarray) -> tuple[list[np.ndarray], int | None] | None:
    """Numbers by row, column and channel whose sum is the place, `NOWHERE` where an entry's row, column or channel holds the one constant."""
    inside = sources >= 0
    outside = np.unique(sources[~inside])
    if not inside.any() or outside.size > 1:
        return None
    first = tuple(int(index) for index in np.argwhere(inside)[0])
    lines = [sources[:, first[1], first[2]], sources[first[0], :, first[2]], sources[first[0], first[1], :]]
    base = int(sources[first])
    axes = [np.where(line >= 0, line - (base if axis else 0), NOWHERE) for axis, line in enumerate(lines)]
    total = axes[0][:, None, None] + axes[1][None, :, None] + axes[2][None, None, :]
    # A row begins at its place in the first column, which can be below 0 only where it is nowhere.
    if not np.array_equal(total >= 0, inside) or not np.array_equal(total[inside], sources[inside]):
        return None
    return axes, int(outside[0]) if outside.size else None


def _array(kind: str, name: str, values: np.ndarray) -> str:
    flat = [str(int(value)) for value in values.reshape(-1)]
    lines = [", ".join(flat[start : start + NUMBERS_A_LINE]) for start in range(0, len(flat), NUMBERS_A_LINE)]
    return f"        static const {kind} {name}[{len(flat)}] = {{\n            " + ",\n            ".join(lines) + "};\n"


def _function(kind: str, name: str, parameters: str, arrays: Sequence[str], result: str) -> str:
    return f"    static {kind} {name}({parameters}) {{\n        #pragma HLS INLINE\n{''.join(arrays)}        return {result};\n    }}\n"
