# SPDX-License-Identifier: Apache-2.0
"""AMFACPose: "Attentive Multi-Scale Features with Adaptive Context PoseResNet for Resource-Efficient Human Pose Estimation".

One person's crop in, two vectors of logits a joint out: where it lies across and down, in half pixels. The paper gives the blocks (section 3,
equations 2 to 19) and rounded totals; stem widths, pyramid width, reductions and the heads' size are chosen so that all totals agree.
What is trained and measured is in `_amfacpose_task`, what a device does before and behind in `isthmus.train.processing.pose`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from isthmus.train.data import Split, coco_keypoints
from isthmus.train.loop import TrainConfig
from isthmus.train.processing.pose import SKELETONS
from isthmus.train.zoo import ZooSystem
from isthmus.train.zoo._amfacpose_task import pose_task

ACTIVATIONS = {"mish": nn.Mish, "hardswish": nn.Hardswish}
# Training pushes the logits of far bins without end, where they mean nothing any more: e^-20 of the likeliest, and less. int8 would spend its steps on
# them, and the bins about the joint, which say where it is, would become too coarse to tell apart. A power of two: -128 steps.
LEAST_LOGIT = -16.0


@dataclass(frozen=True)
class Config:
    """`blocks` of each stage. `coordinate_layers`: how many stem convolutions see their position. `gate_reduction` is the pyramid gates' own,
    `squeeze_reduction` that of squeeze-and-excitation. `depthwise_norm`: batch normalisation after the depthwise half too. `pyramid` to
    `squeeze`: without a part, as in the paper's ablation. Not in the paper, for small devices: `stem_pool`, a 2x2 pool behind the stem;
    `pool_first`, see `Level`; `masked`: the pyramid's maps times their gates, not the square of the maps times them. Height and width are
    multiples of 16, of 32 with the pool. `spread`: standard deviation in bins of a Gaussian target, 0 for the smoothed single bin. `figures`:
    synthetic images where the data set's files are not given.
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
    pyramid: bool = True
    gates: bool = True
    context: bool = True
    squeeze: bool = True
    masked: bool = False
    stem_pool: bool = False
    pool_first: bool = False
    activation: str = "mish"
    joints: int = 17
    bins_per_pixel: int = 2
    spread: float = 0.0
    figures: int = 4

    input_channels = 3


@dataclass(frozen=True)
class TinyConfig:
    """For FPGAs, not in the paper: three convolutions of stride 2 and a 1x1, no gates. The host appends two planes of coordinates."""

    height: int = 64
    width: int = 48
    widths: tuple[int, ...] = (8, 16, 32)
    hidden: int = 32
    joints: int = 17
    bins_per_pixel: int = 1
    spread: float = 1.5
    figures: int = 48

    input_channels = 5


def _conv(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)


def _from_least(logits: Tensor) -> Tensor:
    return torch.clamp(logits, min=LEAST_LOGIT)


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
        self.context = Context(outputs) if config.context else nn.Identity()
        self.squeeze = Gate(outputs, config.squeeze_reduction) if config.squeeze else None
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Sequential(_conv(inputs, outputs, stride=stride), nn.BatchNorm2d(outputs))
        self.activation = ACTIVATIONS[config.activation]()

    def forward(self, x: Tensor) -> Tensor:
        branch = self.context(self.second(self.activation(self.first(x))))
        if self.squeeze is not None:
            branch = branch * self.squeeze(branch.mean((2, 3), keepdim=True))
        return self.activation(branch + self.shortcut(x))


