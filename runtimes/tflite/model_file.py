# SPDX-License-Identifier: Apache-2.0
"""Is this file a whole `.tflite`? The engines follow every offset and index in it without a look, and a wrong one ends the process: so look first.

Walks the FlatBuffer's tables as TensorFlow's schema version 3 lays them out, on the standard library alone: every offset inside the file, every
index inside its list. What an operator's numbers mean is left to the engine, which checks that itself.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from isthmus.errors import IsthmusError

IDENTIFIER = b"TFL3"
IDENTIFIER_OFFSET = 4
SCHEMA_VERSION = 3
MAX_RANK = 16
MAX_ELEMENTS = 2**40

# Table: its fields in the schema's order. "" is a number (or a table that no check needs to enter), "x" a vector of x bytes an element, "text" a
# string, "T" a table, "[T]" a vector of tables. Fields behind the last one named are only checked to lie inside the file.
TABLES: dict[str, tuple[str, ...]] = {
    "Model": ("", "[OperatorCode]", "[SubGraph]", "text", "[Buffer]", "4", "[Metadata]", "[SignatureDef]"),
    "OperatorCode": ("", "text", "", ""),
    "SubGraph": ("[Tensor]", "4", "4", "[Operator]", "text"),
    "Tensor": ("4", "", "", "text", "Quantisation", "", "", "4"),
    "Quantisation": ("4", "4", "4", "8", "", "", ""),
    "Operator": ("", "4", "4", "", "Options", "1", "", "1", "4"),
    "Options": (),
    "ReshapeOptions": ("4",),
    "SqueezeOptions": ("4",),
    "Buffer": ("1",),
    "Metadata": ("text", ""),
    "SignatureDef": ("[TensorMap]", "[TensorMap]", "text", "text", ""),
    "TensorMap": ("text", ""),
}
# A type in the options' union whose table holds a vector.
OPTION_TABLES = {17: "ReshapeOptions", 30: "SqueezeOptions"}


class _BrokenError(Exception):
    """Where the file breaks."""


@dataclass(frozen=True)
class _Table:
    """A table whose vtable lies inside the file."""

    content: bytes
    start: int
    fields: tuple[int, ...]  # offset of each field from `start`, 0 where it is left out

    def place(self, field: int) -> int:
        """Where the field's value lies; 0 where it is left out."""
        return self.start + self.fields[field] if field < len(self.fields) and self.fields[field] else 0

    def number(self, field: int, kind: str = "<i", default: int = 0) -> int:
        place = self.place(field)
        return int(_unpack(kind, self.content, place)) if place else default

    def target(self, field: int) -> int:
        """Where an offset field points; 0 where it is left out."""
        place = self.place(field)
        return place + _unpack("<I", self.content, place) if place else 0


def check_file(path: Path) -> None:
    """Raises `IsthmusError`, one sentence, where the file is missing, something else, or cut short or changed so that an engine would stumble."""
    if not path.is_file():
        raise IsthmusError(f"{path}: no such file; compile the bundle again")
    content = path.read_bytes()
    if content[IDENTIFIER_OFFSET : IDENTIFIER_OFFSET + len(IDENTIFIER)] != IDENTIFIER:
        raise IsthmusError(f"{path}: not a .tflite file (no {IDENTIFIER.decode()} at byte {IDENTIFIER_OFFSET}); compile the bundle again")
    try:
        _check(content)
    except _BrokenError as error:
        raise IsthmusError(f"{path}: not a whole .tflite file ({error}); compile the bundle again") from None


def _check(content: bytes) -> None:
    root = _unpack("<I", content, 0)
    model = _walk(content, root, "Model")
    version = model.number(0, "<I")
    if version != SCHEMA_VERSION:
        raise _BrokenError(f"schema version {version}, this reads {SCHEMA_VERSION}")
    codes, buffers = (_vector(content, model.target(field))[1] for field in (1, 4))
    subgraphs = _tables(content, model.target(2))
    if not subgraphs:
        raise _BrokenError("no subgraph")
    for subgraph in subgraphs:
        _check_subgraph(subgraph, codes, buffers)
    _within([entry.number(1, "<I") for entry in _tables(content, model.target(6))], buffers, "a metadata entry's buffer")
    tensors = len(_tables(content, subgraphs[0].target(0)))
    for signature in _tables(content, model.target(7)):
        _within([signature.number(4, "<I")], len(subgraphs), "a signature's subgraph")
        for side in (0, 1):
            _within([entry.number(1, "<I") for entry in _tables(content, signature.target(side))], tensors, "a signature's tensor")


