# SPDX-License-Identifier: Apache-2.0
"""Recipes that differ from layer to layer, layers kept float, equalisation and bias correction."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import isthmus
from isthmus import reference
from isthmus.artifact import tail_gain
from isthmus.dataset import Dataset
from isthmus.errors import IsthmusError, ProblemsError
from isthmus.export.check import check_equal
from isthmus.export.prepare import prepare_float
from isthmus.float_model import run_float
from isthmus.graph import QuantGraph
from isthmus.post_training import PostTraining, outputs_of
from isthmus.profile import load_profile
from isthmus.quantize.equalise import equalise
from isthmus.recipe import ROUNDINGS, Override, Recipe, load_recipe
from isthmus.registry import load_target

TOML = """
schema = 1
name = "mine"
weight_bits = 7
float_islands = ["head*"]
equalise = true
bias_correction = true
[[overrides]]
layers = "stem*"
per_channel = true
observer = "percentile"
percentile = 99
[[overrides]]
layers = "*"
weight_bits = 4
"""


def network(activation: str = "Relu", uneven: bool = False, bias: bool = True) -> onnx.ModelProto:
    """stem (3x3) -> depthwise (3x3) -> point (1x1) -> pooled -> head; `uneven`: channels of the depthwise layer differ by up to 64 times."""
    generator = np.random.default_rng(5)

    def held(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array((generator.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32), name)

    constants = [held("ws", 8, 3, 3, 3), held("wd", 8, 1, 3, 3), held("wp", 12, 8, 1, 1), held("wh", 5, 12)]
    constants += [held(name, size) for name, size in (("bs", 8), ("bd", 8), ("bp", 12), ("bh", 5))]
    if uneven:
        spread = np.float32(2.0) ** np.linspace(-3, 3, 8, dtype=np.float32)
        constants[1] = numpy_helper.from_array(numpy_helper.to_array(constants[1]) * spread.reshape(-1, 1, 1, 1), "wd")
        constants[2] = numpy_helper.from_array(numpy_helper.to_array(constants[2]) / spread.reshape(1, -1, 1, 1), "wp")
    constants += [numpy_helper.from_array(np.float32(value), name) for name, value in (("low", 0.0), ("high", 1.5))]
    limits = ["low", "high"] if activation == "Clip" else []

    def conv(name: str, x: str, weight: str, bias_name: str, **attributes: object) -> list[onnx.NodeProto]:
        inputs = [x, weight, bias_name] if bias else [x, weight]
        return [
            helper.make_node("Conv", inputs, [f"{name}_y"], name, **attributes),
            helper.make_node(activation, [f"{name}_y", *limits], [f"{name}_a"], f"{name}_act"),
        ]

    nodes = [
        *conv("stem", "image", "ws", "bs", pads=[1] * 4),
        *conv("depthwise", "stem_a", "wd", "bd", pads=[1] * 4, group=8),
        *conv("point", "depthwise_a", "wp", "bp"),
    ]
    nodes += [helper.make_node("GlobalAveragePool", ["point_a"], ["pooled"], "pool"), helper.make_node("Flatten", ["pooled"], ["flat"], "flat")]
    nodes.append(helper.make_node("Gemm", ["flat", "wh", "bh"] if bias else ["flat", "wh"], ["logits"], "head", transB=1))
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, (1, 3, 8, 8))],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, (1, 5))],
        [constant for constant in constants if constant.name in used],
    )
    return prepare_float(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9))


def data(count: int = 48) -> Dataset:
    return Dataset({"image": np.random.default_rng(7).standard_normal((count, 3, 8, 8)).astype(np.float32)}, None, "noise")


def quiet(text: str, share: float | None) -> None:
    return None


def made(model: onnx.ModelProto, recipe: Recipe) -> QuantGraph:
    return PostTraining(model, data(), quiet).graph(recipe)[0]


def noise(model: onnx.ModelProto, recipe: Recipe) -> float:
    """Mean squared error of the form's outputs, relative to their power."""
    samples = data(64)
    exact, found = run_float(model, samples.samples)["logits"], outputs_of(made(model, recipe), samples)["logits"]
    return float(np.square(exact - found).mean() / np.square(exact).mean())


