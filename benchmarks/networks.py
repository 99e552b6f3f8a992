# SPDX-License-Identifier: Apache-2.0
"""The networks that are timed side by side with other tools, as plain torch modules with seeded weights and samples. Scripts beside this file import it.

Weights are random, but batch norms have seen the samples: activations are of the size they have in a trained network. Latency does not depend on
more; where accuracy counts, `trained_c2` trains C2 on the files of PneumoniaMNIST.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from isthmus.train import zoo
from isthmus.train.data import Split
from isthmus.train.loop import fit
from isthmus.train.networks import mobilenet_v2
from isthmus.train.zoo import ZooSystem

SETTLING_BATCH, SETTLING_BATCHES = 8, 4
C2 = "pneumonia-c2"


@dataclass(frozen=True)
class Network:
    """`module()` gives it in evaluation mode, `samples(count)` float32 of the shape (count, ...), the same ones at every call."""

    name: str
    input_shape: tuple[int, ...]
    build: Callable[[], nn.Module]

    def module(self) -> nn.Module:
        torch.manual_seed(0)
        module = self.build().train()
        with torch.no_grad():
            for batch in torch.from_numpy(self.samples(SETTLING_BATCH * SETTLING_BATCHES)).split(SETTLING_BATCH):
                module(batch)
        return module.eval()

    def samples(self, count: int, seed: int = 0) -> np.ndarray:
        """Coarse patches with grain over them, in -1 to 1: edges and flat areas, as images have. `seed` 0 calibrates; another one evaluates."""
        channels, height, width = self.input_shape[1:]
        generator = np.random.default_rng(seed)
        side = max(2, min(height, width) // 8)
        coarse = generator.uniform(-0.8, 0.8, (count, channels, -(-height // side), -(-width // side)))
        patches = coarse.repeat(side, axis=2).repeat(side, axis=3)[:, :, :height, :width]
        return np.clip(patches + generator.normal(0, 0.1, patches.shape), -1, 1).astype(np.float32)

    @property
    def example(self) -> Tensor:
        return torch.zeros(self.input_shape)


class ResNet8(nn.Module):
    """MLPerf Tiny's image classifier: three residual blocks of 16, 32 and 64 channels on 32x32."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.blocks = nn.Sequential(_Residual(16, 16, 1), _Residual(16, 32, 2), _Residual(32, 64, 2))
        self.head = nn.Linear(64, classes)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(image)).mean((2, 3)))


class _Residual(nn.Module):
    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out))
        self.shortcut = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.second(self.first(x)) + self.shortcut(x))


def ds_cnn(classes: int = 12, width: int = 64) -> nn.Sequential:
    """MLPerf Tiny's keyword spotter: 49 frames of 10 coefficients, a 10x4 convolution, four depthwise-separable blocks."""
    layers: list[nn.Module] = [nn.Conv2d(1, width, (10, 4), 2, (5, 1), bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    for _ in range(4):
        layers += [nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(width, classes))


class UNet(nn.Module):
    """Three levels down and up, two 3x3 convolutions each, 2x2 transposed convolutions on the way up, skips by concatenation."""

    def __init__(self, channels: int = 3, classes: int = 2, widths: tuple[int, int, int, int] = (16, 32, 64, 128)) -> None:
        super().__init__()
        self.down = nn.ModuleList(_double(i, o) for i, o in zip((channels, *widths[:-1]), widths, strict=True))
        self.up = nn.ModuleList(nn.ConvTranspose2d(w, n, 2, stride=2) for w, n in zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.joined = nn.ModuleList(_double(2 * n, n) for n in widths[-2::-1])
        self.head = nn.Conv2d(widths[0], classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for level, block in enumerate(self.down):
            x = block(x if level == 0 else nn.functional.max_pool2d(x, 2))
            skips.append(x)
        for up, joined, skip in zip(self.up, self.joined, skips[-2::-1], strict=True):
            x = joined(torch.cat([up(x), skip], dim=1))
        return self.head(x)


def _double(channels: int, out: int) -> nn.Sequential:
    first, second = (nn.Conv2d(i, out, 3, padding=1, bias=False) for i in (channels, out))
    return nn.Sequential(first, nn.BatchNorm2d(out), nn.ReLU(), second, nn.BatchNorm2d(out), nn.ReLU())


def _mobilenet(classes: int = 1000) -> nn.Module:
    return nn.Sequential(mobilenet_v2.features(), nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(mobilenet_v2.CHANNELS, classes))


def _c2() -> nn.Module:
    return zoo.trainable(zoo.load("medmnist")).network(C2)


NETWORKS: dict[str, Network] = {
    network.name: network
    for network in (
        Network("mobilenet-v2-224", (1, 3, 224, 224), _mobilenet),
        Network("resnet-8-32", (1, 3, 32, 32), ResNet8),
        Network("ds-cnn-49x10", (1, 1, 49, 10), ds_cnn),
        Network("c2-28", (1, 1, 28, 28), _c2),
        Network("amfacpose-r18-256", (1, 3, 256, 256), lambda: zoo.load("amfacpose").module("r18-256x256")),
        Network("unet-128", (1, 3, 128, 128), UNet),
    )
}


def trained_c2(data: Path, epochs: int = 4) -> tuple[nn.Module, Split]:
    """C2 on PneumoniaMNIST's own files under `data`, and the samples: about a minute on one core."""
    system: ZooSystem = zoo.trainable(zoo.load("medmnist"))
    split = system.data(0, C2, data)
    module = system.network(C2)
    fit(module, split, replace(system.training(0, C2), epochs=epochs))
    return module.eval(), split
