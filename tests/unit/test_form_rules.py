# SPDX-License-Identifier: Apache-2.0
"""Every rule of the form is broken once, on purpose, and the reader names it; mutated files never crash it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from isthmus import reference
from isthmus.errors import IsthmusError, ProblemsError
from isthmus.form import ISLANDS_KEY, RECIPE_KEY, RULES
from isthmus.form_writer import FormWriter
from isthmus.graph import QuantGraph
from isthmus.recipe import Recipe

MODELS = sorted((Path(__file__).parents[1] / "models").glob("*.onnx"))
Break = Callable[[onnx.ModelProto], None]


def _valid(recipe: Recipe | None = None) -> onnx.ModelProto:
    writer = FormWriter(recipe)
    x = writer.input("x", (1, 2, 4, 4), scale=2.0**-4)
    rng = np.random.default_rng(0)
    y = writer.conv(x, rng.integers(-127, 128, (2, 2, 3, 3)), 2.0**-7, rng.integers(-9, 9, 2), scale=2.0**-3, pads=(1, 1, 1, 1), activation="Relu", name="conv")
    y = writer.flatten(writer.max_pool(y, (2, 2), name="pool"))
    writer.softmax_output(writer.gemm(y, rng.integers(-127, 128, (3, 8)), 2.0**-7, None, scale=2.0**-2, name="fc"), "y")
    return writer.model()


def _constant(model: onnx.ModelProto, name: str, array: np.ndarray) -> None:
    found = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    found.CopyFrom(numpy_helper.from_array(array, name))


def _node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == name)


def _quantiser(model: onnx.ModelProto, name: str, position: int, array: np.ndarray) -> None:
    """Gives a Q or DQ a scale (1) or zero point (2) of its own."""
    node = _node(model, name)
    model.graph.initializer.append(numpy_helper.from_array(array, f"{name}_broken{position}"))
    node.input[position] = f"{name}_broken{position}"


def _both_quantisers(model: onnx.ModelProto, position: int, array: np.ndarray) -> None:
    for name in ("fc_q_quantise", "fc_q_dequantise"):
        _quantiser(model, name, position, array)


def _set_meta(model: onnx.ModelProto, key: str, value: str | None) -> None:
    entries = [(entry.key, value if entry.key == key else entry.value) for entry in model.metadata_props]
    del model.metadata_props[:]
    helper.set_model_props(model, {name: text for name, text in entries if text is not None})


def _attribute(model: onnx.ModelProto, node: str, **attributes: object) -> None:
    found = _node(model, node)
    kept = [attribute for attribute in found.attribute if attribute.name not in attributes]
    del found.attribute[:]
    found.attribute.extend([*kept, *(helper.make_attribute(name, value) for name, value in attributes.items() if value is not None)])


def _bypass(model: onnx.ModelProto, node: str, reads: str) -> None:
    _node(model, node).input[0] = reads


def _control_flow(model: onnx.ModelProto) -> None:
    body = helper.make_graph([helper.make_node("Identity", ["x"], ["b"])], "body", [], [helper.make_tensor_value_info("b", 1, None)])
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    model.graph.node.append(helper.make_node("If", ["yes"], ["chosen"], "if", then_branch=body, else_branch=body))


def _set_flat(model: onnx.ModelProto) -> None:
    """The pool is 2x3 now."""
    _constant(model, "fc_weight_int", np.ones((3, 12), np.int8))


def _big_weights(model: onnx.ModelProto) -> None:
    _constant(model, "conv_bias_int", np.full(2, 2**31 - 5, np.int32))


BREAKS: dict[str, tuple[str, Break]] = {
    "not onnx inside": ("onnx-checker", lambda m: m.graph.node[0].ClearField("output")),
    "shapes do not fit": ("onnx-checker", lambda m: _constant(m, "fc_weight_int", np.ones((3, 9), np.int8))),
    "older opset": ("version", lambda m: setattr(m.opset_import[0], "version", 17)),
    "no recipe": ("metadata", lambda m: _set_meta(m, RECIPE_KEY, None)),
    "recipe of another schema": ("metadata", lambda m: _set_meta(m, RECIPE_KEY, json.dumps({"schema": 99}))),
    "islands are no list": ("metadata", lambda m: _set_meta(m, ISLANDS_KEY, "7")),
    "custom operator": ("domain", lambda m: setattr(_node(m, "pool"), "domain", "com.example")),
    "control flow": ("subgraph", _control_flow),
    "dynamic batch": ("static-shape", lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[0], "dim_param", "N") or m.graph.ClearField("value_info")),
    "double input": ("onnx-checker", lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", onnx.TensorProto.INT8)),
    "uint8 activation": ("quantiser-dtype", lambda m: _both_quantisers(m, 2, np.array(0, np.uint8)) or m.graph.ClearField("value_info")),
    "per-channel activation": ("quantiser-dtype", lambda m: _both_quantisers(m, 2, np.zeros(3, np.int8)) or _both_quantisers(m, 1, np.ones(3, np.float32))),
    "zero scale": ("quantiser-scale", lambda m: _both_quantisers(m, 1, np.array(0, np.float32))),
    "infinite scale": ("quantiser-scale", lambda m: _both_quantisers(m, 1, np.array(np.inf, np.float32))),
    "scale is no power of two": ("scheme", lambda m: _both_quantisers(m, 1, np.array(0.3, np.float32))),
    "zero point in portable": ("scheme", lambda m: _both_quantisers(m, 2, np.array(3, np.int8))),
    "weight scale is no power of two": ("scheme", lambda m: _constant(m, "fc_weight_scale", np.array(0.3, np.float32))),
    "dequantised with another scale": ("dequantiser", lambda m: _quantiser(m, "fc_q_dequantise", 1, np.array(0.5, np.float32))),
    "weight zero point": ("weight", lambda m: _constant(m, "fc_weight_zero", np.array(1, np.int8))),
    "scales along the wrong axis": (
        "weight",
        lambda m: (
            _constant(m, "fc_weight_scale", np.full(8, 2.0**-7, np.float32))
            or _constant(m, "fc_weight_zero", np.zeros(8, np.int8))
            or _attribute(m, "fc_weight_dequantise", axis=1)
        ),
    ),
    "bias scale": ("bias", lambda m: _constant(m, "conv_bias_scale", np.array(1.0, np.float32))),
    "accumulator": ("accumulator-overflow", _big_weights),
    "reads a float": ("operand", lambda m: _bypass(m, "conv", "x")),
    "auto_pad": ("attributes", lambda m: _attribute(m, "conv", auto_pad="SAME_UPPER", pads=None)),
    "no kernel_shape": ("attributes", lambda m: _attribute(m, "conv", kernel_shape=None)),
    "Gemm alpha": ("attributes", lambda m: _attribute(m, "fc", alpha=2.0)),
    "a window of padding alone": (
        "attributes",
        lambda m: _attribute(m, "pool", kernel_shape=[2, 2], strides=[2, 2], pads=[0, 0, 0, 1], ceil_mode=1) or m.graph.ClearField("value_info") or _set_flat(m),
    ),
    "pool changes scale": (
        "passes-scale",
        lambda m: _quantiser(m, "pool_q_quantise", 1, np.array(2.0**-2, np.float32)) or _quantiser(m, "pool_q_dequantise", 1, np.array(2.0**-2, np.float32)),
    ),
    "island not listed": ("float-island", lambda m: _set_meta(m, ISLANDS_KEY, "[]")),
    "island listed twice over": ("float-island", lambda m: _set_meta(m, ISLANDS_KEY, json.dumps(["y_softmax", "nobody"]))),
}


def test_the_valid_model_is_valid() -> None:
    graph = QuantGraph.from_model(_valid())
    assert [node.op for node in graph.nodes if node.kind == "int8"] == ["Conv", "MaxPool", "Flatten", "Gemm"]
    assert graph.float_islands == ("y_softmax",)
    graph.verify()


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_rule_is_named(name: str) -> None:
    rule, broke = BREAKS[name]
    model = _valid()
    broke(model)
    with pytest.raises(ProblemsError) as caught:
        QuantGraph.from_model(model)
    assert rule in {problem.rule for problem in caught.value.problems}, str(caught.value)
    assert all(problem.node and problem.found and problem.fix for problem in caught.value.problems)


def test_every_rule_is_broken_by_a_test() -> None:
    # A border that is not float32 is caught by onnx's own type check first; the rule stands for models without quantisers at the border.
    assert set(RULES) - {rule for rule, _ in BREAKS.values()} == {"border-dtype"}


def test_integer_border_is_refused() -> None:
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"], "id")],
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.INT64, [1])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.INT64, [1])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    helper.set_model_props(model, {RECIPE_KEY: Recipe().to_json(), ISLANDS_KEY: '["id"]'})
    with pytest.raises(ProblemsError, match="border-dtype"):
        QuantGraph.from_model(model)


@pytest.mark.parametrize("file", MODELS, ids=lambda file: file.stem)
def test_writing_and_reading_is_the_identity(file: Path, tmp_path: Path) -> None:
    graph = QuantGraph.load(file)
    graph.save(tmp_path / "again.onnx")
    again = QuantGraph.load(tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == graph.to_bytes()
    assert again.digest == graph.digest
    assert (again.inputs, again.outputs, again.tensors, again.recipe) == (graph.inputs, graph.outputs, graph.tensors, graph.recipe)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damaged_bytes_never_crash_the_reader(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    raw = bytearray(data.draw(st.sampled_from(MODELS)).read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    end = data.draw(st.one_of(st.none(), st.integers(0, len(raw))))
    file = tmp_path_factory.mktemp("damaged") / "model.onnx"
    file.write_bytes(bytes(raw[:end]))
    try:
        graph = QuantGraph.load(file)
    except IsthmusError:
        return
    reference.run(graph, {spec.name: np.zeros(spec.shape, spec.dtype) for spec in graph.inputs})


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_mutated_graphs_are_accepted_or_named(data: st.DataObject) -> None:
    """Whatever `verify` accepts, the reference runs."""
    model = onnx.load(data.draw(st.sampled_from(MODELS)))
    node = data.draw(st.sampled_from(list(model.graph.node)))
    names = [name for other in model.graph.node for name in other.input] + [""]
    match data.draw(st.sampled_from(["rewire", "drop", "op", "attribute", "constant", "swap"])):
        case "rewire" if node.input:
            node.input[data.draw(st.integers(0, len(node.input) - 1))] = data.draw(st.sampled_from(names))
        case "drop":
            model.graph.node.remove(node)
        case "op":
            node.op_type = data.draw(
                st.sampled_from(["Conv", "Gemm", "Relu", "Clip", "Add", "MaxPool", "AveragePool", "Concat", "Flatten", "Reshape", "Softmax", "Identity"])
            )
        case "attribute" if node.attribute:
            attribute = data.draw(st.sampled_from(list(node.attribute)))
            attribute.i = data.draw(st.integers(-3, 3))
            if attribute.ints:
                attribute.ints[0] = data.draw(st.integers(-3, 5))
        case "constant" if model.graph.initializer:
            tensor = data.draw(st.sampled_from(list(model.graph.initializer)))
            array = numpy_helper.to_array(tensor).copy()
            if array.size:
                array.reshape(-1)[0] = (
                    data.draw(st.integers(-128, 127)) if array.dtype.kind == "i" else data.draw(st.sampled_from([0.0, -1.0, np.nan, np.inf, 2.0**-3, 0.3]))
                )
                tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
        case "swap" if len(model.graph.node) > 1:
            first, second = onnx.NodeProto(), onnx.NodeProto()
            first.CopyFrom(model.graph.node[0])
            second.CopyFrom(model.graph.node[1])
            model.graph.node[0].CopyFrom(second)
            model.graph.node[1].CopyFrom(first)
    try:
        graph = QuantGraph.from_model(model)
    except ProblemsError as error:
        assert all(problem.node and problem.rule in RULES for problem in error.problems), str(error)
        return
    values = reference.run(graph, {spec.name: np.ones(spec.shape, spec.dtype) for spec in graph.inputs})
    assert set(values) == {spec.name for spec in graph.outputs}
