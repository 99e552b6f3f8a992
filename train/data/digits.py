# SPDX-License-Identifier: Apache-2.0
"""Handwritten digits: the 1,797 real 8x8 scans inside scikit-learn (a part of the UCI "optical recognition of handwritten digits" set)."""

from __future__ import annotations

import numpy as np

from isthmus.train.data import Split

GREY_LEVELS = 16  # a pixel counts the set cells of a 4x4 block: 0 to 16


def load(seed: int = 0) -> Split:
    """All scans in a stratified split of 60 % training, 20 % validation, 20 % test: [count, 1, 8, 8], pixels 0 to 1 in steps of 1/16.

    Steps of 1/16 make quantising exact at every scale 2^-4 to 2^-6: the int8 network sees the very same image.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = (digits.images / GREY_LEVELS).astype(np.float32)[:, None]
    labels = digits.target.astype(np.int64)
    x_train, x_rest, y_train, y_rest = train_test_split(images, labels, test_size=0.4, stratify=labels, random_state=seed)
    x_val, x_test, y_val, y_test = train_test_split(x_rest, y_rest, test_size=0.5, stratify=y_rest, random_state=seed)
    return Split("digits", x_train, y_train, x_val, y_val, x_test, y_test, classes=tuple(str(name) for name in digits.target_names), seed=seed)
