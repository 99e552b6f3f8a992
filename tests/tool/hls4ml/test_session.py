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


def test_two_simulations_live_in_one_process(hls: Any, classifier: Built, tools: None, tmp_path: Path) -> None:
    weight, _ = hls.random(9)
    writer = FormWriter(recipe=Recipe())
    y = writer.gemm(writer.input("x", (1, 4), scale=2**-3), weight(3, 4), 2**-7, scale=2**-1)
    writer.output(y, "y")
    other = hls.build(writer.graph(), tmp_path / "other")
    x = np.arange(4, dtype=np.int8).reshape(1, 4) * 40
    image = np.arange(36, dtype=np.int8).reshape(1, 1, 6, 6)
    with hls.open(classifier) as first, hls.open(other) as second:
        for _ in range(2):
            np.testing.assert_array_equal(second.run_quantised({"x": x})["y"], reference.run(other[0], {"x": x})["y"])
            np.testing.assert_array_equal(first.run_quantised({"image": image})["logits"], reference.run(classifier[0], {"image": image})["logits"])
    with pytest.raises(IsthmusError, match="the session is closed"):
        second.run_raw({"x": x})


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
