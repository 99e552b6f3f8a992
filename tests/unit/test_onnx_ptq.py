# SPDX-License-Identifier: Apache-2.0
"""Post-training quantisation of a float ONNX model: ranges from data, scales from ranges, quantisers in their places."""

from __future__ import annotations

import dataclasses
import gzip
import math
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from isthmus import reference
from isthmus.errors import IsthmusError, ProblemsError
from isthmus.export.check import check_equal
from isthmus.export.prepare import prepare_float
from isthmus.export.scales import power_of_two_above, quantise_weight, step_from_range
from isthmus.export.to_graph import graph_from_qdq, graph_from_ranges, tensors_to_calibrate
from isthmus.graph import QuantGraph
from isthmus.onnx_file import load_onnx
from isthmus.quantize.onnx_ptq import calibrate
from isthmus.quantize.ranges import RangeCollector
from isthmus.recipe import SCHEMES, Recipe, load_recipe, recipe_names

SHARED = Path(__file__).parents[3] / "shared" / "data"
RNG = np.random.default_rng(11)


def weight(*shape: int) -> np.ndarray:
    return (RNG.standard_normal(shape) / np.sqrt(max(1, np.prod(shape[1:])))).astype(np.float32)


class Net:
    """A float network in the making; every method takes and gives the name of a value."""

    def __init__(self, shape: tuple[int, ...], seed: int = 0) -> None:
        self.shape, self.rng = shape, np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}

    def op(self, op: str, inputs: str, output: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(op, inputs.split(), [output], output, **attributes))
        return output

    def hold(self, name: str, *shape: int, value: np.ndarray | None = None) -> str:
        fan_in = max(1, int(np.prod(shape[1:])))
        self.constants[name] = np.asarray(self.rng.standard_normal(shape) / np.sqrt(fan_in), np.float32) if value is None else value
        return name

    def conv(self, x: str, output: str, filters: int, channels: int, kernel: int = 3, **attributes: object) -> str:
        pads = {"pads": [kernel // 2] * 4} | attributes
        group = int(attributes.get("group", 1))  # type: ignore[call-overload]  # the tests give an int
        inputs = f"{x} {self.hold(f'{output}_w', filters, channels // group, kernel, kernel)} {self.hold(f'{output}_b', filters)}"
        return self.op("Conv", inputs, output, **pads)

    def model(self, *outputs: str) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "net",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, self.shape)],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
            [numpy_helper.from_array(array, name) for name, array in self.constants.items()],
        )
        return prepare_float(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8))


def samples(model: onnx.ModelProto, count: int = 16, seed: int = 3) -> np.ndarray:
    shape = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim][1:]
    return np.random.default_rng(seed).standard_normal((count, *shape)).astype(np.float32)


def quantised(model: onnx.ModelProto, recipe: Recipe | None = None) -> QuantGraph:
    recipe = recipe or Recipe()
    return graph_from_ranges(model, calibrate(model, {"x": samples(model)}, recipe, tensors_to_calibrate(model)), recipe)


def kinds(graph: QuantGraph) -> list[str]:
    return [f"{node.op}:{node.activation}" if node.activation and node.op not in ("Relu", "Clip") else node.op for node in graph.nodes if node.kind == "int8"]


# ---- placement
def test_an_activation_is_fused_where_nobody_else_reads_in_front_of_it() -> None:
    net = Net((1, 3, 8, 8))
    first = net.op("Relu", net.conv("x", "a", 4, 3), "r")
    second = net.conv(first, "b", 4, 4)
    net.op("Add", f"{net.op('Relu', second, 's')} {second}", "y")
    graph = quantised(net.model("y"))
    assert kinds(graph) == ["Conv:Relu", "Conv", "Relu", "Add"]
    assert graph.tensors[graph.nodes[1].output].zero_point == 0
    alone = next(node for node in graph.nodes if node.op == "Relu")
    assert graph.tensors[alone.output].scale == graph.tensors[alone.inputs[0]].scale


def test_values_joined_by_operators_that_pass_them_on_share_one_scale() -> None:
    net = Net((1, 3, 8, 8))
    left = net.op("MaxPool", net.conv("x", "a", 4, 3), "p", kernel_shape=[2, 2], strides=[2, 2])
    right = net.conv("x", "b", 2, 3, strides=[2, 2])
    joined = net.op("Concat", f"{left} {right}", "k", axis=1)
    net.op("Flatten", joined, "y")
    for scheme in SCHEMES:
        graph = quantised(net.model("y"), Recipe(scheme=scheme))
        by_op = {node.op: graph.tensors[node.output] for node in graph.nodes if node.kind == "int8"}
        assert {(spec.scale, spec.zero_point) for op, spec in by_op.items() if op != "Conv"} == {(by_op["Conv"].scale, by_op["Conv"].zero_point)}


