# SPDX-License-Identifier: Apache-2.0
"""What one generation of TensorRT's ONNX parser reads: one file a dialect, chosen by the TensorRT version of the board's profile."""

from __future__ import annotations

from isthmus.errors import IsthmusError
from isthmus.targets.jetson.dialects import tensorrt_8_2, tensorrt_8_5, tensorrt_10_3, tensorrt_11
from isthmus.targets.jetson.dialects.dialect import Dialect

DIALECTS = (tensorrt_8_2.DIALECT, tensorrt_8_5.DIALECT, tensorrt_10_3.DIALECT, tensorrt_11.DIALECT)


def dialect_of(tensorrt: str) -> Dialect:
    """The dialect for a version such as "10.3": the newest that is not newer. Raises `IsthmusError` for a version older than the oldest, or none."""
    try:
        version = tuple(int(part) for part in tensorrt.split(".")[:2])
    except ValueError:
        raise IsthmusError(f"TensorRT version {tensorrt!r}: expected numbers such as 10.3") from None
    known = [dialect for dialect in DIALECTS if dialect.since <= version]
    if not known:
        raise IsthmusError(f"TensorRT {tensorrt} is older than {DIALECTS[0].name}, the oldest that reads QuantizeLinear as isthmus writes it")
    return known[-1]


__all__ = ["DIALECTS", "Dialect", "dialect_of"]
