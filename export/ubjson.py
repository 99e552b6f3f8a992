# SPDX-License-Identifier: Apache-2.0
"""UBJSON as XGBoost writes it (`.ubj`): Draft 12 with typed arrays, big endian. Reads data and nothing else."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

from isthmus.errors import IsthmusError

_NUMBERS = {"i": ">i1", "U": ">u1", "I": ">i2", "u": ">u2", "l": ">i4", "L": ">i8", "d": ">f4", "D": ">f8"}
_CONSTANTS = {"Z": None, "T": True, "F": False}
MAX_DEPTH = 64


def loads(data: bytes) -> Any:
    """The one value in `data`; a typed array of numbers comes as a numpy array. Raises `IsthmusError` on anything that is no UBJSON or goes on behind it."""
    reader = _Reader(data)
    try:
        value = reader.value(reader.marker(), 0)
    except (struct.error, UnicodeDecodeError, ValueError) as error:
        raise IsthmusError(f"not UBJSON, or cut short (at byte {reader.at} of {len(data)}: {error})") from None
    if reader.at != len(data):
        raise IsthmusError(f"not UBJSON: {len(data) - reader.at} bytes behind its end")
    return value


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def take(self, count: int) -> bytes:
        if count < 0 or self.at + count > len(self.data):
            raise ValueError(f"{count} more bytes expected")
        self.at += count
        return self.data[self.at - count : self.at]

    def marker(self) -> str:
        found = "N"
        while found == "N":  # a no-op between values
            found = self.take(1).decode("latin-1")
        return found

    def value(self, marker: str, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise ValueError("nested too deeply")
        if marker in _CONSTANTS:
            return _CONSTANTS[marker]
        if marker in _NUMBERS:
            return np.frombuffer(self.take(np.dtype(_NUMBERS[marker]).itemsize), _NUMBERS[marker])[0].item()
        if marker == "C":
            return self.take(1).decode("latin-1")
        if marker in "SH":
            return self.text()
        if marker == "[":
            return self.array(depth)
        if marker == "{":
            return self.table(depth)
        raise ValueError(f"unknown marker {marker!r}")

    def text(self) -> str:
        return self.take(self.length(self.marker())).decode("utf-8")

    def length(self, marker: str) -> int:
        if marker not in "iUIulL":
            raise ValueError(f"a length of type {marker!r}")
        return int(self.value(marker, 0))

    def header(self) -> tuple[str, int | None, str]:
        """(element type or "", count or None, the marker behind)."""
        kind, count, marker = "", None, self.marker()
        if marker == "$":
            kind, marker = self.marker(), self.marker()
            if marker != "#":
                raise ValueError("a type without a count")
        if marker == "#":
            count, marker = self.length(self.marker()), ""
            if count < 0 or count > len(self.data):
                raise ValueError(f"{count} elements")
        return kind, count, marker

    def array(self, depth: int) -> Any:
        kind, count, marker = self.header()
        if count is not None:
            if kind in _NUMBERS:
                return np.frombuffer(self.take(count * np.dtype(_NUMBERS[kind]).itemsize), _NUMBERS[kind])
            return [self.value(kind or self.marker(), depth + 1) for _ in range(count)]
        values = []
        while marker != "]":
            values.append(self.value(marker, depth + 1))
            marker = self.marker()
        return values

    def table(self, depth: int) -> dict[str, Any]:
        kind, count, marker = self.header()
        values: dict[str, Any] = {}
        if count is not None:
            for _ in range(count):
                name = self.text()
                values[name] = self.value(kind or self.marker(), depth + 1)
            return values
        while marker != "}":
            name = self.take(self.length(marker)).decode("utf-8")
            values[name] = self.value(self.marker(), depth + 1)
            marker = self.marker()
        return values
