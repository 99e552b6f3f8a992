# SPDX-License-Identifier: Apache-2.0
"""`TreeForm`: trees in integers, the form of a tree model; and `quantise`, which finds the smallest fixed point that decides as the library does.

A feature becomes q = clip(floor(x * 2^exponent), lowest threshold, highest threshold + 1), which keeps the order. The exponent is the smallest at
which the calibration sample next below a threshold and the one next above it become two integers; the threshold becomes an integer that parts
them. So x <= t and q(x) <= q(t) are the same for every threshold and every calibration sample. Clipping loses nothing: beyond the outermost
thresholds no comparison tells two values apart. Leaf values are multiples of 2^-score_exponent, summed exactly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from isthmus.errors import IsthmusError, Problem, ProblemsError
from isthmus.spec import TensorSpec
from isthmus.trees import BINARY, LEAF, REGRESSION, Tree, TreeEnsemble, decide

INPUT, OUTPUT = "features", "scores"
MAX_FEATURE_BITS = 32  # what conifer's ap_fixed was tried with; ONNX Runtime compares in double and would take 53
MAX_SCORE_BITS = 24  # ONNX Runtime gives the sum as float32
LEAST_AGREEMENT = 0.995
GUARD_BITS = 3  # finer than the calibration data asks for: samples not seen lie nearer to a threshold
LEAST_BITS = 8  # of the largest value, where the calibration data would do with fewer
EXPONENTS = range(-126, 150)  # what float32 itself spans


@dataclass(frozen=True, eq=False)
class TreeForm:
    """Thresholds, leaf values and base as integers, and how real features become integers. Everything exact, for every float32 input that is finite.

    `exponents`, `lowest`, `highest` are one number a feature; `feature_bits` and `score_bits` what the widest integer takes, its sign included.
    """

    trees: tuple[Tree, ...]
    base: np.ndarray
    exponents: np.ndarray
    lowest: np.ndarray
    highest: np.ndarray
    score_exponent: int
    task: str
    link: str
    source: str

    @property
    def features(self) -> int:
        return len(self.exponents)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec(INPUT, (1, self.features), "float32", "NC"),)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """A binary ensemble has a column a class as well, minus the score and the score: the larger one decides."""
        columns = 2 if self.task == BINARY else len(self.base)
        return (TensorSpec(OUTPUT, (1, columns), "int32", "NC", 2.0**-self.score_exponent, 0),)

    @property
    def depth(self) -> int:
        return max(tree.depth for tree in self.trees)

    @property
    def comparisons(self) -> int:
        return sum(len(tree.inner) for tree in self.trees)

    @property
    def feature_bits(self) -> int:
        return _bits(min(self.lowest.min(), 0), self.highest.max())

    @property
    def score_bits(self) -> int:
        return _bits(-_largest_sum(self.trees, self.base), _largest_sum(self.trees, self.base))

    def quantise(self, samples: np.ndarray) -> np.ndarray:
        """float32 (N, features) -> int64, saturated at the outermost thresholds."""
        return quantise_features(samples, self.exponents, self.lowest, self.highest)

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The reference: raw outputs for float32 samples (N, features). Raises `IsthmusError` on a missing input or a wrong shape."""
        samples = feeds.get(INPUT)
        if samples is None or samples.ndim != 2 or samples.shape[1] != self.features:
            raise IsthmusError(f"input {INPUT!r}: expected shape [N, {self.features}], found {'nothing' if samples is None else list(samples.shape)}")
        steps = self.quantise(samples)
        total = np.tile(self.base, (len(samples), 1))
        for tree in self.trees:
            total += tree.value[tree.leaves(steps)]
        return {OUTPUT: with_both_classes(total, self.task).astype(np.int32)}

    # ---- the file
    @classmethod
    def load(cls, path: str | Path) -> TreeForm:
        from isthmus.onnx_file import load_onnx
        from isthmus.tree_onnx import form_from_model

        return form_from_model(load_onnx(path))

    def save(self, path: str | Path) -> None:
        Path(path).write_bytes(self.to_bytes())

    def to_bytes(self) -> bytes:
        """A standard ONNX file (ai.onnx.ml), the same bytes for the same form: `model.onnx` of a bundle, and what ONNX Runtime runs."""
        from isthmus.tree_onnx import model_from_form

        return bytes(model_from_form(self).SerializeToString(deterministic=True))

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(self.to_bytes()).hexdigest()


def quantise_features(samples: np.ndarray, exponents: np.ndarray, lowest: np.ndarray, highest: np.ndarray) -> np.ndarray:
    """floor(x * 2^exponent), clipped: in float64, where scaling a float32 by a power of two is exact."""
    steps = np.floor(np.ldexp(np.asarray(samples, np.float64), exponents))
    clipped: np.ndarray = np.clip(steps, lowest, highest).astype(np.int64)
    return clipped


