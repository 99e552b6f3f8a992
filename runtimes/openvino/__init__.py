# SPDX-License-Identifier: Apache-2.0
"""Engine `openvino`: an ONNX file on OpenVINO's CPU plugin, inputs read and outputs written in place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from isthmus.errors import IsthmusError
from isthmus.session import Arrays, Session
from isthmus.spec import TensorSpec

_DTYPES = {"i8": "int8", "u8": "uint8", "f32": "float32"}


def open_session(folder: Path, entry: Mapping[str, Any], threads: int = 1) -> OpenVinoSession:
    """The artifact of a manifest entry. Raises `IsthmusError` where the file is missing, cut short, or not what the entry says."""
    file = Path(folder) / entry["artifact"]
    if not file.is_file():
        raise IsthmusError(f"{file}: no such file; compile the bundle again")
    inputs, outputs = (tuple(TensorSpec.from_json(spec) for spec in entry[side]) for side in ("inputs", "outputs"))
    return OpenVinoSession(file, inputs, outputs, threads)


class OpenVinoSession(Session):
    """Outputs are buffers of the session that the next run overwrites; a contiguous input array is read where it lies, another is copied."""

    engine = "openvino"
    version = ov.__version__

    def __init__(self, file: Path, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], threads: int = 1) -> None:
        super().__init__(inputs, outputs)
        if threads < 1:
            raise IsthmusError(f"{threads} threads: expected at least 1")
        compiled = _compiled(file, threads)
        _same_border(file, "input", inputs, compiled.inputs)
        _same_border(file, "output", outputs, compiled.outputs)
        self._request = compiled.create_infer_request()
        self._bound: dict[str, np.ndarray] = {}
        self._results = {spec.name: np.empty(spec.shape, spec.dtype) for spec in outputs}
        for spec in outputs:
            self._request.set_tensor(spec.name, ov.Tensor(self._results[spec.name], shared_memory=True))

    def _run_raw(self, feeds: Arrays) -> dict[str, np.ndarray]:
        for spec in self.inputs:
            array = feeds[spec.name]
            if self._bound.get(spec.name) is not array or not array.flags.c_contiguous:  # a copy of that one was bound: it may be out of date
                self._bound[spec.name] = array
                self._request.set_tensor(spec.name, ov.Tensor(np.ascontiguousarray(array), shared_memory=True))
        self._request.infer()
        return self._results

    def _close(self) -> None:
        del self._request
        self._bound.clear()


def _compiled(file: Path, threads: int) -> Any:
    # One stream on exactly so many threads, pinned by nobody, float layers in float32: what the other engines are asked for.
    settings = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "ENABLE_CPU_PINNING": False, "INFERENCE_PRECISION_HINT": "f32"}
    try:
        return ov.Core().compile_model(str(file), "CPU", settings)
    except RuntimeError as error:
        reason = next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)[:300]
        raise IsthmusError(f"{file}: OpenVINO {ov.__version__} cannot load it ({reason}); compile the bundle again") from None


def _same_border(file: Path, side: str, specs: tuple[TensorSpec, ...], found: list[Any]) -> None:
    """The manifest entry and the file must say the same: a session checks nothing while it runs."""
    expected = [(spec.name, spec.dtype, list(spec.shape)) for spec in specs]
    named = [(spec.name, port) for spec, port in zip(specs, found, strict=False) if spec.name in port.get_names()]
    actual = [(name, _DTYPES.get(port.get_element_type().get_type_name(), "another"), list(port.get_shape())) for name, port in named]
    if expected != actual or len(found) != len(specs):
        raise IsthmusError(f"{file}: its {side}s are {actual}, but its manifest entry says {expected}; compile the bundle again")
