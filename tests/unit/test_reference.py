# SPDX-License-Identifier: Apache-2.0
"""The integer reference against ONNX Runtime with its optimisations off, which computes the QDQ graph in float as ONNX defines it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper
from onnx.reference import ReferenceEvaluator

from isthmus import islands, kernels, reference, resampling, tables
from isthmus.errors import IsthmusError
from isthmus.form_writer import FormWriter
from isthmus.graph import QuantGraph, QuantNode
from isthmus.recipe import Recipe
from isthmus.spec import TensorSpec

MODELS = sorted((Path(__file__).parents[1] / "models").glob("*.onnx"))
SAMPLES = 64


def _plain_session(graph: QuantGraph) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(graph.to_bytes(), options, providers=["CPUExecutionProvider"])


def _noise(graph: QuantGraph) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(1)
    return {spec.name: generator.integers(-128, 128, (SAMPLES, *spec.shape[1:]), np.int8) for spec in graph.inputs}


@pytest.mark.parametrize("file", MODELS, ids=lambda file: file.stem)
def test_equals_onnx_runtime_without_optimisations(file: Path) -> None:
    """Powers of two: every element. Other scales: float32 against float64 may fall on the other side of a tie, by one step."""
    graph = QuantGraph.load(file)
    feeds = _noise(graph)
    expected = reference.run(graph, feeds)
    session = _plain_session(graph)
    for index in range(SAMPLES):
        real = {spec.name: spec.dequantise(feeds[spec.name][index : index + 1]) for spec in graph.inputs}
        for spec, value in zip(graph.outputs, session.run([spec.name for spec in graph.outputs], real), strict=True):
            ours = expected[spec.name][index : index + 1]
            if not spec.is_quantised:
                np.testing.assert_allclose(value, ours, atol=1e-6)
            elif graph.recipe.scheme == "power_of_two":
                np.testing.assert_array_equal(spec.quantise(value), ours)
            else:
                assert np.abs(spec.quantise(value).astype(int) - ours).max() <= 1


@pytest.mark.parametrize("file", [file for file in MODELS if file.stem in ("network", "residual", "average_pool_pad")], ids=lambda file: file.stem)
def test_batches_and_float_feeds_agree(file: Path) -> None:
    graph = QuantGraph.load(file)
    feeds = _noise(graph)
    whole = reference.run(graph, feeds)
    real = {spec.name: spec.dequantise(feeds[spec.name]) for spec in graph.inputs}
    single = [reference.run(graph, {name: array[i : i + 1] for name, array in feeds.items()}) for i in range(3)]
    for name, array in whole.items():
        np.testing.assert_array_equal(reference.run(graph, real)[name], array)
        np.testing.assert_array_equal(np.concatenate([part[name] for part in single]), array[:3])


def test_rounds_half_to_even_and_saturates() -> None:
    values = np.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 1000, -1000])
    np.testing.assert_array_equal(kernels.requantise(values, 1.0, 0, (-128, 127)), [-2, -2, 0, 0, 2, 2, 127, -128])


def test_large_sums_stay_exact() -> None:
    """4,096 products of extremes pass float32's 2^24: the wide accumulator must take over."""
    x = np.full((1, 4096), -128, np.int8)
    weight = np.full((4096, 1), -128, np.int8)
    weight[0, 0] = -127
    assert kernels.matmul_accumulate(x, 0, weight, None)[0, 0] == 4096 * 128 * 128 - 128


def test_wrong_feeds_are_named() -> None:
    graph = QuantGraph.load(next(file for file in MODELS if file.stem == "conv"))
    with pytest.raises(IsthmusError, match="input 'x' is missing"):
        reference.run(graph, {})
    with pytest.raises(IsthmusError, match=r"expected shape \[1, 3, 6, 6\].*found \[1, 3, 6, 5\]"):
        reference.run(graph, {"x": np.zeros((1, 3, 6, 5), np.int8)})


# ---- functions of one number
def _function_node(op: str, **attributes: float | str) -> tuple[QuantNode, list[onnx.NodeProto]]:
    node = QuantNode(op, op, "int8", ("x",), ("y",), attributes)
    if op == "Silu":
        return node, [helper.make_node("Sigmoid", ["x"], ["gate"]), helper.make_node("Mul", ["x", "gate"], ["y"])]
    return node, [helper.make_node(op, ["x"], ["y"], **attributes)]


