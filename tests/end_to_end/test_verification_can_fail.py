# SPDX-License-Identifier: Apache-2.0
"""A check that cannot fail is none: artifacts that compute something else end the compile, with a figure, and leave nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import numpy_helper

from isthmus import pipeline
from isthmus.artifact import golden_side, judged_by_layers
from isthmus.bundle import Bundle
from isthmus.compare import compare_output, compare_outputs
from isthmus.errors import IsthmusError, VerificationError
from isthmus.form_writer import FormWriter
from isthmus.graph import QuantGraph
from isthmus.layerwise import verify_layers
from isthmus.onnx_file import load_onnx
from isthmus.plan import BuildPlan
from isthmus.profile import Profile, load_profile
from isthmus.recipe import Recipe
from isthmus.registry import load_target
from isthmus.runtimes.__main__ import main as on_device
from isthmus.spec import TensorSpec
from isthmus.target import Target

MODEL = Path(__file__).parents[1] / "models" / "network.onnx"


def _wrong_target(profile: str, graph: QuantGraph) -> Target:
    """The profile's real target, which builds `graph` whatever it is asked for."""
    real = load_target({"cpu": "cpu", "rpi5": "tflite"}[profile])

    class Wrong(type(real)):  # type: ignore[misc]
        def plan(self, asked: QuantGraph, profile: Profile, options: Mapping[str, Any]) -> BuildPlan:
            return super().plan(graph, profile, options)

    wrong: Target = Wrong(**{name: getattr(real, name) for name in ("name", "ops", "float_ops", "schemes", "options")})
    return wrong


def _with_one_weight_changed() -> QuantGraph:
    model = load_onnx(MODEL)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("_weight_int"))
    weight = numpy_helper.to_array(tensor).copy()
    weight.reshape(-1)[0] += 1 if weight.reshape(-1)[0] < 100 else -1
    tensor.CopyFrom(numpy_helper.from_array(weight, tensor.name))
    return QuantGraph.from_model(model)


