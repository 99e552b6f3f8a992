# SPDX-License-Identifier: Apache-2.0
"""What a tree model costs: comparisons and additions, no multiplications."""

from __future__ import annotations

from isthmus.cost import Cost, NodeCost
from isthmus.tree_form import TreeForm


def cost_of_trees(form: TreeForm) -> Cost:
    """`flops` counts the comparisons on the longest way through each tree and one addition a tree and output; weights are thresholds and leaf values."""
    flops = sum(tree.depth + len(form.base) for tree in form.trees)
    leaves = sum(len(tree.feature) - len(tree.inner) for tree in form.trees)
    numbers = form.comparisons + leaves * len(form.base)
    weight_bytes = -(-form.comparisons * form.feature_bits // 8) + -(-leaves * len(form.base) * form.score_bits // 8)
    (output,) = form.outputs
    row = NodeCost("trees", f"{len(form.trees)} trees", output.shape, numbers, 0, 0, flops, flops, weight_bytes, 4 * output.size)
    activation_bytes = 8 * form.features + 4 * output.size  # features as doubles, as ONNX Runtime compares them
    return Cost(0, flops, flops, weight_bytes, activation_bytes, numbers, 0, (row,), best_order_bytes=activation_bytes)
