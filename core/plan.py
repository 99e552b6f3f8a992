# SPDX-License-Identifier: Apache-2.0
"""`BuildPlan`: the files and steps that make an artifact, apart from running them: here, on a board, or where a vendor's tool is."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from isthmus.errors import IsthmusError
from isthmus.spec import TensorSpec
from isthmus.tools import Tool, find_tool

FULL_BYTES = 2**18  # less free than this where a step failed: the disk is full


@dataclass(frozen=True)
class Step:
    """One process. `argv` runs in the artifact's folder; "{python}" stands for the interpreter that runs isthmus.

    `tool` is a name `isthmus.tools` knows. `where` is "host" (run during compile), "board" or "toolhost" (left for later:
    the step is planned, never run here). An `optional` step is skipped, and said to be skipped, where its tool is missing.
    """

    name: str
    argv: tuple[str, ...]
    tool: str
    outputs: tuple[str, ...]
    where: str = "host"
    optional: bool = False
    timeout_s: int = 1800


@dataclass(frozen=True)
class StepResult:
    """`status` is "done", "skipped" (optional and its tool is not here) or "planned" (runs elsewhere). `detail` is one sentence."""

    name: str
    status: str
    tool: str
    tool_version: str
    seconds: float
    detail: str


@dataclass(frozen=True)
class BuildPlan:
    """Everything a target says of one artifact.

    - `files`: path relative to the artifact's folder -> content.
    - `steps`: in order.
    - `artifact`: the main file, relative; `engine`: the runtime that opens it.
    - `inputs`, `outputs`: the border as that engine sees it (layout, dtype, scale).
    - `runs_here`: whether this machine can open the artifact (a simulator counts, and its engine says so by name).
    - `max_lsb`: what this target may differ from the integer reference; above 0 needs `why_lsb`.
    - `notes`: sentences for the manifest and the report ("parses and compiles with ...").
    """

    files: Mapping[str, bytes]
    steps: tuple[Step, ...]
    artifact: str
    engine: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    runs_here: bool = True
    max_lsb: int = 0
    why_lsb: str = ""
    notes: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    def digest(self) -> str:
        """sha256 over files, steps and border: equal plans make equal artifacts."""
        state = hashlib.sha256()
        for name in sorted(self.files):
            state.update(name.encode() + b"\0" + hashlib.sha256(self.files[name]).digest())
        rest = {
            "steps": [asdict(step) for step in self.steps],
            "artifact": self.artifact,
            "engine": self.engine,
            "border": [spec.to_json() for spec in (*self.inputs, *self.outputs)],
            "options": dict(self.options),
        }
        state.update(json.dumps(rest, sort_keys=True, default=str).encode())
        return state.hexdigest()


def write_files(plan: BuildPlan, folder: Path) -> None:
    """Writes the plan's files under `folder`. Raises `IsthmusError` where a name would leave it."""
    root = folder.resolve()
    for name, content in plan.files.items():
        path = (root / name).resolve()
        if not path.is_relative_to(root):
            raise IsthmusError(f"plan file {name!r} lies outside its folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def execute(plan: BuildPlan, folder: Path) -> list[StepResult]:
    """Writes the files, runs the host steps in order, one log a step (`logs/<step>.log`).

    Raises `IsthmusError` naming the step, its exit code and the last lines of its log; on a missing tool; on a missing output.
    """
    write_files(plan, folder)
    return [_run(step, folder) for step in plan.steps]


def _run(step: Step, folder: Path) -> StepResult:
    if step.where != "host":
        place = "on the board" if step.where == "board" else f"where {step.tool} is"
        return StepResult(step.name, "planned", step.tool, "", 0.0, f"runs {place}")
    tool = find_tool(step.tool)
    if not tool.found:
        if step.optional:
            return StepResult(step.name, "skipped", step.tool, "", 0.0, f"{step.tool} is not here: {tool.fix}")
        raise IsthmusError(f"step {step.name} needs {step.tool}, which is not here: {tool.fix}")
    argv = [sys.executable if word == "{python}" else word for word in step.argv]
    if argv[0] == step.tool and tool.path:
        argv[0] = tool.path  # where find_tool found it, which need not be on PATH
    log = folder / "logs" / f"{step.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    code = _process(argv, folder, log, step)
    seconds = time.perf_counter() - started
    if code != 0:
        if shutil.disk_usage(folder).free < FULL_BYTES or os.strerror(errno.ENOSPC) in tail(log):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))  # the log says it in a tool's words, or was cut short by it
        raise IsthmusError(f"step {step.name} ({step.tool}) ended with code {code}:\n{tail(log)}")
    missing = [name for name in step.outputs if not (folder / name).exists()]
    if missing:
        raise IsthmusError(f"step {step.name} ended well but did not make {missing[0]}:\n{tail(log)}")
    return StepResult(step.name, "done", step.tool, tool.version, round(seconds, 3), _last_line(log))


def _process(argv: Sequence[str], folder: Path, log: Path, step: Step) -> int:
    with log.open("wb") as stream:
        try:
            return subprocess.run(
                argv, cwd=folder, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, timeout=step.timeout_s, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            raise IsthmusError(f"step {step.name} did not end within {step.timeout_s} s; its log is {log}") from None
        except OSError as error:
            raise IsthmusError(f"step {step.name}: {argv[0]} could not be started: {error.strerror}") from None


def tail(log: Path, lines: int = 12) -> str:
    """The last lines of a log, for an error message."""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


__all__ = ["BuildPlan", "Step", "StepResult", "Tool", "execute", "tail", "write_files"]
