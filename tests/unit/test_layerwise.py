# SPDX-License-Identifier: Apache-2.0
"""A fault in an artifact is found at its layer: real artifacts with one weight changed, opened by the engines that run them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from typer.testing import CliRunner

from isthmus import layerwise, pipeline
from isthmus.bundle import Bundle
from isthmus.cli import app
from isthmus.errors import IsthmusError
from isthmus.exposure import Shown, expose_onnx
from isthmus.form_writer import FormWriter
from isthmus.graph import QuantGraph
from isthmus.layerwise import LayerReport, first_difference, layer_table, verify_layers
from isthmus.recipe import Recipe
from isthmus.spec import TensorSpec
from isthmus.targets.tflite.expose import expose
from isthmus.targets.tflite.flatbuffer import IDENTIFIER, aligning_builder, schema

MODELS = Path(__file__).parents[1] / "models"
TOOLS = {"cpu": "onnxruntime", "rpi5": "litert"}
WRONG = "conv_2"


def compiled(graph: QuantGraph | Path, profile: str, folder: Path, **options: Any) -> Bundle:
    return pipeline.compile(graph, targets=[profile], tune=False, output=folder / "bundle", options=options)


def file_of(bundle: Bundle, profile: str) -> Path:
    return bundle.folder(profile) / bundle.artifact(profile)["artifact"]


def change_onnx(file: Path, weight: np.ndarray) -> None:
    """One element of the stored weight, found by its shape, is another."""
    model = onnx.load(file)
    tensor = next(t for t in model.graph.initializer if tuple(t.dims) == weight.shape)
    values = numpy_helper.to_array(tensor).copy()
    values.reshape(-1)[3] ^= 16
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    file.write_bytes(model.SerializeToString())


def change_tflite(file: Path, weight: np.ndarray) -> None:
    model = schema().ModelT.InitFromPackedBuf(bytearray(file.read_bytes()), 0)
    shape = (weight.shape[0], *weight.shape[2:], weight.shape[1])
    tensor = next(t for t in model.subgraphs[0].tensors if tuple(t.shape) == shape and model.buffers[t.buffer].data is not None)
    data = np.array(model.buffers[tensor.buffer].data)
    data[3] ^= 16
    model.buffers[tensor.buffer].data = data
    builder = aligning_builder()
    builder.Finish(model.Pack(builder), IDENTIFIER)
    file.write_bytes(builder.Output())


CHANGE = {"cpu": change_onnx, "rpi5": change_tflite}


@pytest.mark.parametrize("profile", TOOLS)
def test_one_weight_changed_is_found_at_its_layer(profile: str, tmp_path: Path, require: Callable[[str], str]) -> None:
    require(TOOLS[profile])
    bundle = compiled(MODELS / "network.onnx", profile, tmp_path)
    graph = QuantGraph.load(bundle.model)
    weight = next(node.weight for node in graph.nodes if node.name == WRONG)
    assert weight is not None
    CHANGE[profile](file_of(bundle, profile), weight)

    assert not all(comparison.passed for comparison in pipeline.verify(bundle)[profile])
    report = verify_layers(bundle, profile)
    assert report.first is not None and report.first.layer == WRONG and not report.passed
    by_layer = {layer.layer: layer for layer in report.layers}
    # Only that layer is wrong on its own inputs; what follows carries the difference along.
    assert [name for name, layer in by_layer.items() if layer.own.mismatched] == [WRONG]
    assert by_layer[WRONG].own.max_lsb > 0 and 0 < by_layer[WRONG].own.exact_share < 1
    assert by_layer["gemm"].whole.mismatched > 0 == by_layer["conv"].whole.mismatched
    assert "the first difference is in conv_2 (Conv)" in first_difference(report) and "is at fault" in first_difference(report)
    marked = [line for line in layer_table(report).splitlines() if "<- first difference" in line]
    assert len(marked) == 1 and marked[0].startswith(WRONG)


@pytest.mark.parametrize(
    ("profile", "name"),
    [
        *itertools.product(TOOLS, ["network", "network_asymmetric", "residual", "flatten_gemm", "conv_1d", "concat", "softmax_tail"]),
        ("cpu", "layer_norm_island"),
    ],
)
def test_a_right_artifact_differs_nowhere(profile: str, name: str, tmp_path: Path, require: Callable[[str], str]) -> None:
    """Flattened images, lines of pixels and uint8 are brought back to the form: else a layer that only moves values would differ."""
    require(TOOLS[profile])
    bundle = compiled(MODELS / f"{name}.onnx", profile, tmp_path)
    report = verify_layers(bundle, profile)
    assert report.first is None and report.passed and report.method == "inside"
    graph = QuantGraph.load(bundle.model)
    expected = [node.name for node in graph.nodes if node.kind == "int8" and node.inputs]
    assert [layer.layer for layer in report.layers if layer.own.kind == "int8" and layer.layer in expected] == expected
    assert report.unseen == () and all(layer.own.compared for layer in report.layers)
    assert "no layer differs" in layer_table(report)


def native_add() -> QuantGraph:
    """An Add of two scales that TFLite's own kernel rounds unlike the form, between layers that are exact."""
    w = FormWriter(recipe=Recipe())
    rng = np.random.default_rng(3)
    x = w.input("x", (1, 4, 6, 6), scale=2.0**-4)
    y = w.conv(x, rng.integers(-60, 60, (4, 4, 1, 1)), 2.0**-7, scale=2.0**-5, name="before")
    y = w.add(x, y, scale=2.0**-3, name="sum")
    w.output(w.conv(y, rng.integers(-60, 60, (4, 4, 1, 1)), 2.0**-7, scale=2.0**-3, name="behind"), "y")
    return w.graph()


