# SPDX-License-Identifier: Apache-2.0
"""Data sets that are kept as an archive, unpacked once."""

from __future__ import annotations

import zipfile
from pathlib import Path


def unpacked(archive: Path, folder: Path) -> Path:
    """`folder` with the archive's files. It appears when it is whole: a run that was stopped in between begins anew."""
    if not folder.is_dir():
        partial = folder.with_name(f"{folder.name}.partial")
        with zipfile.ZipFile(archive) as stored:
            stored.extractall(partial)
        partial.rename(folder)
    return folder
