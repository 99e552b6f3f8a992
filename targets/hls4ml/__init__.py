# SPDX-License-Identifier: Apache-2.0
"""hls4ml: the form as a Vitis HLS project, and its C simulation compiled with g++, equal to the integer reference bit for bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from isthmus.errors import IsthmusError, Problem, ProblemsError
from isthmus.plan import BuildPlan, Step
from isthmus.profile import Profile
from isthmus.spec import TensorSpec
from isthmus.target import Option, Target
from isthmus.targets.hls4ml import simulation
from isthmus.targets.hls4ml.folding import Folding, checked_choices, fold
from isthmus.targets.hls4ml.hls_code import EXTENSION
from isthmus.targets.hls4ml.layout import BORDER_LAYOUTS, border_shape
from isthmus.targets.hls4ml.lower import OPERATORS, Lowered, lower
from isthmus.targets.hls4ml.rules import choose_io_type, graph_problems
from isthmus.targets.hls4ml.tail import TAIL_FILE, TAIL_OPERATORS, fpga_outputs, tail_file

if TYPE_CHECKING:
    from isthmus.graph import QuantGraph

CONFIG_SCHEMA = 1
BACKEND = "Vitis"  # the one whose code was compared with the reference


@dataclass(frozen=True)
class Hls4mlTarget(Target):
    """power_of_two form -> QONNX -> hls4ml's Vitis project; its C simulation is the artifact, synthesis is planned for where the tool is."""

    def check(self, graph: QuantGraph, profile: Profile) -> list[Problem]:
        problems = [*_backend_problems(profile), *super().check(graph, profile)]
        problems += graph_problems(graph)
        return problems or choose_io_type(graph, str(profile.defaults.get("io_type", "auto")))[1]

    def plan(self, graph: QuantGraph, profile: Profile, options: Mapping[str, Any]) -> BuildPlan:
        """Raises `ProblemsError` where the io type or the folding that the options ask for cannot carry the graph."""
        options = self.with_defaults(options)
        checked_choices(options)
        part, dsp = _board(profile)
        io_type, problems = choose_io_type(graph, options["io_type"])
        if problems:
            raise ProblemsError(self.name, problems)
        lowered = lower(graph, io_type)
        folding = fold(lowered.products, options["strategy"], options["reuse_factor"], dsp)
        raw = tuple(_border(graph.tensors[tensor]) for tensor in fpga_outputs(graph))
        tail = tail_file(graph, raw)
        return BuildPlan(
            files={
                simulation.QONNX_FILE: lowered.model,
                simulation.CONFIG_FILE: _config(graph, lowered, folding, part, io_type, options["clock_ns"]),
                simulation.SOURCE_FILE: simulation.SOURCE.encode(),
                simulation.HEADER_FILE: simulation.HEADER.encode(),
                simulation.EXTENSION_FILE: EXTENSION.encode(),
                simulation.SYNTHESIS_FILE: simulation.SYNTHESIS.encode(),
                **({TAIL_FILE: tail} if tail is not None else {}),
            },
            steps=_steps(),
            artifact=simulation.LIBRARY_FILE,
            engine="csim",
            inputs=tuple(_border(spec) for spec in graph.inputs),
            outputs=tuple(replace(border, name=spec.name) if spec.is_quantised else spec for spec, border in zip(graph.outputs, raw, strict=True)),
            notes=_notes(part, io_type, folding, dsp, options["clock_ns"], tail is not None),
            options=options,
        )


def _steps() -> tuple[Step, ...]:
    project = simulation.PROJECT_FOLDER
    return (
        Step(
            "convert",
            ("{python}", "-m", "isthmus.targets.hls4ml.convert"),
            "hls4ml",
            (f"{project}/firmware/{simulation.PROJECT_NAME}.cpp", f"{project}/build_prj.tcl"),
            timeout_s=600,
        ),
        Step("csim", ("{python}", "-m", "isthmus.targets.hls4ml.compile_simulation"), "g++", (simulation.LIBRARY_FILE,)),
        Step(
            "synthesis",
            ("vitis_hls", "-f", simulation.SYNTHESIS_FILE),
            "vitis_hls",
            (f"{project}/{simulation.PROJECT_NAME}_prj/solution1/impl/ip",),
            where="toolhost",
            timeout_s=24 * 3600,
        ),
    )


def _backend_problems(profile: Profile) -> list[Problem]:
    backend = profile.toolchain.get("backend", BACKEND)
    if backend == BACKEND:
        return []
    found = f"{profile.board} needs hls4ml's {backend} backend, and isthmus writes projects for {BACKEND} only"
    return [Problem(profile.name, "backend", found, "choose a board with an AMD part ('isthmus targets' lists them)")]


def _board(profile: Profile) -> tuple[str, int]:
    """(FPGA part, DSP blocks)."""
    part, dsp = profile.toolchain.get("part"), profile.facts.get("dsp")
    if not isinstance(part, str) or not isinstance(dsp, int):
        raise IsthmusError(f"profile {profile.name}: target hls4ml needs toolchain.part (a Xilinx part name) and facts.dsp (a number)")
    return part, dsp


def _border(spec: TensorSpec) -> TensorSpec:
    """The raw border in the HLS project's layout: channels last."""
    return replace(spec, shape=border_shape(spec.shape), layout=BORDER_LAYOUTS.get(len(spec.shape), ""))


def _config(graph: QuantGraph, lowered: Lowered, folding: Folding, part: str, io_type: str, clock_ns: float) -> bytes:
    layers = {name: {**layer, **folding.layers.get(name, {})} for name, layer in lowered.layers.items()}
    config = {
        "schema": CONFIG_SCHEMA,
        "backend": BACKEND,
        "part": part,
        "clock_ns": clock_ns,
        "io_type": io_type,
        "inputs": [spec.size // spec.shape[0] for spec in graph.inputs],
        "outputs": [graph.tensors[tensor].size // graph.tensors[tensor].shape[0] for tensor in fpga_outputs(graph)],
        "nodes": lowered.nodes,
        "layers": layers,
    }
    return (json.dumps(config, indent=1, sort_keys=True) + "\n").encode()


def _notes(part: str, io_type: str, folding: Folding, dsp: int, clock_ns: float, tail: bool) -> tuple[str, ...]:
    project, script = simulation.PROJECT_FOLDER, simulation.SYNTHESIS_FILE
    cycles = f"the slowest layer busy for about {folding.cycles} cycles a sample"
    return (
        f"the Vitis HLS project for {part} at {clock_ns:g} ns ({io_type}) is in {project}/; C synthesis is planned: vitis_hls -f {script}",
        f"folded onto {folding.multipliers} multipliers ({dsp} DSP blocks on the board), {cycles}: planned, not synthesised",
        *(["the softmax at the end runs on the host, on the FPGA's int8 values"] if tail else []),
    )


TARGET = Hls4mlTarget(
    name="hls4ml",
    ops=OPERATORS,
    float_ops=TAIL_OPERATORS,
    schemes=frozenset({"power_of_two"}),
    options={
        "io_type": Option("auto", "io_parallel (arrays in registers), io_stream (pixels through fifos), auto: io_parallel where it fits"),
        "strategy": Option("auto", "latency (weights in the logic), resource (weights in block RAM), auto: by the board's DSP blocks"),
        "reuse_factor": Option(0, "how often each multiplier is used for one output; 0: the smallest that fits the board's DSP blocks"),
        "clock_ns": Option(10.0, "clock period of the design, in nanoseconds"),
    },
)
