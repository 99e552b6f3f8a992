# SPDX-License-Identifier: Apache-2.0
"""Training a zoo system into a folder: what `zoo train` does. Stopped at any moment, it goes on from the last finished epoch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import nn

from isthmus.train import zoo
from isthmus.train.checkpoint import Checkpoint
from isthmus.train.data import Split
from isthmus.train.devices import chosen_device, is_first_process, joined
from isthmus.train.ensemble import probabilities
from isthmus.train.loop import Progress, TrainResult, fit, predict
from isthmus.train.metrics import classification_metrics
from isthmus.train.task import Arrays, Task

CHECKPOINT = "checkpoint.pt"
SPLIT_SEED = 0


@dataclass(frozen=True)
class Trained:
    """`module` in its best state by validation; `metrics` of the test part."""

    module: nn.Module
    split: Split
    result: TrainResult
    metrics: dict[str, float]


def train_system(
    reference: str, folder: str | Path, seed: int = 0, data_root: Path | None = None, progress: Progress | None = None, device: str = "cpu"
) -> Trained:
    """Trains "zoo:NAME[@PRESET]" with `seed` on the files under `data_root`, or on what comes along; keeps folder/checkpoint.pt, beside it its teachers'.

    `device` is cpu, cuda or auto. Under `torchrun` all processes train together; the first keeps the checkpoint and moves `progress`.
    Raises `IsthmusError` on bad data, a checkpoint of another preset, seed, data set or code, an absent device, or a loss that is no longer finite.
    """
    architecture, preset = zoo.parse(reference)
    system = zoo.trainable(architecture)
    device, told = chosen_device(device), progress if is_first_process() else None
    split = system.data(SPLIT_SEED, preset, data_root)
    module = system.network(preset, seed)
    checkpoint = Checkpoint(Path(folder) / CHECKPOINT, f"{zoo.PREFIX}{system.name}@{preset}")
    config = replace(system.training(seed, preset, synthetic=data_root is None), device=device)
    with joined(device):
        learned, task = system.taught(split, preset, seed, data_root, Path(folder), told, device)
        result = fit(module, learned, config, told, checkpoint=checkpoint, task=task)
    return Trained(module, split, result, _metrics(system.purpose(preset), predict(module, split.x_test), split.y_test))


def _metrics(task: Task, outputs: Arrays, targets: np.ndarray) -> dict[str, float]:
    if task.labels is None:
        return {task.metric: task.score(outputs, targets)}
    scores = outputs if isinstance(outputs, np.ndarray) else outputs[0]
    return classification_metrics(probabilities(scores), task.labels(targets))
