# SPDX-License-Identifier: Apache-2.0
"""A MobileNetV2 for 28x28 images: depthwise convolutions, linear bottlenecks, residual adds, ReLU6; two reductions to 7x7 and a global average."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from isthmus.train.data import Split, medmnist, mnist
from isthmus.train.loop import TrainConfig
from isthmus.train.networks.mobilenet_v2 import Group, features
from isthmus.train.zoo import ZooSystem


@dataclass(frozen=True)
class Config:
    """`blocks`: (expansion, channels, repeats, stride of the first) of each group of inverted residuals."""

    dataset: str
    classes: int
    blocks: tuple[Group, ...] = ((1, 8, 1, 1), (4, 16, 2, 2), (4, 24, 2, 2), (4, 32, 2, 1))
    stem: int = 16
    head: int = 128
    input_channels: int = 1
    image_size: int = 28


class MobileNetSmall(nn.Module):
    """(N, channels, 28, 28) as scores (N, classes)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.features = features(config.input_channels, config.stem, 1, config.blocks, config.head)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(config.head, config.classes)

    def forward(self, image: Tensor) -> Tensor:
        return self.classifier(self.pool(self.features(image)).flatten(1))


def _data(config: Config, seed: int, root: Path | None) -> Split:
    if config.dataset == "mnist":
        return mnist.load(root, config.input_channels, seed)
    return medmnist.load(config.dataset, root, config.input_channels, seed)


SYSTEM = ZooSystem(
    name="mobilenet_small",
    summary="MobileNetV2-style network for 28x28 images: depthwise convolutions and residual adds",
    paper="Sandler, Howard, Zhu, Zhmoginov, Chen: MobileNetV2: Inverted Residuals and Linear Bottlenecks; sized here for 28x28",
    presets={
        "pneumonia": Config("pneumoniamnist", 2),
        "breast": Config("breastmnist", 2),
        "mnist": Config("mnist", 10),
        "ci": Config("mnist", 10, blocks=((1, 8, 1, 2), (2, 8, 2, 1), (2, 16, 1, 2)), stem=8, head=32),
    },
    build=MobileNetSmall,
    input_shape=lambda config: (1, config.input_channels, config.image_size, config.image_size),
    load_data=_data,
    train=TrainConfig(epochs=8, batch_size=64, learning_rate=1e-2),
    roads=dict.fromkeys(("cpu", "tflite", "jetson"), "any preset, whole"),
)
