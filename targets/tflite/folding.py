# SPDX-License-Identifier: Apache-2.0
"""Strided convolutions of few channels: blocks of pixels become channels, exactly.

XNNPACK's int8 kernels take the channels of one kernel cell four (ARM with dot product) or eight (ARM without, x86) at a time and fill the rest with
zeros: a network's first layer, with one or three channels, mostly multiplies those. Windows that advance by whole blocks can be read from
SPACE_TO_DEPTH's result instead: the same sums from fewer, fuller cells.
"""

from __future__ import annotations

import numpy as np

from isthmus.graph import QuantNode
from isthmus.targets.tflite.lowering import Lowering, Placed
from isthmus.targets.tflite.windows import Pair, Windows

LANES = (4, 8)
MOST_GROWTH = 4 / 3  # of the weights, by the zeros that fill the kernel's last blocks: an engine that fills no lanes multiplies them


def worth_folding(node: QuantNode, seen: Windows, source: Placed, out: Pair) -> bool:
    """Never more work for any count of lanes, and less for one of them."""
    block = seen.strides[0]
    if node.weight_scale is None or block < 2 or seen.strides[1] != block or seen.dilations != (1, 1) or node.attributes["group"] != 1:
        return False
    _, *space, channels = source.shape
    if any(extent < before + begin for extent, before, begin in zip(_extents(seen, out), space, seen.begins, strict=True)):
        return False  # cells behind the last window, which no PAD cuts off
    cells, blocks, inside = int(np.prod(seen.kernel)), int(np.prod(_kernel(seen))), channels * block * block
    before_after = [(cells * _blocks(channels, lanes) * lanes, blocks * _blocks(inside, lanes) * lanes) for lanes in LANES]
    fewer = all(after <= before for before, after in before_after) and any(after < before for before, after in before_after)
    return fewer and blocks * inside <= MOST_GROWTH * cells * channels


def fold(lowering: Lowering, node: QuantNode, source: Placed, weight: np.ndarray, seen: Windows, out: Pair) -> tuple[Placed, np.ndarray, Windows]:
    """The same convolution over blocks: input, weights [out, height, width, in], windows. `weight` has that order, too; `source` is not padded yet."""
    block, kernel = seen.strides[0], _kernel(seen)
    batch, height, width, channels = source.shape
    rows, columns = _extents(seen, out)
    ends = (rows - height - seen.begins[0], columns - width - seen.begins[1])
    if any(seen.begins) or any(ends):
        source = lowering.pad(source, f"{node.name}/padded", seen.begins, ends, like=node.inputs[0])
    folded = lowering.scratch(f"{node.name}/blocks", (batch, rows // block, columns // block, block * block * channels), node.inputs[0])
    lowering.writer.operator("SPACE_TO_DEPTH", 2, [source.index], [folded.index], "SpaceToDepthOptions", blockSize=block)
    filled = np.zeros((len(weight), kernel[0] * block, kernel[1] * block, channels), weight.dtype)
    filled[:, : seen.kernel[0], : seen.kernel[1]] = weight
    cells = filled.reshape(len(weight), kernel[0], block, kernel[1], block, channels).transpose(0, 1, 3, 2, 4, 5)
    return folded, cells.reshape(len(weight), *kernel, -1), Windows(kernel, (1, 1), (1, 1), (0, 0), (0, 0), "VALID")


def _kernel(seen: Windows) -> Pair:
    """The kernel's extents in blocks."""
    return _blocks(seen.kernel[0], seen.strides[0]), _blocks(seen.kernel[1], seen.strides[1])


def _extents(seen: Windows, out: Pair) -> Pair:
    """What the windows over blocks reach of the padded input."""
    rows, columns = ((count - 1 + cells) * stride for count, cells, stride in zip(out, _kernel(seen), seen.strides, strict=True))
    return rows, columns


def _blocks(count: int, block: int) -> int:
    return -(-count // block)