def _check_subgraph(subgraph: _Table, codes: int, buffers: int) -> None:
    content = subgraph.content
    tensors = _tables(content, subgraph.target(0))
    _within([tensor.number(2, "<I") for tensor in tensors], buffers, "a tensor's buffer")
    for tensor in tensors:
        extents = _integers(content, tensor.target(0))
        if len(extents) > MAX_RANK or any(extent < 0 for extent in extents) or _product(extents) > MAX_ELEMENTS:
            raise _BrokenError(f"a tensor of shape {extents[:MAX_RANK]}")
    for field in (1, 2):
        _within(_integers(content, subgraph.target(field)), len(tensors), "an input or output of the graph")
    for operator in _tables(content, subgraph.target(3)):
        _within([operator.number(0, "<I")], codes, "an operator's code")
        _within([index for index in _integers(content, operator.target(1)) if index != -1], len(tensors), "an operator's input")
        _within(_integers(content, operator.target(2)), len(tensors), "an operator's output")


def _product(extents: Sequence[int]) -> int:
    total = 1
    for extent in extents:
        total *= extent
    return total


def _within(indices: Sequence[int], count: int, what: str) -> None:
    wrong = next((index for index in indices if not 0 <= index < count), None)
    if wrong is not None:
        raise _BrokenError(f"{what} is number {wrong} of {count}")


# ---- the FlatBuffer
def _walk(content: bytes, start: int, name: str) -> _Table:
    """The table at `start` and everything below it lies inside the file."""
    table = _table(content, start)
    for field, kind in enumerate(TABLES[name]):
        place = table.place(field)
        if not place or not kind:
            continue
        if kind == "Options":
            kind = OPTION_TABLES.get(table.number(3, "<B"), kind)
        target = table.target(field)
        if kind in TABLES:
            _walk(content, target, kind)
        elif kind.startswith("["):
            for entry in _offsets(content, target):
                _walk(content, entry, kind[1:-1])
        else:
            first, count = _vector(content, target)
            _inside(content, first, count * (1 if kind == "text" else int(kind)))
    return table


def _table(content: bytes, start: int) -> _Table:
    vtable = start - _unpack("<i", content, start)
    size, length = _unpack("<H", content, vtable), _unpack("<H", content, vtable + 2)
    if size < 4 or size % 2 or length < 4:
        raise _BrokenError(f"no table at byte {start}")
    _inside(content, vtable, size)
    _inside(content, start, length)
    fields = struct.unpack_from(f"<{(size - 4) // 2}H", content, vtable + 4)
    if any(field >= length for field in fields):
        raise _BrokenError(f"a field outside its table at byte {start}")
    return _Table(content, start, fields)


def _vector(content: bytes, start: int) -> tuple[int, int]:
    """(where its elements begin, how many there are); nothing where it is left out."""
    return (start + 4, int(_unpack("<I", content, start))) if start else (0, 0)


def _offsets(content: bytes, start: int) -> list[int]:
    first, count = _vector(content, start)
    _inside(content, first, 4 * count)
    return [first + 4 * index + offset for index, offset in enumerate(struct.unpack_from(f"<{count}I", content, first))]


def _tables(content: bytes, start: int) -> list[_Table]:
    return [_table(content, entry) for entry in _offsets(content, start)]


def _integers(content: bytes, start: int) -> list[int]:
    first, count = _vector(content, start)
    _inside(content, first, 4 * count)
    return list(struct.unpack_from(f"<{count}i", content, first))


def _inside(content: bytes, start: int, size: int) -> None:
    if start < 0 or start + size > len(content):
        raise _BrokenError(f"it ends at byte {len(content)}, something in it at {start + size}")


_SIZES: dict[str, Callable[[bytes, int], tuple[int, ...]]] = {kind: struct.Struct(kind).unpack_from for kind in ("<B", "<H", "<i", "<I")}


def _unpack(kind: str, content: bytes, place: int) -> int:
    _inside(content, place, struct.calcsize(kind))
    return int(_SIZES[kind](content, place)[0])
