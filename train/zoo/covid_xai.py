# SPDX-License-Identifier: Apache-2.0
"""Xception over four feature channels of a chest X-ray, one logit: the network of "Explainable Deep Learning for Thoracic Radiographic Diagnosis".

The paper says "Xception" with a first convolution of four channels and a head of one logit; the layers are the published network's.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from isthmus.train.zoo import Architecture


@dataclass(frozen=True)
class Config:
    """`width` scales every channel count (rounded to multiples of 4); `middle_blocks` of three separable convolutions each."""

    image_size: int
    width: float = 1.0
    middle_blocks: int = 8
    input_channels: int = 4
    outputs: int = 1


def _separable(inputs: int, outputs: int) -> list[nn.Module]:
    """Depthwise 3x3, 1x1, batch normalisation."""
    depthwise = nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs, bias=False)
    return [depthwise, nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]


class Block(nn.Module):
    """Separable convolutions of the given widths, a ReLU before each (`leading_relu`: before the first too), added to the input.

    `shrinks`: a 3x3 max pool of stride 2 behind them and a 1x1 of stride 2 on the way past.
    """

    def __init__(self, inputs: int, widths: tuple[int, ...], shrinks: bool, leading_relu: bool = True) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = inputs
        for index, width in enumerate(widths):
            if leading_relu or index:
                layers.append(nn.ReLU())
            layers += _separable(channels, width)
            channels = width
        if shrinks:
            layers.append(nn.MaxPool2d(3, stride=2, padding=1))
        self.layers = nn.Sequential(*layers)
        past = nn.Sequential(nn.Conv2d(inputs, channels, 1, stride=2, bias=False), nn.BatchNorm2d(channels))
        self.skip = past if shrinks else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) + self.skip(x)


class Xception(nn.Module):
    """Valid stem (512 -> 255 -> 253), three shrinking blocks (127, 64, 32), the middle, a shrinking block (16), the exit, mean, one linear layer."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        stem, first, second, third, middle, fourth, fifth, features = (
            max(4, round(width * config.width / 4) * 4) for width in (32, 64, 128, 256, 728, 1024, 1536, 2048)
        )
        self.features = nn.Sequential(
            nn.Conv2d(config.input_channels, stem, 3, stride=2, bias=False),
            nn.BatchNorm2d(stem),
            nn.ReLU(),
            nn.Conv2d(stem, first, 3, bias=False),
            nn.BatchNorm2d(first),
            nn.ReLU(),
            Block(first, (second, second), shrinks=True, leading_relu=False),
            Block(second, (third, third), shrinks=True),
            Block(third, (middle, middle), shrinks=True),
            *(Block(middle, (middle,) * 3, shrinks=False) for _ in range(config.middle_blocks)),
            Block(middle, (middle, fourth), shrinks=True),
            *_separable(fourth, fifth),
            nn.ReLU(),
            *_separable(fifth, features),
            nn.ReLU(),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(features, config.outputs)

    def forward(self, image: Tensor) -> Tensor:
        """(N, 4, 512, 512) in -1..1 as the logit (N, 1)."""
        return self.classifier(self.pool(self.features(image)).flatten(1))


SYSTEM = Architecture(
    name="covid_xai",
    summary="Xception for COVID-19 in chest X-rays, four feature channels",
    paper="Nicholas-Omoregbe et al.: Explainable Deep Learning for Thoracic Radiographic Diagnosis: A COVID-19 Case Study",
    presets={
        "paper": Config(512),
        "native": Config(299),
        "edge": Config(256, width=0.25),
        "ci": Config(128, width=0.25, middle_blocks=2),
        "imagenet": Config(299, input_channels=3, outputs=1000),
    },
    build=Xception,
    input_shape=lambda config: (1, config.input_channels, config.image_size, config.image_size),
)
