# SPDX-License-Identifier: Apache-2.0
"""The session: any file, any engine, no crash."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from isthmus.errors import IsthmusError
from isthmus.plan import BuildPlan
from isthmus.profile import load_profile
from isthmus.runtimes import tflite as engine
from isthmus.runtimes.tflite import find_engine, open_session

Feeds = Mapping[str, np.ndarray]


# ---- the session
@pytest.fixture
def plan(litert: Any) -> BuildPlan:
    return litert.plan(litert.case().conv_graph((1, 3, 6, 6), 4, (3, 3)))


def test_outputs_are_views_that_the_next_run_overwrites(litert: Any, plan: BuildPlan, tmp_path: Path) -> None:
    with litert.open(plan, tmp_path) as session:
        feed = {"x": np.full(plan.inputs[0].shape, 3, np.int8)}
        first = session.run_raw(feed)["y"]
        kept = first.copy()
        other = session.run_raw({"x": np.full(plan.inputs[0].shape, -90, np.int8)})["y"]
        assert np.shares_memory(first, other) and not np.array_equal(kept, other)
        assert np.array_equal(session.run_raw(feed)["y"], kept)
        quantised = {"x": plan.inputs[0].to_form(feed["x"])}
        mine = session.run_quantised(quantised)["y"]
        session.run_raw({"x": np.full(plan.inputs[0].shape, -90, np.int8)})
        assert np.array_equal(mine, plan.outputs[0].to_form(kept))
    assert np.array_equal(first, other)  # the memory outlives the session as long as somebody looks at it


def test_without_xnnpack_the_version_says_so(litert: Any, plan: BuildPlan, tmp_path: Path) -> None:
    (tmp_path / plan.artifact).write_bytes(plan.files[plan.artifact])
    with open_session(tmp_path, litert.entry(plan), xnnpack=False) as session:
        assert session.version == f"{find_engine()[1]} without XNNPACK"
        assert not any(node["op_name"] == "DELEGATE" for node in session._interpreter._get_ops_details())


def test_no_time_per_layer_is_one_sentence(litert: Any, plan: BuildPlan, tmp_path: Path) -> None:
    with litert.open(plan, tmp_path) as session, pytest.raises(IsthmusError, match=r"^LiteRT .* times no single operators from Python: .*benchmark_model"):
        session.per_layer({"x": np.zeros(plan.inputs[0].shape, np.int8)})


def test_the_engine_says_its_version(litert: Any, plan: BuildPlan, tmp_path: Path) -> None:
    with litert.open(plan, tmp_path) as session:
        assert session.engine == "tflite" and session.version.startswith("LiteRT ") and session.version == find_engine()[1]


def test_no_engine_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "ENGINES", (("no_such_module_here", "no-such", "none"),))
    with pytest.raises(IsthmusError, match=r"no TensorFlow Lite engine is here .*pip install"):
        find_engine()


@settings(max_examples=60)
@given(share=st.floats(0, 1, exclude_max=True))
@example(share=0.0)
@example(share=0.999)
def test_a_truncated_file_is_one_sentence(litert: Any, share: float, tmp_path_factory: pytest.TempPathFactory) -> None:
    plan = litert.plan(litert.case().conv_graph((1, 3, 6, 6), 4, (3, 3)))
    content = plan.files[plan.artifact]
    folder = tmp_path_factory.mktemp("cut")
    (folder / plan.artifact).write_bytes(content[: int(len(content) * share)])
    with pytest.raises(IsthmusError, match=r"model\.tflite: .*compile the bundle again") as caught:
        open_session(folder, litert.entry(plan))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"not a model at all", b"\x18\x00\x00\x00TFL3" + b"\xff" * 200])
def test_something_else_is_one_sentence(litert: Any, content: bytes, plan: BuildPlan, tmp_path: Path) -> None:
    (tmp_path / plan.artifact).write_bytes(content)
    with pytest.raises(IsthmusError, match=r"model\.tflite: "):
        open_session(tmp_path, litert.entry(plan))


def test_a_missing_file_another_border_and_no_thread(litert: Any, plan: BuildPlan, tmp_path: Path) -> None:
    with pytest.raises(IsthmusError, match="no such file"):
        open_session(tmp_path, litert.entry(plan))
    (tmp_path / plan.artifact).write_bytes(plan.files[plan.artifact])
    with pytest.raises(IsthmusError, match="threads: expected 1 or more, found 0"):
        open_session(tmp_path, litert.entry(plan), threads=0)
    entry = litert.entry(plan)
    entry["inputs"][0]["shape"] = [1, 3, 6, 6]
    with pytest.raises(IsthmusError, match=r"has the inputs \['int8\[1, 6, 6, 3\]'\], the manifest says \['int8\[1, 3, 6, 6\]'\]"):
        open_session(tmp_path, entry)


@pytest.mark.parametrize("name", ["rpi4", "rpi5"])
def test_the_boards_come_here(name: str) -> None:
    profile = load_profile(name)
    assert profile.target == "tflite" and profile.arch == "aarch64" and set(profile.facts) == set(profile.sources)