# ---- the recipe as data
def test_a_recipe_with_everything_survives_toml_and_json(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(TOML)
    recipe = load_recipe(str(tmp_path / "mine.toml"))
    assert recipe.overrides == (Override("stem*", per_channel=True, observer="percentile", percentile=99), Override("*", weight_bits=4))
    assert (recipe.float_islands, recipe.equalise, recipe.bias_correction, recipe.weight_bits) == (("head*",), True, True, 7)
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert recipe.for_layer("stem.1") == replace(recipe, per_channel=True, observer="percentile", percentile=99, weight_bits=4)
    assert recipe.for_layer("body") == replace(recipe, weight_bits=4)
    assert hash(recipe) == hash(Recipe.from_json(recipe.to_json()))


def test_a_recipe_without_the_later_fields_is_written_without_them() -> None:
    assert set(Recipe().to_dict()) == {
        *("name", "scheme", "per_channel", "observer", "percentile", "calibration_samples", "qat_epochs", "qat_learning_rate", "seed"),
    }


def test_edge_bits_are_overrides_in_front_of_the_others() -> None:
    recipe = Recipe(weight_bits=4, edge_weight_bits=8, overrides=(Override("last", weight_bits=6),))
    resolved = recipe.with_edges(["first[0]", "middle", "last"])
    assert [resolved.for_layer(name).weight_bits for name in ("first[0]", "middle", "last")] == [8, 4, 6]
    assert resolved.edge_weight_bits == 0 and Recipe(weight_bits=4, edge_weight_bits=7).with_edges(["only"]).for_layer("only").weight_bits == 7
    with pytest.raises(IsthmusError, match=r"edge_weight_bits 9 is not between 2 and 8 \(0: as weight_bits\)"):
        Recipe(edge_weight_bits=9)
    with pytest.raises(IsthmusError, match="rounding 'up' is not one of nearest, gptq, learned"):
        Recipe(rounding="up")


patterns = st.text(max_size=8)
overrides = st.builds(
    Override,
    layers=patterns,
    per_channel=st.none() | st.booleans(),
    weight_bits=st.none() | st.integers(2, 8),
    observer=st.none() | st.sampled_from(["minmax", "percentile", "mse"]),
    percentile=st.none() | st.floats(51, 100),
)


@given(
    st.builds(
        Recipe,
        weight_bits=st.integers(2, 8),
        edge_weight_bits=st.sampled_from([0, 2, 8]),
        rounding=st.sampled_from(ROUNDINGS),
        overrides=st.lists(overrides, max_size=3).map(tuple),
        float_islands=st.lists(patterns, max_size=3).map(tuple),
    )
)
def test_any_recipe_survives_json(recipe: Recipe) -> None:
    assert Recipe.from_json(recipe.to_json()) == recipe


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"overrides": {}}, r"field 'overrides' expects a list of tables"),
        ({"overrides": [{"observer": "mse"}]}, r"override 1: expected a table with 'layers'"),
        ({"overrides": [{"layers": "*", "bits": 4}]}, r"override 1: unknown field 'bits'; there are layers, per_channel, weight_bits"),
        ({"overrides": [{"layers": "*", "per_channel": 1}]}, r"override 1: field 'per_channel' expects bool, found 1"),
        ({"overrides": [{"layers": "*", "observer": "best"}]}, r"observer 'best' is not one of .* \(in the override of '\*'\)"),
        ({"overrides": [{"layers": "*", "weight_bits": 9}]}, r"weight_bits 9 is not between 2 and 8"),
        ({"float_islands": "head"}, r"field 'float_islands' expects a list of layer name patterns"),
        ({"float_islands": [1]}, r"field 'float_islands' expects a list of layer name patterns"),
    ],
)
def test_a_wrong_override_is_named(fields: dict[str, object], message: str) -> None:
    with pytest.raises(IsthmusError, match=message):
        Recipe.from_dict({"schema": 1} | fields, "recipe r")


def test_a_pattern_that_matches_nothing_is_a_mistake() -> None:
    with pytest.raises(IsthmusError, match=r"pattern 'haed' matches no layer of the prepared model; its layers are stem, "):
        made(network(), Recipe(float_islands=("haed",)))


# ---- overrides
def test_an_override_changes_its_layer_and_no_other() -> None:
    model = network()
    plain, changed = made(model, Recipe()), made(model, Recipe(overrides=(Override("point", per_channel=True, weight_bits=4),)))
    for before, after in zip(plain.nodes, changed.nodes, strict=True):
        if before.name == "point":
            assert after.weight is not None and np.abs(after.weight).max() <= 7 and after.weight_scale is not None and after.weight_scale.size == 12
        elif before.weight is not None:
            assert np.array_equal(before.weight, after.weight)
    assert changed.recipe.overrides[0].layers == "point"


def test_the_observer_of_a_layer_holds_behind_its_activation() -> None:
    model = network()
    narrow = made(model, Recipe(scheme="symmetric", overrides=(Override("stem", observer="percentile", percentile=90),)))
    plain = made(model, Recipe(scheme="symmetric"))

    def scale(graph: QuantGraph, name: str) -> float:
        return next(float(graph.tensors[node.output].scale or 0) for node in graph.nodes if node.name == name)

    assert scale(narrow, "stem") < 0.8 * scale(plain, "stem")
    assert scale(narrow, "point") == scale(plain, "point")


