# SPDX-License-Identifier: Apache-2.0
"""Student and teachers of "Ensemble-Based Knowledge Distillation for Identification of Childhood Pneumonia" (counts: table 3).

Teachers are snapshots of one training; a student learns from the best of them (KD) or from the mean of the three best (EKD). Beside the paper's student
one for 28x28 images and one for FPGAs, which sees 64x64 where its teachers see 200x200.

Samples are (pixel - 128) / 128: the paper does not say how it scales, and every int8 scheme has these values without an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from isthmus.compare import top1_accuracy
from isthmus.train.data import Split, cxr, medmnist
from isthmus.train.devices import torch_device
from isthmus.train.distillation import distillation_loss, soft_labels
from isthmus.train.loop import Progress, TrainConfig, predict
from isthmus.train.snapshots import TEACHERS, Budget, best, snapshots
from isthmus.train.task import CLASSIFICATION, Arrays, Outputs, Task
from isthmus.train.zoo import ZooSystem

L2 = 0.01  # of the hidden layer's squared weights, in the student's loss
TEACHERS_FOLDER = "teachers"
PAPER_BUDGET, REHEARSAL = Budget(), Budget(epochs=8)


@dataclass(frozen=True)
class Config:
    """`filters` of the 3x3 convolutions (valid, or `same`), each followed by a 2x2 max pool. Without `hidden` units the mean of each channel is classified.

    `norm`: where batch normalisation stands; the paper's student has it behind the ReLU, before the pool.
    `distil`: from how many snapshots of `teacher` the network learns, one or `TEACHERS`; `budget` is that of their training, `rehearsal` where
    `stand_in` synthetic training images take the place of the data set's own.
    """

    filters: tuple[int, ...]
    hidden: int
    norm: Literal["none", "before relu", "behind relu"]
    same: bool = False
    image_size: int = 200
    dataset: Literal["cxr", "pneumoniamnist"] = "cxr"
    distil: Literal["none", "kd", "ekd"] = "none"
    teacher: Config | None = None
    budget: Budget = PAPER_BUDGET
    rehearsal: Budget = REHEARSAL
    stand_in: int = cxr.STAND_IN_COUNT
    classes: int = 2
    input_channels: int = 1


class PneumoniaNet(nn.Module):
    """3x3 convolutions, pools that round down, one hidden dense layer with a dropout, softmax.

    Student: 200 -> 198 -> 99 -> 97 -> 48, 147,456 features. Teacher: two blocks more, 12,800 features.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels, size = config.input_channels, config.image_size
        for width in config.filters:
            norm = nn.BatchNorm2d(width)
            behind: dict[str, list[nn.Module]] = {"none": [nn.ReLU()], "before relu": [norm, nn.ReLU()], "behind relu": [nn.ReLU(), norm]}
            layers += [nn.Conv2d(channels, width, kernel_size=3, padding=int(config.same)), *behind[config.norm], nn.MaxPool2d(2)]
            channels, size = width, (size if config.same else size - 2) // 2
        if not config.hidden:
            layers.append(nn.AdaptiveAvgPool2d(1))
            size = 1
        self.features = nn.Sequential(*layers)
        self.head = nn.Sequential(*_hidden(config, channels * size * size), _centred(nn.Linear(config.hidden or channels, config.classes)))
        self.penalised = config.norm != "none" and config.hidden > 0

    def logits(self, image: Tensor) -> Tensor:
        """(N, 1, size, size) as (N, 2): what distillation softens."""
        return self.head(self.features(image).flatten(1))

    def forward(self, image: Tensor) -> Tensor:
        """Probabilities (N, 2): normal, pneumonia."""
        return self.logits(image).softmax(1)


@torch.no_grad()
def _centred(scores: nn.Linear) -> nn.Linear:
    """`scores` whose mean over the classes is always 0.

    A softmax ignores what all scores have in common, so no gradient changes it: what was drawn would stay, and take up most of int8's range at the output.
    """
    for parameter in (scores.weight, scores.bias):
        parameter -= parameter.mean(0)
    return scores


