# SPDX-License-Identifier: Apache-2.0
"""Student and teacher of "Ensemble-Based Knowledge Distillation for Identification of Childhood Pneumonia" (counts: table 3)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from isthmus.train.zoo import Architecture


@dataclass(frozen=True)
class Config:
    """`filters` of the 3x3 convolutions, each followed by a 2x2 max pool; `norm`: batch normalisation between a convolution's ReLU and its pool."""

    filters: tuple[int, ...]
    hidden: int
    norm: bool
    classes: int = 2
    input_channels: int = 1
    image_size: int = 200


class PneumoniaNet(nn.Module):
    """Valid 3x3 convolutions, pools that round down, one hidden dense layer behind a dropout, softmax.

    Student: 200 -> 198 -> 99 -> 97 -> 48, 147,456 features. Teacher: two blocks more, 12,800 features.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels, size = config.input_channels, config.image_size
        for width in config.filters:
            layers += [nn.Conv2d(channels, width, kernel_size=3), nn.ReLU()]
            if config.norm:
                layers.append(nn.BatchNorm2d(width))
            layers.append(nn.MaxPool2d(2))
            channels, size = width, (size - 2) // 2
        self.features = nn.Sequential(*layers)
        dense, dropout = nn.Linear(channels * size * size, config.hidden), nn.Dropout(0.5)
        # The student drops hidden units, the teacher (Stephen et al.) features.
        hidden = [dense, nn.ReLU(), dropout] if config.norm else [dropout, dense, nn.ReLU()]
        self.head = nn.Sequential(*hidden, nn.Linear(config.hidden, config.classes))

    def logits(self, image: Tensor) -> Tensor:
        """(N, 1, 200, 200) in 0..1 as (N, 2): what distillation softens."""
        return self.head(self.features(image).flatten(1))

    def forward(self, image: Tensor) -> Tensor:
        """Probabilities (N, 2): normal, pneumonia."""
        return self.logits(image).softmax(1)


SYSTEM = Architecture(
    name="pneumonia_kd",
    summary="chest X-rays of children: the distilled student and one of its three teachers",
    paper="Vrbancic, Podgorelec: Ensemble-Based Knowledge Distillation for Identification of Childhood Pneumonia",
    presets={"student": Config(filters=(32, 64), hidden=32, norm=True), "teacher": Config(filters=(32, 64, 128, 128), hidden=512, norm=False)},
    build=PneumoniaNet,
    input_shape=lambda config: (1, config.input_channels, config.image_size, config.image_size),
)