@pytest.mark.parametrize("profile", ["cpu", "rpi5"])
def test_one_weight_off_by_one_is_found(profile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The artifact is a real one, of a graph that differs in one weight by one step."""
    wrong = _wrong_target(profile, _with_one_weight_changed())
    monkeypatch.setattr(pipeline, "load_target", lambda name: wrong)
    with pytest.raises(
        VerificationError, match=rf"{profile}: output 'y' differs from the integer reference in \d+ of \d+ elements, at most by \d+ \(steps\)"
    ) as caught:
        pipeline.compile(MODEL, targets=[profile], tune=False, output=tmp_path / "bundle")
    assert caught.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


# ---- a step that grows on its way
def growing(weight_off: int = 0, bias_off: int = 0, second_off: int = 0) -> QuantGraph:
    """One sum in some thousand of `first` lies so near a tie that float32 decides otherwise than float64; `second` makes five steps of one."""
    w = FormWriter(recipe=Recipe(name="asymmetric", scheme="asymmetric"))
    weight = np.random.default_rng(0).integers(-60, 60, (8, 8, 1, 1))
    weight[3, 4] += weight_off
    bias = np.zeros(8, np.int32)
    bias[2] += bias_off
    widened = np.full((1, 8, 1, 1), 127)
    widened[0, 0] -= second_off
    x = w.conv(w.input("x", (1, 8, 32, 32), scale=0.5), weight, 1 / 997, bias, scale=1.0, zero_point=3, name="first")
    w.output(w.conv(x, widened, 1 / 127, scale=0.2, zero_point=-5, name="second"), "y")
    return w.graph()


@pytest.mark.parametrize("profile", ["cpu", "rpi5"])
def test_a_step_of_a_layer_that_grows_on_its_way_is_judged_by_layers(profile: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    graph = growing()
    target = load_target({"cpu": "cpu", "rpi5": "tflite"}[profile])
    assert target.plan(graph, load_profile(profile), target.with_defaults({})).max_lsb == 2
    bundle = pipeline.compile(graph, targets=[profile], tune=False, output=tmp_path / "bundle")
    entry = bundle.artifact(profile)
    assert entry["verification"][0]["max_lsb"] == entry["max_lsb_allowed"] == 5
    assert "judged by layers: on its own inputs none of 2 is further off than 1 step, end to end 5 steps on 0.23 % of the values" in entry["why_lsb"]
    assert all(comparison.passed for comparison in pipeline.verify(bundle)[profile])
    assert on_device(["verify", str(bundle.root), "-t", profile]) == 0  # judges alike: by what the manifest allows
    assert json.loads(capsys.readouterr().out)["verification"][0]["passed"]
    report = verify_layers(bundle, profile)
    assert report.passed and max(layer.own.max_lsb for layer in report.layers) == 1 < report.layers[-1].whole.max_lsb


@pytest.mark.parametrize("profile", ["cpu", "rpi5"])
@pytest.mark.parametrize(
    ("wrong", "layer"), [({"weight_off": 1}, "first"), ({"bias_off": 20}, "first"), ({"second_off": 5}, "second")], ids=["weight", "bias", "second"]
)
def test_an_artifact_of_other_numbers_is_refused_by_its_layer(
    profile: str, wrong: dict[str, int], layer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = _wrong_target(profile, growing(**wrong))
    monkeypatch.setattr(pipeline, "load_target", lambda name: target)
    with pytest.raises(VerificationError, match=rf"{profile}: output 'y' differs .* allowed: 2; on its own inputs layer {layer} \(Conv\) differs in \d+"):
        pipeline.compile(growing(), targets=[profile], tune=False, output=tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_the_inside_does_not_explain_are_refused(tmp_path: Path) -> None:
    """An engine that computes otherwise than in the copy whose layers can be read: here by one element."""
    graph = growing()
    bundle = pipeline.compile(graph, targets=["cpu"], tune=False, output=tmp_path / "bundle")
    entry, feeds = bundle.artifact("cpu"), golden_side(bundle.golden("cpu"), "input")
    with bundle.open_session("cpu") as session:
        actual = session.run_samples(feeds)
    comparisons = compare_outputs(graph.outputs, golden_side(bundle.golden("cpu"), "output"), actual, 2)
    allowed, found = judged_by_layers(bundle.folder("cpu"), "cpu", entry, graph, feeds, actual, comparisons)
    assert (allowed["max_lsb_allowed"], found) == (5, "")
    actual["y"].reshape(-1)[100] ^= 4
    allowed, found = judged_by_layers(bundle.folder("cpu"), "cpu", entry, graph, feeds, actual, comparisons)
    assert allowed == {} and "layer second (Conv) differs in 1 of 18432 elements, at most by 4" in found


def test_golden_outputs_that_are_not_the_references_are_found(tmp_path: Path) -> None:
    """A bundle whose hashes fit, but whose golden outputs somebody improved."""
    bundle = pipeline.compile(MODEL, targets=["cpu"], tune=False, output=tmp_path / "bundle")
    golden = bundle.golden()
    golden["output/y"] = golden["output/y"] ^ 1
    np.savez(bundle.root / "golden.npz", **golden)
    with pytest.raises(VerificationError, match="is not what the reference computes for 'y'"):
        pipeline.verify(Bundle(bundle.root, bundle.manifest))


def test_nothing_compared_never_passes() -> None:
    spec = TensorSpec("y", (0, 3), "int8", "NC", 1.0, 0)
    assert not compare_output(spec, np.zeros((0, 3), np.int8), np.zeros((0, 3), np.int8)).passed
    real = replace(spec, dtype="float32", scale=None, zero_point=None)
    assert not compare_output(real, np.zeros((0, 3), np.float32), np.zeros((0, 3), np.float32)).passed


def test_nan_and_other_shapes_never_pass() -> None:
    spec = TensorSpec("y", (2,), "float32")
    assert not compare_output(spec, np.zeros(2, np.float32), np.array([0, np.nan], np.float32)).passed
    assert compare_output(spec, np.zeros(2, np.float32), np.full(2, 9e-6, np.float32)).passed
    with pytest.raises(IsthmusError, match=r"expected float32\[2\], the engine gave float32\[1\]"):
        compare_output(spec, np.zeros(2, np.float32), np.zeros(1, np.float32))
