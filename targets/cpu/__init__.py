# SPDX-License-Identifier: Apache-2.0
"""Target `cpu`: an ONNX file for ONNX Runtime on any CPU, raw int8 at the border, integer kernels inside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from isthmus.errors import IsthmusError
from isthmus.graph import QuantGraph, QuantNode
from isthmus.ops import OPS
from isthmus.plan import BuildPlan
from isthmus.profile import Profile
from isthmus.target import Option, Target, carried_steps
from isthmus.targets.cpu.lower import LOWERINGS, onnx_from_graph

ARTIFACT = "model.onnx"
OPTIMISATIONS = ("all", "off")
EXACT_FLOAT32 = 2**24  # every integer up to here is a float32

# Float islands, each tried in ONNX Runtime 1.32 against onnx's reference (tests/tool/test_cpu.py).
FLOAT_OPS = frozenset(
    {
        *("Softmax", "LogSoftmax", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "Elu", "Selu", "LeakyRelu", "Softplus", "Softsign", "Gelu", "Erf", "Exp"),
        *("Log", "Sqrt", "Reciprocal", "Abs", "Neg", "Relu", "Clip", "Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Concat", "Flatten", "Reshape"),
        *("Transpose", "ReduceMean", "ReduceSum", "ReduceMax", "LayerNormalization", "MatMul", "Gemm"),
        *("Conv", "MaxPool", "AveragePool", "GlobalAveragePool"),
    }
)


@dataclass(frozen=True)
class CpuTarget(Target):
    """Takes every scheme. Equal to the reference on every element in the power-of-two scheme; `tolerance` says where not, and why."""

    def plan(self, graph: QuantGraph, profile: Profile, options: Mapping[str, Any]) -> BuildPlan:
        chosen = self.with_defaults(options)
        if chosen["optimisation"] not in OPTIMISATIONS:
            raise IsthmusError(f"option optimisation of target cpu: expected {' or '.join(OPTIMISATIONS)}, found {chosen['optimisation']!r}")
        max_lsb, why = tolerance(graph, chosen["optimisation"])
        return BuildPlan(
            files={ARTIFACT: onnx_from_graph(graph)},
            steps=(),
            artifact=ARTIFACT,
            engine="onnxruntime",
            inputs=graph.inputs,
            outputs=graph.outputs,
            max_lsb=max_lsb,
            why_lsb=why,
            options=chosen,
        )


def tolerance(graph: QuantGraph, optimisation: str) -> tuple[int, str]:
    """(largest difference in steps that ONNX Runtime may show, its reason); (0, "") where it is exact for every input."""
    if graph.recipe.scheme != "power_of_two":
        rounding = [node for node in graph.nodes if node.kind == "int8" and not OPS[node.op].passes_scale]
        return carried_steps(len(rounding)), (
            "the scales are no powers of two and ONNX Runtime multiplies in float32: about one value in 100,000 lies so near a tie that it rounds to the"
            " other side, and later layers may carry that on (3 steps measured on a 53-layer network)"
        )
    for node in graph.nodes:
        if node.op == "QuantizeLinear" and (island := graph.producer(node.inputs[0])) is not None:
            behind = sum(other.kind == "int8" and not OPS[other.op].passes_scale for other in graph.nodes)
            return carried_steps(behind), (
                f"float island {island.name} lies between integers: engines differ in the last bits of float32, which may decide a rounding, and later"
                " layers may carry that on"
            )
        if node.weight is not None and _leaves_float32(node, graph, optimisation):
            return 1, f"sums of {node.name} can pass 2^24, where float32 no longer holds every integer and ONNX Runtime's rounding may miss a tie"
    return 0, ""


def _leaves_float32(node: QuantNode, graph: QuantGraph, optimisation: str) -> bool:
    """Whether a sum that float32 cannot hold exactly could change the int8 result.

    The integer kernels go through float32 once, at the end: a sum past 2^24 matters only where the result is not saturated anyway.
    Without optimisation every partial sum is float32.
    """
    assert node.weight is not None and node.weight_scale is not None
    channel_axis = 1 if node.op == "MatMul" else 0
    others = tuple(axis for axis in range(node.weight.ndim) if axis != channel_axis)
    largest = np.abs(node.weight.astype(np.int64)).sum(axis=others) * 128 + (0 if node.bias is None else np.abs(node.bias.astype(np.int64)))
    if optimisation == "off":
        return bool((largest > EXACT_FLOAT32).any())
    multiplier = float(graph.tensors[node.inputs[0]].scale or 0) * node.weight_scale.astype(np.float64) / float(graph.tensors[node.output].scale or 1)
    return bool(((largest > EXACT_FLOAT32) & (EXACT_FLOAT32 * multiplier < 128.5)).any())


TARGET = CpuTarget(
    name="cpu",
    ops=frozenset(LOWERINGS) - {"QuantizeLinear", "DequantizeLinear"},
    float_ops=FLOAT_OPS,
    options={
        "optimisation": Option("all", "ONNX Runtime's graph optimisation: all, or off (node by node in float, to tell an optimiser's fault from a model's)"),
    },
)
