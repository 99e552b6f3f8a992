# SPDX-License-Identifier: Apache-2.0
"""The custom CNNs of "Lightweight Neural Network Ensemble Models for Medical Image Classification with MedMNIST Dataset", tables 2 and 4.

32 networks: A, and families B, C and D for three data sets of 28x28 images. A grayscale image comes replicated to three channels, as the paper counts them.
Beside them OrganAMNIST's family C for other grey sets, and reduced sizes for FPGAs: these take one channel, which is the same network with the three
kernels summed.

Where the paper feeds 0..255, samples are (pixel - 128) / 128: an affine change the first layer learns, and exact in int8 under every scheme.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from isthmus.train.data import Split, medmnist, mnist
from isthmus.train.loop import TrainConfig
from isthmus.train.zoo import ZooSystem


@dataclass(frozen=True)
class Config:
    """`blocks` holds the filters of each 3x3 convolution, block by block; a block ends in a 2x2 max pool.

    `norm`: where batch normalisation stands (between a convolution and its ReLU). `hidden`: widths of the dense layers before the last one.
    `average`: the mean of each channel goes to the dense layers, in place of every pixel.
    """

    blocks: tuple[tuple[int, ...], ...]
    norm: Literal["none", "last of block", "every"]
    hidden: tuple[int, ...]
    dataset: str
    classes: int
    average: bool = False
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
        if config.average:
            layers.append(nn.AdaptiveAvgPool2d(1))
            size = 1
        self.features = nn.Sequential(*layers)
        head: list[nn.Module] = []
        units = channels * size * size
        for width in config.hidden:
            head += [nn.Linear(units, width), nn.ReLU()]
            units = width
        self.head = nn.Sequential(*head, nn.Linear(units, config.classes))

    def logits(self, image: Tensor) -> Tensor:
        """(N, channels, 28, 28) as (N, classes)."""
        return self.head(self.features(image).flatten(1))

    def forward(self, image: Tensor) -> Tensor:
        """Probabilities (N, classes): an ensemble is the mean of its members'."""
        return self.logits(image).softmax(1)


_PAIRS = ((32, 32), (64, 64), (128, 128), (256, 256))  # Diniz; DaSilva on OrganAMNIST
_TRIPLES = ((32, 32, 64), (64, 128, 128), (256, 256, 512))  # DaSilva
_DATA = {"path": "pathmnist", "organa": "organamnist", "oct": "octmnist", "pneumonia": "pneumoniamnist", "breast": "breastmnist", "mnist": "mnist"}
_GREY = ("pneumonia", "breast", "mnist")  # not in the paper


def _classes(dataset: str) -> int:
    return len(mnist.CLASSES if dataset == "mnist" else medmnist.DATA_SETS[dataset].classes)


def _config(dataset: str, blocks: tuple[tuple[int, ...], ...], norm: Literal["none", "last of block", "every"], *hidden: int) -> Config:
    return Config(blocks, norm, hidden, _DATA[dataset], _classes(_DATA[dataset]))


def _family(dataset: str, letter: str) -> list[Config]:
    """The networks `letter`1, `letter`2, ... of a data set: the first blocks of the largest one, with the same head."""
    if letter == "b":
        return [_config(dataset, _PAIRS[: k + 1], "none", 256) for k in range(4)]
    if letter == "d":
        return [_config(dataset, _TRIPLES[: k + 1], "every", 256) for k in range(3)]
    if dataset == "path":
        return [_config(dataset, _TRIPLES[: k + 1], "none", 128) for k in range(3)]
    if dataset == "oct":
        return [_config(dataset, _TRIPLES[: k + 1], "last of block", 64) for k in range(3)]
    return [_config(dataset, _PAIRS[: k + 1], "last of block", 64) for k in range(4)]


def _paper_presets() -> Mapping[str, Config]:
    """The smallest network comes first, as the default; then A, then by data set and family."""
    families = {(dataset, letter): _family(dataset, letter) for dataset in ("path", "organa", "oct") for letter in "bcd"}
    named = {f"{dataset}-{letter}{k}": config for (dataset, letter), configs in families.items() for k, config in enumerate(configs, 1)}
    adjei = _config("path", ((32, 64, 128, 128, 64),), "every", 64, 64)
    return {"organa-c2": named["organa-c2"], "path-a": adjei} | named


def _grey_presets() -> Mapping[str, Config]:
    """OrganAMNIST's family C, on one channel."""
    return {f"{dataset}-c{k}": replace(config, input_channels=1) for dataset in _GREY for k, config in enumerate(_family(dataset, "c"), 1)}


def _fpga_presets(dataset: str) -> Mapping[str, Config]:
    """A quarter of the filters. Behind an average the weights of the largest layer drop from 12,544 to 2,304 (C2)."""
    quarter = replace(_config(dataset, ((8, 8), (16, 16)), "last of block", 16), input_channels=1)
    averaged = replace(quarter, hidden=(), average=True)
    return {
        f"{dataset}-c2-quarter": quarter,
        f"{dataset}-c2-quarter-average": averaged,
        f"{dataset}-c3-quarter-average": replace(averaged, blocks=((8, 8), (16, 16), (32, 32))),
        f"{dataset}-nano": replace(averaged, blocks=((4, 4), (8, 8))),
    }


def _data(config: Config, seed: int, root: Path | None) -> Split:
    if config.dataset == "mnist":
        return mnist.load(root, config.input_channels, seed)
    return medmnist.load(config.dataset, root, config.input_channels, seed)


def _scores(module: nn.Module) -> nn.Module:
    assert isinstance(module, MedMnistNet)
    return nn.Sequential(module.features, nn.Flatten(1), module.head)


PAPER = _paper_presets()
_LARGE = [name for name, config in PAPER.items() if len(config.blocks[0]) > 2]  # A and what stands on triples: 23 to 247 million multiply-accumulates
FPGA = {name: config for dataset in ("organa", *_GREY) for name, config in _fpga_presets(dataset).items()}
SYSTEM = ZooSystem(
    name="medmnist",
    summary="custom CNNs for 28x28 medical images, members of averaging ensembles",
    paper="Prvan, Music, Coko, Kristic: Lightweight Neural Network Ensemble Models for Medical Image Classification with MedMNIST Dataset",
    presets={**PAPER, **_grey_presets(), **FPGA},
    build=MedMnistNet,
    input_shape=lambda config: (1, config.input_channels, config.image_size, config.image_size),
    load_data=_data,
    train=TrainConfig(epochs=5, batch_size=64, learning_rate=2e-3),
    train_presets=dict.fromkeys(FPGA, TrainConfig(epochs=15, batch_size=64, learning_rate=1e-2)),
    rehearsal=dict.fromkeys(_LARGE, TrainConfig(epochs=1, batch_size=64, learning_rate=2e-3)),
    deployed=_scores,  # softmax and the mean over an ensemble's members are the host's: `isthmus.train.ensemble`
    roads={
        "cpu": "any preset, whole; the mean over an ensemble's members on the host",
        "tflite": "any preset, whole; family C of OrganAMNIST takes 0.3 to 1.3 MB",
        "jetson": "any preset, whole; one engine a member",
        "fpga": "*-quarter, *-quarter-average, *-nano, whole: the others' weights do not fit a small chip",
    },
)
