# SPDX-License-Identifier: Apache-2.0
"""Target `jetson`: the graph as the board's TensorRT wants it, in int8 and in half precision, and a plan that builds both engines on the board.

What can be known on another machine is checked there: NVIDIA's TensorRT-RTX parses and compiles the graphs ahead of time. The engines
themselves, their speed and their exact numbers are the board's to tell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

from isthmus.errors import Problem
from isthmus.graph import QuantGraph, QuantNode
from isthmus.lint import LintRow
from isthmus.ops import OPS
from isthmus.plan import BuildPlan, Step
from isthmus.predict import predictions
from isthmus.profile import Profile
from isthmus.roofline import program_of_graph
from isthmus.spec import TensorSpec
from isthmus.target import Estimate, Option, Target, carried_steps
from isthmus.targets.jetson.dialects import Dialect, dialect_of
from isthmus.targets.jetson.dla import dla_report
from isthmus.targets.jetson.engines import ARTIFACT, ENGINE, FLOAT_STEPS, SCRIPT, Engine, engines_of, has_int8
from isthmus.targets.jetson.float_graph import beyond_fp16
from isthmus.targets.jetson.lint import lint, summary
from isthmus.targets.jetson.lower import LOWERINGS, end_pads

CHECK, KERNELS = "check", "kernels.json"
CHECK_TIMEOUT_S = 600

# Float islands that TensorRT-RTX 1.7 compiles (tests/tool/test_jetson.py) and that stand in the operator table of TensorRT 10.0's parser.
FLOAT_OPS = frozenset(
    {
        *("Softmax", "LogSoftmax", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "Elu", "Selu", "LeakyRelu", "Softplus", "Softsign", "Gelu", "Mish", "Erf"),
        *("Exp", "Log", "Sqrt", "Reciprocal", "Abs", "Neg", "Relu", "Clip", "Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Concat", "Flatten", "Reshape"),
        *("Transpose", "ReduceMean", "ReduceSum", "ReduceMax", "LayerNormalization", "MatMul", "Gemm", "ArgMax", "Cast", "GridSample"),
        *("Conv", "ConvTranspose", "MaxPool", "AveragePool", "GlobalAveragePool", "PRelu", "Squeeze", "Unsqueeze", "Slice", "Split", "Gather", "Expand"),
        *("DepthToSpace", "SpaceToDepth", "Resize", "Identity"),
    }
)


@dataclass(frozen=True)
class JetsonTarget(Target):
    """Takes the schemes with zero point 0; any scheme where the board has no int8. Float32 border: TensorRT quantises inside the engine."""

    def check(self, graph: QuantGraph, profile: Profile) -> list[Problem]:
        dialect = dialect_of(str(profile.toolchain["tensorrt"]))
        found = super().check(graph, profile)
        if not has_int8(profile):
            found = [problem for problem in found if problem.rule != "scheme"]
        for node in graph.nodes:
            found += [*_pool_problems(graph, node), *_dialect_problems(node, dialect)]
        return found

    def lint(self, graph: QuantGraph, profile: Profile) -> list[LintRow]:
        """What runs in int8, what stays float and why: `isthmus.targets.jetson.lint`."""
        return lint(graph, profile)

    def estimate(self, graph: QuantGraph, profile: Profile, options: Mapping[str, Any]) -> list[Estimate]:
        """The int8 and the FP16 engine's latency, predicted: `isthmus.predict`."""
        return predictions(program_of_graph(graph, (row.node for row in self.lint(graph, profile) if row.runs == "float")), profile)

    def plan(self, graph: QuantGraph, profile: Profile, options: Mapping[str, Any]) -> BuildPlan:
        chosen = self.with_defaults(options)
        dialect = dialect_of(str(profile.toolchain["tensorrt"]))
        engines, files = engines_of(graph, profile, dialect, chosen["dla"], chosen["half_islands"])
        int8 = has_int8(profile)
        rounding = [node for node in graph.nodes if node.kind == "int8" and not OPS[node.op].passes_scale]
        return BuildPlan(
            files={**files, SCRIPT: (resources.files(__package__) / SCRIPT).read_bytes()},
            steps=(_check(profile, engines, chosen["check_nearest"]), *(engine.step for engine in engines)),
            artifact=ARTIFACT,
            engine="tensorrt",
            inputs=tuple(map(_float_border, graph.inputs)),
            outputs=tuple(map(_float_border, graph.outputs)),
            runs_here=False,
            max_lsb=carried_steps(len(rounding)) if int8 else FLOAT_STEPS,
            why_lsb=WHY_INT8 if int8 else WHY_FLOAT,
            notes=tuple(_notes(graph, profile, dialect, engines, chosen["dla"])),
            options=chosen,
        )


