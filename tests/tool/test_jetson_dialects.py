# SPDX-License-Identifier: Apache-2.0
"""Four generations of TensorRT's parser, one file each: the same numbers, in what each parser reads. And every Jetson that has a profile."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus import reference
from isthmus.errors import IsthmusError
from isthmus.form_writer import FormWriter
from isthmus.graph import QuantGraph
from isthmus.plan import BuildPlan, execute
from isthmus.profile import Profile, load_profile, profile_names
from isthmus.recipe import Recipe
from isthmus.targets.jetson import TARGET
from isthmus.targets.jetson.check_with_rtx import compiled
from isthmus.targets.jetson.dialects import DIALECTS, Dialect, dialect_of
from isthmus.targets.jetson.float_graph import beyond_fp16, float_onnx_from_graph
from isthmus.targets.jetson.lower import onnx_from_graph

MODELS = Path(__file__).parents[1] / "models"
BOARDS = [name for name in profile_names() if name.startswith("jetson-")]
FORMS = sorted(MODELS.glob("*.onnx"))
TWO = [DIALECTS[0], DIALECTS[1]]  # those whose graphs differ from what tests/tool/test_jetson.py runs
Require = Callable[[str], str]


def name_of(dialect: Dialect) -> str:
    return dialect.name


def run(model: bytes, graph: QuantGraph, fed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """In ONNX Runtime, optimisations off: int8 in, float out."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    values = session.run([spec.name for spec in graph.outputs], {spec.name: spec.dequantise(fed[spec.name]) for spec in graph.inputs})
    return dict(zip((spec.name for spec in graph.outputs), values, strict=True))


def noise(graph: QuantGraph, limit: int = 128) -> dict[str, np.ndarray]:
    return {spec.name: np.random.randint(-limit, limit, spec.shape).astype(np.int8) for spec in graph.inputs}


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_every_dialect_keeps_every_number(path: Path) -> None:
    graph = QuantGraph.load(path)
    fed = noise(graph)
    expected = reference.run(graph, fed)
    for dialect in TWO:
        if graph.recipe.scheme != "asymmetric" and not any(node.op in dialect.missing for node in graph.nodes):  # `check` refuses those, below
            assert_equal(graph, expected, run(onnx_from_graph(graph, dialect), graph, fed))


