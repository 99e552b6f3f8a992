# SPDX-License-Identifier: Apache-2.0
"""CUDA's driver interface over ctypes: memory, streams, graphs. numpy only.

A fresh JetPack has neither cuda-python nor pycuda (the one is fetched from an index, the other compiled with nvcc); libcuda.so.1 is the driver
itself, has had that name and these functions from CUDA 10.2 (JetPack 4) on, and whoever runs TensorRT has it. libcudart is not asked for, as
its name changes with every CUDA. TensorRT works in the device's primary context, and so does this.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_uint, c_ulonglong, c_void_p
from typing import Any

import numpy as np

from isthmus.errors import IsthmusError

LIBRARY = "libcuda.so.1"
MULTIPROCESSORS, MAJOR, MINOR = 16, 75, 76  # CUdevice_attribute
CAPTURE_THREAD_LOCAL = 1  # CUstreamCaptureMode: another thread's calls do not disturb the capture
NON_BLOCKING = 1  # CUstream_flags: does not wait for the default stream
NO_DEVICE, NOT_SUPPORTED_BY_DRIVER, STUB = 100, 35, 34

_pointer, _device_pointer = POINTER(c_void_p), c_ulonglong
# By the names that libcuda exports (cuda.h maps cuMemAlloc to cuMemAlloc_v2): the types of the parameters. All give a CUresult.
PROTOTYPES: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (POINTER(c_int),),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDevicePrimaryCtxRetain": (_pointer, c_int),
    "cuDevicePrimaryCtxRelease": (c_int,),
    "cuCtxSetCurrent": (c_void_p,),
    "cuMemGetInfo_v2": (POINTER(c_size_t), POINTER(c_size_t)),
    "cuMemAlloc_v2": (POINTER(_device_pointer), c_size_t),
    "cuMemFree_v2": (_device_pointer,),
    "cuMemHostAlloc": (_pointer, c_size_t, c_uint),
    "cuMemFreeHost": (c_void_p,),
    "cuMemcpyHtoDAsync_v2": (_device_pointer, c_void_p, c_size_t, c_void_p),
    "cuMemcpyDtoHAsync_v2": (c_void_p, _device_pointer, c_size_t, c_void_p),
    "cuStreamCreate": (_pointer, c_uint),
    "cuStreamDestroy_v2": (c_void_p,),
    "cuStreamSynchronize": (c_void_p,),
    "cuStreamBeginCapture_v2": (c_void_p, c_int),
    "cuStreamEndCapture": (c_void_p, _pointer),
    "cuGraphLaunch": (c_void_p, c_void_p),
    "cuGraphExecDestroy": (c_void_p,),
    "cuGraphDestroy": (c_void_p,),
}
# Since CUDA 11.4; JetPack 4 has the older one, which CUDA 12 still exports under its old name.
INSTANTIATE: tuple[str, tuple[Any, ...]] = ("cuGraphInstantiateWithFlags", (_pointer, c_void_p, c_ulonglong))
INSTANTIATE_OLD: tuple[str, tuple[Any, ...]] = ("cuGraphInstantiate", (_pointer, c_void_p, _pointer, c_char_p, c_size_t))


class CudaError(IsthmusError):
    """A call that the driver refused. `code` is its CUresult."""

    def __init__(self, sentence: str, code: int) -> None:
        super().__init__(sentence)
        self.code = code


class Cuda:
    """The first GPU in its primary context. Raises `IsthmusError`: no driver, one that is too old, no GPU.

    `call` raises on an error; `release` does not: it frees, after whatever went wrong.
    """

    def __init__(self, library: str = LIBRARY) -> None:
        self._library = _library(library)
        self._functions = {name: _function(self._library, library, name, types) for name, types in PROTOTYPES.items()}
        self._instantiate = _instantiate(self._library, library)
        self._init()
        self._device = self._integer("cuDeviceGet", 0)
        self._context = c_void_p()
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._device)
        self._thread = 0
        self.make_current()

    def _init(self) -> None:
        code = self._functions["cuInit"](0)
        if code == NO_DEVICE:
            raise CudaError("CUDA finds no GPU: on a Jetson see that this user is in the group video; in a container, start it with --runtime nvidia", code)
        if code in (NOT_SUPPORTED_BY_DRIVER, STUB):
            raise CudaError(f"{LIBRARY} is no working driver ({self._words(code)}): install JetPack's, and take CUDA's stubs off the library path", code)
        if code:
            raise CudaError(f"CUDA does not start: {self._words(code)}; restart the board, and see that its driver is the one JetPack brought", code)

    def call(self, name: str, *arguments: Any) -> None:
        code = self._functions[name](*arguments)
        if code:
            raise CudaError(f"CUDA refuses {name}: {self._words(code)}", code)

    def release(self, name: str, *arguments: Any) -> None:
        """Frees. After an error that spoilt the context every call gives that same error again, and the driver frees what is left with the process."""
        self._functions[name](*arguments)

    def make_current(self) -> None:
        """The context belongs to threads one by one; a harness runs a session in another thread than the one that opened it."""
        if self._thread != threading.get_ident():
            self.call("cuCtxSetCurrent", self._context)
            self._thread = threading.get_ident()

    @property
    def version(self) -> str:
        """The newest CUDA that the driver knows: "12.6"."""
        number = self._integer("cuDriverGetVersion")
        return f"{number // 1000}.{number % 1000 // 10}"

    def gpu(self) -> dict[str, Any]:
        """Name, compute capability and number of multiprocessors, as `build_engine.py` writes them into an engine's record."""
        name = ctypes.create_string_buffer(256)
        self.call("cuDeviceGetName", name, len(name), self._device)
        major, minor, count = (self._integer("cuDeviceGetAttribute", attribute, self._device) for attribute in (MAJOR, MINOR, MULTIPROCESSORS))
        return {"name": name.value.decode("utf-8", "replace"), "sm": 10 * major + minor, "multiprocessors": count}

    def free_bytes(self) -> int:
        free, total = c_size_t(), c_size_t()
        self.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value

    # ---- what a session holds
    def pinned(self, shape: tuple[int, ...], dtype: str) -> tuple[np.ndarray, c_void_p]:
        """An array in memory that the GPU reads without a copy in between, and its address, for `cuMemFreeHost`."""
        size, address = _bytes(shape, dtype), c_void_p()
        self._allocated("cuMemHostAlloc", size, ctypes.byref(address), size, 0)
        assert address.value is not None
        return array_at(address.value, shape, dtype), address

    def device_memory(self, shape: tuple[int, ...], dtype: str) -> int:
        """The address of as many bytes on the device, for `cuMemFree_v2`."""
        size, address = _bytes(shape, dtype), _device_pointer()
        self._allocated("cuMemAlloc_v2", size, ctypes.byref(address), size)
        return int(address.value)

    def stream(self) -> int:
        stream = c_void_p()
        self.call("cuStreamCreate", ctypes.byref(stream), NON_BLOCKING)
        return int(stream.value or 0)

    def captured(self, stream: int, work: Callable[[], None]) -> int:
        """The executable graph of what `work` puts on `stream`. Raises `IsthmusError` where it cannot be captured; the stream is then as before."""
        graph, executable = c_void_p(), c_void_p()
        self.call("cuStreamBeginCapture_v2", stream, CAPTURE_THREAD_LOCAL)
        try:
            work()
        except IsthmusError:
            self.release("cuStreamEndCapture", stream, ctypes.byref(graph))
            raise
        self.call("cuStreamEndCapture", stream, ctypes.byref(graph))
        code = self._instantiate(executable, graph)
        self.release("cuGraphDestroy", graph)
        if code:
            raise CudaError(f"CUDA cannot instantiate the graph: {self._words(code)}", code)
        return int(executable.value or 0)

    def close(self) -> None:
        self.release("cuDevicePrimaryCtxRelease", self._device)

    def _allocated(self, name: str, size: int, *arguments: Any) -> None:
        try:
            self.call(name, *arguments)
        except CudaError as error:
            raise CudaError(f"{error}: {size:,} bytes were asked for, {self.free_bytes():,} are free: stop other programs", error.code) from None

    def _integer(self, name: str, *arguments: Any) -> int:
        value = c_int()
        self.call(name, ctypes.byref(value), *arguments)
        return value.value

    def _words(self, code: int) -> str:
        words = c_char_p()
        self._functions["cuGetErrorString"](code, ctypes.byref(words))
        return f"{words.value.decode(errors='replace')} (error {code})" if words.value else f"error {code}"


