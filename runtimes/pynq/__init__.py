# SPDX-License-Identifier: Apache-2.0
"""Engine `pynq`: a bitstream on a Zynq board through PYNQ's overlay, int8 in and out, by DMA streams or by buffers the kernel reads itself.

The artifact is the `.bit` file; beside it lie its `.hwh`, and `pynq.json`, which says how tensors lie on the bus. Runs on the board alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from isthmus.errors import IsthmusError
from isthmus.runtimes.pynq.buffers import BeatLayout
from isthmus.runtimes.pynq.hardware import START_OFFSET, Hardware, Kernel, parse_hwh
from isthmus.session import Arrays, Session
from isthmus.spec import TensorSpec

SIDE_FILE = "pynq.json"
SCHEMA = 1
STREAM, MEMORY = "stream", "memory"
START, DONE = 1, 2  # bits of AP_CTRL
TIMEOUT_S = 10.0


class PynqSession(Session):
    """One sample a run. Opening it configures the FPGA; buffers are allocated once, in memory that the DMA reaches, and freed with the session."""

    engine = "pynq"

    def __init__(self, bitstream: Path, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
        super().__init__(inputs, outputs)
        (self._input,), (self._output,) = _single(inputs, "input"), _single(outputs, "output")
        side = _side_file(bitstream.parent / SIDE_FILE)
        self._send = BeatLayout.from_json(side["input"], self._input.size, f"{SIDE_FILE}: input")
        self._receive = BeatLayout.from_json(side["output"], self._output.size, f"{SIDE_FILE}: output")
        hardware = parse_hwh(_read(bitstream.with_suffix(".hwh"), "Vivado writes it beside the bitstream; copy both"), bitstream.with_suffix(".hwh").name)
        run = _check_design(side, hardware, self._send, self._receive)
        overlay, allocate, self.version = _configured(bitstream)
        self._sent, self._received = (allocate(shape=(layout.buffer_bytes,), dtype=np.uint8) for layout in (self._send, self._receive))
        self._sent[:] = 0  # what fills up a beat stays 0
        self._exchange = (
            _Stream(_at(overlay, run.path), self._sent, self._received)
            if side["interface"] == STREAM
            else _Memory(_at(overlay, run.path), run, side["arguments"], self._sent, self._received)
        )

    def _run_raw(self, feeds: Arrays) -> dict[str, np.ndarray]:
        self._send.pack(feeds[self._input.name], self._sent)
        self._exchange.run()
        return {self._output.name: self._receive.unpack(np.asarray(self._received)).reshape(self._output.shape)}

    def _close(self) -> None:
        for buffer in (self._sent, self._received):
            buffer.freebuffer()


class _Stream:
    """The kernel runs freely on what the DMA sends."""

    def __init__(self, dma: Any, sent: Any, received: Any) -> None:
        self.dma, self.sent, self.received = dma, sent, received

    def run(self) -> None:
        # The receiver first: a kernel with a short pipeline answers before a second call would have come.
        self.dma.recvchannel.transfer(self.received)
        self.dma.sendchannel.transfer(self.sent)
        self.dma.sendchannel.wait()
        self.dma.recvchannel.wait()


class _Memory:
    """The kernel reads and writes the buffers itself, at addresses written into its registers, when its start bit is set."""

    def __init__(self, kernel: Any, description: Kernel, arguments: Mapping[str, str], sent: Any, received: Any) -> None:
        self.kernel, self.sent, self.received = kernel, sent, received
        for argument, buffer in ((arguments["input"], sent), (arguments["output"], received)):
            for word, offset in enumerate(description.address_registers(argument)):
                kernel.write(offset, (buffer.device_address >> (32 * word)) & 0xFFFFFFFF)

    def run(self) -> None:
        self.sent.flush()
        self.kernel.write(START_OFFSET, START)
        deadline = time.monotonic() + TIMEOUT_S
        while not self.kernel.read(START_OFFSET) & DONE:
            if time.monotonic() > deadline:
                raise IsthmusError(f"the kernel did not finish within {TIMEOUT_S:g} s: the bitstream and {SIDE_FILE} may not be of one design")
        self.received.invalidate()


def open_session(folder: Path, entry: Mapping[str, Any], threads: int = 1) -> PynqSession:
    """Configures the FPGA with `entry["artifact"]` in `folder`. `threads` is ignored: the FPGA has none.

    Raises `IsthmusError` where a file is missing, the design is not what `pynq.json` says, or this machine is no PYNQ board.
    """
    bitstream = Path(folder) / str(entry["artifact"])
    if bitstream.suffix != ".bit":
        raise IsthmusError(f"{bitstream}: expected a bitstream (.bit)")
    if not bitstream.is_file():
        raise IsthmusError(f"{bitstream}: no such bitstream; run the planned synthesis steps where the vendor's tool is, and copy what they make here")
    inputs, outputs = (tuple(TensorSpec.from_json(spec) for spec in entry[side]) for side in ("inputs", "outputs"))
    return PynqSession(bitstream, inputs, outputs)


def _configured(bitstream: Path) -> tuple[Any, Any, str]:
    """(overlay, pynq.allocate, version). Imported here and nowhere else: on any other machine there is no pynq."""
    try:
        import pynq
    except ImportError as error:
        raise IsthmusError(f"the bitstream {bitstream.name} runs on a PYNQ board, and this machine has no pynq ({error}); open the bundle there") from None
    try:
        return pynq.Overlay(str(bitstream)), pynq.allocate, f"pynq {pynq.__version__}"
    except (OSError, RuntimeError, ValueError) as error:
        raise IsthmusError(
            f"{bitstream}: PYNQ cannot configure the FPGA ({type(error).__name__}: {error}); it needs root, and a bitstream of this part"
        ) from None


def _single(specs: tuple[TensorSpec, ...], side: str) -> tuple[TensorSpec, ...]:
    if len(specs) != 1 or specs[0].dtype != "int8":
        found = [f"{spec.name}: {spec.dtype}" for spec in specs]
        raise IsthmusError(f"engine pynq moves one int8 {side}, found {found}; cut the network (--split) so that one int8 tensor crosses")
    if specs[0].shape[0] != 1:
        raise IsthmusError(f"engine pynq moves one sample a run, and {specs[0].name!r} has a batch of {specs[0].shape[0]}; compile with batch 1")
    return specs


def _read(path: Path, hint: str) -> bytes:
    if not path.is_file():
        raise IsthmusError(f"{path}: no such file: {hint}")
    return path.read_bytes()


def _side_file(path: Path) -> dict[str, Any]:
    try:
        side = json.loads(_read(path, "it says how tensors lie on the bus, and belongs to the bitstream"))
    except (ValueError, RecursionError) as error:
        raise IsthmusError(f"{path}: not JSON: {error}") from None
    if not isinstance(side, dict) or side.get("schema") != SCHEMA:
        raise IsthmusError(f"{path}: schema {side.get('schema') if isinstance(side, dict) else None!r}, this version reads schema {SCHEMA}")
    if side.get("interface") not in (STREAM, MEMORY):
        raise IsthmusError(f"{path}: interface {side.get('interface')!r}, expected {STREAM!r} (DMA) or {MEMORY!r} (the kernel's own bus)")
    arguments = side.get("arguments")
    if side["interface"] == MEMORY and not (isinstance(arguments, dict) and all(isinstance(arguments.get(name), str) for name in ("input", "output"))):
        raise IsthmusError(f"{path}: interface {MEMORY!r} needs arguments.input and arguments.output, the kernel's own names")
    return {"input": None, "output": None, "kernel": "", **side}


def _check_design(side: Mapping[str, Any], hardware: Hardware, send: BeatLayout, receive: BeatLayout) -> Any:
    """The DMA or the kernel that carries the data. Raises `IsthmusError` where widths or registers are not what `pynq.json` says."""
    if side["interface"] == MEMORY:
        kernel = hardware.kernel(str(side["kernel"]))
        for argument in side["arguments"].values():
            kernel.address_registers(argument)
        return kernel
    dma = hardware.only_dma()
    if (dma.send_bytes, dma.receive_bytes) != (send.beat_bytes, receive.beat_bytes):
        raise IsthmusError(
            f"the streams of {dma.path} are {dma.send_bytes} and {dma.receive_bytes} bytes wide, {SIDE_FILE} says {send.beat_bytes} and {receive.beat_bytes}:"
            " bitstream and bundle are not of one design"
        )
    return dma


def _at(overlay: Any, path: str) -> Any:
    """`overlay.hier_0.axi_dma_0` for "hier_0/axi_dma_0"."""
    for name in path.split("/"):
        if not hasattr(overlay, name):
            raise IsthmusError(f"the overlay has no {path!r}: the .hwh file is not that of this bitstream")
        overlay = getattr(overlay, name)
    return overlay
