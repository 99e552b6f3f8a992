# SPDX-License-Identifier: Apache-2.0
"""What hls4ml 1.3.0 gets wrong or cannot do, as rules on the form: each is refused here by name instead of computed wrongly there."""

from __future__ import annotations

import numpy as np

from isthmus.errors import Problem
from isthmus.graph import QuantGraph, QuantNode
from isthmus.targets.hls4ml.fixed import INT8_HIGH, INT8_LOW, fraction_bits
from isthmus.targets.hls4ml.folding import UNROLL_LIMIT
from isthmus.targets.hls4ml.layout import RANKS, element_order, hls_shape
from isthmus.targets.hls4ml.lower import feeds_products
from isthmus.targets.hls4ml.tail import TAIL_OPERATORS, fpga_outputs, softmax_tail
from isthmus.targets.hls4ml.windows import pool_window

POOLS = frozenset({"MaxPool", "AveragePool", "GlobalAveragePool"})
STREAM_COPIES = 7  # hls4ml's clone layer


def graph_problems(graph: QuantGraph) -> list[Problem]:
    """Everything that holds for both io types."""
    problems = [*_border(graph), *_tensors(graph)]
    for node in graph.nodes:
        if node.kind == "int8":
            problems += [*_weights(node), *_shapes(node, graph)]
    return problems


def io_problems(graph: QuantGraph, io_type: str) -> list[Problem]:
    """What one io type cannot carry."""
    return _parallel(graph) if io_type == "io_parallel" else _stream(graph)


def choose_io_type(graph: QuantGraph, wanted: str) -> tuple[str, list[Problem]]:
    """("io_parallel" or "io_stream", the problems of that choice). "auto" takes io_parallel wherever it fits."""
    if wanted != "auto":
        return wanted, io_problems(graph, wanted)
    parallel = _parallel(graph)
    if not parallel:
        return "io_parallel", []
    stream = _stream(graph)
    return "io_stream", [*parallel, *stream] if stream else []


# ---- the border
def _border(graph: QuantGraph) -> list[Problem]:
    problems = []
    raw = fpga_outputs(graph)
    inside = {graph.raw_input(index) for index in range(len(graph.inputs))}
    for spec, tensor in (*((spec, graph.raw_input(index)) for index, spec in enumerate(graph.inputs)), *zip(graph.outputs, raw, strict=True)):
        if not graph.tensors[tensor].is_quantised:
            fix = "let the network begin with its quantiser, and end with int8 or with one softmax"
            problems.append(Problem(spec.name, "float-border", "is float, and the FPGA takes int8", fix))
    origins = [_origin(tensor, graph) for tensor in raw]
    for index, tensor in enumerate(origins):
        if tensor in inside or tensor in origins[:index]:
            problems.append(Problem(graph.outputs[index].name, "output", "is an input, or another output, unchanged", "remove this output"))
    tails = {tail.name for index in range(len(graph.outputs)) if (tail := softmax_tail(graph, index)) is not None}
    for node in graph.nodes:
        if node.kind == "float" and node.op in TAIL_OPERATORS and node.name not in tails:
            found = f"{node.op} inside the network: the host computes it only as the last layer"
            problems.append(Problem(node.name, "float-tail", found, "move it to the end, or choose another target than hls4ml"))
    return problems


def _origin(tensor: str, graph: QuantGraph) -> str:
    """The tensor whose values, in the same order, `tensor` has: hls4ml removes what lies between, and then cannot tell two outputs apart."""
    node = graph.producer(tensor)
    while node is not None and node.kind == "int8":
        shapes = [graph.tensors[name].shape for name in (node.inputs[0], node.output)]
        kept = node.op in ("Flatten", "Reshape") and (element_order(shapes[0]) == element_order(shapes[1])).all()
        if not kept and not (node.op == "Clip" and node.clamp == (INT8_LOW, INT8_HIGH)):
            break
        tensor = node.inputs[0]
        node = graph.producer(tensor)
    return tensor


def _tensors(graph: QuantGraph) -> list[Problem]:
    batch = graph.inputs[0].shape[0] if graph.inputs and graph.inputs[0].shape else 1
    problems = []
    for name, spec in graph.tensors.items():
        if not spec.is_quantised:
            continue
        if len(spec.shape) not in RANKS:
            problems.append(Problem(name, "rank", f"shape {list(spec.shape)}", "keep 2 (NC), 3 (NCW) or 4 (NCHW) axes"))
        elif spec.shape[0] != batch:
            problems.append(
                Problem(name, "batch", f"shape {list(spec.shape)} where the batch is {batch}", "leave the first axis alone: the FPGA works sample by sample")
            )
    return problems


# ---- one node
def _weights(node: QuantNode) -> list[Problem]:
    problems = []
    if node.weight_scale is not None:
        try:
            for scale in node.weight_scale.reshape(-1):
                fraction_bits(float(scale))
        except ValueError as error:
            problems.append(Problem(node.name, "weight-scale", str(error), "quantise the weights with power-of-two scales (--recipe portable)"))
    # QONNX carries constants as float32; hls4ml's text files would then hold another bias than the form.
    if node.bias is not None and (node.bias.astype(np.float32).astype(np.int64) != node.bias).any():
        largest = int(np.abs(node.bias.astype(np.int64)).max())
        problems.append(Problem(node.name, "bias-precision", f"a bias of {largest} steps is not a float32 number", "use a larger weight scale"))
    return problems