def assert_equal(graph: QuantGraph, expected: Mapping[str, np.ndarray], actual: Mapping[str, np.ndarray]) -> None:
    for spec in graph.outputs:
        if spec.is_quantised:
            assert np.abs(spec.quantise(actual[spec.name]).astype(int) - expected[spec.name]).max() <= (graph.recipe.scheme != "power_of_two")
        else:
            np.testing.assert_allclose(actual[spec.name], expected[spec.name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dialect", DIALECTS, ids=name_of)
def test_the_file_says_what_its_parser_reads(dialect: Dialect) -> None:
    for path in (MODELS / "network.onnx", MODELS / "gelu.onnx", MODELS / "add_constant.onnx", MODELS / "layer_norm_island.onnx"):
        model = onnx.load_from_string(onnx_from_graph(QuantGraph.load(path), dialect))
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", dialect.opset)]
        assert model.ir_version == dialect.ir_version
        assert not {node.op_type for node in model.graph.node} & (dialect.spelled_out | dialect.missing)
        for node in model.graph.node:
            assert node.op_type != "Conv" or "kernel_shape" in {attribute.name for attribute in node.attribute}
        zeros = {node.input[2] for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")}
        int8 = {tensor.name for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.INT8} - zeros
        assert dialect.int8_constants == bool(int8) or path.stem in ("gelu", "layer_norm_island")


@pytest.mark.parametrize(
    ("version", "name"), [("8.2", "TensorRT 8.2"), ("8.4.1", "TensorRT 8.2"), ("8.6", "TensorRT 8.5"), ("10.13", "TensorRT 10.3"), ("11.4", "TensorRT 11")]
)
def test_the_version_decides_the_dialect(version: str, name: str) -> None:
    assert dialect_of(version).name == name


@pytest.mark.parametrize(("version", "message"), [("7.1", "TensorRT 7.1 is older than TensorRT 8.2"), ("new", "version 'new': expected numbers")])
def test_other_versions_are_refused(version: str, message: str) -> None:
    with pytest.raises(IsthmusError, match=message):
        dialect_of(version)


@given(st.text(max_size=12) | st.from_regex(r"[0-9]{1,3}(\.[0-9]{1,3}){0,3}", fullmatch=True))
def test_any_version_has_a_dialect_or_a_reason(version: str) -> None:
    try:
        assert dialect_of(version) in DIALECTS
    except IsthmusError as error:
        assert "TensorRT" in str(error)


def test_what_a_parser_has_not_is_named() -> None:
    graph = QuantGraph.load(MODELS / "grid_sample_island.onnx")
    (problem,) = TARGET.check(graph, load_profile("jetson-nano"))
    assert (problem.rule, problem.node) == ("dialect", "island") and "TensorRT 8.2 (JetPack 4.6)" in problem.found
    assert TARGET.check(graph, load_profile("jetson-xavier-nx")) == []


# ---- boards
def planned(board: str | Profile, name: str = "network", **options: object) -> BuildPlan:
    return TARGET.plan(QuantGraph.load(MODELS / f"{name}.onnx"), load_profile(board) if isinstance(board, str) else board, options)


@pytest.mark.parametrize("board", BOARDS)
def test_every_board_has_its_figures_and_a_plan(board: str) -> None:
    profile = load_profile(board)
    facts, tools = profile.facts, profile.toolchain
    assert set(facts) >= {"gpu", "cuda_cores", "tensor_cores", "fp16_dense_flops_per_s", "memory_bytes", "memory_bandwidth_bytes_per_s", "dla_count"}
    assert (
        set(facts) >= {"power_modes_w", "precisions"} and set(facts) == set(profile.sources) and set(tools) == {"jetpack", "tensorrt", "cuda", "sm", "check_sm"}
    )
    assert ("int8" in facts["precisions"]) == (facts.get("int8_dense_ops_per_s", 1) > 0)
    plan = planned(board)
    engines = json.loads(plan.files["engines.json"])
    assert engines["dialect"] == dialect_of(str(tools["tensorrt"])).name
    assert [engine["name"] for engine in engines["engines"]] == (["int8", "fp16"] if "int8" in facts["precisions"] else ["fp16"])
    assert all(engine["model"] in plan.files for engine in engines["engines"])


@pytest.mark.parametrize("board", ["jetson-nano", "jetson-tx2"])
def test_a_board_without_int8_gets_a_float_graph_and_is_told(board: str) -> None:
    plan = planned(board)
    assert {node.op_type for node in onnx.load_from_string(plan.files["model.onnx"]).graph.node}.isdisjoint({"QuantizeLinear", "DequantizeLinear"})
    assert any(f"{load_profile(board).board} has no int8" in note for note in plan.notes) and "rounds nothing to int8" in plan.why_lsb
    assert [step.argv for step in plan.steps[1:]] == [("python3", "build_engine.py", "--engine", "fp16")]


@pytest.mark.parametrize("name", ["network_asymmetric", "add_constant_asymmetric", "conv_transpose_asymmetric"])
def test_a_float_graph_comes_from_any_scheme(name: str) -> None:
    graph, nano = QuantGraph.load(MODELS / f"{name}.onnx"), load_profile("jetson-nano")
    assert TARGET.check(graph, nano) == []
    assert_near(graph, planned(nano, name).files["model.onnx"])


def assert_near(graph: QuantGraph, model: bytes, rtol: float = 0.02) -> None:
    """The float graph is the form without rounding: within 2 % of the output's range where nothing saturates."""
    fed = noise(graph, limit=24)
    expected, actual = reference.run(graph, fed), run(model, graph, fed)
    for spec in graph.outputs:
        real = spec.dequantise(expected[spec.name])
        inside = np.abs(expected[spec.name].astype(int)) < 120
        assert inside.any()
        assert np.abs(actual[spec.name] - real)[inside].max() <= rtol * 255 * float(spec.scale or 0)


@pytest.mark.parametrize("dialect", [DIALECTS[0], DIALECTS[2]], ids=name_of)
@pytest.mark.parametrize("name", ["network", "residual", "mish", "concat", "split", "resize_linear", "add_constant"])
def test_the_float_graph_is_the_form_dequantised(name: str, dialect: Dialect) -> None:
    graph = QuantGraph.load(MODELS / f"{name}.onnx")
    model = float_onnx_from_graph(graph, dialect)
    assert_near(graph, model)
    constants = [tensor for tensor in onnx.load_from_string(model).graph.initializer if not tensor.name.endswith("_scales")]  # of Resize: float32 in ONNX
    assert {tensor.data_type for tensor in constants} - {onnx.TensorProto.INT64} <= {
        onnx.TensorProto.FLOAT16 if dialect.strongly_typed else onnx.TensorProto.FLOAT
    }


def test_no_fp16_engine_where_half_precision_cannot_hold_a_tensor() -> None:
    w = FormWriter(Recipe())
    w.output(w.relu(w.input("x", (1, 2, 4, 4), scale=1024.0)), "y")
    graph = w.graph()
    assert beyond_fp16(graph) == ["x_quantised", "relu_q"]
    plan = TARGET.plan(graph, load_profile("jetson-orin-nano"), {})
    assert "model_float.onnx" not in plan.files and "no FP16 engine is planned: half precision cannot hold x_quantised, relu_q" in plan.notes
    assert "model_float.onnx" in TARGET.plan(graph, load_profile("jetson-xavier-nx"), {}).files  # float32 there, and TensorRT chooses


@pytest.mark.parametrize("board", ["jetson-nano", "jetson-xavier-nx", "jetson-thor"])
def test_tensorrt_rtx_compiles_each_dialect(board: str, tmp_path: Path, require: Require) -> None:
    require("tensorrt_rtx")
    assert execute(planned(board, check_nearest=True), tmp_path)[0].detail.startswith("parses and compiles with TensorRT-RTX")


# ---- half precision where the form is float
@pytest.mark.parametrize("name", ["softmax_island", "layer_norm_island", "argmax_tail", "softmax_tail", "grid_sample_island"])
def test_islands_in_half_precision_leave_every_other_type_alone(name: str, require: Require) -> None:
    require("tensorrt_rtx")
    graph, dialect = QuantGraph.load(MODELS / f"{name}.onnx"), DIALECTS[2]
    half = onnx_from_graph(graph, dialect, half_islands=True)
    model = onnx.shape_inference.infer_shapes(onnx.load_from_string(half), strict_mode=True)
    types = {value.name: value.type.tensor_type.elem_type for value in (*model.graph.value_info, *model.graph.output)}
    islands = {island.name for island in graph.nodes if island.kind == "float"}
    for node in model.graph.node:
        if node.name in islands:
            assert types[node.output[0]] in (onnx.TensorProto.FLOAT16, onnx.TensorProto.INT64)
        elif node.op_type not in ("Cast", "QuantizeLinear"):
            assert types[node.output[0]] == onnx.TensorProto.FLOAT
    fed = noise(graph)
    expected, actual = reference.run(graph, fed), run(half, graph, fed)
    for spec in graph.outputs:
        if spec.is_quantised:  # half precision has 11 bits: a step of an int8 tensor is in reach
            assert np.abs(spec.quantise(actual[spec.name]).astype(int) - expected[spec.name]).max() <= 1
        else:
            np.testing.assert_allclose(actual[spec.name], expected[spec.name], rtol=2e-3, atol=2e-3)
    assert compiled(half, 86).kernels


def test_without_islands_the_option_changes_nothing() -> None:
    graph = QuantGraph.load(MODELS / "network.onnx")
    assert onnx_from_graph(graph, DIALECTS[2], half_islands=True) == onnx_from_graph(graph, DIALECTS[2])
    engine = json.loads(planned("jetson-xavier-nx", half_islands=True).files["engines.json"])["engines"][0]
    assert engine["half"] and not json.loads(planned("jetson-xavier-nx").files["engines.json"])["engines"][0]["half"]


# ---- DLA
def test_the_dla_gets_an_engine_of_its_own() -> None:
    plan = planned("jetson-agx-orin-64gb", dla=True)
    engine = json.loads(plan.files["engines.json"])["engines"][-1]
    assert (engine["name"], engine["dla"], engine["ranges"]) == ("dla", True, "model_dla.ranges.json")
    model = onnx.load_from_string(plan.files["model_dla.onnx"])
    ranges = json.loads(plan.files["model_dla.ranges.json"])
    named = {name for node in model.graph.node for name in node.output} | {value.name for value in model.graph.input}
    assert set(ranges) <= named and all(value > 0 for value in ranges.values())
    assert {tensor.data_type for tensor in model.graph.initializer} <= {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64}
    assert plan.notes[-1].startswith("option dla: the DLA's limits take 4 of 6 layers; on the GPU: globalaveragepool (GlobalAveragePool: "), plan.notes[-1]
    assert plan.notes[-1].endswith(", flatten (Flatten: the DLA has no such layer)")
    assert planned("jetson-orin-nano", dla=True).notes[-1].endswith("has no DLA, every layer runs on the GPU")
