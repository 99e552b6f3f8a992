# SPDX-License-Identifier: Apache-2.0
"""Bundles as candidates of `isthmus select`: their artifacts, and ensembles of them judged on the samples that they share."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from isthmus import cli, pipeline
from isthmus.bundle import Bundle
from isthmus.bundle_candidates import table_of_bundles
from isthmus.candidates import candidates_of
from isthmus.compare import top1_accuracy
from isthmus.errors import IsthmusError
from isthmus.form_writer import FormWriter
from isthmus.graph import QuantGraph
from isthmus.train.ensemble import mean_probabilities, probabilities

NETWORK = Path(__file__).parents[1] / "models" / "network.onnx"
CLASSES, PIXELS = 3, 16


def classifier(seed: int, softmax: bool = False, hidden: int = 0) -> QuantGraph:
    """One dense layer, or two: the rows that decide the labels, with noise of its own."""
    noise = np.random.default_rng(seed).normal(0, 25, (CLASSES, PIXELS))
    writer = FormWriter()
    y = writer.flatten(writer.input("image", (1, 1, 4, 4), scale=2**-5))
    if hidden:
        y = writer.gemm(y, np.repeat(np.eye(PIXELS), hidden, axis=0).astype(np.int8) * 64, 2**-6, scale=2**-5)
    rows = np.repeat((deciding() + noise).clip(-127, 127) / (hidden or 1), hidden or 1, axis=1)
    y = writer.gemm(y, rows.astype(np.int8), 2**-7, scale=2**-3)
    if softmax:
        writer.softmax_output(y, "scores")
    else:
        writer.output(y, "scores")
    return writer.graph()


def deciding() -> np.ndarray:
    return np.random.default_rng(7).normal(0, 30, (CLASSES, PIXELS))


def saved(folder: Path, seed: int = 0, count: int = 120) -> Path:
    """Samples and the labels that the noiseless rows give them."""
    samples = np.random.default_rng(seed).normal(0, 1, (count, 1, 4, 4)).astype(np.float32)
    file = folder / f"data-{seed}.npz"
    np.savez(file, x=samples, y=(samples.reshape(count, -1) @ deciding().T).argmax(axis=1))
    return file


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Bundle]:
    folder = tmp_path_factory.mktemp("bundles")
    data = saved(folder)
    graphs = {"a": classifier(1), "b": classifier(2), "c": classifier(3, softmax=True), "wide": classifier(4, hidden=4)}
    made = {name: pipeline.compile(graph, targets=["cpu"], data=data, tune=False, output=folder / name) for name, graph in graphs.items()}
    return made | {"other": pipeline.compile(classifier(1), targets=["cpu"], data=saved(folder, 1), tune=False, output=folder / "other")}


def roots(bundles: Mapping[str, Bundle], names: str) -> list[str]:
    return [str(bundles[name].root) for name in names.split()]


def invoked(arguments: list[str]) -> str:
    result = CliRunner().invoke(cli.app, ["select", *arguments])
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.stdout


def test_bundles_as_candidates(tmp_path: Path, require: Callable[[str], str]) -> None:
    for tool in ("onnxruntime", "litert"):
        require(tool)
    generator = np.random.default_rng(0)
    data = tmp_path / "data.npz"
    np.savez(data, x=generator.uniform(-4, 4, (40, 1, 8, 8)).astype(np.float32), y=generator.integers(0, 3, 40))
    bundle = pipeline.compile(NETWORK, targets=["cpu", "rpi5", "null"], data=data, tune=False, output=tmp_path / "one")
    table = table_of_bundles([bundle.root])
    assert (table.metrics, table.costs) == (("top1",), ("int8_mb", "macs_m"))
    rows = {row.name: row for row in table.datasets[""]}
    assert set(rows) == {"one:cpu", "one:rpi5"}
    for profile in ("cpu", "rpi5"):
        size = (bundle.folder(profile) / bundle.artifact(profile)["artifact"]).stat().st_size
        assert rows[f"one:{profile}"].costs["int8_mb"] == size / 2**20 and rows[f"one:{profile}"].metrics["top1"] == bundle.artifact(profile)["accuracy"]
    found = json.loads(invoked([str(bundle.root), "--budget", "int8_mb=1", "--json"]))  # sizes below 1 MB need no other unit: bundles are not weighted
    assert found[""]["choice"] in rows
    assert candidates_of(table.datasets[""], False) == list(table.datasets[""])


def test_a_bundle_without_accuracy_cannot_be_chosen(tmp_path: Path, require: Callable[[str], str]) -> None:
    require("onnxruntime")
    bundle = pipeline.compile(NETWORK, targets=["cpu"], tune=False, output=tmp_path / "one")
    with pytest.raises(IsthmusError, match=r"artifact 'cpu' has no accuracy: compile it with labelled samples \(--data\)"):
        table_of_bundles([bundle.root])


# ---- ensembles
def test_an_ensemble_of_bundles_is_the_mean_of_its_members_probabilities(bundles: Mapping[str, Bundle]) -> None:
    rows = {row.name: row for row in table_of_bundles(roots(bundles, "a b c wide"), ensembles=3).datasets[""]}
    assert len(rows) == 4 + 6 + 4 and rows["a+b:cpu"].members == ("a:cpu", "b:cpu") and rows["a:cpu"].is_single
    decided, labels = {}, np.zeros(0)
    for name in ("a", "b", "c"):
        golden = bundles[name].golden()
        known = golden["label"] >= 0
        labels, outputs = golden["label"][known], golden["output/scores"][known]
        decided[name] = outputs if outputs.dtype == np.float32 else probabilities(bundles[name].output_specs()[0].dequantise(outputs))
        assert rows[f"{name}:cpu"].metrics["wS"] == bundles[name].artifact("cpu")["accuracy"]
    for members in ("ab", "ac", "abc"):
        mean = mean_probabilities([decided[member] for member in members])
        assert rows[f"{'+'.join(members)}:cpu"].metrics["wS"] == top1_accuracy(mean, labels)
    assert {round(row.metrics["wS"], 9) for row in rows.values()} - {1.0} and all(set(row.metrics) == {"wS", "wP", "BA", "AUC"} for row in rows.values())


def test_an_ensembles_costs_are_sums_of_what_was_measured(bundles: Mapping[str, Bundle]) -> None:
    table = table_of_bundles(roots(bundles, "a wide"), ensembles=2)
    rows = {row.name: row for row in table.datasets[""]}
    sizes = [(bundles[name].folder("cpu") / bundles[name].artifact("cpu")["artifact"]).stat().st_size for name in ("a", "wide")]
    assert rows["a+wide:cpu"].costs["int8_mb"] == pytest.approx(sum(sizes) / 2**20) and table.costs == ("int8_mb", "macs_m")
    weights = PIXELS * CLASSES, PIXELS * 4 * PIXELS + PIXELS * 4 * CLASSES
    assert rows["a:cpu"].costs["macs_m"] == weights[0] / 1e6 and rows["a+wide:cpu"].costs["macs_m"] == pytest.approx(sum(weights) / 1e6)
    assert rows["a+wide:cpu"].costs["size_mb"] == pytest.approx(4 * sum(weights) / 2**20)  # what the paper's 34 MB are of


def test_the_command_on_bundles(bundles: Mapping[str, Bundle], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    given = roots(bundles, "a b wide")
    found: dict[str, Any] = json.loads(invoked([*given, "--ensembles", "3", "--budget", "size_mb=34", "--json", "-o", str(page)]))[""]
    chosen = set(found["kinds"]["cpu"]["u"])
    assert chosen <= {"a+b:cpu", "a+wide:cpu", "b+wide:cpu", "a+b+wide:cpu"} and found["metrics"] == ["wS", "wP", "BA", "AUC"]
    text = page.read_text(encoding="utf-8")
    assert "wS against int8_mb" in text and "Radar of the best" in text
    singles = json.loads(invoked([*given, "--ensembles", "2", "--include-singles", "--json"]))[""]
    assert {"a:cpu", "b:cpu"} & set(singles["kinds"]["cpu"]["u"])
    small = bundles["a"].artifact("cpu")["size_bytes"] * 1.5 / 2**20
    only = json.loads(invoked([*given, "--ensembles", "2", "--include-singles", "--budget", f"int8_mb={small}", "--json"]))[""]
    assert set(only["within"]["areas"]) <= {"a:cpu", "b:cpu"}


@pytest.mark.parametrize(
    ("names", "arguments", "sentence"),
    [
        ("a other", ["--ensembles", "2"], r"a and .*other hold different samples, so no ensemble can be judged: compile both with the same test data"),
        ("a", ["--ensembles", "2"], r"--ensembles 2: expected 2 to 1, as many as there are bundles"),
        ("a b", ["--ensembles", "0"], r"--ensembles 0: expected 2 to 2"),
        ("a a", [], r"a: is given twice; name each bundle once"),
        ("a b", ["--budget", "size_mb=1e-9"], r"no candidate fits the budget \(size_mb <= 1e-09\)"),
        ("a b", ["--weighted"], r"cost 'int8_mb' has the mean .*, and the weighted radar divides by it"),
    ],
)
def test_mistakes_with_bundles(bundles: Mapping[str, Bundle], names: str, arguments: list[str], sentence: str) -> None:
    result = CliRunner().invoke(cli.app, ["select", *roots(bundles, names), *arguments])
    assert isinstance(result.exception, IsthmusError), result.output
    with pytest.raises(IsthmusError, match=sentence):
        raise result.exception


def test_the_same_labels_of_other_samples_are_seen(bundles: Mapping[str, Bundle], tmp_path: Path) -> None:
    with np.load(saved(tmp_path)) as stored:
        np.savez(tmp_path / "shifted.npz", x=stored["x"] + 1, y=stored["y"])
    shifted = pipeline.compile(classifier(1), targets=["cpu"], data=tmp_path / "shifted.npz", tune=False, output=tmp_path / "shifted")
    with pytest.raises(IsthmusError, match="hold different samples"):
        table_of_bundles([bundles["a"].root, shifted.root], ensembles=2)
