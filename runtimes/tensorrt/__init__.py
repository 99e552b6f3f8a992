# SPDX-License-Identifier: Apache-2.0
"""Runs a TensorRT engine that this machine built (`python -m isthmus.runtimes build`): JetPack's `tensorrt`, or TensorRT-RTX, over CUDA's driver."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from isthmus.errors import IsthmusError
from isthmus.runtimes.tensorrt.api import NAMES, Binding, Enqueue, bindings, find_module, open_context, open_engine, open_log, open_profiler
from isthmus.runtimes.tensorrt.cuda import Cuda
from isthmus.runtimes.tensorrt.records import checked_engine, chosen_engine
from isthmus.session import Arrays, Session
from isthmus.spec import TensorSpec

SEALS_WHAT_IT_BUILDS = True  # `open_session` is told whether to trust an engine that this user's `build` did not seal
SLOTS = 2  # runs in flight in Offline: while the GPU computes one, the other's data move


class TensorRtSession(Session):
    """One engine on the first GPU: pinned buffers, one stream, and one CUDA graph of the whole run where TensorRT can be captured.

    `run_raw` gives views of pinned memory that the next run overwrites and `close` frees. `run_ahead` alternates between two such sets, each
    with a stream of its own. `inputs` and `outputs` are checked against the engine where they are given and read from it else.
    Reading an engine runs code of the file: `content` is one that this user built or trusts.
    """

    engine = "tensorrt"

    def __init__(
        self,
        content: bytes,
        inputs: tuple[TensorSpec, ...] | None = None,
        outputs: tuple[TensorSpec, ...] | None = None,
        *,
        name: str = "the engine",
        module: str = "tensorrt",
        engine_name: str = "",
        dla: bool = False,
        graphs: bool = True,
    ) -> None:
        self._trt = find_module(module)
        self._name, self.engine_name, self._graphs = name, engine_name, graphs
        with ExitStack() as opened:
            self._cuda = Cuda()
            opened.callback(self._cuda.close)
            self._log = open_log(self._trt)
            self._runtime, self._engine = open_engine(self._trt, self._log, content, name, dla)
            opened.callback(self._forget)
            self._border = bindings(self._engine)
            super().__init__(
                _agreed(name, "inputs", inputs, [binding for binding in self._border if binding.is_input]),
                _agreed(name, "outputs", outputs, [binding for binding in self._border if not binding.is_input]),
            )
            self._slots: list[_Slot] = []
            opened.callback(self._close_slots)
            self._slots.append(self._new_slot())
            self._opened = opened.pop_all()
        self._next, self._ahead = 0, False

    @property
    def version(self) -> str:
        """ "TensorRT 10.3.0, int8 engine, CUDA graph"; without a graph, why."""
        slot = self._slots[0]
        graph = "CUDA graph" if slot.graph else f"no CUDA graph ({slot.why_no_graph})"
        return ", ".join(filter(None, (f"{NAMES[self._trt.__name__]} {self._trt.__version__}", self.engine_name and f"{self.engine_name} engine", graph)))

    @property
    def has_graph(self) -> bool:
        return bool(self._slots[0].graph)

    def run_ahead(self, feeds: Arrays) -> None:
        """Starts a run while the one before is still on the GPU."""
        if len(self._slots) < SLOTS:
            self._slots.append(self._new_slot())
        self._cuda.make_current()
        slot = self._slots[self._next]
        self._next = (self._next + 1) % SLOTS
        slot.wait()
        slot.start(feeds)
        self._ahead = True

    def finish(self) -> dict[str, np.ndarray]:
        """Waits for every run that `run_ahead` started; gives the outputs of the last."""
        self._cuda.make_current()
        for slot in self._slots:
            slot.wait()
        self._ahead = False
        return self._slots[self._next - 1 if len(self._slots) == SLOTS else 0].outputs

    def per_layer(self, feeds: Arrays, runs: int = 20) -> list[tuple[str, float]]:
        """By TensorRT's own profiler, in a context of its own so that this one stays as fast as it is. The names are those of the fused layers."""
        if runs < 1:
            raise IsthmusError(f"time per layer over {runs} runs: expected at least 1")
        self._cuda.make_current()
        slot = self._new_slot(graph=False)
        try:
            for _ in range(2):  # the first runs allocate and set clocks
                slot.start(feeds)
                slot.wait()
            profiler = open_profiler(self._trt, slot.context)
            for _ in range(runs):
                slot.start(feeds)
                slot.wait()
        finally:
            slot.close()
        return [(layer, total_ms * 1e6 / runs) for layer, total_ms in profiler.spent_ms.items()]

    def _new_slot(self, graph: bool = True) -> _Slot:
        return _Slot(self._cuda, open_context(self._trt, self._log, self._engine, self._name), self._border, graph and self._graphs)

    def _run_raw(self, feeds: Arrays) -> dict[str, np.ndarray]:
        if self._ahead:
            self.finish()
        self._cuda.make_current()
        slot = self._slots[0]
        slot.start(feeds)
        slot.wait()
        return slot.outputs

    def _close(self) -> None:
        self._cuda.make_current()
        self._opened.close()

    def _close_slots(self) -> None:
        for slot in self._slots:
            slot.close()
        self._slots.clear()

    def _forget(self) -> None:
        del self._engine, self._runtime  # in this order


