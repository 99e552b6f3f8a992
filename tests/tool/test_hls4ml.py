# SPDX-License-Identifier: Apache-2.0
"""The hls4ml target and its C simulation: networks that equal the reference bit for bit, and everything that is refused by name."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus import reference
from isthmus.errors import IsthmusError, ProblemsError
from isthmus.form_writer import FormWriter
from isthmus.graph import QuantGraph
from isthmus.plan import BuildPlan, execute
from isthmus.profile import load_profile
from isthmus.recipe import Recipe
from isthmus.runtimes.csim import CsimSession, open_session
from isthmus.targets.hls4ml import TARGET, simulation
from isthmus.targets.hls4ml.fixed import Fixed, activation_type, average_type, exact_weights, holding, widened
from isthmus.targets.hls4ml.folding import UNROLL_LIMIT, Product, fold
from isthmus.targets.hls4ml.lower import lower
from isthmus.tools import find_tool

PROFILE = load_profile("pynq-z2")
SAMPLES = 40
Built = tuple[QuantGraph, BuildPlan, Path]


# ---- parts
def _random(seed: int) -> tuple[Callable[..., np.ndarray], Callable[..., np.ndarray]]:
    """(weights(*shape), bias(filters)) over the whole range of int8, and of a few output steps."""
    generator = np.random.default_rng(seed)
    return lambda *shape: generator.integers(-128, 128, shape).astype(np.int8), lambda filters: generator.integers(-3000, 3000, filters).astype(np.int32)


def _plan(graph: QuantGraph, **options: Any) -> BuildPlan:
    assert TARGET.check(graph, PROFILE) == []
    return TARGET.plan(graph, PROFILE, options)


def _build(graph: QuantGraph, folder: Path, **options: Any) -> Built:
    plan = _plan(graph, **options)
    folder.mkdir()
    statuses = [(result.name, result.status) for result in execute(plan, folder)]
    assert statuses == [("convert", "done"), ("csim", "done"), ("synthesis", "planned")]
    return graph, plan, folder


def _open(built: Built) -> CsimSession:
    _, plan, folder = built
    return open_session(
        folder, {"artifact": plan.artifact, "inputs": [spec.to_json() for spec in plan.inputs], "outputs": [spec.to_json() for spec in plan.outputs]}
    )


def _equals_reference(built: Built, samples: int = SAMPLES) -> dict[str, np.ndarray]:
    """Every element of every output, over random samples and both extremes. Gives the outputs."""
    graph = built[0]
    generator = np.random.default_rng(1)
    batch = graph.inputs[0].shape[0]
    feeds = {spec.name: generator.integers(-128, 128, (samples * batch, *spec.shape[1:])).astype(np.int8) for spec in graph.inputs}
    for array in feeds.values():
        array[:batch], array[batch : 2 * batch] = -128, 127
    expected = reference.run(graph, feeds)
    with _open(built) as session:
        parts = [session.run_quantised({name: array[start : start + batch] for name, array in feeds.items()}) for start in range(0, samples * batch, batch)]
    for spec in graph.outputs:
        actual = np.concatenate([part[spec.name] for part in parts])
        assert actual.dtype == np.dtype(spec.dtype)
        if spec.is_quantised:
            np.testing.assert_array_equal(actual, expected[spec.name], err_msg=spec.name)
        else:
            np.testing.assert_allclose(actual, expected[spec.name], atol=1e-6, err_msg=spec.name)
    return expected


def _classifier() -> QuantGraph:
    weight, bias = _random(0)
    writer = FormWriter(recipe=Recipe())
    y = writer.input("image", (1, 1, 6, 6), scale=2**-4)
    y = writer.conv(y, weight(4, 1, 3, 3), 2**-7, bias(4), scale=2**-2, activation="Relu", pads=(1, 1, 1, 1), name="Stage/1 conv")
    y = writer.max_pool(y, kernel=(2, 2), strides=(2, 2))
    y = writer.conv(y, weight(8, 4, 3, 3), 2**-7, bias(8), scale=2**0, activation="Relu")
    y = writer.global_average_pool(y, scale=2**-1)
    y = writer.gemm(writer.flatten(y), weight(10, 8), 2**-7, bias(10), scale=2**0)
    writer.output(y, "logits")
    return writer.graph()


def _convolutions() -> QuantGraph:
    """Stride, uneven padding, depthwise, groups, dilation, both kinds of clip, one scale a channel, 1x1."""
    weight, bias = _random(1)
    writer = FormWriter(recipe=Recipe())
    y = writer.input("image", (1, 3, 7, 6), scale=2**-4)
    y = writer.conv(y, weight(6, 3, 3, 3), 2**-7, bias(6), scale=2**-2, activation="Relu", strides=(2, 1), pads=(1, 0, 2, 1))
    y = writer.conv(y, weight(6, 1, 3, 3), 2**-6, bias(6), scale=2**-1, pads=(1, 1, 0, 2), group=6)
    y = writer.conv(y, weight(4, 3, 3, 2), 2**-7, None, scale=2**0, activation=("Clip", -40.0, 60.0), group=2, pads=(1, 0, 1, 1))
    y = writer.conv(y, weight(4, 4, 2, 2), 2**-7, bias(4), scale=2**0, dilations=(2, 2), pads=(1, 1, 1, 1), activation=("Clip", 0.0, 90.0))
    scales = np.array([2.0**-7, 2.0**-5, 2.0**-6, 2.0**-7, 2.0**-4], np.float32)
    y = writer.conv(y, weight(5, 4, 1, 1), scales, bias(5), scale=2**1, strides=(2, 2))
    writer.output(y, "map")
    return writer.graph()


def _merges() -> QuantGraph:
    """A residual, a tensor added to itself, a channel vector; pools that overlap, are padded and overhang; joins and reshapes; two outputs."""
    weight, bias = _random(2)
    writer = FormWriter(recipe=Recipe())
    x = writer.input("image", (1, 3, 5, 5), scale=2**-3)
    y = writer.conv(x, weight(3, 3, 3, 3), 2**-7, bias(3), scale=2**0, pads=(1, 1, 1, 1))
    y = writer.add(x, y, scale=2**0, activation="Relu")
    y = writer.add(y, y, scale=2**1)
    y = writer.add(y, writer.global_average_pool(y, scale=2**-1), scale=2**1)
    joined = writer.concat(
        [
            writer.average_pool(y, kernel=(3, 3), strides=(1, 1), pads=(1, 1, 1, 1), count_include_pad=0, scale=2**1),
            writer.average_pool(y, kernel=(3, 3), strides=(1, 1), pads=(1, 1, 1, 1), count_include_pad=1, scale=2**1),
            writer.max_pool(y, kernel=(3, 3), strides=(1, 1), pads=(1, 1, 1, 1)),
        ],
        axis=1,
    )
    pooled = writer.max_pool(joined, kernel=(3, 2), strides=(2, 2), pads=(1, 0, 0, 0), ceil_mode=1)
    writer.output(writer.reshape(writer.flatten(pooled), (1, 3, 9, 3)), "reshaped")
    y = writer.gemm(writer.flatten(pooled), weight(7, 81), 2**-7, bias(7), scale=2**4, activation="Relu")
    writer.output(writer.matmul(y, weight(7, 5), 2**-7, scale=2**4), "logits")
    return writer.graph()


def _ties() -> QuantGraph:
    """Every int8 value through every rounding: half steps, coarse steps that drop more bits than there are, finer steps that saturate."""
    writer = FormWriter(recipe=Recipe())
    x = writer.input("x", (1, 2, 8, 16), scale=2**-3)
    identity = np.array([[1, 0], [0, 1], [1, 1], [-1, 1], [3, -5]], np.int8).reshape(5, 2, 1, 1)
    bias = np.array([0, 1, 2, 3, -7], np.int32)
    half = writer.requantize(x, scale=2**-2)
    far = writer.requantize(x, scale=2.0**6)
    outputs = [writer.requantize(x, scale=2**-4), half, far]
    outputs += [writer.relu(x), writer.clip(x, -5.0, 9.0), writer.clip(x, 1.0, 100.0), writer.clip(x, -100.0, -2.0)]
    outputs += [writer.conv(x, identity, 2**-1, bias, scale=2**-2), writer.conv(x, identity, 2**-1, bias, scale=2**-2, activation="Relu")]
    outputs += [writer.conv(x, np.full((1, 2, 1, 1), -128, np.int8), 2**-7, scale=2**-3), writer.conv(x, identity[:1], 2**-1, scale=2.0**9, activation="Relu")]
    outputs += [writer.add(x, half, scale=2**-2), writer.add(half, far, scale=2**3, activation=("Clip", -30.0, 200.0))]
    outputs += [writer.average_pool(x, kernel=kernel, strides=(1, 1), pads=(0, 0, 0, 0), scale=2**-2) for kernel in ((1, 3), (3, 3), (5, 1), (2, 2))]
    for index, tensor in enumerate(outputs):
        writer.output(tensor, f"o{index}")
    return writer.graph()


def _signal() -> QuantGraph:
    """1-D, a batch of two, a softmax that the host computes."""
    weight, bias = _random(4)
    writer = FormWriter(recipe=Recipe())
    y = writer.input("signal", (2, 2, 16), scale=2**-5)
    y = writer.conv(y, weight(3, 2, 5), 2**-7, bias(3), scale=2**-2, activation="Relu", strides=(2,), pads=(2, 1))
    y = writer.max_pool(y, kernel=(3,), strides=(2,), pads=(1, 0))
    y = writer.average_pool(y, kernel=(2,), strides=(1,), pads=(0, 0), scale=2**-3)
    writer.output(y, "features")
    writer.softmax_output(writer.gemm(writer.flatten(y), weight(4, 9), 2**-9, bias(4), scale=2**-2, activation=("Clip", -2.0, 3.0)), "probabilities")
    return writer.graph()


def _streamed() -> QuantGraph:
    weight, bias = _random(5)
    writer = FormWriter(recipe=Recipe())
    y = writer.input("image", (1, 3, 8, 8), scale=2**-4)
    y = writer.conv(y, weight(4, 3, 3, 3), 2**-7, bias(4), scale=2**-2, activation="Relu", strides=(2, 1), pads=(1, 0, 2, 1))
    side = writer.conv(y, weight(4, 1, 3, 3), 2**-6, bias(4), scale=2**-1, pads=(1, 1, 1, 1), group=4)
    y = writer.concat([writer.add(y, side, scale=2**-1, activation="Relu"), side], axis=1)
    y = writer.max_pool(writer.clip(y, -20.0, 50.0), kernel=(2, 3), strides=(2, 3))
    y = writer.average_pool(writer.conv(y, weight(6, 8, 1, 1), 2**-7, bias(6), scale=2**-1, activation="Relu"), kernel=(2, 1), strides=(2, 1), scale=2**-2)
    y = writer.gemm(writer.flatten(y), weight(5, 12), 2**-7, bias(5), scale=2**1)
    writer.output(y, "logits")
    return writer.graph()


@pytest.fixture(scope="session")
def tools(require: Callable[[str], str]) -> None:
    require("hls4ml")
    require("g++")


@pytest.fixture(scope="module")
def classifier(tools: None, tmp_path_factory: pytest.TempPathFactory) -> Built:
    return _build(_classifier(), tmp_path_factory.mktemp("hls4ml") / "classifier")


# ---- the C simulation equals the reference
def test_a_classifier_is_exact_and_its_folder_may_move(classifier: Built, tmp_path: Path) -> None:
    outputs = _equals_reference(classifier)
    assert outputs["logits"].std() > 4
    graph, plan, folder = classifier
    moved = (graph, plan, tmp_path / "elsewhere")
    shutil.copytree(folder, moved[2])
    _equals_reference(moved, samples=4)


def test_nothing_in_the_folder_says_where_it_was_built(classifier: Built) -> None:
    folder = classifier[2]
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != "logs"]
    assert len(files) > 50
    assert [path for path in files if str(folder).encode() in path.read_bytes()] == []
    assert "AP_SAT_SYM" not in (folder / "project/firmware/defines.h").read_text()


@pytest.mark.parametrize("network", [_convolutions, _merges, _signal], ids=["convolutions", "merges", "signal"])
def test_operators_are_exact(network: Callable[[], QuantGraph], tools: None, tmp_path: Path) -> None:
    for name, values in _equals_reference(_build(network(), tmp_path / "built")).items():
        assert values.std() > 0.01, f"{name} is constant: nothing was compared"


def test_every_rounding_is_half_to_even_and_saturates(tools: None, tmp_path: Path) -> None:
    outputs = _equals_reference(_build(_ties(), tmp_path / "built"), samples=60)
    assert {-128, 127} <= set(np.unique(outputs["o0"]))


def test_io_stream_is_exact(tools: None, tmp_path: Path) -> None:
    assert _equals_reference(_build(_streamed(), tmp_path / "built", io_type="io_stream", strategy="latency"))["logits"].std() > 4


# ---- the session
def test_two_simulations_live_in_one_process(classifier: Built, tools: None, tmp_path: Path) -> None:
    weight, _ = _random(9)
    writer = FormWriter(recipe=Recipe())
    y = writer.gemm(writer.input("x", (1, 4), scale=2**-3), weight(3, 4), 2**-7, scale=2**-1)
    writer.output(y, "y")
    other = _build(writer.graph(), tmp_path / "other")
    x = np.arange(4, dtype=np.int8).reshape(1, 4) * 40
    image = np.arange(36, dtype=np.int8).reshape(1, 1, 6, 6)
    with _open(classifier) as first, _open(other) as second:
        for _ in range(2):
            np.testing.assert_array_equal(second.run_quantised({"x": x})["y"], reference.run(other[0], {"x": x})["y"])
            np.testing.assert_array_equal(first.run_quantised({"image": image})["logits"], reference.run(classifier[0], {"image": image})["logits"])
    with pytest.raises(IsthmusError, match="the session is closed"):
        second.run_raw({"x": x})


def test_a_closed_session_unloads_its_library(classifier: Built) -> None:
    """Otherwise a library built anew at the same path would never be the one that runs."""
    maps = Path("/proc/self/maps")
    with _open(classifier) as session:
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
def test_a_broken_folder_is_one_sentence(spoil: Callable[[Path], Any], message: str, classifier: Built, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(classifier[2], copy)
    spoil(copy)
    with pytest.raises(IsthmusError, match=message):
        _open((classifier[0], classifier[1], copy))


def test_a_library_of_another_maker_is_refused(classifier: Built, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(classifier[2], copy)
    (copy / "empty.cpp").write_text("int other() { return 1; }\n")
    subprocess.run(["g++", "-shared", "-fPIC", "-o", str(copy / "csim/libmodel.so"), str(copy / "empty.cpp")], check=True, timeout=60)
    with pytest.raises(IsthmusError, match="has no function model_float"):
        _open((classifier[0], classifier[1], copy))


def test_another_border_than_int8_is_refused(classifier: Built) -> None:
    graph, plan, folder = classifier
    with pytest.raises(IsthmusError, match="takes int8 with zero point 0 and a power-of-two scale"):
        _open((graph, replace(plan, inputs=(replace(plan.inputs[0], scale=0.1),)), folder))
    with pytest.raises(IsthmusError, match=r"host_tail\.json is missing: it says how the host computes 'logits'"):
        _open((graph, replace(plan, outputs=(replace(plan.outputs[0], dtype="float32", scale=None, zero_point=None),)), folder))


# ---- the steps
def test_a_type_that_was_not_planned_ends_the_conversion(tools: None, tmp_path: Path) -> None:
    plan = _plan(_classifier())
    config = json.loads(plan.files[simulation.CONFIG_FILE])
    name = next(name for name in config["layers"] if name.endswith("_conv"))
    del config["layers"][name]["Precision"]["accum"]
    spoilt = replace(plan, files={**plan.files, simulation.CONFIG_FILE: json.dumps(config).encode()})
    with pytest.raises(IsthmusError, match=rf"{name} \(Conv2D\): accum fell back to a default type"):
        execute(spoilt, tmp_path)


def test_a_failing_compiler_shows_its_last_lines(tools: None, tmp_path: Path) -> None:
    plan = _plan(_classifier())
    broken = replace(plan, files={simulation.SOURCE_FILE: b"int main( { return 0; }\n"}, steps=plan.steps[1:2])
    with pytest.raises(IsthmusError, match=r"step csim \(g\+\+\) ended with code 1:(.|\n)*library\.cpp:1:.*error"):
        execute(broken, tmp_path)


def test_a_missing_compiler_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan = _plan(_classifier())
    monkeypatch.setenv("PATH", str(tmp_path))
    find_tool.cache_clear()
    try:
        with pytest.raises(IsthmusError, match=r"step csim needs g\+\+, which is not here: apt install g\+\+"):
            execute(replace(plan, steps=plan.steps[1:2]), tmp_path)
    finally:
        find_tool.cache_clear()


# ---- the plan
def test_the_plan_names_every_type_and_starts_no_tool() -> None:
    graph = _classifier()
    plan = _plan(graph)
    assert plan.digest() == _plan(_classifier()).digest()
    assert [(step.name, step.tool, step.where) for step in plan.steps] == [
        ("convert", "hls4ml", "host"),
        ("csim", "g++", "host"),
        ("synthesis", "vitis_hls", "toolhost"),
    ]
    assert (plan.engine, plan.artifact, plan.max_lsb) == ("csim", "csim/libmodel.so", 0)
    assert [(spec.name, spec.shape, spec.layout, spec.dtype) for spec in (*plan.inputs, *plan.outputs)] == [
        ("image", (1, 6, 6, 1), "NHWC", "int8"),
        ("logits", (1, 10), "NC", "int8"),
    ]
    config = json.loads(plan.files[simulation.CONFIG_FILE])
    assert (config["part"], config["clock_ns"], config["io_type"]) == ("xc7z020clg400-1", 10.0, "io_parallel")
    precisions = [value for layer in config["layers"].values() for value in layer["Precision"].values()]
    assert all(re.fullmatch(r"ap_fixed<\d+,-?\d+(,AP_RND_CONV,AP_SAT)?>|auto", value) for value in precisions)
    assert any("planned, not synthesised" in note for note in plan.notes)


def test_accumulators_hold_the_worst_sums_and_no_more() -> None:
    graph = _classifier()
    for node in graph.nodes:
        if node.weight is None:
            continue
        found = exact_weights(node, graph.tensors[node.inputs[0]].scale or 0)
        rows = found.values.reshape(len(found.values), -1)
        highest = int((np.where(rows > 0, rows * 127, rows * -128).sum(axis=1) + np.maximum(found.bias, 0)).max())
        assert 2 ** (found.accumulator.bits - 2) <= max(highest, 2) * 2
        assert highest < 2 ** (found.accumulator.bits - 1)


@given(st.integers(1, 130), st.integers(-6, 6), st.data())
def test_an_average_is_rounded_once(cells: int, shift: int, data: st.DataObject) -> None:
    """What the HLS code does (cut towards zero, then half to even) against exact fractions."""
    total = data.draw(st.integers(-128 * cells, 127 * cells))
    of = average_type(cells, 2.0**-3, 2.0 ** (-3 + shift))
    source, target = 3, 3 - shift
    scaled = total * 2 ** (of.fraction - source)
    assert of.fraction >= source and -(2 ** (of.bits - 1)) <= scaled < 2 ** (of.bits - 1)
    cut = abs(scaled) // cells * (1 if scaled >= 0 else -1)
    assert round(Fraction(cut) / Fraction(2) ** (of.fraction - target)) == round(Fraction(total, cells) / Fraction(2) ** (source - target))
    assert of.fraction - target < of.bits


def test_widths() -> None:
    assert str(holding(-128, 127, 4)) == "ap_fixed<8,4>"
    assert str(holding(-129, 0, 0)) == "ap_fixed<9,9>"
    assert str(activation_type(2.0**3)) == "ap_fixed<8,11,AP_RND_CONV,AP_SAT>"
    assert widened(Fixed(8, 3), activation_type(2.0**6)) == Fixed(10, 3)


def test_the_multipliers_fit_the_board() -> None:
    products = lower(_classifier()).products
    folding = fold(products, "auto", 0, 60)
    assert folding.multipliers <= 60 < sum(product.products for product in products)
    assert {layer["Strategy"] for layer in folding.layers.values()} == {"resource"}
    for product in products:
        # hls4ml 1.3.0 computes wrong sums, in io_parallel, where the reuse factor is a multiple of the terms
        assert product.terms % folding.layers[product.layer]["ReuseFactor"] == 0
    assert {layer["Strategy"] for layer in fold(products, "auto", 0, 10**6).layers.values()} == {"latency"}
    assert fold([Product("n", "n", 9, 4, 1, depthwise=True)], "resource", 5, 1).layers == {"n": {"Strategy": "latency", "ReuseFactor": 1}}
    with pytest.raises(ProblemsError, match=r"5000 multiplications at once.*\[unroll-limit\]; use --set strategy=resource"):
        fold([Product("n", "wide", 50, 100, 1)], "latency", 1, 220)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"io_type": "io_serial"}, "io_type of target hls4ml: 'io_serial' is not one of auto, io_parallel, io_stream"),
        ({"strategy": "fast"}, "strategy of target hls4ml: 'fast' is not one of"),
        ({"reuse_factor": -1}, "reuse_factor of target hls4ml: -1 is below 0"),
        ({"clock_ns": 0.0}, "clock_ns of target hls4ml: 0.0 is not above 0"),
        ({"clock": 5}, "has no option 'clock'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(IsthmusError, match=message):
        TARGET.plan(_classifier(), PROFILE, options)


def test_a_profile_without_a_part_is_refused() -> None:
    with pytest.raises(IsthmusError, match=r"needs toolchain\.part"):
        TARGET.plan(_classifier(), replace(PROFILE, toolchain={}), {})


# ---- what is refused
def _one(make: Callable[[FormWriter, str], str], shape: tuple[int, ...] = (1, 2, 6, 6), **recipe: Any) -> QuantGraph:
    writer = FormWriter(recipe=Recipe(**recipe))
    writer.output(make(writer, writer.input("x", shape, scale=2**-4)), "y")
    return writer.graph()


def _bias_too_fine() -> QuantGraph:
    weight, _ = _random(0)
    return _one(lambda w, x: w.gemm(x, weight(1, 4), 2**-7, np.array([2**24 + 1], np.int32), scale=2**-3), (1, 4))


def _same_output_twice() -> QuantGraph:
    writer = FormWriter(recipe=Recipe())
    x = writer.input("x", (1, 4), scale=2**-4)
    writer.output(writer.relu(x), "y")
    writer.output(x, "z")
    return writer.graph()


def _same_output_reshaped() -> QuantGraph:
    writer = FormWriter(recipe=Recipe())
    y = writer.global_average_pool(writer.input("x", (1, 4, 2, 2), scale=2**-4), scale=2**-4)
    writer.output(y, "pooled")
    writer.output(writer.flatten(y), "flat")
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


REFUSED: dict[str, tuple[Callable[[], QuantGraph], str]] = {
    "scheme": (lambda: _one(lambda w, x: w.relu(x), scheme="symmetric"), "scheme"),
    "operator": (_sigmoid_tail, "operator"),
    "float-tail": (_softmax_inside, "float-tail"),
    "output": (_same_output_twice, "output"),
    "output-reshaped": (_same_output_reshaped, "output"),
    "bias": (_bias_too_fine, "bias-precision"),
    "rank": (lambda: _one(lambda w, x: w.relu(x), (1, 2, 3, 4, 5)), "rank"),
    "batch": (_two_batches, "batch"),
    "matmul-rank": (lambda: _one(lambda w, x: w.matmul(x, np.ones((4, 2), np.int8), 2**-7, scale=2**-4), (1, 3, 4)), "matmul-rank"),
    "broadcast": (lambda: _one(lambda w, x: w.add(x, w.max_pool(x, kernel=(1, 6), strides=(1, 1)), scale=2**-3)), "broadcast"),
    "broadcast-both": (
        lambda: _one(lambda w, x: w.add(w.max_pool(x, kernel=(6, 1), strides=(1, 1)), w.max_pool(x, kernel=(1, 6), strides=(1, 1)), scale=2**-3)),
        "broadcast",
    ),
    "ceil-mode": (
        lambda: _one(lambda w, x: w.average_pool(x, kernel=(3, 3), strides=(2, 2), pads=(1, 1, 1, 1), ceil_mode=1, count_include_pad=1, scale=2**-4)),
        "ceil-mode",
    ),
    "pool-dilation": (lambda: _one(lambda w, x: w.max_pool(x, kernel=(2, 2), strides=(1, 1), dilations=(2, 2))), "pool-dilation"),
    "too-large": (
        # too large for io_parallel, and a pool that io_stream has not
        lambda: _one(lambda w, x: w.max_pool(x, kernel=(3, 3), strides=(1, 1)), (1, 2, 60, 60)),
        "unroll-limit",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str) -> None:
    make, rule = REFUSED[case]
    problems = TARGET.check(make(), PROFILE)
    assert rule in {problem.rule for problem in problems}, problems
    assert all(problem.node and problem.found and problem.fix for problem in problems)


STREAM_REFUSED: dict[str, tuple[Callable[[], QuantGraph], str]] = {
    "fan-out": (lambda: _one(lambda w, x: w.add(x, w.relu(x), scale=2**-3)), "stream-fan-out"),
    "pool": (lambda: _one(lambda w, x: w.max_pool(x, kernel=(2, 2), strides=(1, 1))), "stream-pool"),
    "pool-pads": (lambda: _one(lambda w, x: w.max_pool(x, kernel=(2, 2), strides=(2, 2), pads=(1, 1, 1, 1))), "stream-pool"),
    "broadcast": (lambda: _one(lambda w, x: w.add(x, w.global_average_pool(x, scale=2**-4), scale=2**-3)), "stream-broadcast"),
    "concat": (lambda: _one(lambda w, x: w.concat([x, x], axis=2)), "stream-concat"),
    "reshape": (lambda: _one(lambda w, x: w.flatten(x)), "stream-reshape"),
}


@pytest.mark.parametrize("case", STREAM_REFUSED)
def test_io_stream_refuses_what_it_would_compute_wrongly(case: str) -> None:
    make, rule = STREAM_REFUSED[case]
    graph = make()
    assert TARGET.check(graph, PROFILE) == []  # io_parallel takes it
    with pytest.raises(ProblemsError, match=rf"\[{rule}\]; use --set io_type=io_parallel"):
        TARGET.plan(graph, PROFILE, {"io_type": "io_stream"})


def test_a_large_input_goes_to_io_stream_by_itself() -> None:
    graph = _one(lambda w, x: w.max_pool(x, kernel=(2, 2), strides=(2, 2)), (1, 2, 60, 60))
    assert UNROLL_LIMIT < 2 * 60 * 60
    assert json.loads(_plan(graph).files[simulation.CONFIG_FILE])["io_type"] == "io_stream"
    with pytest.raises(ProblemsError, match=r"\[unroll-limit\]; use --set io_type=io_stream"):
        TARGET.plan(graph, PROFILE, {"io_type": "io_parallel"})
