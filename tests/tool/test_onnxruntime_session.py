# SPDX-License-Identifier: Apache-2.0
"""Engine `onnxruntime` as a session: feeds that do not fit, threads, buffers in place, time per layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.errors import IsthmusError
from isthmus.form_writer import FormWriter
from isthmus.graph import QuantGraph
from isthmus.profile import load_profile
from isthmus.runtimes.null import NullSession
from isthmus.runtimes.onnxruntime import OnnxRuntimeSession, open_session
from isthmus.targets.cpu import TARGET

SHAPES = {"image": (1, 2, 5, 4), "gate": (1, 2, 1, 1)}


def graph_of_two_inputs() -> QuantGraph:
    w = FormWriter()
    image, gate = (w.input(name, shape, scale=2.0**-4) for name, shape in SHAPES.items())
    weight = np.arange(-54, 54, dtype=np.int8).reshape(6, 2, 3, 3)
    w.output(w.conv(w.mul(image, gate, scale=2.0**-3, name="scaled"), weight, 2.0**-8, scale=2.0**-3, pads=(1, 1, 1, 1), name="mixed"), "y")
    return w.graph()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("artifact")
    plan = TARGET.plan(graph_of_two_inputs(), load_profile("cpu"), {})
    (path / plan.artifact).write_bytes(plan.files[plan.artifact])
    return path


def opened(folder: Path, threads: int = 1) -> OnnxRuntimeSession:
    graph = graph_of_two_inputs()
    borders = {"inputs": [spec.to_json() for spec in graph.inputs], "outputs": [spec.to_json() for spec in graph.outputs]}
    session = open_session(folder, {"artifact": "model.onnx", **borders}, threads)
    assert isinstance(session, OnnxRuntimeSession)
    return session


@pytest.fixture(scope="module")
def session(folder: Path) -> Iterator[OnnxRuntimeSession]:
    with opened(folder) as session:
        yield session


def raw_feeds(seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {name: generator.integers(-128, 128, shape).astype(np.int8) for name, shape in SHAPES.items()}


# ---- feeds that do not fit
MISTAKES = ("missing", "extra", "renamed", "axis more", "axis less", "longer", "batch", "empty", "text", "complex", "object", "nan", "infinity")


def spoilt(mistake: str, name: str, dtype: str) -> dict[str, np.ndarray]:
    """Feeds with one mistake at input `name`."""
    feeds = {key: np.zeros(shape, dtype) for key, shape in SHAPES.items()}
    array = feeds[name]
    if mistake in ("missing", "renamed"):
        del feeds[name]
    if mistake in ("extra", "renamed"):
        feeds[f"{name}_"] = array
    grown = {"axis more": array[None], "axis less": array[0], "longer": np.repeat(array, 2, 1), "batch": np.repeat(array, 2, 0), "empty": array[:0]}
    other = {"text": np.full(array.shape, "1"), "complex": array.astype(np.complex64), "object": np.full(array.shape, None)}
    if mistake in grown | other:
        feeds[name] = (grown | other)[mistake]
    if mistake in ("nan", "infinity"):
        feeds[name] = np.zeros(array.shape, np.float32)
        feeds[name].flat[-1] = np.nan if mistake == "nan" else -np.inf
    return feeds


@given(mistake=st.sampled_from(MISTAKES), name=st.sampled_from(sorted(SHAPES)), dtype=st.sampled_from(["float32", "float64", "int8", "uint8", "int64", "bool"]))
def test_real_feeds_that_do_not_fit_are_one_sentence(session: OnnxRuntimeSession, mistake: str, name: str, dtype: str) -> None:
    with pytest.raises(IsthmusError, match=rf"input '{name}_?'") as caught:
        session.run(spoilt(mistake, name, dtype))
    assert "\n" not in str(caught.value)


@given(mistake=st.sampled_from(MISTAKES), name=st.sampled_from(sorted(SHAPES)), quantised=st.booleans())
def test_raw_feeds_that_do_not_fit_are_one_sentence(session: OnnxRuntimeSession, mistake: str, name: str, quantised: bool) -> None:
    run = session.run_quantised if quantised else session.per_layer
    with pytest.raises(IsthmusError, match=rf"input '{name}_?'") as caught:
        run(spoilt(mistake, name, "int8"))
    assert "\n" not in str(caught.value)


@given(name=st.sampled_from(sorted(SHAPES)), dtype=st.sampled_from(["float32", "uint8", "int16", "bool"]))
def test_raw_feeds_have_the_dtype_of_the_border(session: OnnxRuntimeSession, name: str, dtype: str) -> None:
    with pytest.raises(IsthmusError, match=rf"input '{name}': expected int8\[.*, found {dtype}\["):
        session.run_quantised(raw_feeds() | {name: np.zeros(SHAPES[name], dtype)})


@given(order=st.permutations(sorted(SHAPES)), dtype=st.sampled_from(["float32", "float64", "int16", "uint8"]), contiguous=st.booleans())
def test_feeds_that_fit_give_the_same_in_any_order(session: OnnxRuntimeSession, order: list[str], dtype: str, contiguous: bool) -> None:
    numbers = {name: np.arange(np.prod(shape)).reshape(shape) % 7 for name, shape in SHAPES.items()}
    feeds = {name: (numbers[name] if contiguous else np.asfortranarray(numbers[name])).astype(dtype) for name in order}
    np.testing.assert_array_equal(session.run(feeds)["y"], session.run(numbers)["y"])


# ---- threads
@pytest.mark.parametrize("threads", [0, -1])
def test_a_session_has_at_least_one_thread(folder: Path, threads: int) -> None:
    with pytest.raises(IsthmusError, match=rf"{threads} threads: expected at least 1"):
        opened(folder, threads)


def test_two_threads_give_the_same(folder: Path, session: OnnxRuntimeSession) -> None:
    with opened(folder, 2) as other:
        np.testing.assert_array_equal(other.run_quantised(raw_feeds())["y"], session.run_quantised(raw_feeds())["y"])


# ---- time per layer
def test_every_node_has_a_time(session: OnnxRuntimeSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # ONNX Runtime writes its profile where it stands unless told otherwise
    layers = session.per_layer(raw_feeds(), runs=5)
    names = [name for name, _ in layers]
    assert len(set(names)) == len(names)
    assert names.index("scaled") < next(place for place, name in enumerate(names) if name.startswith("mixed"))  # ONNX Runtime renames what it fuses
    assert all(nanoseconds >= 0 for _, nanoseconds in layers) and sum(nanoseconds for _, nanoseconds in layers) > 0
    assert list(tmp_path.iterdir()) == []


def test_a_profile_needs_a_run(session: OnnxRuntimeSession) -> None:
    with pytest.raises(IsthmusError, match="time per layer over 0 runs: expected at least 1"):
        session.per_layer(raw_feeds(), runs=0)


def test_an_engine_without_a_profiler_says_so() -> None:
    spec = replace(graph_of_two_inputs().inputs[0], name="x")
    with NullSession((spec,), (spec,)) as session, pytest.raises(IsthmusError, match="engine null gives no time per layer"):
        session.per_layer({"x": np.zeros(spec.shape, np.int8)})