def test_a_softmax_tail_stays_float_and_is_listed_a_constant_operand_is_stored() -> None:
    net = Net((1, 3, 8, 8))
    shifted = net.op("Add", f"{net.op('Relu', net.conv('x', 'a', 4, 3), 'r')} {net.hold('k', 4, 8, 8)}", "shift")
    pooled = net.op("GlobalAveragePool", net.conv(shifted, "b", 5, 4), "g")
    net.op("Softmax", net.op("Flatten", pooled, "f"), "y", axis=1)
    model = net.model("y")
    graph = quantised(model)
    assert graph.float_islands == ("y",)
    assert kinds(graph) == ["Conv:Relu", "Constant", "Add", "Conv", "GlobalAveragePool", "Flatten"]
    assert graph.outputs[0].dtype == "float32" and graph.outputs[0].name == "y"
    probabilities = reference.run(graph, {"x": samples(model)})["y"]
    np.testing.assert_allclose(probabilities, float_run(model, samples(model))["y"], atol=0.05)


def test_operators_without_weights_between_islands_stay_float() -> None:
    net = Net((1, 3, 8, 8))
    start = net.op("Reshape", f"{net.op('Sin', 'x', 's')} {net.hold('shape', value=np.array([1, 3, 64]))}", "early")
    back = net.op("Reshape", f"{net.op('Cos', start, 't')} {net.hold('again', value=np.array([1, 3, 8, 8]))}", "back")
    conv = net.conv(back, "c", 4, 3)
    side = net.op("Sin", conv, "q")
    net.op("MaxPool", net.op("Add", f"{side} {side}", "twice"), "y", kernel_shape=[2, 2])
    graph = quantised(net.model("y"))
    assert kinds(graph) == ["Reshape", "Conv"]  # the one in front of the Conv costs nothing
    assert graph.float_islands == ("s", "early", "t", "q", "twice", "y")


def test_an_input_that_an_island_reads_too_keeps_its_float_side() -> None:
    net = Net((1, 3, 8, 8))
    net.op("Mul", f"{net.conv('x', 'c', 3, 3)} {net.op('Sin', 'x', 's')}", "early")
    net.op("Cos", "early", "y")
    graph = quantised(net.model("y"))
    assert graph.inputs[0].dtype == "float32"
    assert kinds(graph) == ["Conv", "Mul"] and graph.float_islands == ("s", "y")


def test_two_outputs_keep_their_names() -> None:
    net = Net((1, 3, 8, 8))
    early = net.op("Relu", net.conv("x", "c", 4, 3), "early")
    net.op("GlobalAveragePool", early, "late")
    graph = quantised(net.model("late", "early"))
    assert [spec.name for spec in graph.outputs] == ["late", "early"]
    assert all(spec.dtype == "int8" for spec in graph.outputs)


def test_names_of_the_user_never_meet_ours() -> None:
    net = Net((1, 3, 4, 4))
    net.op("Sigmoid", net.op("Relu", net.conv("x", "conv", 3, 3), "scale"), "conv_q")
    net.op("Add", f"{net.conv('conv_q', 'zero', 3, 3)} conv_q", "conv_out")
    graph = quantised(net.model("conv_out", "conv_q"))
    assert [spec.name for spec in graph.outputs] == ["conv_out", "conv_q"]


def test_nothing_to_quantise_is_said() -> None:
    net = Net((1, 3, 4, 4))
    net.op("Relu", net.op("Sigmoid", "x", "s"), "y")
    with pytest.raises(ProblemsError, match=r"none of its 2 nodes is a layer with weights .* \[nothing-to-quantise\]"):
        tensors_to_calibrate(net.model("y"))


def test_the_same_model_and_data_give_the_same_bytes() -> None:
    net = Net((1, 3, 8, 8))
    net.op("Relu", net.conv("x", "c", 4, 3), "y")
    model = net.model("y")
    assert quantised(model).digest == quantised(model).digest


