# SPDX-License-Identifier: Apache-2.0
"""Mutated files and graphs of every operator: the reader names node and rule, or what it accepts runs; it never crashes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from isthmus import reference
from isthmus.errors import IsthmusError, ProblemsError
from isthmus.form import RULES
from isthmus.form_writer import FormWriter
from isthmus.graph import QuantGraph
from isthmus.ops import OPS
from isthmus.recipe import Recipe

# What a mutation may turn an operator into: every row that is an ONNX operator, and some floats.
OPERATORS = {name for name in OPS if name not in ("Requantize", "Silu", "BatchMatMul", "ResizeNearest", "ResizeLinear")} | {
    *("Resize", "Softmax", "Identity", "ArgMax", "LayerNormalization", "GridSample", "Cast", "Constant", "Exp", "Shape", "Gather"),
}
MODELS = sorted((Path(__file__).parents[1] / "models").glob("*.onnx"))


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


def _mutate(data: st.DataObject, model: onnx.ModelProto) -> None:
    """One change of a kind that a faulty writer could make."""
    node = data.draw(st.sampled_from(list(model.graph.node)))
    names = [name for other in model.graph.node for name in other.input] + [""]
    match data.draw(st.sampled_from(["rewire", "drop", "op", "attribute", "unset", "cut", "constant", "swap"])):
        case "rewire" if node.input:
            node.input[data.draw(st.integers(0, len(node.input) - 1))] = data.draw(st.sampled_from(names))
        case "drop":
            model.graph.node.remove(node)
        case "op":
            node.op_type = data.draw(st.sampled_from(sorted(OPERATORS)))
        case "attribute" if node.attribute:
            attribute = data.draw(st.sampled_from(list(node.attribute)))
            attribute.i = data.draw(st.integers(-3, 3))
            attribute.f = data.draw(st.sampled_from([0.0, -1.5, 1e30, np.nan, np.inf]))
            attribute.s = data.draw(st.sampled_from([b"", b"linear", b"nearest", b"cubic", b"asymmetric", b"tanh", b"CRD", b"reflect", b"\xff"]))
            if attribute.ints:
                attribute.ints[data.draw(st.integers(0, len(attribute.ints) - 1))] = data.draw(st.integers(-3, 5))
        case "unset" if node.attribute:
            del node.attribute[data.draw(st.integers(0, len(node.attribute) - 1))]
        case "cut" if node.input:
            del node.input[data.draw(st.integers(0, len(node.input) - 1)) :]
        case "constant" if model.graph.initializer:
            tensor = data.draw(st.sampled_from(list(model.graph.initializer)))
            array = numpy_helper.to_array(tensor).copy()
            if array.size:
                array.reshape(-1)[data.draw(st.integers(0, array.size - 1))] = (
                    data.draw(st.integers(-128, 127) | st.integers(-3, 3))
                    if array.dtype.kind == "i"
                    else data.draw(st.sampled_from([0.0, -1.0, np.nan, np.inf, 2.0**-3, 0.3]))
                )
                tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
        case "swap" if len(model.graph.node) > 1:
            first, second = onnx.NodeProto(), onnx.NodeProto()
            first.CopyFrom(model.graph.node[0])
            second.CopyFrom(model.graph.node[1])
            model.graph.node[0].CopyFrom(second)
            model.graph.node[1].CopyFrom(first)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_mutated_graphs_are_accepted_or_named(data: st.DataObject) -> None:
    model = onnx.load(data.draw(st.sampled_from(MODELS)))
    for _ in range(data.draw(st.integers(1, 2))):
        if model.graph.node:
            _mutate(data, model)
    _accepted_or_named(model)


@pytest.mark.parametrize("file", [file for file in MODELS if "network" not in file.stem and "excite" not in file.stem], ids=lambda file: file.stem)
def test_every_constant_and_attribute_of_every_operator_may_be_wrong(file: Path) -> None:
    """Each number that decides a shape or a scale, one at a time: so that no operator is left to chance."""
    whole = onnx.load(file)
    for index, tensor in enumerate(whole.graph.initializer):
        array = numpy_helper.to_array(tensor)
        if array.size == 0 or (array.dtype.kind == "i" and array.dtype != np.int64 and array.ndim > 1):
            continue
        for value in (0, -1, 1000) if array.dtype.kind == "i" else (0.0, np.nan, 1e30):
            model, changed = onnx.ModelProto(), array.copy()
            model.CopyFrom(whole)
            changed.reshape(-1)[-1] = np.clip(value, *_limits(array.dtype))
            model.graph.initializer[index].CopyFrom(numpy_helper.from_array(changed, tensor.name))
            _accepted_or_named(model)


def _limits(dtype: np.dtype) -> tuple[float, float]:
    return (np.iinfo(dtype).min, np.iinfo(dtype).max) if dtype.kind == "i" else (-np.inf, np.inf)


@st.composite
def graphs(draw: st.DrawFn) -> onnx.ModelProto:
    """A small network of operators that follow each other as they come; whether scales and shapes suit is not asked."""
    scheme = draw(st.sampled_from(["power_of_two", "symmetric", "asymmetric"]))
    writer = FormWriter(Recipe(name=scheme, scheme=scheme))
    random = np.random.default_rng(draw(st.integers(0, 2**16)))
    zero = draw(st.integers(-128, 127)) if scheme == "asymmetric" else 0
    scale = 2.0 ** draw(st.integers(-7, 1)) * (1.0 if scheme == "power_of_two" else 1.1)
    step: dict[str, Any] = {"scale": scale, "zero_point": zero}
    shape = (draw(st.integers(1, 2)), 4, 4, 4)
    x = writer.input("x", shape, **step)
    for _ in range(draw(st.integers(1, 5))):
        x = draw(st.sampled_from(STEPS))(writer, x, random, step)
    writer.output(x, "y")
    return writer.model()


def _weight(random: np.random.Generator, *shape: int) -> np.ndarray:
    return random.integers(-127, 128, shape).astype(np.int8)


def _stored(writer: FormWriter, random: np.random.Generator, step: dict[str, Any], *shape: int) -> str:
    return writer.constant_int8("stored", _weight(random, *shape), **step)


Step = Callable[[FormWriter, str, np.random.Generator, dict[str, Any]], str]
STEPS: tuple[Step, ...] = (
    lambda w, x, r, s: w.conv(x, _weight(r, 4, 4, 3, 3), 2.0**-7, r.integers(-9, 9, 4), pads=(1, 1, 1, 1), activation="Relu", **s),
    lambda w, x, r, s: w.conv_transpose(x, _weight(r, 4, 2, 2, 2), 2.0**-7, None, strides=(2, 2), group=2, **s),
    lambda w, x, r, s: w.matmul(x, _weight(r, 4, 4), 2.0**-7, r.integers(-9, 9, 4), activation=("Clip", -1.0, 1.0), **s),
    lambda w, x, r, s: w.gemm(w.flatten(x), _weight(r, 5, 64), 2.0**-8, None, **s),
    lambda w, x, r, s: w.batch_matmul(x, w.transpose(x, (0, 1, 3, 2)), **s),
    lambda w, x, r, s: w.batch_matmul(_stored(w, r, s, 1, 4, 4, 4), x, **s),
    lambda w, x, r, s: w.add(x, _stored(w, r, s, 1, 4, 1, 1), **s),
    lambda w, x, r, s: w.sub(_stored(w, r, s, 1, 1, 4, 4), x, activation="Relu", **s),
    lambda w, x, r, s: w.mul(x, x, **s),
    lambda w, x, r, s: w.mul(x, w.function("Sigmoid", x, **s), **s),
    lambda w, x, r, s: w.concat([x, _stored(w, r, s, 1, 1, 4, 4)], 1),
    lambda w, x, r, s: w.concat(w.split(x, (1, 3))[::-1], 1),
    lambda w, x, r, s: w.average_pool(x, (2, 2), (1, 1), (0, 0, 1, 1), **s),
    lambda w, x, r, s: w.max_pool(x, (3, 3), (1, 1), (1, 1, 1, 1)),
    lambda w, x, r, s: w.reduce_mean(x, (1,), **s),
    lambda w, x, r, s: w.expand(w.global_average_pool(x, **s), (1, 4, 4, 4)),
    lambda w, x, r, s: w.resize_linear(x, (1, 4, 8, 8), **s),
    lambda w, x, r, s: w.resize_nearest(x, (1, 4, 8, 2)),
    lambda w, x, r, s: w.silu(x, **s),
    lambda w, x, r, s: w.p_relu(x, np.array([0.5, -1, 0, 2]).reshape(4, 1, 1), **s),
    lambda w, x, r, s: w.pad(w.slice(x, (1,), (3,), (2,)), (0, 0, 1, 0, 0, 0, 1, 0), 0.5),
    lambda w, x, r, s: w.depth_to_space(x, 2),
    lambda w, x, r, s: w.space_to_depth(x, 2),
    lambda w, x, r, s: w.squeeze(w.unsqueeze(w.gather(x, (3, 0, 0, 1), 1), (2,)), (2,)),
    lambda w, x, r, s: w.requantize(w.clip(w.relu(x), None, 2.0), **s),
    lambda w, x, r, s: w.reshape(x, (0, -1, 4, 4)),
)


@settings(max_examples=100, deadline=None)
@given(model=graphs(), data=st.data())
def test_networks_are_accepted_or_named_and_come_back_from_a_file_as_they_were(model: onnx.ModelProto, data: st.DataObject) -> None:
    graph = _accepted_or_named(model)
    if graph is not None:
        again = QuantGraph.from_model(onnx.load_from_string(graph.to_bytes()))
        assert (again.digest, again.tensors, again.inputs, again.outputs) == (graph.digest, graph.tensors, graph.inputs, graph.outputs)
        for ours, theirs in zip(graph.nodes, again.nodes, strict=True):
            for field in dataclasses.fields(ours):
                np.testing.assert_equal(getattr(theirs, field.name), getattr(ours, field.name))
    _mutate(data, model)
    _accepted_or_named(model)


def _accepted_or_named(model: onnx.ModelProto) -> QuantGraph | None:
    """Whatever `verify` accepts, the reference runs, and a batch is its samples one by one."""
    try:
        graph = QuantGraph.from_model(model)
    except ProblemsError as error:
        assert all(problem.node and problem.rule in RULES for problem in error.problems), str(error)
        return None
    random = np.random.default_rng(0)
    two = {spec.name: random.integers(-128, 128, (2 * spec.shape[0], *spec.shape[1:])).astype(spec.dtype) for spec in graph.inputs}
    single = [
        reference.run(graph, {spec.name: two[spec.name][index * spec.shape[0] : (index + 1) * spec.shape[0]] for spec in graph.inputs}) for index in range(2)
    ]
    values = reference.run(graph, two)
    assert set(values) == {spec.name for spec in graph.outputs}
    for spec in graph.outputs:
        assert single[0][spec.name].shape == spec.shape
        np.testing.assert_allclose(values[spec.name], np.concatenate([part[spec.name] for part in single]), rtol=1e-6)
    return graph