def test_a_kernel_that_rounds_otherwise_is_named_with_the_targets_reason(tmp_path: Path, require: Callable[[str], str]) -> None:
    require("litert")
    report = verify_layers(compiled(native_add(), "rpi5", tmp_path, rounding="native"), "rpi5")
    assert report.first is not None and (report.first.layer, report.first.op, report.first.own.max_lsb) == ("sum", "Add", 1)
    assert [layer.layer for layer in report.layers if layer.own.mismatched] == ["sum"]
    assert report.passed and report.why and report.why in first_difference(report)


# ---- an artifact that cannot show its inside
@pytest.mark.parametrize("profile", TOOLS)
def test_layers_built_apart(profile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, require: Callable[[str], str]) -> None:
    require(TOOLS[profile])
    monkeypatch.setattr(layerwise, "_exposed", lambda *arguments: None)
    report = verify_layers(compiled(MODELS / "residual.onnx", profile, tmp_path), profile)
    assert (report.method, [layer.layer for layer in report.layers]) == ("parts", ["conv", "conv_2", "add"])
    assert report.passed and report.first is None and "does not show" in report.how


def test_layers_built_apart_find_the_kernel_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, require: Callable[[str], str]) -> None:
    require("litert")
    monkeypatch.setattr(layerwise, "_exposed", lambda *arguments: None)
    report = verify_layers(compiled(native_add(), "rpi5", tmp_path, rounding="native"), "rpi5")
    assert [(layer.layer, layer.own.max_lsb) for layer in report.layers if layer.own.mismatched] == [("sum", 1)]


@pytest.mark.slow
def test_simulation_layer_by_layer(tmp_path: Path, require: Callable[[str], str]) -> None:
    for tool in ("hls4ml", "g++"):
        require(tool)
    w = FormWriter(recipe=Recipe())
    x = w.input("x", (1, 6), scale=2.0**-4)
    x = w.gemm(x, np.arange(-12, 12).reshape(4, 6).astype(np.int8), 2.0**-6, scale=2.0**-4, activation="Relu", name="first")
    w.output(w.gemm(x, np.arange(-6, 6).reshape(3, 4).astype(np.int8), 2.0**-5, scale=2.0**-4, name="second"), "y")
    report = verify_layers(compiled(w.graph(), "pynq-z2", tmp_path), "pynq-z2")
    assert (report.method, report.passed, report.first) == ("parts", True, None)
    assert [layer.layer for layer in report.layers] == ["first", "second"]


