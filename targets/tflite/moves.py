# SPDX-License-Identifier: Apache-2.0
"""What moves values and computes nothing: reshapes, transposes, cuts, joins, blocks. A move that only undoes channels-last writes no TRANSPOSE."""

from __future__ import annotations

import numpy as np

from isthmus.graph import QuantNode
from isthmus.targets.tflite.functions import FLOAT_FORMS
from isthmus.targets.tflite.lowering import LAST_AXES, Lowering, Order, Placed, axis_in, moves_nothing, shape_in

PASSES_COLUMNS = frozenset({"Relu", "Clip", "Requantize", "QuantizeLinear", "DequantizeLinear", *FLOAT_FORMS} - {"PRelu"})


# ---- reshapes
def lower_reshape(lowering: Lowering, node: QuantNode) -> None:
    """Flatten, Reshape, Squeeze, Unsqueeze. An image whose channels stay stays channels last; one that is flattened for layers with weights as well
    (they permute their weights); else it is turned to the form's order first."""
    name, shape = node.inputs[0], lowering.spec(node.output).shape
    image = lowering.spec(name).shape
    is_last = lowering.order(name) is Order.LAST
    if is_last and len(shape) in LAST_AXES and shape[:2] == image[:2]:
        source, target = lowering.read(name, Order.LAST), lowering.write(node.output, Order.LAST)
    elif is_last and len(shape) == 2 and shape[0] == image[0] and not moves_nothing(image) and _feeds_only_weights(lowering, node.output):
        source = lowering.read(name, Order.LAST)
        lowering.flat_source[node.output] = image
        target = lowering.write(node.output, Order.FLAT)
    else:
        source = lowering.read(name, Order.LAST if is_last and moves_nothing(image) else Order.FORM)
        target = lowering.write(node.output, Order.FORM)
    lowering.emit_reshape(source, target)


def _feeds_only_weights(lowering: Lowering, name: str) -> bool:
    """Every reader is a Gemm or MatMul, or passes elements through to such ones."""
    readers = lowering.graph.consumers(name)
    return bool(readers) and all(
        reader.op in ("Gemm", "MatMul") or (reader.op in PASSES_COLUMNS and _feeds_only_weights(lowering, reader.output)) for reader in readers
    )


def lower_transpose(lowering: Lowering, node: QuantNode) -> None:
    """Where one of the two orders of the result holds the elements as they lie, nothing moves: a RESHAPE."""
    name, permutation = node.inputs[0], list(node.attributes["perm"])
    shape = lowering.spec(name).shape
    present = lowering.order(name)
    lies = _sequence(present, len(shape))
    out_shape = lowering.spec(node.output).shape
    for order in (Order.FORM, Order.LAST):
        if order is Order.LAST and len(shape) not in LAST_AXES:
            continue
        wanted = [permutation[axis] for axis in _sequence(order, len(shape))]
        if [axis for axis in wanted if shape[axis] > 1] == [axis for axis in lies if shape[axis] > 1]:
            lowering.emit_reshape(lowering.read(name, present), lowering.write(node.output, order))
            return
    source = lowering.read(name, present)
    if source.shape != tuple(shape[axis] for axis in lies):  # a line of pixels lies as a plane of height 1
        source = lowering.reshape(source, f"{name}/line", tuple(shape[axis] for axis in lies), like=name)
    order = Order.LAST if len(shape) == 4 and present is Order.LAST else Order.FORM
    wanted = [permutation[axis] for axis in _sequence(order, len(shape))]
    target = lowering.write(node.output, order)
    axes = lowering.writer.constant("permutation", np.array([lies.index(axis) for axis in wanted], np.int32))
    assert target.shape == shape_in(order, out_shape)
    lowering.writer.operator("TRANSPOSE", 2, [source.index, axes], [target.index], "TransposeOptions")


def _sequence(order: Order, rank: int) -> list[int]:
    """The form's axes as they follow each other in the file."""
    return [0, *range(2, rank), 1] if order is Order.LAST else list(range(rank))


def lower_expand(lowering: Lowering, node: QuantNode) -> None:
    order = _kept_order(lowering, node)
    source, target = lowering.read(node.inputs[0], order), lowering.write(node.output, order)
    extents = lowering.writer.constant("shape", np.asarray(target.shape, np.int32))
    lowering.writer.operator("BROADCAST_TO", 3, [source.index, extents], [target.index], "BroadcastToOptions")


def lower_tile(lowering: Lowering, node: QuantNode) -> None:
    order, rank = _kept_order(lowering, node), len(lowering.spec(node.output).shape)
    source, target = lowering.read(node.inputs[0], order), lowering.write(node.output, order)
    times = np.ones(len(source.shape), np.int32)
    for axis, repeats in enumerate(node.attributes["repeats"]):
        times[axis_in(order, rank, axis)] = repeats
    lowering.writer.operator("TILE", 1, [source.index, lowering.writer.constant("times", times)], [target.index], "TileOptions")


def lower_identity(lowering: Lowering, node: QuantNode) -> None:
    """What the input lies in is the output as well."""
    order = lowering.elementwise_order(node)
    lowering.place(node.output, order, lowering.read(node.inputs[0], order))


def _kept_order(lowering: Lowering, node: QuantNode) -> Order:
    """The input's order: the result has as many axes."""
    return lowering.order(node.inputs[0])


# ---- cuts and joins
def lower_concat(lowering: Lowering, node: QuantNode) -> None:
    order = lowering.common_order(node)
    sources = [lowering.read(name, order).index for name in node.inputs]
    axis = axis_in(order, len(lowering.spec(node.output).shape), int(node.attributes["axis"]))
    target = lowering.write(node.output, order)
    lowering.writer.operator("CONCATENATION", 2, sources, [target.index], "ConcatenationOptions", axis=axis)


