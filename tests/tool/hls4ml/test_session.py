# SPDX-License-Identifier: Apache-2.0
"""The session of a C simulation: what it opens, what it refuses, what it leaves behind."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus import reference
from isthmus.errors import IsthmusError
from isthmus.form_writer import FormWriter
from isthmus.graph import QuantGraph
from isthmus.plan import BuildPlan
from isthmus.recipe import Recipe

Built = tuple[QuantGraph, BuildPlan, Path]


def test_a_classifier_is_exact_and_its_folder_may_move(hls: Any, classifier: Built, tmp_path: Path) -> None:
    outputs = hls.equals_reference(classifier)
    assert outputs["logits"].std() > 4
    graph, plan, folder = classifier
    moved = (graph, plan, tmp_path / "elsewhere")
    shutil.copytree(folder, moved[2])
    hls.equals_reference(moved, samples=4)


def test_nothing_in_the_folder_says_where_it_was_built(classifier: Built) -> None:
    folder = classifier[2]
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != "logs"]
    assert len(files) > 50
    assert [path for path in files if str(folder).encode() in path.read_bytes()] == []
    assert "AP_SAT_SYM" not in (folder / "project/firmware/defines.h").read_text()


def _signal(hls: Any) -> QuantGraph:
    """1-D, a batch of two, a softmax that the host computes."""
    weight, bias = hls.random(4)
    writer = FormWriter(recipe=Recipe())
    y = writer.input("signal", (2, 2, 16), scale=2**-5)
    y = writer.conv(y, weight(3, 2, 5), 2**-7, bias(3), scale=2**-2, activation="Relu", strides=(2,), pads=(2, 1))
    y = writer.max_pool(y, kernel=(3,), strides=(2,), pads=(1, 0))
    y = writer.average_pool(y, kernel=(2,), strides=(1,), pads=(0, 0), scale=2**-3)
    writer.output(y, "features")
    writer.softmax_output(writer.gemm(writer.flatten(y), weight(4, 9), 2**-9, bias(4), scale=2**-2, activation=("Clip", -2.0, 3.0)), "probabilities")
    return writer.graph()


def test_two_simulations_live_in_one_process(hls: Any, classifier: Built, tools: None, tmp_path: Path) -> None:
    other = hls.build(_signal(hls), tmp_path / "other")
    for name, values in hls.equals_reference(other).items():
        assert values.std() > 0.01, f"{name} is constant: nothing was compared"
    signal = np.arange(64, dtype=np.int8).reshape(2, 2, 16) * 2
    image = np.arange(36, dtype=np.int8).reshape(1, 1, 6, 6)
    with hls.open(classifier) as first, hls.open(other) as second:
        for _ in range(2):
            np.testing.assert_array_equal(second.run_quantised({"signal": signal})["features"], reference.run(other[0], {"signal": signal})["features"])
            np.testing.assert_array_equal(first.run_quantised({"image": image})["logits"], reference.run(classifier[0], {"image": image})["logits"])
    with pytest.raises(IsthmusError, match="the session is closed"):
        second.run_raw({"signal": signal})


def test_a_closed_session_unloads_its_library(hls: Any, classifier: Built) -> None:
    """Otherwise a library built anew at the same path would never be the one that runs."""
    maps = Path("/proc/self/maps")
    with hls.open(classifier) as session:
        assert session.engine == "csim"
        assert "libmodel.so" in maps.read_text()
    assert "libmodel.so" not in maps.read_text()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "csim/libmodel.so").unlink(), "no such file; compile"),
        (lambda folder: (folder / "csim/libmodel.so").write_bytes(b"\x7fELF" + b"\0" * 60), "cannot be loaded"),
        (lambda folder: next((folder / "project/firmware/weights").glob("w*.txt")).unlink(), r"w\d+\.txt is missing"),
        (lambda folder: (folder / "project/firmware/parameters.h").unlink(), r"parameters\.h is missing"),
        (lambda folder: (folder / "host_tail.json").write_text("[]"), "host_tail.json: cannot be read"),
        (lambda folder: (folder / "host_tail.json").write_text('{"schema": 7}'), "schema 7, this version reads schema 1"),
    ],
)
def test_a_broken_folder_is_one_sentence(hls: Any, spoil: Callable[[Path], Any], message: str, classifier: Built, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(classifier[2], copy)
    spoil(copy)
    with pytest.raises(IsthmusError, match=message):
        hls.open((classifier[0], classifier[1], copy))


def test_a_library_of_another_maker_is_refused(hls: Any, classifier: Built, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(classifier[2], copy)
    (copy / "empty.cpp").write_text("int other() { return 1; }\n")
    subprocess.run(["g++", "-shared", "-fPIC", "-o", str(copy / "csim/libmodel.so"), str(copy / "empty.cpp")], check=True, timeout=60)
    with pytest.raises(IsthmusError, match="has no function model_float"):
        hls.open((classifier[0], classifier[1], copy))


def test_another_border_than_int8_is_refused(hls: Any, classifier: Built) -> None:
    graph, plan, folder = classifier
    with pytest.raises(IsthmusError, match="takes int8 with zero point 0 and a power-of-two scale"):
        hls.open((graph, replace(plan, inputs=(replace(plan.inputs[0], scale=0.1),)), folder))
    with pytest.raises(IsthmusError, match=r"host_tail\.json is missing: it says how the host computes 'logits'"):
        hls.open((graph, replace(plan, outputs=(replace(plan.outputs[0], dtype="float32", scale=None, zero_point=None),)), folder))