def with_both_classes(total: np.ndarray, task: str) -> np.ndarray:
    return np.concatenate([-total, total], axis=1) if task == BINARY else total


def quantise(ensemble: TreeEnsemble, samples: np.ndarray) -> tuple[TreeForm, list[str]]:
    """The form, and sentences worth keeping. `samples` are calibration data, float32 (N, features).

    Raises `ProblemsError` where a feature needs more than `MAX_FEATURE_BITS`, or where `MAX_SCORE_BITS` are too few for the decisions.
    """
    samples = _calibration(samples, ensemble)
    grids = _feature_grids(ensemble, samples)
    exponents = np.array([grid.exponent for grid in grids], np.int64)
    lowest = np.array([grid.steps[0] if len(grid.steps) else 0 for grid in grids], np.int64)
    highest = np.array([grid.steps[-1] + 1 if len(grid.steps) else 0 for grid in grids], np.int64)
    trees = tuple(_with_integer_thresholds(tree, grids) for tree in ensemble.trees)
    finest = _finest_score_exponent(ensemble)
    float_scores = ensemble.scores(samples)

    def form_at(score_exponent: int) -> TreeForm:
        scaled = tuple(Tree(tree.feature, tree.threshold, tree.left, tree.right, _steps(tree.value, score_exponent, tree.feature)) for tree in trees)
        base = np.rint(np.ldexp(ensemble.base, score_exponent)).astype(np.int64)
        return TreeForm(scaled, base, exponents, lowest, highest, score_exponent, ensemble.task, ensemble.link, ensemble.source)

    if ensemble.task == REGRESSION:
        form = form_at(finest)
        off = float(np.abs(_real(form, samples) - float_scores).max())
        return form, [f"{form.feature_bits}-bit features, {form.score_bits}-bit scores: on {len(samples)} samples at most {off:.3g} from the library's scores"]
    expected = decide(float_scores, ensemble.task)
    landed = [tree.leaves(form_at(0).quantise(samples)) for tree in trees]

    def agrees_at(score_exponent: int) -> bool:
        form = form_at(score_exponent)
        sums = form.base + sum(tree.value[leaves] for tree, leaves in zip(form.trees, landed, strict=True))
        return bool((decide(sums, ensemble.task) == expected).all())

    # A coarse grid may decide alike by chance and the next finer one not: `GUARD_BITS` finer ones in a row must agree as well.
    agreeing = [agrees_at(exponent) for exponent in range(finest + 2 - MAX_SCORE_BITS, finest + 1)]
    rows = (index for index in range(len(agreeing) - GUARD_BITS) if all(agreeing[index : index + GUARD_BITS + 1]))
    form = form_at(finest + 2 - MAX_SCORE_BITS + next(rows, len(agreeing) - 1 - GUARD_BITS) + GUARD_BITS)
    agreed = float(np.mean(decide(_real(form, samples), ensemble.task) == expected))
    if agreed < LEAST_AGREEMENT:
        found = f"{MAX_SCORE_BITS}-bit scores decide {100 * agreed:.2f} % of the calibration samples as the library does"
        raise ProblemsError(ensemble.source, [Problem("scores", "score-width", found, "leave out leaves of tiny weight, or train with a larger learning rate")])
    told = f"{form.feature_bits}-bit features, {form.score_bits}-bit scores: {100 * agreed:.4g} % of {len(samples)} decisions are the float ensemble's"
    return form, [told]


def _real(form: TreeForm, samples: np.ndarray) -> np.ndarray:
    """Scores of the reference in real numbers, one column an output of the ensemble."""
    return np.ldexp(form.run({INPUT: samples})[OUTPUT].astype(np.float64), -form.score_exponent)[:, -len(form.base) :]


def _calibration(samples: np.ndarray, ensemble: TreeEnsemble) -> np.ndarray:
    if samples.ndim != 2 or samples.shape[1] != ensemble.features or not len(samples):
        raise IsthmusError(f"calibration data: expected [N, {ensemble.features}] (the features of {ensemble.source}), found {list(samples.shape)}")
    if not np.isfinite(samples).all():
        row, column = np.argwhere(~np.isfinite(samples))[0]
        raise IsthmusError(
            f"calibration data: sample {row} has no finite value for feature {column}: missing values are not routed; fill them in as the model's user will"
        )
    return samples.astype(np.float32)


@dataclass(frozen=True, eq=False)
class _Grid:
    """One feature: its thresholds (sorted, each once), and the integers they become at `exponent`."""

    exponent: int
    thresholds: np.ndarray
    steps: np.ndarray

    @property
    def bits(self) -> int:
        return _bits(int(min(self.steps.min(), 0)), int(self.steps.max()) + 1) if len(self.steps) else 0


