# SPDX-License-Identifier: Apache-2.0
"""Tree models from the file to a bundle: ONNX Runtime, and conifer's C++ compiled by g++; both equal the reference and decide as the library."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
from typer.testing import CliRunner

from isthmus import pipeline
from isthmus.bench_bundle import why_not_measured
from isthmus.bundle import Bundle
from isthmus.cost_model import cost_of
from isthmus.errors import IsthmusError, ProblemsError, VerificationError
from isthmus.export.trees import read_trees
from isthmus.profile import load_profile
from isthmus.run_bundle import run_bundle
from isthmus.targets.trees import TARGET, estimated_lut
from isthmus.targets.trees.convert import conifer_ensemble
from isthmus.tree_form import INPUT, OUTPUT, TreeForm, quantise

MODELS = Path(__file__).parents[1] / "models" / "trees"
FLOOR = 0.995


@pytest.fixture(scope="module")
def xgboost_says() -> dict[str, np.ndarray]:
    with np.load(MODELS / "xgboost.npz") as archive:
        return dict(archive)


@pytest.fixture(scope="module")
def cancer() -> tuple[np.ndarray, np.ndarray]:
    data = load_breast_cancer()
    order = np.random.default_rng(0).permutation(len(data.target))
    return data.data.astype(np.float32)[order], data.target[order]


def decisions(bundle: Bundle, profile: str, samples: np.ndarray) -> np.ndarray:
    with bundle.open_session(profile) as session:
        return np.array([session.run({INPUT: sample[None]})[OUTPUT].argmax() for sample in samples])


def test_a_forest_of_the_floors_size_decides_as_scikit_learn(cancer: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> None:
    x, y = cancer
    forest = RandomForestClassifier(32, max_depth=6, random_state=0).fit(x[:300], y[:300])
    bundle = pipeline.compile(forest, targets=["cpu", "rpi5"], data={INPUT: x[:300]}, output=tmp_path / "forest")
    assert bundle.artifact("rpi5")["engine"] == "onnxruntime"
    assert (decisions(bundle, "cpu", x[300:]) == forest.predict(x[300:])).mean() >= FLOOR
    results = pipeline.verify(bundle)
    assert [comparison.mismatched for comparisons in results.values() for comparison in comparisons] == [0, 0]
    assert bundle.manifest["graph"]["kind"] == "trees"
    assert (bundle.root / "reports" / "report.html").is_file()


def test_the_command_line_takes_a_file(xgboost_says: dict[str, np.ndarray], tmp_path: Path) -> None:
    from isthmus.cli import app

    np.savez(tmp_path / "samples.npz", x=xgboost_says["x"], y=xgboost_says["y"])
    np.save(tmp_path / "one.npy", xgboost_says["unseen"][:4])
    words = ["compile", str(MODELS / "three.ubj"), "-t", "cpu", "--data", str(tmp_path / "samples.npz"), "-o", str(tmp_path / "bundle"), "--json"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["artifacts"]["cpu"]["max_lsb"] == 0
    outputs = run_bundle(Bundle.open(tmp_path / "bundle"), "cpu", [str(tmp_path / "one.npy")])
    assert np.allclose(outputs[OUTPUT], xgboost_says["three/margin"][400:404], atol=0.02)  # 2^-8 a step
    cost = cost_of(str(tmp_path / "bundle"), {}, "mac")
    assert (cost.macs, cost.parameters > 20) == (0, True)


def test_a_factory_may_give_a_tree_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from isthmus.cli import app

    code = """import numpy as np
from sklearn.tree import DecisionTreeClassifier
X = np.arange(40, dtype=np.float32).reshape(20, 2)

def make():
    open("calls", "a").write("x")
    return DecisionTreeClassifier(max_depth=3, random_state=0).fit(X, X[:, 0] > 17)

def three():
    return 1, 2, 3
