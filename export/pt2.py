# SPDX-License-Identifier: Apache-2.0
"""Reads a `.pt2` (torch.export.save) without trusting it.

`torch.export.load` of torch 2.13 must not see a stranger's file: it unpickles weights, constants and sample inputs (falling back to
`weights_only=False`), loads compiled libraries (AOTInductor), passes shape expressions to sympy's eval, and names and guards out of
the file end up in generated Python code. So the archive is written anew from the parts a plain network needs, each checked: raw
tensors, a graph of ATen operators whose strings cannot be code, sample inputs that load with `weights_only=True`. Only that copy
is loaded.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

from isthmus.errors import IsthmusError

ARCHIVE_NOTES = ("archive_format", "archive_version", "byteorder", ".data/version")
PAYLOADS = re.compile(r"data/(weights/(weight_\d+|model_weights_config\.json)|constants/(tensor_\d+|model_constants_config\.json))")
GRAPH, SAMPLES = "models/model.json", "data/sample_inputs/model.pt"
IGNORED = re.compile(r"extra/.*|\.data/serialization_id")
MAX_ARCHIVE_BYTES = 2 * 2**30

OPERATOR = re.compile(r"torch\.ops\.aten\.(?!from_file\b)\w+\.\w+|_operator\.(mul|add|sub|floordiv|getitem)")
WORD = re.compile(r"[\w.+\- ]*")  # names: no bracket, quote, sign of assignment or line break that could make it code
SIZE = re.compile(r"-?\d+|[su]\d+|Symbol\('[su]\d+'(, (positive|nonnegative|integer)=True)*\)")  # a number, or one open dimension
TREE = re.compile(r"[\w\s.,:\[\]{}\"\-]*")  # JSON inside a string: the structure of arguments
TREE_KEYS = ("in_spec", "out_spec")


def load_pt2(path: str | Path) -> torch.export.ExportedProgram:
    """The exported program in a `.pt2` file, in evaluation mode. Runs nothing out of the file. Raises `IsthmusError` naming what is wrong."""
    file = Path(path)
    if not file.is_file():
        raise IsthmusError(f"{file}: no such file; give a .pt2 written by torch.export.save")
    if file.stat().st_size > MAX_ARCHIVE_BYTES:
        raise IsthmusError(f"{file}: {file.stat().st_size} bytes, at most {MAX_ARCHIVE_BYTES} are read; export it to ONNX yourself")
    try:
        with zipfile.ZipFile(io.BytesIO(file.read_bytes())) as archive:
            clean = _clean_copy(file, archive)
    except (zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise IsthmusError(f"{file}: not a .pt2 archive, or cut short ({error}); write it with torch.export.save") from None
    try:
        return torch.export.load(io.BytesIO(clean))
    except Exception as error:  # noqa: BLE001 - the loader raises whatever a changed format makes it stumble over
        raise IsthmusError(f"{file}: torch {torch.__version__} cannot read it ({_first_line(error)}); export it with this torch version") from None


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]


def _clean_copy(file: Path, archive: zipfile.ZipFile) -> bytes:
    """The archive, written anew from checked parts."""
    entries = _entries(file, archive)
    missing = [name for name in (*ARCHIVE_NOTES, GRAPH, SAMPLES) if name not in entries]
    if missing:
        raise IsthmusError(f"{file}: {missing[0]} is missing; write the file with torch.export.save of torch 2.9 or newer")
    copy = io.BytesIO()
    with zipfile.ZipFile(copy, "w", zipfile.ZIP_STORED) as out:
        for name, info in entries.items():
            if IGNORED.fullmatch(name):
                continue
            data = archive.read(info)
            if name.endswith(".json"):
                data = _clean_graph(file, data) if name == GRAPH else _clean_config(file, name, data)
            elif name == SAMPLES:
                data = _clean_samples(file, data)
            out.writestr(f"model/{name}", data)
    return copy.getvalue()


def _entries(file: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """By name behind the archive's own folder; each is of a known kind, and there once."""
    entries: dict[str, zipfile.ZipInfo] = {}
    total = 0
    for info in archive.infolist():
        name = info.filename.partition("/")[2]
        if name in entries:
            raise IsthmusError(f"{file}: holds {name} twice; write it with torch.export.save")
        if not (name in ARCHIVE_NOTES or name in (GRAPH, SAMPLES) or PAYLOADS.fullmatch(name) or IGNORED.fullmatch(name)):
            found = f"holds {name or info.filename}, which is no plain tensor or graph (a compiled or custom object could run code)"
            raise IsthmusError(f"{file}: {found}; export the model without it, or to ONNX")
        total += info.file_size
        if total > MAX_ARCHIVE_BYTES:
            raise IsthmusError(f"{file}: unpacks to more than {MAX_ARCHIVE_BYTES} bytes")
        entries[name] = info
    return entries


