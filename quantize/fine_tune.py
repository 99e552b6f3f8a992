# SPDX-License-Identifier: Apache-2.0
"""Training a quantised module further on a user's samples: by their labels, or, without any, towards what the float module says.

One-cycle AdamW, seeded, the best epoch on samples held back. The state before the first step takes part: the result is never worse on those.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from isthmus.errors import IsthmusError
from isthmus.quantize.single_thread import single_thread
from isthmus.recipe import Recipe

BATCH = 32
WEIGHT_DECAY = 1e-4
HELD_BACK = 0.2  # of the samples choose the epoch
LEAST_HELD_BACK = 12  # with fewer, all samples are trained on and choose the epoch
PROBABILITIES = 1e-4  # rows that sum to 1 within this are a softmax's

Progress = Callable[[str, float], None]
Loss = Callable[[list[Tensor], Tensor], Tensor]  # the outputs on samples, and which samples


@dataclass(frozen=True)
class FineTuning:
    """`losses`: on the samples that choose the epoch, before the first step and after each epoch; `best` is the index of the state kept."""

    objective: str
    trained_on: int
    chosen_on: int
    losses: tuple[float, ...]
    best: int
    seconds: float

    def __str__(self) -> str:
        change = f"loss {self.losses[0]:.4g} before, {self.losses[self.best]:.4g} at best, after epoch {self.best} of {len(self.losses) - 1}"
        return f"{self.objective}, {self.trained_on} samples, {change} (on {self.chosen_on} samples), {self.seconds:.1f} s"


def fine_tune(
    quantised: nn.Module, exact: nn.Module, samples: Sequence[np.ndarray], labels: np.ndarray | None, recipe: Recipe, progress: Progress
) -> FineTuning:
    """Trains `quantised` in place by the recipe's epochs, learning rate and seed; `exact` is the float module it was made of, in evaluation mode.

    Labels are used where the first output has one row of at least as many classes a sample. Raises `IsthmusError` where the loss is no longer finite.
    """
    started = time.perf_counter()
    with single_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        inputs = [torch.from_numpy(np.ascontiguousarray(array)) for array in samples]
        loss, objective = _objective(_outputs(exact, inputs), labels)
        order = torch.randperm(len(inputs[0]))
        back = int(len(order) * HELD_BACK)
        held, trained = (order[:back], order[back:]) if back >= LEAST_HELD_BACK else (order, order)
        losses, best = _Run(quantised, inputs, loss, recipe, progress).run(trained, held)
    return FineTuning(objective, len(trained), len(held), losses, best, time.perf_counter() - started)


class _Run:
    def __init__(self, module: nn.Module, inputs: list[Tensor], loss: Loss, recipe: Recipe, progress: Progress) -> None:
        self.module, self.inputs, self.loss, self.recipe, self.progress = module, inputs, loss, recipe, progress

    def run(self, trained: Tensor, held: Tensor) -> tuple[tuple[float, ...], int]:
        steps = math.ceil(len(trained) / BATCH) * self.recipe.qat_epochs
        optimiser = torch.optim.AdamW(self.module.parameters(), lr=self.recipe.qat_learning_rate, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, self.recipe.qat_learning_rate, total_steps=steps)
        losses, best, state = [self._judged(held)], 0, copy.deepcopy(self.module.state_dict())
        done = 0
        for epoch in range(1, self.recipe.qat_epochs + 1):
            self.module.train()
            for rows in trained[torch.randperm(len(trained))].split(BATCH):
                loss = self.loss(_leaves(self.module(*(array[rows] for array in self.inputs))), rows)
                done += 1
                if not math.isfinite(loss.item()):
                    rate = f"lower qat_learning_rate (now {self.recipe.qat_learning_rate:g}) or look at the scale of the data"
                    raise IsthmusError(f"recipe {self.recipe.name}: QAT: the loss is {loss.item()} at step {done} of {steps} (epoch {epoch}); {rate}")
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
                self.progress(f"epoch {epoch}/{self.recipe.qat_epochs}, loss {losses[-1]:.4g}", done / steps)
            losses.append(self._judged(held))
            if losses[-1] < losses[best]:
                best, state = epoch, copy.deepcopy(self.module.state_dict())
        self.module.load_state_dict(state)
        self.module.eval()
        return tuple(losses), best

    def _judged(self, rows: Tensor) -> float:
        self.module.eval()
        return float(self.loss(_outputs(self.module, [array[rows] for array in self.inputs]), rows))


def _objective(exact: list[Tensor], labels: np.ndarray | None) -> tuple[Loss, str]:
    classes = exact[0].shape[1] if exact[0].ndim == 2 else 0
    if labels is None or classes < 2 or labels.min() < 0 or labels.max() >= classes:
        # Each output by its own power, so that none is drowned by one of larger numbers.
        powers = [values.var().clamp(min=1e-12) for values in exact]

        def distance(found: list[Tensor], rows: Tensor) -> Tensor:
            return torch.stack([functional.mse_loss(new, old[rows]) / power for new, old, power in zip(found, exact, powers, strict=True)]).sum()

        return distance, "towards the float model's outputs"
    truth = torch.from_numpy(labels)
    is_softmax = bool((exact[0] >= 0).all()) and bool(((exact[0].sum(dim=1) - 1).abs() < PROBABILITIES).all())

    def cross_entropy(found: list[Tensor], rows: Tensor) -> Tensor:
        scores = found[0].clamp(min=1e-12).log() if is_softmax else found[0]
        return functional.cross_entropy(scores, truth[rows])

    return cross_entropy, "cross entropy by the labels"


def _outputs(module: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        parts = [_leaves(module(*batch)) for batch in zip(*(array.split(8 * BATCH) for array in inputs), strict=True)]
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def _leaves(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in _leaves(item)]
    assert isinstance(value, list | tuple)  # tracing took the module's outputs
    return [leaf for item in value for leaf in _leaves(item)]
