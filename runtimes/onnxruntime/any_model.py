# SPDX-License-Identifier: Apache-2.0
"""Any `.onnx` file in ONNX Runtime as one runs it by hand: every dtype, all optimisations, outputs where ONNX Runtime puts them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from isthmus.errors import IsthmusError
from isthmus.runtimes.onnxruntime import ERRORS, load, session_options
from isthmus.session import Arrays, Session
from isthmus.spec import TensorSpec

_DTYPES = {
    "tensor(float)": "float32", "tensor(double)": "float64", "tensor(float16)": "float16", "tensor(bool)": "bool",
    **{f"tensor({sign}int{bits})": f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
}  # fmt: skip


class AnyOnnxSession(Session):
    """`inputs` as the file has them, a free batch as 1. It is there to be timed: `outputs` is empty, and `run_raw` gives nothing back."""

    engine = "onnxruntime"
    version = ort.__version__

    def __init__(self, file: Path, threads: int = 1) -> None:
        self._session = load(file, session_options(threads, "all"), "it is measured as it is, and has to run there as it is")
        super().__init__(tuple(_spec(file, value) for value in self._session.get_inputs()), ())
        self._binding = self._session.io_binding()
        for value in self._session.get_outputs():
            self._binding.bind_output(value.name)  # without a buffer of ours: their shapes may depend on the values
        self._bound: dict[str, np.ndarray] = {}

    def _run_raw(self, feeds: Arrays) -> dict[str, np.ndarray]:
        for spec in self.inputs:
            if self._bound.get(spec.name) is not feeds[spec.name]:
                self._bound[spec.name] = feeds[spec.name]
                self._binding.bind_cpu_input(spec.name, feeds[spec.name])
        self._session.run_with_iobinding(self._binding)
        return {}

    def _close(self) -> None:
        del self._binding, self._session
        self._bound.clear()


def open_onnx(file: Path, threads: int = 1) -> AnyOnnxSession:
    """Opens the file and runs it once on zeros. Raises `IsthmusError` where ONNX Runtime cannot do either, or an input has no known shape of numbers."""
    session = AnyOnnxSession(file, threads)
    try:
        session.run_raw({spec.name: np.zeros(spec.shape, spec.dtype) for spec in session.inputs})
    except ERRORS as error:
        session.close()
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise IsthmusError(f"{file}: ONNX Runtime {ort.__version__} does not run it on zeros ({reason}); it cannot be measured") from None
    return session


def _spec(file: Path, value: Any) -> TensorSpec:
    dtype = _DTYPES.get(value.type)
    if dtype is None:
        raise IsthmusError(f"{file}: input {value.name!r} is a {value.type}; measured are models that take arrays of numbers")
    shape = [1 if axis == 0 and not isinstance(extent, int) else extent for axis, extent in enumerate(value.shape)]
    if not all(isinstance(extent, int) and extent > 0 for extent in shape):
        raise IsthmusError(
            f"{file}: input {value.name!r} has the shape {value.shape}: only the batch may be free, it is measured as 1; give the others their"
            " sizes (python -m onnxruntime.tools.make_dynamic_shape_fixed)"
        )
    return TensorSpec(value.name, tuple(shape), dtype)
