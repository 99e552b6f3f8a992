# SPDX-License-Identifier: Apache-2.0
"""Data sets: one module a set, each with a `load(...) -> Split`. Nothing here downloads at import."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from isthmus.errors import IsthmusError


@dataclass(frozen=True)
class Split:
    """Labelled samples in three disjoint parts. Training and calibration see `train`, selection sees `val`, figures come from `test`.

    Samples are float32 [count, *shape], labels int64 [count] with values below `len(classes)`. `seed` is the one the parts were drawn with.
    """

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_val: np.ndarray
    y_val: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    classes: tuple[str, ...]
    seed: int

    def __post_init__(self) -> None:
        for part in ("train", "val", "test"):
            self._check(part, getattr(self, f"x_{part}"), getattr(self, f"y_{part}"))

    def _check(self, part: str, x: np.ndarray, y: np.ndarray) -> None:
        where = f"data set {self.name}, part {part}"
        if x.dtype != np.float32 or y.dtype != np.int64:
            raise IsthmusError(f"{where}: samples are {x.dtype} and labels {y.dtype}, expected float32 and int64; convert them first")
        if len(x) == 0 or len(x) != len(y) or y.ndim != 1:
            raise IsthmusError(f"{where}: {len(x)} samples and labels of shape {y.shape}, expected one label for each of at least one sample")
        if x.shape[1:] != self.x_train.shape[1:]:
            raise IsthmusError(f"{where}: a sample has shape {x.shape[1:]}, in the training part {self.x_train.shape[1:]}; they must be equal")
        if not np.isfinite(x).all():
            raise IsthmusError(f"{where}: sample {int(np.argwhere(~np.isfinite(x))[0][0])} holds NaN or infinity; remove or repair it")
        if y.min() < 0 or y.max() >= len(self.classes):
            raise IsthmusError(f"{where}: labels run from {y.min()} to {y.max()}, expected 0 to {len(self.classes) - 1}; check the list of classes")

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return tuple(self.x_train.shape[1:])
