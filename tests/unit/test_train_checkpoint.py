# SPDX-License-Identifier: Apache-2.0
"""Trainings that were stopped: from the last epoch to the same weights, and checkpoints that are refused, damaged or do not fit on the disk."""

from __future__ import annotations

import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from isthmus.errors import IsthmusError
from isthmus.train.checkpoint import Checkpoint, read_checkpoint
from isthmus.train.data import Split
from isthmus.train.loop import TrainConfig, TrainResult, fit, predict

CONFIG = TrainConfig(epochs=4, batch_size=16)


def split(seed: int = 0) -> Split:
    """Four classes by the brighter quarter of a 4x4 image."""
    generator = np.random.default_rng(seed)
    labels = np.arange(96) % 4
    images = generator.normal(0, 0.6, (96, 1, 4, 4)).astype(np.float32)
    for image, label in zip(images, labels, strict=True):
        image[0, label // 2 * 2 : label // 2 * 2 + 2, label % 2 * 2 : label % 2 * 2 + 2] += 1
    parts = [(images[a:b], labels[a:b].astype(np.int64)) for a, b in ((0, 64), (64, 80), (80, 96))]
    (x, y), (x_val, y_val), (x_test, y_test) = parts
    return Split("quarters", x, y, x_val, y_val, x_test, y_test, classes=("0", "1", "2", "3"), seed=seed)


def network(width: int = 6) -> nn.Module:
    """With dropout and batch norm: both have state that a resumed training must find again."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(1), nn.Linear(16 * width, 4))


class KilledError(Exception):
    pass


def killed_in(epoch: int) -> Callable[[str, float], None]:
    """A progress callback that ends the training in the middle of an epoch."""

    def progress(text: str, share: float) -> None:
        if share > (epoch - 0.5) / CONFIG.epochs:
            raise KilledError

    return progress


def weights(module: nn.Module) -> list[np.ndarray]:
    return [tensor.numpy() for tensor in module.state_dict().values()]


def same(first: nn.Module, second: nn.Module) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(weights(first), weights(second), strict=True))


def plain(result: TrainResult) -> list[str]:
    return [str(epoch) for epoch in result.epochs]


# ---- going on
@pytest.mark.parametrize("epoch", [1, 2, 4])
def test_a_stopped_training_comes_to_the_same_weights(tmp_path: Path, epoch: int) -> None:
    whole, stopped, resumed = network(), network(), network()
    expected = fit(whole, split(), CONFIG)
    checkpoint = Checkpoint(tmp_path / "runs" / "checkpoint.pt", "quarters")
    with pytest.raises(KilledError):
        fit(stopped, split(), CONFIG, killed_in(epoch), checkpoint=checkpoint)
    assert checkpoint.file.exists() == (epoch > 1)
    torch.rand(3)  # the global generator may be anywhere
    result = fit(resumed, split(), CONFIG, checkpoint=checkpoint)
    assert same(whole, resumed) and not same(whole, stopped)
    assert plain(result) == plain(expected) and result.best == expected.best and result.steps == expected.steps == 16
    assert not list(checkpoint.file.parent.glob("*.partial"))


def test_a_finished_training_is_not_repeated(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "checkpoint.pt", "quarters")
    first, again = network(), network()
    fit(first, split(), CONFIG, checkpoint=checkpoint)
    seen: list[float] = []
    fit(again, split(), CONFIG, lambda text, share: seen.append(share), checkpoint=checkpoint)
    assert seen == [] and same(first, again)


def test_a_network_that_is_not_trained_has_a_checkpoint_too(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "checkpoint.pt", "quarters")
    fit(network(), split(), replace(CONFIG, epochs=0), checkpoint=checkpoint)
    kept = read_checkpoint(checkpoint.file)[1]
    assert len(kept.epochs) == 1 and all(torch.equal(tensor, kept.best[name]) for name, tensor in network().state_dict().items())


TRAINING = """
import sys
sys.path.insert(0, {folder!r})
from test_train_checkpoint import CONFIG, Checkpoint, fit, network, split
from dataclasses import replace
fit(network(), split(), replace(CONFIG, epochs=2000), checkpoint=Checkpoint({file!r}, "quarters"))
"""


def test_a_process_that_is_killed_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """SIGKILL at no particular moment: the file is there, is read, and the training goes on from it."""
    file = tmp_path / "checkpoint.pt"
    code = TRAINING.format(folder=str(Path(__file__).parent), file=str(file))
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        for _ in range(1200):
            if file.exists() or process.poll() is not None:
                break
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    stored = torch.load(file, weights_only=True)
    done = len(stored["epochs"]) - 1
    assert 1 <= done < 2000
    seen: list[str] = []

    def stop(text: str, share: float) -> None:
        seen.append(text)
        raise KilledError

    with pytest.raises(KilledError):
        fit(network(), split(), replace(CONFIG, epochs=2000), stop, checkpoint=Checkpoint(file, "quarters"))
    assert seen[0].startswith(f"epoch {done + 1}/2000")


# ---- whose it is
def refused(tmp_path: Path, message: str, **change: object) -> None:
    given = {"model": "zoo:a@small", "width": 6, "config": CONFIG, "data": split(), "teacher": None}
    file = tmp_path / "checkpoint.pt"
    fit(network(), split(), CONFIG, checkpoint=Checkpoint(file, "zoo:a@small"))
    before = file.read_bytes()
    given |= change
    with pytest.raises(IsthmusError, match=message):
        fit(network(given["width"]), given["data"], given["config"], checkpoint=Checkpoint(file, given["model"]), teacher=given["teacher"])  # type: ignore[arg-type]
    assert file.read_bytes() == before


def test_a_checkpoint_of_another_preset(tmp_path: Path) -> None:
    refused(tmp_path, r"checkpoint.pt: is a checkpoint of zoo:a@small, not of zoo:a@large; give another file, or delete it", model="zoo:a@large")


def test_a_checkpoint_of_other_code(tmp_path: Path) -> None:
    refused(tmp_path, r"is a checkpoint of zoo:a@small written by other code: its layers are not those of today", width=5)


def test_a_checkpoint_of_another_seed(tmp_path: Path) -> None:
    refused(tmp_path, r"was trained with TrainConfig\(.*seed=0.*\), now asked for TrainConfig\(.*seed=1", config=replace(CONFIG, seed=1))


def test_a_checkpoint_of_other_data(tmp_path: Path) -> None:
    other = replace(split(), y_train=split().y_train[::-1].copy())
    refused(tmp_path, r"was trained on other data; give another file", data=other)


def test_a_checkpoint_without_the_teacher(tmp_path: Path) -> None:
    refused(tmp_path, r"was trained with .*, now asked for .* and a teacher", teacher=network())


# ---- damaged, hostile, no room
class Hostile:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("unpickled",)


@pytest.mark.parametrize("content", [b"", b"no checkpoint", pickle.dumps(Hostile(), protocol=2), "cut short", "hostile in a checkpoint"])
def test_a_file_that_is_no_checkpoint(tmp_path: Path, content: bytes | str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = Checkpoint("checkpoint.pt", "quarters")
    if content == "cut short":
        fit(network(), split(), replace(CONFIG, epochs=1), checkpoint=checkpoint)
        checkpoint.file.write_bytes(checkpoint.file.read_bytes()[:-200])
    elif content == "hostile in a checkpoint":
        torch.save({"schema": 2, "epochs": Hostile()}, checkpoint.file)
    else:
        assert isinstance(content, bytes)
        checkpoint.file.write_bytes(content)
    with pytest.raises(IsthmusError, match=r"checkpoint.pt: cannot be read as a checkpoint \(.*\); delete it to train anew") as caught:
        fit(network(), split(), CONFIG, checkpoint=checkpoint)
    assert not Path("unpickled").exists() and "\n" not in str(caught.value)


def test_a_checkpoint_of_another_schema(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.pt"
    torch.save({"schema": 1}, file)
    with pytest.raises(IsthmusError, match=r"checkpoint.pt: is no checkpoint of schema 2; delete it to train anew, or give another file"):
        fit(network(), split(), CONFIG, checkpoint=Checkpoint(file, "quarters"))


def test_no_room_for_a_checkpoint(tmp_path: Path) -> None:
    """The limit on a file's size is what a full disk looks like: writing fails half-way. The checkpoint before stays."""
    checkpoint = Checkpoint(tmp_path / "checkpoint.pt", "quarters")
    with pytest.raises(KilledError):
        fit(network(), split(), CONFIG, killed_in(2), checkpoint=checkpoint)
    before = checkpoint.file.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        with pytest.raises(IsthmusError, match=r"the checkpoint of epoch 2 \(\d+ bytes\) cannot be written: .*; the one before \(epoch 1\) is kept; make room"):
            fit(network(), split(), CONFIG, checkpoint=checkpoint)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoint.file.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]
    whole, resumed = network(), network()
    fit(whole, split(), CONFIG)
    fit(resumed, split(), CONFIG, checkpoint=checkpoint)
    assert same(whole, resumed)


