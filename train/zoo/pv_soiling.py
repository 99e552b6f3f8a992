# SPDX-License-Identifier: Apache-2.0
"""MobileNetV3-Small for clean and dusty panels: the CNN of the "Hybrid Ensemble-Based Intelligent Decision Framework" for photovoltaic soiling."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from isthmus.train.zoo import Architecture


@dataclass(frozen=True)
class Bottleneck:
    """One row of the network's table: depthwise kernel, expanded and output channels, squeeze-and-excitation, hard-swish (else ReLU), stride."""

    kernel: int
    expanded: int
    outputs: int
    squeeze: bool
    hard_swish: bool
    stride: int


@dataclass(frozen=True)
class Config:
    bottlenecks: tuple[Bottleneck, ...]
    stem: int = 16
    features: int = 576
    hidden: int = 1024
    classes: int = 2
    image_size: int = 224


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Convolution without bias and batch normalisation, with the stock network's epsilon and momentum."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.01)]


class SqueezeExcitation(nn.Module):
    """Scales every channel by a hard sigmoid of the channels' means; a quarter of the channels, rounded to a multiple of 8, between."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        squeezed = max(8, (channels // 4 + 4) // 8 * 8)
        if squeezed < 0.9 * channels / 4:
            squeezed += 8
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, squeezed, 1), nn.ReLU(), nn.Conv2d(squeezed, channels, 1), nn.Hardsigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


class InvertedResidual(nn.Module):
    """1x1 up (left out where nothing is expanded), depthwise, squeeze-and-excitation, 1x1 down without activation; added to its input where shapes allow."""

    def __init__(self, inputs: int, row: Bottleneck) -> None:
        super().__init__()
        activation = nn.Hardswish if row.hard_swish else nn.ReLU
        layers = [*_conv(inputs, row.expanded, 1), activation()] if row.expanded != inputs else []
        layers += [*_conv(row.expanded, row.expanded, row.kernel, row.stride, groups=row.expanded), activation()]
        if row.squeeze:
            layers.append(SqueezeExcitation(row.expanded))
        self.layers = nn.Sequential(*layers, *_conv(row.expanded, row.outputs, 1))
        self.residual = row.stride == 1 and inputs == row.outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


class MobileNetV3Small(nn.Module):
    """The stock network with as many outputs as there are classes: 224 -> 112 -> 56 -> 28 -> 14 -> 7."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        channels = config.stem
        layers: list[nn.Module] = [*_conv(3, channels, 3, stride=2), nn.Hardswish()]
        for row in config.bottlenecks:
            layers.append(InvertedResidual(channels, row))
            channels = row.outputs
        self.features = nn.Sequential(*layers, *_conv(channels, config.features, 1), nn.Hardswish())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Linear(config.features, config.hidden), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(config.hidden, config.classes))

    def forward(self, image: Tensor) -> Tensor:
        """(N, 3, 224, 224), ImageNet-normalised, as logits (N, classes)."""
        return self.classifier(self.pool(self.features(image)).flatten(1))


_SMALL = (
    Bottleneck(3, 16, 16, squeeze=True, hard_swish=False, stride=2),
    Bottleneck(3, 72, 24, squeeze=False, hard_swish=False, stride=2),
    Bottleneck(3, 88, 24, squeeze=False, hard_swish=False, stride=1),
    Bottleneck(5, 96, 40, squeeze=True, hard_swish=True, stride=2),
    Bottleneck(5, 240, 40, squeeze=True, hard_swish=True, stride=1),
    Bottleneck(5, 240, 40, squeeze=True, hard_swish=True, stride=1),
    Bottleneck(5, 120, 48, squeeze=True, hard_swish=True, stride=1),
    Bottleneck(5, 144, 48, squeeze=True, hard_swish=True, stride=1),
    Bottleneck(5, 288, 96, squeeze=True, hard_swish=True, stride=2),
    Bottleneck(5, 576, 96, squeeze=True, hard_swish=True, stride=1),
    Bottleneck(5, 576, 96, squeeze=True, hard_swish=True, stride=1),
)

SYSTEM = Architecture(
    name="pv_soiling",
    summary="MobileNetV3-Small for clean and dusty photovoltaic panels",
    paper="Khan et al.: A Hybrid Ensemble-Based Intelligent Decision Framework for Risk-Aware Photovoltaic Panel Soiling Detection and Cleaning",
    presets={"small": Config(_SMALL), "small-1000": Config(_SMALL, classes=1000)},
    build=MobileNetV3Small,
    input_shape=lambda config: (1, 3, config.image_size, config.image_size),
)
