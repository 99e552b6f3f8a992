# SPDX-License-Identifier: Apache-2.0
"""Tree models as their libraries write them: what comes out computes what the library computes, and what cannot be read is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from sklearn.ensemble import (
    ExtraTreesClassifier,
    GradientBoostingClassifier,
    GradientBoostingRegressor,
    HistGradientBoostingClassifier,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.linear_model import LogisticRegression

from isthmus.errors import IsthmusError
from isthmus.export.trees import read_trees
from isthmus.export.ubjson import loads
from isthmus.trees import REGRESSION, Tree, TreeEnsemble, at_most, below, checked, decide

MODELS = Path(__file__).parents[1] / "models" / "trees"
GENERATOR = np.random.default_rng(3)
X = GENERATOR.standard_normal((300, 5)).astype(np.float32)
TWO = (X[:, 0] + X[:, 1] > 0).astype(int)
THREE = np.digitize(X[:, 0] + X[:, 2], [-0.7, 0.7])


@pytest.fixture(scope="module")
def xgboost_says() -> dict[str, np.ndarray]:
    with np.load(MODELS / "xgboost.npz") as archive:
        return dict(archive)


@pytest.mark.parametrize("file", ["binary.json", "binary.ubj", "three.ubj", "counts.ubj", "dart.ubj", "stopped.ubj"])
def test_xgboost_margins_and_decisions_are_the_librarys(file: str, xgboost_says: dict[str, np.ndarray]) -> None:
    name = file.partition(".")[0]
    ensemble, _ = read_trees(MODELS / file)
    samples = np.concatenate([xgboost_says["x"], xgboost_says["unseen"]])
    scores = ensemble.scores(samples)
    assert np.allclose(scores, xgboost_says[f"{name}/margin"].reshape(scores.shape), atol=1e-5)
    if ensemble.task != REGRESSION:
        assert (decide(scores, ensemble.task) == xgboost_says[f"{name}/decision"]).all()


def test_early_stopping_is_kept() -> None:
    _, notes = read_trees(MODELS / "stopped.ubj")
    assert "trees are used" in notes[0]


@pytest.mark.parametrize(
    ("model", "truth"),
    [
        (RandomForestClassifier(8, max_depth=4, random_state=0), TWO),
        (RandomForestClassifier(8, max_depth=4, random_state=0), THREE),
        (ExtraTreesClassifier(6, max_depth=5, random_state=0), TWO),
        (GradientBoostingClassifier(n_estimators=6, max_depth=2, random_state=0), TWO),
        (GradientBoostingClassifier(n_estimators=4, max_depth=2, random_state=0), THREE),
    ],
)
def test_scikit_learn_decides_alike(model: RandomForestClassifier, truth: np.ndarray) -> None:
    model.fit(X[:200], truth[:200])
    ensemble, _ = read_trees(model)
    assert (decide(ensemble.scores(X), ensemble.task) == model.predict(X)).mean() > 0.99  # scikit-learn's own sums round, so that exact ties fall either way


@pytest.mark.parametrize(
    "model", [RandomForestRegressor(6, max_depth=4, random_state=0), GradientBoostingRegressor(n_estimators=6, max_depth=2, random_state=0)]
)
def test_scikit_learn_predicts_alike(model: RandomForestRegressor) -> None:
    model.fit(X[:200], X[:200, 0] * 3)
    assert np.allclose(read_trees(model)[0].scores(X)[:, 0], model.predict(X))


def test_labels_of_another_kind_are_told() -> None:
    model = RandomForestClassifier(2, max_depth=2, random_state=0).fit(X, np.array(["no", "yes"])[TWO])
    assert "['no', 'yes']" in read_trees(model)[1][0]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (RandomForestClassifier(), "is not fitted; call fit first"),
        (LogisticRegression(), "LogisticRegression is not among the tree models"),
        (HistGradientBoostingClassifier(), "HistGradientBoostingClassifier is not among"),
        (RandomForestRegressor(2, max_depth=2).fit(X, X[:, :2]), "2 outputs at once"),
        (RandomForestClassifier(2, max_depth=2).fit(X, np.zeros(len(X))), "one class alone"),
        (GradientBoostingClassifier(n_estimators=2, init=LogisticRegression()).fit(X, TWO), "starts from a LogisticRegression"),
    ],
)
def test_scikit_learn_refusals(model: object, message: str) -> None:
    with pytest.raises(IsthmusError, match=message):
        read_trees(model)


@pytest.mark.parametrize(("file", "message"), [("categorical.ubj", "a categorical split"), ("linear.ubj", "booster 'gblinear' has no trees")])
def test_xgboost_refusals(file: str, message: str) -> None:
    with pytest.raises(IsthmusError, match=message):
        read_trees(MODELS / file)


def test_an_unknown_objective_is_refused(tmp_path: Path) -> None:
    model = json.loads((MODELS / "binary.json").read_text())
    model["learner"]["objective"]["name"] = "my:own"
    (tmp_path / "own.json").write_text(json.dumps(model))
    with pytest.raises(IsthmusError, match="objective 'my:own' is not known"):
        read_trees(tmp_path / "own.json")


@pytest.mark.parametrize("content", [b"", b"{", b'{"learner": 3}', b'{"learner": {}}', b"[1, 2]", b"\x80\x04."])
def test_a_file_that_is_no_model(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_bytes(content)
    with pytest.raises(IsthmusError, match=r"bad\.json: not "):
        read_trees(tmp_path / "bad.json")


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 14278), st.binary(min_size=1, max_size=4))
def test_a_damaged_ubjson_is_read_or_refused(at: int, damage: bytes) -> None:
    """Never another exception, whatever the bytes say."""
    data = bytearray((MODELS / "binary.ubj").read_bytes())
    data[at : at + len(damage)] = damage
    try:
        loads(bytes(data))
    except IsthmusError as error:
        assert "UBJSON" in str(error)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 14278), st.binary(min_size=1, max_size=4))
def test_a_damaged_model_is_read_or_refused(at: int, damage: bytes) -> None:
    from isthmus.export.trees_xgboost import ensemble_from_xgboost

    data = bytearray((MODELS / "binary.ubj").read_bytes())
    data[at : at + len(damage)] = damage
    try:
        ensemble, _ = ensemble_from_xgboost(bytes(data), "damaged.ubj")
    except IsthmusError as error:
        assert "damaged.ubj" in str(error)
    else:
        assert ensemble.scores(np.zeros((1, ensemble.features), np.float32)).shape == (1, ensemble.outputs)


def test_skops_files_are_read_and_strange_types_are_not(tmp_path: Path) -> None:
    io = pytest.importorskip("skops.io")
    model = RandomForestClassifier(4, max_depth=3, random_state=0).fit(X, TWO)
    io.dump(model, tmp_path / "forest.skops")
    ensemble, _ = read_trees(tmp_path / "forest.skops")
    assert np.array_equal(ensemble.scores(X), read_trees(model)[0].scores(X))
    model.note = Path("somewhere")
    io.dump({"model": model, "odd": Stranger()}, tmp_path / "odd.skops")
    with pytest.raises(IsthmusError, match="which is not a type of scikit-learn's forests"):
        read_trees(tmp_path / "odd.skops")
    (tmp_path / "cut.skops").write_bytes((tmp_path / "forest.skops").read_bytes()[:200])
    with pytest.raises(IsthmusError, match=r"not a \.skops file, or cut short"):
        read_trees(tmp_path / "cut.skops")


class Stranger:
    """A type that a .skops file may name and that is not opened."""


# ---- ONNX
def onnx_trees(
    op: str = "TreeEnsembleRegressor", mode: str = "BRANCH_LEQ", before: list[onnx.NodeProto] | None = None, **attributes: object
) -> onnx.ModelProto:
    """x[1] <mode> 0.5 ? 2 : (x[0] <mode> -1 ? 3 : -4), and a second tree of a leaf with 0.25."""
    nodes: dict[str, object] = {
        "nodes_treeids": [0, 0, 0, 0, 0, 1],
        "nodes_nodeids": [0, 1, 2, 3, 4, 0],
        "nodes_featureids": [1, 0, 0, 0, 0, 0],
        "nodes_modes": [mode, "LEAF", mode, "LEAF", "LEAF", "LEAF"],
        "nodes_values": [0.5, 0.0, -1.0, 0.0, 0.0, 0.0],
        "nodes_truenodeids": [1, 0, 3, 0, 0, 0],
        "nodes_falsenodeids": [2, 0, 4, 0, 0, 0],
        "post_transform": "NONE",
    }
    prefix = "class" if op.endswith("Classifier") else "target"
    leaves = {f"{prefix}_treeids": [0, 0, 0, 1], f"{prefix}_nodeids": [1, 3, 4, 0], f"{prefix}_ids": [0] * 4, f"{prefix}_weights": [2.0, 3.0, -4.0, 0.25]}
    rest = {"n_targets": 1} if prefix == "target" else {"classlabels_int64s": [0, 1]}
    outputs = ["y"] if prefix == "target" else ["label", "y"]
    chain = before or []
    node = helper.make_node(op, [chain[-1].output[0] if chain else "x"], outputs, domain="ai.onnx.ml", **{**nodes, **leaves, **rest, **attributes})
    values = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    graph = helper.make_graph([*chain, node], "forest", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 2])], values)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("ai.onnx.ml", 3)])


EDGES = np.array(
    [[a, b] for a in (-1.0, np.nextafter(np.float32(-1), np.float32(-2)), -0.5) for b in (0.5, np.nextafter(np.float32(0.5), np.float32(1)), 0)], np.float32
)


@pytest.mark.parametrize("mode", ["BRANCH_LEQ", "BRANCH_LT", "BRANCH_GTE", "BRANCH_GT"])
@pytest.mark.parametrize("aggregate", ["SUM", "AVERAGE"])
def test_onnx_regressors_compare_as_their_mode_says(mode: str, aggregate: str) -> None:
    model = onnx_trees(mode=mode, aggregate_function=aggregate, base_values=[0.125])
    (expected,) = ReferenceEvaluator(model).run(None, {"x": EDGES})
    ensemble, _ = read_trees(model)
    assert np.allclose(ensemble.scores(EDGES), expected if aggregate == "SUM" else (expected - 0.125) + 0.125)


def test_onnx_classifiers_with_one_weight_or_two() -> None:
    one, _ = read_trees(onnx_trees("TreeEnsembleClassifier"))
    assert np.array_equal(one.scores(EDGES[:1]), [[2.25]])
    both, _ = read_trees(onnx_trees("TreeEnsembleClassifier", class_ids=[0, 1, 0, 1]))
    assert np.array_equal(both.scores(EDGES[:1]), [[0.25 - 2.0]])
    positive, _ = read_trees(onnx_trees("TreeEnsembleClassifier", class_weights=[0.25, 0.5, 0.125, 0.0]))
    assert np.array_equal(positive.scores(EDGES[:1]), [[-0.25]])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (onnx_trees(mode="BRANCH_EQ"), "BRANCH_EQ .a categorical split."),
        (onnx_trees(post_transform="PROBIT"), "SUM and PROBIT"),
        (onnx_trees(n_targets=2), "2 targets at once"),
        (onnx_trees(nodes_truenodeids=[9, 0, 3, 0, 0, 0]), "names node 9 of tree 0"),
        (onnx_trees(nodes_truenodeids=[2, 0, 3, 0, 0, 0]), "a node with two parents"),
        (onnx_trees(nodes_featureids=[7, 0, 0, 0, 0, 0]), "compares a feature outside 0 to 1"),
        (onnx_trees(nodes_values=[np.inf, 0.0, -1.0, 0.0, 0.0, 0.0]), "that is not finite"),
        (onnx_trees(target_ids=[0, -1, 0, 0]), "a value to a leaf or an output that it does not have"),
        (onnx_trees(target_nodeids=[1, 3, 9, 0]), "a value to a leaf or an output that it does not have"),
        (onnx_trees(before=[helper.make_node("Neg", ["x"], ["z"])]), "Neg stands before the trees"),
    ],
)
def test_onnx_refusals(model: onnx.ModelProto, message: str) -> None:
    with pytest.raises(IsthmusError, match=message):
        read_trees(model)


# ---- the types
def test_thresholds_keep_every_comparison() -> None:
    values = np.array([0, 1, -1, 1e-45, 3.4e38, -2.5], np.float32)
    exact = np.concatenate([values.astype(np.float64), [0.1, 1 / 3, 1 + 1e-12]])
    for threshold in exact:
        samples = np.concatenate(
            [values, [np.float32(threshold), np.nextafter(np.float32(threshold), np.float32(9)), np.nextafter(np.float32(threshold), np.float32(-9))]]
        )
        assert ((samples <= at_most([threshold])) == (samples.astype(np.float64) <= threshold)).all()
        assert ((samples <= below([threshold])) == (samples.astype(np.float64) < threshold)).all()


def test_no_trees_and_odd_shapes_are_refused() -> None:
    leaf = Tree(*(np.array([value]) for value in (-1, 0.0, 0, 0)), np.zeros((1, 1)))
    with pytest.raises(IsthmusError, match="holds no trees"):
        checked(TreeEnsemble((), 2, np.zeros(1), REGRESSION, "none", "own"))
    with pytest.raises(IsthmusError, match="do not make a classes ensemble"):
        checked(TreeEnsemble((leaf,), 2, np.zeros(1), "classes", "none", "own"))
    with pytest.raises(IsthmusError, match="a regression has no decisions"):
        decide(np.zeros((1, 1)), REGRESSION)
