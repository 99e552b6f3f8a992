# SPDX-License-Identifier: Apache-2.0
"""Runs a `.tflite` file: LiteRT (ai-edge-litert), else its predecessor tflite-runtime, with XNNPACK as both switch it on, or without."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from isthmus.errors import IsthmusError
from isthmus.runtimes.tflite.model_file import check_file
from isthmus.session import Arrays, Session
from isthmus.spec import TensorSpec

# In the order of preference: module, distribution, name in reports. tflite-runtime's last release (2.14.0) needs numpy < 2.
ENGINES = (("ai_edge_litert.interpreter", "ai-edge-litert", "LiteRT"), ("tflite_runtime.interpreter", "tflite-runtime", "tflite-runtime"))


def find_engine() -> tuple[ModuleType, str]:
    """The module that has `Interpreter`, and the engine's name with version. Raises `IsthmusError` where there is none."""
    reasons = []
    for module, distribution, name in ENGINES:
        try:
            found = import_module(module)
        except ImportError as error:
            reasons.append(f"{distribution}: {error}")
            continue
        return found, f"{name} {importlib.metadata.version(distribution)}"
    raise IsthmusError(f"no TensorFlow Lite engine is here ({'; '.join(reasons)}): pip install 'isthmus[runtime-tflite]'")


class TfliteSession(Session):
    """One file in one interpreter.

    `run_raw` writes into the interpreter's own input tensors and gives views of its output tensors: the next run overwrites them. Copy what is
    to stay (`run` and `run_quantised` do). `inputs` and `outputs` are checked against the file where they are given and read from it else.
    """

    engine = "tflite"

    def __init__(
        self,
        path: Path,
        inputs: tuple[TensorSpec, ...] | None = None,
        outputs: tuple[TensorSpec, ...] | None = None,
        threads: int = 1,
        xnnpack: bool = True,
    ) -> None:
        if threads < 1:
            raise IsthmusError(f"threads: expected 1 or more, found {threads}")
        check_file(path)
        module, version = find_engine()
        self._version = version if xnnpack else f"{version} without XNNPACK"
        resolver = module.OpResolverType.AUTO if xnnpack else module.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        try:
            self._interpreter = module.Interpreter(model_path=str(path), num_threads=threads, experimental_op_resolver_type=resolver)
            self._interpreter.allocate_tensors()
            signatures = self._interpreter.get_signature_list()
        except (ValueError, RuntimeError) as error:
            raise IsthmusError(f"{path}: {self._version} cannot open it ({_first_line(error)}); compile the bundle again") from None
        details = {"inputs": self._interpreter.get_input_details(), "outputs": self._interpreter.get_output_details()}
        if inputs is None or outputs is None:
            inputs, outputs = (_specs(self._interpreter, signatures, side, details[side]) for side in ("inputs", "outputs"))
        super().__init__(inputs, outputs)
        self._inputs = self._views(path, "inputs", details["inputs"], inputs)
        self._outputs = self._views(path, "outputs", details["outputs"], outputs)
        # `Interpreter.invoke` refuses to run while anybody holds a view, as tensors could move. Here none does: shapes are fixed and
        # `allocate_tensors` is never called again. What it calls inside is the same.
        self._invoke = self._interpreter._interpreter.Invoke

    @property
    def version(self) -> str:
        """Which engine runs, and its version: "LiteRT 2.3.0"."""
        return self._version

    def per_layer(self, feeds: Arrays, runs: int = 20) -> list[tuple[str, float]]:
        """Always raises `IsthmusError`: the interpreter's Python interface has no profiler."""
        raise IsthmusError(
            f"{self._version} times no single operators from Python: run TensorFlow's benchmark_model with --enable_op_profiling=true on the file"
        )

    def _views(self, path: Path, side: str, details: list[dict[str, Any]], specs: tuple[TensorSpec, ...]) -> list[tuple[str, np.ndarray]]:
        """(name, the interpreter's memory) in the order of the specs, which is the file's. Raises `IsthmusError` where shape or dtype differ."""
        found = [f"{np.dtype(detail['dtype']).name}{[int(extent) for extent in detail['shape']]}" for detail in details]
        expected = [f"{spec.dtype}{list(spec.shape)}" for spec in specs]
        if found != expected:
            raise IsthmusError(f"{path}: has the {side} {found}, the manifest says {expected}; compile the bundle again")
        scalars = [spec.name for spec in specs if not spec.shape]
        if scalars:
            raise IsthmusError(f"{path}: {side[:-1]} {scalars[0]!r} is one number without axes, which the engine gives no view of; give it a shape of [1]")
        return [(spec.name, self._interpreter.tensor(detail["index"])()) for spec, detail in zip(specs, details, strict=True)]

    def _run_raw(self, feeds: Arrays) -> dict[str, np.ndarray]:
        for name, memory in self._inputs:
            memory[...] = feeds[name]
        self._invoke()
        return dict(self._outputs)

    def _close(self) -> None:
        del self._inputs, self._outputs, self._invoke, self._interpreter


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


def _specs(interpreter: Any, signatures: Mapping[str, Any], side: str, details: list[dict[str, Any]]) -> tuple[TensorSpec, ...]:
    """What a file says of its own border: the names of its only signature (else its tensors'), axes in the file's order."""
    names = {int(detail["index"]): str(detail["name"]) for detail in details}
    if len(signatures) == 1:
        runner = interpreter.get_signature_runner()
        signed = runner.get_input_details() if side == "inputs" else runner.get_output_details()
        names |= {int(detail["index"]): str(name) for name, detail in signed.items()}
    specs = []
    for detail in details:
        scale, zero_point = detail["quantization"]
        dtype = np.dtype(detail["dtype"]).name
        quantisation = (float(scale), int(zero_point)) if scale and dtype != "float32" else (None, None)
        specs.append(TensorSpec(names[int(detail["index"])], tuple(int(extent) for extent in detail["shape"]), dtype, "", *quantisation))
    return tuple(specs)


def open_session(folder: Path, entry: Mapping[str, Any], threads: int = 1, xnnpack: bool = True) -> TfliteSession:
    """Opens the artifact that manifest entry `entry` describes. Raises `IsthmusError`: no engine, no file, not a whole `.tflite`, another border."""
    inputs, outputs = (tuple(TensorSpec.from_json(spec) for spec in entry[side]) for side in ("inputs", "outputs"))
    return TfliteSession(Path(folder) / entry["artifact"], inputs, outputs, threads, xnnpack)


def open_tflite(path: str | Path, threads: int = 1, xnnpack: bool = True, trust: bool = False) -> TfliteSession:
    """Opens any `.tflite` file, whoever made it; `inputs` and `outputs` say what it says of itself.

    It is first run once in a process of its own, unless you `trust` it: a broken file can end the process it runs in. Raises `IsthmusError` as
    `open_session` does, and where that one run fails.
    """
    check_file(Path(path))
    if not trust:
        from isthmus.runtimes.tflite.probe import probe  # it imports this module, in its own process

        probe(Path(path), xnnpack)
    return TfliteSession(Path(path), threads=threads, xnnpack=xnnpack)


__all__ = ["TfliteSession", "find_engine", "open_session", "open_tflite"]
