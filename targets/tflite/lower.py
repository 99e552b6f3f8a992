# SPDX-License-Identifier: Apache-2.0
"""`lower`: a `QuantGraph` as the bytes of a `.tflite` file, with the border as the file has it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from isthmus.errors import ProblemsError
from isthmus.graph import QuantGraph, QuantNode
from isthmus.spec import TensorSpec
from isthmus.targets.tflite import (
    arithmetic,
    elementwise,
    float_arithmetic,
    float_functions,
    functions,
    islands,
    means,
    moves,
    pools,
    sampling,
    transposed,
    weighted,
)
from isthmus.targets.tflite.float_form import float_form
from isthmus.targets.tflite.lowering import Lowering, Order, Placed

DIGEST_KEY = "isthmus.digest"
IMAGES = frozenset({"Conv", "ConvTranspose", "MaxPool", "AveragePool", "GlobalAveragePool", "ResizeNearest", "ResizeLinear"})
KEEPS_AXES = frozenset(
    {
        *("QuantizeLinear", "DequantizeLinear", "Requantize", "Relu", "Clip", "Add", "Sub", "Mul", "Concat", "Pad", "Slice", "Identity"),
        *(*float_functions.FORMS, *float_arithmetic.FUSING, *float_arithmetic.CHAINED, *float_arithmetic.PLAIN, "InstanceNormalization"),
    },
)
LAST_LAYOUTS = {3: "NWC", 4: "NHWC"}

# What is lowered in the same way whether its tensors are int8 or float32.
SHARED: Mapping[str, Callable[[Lowering, QuantNode], None]] = {
    "Constant": elementwise.lower_constant,
    "Conv": weighted.lower_conv,
    "ConvTranspose": transposed.lower_conv_transpose,
    "Gemm": weighted.lower_gemm,
    "MatMul": weighted.lower_gemm,
    "MaxPool": pools.lower_max_pool,
    "AveragePool": pools.lower_average_pool,
    "GlobalAveragePool": pools.lower_global_average_pool,
    "ResizeNearest": means.lower_resize_nearest,
    "ResizeLinear": means.lower_resize_linear,
    "Relu": elementwise.lower_clamp,
    "Clip": elementwise.lower_clamp,
    **dict.fromkeys(("Flatten", "Reshape", "Squeeze", "Unsqueeze"), moves.lower_reshape),
    "Concat": moves.lower_concat,
    "Split": moves.lower_split,
    "Slice": moves.lower_slice,
    "Pad": moves.lower_pad,
    "Transpose": moves.lower_transpose,
    "Expand": moves.lower_expand,
    "DepthToSpace": moves.lower_depth_to_space,
    "SpaceToDepth": moves.lower_space_to_depth,
    "Gather": moves.lower_gather,
}
INT8_LOWERINGS: Mapping[str, Callable[[Lowering, QuantNode], None]] = {
    **SHARED,
    "BatchMatMul": arithmetic.lower_batch_matmul,
    "Add": arithmetic.lower_sum,
    "Sub": arithmetic.lower_sum,
    "Mul": arithmetic.lower_product,
    "ReduceMean": means.lower_reduce_mean,
    "Requantize": elementwise.lower_requantise,
    **dict.fromkeys(functions.FLOAT_FORMS, functions.lower_function),
}
FLOAT_LOWERINGS: Mapping[str, Callable[[Lowering, QuantNode], None]] = {
    **SHARED,
    **float_arithmetic.LOWERINGS,
    **dict.fromkeys(float_functions.FORMS, float_functions.lower_function),
    "Tile": moves.lower_tile,
    "Identity": moves.lower_identity,
    "Softmax": islands.lower_softmax,
    "LogSoftmax": islands.lower_softmax,
    "LayerNormalization": islands.lower_layer_norm,
    "ArgMax": islands.lower_arg_max,
    "ArgMin": islands.lower_arg_max,
    "Cast": islands.lower_cast,
    "GridSample": sampling.lower_grid_sample,
}
BORDER_LOWERINGS: Mapping[str, Callable[[Lowering, QuantNode], None]] = dict.fromkeys(("QuantizeLinear", "DequantizeLinear"), islands.lower_quantise)
LOWERINGS = {"int8": INT8_LOWERINGS, "float": FLOAT_LOWERINGS, "border": BORDER_LOWERINGS}


@dataclass(frozen=True)
class Lowered:
    """The file, its border in the order of the graph's, and the nodes whose result may differ from the reference.

    `orders`: how each form tensor that has one of its own lies in the file, with the image's form shape where it is flattened.
    """

    content: bytes
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    inexact: tuple[QuantNode, ...]
    orders: Mapping[str, tuple[Order, tuple[int, ...]]]


def lower(graph: QuantGraph, *, raw_border: bool = True, exact: bool = True) -> Lowered:
    """`raw_border`: int8 inputs and outputs where the form has a quantiser there; else float32. `exact`: see `Lowering`."""
    digest = graph.digest
    graph, problems = float_form(graph)
    if problems:
        raise ProblemsError("not for target tflite", problems)
    lowering = Lowering(graph, exact)
    inputs = [_input(lowering, index, raw_border) for index in range(len(graph.inputs))]
    for node in graph.nodes:
        if not lowering.is_placed(node.output) and not (raw_border and _is_output_border(graph, node)):
            LOWERINGS[node.kind][node.op](lowering, node)
    outputs = [_output(lowering, index, raw_border) for index in range(len(graph.outputs))]
    content = lowering.writer.to_bytes(
        [(spec.name, placed.index) for spec, placed in inputs],
        [(spec.name, placed.index) for spec, placed in outputs],
        {DIGEST_KEY: digest.encode()},
        "isthmus",
    )
    return Lowered(content, tuple(spec for spec, _ in inputs), tuple(spec for spec, _ in outputs), tuple(lowering.inexact), lowering.orders())


def _is_output_border(graph: QuantGraph, node: QuantNode) -> bool:
    """A DequantizeLinear that only makes a graph output: an int8 border leaves it to the caller."""
    return node.op == "DequantizeLinear" and not graph.consumers(node.output)


def _input(lowering: Lowering, index: int, raw_border: bool) -> tuple[TensorSpec, Placed]:
    graph = lowering.graph
    spec = graph.inputs[index]
    name = graph.raw_input(index) if raw_border else spec.name
    if not (raw_border and spec.is_quantised):
        spec = _real(spec)
    rank = len(spec.shape)
    last = rank == 4 or (rank == 3 and _reaches_window(graph, name))
    border = _channels_last(spec) if last else spec
    placed = Placed(lowering.writer.tensor(name, border.shape, border.dtype, lowering.quantisation(name)), border.shape)
    if rank == 3 and last:
        batch, width, channels = border.shape
        lowering.place(name, Order.LAST, lowering.reshape(placed, f"{name}/plane", (batch, 1, width, channels), like=name))
    else:
        lowering.place(name, Order.LAST if last else Order.FORM, placed)
    return border, placed


def _output(lowering: Lowering, index: int, raw_border: bool) -> tuple[TensorSpec, Placed]:
    graph = lowering.graph
    spec = graph.outputs[index]
    name = graph.raw_output(index) if raw_border else spec.name
    if not (raw_border and spec.is_quantised):
        spec = _real(spec)
    rank = len(spec.shape)
    if rank == 4:
        return _channels_last(spec), lowering.read(name, Order.LAST)
    if rank == 3 and lowering.order(name) is Order.LAST:
        border = _channels_last(spec)
        return border, lowering.reshape(lowering.read(name, Order.LAST), f"{name}/line", border.shape, like=name)
    return spec, lowering.read(name, Order.FORM)


def _real(spec: TensorSpec) -> TensorSpec:
    """A float32 border; scale and zero point of the quantiser behind it stay, for whoever compares with the integer reference."""
    return replace(spec, dtype="float32")


def _channels_last(spec: TensorSpec) -> TensorSpec:
    batch, channels, *space = spec.shape
    return replace(spec, shape=(batch, *space, channels), layout=LAST_LAYOUTS[len(spec.shape)])


def _reaches_window(graph: QuantGraph, name: str) -> bool:
    """An operator on images reads the tensor, or what keeps its axes in between: [N, C, W] is then a line of pixels, not a batch of rows."""
    return any(node.op in IMAGES or (node.op in KEEPS_AXES and _reaches_window(graph, node.output)) for node in graph.consumers(name))
