# SPDX-License-Identifier: Apache-2.0
"""Parts of the form: each is the form again, and the two halves of a cut together compute what the whole did, on every tiny model."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus import reference
from isthmus.cut import border_name, crossing, extract, split
from isthmus.errors import IsthmusError
from isthmus.form_writer import FormWriter
from isthmus.graph import QuantGraph
from isthmus.recipe import Recipe

MODELS = sorted((Path(__file__).parents[1] / "models").glob("*.onnx"))
SAMPLES = 3


def model(name: str) -> QuantGraph:
    return QuantGraph.load(Path(__file__).parents[1] / "models" / f"{name}.onnx")


def samples(graph: QuantGraph) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(1)
    feeds = {}
    for spec in graph.inputs:
        shape = (SAMPLES * spec.shape[0], *spec.shape[1:])
        feeds[spec.name] = generator.integers(-128, 128, shape, np.int8) if spec.is_quantised else generator.standard_normal(shape).astype(np.float32)
    return feeds


def cuttable(graph: QuantGraph) -> list[str]:
    """int8 tensors that a node writes from others."""
    return [name for node in graph.nodes if node.inputs for name in node.outputs if graph.tensors[name].dtype == "int8"]


def check_halves(graph: QuantGraph, tensors: list[str]) -> None:
    feeds = samples(graph)
    whole, every = reference.run(graph, feeds), reference.run_all(graph, feeds)
    head, rest = split(graph, tensors)
    for half in (head, rest):
        assert half.problems() == []
        assert QuantGraph.from_model(half.model).to_bytes() == half.to_bytes()
    first = reference.run(head, {spec.name: feeds[spec.name] for spec in head.inputs})
    for name in tensors:
        np.testing.assert_array_equal(first[border_name(graph, name)], every[name])
    assert {spec.name for spec in rest.inputs} == {border_name(graph, name) for name in tensors}
    second = reference.run(rest, {spec.name: first[spec.name] for spec in rest.inputs})
    assert {*first, *second} == {*whole, *(border_name(graph, name) for name in tensors)}
    for name, array in whole.items():
        np.testing.assert_array_equal((second if name in second else first)[name], array)


@pytest.mark.parametrize("file", MODELS, ids=lambda file: file.stem)
def test_halves_together_are_the_whole(file: Path) -> None:
    graph = QuantGraph.load(file)
    for name in cuttable(graph)[:-1] or cuttable(graph):  # behind the last is only a border
        tensors = [name, *crossing(graph, [name])]
        assert crossing(graph, tensors) == []
        check_halves(graph, tensors)


@settings(max_examples=25)
@given(st.data())
def test_any_set_of_tensors_completed_is_a_cut(data: st.DataObject) -> None:
    graph = model(
        data.draw(st.sampled_from(["network", "residual", "squeeze_excite", "split", "concat", "batch_matmul", "softmax_island", "network_asymmetric"]))
    )
    tensors = data.draw(st.lists(st.sampled_from(cuttable(graph)), min_size=1, max_size=3, unique=True))
    while extra := crossing(graph, tensors):
        tensors += extra
    while (idle := idle_tensor(graph, tensors)) is not None:
        tensors.remove(idle)
    check_halves(graph, tensors)


def idle_tensor(graph: QuantGraph, tensors: list[str]) -> str | None:
    """The one that `split` says nothing behind the cut reads."""
    try:
        split(graph, tensors)
    except IsthmusError as error:
        named = re.fullmatch("nothing behind the cut reads '(.*)': leave it out", str(error))
        assert named is not None, str(error)
        return named[1]
    return None


@settings(max_examples=40)
@given(st.data())
def test_a_part_computes_what_the_whole_did(data: st.DataObject) -> None:
    """`extract` between any tensors: fed by the reference's values, it gives the reference's values, or says what does not depend on what."""
    graph = QuantGraph.load(data.draw(st.sampled_from(MODELS)))
    names = cuttable(graph)
    outputs = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True))
    inputs = [name for name in data.draw(st.lists(st.sampled_from(names), max_size=2, unique=True)) if name not in outputs]
    feeds = samples(graph)
    every = reference.run_all(graph, feeds)
    try:
        part = extract(graph, outputs, inputs)
    except IsthmusError as error:
        assert "depends on" in str(error)
        return
    given_here = feeds | {border_name(graph, name): every[name] for name in inputs}
    result = reference.run(part, {spec.name: given_here[spec.name] for spec in part.inputs})
    for name in outputs:
        np.testing.assert_array_equal(result[border_name(graph, name)], every[name])


def test_a_single_layer_keeps_its_weights_and_nothing_else() -> None:
    graph = model("network")
    node = next(node for node in graph.nodes if node.name == "conv_2")
    part = extract(graph, [node.output], list(node.inputs))
    inside = [other for other in part.nodes if other.kind == "int8"]
    assert [other.name for other in inside] == ["conv_2"]
    assert inside[0].weight is not None and node.weight is not None
    np.testing.assert_array_equal(inside[0].weight, node.weight)
    assert (inside[0].clamp, inside[0].attributes) == (node.clamp, node.attributes)
    assert len(part.to_bytes()) < len(graph.to_bytes())


def test_a_float_island_can_be_the_border() -> None:
    graph = model("softmax_island")
    island = next(node for node in graph.nodes if node.kind == "float")
    check_halves_float(graph, island.output)


def check_halves_float(graph: QuantGraph, tensor: str) -> None:
    feeds = samples(graph)
    head, rest = split(graph, [tensor])
    first = reference.run(head, feeds)
    second = reference.run(rest, {tensor: first[tensor]})
    for name, array in reference.run(graph, feeds).items():
        np.testing.assert_array_equal(second[name], array)
    assert head.float_islands == graph.float_islands and rest.float_islands == ()


def two_branches() -> QuantGraph:
    w = FormWriter(recipe=Recipe())
    x = w.input("x", (1, 2, 4, 4), scale=2.0**-4)
    y = w.conv(x, np.ones((2, 2, 1, 1), np.int8), 2.0**-4, scale=2.0**-4, name="stem")
    w.output(w.relu(y, name="left"), "a")
    w.output(w.global_average_pool(y, scale=2.0**-4, name="right"), "b")
    return w.graph()


def test_an_output_beside_the_cut_stays_with_the_first_half() -> None:
    graph = two_branches()
    left = next(node.output for node in graph.nodes if node.name == "left")
    head, rest = split(graph, [left])
    assert [spec.name for spec in head.outputs] == [border_name(graph, left), "b"]
    assert [spec.name for spec in rest.outputs] == ["a"]


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        (["nowhere"], r"the graph has no tensor 'nowhere': its int8 tensors are x_quantised, conv_q, conv_2_q, add_q"),
        (["x"], r"'x' is an input of the graph: cut at a tensor that a layer writes"),
        (["conv_2_q"], r"a cut at 'conv_2_q' is not the whole cut: 'x_quantised' crosses it too; name it as well, or cut elsewhere"),
        (["y"], r"'y' is 'add_q' in real numbers: cut at 'add_q'"),
    ],
)
def test_what_is_no_cut_is_said(tensors: list[str], sentence: str) -> None:
    with pytest.raises(IsthmusError, match=sentence):
        split(model("residual"), tensors)


def test_parts_that_make_no_sense_are_said() -> None:
    graph = two_branches()
    left, right = (next(node.output for node in graph.nodes if node.name == name) for name in ("left", "right"))
    with pytest.raises(IsthmusError, match="needs at least one output"):
        extract(graph, [])
    with pytest.raises(IsthmusError, match=f"'{left}' is asked for as input and as output"):
        extract(graph, [left, right], [left])
    with pytest.raises(IsthmusError, match=f"none of the outputs '{left}' depends on '{right}'"):
        extract(graph, [left], [right])


def test_whole_numbers_are_no_border() -> None:
    with pytest.raises(IsthmusError, match="'y_index' is int64, and a border is int8 or float32"):
        split(model("argmax_tail"), ["y_index"])
