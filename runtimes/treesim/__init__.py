# SPDX-License-Identifier: Apache-2.0
"""Engine `treesim`: conifer's C++ backend of a tree model, compiled by g++; the host turns features into integers. A simulator, and native code."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from isthmus.errors import IsthmusError
from isthmus.session import Arrays, Session
from isthmus.spec import TensorSpec

SIMULATOR = True  # its time says nothing about the FPGA
RUNS_NATIVE_CODE = True
SIDE_FILE, MODEL_FILE = "features.json", "csim/model.json"
SCHEMA = 1
BINARY = "binary"


class TreeSimulation(Session):
    """One sample at a time: float32 features -> integers -> conifer's fixed point -> int32 scores."""

    engine = "treesim"
    version = "conifer C++ backend"

    def __init__(self, folder: Path, artifact: str, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
        super().__init__(inputs, outputs)
        (self._input,), (self._output,) = inputs, outputs
        self._features = _Features(folder / SIDE_FILE, self._input.shape[-1])
        columns = 2 if self._features.binary else self._features.sums
        if self._output.dtype != "int32" or self._output.shape[-1] != columns:
            raise IsthmusError(f"{folder}: its manifest entry and {SIDE_FILE} disagree about {self._output.name!r}; compile again")
        self._sums = np.zeros(self._features.sums, np.float64)
        self._library = _loaded(folder / artifact)
        self._model = self._library.trees_open(str((folder / MODEL_FILE).resolve()).encode())
        if not self._model:
            raise IsthmusError(f"{folder / MODEL_FILE}: conifer cannot read it; restore the bundle or compile again")

    def _run_raw(self, feeds: Arrays) -> dict[str, np.ndarray]:
        if not self._model:
            raise IsthmusError("the session is closed")
        samples = feeds[self._input.name]
        result = np.empty((len(samples), self._output.shape[-1]), np.int32)
        for row, steps in enumerate(self._features.steps(samples)):
            code = self._library.trees_run(self._model, steps.ctypes.data, len(steps), self._sums.ctypes.data, len(self._sums))
            if code:
                raise IsthmusError(f"conifer's C++ gave code {code}: the library and {SIDE_FILE} are not of one compile; compile again")
            result[row] = np.concatenate([-self._sums, self._sums]) if self._features.binary else self._sums
        return {self._output.name: result}

    def _close(self) -> None:
        model, self._model = self._model, None
        self._library.trees_close(model)


class _Features:
    """How features become integers: floor(x * 2^exponent), clipped, of the features that the trees read."""

    def __init__(self, path: Path, features: int) -> None:
        if not path.is_file():
            raise IsthmusError(f"{path} is missing: it says how features become integers; restore the bundle or compile again")
        try:
            data = json.loads(path.read_bytes())
            if data["schema"] != SCHEMA:
                raise IsthmusError(f"{path}: schema {data['schema']!r}, this version reads schema {SCHEMA}")
            self.used, self.exponents, self.lowest, self.highest = (np.array(data[name], np.int64) for name in ("used", "exponents", "lowest", "highest"))
            self.binary, self.sums = data["task"] == BINARY, int(data["sums"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise IsthmusError(f"{path}: cannot be read ({type(error).__name__}: {error}); restore the bundle or compile again") from None
        sizes = {array.shape for array in (self.used, self.exponents, self.lowest, self.highest)}
        if len(sizes) != 1 or self.used.ndim != 1 or not self.used.size or self.used.min() < 0 or self.used.max() >= features or self.sums < 1:
            raise IsthmusError(f"{path}: does not fit {features} features; restore the bundle or compile again")

    def steps(self, samples: np.ndarray) -> np.ndarray:
        scaled = np.floor(np.ldexp(samples[:, self.used].astype(np.float64), self.exponents))
        clipped: np.ndarray = np.ascontiguousarray(np.clip(scaled, self.lowest, self.highest), np.float64)
        return clipped


def _loaded(path: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path.resolve()))
        library.trees_open.restype = ctypes.c_void_p
        library.trees_open.argtypes = [ctypes.c_char_p]
        library.trees_run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
        library.trees_close.restype = None
        library.trees_close.argtypes = [ctypes.c_void_p]
    except OSError as error:
        raise IsthmusError(f"{path}: cannot be loaded ({error}); compile the bundle on this machine") from None
    except AttributeError:
        raise IsthmusError(f"{path}: is not a tree simulation that isthmus compiled") from None
    return library


def open_session(folder: Path, entry: Mapping[str, Any], threads: int = 1) -> TreeSimulation:
    """Opens `entry["artifact"]` in `folder`. `threads` is ignored: the simulation has one. Raises `IsthmusError` where it cannot be loaded."""
    folder = Path(folder)
    if not (folder / str(entry["artifact"])).is_file():
        raise IsthmusError(f"{folder / str(entry['artifact'])}: no such file; compile the bundle again")
    inputs, outputs = (tuple(TensorSpec.from_json(spec) for spec in entry[side]) for side in ("inputs", "outputs"))
    return TreeSimulation(folder, str(entry["artifact"]), inputs, outputs)
