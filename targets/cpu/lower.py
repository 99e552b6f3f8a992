# SPDX-License-Identifier: Apache-2.0
"""Which lowering each operator of the form has. Why it is uint8 inside: `lowering`."""

from __future__ import annotations

from collections.abc import Callable

from isthmus.graph import QuantGraph, QuantNode
from isthmus.tables import FUNCTIONS
from isthmus.targets.cpu import arithmetic, functions, moves, weighted
from isthmus.targets.cpu.conv_transpose import conv_transpose
from isthmus.targets.cpu.lowering import Lowering
from isthmus.targets.cpu.resize import resize_linear, resize_nearest


def onnx_from_graph(graph: QuantGraph, raw_border: bool = True) -> bytes:
    """The ONNX file: inputs and outputs have the names and shapes of `graph.inputs` and `graph.outputs`, and their dtypes, or else float32."""
    return _lowered(graph, raw_border).finished().SerializeToString(deterministic=True)


def flattened_last(graph: QuantGraph) -> dict[str, tuple[int, ...]]:
    """The tensors that lie otherwise in the file than in the form: flattened channels last. Each with its image's shape in the form."""
    return _lowered(graph, True).flattened_last


def _lowered(graph: QuantGraph, raw_border: bool) -> Lowering:
    lowering = Lowering(graph, raw_border)
    for node in graph.nodes:
        if node.kind == "float":
            lowering.island(node)
        else:
            LOWERINGS[node.op](lowering, node)
    return lowering


# The operator table of the target: what stands here is what `check` accepts.
LOWERINGS: dict[str, Callable[[Lowering, QuantNode], None]] = {
    "QuantizeLinear": Lowering.quantise_border,
    "DequantizeLinear": Lowering.dequantise_border,
    "Constant": moves.constant,
    "Conv": weighted.conv,
    "ConvTranspose": conv_transpose,
    "Gemm": weighted.gemm,
    "MatMul": weighted.matmul,
    "BatchMatMul": weighted.batch_matmul,
    "Add": arithmetic.add,
    "Sub": arithmetic.sub,
    "Mul": arithmetic.mul,
    "AveragePool": arithmetic.average_pool,
    "GlobalAveragePool": arithmetic.global_average_pool,
    "ReduceMean": arithmetic.reduce_mean,
    "Requantize": arithmetic.requantize,
    "ResizeLinear": resize_linear,
    "ResizeNearest": resize_nearest,
    **dict.fromkeys((*FUNCTIONS, "PRelu"), functions.function),
    "MaxPool": moves.max_pool,
    "Relu": moves.clip,
    "Clip": moves.clip,
    "Flatten": moves.reshape,
    "Reshape": moves.reshape,
    "Squeeze": moves.squeeze,
    "Unsqueeze": moves.squeeze,
    "Concat": moves.concat,
    "Split": moves.split,
    "Slice": moves.cut,
    "Pad": moves.pad,
    "Transpose": moves.transpose,
    "Expand": moves.expand,
    "DepthToSpace": moves.depth_to_space,
    "SpaceToDepth": moves.space_to_depth,
    "Gather": moves.gather,
}
