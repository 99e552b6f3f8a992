# SPDX-License-Identifier: Apache-2.0
"""Target `jetson`: the same numbers in TensorRT's dialect, NVIDIA's own compiler run ahead of time, and the script that builds on the board."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from isthmus import reference
from isthmus.errors import IsthmusError
from isthmus.form_writer import FormWriter
from isthmus.graph import QuantGraph
from isthmus.ops import OPS
from isthmus.plan import BuildPlan, execute
from isthmus.profile import load_profile
from isthmus.recipe import Recipe
from isthmus.targets.jetson import FLOAT_OPS, TARGET

PROFILE = load_profile("jetson-orin-nano")
MODELS = sorted((Path(__file__).parents[1] / "models").glob("*.onnx"))
BUILD_SCRIPT = Path(str(resources.files("isthmus.targets.jetson") / "build_engine.py"))
Require = Callable[[str], str]


def anything(*shape: int) -> np.ndarray:
    return np.random.randint(-128, 128, shape).astype(np.int8)


def one(shape: tuple[int, ...], body: Callable[[FormWriter, str], str], recipe: Recipe | None = None) -> QuantGraph:
    w = FormWriter(recipe)
    w.output(body(w, w.input("x", shape, scale=2.0**-4)), "y")
    return w.graph()


def planned(graph: QuantGraph) -> BuildPlan:
    return TARGET.plan(graph, PROFILE, {})


def lowered(graph: QuantGraph) -> onnx.ModelProto:
    return onnx.load_from_string(planned(graph).files["model.onnx"])


def images() -> QuantGraph:
    """Every kind of convolution and pool, additions and joins, logits and probabilities."""
    w = FormWriter()
    x = w.input("image", (1, 4, 12, 12), scale=2.0**-4)
    y = w.conv(x, anything(8, 2, 3, 3), 2.0**-8, np.arange(8, dtype=np.int32), scale=2.0**-1, group=2, pads=(1, 0, 1, 2), activation="Relu")
    d = w.conv(
        y, anything(8, 1, 3, 3), 2.0 ** -np.arange(4.0, 12.0), None, scale=2.0**-1, group=8, dilations=(2, 1), pads=(2, 1, 2, 1), activation=("Clip", 0.0, 6.0)
    )
    total = w.add(y, d, scale=2.0**0, activation="Relu")
    a = w.average_pool(total, (3, 3), (2, 2), (1, 1, 0, 0), ceil_mode=1, scale=2.0**-1)
    m = w.requantize(w.max_pool(total, (3, 3), (2, 2), (0, 0, 0, 0), ceil_mode=1), scale=2.0**-1)
    joined = w.clip(w.concat([a, m], 1), -1.0, 5.0)
    pooled = w.flatten(w.global_average_pool(joined, scale=2.0**-2))
    logits = w.gemm(pooled, anything(10, 16), 2.0**-7, np.arange(10, dtype=np.int32), scale=2.0**-1)
    w.output(logits, "logits")
    w.softmax_output(logits, "probabilities")
    return w.graph()


def sequences() -> QuantGraph:
    """One space axis: convolution, pools, a matrix product over three axes."""
    w = FormWriter()
    x = w.input("signal", (1, 4, 24), scale=2.0**-4)
    y = w.conv(x, anything(6, 2, 5), 2.0**-7, np.arange(6, dtype=np.int32), scale=2.0**-1, group=2, strides=(2,), pads=(1, 2), activation="Relu")
    y = w.average_pool(w.max_pool(y, (3,), (1,), (1, 1)), (2,), scale=2.0**-2)
    y = w.matmul(y, anything(6, 4), 2.0**-7, scale=2.0**-1, activation="Relu")
    w.output(w.reshape(w.relu(y), (1, 24)), "y")
    return w.graph()


def assert_same_numbers(graph: QuantGraph, max_lsb: int = 0) -> None:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(planned(graph).files["model.onnx"], options, providers=["CPUExecutionProvider"])
    for choice in (np.arange(-128, 128), np.array([-128, 127])):
        fed = {spec.name: np.random.choice(choice.astype(np.int8), spec.shape) for spec in graph.inputs}
        expected = reference.run(graph, fed)
        actual = session.run([spec.name for spec in graph.outputs], {spec.name: spec.dequantise(fed[spec.name]) for spec in graph.inputs})
        for spec, real in zip(graph.outputs, actual, strict=True):
            if spec.is_quantised:
                assert np.abs(spec.quantise(real).astype(int) - expected[spec.name]).max() <= max_lsb, spec.name
            else:
                np.testing.assert_allclose(real, expected[spec.name], rtol=1e-5, atol=1e-6)


# ---- the dialect
@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_lowering_keeps_every_number(path: Path) -> None:
    graph = QuantGraph.load(path)
    if graph.recipe.scheme == "asymmetric":
        assert "scheme" in {problem.rule for problem in TARGET.check(graph, PROFILE)}
        return
    assert TARGET.check(graph, PROFILE) == []
    assert_same_numbers(graph, max_lsb=0 if graph.recipe.scheme == "power_of_two" else 1)


@pytest.mark.parametrize("make", [images, sequences])
def test_networks_keep_every_number(make: Callable[[], QuantGraph]) -> None:
    assert_same_numbers(make())


def test_groups_of_a_transposed_convolution_share_their_scales() -> None:
    scales, bias = np.array([0.011, 0.007], np.float32), np.arange(-2, 2, dtype=np.int32) * 300
    symmetric = Recipe(name="symmetric", scheme="symmetric", per_channel=True)
    assert_same_numbers(
        one((1, 4, 5, 5), lambda w, x: w.conv_transpose(x, anything(4, 2, 3, 3), scales, bias, scale=0.9, group=2, strides=(2, 2)), symmetric), max_lsb=1
    )


@pytest.mark.parametrize("make", [images, sequences])
def test_the_dialect_is_what_the_parser_takes(make: Callable[[], QuantGraph]) -> None:
    model = lowered(make())
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 20)]
    assert all(value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT for value in (*model.graph.input, *model.graph.output))
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node in model.graph.node:
        attributes = {attribute.name for attribute in node.attribute}
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            scale, zero = constants[node.input[1]], constants[node.input[2]]
            assert zero.dtype == np.int8 and not zero.any() and zero.size == scale.size
            assert node.input[0] not in constants or constants[node.input[0]].dtype == np.int8  # never an int32 bias
        if node.op_type in ("Conv", "Gemm") and len(node.input) > 2:
            assert constants[node.input[2]].dtype == np.float32
        if node.op_type in ("Conv", "MaxPool", "AveragePool"):
            assert "kernel_shape" in attributes and "auto_pad" not in attributes
        assert "ceil_mode" not in attributes and ("dilations" not in attributes or node.op_type == "Conv")
    assert model.ir_version == 9
    assert len({node.name for node in model.graph.node}) == len(model.graph.node)


def test_duplicate_node_names_do_not_mix_up_constants() -> None:
    model = onnx.load_from_string(sequences().to_bytes())
    for node in model.graph.node:
        node.name = "same"
    assert_same_numbers(QuantGraph.from_model(model))


# ---- what it refuses
@pytest.mark.parametrize(
    ("body", "rule"),
    [
        (lambda w, x: w.max_pool(x, (3, 3), (1, 1), dilations=(2, 2), name="pool"), "pool-dilation"),
        (lambda w, x: w.average_pool(x, (3, 3), (2, 2), (1, 0, 1, 0), 1, 1, scale=2.0**-4, name="pool"), "pool-overhang"),
    ],
)
def test_pools_that_tensorrt_has_not_are_named(body: Callable[[FormWriter, str], str], rule: str) -> None:
    problems = TARGET.check(one((1, 2, 9, 10), body), PROFILE)
    assert [(problem.node, problem.rule) for problem in problems] == [("pool", rule)]


def test_every_problem_is_given_at_once() -> None:
    w = FormWriter(Recipe(name="a", scheme="asymmetric"))
    x = w.max_pool(w.input("x", (1, 2, 9, 9), scale=0.1, zero_point=3), (2, 2), dilations=(2, 2))
    w.float_node("Sin", [w.dequantise(x)], ["y"], "wave")
    w.float_output("y")
    assert [problem.rule for problem in TARGET.check(w.graph(), PROFILE)] == ["scheme", "operator", "pool-dilation"]


# ---- the plan
def test_the_plan_says_what_is_left_for_the_board() -> None:
    graph = images()
    plan = planned(graph)
    check, engine, half = plan.steps
    assert sorted(plan.files) == ["build_engine.py", "engines.json", "model.onnx", "model_float.onnx"]
    assert (plan.artifact, plan.engine, plan.runs_here) == ("model.onnx", "tensorrt", False)
    assert (check.name, check.tool, check.where, check.optional) == ("check", "tensorrt_rtx", "host", True)
    assert check.argv[-5:] == ("--sm", "86", "89", "--kernels", "kernels.json")
    assert TARGET.plan(graph, PROFILE, {"check_nearest": True}).steps[0].argv[-4:] == ("--sm", "86", "--kernels", "kernels.json")
    assert (engine.tool, engine.where, engine.outputs) == ("tensorrt", "board", ("model.engine",))
    assert engine.argv == ("python3", "build_engine.py", "--engine", "int8")
    assert (half.name, half.argv[-1], half.where, half.outputs) == ("engine-fp16", "fp16", "board", ("model_fp16.engine",))
    assert [(spec.name, spec.dtype, spec.scale) for spec in (*plan.inputs, *plan.outputs)] == [
        ("image", "float32", graph.inputs[0].scale),
        ("logits", "float32", graph.outputs[0].scale),
        ("probabilities", "float32", None),
    ]
    assert plan.max_lsb == 2 and "not measured yet" in plan.why_lsb
    assert not any("runs on" in note for note in plan.notes)
    assert "SM87" in plan.notes[1] and "JetPack 6.2 brings 10.3" in plan.notes[0]
    assert re.match(r"predicted from the graph: ([\d,]+) of \1 MACs \(100.0 %\) in int8, 3 of 3 layers, ", plan.notes[2]), plan.notes[2]
    assert plan.notes[3].startswith("an FP16 engine is planned beside the int8 one")


def test_equal_graphs_make_equal_plans() -> None:
    assert planned(QuantGraph.load(MODELS[0])).digest() == planned(QuantGraph.load(MODELS[0])).digest()


# ---- NVIDIA's compiler, without a GPU
@pytest.mark.parametrize("make", [images, sequences])
def test_tensorrt_rtx_compiles_every_operator(make: Callable[[], QuantGraph], tmp_path: Path, require: Require) -> None:
    require("tensorrt_rtx")
    check, engine, _ = execute(planned(make()), tmp_path)
    assert check.status == "done" and check.tool_version
    assert check.detail.startswith(f"parses and compiles with TensorRT-RTX {check.tool_version} for SM86 and SM89 in ")
    assert (engine.status, engine.detail) == ("planned", "runs on the board")
    assert not (tmp_path / "model.engine").exists()
    assert set(json.loads((tmp_path / "kernels.json").read_text(encoding="utf-8"))) == {"model.onnx", "model_float.onnx"}


def test_the_models_and_these_networks_hold_every_operator_of_the_table() -> None:
    graphs = [images(), sequences(), *map(QuantGraph.load, MODELS)]
    assert {node.op for graph in graphs for node in graph.nodes if node.kind == "int8"} == TARGET.ops == set(OPS)
    assert {"ArgMax", "Cast", "GridSample", "LayerNormalization", "Softmax"} <= {node.op for graph in graphs for node in graph.nodes if node.kind == "float"}


def every_island(graph_writer: FormWriter) -> QuantGraph:
    """All in one graph, but for those that a tiny model holds: a compile takes longer than an operator."""
    w = graph_writer
    x = w.dequantise(w.input("x", (1, 8, 8), scale=2.0**-5))
    w.float_node("Exp", [x], ["positive"], "positive")
    w.float_node("Unsqueeze", [x, w.constant("zeroth", np.array([0]))], ["image"], "to_image")
    w.float_node("Reshape", [x, w.constant("four", np.array([1, 4, 4, 4]))], ["deep"], "to_deep")
    w.float_node("Squeeze", [x, w.constant("first", np.array([0]))], ["matrix"], "matrix")
    kernel = np.ones((1, 1, 3, 3), np.float32)
    constants = {
        "Pow": [np.float32(0.5)],
        "Clip": [np.float32(-1), np.float32(2)],
        "Reshape": [np.array([1, 64])],
        "LayerNormalization": [np.ones(8, np.float32), np.ones(8, np.float32)],
        **{op: [np.array([-1])] for op in ("ReduceMean", "ReduceSum", "ReduceMax")},
        **{op: [np.ones((8, 5), np.float32)] for op in ("MatMul", "Gemm")},
        **{op: [kernel] for op in ("Conv", "ConvTranspose")},
        "PRelu": [np.full((1, 8, 1), 0.25, np.float32)],
        **{op: [np.array([0])] for op in ("Squeeze", "Unsqueeze")},
        "Slice": [np.array([1]), np.array([7]), np.array([1]), np.array([2])],
        "Gather": [np.array([0, 3])],
        "Expand": [np.array([1, 8, 8])],
        "Resize": [np.zeros(0, np.float32), np.array([1, 1, 2, 2], np.float32)],
        "Split": [np.array([5, 3])],
    }
    attributes = {
        "Concat": {"axis": 1},
        "Transpose": {"perm": [0, 2, 1]},
        **{op: {"axis": -1} for op in ("Softmax", "LogSoftmax", "LayerNormalization")},
        **{op: {"kernel_shape": [3, 3]} for op in ("Conv", "ConvTranspose", "MaxPool", "AveragePool")},
        **{op: {"axis": 1} for op in ("Gather", "Split")},
        **{op: {"blocksize": 2} for op in ("DepthToSpace", "SpaceToDepth")},
    }
    images = ("Conv", "ConvTranspose", "MaxPool", "AveragePool", "GlobalAveragePool", "SpaceToDepth", "Resize")
    sources = {"Gemm": "matrix", "DepthToSpace": "deep"} | dict.fromkeys(("Log", "Sqrt", "Reciprocal", "Pow"), "positive") | dict.fromkeys(images, "image")
    for op in sorted(FLOAT_OPS - {"ArgMax", "Cast", "GridSample"}):
        two = ["positive"] if op in ("Add", "Sub", "Mul", "Div", "Max", "Min", "Concat") else []
        given = [w.constant(f"{op}_{index}", np.asarray(array)) for index, array in enumerate(constants.get(op, []))]
        outputs = [f"y_{op}", f"y_{op}_rest"] if op == "Split" else [f"y_{op}"]
        w.float_node(op, [sources.get(op, x), *two, *given], outputs, f"island_{op}", **attributes.get(op, {}))
        for output in outputs:
            w.float_output(output)
    return w.graph()


@pytest.mark.parametrize("board", ["jetson-orin-nano", "jetson-nano"])
def test_tensorrt_rtx_compiles_every_float_island(board: str, tmp_path: Path, require: Require) -> None:
    require("tensorrt_rtx")
    graph, profile = every_island(FormWriter()), load_profile(board)
    assert TARGET.check(graph, profile) == []
    assert execute(TARGET.plan(graph, profile, {"check_nearest": True}), tmp_path)[0].detail.startswith("parses and compiles")


def check_with_rtx(folder: Path, model: str, *more: str) -> tuple[int, str]:
    argv = [sys.executable, "-m", "isthmus.targets.jetson.check_with_rtx", model, *more]
    done = subprocess.run(argv, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert "Traceback" not in done.stdout + done.stderr
    return done.returncode, done.stdout.strip().splitlines()[-1]


def test_the_check_names_what_nvidia_refuses(tmp_path: Path, require: Require) -> None:
    require("tensorrt_rtx")
    graph = one((1, 2, 9, 9), lambda w, x: w.conv(x, anything(2, 2, 3, 3), 2.0**-7, np.arange(2, dtype=np.int32), scale=2.0, name="stem"))
    (tmp_path / "form.onnx").write_bytes(graph.to_bytes())  # the form itself: its bias stands behind a DequantizeLinear
    code, line = check_with_rtx(tmp_path, "form.onnx")
    assert code == 1
    assert "refuses node 'stem_bias_dequantise' (DequantizeLinear): " in line and "input has type Int32" in line


def test_the_check_refuses_other_files_in_one_line(tmp_path: Path, require: Require) -> None:
    require("tensorrt_rtx")
    (tmp_path / "cut.onnx").write_bytes(planned(sequences()).files["model.onnx"][:300])
    assert check_with_rtx(tmp_path, "cut.onnx")[0] == 1
    assert check_with_rtx(tmp_path, "none.onnx") == (2, "none.onnx: No such file or directory")
    (tmp_path / "model.onnx").write_bytes(planned(sequences()).files["model.onnx"])
    assert re.match(r"cut.onnx: TensorRT-RTX \S+ refuses the file: ", check_with_rtx(tmp_path, "model.onnx", "cut.onnx")[1])
    assert check_with_rtx(tmp_path, "model.onnx", "--sm", "87")[1].endswith("does not know SM87: it has SM120, SM121, SM75, SM80, SM86, SM89")


def test_a_refused_graph_ends_the_compile(tmp_path: Path, require: Require) -> None:
    require("tensorrt_rtx")
    plan = planned(one((1, 2, 9, 9), lambda w, x: w.max_pool(x, (3, 3), (1, 1), dilations=(2, 2), name="pool")))  # `check` was passed over
    with pytest.raises(IsthmusError, match=r"(?s)step check .* ended with code 1:.*model.onnx: TensorRT-RTX .* refuses node 'pool' \(MaxPool\): .*dilations"):
        execute(plan, tmp_path)


# ---- the script for the board
# TensorRT's Python module cannot be installed here; TensorRT-RTX has the same classes and really builds. It needs to be told a GPU, and a version; the
# script, which GPU is here. Names and arguments are held against TensorRT's own in test_tensorrt_api.py.
STAND_IN = """
import __main__
import tensorrt_rtx
from tensorrt_rtx import *