def _json(file: Path, name: str, data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise IsthmusError(f"{file}: {name} is not JSON; write the file with torch.export.save") from None


def _clean_config(file: Path, name: str, data: bytes) -> bytes:
    config = _json(file, name, data)
    payloads = config.get("config") if isinstance(config, dict) else None
    if not isinstance(payloads, dict) or not all(isinstance(payload, dict) for payload in payloads.values()):
        raise IsthmusError(f"{file}: {name} is no list of tensors; write the file with torch.export.save")
    for key, payload in payloads.items():
        if payload.get("use_pickle") is not False:
            raise IsthmusError(f"{file}: tensor {key!r} is stored as a pickle, which could run code; export the model with plain dense tensors, or to ONNX")
    _check_strings(file, payloads, "")
    return json.dumps(config).encode()


def _clean_samples(file: Path, data: bytes) -> bytes:
    try:
        samples = torch.load(io.BytesIO(data), weights_only=True) if data else None
    except Exception as error:  # noqa: BLE001 - the unpickler's errors are of many types
        found = f"its sample inputs are more than tensors, which could run code ({_first_line(error)})"
        raise IsthmusError(f"{file}: {found}; export with plain tensors as inputs") from None
    if samples is None:
        return b""
    copy = io.BytesIO()
    torch.save(samples, copy)
    return copy.getvalue()


def _clean_graph(file: Path, data: bytes) -> bytes:
    program = _json(file, GRAPH, data)
    try:
        nodes = program["graph_module"]["graph"]["nodes"]
        program["guards_code"] = []
        program["graph_module"]["metadata"] = {}
        for node in nodes:
            node["metadata"] = {}
            _check_operator(file, node)
    except (KeyError, TypeError, AttributeError):
        raise IsthmusError(f"{file}: {GRAPH} does not have the shape of torch {torch.__version__}; export it with this torch version") from None
    _check_strings(file, program, "")
    return json.dumps(program).encode()


def _check_operator(file: Path, node: dict[str, Any]) -> None:
    target = node["target"]
    if not isinstance(target, str) or not OPERATOR.fullmatch(target):
        found = f"node {node.get('name')!r} calls {target!r}, expected operators of torch.ops.aten only"
        raise IsthmusError(f"{file}: {found}; export without custom operators and control flow")
    for argument in node["inputs"]:
        if argument["name"] in ("train", "training") and argument["arg"].get("as_bool") is True:
            raise IsthmusError(f"{file}: node {node.get('name')!r} ({target}) is in training mode; call .eval() on the module before torch.export.export")


def _check_strings(file: Path, value: Any, key: str) -> None:
    """Raises where a string anywhere could be more than a name, a size or an argument structure."""
    if isinstance(value, dict):
        for name, inner in value.items():
            _check_strings(file, name, "")
            _check_strings(file, inner, name)
    elif isinstance(value, list):
        for inner in value:
            _check_strings(file, inner, key)
    elif isinstance(value, str):
        if key == "expr_str":
            if not SIZE.fullmatch(value):
                raise IsthmusError(f"{file}: a size in its graph is computed by {value[:60]!r}; export the model with static shapes")
            return
        pattern = TREE if key in TREE_KEYS else WORD
        if not pattern.fullmatch(value):
            raise IsthmusError(f"{file}: the text {value[:60]!r} in its graph is no plain name, and could run code; export the model with plain names")
