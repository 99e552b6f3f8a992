# SPDX-License-Identifier: Apache-2.0
"""The denoisers of "Physics-Informed Neural Network for Denoising Images Using Nonlinear PDE": one grey image in, the same image without noise out.

The equations act in training alone: what goes to a device is a plain convolutional network. The paper gives levels and blocks; widths of ResUNet and the
nested networks, the way up in UNet, the lite preset and all small sizes are readings (UNet's names no upsampling: nearest and a convolution).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from isthmus.train.data import Split, denoise
from isthmus.train.data.denoise import GAUSSIAN_25, Degradation
from isthmus.train.data.images import PARTS
from isthmus.train.image_metrics import psnr
from isthmus.train.loop import TrainConfig
from isthmus.train.pde_priors import DEFAULT_WEIGHTS, PRIORS, DenoisingLoss, Reading, Weights
from isthmus.train.task import Arrays, Outputs, Task, as_tuple
from isthmus.train.zoo import ZooSystem


@dataclass(frozen=True, kw_only=True)
class Common:
    """How a backbone is trained: the equation, the loss, the noise; `patches` a part of the data, of the image's size."""

    prior: str = "zg"
    weights: Weights = DEFAULT_WEIGHTS
    residual: Reading = "steady"
    degradation: Degradation = GAUSSIAN_25
    patches: tuple[int, int, int] = (4, 2, 2)
    input_channels: int = 1
    image_size: int = 256


@dataclass(frozen=True)
class UNetConfig(Common):
    """`widths` from the full size down, a 2x2 max pool between two levels, the last one the bottleneck.

    `residual_blocks`: blocks with a shortcut. `upsampling`: "nearest" leaves the channels to the block behind it, the others bring them to the level's width.
    `convolutions`: of a block without one, but the bottleneck's, which has two. Height and width are multiples of 2 to the number of pools.
    """

    widths: tuple[int, ...] = (32, 64, 128, 256)
    residual_blocks: bool = False
    upsampling: Literal["nearest and convolution", "transposed", "nearest"] = "nearest and convolution"
    norm: bool = True
    convolutions: int = 2


@dataclass(frozen=True)
class NestedConfig(Common):
    """`middles` and `outputs` of the encoder's six stages, then of the decoder's five, deepest first: their blocks are small UNets of their own.

    `add_skips`: a decoder stage's output plus the encoder's of that size, where the channels agree. `bounded`: a sigmoid behind every map.
    Height and width are multiples of 32.
    """

    middles: tuple[int, ...]
    outputs: tuple[int, ...]
    add_skips: bool
    bounded: bool
    side_kernel: int = 1


Config = UNetConfig | NestedConfig
SIZE_MULTIPLE = 32  # of height and width, enough for every preset


# How a map without bounds starts. Left as torch has it, it starts as far as several ranges of the image from any image, and a short training spends itself on
# the way there; a map behind a sigmoid is inside from the start.
MID_GREY = 0.5
SIDE_SHARE = 0.1  # of torch's usual weights: six maps of features that batch norms hold at a scale of 1


def _from_grey(head: nn.Conv2d, share: float = 1.0) -> nn.Conv2d:
    assert head.bias is not None
    with torch.no_grad():
        head.weight.mul_(share)
        head.bias.fill_(MID_GREY)
    return head


