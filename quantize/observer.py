# SPDX-License-Identifier: Apache-2.0
"""What range a tensor takes on calibration samples, and the int8 scale that follows from it (zero point 0)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from isthmus.errors import IsthmusError
from isthmus.recipe import Recipe

LARGEST = 127
BINS = 8192
DEAD_SCALE = 2.0**-7  # of a tensor that is zero on every sample: any scale is right, this one holds -1 to 1
MSE_STEPS = 64  # scales tried from a quarter of the range to all of it


class Observer(nn.Module):
    """Identity. First pass: the largest magnitude. Second pass (`counting`): a histogram of magnitudes up to it."""

    def __init__(self) -> None:
        super().__init__()
        self.maximum = 0.0
        self.counting = False
        self.counts = torch.zeros(BINS, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        if self.counting and self.maximum > 0:
            self.counts += torch.histc(x.detach().abs(), BINS, 0.0, self.maximum).double()
        elif not self.counting:
            self.maximum = max(self.maximum, float(x.detach().abs().max()))
            if not math.isfinite(self.maximum):
                raise IsthmusError("calibration: a layer's result is NaN or infinite; look at the weights and at the scale of the samples")
        return x

    def scale(self, recipe: Recipe) -> float:
        """The scale that the recipe's observer chooses; a power of two where the scheme says so."""
        if self.maximum == 0:
            return DEAD_SCALE
        whole = fitting_scale(self.maximum, recipe)
        if recipe.observer == "minmax":
            return whole
        if recipe.observer == "percentile":
            share = self.counts.cumsum(0) / self.counts.sum()
            last = int(torch.searchsorted(share, recipe.percentile / 100))
            return fitting_scale(self.maximum * min(last + 1, BINS) / BINS, recipe)
        return min(_candidates(whole, recipe), key=self._squared_error)

    def _squared_error(self, scale: float) -> float:
        centres = (torch.arange(BINS, dtype=torch.float64) + 0.5) * (self.maximum / BINS)
        rounded = torch.clamp(torch.round(centres / scale), max=LARGEST) * scale
        return float((self.counts * (centres - rounded) ** 2).sum())


def fitting_scale(limit: float, recipe: Recipe) -> float:
    """The smallest scale of the scheme at which `limit` is not clipped."""
    scale = limit / LARGEST
    return 2.0 ** math.ceil(math.log2(scale)) if recipe.scheme == "power_of_two" else scale


def border_scale(samples: Tensor, recipe: Recipe) -> float:
    """The scale of a graph input. A power of two is the one with the least squared error on the samples themselves, the finest among equals.

    So samples on a grid (k/16) stay exact, and samples from 0 to 1 in steps of 1/255 keep 2^-7, where only 1.0 itself is clipped.
    """
    maximum = float(samples.abs().max())
    if maximum == 0 or recipe.scheme != "power_of_two":
        return maximum / LARGEST or DEAD_SCALE
    errors = {scale: _error_on(samples, scale) for scale in reversed(_candidates(fitting_scale(maximum, recipe), recipe))}
    return min(errors, key=lambda scale: errors[scale])


def _error_on(samples: Tensor, scale: float) -> float:
    total = 0.0
    for part in samples.split(64):  # large images: no second copy of all samples
        total += float(((part / scale).round().clamp(-LARGEST - 1, LARGEST) * scale - part).double().square().sum())
    return total


def _candidates(whole: float, recipe: Recipe) -> list[float]:
    """From the scale that clips nothing down."""
    if recipe.scheme == "power_of_two":
        return [whole / 2**halvings for halvings in range(4)]
    return [whole * step / MSE_STEPS for step in range(MSE_STEPS, MSE_STEPS // 4 - 1, -1)]
