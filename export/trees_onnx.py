# SPDX-License-Identifier: Apache-2.0
"""A float tree model in ONNX (`ai.onnx.ml`, as skl2onnx, onnxmltools write it) as a `TreeEnsemble`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx

from isthmus.errors import IsthmusError
from isthmus.tree_onnx import ML_DOMAIN, node_attributes, numbers, trees_from_attributes
from isthmus.trees import BINARY, CLASSES, LEAF, REGRESSION, Tree, TreeEnsemble, at_most, below, checked, with_one_margin

TREE_OPS = ("TreeEnsembleRegressor", "TreeEnsembleClassifier")
BEFORE = ("Cast", "Identity", "Reshape", "Flatten")
# Behind the trees: what writes labels and probabilities in another shape, and decides nothing.
BEHIND = ("Cast", "Identity", "Reshape", "Flatten", "ZipMap", "Normalizer", "Squeeze", "Unsqueeze")
LINKS = {"NONE": "none", "LOGISTIC": "sigmoid", "SOFTMAX": "softmax"}
MODES = ("LEAF", "BRANCH_LEQ", "BRANCH_LT", "BRANCH_GTE", "BRANCH_GT")


def has_trees(model: onnx.ModelProto) -> bool:
    return any(node.domain == ML_DOMAIN and node.op_type.startswith("TreeEnsemble") for node in model.graph.node)


def ensemble_from_onnx(model: onnx.ModelProto, where: str) -> tuple[TreeEnsemble, list[str]]:
    """The ensemble and notes. Raises `IsthmusError` where the file holds more than one tree node and casts around it, or trees of another kind."""
    trees = [node for node in model.graph.node if node.domain == ML_DOMAIN and node.op_type.startswith("TreeEnsemble")]
    if len(trees) != 1:
        raise IsthmusError(f"{where}: {len(trees)} tree operators, expected one")
    (node,) = trees
    if node.op_type not in TREE_OPS:
        raise IsthmusError(f"{where}: {node.op_type} of ai.onnx.ml 5 is not read; export for ai.onnx.ml 3 (target_opset) to {' or '.join(TREE_OPS)}")
    _only_casts_around(model, node, where)
    try:
        ensemble = _ensemble(node, node_attributes(node), _features(model, where), where)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise IsthmusError(f"{where}: its {node.op_type} is not complete ({type(error).__name__}: {error}); export it again") from None
    return checked(ensemble), []


def _only_casts_around(model: onnx.ModelProto, node: onnx.NodeProto, where: str) -> None:
    writers = {name: other for other in model.graph.node for name in other.output}
    before, name = set(), node.input[0]
    while name in writers:
        writer = writers[name]
        before.add(id(writer))
        if writer.op_type not in BEFORE:
            raise IsthmusError(f"{where}: {writer.op_type} stands before the trees; give the trees alone, and do that to the data")
        name = writer.input[0]
    for other in model.graph.node:
        if other is not node and id(other) not in before and other.op_type not in BEHIND:
            raise IsthmusError(f"{where}: {other.op_type} ({other.name or other.output[0]}) stands beside the trees; export the trees alone")


def _features(model: onnx.ModelProto, where: str) -> int:
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    extents = [extent.dim_value for extent in inputs[0].type.tensor_type.shape.dim] if len(inputs) == 1 else []
    if len(extents) != 2 or extents[1] < 1:
        raise IsthmusError(f"{where}: expected one input of shape [N, features], found {[value.name for value in inputs]} {extents}")
    return int(extents[1])


def _ensemble(node: onnx.NodeProto, attributes: Mapping[str, Any], features: int, where: str) -> TreeEnsemble:
    odd = sorted(set(attributes["nodes_modes"]) - set(MODES))
    if odd:
        raise IsthmusError(f"{where}: a node that compares by {odd[0]} (a categorical split): encode the category as numbers and train again")
    transform = attributes.get("post_transform", "NONE")
    aggregate = attributes.get("aggregate_function", "SUM")
    if transform not in LINKS or aggregate not in ("SUM", "AVERAGE"):
        raise IsthmusError(f"{where}: {node.op_type} with {aggregate} and {transform}: expected SUM or AVERAGE, and one of {', '.join(LINKS)}")
    classifies = node.op_type == "TreeEnsembleClassifier"
    prefix = "class" if classifies else "target"
    labels = len(attributes.get("classlabels_int64s", ()) or attributes.get("classlabels_strings", ())) if classifies else int(attributes.get("n_targets", 1))
    given = trees_from_attributes(attributes, prefix, labels)
    modes = _by_tree(attributes, np.array(attributes["nodes_modes"]))
    trees = tuple(_less_equal(tree, mode) for tree, mode in zip(given, modes, strict=True))
    if aggregate == "AVERAGE":
        trees = tuple(replace(tree, value=tree.value / len(trees)) for tree in trees)
    base = numbers(attributes, "base_values").astype(np.float64)
    ensemble = TreeEnsemble(trees, features, base if base.size else np.zeros(labels), REGRESSION, LINKS[transform], f"{where}: ONNX, {node.op_type}")
    if not classifies:
        if labels != 1:
            raise IsthmusError(f"{where}: {labels} targets at once: export one model a target")
        return ensemble
    return _binary(ensemble, attributes) if labels == 2 else replace(ensemble, task=CLASSES)


def _binary(ensemble: TreeEnsemble, attributes: Mapping[str, Any]) -> TreeEnsemble:
    """Two classes as one margin. With weights for one class alone the operator takes it as the margin, or, were all of them positive, as a probability."""
    written = set(np.asarray(attributes["class_ids"]).tolist())
    if len(written) == 2:
        return with_one_margin(replace(ensemble, task=CLASSES))
    (column,) = written
    trees = tuple(replace(tree, value=tree.value[:, [column]]) for tree in ensemble.trees)
    base = ensemble.base[-1:]
    if bool((numbers(attributes, "class_weights") >= 0).all()):
        base = base - 0.5
    return replace(ensemble, trees=trees, base=base, task=BINARY)


def _by_tree(attributes: Mapping[str, Any], values: np.ndarray) -> list[np.ndarray]:
    tree_ids = np.asarray(attributes["nodes_treeids"])
    return [values[tree_ids == tree] for tree in np.unique(tree_ids)]


def _less_equal(tree: Tree, modes: np.ndarray) -> Tree:
    """Every comparison as x <= t: x < t with the next smaller t; x >= t and x > t with the children swapped."""
    strict = (modes == "BRANCH_LT") | (modes == "BRANCH_GTE")
    swapped = (modes == "BRANCH_GTE") | (modes == "BRANCH_GT")
    threshold = np.where(tree.feature == LEAF, np.float32(0), np.where(strict, below(tree.threshold), at_most(tree.threshold)))
    return replace(tree, threshold=threshold, left=np.where(swapped, tree.right, tree.left), right=np.where(swapped, tree.left, tree.right))