def _mean_of(maps: int) -> nn.Conv2d:
    """A 1x1 convolution that starts as the mean of its inputs."""
    fuse = nn.Conv2d(maps, 1, 1)
    assert fuse.bias is not None
    with torch.no_grad():
        fuse.weight.fill_(1 / maps)
        fuse.bias.zero_()
    return fuse


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
    if config.residual_blocks:
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
        self.head = _from_grey(nn.Conv2d(below, 1, 1))

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
        sides = [nn.Conv2d(width, 1, config.side_kernel, padding=config.side_kernel // 2) for width in widths]
        self.sides = nn.ModuleList(sides if config.bounded else [_from_grey(side, SIDE_SHARE) for side in sides])
        self.widened = nn.ModuleList(nn.Identity() if depth == 0 else _enlarge(2**depth) for depth in range(count))
        self.fuse = nn.Conv2d(count, 1, 1) if config.bounded else _mean_of(count)
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


# ---- how far it sees
def margin(config: UNetConfig) -> int:
    """Pixels to each side of an output pixel that it may depend on: how far tiles must reach beyond what is kept of them."""
    spans = [_decoded(config, pixel, pixel, 0) for pixel in range(size_multiple(config))]
    return max(max(pixel - first, last - pixel) for pixel, (first, last) in enumerate(spans))


def size_multiple(config: Config) -> int:
    """What height and width are multiples of, and where a tile may start."""
    return 2 ** (len(config.widths) - 1) if isinstance(config, UNetConfig) else SIZE_MULTIPLE


def _decoded(config: UNetConfig, first: int, last: int, level: int) -> tuple[int, int]:
    """The image's pixels that those of a level on the way up see."""
    if level == len(config.widths) - 1:
        return _encoded(config, first, last, level)
    reach = _reach(config, level)
    first, last = first - reach, last + reach
    skip = _encoded(config, first, last, level)
    wider = config.upsampling == "nearest and convolution"
    below = _decoded(config, (first - wider) // 2, (last + wider) // 2, level + 1)
    return min(skip[0], below[0]), max(skip[1], below[1])


def _encoded(config: UNetConfig, first: int, last: int, level: int) -> tuple[int, int]:
    """The same on the way down."""
    reach = _reach(config, level)
    first, last = first - reach, last + reach
    return (first, last) if level == 0 else _encoded(config, 2 * first, 2 * last + 1, level - 1)


def _reach(config: UNetConfig, level: int) -> int:
    """3x3 convolutions of a block."""
    return 2 if config.residual_blocks or level == len(config.widths) - 1 else config.convolutions


# ---- data and task
def _data(config: Config, seed: int, root: Path | None) -> Split:
    return denoise.load(root, config.image_size, config.degradation, dict(zip(PARTS, config.patches, strict=True)), seed)


def _task(config: Config) -> Task:
    """Targets hold the clean image and the noisy one. Fresh noise, quarter turns and mirror images every batch; PSNR of what is clipped to 0..1."""
    criterion = DenoisingLoss(config.prior, config.weights, config.residual)

    def loss(outputs: Outputs, targets: Tensor) -> Tensor:
        return criterion(as_tuple(outputs), targets[:, :1], targets[:, 1:])

    def score(outputs: Arrays, targets: np.ndarray) -> float:
        assert isinstance(outputs, np.ndarray)  # one image in evaluation
        return psnr(np.clip(outputs, 0, 1), targets[:, :1])

    def augment(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        turns, mirrored, seed = (int(torch.randint(high, ())) for high in (4, 2, 2**62))
        clean = torch.rot90(targets[:, :1], turns, (2, 3))
        clean = clean.flip(3) if mirrored else clean
        noisy = torch.from_numpy(config.degradation.apply(clean.cpu().numpy(), np.random.default_rng(seed))).to(clean.device)
        return noisy, torch.cat([clean, noisy], dim=1)

    return Task("PSNR (dB)", loss, score, augment=augment)


# ---- presets
_MIDDLES = (32, 32, 64, 128, 256, 256, 256, 128, 64, 32, 16)
_OUTPUTS = (64, 128, 256, 512, 512, 512, 512, 256, 128, 64, 64)
_STAGES = len(_MIDDLES)
_LITE = NestedConfig((16,) * _STAGES, (64,) * _STAGES, add_skips=True, bounded=False)
_FPGA = UNetConfig(widths=(4, 8), upsampling="nearest", norm=False, convolutions=1, image_size=32, patches=(256, 32, 32))
_SMALL_UNET = UNetConfig(widths=(8, 16, 32), upsampling="nearest", norm=False, convolutions=1, image_size=64, patches=(64, 16, 16))
# The four backbones at a size that trains on a CPU, each under each of the four equations.
SMALL: dict[str, Config] = {
    "unet": _SMALL_UNET,
    "resunet": replace(_SMALL_UNET, residual_blocks=True, norm=True, upsampling="transposed"),
    "u2net": replace(_LITE, middles=(4,) * _STAGES, outputs=(8,) * _STAGES, add_skips=False, bounded=True, image_size=64, patches=(64, 16, 16)),
    "resu2net": replace(_LITE, middles=(4,) * _STAGES, outputs=(8,) * _STAGES, image_size=64, patches=(64, 16, 16)),
}
_LARGE: dict[str, Config] = {
    "unet": UNetConfig(),
    "unet-transposed": UNetConfig(upsampling="transposed"),
    "resunet": UNetConfig(residual_blocks=True, upsampling="transposed"),
    "u2net": NestedConfig(_MIDDLES, _OUTPUTS, add_skips=False, bounded=True),
    "resu2net": _LITE,
    "resu2net-full": NestedConfig(_MIDDLES, _OUTPUTS, add_skips=True, bounded=False),
    "unet-edge": UNetConfig(widths=(16, 32, 64, 128)),
    "resu2net-edge": replace(_LITE, middles=(8,) * _STAGES, outputs=(16,) * _STAGES),
}

SYSTEM = ZooSystem(
    name="pinn_denoise",
    summary="denoisers for aerial and radar images, trained under a differential equation: UNet, ResUNet, U2Net, ResU2Net",
    paper="Osorio Quero, Crespo: Physics-Informed Neural Network for Denoising Images Using Nonlinear PDE",
    presets={
        **_LARGE,
        **{f"{backbone}-small-{prior}": replace(config, prior=prior) for backbone, config in SMALL.items() for prior in PRIORS},
        "ci": replace(_SMALL_UNET, widths=(4, 8, 16), image_size=32, patches=(96, 16, 16)),
        "fpga": _FPGA,
        "fpga-8-16": replace(_FPGA, widths=(8, 16)),
    },
    build=build,
    input_shape=lambda config: (1, config.input_channels, config.image_size, config.image_size),
    load_data=_data,
    train=TrainConfig(epochs=25, batch_size=4, learning_rate=1e-2),
    train_presets=dict.fromkeys(_LARGE, TrainConfig(epochs=1, batch_size=2, learning_rate=1e-3)),  # no more than that the batch norms have seen images
    task=_task,
    roads={
        "cpu": "any preset, whole, in tiles for large images",
        "tflite": "unet-edge or resu2net-edge, whole",
        "jetson": "any preset, whole; resu2net is the paper's lightweight one. A Jetson Nano has no int8",
        "fpga": "fpga or fpga-8-16 (mini-UNet), whole, in tiles of 32x32",
    },
)
