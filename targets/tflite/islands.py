# SPDX-License-Identifier: Apache-2.0
"""Float islands, in float32, and the quantisers around them: Softmax, LayerNormalization, ArgMax, Cast. The others: `float_form`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from isthmus.errors import Problem
from isthmus.graph import QuantGraph, QuantNode
from isthmus.targets.tflite.lowering import LAST_AXES, Lowering, Order, Placed, axis_in

CAST_TYPES = frozenset({"float32", "int32", "int64", "bool"})
LARGEST_TRANSPOSE = 6  # axes
SOFTMAXES: Mapping[str, tuple[str, str, dict[str, Any]]] = {
    "Softmax": ("SOFTMAX", "SoftmaxOptions", {"beta": 1.0}),
    "LogSoftmax": ("LOG_SOFTMAX", "LogSoftmaxOptions", {}),
}
EXTREMES = {"ArgMax": ("ARG_MAX", "ArgMaxOptions"), "ArgMin": ("ARG_MIN", "ArgMinOptions")}


def lower_quantise(lowering: Lowering, node: QuantNode) -> None:
    """A QuantizeLinear or DequantizeLinear that stays in the file."""
    order = lowering.elementwise_order(node)
    source, target = lowering.read(node.inputs[0], order), lowering.write(node.output, order)
    if node.op == "DequantizeLinear":
        lowering.writer.operator("DEQUANTIZE", 2, [source.index], [target.index], "DequantizeOptions")
        return
    maker = lowering.graph.producer(node.inputs[0])
    lowering.declare(node, maker is None or maker.kind != "float")
    lowering.quantise(source, target)


def lower_softmax(lowering: Lowering, node: QuantNode) -> None:
    """TFLite's SOFTMAX and LOG_SOFTMAX run along the file's last axis: the form's last, the channels of an image, or one that is moved there and back."""
    rank = len(lowering.spec(node.inputs[0]).shape)
    axis = int(node.attributes.get("axis", -1)) % rank
    order = Order.LAST if axis == 1 and rank in LAST_AXES else Order.FORM
    source, target = lowering.read(node.inputs[0], order), lowering.write(node.output, order)
    op, options, fields = SOFTMAXES[node.op]
    if order is Order.LAST or axis == rank - 1:
        lowering.writer.operator(op, 1, [source.index], [target.index], options, **fields)
        return
    swap = list(range(rank))
    swap[axis], swap[-1] = rank - 1, axis
    turned = lowering.transpose(source, f"{node.name}/turned", swap, [source.shape[place] for place in swap], like=node.inputs[0])
    result = lowering.float_operator(op, [turned.index], turned.shape, options, **fields)
    axes = lowering.writer.constant("permutation", np.array(swap, np.int32))
    lowering.writer.operator("TRANSPOSE", 2, [result.index, axes], [target.index], "TransposeOptions")


def lower_layer_norm(lowering: Lowering, node: QuantNode) -> None:
    """(x - mean) / sqrt(mean((x - mean)^2) + epsilon) * gain + shift, over the last axes."""
    rank = len(lowering.spec(node.inputs[0]).shape)
    axis = int(node.attributes.get("axis", -1)) % rank
    gain, shift = node.constants[1].astype(np.float32), node.constants.get(2)
    x = lowering.read(node.inputs[0], Order.FORM)
    result = normalised(lowering, node, x, range(axis, rank), gain, None if shift is None else shift.astype(np.float32))
    lowering.settle(node.output, Order.FORM, result)


