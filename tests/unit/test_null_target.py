# SPDX-License-Identifier: Apache-2.0
"""The worked example: target `null`, engine `null`. It takes everything, computes nothing, and never claims otherwise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from isthmus.bench import Rules, measure
from isthmus.errors import IsthmusError
from isthmus.form_writer import FormWriter
from isthmus.graph import QuantGraph
from isthmus.plan import execute
from isthmus.profile import load_profile
from isthmus.registry import load_target
from isthmus.runtimes.null import NullSession, open_session


def graph_with_tail() -> QuantGraph:
    w = FormWriter()
    x = w.relu(w.input("x", (1, 8), scale=2.0**-4))
    w.output(x, "y")
    w.float_node("Sin", [w.dequantise(x)], ["wave"], "wave")
    w.float_output("wave")
    return w.graph()


def session_of(graph: QuantGraph, folder: Path) -> NullSession:
    plan = load_target("null").plan(graph, load_profile("null"), {})
    execute(plan, folder)
    return open_session(folder, {"artifact": plan.artifact, "inputs": [s.to_json() for s in plan.inputs], "outputs": [s.to_json() for s in plan.outputs]})


def test_it_takes_what_no_other_target_takes() -> None:
    graph = graph_with_tail()
    assert load_target("null").check(graph, load_profile("null")) == []
    assert load_target("hls4ml").check(graph, load_profile("pynq-z2")) != []


def test_its_artifact_is_the_form_itself(tmp_path: Path) -> None:
    graph = graph_with_tail()
    session_of(graph, tmp_path)
    assert QuantGraph.load(tmp_path / "model.onnx").digest == graph.digest


def test_it_promises_nothing() -> None:
    plan = load_target("null").plan(graph_with_tail(), load_profile("null"), {})
    assert not plan.runs_here
    assert plan.notes == ("computes nothing, so there is nothing to verify",)


def test_its_session_has_the_border_and_no_numbers(tmp_path: Path) -> None:
    with session_of(graph_with_tail(), tmp_path) as session:
        outputs = session.run_quantised({"x": np.full((1, 8), 127, np.int8)})
    assert {name: (array.dtype, array.shape, array.any()) for name, array in outputs.items()} == {
        "y": (np.int8, (1, 8), False),
        "wave": (np.float32, (1, 8), False),
    }


def test_it_measures_the_harness_alone(tmp_path: Path) -> None:
    feeds = {"x": np.zeros((1, 8), np.int8)}
    with session_of(graph_with_tail(), tmp_path) as session:
        measurement = measure(session, feeds, Rules(min_count=1000, min_duration_s=0.05, max_duration_s=5.0))
    assert measurement.count >= 1000
    assert measurement.p50_ns < 100_000  # microseconds at most: nothing is computed


def test_a_missing_artifact_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(IsthmusError, match=r"model\.onnx: no such file; compile the bundle again"):
        open_session(tmp_path, {"artifact": "model.onnx", "inputs": [], "outputs": []})


def test_options_it_does_not_have_are_refused() -> None:
    with pytest.raises(IsthmusError, match="target null has no option 'speed': it has none"):
        load_target("null").plan(graph_with_tail(), load_profile("null"), {"speed": 1})