WHY_INT8 = (
    "TensorRT fuses operators and chooses kernels on the board, and NVIDIA documents no rounding for them: a layer may fall to the other side of a tie, and"
    " later layers may carry that on; not measured yet"
)
WHY_FLOAT = "the board has no int8: its engine computes in half precision and rounds nothing to int8 between layers; not measured yet"


def _check(profile: Profile, engines: Sequence[Engine], nearest: bool) -> Step:
    sms = [str(sm) for sm in profile.toolchain["check_sm"]][: 1 if nearest else None]
    models = dict.fromkeys(engine.model for engine in engines)
    return Step(
        CHECK,
        ("{python}", "-m", "isthmus.targets.jetson.check_with_rtx", *models, "--sm", *sms, "--kernels", KERNELS),
        tool="tensorrt_rtx",
        outputs=(KERNELS,),
        optional=True,
        timeout_s=CHECK_TIMEOUT_S,
    )


def _float_border(spec: TensorSpec) -> TensorSpec:
    """Real numbers; scale and zero point are those of the quantisers inside, by which the reference's steps are fed and read."""
    return replace(spec, dtype="float32")


def _pool_problems(graph: QuantGraph, node: QuantNode) -> list[Problem]:
    if node.kind == "border" or node.op not in ("MaxPool", "AveragePool"):
        return []
    problems = []
    if set(node.attributes.get("dilations", [1])) != {1}:
        found = f"{node.op} with dilations {node.attributes['dilations']}"
        problems.append(Problem(node.name, "pool-dilation", found, "TensorRT pools without dilation: use a larger kernel, or a strided layer"))
    if node.kind == "int8" and node.op == "AveragePool" and node.attributes["count_include_pad"] and end_pads(graph, node) != list(node.attributes["pads"]):
        found = "AveragePool with ceil_mode and count_include_pad whose last window hangs over"
        fix = "TensorRT cannot count padding and leave out the overhang: drop ceil_mode or count_include_pad"
        problems.append(Problem(node.name, "pool-overhang", found, fix))
    return problems


def _dialect_problems(node: QuantNode, dialect: Dialect) -> list[Problem]:
    if node.kind == "border" or node.op not in dialect.missing:
        return []
    found = f"{node.op}, which the parser of {dialect.name} (JetPack {dialect.jetpack}) has not"
    return [Problem(node.name, "dialect", found, "write it in operators the parser has, or take a board with a later JetPack")]


def _notes(graph: QuantGraph, profile: Profile, dialect: Dialect, engines: Sequence[Engine], dla: bool) -> list[str]:
    of_board = profile.toolchain
    sm, names = of_board["check_sm"][0], [engine.name for engine in engines]
    notes = [
        f"planned: 'python3 {SCRIPT}' in this folder on the board makes {ENGINE}; it needs TensorRT (JetPack {of_board['jetpack']} brings"
        f" {of_board['tensorrt']}) and nothing else; the graph is in the dialect of {dialect.name}",
        f"step {CHECK} compiles the graph with TensorRT-RTX, SM{sm} being the nearest GPU it knows; the board is SM{of_board['sm']}: its engine, latency and"
        f" exact numbers are measured on the board; {KERNELS} lists what was compiled",
    ]
    if not has_int8(profile):
        notes.append(f"{profile.board} has no int8: the graph is written without quantisers, with float weights, and its engine is FP16")
    else:
        notes.append(summary(lint(graph, profile)))
        if "fp16" in names:
            notes.append("an FP16 engine is planned beside the int8 one: at batch 1 either may be the faster, which the board tells")
        else:
            notes.append(f"no FP16 engine is planned: half precision cannot hold {', '.join(beyond_fp16(graph)[:3])}")
    if dla:
        notes += dla_report(graph, profile)
    return notes


TARGET = JetsonTarget(
    name="jetson",
    ops=frozenset(LOWERINGS),
    float_ops=FLOAT_OPS,
    schemes=frozenset({"power_of_two", "symmetric"}),
    options={
        "dla": Option(
            False, "a third engine that places layers on the deep learning accelerator where it takes them; the notes list which fall back to the GPU"
        ),
        "check_nearest": Option(False, "compile ahead of time for the nearest GPU that TensorRT-RTX knows alone, and not for a second one: half the time"),
        "half_islands": Option(False, "float islands of the int8 engine in half precision: faster, and some three digits instead of seven"),
    },
)
