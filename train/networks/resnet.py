# SPDX-License-Identifier: Apache-2.0
"""ResNet-50 as Keras has it: convolutions with bias, the stride in a block's first 1x1 (He, Zhang, Ren, Sun)."""

from __future__ import annotations

from torch import Tensor, nn

CHANNELS = 2048
GROUPS = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))  # (width, repeats, stride of the first); a block gives four times its width


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1, added to the input, which a 1x1 brings to the same shape in the first block of a group."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out = 4 * width
        self.layers = nn.Sequential(*_conv_norm(channels, width, 1, stride), nn.ReLU(), *_conv_norm(width, width, 3), nn.ReLU(), *_conv_norm(width, out, 1))
        self.shortcut = nn.Sequential(*_conv_norm(channels, out, 1, stride)) if channels != out or stride != 1 else nn.Identity()
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.shortcut(x) + self.layers(x))


def features() -> nn.Sequential:
    """(N, 3, H, W) as (N, 2048, H / 32, W / 32)."""
    layers: list[nn.Module] = [*_conv_norm(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1)]
    channels = 64
    for width, repeats, stride in GROUPS:
        for index in range(repeats):
            layers.append(Bottleneck(channels, width, stride if index == 0 else 1))
            channels = 4 * width
    return nn.Sequential(*layers)


def _conv_norm(channels: int, out: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(channels, out, kernel, stride, padding=kernel // 2), nn.BatchNorm2d(out)]
