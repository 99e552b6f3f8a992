# SPDX-License-Identifier: Apache-2.0
"""The custom CNNs of "Lightweight Neural Network Ensemble Models for Medical Image Classification with MedMNIST Dataset", tables 2 and 4.

31 networks: families A, B, C and D for three data sets of 28x28 images. A grayscale image comes replicated to three channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from isthmus.train.zoo import Architecture


@dataclass(frozen=True)
class Config:
    """`blocks` holds the filters of each 3x3 convolution, block by block; a block ends in a 2x2 max pool.

    `norm`: where batch normalisation stands (between a convolution and its ReLU). `hidden`: widths of the dense layers before the last one.
    """

    blocks: tuple[tuple[int, ...], ...]
    norm: Literal["none", "last of block", "every"]
    hidden: tuple[int, ...]
    classes: int
    input_channels: int = 3
    image_size: int = 28


class MedMnistNet(nn.Module):
    """Same 3x3 convolutions with bias, pools that round up (28 -> 14 -> 7 -> 4 -> 2), dense layers, softmax."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels, size = config.input_channels, config.image_size
        for filters in config.blocks:
            for index, width in enumerate(filters):
                layers.append(nn.Conv2d(channels, width, kernel_size=3, padding=1))
                if config.norm == "every" or (config.norm == "last of block" and index == len(filters) - 1):
                    layers.append(nn.BatchNorm2d(width))
                layers.append(nn.ReLU())
                channels = width
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
            size = -(-size // 2)
        self.features = nn.Sequential(*layers)
        head: list[nn.Module] = []
        units = channels * size * size
        for width in config.hidden:
            head += [nn.Linear(units, width), nn.ReLU()]
            units = width
        self.head = nn.Sequential(*head, nn.Linear(units, config.classes))

    def logits(self, image: Tensor) -> Tensor:
        """(N, 3, 28, 28), raw 0..255, as (N, classes)."""
        return self.head(self.features(image).flatten(1))

    def forward(self, image: Tensor) -> Tensor:
        """Probabilities (N, classes): an ensemble is the mean of its members'."""
        return self.logits(image).softmax(1)


_PAIRS = ((32, 32), (64, 64), (128, 128), (256, 256))  # Diniz; DaSilva on OrganAMNIST
_TRIPLES = ((32, 32, 64), (64, 128, 128), (256, 256, 512))  # DaSilva
_CLASSES = {"path": 9, "organa": 11, "oct": 4}


def _family(dataset: str, letter: str) -> list[Config]:
    """The networks `letter`1, `letter`2, ... of a data set: the first blocks of the largest one, with the same head."""
    classes = _CLASSES[dataset]
    if letter == "b":
        return [Config(_PAIRS[: k + 1], "none", (256,), classes) for k in range(4)]
    if letter == "d":
        return [Config(_TRIPLES[: k + 1], "every", (256,), classes) for k in range(3)]
    if dataset == "organa":
        return [Config(_PAIRS[: k + 1], "last of block", (64,), classes) for k in range(4)]
    if dataset == "oct":
        return [Config(_TRIPLES[: k + 1], "last of block", (64,), classes) for k in range(3)]
    return [Config(_TRIPLES[: k + 1], "none", (128,), classes) for k in range(3)]


def _presets() -> Mapping[str, Config]:
    """The smallest network comes first, as the default; then A, then by data set and family."""
    families = {(dataset, letter): _family(dataset, letter) for dataset in _CLASSES for letter in "bcd"}
    named = {f"{dataset}-{letter}{k}": config for (dataset, letter), configs in families.items() for k, config in enumerate(configs, 1)}
    adjei = Config(((32, 64, 128, 128, 64),), "every", (64, 64), _CLASSES["path"])
    return {"organa-c2": named["organa-c2"], "path-a": adjei} | named


SYSTEM = Architecture(
    name="medmnist",
    summary="custom CNNs for 28x28 medical images, members of averaging ensembles",
    paper="Prvan, Music, Coko, Kristic: Lightweight Neural Network Ensemble Models for Medical Image Classification with MedMNIST Dataset",
    presets=_presets(),
    build=MedMnistNet,
    input_shape=lambda config: (1, config.input_channels, config.image_size, config.image_size),
)