@pytest.mark.parametrize(
    ("op", "attributes", "near_a_tie"),
    [
        ("Sigmoid", {}, 0),
        ("Tanh", {}, 0),
        ("LeakyRelu", {"alpha": 0.01}, 0),
        ("LeakyRelu", {"alpha": 0.1}, 0),
        ("HardSigmoid", {"alpha": 0.2, "beta": 0.5}, 0),
        ("HardSigmoid", {"alpha": 1 / 6, "beta": 0.5}, 0),
        ("HardSwish", {}, 0),
        ("Gelu", {"approximate": "none"}, 0),
        ("Gelu", {"approximate": "tanh"}, 0),
        ("Softplus", {}, 0),
        ("Elu", {"alpha": 0.5}, 0),
        # Where the function is x but for its last bit, and x a tie: ONNX Runtime 1.32's exp decides it.
        ("Mish", {}, 1),
        ("Silu", {}, 2),
    ],
)
def test_tables_equal_onnx_runtime(op: str, attributes: dict[str, float | str], near_a_tie: int) -> None:
    """Each of the 256 inputs, at 100 pairs of scales."""
    node, protos = _function_node(op, **attributes)
    border = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [256]) for name in ("x", "y")]
    model = helper.make_model(helper.make_graph(protos, "f", border[:1], border[1:]), opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    different = 0
    for source in (TensorSpec("x", (256,), "int8", "", 2.0**exponent, 0) for exponent in range(-8, 2)):
        (real,) = session.run(None, {"x": source.dequantise(np.arange(-128, 128).astype(np.int8))})
        for target in (TensorSpec("y", (256,), "int8", "", 2.0**exponent, 0) for exponent in range(-8, 2)):
            steps = np.abs(target.quantise(real).astype(int) - tables.table(node, {"x": source, "y": target}))
            assert steps.max() <= 1
            different += int(steps.sum())
    assert different <= near_a_tie


# ---- resizing
@pytest.mark.parametrize("transform", ["half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric"])
@pytest.mark.parametrize(("source", "target"), [(3, 7), (7, 3), (4, 4), (5, 1), (1, 5), (8, 16), (6, 9)])
def test_resizing_takes_the_samples_onnx_says(source: int, target: int, transform: str) -> None:
    """Against onnx's reference, which works in float64: within its rounding."""
    x = np.arange(source, dtype=np.float64) ** 2
    taps = resampling.linear_taps(source, target, transform)
    ours = (x[taps.lower] * (taps.denominator - taps.weight) + x[taps.upper] * taps.weight) / taps.denominator
    np.testing.assert_allclose(_resized(x, target, mode="linear", coordinate_transformation_mode=transform), ours, rtol=1e-6, atol=1e-6)
    for mode in resampling.NEAREST_MODES:
        theirs = _resized(x, target, mode="nearest", coordinate_transformation_mode=transform, nearest_mode=mode)
        np.testing.assert_array_equal(x[resampling.nearest_indices(source, target, transform, mode)], theirs)


def _resized(x: np.ndarray, target: int, **attributes: str) -> np.ndarray:
    node = helper.make_node("Resize", ["x", "", "", "sizes"], ["y"], **attributes)
    x = x.astype(np.float32)
    ours = ReferenceEvaluator(node).run(None, {"x": x.reshape(1, 1, -1), "sizes": np.array([1, 1, target])})[0]
    return np.asarray(ours).reshape(-1)


# ---- sums
@pytest.mark.parametrize("seed", range(40))
def test_a_transposed_convolution_is_what_onnx_says(seed: int) -> None:
    random = np.random.default_rng(seed)
    rank, group = int(random.integers(1, 3)), int(random.integers(1, 4))
    kernel, strides, dilations = (random.integers(1, top, rank).tolist() for top in (5, 4, 3))
    extra = [int(random.integers(0, stride)) for stride in strides]
    pads = random.integers(0, 2, 2 * rank).tolist()
    weight = random.integers(-128, 128, (2 * group, 3, *kernel)).astype(np.int8)
    x = random.integers(-128, 128, (2, 2 * group, *random.integers(3, 6, rank))).astype(np.int8)
    attributes = {"strides": strides, "dilations": dilations, "pads": pads, "group": group}
    node = helper.make_node("ConvTranspose", ["x", "w"], ["y"], output_padding=extra, **attributes)
    model = helper.make_model(
        helper.make_graph(
            [node],
            "t",
            [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, array.shape) for name, array in (("x", x), ("w", weight))],
            [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=9,
    )
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"x": x.astype(np.float32), "w": weight.astype(np.float32)})
    total = kernels.conv_transpose_accumulate(x, 0, weight, None, expected.shape[2:], **attributes)
    np.testing.assert_array_equal(total, expected)


