# SPDX-License-Identifier: Apache-2.0
"""Synthetic aerial images, for where no real ones are: fields of constant grey, roads, roofs, crop rows, uneven light; each with a map of what is where."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

FIELD, CROP_ROWS, ROAD, ROOF = range(4)  # of the map
ILLUMINATION = 0.1  # amplitude of the uneven light
CROP_SHARE = 0.05  # of the fields that have rows
CROP_AMPLITUDE = 0.08
PIXELS_A_FIELD = 400  # on average
CONTRAST = (0.1, 0.9)


def synthetic_aerial(generator: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """An image, float32 (size, size) in 0..1, and its map, uint8 of the same shape: the kinds above."""
    rows, columns = np.mgrid[0:size, 0:size].astype(np.float64)
    image, kinds = _fields(generator, rows, columns)
    for _ in range(generator.integers(1, 4)):
        _road(generator, image, kinds, rows, columns)
    for _ in range(generator.integers(1, 2 + size * size // 1024)):
        _roof(generator, image, kinds)
    angle, phase = generator.uniform(0, 2 * np.pi, 2)
    image += ILLUMINATION * np.sin((rows * np.sin(angle) + columns * np.cos(angle)) * np.pi / size + phase)
    return np.clip(image, 0, 1).astype(np.float32), kinds


def _fields(generator: np.random.Generator, rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Voronoi cells, each of one grey, some with rows of crops."""
    size = len(rows)
    count = max(4, size * size // PIXELS_A_FIELD)
    centres = generator.uniform(0, size, (count, 2))
    nearest = np.zeros((size, size), np.int64)
    distance = np.full((size, size), np.inf)
    for index, (row, column) in enumerate(centres):
        own = (rows - row) ** 2 + (columns - column) ** 2
        nearest = np.where(own < distance, index, nearest)
        distance = np.minimum(own, distance)
    grey = generator.uniform(*CONTRAST, count)
    has_rows = generator.random(count) < CROP_SHARE
    angle, period = generator.uniform(0, np.pi, count)[nearest], generator.uniform(3, 8, count)[nearest]
    waves = np.sin(2 * np.pi * (rows * np.sin(angle) + columns * np.cos(angle)) / period)
    image = grey[nearest] + CROP_AMPLITUDE * waves * has_rows[nearest]
    return image, np.where(has_rows[nearest], CROP_ROWS, FIELD).astype(np.uint8)


def _road(generator: np.random.Generator, image: np.ndarray, kinds: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> None:
    """A line of two stretches, 2 to 4 pixels wide, over the whole image."""
    size = len(image)
    width, grey = generator.uniform(2, 4), generator.uniform(*CONTRAST)
    points = np.array([[0, generator.uniform(0, size)], generator.uniform(0.25 * size, 0.75 * size, 2), [size, generator.uniform(0, size)]])
    if generator.random() < 0.5:
        points = points[:, ::-1]
    for start, end in pairwise(points):
        along = end - start
        share = np.clip(((rows - start[0]) * along[0] + (columns - start[1]) * along[1]) / (along @ along), 0, 1)
        on = np.hypot(rows - start[0] - share * along[0], columns - start[1] - share * along[1]) < width / 2
        image[on], kinds[on] = grey, ROAD


def _roof(generator: np.random.Generator, image: np.ndarray, kinds: np.ndarray) -> None:
    height, width = generator.integers(4, max(5, len(image) // 6), 2)
    top, left = generator.integers(0, len(image) - height), generator.integers(0, len(image) - width)
    image[top : top + height, left : left + width] = generator.uniform(*CONTRAST)
    kinds[top : top + height, left : left + width] = ROOF
