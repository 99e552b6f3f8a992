# SPDX-License-Identifier: Apache-2.0
"""Training a classifier on the CPU: seeded, one-cycle AdamW, the best state by validation. Used for float training and for QAT alike."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from isthmus.compare import top1_accuracy
from isthmus.errors import IsthmusError
from isthmus.train.data import Split

Progress = Callable[[str, float], None]  # a short text, the share that is done
EVALUATION_BATCH = 512


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


def fit(module: nn.Module, split: Split, config: TrainConfig, progress: Progress | None = None) -> TrainResult:
    """Trains `module` in place and leaves it in evaluation mode, in the state with the best validation accuracy (then loss).

    The state before the first step takes part, so a fine-tuning never ends worse on validation than it began. The test part is
    not read. Raises `IsthmusError` naming the step where the loss is no longer finite.
    """
    started = time.perf_counter()
    with _threads(config.threads), torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        epochs, best_state, steps = _run(module, split, config, progress or _silent)
    module.load_state_dict(best_state)
    module.eval()
    return TrainResult(tuple(epochs), _best(epochs), steps, time.perf_counter() - started)


def predict(module: nn.Module, samples: np.ndarray) -> np.ndarray:
    """The module's output in evaluation mode, float32, one row a sample."""
    module.eval()
    with torch.no_grad():
        return np.concatenate([module(batch).numpy() for batch in torch.from_numpy(samples).split(EVALUATION_BATCH)])


def _run(module: nn.Module, split: Split, config: TrainConfig, progress: Progress) -> tuple[list[Epoch], dict[str, torch.Tensor], int]:
    samples, labels = torch.from_numpy(split.x_train), torch.from_numpy(split.y_train)
    batches = math.ceil(len(samples) / config.batch_size)
    total = batches * config.epochs
    epochs = [_evaluate(module, split, 0, math.nan)]
    best_state = copy.deepcopy(module.state_dict())
    if total == 0:
        return epochs, best_state, 0
    optimiser = torch.optim.AdamW(module.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, config.learning_rate, total_steps=total)
    step = 0
    for number in range(1, config.epochs + 1):
        module.train()
        losses = []
        for indices in torch.randperm(len(samples)).split(config.batch_size):
            loss = nn.functional.cross_entropy(module(samples[indices]), labels[indices])
            step += 1
            if not math.isfinite(loss.item()):
                raise IsthmusError(
                    f"training: the loss is {loss.item()} at step {step} of {total} (epoch {number}); "
                    f"lower the learning rate (now {config.learning_rate:g}) or look at the scale of the data"
                )
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            losses.append(loss.item())
            progress(f"epoch {number}/{config.epochs}, validation {epochs[-1].validation_accuracy:.3f}", step / total)
        epochs.append(_evaluate(module, split, number, float(np.mean(losses))))
        if _best(epochs) is epochs[-1]:
            best_state = copy.deepcopy(module.state_dict())
    return epochs, best_state, step


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