__main__.gpu_here = lambda: {{"name": "stand-in", **{{fact: __main__._plan()[fact] for fact in ("sm", "multiprocessors")}}}}

__version__ = {version!r}


class Builder(tensorrt_rtx.Builder):
    def create_builder_config(self):
        config = super().create_builder_config()
        config.num_compute_capabilities = 1
        config.set_compute_capability(tensorrt_rtx.ComputeCapability.SM86, 0)
        return config
"""


# TensorRT 8 types weakly: flags say what the builder may choose from. TensorRT-RTX has no such flags; others of its own take their place and are told.
STAND_IN_8 = (
    STAND_IN
    + """

class NetworkDefinitionCreationFlag:
    EXPLICIT_BATCH = tensorrt_rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED


class BuilderFlag:
    TF32, GPU_FALLBACK = tensorrt_rtx.BuilderFlag.TF32, tensorrt_rtx.BuilderFlag.GPU_FALLBACK
    FP16, INT8 = tensorrt_rtx.BuilderFlag.SPARSE_WEIGHTS, tensorrt_rtx.BuilderFlag.DISTRIBUTIVE_INDEPENDENCE


class Builder(Builder):
    def build_serialized_network(self, network, config):
        print("flags", [name for name in ("FP16", "INT8", "TF32", "GPU_FALLBACK") if config.get_flag(getattr(BuilderFlag, name))])
        return super().build_serialized_network(network, config)
