# SPDX-License-Identifier: Apache-2.0
"""XGBoost's own model files (JSON, UBJSON) as a `TreeEnsemble`. Needs no XGBoost: the format is documented and stable."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from isthmus.errors import IsthmusError
from isthmus.export.ubjson import loads
from isthmus.trees import BINARY, CLASSES, LEAF, REGRESSION, Tree, TreeEnsemble, below, checked, with_one_margin

# Objectives whose base score is stored as a probability or a mean: margin = logit or log of it.
LOGIT = ("binary:logistic", "binary:logitraw", "reg:logistic")
LOG = ("count:poisson", "reg:gamma", "reg:tweedie", "survival:cox")
LINKS = {"binary:logistic": "sigmoid", "reg:logistic": "sigmoid", "multi:softprob": "softmax"} | dict.fromkeys(LOG, "exp")
IDENTITY = (
    "reg:squarederror",
    "reg:squaredlogerror",
    "reg:pseudohubererror",
    "reg:absoluteerror",
    "reg:quantileerror",
    "rank:pairwise",
    "rank:ndcg",
    "rank:map",
)
CLASSIFYING = {"binary:logistic": BINARY, "binary:logitraw": BINARY, "multi:softmax": CLASSES, "multi:softprob": CLASSES}


def ensemble_from_xgboost(data: bytes, where: str) -> tuple[TreeEnsemble, list[str]]:
    """The ensemble and notes. Raises `IsthmusError`: neither JSON nor UBJSON, no tree booster, categorical splits, vector leaves, an unknown objective."""
    model = _parsed(data, where)
    try:
        return _ensemble(model["learner"], where)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
        raise IsthmusError(f"{where}: not a model of XGBoost 1.7 or newer ({type(error).__name__}: {error}); save it again with save_model") from None


def _parsed(data: bytes, where: str) -> Any:
    if data[:1] == b"{" and data[1:2] in (b'"', b"\n", b" ", b"\r", b"\t", b"}"):
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            raise IsthmusError(f"{where}: not JSON, or cut short: {error}") from None
    try:
        return loads(data)
    except IsthmusError as error:
        raise IsthmusError(f"{where}: {error}; expected what XGBoost's save_model writes") from None


def _ensemble(learner: Mapping[str, Any], where: str) -> tuple[TreeEnsemble, list[str]]:
    objective = str(learner["objective"]["name"])
    if objective not in (*CLASSIFYING, *LOGIT, *LOG, *IDENTITY):
        raise IsthmusError(f"{where}: objective {objective!r} is not known, so what its scores mean is not either")
    booster, weights = _booster(learner["gradient_booster"], where)
    parameters = learner["learner_model_param"]
    if int(parameters.get("num_target", 1)) > 1:
        raise IsthmusError(f"{where}: {parameters['num_target']} targets at once: train one model a target")
    groups = max(int(parameters["num_class"]), 1)
    count, notes = _used_trees(learner, booster)
    trees = tuple(
        _tree(tree, group, groups, float(weight), f"{where}: tree {index}")
        for index, (tree, group, weight) in enumerate(zip(booster["trees"][:count], list(booster["tree_info"])[:count], weights[:count], strict=True))
    )
    base = _base(str(parameters["base_score"]), objective, groups)
    task = CLASSIFYING.get(objective, REGRESSION)
    ensemble = TreeEnsemble(trees, int(parameters["num_feature"]), base, task, LINKS.get(objective, "none"), f"{where}: XGBoost, {objective}")
    return checked(with_one_margin(ensemble)), notes


def _booster(booster: Mapping[str, Any], where: str) -> tuple[Mapping[str, Any], list[float]]:
    """(trees, the weight of each)."""
    name = booster["name"]
    if name == "gbtree":
        return booster["model"], [1.0] * len(booster["model"]["trees"])
    if name == "dart":
        return booster["gbtree"]["model"], [float(weight) for weight in booster["weight_drop"]]
    raise IsthmusError(f"{where}: booster {name!r} has no trees; expected gbtree or dart")


def _used_trees(learner: Mapping[str, Any], booster: Mapping[str, Any]) -> tuple[int, list[str]]:
    """XGBoost's scikit-learn classes stop at the best iteration of early stopping; so does this."""
    best = learner.get("attributes", {}).get("best_iteration")
    total = len(booster["trees"])
    if best is None or "iteration_indptr" not in booster:
        return total, []
    count = int(booster["iteration_indptr"][int(best) + 1])
    return count, [f"early stopping: {count} of {total} trees are used, those up to the best iteration"] if count < total else []


def _base(text: str, objective: str, groups: int) -> np.ndarray:
    score = np.array([float(word) for word in text.strip("[]").split(",")], np.float32).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):  # `checked` refuses what is not finite
        if objective in LOGIT:
            score = -np.log(1.0 / score - 1.0)
        elif objective in LOG:
            score = np.log(score)
    if score.size not in (1, groups):
        raise ValueError(f"{score.size} base scores for {groups} classes")
    return np.broadcast_to(score, (groups,)).copy()


def _tree(tree: Mapping[str, Any], group: int, groups: int, weight: float, where: str) -> Tree:
    if any(tree.get("split_type", ())) or len(tree.get("categories_nodes", ())):
        raise IsthmusError(f"{where}: a categorical split: no backend here takes one; encode the category as numbers (one-hot or ordinal) and train again")
    if int(tree["tree_param"].get("size_leaf_vector", 1)) > 1:
        raise IsthmusError(f"{where}: leaves with several values (multi_strategy): train with one output a tree")
    left, right = (np.asarray(tree[side], np.int64) for side in ("left_children", "right_children"))
    condition = np.asarray(tree["split_conditions"], np.float32)
    leaf = left == -1
    value = np.zeros((len(left), groups))
    value[leaf, int(group)] = condition[leaf].astype(np.float64) * weight
    feature = np.where(leaf, LEAF, np.asarray(tree["split_indices"], np.int64))
    return Tree(feature, np.where(leaf, np.float32(0), below(condition)), np.where(leaf, 0, left), np.where(leaf, 0, right), value)
