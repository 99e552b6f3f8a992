# SPDX-License-Identifier: Apache-2.0
"""Knowledge distillation from one teacher (KD) or from an ensemble of them (EKD), equations 1 to 3 of "Ensemble-Based Knowledge Distillation ...".

The teachers' part of the loss is computed once a training set, as nothing augments the images.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor
from torch.nn import functional

from isthmus.train.ensemble import mean_probabilities, probabilities

TEMPERATURE, ALPHA = 3.0, 0.5


def soft_labels(teachers: Sequence[np.ndarray], temperature: float = TEMPERATURE) -> np.ndarray:
    """The mean over the teachers of softmax(logits / temperature), float32 (N, classes); each teacher's logits are (N, classes).

    The mean of probabilities, not of logits. Raises `IsthmusError` where there is no teacher or their shapes differ.
    """
    return mean_probabilities([probabilities(logits / temperature) for logits in teachers])


def distillation_loss(logits: Tensor, labels: Tensor, soft: Tensor, temperature: float = TEMPERATURE, alpha: float = ALPHA) -> Tensor:
    """alpha * CE(labels, softmax(z)) + (1 - alpha) * T^2 * CE(soft, softmax(z / T)), the mean over the batch (equation 3).

    logits (N, classes), labels int64 (N), soft (N, classes) from `soft_labels` of the same temperature. T^2 keeps the second part's gradient
    from shrinking as T grows.
    """
    hard = functional.cross_entropy(logits, labels)
    return alpha * hard + (1 - alpha) * temperature**2 * functional.cross_entropy(logits / temperature, soft)
