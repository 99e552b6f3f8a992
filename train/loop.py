# SPDX-License-Identifier: Apache-2.0
"""Training a classifier on the CPU: seeded, one-cycle AdamW, the best state by validation. Used for float training and for QAT alike."""

from __future__ import annotations

import copy
import hashlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass

import numpy as np
import torch
from torch import nn

from isthmus.compare import top1_accuracy
from isthmus.errors import IsthmusError
from isthmus.train.checkpoint import Checkpoint, Owner, TrainState
from isthmus.train.data import Split

Progress = Callable[[str, float], None]  # a short text, the share that is done
EVALUATION_BATCH = 512
TEMPERATURE = 4.0  # of a teacher's scores: what it holds apart from the label is in the smaller ones


@dataclass(frozen=True)
class TrainConfig:
    """`learning_rate` is the peak of the one-cycle schedule.

    `threads` is part of the result: sums are split by it, so one thread gives the same floats whatever the number of cores.
    """

    epochs: int
    batch_size: int = 64
    learning_rate: float = 1e-2
    weight_decay: float = 1e-4
    seed: int = 0
    threads: int = 1

    def __post_init__(self) -> None:
        if self.epochs < 0 or self.batch_size < 1 or not self.learning_rate > 0 or self.weight_decay < 0 or self.threads < 1:
            raise IsthmusError(f"{self}: epochs and weight_decay must be at least 0, batch_size and threads at least 1, learning_rate above 0")


@dataclass(frozen=True)
class Epoch:
    """`number` 0 is the state before the first step; its `loss` (mean over the training batches) is NaN."""

    number: int
    loss: float
    validation_loss: float
    validation_accuracy: float


@dataclass(frozen=True)
class TrainResult:
    """`epochs` in order, `best` the one whose state the module now has."""

    epochs: tuple[Epoch, ...]
    best: Epoch
    steps: int
    seconds: float


def fit(
    module: nn.Module,
    split: Split,
    config: TrainConfig,
    progress: Progress | None = None,
    *,
    checkpoint: Checkpoint | None = None,
    teacher: nn.Module | None = None,
) -> TrainResult:
    """Trains `module` in place and leaves it in evaluation mode, in the state with the best validation accuracy (then loss).

    The state before the first step takes part, so a fine-tuning never ends worse on validation than it began. The test part is
    not read. With `teacher` the network learns that one's class scores on the training samples in place of the labels: so int8 stays close
    to its float network. With `checkpoint` every epoch is kept, and a training that was stopped goes on from its last one to the same weights.

    Raises `IsthmusError` naming the step where the loss is no longer finite, and where a checkpoint is another training's or cannot be written.
    """
    started = time.perf_counter()
    with _threads(config.threads), torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        training = _Training(module, split, config, progress or _silent, checkpoint, teacher)
        training.run()
    module.load_state_dict(training.best_state)
    module.eval()
    return TrainResult(tuple(training.epochs), _best(training.epochs), training.step, time.perf_counter() - started)


def predict(module: nn.Module, samples: np.ndarray) -> np.ndarray:
    """The module's output in evaluation mode, float32, one row a sample."""
    module.eval()
    with torch.no_grad():
        return np.concatenate([module(batch).numpy() for batch in torch.from_numpy(samples).split(EVALUATION_BATCH)])


