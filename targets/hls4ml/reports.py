# SPDX-License-Identifier: Apache-2.0
"""Reports of the tools: C synthesis (text and XML, Vivado HLS and Vitis HLS), co-simulation, Vivado's utilisation and timing, SmartHLS' results.

What a tool says replaces an estimate. A file that is none of these ends in one sentence, never in a guess.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from isthmus.errors import IsthmusError

MAX_BYTES = 64 * 2**20
# A name of the tools -> ours. BRAM counts halves of 18 Kb, as HLS does; Vivado counts tiles of 36 Kb.
RESOURCES = {"BRAM_18K": "bram_18k", "DSP": "dsp", "DSP48E": "dsp", "FF": "ff", "LUT": "lut", "URAM": "uram"}
UTILISATION = {
    "Slice LUTs": ("lut", 1),
    "CLB LUTs": ("lut", 1),
    "Slice Registers": ("ff", 1),
    "CLB Registers": ("ff", 1),
    "Block RAM Tile": ("bram_18k", 2),
    "URAM": ("uram", 1),
    "DSPs": ("dsp", 1),
}


@dataclass(frozen=True)
class Module:
    """One function of the design: cycles None where the tool knows no bound."""

    name: str
    latency_cycles: int | None
    interval_cycles: int | None
    resources: Mapping[str, int]


@dataclass(frozen=True)
class ToolReport:
    """`kind`: c-synthesis, co-simulation, utilisation, timing or smart-hls; what a report does not say is None or missing."""

    kind: str
    tool_version: str = ""
    part: str = ""
    clock_target_ns: float | None = None
    clock_estimated_ns: float | None = None
    latency_cycles: int | None = None
    interval_cycles: int | None = None
    resources: Mapping[str, int] = field(default_factory=dict)
    available: Mapping[str, int] = field(default_factory=dict)
    slack_ns: float | None = None
    passed: bool | None = None
    modules: tuple[Module, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Only what the report says."""
        return {name: list(value) if name == "modules" else value for name, value in asdict(self).items() if value not in (None, "", {}, ())}


def replaced(estimate: Mapping[str, Any], reports: Iterable[ToolReport]) -> dict[str, Any]:
    """An estimate as JSON with what the tools said, the later report before the earlier: their figures have no interval."""
    found = dict(estimate)
    intervals = dict(found.get("intervals", {}))
    for report in reports:
        known = {name: count for name, count in report.resources.items() if name in found}
        known |= {name: count for name in ("latency_cycles", "interval_cycles") if (count := getattr(report, name)) is not None}
        if not known:
            continue
        found |= known
        found["source"] = report.kind
        intervals = {name: between for name, between in intervals.items() if name not in known}
    found["intervals"] = intervals
    found["fits"] = all(found.get(name, 0) <= there for name, there in found.get("available", {}).items())
    if "clock_ns" in found and "latency_cycles" in found:
        found["latency_us"] = round(found["latency_cycles"] * found["clock_ns"] / 1000, 3)
    return found


def read_report(path: Path) -> ToolReport:
    """Reads any of the reports. Raises `IsthmusError` where the file is missing, too large or in no known format."""
    try:
        size = path.stat().st_size
        text = path.read_text(encoding="utf-8", errors="replace") if size <= MAX_BYTES else ""
    except OSError as error:
        raise IsthmusError(f"{path.name}: the report cannot be read: {error.strerror}") from None
    if size > MAX_BYTES:
        raise IsthmusError(f"{path.name}: {size} bytes are too many for a report")
    return parse_report(text, path.name)


def parse_report(text: str, name: str = "report") -> ToolReport:
    """As `read_report`, of a text. `name` is what the sentence calls it."""
    for marker, reader in _READERS:
        if re.search(marker, text[:20000], re.MULTILINE):
            try:
                found = reader(text)
            except (ElementTree.ParseError, ValueError, OverflowError) as error:
                raise IsthmusError(f"{name}: looks like {reader.__doc__} but cannot be read: {error}") from None
            return found
    raise IsthmusError(
        f"{name}: not a report that isthmus knows (C synthesis, co-simulation, utilisation or timing of Vivado HLS, Vitis HLS or Vivado, results of SmartHLS); "
        "the tool's own file is kept beside it"
    )


