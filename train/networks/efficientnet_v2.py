# SPDX-License-Identifier: Apache-2.0
"""EfficientNetV2-B0: fused inverted residuals first, depthwise ones with squeeze-and-excite behind (Tan, Le)."""

from __future__ import annotations

from torch import Tensor, nn

from isthmus.train.networks.mobilenet_v3 import SqueezeExcite

CHANNELS = 1280
STEM = 32
# (fused, expansion, channels, repeats, stride of the first)
GROUPS = ((True, 1, 16, 1, 1), (True, 4, 32, 2, 2), (True, 4, 48, 2, 2), (False, 4, 96, 3, 2), (False, 6, 112, 5, 1), (False, 6, 192, 8, 2))


class _Block(nn.Module):
    """Fused: one 3x3 for expansion and space. Else 1x1, depthwise 3x3, squeeze-and-excite to a quarter of the block's input, 1x1."""

    def __init__(self, channels: int, fused: bool, expansion: int, out: int, stride: int) -> None:
        super().__init__()
        width = channels * expansion
        if fused and expansion == 1:
            layers = _conv_norm(channels, out, 3, stride)
        elif fused:
            layers = [*_conv_norm(channels, width, 3, stride), *_linear(width, out)]
        else:
            excite = SqueezeExcite(width, max(1, channels // 4), nn.SiLU(), nn.Sigmoid())
            layers = [*_conv_norm(channels, width, 1, 1), *_conv_norm(width, width, 3, stride, groups=width), excite, *_linear(width, out)]
        self.layers = nn.Sequential(*layers)
        self.residual = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


def features() -> nn.Sequential:
    """(N, 3, H, W) as (N, 1280, H / 32, W / 32)."""
    layers = _conv_norm(3, STEM, 3, 2)
    channels = STEM
    for fused, expansion, out, repeats, stride in GROUPS:
        for index in range(repeats):
            layers.append(_Block(channels, fused, expansion, out, stride if index == 0 else 1))
            channels = out
    return nn.Sequential(*layers, *_conv_norm(channels, CHANNELS, 1, 1))


def _conv_norm(channels: int, out: int, kernel: int, stride: int, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(channels, out, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(out, eps=1e-3), nn.SiLU()]


def _linear(channels: int, out: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, out, 1, bias=False), nn.BatchNorm2d(out, eps=1e-3)]
