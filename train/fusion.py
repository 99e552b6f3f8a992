# SPDX-License-Identifier: Apache-2.0
"""Members of an ensemble fused by a small network in place of their mean (the MedMNIST paper, section on stacking and early fusion).

The paper finds no significant difference from the mean, which needs no training: `isthmus.train.ensemble`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

import torch
from torch import Tensor, nn

from isthmus.errors import IsthmusError
from isthmus.train.zoo.medmnist import MedMnistNet

At = Literal["probabilities", "hidden", "flat"]


class Fusion(nn.Module):
    """What trained members see of an image, side by side, through the dense layers `hidden` to class scores; the members stay as they are.

    `at`: "probabilities" (stacking), "hidden" (early fusion 1: the units before a member's last layer) or "flat" (early fusion 2: its last map).
    Raises `IsthmusError` where members do not have the same classes.
    """

    def __init__(self, members: Sequence[MedMnistNet], at: At, *hidden: int) -> None:
        super().__init__()
        layers = [_dense_layers(member) for member in members]
        classes = {dense[-1].out_features for dense in layers}
        if len(classes) != 1:
            raise IsthmusError(f"a fusion needs members of the same classes, found {sorted(classes) or 'no member'}")
        self.at = at
        self.members = nn.ModuleList(members).requires_grad_(False).eval()
        width = {
            "probabilities": lambda dense: dense[-1].out_features,
            "hidden": lambda dense: dense[-1].in_features,
            "flat": lambda dense: dense[0].in_features,
        }[at]
        units = sum(width(dense) for dense in layers)
        head: list[nn.Module] = []
        for size in hidden:
            head += [nn.Linear(units, size), nn.ReLU()]
            units = size
        self.head = nn.Sequential(*head, nn.Linear(units, classes.pop()))

    def train(self, mode: bool = True) -> Self:
        """The head alone: members keep their running statistics."""
        super().train(mode)
        self.members.eval()
        return self

    def forward(self, image: Tensor) -> Tensor:
        """(N, channels, 28, 28) as class scores (N, classes)."""
        return self.head(torch.cat([self._seen(member, image) for member in self.members], dim=1))

    def _seen(self, member: nn.Module, image: Tensor) -> Tensor:
        assert isinstance(member, MedMnistNet) and isinstance(member.head, nn.Sequential)
        if self.at == "probabilities":
            return member(image)
        flat = member.features(image).flatten(1)
        return flat if self.at == "flat" else member.head[:-1](flat)


def _dense_layers(member: MedMnistNet) -> list[nn.Linear]:
    return [layer for layer in member.head.modules() if isinstance(layer, nn.Linear)]
