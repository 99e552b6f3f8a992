# SPDX-License-Identifier: Apache-2.0
"""Operators that move or compare values: on uint8 as it is."""

from __future__ import annotations

import math

import numpy as np

from isthmus.graph import QuantNode
from isthmus.targets.cpu.lowering import SHIFT, Lowering

RUN_BYTES = 16  # shorter runs of bytes are not worth the way through channels last
STAY_LAST = frozenset({"MaxPool", "Relu", "Clip"})  # ONNX Runtime moves its Transposes through these, where that makes two of them vanish


def constant(w: Lowering, node: QuantNode) -> None:
    w.initialiser(node.output, (node.constants[0].astype(np.int16) + SHIFT).astype(np.uint8))


def max_pool(w: Lowering, node: QuantNode) -> None:
    w.emit("MaxPool", [node.inputs[0]], node.output, node.name, **node.attributes)


def clip(w: Lowering, node: QuantNode) -> None:
    w.clamp(node, node.inputs[0])


def reshape(w: Lowering, node: QuantNode) -> None:
    """An image that a convolution leaves channels last is flattened so for matrix products: their columns move, not the image (`weighted.columns`)."""
    source, shape = node.inputs[0], w.spec(node.output).shape
    image = w.spec(source).shape
    if _flattens_for_products(w, node) and _behind_conv(w, node, STAY_LAST):
        w.flattened_last[node.output] = image
        source = w.channels_last(source, len(image))
    w.reshaped(source, shape, node.output, node.name)


def _flattens_for_products(w: Lowering, node: QuantNode) -> bool:
    image, shape, readers = w.spec(node.inputs[0]).shape, w.spec(node.output).shape, w.graph.consumers(node.output)
    flattens = len(image) > 2 and min(image[1], math.prod(image[2:])) > 1 and shape == (image[0], math.prod(image[1:]))
    return flattens and bool(readers) and all(reader.op in ("Gemm", "MatMul") for reader in readers)


def squeeze(w: Lowering, node: QuantNode) -> None:
    """Squeeze and Unsqueeze: ONNX Runtime moves its Transposes through these, but not through a Reshape."""
    w.emit(node.op, [node.inputs[0], w.whole_numbers(f"{node.output}_axes", node.attributes["axes"])], node.output, node.name)


def concat(w: Lowering, node: QuantNode) -> None:
    w.emit("Concat", list(node.inputs), node.output, node.name, axis=node.attributes["axis"])


def split(w: Lowering, node: QuantNode) -> None:
    sizes = w.whole_numbers(f"{node.output}_sizes", node.attributes["sizes"])
    w.node("Split", [node.inputs[0], sizes], node.outputs, node.name, {"axis": node.attributes["axis"]})


def cut(w: Lowering, node: QuantNode) -> None:
    """The form's cuts are Python ranges; in ONNX an end of -1 is the last element, so one in front of the first is written as -extent - 1."""
    a, shape = node.attributes, w.spec(node.inputs[0]).shape
    ends = [end if end >= 0 else -shape[axis] - 1 for axis, end in zip(a["axes"], a["ends"], strict=True)]
    bounds = [w.whole_numbers(f"{node.output}_{part}", values) for part, values in (("starts", a["starts"]), ("ends", ends), ("axes", a["axes"]))]
    w.emit("Slice", [node.inputs[0], *bounds, w.whole_numbers(f"{node.output}_steps", a["steps"])], node.output, node.name)


def pad(w: Lowering, node: QuantNode) -> None:
    steps = int(w.spec(node.output).quantise(np.array(node.attributes["value"], np.float32))) + SHIFT
    bounds = [w.whole_numbers(f"{node.output}_pads", node.attributes["pads"]), w.constant(f"uint8_{steps}", np.array(steps, np.uint8))]
    w.emit("Pad", [node.inputs[0], *bounds], node.output, node.name)


def transpose(w: Lowering, node: QuantNode) -> None:
    w.emit("Transpose", [node.inputs[0]], node.output, node.name, perm=node.attributes["perm"])


def expand(w: Lowering, node: QuantNode) -> None:
    w.emit("Expand", [node.inputs[0], w.whole_numbers(f"{node.output}_shape", w.spec(node.output).shape)], node.output, node.name)


def gather(w: Lowering, node: QuantNode) -> None:
    indices = w.whole_numbers(f"{node.output}_indices", np.array(node.attributes["indices"], np.int64))
    w.emit("Gather", [node.inputs[0], indices], node.output, node.name, axis=node.attributes["axis"])


def depth_to_space(w: Lowering, node: QuantNode) -> None:
    """Behind a convolution channels last is 1.5 times as fast for DCR, where a block's row is one run of bytes; for CRD it is half as fast."""
    block, mode = node.attributes["blocksize"], node.attributes["mode"]
    batch, channels, height, width = w.spec(node.output).shape
    if mode == "DCR" and block * channels >= RUN_BYTES and _behind_conv(w, node):
        blocks_apart(w, node.inputs[0], (batch, height // block, width // block, channels), (block, block), node.output, node.name)
    else:
        w.emit("DepthToSpace", [node.inputs[0]], node.output, node.name, blocksize=block, mode=mode)


def blocks_apart(w: Lowering, source: str, shape: tuple[int, ...], blocks: tuple[int, ...], output: str, name: str = "") -> None:
    """[N, blocks * C, *space] to [N, C, *(space * blocks)]; `shape` is (N, *space, C)."""
    batch, *space, channels = shape
    rank = len(space)
    apart = w.reshaped(w.channels_last(source, rank + 2), [batch, *space, *blocks, channels])
    order = [0, *(axis for place in range(rank) for axis in (1 + place, 1 + rank + place)), 1 + 2 * rank]
    moved = w.emit("Transpose", [apart], w.fresh(f"{output}_moved"), perm=order)
    grown = [extent * block for extent, block in zip(space, blocks, strict=True)]
    w.channels_first(w.reshaped(moved, [batch, *grown, channels]), rank + 2, output, name)


def space_to_depth(w: Lowering, node: QuantNode) -> None:
    block = node.attributes["blocksize"]
    batch, channels, height, width = w.spec(node.inputs[0]).shape
    if block * channels < RUN_BYTES or not _behind_conv(w, node):
        w.emit("SpaceToDepth", [node.inputs[0]], node.output, node.name, blocksize=block)
        return
    apart = w.reshaped(w.channels_last(node.inputs[0], 4), [batch, height // block, block, width // block, block, channels])
    moved = w.emit("Transpose", [apart], w.fresh(f"{node.output}_moved"), perm=[0, 1, 3, 2, 4, 5])
    w.channels_first(w.reshaped(moved, [batch, height // block, width // block, block * block * channels]), 4, node.output, node.name)


def _behind_conv(w: Lowering, node: QuantNode, between: frozenset[str] = frozenset()) -> bool:
    """Whether a convolution comes before it, with none but operators of `between` in between."""
    producer = w.graph.producer(node.inputs[0])
    while producer is not None and producer.op in between:
        producer = w.graph.producer(producer.inputs[0])
    return producer is not None and producer.op in ("Conv", "ConvTranspose")