"""
    (tmp_path / "trees_of_a_test.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    np.save("samples.npy", np.arange(40, dtype=np.float32).reshape(20, 2))
    done = CliRunner().invoke(app, ["compile", "trees_of_a_test:make", "-t", "cpu", "--data", "samples.npy", "-o", "bundle"])
    assert done.exit_code == 0, done.output
    assert Path("calls").read_text() == "x"  # a factory may train: once is enough
    bundle = Bundle.open(Path("bundle"))
    assert (bundle.manifest["name"], bundle.manifest["graph"]["kind"]) == ("trees_of_a_test:make", "trees")
    assert decisions(bundle, "cpu", np.array([[3.0, 4.0], [30.0, 31.0]], np.float32)).tolist() == [0, 1]
    with pytest.raises(IsthmusError, match=r"returned 3 values, expected the model alone or \(module, example_inputs\)"):
        pipeline.compile("trees_of_a_test:three", data="samples.npy", output="other")


def test_a_form_is_compiled_again_without_data(xgboost_says: dict[str, np.ndarray], tmp_path: Path) -> None:
    first = pipeline.compile(MODELS / "binary.json", data=xgboost_says["x"], output=tmp_path / "one")
    again = pipeline.compile(first.model, targets=["jetson-orin-nano"], output=tmp_path / "two")
    assert again.manifest["graph"]["digest"] == first.manifest["graph"]["digest"]


def test_conifers_cpp_equals_the_reference_and_the_library(require: Callable[[str], str], xgboost_says: dict[str, np.ndarray], tmp_path: Path) -> None:
    """One compile: three classes, so that columns of trees are filled up as well."""
    require("conifer")
    require("g++")
    bundle = pipeline.compile(MODELS / "three.ubj", targets=["pynq-z2", "cpu"], data=xgboost_says["x"], output=tmp_path / "bundle", options={"clock_ns": "8"})
    entry = bundle.artifact("pynq-z2")
    assert entry["engine"] == "treesim" and why_not_measured(entry) == "needs the board"
    assert [row["mismatched"] for row in entry["verification"]] == [0] and entry["verification"][0]["compared"] > 1000
    unseen = xgboost_says["unseen"]
    assert (decisions(bundle, "pynq-z2", unseen) == xgboost_says["three/decision"][400:]).mean() >= FLOOR
    folder = bundle.folder("pynq-z2")
    parameters = (folder / "project" / "hls_parameters.tcl").read_text()
    assert "xc7z020clg400-1" in parameters and "clock_period 8" in parameters
    for file in folder.rglob("*.json"):
        assert str(tmp_path) not in file.read_text()
    assert [step["name"] for step in entry["planned"]] == ["synthesis"]
    checked = subprocess.run([sys.executable, "-m", "isthmus.targets.trees.check_project", "60"], cwd=folder, capture_output=True, text=True, check=False)
    assert checked.returncode == 0 and "0 of 60 samples differ between the HLS project and conifer's C++ backend" in checked.stdout, checked.stdout
    (folder / "features.json").write_text("{}")
    with pytest.raises(IsthmusError, match=r"features\.json"):
        bundle.open_session("pynq-z2")


def test_conifers_dictionary_holds_every_tree_once(xgboost_says: dict[str, np.ndarray]) -> None:
    """Without conifer: what it is given computes the reference's sums."""
    from isthmus.targets.trees import simulation

    for name in ("binary.ubj", "three.ubj"):
        form, _ = quantise(read_trees(MODELS / name)[0], xgboost_says["x"])
        side = json.loads(simulation.side_file(form))
        made = conifer_ensemble(side)
        steps = form.quantise(xgboost_says["unseen"])[:, side["used"]]
        expected = form.run({INPUT: xgboost_says["unseen"]})[OUTPUT][:, -len(form.base) :]
        for output in range(len(form.base)):
            sums = np.array([made["init_predict"][output] + sum(_walk(row[output], sample) for row in made["trees"]) for sample in steps])
            assert np.array_equal(sums, expected[:, output])


def _walk(tree: dict[str, list[int]], sample: np.ndarray) -> int:
    node = 0
    while tree["feature"][node] != -2:
        left = np.dot(sample, tree["weight"][node]) <= tree["threshold"][node]
        node = tree["children_left" if left else "children_right"][node]
    return tree["value"][node]