class _Slot:
    """What one run in flight needs of its own: a context, a stream, pinned and device memory, and the graph of copying in, running, copying out."""

    def __init__(self, cuda: Cuda, context: Any, border: Sequence[Binding], graph: bool) -> None:
        self._cuda, self.context, self.graph, self.why_no_graph = cuda, context, 0, "" if graph else "not asked for"
        with ExitStack() as opened:
            self._stream = cuda.stream()
            opened.callback(cuda.release, "cuStreamDestroy_v2", self._stream)
            self._inputs: list[tuple[str, np.ndarray, ctypes.c_void_p, int]] = []
            self._results: list[tuple[str, np.ndarray, ctypes.c_void_p, int]] = []
            for binding in border:
                array, address = cuda.pinned(binding.shape, binding.dtype)
                opened.callback(cuda.release, "cuMemFreeHost", address)
                device = cuda.device_memory(binding.shape, binding.dtype)
                opened.callback(cuda.release, "cuMemFree_v2", device)
                (self._inputs if binding.is_input else self._results).append((binding.name, array, address, device))
            self._enqueue = Enqueue(context, border, {name: device for name, _, _, device in (*self._inputs, *self._results)})
            opened.callback(self._forget)
            self.outputs = {name: array for name, array, _, _ in self._results}
            for _, array, _, _ in self._inputs:
                array[...] = 0
            self._put()  # TensorRT asks for a run before one is captured: it allocates and sets itself up
            self.wait()
            if graph:
                self._capture(opened)
            self._opened = opened.pop_all()

    def _capture(self, opened: ExitStack) -> None:
        """Some engines cannot be captured (a loop, a copy in the middle of the run): they then run as they are, and `why_no_graph` says so."""
        try:
            self.graph = self._cuda.captured(self._stream, self._put)
        except IsthmusError as error:
            self.why_no_graph = str(error)
            self._put()
            self.wait()  # the stream still works
            return
        opened.callback(self._cuda.release, "cuGraphExecDestroy", self.graph)

    def _put(self) -> None:
        for _, array, address, device in self._inputs:
            self._cuda.call("cuMemcpyHtoDAsync_v2", device, address, array.nbytes, self._stream)
        self._enqueue(self._stream)
        for _, array, address, device in self._results:
            self._cuda.call("cuMemcpyDtoHAsync_v2", address, device, array.nbytes, self._stream)

    def start(self, feeds: Arrays) -> None:
        for name, array, _, _ in self._inputs:
            np.copyto(array, feeds[name], casting="no")
        if self.graph:
            self._cuda.call("cuGraphLaunch", self.graph, self._stream)
        else:
            self._put()

    def wait(self) -> None:
        self._cuda.call("cuStreamSynchronize", self._stream)

    def close(self) -> None:
        self._cuda.release("cuStreamSynchronize", self._stream)  # nothing is freed under a run
        self._opened.close()

    def _forget(self) -> None:
        self._enqueue = self.context = None  # type: ignore[assignment]  # after this the slot is not used


def open_session(folder: Path, entry: Mapping[str, Any], threads: int = 1, trust: bool = False, engine: str = "") -> TensorRtSession:
    """The engine that was built here from the artifact of manifest entry `entry`: the one `bench` chose, else the first, or `engine` by name.

    Raises `IsthmusError`: not built yet, built by another TensorRT or for another GPU, cut short, changed, or not built by this user and not
    to `trust`. `threads` says nothing to a GPU.
    """
    folder = Path(folder)
    planned = chosen_engine(folder, engine)
    content, record = checked_engine(folder, planned, trust)
    module = str(record["module"])
    find_module(module)
    inputs, outputs = (tuple(TensorSpec.from_json(spec) for spec in entry[side]) for side in ("inputs", "outputs"))
    return TensorRtSession(
        content, inputs, outputs, name=str(folder / planned["output"]), module=module, engine_name=str(planned["name"]), dla=bool(planned["dla"])
    )


def check_built(folder: Path, trust: bool = False) -> None:
    """Raises `IsthmusError` with what keeps this machine from opening the engine that stands in an artifact's folder."""
    checked_engine(Path(folder), chosen_engine(Path(folder)), trust)


def open_engine_file(file: str | Path, module: str = "tensorrt") -> TensorRtSession:
    """Opens any engine file, whoever built it: reading one runs code of it, so only what you trust. Its border is what it says of itself."""
    path = Path(file)
    if not path.is_file():
        raise IsthmusError(f"{path}: no such file")
    return TensorRtSession(path.read_bytes(), name=str(path), module=module)


def _agreed(name: str, side: str, specs: tuple[TensorSpec, ...] | None, found: Sequence[Binding]) -> tuple[TensorSpec, ...]:
    """The specs in the manifest's order. Raises `IsthmusError` where the engine's border is another: a session checks nothing while it runs."""
    if any(extent < 0 for binding in found for extent in binding.shape):
        raise IsthmusError(f"{name}: its {side} have shapes that are not fixed ({_shown(found)}): build it from a model with fixed shapes")
    if specs is None:
        return tuple(TensorSpec(binding.name, binding.shape, binding.dtype) for binding in found)
    expected = [Binding(spec.name, side == "inputs", spec.shape, spec.dtype) for spec in specs]
    if sorted(expected, key=_by_name) != sorted(found, key=_by_name):
        raise IsthmusError(f"{name}: has the {side} {_shown(found)}, the manifest says {_shown(expected)}: build it again, or compile the bundle again")
    return specs


def _by_name(binding: Binding) -> str:
    return binding.name


def _shown(border: Sequence[Binding]) -> str:
    return ", ".join(f"{binding.name} {binding.dtype}{list(binding.shape)}" for binding in border)


__all__ = ["TensorRtSession", "check_built", "open_engine_file", "open_session"]
