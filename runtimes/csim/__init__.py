# SPDX-License-Identifier: Apache-2.0
"""Opens the C simulation of an HLS project (hls4ml's bridge in a shared library) with ctypes. A simulator: its speed says nothing of the FPGA's."""

from __future__ import annotations

import ctypes
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from isthmus.errors import IsthmusError
from isthmus.session import Arrays, Session
from isthmus.spec import TensorSpec

SIMULATOR = True  # its time is not the board's: nothing measures it
RUNS_NATIVE_CODE = True  # a bundle asks for trust before it opens one

FUNCTION = "model_float"
# Relative to the library's folder: names the weight files. The generated code ends the whole process where one is missing, so that is looked at first.
PARAMETERS = (Path("..") / "project" / "firmware" / "parameters.h", Path("..") / "project" / "src" / "firmware" / "parameters.h")  # the second: oneAPI
TAIL_FILE = "host_tail.json"
TAIL_SCHEMA = 1
# int8 steps times 2^n: float32 holds them exactly, and so do the ap_fixed types of the bridge.
EXACT_EXPONENTS = range(-100, 101)


@dataclass(frozen=True)
class FpgaOutput:
    """What the FPGA gives for one output, and the axis of the softmax (in the form's layout) that the host computes on it, if any."""

    raw: TensorSpec
    softmax_axis: int | None = None


class CsimSession(Session):
    """One sample at a time, through hls4ml's float bridge: int8 -> real numbers, exactly, and back, exactly, or an error."""

    engine = "csim"

    def __init__(self, library: Path, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], made: Sequence[FpgaOutput]) -> None:
        super().__init__(inputs, outputs)
        self._made = tuple(made)
        borders = (*inputs, *(output.raw for output in self._made))
        for spec in borders:
            _check_spec(spec)
        _check_weights(library)
        try:
            # RTLD_LOCAL (ctypes' default): every such library defines the same names.
            self._library: ctypes.CDLL | None = ctypes.CDLL(str(library.resolve()))
            self._function = getattr(self._library, FUNCTION)
        except OSError as error:
            raise IsthmusError(f"{library}: cannot be loaded ({error}); compile the bundle on this machine") from None
        except AttributeError:
            raise IsthmusError(f"{library}: has no function {FUNCTION}: not a C simulation that isthmus compiled") from None
        self._function.restype = None
        self._function.argtypes = [ctypes.c_void_p] * len(borders)
        self._arguments = [np.zeros(spec.shape[1:], np.float32) for spec in borders]
        self._pointers = [array.ctypes.data for array in self._arguments]

    @property
    def version(self) -> str:
        return "hls4ml C simulation"

    def _run_raw(self, feeds: Arrays) -> dict[str, np.ndarray]:
        if self._library is None:
            raise IsthmusError("the session is closed")
        given, taken = self._arguments[: len(self.inputs)], self._arguments[len(self.inputs) :]
        raw = [np.empty(output.raw.shape, np.int8) for output in self._made]
        for sample in range(self.inputs[0].shape[0]):
            for spec, array in zip(self.inputs, given, strict=True):
                np.multiply(feeds[spec.name][sample], np.float32(spec.scale), out=array)
            self._function(*self._pointers)
            for output, array, steps in zip(self._made, taken, raw, strict=True):
                steps[sample] = _steps(output.raw, array)
        return {spec.name: _with_tail(output, steps) for spec, output, steps in zip(self.outputs, self._made, raw, strict=True)}

    def _close(self) -> None:
        """Unloads the library: loading one by a path that is still loaded gives the old one, even where the file is another by now."""
        if self._library is not None:
            handle, self._library = self._library._handle, None
            del self._function
            closer = ctypes.CDLL(None).dlclose
            closer.argtypes = [ctypes.c_void_p]
            closer(handle)


def _steps(spec: TensorSpec, real: np.ndarray) -> np.ndarray:
    """Real numbers of the simulation -> int8 steps. Raises `IsthmusError` where one is no int8 multiple of the scale."""
    steps = real / np.float32(spec.scale)
    whole = np.clip(np.rint(steps), -128, 127)
    if not np.array_equal(whole, steps):
        odd = real.reshape(-1)[(whole != steps).reshape(-1)][0]
        raise IsthmusError(f"output {spec.name!r} of the C simulation is not int8 at scale {spec.scale}: found {odd}; compile the bundle again")
    return whole.astype(np.int8)


def _with_tail(output: FpgaOutput, steps: np.ndarray) -> np.ndarray:
    """int8 as the FPGA gives it, or the softmax of it: float32, in the form's layout."""
    if output.softmax_axis is None:
        return steps
    real = output.raw.dequantise(output.raw.to_form(steps))
    powers = np.exp(real - real.max(axis=output.softmax_axis, keepdims=True))
    return powers / powers.sum(axis=output.softmax_axis, keepdims=True)


def _check_spec(spec: TensorSpec) -> None:
    exponent = np.log2(spec.scale) if spec.scale else 0.5
    if spec.dtype != "int8" or spec.zero_point != 0 or exponent not in EXACT_EXPONENTS:
        found = f"{spec.dtype}, zero point {spec.zero_point}, scale {spec.scale}"
        raise IsthmusError(f"{spec.name!r}: the C simulation takes int8 with zero point 0 and a power-of-two scale, the manifest says {found}")


def _check_weights(library: Path) -> None:
    """Every weight file that the generated parameters.h names is there."""
    places = [library.parent / place for place in PARAMETERS]
    parameters = next((place for place in places if place.is_file()), places[0])
    if not parameters.is_file():
        raise IsthmusError(f"{parameters} is missing: it belongs to the C simulation; restore the bundle or compile again")
    for name in re.findall(r'"weights/(\w+)\.h"', parameters.read_text(encoding="utf-8")):
        path = parameters.parent / "weights" / f"{name}.txt"
        if not path.is_file():
            raise IsthmusError(f"{path} is missing: the C simulation reads its weights there; restore the bundle or compile again")


def _tails(path: Path, outputs: tuple[TensorSpec, ...]) -> list[FpgaOutput]:
    """The FPGA's side of each output, from the tail file; without one, every output is the FPGA's own."""
    if not path.is_file():
        floats = [spec.name for spec in outputs if not spec.is_quantised]
        if floats:
            raise IsthmusError(f"{path} is missing: it says how the host computes {floats[0]!r}; restore the bundle or compile again")
        return [FpgaOutput(spec) for spec in outputs]
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["schema"] != TAIL_SCHEMA:
            raise IsthmusError(f"{path}: schema {data['schema']}, this version reads schema {TAIL_SCHEMA}")
        found = {entry["name"]: FpgaOutput(TensorSpec.from_json(entry["raw"]), entry["softmax_axis"]) for entry in data["outputs"]}
        return [found[spec.name] for spec in outputs]
    except (KeyError, TypeError, ValueError) as error:
        raise IsthmusError(f"{path}: cannot be read ({type(error).__name__}: {error}); restore the bundle or compile again") from None


def open_session(folder: Path, entry: Mapping[str, Any], threads: int = 1) -> CsimSession:
    """Opens `entry["artifact"]` in `folder`. `threads` is ignored: the simulation has one. Raises `IsthmusError` where it cannot be loaded."""
    library = Path(folder) / str(entry["artifact"])
    if not library.is_file():
        raise IsthmusError(f"{library}: no such file; compile the bundle again")
    inputs, outputs = (tuple(TensorSpec.from_json(spec) for spec in entry[side]) for side in ("inputs", "outputs"))
    return CsimSession(library, inputs, outputs, _tails(Path(folder) / TAIL_FILE, outputs))
