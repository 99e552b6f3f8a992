# SPDX-License-Identifier: Apache-2.0
"""AMFACPose: "Attentive Multi-Scale Features with Adaptive Context PoseResNet for Resource-Efficient Human Pose Estimation".

One person's crop in, two vectors of logits a joint out: where it lies across and down, in half pixels. The paper gives the blocks (section 3,
equations 2 to 19) and rounded totals; stem widths, pyramid width, reductions and the heads' size are chosen so that all totals agree.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from isthmus.train.zoo import Architecture


@dataclass(frozen=True)
class Config:
    """`blocks` of each stage. `coordinate_layers`: how many stem convolutions see their position. `gate_reduction` is the pyramid gates' own,
    `squeeze_reduction` that of squeeze-and-excitation. `depthwise_norm`: batch normalisation after the depthwise half too. `stem_pool`: a 2x2
    pool behind the stem, not in the paper, for small devices. Height and width are multiples of 16, of 32 with the pool.
    """

    blocks: tuple[int, int, int, int]
    height: int
    width: int
    widths: tuple[int, int, int, int] = (64, 128, 256, 512)
    stem: tuple[int, ...] = (32, 32, 64)
    coordinate_layers: int = 3
    pyramid_channels: int = 96
    fused_channels: int = 512
    hidden: int = 288
    gate_reduction: int = 4
    squeeze_reduction: int = 16
    depthwise_norm: bool = False
    stem_pool: bool = False
    joints: int = 17
    bins_per_pixel: int = 2


def _conv(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)


class CoordConv(nn.Module):
    """3x3 convolution over the image and two planes of coordinates, each from -1 to 1 with a trained scale and shift (equation 2)."""

    columns: Tensor
    rows: Tensor

    def __init__(self, inputs: int, outputs: int, stride: int, height: int, width: int) -> None:
        super().__init__()
        self.conv = _conv(inputs + 2, outputs, kernel=3, stride=stride)
        self.scale, self.shift = nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(2))
        # Whole numbers: positions are no weights, and a count of the graph must not take them for such.
        self.register_buffer("columns", torch.arange(width).reshape(1, 1, 1, width), persistent=False)
        self.register_buffer("rows", torch.arange(height).reshape(1, 1, height, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) as (N, outputs, H / stride, W / stride)."""
        across, down = (positions.to(x.dtype) * (2 / (positions.numel() - 1)) - 1 for positions in (self.columns, self.rows))
        plane = (x.shape[0], 1, x.shape[2], x.shape[3])
        across, down = across * self.scale[0] + self.shift[0], down * self.scale[1] + self.shift[1]
        return self.conv(torch.cat([x, across.expand(plane), down.expand(plane)], dim=1))


class Separable(nn.Sequential):
    """Depthwise 3x3, then 1x1, batch normalisation last (equations 3 and 4)."""

    def __init__(self, inputs: int, outputs: int, stride: int, depthwise_norm: bool) -> None:
        between = [nn.BatchNorm2d(inputs)] if depthwise_norm else []
        super().__init__(_conv(inputs, inputs, kernel=3, stride=stride, groups=inputs), *between, _conv(inputs, outputs), nn.BatchNorm2d(outputs))


