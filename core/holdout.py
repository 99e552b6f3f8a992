# SPDX-License-Identifier: Apache-2.0
"""One user's samples as two sets: what a recipe is chosen, calibrated or trained on must not judge it as well."""

from __future__ import annotations

import numpy as np

from isthmus.dataset import Dataset

LEAST = 64  # samples; half of fewer would neither calibrate nor judge
MOST_JUDGED = 1000


def hold_out(data: Dataset, batch: int, seed: int) -> tuple[Dataset, Dataset, str]:
    """(learnt from, judged on, a sentence on it): half of the samples, at most `MOST_JUDGED`, judge; drawn with `seed`, in whole batches.

    Fewer than `LEAST` samples are not divided, and the sentence warns of it.
    """
    judged = min(len(data) // 2, MOST_JUDGED) // batch * batch
    if len(data) < LEAST or judged == 0:
        where = f"{len(data)} samples are too few to divide (at least {max(LEAST, 2 * batch)})"
        return data, data, f"warning: {where}: accuracy is judged on the samples that were learnt from and may look better than it is"
    order = np.random.default_rng(seed).permutation(len(data))
    rest, chosen = np.sort(order[judged:]), np.sort(order[:judged])
    told = f"{data.source}: {len(rest)} samples learnt from, {judged} others judged on (drawn with seed {seed})"
    return _rows(data, rest, "learnt from"), _rows(data, chosen, "held out"), told


def _rows(data: Dataset, rows: np.ndarray, part: str) -> Dataset:
    labels = None if data.labels is None else data.labels[rows]
    return Dataset({name: array[rows] for name, array in data.samples.items()}, labels, f"{data.source}: {part}")
