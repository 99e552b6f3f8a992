# SPDX-License-Identifier: Apache-2.0
"""Engine `onnxruntime`: an ONNX file on the CPU execution provider, inputs and outputs bound in place."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as state

from isthmus.errors import IsthmusError
from isthmus.session import Arrays, Session
from isthmus.spec import TensorSpec

_LEVELS = {"all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL, "off": ort.GraphOptimizationLevel.ORT_DISABLE_ALL}
_DTYPES = {"tensor(int8)": "int8", "tensor(uint8)": "uint8", "tensor(float)": "float32", "tensor(int32)": "int32"}
_ERRORS_ONLY = 3
_TIMED = "_kernel_time"  # what the profile appends to the name of a node that ran
# What ONNX Runtime raises on a model: they have no base of their own.
ERRORS = (
    *(state.Fail, state.InvalidArgument, state.InvalidGraph, state.InvalidProtobuf, state.NoModel, state.NoSuchFile, state.NotImplemented),
    *(state.RuntimeException, RuntimeError, ValueError),  # ValueError: text in the file that is not UTF-8
)


def open_session(folder: Path, entry: Mapping[str, Any], threads: int = 1) -> OnnxRuntimeSession:
    """The artifact of a manifest entry. Raises `IsthmusError` where the file is missing, cut short, or not what the entry says."""
    file = Path(folder) / entry["artifact"]
    if not file.is_file():
        raise IsthmusError(f"{file}: no such file; compile the bundle again")
    level = entry.get("options", {}).get("optimisation", "all")
    if level not in _LEVELS:
        raise IsthmusError(f"{file}: optimisation {level!r} of its manifest entry is not one of {', '.join(_LEVELS)}")
    inputs, outputs = (tuple(TensorSpec.from_json(spec) for spec in entry[side]) for side in ("inputs", "outputs"))
    return OnnxRuntimeSession(file, inputs, outputs, threads, level)


class OnnxRuntimeSession(Session):
    """Outputs are buffers of the session that the next run overwrites; a contiguous input array is read where it lies, another is copied."""

    engine = "onnxruntime"
    version = ort.__version__

    def __init__(self, file: Path, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], threads: int = 1, optimisation: str = "all") -> None:
        super().__init__(inputs, outputs)
        self._file, self._threads, self._optimisation = file, threads, optimisation
        self._session = load(file, session_options(threads, optimisation))
        _same_border(file, "input", inputs, self._session.get_inputs())
        _same_border(file, "output", outputs, self._session.get_outputs())
        self._binding = self._session.io_binding()
        self._bound: dict[str, np.ndarray] = {}
        self._results = {spec.name: np.empty(spec.shape, spec.dtype) for spec in outputs}
        for spec in outputs:
            buffer = self._results[spec.name]
            self._binding.bind_output(spec.name, "cpu", 0, buffer.dtype.type, spec.shape, buffer.ctypes.data)

    def _run_raw(self, feeds: Arrays) -> dict[str, np.ndarray]:
        for spec in self.inputs:
            array = feeds[spec.name]
            if self._bound.get(spec.name) is not array or not array.flags.c_contiguous:  # ONNX Runtime bound a copy of that one: it may be out of date
                self._bound[spec.name] = array
                self._binding.bind_cpu_input(spec.name, array)
        self._session.run_with_iobinding(self._binding)
        return self._results

    def per_layer(self, feeds: Arrays, runs: int = 20) -> list[tuple[str, float]]:
        """By ONNX Runtime's own profiler, in a session of its own so that this one stays as fast as it is. The profiler counts whole microseconds."""
        if runs < 1:
            raise IsthmusError(f"time per layer over {runs} runs: expected at least 1")
        self._check_raw(feeds)
        with tempfile.TemporaryDirectory() as folder:
            options = session_options(self._threads, self._optimisation)
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder) / "profile")
            session = load(self._file, options)
            for _ in range(1 + runs):  # the first one allocates
                session.run(None, dict(feeds))
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        return _means(events, runs)

    def _check_raw(self, feeds: Arrays) -> None:
        self._no_extra(feeds)
        for spec in self.inputs:
            array = feeds.get(spec.name)
            if array is None or (str(array.dtype), tuple(array.shape)) != (spec.dtype, spec.shape):
                found = "nothing" if array is None else f"{array.dtype}{list(array.shape)}"
                raise IsthmusError(f"input {spec.name!r}: expected {spec.dtype}{list(spec.shape)}, found {found}")

    def _close(self) -> None:
        del self._binding, self._session
        self._bound.clear()


def session_options(threads: int, optimisation: str) -> ort.SessionOptions:
    """One run at a time on `threads` threads; `optimisation` is "all" or "off". ONNX Runtime reads 0 threads as all there are."""
    if threads < 1:
        raise IsthmusError(f"{threads} threads: expected at least 1")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = _LEVELS[optimisation]
    options.log_severity_level = _ERRORS_ONLY
    return options


def _means(events: list[dict[str, Any]], runs: int) -> list[tuple[str, float]]:
    """Mean time in ns of each node over the last `runs` runs, in the order in which they ran."""
    spans: dict[str, list[float]] = {}
    for event in sorted((event for event in events if event["cat"] == "Node" and event["name"].endswith(_TIMED)), key=lambda event: event["ts"]):
        spans.setdefault(event["name"].removesuffix(_TIMED), []).append(1000.0 * event["dur"])
    return [(name, sum(times[-runs:]) / len(times[-runs:])) for name, times in spans.items()]


def load(file: Path, options: ort.SessionOptions, advice: str = "compile the bundle again") -> ort.InferenceSession:
    """The file as it is. Raises `IsthmusError` with `advice` where ONNX Runtime cannot load it."""
    try:
        return ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"], enable_fallback=0)  # else it prints, and tries again
    except ERRORS as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise IsthmusError(f"{file}: ONNX Runtime {ort.__version__} cannot load it ({reason}); {advice}") from None


def _same_border(file: Path, side: str, specs: tuple[TensorSpec, ...], found: list[Any]) -> None:
    """The manifest entry and the file must say the same: a session checks nothing while it runs."""
    expected = [(spec.name, spec.dtype, list(spec.shape)) for spec in specs]
    actual = [(value.name, _DTYPES.get(value.type, value.type), list(value.shape)) for value in found]
    if expected != actual:
        raise IsthmusError(f"{file}: its {side}s are {actual}, but its manifest entry says {expected}; compile the bundle again")
