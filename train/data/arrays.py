# SPDX-License-Identifier: Apache-2.0
"""Arrays of a data set's .npz file, each checked against its header before memory is taken for it. Never unpickles."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from isthmus.errors import IsthmusError
from isthmus.numpy_file import DAMAGE, damaged

MAX_ARRAY_BYTES = 2**30
SHOWN = 3


@dataclass(frozen=True)
class Expected:
    """An array of a file: the shapes that may follow the count, and whether its values are 0 to 255 (uint8) or any whole numbers."""

    tails: tuple[tuple[int, ...], ...]
    pixels: bool

    def __str__(self) -> str:
        shapes = " or ".join(f"[{', '.join(['N', *map(str, tail)])}]" for tail in self.tails)
        return f"{'uint8' if self.pixels else 'whole numbers'} {shapes}"


def pixels(*tail: int) -> Expected:
    return Expected((tail,), True)


LABELS = Expected(((), (1,)), False)


def read_npz(file: Path, expected: Mapping[str, Expected]) -> dict[str, np.ndarray]:
    """The arrays of `expected` by name. Raises `IsthmusError` on a file that cannot be read, or naming the first arrays that are missing or do not fit."""
    try:
        with zipfile.ZipFile(file) as archive:
            faults = _faults(archive, expected)
        if faults:
            raise IsthmusError(f"{file}: {len(faults)} of the {len(expected)} arrays needed do not fit: {listed(faults)}; get the file again")
        with np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in expected}
    except DAMAGE as error:
        raise damaged(file, error) from None


def listed(words: Sequence[object], shown: int = SHOWN) -> str:
    """The first few, and how many more there are."""
    more = len(words) - shown
    return ", ".join(str(word) for word in words[:shown]) + (f" and {more} more" if more > 0 else "")


def _faults(archive: zipfile.ZipFile, expected: Mapping[str, Expected]) -> list[str]:
    present = set(archive.namelist())
    found = {name: _fault(archive, name, wanted) if f"{name}.npy" in present else f"{name} is missing" for name, wanted in expected.items()}
    return [fault for fault in found.values() if fault]


def _fault(archive: zipfile.ZipFile, name: str, wanted: Expected) -> str:
    """What is wrong with one array by its header and stored size; '' where nothing is."""
    stored = archive.getinfo(f"{name}.npy").file_size
    with archive.open(f"{name}.npy") as stream:
        version = np.lib.format.read_magic(stream)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(stream)
        body = stored - stream.tell()
    fits = (dtype == np.uint8 if wanted.pixels else dtype.kind in "iu") and len(shape) > 0 and tuple(shape[1:]) in wanted.tails
    if not fits:
        return f"{name} is {dtype}{list(shape)} instead of {wanted}"
    size = math.prod(shape) * dtype.itemsize
    if size > MAX_ARRAY_BYTES:
        return f"{name} of {list(shape)} takes {size} bytes, more than the {MAX_ARRAY_BYTES} that are read"
    return "" if size == body else f"{name} of {list(shape)} needs {size} bytes and has {body}"
