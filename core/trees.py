# SPDX-License-Identifier: Apache-2.0
"""`TreeEnsemble`: a random forest or boosted trees as numpy arrays, whichever library trained them; every reader fills it, `tree_form` quantises it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from isthmus.errors import IsthmusError

BINARY, CLASSES, REGRESSION = "binary", "classes", "regression"
TASKS = (BINARY, CLASSES, REGRESSION)
# What the library makes of a score where a user asks for a prediction. Every one is monotone: decisions are those of the scores.
LINKS = ("none", "sigmoid", "softmax", "exp")
LEAF = -1
MAX_NODES = 10_000_000


@dataclass(frozen=True, eq=False)
class Tree:
    """One tree as arrays over its nodes; node 0 is the root. A sample goes left where x[feature] <= threshold.

    `feature` is `LEAF` at a leaf; `value` is (nodes, outputs) and counts at leaves alone. `threshold` is float32 in a float ensemble and int64
    in a quantised one.
    """

    feature: np.ndarray
    threshold: np.ndarray
    left: np.ndarray
    right: np.ndarray
    value: np.ndarray

    @property
    def inner(self) -> np.ndarray:
        """Indices of the nodes that compare."""
        return np.flatnonzero(self.feature != LEAF)

    @cached_property
    def depth(self) -> int:
        """Comparisons on the longest way; 0 for a lone leaf."""
        depth, level = 0, np.array([0])
        while len(level := level[self.feature[level] != LEAF]):
            level = np.concatenate([self.left[level], self.right[level]])
            depth += 1
        return depth

    def leaves(self, samples: np.ndarray) -> np.ndarray:
        """The leaf in which each sample (N, features) ends."""
        at = np.zeros(len(samples), np.int64)
        rows = np.arange(len(samples))
        for _ in range(self.depth):
            feature = self.feature[at]
            goes_left = samples[rows, np.maximum(feature, 0)] <= self.threshold[at]
            at = np.where(feature == LEAF, at, np.where(goes_left, self.left[at], self.right[at]))
        return at


@dataclass(frozen=True, eq=False)
class TreeEnsemble:
    """Trees whose leaf values are summed: score = base + sum of values, (outputs,) for a sample of `features` float32 numbers.

    `task` "binary" has one output, class 1 where it is above 0; "classes" one output a class, three or more, the largest decides, the first on a tie;
    "regression" one output. `link` is the library's last function, which no decision needs. `source` is one phrase for reports.
    """

    trees: tuple[Tree, ...]
    features: int
    base: np.ndarray
    task: str
    link: str
    source: str

    @property
    def outputs(self) -> int:
        return len(self.base)

    @property
    def depth(self) -> int:
        return max(tree.depth for tree in self.trees)

    @property
    def nodes(self) -> int:
        return sum(len(tree.feature) for tree in self.trees)

    def scores(self, samples: np.ndarray) -> np.ndarray:
        """(N, outputs) float64 for float32 samples (N, features)."""
        total = np.tile(self.base, (len(samples), 1)).astype(np.float64)
        for tree in self.trees:
            total += tree.value[tree.leaves(samples)]
        return total

    def thresholds(self) -> list[np.ndarray]:
        """Every threshold of each feature, sorted, each once."""
        feature = np.concatenate([tree.feature[tree.inner] for tree in self.trees])
        threshold = np.concatenate([tree.threshold[tree.inner] for tree in self.trees])
        return [np.unique(threshold[feature == index]) for index in range(self.features)]


def decide(scores: np.ndarray, task: str) -> np.ndarray:
    """The class of each sample. Raises `IsthmusError` for a regression, which decides nothing."""
    if task == REGRESSION:
        raise IsthmusError("a regression has no decisions")
    decided: np.ndarray = (scores[:, 0] > 0).astype(np.int64) if task == BINARY else scores.argmax(axis=1)
    return decided


def checked(ensemble: TreeEnsemble) -> TreeEnsemble:
    """The ensemble itself. Raises `IsthmusError` where a file described no trees: an index outside, a node with two parents, a number that is not finite."""
    where = ensemble.source
    if not ensemble.trees:
        raise IsthmusError(f"{where}: holds no trees")
    if ensemble.task not in TASKS or ensemble.link not in LINKS:
        raise IsthmusError(f"{where}: task {ensemble.task!r} with link {ensemble.link!r} is none that is known ({', '.join(TASKS)}; {', '.join(LINKS)})")
    expected = {BINARY: ensemble.outputs == 1, REGRESSION: ensemble.outputs == 1, CLASSES: ensemble.outputs >= 3}
    if not expected[ensemble.task] or ensemble.features < 1:
        raise IsthmusError(f"{where}: {ensemble.outputs} outputs and {ensemble.features} features do not make a {ensemble.task} ensemble")
    if not np.isfinite(ensemble.base).all():
        raise IsthmusError(f"{where}: its base score is not finite")
    for index, tree in enumerate(ensemble.trees):
        if fault := _fault(tree, ensemble.features, ensemble.outputs):
            raise IsthmusError(f"{where}: tree {index}: {fault}; save the model again")
    return ensemble


def _fault(tree: Tree, features: int, outputs: int) -> str:
    count = len(tree.feature)
    if not 0 < count <= MAX_NODES or any(len(array) != count for array in (tree.threshold, tree.left, tree.right, tree.value)):
        return "its arrays differ in length"
    if tree.value.shape != (count, outputs):
        return f"values of shape {list(tree.value.shape)}, expected {[count, outputs]}"
    inner = tree.inner
    if len(inner) and (tree.feature[inner].min() < 0 or tree.feature.max() >= features):
        return f"compares a feature outside 0 to {features - 1}"
    children = np.concatenate([tree.left[inner], tree.right[inner]])
    if len(children) and (children.min() < 1 or children.max() >= count):
        return "a child outside the tree"
    if len(np.unique(children)) != len(children):
        return "a node with two parents"
    leaves = tree.feature == LEAF
    if not np.isfinite(tree.threshold[inner]).all() or not np.isfinite(tree.value[leaves]).all():
        return "a threshold or leaf value that is not finite"
    return ""  # every node has one parent and the root none: every way from the root ends


def with_one_margin(ensemble: TreeEnsemble) -> TreeEnsemble:
    """Two classes with a score each as a binary ensemble: what decides is the second less the first."""
    if ensemble.task != CLASSES or ensemble.outputs != 2:
        return ensemble
    trees = tuple(replace(tree, value=tree.value[:, 1:] - tree.value[:, :1]) for tree in ensemble.trees)
    link = "sigmoid" if ensemble.link == "softmax" else ensemble.link
    return replace(ensemble, trees=trees, base=ensemble.base[1:] - ensemble.base[:1], task=BINARY, link=link)


def below(threshold: Sequence[float] | np.ndarray) -> np.ndarray:
    """The float32 thresholds t' for which x <= t' is what x < t is, for every float32 x."""
    exact = np.asarray(threshold, np.float64)
    near = exact.astype(np.float32)
    return np.where(near.astype(np.float64) < exact, near, np.nextafter(near, np.float32(-np.inf))).astype(np.float32)


def at_most(threshold: Sequence[float] | np.ndarray) -> np.ndarray:
    """The float32 thresholds t' for which x <= t' is what x <= t is, for every float32 x: rounded down, never to nearest."""
    exact = np.asarray(threshold, np.float64)
    near = exact.astype(np.float32)
    return np.where(near.astype(np.float64) <= exact, near, np.nextafter(near, np.float32(-np.inf))).astype(np.float32)
