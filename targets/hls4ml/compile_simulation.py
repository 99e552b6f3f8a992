# SPDX-License-Identifier: Apache-2.0
"""`python -m isthmus.targets.hls4ml.compile_simulation`, in the artifact's folder: project/ -> csim/libmodel.so, by g++.

What g++ made of the very same files before is taken from the user's cache; the headers that every project shares are parsed once and kept.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from isthmus.errors import IsthmusError
from isthmus.targets.hls4ml import simulation
from isthmus.targets.hls4ml.backends import BACKENDS, Backend
from isthmus.targets.hls4ml.board_design import KERNEL_FILE
from isthmus.targets.hls4ml.build_cache import BuildCache, cache_folder
from isthmus.tools import find_tool

WAY_OUT = "let XDG_CACHE_HOME name a folder that can be written"


def main() -> int:
    backend = BACKENDS[json.loads(Path(simulation.CONFIG_FILE).read_text(encoding="utf-8"))["backend"]]
    compiler = find_tool("g++")
    if not compiler.found:
        sys.stdout.write(f"g++ is not here: {compiler.fix}\n")
        return 1
    try:
        cache = BuildCache(cache_folder())
    except IsthmusError as error:
        sys.stdout.write(f"{error}\n")
        return 1
    except OSError as error:
        sys.stdout.write(f"not cached: {error}; {WAY_OUT}\n")
        return _compile([compiler.path, *simulation.flags(backend)])
    return _cached(cache, backend, compiler.path, f"{compiler.version}\0{_target_of(compiler.path)}")


def _cached(cache: BuildCache, backend: Backend, compiler: str, identity: str) -> int:
    argv = [compiler, *simulation.flags(backend)]
    library, header, firmware = Path(simulation.LIBRARY_FILE), Path(simulation.HEADER_FILE), Path(backend.firmware)
    folders = (firmware / "nnet_utils", *(Path(folder) for folder in backend.includes))
    shared = sorted({path for folder in folders for path in folder.rglob("*.h*") if path.name != simulation.GENERATED_HEADER})
    headers = digest_of(f"{identity}\0{' '.join(argv[1:])}", [header, *shared])
    own = sorted({*firmware.rglob("*.h"), *firmware.glob("*.cpp")} - set(shared))
    others = [path for path in (Path(simulation.SOURCE_FILE), Path(backend.bridge), Path(KERNEL_FILE)) if path.is_file()]
    digest = digest_of(headers, [*own, *others])
    found = cache.find("simulation", digest)
    if found is not None:
        shutil.copyfile(found / library.name, library)
        sys.stdout.write("taken from the cache: g++ has compiled these files before\n")
        return 0

    def parse(folder: Path) -> None:
        shutil.copyfile(header, folder / header.name)
        if _run([*argv, "-x", "c++-header", str(folder / header.name), "-o", str(folder / f"{header.name}.gch")]):
            raise IsthmusError("g++ cannot precompile the headers")

    try:
        precompiled = cache.find("headers", headers) or cache.add("headers", headers, parse)
        code = _compile([*argv, "-include", str(precompiled / header.name)])
        if code == 0:
            cache.add("simulation", digest, lambda folder: shutil.copyfile(library, folder / library.name))
    except (OSError, IsthmusError) as error:
        sys.stdout.write(f"not cached: {error}; {WAY_OUT}\n")
        code = _compile(argv)
    return code


def digest_of(identity: str, files: Iterable[Path]) -> str:
    """sha256 of everything a compile sees: paths, contents, compiler, flags."""
    state = hashlib.sha256(f"{identity}\0".encode())
    for path in files:
        state.update(f"{path.as_posix()}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\0".encode())
    return state.hexdigest()


def _target_of(compiler: str) -> str:
    return subprocess.run([compiler, "-dumpmachine"], capture_output=True, text=True, timeout=60, check=True).stdout.strip()


def _compile(argv: list[str]) -> int:
    return _run([*argv, "-shared", simulation.SOURCE_FILE, "-o", simulation.LIBRARY_FILE, "-ldl"])


def _run(argv: list[str]) -> int:
    """g++, its messages in this process's log."""
    return subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=sys.stdout.fileno(), stderr=subprocess.STDOUT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
