# SPDX-License-Identifier: Apache-2.0
"""What the target refuses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from isthmus.form_writer import FormWriter
from isthmus.graph import QuantGraph
from isthmus.profile import load_profile
from isthmus.targets.tflite import TARGET

Feeds = Mapping[str, np.ndarray]


PROFILE = load_profile("rpi5")
ONE = np.ones((1, 1, 1, 1), np.int8)


# ---- what the target refuses
def _refused(graph: QuantGraph) -> str:
    (problem,) = TARGET.check(graph, PROFILE)
    assert problem.node in {node.name for node in graph.nodes} and problem.found and problem.fix
    return problem.rule


def test_what_tflite_lacks_is_named(litert: Any) -> None:
    assert _refused(litert.case().one((1, 3, 8, 8), lambda c, x: c.writer.max_pool(x, (2, 2), (1, 1), dilations=(2, 2)))) == "tflite-dilation"
    assert _refused(litert.case().one((1, 3, 4, 4, 4), lambda c, x: c.writer.global_average_pool(x, scale=0.5))) == "tflite-rank"
    writer = FormWriter()
    writer.output(writer.conv(writer.input("x", (1, 1, 4, 4), scale=1.0), ONE, 1.0, scale=2.0**-8), "y")
    assert _refused(writer.graph()) == "tflite-scale"
    assert _refused(litert.case().one((1, 2, 2, 2, 2, 2, 2), lambda c, x: c.writer.transpose(x, (0, 6, 5, 4, 3, 2, 1)))) == "tflite-rank"


def _island(op: str, shape: tuple[int, ...], more: int = 0, **attributes: Any) -> QuantGraph:
    writer = FormWriter()
    inputs = [writer.dequantise(writer.input(f"x{index}", extents, scale=1.0)) for index, extents in enumerate((shape, (1, 2, 2, 2))[: 1 + more])]
    writer.float_node(op, inputs, ["inside"], "island", **attributes)
    if op == "ArgMax":
        writer.float_node("Cast", ["inside"], ["number"], "cast", to=1)
    writer.output(writer.quantise("number" if op == "ArgMax" else "inside", scale=1.0), "y")
    return writer.graph()


def test_an_island_that_tflite_computes_otherwise_is_named() -> None:
    assert _refused(_island("ArgMax", (1, 3, 4, 4), axis=1, select_last_index=1)) == "tflite-island"
    assert _refused(_island("GridSample", (1, 3, 4, 4), more=1, mode="cubic")) == "tflite-island"
    assert _refused(_island("GridSample", (1, 3, 4, 4), more=1, padding_mode="reflection")) == "tflite-island"
    assert _refused(_island("LpNormalization", (1, 3, 4, 4), axis=1)) == "operator"


def test_two_weights_of_minus_128_are_refused_where_the_input_can_be_that_low() -> None:
    weight = np.full((1, 2, 1, 1), -128, np.int8)

    def graph(relu: bool, weight: np.ndarray) -> QuantGraph:
        writer = FormWriter()
        x = writer.input("x", (1, 2, 4, 4), scale=1.0)
        writer.output(writer.conv(writer.relu(x) if relu else x, weight, 0.5, scale=1.0), "y")
        return writer.graph()

    assert _refused(graph(False, weight)) == "tflite-weight-range"
    assert TARGET.check(graph(True, weight), PROFILE) == []
    assert TARGET.check(graph(False, np.array([-128, -127], np.int8).reshape(1, 2, 1, 1)), PROFILE) == []


def test_two_weights_of_minus_128_in_a_transposed_convolution() -> None:
    """Its weight has the output channels second."""
    weight = np.zeros((2, 3, 1, 1), np.int8)
    weight[:, 1] = -128

    def graph(weight: np.ndarray) -> QuantGraph:
        writer = FormWriter()
        writer.output(writer.conv_transpose(writer.input("x", (1, 2, 4, 4), scale=1.0), weight, 0.5, scale=1.0), "y")
        return writer.graph()

    assert _refused(graph(weight)) == "tflite-weight-range"
    weight[0, 1], weight[0, 2] = 0, -128  # one for each of two outputs
    assert TARGET.check(graph(weight), PROFILE) == []
