# SPDX-License-Identifier: Apache-2.0
"""Trees: a quantised ensemble by conifer to a Vitis HLS project, run in conifer's C++ backend; on every other board as ONNX in ONNX Runtime.

A tree model goes through this target whatever target the profile names for networks; the profile's `arch` chooses the road.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from isthmus.errors import IsthmusError, Problem
from isthmus.plan import BuildPlan, Step
from isthmus.profile import Profile
from isthmus.target import Option, Target
from isthmus.targets.trees import simulation
from isthmus.tree_form import TreeForm

ONNX_FILE = "model.onnx"
FPGA = "fpga"
BACKENDS = ("Vitis", "Vivado", "VivadoAccelerator")  # AMD's tools: what conifer's HLS code is written for
MAX_DEPTH = 16
WHY_DEPTH = "conifer writes every node of a tree as logic of its own, and a level more may double it"


@dataclass(frozen=True)
class TreesTarget(Target):
    """Takes a `TreeForm`. Exact: both backends add the reference's integers."""

    def check(self, graph: Any, profile: Profile) -> list[Problem]:
        if not isinstance(graph, TreeForm):
            return [Problem("model", "trees", "a network, and target trees takes tree models", f"compile it for a network target, not for {profile.name}")]
        return _fpga_problems(graph, profile) if profile.arch == FPGA else []

    def plan(self, graph: Any, profile: Profile, options: Mapping[str, Any]) -> BuildPlan:
        options = self.with_defaults(options)
        form: TreeForm = graph
        if profile.arch != FPGA:
            return BuildPlan(files={ONNX_FILE: form.to_bytes()}, steps=(), artifact=ONNX_FILE, engine="onnxruntime", inputs=form.inputs, outputs=form.outputs)
        part = profile.toolchain.get("part")
        if not isinstance(part, str):
            raise IsthmusError(f"profile {profile.name}: target trees needs toolchain.part (a part name)")
        if not options["clock_ns"] > 0:
            raise IsthmusError(f"option clock_ns of target trees: expected more than 0, found {options['clock_ns']}")
        return BuildPlan(
            files={
                simulation.SIDE_FILE: simulation.side_file(form),
                simulation.CONFIG_FILE: simulation.config_file(part, options["clock_ns"]),
                simulation.SOURCE_FILE: simulation.source(form.feature_bits, form.score_bits).encode(),
                simulation.PROJECT_SOURCE_FILE: simulation.PROJECT_SOURCE.encode(),
                simulation.SYNTHESIS_FILE: simulation.SYNTHESIS.encode(),
            },
            steps=_steps(),
            artifact=simulation.LIBRARY_FILE,
            engine="treesim",
            inputs=form.inputs,
            outputs=form.outputs,
            notes=_notes(form, part, options["clock_ns"]),
            options=options,
        )


def estimated_lut(form: TreeForm) -> int:
    """LUTs of the comparators and of the leaves' values alone: a comparison with a constant takes about one LUT for two bits."""
    leaves = form.comparisons + len(form.trees)
    return form.comparisons * -(-form.feature_bits // 2) + leaves * -(-form.score_bits // 6)


def _fpga_problems(form: TreeForm, profile: Profile) -> list[Problem]:
    problems = []
    backend = profile.toolchain.get("backend", BACKENDS[0])
    if backend not in BACKENDS:
        found = f"{profile.board} needs {backend}, and conifer writes HLS code for AMD's tools"
        problems.append(Problem(profile.name, "backend", found, "choose a board with an AMD part ('isthmus targets' lists them)"))
    if form.depth > MAX_DEPTH:
        problems.append(
            Problem("trees", "depth", f"depth {form.depth}, and {MAX_DEPTH} is the most: {WHY_DEPTH}", f"train with a max_depth of at most {MAX_DEPTH}")
        )
    lut, needed = profile.facts.get("lut"), estimated_lut(form)
    if isinstance(lut, int) and needed > lut:
        found = f"{form.comparisons} comparisons of {form.feature_bits} bits need about {needed} LUT (estimated), and {profile.board} has {lut}"
        problems.append(Problem("trees", "lut", found, "train fewer or shallower trees, or choose a larger part"))
    return problems


def _steps() -> tuple[Step, ...]:
    project = simulation.PROJECT_FOLDER
    return (
        Step(
            "convert",
            ("{python}", "-m", "isthmus.targets.trees.convert"),
            "conifer",
            (f"{project}/firmware/parameters.h", f"{project}/build_hls.tcl", simulation.MODEL_FILE),
            timeout_s=600,
        ),
        Step("csim", ("{python}", "-m", "isthmus.targets.trees.compile_simulation"), "g++", (simulation.LIBRARY_FILE,), timeout_s=600),
        Step(
            "synthesis",
            ("vitis_hls", "-f", simulation.SYNTHESIS_FILE),
            "vitis_hls",
            (f"{project}/{simulation.PROJECT_NAME}/solution1/impl/ip",),
            where="toolhost",
            timeout_s=24 * 3600,
        ),
    )


def _notes(form: TreeForm, part: str, clock_ns: float) -> tuple[str, ...]:
    return (
        f"conifer's HLS project for {part} at {clock_ns:g} ns is in {simulation.PROJECT_FOLDER}/: {len(form.trees)} trees of depth {form.depth},"
        f" ap_fixed<{form.feature_bits}> features, ap_fixed<{form.score_bits}> scores; about {estimated_lut(form)} LUT, estimated, not synthesised",
        "compared in conifer's C++ backend; the host turns features into integers (features.json), the FPGA compares and adds",
    )


TARGET = TreesTarget(name="trees", ops=frozenset(), options={"clock_ns": Option(10.0, "clock period of the design, in nanoseconds")})
