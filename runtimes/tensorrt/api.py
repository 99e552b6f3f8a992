# SPDX-License-Identifier: Apache-2.0
"""TensorRT's Python interface as a session needs it: what differs between 8.2 and 11, and TensorRT-RTX, stands here and nowhere else at run time.

| | 8.2 to 8.4 | 8.5 to 9 | 10 and 11, TensorRT-RTX 1.x |
|---|---|---|---|
| border | bindings, by index | both | tensors, by name |
| run | `execute_async_v2`, a list of addresses | both | `set_tensor_address`, then `execute_async_v3` |

What differs while an engine is built stands in `build_engine.py`, which runs on a board without isthmus.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

from isthmus.errors import IsthmusError

MODULES = {"tensorrt": "'sudo apt install tensorrt' (JetPack)", "tensorrt_rtx": "pip install tensorrt-rtx-cu13"}
NAMES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
# Not `trt.nptype`: up to 8.5 it names numpy.bool, which numpy 1.24 no longer has.
DTYPES = {"FLOAT": "float32", "HALF": "float16", "INT8": "int8", "INT32": "int32", "BOOL": "bool", "UINT8": "uint8", "INT64": "int64"}


@dataclass(frozen=True)
class Binding:
    """One tensor of an engine's border, as the engine has it."""

    name: str
    is_input: bool
    shape: tuple[int, ...]
    dtype: str


def find_module(name: str) -> ModuleType:
    """`tensorrt` or `tensorrt_rtx`. Raises `IsthmusError` where it cannot be imported."""
    if name not in MODULES:
        raise IsthmusError(f"no TensorRT is called {name!r}: there are {', '.join(MODULES)}")
    try:
        return import_module(name)
    except ImportError as error:
        raise IsthmusError(f"the Python module {name} cannot be imported ({error}): it comes with {MODULES[name]}") from None


def open_log(trt: Any) -> Any:
    """A logger that keeps what TensorRT complains of: `errors`, for the sentence a user gets."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            # That CUDA does not start, some versions say in a warning.
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR) or "CUDA initialization failure" in msg:
                self.errors.append(msg)

    return Log()


def open_engine(trt: Any, log: Any, content: bytes, name: str, dla: bool = False) -> tuple[Any, Any]:
    """(runtime, engine): the runtime must outlive the engine. Raises `IsthmusError` with what is wrong with file `name`."""
    try:
        runtime = trt.Runtime(log)
    except TypeError:  # pybind11's "factory function returned nullptr": CUDA does not start
        runtime = None
    if runtime is None:
        raise IsthmusError(refusal(trt, log.errors, name))
    if dla:
        runtime.DLA_core = 0
    engine = runtime.deserialize_cuda_engine(content)
    if engine is None:
        raise IsthmusError(refusal(trt, log.errors, name))
    return runtime, engine


def open_context(trt: Any, log: Any, engine: Any, name: str) -> Any:
    context = engine.create_execution_context()
    if context is None:
        raise IsthmusError(refusal(trt, log.errors, name))
    return context


def bindings(engine: Any) -> list[Binding]:
    """Inputs and outputs in the engine's order."""
    if hasattr(engine, "num_io_tensors"):  # since 8.5
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        return [
            Binding(name, engine.get_tensor_mode(name).name == "INPUT", tuple(engine.get_tensor_shape(name)), _dtype(engine.get_tensor_dtype(name)))
            for name in names
        ]
    return [
        Binding(engine.get_binding_name(index), engine.binding_is_input(index), tuple(engine.get_binding_shape(index)), _dtype(engine.get_binding_dtype(index)))
        for index in range(engine.num_bindings)
    ]


def _dtype(dtype: Any) -> str:
    return DTYPES.get(dtype.name, dtype.name)


class Enqueue:
    """Puts one run of `context` on a stream, with the device addresses it was made with."""

    def __init__(self, context: Any, border: Sequence[Binding], addresses: Mapping[str, int]) -> None:
        self._context = context
        self._by_name = hasattr(context, "execute_async_v3")
        self._addresses = [addresses[binding.name] for binding in border]
        for name, address in addresses.items() if self._by_name else ():
            if not context.set_tensor_address(name, address):
                raise IsthmusError(f"TensorRT takes no memory for tensor {name!r}")

    def __call__(self, stream: int) -> None:
        if self._by_name:
            started = self._context.execute_async_v3(stream_handle=stream)
        else:
            started = self._context.execute_async_v2(bindings=self._addresses, stream_handle=stream)
        if not started:
            raise IsthmusError("TensorRT did not start the run")


def open_profiler(trt: Any, context: Any) -> Any:
    """From now on each run of `context` adds the milliseconds of every layer to `spent_ms`, in the order of execution. Keep it as long as the context."""

    class Profiler(trt.IProfiler):
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.spent_ms: dict[str, float] = {}

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.spent_ms[layer_name] = self.spent_ms.get(layer_name, 0.0) + ms

    profiler = Profiler()
    context.profiler = profiler
    return profiler


# What NVIDIA writes into its log, and what it means for whoever holds the file. The first that fits.
_REFUSALS = (
    (r"driver version is insufficient|CUDA initialization failure with error:? 35\b", "the GPU's driver is too old for it, or there is none: update JetPack"),
    (r"CUDA initialization failure|no CUDA-capable device", "CUDA finds no GPU: see that this user may use it (group video)"),
    (r"out of memory|OutOfMemory|cudaErrorMemoryAllocation", "the memory for it is not free: stop other programs"),
    (
        r"header\.size == blobSize|bufferSize >= minBufferSize|empty memory buffer|size of the serialized engine|truncated",
        "the file is cut short: build it again",
    ),
    (
        r"[Mm]agicTag|serialization version|Version tag does not match|different version|older plan file|newer plan file",
        "it is no engine of this TensorRT, but of another version, or no engine: build it here, with this one",
    ),
    (r"compute capability|different.*device|incompatible.*device|device model", "it was built for another GPU: build it on the board that runs it"),
)


def refusal(trt: Any, errors: Sequence[str], name: str) -> str:
    """One sentence for what TensorRT wrote when it did not take file `name`."""
    version = f"{NAMES[trt.__name__]} {trt.__version__}"
    found = [(text, meaning) for text in errors for pattern, meaning in _REFUSALS if re.search(pattern, text)]
    # Reading a damaged file ends in further complaints, where there is no GPU of that too: the first is about the file.
    if found:
        return f"{name}: {version} does not open it: {found[0][1]}"
    lines = [line.strip() for text in errors for line in text.splitlines() if line.strip()]
    return f"{name}: {version} does not open it ({lines[0][:300] if lines else 'it gives no reason'}): build it again"


__all__ = ["Binding", "Enqueue", "bindings", "find_module", "open_context", "open_engine", "open_log", "open_profiler", "refusal"]
