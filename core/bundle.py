# SPDX-License-Identifier: Apache-2.0
"""`Bundle`: a folder with `manifest.json`, the sha256 of every file in it, and a seal that says whether this user built it. numpy only."""

from __future__ import annotations

import ctypes
import hashlib
import hmac
import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from isthmus.errors import IsthmusError
from isthmus.numpy_file import read_npz
from isthmus.session import Session
from isthmus.spec import TensorSpec

SCHEMA = 1
NEEDS_BOARD = "needs the board"
MANIFEST = "manifest.json"
SEAL = "manifest.seal"
MAX_MANIFEST_BYTES = 64 * 2**20
MAX_GOLDEN_BYTES = 4 * 2**30
# What every reader of an artifact's manifest entry may count on.
ENTRY_FIELDS = ("artifact", "engine", "inputs", "outputs", "runs_here", "target", "max_lsb_allowed", "float_tolerance")


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: every file listed in the manifest was there with its sha256 when `open` returned.

    Layout: `model.onnx` (the form), `golden.npz` (raw inputs and the reference's raw outputs), `artifacts/<profile>/`, `reports/`.
    """

    root: Path
    manifest: Mapping[str, Any]

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Raises `IsthmusError`: no bundle, unknown schema, a file missing, changed, or outside the folder."""
        root = Path(path)
        manifest = _read_manifest(root)
        for name, digest in manifest["files"].items():
            _check_file(root, name, digest)
        for profile, entry in manifest["artifacts"].items():
            _check_entry(profile, entry, manifest["files"])
        return cls(root, manifest)

    # ---- parts
    @property
    def profiles(self) -> list[str]:
        return list(self.manifest["artifacts"])

    def artifact(self, profile: str) -> dict[str, Any]:
        """The manifest entry of one artifact. Raises `IsthmusError` listing the profiles there are."""
        if profile not in self.manifest["artifacts"]:
            raise IsthmusError(f"{self.root}: no artifact for {profile!r}, there are {', '.join(self.profiles)}")
        return dict(self.manifest["artifacts"][profile])

    def folder(self, profile: str) -> Path:
        return self.root / "artifacts" / profile

    @property
    def model(self) -> Path:
        """The int8 form."""
        return self.root / "model.onnx"

    def form(self, profile: str = "") -> Path | None:
        """The int8 form that an artifact computes: the bundle's, or its own where tuning took another scheme; None where it runs the float model."""
        own = self._own_reference(profile)
        if not own:
            return self.model
        return self.folder(profile) / own["form"] if own["form"] else None

    def output_specs(self, profile: str = "") -> tuple[TensorSpec, ...]:
        """The outputs that an artifact is compared by, in the form's layout."""
        own = self._own_reference(profile)
        return tuple(TensorSpec.from_json(spec) for spec in (own or self.manifest["graph"])["outputs"])

    def golden(self, profile: str = "") -> dict[str, np.ndarray]:
        """`input/<name>` and `output/<name>`: raw arrays (N, ...) in the form's layout; `label` where the samples have one.

        With a profile: its own, where the artifact computes something else than the bundle's form.
        """
        own = self._own_reference(profile)
        file = self.folder(profile) / own["golden"] if own else self.root / "golden.npz"
        return load_golden(file)

    def _own_reference(self, profile: str) -> Mapping[str, Any]:
        """Empty where the artifact computes the bundle's form."""
        return self.artifact(profile).get("reference") or {} if profile else {}

    def open_session(self, profile: str, threads: int = 1, trust: bool = False) -> Session:
        """The artifact in its engine.

        An engine that runs native code out of the bundle (a C simulation) is opened only where this user built the bundle, or `trust`.
        Raises `IsthmusError` where the artifact needs its board, its engine is missing, or the bundle is not trusted.
        """
        if threads < 1:
            raise IsthmusError(f"threads: expected at least 1, found {threads}")
        entry = self.artifact(profile)
        if not entry["runs_here"] and not self._built_since(profile, entry):
            left = "; ".join(" ".join(step["argv"]) for step in entry.get("planned", ()))
            raise IsthmusError(f"the artifact for {profile} needs the board{f': there, in artifacts/{profile}, run {left}' if left else ''}")
        name = entry["engine"]
        if not isinstance(name, str) or not name.isidentifier():
            raise IsthmusError(f"{self.root}: engine {name!r} is no engine's name")
        try:
            engine = import_module(f"isthmus.runtimes.{name}")
        except ImportError as error:
            raise IsthmusError(f"the engine {name!r} cannot be used: {error}; 'isthmus doctor' says what brings it") from error
        if getattr(engine, "RUNS_NATIVE_CODE", False) and not (trust or self.built_here()):
            raise IsthmusError(
                f"the artifact for {profile} is native code, and this user did not build {self.root}:"
                " compile it here, or pass --trust-bundle if you know where it is from"
            )
        if not hasattr(engine, "open_session"):
            raise IsthmusError(f"{self.root}: engine {name!r} is no engine's name")
        # What a board builds later stands in no manifest: its engine seals and checks it itself.
        trusted = (trust,) if getattr(engine, "SEALS_WHAT_IT_BUILDS", False) else ()
        session: Session = engine.open_session(self.folder(profile), entry, threads, *trusted)
        return session

    def why_not_here(self, profile: str, trust: bool = False) -> str:
        """Why this machine does not open the artifact; "" where it does, and where the engine that is left for the board was built in this folder, for it."""
        entry = self.artifact(profile)
        if entry["runs_here"]:
            return ""
        if not self._built_since(profile, entry):
            return NEEDS_BOARD
        try:
            check = getattr(import_module(f"isthmus.runtimes.{entry['engine']}"), "check_built", None)
            if check is not None:
                check(self.folder(profile), trust)
        except (ImportError, IsthmusError) as error:
            return str(error)
        return ""

    def _built_since(self, profile: str, entry: Mapping[str, Any]) -> bool:
        """Whether a step that was left for the board has been done in this very folder."""
        return any((self.folder(profile) / output).is_file() for step in entry.get("planned", ()) for output in step["outputs"])

    def built_here(self) -> bool:
        """Whether the manifest carries the seal of this user's own key: then its native code is this user's own."""
        seal = self.root / SEAL
        if not seal.is_file() or seal.stat().st_size > 1024 or not _key_file().is_file():
            return False
        expected = user_seal((self.root / MANIFEST).read_bytes())
        return hmac.compare_digest(seal.read_bytes().strip(), expected)

    def add_report(self, name: str, content: bytes) -> Bundle:
        """Writes `reports/<name>` and the manifest that lists it, each at once; gives the bundle as it now is."""
        sealed = self.built_here()
        with _disk_errors(self.root):
            (self.root / "reports").mkdir(exist_ok=True)
            _write_at_once(self.root / "reports" / name, content)
            files = {**self.manifest["files"], f"reports/{name}": hashlib.sha256(content).hexdigest()}
            manifest = {**self.manifest, "files": dict(sorted(files.items()))}
            _write_manifest(self.root, manifest, sealed)
        return Bundle(self.root, manifest)


class BundleWriter:
    """Makes a bundle in a hidden folder beside its place and swaps it in at the end: a killed compile leaves the old bundle or the new one.

    Use as a context manager: fill `folder`, `seal(manifest)`, add reports to what that gives, `commit` it. Without a commit nothing stays.
    """

    def __init__(self, path: str | Path, force: bool = False) -> None:
        self.path = Path(path).absolute()
        self.force = force
        self.folder = self.path.parent / f".{self.path.name}.partial-{os.getpid()}"

    def __enter__(self) -> BundleWriter:
        if self.path.exists() and not self.path.is_dir():
            raise IsthmusError(f"{self.path}: is a file; give a folder for the bundle (-o)")
        if self.path.is_dir() and any(self.path.iterdir()):
            if not self.force:
                raise IsthmusError(f"{self.path}: exists; pass --force to replace it, or -o for another place")
            if not (self.path / MANIFEST).is_file():
                raise IsthmusError(f"{self.path}: is no bundle, and is not replaced even with --force; remove it yourself or give another place")
        with _disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _remove_left_overs(self.path)
            self.folder.mkdir()
            (self.folder / "artifacts").mkdir()
            (self.folder / "reports").mkdir()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        cause = error.__cause__ if isinstance(error, IsthmusError) else error
        if isinstance(cause, OSError):
            raise _disk_sentence(self.path, cause) from error

    def seal(self, manifest: Mapping[str, Any]) -> Bundle:
        """Hashes every file, writes the manifest and its seal. Gives the bundle as it stands in its hidden folder."""
        files = {}
        for file in sorted(self.folder.rglob("*")):
            if file.is_symlink():
                raise IsthmusError(f"{file.name}: a link cannot be part of a bundle")
            if file.is_file():
                files[file.relative_to(self.folder).as_posix()] = _sha256(file)
                _sync(file)
        complete = {"schema": SCHEMA, **manifest, "files": files}
        _write_manifest(self.folder, complete, sealed=True)
        return Bundle(self.folder, complete)

    def commit(self, sealed: Bundle) -> Bundle:
        """Swaps the sealed bundle into its place and gives it there."""
        _sync(self.folder)
        _swap(self.folder, self.path)
        return Bundle(self.path, sealed.manifest)


def load_golden(file: Path) -> dict[str, np.ndarray]:
    """The arrays of a golden file. Raises `IsthmusError` on damage, and where it unpacks to more than `MAX_GOLDEN_BYTES`."""
    return read_npz(file, MAX_GOLDEN_BYTES)


def _read_manifest(root: Path) -> dict[str, Any]:
    file = root / MANIFEST
    if not root.exists():
        raise IsthmusError(f"{root}: no such bundle")
    if not file.is_file():
        raise IsthmusError(f"{root}: no bundle: it has no {MANIFEST}")
    if file.stat().st_size > MAX_MANIFEST_BYTES:
        raise IsthmusError(f"{file}: {file.stat().st_size} bytes, a manifest ends at {MAX_MANIFEST_BYTES}")
    try:
        manifest = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise IsthmusError(f"{file}: not JSON: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        found = manifest.get("schema") if isinstance(manifest, dict) else None
        raise IsthmusError(
            f"{file}: schema {found!r}; this version reads schema {SCHEMA}: use the isthmus that wrote it ({_writer(manifest)}), or compile again"
        )
    for key in ("files", "artifacts", "graph"):
        if not isinstance(manifest.get(key), dict):
            raise IsthmusError(f"{file}: field {key!r} is missing or no table; compile again")
    return manifest


def _writer(manifest: Any) -> str:
    return str(manifest.get("isthmus", "unknown version")) if isinstance(manifest, dict) else "unknown version"


def _check_file(root: Path, name: Any, digest: Any) -> None:
    parts = PurePosixPath(name).parts if isinstance(name, str) else ()
    if not parts or PurePosixPath(name).is_absolute() or ".." in parts or "\\" in name or "\0" in name:
        raise IsthmusError(f"{root}: the manifest names {name!r}, which is no path inside the bundle")
    path = root
    for part in parts:
        path = path / part
        if path.is_symlink():
            raise IsthmusError(f"{root}: {name} is or lies behind a link")
    if not path.is_file():
        raise IsthmusError(f"{root}: {name} is missing; copy the bundle again or compile it again")
    if _sha256(path) != digest:
        raise IsthmusError(f"{root}: {name} is not what was compiled (its sha256 differs); copy the bundle again or compile it again")


def _check_entry(profile: Any, entry: Any, files: Mapping[str, Any]) -> None:
    if not isinstance(entry, dict) or any(key not in entry for key in ENTRY_FIELDS):
        raise IsthmusError(f"artifact {profile!r}: its manifest entry is not complete; compile again")
    if f"artifacts/{profile}/{entry['artifact']}" not in files:
        raise IsthmusError(f"artifact {profile!r}: {entry['artifact']!r} is not among the bundle's files; compile again")
    if entry.get("reference") is not None:
        _check_reference(profile, entry["reference"], files)


def _check_reference(profile: Any, own: Any, files: Mapping[str, Any]) -> None:
    if not isinstance(own, dict) or not isinstance(own.get("outputs"), list) or "form" not in own:
        raise IsthmusError(f"artifact {profile!r}: field 'reference' of its manifest entry is not complete; compile again")
    for name in (own.get("golden"), *([own["form"]] if own["form"] is not None else [])):
        if f"artifacts/{profile}/{name}" not in files:
            raise IsthmusError(f"artifact {profile!r}: {name!r} is not among the bundle's files; compile again")


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()  # hashlib.file_digest is not there in a board's Python 3.10
    with file.open("rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _write_manifest(root: Path, manifest: Mapping[str, Any], sealed: bool) -> None:
    content = json.dumps(manifest, indent=1, sort_keys=False).encode()
    if sealed:
        # The seal goes first: between the two writes the bundle counts as unsealed, never as falsely sealed.
        _write_at_once(root / SEAL, user_seal(content) + b"\n")
    _write_at_once(root / MANIFEST, content)


def _write_at_once(file: Path, content: bytes) -> None:
    partial = file.with_name(f".{file.name}.partial-{os.getpid()}")
    try:
        with partial.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _swap(new: Path, place: Path) -> None:
    """`new` takes the place of `place` in one step; what stood there is then removed."""
    if not place.exists():
        os.rename(new, place)
    elif _exchange(new, place):
        shutil.rmtree(new, ignore_errors=True)
    else:
        # No exchanging rename on this system: for an instant only the set-aside old bundle exists.
        aside = place.with_name(f".{place.name}.replaced-{os.getpid()}")
        os.rename(place, aside)
        os.rename(new, place)
        shutil.rmtree(aside, ignore_errors=True)
    _sync(place.parent)


def _exchange(a: Path, b: Path) -> bool:
    """Linux renameat2(RENAME_EXCHANGE); False where the system or file system has none."""
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    at_fdcwd, exchange = -100, 2
    return bool(libc.renameat2(at_fdcwd, os.fsencode(a), at_fdcwd, os.fsencode(b), exchange) == 0)


def _remove_left_overs(path: Path) -> None:
    """What killed compiles of the same bundle left; a living one's folder stays."""
    for folder in path.parent.glob(f".{path.name}.partial-*"):
        process = folder.name.rpartition("-")[2]
        if process.isdigit() and not _alive(int(process)):
            shutil.rmtree(folder, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return process != os.getpid()


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _disk_sentence(path, error) from error


def _disk_sentence(path: Path, error: OSError) -> IsthmusError:
    return IsthmusError(f"{path}: cannot be written: {error.strerror or error}; nothing half-written is left; free space or give another place (-o)")


# ---- the seal
def _key_file() -> Path:
    home = os.environ.get("XDG_DATA_HOME") or os.path.join(os.path.expanduser("~"), ".local", "share")
    return Path(home) / "isthmus" / "seal.key"


def user_seal(content: bytes) -> bytes:
    """HMAC-SHA256 with this user's key, which is made at first use and never leaves its file. Seals manifests, and native code in a cache."""
    file = _key_file()
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            pass  # another process was faster; its key is as good
        else:
            with os.fdopen(handle, "wb") as stream:
                stream.write(secrets.token_bytes(32))
    return hmac.new(file.read_bytes(), content, hashlib.sha256).hexdigest().encode()