# ---- float islands
def test_a_layer_kept_float_is_an_island_that_every_part_knows(tmp_path: Path) -> None:
    model, recipe = network(), Recipe(float_islands=("depthwise*",))
    graph = made(model, recipe)
    graph.verify()
    assert graph.float_islands == ("depthwise", "depthwise_act")
    assert {node.op for node in graph.nodes if node.kind == "float"} == {"Conv", "Relu"}
    samples = data(4)
    raw = reference.run(graph, {"image": graph.inputs[0].quantise(samples.samples["image"])})["logits"]
    assert np.abs(graph.outputs[0].dequantise(raw) - outputs_of(graph, samples)["logits"]).max() <= float(graph.outputs[0].scale or 0)
    bundle = isthmus.compile(model, targets=["cpu"], data=data().samples["image"], recipe=recipe, tune=False, output=tmp_path / "bundle")
    row = bundle.artifact("cpu")["verification"][0]
    assert row["passed"] and row["max_lsb"] <= 1 and bundle.manifest["graph"]["float_islands"] == ["depthwise", "depthwise_act"]
    for name in ("pynq-z2",):
        profile = load_profile(name)
        problems = [problem for problem in load_target(profile.target).check(graph, profile) if problem.node == "depthwise"]
        assert problems and "Conv (float)" in problems[0].found


def test_a_float_head_behind_a_float_layer_may_enlarge_the_step_that_came_before_it(tmp_path: Path) -> None:
    model, recipe = network(), Recipe(float_islands=("depthwise*", "head"))
    graph = made(model, recipe)
    head = next(node.constants[1] for node in graph.nodes if node.name == "head")
    assert head.shape == (5, 12) and tail_gain(graph) == pytest.approx(float(np.abs(head).sum(axis=1).max())) and tail_gain(graph) > 1
    assert tail_gain(made(model, Recipe())) == 1.0
    bundle = isthmus.compile(model, targets=["cpu"], data=data().samples["image"], recipe=recipe, tune=False, output=tmp_path / "bundle")
    assert bundle.artifact("cpu")["verification"][0]["passed"]


def test_an_activation_alone_can_stay_float() -> None:
    graph = made(network(), Recipe(float_islands=("stem_act",)))
    assert graph.float_islands == ("stem_act",)


def test_everything_float_is_nothing_to_quantise() -> None:
    with pytest.raises(ProblemsError, match="nothing-to-quantise"):
        made(network(), Recipe(float_islands=("*",)))


# ---- equalisation
def test_equalisation_is_the_same_function_with_even_channels() -> None:
    model = network(uneven=True)
    evened, pairs = equalise(model)
    assert pairs == 2 and check_equal(model, evened, tolerance=1e-5) < 1e-5
    depthwise = next(numpy_helper.to_array(t) for t in evened.graph.initializer if t.name == "wd")
    peaks = np.abs(depthwise).max(axis=(1, 2, 3))
    assert peaks.max() / peaks.min() < 8
    assert noise(model, Recipe(equalise=True)) < 0.5 * noise(model, Recipe())


def test_a_clip_ends_the_chain() -> None:
    model = network("Clip")
    evened, pairs = equalise(model)
    assert pairs == 0 and evened.SerializeToString() == model.SerializeToString()


# ---- bias correction
@pytest.mark.parametrize("bias", [True, False])
def test_bias_correction_changes_biases_alone_and_takes_the_mean_error_away(bias: bool) -> None:
    model = network(bias=bias)
    recipe = Recipe(weight_bits=4)
    plain, corrected = made(model, recipe), made(model, replace(recipe, bias_correction=True))
    for before, after in zip(plain.nodes, corrected.nodes, strict=True):
        assert replace(before, bias=None, weight=None, weight_scale=None).inputs == after.inputs
        assert before.weight is None or (np.array_equal(before.weight, after.weight) and np.array_equal(before.weight_scale, after.weight_scale))  # type: ignore[arg-type]
    assert all(plain.tensors[name] == spec for name, spec in corrected.tensors.items())
    samples = data(48)
    exact = run_float(model, samples.samples)["logits"]
    errors = [np.abs((outputs_of(graph, samples)["logits"] - exact).mean(axis=0)).max() for graph in (plain, corrected)]
    assert errors[1] < 0.5 * errors[0]
    assert errors[1] <= float(corrected.outputs[0].scale or 0)
