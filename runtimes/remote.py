# SPDX-License-Identifier: Apache-2.0
"""A board over ssh: brings one artifact of a bundle and the runtime there, runs it, brings the result home. Uses the OpenSSH client program.

Nothing unquoted reaches a shell on either side: the remote command is one word list, each word quoted. Host keys are checked strictly; an
unknown or changed key ends it. Files travel to `incoming/<sha256>` and are appended to, so a cut transfer goes on where it stopped, and are
checked there before they are used. What comes back is data: bounded in size, read as JSON.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import shlex
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import isthmus
from isthmus.bundle import Bundle
from isthmus.errors import IsthmusError, VerificationError
from isthmus.measurement import Measurement

ROOT = ".cache/isthmus"
REPLY_BYTES = 2**27
CONNECT_TIMEOUT_S = 15
COMMAND_TIMEOUT_S = 600.0
INSTALL_TIMEOUT_S = 1800.0
BUILD_TIMEOUT_S = 7200.0
SSH_FAILED = 255  # what ssh itself ends with where the connection fails or ends
BLOCK_BYTES = 2**18

# user@board, board, an address or a name of ~/.ssh/config: nothing that ssh could take for an option.
_HOST = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9\[][A-Za-z0-9_.:\[\]%-]*")
# What brings each engine to a board, and the module that shows whether it is there.
ENGINES = {
    "tflite": ("ai_edge_litert", "ai-edge-litert"),
    "onnxruntime": ("onnxruntime", "onnxruntime"),
    "openvino": ("openvino", "openvino"),
    "tensorrt": ("tensorrt", ""),
    "null": ("numpy", ""),
}
# What of the core a device needs beside `runtimes`.
DEVICE_FILES = ("__init__", "errors", "spec", "session", "bundle", "numpy_file", "compare", "bench", "measurement", "conditions", "affinity", "loadgen")

Say = Callable[[str, float | None], None]


class LostConnectionError(IsthmusError):
    """ssh could not connect, or the connection ended."""


@dataclass(frozen=True)
class Host:
    """Where a board is. `options` are further words for ssh (`-i key`, `-F config`), from the program, never from a file."""

    address: str
    port: int | None = None
    python: str = "python3"
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not _HOST.fullmatch(self.address):
            raise IsthmusError(f"--host {self.address!r}: expected user@board, a name or an address")
        if self.port is not None and not 0 < self.port < 65536:
            raise IsthmusError(f"--port {self.port}: expected 1 to 65535")

    @classmethod
    def named(cls, address: str, port: int | None = None, python: str = "python3", identity: Path | None = None) -> Host:
        """As the command line names it."""
        if identity is not None and not identity.is_file():
            raise IsthmusError(f"--identity {identity}: no such file")
        return cls(address, port, python, ("-i", str(identity)) if identity is not None else ())

    def argv(self, words: Sequence[str]) -> list[str]:
        """The local command that runs `words` on the board."""
        program = shutil.which("ssh")
        if program is None:
            raise IsthmusError("ssh is not on the PATH: install the OpenSSH client")
        strict = ["-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=yes", "-o", f"ConnectTimeout={CONNECT_TIMEOUT_S}", "-o", "ServerAliveInterval=10"]
        port = ["-p", str(self.port)] if self.port is not None else []
        return [program, "-T", *strict, *port, *self.options, "--", self.address, shlex.join(words)]


def measure_on(bundle: Bundle, profile: str, host: Host, arguments: Sequence[str] = (), say: Say = lambda text, share: None) -> Measurement:
    """Verifies the artifact on the board, measures it there, gives the measurement. `arguments` are those of `python -m isthmus.runtimes bench`.

    Raises `IsthmusError` (no connection, an unknown key, another architecture, no room, an engine that cannot be installed) and
    `VerificationError` where the board computes something else than the reference.
    """
    python, folder = _prepared(bundle, profile, host, say)
    say(f"{host.address}: verifying", None)
    code, reply = _json(host, [python, "-m", "isthmus.runtimes", "verify", folder, "-t", profile], COMMAND_TIMEOUT_S)
    if code != 0:
        worst: dict[str, Any] = next((row for row in reply.get("verification", []) if not row.get("passed")), {})
        raise VerificationError(
            f"{profile} on {host.address}: {worst.get('tensor')!r} differs from the reference in {worst.get('mismatched')} of {worst.get('compared')} elements"
        )
    say(f"{host.address}: measuring", None)
    _, reply = _json(host, [python, "-m", "isthmus.runtimes", "bench", folder, "-t", profile, *arguments], COMMAND_TIMEOUT_S)
    reply.pop("profile", None)
    return Measurement.from_json(reply)


def _prepared(bundle: Bundle, profile: str, host: Host, say: Say) -> tuple[str, str]:
    """(Python of the board's environment, folder of the bundle there)."""
    entry = bundle.artifact(profile)
    if entry["engine"] not in ENGINES:
        raise IsthmusError(f"{profile}: its engine {entry['engine']!r} does not run on a board over ssh")
    archive, wheel = _archive(bundle, profile), runtime_wheel()
    sent = {_digest(content): content for content in (archive, wheel)}
    say(f"{host.address}: connecting", None)
    sizes = [word for digest, content in sent.items() for word in (digest, str(len(content)))]
    board = _board(host, ["look", ROOT, *sizes], CONNECT_TIMEOUT_S + 60)
    _check_board(board, entry, profile, host, sum(map(len, sent.values())))
    for digest, content in sent.items():
        _send(host, digest, content, int(board["have"][digest]), say)
    folder = _board(host, ["unpack", ROOT, _digest(archive)], COMMAND_TIMEOUT_S)["folder"]
    placed = _board(host, ["wheel", ROOT, _digest(wheel), f"isthmus-{isthmus.__version__}-py3-none-any.whl"], COMMAND_TIMEOUT_S)["file"]
    say(f"{host.address}: making the environment", None)
    module, distribution = ENGINES[entry["engine"]]
    python = _board(host, ["environment", ROOT, placed, module, distribution], INSTALL_TIMEOUT_S)["python"]
    if not entry["runs_here"]:
        _built(host, [python, "-m", "isthmus.runtimes", "build", folder, "-t", profile, "--wait"], say)
    return str(python), str(folder)


def _built(host: Host, words: Sequence[str], say: Say) -> None:
    """What only the board can build, built there: minutes the first time, nothing where it is there already."""
    say(f"{host.address}: building the engines, which takes minutes the first time", None)
    try:
        _json(host, words, BUILD_TIMEOUT_S)
    except LostConnectionError as error:
        raise LostConnectionError(f"{error}; the build goes on there: the same command waits for it and goes on from it") from None


def _check_board(board: Mapping[str, Any], entry: Mapping[str, Any], profile: str, host: Host, size_bytes: int) -> None:
    if not board["enough"]:
        raise IsthmusError(f"{host.address}: Python {board['python']}, at least 3.10 is needed: name a newer one with --board-python")
    if entry.get("arch", "any") not in ("any", board["machine"]):
        raise IsthmusError(f"{host.address} is a {board['machine']}, the profile {profile} is for {entry['arch']}: a figure of it would carry a wrong name")
    if board["free_bytes"] < 4 * size_bytes:
        raise IsthmusError(f"{host.address}: {board['free_bytes']:,} bytes are free, some {4 * size_bytes:,} are needed")


# ---- what travels
def _archive(bundle: Bundle, profile: str) -> bytes:
    """The bundle with one artifact, as tar: the same bytes for the same bundle, so that a cut transfer can go on."""
    kept = {name: digest for name, digest in bundle.manifest["files"].items() if name == "golden.npz" or name.startswith(f"artifacts/{profile}/")}
    manifest = {**bundle.manifest, "artifacts": {profile: bundle.artifact(profile)}, "files": kept}
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name in sorted(kept):
            _add(archive, name, (bundle.root / name).read_bytes())
        _add(archive, "manifest.json", json.dumps(manifest, sort_keys=True).encode())
    return out.getvalue()


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(content), 0o600
    archive.addfile(member, io.BytesIO(content))


def runtime_wheel() -> bytes:
    """A wheel of `isthmus.runtimes` and what it needs of the core, from the installed files: the same bytes for the same version."""
    package, runtimes = files("isthmus"), files("isthmus.runtimes")
    content = {f"isthmus/{name}.py": package.joinpath(f"{name}.py").read_bytes() for name in DEVICE_FILES}
    content |= {f"isthmus/runtimes/{name}": data for name, data in _python_files(runtimes)}
    information = f"isthmus-{isthmus.__version__}.dist-info"
    content[f"{information}/METADATA"] = f"Metadata-Version: 2.1\nName: isthmus\nVersion: {isthmus.__version__}\nRequires-Dist: numpy\n".encode()
    content[f"{information}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: isthmus\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    content[f"{information}/RECORD"] = "".join(f"{name},,\n" for name in [*content, f"{information}/RECORD"]).encode()
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, data in content.items():
            wheel.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data)
    return out.getvalue()


def _python_files(folder: Any, prefix: str = "") -> list[tuple[str, bytes]]:
    found = []
    for item in sorted(folder.iterdir(), key=lambda item: item.name):
        if item.is_dir() and item.name != "__pycache__":
            found += _python_files(item, f"{prefix}{item.name}/")
        elif item.name.endswith(".py"):
            found.append((f"{prefix}{item.name}", item.read_bytes()))
    return found


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# ---- over the wire
def _send(host: Host, digest: str, content: bytes, have: int, say: Say) -> None:
    """Appends what is missing to `incoming/<digest>`."""
    if have < 0 or have >= len(content):  # there already
        return
    process = subprocess.Popen(
        host.argv(["sh", "-c", 'cat >> "$HOME/$1"', "sh", f"{ROOT}/incoming/{digest}"]),
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None and process.stderr is not None
    try:
        for start in range(have, len(content), BLOCK_BYTES):
            say(f"{host.address}: sending", start / len(content))
            process.stdin.write(content[start : start + BLOCK_BYTES])
        process.stdin.close()
    except BrokenPipeError:
        pass  # ssh is gone: its exit code and words say why
    except BaseException:
        process.kill()
        process.wait()
        raise
    words = process.stderr.read().decode(errors="replace")
    process.stderr.close()
    if process.wait() != 0:
        raise IsthmusError(f"{_why(host, words)}; the transfer was cut: the same command goes on where it stopped")


def _board(host: Host, arguments: Sequence[str], timeout_s: float) -> dict[str, Any]:
    """What `isthmus/runtimes/board.py` says on the board. It travels on stdin: nothing of it lies there."""
    script = files("isthmus.runtimes").joinpath("board.py").read_bytes()
    code, reply = _json(host, [host.python, "-", *arguments], timeout_s, script)
    if code != 0 or "error" in reply:
        raise IsthmusError(f"{host.address}: {reply.get('error', f'exit code {code}')}")
    return reply


def _json(host: Host, words: Sequence[str], timeout_s: float, stdin: bytes = b"") -> tuple[int, dict[str, Any]]:
    """(exit code, the JSON object on the last line of stdout). Raises `IsthmusError` on anything else."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        try:
            done = subprocess.run(host.argv(words), input=stdin, stdout=out, stderr=err, timeout=timeout_s, check=False)
        except subprocess.TimeoutExpired:
            raise IsthmusError(f"{host.address}: no answer within {timeout_s:.0f} s") from None
        size = out.tell() if out.tell() else out.seek(0, 2)
        if size > REPLY_BYTES:
            raise IsthmusError(f"{host.address}: answered with {size:,} bytes, at most {REPLY_BYTES:,} are read")
        out.seek(0)
        err.seek(0)
        printed, words_of_error = out.read(), err.read(2**16).decode(errors="replace")
    lines = printed.decode(errors="replace").strip().splitlines()
    try:
        reply = json.loads(lines[-1]) if lines else None
    except (ValueError, RecursionError):
        reply = None
    if not isinstance(reply, dict):
        if done.returncode == SSH_FAILED:
            raise LostConnectionError(_why(host, words_of_error))
        raise IsthmusError(_why(host, words_of_error) if done.returncode else f"{host.address}: answered something else than expected: {lines[-1:]!r:.200}")
    return done.returncode, reply


def _why(host: Host, words: str) -> str:
    """One sentence out of what ssh printed."""
    lines = [line.strip() for line in words.splitlines() if line.strip() and not set(line.strip()) <= set("@ ")]
    text = " ".join(lines)
    if "HOST IDENTIFICATION HAS CHANGED" in text:
        return f"{host.address}: its host key is not the one this machine knows: another board, or somebody between; see ssh-keygen -R"
    if "Host key verification failed" in text:
        return f"{host.address}: its host key is not known here: connect once by hand (ssh {host.address}) and compare it"
    if "Permission denied" in text:
        return f"{host.address}: the board does not let this user in: put a key there first (ssh-copy-id {host.address})"
    isthmus_says = next((line.removeprefix("isthmus: ") for line in reversed(lines) if line.startswith("isthmus: ")), "")
    return f"{host.address}: {isthmus_says or (lines[-1] if lines else 'the connection ended')}"[:500]


__all__ = ["Host", "measure_on", "runtime_wheel"]
