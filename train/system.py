# SPDX-License-Identifier: Apache-2.0
"""Training a zoo system into a folder: what `zoo train` does. Stopped at any moment, it goes on from the last finished epoch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from isthmus.train import zoo
from isthmus.train.checkpoint import Checkpoint
from isthmus.train.data import Split
from isthmus.train.ensemble import probabilities
from isthmus.train.loop import Progress, TrainResult, fit, predict
from isthmus.train.metrics import classification_metrics

CHECKPOINT = "checkpoint.pt"
SPLIT_SEED = 0


@dataclass(frozen=True)
class Trained:
    """`module` in its best state by validation; `metrics` of the test part."""

    module: nn.Module
    split: Split
    result: TrainResult
    metrics: dict[str, float]


def train_system(reference: str, folder: str | Path, seed: int = 0, data_root: Path | None = None, progress: Progress | None = None) -> Trained:
    """Trains "zoo:NAME[@PRESET]" with `seed` on the files under `data_root`, or on what comes along; keeps folder/checkpoint.pt.

    Raises `IsthmusError` on bad data, a checkpoint of another preset, seed, data set or code, or a loss that is no longer finite.
    """
    architecture, preset = zoo.parse(reference)
    system = zoo.trainable(architecture)
    split = system.data(SPLIT_SEED, preset, data_root)
    module = system.network(preset, seed)
    checkpoint = Checkpoint(Path(folder) / CHECKPOINT, f"{zoo.PREFIX}{system.name}@{preset}")
    result = fit(module, split, system.training(seed, preset), progress, checkpoint=checkpoint)
    return Trained(module, split, result, classification_metrics(probabilities(predict(module, split.x_test)), split.y_test))