class _Training:
    def __init__(
        self, module: nn.Module, split: Split, config: TrainConfig, progress: Progress, checkpoint: Checkpoint | None, teacher: nn.Module | None
    ) -> None:
        self.module, self.split, self.config, self.progress, self.checkpoint = module, split, config, progress, checkpoint
        self.samples, self.labels = torch.from_numpy(split.x_train), torch.from_numpy(split.y_train)
        self.taught = None if teacher is None else torch.from_numpy(predict(teacher, split.x_train))
        self.total = math.ceil(len(self.samples) / config.batch_size) * config.epochs
        self.optimiser = torch.optim.AdamW(module.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimiser, config.learning_rate, total_steps=max(self.total, 1))
        self.step = 0
        self.epochs: list[Epoch] = []
        self.best_state: dict[str, torch.Tensor] = {}

    def run(self) -> None:
        owner = None if self.checkpoint is None else self._owner(self.checkpoint)
        kept = None if self.checkpoint is None or owner is None else self.checkpoint.load(owner)
        if kept is None:
            self._finished(0, math.nan)
        else:
            self._restore(kept)
        for number in range(len(self.epochs), self.config.epochs + 1):
            self._finished(number, self._epoch(number))
            if self.checkpoint is not None and owner is not None:
                self.checkpoint.save(owner, self._state())

    def _epoch(self, number: int) -> float:
        """One pass over the training part; the mean loss of its batches."""
        self.module.train()
        losses = []
        for indices in torch.randperm(len(self.samples)).split(self.config.batch_size):
            loss = self._loss(indices)
            self.step += 1
            if not math.isfinite(loss.item()):
                raise IsthmusError(self._not_finite(loss.item(), number))
            self.optimiser.zero_grad()
            loss.backward()
            self.optimiser.step()
            self.schedule.step()
            losses.append(loss.item())
            self.progress(f"epoch {number}/{self.config.epochs}, validation {self.epochs[-1].validation_accuracy:.3f}", self.step / self.total)
        return float(np.mean(losses))

    def _loss(self, indices: torch.Tensor) -> torch.Tensor:
        scores = self.module(self.samples[indices])
        if self.taught is None:
            return nn.functional.cross_entropy(scores, self.labels[indices])
        softened = (self.taught[indices] / TEMPERATURE).softmax(1)
        return TEMPERATURE**2 * nn.functional.cross_entropy(scores / TEMPERATURE, softened)

    def _finished(self, number: int, loss: float) -> None:
        self.epochs.append(_evaluate(self.module, self.split, number, loss))
        if _best(self.epochs) is self.epochs[-1]:
            self.best_state = copy.deepcopy(self.module.state_dict())

    # ---- what a checkpoint holds
    def _owner(self, checkpoint: Checkpoint) -> Owner:
        labels = hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in (self.split.y_train, self.split.y_val)))
        data = f"{self.split.name}, {list(self.split.x_train.shape)}, {labels.hexdigest()}"
        settings = f"{self.config}{'' if self.taught is None else ' and a teacher'}"
        return Owner.of(checkpoint.model, self.module, data, settings)

    def _state(self) -> TrainState:
        epochs = [[float(value) for value in astuple(epoch)] for epoch in self.epochs]
        states = self.module.state_dict(), self.best_state, self.optimiser.state_dict(), self.schedule.state_dict()
        return TrainState(*states, torch.get_rng_state(), epochs, self.step)

    def _restore(self, kept: TrainState) -> None:
        self.module.load_state_dict(kept.module)
        self.optimiser.load_state_dict(dict(kept.optimiser))
        self.schedule.load_state_dict(dict(kept.schedule))
        torch.set_rng_state(kept.generator)
        self.best_state, self.step = dict(kept.best), kept.step
        self.epochs = [Epoch(int(number), *rest) for number, *rest in kept.epochs]

    def _not_finite(self, loss: float, number: int) -> str:
        kept = ""
        if self.checkpoint is not None:
            kept = (
                f"; {self.checkpoint.file} keeps epoch {number - 1}" if self.checkpoint.file.exists() else "; no epoch was finished, so there is no checkpoint"
            )
        return (
            f"training: the loss is {loss} at step {self.step} of {self.total} (epoch {number}); "
            f"lower the learning rate (now {self.config.learning_rate:g}) or look at the scale of the data{kept}"
        )


def _evaluate(module: nn.Module, split: Split, number: int, loss: float) -> Epoch:
    scores = predict(module, split.x_val)
    validation_loss = nn.functional.cross_entropy(torch.from_numpy(scores), torch.from_numpy(split.y_val)).item()
    return Epoch(number, loss, validation_loss, top1_accuracy(scores, split.y_val))


def _best(epochs: list[Epoch]) -> Epoch:
    return max(epochs, key=lambda epoch: (epoch.validation_accuracy, -epoch.validation_loss))


def _silent(text: str, share: float) -> None:
    return None


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
