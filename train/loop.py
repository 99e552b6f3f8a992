# SPDX-License-Identifier: Apache-2.0
"""Training for a `Task`: seeded, the best state by validation. Used for float training and for QAT alike."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass

import numpy as np
import torch
from torch import Tensor, nn

from isthmus.errors import IsthmusError
from isthmus.train.checkpoint import Checkpoint, Owner, TrainState
from isthmus.train.data import Split
from isthmus.train.devices import Workers, generator_state, restore_generator, torch_device
from isthmus.train.schedules import Optimiser, Schedule, optimiser, schedule
from isthmus.train.task import CLASSIFICATION, Arrays, Outputs, Task, as_tuple

Progress = Callable[[str, float], None]  # a short text, the share that is done
EVALUATION_BATCH = 512  # samples at most
EVALUATION_NUMBERS = 2**21  # of a batch's samples together: what a network makes of large images has to fit into memory


@dataclass(frozen=True)
class TrainConfig:
    """`learning_rate` is the highest of the `schedule`. `batch_size` is that of all processes together.

    With `patience` the training ends after so many epochs in a row without a better one. `start_counts`: the state before the first step may be the best.

    `threads` and `device` ("cpu", "cuda") are part of the result: sums are split by it, so one thread of a CPU gives the same floats whatever
    the number of cores. On CUDA forward and backward run in bfloat16 where torch's autocast finds it safe; weights and loss stay float32.
    """

    epochs: int
    batch_size: int = 64
    learning_rate: float = 1e-2
    weight_decay: float = 1e-4
    seed: int = 0
    threads: int = 1
    device: str = "cpu"
    optimiser: Optimiser = "adamw"
    schedule: Schedule = "one-cycle"
    patience: int | None = None
    start_counts: bool = True

    def __post_init__(self) -> None:
        if self.epochs < 0 or self.batch_size < 1 or not self.learning_rate > 0 or self.weight_decay < 0 or self.threads < 1:
            raise IsthmusError(f"{self}: epochs and weight_decay must be at least 0, batch_size and threads at least 1, learning_rate above 0")
        if self.device not in ("cpu", "cuda"):
            raise IsthmusError(f"{self}: device must be cpu or cuda")


@dataclass(frozen=True)
class Epoch:
    """`number` 0 is the state before the first step; its `loss` (mean over the training batches) is NaN. `validation_score`: the task's metric."""

    number: int
    loss: float
    validation_loss: float
    validation_score: float


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
    task: Task = CLASSIFICATION,
) -> TrainResult:
    """Trains `module` in place and leaves it on the CPU in evaluation mode, in the state with the best validation score (then loss).

    The state before the first step takes part (`start_counts`), so a fine-tuning never ends worse on validation than it began. The test part is
    not read. With `teacher` the network learns that one's outputs on the training samples (`task.distil`) in place of the targets: so int8 stays
    close to its float network. With `checkpoint` every epoch is kept, and a training that was stopped goes on from its last one to the same weights.
    Inside `devices.joined` each process trains on its share of every batch and judges all of the validation part; the first writes the checkpoint.

    Raises `IsthmusError` naming the step where the loss is no longer finite, and where a checkpoint is another training's or cannot be written.
    """
    started = time.perf_counter()
    device = torch_device(config.device)
    with _threads(config.threads), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed + Workers.now().rank)  # each process drops and augments its own; the order is the first one's
        training = _Training(module.to(device), split, config, progress or _silent, checkpoint, teacher, task, device)
        training.run()
    module.load_state_dict(training.best_state)
    module.to("cpu").eval()
    return TrainResult(tuple(training.epochs), training.best, training.step, time.perf_counter() - started)


