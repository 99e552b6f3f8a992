# SPDX-License-Identifier: Apache-2.0
"""Target `cpu`: an ONNX file for ONNX Runtime on any CPU, raw int8 at the border, integer kernels inside."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from isthmus.errors import IsthmusError
from isthmus.graph import QuantGraph, QuantNode
from isthmus.kernels import EXACT_FLOAT32, conv_like_weight, product_limit
from isthmus.ops import OPS
from isthmus.plan import BuildPlan
from isthmus.profile import Profile
from isthmus.tables import FUNCTIONS
from isthmus.target import Option, Target, carried_steps
from isthmus.targets.cpu.lower import LOWERINGS, onnx_from_graph
from isthmus.targets.cpu.resize import largest_divisor

ARTIFACT = "model.onnx"
BORDERS = ("int8", "float32")
OPTIMISATIONS = ("all", "off")
ENGINES = ("onnxruntime", "openvino")
TABLES = frozenset({*FUNCTIONS, "PRelu"})  # exact in every scheme: see `functions`

# Float islands, each tried in ONNX Runtime 1.32 against onnx's reference (tests/tool/test_cpu.py).
FLOAT_OPS = frozenset(
    {
        *("Softmax", "LogSoftmax", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "Elu", "Selu", "LeakyRelu", "PRelu", "Softplus", "Softsign", "Mish", "Gelu"),
        *("Erf", "Exp", "Log", "Sqrt", "Reciprocal", "Abs", "Neg", "Floor", "Ceil", "Sign", "Cos", "Sin", "Relu", "Clip", "Add", "Sub", "Mul", "Div", "Pow"),
        *("Max", "Min", "Concat", "Split", "Slice", "Pad", "Flatten", "Reshape", "Squeeze", "Unsqueeze", "Transpose", "Expand", "Tile", "Gather", "Resize"),
        *("DepthToSpace", "SpaceToDepth", "ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ArgMax", "Cast", "Identity"),
        *("LayerNormalization", "InstanceNormalization", "BatchNormalization", "MatMul", "Gemm", "Conv", "ConvTranspose"),
        *("MaxPool", "AveragePool", "GlobalAveragePool", "GridSample"),
    }
)


@dataclass(frozen=True)
class CpuTarget(Target):
    """Takes every scheme. Equal to the reference on every element in the power-of-two scheme; `tolerance` says where not, and why."""

    def plan(self, graph: QuantGraph, profile: Profile, options: Mapping[str, Any]) -> BuildPlan:
        chosen = self.with_defaults(options)
        if chosen["optimisation"] not in OPTIMISATIONS:
            raise IsthmusError(f"option optimisation of target cpu: expected {' or '.join(OPTIMISATIONS)}, found {chosen['optimisation']!r}")
        if chosen["engine"] not in ENGINES:
            raise IsthmusError(f"option engine of target cpu: expected {' or '.join(ENGINES)}, found {chosen['engine']!r}")
        if chosen["io"] not in BORDERS:
            raise IsthmusError(f"option io of target cpu: expected {' or '.join(BORDERS)}, found {chosen['io']!r}")
        raw = chosen["io"] == "int8"
        inputs, outputs = (tuple(spec if raw else replace(spec, dtype="float32") for spec in side) for side in (graph.inputs, graph.outputs))
        max_lsb, why = tolerance(graph, chosen["optimisation"]) if chosen["engine"] == "onnxruntime" else openvino_tolerance(graph)
        return BuildPlan(
            files={ARTIFACT: onnx_from_graph(graph, raw)},
            steps=(),
            artifact=ARTIFACT,
            engine=chosen["engine"],
            inputs=inputs,
            outputs=outputs,
            max_lsb=max_lsb,
            why_lsb=why,
            options=chosen,
        )


def tolerance(graph: QuantGraph, optimisation: str) -> tuple[int, str]:
    """(largest difference in steps that ONNX Runtime may show, its reason); (0, "") where it is exact for every input."""
    rounding = [node for node in graph.nodes if node.kind == "int8" and node.inputs and not OPS[node.op].passes_scale]
    if graph.recipe.scheme != "power_of_two" and any(node.op not in TABLES for node in rounding):
        return carried_steps(len(rounding)), (
            "the scales are no powers of two and ONNX Runtime multiplies in float32: about one value in 100,000 lies so near a tie that it rounds to the"
            " other side, and later layers may carry that on (3 steps measured on a 53-layer network)"
        )
    for node in graph.nodes:
        if node.op == "QuantizeLinear" and (island := graph.producer(node.inputs[0])) is not None:
            return carried_steps(len(rounding)), (
                f"float island {island.name} lies between integers: engines differ in the last bits of float32, which may decide a rounding, and later"
                " layers may carry that on"
            )
        if node.kind == "int8" and _leaves_float32(node, graph, optimisation):
            return 1, f"sums of {node.name} can pass 2^24, where float32 no longer holds every integer and ONNX Runtime's rounding may miss a tie"
    return 0, ""


def openvino_tolerance(graph: QuantGraph) -> tuple[int, str]:
    """Like `tolerance`, for OpenVINO, whose rounding is documented nowhere."""
    rounding = [node for node in graph.nodes if node.kind == "int8" and node.inputs and not OPS[node.op].passes_scale]
    return 1 + carried_steps(len(rounding)), (
        "OpenVINO fuses requantisation its own way and rounds by one step otherwise, and on x86 without VNNI its sums of 16 bits saturate where weights"
        " of more than 7 bits meet large activations; later layers may carry that on"
    )


def _leaves_float32(node: QuantNode, graph: QuantGraph, optimisation: str) -> bool:
    """Whether a sum that float32 cannot hold exactly could change the int8 result.

    The integer kernels go through float32 once, at the end: a sum past 2^24 matters only where the result is not saturated anyway.
    Without optimisation every partial sum is float32, and averages and interpolations always are.
    """
    largest, multiplier = _largest_sums(node, graph)
    if optimisation == "off" or multiplier is None:
        return bool((largest > EXACT_FLOAT32).any())
    return bool(((largest > EXACT_FLOAT32) & (EXACT_FLOAT32 * multiplier < 128.5)).any())


def _largest_sums(node: QuantNode, graph: QuantGraph) -> tuple[np.ndarray, np.ndarray | None]:
    """The largest sums any input can give, and output steps a unit of them; None where they are summed in float32."""
    source, target = (graph.tensors[name] for name in (node.inputs[0] if node.inputs else node.output, node.output))
    ratio = float(source.scale or 0) / float(target.scale or 1)
    if node.weight is not None and node.weight_scale is not None:
        rows = conv_like_weight(node.weight, node.attributes["group"]) if node.op == "ConvTranspose" else node.weight
        rows = rows.T if node.op == "MatMul" else rows
        bias = 0 if node.bias is None else np.abs(node.bias.astype(np.int64))
        return np.abs(rows.astype(np.int64)).reshape(len(rows), -1).sum(axis=1) * 128 + bias, ratio * node.weight_scale.astype(np.float64)
    if node.op == "BatchMatMul":
        other = float(graph.tensors[node.inputs[1]].scale or 0)
        return np.array(product_limit(source.shape[-1], (0, 0))), np.array(ratio * other)
    if node.op == "GlobalAveragePool":
        return np.array(math.prod(source.shape[2:]) * 128), None
    if node.op == "AveragePool":
        return np.array(math.prod(node.attributes["kernel_shape"]) * 128), None
    if node.op == "ReduceMean":
        return np.array(math.prod(source.shape[axis] for axis in node.attributes["axes"]) * 128), None
    return (np.array(largest_divisor(node, source.shape) * 128), None) if node.op == "ResizeLinear" else (np.zeros(1), None)


TARGET = CpuTarget(
    name="cpu",
    ops=frozenset(LOWERINGS) - {"QuantizeLinear", "DequantizeLinear"},
    float_ops=FLOAT_OPS,
    options={
        "io": Option("int8", "what the file takes and gives: int8 (raw), or float32, which ONNX Runtime turns into its own uint8 in one step less"),
        "engine": Option("onnxruntime", "what runs the file: onnxruntime, or openvino, which has no exact rounding"),
        "optimisation": Option("all", "ONNX Runtime's graph optimisation: all, or off (node by node in float, to tell an optimiser's fault from a model's)"),
    },
)