class Context(nn.Module):
    """SCRM, equations 14 to 16: a gate a channel and a gate a pixel, both from the same input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channel = nn.Sequential(nn.Conv1d(1, 1, kernel_size=3, padding=1, bias=False), nn.BatchNorm1d(1))
        self.pixel = nn.Sequential(_conv(channels, channels, kernel=3, groups=channels), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        across_channels = x.mean((2, 3)).unsqueeze(1)  # (N, 1, C): the kernel slides over neighbouring channels
        channel_gate = torch.sigmoid(self.channel(across_channels)).transpose(1, 2).unsqueeze(3)
        return x * channel_gate * torch.sigmoid(self.pixel(x))


class Gate(nn.Sequential):
    """Two 1x1 convolutions on the pooled vector (N, C, 1, 1), ReLU between, sigmoid behind (equations 10 to 13)."""

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__(_conv(channels, channels // reduction), nn.ReLU(), _conv(channels // reduction, channels), nn.Sigmoid())


class Block(nn.Module):
    """A ResNet basic block of separable convolutions, its branch gated by context and by squeeze-and-excitation."""

    def __init__(self, inputs: int, outputs: int, stride: int, config: Config) -> None:
        super().__init__()
        self.first = Separable(inputs, outputs, stride, config.depthwise_norm)
        self.second = Separable(outputs, outputs, 1, config.depthwise_norm)
        self.context = Context(outputs)
        self.squeeze = Gate(outputs, config.squeeze_reduction)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Sequential(_conv(inputs, outputs, stride=stride), nn.BatchNorm2d(outputs))
        self.activation = nn.Mish()

    def forward(self, x: Tensor) -> Tensor:
        branch = self.context(self.second(self.activation(self.first(x))))
        branch = branch * self.squeeze(branch.mean((2, 3), keepdim=True))
        return self.activation(branch + self.shortcut(x))


class Level(nn.Module):
    """One level of the pyramid: 1x1, two gates from its mean, both brought to the smallest level's size and multiplied (equations 5 to 8).

    As printed, the gated map is multiplied with the map itself: its square times the gates.
    """

    def __init__(self, inputs: int, channels: int, reduction: int) -> None:
        super().__init__()
        self.lateral = nn.Sequential(_conv(inputs, channels), nn.BatchNorm2d(channels))
        self.channel_gate, self.context_gate = Gate(channels, reduction), Gate(channels, reduction)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        x = self.lateral(x)
        mean = x.mean((2, 3), keepdim=True)
        gated = x * self.channel_gate(mean) * self.context_gate(mean)
        return _resized(x, size) * _resized(gated, size)


def _resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    return x if tuple(x.shape[2:]) == size else functional.interpolate(x, size=size, mode="bilinear", align_corners=False)


class AmfacPose(nn.Module):
    """Stem of stride 2, four stages, pyramid fused at the last stage's size, a 1x1 to the joints, one small network an axis for all joints."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        stem: list[nn.Module] = []
        channels, height, width = 3, config.height, config.width
        for index, outputs in enumerate(config.stem):
            stride = 2 if index == 0 else 1
            if index < config.coordinate_layers:
                stem.append(CoordConv(channels, outputs, stride, height, width))
            else:
                stem.append(_conv(channels, outputs, kernel=3, stride=stride))
            stem += [nn.BatchNorm2d(outputs), nn.Mish()]
            channels, height, width = outputs, height // stride, width // stride
        self.stem = nn.Sequential(*stem, *([nn.MaxPool2d(2)] if config.stem_pool else []))
        stages, levels = [], []
        for index, (outputs, count) in enumerate(zip(config.widths, config.blocks, strict=True)):
            strides = [1 if index == 0 else 2] + [1] * (count - 1)
            stages.append(nn.Sequential(*(Block(channels if i == 0 else outputs, outputs, stride, config) for i, stride in enumerate(strides))))
            levels.append(Level(outputs, config.pyramid_channels, config.gate_reduction))
            channels = outputs
        self.stages, self.levels = nn.ModuleList(stages), nn.ModuleList(levels)
        fused = config.fused_channels
        self.fuse = nn.Sequential(_conv(4 * config.pyramid_channels, fused), nn.BatchNorm2d(fused), nn.Mish())
        self.joints = nn.Conv2d(fused, config.joints, kernel_size=1)
        reduced = 32 if config.stem_pool else 16
        positions = (config.height // reduced) * (config.width // reduced)
        self.across, self.down = (
            nn.Sequential(nn.Linear(positions, config.hidden), nn.Mish(), nn.Linear(config.hidden, extent * config.bins_per_pixel))
            for extent in (config.width, config.height)
        )

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 3, H, W), ImageNet-normalised, as logits (N, joints, 2 W) and (N, joints, 2 H)."""
        x = self.stem(image)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        size = (x.shape[2], x.shape[3])
        fused = self.fuse(torch.cat([level(features, size) for level, features in zip(self.levels, maps, strict=True)], dim=1))
        joints = self.joints(fused).flatten(2)
        return self.across(joints), self.down(joints)


_R34, _R18 = (3, 4, 6, 3), (2, 2, 2, 2)

SYSTEM = Architecture(
    name="amfacpose",
    summary="2-D human pose from a person's crop, coordinates as classes",
    paper="Zakir, Salman, Benitez-Garcia, Takahashi: Attentive Multi-Scale Features with Adaptive Context PoseResNet",
    presets={
        "r34-384x288": Config(_R34, 384, 288),
        "r34-256x256": Config(_R34, 256, 256),
        "r18-384x288": Config(_R18, 384, 288),
        "r18-256x256": Config(_R18, 256, 256),
        "r34-384x288-pool": Config(_R34, 384, 288, stem_pool=True),
        "r18-256x256-pool": Config(_R18, 256, 256, stem_pool=True),
    },
    build=AmfacPose,
    input_shape=lambda config: (1, 3, config.height, config.width),
)
