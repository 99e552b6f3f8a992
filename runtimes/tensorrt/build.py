# SPDX-License-Identifier: Apache-2.0
"""`python -m isthmus.runtimes build`: the artifact's own script, run by this Python on the board, and a seal on what it made."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isthmus.bundle import Bundle
from isthmus.errors import IsthmusError
from isthmus.runtimes.tensorrt.records import SCRIPT, SCRIPT_SHA256, is_sealed, planned_engine, planned_engines, read_record, seal

LAST_LINES = 4
PREFIX = "build_engine: "
LOCK = "seal.lock"


@dataclass(frozen=True)
class BuildOptions:
    """As the command line has them. `engines`: names, all that are planned where empty. `rtx`: a compute capability for TensorRT-RTX, 0 for TensorRT."""

    engines: tuple[str, ...] = ()
    workspace_mib: int = 0
    rebuild: bool = False
    wait: bool = False
    other_board: bool = False
    rtx: int = 0
    trust: bool = False


def build_engines(bundle: Bundle, profile: str, options: BuildOptions) -> list[dict[str, Any]]:
    """Builds what `engines.json` names and is not there yet, one after the other; gives their records.

    Goes on where the terminal or the ssh connection goes away. Raises `IsthmusError`: nothing to build, a script that is not this version's (and
    no `trust`), or the script's own sentence.
    """
    entry = bundle.artifact(profile)
    if entry["engine"] != "tensorrt":
        raise IsthmusError(f"{profile}: nothing is built on the board for engine {entry['engine']}: its artifact runs as it is")
    folder = bundle.folder(profile)
    _check_script(bundle, folder / SCRIPT, options.trust)
    planned = [planned_engine(folder, name) for name in options.engines] or planned_engines(folder)
    with _hang_up_ignored(), _alone(folder, options.wait):
        return [_built(folder, one, options) for one in planned]


def _check_script(bundle: Bundle, script: Path, trust: bool) -> None:
    """It is code of the bundle: run where it is what this version writes, where this user compiled the bundle, or on trust."""
    if not script.is_file():
        raise IsthmusError(f"{script}: no such file; compile the bundle again")
    if hashlib.sha256(script.read_bytes()).hexdigest() != SCRIPT_SHA256 and not (trust or bundle.built_here()):
        raise IsthmusError(f"{script}: is not the script that this version of isthmus writes: compile again with it, or pass --trust-bundle to run it as it is")


def _built(folder: Path, planned: dict[str, Any], options: BuildOptions) -> dict[str, Any]:
    # An engine that stands there without this user's seal may be anybody's: it is built anew.
    rebuild = options.rebuild or not (is_sealed(folder, planned) or options.trust)
    words = ["--engine", planned["name"], "--timing-cache", str(timing_cache())]
    words += ["--workspace-mib", str(options.workspace_mib)] if options.workspace_mib else []
    words += ["--rtx", str(options.rtx)] if options.rtx else []
    words += [word for word, wanted in (("--rebuild", rebuild), ("--wait", options.wait), ("--other-board", options.other_board)) if wanted]
    log = folder / "logs" / f"build-{planned['name']}.log"
    own = log.with_suffix(f".{os.getpid()}")  # the one before may still be written to, by a build whose parent was killed
    log.parent.mkdir(exist_ok=True)
    with own.open("wb") as stream:
        code = subprocess.run([sys.executable, SCRIPT, *words], cwd=folder, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, check=False).returncode
    os.replace(own, log)
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    if code != 0:
        raise IsthmusError(f"{folder.name}, engine {planned['name']}: {_why(code, lines)}; its log is {log}")
    seal(folder, planned)
    return {**read_record(folder, planned), "file": planned["output"], "said": lines[-1] if lines else ""}


def _why(code: int, lines: Sequence[str]) -> str:
    if code == -signal.SIGKILL:
        return (
            "the build was killed (signal 9): the system does that when memory runs out; stop other programs, add swap, or pass a smaller --workspace-mib,"
            " and start it again"
        )
    if code < 0:
        return f"the build ended by signal {-code} ({signal.Signals(-code).name}); start it again"
    own = [line.removeprefix(PREFIX) for line in lines if line.startswith(PREFIX)]
    return own[-1] if own else f"the build ended with code {code}: {' | '.join(lines[-LAST_LINES:]) or 'it said nothing'}"


@contextmanager
def _alone(folder: Path, wait: bool) -> Iterator[None]:
    """From the look at an engine's seal to the new seal. The script has a lock of its own: for those who run it by hand, and one that outlived its parent."""
    with (folder / LOCK).open("a+", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise IsthmusError(f"{folder}: another build is running here: wait for it, or pass --wait") from None
        yield


def timing_cache() -> Path:
    """One for all bundles of this user: kernels that were measured once are not measured again. `build_engine.py` leaves one of another GPU aside."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(home) / "isthmus" / "tensorrt" / "timing.cache"


@contextmanager
def _hang_up_ignored() -> Iterator[None]:
    """A build takes minutes: where ssh is gone in the middle it goes on, as the script's own process does, which inherits this."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


def printed(profile: str, records: Sequence[dict[str, Any]]) -> str:
    """One line of JSON, which the host reads when it started the build over ssh."""
    return json.dumps({"profile": profile, "engines": list(records)})


__all__ = ["BuildOptions", "build_engines", "printed", "timing_cache"]
