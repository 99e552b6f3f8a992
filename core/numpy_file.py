# SPDX-License-Identifier: Apache-2.0
"""numpy's .npy and .npz files from strangers: never unpickled, refused by size before memory is taken, damage told in one sentence."""

from __future__ import annotations

import tokenize
import zipfile
import zlib
from pathlib import Path

import numpy as np

from isthmus.errors import IsthmusError

# What numpy, zipfile and zlib raise on bytes that are no such file; an array's header goes through Python's own tokeniser.
DAMAGE = (ValueError, EOFError, OSError, SyntaxError, tokenize.TokenError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, MemoryError)


def read_npy(file: Path, most_bytes: int) -> np.ndarray:
    """The array of a .npy file. Raises `IsthmusError` on damage, and on a file above `most_bytes`."""
    try:
        _refuse_large(file, file.stat().st_size, most_bytes)
        with file.open("rb") as stream:
            return np.lib.format.read_array(stream, allow_pickle=False)
    except DAMAGE as error:
        raise damaged(file, error) from None


def read_npz(file: Path, most_bytes: int) -> dict[str, np.ndarray]:
    """Every array of a .npz file by name. Raises `IsthmusError` on damage, and on a file that says it unpacks to more than `most_bytes`."""
    try:
        with zipfile.ZipFile(file) as archive:  # a member never gives more bytes than the archive says here
            _refuse_large(file, sum(info.file_size for info in archive.infolist()), most_bytes)
        with np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except DAMAGE as error:
        raise damaged(file, error) from None


def damaged(file: Path, error: BaseException) -> IsthmusError:
    """The sentence for one of `DAMAGE`."""
    if isinstance(error, FileNotFoundError):
        return IsthmusError(f"{file}: no such file")
    reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return IsthmusError(f"{file}: cannot be read as a {file.suffix} file, it is cut short or damaged ({reason}); get or make it again")


def _refuse_large(file: Path, found_bytes: int, most_bytes: int) -> None:
    if found_bytes > most_bytes:
        raise IsthmusError(f"{file}: unpacks to {found_bytes} bytes, more than the {most_bytes} that are read")