# ---- C synthesis
def _c_synthesis_xml(text: str) -> ToolReport:
    """a C synthesis report (XML)"""
    root = ElementTree.fromstring(text.strip())
    user, performance, area = (root.find(name) for name in ("UserAssignments", "PerformanceEstimates", "AreaEstimates"))
    if user is None or performance is None or area is None:
        raise ValueError("UserAssignments, PerformanceEstimates and AreaEstimates are expected")
    return ToolReport(
        "c-synthesis",
        tool_version=root.findtext("ReportVersion/Version", ""),
        part=user.findtext("Part", ""),
        clock_target_ns=_real(user.findtext("TargetClockPeriod")),
        clock_estimated_ns=_real(performance.findtext("SummaryOfTimingAnalysis/EstimatedClockPeriod")),
        latency_cycles=_count(performance.findtext("SummaryOfOverallLatency/Worst-caseLatency")),
        interval_cycles=_count(performance.findtext("SummaryOfOverallLatency/Interval-max")),
        resources=_xml_resources(area.find("Resources")),
        available=_xml_resources(area.find("AvailableResources")),
    )


def _xml_resources(element: ElementTree.Element | None) -> dict[str, int]:
    found = {} if element is None else {RESOURCES[child.tag]: _count(child.text) for child in element if child.tag in RESOURCES}
    return {name: count for name, count in found.items() if count is not None}


def _c_synthesis_text(text: str) -> ToolReport:
    """a C synthesis report (text)"""
    # Vivado HLS has the unit in the title of the table, Vitis HLS in each cell.
    clock = re.search(r"^\s*\|\s*ap_clk\s*\|\s*([\d.]+)(?: ns)?\s*\|\s*([\d.]+)(?: ns)?\s*\|", text, re.MULTILINE)
    head, _, details = text.partition("+ Detail:")
    rows = [cells for cells in _rows(head.partition("+ Latency")[2]) if len(cells) in (5, 7) and _is_cycles(cells[0])]
    area = text.partition("== Utilization Estimates")[2]
    if not rows or "|Total" not in area.replace("| Total", "|Total"):
        raise ValueError("the latency summary and the utilization summary are expected")
    return ToolReport(
        "c-synthesis",
        tool_version=_first(r"^\* Version:\s+(\S+)", text),
        part=_first(r"^\* Target device:\s+(\S+)", text),
        clock_target_ns=float(clock.group(1)) if clock else None,
        clock_estimated_ns=float(clock.group(2)) if clock else None,
        latency_cycles=_count(rows[0][1]),
        interval_cycles=_count(rows[0][-2]),
        resources=_text_resources(area, "Total"),
        available=_text_resources(area, "Available"),
        modules=_modules(details, area),
    )


def _text_resources(area: str, wanted: str) -> dict[str, int]:
    columns: list[str] = []
    for cells in _rows(area):
        if "BRAM_18K" in cells:
            columns = cells
        elif columns and cells[0] == wanted and len(cells) == len(columns):
            found = {RESOURCES[column]: _count(cell) for column, cell in zip(columns, cells, strict=True) if column in RESOURCES}
            return {name: count or 0 for name, count in found.items()}
    return {}


def _modules(latencies: str, area: str) -> tuple[Module, ...]:
    """The rows of the two instance tables: cycles in one, resources in the other, joined by the instance."""
    cycles = {}
    for cells in _rows(latencies.partition("* Loop:")[0].partition("== Utilization")[0]):
        if len(cells) in (7, 9) and _is_cycles(cells[2]):
            cycles[cells[0]] = (_count(cells[3]), _count(cells[-2]))
    found, columns = [], list[str]()
    for cells in _rows(area.partition("* Instance:")[2].partition("    * ")[0]):
        if "BRAM_18K" in cells:
            columns = cells
        elif columns and len(cells) == len(columns) and cells[0] != "Total":
            counts = {RESOURCES[column]: _count(cell) or 0 for column, cell in zip(columns, cells, strict=True) if column in RESOURCES}
            found.append(Module(cells[1], *cycles.get(cells[0], (None, None)), counts))
    return tuple(found)


# ---- co-simulation
def _co_simulation(text: str) -> ToolReport:
    """a co-simulation report"""
    rows = [cells for cells in _rows(text) if len(cells) >= 8 and cells[0] in ("VHDL", "Verilog") and cells[1] != "NA"]
    if not rows:
        raise ValueError("a row with VHDL or Verilog that was run is expected")
    numbers = [_count(cell) for cell in rows[0][2:8]]  # latency min, avg, max; interval min, avg, max
    return ToolReport(
        "co-simulation",
        tool_version=_first(r"^\* Version:\s+(\S+)", text),
        part=_first(r"^\* Target device:\s+(\S+)", text),
        latency_cycles=numbers[2],
        interval_cycles=numbers[5],
        passed=rows[0][1].lower() == "pass",
    )


