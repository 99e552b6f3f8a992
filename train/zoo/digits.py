# SPDX-License-Identifier: Apache-2.0
"""Handwritten digits with the reduced custom CNN of the MedMNIST ensembles: two blocks of 3x3 convolutions and a global average."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from isthmus.train.data import digits as data
from isthmus.train.loop import TrainConfig
from isthmus.train.zoo import ZooSystem


@dataclass(frozen=True)
class Config:
    """`blocks` holds the filters of each 3x3 convolution, block by block; a block ends in a 2x2 max pool."""

    blocks: tuple[tuple[int, ...], ...]
    input_channels: int = 1
    image_size: int = 8
    classes: int = 10


class DigitsNet(nn.Module):
    """Per block: same convolutions with ReLU, a batch norm after the last one (before its ReLU), a pool. Then the mean and one linear layer."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = config.input_channels
        for filters in config.blocks:
            for index, width in enumerate(filters):
                layers.append(nn.Conv2d(channels, width, kernel_size=3, padding=1))
                if index == len(filters) - 1:
                    layers.append(nn.BatchNorm2d(width))
                layers.append(nn.ReLU())
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, config.classes)

    def forward(self, image: Tensor) -> Tensor:
        return self.classifier(self.pool(self.features(image)).flatten(1))


SYSTEM = ZooSystem(
    name="digits",
    summary="small CNN on scikit-learn's handwritten digits (8x8 scans, 10 classes)",
    paper="lightweight CNN ensembles on MedMNIST: the custom CNN C2 with a quarter of its filters and a global average in place of its hidden layer",
    presets={"c2": Config(blocks=((8, 8), (16, 16))), "nano": Config(blocks=((4, 4), (8, 8)))},
    build=DigitsNet,
    input_shape=lambda config: (1, config.input_channels, config.image_size, config.image_size),
    load_data=lambda config, seed, root: data.load(seed),  # the scans come with scikit-learn: no folder
    train=TrainConfig(epochs=40, batch_size=64, learning_rate=1e-2),
)
