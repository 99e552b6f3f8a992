# SPDX-License-Identifier: Apache-2.0
"""What a board built beside the manifest: engines, their records, their seals, and which of them runs.

`build_engine.py` writes `model.engine` and `model.engine.json` (its record) into the artifact's folder. No manifest lists them: a bundle stays what
was compiled. Reading an engine runs code of the file, so `python -m isthmus.runtimes build` seals the record with this user's own key
(`model.engine.seal`), as a bundle's own manifest is sealed where it was compiled.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from isthmus.bundle import user_seal
from isthmus.errors import IsthmusError

PLAN = "engines.json"
SCRIPT = "build_engine.py"
CHOSEN = "chosen.json"
RECORD_SCHEMA = 1
MAX_RECORD_BYTES = 2**20
BUILD = "python -m isthmus.runtimes build BUNDLE"
# Of the script that this version's compiler puts beside the models: it is run without being trusted. A test compares the two.
SCRIPT_SHA256 = "d03947d612c2999407cc6bff1aeb41fd4954a9b17e5be3a49f782d1081dd07f9"

_ENGINE_FIELDS = {"name": str, "model": str, "output": str, "precision": str, "half": bool, "ranges": str, "dla": bool}
_RECORD_FIELDS = {"sha256": str, "size_bytes": int, "model_sha256": str, "module": str, "tensorrt": str, "gpu": dict, "key": str}


def planned_engines(folder: Path) -> list[dict[str, Any]]:
    """The engines of `engines.json`, the artifact's own first. Raises `IsthmusError` where the file is not there or not what a compile writes."""
    plan = _read(folder / PLAN, "compile the bundle again")
    engines = plan.get("engines")
    sound = isinstance(engines, list) and bool(engines) and all(isinstance(one, dict) and _has(one, _ENGINE_FIELDS) and _inside(one) for one in engines)
    if not sound or plan.get("schema") != 1:
        raise IsthmusError(f"{folder / PLAN}: not the plan of a TensorRT build that this version reads; compile the bundle again")
    return list(engines)  # type: ignore[arg-type]  # a list, as just seen


def planned_engine(folder: Path, name: str = "") -> dict[str, Any]:
    """One of them by name, the first without. Raises `IsthmusError` listing the names there are."""
    engines = planned_engines(folder)
    found = [one for one in engines if one["name"] == name] if name else engines[:1]
    if not found:
        raise IsthmusError(f"{folder}: no engine is called {name!r}, there are {', '.join(one['name'] for one in engines)}")
    return found[0]


def chosen_engine(folder: Path, name: str = "") -> dict[str, Any]:
    """The engine called `name`; without a name the one that `bench` chose here, else the first."""
    file = folder / CHOSEN
    if name or not file.is_file():
        return planned_engine(folder, name)
    chosen = _read(file, "remove it, or run bench again").get("engine")
    if not isinstance(chosen, str) or not chosen:
        raise IsthmusError(f"{file}: names no engine; remove it, or run bench again")
    return planned_engine(folder, chosen)


def is_built(folder: Path, planned: dict[str, Any]) -> bool:
    return (folder / planned["output"]).is_file() and _record_file(folder, planned).is_file()


def read_record(folder: Path, planned: dict[str, Any]) -> dict[str, Any]:
    """The record of an engine that stands there. Raises `IsthmusError` where none is built, or its record is none."""
    if not is_built(folder, planned):
        raise IsthmusError(f"{folder / planned['output']}: the {planned['name']} engine is not built yet: on the board run '{BUILD}'")
    file = _record_file(folder, planned)
    record = _read(file, f"build it again: '{BUILD} --rebuild'")
    if not _has(record, _RECORD_FIELDS) or record.get("schema") != RECORD_SCHEMA:
        raise IsthmusError(f"{file}: not a record that this version reads; build the engine again: '{BUILD} --rebuild'")
    return record


def checked_engine(folder: Path, planned: dict[str, Any], trust: bool = False) -> tuple[bytes, dict[str, Any]]:
    """(the engine's bytes, its record), once everything that its record says is so on this machine. Raises `IsthmusError` with what is not."""
    record = read_record(folder, planned)
    file = folder / planned["output"]
    content = _content(file, record)
    again = f"build it again: '{BUILD} --rebuild'"
    if hashlib.sha256((folder / planned["model"]).read_bytes()).hexdigest() != record["model_sha256"]:
        raise IsthmusError(f"{file}: was built from another {planned['model']}; {again}")
    if not (trust or is_sealed(folder, planned)):
        raise IsthmusError(f"{file}: this user's '{BUILD}' did not build it, and reading an engine runs code of it; {again}, or pass --trust-bundle")
    _check_machine(file, record, again)
    return content, record


