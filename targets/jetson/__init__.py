# SPDX-License-Identifier: Apache-2.0
"""Target `jetson`: the graph as TensorRT wants it, and a plan that builds the engine on the board.

What can be known on another machine is checked there: NVIDIA's TensorRT-RTX parses and compiles the graph ahead of time. The engine
itself, its speed and its exact numbers are the board's to tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

from isthmus.errors import Problem
from isthmus.graph import QuantGraph, QuantNode
from isthmus.plan import BuildPlan, Step
from isthmus.profile import Profile
from isthmus.spec import TensorSpec
from isthmus.target import Target
from isthmus.targets.jetson.lower import LOWERINGS, end_pads, onnx_from_graph

ARTIFACT = "model.onnx"
ENGINE = "model.engine"
SCRIPT = "build_engine.py"
CHECK_TIMEOUT_S = 600

# Float islands that TensorRT-RTX 1.7 compiles (tests/tool/test_jetson.py) and that stand in the operator table of TensorRT 10.0's parser.
FLOAT_OPS = frozenset(
    {
        *("Softmax", "LogSoftmax", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "Elu", "Selu", "LeakyRelu", "Softplus", "Softsign", "Gelu", "Erf", "Exp"),
        *("Log", "Sqrt", "Reciprocal", "Abs", "Neg", "Relu", "Clip", "Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Concat", "Flatten", "Reshape"),
        *("Transpose", "ReduceMean", "ReduceSum", "ReduceMax", "LayerNormalization", "MatMul", "Gemm"),
    }
)


@dataclass(frozen=True)
class JetsonTarget(Target):
    """Takes the schemes with zero point 0. Float32 border: TensorRT quantises inside the engine."""

    def check(self, graph: QuantGraph, profile: Profile) -> list[Problem]:
        return [*super().check(graph, profile), *(problem for node in graph.nodes for problem in _pool_problems(graph, node))]

    def plan(self, graph: QuantGraph, profile: Profile, options: Mapping[str, Any]) -> BuildPlan:
        sm = str(profile.toolchain["check_sm"])
        check = Step(
            f"check-sm{sm}",
            ("{python}", "-m", "isthmus.targets.jetson.check_with_rtx", ARTIFACT, "--sm", sm),
            tool="tensorrt_rtx",
            outputs=(),
            optional=True,
            timeout_s=CHECK_TIMEOUT_S,
        )
        engine = Step("engine", ("python3", SCRIPT), tool="tensorrt", outputs=(ENGINE,), where="board")
        return BuildPlan(
            files={ARTIFACT: onnx_from_graph(graph), SCRIPT: (resources.files(__package__) / SCRIPT).read_bytes()},
            steps=(check, engine),
            artifact=ARTIFACT,
            engine="tensorrt",
            inputs=tuple(map(_float_border, graph.inputs)),
            outputs=tuple(map(_float_border, graph.outputs)),
            runs_here=False,
            max_lsb=1,
            why_lsb="TensorRT fuses operators and chooses kernels on the board, and NVIDIA documents no rounding for them; not measured yet",
            notes=_notes(profile, sm),
            options=self.with_defaults(options),
        )


def _float_border(spec: TensorSpec) -> TensorSpec:
    return replace(spec, dtype="float32", scale=None, zero_point=None)


def _pool_problems(graph: QuantGraph, node: QuantNode) -> list[Problem]:
    if node.kind != "int8" or node.op not in ("MaxPool", "AveragePool"):
        return []
    problems = []
    if set(node.attributes["dilations"]) != {1}:
        found = f"{node.op} with dilations {node.attributes['dilations']}"
        problems.append(Problem(node.name, "pool-dilation", found, "TensorRT pools without dilation: use a larger kernel, or a strided layer"))
    if node.op == "AveragePool" and node.attributes["count_include_pad"] and end_pads(graph, node) != list(node.attributes["pads"]):
        found = "AveragePool with ceil_mode and count_include_pad whose last window hangs over"
        fix = "TensorRT cannot count padding and leave out the overhang: drop ceil_mode or count_include_pad"
        problems.append(Problem(node.name, "pool-overhang", found, fix))
    return problems


def _notes(profile: Profile, sm: str) -> tuple[str, ...]:
    of_board = profile.toolchain
    return (
        f"planned: 'python3 {SCRIPT}' in this folder on the board makes {ENGINE}; it needs TensorRT 10 or later"
        f" (JetPack {of_board['jetpack']} brings {of_board['tensorrt']}) and nothing else",
        f"step check-sm{sm} compiles the graph with TensorRT-RTX for SM{sm}, the nearest GPU it knows; the board is SM{of_board['sm']}: its engine, latency and"
        " exact numbers are measured on the board",
    )


TARGET = JetsonTarget(
    name="jetson",
    ops=frozenset(LOWERINGS) - {"QuantizeLinear", "DequantizeLinear"},
    float_ops=FLOAT_OPS,
    schemes=frozenset({"power_of_two", "symmetric"}),
)