def _feature_grids(ensemble: TreeEnsemble, samples: np.ndarray) -> list[_Grid]:
    grids, problems = [], []
    for index, thresholds in enumerate(ensemble.thresholds()):
        grid = _grid(thresholds, np.unique(samples[:, index]).astype(np.float64))
        if grid.bits > MAX_FEATURE_BITS:
            span = f"thresholds from {thresholds[0]:g} to {thresholds[-1]:g}"
            found = f"{span} need {grid.bits} bits to part the calibration samples as they do, and {MAX_FEATURE_BITS} is the most"
            problems.append(
                Problem(f"feature {index}", "feature-width", found, "bring its values closer together (a logarithm, ranks, fewer digits) and train again")
            )
        grids.append(grid)
    if problems:
        raise ProblemsError(ensemble.source, problems)
    return grids


def _grid(thresholds: np.ndarray, values: np.ndarray) -> _Grid:
    """The coarsest grid that parts `values` as the thresholds do, and finer than that by `GUARD_BITS` as far as `MAX_FEATURE_BITS` go."""
    exact = thresholds.astype(np.float64)
    if not len(exact):
        return _Grid(0, exact, np.zeros(0, np.int64))
    after = np.searchsorted(values, exact, side="right")
    below = np.where(after > 0, values[np.maximum(after - 1, 0)], -np.inf)
    above = np.where(after < len(values), values[np.minimum(after, len(values) - 1)], np.inf)
    least = _least_exponent(below, above)
    magnitude = float(np.abs(np.concatenate([exact, values])).max())
    wanted = max(least + GUARD_BITS, LEAST_BITS - int(np.ceil(np.log2(magnitude))) if magnitude > 0 else 0)
    made = (_Grid(exponent, exact, _threshold_steps(exact, above, exponent)) for exponent in range(wanted, least - 1, -1))
    return next((grid for grid in made if grid.bits <= MAX_FEATURE_BITS), _Grid(least, exact, _threshold_steps(exact, above, least)))


def _least_exponent(below: np.ndarray, above: np.ndarray) -> int:
    """The smallest exponent at which every value just below a threshold and the one just above it are two integers."""
    low, high = EXPONENTS.start, EXPONENTS.stop - 1  # two float32 apart differ on the finest grid; finer grids keep what coarser ones part
    while low < high:
        middle = (low + high) // 2
        if bool((np.floor(np.ldexp(above, middle)) > np.floor(np.ldexp(below, middle))).all()):
            high = middle
        else:
            low = middle + 1
    return low


def _threshold_steps(exact: np.ndarray, above: np.ndarray, exponent: int) -> np.ndarray:
    """floor(t * 2^exponent), or the integer under the next larger calibration value where both fall on one."""
    steps: np.ndarray = np.minimum(np.floor(np.ldexp(exact, exponent)), np.floor(np.ldexp(above, exponent)) - 1).astype(np.int64)
    return steps


def _bits(lowest: int, highest: int) -> int:
    """Bits of the two's complement that holds both."""
    return max((-int(lowest) - 1).bit_length() if lowest < 0 else 0, int(highest).bit_length() if highest > 0 else 0) + 1


def _with_integer_thresholds(tree: Tree, grids: list[_Grid]) -> Tree:
    steps = np.zeros(len(tree.feature), np.int64)
    for index in tree.inner:
        grid = grids[tree.feature[index]]
        steps[index] = grid.steps[np.searchsorted(grid.thresholds, float(tree.threshold[index]))]
    return Tree(tree.feature, steps, tree.left, tree.right, tree.value)


def _steps(value: np.ndarray, score_exponent: int, feature: np.ndarray) -> np.ndarray:
    """Leaf values as integers, half to even; 0 at inner nodes."""
    steps: np.ndarray = np.rint(np.ldexp(np.where((feature == LEAF)[:, None], value, 0.0), score_exponent)).astype(np.int64)
    return steps


def _largest_sum(trees: tuple[Tree, ...], base: np.ndarray) -> int:
    """No partial sum of any output is larger in magnitude, in whatever order the trees are added."""
    return int((np.abs(base) + sum(np.abs(tree.value).max(axis=0) for tree in trees)).max())


def _finest_score_exponent(ensemble: TreeEnsemble) -> int:
    """The largest exponent whose sums stay within `MAX_SCORE_BITS`, with half a step of rounding for each summand."""
    largest = np.abs(ensemble.base) + sum(np.abs(np.where((tree.feature == LEAF)[:, None], tree.value, 0)).max(axis=0) for tree in ensemble.trees)
    room = 2.0 ** (MAX_SCORE_BITS - 1) - 1 - (len(ensemble.trees) + 1)
    peak = float(largest.max())
    return int(np.floor(np.log2(room / peak))) if peak > 0 else 0
