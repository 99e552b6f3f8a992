# SPDX-License-Identifier: Apache-2.0
"""`python -m isthmus.targets.hls4ml.build_project`, in the artifact's folder: from the HLS project to a bitstream, by the vendor's tools.

    [--host user@machine] [--until synthesis|cosimulation|export|implementation|bitstream] [--rebuild] [--timeout-s N]

Each step leaves a checkpoint in build/ with what it was made from, its time and its report: a build that died goes on behind the last step
that ended well, one whose project has changed begins anew. Logs are kept in build/. With `--host` the folder is copied there, the steps run
there, and build/ comes back after each.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from isthmus.errors import IsthmusError
from isthmus.plan import tail
from isthmus.targets.hls4ml import simulation
from isthmus.targets.hls4ml.board_design import BITSTREAM_FOLDER, KERNEL_FILE
from isthmus.targets.hls4ml.build_steps import BuildStep, step_names, steps_of
from isthmus.targets.hls4ml.reports import ToolReport, read_report, replaced

RECORD_SCHEMA = 1
# What the tools make inside the project's folder, beside logs: AMD's and Catapult's project, SmartHLS' output, results of test benches.
MADE_BY_TOOLS = ("project/model_prj/", "project/hls_output/", "project/tb_data/")
SOURCES = (".c", ".cpp", ".h", ".hpp", ".tcl", ".txt", "")  # weights are .txt, a Makefile has no ending
SECONDS = 24 * 3600
FOUND = 'for tool in {tools}; do command -v "$tool" && exit 0; done; exit 1'


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Synthesis, co-simulation, export, implementation and bitstream of the HLS project in this folder.")
    parser.add_argument("--host", default="", help="user@machine that has the tools, reached by ssh")
    parser.add_argument("--until", choices=step_names(), default="", help="the last step (default: all that the backend and the board have)")
    parser.add_argument("--rebuild", action="store_true", help="begin anew, whatever checkpoints say")
    parser.add_argument("--timeout-s", type=int, default=SECONDS, help="of each step")
    options = parser.parse_args(arguments)
    try:
        record = build(Path(), options.host, options.until, options.rebuild, options.timeout_s)
    except IsthmusError as error:
        sys.stdout.write(f"{error}\n")
        return 1
    for step in record["steps"]:
        sys.stdout.write(f"{step['name']}: {step['status']}, {step['seconds']:.0f} s\n")
    return 0


def build(folder: Path, host: str = "", until: str = "", rebuild: bool = False, timeout_s: int = SECONDS) -> dict[str, Any]:
    """Runs what is not done yet, and gives the record that it leaves in build/build.json.

    Raises `IsthmusError` where there is no project, a tool is missing, or a step fails: the sentence names its log and that the same
    command goes on from there.
    """
    steps = _steps(folder, until)
    if not (folder / simulation.PROJECT_FOLDER).is_dir():
        raise IsthmusError(f"{folder.resolve()}: no HLS project here: compile for an FPGA board first, and run this in artifacts/<profile>/")
    place = _Host(folder, host) if host else _Here(folder)
    digest = project_digest(folder)
    (folder / simulation.BUILD_FOLDER).mkdir(exist_ok=True)
    done: list[dict[str, Any]] = []
    fresh = rebuild
    for step in steps:
        known = None if fresh else _checkpoint(folder, step, digest)
        if known is not None:
            done.append({**known, "status": "done before"})
            continue
        fresh = True  # what follows was made from something else
        done.append(_run(step, place, folder, digest, timeout_s))
        _write(folder / simulation.BUILD_RECORD, _record(folder, digest, steps, done))
    record = _record(folder, digest, steps, done)
    _write(folder / simulation.BUILD_RECORD, record)
    return record


def _steps(folder: Path, until: str) -> tuple[BuildStep, ...]:
    """Those of the artifact's backend and board, up to `until`."""
    try:
        config = json.loads((folder / simulation.CONFIG_FILE).read_text(encoding="utf-8"))
        steps = steps_of(config["backend"], config["board"] is not None)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IsthmusError(
            f"{folder.resolve()}: no HLS project here ({error}): compile for an FPGA board first, and run this in artifacts/<profile>/"
        ) from None
    names = [step.name for step in steps]
    if until and until not in names:
        raise IsthmusError(
            f"--until {until}: this artifact's steps are {', '.join(names)} ({config['backend']}{'' if config['board'] else ', no board design'})"
        )
    return steps[: names.index(until) + 1] if until else steps