class Level(nn.Module):
    """One level of the pyramid: 1x1, two gates from its mean, both brought to the smallest level's size and multiplied (equations 5 to 8).

    As printed, the gated map is multiplied with the map itself: its square times the gates. A 1x1 convolution, its batch norm in evaluation and a
    gate a channel commute with means over pixels, so `pool_first` gives the same numbers from fewer of them; training keeps the paper's
    order, because the batch norm's statistics are those of all pixels.
    """

    def __init__(self, inputs: int, config: Config) -> None:
        super().__init__()
        channels = config.pyramid_channels
        self.lateral = nn.Sequential(_conv(inputs, channels), nn.BatchNorm2d(channels))
        self.gates = nn.ModuleList(Gate(channels, config.gate_reduction) for _ in range(2 if config.gates else 0))
        self.pool_first, self.masked = config.pool_first, config.masked

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        if self.pool_first and not self.training:
            small = self.lateral(shrunk(x, size))
            gated = self._gated(small, self.lateral(x.mean((2, 3), keepdim=True)))
        else:
            x = self.lateral(x)
            small, gated = _resized(x, size), _resized(self._gated(x, x.mean((2, 3), keepdim=True)), size)
        if not self.gates:
            return small
        return gated if self.masked else small * gated

    def _gated(self, x: Tensor, mean: Tensor) -> Tensor:
        for gate in self.gates:
            x = x * gate(mean)
        return x


def _resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    return x if tuple(x.shape[2:]) == size else functional.interpolate(x, size=size, mode="bilinear", align_corners=False)