# ---- Vivado
def _utilisation(text: str) -> ToolReport:
    """a utilisation report"""
    used: dict[str, int] = {}
    available: dict[str, int] = {}
    columns: list[str] = []
    for cells in _rows(text):
        if cells[0] in ("Site Type", "Ref Name") or "Available" in cells:
            columns = cells
            continue
        site = cells[0].rstrip("*")
        if site in UTILISATION and "Used" in columns and len(cells) == len(columns) and UTILISATION[site][0] not in used:
            name, unit = UTILISATION[site]
            used[name] = int(float(cells[columns.index("Used")]) * unit)
            if "Available" in columns:
                available[name] = int(float(cells[columns.index("Available")]) * unit)
    if "lut" not in used:
        raise ValueError("a row 'Slice LUTs' or 'CLB LUTs' is expected")
    return ToolReport(
        "utilisation",
        tool_version=_first(r"Tool Version\s*:\s*(?:Vivado\s+)?(\S+)", text),
        part=_first(r"^\|?\s*Device\s*:\s*(\S+)", text),
        resources=used,
        available=available,
    )


def _timing(text: str) -> ToolReport:
    """a timing summary"""
    summary = text.partition("Design Timing Summary")[2]
    numbers = re.search(r"^\s*(-?\d+\.\d+|inf|NA)\s+(?:-?\d+\.\d+|inf|NA)\s+\d+\s+\d+", summary, re.MULTILINE)
    if numbers is None:
        raise ValueError("the worst negative slack is expected")
    slack = None if numbers.group(1) in ("NA", "inf") else float(numbers.group(1))
    return ToolReport(
        "timing",
        tool_version=_first(r"Tool Version\s*:\s*(?:Vivado\s+)?(\S+)", text),
        part=_first(r"^\|?\s*Device\s*:\s*(\S+)", text),
        slack_ns=slack,
        passed=slack is None or slack >= 0,
    )


# ---- SmartHLS
# Its names -> ours. A 4-input LUT and a flip-flop belong together in a logic element; LSRAM blocks have 20 Kb each.
SMART_HLS = {"Fabric + Interface 4LUT": "lut", "Fabric + Interface DFF": "ff", "Math": "dsp", "LSRAM": "lsram_20k"}


def _smart_hls(text: str) -> ToolReport:
    """a results report of SmartHLS"""
    if "====== 3. Resource Usage" not in text:
        raise ValueError("a section '3. Resource Usage' is expected")
    calls, cycles = (_count(_first(rf"^{name}:\s+([\d,]+)", text).replace(",", "")) for name in ("Number of calls", "Cycle latency"))
    verdict = _first(r"^SW/HW co-simulation:\s+(\S+)", text)
    clock = re.search(r"^\|\s*\S+\s*\|\s*([\d.]+) ns\s*\|\s*[\d.]+ MHz\s*\|\s*(-?[\d.]+) ns\s*\|\s*([\d.]+) ns", text, re.MULTILINE)
    used: dict[str, int] = {}
    available: dict[str, int] = {}
    for cells in _rows(text.partition("====== 3. Resource Usage")[2].partition("====== 4.")[0]):
        name = SMART_HLS.get(cells[0].rstrip("*"))
        if name and len(cells) == 4:
            used[name], available[name] = int(cells[1].rpartition("=")[2]), int(cells[2])
    return ToolReport(
        "smart-hls",
        part=_first(r"^Device:\s+(\S+)", text),
        clock_target_ns=float(clock.group(1)) if clock else None,
        clock_estimated_ns=float(clock.group(3)) if clock else None,
        latency_cycles=cycles if calls == 1 else None,  # the cycles of all calls together
        resources=used,
        available=available,
        slack_ns=float(clock.group(2)) if clock else None,
        passed=verdict == "PASS" if verdict else None,
    )


_READERS = (
    (r"Summary Report for RTL Simulation and FPGA Synthesis", _smart_hls),
    (r"<profile>\s*(?:<!--.*?-->\s*)?<ReportVersion>", _c_synthesis_xml),
    (r"== Vi(?:vado|tis) HLS Report for '", _c_synthesis_text),
    (r"^Simulation tool\s*:(?s:.*)\|\s*Verilog\|", _co_simulation),
    (r"Design Timing Summary|Timing Summary Report", _timing),
    (r"Utilization Design Information|Command\s*:\s*report_utilization", _utilisation),
)


# ---- tables of text
def _rows(text: str) -> Iterator[list[str]]:
    for line in text.splitlines():
        stripped = line.strip()
        if stripped.startswith("|") and stripped.endswith("|"):
            yield [cell.strip() for cell in stripped[1:-1].split("|")]


def _is_cycles(cell: str) -> bool:
    return cell.isdecimal() or cell == "?"


def _count(text: str | None) -> int | None:
    """A whole number; None where the tool says "?", "-", "undef" or nothing."""
    found = re.fullmatch(r"\s*~?(\d{1,18})\s*", text or "")
    return int(found.group(1)) if found else None


def _real(text: str | None) -> float | None:
    found = re.fullmatch(r"\s*(\d{1,12}(?:\.\d{1,12})?)\s*", text or "")
    return float(found.group(1)) if found else None


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text, re.MULTILINE)
    return found.group(1) if found else ""