def _record(folder: Path, digest: str, steps: Sequence[BuildStep], done: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The steps, and what is now known of the design: the estimate, with what the tools said in its place."""
    reports = [folder / name for step in steps[: len(done)] for name in step.reports]
    known = [report for path in reports if (report := _read(path)) is not None]
    try:
        estimate = json.loads((folder / simulation.ESTIMATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise IsthmusError(f"{simulation.ESTIMATE_FILE}: cannot be read, compile the artifact anew: {error}") from None
    return {"schema": RECORD_SCHEMA, "project": digest, "steps": list(done), "design": replaced(estimate, known)}


def _read(path: Path) -> ToolReport | None:
    try:
        return read_report(path)
    except IsthmusError:
        return None  # `report_entry` has said why


def project_digest(folder: Path) -> str:
    """sha256 of what the steps read: the project without what the tools made in it, and the kernel around it."""
    state = hashlib.sha256()
    root = folder / simulation.PROJECT_FOLDER
    for path in [*sorted(root.rglob("*")), *sorted((folder / KERNEL_FILE).parent.glob("*"))]:
        name = path.relative_to(folder).as_posix()
        if path.is_file() and path.suffix in SOURCES and not name.startswith(MADE_BY_TOOLS):
            state.update(f"{name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\0".encode())
    return state.hexdigest()


def _checkpoint(folder: Path, step: BuildStep, digest: str) -> dict[str, Any] | None:
    """What the step left when it ended well, for this very project; None where it did not."""
    try:
        record = json.loads((folder / simulation.BUILD_FOLDER / f"{step.name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.get("schema") == RECORD_SCHEMA and record.get("project") == digest else None


def _run(step: BuildStep, place: _Here | _Host, folder: Path, digest: str, timeout_s: int) -> dict[str, Any]:
    tool = place.find(step.tools)
    if step.script:
        (folder / step.script).write_text(step.tcl, encoding="utf-8")
    log = folder / simulation.BUILD_FOLDER / f"{step.name}.log"
    started = time.perf_counter()
    code = place.run(step, step.command(tool), log, timeout_s)
    seconds = time.perf_counter() - started
    again = "run the same command again: it goes on from this step"
    if code != 0:
        raise IsthmusError(f"step {step.name} ({Path(tool).name}) ended with code {code}, its log is {log}; {again}\n{tail(log)}")
    missing = place.missing((*step.makes, *step.reports))
    if missing:
        raise IsthmusError(f"step {step.name} ({Path(tool).name}) ended well but did not make {missing[0]}, its log is {log}; {again}\n{tail(log)}")
    place.fetch((*step.reports, *(name for name in step.makes if name.startswith(BITSTREAM_FOLDER))))
    record: dict[str, Any] = {"schema": RECORD_SCHEMA, "project": digest, "name": step.name, "status": "done", "tool": tool, "seconds": round(seconds, 1)}
    record["reports"] = [report_entry(folder / name) for name in step.reports]
    failed = [entry for entry in record["reports"] if entry.get("passed") is False and entry.get("kind") in ("co-simulation", "smart-hls")]
    if failed:
        raise IsthmusError(f"step {step.name}: the generated hardware computes something else than the C code, its log is {log}")
    _write(folder / simulation.BUILD_FOLDER / f"{step.name}.json", record)
    return record


def report_entry(path: Path) -> dict[str, Any]:
    """A report as the record holds it; one in an unknown format is named, with the sentence, and does not end the build."""
    try:
        return {"file": path.name, **read_report(path).to_json()}
    except IsthmusError as error:
        return {"file": path.name, "unread": str(error)}


def _write(path: Path, content: Mapping[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(partial, path)


# ---- where the tools are
def bring(tools: Sequence[str]) -> str:
    """What puts a tool on the PATH."""
    return {
        "catapult": "put Catapult's bin folder on PATH",
        "cmake": "install CMake, and source oneAPI's setvars.sh for icpx",
        "shls": "put SmartHLS' bin folder on PATH",
    }.get(tools[0], "source AMD's settings64.sh")


class _Here:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, tools: Sequence[str]) -> str:
        for name in tools:
            path = os.environ.get(f"ISTHMUS_{name.upper().replace('-', '_')}") or shutil.which(name)
            if path:
                return path
        raise IsthmusError(f"none of {', '.join(tools)} is here: {bring(tools)}, or name a machine that has it: --host user@machine")

    def run(self, step: BuildStep, argv: Sequence[str], log: Path, timeout_s: int) -> int:
        return _logged(argv, self.folder / step.folder, log.resolve(), timeout_s)

    def missing(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if not (self.folder / name).exists()]

    def fetch(self, names: Iterable[str]) -> None:
        """They are here."""


class _Host:
    """The same over ssh. The folder there is named by the project, so that a build goes on where it stopped."""

    def __init__(self, folder: Path, host: str) -> None:
        if host.startswith("-") or any(character.isspace() for character in host):
            raise IsthmusError(f"--host: expected user@machine, found {host!r}")
        self.folder, self.host = folder, host
        self.there = f"isthmus-build/{project_digest(folder)[:16]}"
        sent = [name for name in (simulation.PROJECT_FOLDER, "kernel", BITSTREAM_FOLDER) if (folder / name).is_dir()]
        packed = subprocess.run(["tar", "-cf", "-", *sent], cwd=folder, capture_output=True, check=False)
        self._ssh(f"mkdir -p {self.there}/{simulation.BUILD_FOLDER} && tar -C {self.there} -xf -", packed.stdout)

    def _ssh(self, command: str, given: bytes = b"") -> bytes:
        try:
            done = subprocess.run(["ssh", "-o", "BatchMode=yes", self.host, command], input=given, capture_output=True, check=False)
        except OSError as error:
            raise IsthmusError(f"ssh could not be started: {error.strerror}") from None
        if done.returncode != 0:
            said = done.stderr.decode(errors="replace").strip().splitlines()
            raise IsthmusError(f"{self.host}: {said[-1] if said else f'ssh ended with code {done.returncode}'}")
        return done.stdout

    def find(self, tools: Sequence[str]) -> str:
        try:
            return self._ssh(f"bash -lc '{FOUND.format(tools=' '.join(tools))}'").decode().split()[-1]
        except (IsthmusError, IndexError):
            raise IsthmusError(f"{self.host} has none of {', '.join(tools)} on its PATH: let its login shell {bring(tools)}") from None

    def run(self, step: BuildStep, argv: Sequence[str], log: Path, timeout_s: int) -> int:
        if step.script:
            self._ssh(f"cat > {self.there}/{step.script}", (self.folder / step.script).read_bytes())
        place = f"{self.there}/{step.folder}" if step.folder else self.there
        command = f"cd {place} && bash -lc {shlex.quote(shlex.join(argv))}"
        return _logged(["ssh", "-o", "BatchMode=yes", self.host, command], self.folder, log, timeout_s)

    def missing(self, names: Iterable[str]) -> list[str]:
        listed = " ".join(names)
        return self._ssh(f'cd {self.there} && for name in {listed}; do [ -e "$name" ] || echo "$name"; done').decode().split() if listed else []

    def fetch(self, names: Iterable[str]) -> None:
        for name in names:
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self._ssh(f"cat {self.there}/{name}"))


def _logged(argv: Sequence[str], folder: Path, log: Path, timeout_s: int) -> int:
    with log.open("wb") as stream:
        try:
            return subprocess.run(
                argv, cwd=folder, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, timeout=timeout_s, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            raise IsthmusError(f"{Path(argv[0]).name} did not end within {timeout_s} s, its log is {log}; run the same command again") from None
        except OSError as error:
            raise IsthmusError(f"{argv[0]} could not be started: {error.strerror}") from None


if __name__ == "__main__":
    sys.exit(main())
