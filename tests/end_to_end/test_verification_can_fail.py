# SPDX-License-Identifier: Apache-2.0
"""A check that cannot fail is none: artifacts that compute something else end the compile, with a figure, and leave nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import numpy_helper

from isthmus import pipeline
from isthmus.bundle import Bundle
from isthmus.compare import compare_output
from isthmus.errors import IsthmusError, VerificationError
from isthmus.graph import QuantGraph
from isthmus.onnx_file import load_onnx
from isthmus.plan import BuildPlan
from isthmus.profile import Profile
from isthmus.registry import load_target
from isthmus.spec import TensorSpec
from isthmus.target import Target

MODEL = Path(__file__).parents[1] / "models" / "network.onnx"


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
    real = load_target({"cpu": "cpu", "rpi5": "tflite"}[profile])

    class Wrong(type(real)):  # type: ignore[misc]
        def plan(self, graph: QuantGraph, profile: Profile, options: Mapping[str, Any]) -> BuildPlan:
            return super().plan(_with_one_weight_changed(), profile, options)

    wrong: Target = Wrong(**{name: getattr(real, name) for name in ("name", "ops", "float_ops", "schemes", "options")})
    monkeypatch.setattr(pipeline, "load_target", lambda name: wrong)
    with pytest.raises(
        VerificationError, match=rf"{profile}: output 'y' differs from the integer reference in \d+ of \d+ elements, at most by \d+ \(steps\)"
    ) as caught:
        pipeline.compile(MODEL, targets=[profile], tune=False, output=tmp_path / "bundle")
    assert caught.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


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