def shrunk(x: Tensor, size: tuple[int, int]) -> Tensor:
    """What bilinear interpolation down by 2, 4 or 8 gives: the mean of the middle 2x2 of each tile."""
    factor = x.shape[2] // size[0]
    begin = max(factor // 2 - 1, 0)
    return x if factor == 1 else functional.avg_pool2d(x[..., begin:, begin:], kernel_size=2, stride=factor)


class AmfacPose(nn.Module):
    """Stem of stride 2, four stages, pyramid fused at the last stage's size, a 1x1 to the joints, one small network an axis for all joints."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        stem: list[nn.Module] = []
        activation = ACTIVATIONS[config.activation]
        channels, height, width = 3, config.height, config.width
        for index, outputs in enumerate(config.stem):
            stride = 2 if index == 0 else 1
            if index < config.coordinate_layers:
                stem.append(CoordConv(channels, outputs, stride, height, width))
            else:
                stem.append(_conv(channels, outputs, kernel=3, stride=stride))
            stem += [nn.BatchNorm2d(outputs), activation()]
            channels, height, width = outputs, height // stride, width // stride
        self.stem = nn.Sequential(*stem, *([nn.MaxPool2d(2)] if config.stem_pool else []))
        stages: list[nn.Module] = []
        levels: list[nn.Module] = []
        for index, (outputs, count) in enumerate(zip(config.widths, config.blocks, strict=True)):
            strides = [1 if index == 0 else 2] + [1] * (count - 1)
            stages.append(nn.Sequential(*(Block(channels if i == 0 else outputs, outputs, stride, config) for i, stride in enumerate(strides))))
            if config.pyramid:
                levels.append(Level(outputs, config))
            channels = outputs
        self.stages, self.levels = nn.ModuleList(stages), nn.ModuleList(levels)
        if config.pyramid:
            channels = config.fused_channels
            self.fuse = nn.Sequential(_conv(4 * config.pyramid_channels, channels), nn.BatchNorm2d(channels), activation())
        self.joints = nn.Conv2d(channels, config.joints, kernel_size=1)
        reduced = 32 if config.stem_pool else 16
        positions = (config.height // reduced) * (config.width // reduced)
        self.across, self.down = (
            nn.Sequential(nn.Linear(positions, config.hidden), activation(), nn.Linear(config.hidden, extent * config.bins_per_pixel))
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
        if len(self.levels):
            x = self.fuse(torch.cat([level(features, size) for level, features in zip(self.levels, maps, strict=True)], dim=1))
        joints = self.joints(x).flatten(2)
        return _from_least(self.across(joints)), _from_least(self.down(joints))


class TinyPose(nn.Module):
    """`trunk` is what goes onto the FPGA, (N, 5, 64, 48) as (N, 17, 8, 6); the two small networks for all joints run on its host."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = config.input_channels
        for outputs in config.widths:
            layers += [nn.Conv2d(channels, outputs, kernel_size=3, stride=2, padding=1), nn.ReLU()]
            channels = outputs
        self.trunk = nn.Sequential(*layers, nn.Conv2d(channels, config.joints, kernel_size=1))
        reduced = 2 ** len(config.widths)
        positions = (config.height // reduced) * (config.width // reduced)
        self.across, self.down = (
            nn.Sequential(nn.Linear(positions, config.hidden), nn.ReLU(), nn.Linear(config.hidden, extent * config.bins_per_pixel))
            for extent in (config.width, config.height)
        )

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 5, H, W), normalised pixels and coordinate planes, as logits (N, joints, W) and (N, joints, H)."""
        joints = self.trunk(image).flatten(2)
        return _from_least(self.across(joints)), _from_least(self.down(joints))


def _build(config: Config | TinyConfig) -> nn.Module:
    return AmfacPose(config) if isinstance(config, Config) else TinyPose(config)


def _data(config: Config | TinyConfig, seed: int, root: Path | None) -> Split:
    taken = (config.height, config.width, config.input_channels == 5)
    return coco_keypoints.load(root, taken, SKELETONS[config.joints], config.figures, seed)


_R34, _R18 = (3, 4, 6, 3), (2, 2, 2, 2)
_LITE = Config(
    _R18, 256, 192, widths=(16, 32, 64, 128), stem=(16, 16, 16), pyramid_channels=48, fused_channels=128, hidden=128, stem_pool=True, pool_first=True,
    activation="hardswish", spread=3.0,
)  # fmt: skip
FULL = Config(_R34, 384, 288)
# The rows of the paper's table 6 in front of the full network, each with the parts of those before it.
ABLATION = {
    "baseline": replace(FULL, pyramid=False, context=False, squeeze=False, coordinate_layers=0),
    "+AFPN": replace(FULL, gates=False, context=False, squeeze=False, coordinate_layers=0),
    "+DGCB": replace(FULL, context=False, squeeze=False, coordinate_layers=0),
    "+SCRM": replace(FULL, squeeze=False, coordinate_layers=0),
    "+SE": replace(FULL, coordinate_layers=0),
}
# On the stand-in, of the paper's sizes: enough for the batch norms to have seen pictures, not to find anybody.
_TOUCHED = TrainConfig(epochs=1, batch_size=4, learning_rate=1e-3, weight_decay=1e-2)

PRESETS: dict[str, Config | TinyConfig] = {
    "r34-384x288": FULL,
    "r34-256x256": Config(_R34, 256, 256),
    "r18-384x288": Config(_R18, 384, 288),
    "r18-256x256": Config(_R18, 256, 256),
    "r34-384x288-pool": Config(_R34, 384, 288, stem_pool=True),
    "r18-256x256-pool": Config(_R18, 256, 256, stem_pool=True),
    "r18_lite": replace(_LITE, figures=16),
    "tinypose_fpga": TinyConfig(),
    "ci": replace(_LITE, height=128, width=96, figures=128),
}

SYSTEM = ZooSystem(
    name="amfacpose",
    summary="2-D human pose from a person's crop, coordinates as classes",
    paper="Zakir, Salman, Benitez-Garcia, Takahashi: Attentive Multi-Scale Features with Adaptive Context PoseResNet",
    presets=PRESETS,
    build=_build,
    input_shape=lambda config: (1, config.input_channels, config.height, config.width),
    load_data=_data,
    # The paper's epochs and batch (section 4.1); its rate of 1e-5 from scratch without a schedule would not arrive in them.
    train=TrainConfig(epochs=140, batch_size=32, learning_rate=1e-3, weight_decay=1e-2),
    rehearsal=dict.fromkeys(PRESETS, _TOUCHED)
    | {
        "ci": TrainConfig(epochs=8, batch_size=16, learning_rate=3e-3, weight_decay=1e-2),
        "tinypose_fpga": TrainConfig(epochs=12, batch_size=16, learning_rate=5e-3, weight_decay=1e-2),
    },
    task=pose_task,
    outputs=("logits_x", "logits_y"),
    roads={
        "jetson": "r34 and r18 at 384x288 and 256x256, whole",
        "tflite": "r18-256x256 or r18_lite (hard-swish, narrow), whole",
        "cpu": "any preset, whole",
        "fpga": "tinypose_fpga up to the trunk's output (--split), the heads on the host",
    },
)
