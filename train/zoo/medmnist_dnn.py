# SPDX-License-Identifier: Apache-2.0
"""The five reference DNNs of the MedMNIST ensembles (table 3), with one dense layer behind the backbone, whose last map is 1x1.

The paper's "EfficientNetB0" is EfficientNetV2-B0 by its parameters. Grey images come replicated to three channels; MobileNetV3 and DenseNet-121 take
them padded to 32x32 with black. Weights are random here: the paper starts from ImageNet's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from isthmus.train.data import Split, medmnist
from isthmus.train.loop import TrainConfig
from isthmus.train.networks import densenet, efficientnet_v2, mobilenet_v2, mobilenet_v3, resnet
from isthmus.train.zoo import ZooSystem

BLACK = -1.0  # as a sample holds it


@dataclass(frozen=True)
class Config:
    backbone: str
    dataset: str
    classes: int
    image_size: int
    input_channels: int = 3


# Backbone -> its layers, their channels, the image size it takes.
BACKBONES: Mapping[str, tuple[Callable[[], nn.Module], int, int]] = {
    "mobilenet_v2": (mobilenet_v2.features, mobilenet_v2.CHANNELS, 28),
    "mobilenet_v3": (mobilenet_v3.features, mobilenet_v3.CHANNELS, 32),
    "densenet121": (densenet.features, densenet.CHANNELS, 32),
    "resnet50": (resnet.features, resnet.CHANNELS, 28),
    "efficientnet_v2_b0": (efficientnet_v2.features, efficientnet_v2.CHANNELS, 28),
}


class ReferenceDnn(nn.Module):
    """The 2x2 pool that the paper puts on the 1x1 map does nothing and is left out."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        features, channels, _ = BACKBONES[config.backbone]
        self.features = features()
        self.head = nn.Linear(channels, config.classes)

    def logits(self, image: Tensor) -> Tensor:
        """(N, 3, size, size) as (N, classes)."""
        return self.head(self.features(image).flatten(1))

    def forward(self, image: Tensor) -> Tensor:
        """Probabilities (N, classes)."""
        return self.logits(image).softmax(1)


def _presets() -> Mapping[str, Config]:
    sets = {"organa": "organamnist", "path": "pathmnist", "oct": "octmnist", "pneumonia": "pneumoniamnist", "breast": "breastmnist"}
    return {
        f"{short}-{backbone}": Config(backbone, name, len(medmnist.DATA_SETS[name].classes), size)
        for short, name in sets.items()
        for backbone, (_, _, size) in BACKBONES.items()
    }


def _data(config: Config, seed: int, root: Path | None) -> Split:
    split = medmnist.load(config.dataset, root, config.input_channels, seed)
    border = (config.image_size - medmnist.SIZE) // 2
    pads = ((0, 0), (0, 0), (border, border), (border, border))
    x_train, x_val, x_test = (np.pad(images, pads, constant_values=BLACK) for images in (split.x_train, split.x_val, split.x_test))
    return replace(split, x_train=x_train, x_val=x_val, x_test=x_test)


def _scores(module: nn.Module) -> nn.Module:
    assert isinstance(module, ReferenceDnn)
    return nn.Sequential(module.features, nn.Flatten(1), module.head)


SYSTEM = ZooSystem(
    name="medmnist_dnn",
    summary="reference DNNs for 28x28 medical images, members of averaging ensembles",
    paper="Prvan, Music, Coko, Kristic: Lightweight Neural Network Ensemble Models for Medical Image Classification with MedMNIST Dataset",
    presets=_presets(),
    build=ReferenceDnn,
    input_shape=lambda config: (1, config.input_channels, config.image_size, config.image_size),
    load_data=_data,
    train=TrainConfig(epochs=5, batch_size=64, learning_rate=1e-3),
    rehearsal=dict.fromkeys(_presets(), TrainConfig(epochs=1, batch_size=64, learning_rate=1e-3)),
    deployed=_scores,
    roads={
        "cpu": "any preset, whole; the mean over an ensemble's members on the host",
        "tflite": "mobilenet_v2, whole, beside a custom CNN (zoo:medmnist)",
        "jetson": "any preset, whole; one engine a member",
        "fpga": "none: of a hybrid ensemble the custom CNN goes there, the DNN to the processor beside it",
    },
)