def lower_split(lowering: Lowering, node: QuantNode) -> None:
    """SPLIT into equal parts; uneven ones by a SLICE each, as XNNPACK has no SPLIT_V."""
    order, writer = _kept_order(lowering, node), lowering.writer
    source = lowering.read(node.inputs[0], order)
    axis = axis_in(order, len(lowering.spec(node.inputs[0]).shape), int(node.attributes["axis"]))
    targets = [lowering.write(name, order) for name in node.outputs]
    sizes = node.attributes["sizes"]
    if len(set(sizes)) == 1:
        writer.operator("SPLIT", 2, [writer.constant("axis", np.array(axis, np.int32)), source.index], [target.index for target in targets], "SplitOptions",
                        numSplits=len(sizes))  # fmt: skip
        return
    for start, target in zip(np.cumsum([0, *sizes[:-1]]), targets, strict=True):
        lowering.slice(source, target, [int(start) if place == axis else 0 for place in range(len(source.shape))])


def lower_slice(lowering: Lowering, node: QuantNode) -> None:
    order = _kept_order(lowering, node)
    source, target = lowering.read(node.inputs[0], order), lowering.write(node.output, order)
    rank = len(lowering.spec(node.inputs[0]).shape)
    begins, ends, steps, to_the_first = [0] * len(source.shape), list(source.shape), [1] * len(source.shape), 0
    a = node.attributes
    for axis, start, end, step in zip(a["axes"], a["starts"], a["ends"], a["steps"], strict=True):
        place = axis_in(order, rank, axis)
        begins[place], ends[place], steps[place] = start, end, step
        to_the_first |= (end < 0) << place  # backwards through the first element: no index says that, a bit does
    if all(step == 1 for step in steps):
        lowering.slice(source, target, begins)
        return
    bounds = [lowering.writer.constant(label, np.array(values, np.int32)) for label, values in (("begins", begins), ("ends", ends), ("steps", steps))]
    lowering.writer.operator("STRIDED_SLICE", 2, [source.index, *bounds], [target.index], "StridedSliceOptions", endMask=to_the_first)


def lower_pad(lowering: Lowering, node: QuantNode) -> None:
    """PAD with real zero, PADV2 with another value, MIRROR_PAD where a float island reflects."""
    name, order = node.inputs[0], _kept_order(lowering, node)
    source, target = lowering.read(name, order), lowering.write(node.output, order)
    rank, spec = len(lowering.spec(name).shape), lowering.spec(node.output)
    amounts = np.zeros((len(source.shape), 2), np.int32)
    for axis in range(rank):
        amounts[axis_in(order, rank, axis)] = node.attributes["pads"][axis], node.attributes["pads"][axis + rank]
    paddings = lowering.writer.constant("paddings", amounts)
    if node.attributes["mode"] == "reflect":
        mode = lowering.writer.enum("MirrorPadMode", "REFLECT")
        lowering.writer.operator("MIRROR_PAD", 1, [source.index, paddings], [target.index], "MirrorPadOptions", mode=mode)
        return
    value = spec.quantise(np.array([node.attributes["value"]], np.float32))
    if value[0] == (spec.zero_point or 0):
        lowering.writer.operator("PAD", 2, [source.index, paddings], [target.index], "PadOptions")
        return
    fill = lowering.writer.constant("fill", value, lowering.quantisation(name))
    lowering.writer.operator("PADV2", 2, [source.index, paddings, fill], [target.index], "PadV2Options")


def lower_gather(lowering: Lowering, node: QuantNode) -> None:
    """Indices of one axis keep the number of axes, and so the order; others change it."""
    indices, rank = np.asarray(node.attributes["indices"], np.int32), len(lowering.spec(node.inputs[0]).shape)
    order = _kept_order(lowering, node) if indices.ndim == 1 else Order.FORM
    source, target = lowering.read(node.inputs[0], order), lowering.write(node.output, order)
    lowering.gather(source, target, indices, axis_in(order, rank, int(node.attributes["axis"])))


# ---- blocks
def lower_depth_to_space(lowering: Lowering, node: QuantNode) -> None:
    """TFLite's is DCR. CRD: the channels in DCR's order first, which is one GATHER of whole pixels."""
    block = int(node.attributes["blocksize"])
    source = lowering.read(node.inputs[0], Order.LAST)
    channels = source.shape[-1] // block**2
    if node.attributes["mode"] == "CRD" and block > 1 and channels > 1:
        order = np.arange(source.shape[-1]).reshape(channels, block * block).T.reshape(-1)
        sorted_channels = lowering.scratch(f"{node.name}/sorted", source.shape, node.inputs[0])
        lowering.gather(source, sorted_channels, order, 3)
        source = sorted_channels
    _blocks(lowering, "DEPTH_TO_SPACE", 1, source, node, block)


def lower_space_to_depth(lowering: Lowering, node: QuantNode) -> None:
    _blocks(lowering, "SPACE_TO_DEPTH", 2, lowering.read(node.inputs[0], Order.LAST), node, int(node.attributes["blocksize"]))


def _blocks(lowering: Lowering, op: str, version: int, source: Placed, node: QuantNode, block: int) -> None:
    target = lowering.write(node.output, Order.LAST)
    options = "DepthToSpaceOptions" if op == "DEPTH_TO_SPACE" else "SpaceToDepthOptions"
    lowering.writer.operator(op, version, [source.index], [target.index], options, blockSize=block)
