# SPDX-License-Identifier: Apache-2.0
"""Prediction of latency: the published rows, the fit and its honesty, the roofline's kernels, and what the command prints."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from isthmus.bundle import Bundle
from isthmus.cli import app
from isthmus.errors import IsthmusError
from isthmus.form_writer import FormWriter
from isthmus.graph import QuantGraph
from isthmus.measurement import Measurement
from isthmus.pipeline import compile as compile_model
from isthmus.predict import (
    Coefficients,
    Fit,
    Row,
    counted,
    fit,
    missing_facts,
    percents,
    predict,
    predictions,
    published_fit,
    published_networks,
    published_rows,
    rates_of,
    rows_of_csv,
    work_of,
    work_of_row,
)
from isthmus.profile import load_profile, profile_names
from isthmus.registry import load_target
from isthmus.roofline import Kernel, fused, op_by_op, program_of_graph, program_of_onnx

JETSONS = [name for name in profile_names() if name.startswith("jetson-")]
AMFACPOSE = "amfacpose-"
PAPER_BILLIONS = {"r34-384x288": 5.2, "r34-256x256": 3.1, "r18-384x288": 3.2, "r18-256x256": 1.9}  # AMFACPose, table 4: GFLOPs, which are MACs
PAPER_FPS = {
    "jetson-orin-nano": (14.74, 23.59, 23.18, 36.02),
    "jetson-orin-nx-8gb": (18.90, 30.23, 29.89, 45.03),
    "jetson-orin-nx-16gb": (21.75, 34.16, 33.74, 50.45),
}


def float_net(path: Path | None = None) -> onnx.ModelProto:
    """conv, batch normalisation, x * sigmoid(x), a gate from its mean, and the image's own branch added."""
    rng = np.random.default_rng(0)
    arrays = {
        "w": rng.standard_normal((8, 4, 3, 3)),
        "s": np.ones(8),
        "b": np.zeros(8),
        "m": np.zeros(8),
        "v": np.ones(8),
        "g": rng.standard_normal((8, 8, 1, 1)),
    }
    arrays["p"] = rng.standard_normal((8, 4, 1, 1))
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], "conv", pads=[1, 1, 1, 1], kernel_shape=[3, 3]),
        helper.make_node("BatchNormalization", ["c", "s", "b", "m", "v"], ["n"], "norm"),
        helper.make_node("Sigmoid", ["n"], ["sig"], "sigmoid"),
        helper.make_node("Mul", ["n", "sig"], ["silu"], "silu"),
        helper.make_node("GlobalAveragePool", ["silu"], ["mean"], "mean"),
        helper.make_node("Conv", ["mean", "g"], ["gate"], "gate", kernel_shape=[1, 1]),
        helper.make_node("Mul", ["silu", "gate"], ["gated"], "gated"),
        helper.make_node("Conv", ["x", "p"], ["short"], "short", kernel_shape=[1, 1]),
        helper.make_node("Add", ["gated", "short"], ["y"], "sum"),
    ]
    tensors = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in arrays.items()]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, channels, 16, 16]) for name, channels in (("x", 4), ("y", 8))]
    model = helper.make_model(helper.make_graph(nodes, "net", ends[:1], ends[1:], tensors), opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    if path is not None:
        onnx.save(model, path)
    return model


def small_form() -> QuantGraph:
    writer = FormWriter()
    image = writer.input("image", (1, 4, 8, 8), scale=2**-5)
    weight = np.arange(-72, 72, dtype=np.int8).reshape(4, 4, 3, 3)
    hidden = writer.conv(image, weight, 2**-6, np.arange(4, dtype=np.int32), scale=2**-4, pads=(1, 1, 1, 1), activation="Relu")
    writer.output(writer.flatten(writer.global_average_pool(hidden, scale=2**-5)), "scores")
    return writer.graph()


# ---- the floor
def test_leave_one_out_error_on_the_twelve_amfacpose_rows() -> None:
    """Each row predicted by parameters fitted without it; and without its whole network, and without its whole board."""
    found = published_fit("framework")
    twelve = [index for index, row in enumerate(found.rows) if row.network.startswith(AMFACPOSE)]
    assert len(twelve) == 12
    for errors in (found.errors, found.unseen):
        off = percents(errors[index] for index in twelve)
        assert np.median(off) <= 8
        assert max(off) <= 20
    rows, networks = published_rows(), published_networks()
    for board in {found.rows[index].boards[0] for index in twelve}:
        without = fit("framework", [row for row in rows if row.boards != (board,)], networks).coefficients
        own = [found.rows[index] for index in twelve if found.rows[index].boards == (board,)]
        assert max(percents(row.error(without.seconds(work_of_row(row, board, networks))) for row in own)) <= 20


def test_leaving_a_row_out_really_leaves_it_out() -> None:
    """A row's left-out prediction does not change with its own value."""
    rows = [row for row in published_rows() if row.network.startswith(AMFACPOSE)]
    assert rows[0].seconds is not None
    changed = [replace(rows[0], seconds=rows[0].seconds * 1.5), *rows[1:]]
    before, after = (fit("framework", each, published_networks()) for each in (rows, changed))
    assert after.errors[0] == pytest.approx(before.errors[0] - np.log(1.5), abs=1e-3)
    assert after.coefficients != before.coefficients
    assert abs(after.errors[1] - before.errors[1]) > 1e-4


def test_the_shares_are_physical() -> None:
    for runtime in ("tensorrt", "framework"):
        c = published_fit(runtime).coefficients
        assert 0 < c.compute_share <= 1
        assert 0 < c.memory_share <= 1
        assert 1e-6 < c.overhead_s < 1e-4


def test_the_fit_finds_the_parameters_that_made_its_rows() -> None:
    truth = Coefficients(0.3, 0.6, 2e-5)
    networks = published_networks()
    rows = [row for row in published_rows() if row.runtime == "tensorrt"]
    made = [replace(row, seconds=truth.seconds(work_of_row(row, row.boards[0], networks))) for row in rows]
    found = fit("tensorrt", made, networks)
    c = found.coefficients
    assert (c.compute_share, c.memory_share, c.overhead_s) == pytest.approx((0.3, 0.6, 2e-5), rel=1e-3)
    assert found.factor == pytest.approx(1, abs=1e-3)


def test_too_few_rows_fit_nothing() -> None:
    with pytest.raises(IsthmusError, match=r"runtime tensorrt: 4 rows of \d networks fit no model of 3 parameters"):
        fit("tensorrt", [row for row in published_rows() if row.runtime == "tensorrt" and row.fitted][:4], published_networks())


def test_an_engine_that_tensorrt_does_not_make_of_the_graph_is_held_against_and_not_fitted() -> None:
    """MLPerf's ResNet-50 has kernels of its own: slower than it is predicted, and no parameter knows of it."""
    rows, networks = published_rows(), published_networks()
    apart = [row for row in rows if not row.comparable]
    assert [row.network for row in apart] == ["resnet50-v1.5-224"] * 2 and not any(row.fitted for row in apart)
    assert fit("tensorrt", [row for row in rows if row.comparable], networks).coefficients == published_fit("tensorrt").coefficients
    c = published_fit("tensorrt").coefficients
    assert all(row.error(c.seconds(work_of_row(row, row.boards[0], networks))) > 0 for row in apart)


def test_the_tensorrt_rows_are_predicted_within_their_interval() -> None:
    """Nine in ten of the networks that the fit had not seen, by what the interval is made of; half of the rows within 15 %."""
    found = published_fit("tensorrt")
    assert len({row.network for row in found.rows}) >= 12 and len({row.boards for row in found.rows}) >= 4
    assert np.median(percents(found.errors)) <= 15
    assert np.mean(np.abs(found.unseen) <= np.log(found.factor)) >= 0.9


# ---- data
def test_every_row_has_a_source_a_network_and_a_board() -> None:
    networks = published_networks()
    for row in published_rows():
        assert row.source
        assert (row.seconds is None) != (row.fps is None)
        for board in row.boards:
            assert work_of_row(row, board, networks).counts.sum() > 10
    assert {len(row.boards) for row in published_rows()} == {1, 2}


def test_the_papers_rows_are_its_own_frames_a_second_but_one() -> None:
    """Milliseconds and frames a second stand beside each other in AMFACPose's table 4, and contradict each other in one cell of it."""
    seconds = amfacpose_seconds()
    off = {
        (board, preset)
        for board, row in PAPER_FPS.items()
        for preset, fps in zip(PAPER_BILLIONS, row, strict=True)
        if abs(fps * seconds[board][preset] - 1) >= 5e-3
    }
    assert off == {("jetson-orin-nx-8gb", "r18-384x288")}


@pytest.mark.parametrize(("board", "offset", "slope"), [("jetson-orin-nano", 4.6, 12.1), ("jetson-orin-nx-8gb", 4.0, 9.3), ("jetson-orin-nx-16gb", 4.6, 7.9)])
def test_the_papers_rows_lie_on_the_line_that_the_specification_finds(board: str, offset: float, slope: float) -> None:
    """Milliseconds over the paper's GFLOPs, least squares (specification 10, section 5)."""
    milliseconds = 1e3 * np.array([amfacpose_seconds()[board][preset] for preset in PAPER_BILLIONS])
    assert np.polyfit(list(PAPER_BILLIONS.values()), milliseconds, 1) == pytest.approx([slope, offset], abs=0.05)


def amfacpose_seconds() -> dict[str, dict[str, float]]:
    """Of each board and preset."""
    rows = [row for row in published_rows() if row.network.startswith(AMFACPOSE)]
    return {board: {row.network.removeprefix(AMFACPOSE): row.seconds or 0.0 for row in rows if row.boards == (board,)} for board in PAPER_FPS}


def test_a_range_is_no_error_inside_and_the_nearer_end_outside() -> None:
    row = Row("n", ("b",), "fp32", "framework", "s", fps=(2, 4))
    assert row.error(1 / 3) == 0
    assert row.error(1) == pytest.approx(np.log(2))
    assert row.error(1 / 8) == pytest.approx(np.log(0.5))
    assert replace(row, fps=(0, 1)).error(1e3) == 0


def test_the_stored_kernels_add_up_to_the_published_macs() -> None:
    networks = published_networks()
    billions = {name: sum(kernel.macs * count for kernel, count in kernels.items()) / 1e9 for name, kernels in networks.items()}
    assert {preset: billions[AMFACPOSE + preset] for preset in PAPER_BILLIONS} == pytest.approx(PAPER_BILLIONS, abs=0.06)
    # Ultralytics' own count is of FLOPs, 2 a MAC.
    assert 2 * billions["yolo11n-640"] == pytest.approx(6.5, abs=0.1)
    assert 2 * billions["yolov8m-640"] == pytest.approx(78.9, abs=0.1)
    assert billions["u2net-256"] == pytest.approx(37.378, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["r34-384x288", "r34-256x256", "r18-384x288", "r18-256x256"])
def test_the_stored_kernels_are_those_of_the_network(preset: str) -> None:
    """The paper's, which was measured: without the bound that the zoo's logits have."""
    from isthmus.zoo_source import untrained_onnx

    model = untrained_onnx(f"zoo:amfacpose@{preset}")
    bounds = {node.input[0]: node for node in model.graph.node if node.op_type == "Clip"}
    assert sorted(bound.output[0] for bound in bounds.values()) == sorted(output.name for output in model.graph.output)
    for node in model.graph.node:
        if node.output[0] in bounds:
            node.output[0] = bounds[node.output[0]].output[0]
    for bound in bounds.values():
        model.graph.node.remove(bound)
    assert counted(op_by_op(program_of_onnx(model))) == published_networks()[AMFACPOSE + preset]


# ---- kernels
def test_fused_kernels_of_a_float_net() -> None:
    """Three: convolution with its norm and x * sigmoid(x); its mean; the gate. The gate is computed from what the first makes, so the product is apart,
    and takes the sum with it once the shortcut is there."""
    kernels = fused(program_of_onnx(float_net()))
    assert kernels == [
        Kernel(8 * 256 * 36, 4 * 256, 8 * 36, 8 * 256),
        Kernel(0, 8 * 256, 0, 8),
        Kernel(64, 8, 64, 8),
        Kernel(0, 8 * 256 + 8, 0, 8 * 256),
        Kernel(8 * 256 * 4, 4 * 256 + 8 * 256, 8 * 4, 8 * 256),
    ]


def test_op_by_op_is_one_kernel_an_operator_with_the_same_macs() -> None:
    program = program_of_onnx(float_net())
    kernels = op_by_op(program)
    assert len(kernels) == 9
    assert sum(kernel.macs for kernel in kernels) == sum(kernel.macs for kernel in fused(program))


def test_resnet_50_has_as_many_kernels_as_layers() -> None:
    """53 convolutions, two pools and the dense layer; every ReLU, norm and addition is inside one of them."""
    resnet = published_networks()["resnet50-v1.5-224"]
    assert sum(resnet.values()) == 56
    assert sum(kernel.macs * count for kernel, count in resnet.items()) == 4_089_184_256


def test_a_float_layer_counts_in_half_precision() -> None:
    rates = rates_of(load_profile("jetson-orin-nano"))
    alone, floating = (work_of({Kernel(1000, 10, 10, 10, kind): 1}, rates, "int8") for kind in (False, True))
    assert floating.arithmetic_s[0] == pytest.approx(2 * alone.arithmetic_s[0])
    assert floating.memory_s[0] == pytest.approx(2 * alone.memory_s[0])


# ---- predictions
@pytest.mark.parametrize("name", JETSONS)
def test_every_jetson_is_predicted_or_lacks_a_fact(name: str) -> None:
    profile = load_profile(name)
    found = load_target("jetson").estimate(small_form(), profile, {})
    assert bool(found) != bool(missing_facts(profile))
    for estimate in found:
        assert estimate.word == "predicted"
        assert "leave-one-out error median" in estimate.basis
        assert estimate.latency_s is not None
        low, likely, high = estimate.latency_s
        assert 0 < low < likely < high
    assert all("int8" not in estimate.label for estimate in found) == ("int8" not in profile.facts["precisions"] or not found)


def test_a_faster_clock_a_faster_board_and_fewer_bits_are_never_slower() -> None:
    program = program_of_onnx(float_net())

    def likely(board: str, precision: str, mode: str = "") -> float:
        found = predict(program, load_profile(board), precision, mode=mode).latency_s
        assert found is not None
        return found[1]

    assert likely("jetson-orin-nano", "int8") <= likely("jetson-orin-nano", "fp16")
    assert likely("jetson-orin-nano", "fp16", "super") <= likely("jetson-orin-nano", "fp16")
    assert likely("jetson-agx-orin-64gb", "fp16") <= likely("jetson-orin-nano", "fp16") < likely("jetson-nano", "fp16")
    with pytest.raises(IsthmusError, match=r"the board has no int8: it has fp32, fp16"):
        predict(program, load_profile("jetson-nano"), "int8")
    with pytest.raises(IsthmusError, match=r"unknown mode 'turbo' of jetson-nano"):
        predict(program, load_profile("jetson-nano"), "fp16", mode="turbo")


def test_a_form_has_no_framework_row() -> None:
    labels = [estimate.label for estimate in predictions(program_of_graph(small_form()), load_profile("jetson-orin-nx-16gb"))]
    assert labels == ["TensorRT, int8", "TensorRT, fp16"]


# ---- a user's own rows
HEADER = "model,board,precision,runtime,mode,ms,source\n"


def test_own_rows_join_the_fit(tmp_path: Path) -> None:
    float_net(tmp_path / "net.onnx")
    (tmp_path / "own.csv").write_text(HEADER + "net.onnx,jetson-orin-nano,fp16,tensorrt,super,0.35,my desk\n")
    rows, networks = rows_of_csv(tmp_path / "own.csv")
    assert (rows[0].seconds, rows[0].mode, rows[0].source) == (0.35e-3, "super", "my desk")
    joined = fit("tensorrt", [*published_rows(), *rows], {**published_networks(), **networks})
    assert len(joined.rows) == len(published_fit("tensorrt").rows) + 1
    assert isinstance(joined, Fit)


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("a,b\n", r"own.csv: expected the columns model,board,precision,runtime,mode,ms,source, found a,b"),
        ("", r"found none"),
        (HEADER + "net.onnx,jetson-orin-nano,fp16,tensorrt,,fast,\n", r"own.csv, line 2: ms is 'fast', expected a time above 0"),
        (HEADER + "net.onnx,jetson-orin-nano,fp16,tensorrt,,-1,\n", r"line 2: ms is '-1'"),
        (HEADER + "net.onnx,jetson-orin-nano,fp64,tensorrt,,1,\n", r"line 2: precision is 'fp64', expected one of fp32, fp16, int8"),
        (HEADER + "net.onnx,jetson-orin-nano,fp16,tvm,,1,\n", r"line 2: runtime is 'tvm', expected one of tensorrt, framework"),
        (HEADER + "net.onnx,jetson-nano,int8,tensorrt,,1,\n", r"the board has no int8"),
        (HEADER + "net.onnx,jetson-orin,fp16,tensorrt,,1,\n", r"unknown profile 'jetson-orin'"),
        (HEADER + "net.onnx,jetson-orin-nano,fp16,tensorrt,,1,\n", r"net.onnx"),
    ],
)
def test_wrong_rows_are_named(tmp_path: Path, text: str, pattern: str) -> None:
    (tmp_path / "own.csv").write_text(text)
    with pytest.raises(IsthmusError, match=pattern):
        rows_of_csv(tmp_path / "own.csv")


