# SPDX-License-Identifier: Apache-2.0
"""The plan and its steps: conversion, compilation, options."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from isthmus.errors import IsthmusError
from isthmus.graph import QuantGraph
from isthmus.plan import BuildPlan, execute
from isthmus.targets.hls4ml import TARGET, simulation
from isthmus.tools import find_tool

Built = tuple[QuantGraph, BuildPlan, Path]


def test_a_type_that_was_not_planned_ends_the_conversion(hls: Any, tools: None, tmp_path: Path) -> None:
    plan = hls.plan(hls.classifier())
    config = json.loads(plan.files[simulation.CONFIG_FILE])
    name = next(name for name in config["layers"] if name.endswith("_conv"))
    del config["layers"][name]["Precision"]["accum"]
    spoilt = replace(plan, files={**plan.files, simulation.CONFIG_FILE: json.dumps(config).encode()})
    with pytest.raises(IsthmusError, match=rf"{name} \(Conv2D\): accum fell back to a default type"):
        execute(spoilt, tmp_path)


def test_a_failing_compiler_shows_its_last_lines(classifier: Built, tmp_path: Path) -> None:
    _, plan, folder = classifier
    shutil.copytree(folder, tmp_path / "copy")
    broken = replace(plan, files={simulation.SOURCE_FILE: b"int main( { return 0; }\n"}, steps=plan.steps[1:2])
    with pytest.raises(IsthmusError, match=r"step csim \(g\+\+\) ended with code 1:(.|\n)*library\.cpp:1:.*error"):
        execute(broken, tmp_path / "copy")


def test_a_missing_compiler_is_one_sentence(hls: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan = hls.plan(hls.classifier())
    monkeypatch.setenv("PATH", str(tmp_path))
    find_tool.cache_clear()
    try:
        with pytest.raises(IsthmusError, match=r"step csim needs g\+\+, which is not here: apt install g\+\+"):
            execute(replace(plan, steps=plan.steps[1:2]), tmp_path)
    finally:
        find_tool.cache_clear()


# ---- the plan
def test_the_plan_names_every_type_and_starts_no_tool(hls: Any) -> None:
    graph = hls.classifier()
    plan = hls.plan(graph)
    assert plan.digest() == hls.plan(hls.classifier()).digest()
    assert [(step.name, step.tool, step.where) for step in plan.steps] == [
        ("convert", "hls4ml", "host"),
        ("csim", "g++", "host"),
        ("synthesis", "vitis_hls", "toolhost"),
    ]
    assert (plan.engine, plan.artifact, plan.max_lsb) == ("csim", "csim/libmodel.so", 0)
    assert [(spec.name, spec.shape, spec.layout, spec.dtype) for spec in (*plan.inputs, *plan.outputs)] == [
        ("image", (1, 6, 6, 1), "NHWC", "int8"),
        ("logits", (1, 10), "NC", "int8"),
    ]
    config = json.loads(plan.files[simulation.CONFIG_FILE])
    assert (config["part"], config["clock_ns"], config["io_type"]) == ("xc7z020clg400-1", 10.0, "io_parallel")
    precisions = [value for layer in config["layers"].values() for value in layer["Precision"].values()]
    assert all(re.fullmatch(r"ap_fixed<\d+,-?\d+(,AP_RND_CONV,AP_SAT)?>|auto", value) for value in precisions)
    assert any("planned, not synthesised" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"io_type": "io_serial"}, "io_type of target hls4ml: 'io_serial' is not one of auto, io_parallel, io_stream"),
        ({"strategy": "fast"}, "strategy of target hls4ml: 'fast' is not one of"),
        ({"reuse_factor": -1}, "reuse_factor of target hls4ml: -1 is below 0"),
        ({"clock_ns": 0.0}, "clock_ns of target hls4ml: 0.0 is not above 0"),
        ({"clock": 5}, "has no option 'clock'"),
    ],
)
def test_bad_options(hls: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(IsthmusError, match=message):
        TARGET.plan(hls.classifier(), hls.profile, options)


def test_a_profile_without_a_part_is_refused(hls: Any) -> None:
    with pytest.raises(IsthmusError, match=r"needs toolchain\.part"):
        TARGET.plan(hls.classifier(), replace(hls.profile, toolchain={}), {})
