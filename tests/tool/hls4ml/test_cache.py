# SPDX-License-Identifier: Apache-2.0
"""The cache of compiled simulations: native code, so only this user's own, byte for byte what was compiled, and never without bound."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from isthmus.errors import IsthmusError
from isthmus.graph import QuantGraph
from isthmus.plan import BuildPlan, execute
from isthmus.targets.hls4ml import simulation
from isthmus.targets.hls4ml.build_cache import SEAL, BuildCache, cache_folder

Built = tuple[QuantGraph, BuildPlan, Path]


SMALL = b'extern "C" int answer() { return 42; }\n'  # compiled in place of the project's code: the cache does not look into it


def _compiled_again(built: Built, place: Path, source: bytes | None = None) -> str:
    """What the compile step says in a copy of the folder without its library, with `source` instead of the project's own code."""
    _, plan, folder = built
    shutil.copytree(folder, place)
    (place / simulation.LIBRARY_FILE).unlink()
    files = {} if source is None else {simulation.SOURCE_FILE: source}
    (result,) = execute(replace(plan, files=files, steps=plan.steps[1:2]), place)
    assert result.status == "done"
    return result.detail


def _entries(kind: str) -> list[Path]:
    return sorted(cache_folder().glob(f"{kind}-*"))


def test_the_same_project_is_compiled_once_and_changed_bytes_are_not_taken(hls: Any, classifier: Built, tmp_path: Path) -> None:
    taken = "taken from the cache: g++ has compiled these files before"
    assert _compiled_again(classifier, tmp_path / "second") == taken
    hls.equals_reference((*classifier[:2], tmp_path / "second"), samples=2)
    before = set(_entries("simulation"))
    assert _compiled_again(classifier, tmp_path / "third", SMALL) != taken
    (entry,) = set(_entries("simulation")) - before
    assert _compiled_again(classifier, tmp_path / "fourth", SMALL) == taken
    with (entry / "libmodel.so").open("ab") as library:
        library.write(b"\0")
    assert _compiled_again(classifier, tmp_path / "fifth", SMALL) != taken
    assert _answer(tmp_path / "fifth") == 42


def _answer(folder: Path) -> int:
    # In a process of its own: ctypes never unloads it.
    code = f"import ctypes; print(ctypes.CDLL({str(folder / simulation.LIBRARY_FILE)!r}).answer())"
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=60).stdout)


def test_a_folder_that_cannot_be_a_cache_is_said_and_the_simulation_is_compiled(classifier: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert _compiled_again(classifier, tmp_path / "built", SMALL).startswith("not cached: ")
    assert _answer(tmp_path / "built") == 42


def test_a_cache_that_others_can_write_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = cache_folder()
    assert folder == tmp_path / "isthmus" / "csim" and folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o770)
    with pytest.raises(IsthmusError, match=r"must be a folder of this user alone \(mode 0700\); remove it"):
        cache_folder()
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(IsthmusError, match="must be a folder of this user alone"):
        cache_folder()


def _filled(cache: BuildCache, digest: str, content: bytes = b"code") -> Path:
    return cache.add("simulation", digest, lambda folder: (folder / "libmodel.so").write_bytes(content))


def test_an_entry_is_sealed_to_its_name_its_files_and_its_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = BuildCache(tmp_path)
    entry = _filled(cache, "a")
    assert cache.find("simulation", "a") == entry
    assert cache.find("simulation", "b") is None
    shutil.copytree(entry, tmp_path / "simulation-b")  # sealed, but as another simulation
    assert cache.find("simulation", "b") is None and not (tmp_path / "simulation-b").exists()
    (entry / "more.so").write_bytes(b"code")
    assert cache.find("simulation", "a") is None and not entry.exists()
    seal = _filled(cache, "a") / SEAL
    assert seal.is_file()
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "another user"))
    assert cache.find("simulation", "a") is None


def test_the_least_recently_used_entry_goes_first(tmp_path: Path) -> None:
    cache = BuildCache(tmp_path, max_bytes=2500)
    for age, digest in enumerate("abc"):
        os.utime(_filled(cache, digest, b"x" * 700), (1000 + age, 1000 + age))
    assert cache.find("simulation", "a") is not None  # used again: now the newest
    abandoned = tmp_path / "partial-killed"
    abandoned.mkdir()
    os.utime(abandoned, (1000, 1000))
    _filled(cache, "d", b"x" * 700)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["simulation-a", "simulation-c", "simulation-d"]
    failing = pytest.raises(OSError, match="disk")
    with failing:
        cache.add("simulation", "e", _raise)
    assert not list(tmp_path.glob("partial-*"))


def _raise(folder: Path) -> None:
    raise OSError("disk")
