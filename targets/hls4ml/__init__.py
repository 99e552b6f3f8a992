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
from isthmus.targets.hls4ml.backends import Backend, backend_problems, chosen_backend, part_problems, settings
from isthmus.targets.hls4ml.board_design import Board, board_files, board_of
from isthmus.targets.hls4ml.design import layers_of
from isthmus.targets.hls4ml.estimate import LABELS, FpgaEstimate, budget
from isthmus.targets.hls4ml.folding import checked_choices, fold
from isthmus.targets.hls4ml.hls_code import extension_code
from isthmus.targets.hls4ml.layout import BORDER_LAYOUTS, border_shape
from isthmus.targets.hls4ml.lower import OPERATORS, Lowered, lower
from isthmus.targets.hls4ml.parts import checked_part
from isthmus.targets.hls4ml.rules import choose_io_type, graph_problems, io_problems
from isthmus.targets.hls4ml.tail import TAIL_FILE, TAIL_OPERATORS, fpga_outputs, tail_file

if TYPE_CHECKING:
    from isthmus.graph import QuantGraph

CONFIG_SCHEMA = 2
CALIBRATED = ("Vitis", "Vivado", "VivadoAccelerator")


@dataclass(frozen=True)
class Hls4mlTarget(Target):
    """power_of_two form -> QONNX -> hls4ml's project for the board's maker; its C simulation is the artifact, synthesis is planned for where the tool is."""

    def check(self, graph: QuantGraph, profile: Profile) -> list[Problem]:
        backend = chosen_backend(profile)
        problems = [*part_problems(backend, profile), *super().check(graph, profile)]
        problems += graph_problems(graph)
        io_type, refused = ("", problems) if problems else _io_type(graph, backend, str(profile.defaults.get("io_type", "auto")))
        return refused or backend_problems(backend, graph, profile, io_type)

    def plan(self, graph: QuantGraph, profile: Profile, options: Mapping[str, Any]) -> BuildPlan:
        """Raises `ProblemsError` where the io type or the folding that the options ask for cannot carry the graph, or nothing fits the part."""
        options = self.with_defaults(options)
        checked_choices(options)
        backend, part = _backend(profile, options), checked_part(profile, options["part"])
        made = _folded(graph, profile, options)
        board = board_of(backend, profile, len(graph.inputs), len(graph.outputs))
        raw = tuple(_border(graph.tensors[tensor]) for tensor in fpga_outputs(graph))
        tail = tail_file(graph, raw)
        return BuildPlan(
            files={
                simulation.QONNX_FILE: made.lowered.model,
                simulation.CONFIG_FILE: _config(graph, made, backend, profile, part, options["clock_ns"], board),
                simulation.ESTIMATE_FILE: (json.dumps(made.estimate.to_json() | budget(graph, profile), indent=1) + "\n").encode(),
                simulation.SOURCE_FILE: simulation.source(backend, board is not None).encode(),
                simulation.HEADER_FILE: simulation.header(backend).encode(),
                **{f"{simulation.STAND_INS_FOLDER}/{name}": text.encode() for name, text in backend.stand_ins.items()},
                **(board_files(board, backend) if board is not None else {}),
                simulation.EXTENSION_FILE: extension_code(backend.name).encode(),
                **({TAIL_FILE: tail} if tail is not None else {}),
            },
            steps=_steps(backend),
            artifact=simulation.LIBRARY_FILE,
            engine="csim",
            inputs=tuple(_border(spec) for spec in graph.inputs),
            outputs=tuple(replace(border, name=spec.name) if spec.is_quantised else spec for spec, border in zip(graph.outputs, raw, strict=True)),
            notes=_notes(made, graph, profile, backend, part, options["clock_ns"], tail is not None),
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
        return [one.as_shown() for one in ([one.estimate for one in made.front] if options["pareto"] else [made.estimate])]


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
    """Searched for, unless the options name a strategy or a reuse factor; "auto" takes the better of both io types, where the graph has both."""
    backend = _backend(profile, options)
    io_type, problems = _io_type(graph, backend, options["io_type"])
    if problems:
        raise ProblemsError("hls4ml", problems)
    both = options["io_type"] == "auto" and "io_stream" in backend.io_types and not io_problems(graph, "io_stream")
    made: list[_Made] = []
    for one in dict.fromkeys((io_type, "io_stream")) if both else (io_type,):
        try:
            made.append(_folded_as(one, graph, profile, options))
        except ProblemsError as error:
            problems += [problem for problem in error.problems if problem not in problems]
    if not made:
        raise ProblemsError("hls4ml", problems)
    best = min(made, key=lambda one: search.rank(one.estimate, _goal(options)))
    return replace(best, front=tuple(search.merged([configuration for one in made for configuration in one.front])))


def _goal(options: Mapping[str, Any]) -> search.Goal:
    return search.Goal(options["max_latency_us"], options["min_fps"])


def _folded_as(io_type: str, graph: QuantGraph, profile: Profile, options: Mapping[str, Any]) -> _Made:
    problems = backend_problems(_backend(profile, options), graph, profile, io_type)
    if problems:
        raise ProblemsError("hls4ml", problems)
    lowered, clock_ns = lower(graph, io_type), options["clock_ns"]
    layers = layers_of(lowered, io_type)
    if options["strategy"] != "auto" or options["reuse_factor"]:
        folding = fold(lowered.products, options["strategy"], options["reuse_factor"], _dsp(profile))
        picked = [folding.layers.get(layer.name, {}) for layer in layers]
        return _Made(io_type, lowered, folding.layers, search.configuration(layers, picked, profile, io_type, clock_ns).estimate, folding.notes)
    goal = _goal(options)
    whole = tuple(search.front(layers, profile, io_type, clock_ns)) if options["pareto"] else ()
    one = search.chosen(whole, goal, profile) if whole else search.found(layers, profile, io_type, clock_ns, goal)
    notes = () if one.estimate.fits else (str(search.too_large(one, profile)),)
    return _Made(io_type, lowered, one.choices, one.estimate, notes, whole)


def _steps(backend: Backend) -> tuple[Step, ...]:
    return (
        Step("convert", ("{python}", "-m", "isthmus.targets.hls4ml.convert"), "hls4ml", (backend.written,), timeout_s=600),
        Step("csim", ("{python}", "-m", "isthmus.targets.hls4ml.compile_simulation"), "g++", (simulation.LIBRARY_FILE,)),
        Step(
            "synthesis",
            ("{python}", "-m", "isthmus.targets.hls4ml.build_project"),
            backend.tools[-1],
            (simulation.BUILD_RECORD,),
            where="toolhost",
            timeout_s=24 * 3600,
        ),
    )


def _backend(profile: Profile, options: Mapping[str, Any]) -> Backend:
    """Raises `IsthmusError` for an unknown name, `ProblemsError` where the board's part is another maker's."""
    backend = chosen_backend(profile, str(options["backend"]))
    problems = part_problems(backend, profile)
    if problems:
        raise ProblemsError("hls4ml", problems)
    return backend


def _io_type(graph: QuantGraph, backend: Backend, wanted: str) -> tuple[str, list[Problem]]:
    """As `choose_io_type`, within what the backend has."""
    if wanted == "auto" and len(backend.io_types) == 1:
        wanted = backend.io_types[0]
    if wanted in ("io_parallel", "io_stream") and wanted not in backend.io_types:
        fix = f"use --set io_type={backend.io_types[0]}, or a board with an AMD part"
        return wanted, [Problem("model", "backend-io", f"{wanted}, which isthmus does not write for hls4ml's {backend.name} backend", fix)]
    return choose_io_type(graph, wanted)


def _dsp(profile: Profile) -> int:
    dsp = profile.facts.get("dsp")
    if not isinstance(dsp, int):
        raise IsthmusError(f"profile {profile.name}: target hls4ml needs facts.dsp (a number)")
    return dsp


def _border(spec: TensorSpec) -> TensorSpec:
    """The raw border in the HLS project's layout: channels last."""
    return replace(spec, shape=border_shape(spec.shape), layout=BORDER_LAYOUTS.get(len(spec.shape), ""))


def _config(graph: QuantGraph, made: _Made, backend: Backend, profile: Profile, part: str, clock_ns: float, board: Board | None) -> bytes:
    layers = {name: {**layer, **made.layers.get(name, {})} for name, layer in made.lowered.layers.items()}
    config = {
        "schema": CONFIG_SCHEMA,
        "backend": backend.name,
        "part": part,
        "settings": settings(backend, graph, profile),
        "board": None if board is None else board.to_json(),
        "clock_ns": clock_ns,
        "io_type": made.io_type,
        "inputs": [spec.size // spec.shape[0] for spec in graph.inputs],
        "outputs": [graph.tensors[tensor].size // graph.tensors[tensor].shape[0] for tensor in fpga_outputs(graph)],
        "nodes": made.lowered.nodes,
        "layers": layers,
        "fifo_depths": dict(made.estimate.fifos),
    }
    return (json.dumps(config, indent=1, sort_keys=True) + "\n").encode()


def _notes(made: _Made, graph: QuantGraph, profile: Profile, backend: Backend, part: str, clock_ns: float, tail: bool) -> tuple[str, ...]:
    project, one = simulation.PROJECT_FOLDER, made.estimate
    over = "; ".join(f"{needed:.0f} {LABELS[name]} where there are {there:.0f}" for name, (needed, there) in one.over().items())
    memory = budget(graph, profile)
    return (
        f"the {backend.title} project for {part} at {clock_ns:g} ns ({made.io_type}) is in {project}/; synthesis and what follows are planned: "
        f"{' '.join(_steps(backend)[-1].argv).replace('{python}', 'python')}",
        *([backend.said] if backend.said else []),
        *([] if backend.name in CALIBRATED else [f"the estimate was calibrated on AMD's reports, not on {backend.title}'s"]),
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
        "io_type": Option("auto", "io_parallel (arrays in registers), io_stream (pixels through fifos), auto: whichever the search finds to be better"),
        "strategy": Option("auto", "latency (weights in the logic), resource (weights in block RAM), auto: searched for, layer by layer"),
        "reuse_factor": Option(0, "how often each multiplier is used for one output; 0: searched for, layer by layer"),
        "max_latency_us": Option(0.0, "the smallest design whose estimated latency is at most this, in microseconds; 0: the fastest that fits"),
        "min_fps": Option(0.0, "the smallest design that is estimated to take as many samples a second; 0: the fastest that fits"),
        "pareto": Option(False, "list every configuration that no other beats in both latency and size"),
        "clock_ns": Option(10.0, "clock period of the design, in nanoseconds"),
        "part": Option("", "the board's device in another package or speed grade; empty: the board's own part"),
        "backend": Option("auto", "hls4ml's Vitis, Vivado, VivadoAccelerator, Catapult, oneAPI or Libero; auto: the board's own"),
    },
)
