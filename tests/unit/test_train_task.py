# SPDX-License-Identifier: Apache-2.0
"""Networks that decide no class: several outputs, float targets, a metric of their own, from training to the bundle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import isthmus
from isthmus.errors import IsthmusError
from isthmus.train.data import Split
from isthmus.train.loop import TrainConfig, fit, predict
from isthmus.train.system import train_system
from isthmus.train.task import CLASSIFICATION, Arrays, Outputs, Task, mean_squared_error
from isthmus.train.zoo import ZooSystem, digits


class Halves(nn.Module):
    """A 4x4 image to what its rows and its columns hold: two outputs, as a network of key points has them."""

    def __init__(self, config: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, config, 3, padding=1), nn.ReLU(), nn.Flatten(1))
        self.rows, self.columns = nn.Linear(16 * config, 4), nn.Linear(16 * config, 4)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(image)
        return self.rows(features), self.columns(features)


def data(seed: int = 0) -> Split:
    """Targets are float32 (N, 2, 4): the means of rows and of columns."""
    images = np.random.default_rng(seed).normal(size=(160, 1, 4, 4)).astype(np.float32)
    targets = np.stack([images[:, 0].mean(axis=2), images[:, 0].mean(axis=1)], axis=1)
    parts = {
        f"{axis}_{part}": array[a:b]
        for axis, array in (("x", images), ("y", targets))
        for part, a, b in (("train", 0, 96), ("val", 96, 128), ("test", 128, 160))
    }
    return Split("means", **parts, classes=(), seed=seed)


def loss(outputs: Outputs, targets: Tensor) -> Tensor:
    return mean_squared_error(outputs, (targets[:, 0], targets[:, 1]))


def signal_to_error_db(outputs: Arrays, targets: np.ndarray) -> float:
    assert isinstance(outputs, tuple)
    error = np.stack(outputs, axis=1) - targets
    return float(10 * np.log10(np.mean(targets**2) / np.mean(error**2)))


def flipped(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The image upside down, for half of the batches: the rows' means turn with it."""
    if torch.rand(()) < 0.5:
        return inputs, targets
    return inputs.flip(2), torch.stack([targets[:, 0].flip(1), targets[:, 1]], dim=1)


TASK = Task("signal to error (dB)", loss, signal_to_error_db, augment=flipped)
CONFIG = TrainConfig(epochs=16, batch_size=16, learning_rate=3e-2)
SYSTEM = ZooSystem(
    name="digits",
    summary="means",
    paper="none",
    presets={"tiny": 4},
    build=Halves,
    input_shape=lambda config: (1, 1, 4, 4),
    load_data=lambda config, seed, root: data(),
    train=CONFIG,
    task=lambda config: TASK,
    outputs=("across", "down"),
)


def test_a_network_of_two_outputs_learns_by_its_own_metric() -> None:
    first, second = SYSTEM.network(), SYSTEM.network()
    result = fit(first, data(), CONFIG, task=TASK)
    fit(second, data(), CONFIG, task=TASK)
    assert result.best.validation_score > result.epochs[0].validation_score + 10
    outputs, again = predict(first, data().x_test), predict(second, data().x_test)
    assert isinstance(outputs, tuple) and [part.shape for part in outputs] == [(32, 4), (32, 4)]
    assert all(np.array_equal(a, b) for a, b in zip(outputs, again, strict=True))  # the augmentation is seeded too


@pytest.mark.parametrize("augment", [None, flipped])
def test_a_taught_network_comes_close_to_its_teachers_outputs(augment: object) -> None:
    teacher, student = SYSTEM.network(seed=1), SYSTEM.network(seed=2)
    fit(teacher, data(), CONFIG, task=TASK)
    untrue = replace(data(), y_train=np.zeros_like(data().y_train))  # what a taught network does not look at
    fit(student, untrue, CONFIG, teacher=teacher, task=replace(TASK, augment=augment))
    taught, learnt = predict(teacher, data().x_test), predict(student, data().x_test)
    assert signal_to_error_db(learnt, np.stack(taught, axis=1)) > 10


