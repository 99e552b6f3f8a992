# SPDX-License-Identifier: Apache-2.0
"""DenseNet-121: each layer reads the concatenation of all before it in its block (Huang, Liu, van der Maaten, Weinberger)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

CHANNELS = 1024
BLOCKS = (6, 12, 24, 16)
GROWTH, STEM, BOTTLENECK = 32, 64, 4


class _Layer(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        width = BOTTLENECK * GROWTH
        self.layers = nn.Sequential(
            *(nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, width, 1, bias=False)),
            *(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, GROWTH, 3, padding=1, bias=False)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.layers(x)], dim=1)


def features() -> nn.Sequential:
    """(N, 3, H, W) as (N, 1024, H / 32, W / 32)."""
    layers: list[nn.Module] = [nn.Conv2d(3, STEM, 7, 2, padding=3, bias=False), nn.BatchNorm2d(STEM), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1)]
    channels = STEM
    for number, count in enumerate(BLOCKS):
        for _ in range(count):
            layers.append(_Layer(channels))
            channels += GROWTH
        layers += [nn.BatchNorm2d(channels), nn.ReLU()]
        if number < len(BLOCKS) - 1:
            layers += [nn.Conv2d(channels, channels // 2, 1, bias=False), nn.AvgPool2d(2)]
            channels //= 2
    return nn.Sequential(*layers)
