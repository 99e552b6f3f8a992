# SPDX-License-Identifier: Apache-2.0
"""`lower`: a `QuantGraph` as the bytes of a `.tflite` file, with the border as the file has it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from isthmus.graph import QuantGraph, QuantNode
from isthmus.spec import TensorSpec
from isthmus.targets.tflite import elementwise, pools, weighted
from isthmus.targets.tflite.lowering import Lowering, Order, Placed

DIGEST_KEY = "isthmus.digest"
WINDOWED = frozenset({"Conv", "MaxPool", "AveragePool", "GlobalAveragePool"})
LAST_LAYOUTS = {3: "NWC", 4: "NHWC"}

LOWERINGS: Mapping[str, Callable[[Lowering, QuantNode], None]] = {
    "Conv": weighted.lower_conv,
    "Gemm": weighted.lower_gemm,
    "MatMul": weighted.lower_gemm,
    "MaxPool": pools.lower_max_pool,
    "AveragePool": pools.lower_average_pool,
    "GlobalAveragePool": pools.lower_global_average_pool,
    "Add": elementwise.lower_add,
    "Relu": elementwise.lower_clamp,
    "Clip": elementwise.lower_clamp,
    "Requantize": elementwise.lower_requantise,
    "Concat": elementwise.lower_concat,
    "Flatten": elementwise.lower_reshape,
    "Reshape": elementwise.lower_reshape,
    "Softmax": elementwise.lower_softmax,
    "QuantizeLinear": elementwise.lower_quantise,
    "DequantizeLinear": elementwise.lower_quantise,
}


@dataclass(frozen=True)
class Lowered:
    """The file, its border in the order of the graph's, and the nodes whose result may differ from the reference."""

    content: bytes
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    inexact: tuple[QuantNode, ...]


def lower(graph: QuantGraph, *, raw_border: bool = True, exact: bool = True) -> Lowered:
    """`raw_border`: int8 inputs and outputs where the form has a quantiser there; else float32. `exact`: see `Lowering`."""
    lowering = Lowering(graph, exact)
    inputs = [_input(lowering, index, raw_border) for index in range(len(graph.inputs))]
    for node in graph.nodes:
        if not lowering.is_placed(node.output) and not (raw_border and _is_output_border(graph, node)):
            LOWERINGS[node.op](lowering, node)
    outputs = [_output(lowering, index, raw_border) for index in range(len(graph.outputs))]
    content = lowering.writer.to_bytes(
        [(spec.name, placed.index) for spec, placed in inputs],
        [(spec.name, placed.index) for spec, placed in outputs],
        {DIGEST_KEY: graph.digest.encode()},
        "isthmus",
    )
    return Lowered(content, tuple(spec for spec, _ in inputs), tuple(spec for spec, _ in outputs), tuple(lowering.inexact))


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
    """A convolution or pool reads the tensor, or what keeps its axes in between: [N, C, W] is then a line of pixels, not a batch of rows."""
    keeps = ("QuantizeLinear", "DequantizeLinear", "Requantize", "Relu", "Clip", "Add", "Concat")
    return any(node.op in WINDOWED or (node.op in keeps and _reaches_window(graph, node.output)) for node in graph.consumers(name))