def test_the_split_takes_targets_of_any_shape_and_checks_them() -> None:
    for change, message in (
        (
            {"y_val": np.zeros((32, 2, 4))},
            r"part val: samples are float32 and targets float64, expected float32 and float32 \(int64 labels need their classes\)",
        ),
        ({"y_val": np.zeros((32, 4), np.float32)}, r"part val: a target has shape \(4,\), in the training part \(2, 4\)"),
        ({"y_test": np.full((32, 2, 4), np.inf, np.float32)}, r"part test: target 0 holds NaN or infinity"),
        ({"y_train": np.zeros((3, 2, 4), np.float32)}, r"part train: 96 samples and targets of shape \(3, 2, 4\)"),
    ):
        with pytest.raises(IsthmusError, match=message):
            replace(data(), **change)


def test_the_bundle_says_what_the_outputs_are_worth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits, "SYSTEM", SYSTEM)
    bundle = isthmus.compile("zoo:digits", targets=["cpu"], recipe="portable-qat", tune=False, output=tmp_path / "bundle")
    task = bundle.manifest["task"]
    assert (task["metric"], task["samples"]) == (TASK.metric, 32) and task["float"] > 10 and task["reference"] > task["float"] - 1
    assert [spec["name"] for spec in bundle.manifest["graph"]["outputs"]] == ["across", "down"]
    entry = bundle.artifact("cpu")
    assert entry["accuracy"] is None and entry["score"] == task["reference"]
    page = (bundle.root / "reports" / "report.html").read_text(encoding="utf-8")
    assert "int8 signal to error (dB)" in page and "larger is better" in page and "points" not in page
    assert "by validation signal to error (dB)" in bundle.manifest["notes"][-1]


def test_a_choice_among_recipes_has_no_decisions_to_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits, "SYSTEM", replace(SYSTEM, train=TrainConfig(epochs=0)))
    with pytest.raises(IsthmusError, match=r"digits@tiny: --recipe auto judges decisions, this network is judged by signal to error"):
        isthmus.compile("zoo:digits", targets=["cpu"], recipe="auto", output=tmp_path / "bundle")


def test_the_figure_of_a_training_is_the_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits, "SYSTEM", SYSTEM)
    assert train_system("zoo:digits", tmp_path).metrics[TASK.metric] > 10


def test_labels_inside_the_targets_are_the_bundles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A classifier whose targets hold more than the label still has its accuracy."""
    labels = (data().x_train[:, 0].mean(axis=(1, 2)) > 0, data().x_val[:, 0].mean(axis=(1, 2)) > 0, data().x_test[:, 0].mean(axis=(1, 2)) > 0)
    targets = {f"y_{part}": np.stack([own, 1 - own], axis=1).astype(np.float32) for part, own in zip(("train", "val", "test"), labels, strict=True)}
    task = replace(
        CLASSIFICATION,
        loss=lambda scores, targets: CLASSIFICATION.loss(scores, targets[:, 0].long()),
        score=lambda scores, targets: CLASSIFICATION.score(scores, targets[:, 0]),
        labels=lambda targets: targets[:, 0].astype(np.int64),
    )
    system = replace(
        SYSTEM,
        build=lambda config: nn.Sequential(nn.Flatten(1), nn.Linear(16, 2)),
        load_data=lambda config, seed, root: replace(data(), **targets),
        task=lambda config: task,
        outputs=("output",),
    )
    monkeypatch.setattr(digits, "SYSTEM", system)
    bundle = isthmus.compile("zoo:digits", targets=["cpu"], tune=False, output=tmp_path / "bundle")
    assert bundle.manifest["task"]["metric"] == "top-1 accuracy" and bundle.artifact("cpu")["accuracy"] > 0.8
