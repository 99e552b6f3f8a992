# SPDX-License-Identifier: Apache-2.0
"""`Task`: what a network is trained for and judged by. The loop, the zoo and the compiler ask it and know no more of the purpose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torch.nn import functional

from isthmus.compare import top1_accuracy

Outputs = Tensor | tuple[Tensor, ...]  # what the module returns for a batch
Arrays = np.ndarray | tuple[np.ndarray, ...]  # the same in numpy, float32, one row a sample
TEMPERATURE = 4.0  # of a teacher's scores: what it holds apart from the label is in the smaller ones


def mean_squared_error(outputs: Outputs, expected: Outputs) -> Tensor:
    """Summed over the outputs, each of them averaged over its elements."""
    pairs = zip(as_tuple(outputs), as_tuple(expected), strict=True)
    return sum((functional.mse_loss(one, other) for one, other in pairs), start=as_tuple(outputs)[0].new_zeros(()))


def softened_cross_entropy(scores: Outputs, taught: Outputs) -> Tensor:
    """Of class scores (N, classes) towards a teacher's, both at `TEMPERATURE`, times its square: gradients keep their size."""
    assert isinstance(scores, Tensor) and isinstance(taught, Tensor)
    return TEMPERATURE**2 * functional.cross_entropy(scores / TEMPERATURE, (taught / TEMPERATURE).softmax(1))


def as_tuple(outputs: Outputs) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


@dataclass(frozen=True)
class Task:
    """What a network is trained for and judged by.

    - `metric`: name of what `score` gives; larger is better.
    - `loss(outputs, targets)`: of a batch, its mean; `targets` as the `Split` has them.
    - `score(outputs, targets)`: numpy arrays of a whole part; of the validation part it chooses the best epoch, of the test part it is the figure.
    - `distil(outputs, taught)`: how far from the float network's outputs; trained on in place of the loss with the rounding in place (QAT).
    - `augment(inputs, targets)`: another training batch of the same shapes, drawn from torch's global generator, so that seeds and going on hold.
    - `labels(targets)`: the classes, int64 (N), where the first output is class scores; None where the network decides no class.
    """

    metric: str
    loss: Callable[[Outputs, Tensor], Tensor]
    score: Callable[[Arrays, np.ndarray], float]
    distil: Callable[[Outputs, Outputs], Tensor] = mean_squared_error
    augment: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    labels: Callable[[np.ndarray], np.ndarray] | None = None


def _cross_entropy(scores: Outputs, labels: Tensor) -> Tensor:
    assert isinstance(scores, Tensor)
    return functional.cross_entropy(scores, labels)


def _accuracy(scores: Arrays, labels: np.ndarray) -> float:
    assert isinstance(scores, np.ndarray)
    return top1_accuracy(scores, labels)


CLASSIFICATION = Task("accuracy", _cross_entropy, _accuracy, softened_cross_entropy, labels=lambda targets: targets)
