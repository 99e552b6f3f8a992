# SPDX-License-Identifier: Apache-2.0
"""MobileNetV2: inverted residuals with linear bottlenecks (Sandler, Howard, Zhu, Zhmoginov, Chen)."""

from __future__ import annotations

from torch import Tensor, nn

# (expansion, channels, repeats, stride of the first)
Group = tuple[int, int, int, int]
GROUPS: tuple[Group, ...] = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
CHANNELS = 1280


class InvertedResidual(nn.Module):
    """1x1 to `expansion` times the channels, depthwise 3x3, 1x1 without activation; added to its input where the shapes are equal."""

    def __init__(self, channels: int, expansion: int, out: int, stride: int) -> None:
        super().__init__()
        width = channels * expansion
        expand = conv_norm(channels, width, 1) if expansion != 1 else []
        self.layers = nn.Sequential(*expand, *conv_norm(width, width, 3, stride, groups=width), nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out))
        self.residual = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


def features(channels: int = 3, stem: int = 32, stem_stride: int = 2, groups: tuple[Group, ...] = GROUPS, last: int = CHANNELS) -> nn.Sequential:
    """(N, channels, H, W) as (N, last, H / 32, W / 32) for the paper's numbers, which are the defaults."""
    layers: list[nn.Module] = conv_norm(channels, stem, 3, stem_stride)
    channels = stem
    for expansion, out, repeats, stride in groups:
        for index in range(repeats):
            layers.append(InvertedResidual(channels, expansion, out, stride if index == 0 else 1))
            channels = out
    return nn.Sequential(*layers, *conv_norm(channels, last, 1))


def conv_norm(channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(channels, out, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(out), nn.ReLU6()]
