# SPDX-License-Identifier: Apache-2.0
"""Ties, and what lies next to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus import reference
from isthmus.form_writer import FormWriter
from isthmus.graph import QuantGraph
from isthmus.targets.tflite import ROUNDING
from isthmus.targets.tflite.rounding import Average

Feeds = Mapping[str, np.ndarray]


def _ties(layer: Callable[[FormWriter, str], str], shape: tuple[int, ...] = (1, 1, 16, 16)) -> QuantGraph:
    writer = FormWriter()
    writer.output(layer(writer, writer.input("x", shape, scale=0.5)), "y")
    return writer.graph()


ONE = np.ones((1, 1, 1, 1), np.int8)
TIES: dict[str, Callable[[], QuantGraph]] = {
    "conv": lambda: _ties(lambda w, x: w.conv(x, ONE, 1.0, scale=1.0)),
    "depthwise": lambda: _ties(lambda w, x: w.conv(x, np.ones((256, 1, 1, 1), np.int8), 1.0, scale=1.0, group=256), (1, 256, 1, 1)),
    "gemm": lambda: _ties(lambda w, x: w.gemm(w.flatten(x), np.eye(256, dtype=np.int8), 1.0, scale=1.0)),
    "requantise": lambda: _ties(lambda w, x: w.requantize(x, scale=1.0)),
    "add": lambda: _ties(lambda w, x: w.add(x, w.relu(x), scale=1.0)),
    "add relu": lambda: _ties(lambda w, x: w.add(x, w.relu(x), scale=1.0, activation="Relu")),
    "average pool": lambda: _ties(lambda w, x: w.average_pool(x, (1, 2), scale=1.0)),
    "average pool of nine": lambda: _ties(lambda w, x: w.average_pool(x, (3, 3), (1, 1), scale=1.0)),
    "average pool of the edge": lambda: _ties(lambda w, x: w.average_pool(x, (3, 3), (1, 1), (1, 1, 1, 1), scale=1.0)),
}


@pytest.mark.parametrize("name", TIES)
def test_ties_go_to_even(litert: Any, name: str, tmp_path: Path) -> None:
    graph = TIES[name]()
    every = {"x": np.arange(-128, 128).astype(np.int8).reshape(graph.inputs[0].shape)}
    values = reference.run_all(graph, every)
    assert len(np.unique(values[graph.raw_output()])) > 60
    with litert.open(litert.plan(graph), tmp_path) as session:
        assert litert.difference(graph, session, [every, *litert.feeds(graph)]) == 0


@pytest.mark.parametrize("kernel", [(3, 3), (3, 5), (4, 7), (2, 4)])
@pytest.mark.parametrize("padded", [False, True])
def test_the_average_of_equal_cells(litert: Any, kernel: tuple[int, int], padded: bool, tmp_path: Path) -> None:
    """One channel a value, every cell the same: at twice the step each odd value is a tie, whatever a window counts."""
    writer = FormWriter()
    pads = (1, 2, 1, 2) if padded and kernel[1] > 2 else (0, 0, 0, 0)
    writer.output(writer.average_pool(writer.input("x", (1, 256, 9, 10), scale=0.5), kernel, (1, 1), pads, scale=1.0), "y")
    graph = writer.graph()
    plan = litert.plan(graph)
    assert plan.max_lsb == 0
    with litert.open(plan, tmp_path) as session:
        values = np.arange(-128, 128).astype(np.int8).reshape(1, 256, 1, 1)
        assert litert.difference(graph, session, [{"x": np.broadcast_to(values, (1, 256, 9, 10)).copy()}]) == 0


@pytest.mark.parametrize(("height", "width"), [(5, 5), (7, 7), (8, 8), (11, 11), (14, 2)])
def test_every_sum_of_a_global_average(litert: Any, height: int, width: int, tmp_path: Path) -> None:
    """One channel a sum: ties (a power of two twice the step) and their neighbours, over the whole range."""
    cells = height * width
    sums = np.unique(np.concatenate([np.arange(-128, 128) * cells // 2 + near for near in (-1, 0, 1)]).clip(-128 * cells, 127 * cells))
    low, more = np.divmod(sums, cells)
    columns = low[:, np.newaxis] + (np.arange(cells) < more[:, np.newaxis])
    writer = FormWriter()
    writer.output(writer.global_average_pool(writer.input("x", (1, len(sums), height, width), scale=0.5), scale=1.0), "y")
    graph = writer.graph()
    with litert.open(litert.plan(graph), tmp_path) as session:
        assert litert.difference(graph, session, [{"x": columns.reshape(1, len(sums), height, width).astype(np.int8)}]) == 0


def test_some_counts_need_another_weight() -> None:
    """1 / 14 in float32 breaks a tie that 1 / (14 w) for another w keeps; every count up to 64 has such a w."""
    assert not Average(14, (1.0, 0), (1.0, 0)).exact_by_mean()
    found = [Average(count, (1.0, 0), (2.0, 0)).convolution_weight() for count in range(1, 65)]
    assert None not in found and max(weight or 0 for weight in found) > 1


def test_native_rounding_declares_its_step(litert: Any, tmp_path: Path) -> None:
    graph = TIES["add"]()
    plan = litert.plan(graph, rounding="native")
    assert litert.operators(plan) == ["RELU", "ADD"]
    assert plan.max_lsb == ROUNDING["Add"].max_lsb == 1 and "halves up" in plan.why_lsb
    with litert.open(plan, tmp_path) as session:
        assert litert.difference(graph, session, litert.feeds(graph)) == 1