def _shapes(node: QuantNode, graph: QuantGraph) -> list[Problem]:
    shapes = [graph.tensors[name].shape for name in node.inputs]
    target = graph.tensors[node.output].shape
    if any(len(shape) not in RANKS for shape in (*shapes, target)):
        return []
    if node.op in ("Gemm", "MatMul") and len(shapes[0]) != 2:
        return [Problem(node.name, "matmul-rank", f"{node.op} on a tensor of shape {list(shapes[0])}", "flatten first, or use a 1x1 Conv")]
    if node.op == "Add" and not _broadcasts(shapes[0], shapes[1], target):
        found = f"adds shapes {list(shapes[0])} and {list(shapes[1])}"
        return [
            Problem(
                node.name,
                "broadcast",
                found,
                "give both the same shape, or let the smaller be one value a channel: hls4ml repeats the smaller one, channels last",
            )
        ]
    if node.op in POOLS:
        return _pool(node, shapes[0], target)
    return []


def _broadcasts(first: tuple[int, ...], second: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """hls4ml adds element i of the larger to element i modulo the size of the smaller: right for equal shapes and channel vectors."""
    if len(first) != len(second) or target not in (first, second):
        return False
    larger, smaller = (first, second) if target == first else (second, first)
    tail = hls_shape(smaller)[1:]
    while tail and tail[0] == 1:
        tail = tail[1:]
    return not tail or hls_shape(larger)[-len(tail) :] == tail


def _pool(node: QuantNode, source: tuple[int, ...], target: tuple[int, ...]) -> list[Problem]:
    if any(int(dilation) != 1 for dilation in node.attributes.get("dilations") or []):
        return [Problem(node.name, "pool-dilation", f"dilations {list(node.attributes['dilations'])}, which hls4ml ignores", "use a pool without dilation")]
    window = pool_window(node, source, target)
    if window.overhang and window.counts_padding:
        return [Problem(node.name, "ceil-mode", "ceil_mode with count_include_pad", "pad so that the last window ends inside, or use count_include_pad=0")]
    return []


# ---- io types
def _parallel(graph: QuantGraph) -> list[Problem]:
    problems = []
    for name, spec in graph.tensors.items():
        size = spec.size // spec.shape[0] if spec.shape else 1
        if spec.is_quantised and size > UNROLL_LIMIT:
            fix = "use --set io_type=io_stream, or a smaller input"
            problems.append(Problem(name, "unroll-limit", f"{size} values, in io_parallel one register each, HLS partitions at most {UNROLL_LIMIT}", fix))
    return problems


def _stream(graph: QuantGraph) -> list[Problem]:
    """io_stream moves one pixel at a time through fifos: where it cannot, hls4ml stops at an assertion, hangs, or computes something else."""
    fix = "use --set io_type=io_parallel, or change the layer"
    problems = []
    for index, spec in enumerate(graph.inputs):
        if len(graph.consumers(graph.raw_input(index))) > 1:
            problems.append(Problem(spec.name, "stream-fan-out", "a graph input that two layers read is not copied in io_stream", fix))
    for spec, raw in zip(graph.outputs, fpga_outputs(graph), strict=True):
        if any(node.kind == "int8" for node in graph.consumers(raw)):
            problems.append(Problem(spec.name, "stream-fan-out", "an output that another layer reads is not copied in io_stream", fix))
    for name, tensor in graph.tensors.items():
        readers = sum(node.inputs.count(name) for node in graph.nodes)
        if tensor.is_quantised and readers > STREAM_COPIES:
            problems.append(Problem(name, "stream-fan-out", f"{readers} layers read it, io_stream copies at most {STREAM_COPIES} times", fix))
    for node in graph.nodes:
        if node.kind == "int8":
            problems += [Problem(node.name, rule, found, fix) for rule, found in _stream_node(node, graph)]
    return problems


def _stream_node(node: QuantNode, graph: QuantGraph) -> list[tuple[str, str]]:
    shapes = [graph.tensors[name].shape for name in node.inputs]
    target = graph.tensors[node.output].shape
    if any(len(shape) not in RANKS for shape in (*shapes, target)):
        return []
    if node.op in POOLS:
        window = pool_window(node, shapes[0], target)
        if any(window.pads) or window.kernel != window.strides:
            return [("stream-pool", f"window {window.kernel}, stride {window.strides}, pads {window.pads}: io_stream needs stride = window and no padding")]
    if node.op == "Add" and shapes[0] != shapes[1]:
        return [("stream-broadcast", f"adds shapes {list(shapes[0])} and {list(shapes[1])}")]
    if node.op == "Concat" and node.attributes["axis"] % len(target) != 1:
        return [("stream-concat", f"joins along axis {node.attributes['axis']}, io_stream only along the channels")]
    if node.op in ("Flatten", "Reshape") and not (feeds_products(node, graph) or (element_order(shapes[0]) == element_order(target)).all()):
        return [("stream-reshape", "moves values between channels and space")]
    return []