# ---- a graph for an engine that is elsewhere
def test_the_graph_for_tensorrt_is_right_as_onnx(tmp_path: Path, require: Callable[[str], str]) -> None:
    require("onnxruntime")
    bundle = compiled(MODELS / "network.onnx", "jetson-orin-nano", tmp_path)
    report = verify_layers(bundle, "jetson-orin-nano")
    assert report.first is None and report.passed and "nothing of the engine that the board builds" in report.how
    weight = next(node.weight for node in QuantGraph.load(bundle.model).nodes if node.name == WRONG)
    assert weight is not None
    change_onnx(bundle.folder("jetson-orin-nano") / "model.onnx", weight)
    wrong = verify_layers(bundle, "jetson-orin-nano")
    assert wrong.first is not None and wrong.first.layer == WRONG and not wrong.passed


def test_what_computes_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IsthmusError, match="null: computes nothing"):
        verify_layers(compiled(MODELS / "network.onnx", "null", tmp_path), "null")


def test_nothing_compared_never_passes() -> None:
    assert not LayerReport("cpu", "inside", "", "", (), ("conv_q",)).passed


# ---- the copies
def test_the_onnx_copy_only_gains_outputs(tmp_path: Path, require: Callable[[str], str]) -> None:
    require("onnxruntime")
    bundle = compiled(MODELS / "network.onnx", "cpu", tmp_path)
    graph, before = QuantGraph.load(bundle.model), onnx.load(file_of(bundle, "cpu"))
    exposure = expose_onnx(file_of(bundle, "cpu").read_bytes(), graph)
    after = onnx.load_from_string(exposure.content)
    del after.graph.output[len(before.graph.output) :]
    assert after == before
    assert {shown.tensor for shown in exposure.shown} == {name for name, spec in graph.tensors.items() if spec.dtype == "int8"}


@pytest.mark.parametrize("read", [lambda graph: expose_onnx(b"\x08\x01garbage", graph), lambda graph: expose(b"\x10\0\0\0TFL3\xff\xff", graph, {})])
def test_broken_files_are_one_sentence(read: Callable[[QuantGraph], object], require: Callable[[str], str]) -> None:
    require("litert")
    with pytest.raises(IsthmusError, match=r"the artifact is no readable \.?\w+ file .*; compile the bundle again"):
        read(QuantGraph.load(MODELS / "network.onnx"))


def test_flattened_and_unsigned_values_come_back_to_the_form() -> None:
    form = np.arange(-48, 48, dtype=np.int8).reshape(2, 3, 4, 4)
    flat = np.moveaxis(form, 1, -1).reshape(2, 48)
    shown = Shown("t", TensorSpec("t", (1, 48), "int8"), (1, 3, 4, 4))
    np.testing.assert_array_equal(shown.in_form(flat, (1, 48)), form.reshape(2, 48))
    raw = (form.astype(np.int16) + 128).astype(np.uint8)
    np.testing.assert_array_equal(Shown("t", TensorSpec("t", (1, 3, 4, 4), "uint8")).in_form(raw, (1, 3, 4, 4)), form)


# ---- the command
def described(arguments: list[str]) -> tuple[int, Any]:
    result = CliRunner().invoke(app, ["verify", *arguments])
    return result.exit_code, json.loads(result.stdout) if "--json" in arguments else result.stdout


def test_the_command(tmp_path: Path, require: Callable[[str], str]) -> None:
    require("onnxruntime")
    bundle = pipeline.compile(MODELS / "network.onnx", targets=["cpu", "null"], tune=False, output=tmp_path / "bundle")
    code, text = described([str(bundle.root), "--layers"])
    assert code == 0 and "globalaveragepool" in text and "cpu: no layer differs" in text
    code, reports = described([str(bundle.root), "--layers", "--json"])
    assert code == 0 and [report["profile"] for report in reports] == ["cpu"]
    assert_sums(reports[0])


def assert_sums(report: Mapping[str, Any]) -> None:
    assert report["passed"] is True and report["first"] is None and report["unseen"] == []
    assert all(layer["own"]["compared"] == layer["whole"]["compared"] > 0 for layer in report["layers"])