# ---- the command
def said(*words: str | Path) -> str:
    done = CliRunner().invoke(app, list(map(str, words)), catch_exceptions=True)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.stdout


def test_cost_on_prints_the_interval_the_word_and_the_error(tmp_path: Path) -> None:
    float_net(tmp_path / "net.onnx")
    words = ["cost", tmp_path / "net.onnx", "--on", "jetson-orin-nx-16gb", "--on", "jetson-thor", "--on", "pynq-z2"]
    text = said(*words)
    assert "low ms  likely ms  high ms" in text
    assert text.count("predicted") >= 4
    assert "leave-one-out error median" in text
    assert "jetson-thor: nothing is predicted: its profile has no" in text
    assert "pynq-z2: target hls4ml estimates int8 forms alone" in text
    data = json.loads(said(*words, "--json"))
    assert data["on"]["jetson-orin-nx-16gb"][0]["word"] == "predicted"
    assert len(data["on"]["jetson-orin-nx-16gb"][0]["latency_s"]) == 3
    assert data["macs"] > 0
    with pytest.raises(IsthmusError, match="name a board with --on"):
        said("cost", tmp_path / "net.onnx", "--rows", tmp_path / "own.csv")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("predict")
    small_form().save(folder / "small.onnx")
    return compile_model(folder / "small.onnx", targets=["jetson-orin-nano"], output=folder / "bundle")


