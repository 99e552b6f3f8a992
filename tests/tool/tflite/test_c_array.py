# SPDX-License-Identifier: Apache-2.0
"""The model as C source for TensorFlow Lite Micro: it compiles, holds the file's bytes, and its arena follows the greedy plan."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.errors import IsthmusError
from isthmus.graph import QuantGraph
from isthmus.plan import BuildPlan
from isthmus.targets.tflite.arena import Buffer, greedy_bytes, plan_arena
from isthmus.targets.tflite.c_array import HEADER, SOURCE

CHECK = """
#include <stdio.h>
#include "model_data.h"
int main(void) {
  unsigned int index;
  if (((size_t)isthmus_model) % 16 != 0) return 1;
  for (index = 0; index < isthmus_model_size; ++index) putchar(isthmus_model[index]);
  return ISTHMUS_TENSOR_ARENA_BYTES < ISTHMUS_ACTIVATION_BYTES;
}
"""
NETWORK = Path(__file__).parents[2] / "models" / "network.onnx"


def _network(litert: Any) -> BuildPlan:
    plan: BuildPlan = litert.plan(QuantGraph.load(NETWORK), emit_c=True)
    return plan


@pytest.mark.parametrize(("compiler", "standard"), [("gcc", "-std=c11"), ("g++", "-std=c++11")])
def test_the_source_compiles_and_holds_the_file(litert: Any, compiler: str, standard: str, require: Callable[[str], str], tmp_path: Path) -> None:
    plan = _network(litert)
    for file, content in plan.files.items():
        (tmp_path / file).write_bytes(content)
    (tmp_path / "check.c").write_text(CHECK)
    program = Path(require("g++")).with_name(compiler)  # g++ brings gcc
    argv = [program, standard, "-Wall", "-Wextra", "-Werror", "check.c", SOURCE, "-o", "check"]
    built = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([tmp_path / "check"], capture_output=True, check=False)
    assert ran.returncode == 0 and ran.stdout == plan.files["model.tflite"]


def test_the_header_says_what_to_register_and_to_reserve(litert: Any) -> None:
    plan = _network(litert)
    header = plan.files[HEADER].decode()
    methods = "AddConv2D(), AddDepthwiseConv2D(), AddFullyConnected(), AddMaxPool2D(), AddReshape()"
    assert f"MicroMutableOpResolver<5>: {methods}" in header
    assert QuantGraph.load(NETWORK).digest in header and "x: int8[1, 8, 8, 1] NHWC" in header
    arena = plan_arena(plan.files["model.tflite"])
    assert re.search(r"ISTHMUS_TENSOR_ARENA_BYTES (\d+)", header).group(1) == str(arena.size_bytes)  # type: ignore[union-attr]
    assert arena.activation_bytes == 8 * 8 * 4 + 4 * 4 * 4  # the first convolution's result and the pool's
    assert any("model_data.c" in note and f"{arena.size_bytes:,}" in note for note in plan.notes)


def test_no_c_unless_asked_for(litert: Any) -> None:
    assert set(litert.plan(QuantGraph.load(NETWORK)).files) == {"model.tflite"}


def test_what_tflite_micro_lacks_is_named(litert: Any) -> None:
    graph = QuantGraph.load(NETWORK.with_name("gelu.onnx"))
    with pytest.raises(IsthmusError, match=r"emit_c of target tflite: TensorFlow Lite Micro has no GELU"):
        litert.plan(graph, emit_c=True)


def test_a_hostile_name_stays_in_its_comment(litert: Any) -> None:
    case = litert.case()
    graph = case.graph(case.writer.relu(case.input((1, 3, 4, 4), "x*/ int y;")))
    header = litert.plan(graph, emit_c=True).files[HEADER].decode()
    assert header.count("*/") == 1 and "x___int_y_" in header


# ---- the greedy plan
def test_the_greedy_plan_reuses_what_is_free() -> None:
    assert greedy_bytes([]) == 0
    assert greedy_bytes([Buffer(64, 0, 0), Buffer(32, 1, 1)]) == 64
    assert greedy_bytes([Buffer(64, 0, 1), Buffer(32, 1, 2), Buffer(64, 2, 3)]) == 96
    assert greedy_bytes([Buffer(16, 0, 3), Buffer(48, 0, 1), Buffer(32, 2, 3)]) == 64


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12))
def test_the_greedy_plan_holds_all_that_lives_at_once(buffers: list[tuple[int, int, int]]) -> None:
    made = [Buffer(size * 16, min(a, b), max(a, b)) for size, a, b in buffers]
    needed = [sum(one.size_bytes for one in made if one.first <= step <= one.last) for step in range(10)]
    assert np.max(needed) <= greedy_bytes(made) <= sum(one.size_bytes for one in made)
