# SPDX-License-Identifier: Apache-2.0
"""Stored pixels and labels of three parts as a checked `Split`."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from isthmus.errors import IsthmusError
from isthmus.train.data import Split
from isthmus.train.data.arrays import listed

PARTS = ("train", "val", "test")
Part = tuple[np.ndarray, np.ndarray]  # uint8 (N, H, W) or (N, H, W, 3); whole numbers (N) or (N, 1)


def network_input(images: np.ndarray, channels: int) -> np.ndarray:
    """uint8 (N, H, W) or (N, H, W, 3) -> float32 (N, channels, H, W) from -1 to below 1: (pixel - 128) / 128.

    An int8 network sees these very values: at scale 2^-7 and zero point 0 every pixel is a whole step. Grey is repeated over `channels`.
    """
    planes = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
    if planes.shape[1] not in (1, channels):
        raise IsthmusError(f"images of {planes.shape[1]} channels for a network that takes {channels}; choose a network for colour")
    return np.repeat((planes.astype(np.float32) - 128) / 128, channels // planes.shape[1], axis=1)


def split_of_images(name: str, source: str, parts: Mapping[str, Part], classes: tuple[str, ...], channels: int, seed: int) -> Split:
    """`source` is the file or folder that messages name. Raises `IsthmusError` on labels that are no class and on a class that a part lacks."""
    arrays = {}
    for part in PARTS:
        images, labels = parts[part]
        arrays[f"x_{part}"] = network_input(images, channels)
        arrays[f"y_{part}"] = _checked_labels(labels.reshape(-1).astype(np.int64), len(images), classes, f"{source}, part {part}")
    return Split(name, **arrays, classes=classes, seed=seed)


def _checked_labels(labels: np.ndarray, count: int, classes: tuple[str, ...], where: str) -> np.ndarray:
    if len(labels) != count or not count:
        raise IsthmusError(f"{where}: {len(labels)} labels for {count} images, expected one for each of at least one image; get the files again")
    wrong = np.flatnonzero((labels < 0) | (labels >= len(classes)))
    if len(wrong):
        first = listed([f"{labels[index]} of image {index}" for index in wrong])
        raise IsthmusError(f"{where}: {len(wrong)} of {count} labels are outside 0 to {len(classes) - 1}: {first}; correct or remove them")
    absent = [repr(classes[label]) for label in range(len(classes)) if label not in set(labels.tolist())]
    if absent:
        raise IsthmusError(f"{where}: no image of {len(absent)} of the {len(classes)} classes: {listed(absent)}; every part needs every class")
    return labels