# ---- scales
@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6), st.sampled_from(SCHEMES))
def test_a_step_covers_its_range_and_zero(a: float, b: float, scheme: str) -> None:
    low, high = min(a, b, 0.0), max(a, b, 0.0)
    step = step_from_range(min(a, b), max(a, b), scheme)
    assert -128 <= step.zero_point <= 127 and np.float32(step.scale) == step.scale > 0
    assert (-128 - step.zero_point) * step.scale <= low + 0.51 * step.scale
    assert (127 - step.zero_point) * step.scale >= high - 0.51 * step.scale
    if scheme != "asymmetric":
        assert step.zero_point == 0
    if scheme == "power_of_two" and high - low > 1e-9:
        assert math.frexp(step.scale)[0] == 0.5
        assert max(high / 127, -low / 128) > step.scale / 2, "one half of it would clip"


@given(st.integers(-60, 60), st.floats(0.5, 1.0, exclude_max=True))
def test_the_power_of_two_above_is_exact(exponent: int, mantissa: float) -> None:
    value = math.ldexp(mantissa, exponent)
    assert power_of_two_above(value) == (value if mantissa == 0.5 else math.ldexp(1.0, exponent))


@pytest.mark.parametrize(("low", "high"), [(math.nan, 1.0), (0.0, math.inf), (math.inf, -math.inf), (2.0, 1.0)])
def test_a_range_that_is_none_is_refused(low: float, high: float) -> None:
    with pytest.raises(IsthmusError, match="cannot be quantised; calibrate with data on which the model stays finite"):
        step_from_range(low, high, "symmetric")


def test_weights_stay_within_127_and_channels_have_their_own_scale() -> None:
    array = weight(4, 3, 3, 3) * np.float32([1, 10, 0, 0.1]).reshape(4, 1, 1, 1)
    for recipe in (Recipe(), Recipe(scheme="symmetric", per_channel=True), Recipe(per_channel=True)):
        held = quantise_weight(array, 0, recipe)
        assert held.values.dtype == np.int8 and np.abs(held.values.astype(int)).max() <= 127
        assert held.scale.shape == ((4,) if recipe.per_channel else (1,)) and (held.scale > 0).all()
        steps = held.scale.reshape(-1, 1, 1, 1) if recipe.per_channel else held.scale
        assert np.abs(held.values * steps - array).max() <= np.max(steps) * (0.51 if recipe.scheme == "symmetric" else 20)
        if recipe.scheme == "power_of_two":
            assert (np.frexp(held.scale)[0] == 0.5).all()


def test_a_power_of_two_clips_one_outlier_rather_than_lose_a_bit() -> None:
    array = np.append(np.linspace(-1, 1, 4000), 1.03).astype(np.float32).reshape(1, -1)
    assert quantise_weight(array * 127 / 128, 0, Recipe()).scale[0] == 2.0**-7
    assert quantise_weight(np.linspace(-1.9, 1.9, 4001).reshape(1, -1), 0, Recipe()).scale[0] == 2.0**-6


def test_a_bias_that_outgrows_int32_widens_its_channels_scale() -> None:
    array = np.array([[1e-9, 0.0], [0.5, 0.25]], np.float32)
    bias = np.array([3.0, 0.1], np.float32)
    for recipe in (Recipe(scheme="symmetric", per_channel=True), Recipe(per_channel=True)):
        held = quantise_weight(array, 0, recipe, bias, input_scale=2.0**-7)
        assert np.abs(bias / (held.scale * 2.0**-7)).max() <= 2**30
        assert held.values[1].max() in (127, 64)


# ---- ranges
def collected(values: np.ndarray) -> RangeCollector:
    collector = RangeCollector()
    for chunk in np.array_split(values, 4):
        collector.measure(chunk)
    for chunk in np.array_split(values, 4):
        collector.count(chunk)
    return collector


def test_a_percentile_cuts_tails_on_the_sides_that_leave_zero() -> None:
    both = np.random.default_rng(0).standard_normal(40_000)
    low, high = collected(both).range(Recipe(observer="percentile", percentile=99.0, scheme="symmetric"))
    assert low == pytest.approx(np.percentile(both, 0.5), abs=0.03) and high == pytest.approx(np.percentile(both, 99.5), abs=0.03)
    positive = np.abs(both)
    low, high = collected(positive).range(Recipe(observer="percentile", percentile=99.0, scheme="symmetric"))
    assert low == 0 and high == pytest.approx(np.percentile(positive, 99), abs=0.03)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_mse_observer_ignores_an_outlier_and_keeps_an_even_range(scheme: str) -> None:
    recipe = Recipe(observer="mse", scheme=scheme)
    even = np.random.default_rng(0).uniform(-1, 1, 200_000)
    low, high = collected(even).range(recipe)
    assert high == pytest.approx(1.0, rel=0.05) and low == pytest.approx(-1.0, rel=0.05)
    spiky = np.append(even * 0.5, 3.0)
    assert collected(spiky).range(recipe)[1] < 2.5


