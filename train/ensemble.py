# SPDX-License-Identifier: Apache-2.0
"""Averaging ensembles: the mean of the members' class probabilities. numpy alone, as it runs on a host or a board that has no torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from isthmus.errors import IsthmusError

# Members as the MedMNIST paper's tables name them; a custom CNN is its letter and number, as in MobNetV2_C2.
REFERENCE_DNNS = {
    **dict.fromkeys(("Dense121", "DenseNet121"), "densenet121"),
    **dict.fromkeys(("Res50", "ResNet50"), "resnet50"),
    **dict.fromkeys(("MobNetV2", "MobV2", "MobileNetV2"), "mobilenet_v2"),
    **dict.fromkeys(("MobV3", "MobileNetV3"), "mobilenet_v3"),
    **dict.fromkeys(("EffB0", "EffNetB0", "EfficientNetB0"), "efficientnet_v2_b0"),
}


def probabilities(scores: np.ndarray) -> np.ndarray:
    """Softmax of class scores (N, classes), float32; the largest score is taken off first, so nothing overflows."""
    exponentials = np.exp(scores.astype(np.float64) - scores.max(axis=1, keepdims=True))
    return (exponentials / exponentials.sum(axis=1, keepdims=True)).astype(np.float32)


def mean_probabilities(members: Sequence[np.ndarray]) -> np.ndarray:
    """The unweighted mean of the members' probabilities, each (N, classes). Raises `IsthmusError` where there is none or shapes differ."""
    shapes = sorted({member.shape for member in members})
    if len(shapes) != 1 or len(shapes[0]) != 2:
        raise IsthmusError(f"an ensemble needs members' probabilities of one shape (samples, classes), found {', '.join(map(str, shapes)) or 'no member'}")
    return np.mean(np.stack([member.astype(np.float64) for member in members]), axis=0).astype(np.float32)


def references(dataset: str, ensemble: str) -> list[str]:
    """'organa', 'MobV2_C2' -> the zoo references of the members, in order. Raises `IsthmusError` on a member the tables do not have."""
    from isthmus.train import zoo

    found = []
    for member in ensemble.split("_"):
        dnn = REFERENCE_DNNS.get(member)
        reference = f"zoo:medmnist_dnn@{dataset}-{dnn}" if dnn else f"zoo:medmnist@{dataset}-{member.lower()}"
        zoo.parse(reference)
        found.append(reference)
    return found
