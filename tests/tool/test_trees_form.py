# SPDX-License-Identifier: Apache-2.0
"""Trees in integers: the fixed point decides as the float ensemble on the calibration data, and the file says what the arrays say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.errors import IsthmusError, ProblemsError
from isthmus.tree_bundle import make_golden
from isthmus.tree_form import INPUT, MAX_FEATURE_BITS, MAX_SCORE_BITS, OUTPUT, TreeForm, quantise
from isthmus.trees import BINARY, CLASSES, LEAF, REGRESSION, Tree, TreeEnsemble, decide


def random_tree(generator: np.random.Generator, samples: np.ndarray, outputs: int, depth: int) -> Tree:
    """A full tree whose thresholds are data, next to data, or between."""
    inner, total = 2**depth - 1, 2 ** (depth + 1) - 1
    feature = np.concatenate([generator.integers(0, samples.shape[1], inner), np.full(total - inner, LEAF)])
    drawn = samples[generator.integers(0, len(samples), inner), feature[:inner]]
    threshold = np.select(
        [generator.random(inner) < 0.3, generator.random(inner) < 0.3],
        [drawn, np.nextafter(drawn, np.float32(-np.inf))],
        (drawn + samples[generator.integers(0, len(samples), inner), feature[:inner]]) / 2,
    ).astype(np.float32)
    nodes = np.arange(total)
    left, right = (np.where(nodes < inner, 2 * nodes + side, 0) for side in (1, 2))
    return Tree(feature, np.concatenate([threshold, np.zeros(total - inner, np.float32)]), left, right, generator.standard_normal((total, outputs)))


def random_ensemble(seed: int, task: str, scale: float = 1.0) -> tuple[TreeEnsemble, np.ndarray]:
    generator = np.random.default_rng(seed)
    samples = (generator.standard_normal((60, 3)) * [scale, 1.0, 100.0]).astype(np.float32)
    outputs = 3 if task == CLASSES else 1
    trees = tuple(random_tree(generator, samples, outputs, int(generator.integers(0, 4))) for _ in range(4))
    return TreeEnsemble(trees, 3, generator.standard_normal(outputs), task, "none", "random"), samples


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([BINARY, CLASSES, REGRESSION]), st.sampled_from([1e-30, 1e-4, 1.0, 3e20]))
def test_every_calibration_sample_ends_in_the_same_leaves(seed: int, task: str, scale: float) -> None:
    ensemble, samples = random_ensemble(seed, task, scale)
    form, _ = quantise(ensemble, samples)
    steps = form.quantise(samples)
    for given_tree, made in zip(ensemble.trees, form.trees, strict=True):
        assert np.array_equal(given_tree.leaves(samples), made.leaves(steps))
    assert form.feature_bits <= MAX_FEATURE_BITS and form.score_bits <= MAX_SCORE_BITS
    if task != REGRESSION:
        scores = form.run({INPUT: samples})[OUTPUT]
        decided = scores.argmax(axis=1)
        assert np.array_equal(decided, decide(ensemble.scores(samples), task))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([BINARY, CLASSES, REGRESSION]))
def test_the_file_is_the_form_and_onnx_runtime_gives_the_same_integers(seed: int, task: str) -> None:
    ensemble, samples = random_ensemble(seed, task)
    form, _ = quantise(ensemble, samples)
    data = form.to_bytes()
    from isthmus.tree_onnx import form_from_model

    again = form_from_model(onnx.load_from_string(data))
    assert again.digest == form.digest
    golden = make_golden(form, None)
    session = ort.InferenceSession(data, providers=["CPUExecutionProvider"])
    made = np.concatenate([session.run(None, {INPUT: sample[None]})[0] for sample in golden[f"input/{INPUT}"]])
    assert np.array_equal(made, golden[f"output/{OUTPUT}"])
    assert np.array_equal(again.run({INPUT: golden[f"input/{INPUT}"]})[OUTPUT], made)


def test_golden_samples_lie_on_both_sides_of_thresholds() -> None:
    ensemble, samples = random_ensemble(5, BINARY)
    form, _ = quantise(ensemble, samples)
    steps = form.quantise(make_golden(form, None)[f"input/{INPUT}"])
    distances = [set((steps[:, tree.feature[node]] - tree.threshold[node]).tolist()) for tree in form.trees for node in tree.inner]
    assert len(distances) > 5 and all({0, 1} <= found for found in distances)


def stump(threshold: float, values: tuple[float, float] = (-1.0, 1.0)) -> TreeEnsemble:
    children = (np.array([1, 0, 0]), np.array([2, 0, 0]))
    tree = Tree(np.array([0, LEAF, LEAF]), np.array([threshold, 0, 0], np.float32), *children, np.array([[0.0], [values[0]], [values[1]]]))
    return TreeEnsemble((tree,), 1, np.zeros(1), BINARY, "none", "stump")


def test_the_width_follows_what_the_data_ask_for() -> None:
    coarse, _ = quantise(stump(0.5), np.array([[0.0], [1.0]], np.float32))
    fine, _ = quantise(stump(0.5), np.array([[0.5], [0.500001]], np.float32))
    assert coarse.feature_bits <= 10 < fine.feature_bits


def test_a_feature_too_wide_is_a_problem() -> None:
    """A threshold at 1e9 and one at 1e-6, both needed."""
    tall = stump(1e9).trees[0]
    small = stump(1e-6).trees[0]
    ensemble = replace(stump(0.0), trees=(tall, small))
    samples = np.array([[0.0], [1e-6], [2e-6], [1e9], [2e9]], np.float32)
    with pytest.raises(ProblemsError, match=rf"feature 0: thresholds from 1e-06 to 1e\+09 need \d+ bits .* {MAX_FEATURE_BITS} is the most") as caught:
        quantise(ensemble, samples)
    assert [problem.rule for problem in caught.value.problems] == ["feature-width"]


def test_scores_too_close_for_the_width_are_a_problem() -> None:
    """Two huge leaves cancel, and what decides is far below the last bit."""
    huge = Tree(*(np.array([value]) for value in (LEAF, 0.0, 0, 0)), np.array([[1e12]]))
    ensemble = replace(stump(0.5, (-1e-6, 1e-6)), trees=(huge, replace(huge, value=-huge.value), stump(0.5, (-1e-6, 1e-6)).trees[0]))
    with pytest.raises(ProblemsError, match="score-width"):
        quantise(ensemble, np.array([[0.0], [1.0]], np.float32))


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (np.zeros((3, 2), np.float32), r"expected \[N, 1\]"),
        (np.zeros((0, 1), np.float32), r"expected \[N, 1\]"),
        (np.array([[0.0], [np.nan]], np.float32), "sample 1 has no finite value for feature 0: missing values are not routed"),
    ],
)
def test_calibration_data_that_do_not_fit(samples: np.ndarray, message: str) -> None:
    with pytest.raises(IsthmusError, match=message):
        quantise(stump(0.5), samples)


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    form, _ = quantise(stump(0.5), np.array([[0.0], [1.0]], np.float32))
    form.save(tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    model.graph.node[2].op_type = "Ceil"
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(IsthmusError, match="not in the form that isthmus writes"):
        TreeForm.load(tmp_path / "model.onnx")
    model.metadata_props[0].value = '{"schema": 9}'
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(IsthmusError, match="schema 9, this version reads schema 1"):
        TreeForm.load(tmp_path / "model.onnx")


def test_a_missing_input_is_refused() -> None:
    form, _ = quantise(stump(0.5), np.array([[0.0], [1.0]], np.float32))
    with pytest.raises(IsthmusError, match=r"expected shape \[N, 1\], found nothing"):
        form.run({})