def test_a_power_of_two_range_gives_back_the_scale_that_was_chosen() -> None:
    values = np.append(np.random.default_rng(0).uniform(-1, 1, 50_000), 1.01)
    low, high = collected(values).range(Recipe())
    assert step_from_range(low, high, "power_of_two").scale == 2.0**-7  # 2^-6 would clip nothing, and cost more


def test_calibration_is_exact_on_minmax_and_seeded() -> None:
    net = Net((1, 3, 6, 6))
    net.op("Relu", net.conv("x", "c", 4, 3), "y")
    model = net.model("y")
    data = samples(model, 20)
    recipe = Recipe(scheme="symmetric", calibration_samples=20)
    ranges = calibrate(model, {"x": data}, recipe)
    assert set(ranges) == {"x", "c", "y"} and ranges.samples == 20 and ranges.warnings == ()
    assert ranges["x"] == (float(data.min()), float(data.max()))
    assert ranges["y"] == pytest.approx((0.0, float(float_run(model, data)["y"].max())))
    few = dataclasses.replace(recipe, calibration_samples=5)
    assert calibrate(model, {"x": data}, few).samples == 5
    assert calibrate(model, {"x": data}, few) == calibrate(model, {"x": data}, few) != calibrate(model, {"x": data}, dataclasses.replace(few, seed=1))


def test_calibration_works_in_the_models_own_batch_and_tells_of_progress() -> None:
    net = Net((4, 3, 6, 6))
    net.conv("x", "y", 4, 3)
    model = net.model("y")
    seen: list[tuple[int, int]] = []
    ranges = calibrate(model, {"x": samples(model, 10)}, Recipe(), progress=lambda done, total: seen.append((done, total)))
    assert ranges.samples == 8 and seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    with pytest.raises(IsthmusError, match=r"needs at least 4 samples \(the model's batch\), found 3"):
        calibrate(model, {"x": samples(model, 3)}, Recipe())


def test_a_tensor_that_is_always_zero_gets_a_scale_and_a_sentence() -> None:
    net = Net((1, 3, 6, 6))
    conv = net.conv("x", "c", 4, 3)
    net.constants["c_b"] = np.full(4, -1e6, np.float32)
    net.op("Relu", conv, "y")
    model = net.model("y")
    ranges = calibrate(model, {"x": samples(model)}, Recipe(), tensors_to_calibrate(model))
    assert len(ranges.warnings) == 1 and "tensor 'y' is zero on all calibration data" in ranges.warnings[0]
    graph_from_ranges(model, ranges, Recipe())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, r"input 'x' has no array; the model's inputs are \['x'\], the data holds \[\]"),
        ({"x": np.zeros((4, 3, 6, 6), np.float32), "z": np.zeros(4)}, r"array 'z' fits no input"),
        ({"x": np.zeros((0, 3, 6, 6), np.float32)}, r"input 'x' is empty; give at least one sample"),
        ({"x": np.zeros((4, 6, 6, 3), np.float32)}, r"input 'x': expected an array \[N, 3, 6, 6\], found \[4, 6, 6, 3\]"),
        ({"x": np.zeros((4, 3, 6, 6), np.complex64)}, r"input 'x': expected numbers, found dtype complex64"),
        ({"x": np.full((4, 3, 6, 6), np.nan)}, r"input 'x' holds NaN or infinity, first in sample 0"),
        ({"x": np.full((4, 3, 6, 6), "a")}, r"expected numbers, found dtype <U1"),
    ],
)
def test_data_that_does_not_fit_is_refused(data: dict[str, np.ndarray], message: str) -> None:
    net = Net((1, 3, 6, 6))
    net.conv("x", "y", 4, 3)
    with pytest.raises(IsthmusError, match=message):
        calibrate(net.model("y"), data, Recipe())