def test_an_operand_without_the_batch_goes_through_one_batch_at_a_time() -> None:
    writer = FormWriter()
    a, b = writer.input("a", (1, 2, 3), scale=1.0), writer.input("b", (2, 3), scale=1.0)
    writer.output(writer.sub(a, b, scale=1.0), "y")
    random = np.random.default_rng(0)
    feeds = {"a": random.integers(-60, 60, (3, 2, 3)).astype(np.int8), "b": random.integers(-60, 60, (6, 3)).astype(np.int8)}
    np.testing.assert_array_equal(reference.run(writer.graph(), feeds)["y"], feeds["a"] - feeds["b"].reshape(3, 2, 3))


def test_a_constant_operand_stands_for_every_batch() -> None:
    """The graph's own batch is 2: each of the two samples has a token of its own, and one embedding serves both."""
    writer = FormWriter()
    x = writer.input("x", (2, 3, 4), scale=1.0)
    random = np.random.default_rng(0)
    token, embedding = random.integers(-60, 60, (2, 1, 4)).astype(np.int8), random.integers(-60, 60, (1, 4, 4)).astype(np.int8)
    joined = writer.concat([writer.constant_int8("token", token, scale=1.0), x], axis=1)
    writer.output(writer.add(joined, writer.constant_int8("embedding", embedding, scale=1.0), scale=1.0), "y")
    feed = random.integers(-60, 60, (6, 3, 4)).astype(np.int8)
    expected = np.concatenate([np.concatenate([token] * 3), feed], axis=1) + embedding
    np.testing.assert_array_equal(reference.run(writer.graph(), {"x": feed})["y"], expected)


def test_an_island_reads_a_stored_constant_with_its_zero_point() -> None:
    writer = FormWriter(Recipe(name="asymmetric", scheme="asymmetric"))
    x = writer.dequantise(writer.input("x", (1, 3), scale=0.5, zero_point=1))
    stored = writer.dequantise(writer.constant_int8("stored", np.array([[3, 4, 5]]), scale=0.25, zero_point=3))
    writer.float_node("Max", [x, stored], ["largest"], "largest")
    writer.float_output("largest")
    feed = np.full((2, 3), -128, np.int8)
    np.testing.assert_array_equal(reference.run(writer.graph(), {"x": feed})["largest"], [[0, 0.25, 0.5]] * 2)


# ---- float islands
def test_an_island_of_constants_is_repeated_with_the_batch() -> None:
    writer = FormWriter()
    x = writer.input("x", (1, 2, 3), scale=2.0**-3)
    writer.float_node("Exp", [writer.constant("start", np.zeros((1, 2, 3), np.float32))], ["ones"], "ones")
    writer.output(writer.add(x, writer.quantise("ones", scale=2.0**-3), scale=2.0**-3), "y")
    feeds = {"x": np.arange(12).reshape(2, 2, 3).astype(np.int8)}
    np.testing.assert_array_equal(reference.run(writer.graph(), feeds)["y"], feeds["x"] + 8)


def test_an_island_may_leave_inputs_out() -> None:
    writer = FormWriter()
    x = writer.dequantise(writer.input("x", (1, 2, 2), scale=2.0**-3))
    writer.float_node("Resize", [x, "", writer.constant("scales", np.array([1, 1, 2], np.float32))], ["big"], "big", mode="cubic")
    writer.float_output("big")
    assert reference.run(writer.graph(), {"x": np.ones((3, 2, 2), np.int8)})["big"].shape == (3, 2, 4)


@pytest.mark.parametrize("align_corners", [0, 1])
@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("mode", ["linear", "nearest"])
def test_sampling_images_equals_onnx_runtime(mode: str, padding: str, align_corners: int) -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(2, 3, 6, 5)).astype(np.float32)
    grid = random.uniform(-1.5, 1.5, (2, 4, 7, 2)).astype(np.float32)
    node = helper.make_node("GridSample", ["x", "grid"], ["y"], mode=mode, padding_mode=padding, align_corners=align_corners)
    border = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in (("x", x.shape), ("grid", grid.shape), ("y", None))]
    model = helper.make_model(helper.make_graph([node], "g", border[:2], border[2:]), opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    (expected,) = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x, "grid": grid})
    np.testing.assert_allclose(islands.grid_sample(x, grid, mode, padding, bool(align_corners)), expected, atol=1e-6)
