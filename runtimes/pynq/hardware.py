# SPDX-License-Identifier: Apache-2.0
"""What Vivado's hardware description (`.hwh`) says of a design: its DMA with the widths of its streams, and the registers of its HLS kernels."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree  # a board's Python has no other parser
from collections.abc import Mapping
from dataclasses import dataclass

from isthmus.errors import IsthmusError

MAX_BYTES = 64 * 2**20
DMA, HLS = "axi_dma", ":hls:"
SEND_WIDTH, RECEIVE_WIDTH = "c_m_axis_mm2s_tdata_width", "c_s_axis_s2mm_tdata_width"
START_OFFSET = 0  # AP_CTRL of every HLS kernel with an AXI-lite control port


@dataclass(frozen=True)
class Dma:
    """`path` is the DMA's place in the overlay ("hier_0/axi_dma_0"); widths of the streams to and from the kernel in bytes, 0 for one that is not there."""

    path: str
    send_bytes: int
    receive_bytes: int


@dataclass(frozen=True)
class Kernel:
    """An HLS kernel: its place in the overlay and the offset of each register, by the argument's name."""

    path: str
    registers: Mapping[str, int]

    def address_registers(self, argument: str) -> tuple[int, ...]:
        """Where the address of a buffer goes: one register, or low and high word. Raises `IsthmusError` where the kernel has no such argument."""
        if argument in self.registers:
            return (self.registers[argument],)
        words = [f"{argument}_{index}" for index in (1, 2)]
        if all(word in self.registers for word in words):
            return tuple(self.registers[word] for word in words)
        raise IsthmusError(f"kernel {self.path}: no register for argument {argument!r}; it has {', '.join(sorted(self.registers)) or 'none'}")


@dataclass(frozen=True)
class Hardware:
    """The DMAs and HLS kernels of a design, in the order of the file."""

    dmas: tuple[Dma, ...]
    kernels: tuple[Kernel, ...]

    def only_dma(self) -> Dma:
        """The DMA with a stream each way. Raises `IsthmusError` unless there is exactly one."""
        both = [dma for dma in self.dmas if dma.send_bytes and dma.receive_bytes]
        if len(both) != 1:
            raise IsthmusError(f"the design has {len(both)} DMAs with a stream each way ({', '.join(dma.path for dma in both) or 'none'}), expected one")
        return both[0]

    def kernel(self, name: str) -> Kernel:
        """The kernel whose place ends in `name`; the only one where `name` is "". Raises `IsthmusError` that lists what there is."""
        found = [kernel for kernel in self.kernels if not name or kernel.path.rpartition("/")[2] == name or kernel.path == name]
        if len(found) != 1:
            there = ", ".join(kernel.path for kernel in self.kernels) or "none"
            raise IsthmusError(f"the design has {len(found)} HLS kernels called {name or 'anything'!r}, expected one: there are {there}")
        return found[0]


def parse_hwh(data: bytes, where: str = "the .hwh file") -> Hardware:
    """Raises `IsthmusError` where the file is no hardware description of Vivado's."""
    if len(data) > MAX_BYTES:
        raise IsthmusError(f"{where}: {len(data)} bytes, a hardware description ends at {MAX_BYTES}")
    if b"<!DOCTYPE" in data or b"<!ENTITY" in data:
        raise IsthmusError(f"{where}: defines entities, which no hardware description does")
    try:
        root = ElementTree.fromstring(data)
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # LookupError: an encoding nobody knows
        raise IsthmusError(f"{where}: not XML, or cut short: {error}") from None
    if root.tag != "EDKSYSTEM":
        raise IsthmusError(f"{where}: not Vivado's hardware description: it begins with <{root.tag[:40]}>, expected <EDKSYSTEM>")
    modules = list(root.iter("MODULE"))
    return Hardware(
        tuple(_dma(module, where) for module in modules if module.get("MODTYPE") == DMA),
        tuple(Kernel(_path(module), _registers(module, where)) for module in modules if HLS in module.get("VLNV", "")),
    )


def _path(module: ElementTree.Element) -> str:
    return (module.get("FULLNAME") or module.get("INSTANCE") or "").lstrip("/")


def _dma(module: ElementTree.Element, where: str) -> Dma:
    parameters = {(parameter.get("NAME") or "").lower(): parameter.get("VALUE", "") for parameter in module.iter("PARAMETER")}
    widths = []
    for name, switch in ((SEND_WIDTH, "c_include_mm2s"), (RECEIVE_WIDTH, "c_include_s2mm")):
        bits = _whole(parameters.get(name, "0"), f"{where}: {name} of {_path(module)}") if parameters.get(switch, "1") == "1" else 0
        if bits % 8:
            raise IsthmusError(f"{where}: {name} of {_path(module)} is {bits} bits, expected whole bytes")
        widths.append(bits // 8)
    return Dma(_path(module), *widths)


def _registers(module: ElementTree.Element, where: str) -> dict[str, int]:
    """The registers' own offsets: fields inside a register carry properties of the same name."""
    found = {}
    for register in module.iter("REGISTER"):
        offsets = [entry.get("VALUE", "") for entry in register.findall("PROPERTY") if entry.get("NAME") == "ADDRESS_OFFSET"]
        if register.get("NAME") and offsets:
            found[str(register.get("NAME"))] = _whole(offsets[0], f"{where}: register {register.get('NAME')} of {_path(module)}")
    return found


def _whole(text: str, where: str) -> int:
    try:
        value = int(text, 0)
    except ValueError:
        value = -1
    if value < 0:
        raise IsthmusError(f"{where}: {text[:40]!r} is no whole number of at least 0")
    return value
