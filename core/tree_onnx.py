# SPDX-License-Identifier: Apache-2.0
"""Trees as ONNX's `ai.onnx.ml` operators: the arrays of one such node, and the file of a `TreeForm`, written and read back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from isthmus.errors import IsthmusError
from isthmus.tree_form import INPUT, OUTPUT, TreeForm
from isthmus.trees import BINARY, LEAF, Tree

ML_DOMAIN, ML_OPSET, OPSET, IR_VERSION = "ai.onnx.ml", 3, 20, 9
FORM_KEY, FORM_SCHEMA = "isthmus.trees", 1
LESS_EQUAL, NODE_LEAF = "BRANCH_LEQ", "LEAF"


# ---- the form's file
def model_from_form(form: TreeForm) -> onnx.ModelProto:
    """Cast, Mul, Floor, Max, Min (features to integers, exactly, in double), TreeEnsembleRegressor, Cast."""
    constants = {
        "scales": np.ldexp(1.0, form.exponents),
        "lowest": form.lowest.astype(np.float64),
        "highest": form.highest.astype(np.float64),
    }
    last = "sums" if form.task == BINARY else OUTPUT
    nodes = [
        helper.make_node("Cast", [INPUT], ["wide"], "widen", to=TensorProto.DOUBLE),
        helper.make_node("Mul", ["wide", "scales"], ["scaled"], "scale"),
        helper.make_node("Floor", ["scaled"], ["floored"], "floor"),
        helper.make_node("Max", ["floored", "lowest"], ["raised"], "saturate_low"),
        helper.make_node("Min", ["raised", "highest"], ["steps"], "saturate_high"),
        helper.make_node("TreeEnsembleRegressor", ["steps"], ["total"], "trees", domain=ML_DOMAIN, **_attributes(form)),
        helper.make_node("Cast", ["total"], [last], "integer", to=TensorProto.INT32),
    ]
    if form.task == BINARY:
        nodes += [
            helper.make_node("Neg", [last], ["negative"], "other_class"),
            helper.make_node("Concat", ["negative", last], [OUTPUT], "both_classes", axis=1),
        ]
    (source,), (target,) = form.inputs, form.outputs
    graph = helper.make_graph(
        nodes,
        "trees",
        [helper.make_tensor_value_info(source.name, TensorProto.FLOAT, source.shape)],
        [helper.make_tensor_value_info(target.name, TensorProto.INT32, target.shape)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(ML_DOMAIN, ML_OPSET)], ir_version=IR_VERSION, producer_name="isthmus"
    )
    about = {"schema": FORM_SCHEMA, "task": form.task, "link": form.link, "source": form.source, "score_exponent": form.score_exponent}
    helper.set_model_props(model, {FORM_KEY: json.dumps(about)})
    return model


def is_tree_form(model: onnx.ModelProto) -> bool:
    return any(entry.key == FORM_KEY for entry in model.metadata_props)


def form_from_model(model: onnx.ModelProto) -> TreeForm:
    """Raises `IsthmusError` where the file is not, node for node, what `model_from_form` writes."""
    about = next((entry.value for entry in model.metadata_props if entry.key == FORM_KEY), None)
    try:
        facts = json.loads(about or "")
        if facts["schema"] != FORM_SCHEMA:
            raise IsthmusError(f"the tree model has schema {facts['schema']!r}, this version reads schema {FORM_SCHEMA}; compile again")
        constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        node = next(node for node in model.graph.node if node.op_type == "TreeEnsembleRegressor")
        attributes = {attribute.name: _value(attribute) for attribute in node.attribute}
        base = np.asarray(attributes["base_values"], np.float64)
        form = TreeForm(
            tuple(_integer(tree) for tree in trees_from_attributes(attributes, "target", len(base))),
            base.astype(np.int64),
            np.log2(constants["scales"]).astype(np.int64),
            constants["lowest"].astype(np.int64),
            constants["highest"].astype(np.int64),
            int(facts["score_exponent"]),
            str(facts["task"]),
            str(facts["link"]),
            str(facts["source"]),
        )
        same = model_from_form(form).SerializeToString(deterministic=True) == model.SerializeToString(deterministic=True)
    except (KeyError, TypeError, ValueError, StopIteration, OverflowError, IndexError):
        same = False
    if not same:
        raise IsthmusError("the tree model is not in the form that isthmus writes: compile it again")
    return form


def _attributes(form: TreeForm) -> dict[str, Any]:
    """Nodes tree after tree, leaves' values once for each output that has one."""
    nodes = [(tree_id, index) for tree_id, tree in enumerate(form.trees) for index in range(len(tree.feature))]
    joined = {name: np.concatenate([getattr(tree, name) for tree in form.trees]) for name in ("feature", "threshold", "left", "right")}
    leaf = joined["feature"] == LEAF
    values = [
        (tree_id, index, output, int(tree.value[index, output]))
        for tree_id, tree in enumerate(form.trees)
        for index in np.flatnonzero(tree.feature == LEAF)
        for output in range(len(form.base))
        if tree.value[index, output] or output == 0
    ]
    return {
        "n_targets": len(form.base),
        "aggregate_function": "SUM",
        "post_transform": "NONE",
        "base_values": [float(value) for value in form.base],
        "nodes_treeids": [tree_id for tree_id, _ in nodes],
        "nodes_nodeids": [index for _, index in nodes],
        "nodes_featureids": [int(index) for index in np.where(leaf, 0, joined["feature"])],
        "nodes_modes": [NODE_LEAF if is_leaf else LESS_EQUAL for is_leaf in leaf],
        "nodes_truenodeids": [int(index) for index in np.where(leaf, 0, joined["left"])],
        "nodes_falsenodeids": [int(index) for index in np.where(leaf, 0, joined["right"])],
        "nodes_values_as_tensor": numpy_helper.from_array(np.where(leaf, 0, joined["threshold"]).astype(np.float64), "thresholds"),
        "target_treeids": [tree_id for tree_id, _, _, _ in values],
        "target_nodeids": [int(index) for _, index, _, _ in values],
        "target_ids": [output for _, _, output, _ in values],
        "target_weights_as_tensor": numpy_helper.from_array(np.array([value for *_, value in values], np.float64), "values"),
    }