def normalised(lowering: Lowering, node: QuantNode, x: Placed, over: Sequence[int], gain: np.ndarray, shift: np.ndarray | None) -> Placed:
    """`x` less its mean over the axes `over` of the file, by its deviation there, times `gain`, plus `shift`; the two broadcast."""
    writer = lowering.writer
    axes = writer.constant("axes", np.array(over, np.int32))
    reduced = tuple(1 if axis in over else extent for axis, extent in enumerate(x.shape))
    none = writer.enum("ActivationFunctionType", "NONE")

    def mean(values: Placed) -> Placed:
        return lowering.float_operator("MEAN", [values.index, axes], reduced, "ReducerOptions", keepDims=True)

    def binary(op: str, a: Placed, b: int) -> Placed:
        return lowering.float_operator(op, [a.index, b], a.shape, f"{op.capitalize()}Options", fusedActivationFunction=none)

    centred = binary("SUB", x, mean(x).index)
    variance = mean(binary("MUL", centred, centred.index))
    spread = binary("ADD", variance, lowering.number(float(node.attributes.get("epsilon", 1e-5))))
    result = binary("MUL", centred, lowering.float_operator("RSQRT", [spread.index], reduced).index)
    result = binary("MUL", result, writer.constant(f"{node.name}/gain", gain))
    return result if shift is None else binary("ADD", result, writer.constant(f"{node.name}/shift", shift))


def lower_arg_max(lowering: Lowering, node: QuantNode) -> None:
    """The first of equal values, as ONNX says; channels-last images as they lie. An index is int32, all that TFLM knows, where a Cast alone reads it."""
    name, keep = node.inputs[0], bool(node.attributes.get("keepdims", 1))
    rank = len(lowering.spec(name).shape)
    axis = int(node.attributes.get("axis", 0)) % rank
    order = lowering.order(name) if rank == 4 and (keep or axis == 1) else Order.FORM
    source = lowering.read(name, order)
    place = axis_in(order, rank, axis)
    shape = tuple(extent for index, extent in enumerate(source.shape) if index != place)
    dtype = "int32" if all(reader.op == "Cast" for reader in lowering.graph.consumers(node.output)) else "int64"
    found = Placed(lowering.writer.tensor(f"{node.output}/found" if keep else node.output, shape, dtype), shape)
    along = lowering.writer.constant("axis", np.array(place, np.int32))
    op, options = EXTREMES[node.op]
    lowering.writer.operator(op, 1, [source.index, along], [found.index], options, outputType=lowering.writer.enum("TensorType", dtype.upper()))
    if keep:
        extents = (*source.shape[:place], 1, *source.shape[place + 1 :])
        target = Placed(lowering.writer.tensor(node.output, extents, dtype), extents)
        lowering.emit_reshape(found, target)
        found = target
    lowering.place(node.output, order if keep else Order.FORM, found)


def lower_cast(lowering: Lowering, node: QuantNode) -> None:
    order = lowering.elementwise_order(node)
    source, target = lowering.read(node.inputs[0], order), lowering.write(node.output, order)
    lowering.writer.operator("CAST", 1, [source.index], [target.index])


# ---- what TFLite lacks of them
def island_problems(graph: QuantGraph, node: QuantNode) -> list[Problem]:
    """Islands that are in the table, but not like this."""
    found, fix = _not_like_this(graph, node)
    return [Problem(node.name, "tflite-island", found, fix)] if found else []


def _not_like_this(graph: QuantGraph, node: QuantNode) -> tuple[str, str]:
    rank = len(graph.tensors[node.inputs[0]].shape) if node.inputs else 0
    if node.op in SOFTMAXES and rank > LARGEST_TRANSPOSE and int(node.attributes.get("axis", -1)) % rank != rank - 1:
        return f"{node.op} along an inner axis of {rank}", f"move the axis to the end: TFLite turns up to {LARGEST_TRANSPOSE} axes"
    if node.op in EXTREMES and node.attributes.get("select_last_index", 0):
        return f"{node.op} with select_last_index", "TFLite gives the first of equal values: leave it at 0"
    if node.op == "LayerNormalization" and (len(node.outputs) > 1 or len(node.inputs) > 1 or 1 not in node.constants):
        return "LayerNormalization with several outputs or a computed gain", "give it one output, a constant gain and shift"
    types = [graph.tensors[name].dtype for name in (*node.inputs, *node.outputs)]
    if node.op == "Cast" and not set(types) <= CAST_TYPES:
        return f"Cast from {types[0]} to {types[-1]}", f"cast between {', '.join(sorted(CAST_TYPES))}"
    return "", ""