def test_a_measurement_takes_the_place_of_the_prediction_and_joins_the_fit(bundle: Bundle) -> None:
    text = said("cost", bundle.root, "--on", "jetson-orin-nano")
    assert "predicted" in text and "measured" not in text
    with pytest.raises(IsthmusError, match="no valid measurement of a TensorRT engine on a Jetson"):
        said("cost", bundle.root, "--on", "jetson-orin-nx-16gb", "--rows", bundle.root)
    samples = np.full(700, 250_000)
    conditions = {"engine": "tensorrt", "engine_chosen": "int8", "measured_over_ssh_on": "user@board"}
    taken = Measurement("SingleStream", samples, 10, 700, int(samples.sum()), conditions)
    measured = bundle.add_report("bench-jetson-orin-nano.json", json.dumps(taken.to_json()).encode())
    data = json.loads(said("cost", measured.root, "--on", "jetson-orin-nano", "--json"))
    (only,) = data["on"]["jetson-orin-nano"]
    assert (only["word"], only["latency_s"]) == ("measured", [250e-6] * 3)
    joined = json.loads(said("cost", measured.root, "--on", "jetson-orin-nx-16gb", "--rows", measured.root, "--json"))
    assert f"{len(published_fit('tensorrt').rows) + 1} rows" in joined["on"]["jetson-orin-nx-16gb"][0]["basis"]