def test_no_folder_for_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(IsthmusError, match=r"checkpoint.pt: the checkpoint of epoch 1 .* cannot be written: .*; there is none before it; make room"):
        fit(network(), split(), CONFIG, checkpoint=Checkpoint(tmp_path / "file" / "checkpoint.pt", "quarters"))


class BreaksDown(nn.Module):
    """The loss becomes NaN at a step of its own."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.inner, self.left = network(), step

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.left -= 1
        return self.inner(x) * (torch.nan if self.left == 0 else 1.0)


@pytest.mark.parametrize(("step", "kept"), [(2, r"; no epoch was finished, so there is no checkpoint"), (11, r"; .*checkpoint.pt keeps epoch 2")])
def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(tmp_path: Path, step: int, kept: str) -> None:
    checkpoint = Checkpoint(tmp_path / "checkpoint.pt", "quarters")
    with pytest.raises(IsthmusError, match=rf"the loss is nan at step {step} of 16 \(epoch {(step + 3) // 4}\); lower the learning rate .*{kept}"):
        fit(BreaksDown(step), split(), CONFIG, checkpoint=checkpoint)
    if step > 4:
        stored = torch.load(checkpoint.file, weights_only=True)
        assert len(stored["epochs"]) == 3 and all(bool(torch.isfinite(tensor).all()) for tensor in stored["module"].values() if tensor.is_floating_point())


# ---- a teacher
def test_a_taught_network_learns_its_teachers_decisions_and_no_labels() -> None:
    teacher, student, config = network(), network(), TrainConfig(epochs=10, batch_size=16)
    fit(teacher, split(), config)
    unlabelled = replace(split(), y_train=np.zeros_like(split().y_train))
    fit(student, unlabelled, config, teacher=teacher)
    decided = [predict(module, split().x_test).argmax(axis=1) for module in (teacher, student)]
    assert len(set(decided[0].tolist())) == 4
    assert (decided[0] == decided[1]).mean() > 0.8