def test_inputs_with_unequal_counts_are_refused() -> None:
    model = prepare_float(
        helper.make_model(
            helper.make_graph(
                [helper.make_node("Add", ["a", "b"], ["y"])], "g",
                [helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, 3)) for name in "ab"],
                [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            ),
            opset_imports=[helper.make_opsetid("", 18)], ir_version=8,
        )
    )  # fmt: skip
    with pytest.raises(IsthmusError, match=r"as many samples as the others, found \{'a': 4, 'b': 3\}"):
        calibrate(model, {"a": np.zeros((4, 3)), "b": np.zeros((3, 3))}, Recipe())
    assert calibrate(model, {"a": np.zeros((4, 3)), "b": np.ones((4, 3))}, Recipe())["y"] == (1.0, 1.0)


def test_a_network_that_leaves_the_numbers_is_said() -> None:
    net = Net((1, 3, 6, 6))
    net.constants["huge"] = np.float32(3e38)
    net.op("Mul", f"{net.op('Exp', net.conv('x', 'c', 4, 3), 'e')} huge", "m")
    net.conv("m", "y", 4, 4)
    model = net.model("y")
    ranges = calibrate(model, {"x": samples(model) * 100}, Recipe())
    assert any("becomes NaN or infinite on the calibration data" in warning for warning in ranges.warnings)
    with pytest.raises(IsthmusError, match=r"tensor '.*': its range .* cannot be quantised"):
        graph_from_ranges(model, ranges, Recipe())


def test_missing_ranges_and_infinite_weights_are_named() -> None:
    net = Net((1, 3, 6, 6))
    net.conv("x", "y", 4, 3)
    model = net.model("y")
    with pytest.raises(IsthmusError, match=r"no range was measured for tensor 'x' \(1 of 2 are missing\)"):
        graph_from_ranges(model, {"y": (0.0, 1.0)}, Recipe())
    net.constants["y_w"][0, 0, 0, 0] = np.inf
    with pytest.raises(ProblemsError, match=r"y: its weight or bias holds NaN or infinity \[finite-weights\]"):
        graph_from_ranges(net.model("y"), {"x": (0.0, 1.0), "y": (0.0, 1.0)}, Recipe())


# ---- the whole way
def float_run(model: onnx.ModelProto, data: np.ndarray) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    runs = [session.run(names, {session.get_inputs()[0].name: row[None]}) for row in data]
    return {name: np.concatenate([run[index] for run in runs]) for index, name in enumerate(names)}


@st.composite
def networks(draw: st.DrawFn) -> Net:
    """A few layers of what the form has, in any order that fits."""
    channels, side = draw(st.integers(1, 4)), draw(st.integers(5, 9))
    net = Net((1, channels, side, side), draw(st.integers(0, 1000)))
    value = "x"
    for index in range(draw(st.integers(1, 5))):
        name = f"v{index}"
        kind = draw(st.sampled_from(["conv", "conv", "depthwise", "pool", "average", "residual", "concat", "batch_norm", "sigmoid"]))
        if kind == "conv":
            filters, stride = draw(st.integers(1, 5)), draw(st.integers(1, 2)) if side > 4 else 1
            value, channels, side = net.conv(value, name, filters, channels, strides=[stride, stride]), filters, (side - 1) // stride + 1
        elif kind == "depthwise":
            value = net.conv(value, name, channels, channels, group=channels)
        elif kind in ("pool", "average") and side >= 4:
            value, side = net.op("MaxPool" if kind == "pool" else "AveragePool", value, name, kernel_shape=[2, 2], strides=[2, 2]), side // 2
        elif kind == "residual":
            value = net.op("Add", f"{value} {net.conv(value, f'{name}_c', channels, channels)}", name)
        elif kind == "concat":
            value, channels = net.op("Concat", f"{value} {net.conv(value, f'{name}_c', 2, channels, kernel=1)}", name, axis=1), channels + 2
        elif kind == "batch_norm":
            parameters = " ".join(net.hold(f"{name}_{part}", channels) for part in ("gamma", "beta", "mean"))
            value = net.op("BatchNormalization", f"{value} {parameters} {net.hold(f'{name}_var', value=np.ones(channels, np.float32))}", name)
        elif kind == "sigmoid":
            value = net.op("Sigmoid", value, name)
        if draw(st.booleans()):
            value = net.op("Relu", value, f"{name}_r")
    pooled = net.op("Flatten", net.op("GlobalAveragePool", value, "gap"), "flat")
    net.op("Gemm", f"{pooled} {net.hold('fc', channels, 3)} {net.hold('fc_b', 3)}", "y")
    return net