"""
)


def build_on_board(folder: Path, *arguments: str, version: str = "10.3.0", module: str = STAND_IN) -> subprocess.CompletedProcess[str]:
    """Runs the plan's script as the board would, with a module called tensorrt on its path."""
    (folder / "site").mkdir(exist_ok=True)
    (folder / "site" / "tensorrt.py").write_text(module.format(version=version) if module.startswith(STAND_IN) else module, encoding="utf-8")
    argv = [sys.executable, "-W", "ignore", "build_engine.py", *arguments]
    return subprocess.run(argv, cwd=folder, env={**os.environ, "PYTHONPATH": "site"}, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    ("name", "version", "engine", "flags"),
    [
        ("jetson-xavier-nx", "8.5.2", "int8", "['INT8']"),
        ("jetson-xavier-nx", "8.5.2", "fp16", "['FP16']"),
        ("jetson-nano", "8.2.1", "fp16", "['FP16']"),
    ],
)
def test_the_script_tells_tensorrt_8_what_it_may_choose(name: str, version: str, engine: str, flags: str, tmp_path: Path, require: Require) -> None:
    require("tensorrt_rtx")
    for file, content in TARGET.plan(sequences(), load_profile(name), {}).files.items():
        (tmp_path / file).write_bytes(content)
    done = build_on_board(tmp_path, "--engine", engine, version=version, module=STAND_IN_8)
    assert done.returncode == 0, done.stderr
    assert f"flags {flags}" in done.stdout.splitlines()


