# SPDX-License-Identifier: Apache-2.0
"""Metrics of a classifier, by scikit-learn. Top-1 alone needs none of it: `isthmus.compare.top1_accuracy`."""

from __future__ import annotations

import numpy as np

from isthmus.errors import IsthmusError


def classification_metrics(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """`weighted_sensitivity` (equal to accuracy), `weighted_precision`, `weighted_f1`, `balanced_accuracy`, `auc` (macro, one against the rest).

    probabilities (N, classes), rows summing to 1. Raises `IsthmusError` where a class has no sample: two of the metrics mean nothing then.
    """
    from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, precision_score, roc_auc_score

    classes = probabilities.shape[1]
    absent = sorted(set(range(classes)) - set(labels.tolist()))
    if len(labels) != len(probabilities) or absent:
        found = f"no sample of the classes {absent}" if absent else f"{len(labels)} labels"
        raise IsthmusError(f"metrics: {found} for {len(probabilities)} rows of {classes} classes; give labels of every class, one a row")
    decided = probabilities.argmax(axis=1)
    scores = probabilities[:, 1] if classes == 2 else probabilities
    return {
        "weighted_sensitivity": float(accuracy_score(labels, decided)),
        "weighted_precision": float(precision_score(labels, decided, average="weighted", zero_division=0.0)),
        "weighted_f1": float(f1_score(labels, decided, average="weighted")),
        "balanced_accuracy": float(balanced_accuracy_score(labels, decided)),
        "auc": float(roc_auc_score(labels, scores, multi_class="ovr", average="macro")),
    }