@settings(max_examples=40)
@given(networks(), st.sampled_from(SCHEMES), st.booleans())
def test_any_network_of_these_operators_becomes_a_form_close_to_it(net: Net, scheme: str, per_channel: bool) -> None:
    model = net.model("y")
    graph = quantised(model, Recipe(scheme=scheme, per_channel=per_channel))
    assert graph.problems() == []
    assert QuantGraph.from_model(onnx.load_from_string(graph.to_bytes())).digest == graph.digest
    data = samples(model)
    exact, found = float_run(model, data)["y"], graph.outputs[0].dequantise(reference.run(graph, {"x": data})["y"])
    spread = float(np.abs(exact).max())
    assert np.sqrt(np.mean((exact - found) ** 2)) <= 0.12 * spread + (graph.outputs[0].scale or 0)


def mnist() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    folder = SHARED / "mnist"
    if not folder.is_dir():
        pytest.skip("the folder of public data is not beside this checkout")
    with gzip.open(folder / "t10k-images-idx3-ubyte.gz") as images, gzip.open(folder / "t10k-labels-idx1-ubyte.gz") as labels:
        test = np.frombuffer(images.read(), np.uint8)[16:].reshape(-1, 1, 28, 28)[:1000].astype(np.float32)
        truth = np.frombuffer(labels.read(), np.uint8)[8:][:1000]
    return np.load(folder / "mnist_train5k.npz")["images"].reshape(-1, 1, 28, 28).astype(np.float32), test, truth


def test_there_are_these_recipes() -> None:
    assert {"portable", "symmetric", "asymmetric"} <= set(recipe_names())
    assert (load_recipe("portable").scheme, load_recipe("portable").per_channel) == ("power_of_two", False)
    assert (load_recipe("symmetric").scheme, load_recipe("asymmetric").scheme) == ("symmetric", "asymmetric")


@pytest.mark.parametrize(("name", "agreement"), [("portable", 0.993), ("symmetric", 0.997), ("asymmetric", 0.997)])
def test_a_public_digit_network_keeps_its_decisions(name: str, agreement: float) -> None:
    train, test, truth = mnist()
    original = load_onnx(SHARED / "onnx_models" / "mnist_ort_examples.onnx")
    model = prepare_float(original)
    check_equal(original, model)
    recipe = dataclasses.replace(load_recipe(name), calibration_samples=128)
    graph = graph_from_ranges(model, calibrate(model, {"Input3": train}, recipe), recipe)
    assert graph.float_islands == ()
    decided = reference.run(graph, {"Input3": test})["Plus214_Output_0"].argmax(axis=1)
    wanted = float_run(model, test)["Plus214_Output_0"].argmax(axis=1)
    assert (decided == wanted).mean() >= agreement
    assert (decided == truth).mean() >= (wanted == truth).mean() - 0.005


def loosened(graph: QuantGraph) -> onnx.ModelProto:
    """The form as another writer might leave it: no metadata, no quantiser behind an operator that only passes values on."""
    model = onnx.load_from_string(graph.to_bytes())
    del model.metadata_props[:], model.graph.value_info[:]
    writers = {name: node for node in model.graph.node for name in node.output}
    borders = {value.name for value in model.graph.output}
    for node in list(model.graph.node):
        readers = [reader for reader in model.graph.node if node.output[0] in reader.input]
        passes = node.op_type in ("MaxPool", "Concat", "Flatten", "Relu") and writers[node.input[0]].op_type == "DequantizeLinear"
        if not passes or len(readers) != 1 or readers[0].op_type != "QuantizeLinear":
            continue
        dequantisers = [reader for reader in model.graph.node if readers[0].output[0] in reader.input]
        if any(reader.output[0] in borders for reader in dequantisers):
            continue
        removed = {reader.output[0] for reader in dequantisers}
        for reader in model.graph.node:
            for position, name in enumerate(reader.input):
                if name in removed:
                    reader.input[position] = node.output[0]
        for gone in (*dequantisers, readers[0]):
            model.graph.node.remove(gone)
    return model


@settings(max_examples=25)
@given(networks(), st.sampled_from(SCHEMES), st.booleans())
def test_any_form_loosened_comes_back_with_the_same_integers(net: Net, scheme: str, per_channel: bool) -> None:
    graph = quantised(net.model("y"), Recipe(scheme=scheme, per_channel=per_channel))
    again = graph_from_qdq(loosened(graph))
    feeds = {spec.name: spec.quantise(np.random.default_rng(0).standard_normal(spec.shape).astype(np.float32)) for spec in graph.inputs}
    np.testing.assert_array_equal(reference.run(again, feeds)["y"], reference.run(graph, feeds)["y"])