@pytest.fixture
def board(tmp_path: Path) -> Path:
    for name, content in planned(sequences()).files.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_the_script_builds_an_engine(board: Path, require: Require) -> None:
    require("tensorrt_rtx")
    done = build_on_board(board)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"built model.engine: {(board / 'model.engine').stat().st_size} bytes, int8, TensorRT 10.3.0, ")
    beside = {"model.engine", "model.engine.json", "model.engine.trtexec", "timing.cache", "timing.cache.sha256", "build.lock"}
    assert {path.name for path in board.iterdir()} - set(planned(sequences()).files) == {*beside, "site"}
    done = build_on_board(board, "--workspace-mib", "256", "--engine", "fp16")  # with the timing cache of the first
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(f"built model_fp16.engine: {(board / 'model_fp16.engine').stat().st_size} bytes, fp16, ")


@pytest.mark.parametrize(
    ("arguments", "version", "message"),
    [
        (("--engine", "int4"), "10.3.0", "build_engine: no engine called 'int4' in engines.json: there are int8, fp16"),
        ((), "8.5.2", "build_engine: TensorRT 8.5.2 found, expected 10.0 or later: this graph is written for JetPack 6"),
        (
            ("--workspace-mib", "8"),
            "10.3.0",
            "build_engine: 8 MiB for TensorRT's workspace, expected 64 or more: pass a larger --workspace-mib",
        ),
    ],
)
def test_the_script_says_what_is_wrong_in_one_sentence(arguments: tuple[str, ...], version: str, message: str, board: Path, require: Require) -> None:
    require("tensorrt_rtx")
    done = build_on_board(board, *arguments, version=version)
    assert (done.returncode, done.stderr.strip()) == (1, message)
    assert not (board / "model.engine").exists()