def array_at(address: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Memory that somebody else owns, as an array."""
    memory = (ctypes.c_ubyte * _bytes(shape, dtype)).from_address(address)
    array: np.ndarray = np.ctypeslib.as_array(memory).view(dtype)
    return array[: int(np.prod(shape, dtype=np.int64))].reshape(shape)


def _library(name: str) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(name)
    except OSError as error:
        raise IsthmusError(
            f"CUDA's driver cannot be loaded ({error}): a TensorRT engine runs on a machine with an NVIDIA GPU, and on a Jetson JetPack brings the driver"
        ) from None


def _function(library: ctypes.CDLL, file: str, name: str, types: tuple[Any, ...]) -> Any:
    try:
        function = getattr(library, name)
    except AttributeError:
        raise IsthmusError(f"{file} has no {name}: its driver is older than CUDA 10.2, the oldest that is known here; update JetPack") from None
    function.argtypes, function.restype = list(types), c_int
    return function


def _instantiate(library: ctypes.CDLL, file: str) -> Callable[[c_void_p, c_void_p], int]:
    """(executable to fill in, graph) -> CUresult."""
    name, types = INSTANTIATE
    if hasattr(library, name):
        new = _function(library, file, name, types)
        return lambda executable, graph: int(new(ctypes.byref(executable), graph, 0))
    name, types = INSTANTIATE_OLD
    old = _function(library, file, name, types)
    return lambda executable, graph: int(old(ctypes.byref(executable), graph, None, None, 0))


def _bytes(shape: tuple[int, ...], dtype: str) -> int:
    """At least one element: CUDA allocates no zero bytes."""
    return max(1, int(np.prod(shape, dtype=np.int64))) * np.dtype(dtype).itemsize


__all__ = ["Cuda", "CudaError"]
