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
from isthmus.target import Estimate, Option, Target
from isthmus.targets.hls4ml import search, simulation
from isthmus.targets.hls4ml.design import layers_of
from isthmus.targets.hls4ml.estimate import LABELS, FpgaEstimate, budget
from isthmus.targets.hls4ml.folding import checked_choices, fold
from isthmus.targets.hls4ml.hls_code import EXTENSION
from isthmus.targets.hls4ml.layout import BORDER_LAYOUTS, border_shape
from isthmus.targets.hls4ml.lower import OPERATORS, Lowered, lower
from isthmus.targets.hls4ml.rules import choose_io_type, graph_problems, io_problems
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
        """Raises `ProblemsError` where the io type or the folding that the options ask for cannot carry the graph, or nothing fits the part."""
        options = self.with_defaults(options)
        checked_choices(options)
        part, _ = _board(profile)
        made = _folded(graph, profile, options)
        raw = tuple(_border(graph.tensors[tensor]) for tensor in fpga_outputs(graph))
        tail = tail_file(graph, raw)
        return BuildPlan(
            files={
                simulation.QONNX_FILE: made.lowered.model,
                simulation.CONFIG_FILE: _config(graph, made, part, options["clock_ns"]),
                simulation.ESTIMATE_FILE: (json.dumps(made.estimate.to_json() | budget(graph, profile), indent=1) + "\n").encode(),
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
            notes=_notes(made, graph, profile, part, options["clock_ns"], tail is not None),
            options=options,
        )

    def estimate(self, graph: QuantGraph, profile: Profile, options: Mapping[str, Any]) -> list[Estimate]:
        """The configuration that `plan` would take; with `pareto` the whole front, fastest first."""
        options = self.with_defaults(options)
        checked_choices(options)
        problems = self.check(graph, profile)
        if problems:
            raise ProblemsError(self.name, problems)
        made = _folded(graph, profile, options)
        shown = [made.estimate] if not options["pareto"] else [one.estimate for one in made.front]
        return [one.as_shown(made.io_type) for one in shown]


@dataclass(frozen=True)
class _Made:
    """The graph lowered for one io type, with a folding and its estimate; `front` where it was asked for."""

    io_type: str
    lowered: Lowered
    layers: Mapping[str, Mapping[str, Any]]
    estimate: FpgaEstimate
    notes: tuple[str, ...] = ()
    front: tuple[search.Configuration, ...] = ()


def _folded(graph: QuantGraph, profile: Profile, options: Mapping[str, Any]) -> _Made:
    """Searched for, unless the options name a strategy or a reuse factor. "auto" turns to io_stream where nothing fits in io_parallel."""
    io_type, problems = choose_io_type(graph, options["io_type"])
    if problems:
        raise ProblemsError("hls4ml", problems)
    try:
        made = _folded_as(io_type, graph, profile, options)
        if made.estimate.fits or options["io_type"] != "auto" or io_type == "io_stream" or io_problems(graph, "io_stream"):
            return made
    except ProblemsError:
        if options["io_type"] != "auto" or io_type == "io_stream" or io_problems(graph, "io_stream"):
            raise
    return _folded_as("io_stream", graph, profile, options)


def _folded_as(io_type: str, graph: QuantGraph, profile: Profile, options: Mapping[str, Any]) -> _Made:
    lowered, clock_ns = lower(graph, io_type), options["clock_ns"]
    layers = layers_of(lowered, io_type)
    if options["strategy"] != "auto" or options["reuse_factor"]:
        folding = fold(lowered.products, options["strategy"], options["reuse_factor"], _board(profile)[1])
        picked = [folding.layers.get(layer.name, {}) for layer in layers]
        return _Made(io_type, lowered, folding.layers, search.configuration(layers, picked, profile, io_type, clock_ns).estimate, folding.notes)
    goal = search.Goal(options["max_latency_us"], options["min_fps"])
    whole = tuple(search.front(layers, profile, io_type, clock_ns)) if options["pareto"] else ()
    one = search.chosen(whole, goal, profile) if whole else search.found(layers, profile, io_type, clock_ns, goal)
    notes = () if one.estimate.fits else (str(search.too_large(one, profile)),)
    return _Made(io_type, lowered, one.choices, one.estimate, notes, whole)


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
            ("{python}", "-m", "isthmus.targets.hls4ml.build_project"),
            "vitis_hls",
            (simulation.BUILD_RECORD,),
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


def _config(graph: QuantGraph, made: _Made, part: str, clock_ns: float) -> bytes:
    layers = {name: {**layer, **made.layers.get(name, {})} for name, layer in made.lowered.layers.items()}
    config = {
        "schema": CONFIG_SCHEMA,
        "backend": BACKEND,
        "part": part,
        "clock_ns": clock_ns,
        "io_type": made.io_type,
        "inputs": [spec.size // spec.shape[0] for spec in graph.inputs],
        "outputs": [graph.tensors[tensor].size // graph.tensors[tensor].shape[0] for tensor in fpga_outputs(graph)],
        "nodes": made.lowered.nodes,
        "layers": layers,
        "fifo_depths": dict(made.estimate.fifos),
    }
    return (json.dumps(config, indent=1, sort_keys=True) + "\n").encode()


def _notes(made: _Made, graph: QuantGraph, profile: Profile, part: str, clock_ns: float, tail: bool) -> tuple[str, ...]:
    project, one = simulation.PROJECT_FOLDER, made.estimate
    over = "; ".join(f"{needed:.0f} {LABELS[name]} where there are {there:.0f}" for name, (needed, there) in one.over().items())
    memory = budget(graph, profile)
    return (
        f"the Vitis HLS project for {part} at {clock_ns:g} ns ({made.io_type}) is in {project}/; synthesis and what follows are planned: "
        f"{' '.join(_steps()[-1].argv).replace('{python}', 'python')}",
        f"{one.sentence()}; planned, not synthesised",
        *([f"estimated not to fit {profile.board}: {over}"] if over and not made.notes else []),
        *(
            []
            if memory["memory_fits"]
            else [f"weights and activations need {memory['needed_bytes']} bytes of on-chip memory, {profile.board} has {memory['on_chip_bytes']}"]
        ),
        *made.notes,
        *(f"front {place}, estimated: {line}" for place, line in enumerate(search.table(made.front), start=1)),
        *(["the softmax at the end runs on the host, on the FPGA's int8 values"] if tail else []),
    )


TARGET = Hls4mlTarget(
    name="hls4ml",
    ops=OPERATORS,
    float_ops=TAIL_OPERATORS,
    schemes=frozenset({"power_of_two"}),
    options={
        "io_type": Option("auto", "io_parallel (arrays in registers), io_stream (pixels through fifos), auto: io_parallel where it fits"),
        "strategy": Option("auto", "latency (weights in the logic), resource (weights in block RAM), auto: searched for, layer by layer"),
        "reuse_factor": Option(0, "how often each multiplier is used for one output; 0: searched for, layer by layer"),
        "max_latency_us": Option(0.0, "the smallest design whose estimated latency is at most this, in microseconds; 0: the fastest that fits"),
        "min_fps": Option(0.0, "the smallest design that is estimated to take as many samples a second; 0: the fastest that fits"),
        "pareto": Option(False, "list every configuration that no other beats in both latency and size"),
        "clock_ns": Option(10.0, "clock period of the design, in nanoseconds"),
    },
)
