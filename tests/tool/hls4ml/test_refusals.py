# SPDX-License-Identifier: Apache-2.0
"""What the target refuses, by name and with a way out; what only io_stream refuses; a board whose backend is not written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.errors import ProblemsError
from isthmus.form_writer import FormWriter
from isthmus.graph import QuantGraph
from isthmus.profile import load_profile
from isthmus.recipe import Recipe
from isthmus.targets.hls4ml import TARGET, simulation
from isthmus.targets.hls4ml.folding import UNROLL_LIMIT


def _one(make: Callable[[FormWriter, str], str], shape: tuple[int, ...] = (1, 2, 6, 6), **recipe: Any) -> QuantGraph:
    writer = FormWriter(recipe=Recipe(**recipe))
    writer.output(make(writer, writer.input("x", shape, scale=2**-4)), "y")
    return writer.graph()


def _softmax_inside() -> QuantGraph:
    writer = FormWriter(recipe=Recipe())
    writer.float_node("Softmax", [writer.dequantise(writer.input("x", (1, 4), scale=2**-4))], ["soft"], axis=-1)
    writer.output(writer.relu(writer.quantise("soft", scale=2**-7)), "y")
    return writer.graph()


def _two_batches() -> QuantGraph:
    writer = FormWriter(recipe=Recipe())
    x, y = writer.input("x", (1, 4), scale=2**-4), writer.input("y", (2, 4), scale=2**-4)
    writer.output(writer.add(x, y, scale=2**-3), "sum")
    return writer.graph()


def _sigmoid_tail() -> QuantGraph:
    writer = FormWriter(recipe=Recipe())
    writer.float_node("Sigmoid", [writer.dequantise(writer.input("x", (1, 4), scale=2**-4))], ["y"])
    writer.float_output("y")
    return writer.graph()


def _fewer_axes() -> QuantGraph:
    writer = FormWriter(recipe=Recipe())
    x, y = writer.input("x", (2, 3, 2, 4), scale=2**-4), writer.input("y", (2, 4), scale=2**-4)
    writer.output(writer.add(x, y, scale=2**-3), "sum")
    return writer.graph()


def _max_pool(**more: Any) -> QuantGraph:
    return _one(lambda w, x: w.max_pool(x, **more))


def _uncounted(shape: tuple[int, ...]) -> QuantGraph:
    """An average that divides by fewer cells at the border."""
    return _one(lambda w, x: w.average_pool(x, kernel=(3, 3), strides=(1, 1), pads=(1, 1, 1, 1), count_include_pad=0, scale=2**-4), shape)


REFUSED: dict[str, tuple[Callable[[], QuantGraph], str]] = {
    "scheme": (lambda: _one(lambda w, x: w.relu(x), scheme="symmetric"), "scheme"),
    "operator": (_sigmoid_tail, "operator"),
    "float-tail": (_softmax_inside, "float-tail"),
    "bias": (lambda: _one(lambda w, x: w.gemm(x, np.ones((1, 4), np.int8), 2**-7, np.array([2**24 + 1], np.int32), scale=2**-3), (1, 4)), "bias-precision"),
    "rank": (lambda: _one(lambda w, x: w.resize_linear(x, (1, 2, 3, 4, 10), scale=2**-4), (1, 2, 3, 4, 5)), "rank"),
    "slope-rank": (lambda: _one(lambda w, x: w.p_relu(x, np.full((2, 1, 1, 1), 0.1), scale=2**-4), (1, 2, 3, 4, 5)), "rank"),
    "batch": (_two_batches, "batch"),
    "fewer-axes": (_fewer_axes, "batch"),
    "ceil-mode": (
        lambda: _one(lambda w, x: w.average_pool(x, kernel=(3, 3), strides=(2, 2), pads=(1, 1, 1, 1), ceil_mode=1, count_include_pad=1, scale=2**-4)),
        "ceil-mode",
    ),
    "pool-dilation": (lambda: _max_pool(kernel=(2, 2), strides=(1, 1), dilations=(2, 2)), "pool-dilation"),
    # too large for io_parallel, and a pool that io_stream has not
    "too-large": (lambda: _uncounted((1, 2, 60, 60)), "unroll-limit"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str) -> None:
    make, rule = REFUSED[case]
    problems = TARGET.check(make(), load_profile("pynq-z2"))
    assert rule in {problem.rule for problem in problems}, problems
    assert all(problem.node and problem.found and problem.fix for problem in problems)


STREAM_REFUSED: dict[str, tuple[Callable[[], QuantGraph], str]] = {
    "fan-out": (lambda: _one(lambda w, x: w.concat([x] * 8, axis=1)), "stream-fan-out"),
    "pool": (lambda: _uncounted((1, 2, 6, 6)), "stream-pool"),
}


@pytest.mark.parametrize("case", STREAM_REFUSED)
def test_io_stream_refuses_what_it_would_compute_wrongly(case: str) -> None:
    make, rule = STREAM_REFUSED[case]
    graph, profile = make(), load_profile("pynq-z2")
    assert TARGET.check(graph, profile) == []  # io_parallel takes it
    with pytest.raises(ProblemsError, match=rf"\[{rule}\]; use --set io_type=io_parallel"):
        TARGET.plan(graph, profile, {"io_type": "io_stream"})


def test_a_large_input_goes_to_io_stream_by_itself() -> None:
    graph, profile = _one(lambda w, x: w.max_pool(x, kernel=(2, 2), strides=(2, 2)), (1, 2, 60, 60)), load_profile("pynq-z2")
    assert UNROLL_LIMIT < 2 * 60 * 60 and TARGET.check(graph, profile) == []
    assert json.loads(TARGET.plan(graph, profile, {}).files[simulation.CONFIG_FILE])["io_type"] == "io_stream"
    with pytest.raises(ProblemsError, match=r"\[unroll-limit\]; use --set io_type=io_stream"):
        TARGET.plan(graph, profile, {"io_type": "io_parallel"})


def test_the_zeros_of_a_transposed_convolution_count() -> None:
    weight = np.ones((8, 2, 2, 2), np.int8)
    graph = _one(lambda w, x: w.conv_transpose(x, weight, 2**-7, scale=2**-3, strides=(2, 2)), (1, 8, 16, 16))
    with pytest.raises(ProblemsError, match=r"reads 8712 values with the zeros between them.*\[unroll-limit\]"):
        TARGET.plan(graph, load_profile("pynq-z2"), {"io_type": "io_parallel"})


@pytest.mark.parametrize(("board", "backend"), [("arria10-gx1150", "oneAPI"), ("polarfire-mpf300t", "Libero")])
def test_a_board_of_another_maker_is_refused_by_name(board: str, backend: str) -> None:
    (problem,) = TARGET.check(_one(lambda w, x: w.relu(x)), load_profile(board))
    assert (problem.node, problem.rule) == (board, "backend") and f"{backend} backend" in problem.found


def test_the_document_lists_the_rules_of_the_code() -> None:
    root = Path(__file__).parents[3]
    code = "".join((root / "targets" / "hls4ml" / f"{name}.py").read_text(encoding="utf-8") for name in ("rules", "folding", "search", "__init__"))
    rules = set(re.findall(r'Problem\(\s*[\w."]+,\s*"([a-z-]+)"', code))
    table = (root / "docs" / "hls4ml.md").read_text(encoding="utf-8").partition("## What is refused")[2].partition("Float islands")[0]
    assert set(re.findall(r"^\| `([a-z-]+)` \|", table, re.MULTILINE)) == rules and len(rules) > 10