def test_a_regression_has_scores_and_no_accuracy(cancer: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> None:
    x, _ = cancer
    model = RandomForestRegressor(4, max_depth=4, random_state=0).fit(x[:200, 1:], x[:200, 0])
    np.savez(tmp_path / "data.npz", x=x[:200, 1:], y=np.zeros(200, int))
    bundle = pipeline.compile(model, data=tmp_path / "data.npz", output=tmp_path / "bundle")
    assert bundle.manifest["task"] is None and bundle.artifact("cpu")["accuracy"] is None
    with bundle.open_session("cpu") as session:
        made = np.array([session.run({INPUT: sample[None]})[OUTPUT][0, 0] for sample in x[200:260, 1:]])
    assert np.abs(made - model.predict(x[200:260, 1:])).max() < 1e-3 * made.max()


# ---- bad input
def form_of(depth: int, trees: int) -> TreeForm:
    x, y = load_digits(return_X_y=True)
    x = (x + np.random.default_rng(0).random(x.shape)).astype(np.float32)
    return quantise(read_trees(RandomForestClassifier(trees, max_depth=depth, random_state=0, max_features=1).fit(x, y))[0], x[:200])[0]


def test_trees_too_deep_or_too_many_are_refused_for_an_fpga_and_taken_by_a_processor() -> None:
    form = form_of(25, 30)
    problems = TARGET.check(form, load_profile("pynq-z2"))
    assert [problem.rule for problem in problems] == ["depth", "lut"]
    assert f"need about {estimated_lut(form)} LUT" in problems[1].found
    assert TARGET.check(form, load_profile("rpi5")) == []


def test_parts_of_other_makers_are_refused() -> None:
    form = form_of(2, 1)
    for name, backend in (("arria10-gx1150", "oneAPI"), ("polarfire-mpf300t", "Libero")):
        (problem,) = TARGET.check(form, load_profile(name))
        assert problem.rule == "backend" and backend in problem.found


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("forest.pkl", {}, "a pickle runs code when it is opened"),
        ("forest.joblib", {}, "a pickle runs code when it is opened"),
        (MODELS / "binary.ubj", {}, "choosing the fixed point needs calibration data"),
        (MODELS / "binary.ubj", {"data": np.zeros((4, 3), np.float32)}, "features"),
        (MODELS / "binary.ubj", {"data": np.full((4, 6), np.nan, np.float32)}, "NaN|finite"),
        (MODELS / "binary.ubj", {"targets": ["pynq"], "data": np.zeros((4, 6), np.float32)}, "unknown profile 'pynq'"),
        (MODELS / "binary.ubj", {"options": {"reuse": "3"}, "data": np.zeros((4, 6), np.float32)}, "target trees has no option 'reuse'"),
        (MODELS / "binary.ubj", {"split": ["x"], "data": np.zeros((4, 6), np.float32)}, "a tree model has none"),
        ("missing.ubj", {"data": np.zeros((4, 6), np.float32)}, "no such file"),
    ],
)
def test_what_cannot_be_compiled_leaves_nothing(model: str | Path, arguments: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(IsthmusError, match=message):
        pipeline.compile(model, output=tmp_path / "bundle", **arguments)  # type: ignore[arg-type]
    assert not (tmp_path / "bundle").exists()


def test_missing_values_are_refused_when_running(xgboost_says: dict[str, np.ndarray], tmp_path: Path) -> None:
    bundle = pipeline.compile(MODELS / "binary.ubj", data=xgboost_says["x"], output=tmp_path / "bundle")
    with bundle.open_session("cpu") as session, pytest.raises(IsthmusError, match="holds NaN or infinity"):
        session.run({INPUT: np.full((1, 6), np.nan, np.float32)})


def test_golden_outputs_that_were_changed_are_noticed(xgboost_says: dict[str, np.ndarray], tmp_path: Path) -> None:
    bundle = pipeline.compile(MODELS / "binary.ubj", data=xgboost_says["x"], output=tmp_path / "bundle")
    golden = bundle.golden()
    golden[f"output/{OUTPUT}"][0, 0] += 1
    np.savez_compressed(bundle.root / "golden.npz", **golden)
    with pytest.raises(VerificationError, match=r"golden\.npz is not what the reference computes"):
        pipeline.verify(bundle)


def test_a_network_is_not_for_this_target() -> None:
    from isthmus.graph import QuantGraph

    graph = QuantGraph.load(MODELS.parent / "network.onnx")
    assert [problem.rule for problem in TARGET.check(graph, load_profile("cpu"))] == ["trees"]


def test_a_bundle_of_too_deep_trees_is_not_written(cancer: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    x = generator.random((2000, 2)).astype(np.float32)
    forest = RandomForestClassifier(2, random_state=0, max_features=1).fit(x, generator.integers(0, 2, 2000))
    with pytest.raises(ProblemsError, match=r"\[depth\]"):
        pipeline.compile(forest, targets=["zcu104"], data=x, output=tmp_path / "bundle")
