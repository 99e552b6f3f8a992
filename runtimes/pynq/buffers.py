# SPDX-License-Identifier: Apache-2.0
"""How a tensor lies in a DMA buffer: int8 elements in beats of the bus, each beat filled up with zeros to the bus's width. numpy only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from isthmus.errors import IsthmusError

MAX_BEAT_BYTES = 128  # an AXI stream behind an AXI DMA ends at 1024 bits


@dataclass(frozen=True)
class BeatLayout:
    """`elements` int8 numbers, `per_beat` of them in each beat of `beat_bytes` bytes; the last beat may hold fewer.

    An HLS stream of pixels has a pixel's channels in a beat; a bus wider than an element and no packing has one element a beat.
    """

    elements: int
    per_beat: int
    beat_bytes: int

    def __post_init__(self) -> None:
        if self.elements < 1 or self.per_beat < 1:
            raise IsthmusError(f"a buffer of {self.elements} elements, {self.per_beat} a beat: expected at least 1 of each")
        if self.beat_bytes < 1 or self.beat_bytes > MAX_BEAT_BYTES or self.beat_bytes & (self.beat_bytes - 1):
            raise IsthmusError(f"a bus of {self.beat_bytes} bytes: expected a power of two up to {MAX_BEAT_BYTES}")
        if self.per_beat > self.beat_bytes:
            raise IsthmusError(f"{self.per_beat} int8 elements do not fit a beat of {self.beat_bytes} bytes")

    @property
    def beats(self) -> int:
        return -(-self.elements // self.per_beat)

    @property
    def buffer_bytes(self) -> int:
        return self.beats * self.beat_bytes

    def pack(self, array: np.ndarray, buffer: np.ndarray) -> None:
        """Writes int8 `array` (any shape, in order) into `buffer` (uint8, `buffer_bytes` long). Bytes that carry nothing are left as they are."""
        rows = buffer.reshape(self.beats, self.beat_bytes).view(np.int8)
        flat = array.reshape(-1)
        whole = self.elements // self.per_beat
        rows[:whole, : self.per_beat] = flat[: whole * self.per_beat].reshape(whole, self.per_beat)
        if rest := self.elements - whole * self.per_beat:
            rows[whole, :rest] = flat[whole * self.per_beat :]

    def unpack(self, buffer: np.ndarray) -> np.ndarray:
        """int8 (elements,) out of `buffer`: a copy."""
        rows = buffer.reshape(self.beats, self.beat_bytes).view(np.int8)
        return np.ascontiguousarray(rows[:, : self.per_beat]).reshape(-1)[: self.elements]

    @classmethod
    def from_json(cls, data: Mapping[str, Any], elements: int, where: str) -> BeatLayout:
        """Raises `IsthmusError` where `data` does not hold `per_beat` and `beat_bytes` as whole numbers."""
        per_beat, beat_bytes = (data.get(name) if isinstance(data, Mapping) else None for name in ("per_beat", "beat_bytes"))
        if type(per_beat) is not int or type(beat_bytes) is not int:
            raise IsthmusError(f"{where}: expected the whole numbers per_beat and beat_bytes, found {str(data)[:100]}")
        return cls(elements, per_beat, beat_bytes)
