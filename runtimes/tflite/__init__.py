# SPDX-License-Identifier: Apache-2.0
"""Runs a `.tflite` artifact: LiteRT (ai-edge-litert), else its predecessor tflite-runtime, with XNNPACK as both switch it on."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from isthmus.errors import IsthmusError
from isthmus.session import Arrays, Session
from isthmus.spec import TensorSpec

# In the order of preference: module, distribution, name in reports. tflite-runtime's last release (2.14.0) needs numpy < 2.
ENGINES = (("ai_edge_litert.interpreter", "ai-edge-litert", "LiteRT"), ("tflite_runtime.interpreter", "tflite-runtime", "tflite-runtime"))
IDENTIFIER = b"TFL3"
IDENTIFIER_OFFSET = 4


def find_engine() -> tuple[Callable[..., Any], str]:
    """The `Interpreter` class that is installed and its name with version. Raises `IsthmusError` where there is none."""
    reasons = []
    for module, distribution, name in ENGINES:
        try:
            interpreter = import_module(module).Interpreter
        except (ImportError, AttributeError) as error:
            reasons.append(f"{distribution}: {error}")
            continue
        return interpreter, f"{name} {importlib.metadata.version(distribution)}"
    raise IsthmusError(f"no TensorFlow Lite engine is here ({'; '.join(reasons)}): pip install 'isthmus[runtime-tflite]'")


class TfliteSession(Session):
    """One file in one interpreter. What `run_raw` gives is a copy: a view into the interpreter would forbid the next `invoke`."""

    engine = "tflite"

    def __init__(self, path: Path, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], threads: int = 1) -> None:
        super().__init__(inputs, outputs)
        if threads < 1:
            raise IsthmusError(f"threads: expected 1 or more, found {threads}")
        self._check_file(path)
        create, self._version = find_engine()
        try:
            self._interpreter = create(model_path=str(path), num_threads=threads)
            self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise IsthmusError(f"{path}: {self._version} cannot open it ({_first_line(error)}); compile the bundle again") from None
        self._inputs = _tensors(path, "inputs", self._interpreter.get_input_details(), inputs)
        self._outputs = _tensors(path, "outputs", self._interpreter.get_output_details(), outputs)

    @staticmethod
    def _check_file(path: Path) -> None:
        if not path.is_file():
            raise IsthmusError(f"{path}: no such file; compile the bundle again")
        with path.open("rb") as stream:
            head = stream.read(IDENTIFIER_OFFSET + len(IDENTIFIER))
        if head[IDENTIFIER_OFFSET:] != IDENTIFIER:
            raise IsthmusError(f"{path}: not a .tflite file (no {IDENTIFIER.decode()} at byte {IDENTIFIER_OFFSET}); compile the bundle again")

    @property
    def version(self) -> str:
        """Which engine runs, and its version: "LiteRT 2.3.0"."""
        return self._version

    def _run_raw(self, feeds: Arrays) -> dict[str, np.ndarray]:
        interpreter = self._interpreter
        for name, index in self._inputs:
            interpreter.set_tensor(index, feeds[name])
        interpreter.invoke()
        return {name: interpreter.get_tensor(index) for name, index in self._outputs}

    def _close(self) -> None:
        del self._interpreter


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


def _tensors(path: Path, side: str, details: list[dict[str, Any]], specs: tuple[TensorSpec, ...]) -> list[tuple[str, int]]:
    """(name, tensor index) in the order of the specs, which is the file's. Raises `IsthmusError` where shape or dtype differ."""
    found = [f"{np.dtype(detail['dtype']).name}{[int(extent) for extent in detail['shape']]}" for detail in details]
    expected = [f"{spec.dtype}{list(spec.shape)}" for spec in specs]
    if found != expected:
        raise IsthmusError(f"{path}: has the {side} {found}, the manifest says {expected}; compile the bundle again")
    return [(spec.name, int(detail["index"])) for spec, detail in zip(specs, details, strict=True)]


def open_session(folder: Path, entry: Mapping[str, Any], threads: int = 1) -> TfliteSession:
    """Opens the artifact that manifest entry `entry` describes. Raises `IsthmusError`: no engine, no file, not a whole `.tflite`, another border."""
    inputs, outputs = (tuple(TensorSpec.from_json(spec) for spec in entry[side]) for side in ("inputs", "outputs"))
    return TfliteSession(Path(folder) / entry["artifact"], inputs, outputs, threads)


__all__ = ["TfliteSession", "find_engine", "open_session"]