def _hidden(config: Config, features: int) -> list[nn.Module]:
    if not config.hidden:
        return []
    dense, dropout = nn.Linear(features, config.hidden), nn.Dropout(0.5)
    # The student drops hidden units, the teacher (Stephen et al.) features.
    return [dropout, dense, nn.ReLU()] if config.norm == "none" else [dense, nn.ReLU(), dropout]


class Scores(nn.Module):
    """The part of a network that is trained and deployed: class scores (N, 2), and in training the L2 term of the loss beside them."""

    def __init__(self, network: PneumoniaNet) -> None:
        super().__init__()
        self.features, self.head, self.penalised = network.features, network.head, network.penalised

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        scores = self.head(self.features(image).flatten(1))
        if not (self.training and self.penalised):
            return scores
        hidden = self.head[0]
        assert isinstance(hidden, nn.Linear)
        return scores, L2 * hidden.weight.square().sum()


def _scores(module: nn.Module) -> nn.Module:
    assert isinstance(module, PneumoniaNet)
    return Scores(module)


# ---- what a network learns
def _penalised(outputs: Outputs) -> tuple[Tensor, Tensor | float]:
    """The scores and the L2 term, which there is in training alone."""
    return (outputs, 0.0) if isinstance(outputs, Tensor) else (outputs[0], outputs[1])


def _loss(outputs: Outputs, labels: Tensor) -> Tensor:
    scores, penalty = _penalised(outputs)
    return functional.cross_entropy(scores, labels) + penalty


def _taught_loss(outputs: Outputs, targets: Tensor) -> Tensor:
    """`targets` (N, 1 + classes): the label, then the teachers' softened probabilities."""
    scores, penalty = _penalised(outputs)
    return distillation_loss(scores, targets[:, 0].long(), targets[:, 1:]) + penalty


def _taught_score(outputs: Arrays, targets: np.ndarray) -> float:
    assert isinstance(outputs, np.ndarray)
    return top1_accuracy(outputs, targets[:, 0].astype(np.int64))


LABELS = replace(CLASSIFICATION, loss=_loss)
TAUGHT = replace(CLASSIFICATION, loss=_taught_loss, score=_taught_score, labels=lambda targets: targets[:, 0].astype(np.int64))


def taught_split(split: Split, of_train: Sequence[np.ndarray], of_val: Sequence[np.ndarray]) -> Split:
    """`split` with the targets of `TAUGHT`, from the logits of each teacher on the training and validation parts; none is asked about the test part."""
    soft = {"train": soft_labels(of_train), "val": soft_labels(of_val), "test": np.eye(len(split.classes), dtype=np.float32)[split.y_test]}
    labels = {"train": split.y_train, "val": split.y_val, "test": split.y_test}
    y_train, y_val, y_test = (np.concatenate([labels[part][:, None].astype(np.float32), soft[part]], axis=1) for part in soft)
    return replace(split, y_train=y_train, y_val=y_val, y_test=y_test, classes=())


