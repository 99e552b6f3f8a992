# SPDX-License-Identifier: Apache-2.0
"""The backbones of "Physics-Informed Neural Network for Denoising Images Using Nonlinear PDE": one grey image in, the same image without noise out.

The equations act in training alone: what is built here, and what goes to a device, is a plain convolutional network. The paper gives levels and blocks;
widths of ResUNet and the nested networks, the way up in UNet and the lite preset are readings (UNet's names no upsampling: nearest and a convolution).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from isthmus.train.zoo import Architecture


@dataclass(frozen=True)
class UNetConfig:
    """`widths` from the full size down, a 2x2 max pool between two levels, the last one the bottleneck.

    `residual`: blocks with a shortcut. `upsampling`: "nearest" leaves the channels to the block behind it, the others bring them to the level's width.
    `convolutions`: of every level but the bottleneck, which has two. Height and width are multiples of 2 to the number of pools.
    """

    widths: tuple[int, ...] = (32, 64, 128, 256)
    residual: bool = False
    upsampling: Literal["nearest and convolution", "transposed", "nearest"] = "nearest and convolution"
    norm: bool = True
    convolutions: int = 2
    input_channels: int = 1
    image_size: int = 256


@dataclass(frozen=True)
class NestedConfig:
    """`middles` and `outputs` of the encoder's six stages, then of the decoder's five, deepest first: their blocks are small UNets of their own.

    `add_skips`: a decoder stage's output plus the encoder's of that size, where the channels agree. `bounded`: a sigmoid behind every map.
    Height and width are multiples of 32.
    """

    middles: tuple[int, ...]
    outputs: tuple[int, ...]
    add_skips: bool
    bounded: bool
    side_kernel: int = 1
    input_channels: int = 1
    image_size: int = 256


Config = UNetConfig | NestedConfig
SIZE_MULTIPLE = 32  # of height and width, enough for every backbone


def _convolved(inputs: int, outputs: int, norm: bool = True, dilation: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, 3, padding=dilation, dilation=dilation)
    return [conv, *([nn.BatchNorm2d(outputs)] if norm else []), nn.ReLU()]


# ---- UNet and ResUNet
class Residual(nn.Module):
    """Two 3x3 convolutions and their input, by a 1x1 convolution where the channels change."""

    def __init__(self, inputs: int, outputs: int, norm: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential(*_convolved(inputs, outputs, norm), *_convolved(outputs, outputs, norm)[:-1])
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.layers(x) + self.shortcut(x))


def _level(config: UNetConfig, inputs: int, outputs: int, convolutions: int) -> nn.Module:
    if config.residual:
        return Residual(inputs, outputs, config.norm)
    widths = [inputs] + [outputs] * convolutions
    return nn.Sequential(*(layer for pair in pairwise(widths) for layer in _convolved(*pair, config.norm)))


def _up(config: UNetConfig, inputs: int, outputs: int) -> nn.Module:
    """Twice the height and width."""
    if config.upsampling == "transposed":
        return nn.ConvTranspose2d(inputs, outputs, 2, stride=2)
    nearest = nn.Upsample(scale_factor=2, mode="nearest")
    return nearest if config.upsampling == "nearest" else nn.Sequential(nearest, nn.Conv2d(inputs, outputs, 3, padding=1))


class UNet(nn.Module):
    """Levels down, levels up on what came up beside the skip of that size, a 1x1 convolution without activation."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        *above, bottom = config.widths
        counts = [config.convolutions] * len(above) + [2]
        self.down = nn.ModuleList(_level(config, i, o, count) for i, o, count in zip((config.input_channels, *above), config.widths, counts, strict=True))
        self.pool = nn.MaxPool2d(2)
        ups, joined = [], []
        below = bottom
        for width in above[::-1]:
            ups.append(_up(config, below, width))
            joined.append(_level(config, width + (below if config.upsampling == "nearest" else width), width, config.convolutions))
            below = width
        self.up, self.joined = nn.ModuleList(ups), nn.ModuleList(joined)
        self.head = nn.Conv2d(below, 1, 1)

    def forward(self, image: Tensor) -> Tensor:
        """(N, 1, H, W) in 0..1 as the same; what lies outside is the host's to clip."""
        skips: list[Tensor] = []
        x = image
        for index, level in enumerate(self.down):
            x = level(self.pool(x) if index else x)
            skips.append(x)
        for up, joined, skip in zip(self.up, self.joined, skips[-2::-1], strict=True):
            x = joined(torch.cat([up(x), skip], dim=1))
        return self.head(x)


# ---- U2Net and ResU2Net
HEIGHTS = (7, 6, 5, 4, 4, 4)  # of the encoder's blocks, and of the decoder's at the same sizes
DILATED_FROM = 4  # the encoder stage (counted from 0) from which blocks dilate in place of pooling


