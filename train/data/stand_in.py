# SPDX-License-Identifier: Apache-2.0
"""Synthetic labelled images in the shape of a real data set, for where its files are not: seeded, learnable in a few epochs, not trivial.

A class is a grating of its own orientation over a disc of its own size; neighbours in a pair share the frequency, so networks confuse them and disagree.
"""

from __future__ import annotations

import colorsys
import zlib

import numpy as np

from isthmus.train.data.images import PARTS, Part

SIZES = {"train": 2000, "val": 300, "test": 400}
NOISE = 20.0  # grey levels
GOLDEN_ANGLE = 0.381966
NAME = "synthetic stand-in"


def stand_in(name: str, classes: int, channels: int, seed: int, size: int = 28, balanced: bool = False) -> dict[str, Part]:
    """Images and labels by part. Training and validation are unbalanced as medical sets are; with `balanced` the test part is not."""
    parts = {}
    for number, part in enumerate(PARTS):
        generator = np.random.default_rng([seed, zlib.crc32(name.encode()), number])
        weights = np.ones(classes) if balanced and part == "test" else 1 / (1 + np.arange(classes) % 4)
        rest = generator.choice(classes, SIZES[part] - classes, p=weights / weights.sum())
        labels = generator.permutation(np.concatenate([np.arange(classes), rest]))  # no class is absent
        parts[part] = _images(labels, classes, channels, size, generator), labels.astype(np.uint8)
    return parts


def _images(labels: np.ndarray, classes: int, channels: int, size: int, generator: np.random.Generator) -> np.ndarray:
    count = len(labels)

    def drawn(low: float, high: float) -> np.ndarray:
        return generator.uniform(low, high, (count, 1, 1))

    own = labels[:, None, None].astype(np.float64)
    rows, columns = np.mgrid[0:size, 0:size] / size - 0.5
    angle = np.pi * (own / classes + drawn(-0.25, 0.25) / classes)
    frequency = 1 + 4 * (own // 2 * 2) / max(classes - 1, 1)
    grating = np.sin(2 * np.pi * (frequency * (columns * np.cos(angle) + rows * np.sin(angle)) + drawn(0, 1)))
    radius = 0.15 + 0.25 * own / classes
    disc = np.hypot(columns - drawn(-0.15, 0.15), (rows - drawn(-0.15, 0.15)) * drawn(0.8, 1.25)) < radius
    grey = (110 + drawn(-20, 20) + 50 * grating + 40 * disc)[..., None]
    colour = np.ones((classes, 1)) if channels == 1 else np.array([colorsys.hsv_to_rgb(c * GOLDEN_ANGLE % 1, 0.4, 1.0) for c in range(classes)])
    image = grey * colour[labels][:, None, None, :] + generator.normal(0, NOISE, (count, size, size, channels))
    stored = np.clip(np.rint(image), 0, 255).astype(np.uint8)
    return stored[..., 0] if channels == 1 else stored