def train_teachers(
    config: Config, split: Split, budget: Budget, seed: int, progress: Progress | None = None, folder: Path | None = None, model: str = ""
) -> list[nn.Module]:
    """The `TEACHERS` best snapshots of a teacher `config`, the best first, in evaluation mode on the device that they were trained on.

    See `snapshots` for `folder` and `model`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = _scores(PneumoniaNet(config))
    chosen = best(snapshots(module, split, budget, seed, progress, folder, model), TEACHERS)
    teachers = []
    for snapshot in chosen:
        teacher = _scores(PneumoniaNet(config))
        teacher.load_state_dict(snapshot.state)
        teachers.append(teacher.to(torch_device(budget.device)).eval())
    return teachers


def _lesson(config: Config, split: Split, root: Path | None, seed: int, folder: Path | None, progress: Progress | None, device: str) -> tuple[Split, Task]:
    """Trains the teachers first, with checkpoints in folder/teachers."""
    if config.distil == "none" or config.teacher is None:
        return split, LABELS
    seen = _data(config.teacher, split.seed, root)
    budget = replace(config.rehearsal if root is None else config.budget, device=device)
    teachers = train_teachers(config.teacher, seen, budget, seed, progress, None if folder is None else folder / TEACHERS_FOLDER, "zoo:pneumonia_kd")
    asked = teachers[:1] if config.distil == "kd" else teachers
    return taught_split(split, [logits(teacher, seen.x_train) for teacher in asked], [logits(teacher, seen.x_val) for teacher in asked]), TAUGHT


def logits(network: nn.Module, samples: np.ndarray) -> np.ndarray:
    """(N, 2) float32."""
    scores = predict(network, samples)
    assert isinstance(scores, np.ndarray)
    return scores


def _data(config: Config, seed: int, root: Path | None) -> Split:
    if config.dataset == "pneumoniamnist":
        return medmnist.load(config.dataset, root, config.input_channels, seed)
    return cxr.load(root, config.image_size, seed, config.stand_in)


TEACHER = Config(filters=(32, 64, 128, 128), hidden=512, norm="none")
TEACHER_28 = Config(filters=(32, 64, 128), hidden=512, norm="none", image_size=28, dataset="pneumoniamnist")  # 28 -> 13 -> 5 -> 1: no place for a fourth
TEACHER_CI = Config(filters=(8, 16), hidden=16, norm="none", same=True, image_size=32, stand_in=160)
STUDENT = Config(filters=(32, 64), hidden=32, norm="behind relu", distil="ekd", teacher=TEACHER)
AVERAGED = Config(filters=(8, 16, 16), hidden=0, norm="before relu", same=True, image_size=64, distil="ekd", teacher=TEACHER)

# Adam at one rate until the validation part says stop; the paper gives a student that learns from teachers a tenth of the other's rate.
TRAIN = TrainConfig(epochs=100, batch_size=32, learning_rate=1e-4, weight_decay=0.0, schedule="constant", patience=10, start_counts=False)
SYSTEM = ZooSystem(
    name="pneumonia_kd",
    summary="chest X-rays of children: a student distilled from snapshot-ensembled teachers",
    paper="Vrbancic, Podgorelec: Ensemble-Based Knowledge Distillation for Identification of Childhood Pneumonia",
    presets={
        "student": STUDENT,
        "teacher": TEACHER,
        "student-28": replace(STUDENT, image_size=28, dataset="pneumoniamnist", teacher=TEACHER_28),
        "teacher-28": TEACHER_28,
        "fpga-s": AVERAGED,
        "ci": replace(AVERAGED, filters=(4, 8), image_size=32, teacher=TEACHER_CI, rehearsal=Budget(epochs=24), stand_in=TEACHER_CI.stand_in),
    },
    build=PneumoniaNet,
    input_shape=lambda config: (1, config.input_channels, config.image_size, config.image_size),
    load_data=_data,
    train=TRAIN,
    train_presets={
        **dict.fromkeys(("teacher", "teacher-28"), replace(TRAIN, learning_rate=0.02, optimiser="sgd", schedule="cosine")),
        **dict.fromkeys(("fpga-s", "ci"), TrainConfig(epochs=40, batch_size=32, learning_rate=2e-2)),
    },
    rehearsal={
        **dict.fromkeys(("student", "student-28"), replace(TRAIN, epochs=2, learning_rate=1e-3)),
        **dict.fromkeys(("teacher", "teacher-28"), replace(TRAIN, epochs=2, learning_rate=0.02, optimiser="sgd")),
    },
    deployed=_scores,
    task=lambda config: LABELS,
    lesson=_lesson,
    roads={
        "cpu": "student, the whole network",
        "tflite": "student, the whole network",
        "jetson": "student, the whole network; the three teachers stay on the host",
        "fpga": "fpga-s: the student's hidden layer has 4.7 million weights; this network is distilled from the same teachers",
    },
)
