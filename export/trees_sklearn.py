# SPDX-License-Identifier: Apache-2.0
"""scikit-learn's forests and boosted trees as a `TreeEnsemble`: from a living object, or from a `.skops` file. Pickles are never opened."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from isthmus.errors import IsthmusError
from isthmus.trees import BINARY, CLASSES, LEAF, REGRESSION, Tree, TreeEnsemble, at_most, checked

AVERAGING = (
    "RandomForestClassifier",
    "ExtraTreesClassifier",
    "DecisionTreeClassifier",
    "RandomForestRegressor",
    "ExtraTreesRegressor",
    "DecisionTreeRegressor",
)
BOOSTING = ("GradientBoostingClassifier", "GradientBoostingRegressor")
# Beyond what skops trusts by itself: scikit-learn's own arrays of a tree, which check themselves as they are read.
TRUSTED = ("sklearn.tree._tree.Tree",)


def load_skops(path: Path) -> Any:
    """The object in a `.skops` file. Raises `IsthmusError` where it names a type that neither skops nor `TRUSTED` trusts: such a file could run code."""
    try:
        from skops import io
        from skops.io.exceptions import UntrustedTypesFoundException
    except ImportError as error:
        raise IsthmusError(f"{path}: reading .skops needs skops and scikit-learn ({error}): pip install 'isthmus[trees]'") from None
    try:
        untrusted = [name for name in io.get_untrusted_types(file=path) if name not in TRUSTED]
        if untrusted:
            raise IsthmusError(f"{path}: holds {untrusted[0]}, which is not a type of scikit-learn's forests: it is not opened; save the plain estimator")
        return io.load(path, trusted=list(TRUSTED))
    except (UntrustedTypesFoundException, zipfile.BadZipFile, KeyError, TypeError, ValueError, OSError) as error:  # json's errors are ValueErrors
        raise IsthmusError(f"{path}: not a .skops file, or cut short ({type(error).__name__}: {error})") from None


def ensemble_from_sklearn(model: Any, where: str) -> tuple[TreeEnsemble, list[str]]:
    """The ensemble and notes. Raises `IsthmusError`: not fitted, several outputs, an estimator that is not in the table."""
    name = type(model).__name__
    if name not in (*AVERAGING, *BOOSTING):
        raise IsthmusError(f"{where}: {name} is not among the tree models that are known: {', '.join((*AVERAGING, *BOOSTING))}")
    if not hasattr(model, "tree_" if name.startswith("DecisionTree") else "estimators_"):
        raise IsthmusError(f"{where}: this {name} is not fitted; call fit first")
    if getattr(model, "n_outputs_", 1) != 1:
        raise IsthmusError(f"{where}: {model.n_outputs_} outputs at once: train one model an output")
    ensemble = _boosted(model, where) if name in BOOSTING else _averaged(model, where)
    labels = getattr(model, "classes_", None)
    notes = [] if labels is None or list(labels) == list(range(len(labels))) else [f"class k is the k-th of {[str(label) for label in labels]}"]
    return checked(ensemble), notes


def _averaged(model: Any, where: str) -> TreeEnsemble:
    members = [model] if hasattr(model, "tree_") else list(model.estimators_)
    classifies = type(model).__name__.endswith("Classifier")
    outputs = int(model.n_classes_) if classifies else 1
    if classifies and outputs < 2:
        raise IsthmusError(f"{where}: one class alone: there is nothing to decide")
    trees = []
    for member in members:
        value = np.asarray(member.tree_.value, np.float64)[:, 0, :]
        if classifies:
            value = value / value.sum(axis=1, keepdims=True)  # counts before scikit-learn 1.3, shares since
        if classifies and outputs == 2:
            value = value[:, 1:] - value[:, :1]
        trees.append(_tree(member.tree_, value / len(members)))
    task = REGRESSION if not classifies else BINARY if outputs == 2 else CLASSES
    columns = 1 if task != CLASSES else outputs
    return TreeEnsemble(tuple(trees), int(model.n_features_in_), np.zeros(columns), task, "none", f"{where}: scikit-learn, {type(model).__name__}")


def _boosted(model: Any, where: str) -> TreeEnsemble:
    initial = model.init_
    if initial != "zero" and type(initial).__name__ not in ("DummyClassifier", "DummyRegressor"):
        raise IsthmusError(f"{where}: starts from a {type(initial).__name__}, whose predictions are no constant; train without init")
    base = np.asarray(model._raw_predict_init(np.zeros((1, model.n_features_in_), np.float32)), np.float64)[0]
    trees = []
    for stage in model.estimators_:
        for output, member in enumerate(stage):
            value = np.zeros((member.tree_.node_count, len(base)))
            value[:, output] = np.asarray(member.tree_.value, np.float64)[:, 0, 0] * model.learning_rate
            trees.append(_tree(member.tree_, value))
    classifies = type(model).__name__.endswith("Classifier")
    task = REGRESSION if not classifies else BINARY if len(base) == 1 else CLASSES
    link = {BINARY: "sigmoid", CLASSES: "softmax", REGRESSION: "none"}[task]
    return TreeEnsemble(tuple(trees), int(model.n_features_in_), base, task, link, f"{where}: scikit-learn, {type(model).__name__}")


def _tree(tree: Any, value: np.ndarray) -> Tree:
    """scikit-learn compares float32 features with float64 thresholds: x <= t."""
    left, right = (np.asarray(side, np.int64) for side in (tree.children_left, tree.children_right))
    leaf = left == -1
    feature = np.where(leaf, LEAF, np.asarray(tree.feature, np.int64))
    return Tree(feature, np.where(leaf, np.float32(0), at_most(tree.threshold)), np.where(leaf, 0, left), np.where(leaf, 0, right), value)
