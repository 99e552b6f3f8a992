# SPDX-License-Identifier: Apache-2.0
"""What the target refuses, by name and with a way out; what only io_stream refuses; what a backend cannot carry; parts nobody knows."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.errors import IsthmusError, ProblemsError
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


def test_a_backend_writes_for_its_own_makers_parts() -> None:
    relu, mlp = _one(lambda w, x: w.relu(x)), _one(lambda w, x: w.gemm(x, np.ones((2, 4), np.int8), 2**-7, scale=2**-3), (1, 4))
    for board, backend, graph in (("arria10-gx1150", "oneAPI", relu), ("polarfire-mpf300t", "Libero", mlp), ("pynq-z2", "Vitis", relu)):
        profile = load_profile(board)
        assert TARGET.check(graph, profile) == []
        assert json.loads(TARGET.plan(graph, profile, {}).files[simulation.CONFIG_FILE])["backend"] == backend
    with pytest.raises(ProblemsError, match=r"Libero writes for parts of Microchip, and PYNQ-Z2 is AMD's \[backend\]; use --set backend=Vitis"):
        TARGET.plan(relu, load_profile("pynq-z2"), {"backend": "Libero"})
    with pytest.raises(IsthmusError, match="option backend of target hls4ml: 'HLS' is not one of auto, Vitis, Vivado"):
        TARGET.plan(relu, load_profile("pynq-z2"), {"backend": "HLS"})
    with pytest.raises(
        ProblemsError, match=r"io_stream, which isthmus does not write for hls4ml's oneAPI backend \[backend-io\]; use --set io_type=io_parallel"
    ):
        TARGET.plan(relu, load_profile("arria10-gx1150"), {"io_type": "io_stream"})
    with pytest.raises(ProblemsError, match=r"VivadoAccelerator knows the boards pynq-z2, zcu102 \[backend\]; use --set backend=Vitis"):
        TARGET.plan(relu, load_profile("kv260"), {"backend": "VivadoAccelerator"})


def test_a_layer_that_a_backend_would_leave_out_is_refused() -> None:
    """hls4ml drops a layer it has no code for, without a word."""
    (problem,) = TARGET.check(_one(lambda w, x: w.function("Sigmoid", x, scale=2**-7), (1, 4)), load_profile("polarfire-mpf300t"))
    averages = _one(lambda w, x: w.average_pool(x, kernel=(2, 2), strides=(2, 2), scale=2**-4))
    with pytest.raises(ProblemsError, match=r"cuts off at the bits of its input, where the form rounds \[backend-layer\]; use --set backend=Vitis"):
        TARGET.plan(averages, load_profile("pynq-z2"), {"backend": "Catapult"})
    depthwise = _one(lambda w, x: w.conv(x, np.ones((2, 1, 3, 3), np.int8), 2**-7, scale=2**-3, group=2))
    assert [found.rule for found in TARGET.check(depthwise, load_profile("arria10-gx1150"))] == ["backend-layer"]
    assert problem.rule == "backend-layer" and "becomes IsthmusKernel, which hls4ml's Libero backend has no code for" in problem.found


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("xc7z020clg484-1", ""),
        ("xc7z020clg400", "'xc7z020clg400' is no part of XC7Z020: expected the device, a package and a speed grade, as in xc7z020clg400-1"),
        ("xc7z010clg400-1", "'xc7z010clg400-1' is another device than PYNQ-Z2's: did you mean xc7z020clg400-1"),
        ("xczu9eg-ffvb1156-2-e", "'xczu9eg-ffvb1156-2-e' is the part of board zcu102: use --target zcu102"),
        ("zynq", "'zynq' is another device than PYNQ-Z2's"),
    ],
)
def test_a_part_nobody_knows(part: str, message: str) -> None:
    graph, profile = _one(lambda w, x: w.relu(x)), load_profile("pynq-z2")
    if not message:
        assert json.loads(TARGET.plan(graph, profile, {"part": part}).files[simulation.CONFIG_FILE])["part"] == part
        return
    with pytest.raises(IsthmusError, match=re.escape(f"option part of target hls4ml: {message}")) as error:
        TARGET.plan(graph, profile, {"part": part})
    assert "\n" not in str(error.value)


def test_the_document_lists_the_rules_of_the_code() -> None:
    root = Path(__file__).parents[3]
    code = "".join((root / "targets" / "hls4ml" / f"{name}.py").read_text(encoding="utf-8") for name in ("rules", "folding", "search", "backends", "__init__"))
    rules = set(re.findall(r'Problem\(\s*[\w."]+,\s*"([a-z-]+)"', code))
    table = (root / "docs" / "hls4ml.md").read_text(encoding="utf-8").partition("## What is refused")[2].partition("Float islands")[0]
    assert set(re.findall(r"^\| `([a-z-]+)` \|", table, re.MULTILINE)) == rules and len(rules) > 10
