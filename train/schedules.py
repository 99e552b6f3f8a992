# SPDX-License-Identifier: Apache-2.0
"""Optimisers, and how their learning rate runs from the first step to the last."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

Optimiser = Literal["adamw", "sgd"]
Schedule = Literal["one-cycle", "constant", "linear", "sine", "cosine"]
MOMENTUM = 0.9  # of SGD

# The share of the first rate, by the share of the epochs that has passed. The restarts of snapshot ensembling fall along a sine or a cosine.
SHAPES: Mapping[str, Callable[[float], float]] = {
    "constant": lambda passed: 1.0,
    "linear": lambda passed: 1 - passed,
    "sine": lambda passed: 1 - math.sin(math.pi / 2 * passed),
    "cosine": lambda passed: (1 + math.cos(math.pi * passed)) / 2,
}


def optimiser(name: Optimiser, parameters: Iterable[nn.Parameter], learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW (without decay it is Adam), or SGD with `MOMENTUM`."""
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=learning_rate, momentum=MOMENTUM, weight_decay=weight_decay)
    return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)


def schedule(name: Schedule, stepped: torch.optim.Optimizer, learning_rate: float, epochs: int, steps_per_epoch: int) -> LRScheduler:
    """Of a step each: "one-cycle" rises to `learning_rate` and falls; the others begin with it and keep one rate for an epoch."""
    if name == "one-cycle":
        return OneCycleLR(stepped, learning_rate, total_steps=max(epochs * steps_per_epoch, 1))
    return LambdaLR(stepped, lambda step: SHAPES[name](step // steps_per_epoch / max(epochs, 1)))
