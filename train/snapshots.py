# SPDX-License-Identifier: Apache-2.0
"""Snapshot ensembling (SGDRE of "Ensemble-Based Knowledge Distillation ..."): several teachers out of one training with warm restarts.

Half of the epochs with a rate that falls linearly, then four restarts from the weights reached, two along a sine and two along a cosine.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from isthmus.errors import IsthmusError
from isthmus.train.checkpoint import Checkpoint
from isthmus.train.data import Split
from isthmus.train.ensemble import probabilities
from isthmus.train.loop import Progress, TrainConfig, fit, predict
from isthmus.train.schedules import Schedule
from isthmus.train.task import CLASSIFICATION, Arrays, Task

RESTARTS: tuple[tuple[Schedule, float], ...] = (("sine", 0.01), ("sine", 0.02), ("cosine", 0.01), ("cosine", 0.02))
TEACHERS = 3
HALVINGS = 3


@dataclass(frozen=True)
class Budget:
    """`epochs` of all phases at most; `peak` is the first phase's learning rate. A restart ends after `patience` epochs without a better one."""

    epochs: int = 100
    batch_size: int = 32
    peak: float = 0.1
    patience: int = 10
    threads: int = 1
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.restart_epochs < 1:
            raise IsthmusError(f"snapshot ensembling: {self.epochs} epochs leave none for {len(RESTARTS)} restarts; give at least {2 * len(RESTARTS) - 1}")

    @property
    def first_epochs(self) -> int:
        return self.epochs // 2

    @property
    def restart_epochs(self) -> int:
        return (self.epochs - self.first_epochs) // len(RESTARTS)


@dataclass(frozen=True)
class Snapshot:
    """The best epoch of a phase by the AUC on the validation part; `epochs` is how many the phase took."""

    phase: str
    auc: float
    epochs: int
    state: dict[str, Tensor]


def auc(scores: Arrays, labels: np.ndarray) -> float:
    """Area under the receiver operating characteristic of class scores (N, 2): of the probability of class 1."""
    from sklearn.metrics import roc_auc_score

    assert isinstance(scores, np.ndarray)
    return float(roc_auc_score(labels, probabilities(scores)[:, 1]))


AUC = Task("AUC", CLASSIFICATION.loss, auc, CLASSIFICATION.distil, labels=CLASSIFICATION.labels)


def snapshots(
    module: nn.Module, split: Split, budget: Budget, seed: int = 0, progress: Progress | None = None, folder: Path | None = None, model: str = ""
) -> list[Snapshot]:
    """The snapshots of the five phases in order; `module` (class scores of two classes) is left with those of the first.

    Where the first phase kills the network (all its ReLUs at 0), it is trained anew at half the rate, `HALVINGS` times at most; the phase's name says the
    rate it took. With `folder` each phase keeps a checkpoint there, owned by `model`, and what was stopped goes on to the same weights.
    Raises `IsthmusError` where the network stays dead, and what `fit` raises.
    """

    untrained = copy.deepcopy(module.state_dict())

    def phase(number: int, schedule: Schedule, rate: float, epochs: int, patience: int | None) -> Snapshot:
        name = f"{schedule} {rate:g}"
        config = TrainConfig(
            epochs=epochs,
            batch_size=budget.batch_size,
            learning_rate=rate,
            weight_decay=0.0,
            seed=seed + number,  # restarts at the same rate would else see the same order
            threads=budget.threads,
            device=budget.device,
            optimiser="sgd",
            schedule=schedule,
            patience=patience,
            start_counts=False,
        )

        def moved(text: str, share: float) -> None:
            if progress is not None:
                progress(f"teachers, {name}: {text}", (number + share) / (1 + len(RESTARTS)))

        checkpoint = None if folder is None else Checkpoint(folder / f"phase-{number}-{schedule}-{rate:g}.pt", f"{model}, teachers, {name}")
        result = fit(module, split, config, moved, checkpoint=checkpoint, task=AUC)
        return Snapshot(name, result.best.validation_score, len(result.epochs) - 1, copy.deepcopy(module.state_dict()))

    for halved in range(HALVINGS + 1):
        module.load_state_dict(untrained)
        first = phase(0, "linear", budget.peak / 2**halved, budget.first_epochs, None)
        if not _dead(module, split):
            break
    else:
        raise IsthmusError(
            f"snapshot ensembling: the network says the same of every validation image after {budget.first_epochs} epochs, at a rate of {budget.peak:g} and"
            f" at {HALVINGS} halvings of it; train longer, or with another seed"
        )
    found = [first]
    for number, (schedule, rate) in enumerate(RESTARTS, 1):
        module.load_state_dict(first.state)
        found.append(phase(number, schedule, rate, budget.restart_epochs, budget.patience))
    module.load_state_dict(first.state)
    return found


def best(candidates: Sequence[Snapshot], count: int = TEACHERS) -> list[Snapshot]:
    """The `count` of the largest AUC, the best first; of equal ones the earlier."""
    return sorted(candidates, key=lambda snapshot: -snapshot.auc)[:count]


def _dead(module: nn.Module, split: Split) -> bool:
    scores = predict(module, split.x_val)
    assert isinstance(scores, np.ndarray)
    return bool((np.ptp(scores, axis=0) == 0).all())
