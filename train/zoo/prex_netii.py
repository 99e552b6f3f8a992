# SPDX-License-Identifier: Apache-2.0
"""Prex-NetII: "Attention-Based Back-Projection Network for Light Field Reconstruction". Four corner views in, all 7x7 views out.

Luma only. Up- and down-projections alternate between the views' grid and one of twice its size; each reads everything before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from isthmus.train.zoo import Architecture


@dataclass(frozen=True)
class Config:
    """`blocks` of up- and down-projection; `initial`: filters of the first three convolutions."""

    blocks: int
    initial: tuple[int, int, int] = (256, 128, 64)
    views: int = 49
    reduction: int = 14
    height: int = 96
    width: int = 96


class SpatialAttention(nn.Module):
    """A gate a pixel from the mean and the largest of its channels; padded by 3, as 7x7 needs (printed as 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, kernel_size=7, padding=3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.conv(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], dim=1)))


class ChannelAttention(nn.Module):
    """A gate a channel from the channels' means; the two dense layers as 1x1 convolutions, which is the same and stays four-dimensional."""

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        between = channels // reduction
        self.gate = nn.Sequential(nn.Conv2d(channels, between, 1), nn.ReLU(), nn.Conv2d(between, channels, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x.mean((2, 3), keepdim=True))


class Up(nn.Sequential):
    """F: (N, 49, H, W) as (N, 49, 2H, 2W)."""

    def __init__(self, config: Config) -> None:
        views = config.views
        attention = ChannelAttention(4 * views, config.reduction)
        super().__init__(nn.Conv2d(views, 4 * views, 3, padding=1), attention, nn.PixelShuffle(2), nn.LeakyReLU(0.2))


def _down(config: Config) -> nn.Conv2d:
    """g: (N, 49, 2H, 2W) as (N, 49, H, W)."""
    return nn.Conv2d(config.views, config.views, kernel_size=6, stride=2, padding=2)


def _merge(maps: int, config: Config) -> nn.Module:
    """1x1 from the maps so far to one; one map alone needs none."""
    return nn.Identity() if maps == 1 else nn.Sequential(nn.Conv2d(maps * config.views, config.views, 1), nn.LeakyReLU(0.2))


class UpProjection(nn.Module):
    """Equations 1 and 2: up, down again, and the error of the way back up."""

    def __init__(self, maps: int, config: Config) -> None:
        super().__init__()
        self.merge, self.up, self.down, self.up_error = _merge(maps, config), Up(config), _down(config), Up(config)
        self.activation = nn.LeakyReLU(0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.merge(x)
        large = self.up(x)
        return large + self.up_error(self.activation(self.down(large)) - x)


class DownProjection(nn.Module):
    """Equations 3 and 4: down, up again, and the error of the way back down. The first result has no activation."""

    def __init__(self, maps: int, config: Config) -> None:
        super().__init__()
        self.merge, self.down, self.up, self.down_error = _merge(maps, config), _down(config), Up(config), _down(config)
        self.activation = nn.LeakyReLU(0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.merge(x)
        small = self.down(x)
        return small + self.activation(self.down_error(self.up(small) - x))


class PrexNet(nn.Module):
    """Five convolutions on the interleaved corners, `blocks` pairs of projections, one convolution over all small maps, the long skip."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        first, second, third = config.initial
        views = config.views
        self.initial = nn.Sequential(
            nn.PixelShuffle(2),
            nn.Conv2d(1, first, 3, padding=1),
            nn.LeakyReLU(0.01),
            SpatialAttention(),
            nn.Conv2d(first, second, 3, padding=1),
            nn.LeakyReLU(0.01),
            nn.Conv2d(second, third, 3, padding=1),
            nn.LeakyReLU(0.01),
            nn.Conv2d(third, views, 3, padding=1),
            nn.LeakyReLU(0.01),
            nn.Conv2d(views, views, 3, stride=2, padding=1),
            nn.LeakyReLU(0.01),
        )
        # Up-projection k reads k - 1 small maps, the first one the initial features.
        self.ups = nn.ModuleList(UpProjection(max(1, block), config) for block in range(config.blocks))
        self.downs = nn.ModuleList(DownProjection(block + 1, config) for block in range(config.blocks))
        self.last = nn.Conv2d(config.blocks * views, views, 3, padding=1)

    def forward(self, corners: Tensor) -> Tensor:
        """(N, 4, H, W), luma in 0..1, left top, right top, left bottom, right bottom, as (N, 49, H, W), row by row."""
        initial = self.initial(corners)
        large: list[Tensor] = []
        small: list[Tensor] = []
        for up, down in zip(self.ups, self.downs, strict=True):
            large.append(up(torch.cat(small, dim=1) if small else initial))
            small.append(down(torch.cat(large, dim=1)))
        return self.last(torch.cat(small, dim=1)) + initial


SYSTEM = Architecture(
    name="prex_netii",
    summary="light field: 49 views from the four corner views",
    paper="Kim, Suh: Prex-NetII: Attention-Based Back-Projection Network for Light Field Reconstruction",
    presets={"blocks-3": Config(3), "blocks-6": Config(6), "blocks-9": Config(9), "blocks-12": Config(12)},
    build=PrexNet,
    input_shape=lambda config: (1, 4, config.height, config.width),
)
