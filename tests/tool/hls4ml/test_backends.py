# SPDX-License-Identifier: Apache-2.0
"""hls4ml's other backends, and the wrapper for a board's bus: what they write, compiled and run; `benchmarks/hls4ml_backends.py` has all tiny models."""

from __future__ import annotations

import ctypes
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus import reference
from isthmus.form_writer import FormWriter
from isthmus.graph import QuantGraph
from isthmus.plan import BuildPlan
from isthmus.profile import load_profile
from isthmus.recipe import Recipe
from isthmus.runtimes.pynq.buffers import BeatLayout
from isthmus.targets.hls4ml import TARGET, simulation
from isthmus.targets.hls4ml.backends import BACKENDS
from isthmus.targets.hls4ml.board_design import DESIGN_FILE, SIDE_FILE

Built = tuple[QuantGraph, BuildPlan, Path]


def _layers_and_table(hls: Any) -> QuantGraph:
    """Dense layers, and a layer of our own: its code is another for oneAPI."""
    weight, bias = hls.random(3)
    writer = FormWriter(recipe=Recipe())
    y = writer.gemm(writer.input("x", (1, 6), scale=2**-4), weight(8, 6), 2**-7, bias(8), scale=2**-4, activation="Relu")
    y = writer.function("Sigmoid", y, scale=2**-7)
    writer.output(writer.gemm(y, weight(5, 8), 2**-7, bias(5), scale=2**-3), "y")
    return writer.graph()


def test_oneapi_code_is_exact_and_the_artifact_says_what_compiled_it(hls: Any, tools: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(hls), "profile", load_profile("arria10-gx1150"))
    built = hls.build(_layers_and_table(hls), tmp_path / "built")
    assert hls.equals_reference(built)["y"].std() > 4
    assert any("a stand-in for SYCL's pipes; icpx has not compiled it" in note for note in built[1].notes)
    assert any("calibrated on AMD's reports, not on oneAPI's" in note for note in built[1].notes)
    assert str(tmp_path) not in "".join(path.read_text(errors="replace") for path in (built[2] / "project").rglob("*") if path.is_file())


def test_the_wrapper_moves_what_the_boards_driver_sends(hls: Any, classifier: Built, tmp_path: Path) -> None:
    """From the driver's buffer through the AXI-stream wrapper and the network into the driver's buffer, as g++ compiles it."""
    graph, plan, folder = classifier
    side = json.loads((folder / SIDE_FILE).read_text())
    given, made = (BeatLayout.from_json(side[name], specs[0].size, name) for name, specs in (("input", plan.inputs), ("output", plan.outputs)))
    samples = np.random.default_rng(5).integers(-128, 128, (20, *graph.inputs[0].shape[1:])).astype(np.int8)
    expected = reference.run(graph, {"image": samples})["logits"]
    # ctypes never unloads it, so it is a library that no other test opens: its weights lie in the folder it is loaded from.
    beside = shutil.copytree(folder, tmp_path / "copy") / plan.artifact
    library = ctypes.CDLL(str(beside.rename(beside.with_name("wrapper.so"))))
    for sample, wanted in zip(samples, expected, strict=True):
        sent, received = np.zeros(given.buffer_bytes, np.uint8), np.full(made.buffer_bytes, 255, np.uint8)
        given.pack(np.ascontiguousarray(sample.transpose(1, 2, 0)), sent)
        library.model_beats(ctypes.c_void_p(sent.ctypes.data), ctypes.c_void_p(received.ctypes.data))
        np.testing.assert_array_equal(made.unpack(received), wanted)
        assert not received.reshape(made.beats, made.beat_bytes)[-1, made.elements % made.per_beat or made.per_beat :].any()


@pytest.mark.parametrize(("board", "cell"), [("pynq-z2", "processing_system7"), ("kv260", "zynq_ultra_ps_e"), ("virtex7-690t", "")])
def test_a_design_of_the_board_is_planned_where_there_is_a_processor(hls: Any, board: str, cell: str) -> None:
    plan = TARGET.plan(hls.classifier(), load_profile(board), {})
    assert (DESIGN_FILE in plan.files) == bool(cell)
    if cell:
        design = plan.files[DESIGN_FILE].decode()
        assert f"xilinx.com:ip:{cell}" in design and "c_m_axis_mm2s_tdata_width 32" in design and design.count("{") == design.count("}")


def test_two_outputs_get_no_bitstream(hls: Any) -> None:
    writer = FormWriter(recipe=Recipe())
    x = writer.input("x", (1, 4), scale=2**-4)
    writer.output(writer.relu(x), "a")
    writer.output(writer.requantize(x, scale=2**-2), "b")
    assert DESIGN_FILE not in hls.plan(writer.graph()).files


@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_plans_its_own_files(hls: Any, name: str) -> None:
    backend = BACKENDS[name]
    board = {"oneAPI": "arria10-gx1150", "Libero": "polarfire-mpf300t"}.get(name, "pynq-z2")
    writer = FormWriter(recipe=Recipe())
    writer.output(writer.gemm(writer.input("x", (1, 4), scale=2**-4), np.ones((2, 4), np.int8), 2**-7, scale=2**-3), "y")
    plan = TARGET.plan(writer.graph(), load_profile(board), {"backend": name})
    assert plan.steps[0].outputs == (backend.written,) and plan.steps[2].tool == backend.tools[-1]
    assert f'#include "{backend.types}_fixed.h"' in plan.files[simulation.HEADER_FILE].decode()
    assert any(backend.title in note for note in plan.notes)
    other = replace(plan, files={**plan.files, simulation.EXTENSION_FILE: b""})
    assert other.digest() != plan.digest()
