# SPDX-License-Identifier: Apache-2.0
"""VGG19 over a folded light curve: the features of "Detection of Exoplanets in Transit Light Curves with Conditional Flow Matching and XGBoost".

The paper names VGG19, a pool of 3 with stride 2, and 2,560 features; only these layers give them.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from isthmus.train.zoo import Architecture


@dataclass(frozen=True)
class Config:
    """`groups` holds the channels of each convolution, group by group. `classes` 0 leaves out the layer that only training needs."""

    groups: tuple[tuple[int, ...], ...]
    norm: bool
    classes: int
    length: int = 201


class Vgg1d(nn.Module):
    """Same convolutions of kernel 3 with ReLU, MaxPool1d(3, stride 2) after each group: 201 -> 100 -> 49 -> 24 -> 11 -> 5, then 512 x 5 features.

    `norm` puts batch normalisation before each ReLU: without it the network hardly trains from PyTorch's initial weights.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels, length = 1, config.length
        for group in config.groups:
            for width in group:
                layers.append(nn.Conv1d(channels, width, kernel_size=3, padding=1))
                if config.norm:
                    layers.append(nn.BatchNorm1d(width))
                layers.append(nn.ReLU())
                channels = width
            layers.append(nn.MaxPool1d(3, stride=2))
            length = (length - 3) // 2 + 1
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels * length, config.classes) if config.classes else nn.Identity()

    def forward(self, view: Tensor) -> Tensor:
        """(N, 1, 201), median 0 and deepest point -1, as (N, 2560) features or (N, classes) logits."""
        return self.classifier(self.features(view).flatten(1))


def _groups(divisor: int) -> tuple[tuple[int, ...], ...]:
    """VGG19's sixteen convolutions, every width divided."""
    counts = ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))
    return tuple((width // divisor,) * count for width, count in counts)


SYSTEM = Architecture(
    name="exoplanet_vetting",
    summary="VGG19 in one dimension over 201 points of a folded light curve",
    paper="Fiscale et al.: Detection of Exoplanets in Transit Light Curves with Conditional Flow Matching and XGBoost",
    presets={
        "vgg19": Config(_groups(1), norm=False, classes=0),
        "vgg19-trained": Config(_groups(1), norm=True, classes=3),
        "width-4": Config(_groups(4), norm=False, classes=0),
        "width-8": Config(_groups(8), norm=False, classes=0),
        "width-16": Config(_groups(16), norm=False, classes=0),
    },
    build=Vgg1d,
    input_shape=lambda config: (1, 1, config.length),
)
