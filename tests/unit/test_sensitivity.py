# SPDX-License-Identifier: Apache-2.0
"""`isthmus sensitivity`: the figures, the table, the page, the command."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from isthmus import cli
from isthmus.errors import IsthmusError
from isthmus.quantize.sensitivity import Sensitivity, sensitivity, sqnr_db
from isthmus.recipe import Recipe
from isthmus.report.sensitivity import render_sensitivity
from isthmus.sensitivity_model import sensitivity_of, sensitivity_table

ERRORS = {"a": 0.5, "b": 0.1, "c": 0.0}


def synthetic(metric: str = "sqnr", labels: np.ndarray | None = None) -> Sensitivity:
    """Layer by layer an error of known size on the first of two outputs."""
    exact = {"y": np.eye(4, dtype=np.float32), "z": np.zeros((4, 1), np.float32)}

    def outputs_with(kept_float: Collection[str]) -> dict[str, np.ndarray]:
        return {"y": exact["y"] + sum(error for name, error in ERRORS.items() if name not in kept_float), "z": exact["z"]}

    return sensitivity(list(ERRORS), outputs_with, exact, labels, metric)


def network(weights: int = 3) -> onnx.ModelProto:
    """Gemm layers; in the second, the weights of an input that is always zero are so large that all others are rounded to nothing."""
    generator = np.random.default_rng(3)
    nodes, constants, value = [], [], "x"
    for index in range(weights):
        weight = generator.standard_normal((6, 6)).astype(np.float32)
        if index == 0:
            weight[0] = 0
        if index == 1:
            weight[:, 0] = 200
        constants.append(numpy_helper.from_array(weight, f"w{index}"))
        nodes.append(helper.make_node("Gemm", [value, f"w{index}"], [f"y{index}"], f"layer{index}", transB=1))
        value = f"y{index}"
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 6))],
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, (1, 6))],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def samples(count: int = 32) -> np.ndarray:
    return np.random.default_rng(4).standard_normal((count, 6)).astype(np.float32)


def test_the_figures_are_what_was_put_in() -> None:
    result = synthetic()
    assert [row.name for row in result.layers] == ["a", "b", "c"]
    # 4 ones against 16 errors of 0.5: power 4, error 4.
    assert result.layers[0].alone.sqnr_db == pytest.approx(0.0)
    assert result.layers[1].alone.sqnr_db == pytest.approx(10 * math.log10(4 / 0.16))
    assert result.layers[2].alone.sqnr_db == math.inf
    assert result.layers[0].spared is not None and result.layers[0].spared.sqnr_db == pytest.approx(result.layers[1].alone.sqnr_db, rel=1e-5)
    assert result.int8.sqnr_db == pytest.approx(10 * math.log10(4 / (16 * 0.36)))
    assert (result.labelled, result.float_top1, result.int8.top1) == (False, 1.0, 1.0)


def test_labels_are_used_where_there_are_any() -> None:
    result = synthetic("top1", np.array([0, 1, 2, 0]))
    assert (result.labelled, result.float_top1, result.metric) == (True, 0.75, "top1")


def test_an_unknown_metric_and_no_layers_are_refused() -> None:
    with pytest.raises(IsthmusError, match="unknown metric 'psnr': there are sqnr, top1"):
        synthetic("psnr")
    with pytest.raises(IsthmusError, match="no layer is left to try"):
        sensitivity([], lambda kept: {}, {"y": np.zeros((1, 1))}, None)


def test_a_signal_of_nothing_has_no_decibels() -> None:
    zero, one = {"y": np.zeros(3)}, {"y": np.ones(3)}
    assert (sqnr_db(zero, zero), sqnr_db(zero, one), sqnr_db(one, one)) == (math.inf, -math.inf, math.inf)


def test_the_layer_with_the_outlier_is_found() -> None:
    result = sensitivity_of(network(), samples(), samples=16)
    assert result.layers[0].name == "layer1" and result.samples == 16
    spared = {row.name: row.spared.sqnr_db for row in result.layers if row.spared}
    assert max(spared, key=lambda name: spared[name]) == "layer1"


def test_the_only_layer_is_not_spared() -> None:
    result = sensitivity_of(network(1), samples(), recipe=Recipe(bias_correction=True))
    assert result.layers[0].spared is None and result.layers[0].alone == result.int8
    assert "layer0" in sensitivity_table(result)


def test_it_needs_a_float_model_and_samples() -> None:
    form = Path(__file__).parents[1] / "models" / "network.onnx"
    with pytest.raises(IsthmusError, match="is int8 already"):
        sensitivity_of(form, samples())
    with pytest.raises(IsthmusError, match="needs samples: --data"):
        sensitivity_of(network())
    with pytest.raises(IsthmusError, match="--samples 0: at least 1"):
        sensitivity_of(network(), samples(), samples=0)


# ---- page and command
class Page(HTMLParser):
    """Tags that are open at the end, and everything that would load something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value or "" for name, value in attrs if name in ("src", "href") and not (value or "").startswith(("#", "data:"))]
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("metric", ["sqnr", "top1"])
def test_the_page_is_whole_and_loads_nothing(metric: str) -> None:
    text = render_sensitivity("<script>evil.onnx", synthetic(metric).to_json())
    page = Page(text)
    assert page.open == [] and page.loads == [] and "<script" not in text
    assert text.count("<circle") == 6 and "NaN" not in text and "inf" not in re.sub(r"info|infinite", "", text)


def test_the_command_writes_table_json_and_page(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    onnx.save(network(), tmp_path / "net.onnx")
    np.savez(tmp_path / "data.npz", x=samples(), y=np.arange(32) % 6)
    words = ["isthmus", "sensitivity", str(tmp_path / "net.onnx"), "--data", str(tmp_path / "data.npz"), "-o", str(tmp_path / "page.html")]
    for more in ([], ["--json"]):
        monkeypatch.setattr("sys.argv", [*words, *more])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
        printed = capsys.readouterr().out
        if more:
            read = json.loads(printed)
            assert read["layers"][0]["name"] == "layer1" and read["labelled"] is True
        else:
            assert re.search(r"^layer1 +-?\d+\.\d dB", printed, re.MULTILINE) and "top-1 against the labels" in printed
    assert "layer1" in (tmp_path / "page.html").read_text()
