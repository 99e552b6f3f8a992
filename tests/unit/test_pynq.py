# SPDX-License-Identifier: Apache-2.0
"""The PYNQ driver as far as it can be known without a board: buffer layouts, the hardware description, and what it refuses. Nothing here runs a bitstream."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.errors import IsthmusError
from isthmus.runtimes import pynq as engine
from isthmus.runtimes.pynq.buffers import BeatLayout
from isthmus.runtimes.pynq.hardware import Dma, parse_hwh
from isthmus.spec import TensorSpec

DMA = """<MODULE FULLNAME="/hier_0/axi_dma_0" INSTANCE="hier_0_axi_dma_0" MODTYPE="axi_dma" VLNV="xilinx.com:ip:axi_dma:7.1"><PARAMETERS>
<PARAMETER NAME="c_include_mm2s" VALUE="{mm2s}"/><PARAMETER NAME="c_include_s2mm" VALUE="1"/>
<PARAMETER NAME="c_m_axis_mm2s_tdata_width" VALUE="{send}"/><PARAMETER NAME="c_s_axis_s2mm_tdata_width" VALUE="{receive}"/>
</PARAMETERS></MODULE>"""
KERNEL = """<MODULE FULLNAME="/{name}" INSTANCE="{name}" MODTYPE="myproject_axi" VLNV="xilinx.com:hls:myproject_axi:1.0">
<ADDRESSBLOCKS><ADDRESSBLOCK><REGISTERS>{registers}</REGISTERS></ADDRESSBLOCK></ADDRESSBLOCKS></MODULE>"""
# A field inside a register has properties of the same name: its offset is a bit, not an address.
REGISTER = """<REGISTER NAME="{name}"><PROPERTY NAME="ADDRESS_OFFSET" VALUE="{offset}"/>
<FIELDS><FIELD NAME="bit"><PROPERTY NAME="ADDRESS_OFFSET" VALUE="7"/></FIELD></FIELDS></REGISTER>"""


def hwh(*modules: str) -> bytes:
    return f'<?xml version="1.0" encoding="UTF-8"?><EDKSYSTEM><MODULES>{"".join(modules)}</MODULES></EDKSYSTEM>'.encode()


def dma(send: int = 32, receive: int = 8, mm2s: int = 1) -> str:
    return DMA.format(send=send, receive=receive, mm2s=mm2s)


def kernel(name: str = "net_0", **registers: int | str) -> str:
    return KERNEL.format(name=name, registers="".join(REGISTER.format(name=key, offset=value) for key, value in registers.items()))


# ---- buffers
@settings(max_examples=100)
@given(st.integers(1, 300), st.integers(1, 16), st.sampled_from([16, 32, 64, 128]), st.integers(0, 2**32 - 1))
def test_what_is_packed_is_unpacked(elements: int, per_beat: int, beat_bytes: int, seed: int) -> None:
    layout = BeatLayout(elements, per_beat, beat_bytes)
    array = np.random.default_rng(seed).integers(-128, 128, elements, np.int8)
    buffer = np.zeros(layout.buffer_bytes, np.uint8)
    layout.pack(array, buffer)
    assert np.array_equal(layout.unpack(buffer), array)
    assert layout.buffer_bytes % beat_bytes == 0
    filling = buffer.reshape(-1, beat_bytes)[:, per_beat:]
    assert not filling.any()


def test_pixels_lie_one_a_beat_filled_up_to_the_bus() -> None:
    """Three channels on a bus of four bytes, as an HLS stream of pixels has them."""
    layout = BeatLayout(6, 3, 4)
    buffer = np.zeros(layout.buffer_bytes, np.uint8)
    layout.pack(np.array([[[1, 2, -3], [4, -5, 6]]], np.int8), buffer)
    assert buffer.tolist() == [1, 2, 253, 0, 4, 251, 6, 0]


def test_the_last_beat_may_be_short() -> None:
    layout = BeatLayout(5, 4, 4)
    buffer = np.zeros(layout.buffer_bytes, np.uint8)
    layout.pack(np.arange(5, dtype=np.int8), buffer)
    assert (layout.beats, buffer.tolist()) == (2, [0, 1, 2, 3, 4, 0, 0, 0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0, 1, 4), "expected at least 1"), ((4, 1, 3), "a power of two up to 128"), ((4, 1, 256), "a power of two"), ((4, 5, 4), "do not fit a beat of 4 bytes")],
)
def test_layouts_that_are_none(arguments: tuple[int, int, int], message: str) -> None:
    with pytest.raises(IsthmusError, match=message):
        BeatLayout(*arguments)


# ---- the hardware description
def test_a_dma_and_a_kernel_are_found() -> None:
    found = parse_hwh(hwh(dma(), kernel("net_0", CTRL="0", x_1="0x10", x_2="0x14", y="28")))
    assert found.only_dma() == Dma("hier_0/axi_dma_0", 4, 1)
    made = found.kernel("")
    assert made.registers == {"CTRL": 0, "x_1": 16, "x_2": 20, "y": 28}
    assert (made.address_registers("x"), made.address_registers("y")) == ((16, 20), (28,))
    assert found.kernel("net_0") == made


def test_a_dma_without_a_stream_each_way_does_not_count() -> None:
    with pytest.raises(IsthmusError, match=r"0 DMAs with a stream each way"):
        parse_hwh(hwh(dma(mm2s=0))).only_dma()
    with pytest.raises(IsthmusError, match=r"2 DMAs with a stream each way \(hier_0/axi_dma_0, hier_0/axi_dma_0\)"):
        parse_hwh(hwh(dma(), dma())).only_dma()


def test_missing_kernels_and_arguments_are_listed() -> None:
    found = parse_hwh(hwh(kernel("one", CTRL=0), kernel("two", CTRL=0)))
    with pytest.raises(IsthmusError, match="2 HLS kernels called 'anything', expected one: there are one, two"):
        found.kernel("")
    with pytest.raises(IsthmusError, match="no register for argument 'x'; it has CTRL"):
        found.kernel("two").address_registers("x")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not XML"),
        (b"<EDKSYSTEM>", "not XML, or cut short"),
        (b"<html/>", "it begins with <html>"),
        (b'<!DOCTYPE a [<!ENTITY b "c">]><EDKSYSTEM>&b;</EDKSYSTEM>', "defines entities"),
        (hwh(dma(send=33)), "33 bits, expected whole bytes"),
        (hwh(kernel(x="ten")), "register x of net_0: 'ten' is no whole number"),
        (hwh(kernel(x="-4")), "'-4' is no whole number"),
    ],
)
def test_descriptions_that_are_none(data: bytes, message: str) -> None:
    with pytest.raises(IsthmusError, match=message):
        parse_hwh(data)


@settings(max_examples=100)
@given(st.integers(0, 900), st.binary(min_size=1, max_size=3))
def test_a_damaged_description_is_read_or_refused(at: int, damage: bytes) -> None:
    data = bytearray(hwh(dma(), kernel(CTRL=0, x=16)))
    data[at : at + len(damage)] = damage
    try:
        parse_hwh(bytes(data))
    except IsthmusError as error:
        assert "the .hwh file" in str(error)


# ---- opening
def artifact(folder: Path, side: dict[str, Any] | None = None, description: bytes | None = None) -> dict[str, Any]:
    (folder / "net.bit").write_bytes(b"no real bitstream: it must never be loaded")
    (folder / "net.hwh").write_bytes(hwh(dma()) if description is None else description)
    default = {"schema": 1, "interface": "stream", "input": {"per_beat": 3, "beat_bytes": 4}, "output": {"per_beat": 1, "beat_bytes": 1}}
    (folder / "pynq.json").write_text(json.dumps({**default, **(side or {})}))
    specs = [TensorSpec("x", (1, 4, 4, 3), "int8", "NHWC", 2**-5, 0), TensorSpec("y", (1, 10), "int8", "NC", 2**-4, 0)]
    return {"artifact": "net.bit", "inputs": [specs[0].to_json()], "outputs": [specs[1].to_json()]}


def test_a_machine_without_pynq_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that can be checked was checked before; then the sentence. There is no stand-in for the board."""
    monkeypatch.setitem(sys.modules, "pynq", None)
    with pytest.raises(IsthmusError, match=r"the bitstream net\.bit runs on a PYNQ board, and this machine has no pynq"):
        engine.open_session(tmp_path, artifact(tmp_path))