def _content(file: Path, record: dict[str, Any]) -> bytes:
    size = file.stat().st_size
    if size < record["size_bytes"]:
        raise IsthmusError(f"{file}: {size:,} bytes, its record says {record['size_bytes']:,}: it is cut short; build it again: '{BUILD} --rebuild'")
    content = file.read_bytes()
    if hashlib.sha256(content).hexdigest() != record["sha256"]:
        raise IsthmusError(f"{file}: is not what was built (its sha256 differs); build it again: '{BUILD} --rebuild'")
    return content


def _check_machine(file: Path, record: dict[str, Any], again: str) -> None:
    from isthmus.runtimes.tensorrt.api import NAMES, find_module
    from isthmus.runtimes.tensorrt.cuda import Cuda

    trt = find_module(record["module"])
    if record["tensorrt"] != trt.__version__:
        name = NAMES[record["module"]]
        raise IsthmusError(
            f"{file}: was built by {name} {record['tensorrt']}, this machine has {trt.__version__}, and an engine belongs to one version; {again}"
        )
    cuda = Cuda()
    try:
        here = cuda.gpu()
    finally:
        cuda.close()
    check_gpu(file, record["gpu"], here, again)


def check_gpu(file: Path, built_for: dict[str, Any], here: dict[str, Any], again: str) -> None:
    """An engine is for one GPU; one of TensorRT-RTX, built ahead of time, is for every GPU of its compute capability. Raises `IsthmusError`."""
    same = built_for == here or (not built_for.get("name") and built_for.get("sm") == here["sm"])
    if not same:
        raise IsthmusError(f"{file}: was built for {_gpu(built_for)}, this machine has {_gpu(here)}; {again}")


def _gpu(gpu: dict[str, Any]) -> str:
    name, count = gpu.get("name") or "any GPU", gpu.get("multiprocessors")
    return f"{name} (SM {gpu.get('sm')}{f', {count} multiprocessors' if count else ''})"


# ---- seals and choice
def is_sealed(folder: Path, planned: dict[str, Any]) -> bool:
    """Whether this user's `build` sealed the record that stands there."""
    record, seal = _record_file(folder, planned), _seal_file(folder, planned)
    if not seal.is_file() or seal.stat().st_size > 1024 or not record.is_file():
        return False
    return hmac.compare_digest(seal.read_bytes().strip(), user_seal(record.read_bytes()))


def seal(folder: Path, planned: dict[str, Any]) -> None:
    """Says that this user built the engine. Raises `IsthmusError` where the file is not what its record says."""
    _content(folder / planned["output"], read_record(folder, planned))
    write_at_once(_seal_file(folder, planned), user_seal(_record_file(folder, planned).read_bytes()) + b"\n")


def choose(folder: Path, name: str, why: dict[str, Any]) -> None:
    """From now on `open_session` opens this engine where none is named."""
    write_at_once(folder / CHOSEN, (json.dumps({"engine": name, **why}, indent=1) + "\n").encode())


def write_at_once(file: Path, content: bytes) -> None:
    handle, partial = tempfile.mkstemp(dir=file.parent, prefix=f"{file.name}.partial-")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, file)
    except BaseException:
        os.unlink(partial)
        raise


# ---- reading what nobody vouches for
def _read(file: Path, what_to_do: str) -> dict[str, Any]:
    if not file.is_file():
        raise IsthmusError(f"{file}: no such file; {what_to_do}")
    if file.stat().st_size > MAX_RECORD_BYTES:
        raise IsthmusError(f"{file}: {file.stat().st_size:,} bytes, at most {MAX_RECORD_BYTES:,} are read; {what_to_do}")
    try:
        found = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise IsthmusError(f"{file}: not JSON ({str(error)[:100]}); {what_to_do}") from None
    if not isinstance(found, dict):
        raise IsthmusError(f"{file}: expected a table, found {type(found).__name__}; {what_to_do}")
    return found


def _has(table: dict[str, Any], fields: dict[str, type]) -> bool:
    return all(type(table.get(name)) is kind for name, kind in fields.items())


def _inside(planned: dict[str, Any]) -> bool:
    """Every file it names lies in the folder itself."""
    return all(Path(planned[name]).name == planned[name] != ".." for name in ("model", "output", "ranges")) and bool(planned["model"] and planned["output"])


def _record_file(folder: Path, planned: dict[str, Any]) -> Path:
    return folder / f"{planned['output']}.json"


def _seal_file(folder: Path, planned: dict[str, Any]) -> Path:
    return folder / f"{planned['output']}.seal"