class Nested(nn.Module):
    """A U-shaped block (RSU) added to its own first convolution: `height` - 1 convolutions down, one at the bottom, as many up.

    Pools between and a dilation of 2 at the bottom; or, `dilated`, no pools and dilations of 1, 2, 4, ... down.
    """

    def __init__(self, inputs: int, middle: int, outputs: int, height: int, dilated: bool) -> None:
        super().__init__()
        rates = [2**depth if dilated else 1 for depth in range(height - 1)]
        self.dilated = dilated
        self.first = nn.Sequential(*_convolved(inputs, outputs))
        self.down = nn.ModuleList(nn.Sequential(*_convolved(middle if depth else outputs, middle, dilation=rate)) for depth, rate in enumerate(rates))
        self.bottom = nn.Sequential(*_convolved(middle, middle, dilation=2 * rates[-1] if dilated else 2))
        self.up = nn.ModuleList(
            nn.Sequential(*_convolved(2 * middle, middle if depth else outputs, dilation=rate)) for depth, rate in reversed(list(enumerate(rates)))
        )
        self.pool, self.enlarge = nn.MaxPool2d(2), _enlarge(2)

    def forward(self, x: Tensor) -> Tensor:
        first = x = self.first(x)
        skips: list[Tensor] = []
        for index, layer in enumerate(self.down):
            x = layer(self.pool(x) if index and not self.dilated else x)
            skips.append(x)
        x = self.bottom(x)
        for index, (layer, skip) in enumerate(zip(self.up, skips[::-1], strict=True)):
            x = layer(torch.cat([self.enlarge(x) if index and not self.dilated else x, skip], dim=1))
        return x + first


def _enlarge(factor: int) -> nn.Module:
    return nn.Upsample(scale_factor=factor, mode="bilinear", align_corners=False)


class NestedUNet(nn.Module):
    """A UNet of `Nested` blocks; a map from every decoder stage and the bottom, brought to full size and fused by a 1x1 convolution."""

    def __init__(self, config: NestedConfig) -> None:
        super().__init__()
        count = len(HEIGHTS)
        inputs = (config.input_channels, *config.outputs[: count - 1])
        encoder = zip(inputs, config.middles, config.outputs, HEIGHTS, strict=False)
        self.down = nn.ModuleList(Nested(*row, dilated=stage >= DILATED_FROM) for stage, row in enumerate(encoder))
        decoder, below = [], config.outputs[count - 1]
        for stage, middle, outputs in zip(reversed(range(count - 1)), config.middles[count:], config.outputs[count:], strict=True):
            decoder.append(Nested(below + config.outputs[stage], middle, outputs, HEIGHTS[stage], dilated=stage >= DILATED_FROM))
            below = outputs
        self.up = nn.ModuleList(decoder)
        self.add_skips = [config.add_skips and up == skip for up, skip in zip(config.outputs[count:], config.outputs[count - 2 :: -1], strict=True)]
        widths = (*config.outputs[:-count:-1], config.outputs[count - 1])  # full size first, the bottom last
        self.sides = nn.ModuleList(nn.Conv2d(width, 1, config.side_kernel, padding=config.side_kernel // 2) for width in widths)
        self.widened = nn.ModuleList(nn.Identity() if depth == 0 else _enlarge(2**depth) for depth in range(count))
        self.fuse = nn.Conv2d(count, 1, 1)
        self.bound = nn.Sigmoid() if config.bounded else nn.Identity()
        self.pool, self.enlarge = nn.MaxPool2d(2), _enlarge(2)

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, ...]:
        """(N, 1, H, W) in 0..1 as the same; in training the fused map and the six it is fused from, each of which the loss sees."""
        skips: list[Tensor] = []
        x = image
        for index, block in enumerate(self.down):
            x = block(self.pool(x) if index else x)
            skips.append(x)
        maps = [x]
        for block, skip, added in zip(self.up, skips[-2::-1], self.add_skips, strict=True):
            x = block(torch.cat([self.enlarge(x), skip], dim=1))
            x = x + skip if added else x
            maps.append(x)
        sides = [widened(side(x)) for side, widened, x in zip(self.sides, self.widened, maps[::-1], strict=True)]
        fused: Tensor = self.bound(self.fuse(torch.cat(sides, dim=1)))
        return (fused, *map(self.bound, sides)) if self.training else fused


def build(config: Config) -> nn.Module:
    """The backbone of a configuration."""
    return UNet(config) if isinstance(config, UNetConfig) else NestedUNet(config)


_MIDDLES = (32, 32, 64, 128, 256, 256, 256, 128, 64, 32, 16)
_OUTPUTS = (64, 128, 256, 512, 512, 512, 512, 256, 128, 64, 64)
_STAGES = len(_MIDDLES)
_FPGA = UNetConfig((4, 8), upsampling="nearest", norm=False, convolutions=1, image_size=32)

SYSTEM = Architecture(
    name="pinn_denoise",
    summary="denoisers for aerial and radar images, trained under a differential equation: UNet, ResUNet, U2Net, ResU2Net",
    paper="Osorio Quero, Crespo: Physics-Informed Neural Network for Denoising Images Using Nonlinear PDE",
    presets={
        "unet": UNetConfig(),
        "unet-transposed": UNetConfig(upsampling="transposed"),
        "resunet": UNetConfig(residual=True, upsampling="transposed"),
        "u2net": NestedConfig(_MIDDLES, _OUTPUTS, add_skips=False, bounded=True),
        "resu2net": NestedConfig((16,) * _STAGES, (64,) * _STAGES, add_skips=True, bounded=False),
        "resu2net-full": NestedConfig(_MIDDLES, _OUTPUTS, add_skips=True, bounded=False),
        "unet-edge": UNetConfig((16, 32, 64, 128)),
        "resu2net-edge": NestedConfig((8,) * _STAGES, (16,) * _STAGES, add_skips=True, bounded=False),
        "unet-ci": UNetConfig((8, 16, 32, 64), image_size=64),
        "fpga": _FPGA,
        "fpga-8-16": UNetConfig((8, 16), upsampling="nearest", norm=False, convolutions=1, image_size=32),
    },
    build=build,
    input_shape=lambda config: (1, config.input_channels, config.image_size, config.image_size),
)
