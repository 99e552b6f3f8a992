# SPDX-License-Identifier: Apache-2.0
"""Task metrics on numpy arrays."""

from __future__ import annotations

import numpy as np

from isthmus.errors import IsthmusError


def top1_accuracy(scores: np.ndarray, labels: np.ndarray) -> float:
    """The share of rows of `scores` [count, classes] whose largest entry is at the label; the first of equal entries counts.

    Raises `IsthmusError` on no rows (nothing compared is not a result) and on shapes that do not match.
    """
    if scores.ndim != 2 or labels.shape != scores.shape[:1]:
        raise IsthmusError(f"accuracy: scores of shape {scores.shape} and labels of shape {labels.shape}, expected [count, classes] and [count]")
    if len(scores) == 0:
        raise IsthmusError("accuracy: no samples; a share of nothing is not a figure")
    return float(np.mean(np.argmax(scores, axis=1) == labels))