def predict(module: nn.Module, samples: np.ndarray) -> Arrays:
    """What the module gives in evaluation mode, float32, one row a sample: an array, or a tuple of them where it has several outputs."""
    module.eval()
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    size = max(1, min(EVALUATION_BATCH, EVALUATION_NUMBERS // max(1, samples[:1].size)))
    with torch.no_grad():
        batches = [module(batch.to(device)) for batch in torch.from_numpy(samples).split(size)]
    columns = [np.concatenate([part.cpu().numpy() for part in column]) for column in zip(*map(as_tuple, batches), strict=True)]
    return columns[0] if isinstance(batches[0], Tensor) else tuple(columns)


class _Training:
    def __init__(
        self,
        module: nn.Module,
        split: Split,
        config: TrainConfig,
        progress: Progress,
        checkpoint: Checkpoint | None,
        teacher: nn.Module | None,
        task: Task,
        device: torch.device,
    ) -> None:
        self.module, self.split, self.config, self.progress, self.checkpoint = module, split, config, progress, checkpoint
        self.teacher, self.task, self.device, self.workers = teacher, task, device, Workers.now()
        self.samples, self.targets = torch.from_numpy(split.x_train), torch.from_numpy(split.y_train)
        # Augmented samples are new each time: the teacher says something to each batch.
        self.taught = None if teacher is None or task.augment is not None else _tensors(predict(teacher, split.x_train))
        steps_per_epoch = math.ceil(len(self.samples) / config.batch_size)
        self.total = steps_per_epoch * config.epochs
        self.called = self.workers.together(module, device)
        self.optimiser = optimiser(config.optimiser, module.parameters(), config.learning_rate, config.weight_decay)
        self.schedule = schedule(config.schedule, self.optimiser, config.learning_rate, config.epochs, steps_per_epoch)
        self.step = 0
        self.epochs: list[Epoch] = []
        self.best_state: dict[str, Tensor] = {}

    def run(self) -> None:
        checkpoint, owner = self.checkpoint, None if self.checkpoint is None else self._owner(self.checkpoint)
        kept = None if checkpoint is None or owner is None else self.workers.shared(lambda: checkpoint.load(owner))
        if kept is None:
            self._finished(0, math.nan)
        else:
            self._restore(kept)
        for number in range(len(self.epochs), self.config.epochs + 1):
            if self.config.patience is not None and number - 1 - self.best.number >= self.config.patience:
                break
            self._finished(number, self._epoch(number))
            if checkpoint is not None and owner is not None:
                self._save(checkpoint, owner)
        if checkpoint is not None and owner is not None and self.config.epochs == 0:
            self._save(checkpoint, owner)

    def _epoch(self, number: int) -> float:
        """One pass over the training part; the mean loss of its batches."""
        self.module.train()
        losses = []
        order = torch.randperm(len(self.samples))
        self.workers.agree(order, device=self.device)
        for rows in order.split(self.config.batch_size):
            own, weight = self.workers.share(rows)
            loss = self._loss(own) * weight
            self.step += 1
            value = self.workers.mean(loss)
            if not math.isfinite(value):
                raise IsthmusError(self._not_finite(value, number))
            self.optimiser.zero_grad()
            loss.backward()
            self.optimiser.step()
            self.schedule.step()
            losses.append(value)
            self.progress(f"epoch {number}/{self.config.epochs}, validation {self.epochs[-1].validation_score:.3f}", self.step / self.total)
        self.workers.agree(*self.module.buffers(), device=self.device)
        return float(np.mean(losses))

    def _loss(self, rows: Tensor) -> Tensor:
        inputs, targets = self.samples[rows].to(self.device), self.targets[rows].to(self.device)
        if self.task.augment is not None:
            inputs, targets = self.task.augment(inputs, targets)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            outputs = self.called(inputs)
        outputs = _float32(outputs)
        if self.teacher is None:
            return self.task.loss(outputs, targets)
        return self.task.distil(outputs, self._taught(rows, inputs))

    def _taught(self, rows: Tensor, inputs: Tensor) -> Outputs:
        if self.taught is None:
            assert self.teacher is not None
            with torch.no_grad():
                return self.teacher.to(self.device).eval()(inputs)
        return self.taught[rows].to(self.device) if isinstance(self.taught, Tensor) else tuple(part[rows].to(self.device) for part in self.taught)

    def _finished(self, number: int, loss: float) -> None:
        self.epochs.append(_evaluate(self.module, self.split, self.task, number, loss))
        if self.best is self.epochs[-1]:
            self.best_state = copy.deepcopy(self.module.state_dict())

    @property
    def best(self) -> Epoch:
        counting = self.epochs if self.config.start_counts else self.epochs[1:] or self.epochs
        return max(counting, key=lambda epoch: (epoch.validation_score, -epoch.validation_loss))

    # ---- what a checkpoint holds
    def _owner(self, checkpoint: Checkpoint) -> Owner:
        processes = "" if self.workers.count == 1 else f" in {self.workers.count} processes"
        settings = f"{self.config}{'' if self.teacher is None else ' and a teacher'}{processes}"
        return Owner.of(checkpoint.model, self.module, self.split, settings)

    def _save(self, checkpoint: Checkpoint, owner: Owner) -> None:
        generators = self.workers.gathered(generator_state(self.device), self.device)
        if self.workers.rank == 0:
            epochs = [[float(value) for value in astuple(epoch)] for epoch in self.epochs]
            states = self.module.state_dict(), self.best_state, self.optimiser.state_dict(), self.schedule.state_dict()
            checkpoint.save(owner, TrainState(*states, generators, epochs, self.step))

    def _restore(self, kept: TrainState) -> None:
        self.module.load_state_dict(kept.module)
        self.optimiser.load_state_dict(dict(kept.optimiser))
        self.schedule.load_state_dict(dict(kept.schedule))
        restore_generator(kept.generators[self.workers.rank], self.device)
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


def _evaluate(module: nn.Module, split: Split, task: Task, number: int, loss: float) -> Epoch:
    outputs = predict(module, split.x_val)
    validation_loss = task.loss(_tensors(outputs), torch.from_numpy(split.y_val)).item()
    return Epoch(number, loss, validation_loss, task.score(outputs, split.y_val))


def _tensors(outputs: Arrays) -> Outputs:
    return torch.from_numpy(outputs) if isinstance(outputs, np.ndarray) else tuple(torch.from_numpy(part) for part in outputs)


def _float32(outputs: Outputs) -> Outputs:
    return outputs.float() if isinstance(outputs, Tensor) else tuple(part.float() for part in outputs)


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