def _integer(tree: Tree) -> Tree:
    return Tree(tree.feature, tree.threshold.astype(np.int64), tree.left, tree.right, tree.value.astype(np.int64))


# ---- any tree node
def node_attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """Attributes by name; tensors as arrays, words as text."""
    return {attribute.name: _value(attribute) for attribute in node.attribute}


def _value(attribute: onnx.AttributeProto) -> Any:
    value = helper.get_attribute_value(attribute)
    if isinstance(value, onnx.TensorProto):
        return numpy_helper.to_array(value)
    if isinstance(value, bytes):
        return value.decode()
    return [word.decode() for word in value] if isinstance(value, list) and value and isinstance(value[0], bytes) else value


def numbers(attributes: Mapping[str, Any], name: str) -> np.ndarray:
    """`<name>_as_tensor`, else `<name>` (float32 as the file has it)."""
    tensor = attributes.get(f"{name}_as_tensor")
    return np.asarray(attributes.get(name, ()), np.float32) if tensor is None else np.asarray(tensor)


def trees_from_attributes(attributes: Mapping[str, Any], prefix: str, outputs: int) -> list[Tree]:
    """The trees as the node has them, thresholds and modes untouched: what compares otherwise than `BRANCH_LEQ` is the reader's to rewrite.

    Leaf values are summed where one leaf has several for the same output. Raises `IsthmusError` where an index leads nowhere.
    """
    tree_ids, node_ids = (np.asarray(attributes[f"nodes_{name}"], np.int64) for name in ("treeids", "nodeids"))
    place = {key: position for position, key in enumerate(zip(tree_ids.tolist(), node_ids.tolist(), strict=True))}
    order = [np.flatnonzero(tree_ids == tree) for tree in np.unique(tree_ids)]
    local = np.zeros(len(tree_ids), np.int64)
    for positions in order:
        local[positions] = np.arange(len(positions))
    leaf = np.array([mode == NODE_LEAF for mode in attributes["nodes_modes"]], bool)
    children = [_children(attributes[f"nodes_{side}nodeids"], tree_ids, leaf, place, local) for side in ("true", "false")]
    value = np.zeros((len(tree_ids), outputs), np.float64)
    keys = zip(attributes[f"{prefix}_treeids"], attributes[f"{prefix}_nodeids"], strict=True)
    ids = np.asarray(attributes[f"{prefix}_ids"], np.int64)
    try:
        if ids.size and ids.min() < 0:
            raise IndexError
        owners = np.asarray([place[key] for key in keys], np.int64)
        np.add.at(value, (owners, ids), numbers(attributes, f"{prefix}_weights").astype(np.float64))
    except (KeyError, IndexError):
        raise IsthmusError("the tree model gives a value to a leaf or an output that it does not have") from None
    feature = np.where(leaf, LEAF, np.asarray(attributes["nodes_featureids"], np.int64))
    threshold = np.where(leaf, 0, numbers(attributes, "nodes_values"))
    return [Tree(feature[p], threshold[p], children[0][p], children[1][p], value[p]) for p in order]


def _children(ids: Sequence[int], tree_ids: np.ndarray, leaf: np.ndarray, place: Mapping[tuple[int, int], int], local: np.ndarray) -> np.ndarray:
    found = np.zeros(len(tree_ids), np.int64)
    for position, (tree, child) in enumerate(zip(tree_ids.tolist(), ids, strict=True)):
        if not leaf[position]:
            if (tree, child) not in place:
                raise IsthmusError(f"the tree model names node {child} of tree {tree}, which is not there")
            found[position] = local[place[tree, child]]
    return found
