# SPDX-License-Identifier: Apache-2.0
"""What hls4ml 1.3.0 gets wrong or cannot do, as rules on the form: each is refused here by name instead of computed wrongly there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from isthmus.errors import Problem
from isthmus.targets.hls4ml.fixed import fraction_bits
from isthmus.targets.hls4ml.folding import UNROLL_LIMIT
from isthmus.targets.hls4ml.layout import RANKS
from isthmus.targets.hls4ml.lower import reads
from isthmus.targets.hls4ml.tail import TAIL_OPERATORS, fpga_outputs, softmax_tail
from isthmus.targets.hls4ml.windows import pool_window, stuffed_places

if TYPE_CHECKING:
    from isthmus.graph import QuantGraph, QuantNode

POOLS = frozenset({"MaxPool", "AveragePool", "GlobalAveragePool"})
NAMED_AXES = POOLS | {"Conv", "ConvTranspose", "ResizeLinear"}
SPREADS = frozenset({"Add", "Sub", "Mul", "Concat", "BatchMatMul"})
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
    for spec, tensor in (*((spec, graph.raw_input(index)) for index, spec in enumerate(graph.inputs)), *zip(graph.outputs, raw, strict=True)):
        if not graph.tensors[tensor].is_quantised:
            fix = "let the network begin with its quantiser, and end with int8 or with one softmax"
            problems.append(Problem(spec.name, "float-border", "is float, and the FPGA takes int8", fix))
    tails = {tail.name for index in range(len(graph.outputs)) if (tail := softmax_tail(graph, index)) is not None}
    for node in graph.nodes:
        if node.kind == "float" and node.op in TAIL_OPERATORS and node.name not in tails:
            found = f"{node.op} inside the network: the host computes it only as the last layer"
            problems.append(Problem(node.name, "float-tail", found, "move it to the end, or choose another target than hls4ml"))
    return problems


def _tensors(graph: QuantGraph) -> list[Problem]:
    batch = graph.inputs[0].shape[0] if graph.inputs and graph.inputs[0].shape else 1
    stored = {node.output for node in graph.nodes if node.op == "Constant"}
    problems = []
    for name, spec in graph.tensors.items():
        if spec.is_quantised and name not in stored and spec.shape[0] != batch:
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
    if node.op in NAMED_AXES and len(shapes[0]) not in (3, 4):
        fix = "give it 3 (NCW) or 4 (NCHW) axes, by a reshape before and behind it"
        return [Problem(node.name, "rank", f"{node.op} on a tensor of shape {list(shapes[0])}", fix)]
    if node.op == "PRelu" and node.constants[1].size > 1 and len(shapes[0]) not in RANKS:
        return [Problem(node.name, "rank", f"a slope a channel on a tensor of shape {list(shapes[0])}", "use one slope, or reshape to at most 4 axes")]
    if node.op == "BatchMatMul" and len(target) < 3:
        return [Problem(node.name, "matmul-rank", f"multiplies shapes {list(shapes[0])} and {list(shapes[1])}", "put the batch in an axis of its own")]
    problems = [problem for name, shape in zip(node.inputs, shapes, strict=True) if (problem := _spread(node, name, shape, target, graph)) is not None]
    return problems + (_pool(node, shapes[0], target) if node.op in POOLS else [])


def _spread(node: QuantNode, name: str, shape: tuple[int, ...], target: tuple[int, ...], graph: QuantGraph) -> Problem | None:
    """An operand that one sample does not see whole: the FPGA works sample by sample."""
    if node.op not in SPREADS or target[0] == 1:
        return None
    producer = graph.producer(name)
    stored = producer is not None and producer.op == "Constant"
    aligned = len(shape) == len(target) and shape[0] == (1 if stored else target[0])
    if aligned or (stored and len(shape) < len(target)):
        return None
    fix = "give it as many axes as the result, the first the batch"
    return Problem(node.name, "batch", f"operand {name} of shape {list(shape)} where the batch is {target[0]}", fix)


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
    for node in graph.nodes:
        if node.op == "ConvTranspose":
            size = stuffed_places(node, graph.tensors[node.inputs[0]].shape, graph.tensors[node.output].shape).size
            if size > UNROLL_LIMIT:
                found = f"reads {size} values with the zeros between them, in io_parallel one register each, HLS partitions at most {UNROLL_LIMIT}"
                problems.append(Problem(node.name, "unroll-limit", found, "use --set io_type=io_stream, or a smaller input"))
    return problems


def _stream(graph: QuantGraph) -> list[Problem]:
    """io_stream moves one pixel at a time through fifos: where it cannot, hls4ml stops at an assertion, hangs, or computes something else."""
    fix = "use --set io_type=io_parallel, or change the layer"
    problems = []
    for name, tensor in graph.tensors.items():
        readers = reads(graph, name)
        if tensor.is_quantised and readers > STREAM_COPIES:
            problems.append(Problem(name, "stream-fan-out", f"{readers} layers read it, io_stream copies at most {STREAM_COPIES} times", fix))
    for node in graph.nodes:
        if node.op in POOLS:
            window = pool_window(node, graph.tensors[node.inputs[0]].shape, graph.tensors[node.output].shape)
            if node.op == "AveragePool" and any(window.pads) and not window.counts_padding:
                found = f"pads {window.pads} that do not count: io_stream divides every window by the same number"
                problems.append(Problem(node.name, "stream-pool", found, fix))
    return problems