@pytest.mark.parametrize("file", ["net.bit", "net.hwh", "pynq.json"])
def test_a_missing_file_is_named(file: str, tmp_path: Path) -> None:
    entry = artifact(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(IsthmusError, match=rf"{file}: no such"):
        engine.open_session(tmp_path, entry)


@pytest.mark.parametrize(
    ("side", "description", "message"),
    [
        ({"schema": 2}, None, "schema 2, this version reads schema 1"),
        ({"interface": "telepathy"}, None, "interface 'telepathy', expected 'stream'"),
        ({"input": {"per_beat": 3, "beat_bytes": 8}}, None, "are 4 and 1 bytes wide, pynq.json says 8 and 1"),
        ({"input": {"per_beat": "3"}}, None, "expected the whole numbers per_beat and beat_bytes"),
        ({"interface": "memory"}, None, "needs arguments.input and arguments.output"),
        ({"interface": "memory", "arguments": {"input": "x", "output": "y"}}, hwh(kernel(CTRL=0, x=16)), "no register for argument 'y'"),
        ({"interface": "memory", "arguments": {"input": "x", "output": "y"}}, hwh(dma()), "0 HLS kernels"),
    ],
)
def test_a_design_that_is_another_is_refused(side: dict[str, Any], description: bytes | None, message: str, tmp_path: Path) -> None:
    with pytest.raises(IsthmusError, match=message):
        engine.open_session(tmp_path, artifact(tmp_path, side, description))


def test_only_one_int8_tensor_of_one_sample_goes_over_the_bus(tmp_path: Path) -> None:
    entry = artifact(tmp_path)
    floats = TensorSpec("y", (1, 10), "float32", "NC").to_json()
    with pytest.raises(IsthmusError, match=r"moves one int8 output, found \['y: float32'\]"):
        engine.open_session(tmp_path, {**entry, "outputs": [floats]})
    with pytest.raises(IsthmusError, match="moves one int8 input"):
        engine.open_session(tmp_path, {**entry, "inputs": entry["inputs"] * 2})
    with pytest.raises(IsthmusError, match="has a batch of 2"):
        engine.open_session(tmp_path, {**entry, "outputs": [TensorSpec("y", (2, 10), "int8", "NC", 2**-4, 0).to_json()]})
    with pytest.raises(IsthmusError, match="expected a bitstream"):
        engine.open_session(tmp_path, {**entry, "artifact": "net.xclbin"})
