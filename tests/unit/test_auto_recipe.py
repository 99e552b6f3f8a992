# SPDX-License-Identifier: Apache-2.0
"""`--recipe auto`: the steps, what stops them, what is said of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import isthmus
from isthmus.auto_recipe import base_recipe, climb, is_auto
from isthmus.dataset import Dataset
from isthmus.errors import IsthmusError, Problem
from isthmus.export.prepare import prepare_float
from isthmus.graph import QuantGraph
from isthmus.post_training import PostTraining


def network(spread: float = 1.0) -> onnx.ModelProto:
    """Three 1x1 convolutions and a head; the inner channels differ by up to `spread` squared."""
    generator = np.random.default_rng(2)
    factor = np.geomspace(1 / spread, spread, 8).astype(np.float32)

    def weight(name: str, filters: int, channels: int) -> np.ndarray:
        held = (generator.standard_normal((filters, channels, 1, 1)) / np.sqrt(channels)).astype(np.float32)
        return held * (factor.reshape(-1, 1, 1, 1) if name in ("w0", "w1") else 1) / (factor.reshape(1, -1, 1, 1) if name in ("w1", "w2") else 1)

    arrays = {"w0": weight("w0", 8, 4), "w1": weight("w1", 8, 8), "w2": weight("w2", 8, 8)}
    arrays["head"] = (generator.standard_normal((6, 128)) / 12).astype(np.float32)
    nodes, value = [], "x"
    for name in ("w0", "w1", "w2"):
        nodes += [helper.make_node("Conv", [value, name], [f"{name}_y"], f"conv_{name}"), helper.make_node("Relu", [f"{name}_y"], [f"{name}_a"])]
        value = f"{name}_a"
    nodes.append(helper.make_node("Flatten", [value], ["f"]))
    nodes.append(helper.make_node("Gemm", ["f", "head"], ["logits"], "head", transB=1))
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 4, 4, 4))],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, (1, 6))],
        [numpy_helper.from_array(np.asarray(array, np.float32), name) for name, array in arrays.items()],
    )
    return prepare_float(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9))


def samples(count: int = 64) -> np.ndarray:
    return np.random.default_rng(9).standard_normal((count, 4, 4, 4)).astype(np.float32)


def data(labels: np.ndarray | None = None) -> Dataset:
    return Dataset({"x": samples()}, labels, "noise")


def quiet(text: str, share: float | None) -> None:
    return None


def accepts(graph: QuantGraph) -> Sequence[Problem]:
    return ()


def refuses_float_layers(graph: QuantGraph) -> Sequence[Problem]:
    return [Problem(name, "operator", "is float", "choose another target") for name in graph.float_islands]


def climbed(
    model: onnx.ModelProto, max_drop: float, check: object = accepts, base: str = "auto", evaluation: Dataset | None = None
) -> tuple[QuantGraph, list[str]]:
    return climb(PostTraining(model, data(), quiet), evaluation or data(), base_recipe(base), max_drop, check, quiet)  # type: ignore[arg-type]


def test_the_words_that_ask_for_it() -> None:
    assert is_auto("auto") and is_auto("auto:symmetric") and not is_auto("portable") and not is_auto(base_recipe("auto"))
    assert (base_recipe("auto").scheme, base_recipe("auto:symmetric").scheme, base_recipe("auto:portable-qat").qat_epochs) == ("power_of_two", "symmetric", 0)
    with pytest.raises(IsthmusError, match="unknown recipe 'best'"):
        base_recipe("auto:best")


def test_an_easy_network_takes_the_first_step() -> None:
    graph, notes = climbed(network(), 0.2)
    assert (graph.recipe.name, graph.recipe.observer, graph.recipe.per_channel, graph.recipe.float_islands) == ("auto", "minmax", False, ())
    assert notes[0] == ("recipe auto: agreement with the float model's decisions (the data has no labels), 1 for float, on 64 samples, at most 0.2 lower")
    assert notes[1].startswith("tried power_of_two, ranges by min-max: ") and re.search(r"dB, \d+\.\d s: holds$", notes[1])


def test_an_uneven_network_climbs_and_stops_at_the_first_that_holds() -> None:
    graph, notes = climbed(network(spread=12.0), 0.04)
    tried = [note for note in notes if note.startswith("tried ")]
    assert len(tried) >= 4 and all(note.endswith("too low") for note in tried[:-1]) and tried[-1].endswith("holds")
    assert graph.recipe.per_channel or graph.recipe.equalise
    assert graph.recipe.float_islands == ()


def test_labels_are_the_measure_where_there_are_any() -> None:
    model, labels = network(), np.zeros(64, np.int64)
    _, notes = climbed(model, 0.2, evaluation=data(labels))
    assert notes[0].startswith("recipe auto: top-1, float 0.")


def test_the_last_steps_keep_the_most_sensitive_layers_float() -> None:
    # Nothing but float layers is accepted: each of the earlier steps is refused in words.
    graph, notes = climbed(network(), 0.2, lambda graph: () if graph.float_islands else [Problem("net", "test", "is all int8", "keep a layer float")])
    assert graph.recipe.float_islands and set(graph.float_islands) >= set(graph.recipe.float_islands)
    assert sum("refused: net: is all int8" in note for note in notes) == 6


def test_a_target_that_takes_no_float_layer_is_said_and_nothing_holds() -> None:
    with pytest.raises(IsthmusError, match="no recipe holds") as caught:
        climbed(network(spread=40.0), 0.0, refuses_float_layers, "auto")
    text = str(caught.value)
    assert text.count("\n  - ") == 7 and "layers kept float: refused: conv_w0: is float [operator]" in text
    assert text.count("too low") == 6 and "Allow a larger --max-drop" in text


@pytest.mark.parametrize("drop", [-0.1, 1.0, float("nan")])
def test_a_drop_that_is_no_share_is_refused(drop: float) -> None:
    with pytest.raises(IsthmusError, match=r"--max-drop .*: expected a share"):
        climbed(network(), drop)


def test_compile_climbs_and_says_so_in_the_manifest(tmp_path: Path) -> None:
    bundle = isthmus.compile(
        network(spread=12.0), targets=["cpu", "rpi5"], data=samples(256), recipe="auto", max_drop=0.1, tune=False, output=tmp_path / "bundle"
    )
    assert bundle.manifest["notes"][0] == "data: 128 samples learnt from, 128 others judged on (drawn with seed 0)"
    assert bundle.manifest["recipe"]["name"] == "auto"
    assert any(note.startswith("tried ") and note.endswith("holds") for note in bundle.manifest["notes"])
    assert all(row["passed"] for name in ("cpu", "rpi5") for row in bundle.artifact(name)["verification"])


def test_compile_refuses_what_makes_no_sense(tmp_path: Path) -> None:
    form = Path(__file__).parents[1] / "models" / "network.onnx"
    with pytest.raises(IsthmusError, match="--max-drop says when --recipe auto may stop"):
        isthmus.compile(network(), data=samples(), max_drop=0.1, tune=False, output=tmp_path / "a")
    with pytest.raises(IsthmusError, match="is int8 already: --recipe auto chooses"):
        isthmus.compile(form, recipe="auto", tune=False, output=tmp_path / "b")
    with pytest.raises(IsthmusError, match="--recipe auto needs samples"):
        isthmus.compile(network(), recipe="auto", tune=False, output=tmp_path / "c")
