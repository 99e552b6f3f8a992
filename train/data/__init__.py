# SPDX-License-Identifier: Apache-2.0
"""Data sets: one module a set, each with a `load(...) -> Split`. Nothing here downloads at import."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from isthmus.errors import IsthmusError


@dataclass(frozen=True)
class Split:
    """Samples with their targets in three disjoint parts. Training and calibration see `train`, selection sees `val`, figures come from `test`.

    Samples are float32 [count, *shape]. Targets are labels, int64 [count] with values below `len(classes)`; or, without `classes`, float32
    [count, *any shape], as the system's `Task` reads them. `seed` is the one the parts were drawn with.
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
        expected = np.int64 if self.classes else np.float32
        if x.dtype != np.float32 or y.dtype != expected:
            wanted = "int64" if self.classes else "float32 (int64 labels need their classes)"
            raise IsthmusError(f"{where}: samples are {x.dtype} and targets {y.dtype}, expected float32 and {wanted}; convert them first")
        if len(x) == 0 or len(x) != len(y) or (self.classes and y.ndim != 1):
            raise IsthmusError(f"{where}: {len(x)} samples and targets of shape {y.shape}, expected one target for each of at least one sample")
        for what, array, of_train in (("sample", x, self.x_train), ("target", y, self.y_train)):
            if array.shape[1:] != of_train.shape[1:]:
                raise IsthmusError(f"{where}: a {what} has shape {array.shape[1:]}, in the training part {of_train.shape[1:]}; they must be equal")
            if not np.isfinite(array).all():
                raise IsthmusError(f"{where}: {what} {int(np.argwhere(~np.isfinite(array))[0][0])} holds NaN or infinity; remove or repair it")
        if self.classes and (y.min() < 0 or y.max() >= len(self.classes)):
            raise IsthmusError(f"{where}: labels run from {y.min()} to {y.max()}, expected 0 to {len(self.classes) - 1}; check the list of classes")

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return tuple(self.x_train.shape[1:])
