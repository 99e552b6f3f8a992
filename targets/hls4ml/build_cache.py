# SPDX-License-Identifier: Apache-2.0
"""Native code kept between compiles, in a folder that only this user can write: each file carries this user's seal, or is not taken.

Two kinds: C simulations, by the digest of everything g++ saw, and the precompiled headers that they share.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from isthmus.bundle import user_seal
from isthmus.errors import IsthmusError

MAX_BYTES = 2**30  # the least recently used entries go first; a precompiled header has about 100 MB, a simulation a few hundred KB
SEAL = "seal"
PARTIAL = "partial-"
ABANDONED_S = 3600  # a partial entry older than this is what a killed compile left


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/isthmus/csim, made with mode 0700. Raises `IsthmusError` where it is not this user's alone."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(home) / "isthmus" / "csim"
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise IsthmusError(f"{folder}: holds native code that is run, and must be a folder of this user alone (mode 0700); remove it, it is made anew")
    return folder


class BuildCache:
    """Entries are folders `<kind>-<digest>`, each with files and a seal over their names and contents."""

    def __init__(self, folder: Path, max_bytes: int = MAX_BYTES) -> None:
        self.folder = folder
        self.max_bytes = max_bytes

    def find(self, kind: str, digest: str) -> Path | None:
        """The entry's folder. None where there is none, or where its seal is not this user's for these very bytes: it is then removed."""
        entry = self.folder / f"{kind}-{digest}"
        if not entry.is_dir() or entry.is_symlink():
            return None
        seal = entry / SEAL
        if not seal.is_file() or not hmac.compare_digest(seal.read_bytes(), _seal_of(entry)):
            shutil.rmtree(entry, ignore_errors=True)
            return None
        os.utime(entry)
        return entry

    def add(self, kind: str, digest: str, fill: Callable[[Path], object]) -> Path:
        """`fill(folder)` writes the entry's files; they are sealed and appear at once, or not at all. Gives the entry's folder."""
        entry = self.folder / f"{kind}-{digest}"
        partial = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=self.folder))
        try:
            fill(partial)
            # The seal names the entry, which the partial folder is not yet.
            (partial / SEAL).write_bytes(_seal_of(partial, entry.name))
            try:
                os.rename(partial, entry)
            except OSError:
                if not entry.is_dir():  # another process was faster: its entry is as good
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        self._shrink(entry)
        return entry

    def _shrink(self, newest: Path) -> None:
        entries = []
        for entry in self.folder.iterdir():
            try:
                entries.append((entry.stat().st_mtime_ns, sum(file.stat().st_size for file in entry.iterdir()), entry))
            except (FileNotFoundError, NotADirectoryError):
                continue  # another process removed it, or it is no entry
        total = sum(size for _, size, _ in entries)
        for used_ns, size, entry in sorted(entries):
            partial = entry.name.startswith(PARTIAL)
            abandoned = partial and time.time_ns() - used_ns > ABANDONED_S * 10**9
            if abandoned or (total > self.max_bytes and entry != newest and not partial):
                shutil.rmtree(entry, ignore_errors=True)
                total -= size


def _seal_of(entry: Path, name: str = "") -> bytes:
    """The seal of an entry as it stands."""
    state = [f"isthmus csim cache\0{name or entry.name}"]
    for file in sorted(entry.iterdir()):
        if file.name != SEAL:
            with file.open("rb") as stream:
                state.append(f"{file.name}\0{hashlib.file_digest(stream, 'blake2b').hexdigest()}")
    return user_seal("\n".join(state).encode())
