# SPDX-License-Identifier: Apache-2.0
"""A `.tflite` or `.onnx` file that isthmus did not make, opened in the engine one runs it with: what `isthmus bench --against` sets a bundle beside."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import numpy as np

from isthmus.errors import IsthmusError
from isthmus.onnx_file import load_onnx
from isthmus.session import Arrays, Session
from isthmus.spec import TensorSpec
from isthmus.tools import find_tool

TOOLS = {".tflite": "litert", ".onnx": "onnxruntime"}
FEED_COUNT = 16
SEED = 0


def open_foreign(file: Path, threads: int = 1, trust: bool = False) -> tuple[Session, list[Arrays]]:
    """The session, and drawn feeds in its own dtypes: nobody knows what the file wants, and how long an engine takes hardly depends on values.

    Raises `IsthmusError` on a file that is damaged, does not run or takes no arrays of known shapes, and on a missing engine. `trust`: do not
    run a `.tflite` in a process of its own first, which a broken one may end.
    """
    if not file.is_file():
        raise IsthmusError(f"{file}: no such file")
    tool = find_tool(TOOLS[file.suffix])
    if not tool.found:
        raise IsthmusError(f"{file}: {tool.fix}")
    if file.suffix == ".tflite":
        session: Session = import_module("isthmus.runtimes.tflite").open_tflite(file, threads, trust=trust)
    else:
        load_onnx(file)  # its sentences on damage, and on weights outside its folder
        session = import_module("isthmus.runtimes.onnxruntime.any_model").open_onnx(file, threads)
    return session, _drawn(session.inputs)


def _drawn(inputs: tuple[TensorSpec, ...]) -> list[Arrays]:
    generator = np.random.default_rng(SEED)
    return [{spec.name: _values(spec, generator) for spec in inputs} for _ in range(FEED_COUNT)]


def _values(spec: TensorSpec, generator: np.random.Generator) -> np.ndarray:
    """Normal floats, bytes over their whole range; zeros of wider integers, which may be indices."""
    if spec.dtype in ("int8", "uint8"):
        bounds = np.iinfo(spec.dtype)
        return generator.integers(bounds.min, bounds.max + 1, spec.shape).astype(spec.dtype)
    if np.dtype(spec.dtype).kind == "f":
        return generator.standard_normal(spec.shape).astype(spec.dtype)
    return np.zeros(spec.shape, spec.dtype)
