# SPDX-License-Identifier: Apache-2.0
"""The fusion linter: what runs in int8, what does not and why. The known cases are issues that users of TensorRT filed; the judge is NVIDIA's compiler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.form_writer import FormWriter
from isthmus.graph import QuantGraph
from isthmus.lint import LintRow, totals
from isthmus.profile import load_profile
from isthmus.targets.jetson import TARGET
from isthmus.targets.jetson.check_with_rtx import MATRIX_KERNELS, compiled, kernels_from_log
from isthmus.targets.jetson.dialects import dialect_of
from isthmus.targets.jetson.dla import dla_report, why_not_on_dla
from isthmus.targets.jetson.lint import PRODUCTS, lint, summary
from isthmus.targets.jetson.lower import onnx_from_graph

MODELS = Path(__file__).parents[1] / "models"
ORIN = load_profile("jetson-orin-nano")
STEP = 2.0**-4
Require = Callable[[str], str]
Body = Callable[[FormWriter, str], str]


def graph_of(body: Body, shape: Sequence[int] = (1, 8, 8, 8)) -> QuantGraph:
    w = FormWriter()
    w.output(body(w, w.input("x", shape, scale=STEP)), "y")
    return w.graph()


def conv(w: FormWriter, x: str, name: str, depth: int = 8, **more: object) -> str:
    weight = np.random.randint(-128, 128, (8, depth, 3, 3)).astype(np.int8)
    return w.conv(x, weight, 2.0**-9, None, scale=STEP, pads=(1, 1, 1, 1), name=name, **more)  # type: ignore[arg-type]


def float_conv(w: FormWriter, value: str, name: str) -> str:
    """A convolution that the recipe left float."""
    weight = w.constant(f"{name}_weight", np.random.standard_normal((8, 8, 3, 3)).astype(np.float32) / 8)
    w.float_node("Conv", [value, weight], [f"{name}_out"], name, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    return f"{name}_out"


def float_add(w: FormWriter, a: str, b: str) -> str:
    w.float_node("Add", [a, b], ["sum"], "add")
    return w.quantise("sum", scale=STEP)


# ---- the known cases
def quantised(w: FormWriter, x: str) -> str:
    return w.add(conv(w, conv(w, x, "first", activation="Relu"), "second"), x, scale=STEP, activation="Relu", name="add")


def branch_left_float(w: FormWriter, x: str) -> str:
    """TensorRT issues 3197 and 2067: quantisers stand in front of the convolution, none behind it, so it runs float in, float out."""
    first = conv(w, x, "first", activation="Relu")
    return float_add(w, float_conv(w, w.dequantise(first), "second"), w.dequantise(x))


def lone_island(w: FormWriter, x: str) -> str:
    first = conv(w, x, "first")
    w.float_node("Softmax", [w.dequantise(first)], ["share"], "gate", axis=1)
    return conv(w, w.quantise("share", scale=2.0**-7), "second")


def transposed(w: FormWriter, x: str) -> str:
    return w.conv_transpose(x, np.ones((8, 8, 2, 2), np.int8), 2.0**-7, scale=STEP, strides=(2, 2), name="up")


def padded_average(w: FormWriter, x: str) -> str:
    return conv(w, w.average_pool(x, (3, 3), (1, 1), (1, 1, 1, 1), scale=STEP, name="pool"), "second")


def test_a_quantised_residual_block_is_int8_throughout() -> None:
    rows = lint(graph_of(quantised), ORIN)
    assert [(row.node, row.runs, row.why) for row in rows] == [("first", "int8", ""), ("second", "int8", "")]
    assert totals(rows).int8_macs == totals(rows).macs == 2 * 8 * 8 * 9 * 64 and totals(rows).reformats == 0
    assert summary(rows) == "predicted from the graph: 73,728 of 73,728 MACs (100.0 %) in int8, 2 of 2 layers, 0 reformats"


def test_a_branch_without_quantisers_keeps_addition_and_convolution_float() -> None:
    rows = {row.node: row for row in lint(graph_of(branch_left_float), ORIN)}
    assert rows["first"].runs == "int8"
    assert (rows["second"].runs, rows["second"].why) == ("float", "its output goes to 'add' (Add) without a quantiser")
    assert rows["second"].fix == "quantise the output, in front of 'add'" and rows["second"].macs == rows["first"].macs
    assert rows["add"].why == "its branch 'second_out' is not quantised, so the addition and what writes that branch stay float"
    assert rows["add"].fix == "quantise both branches of the addition"
    assert totals(rows.values()).int8_macs * 2 == totals(rows.values()).macs and totals(rows.values()).reformats == 3
    assert "(50.0 %) in int8, 1 of 2 layers, 3 reformats; float: second (Conv): its output goes to" in summary(list(rows.values()))


def test_a_lone_island_costs_two_changes_of_type() -> None:
    rows = {row.node: row for row in lint(graph_of(lone_island), ORIN)}
    assert (rows["gate"].runs, rows["gate"].reformats) == ("float", 2)
    assert rows["gate"].why == "a float island between int8 layers: 2 changes of type" and rows["gate"].fix


@pytest.mark.parametrize(("body", "node", "why"), [(transposed, "up", "transposed convolutions in float"), (padded_average, "pool", "leaves out its padding")])
def test_operators_without_an_int8_kernel_are_named(body: Body, node: str, why: str) -> None:
    (row,) = [row for row in lint(graph_of(body), ORIN) if row.node == node]
    assert row.runs == "float" and why in row.why and row.fix and row.reformats == 2


def test_a_change_of_scale_is_a_pass_of_its_own() -> None:
    (row,) = lint(graph_of(lambda w, x: w.requantize(x, scale=2.0**-3, name="again")), ORIN)
    assert (row.op, row.reformats, row.fix) == ("Requantize", 1, "let both readers share one scale")


def test_channels_that_are_padded_are_named() -> None:
    (row,) = lint(graph_of(lambda w, x: conv(w, x, "stem", 6), (1, 6, 8, 8)), ORIN)
    assert (row.runs, row.why, row.fix) == ("int8", "6 channels are padded to 8", "a multiple of 4 channels")


def test_what_the_board_has_decides() -> None:
    graph = graph_of(lambda w, x: w.matmul(x, np.ones((8, 4), np.int8), 2.0**-7, scale=STEP, name="product"), (1, 6, 8))
    assert lint(graph, ORIN)[0].runs == "int8"
    row = lint(graph, load_profile("jetson-xavier-nx"))[0]
    assert row.runs == "float" and row.why == "the parser of TensorRT 8.5 lists MatMul for FP32 and FP16 only" and row.fix == "write it as Gemm"
    (row,) = lint(graph, load_profile("jetson-nano"))
    assert row.why == "NVIDIA Jetson Nano 4GB has no int8"


# ---- the judge
def network() -> QuantGraph:
    return QuantGraph.load(MODELS / "network.onnx")


@pytest.mark.parametrize("make", [lambda: graph_of(quantised), lambda: graph_of(lone_island), lambda: graph_of(transposed), network])
def test_nvidias_compiler_multiplies_in_int8_what_is_predicted(make: Callable[[], QuantGraph], require: Require) -> None:
    require("tensorrt_rtx")
    graph = make()
    assert TARGET.check(graph, ORIN) == []
    kernels = [kernel for kernel in compiled(onnx_from_graph(graph, dialect_of("10.3")), 86).kernels if kernel.kind in MATRIX_KERNELS]
    rows = [row for row in lint(graph, ORIN) if row.op in PRODUCTS]
    by_node = {node: kernel for kernel in kernels for node in kernel.nodes}
    assert len(kernels) == len(rows)
    assert {row.node: row.runs == "int8" for row in rows} == {row.node: by_node[row.node].multiplies_int8 for row in rows}


def test_kernels_are_read_from_the_log() -> None:
    tensor = "Name: a, Dimensions: [1,2], Datatype: {}, Format: (Linear) Row major linear format"
    line = (
        "Name: conv_myl0_1, LayerType: correlation, Inputs: [ {{ {} }}], Constants: [ {{ {} }}], Outputs: [ {{ {} }}], TacticName: t, Metadata: [ONNX Layer: c]"
    )
    text = "Layers:\n" + line.format(*(tensor.format(kind) for kind in ("Int8", "Float", "Half"))) + "\nsomething else\n"
    (kernel,) = kernels_from_log(text)
    assert (kernel.kind, kernel.reads, kernel.constants, kernel.writes, kernel.nodes) == ("correlation", ("Int8",), ("Float",), ("Half",), ("c",))
    assert kernel.multiplies_int8 and kernels_from_log("") == ()


@given(
    st.lists(st.sampled_from(["Name: a, LayerType: gemm, Inputs: [", "Outputs: [", "Constants: [", "Datatype: Int8, ", "\n", "[ONNX Layer: n]", "é]"])).map(
        "".join
    )
)
def test_any_log_is_read(text: str) -> None:
    for kernel in kernels_from_log(text):
        assert kernel.kind == "gemm" and set(kernel.reads) <= {"Int8"} and set(kernel.nodes) <= {"n"}


# ---- the DLA
@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda w, x: conv(w, x, "layer"), ""),
        (lambda w, x: w.conv(x, np.ones((8, 8, 3, 3), np.int8), 2.0**-7, scale=1.0, strides=(9, 1), name="layer"), "stride [9, 1] outside 1 to 8"),
        (transposed, ""),
        (lambda w, x: w.max_pool(x, (3, 3), name="layer"), ""),
        (padded_average, ""),
        (
            lambda w, x: w.conv(x, np.ones((8, 8, 1, 1), np.int8), 2.0**-7, scale=1.0, pads=(1, 1, 1, 1), name="layer"),
            "padding [1, 1, 1, 1] not below the kernel",
        ),
        (lambda w, x: w.conv_transpose(x, np.ones((8, 8, 64, 1), np.int8), 2.0**-7, scale=STEP, strides=(1, 1), name="layer"), ""),
        (lambda w, x: w.conv_transpose(x, np.ones((8, 8, 64, 2), np.int8), 2.0**-7, scale=STEP, name="layer"), "kernel [64, 2] outside 1 to 32"),
        (lambda w, x: w.max_pool(w.resize_nearest(x, (1, 8, 32, 32)), (9, 1), pads=(8, 0, 8, 0), name="layer"), "window [9, 1] outside 1 to 8"),
        (lambda w, x: w.average_pool(x, (2, 2), scale=2 * STEP, name="layer"), "in int8 input and output must share one scale"),
        (lambda w, x: w.global_average_pool(x, scale=STEP, name="layer"), "the parser makes a reduction of it"),
        (lambda w, x: w.add(x, w.requantize(x, scale=2 * STEP), scale=STEP, name="layer"), "in int8 both operands must share one scale"),
        (lambda w, x: w.add(x, x, scale=STEP, name="layer"), ""),
        (lambda w, x: w.resize_nearest(x, (1, 8, 16, 32), name="layer"), ""),
        (lambda w, x: w.resize_nearest(x, (1, 8, 16, 16), "half_pixel", "floor", name="layer"), "its coordinates (half_pixel, floor) are none of the DLA's"),
        (lambda w, x: w.resize_linear(x, (1, 8, 16, 16), "align_corners", scale=STEP, name="layer"), "its coordinates (align_corners) are none of the DLA's"),
        (lambda w, x: w.transpose(x, (0, 2, 3, 1), name="layer"), "NVIDIA's limits for a Shuffle layer were not read"),
        (lambda w, x: w.max_pool(w.resize_nearest(x, (1, 8, 16, 16)), (16, 1), name="layer"), "window [16, 1] outside 1 to 8"),
        (lambda w, x: w.resize_nearest(x, (1, 8, 12, 12), name="layer"), "nearest by other than whole factors up to 32"),
        (lambda w, x: w.resize_linear(x, (1, 8, 40, 40), scale=STEP, name="layer"), "bilinear by other than whole factors up to 4"),
        (lambda w, x: w.concat([x, x], 2, name="layer"), "a join along another axis than the channels"),
        (lambda w, x: w.function("Mish", x, scale=STEP, name="layer"), "the DLA has no such layer"),
        (lambda w, x: w.relu(w.reshape(x, (1, 8, 64)), name="layer"), "tensors must have four axes"),
    ],
)
def test_each_limit_of_the_dla(body: Body, reason: str) -> None:
    graph = graph_of(body)
    node = next(node for node in graph.nodes if node.name in ("layer", "up", "pool"))
    assert why_not_on_dla(graph, node).startswith(reason) and bool(why_not_on_dla(graph, node)) == bool(reason)


def test_xaviers_dla_takes_less() -> None:
    (pool,) = [node for node in graph_of(padded_average).nodes if node.name == "pool"]
    assert why_not_on_dla(graph_of(padded_average), pool, sm=72) == "an average that leaves out its padding"
    graph = QuantGraph.load(MODELS / "slice.onnx")
    (cut,) = [node for node in graph.nodes if node.op == "Slice"]
    assert why_not_on_dla(graph, cut, sm=72) == "read for Orin's DLA alone" != why_not_on_dla(graph, cut)


def test_the_report_lists_what_falls_back() -> None:
    graph = graph_of(lambda w, x: w.function("Mish", conv(w, x, "stem"), scale=STEP, name="bend"))
    assert dla_report(graph, load_profile("jetson-orin-nx-16gb")) == [
        "option dla: the DLA's limits take 1 of 2 layers; on the GPU: bend (Mish: the DLA has no such layer)"
    ]


def test_rows_are_plain_values() -> None:
    assert all(isinstance(row, LintRow) and row.runs in ("int8", "float") for row in lint(network(), ORIN))