def test_the_script_without_tensorrt_says_what_brings_it(board: Path) -> None:
    done = build_on_board(board, module="raise ImportError('no library')")
    assert done.returncode == 1
    assert done.stderr == "build_engine: the Python module tensorrt cannot be imported (no library): install it with 'sudo apt install tensorrt' (JetPack)\n"


def test_a_failed_build_leaves_the_old_engine(board: Path, require: Require) -> None:
    require("tensorrt_rtx")
    (board / "model.engine").write_bytes(b"old")
    graph = one((1, 2, 9, 9), lambda w, x: w.conv(x, anything(2, 2, 3, 3), 2.0**-7, np.arange(2, dtype=np.int32), scale=2.0, name="stem"))
    (board / "model.onnx").write_bytes(graph.to_bytes())
    done = build_on_board(board)
    assert done.returncode == 1
    assert "build_engine: TensorRT 10.3.0 refuses model.onnx at node 'stem_bias_dequantise' (DequantizeLinear): " in done.stderr
    assert (board / "model.engine").read_bytes() == b"old"
    assert {path.name for path in board.iterdir()} - set(planned(sequences()).files) == {"model.engine", "site", "build.lock"}


def test_the_script_misses_its_files_in_one_sentence(board: Path) -> None:
    (board / "model.onnx").unlink()
    assert build_on_board(board).stderr == "build_engine: model.onnx: no such file; copy the artifact's folder to the board again\n"
    (board / "engines.json").write_text("{", encoding="utf-8")
    assert build_on_board(board).stderr.startswith("build_engine: engines.json cannot be read (")
    (board / "engines.json").unlink()
    assert build_on_board(board).stderr == "build_engine: engines.json: no such file; run this in the artifact's folder\n"


def test_the_script_needs_the_standard_library_and_tensorrt_alone() -> None:
    """In the grammar of Python 3.6, which JetPack 4 has, and without what only later ones import."""
    tree = ast.parse(BUILD_SCRIPT.read_text(encoding="utf-8"), feature_version=(3, 6))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported - set(sys.stdlib_module_names) == {"tensorrt", "tensorrt_rtx"}  # one of the two
    assert "__future__" not in imported  # annotations came with 3.7; so did these annotations' meaning:
    hints = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) for node in [*(a.annotation for a in node.args.args), node.returns]]
    assert all(isinstance(hint, (ast.Name, ast.Constant, ast.Attribute)) for hint in hints if hint is not None)
