# SPDX-License-Identifier: Apache-2.0
"""Reports of AMD's tools, as they lie in public repositories; whatever else a file holds ends in one sentence."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.errors import IsthmusError
from isthmus.targets.hls4ml.reports import parse_report, read_report

REPORTS = Path(__file__).parent / "reports"


@pytest.mark.parametrize("suffix", ["rpt", "xml"])
def test_c_synthesis_of_vitis(suffix: str) -> None:
    found = read_report(REPORTS / f"vitis_2021.1_csynth.{suffix}")
    assert (found.kind, found.tool_version, found.part) == ("c-synthesis", "2021.1", "xc7z007s-clg225-2")
    assert (found.clock_target_ns, found.latency_cycles, found.interval_cycles) == (5.0, 18, 2)
    assert found.resources == {"bram_18k": 2, "dsp": 0, "ff": 1632, "lut": 4824, "uram": 0}
    assert found.available["dsp"] == 66
    if suffix == "rpt":
        first = found.modules[0]
        assert first.name.startswith("dense_latency_") and (first.latency_cycles, first.interval_cycles) == (3, 2)
        assert sum(module.resources["lut"] for module in found.modules) <= 4824


def test_c_synthesis_of_vivado() -> None:
    found = read_report(REPORTS / "vivado_2019.2_csynth.rpt")
    assert (found.tool_version, found.clock_target_ns, found.latency_cycles, found.interval_cycles) == ("2019.2", 10.0, 78, 70)
    assert found.resources == {"bram_18k": 20, "dsp": 21, "ff": 13025, "lut": 36782, "uram": 0}
    assert max(module.latency_cycles or 0 for module in found.modules) == 69


def test_co_simulation_utilisation_and_timing() -> None:
    simulated = read_report(REPORTS / "vitis_2023.2_cosim.rpt")
    assert (simulated.passed, simulated.latency_cycles, simulated.interval_cycles) == (True, 3555, 2354)
    used = read_report(REPORTS / "vivado_2019.2_utilisation.rpt")
    assert (used.kind, used.part, used.resources["lut"], used.resources["bram_18k"], used.available["bram_18k"]) == (
        "utilisation",
        "7z020clg400-1",
        17192,
        10,
        280,
    )
    timing = read_report(REPORTS / "vivado_2019.2_timing.rpt")
    assert (timing.kind, timing.slack_ns, timing.passed) == ("timing", 0.044, True)
    assert timing.to_json() == {"kind": "timing", "tool_version": "v.2019.2", "part": "7z020-clg400", "slack_ns": 0.044, "passed": True}


def test_results_of_smart_hls() -> None:
    simulated = read_report(REPORTS / "smarthls_cosim.rpt")
    assert (simulated.kind, simulated.part, simulated.latency_cycles, simulated.passed) == ("smart-hls", "MPF300TS-1FCG1152I", 1040408, True)
    assert simulated.resources == {} and simulated.clock_target_ns is None  # "N/A. Please run ..."
    used = read_report(REPORTS / "smarthls_synthesis.rpt")
    assert used.resources == {"lut": 460, "ff": 273, "dsp": 1, "lsram_20k": 0}
    assert used.available == {"lut": 299544, "ff": 299544, "dsp": 924, "lsram_20k": 952} and used.latency_cycles is None  # of 16,800 calls together
    timed = parse_report(
        "Summary Report for RTL Simulation and FPGA Synthesis\n| clk | 10.000 ns | 100.000 MHz | 7.170 ns | 2.830 ns | 353.357 MHz |\n====== 3. Resource Usage"
    )
    assert (timed.clock_target_ns, timed.clock_estimated_ns, timed.slack_ns, timed.passed) == (10.0, 2.83, 7.17, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Summary Report for RTL Simulation and FPGA Synthesis", "looks like a results report of SmartHLS but cannot be read: a section '3"),
        ("LUTs: many", "csynth.rpt: not a report that isthmus knows"),
        ("", "not a report that isthmus knows"),
        ("== Vitis HLS Report for 'model'\n", r"looks like a C synthesis report \(text\) but cannot be read: the latency summary"),
        ("<profile>\n<ReportVersion>\n", r"looks like a C synthesis report \(XML\) but cannot be read"),
        ("| Command : report_utilization\n", "looks like a utilisation report but cannot be read: a row 'Slice LUTs'"),
        ("| Design Timing Summary\n", "looks like a timing summary but cannot be read"),
    ],
)
def test_an_unknown_format_is_one_sentence(text: str, message: str) -> None:
    with pytest.raises(IsthmusError, match=message) as error:
        parse_report(text, "csynth.rpt")
    assert "\n" not in str(error.value)


def test_a_missing_report_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(IsthmusError, match=r"gone\.rpt: the report cannot be read: No such file"):
        read_report(tmp_path / "gone.rpt")


@given(st.sampled_from(sorted(path.name for path in REPORTS.glob("*_*"))), st.data())
def test_a_damaged_report_is_read_or_refused(name: str, data: st.DataObject) -> None:
    lines = (REPORTS / name).read_text(encoding="utf-8").splitlines()
    begin = data.draw(st.integers(0, len(lines) - 1))
    kept = lines[:begin] + lines[data.draw(st.integers(begin, len(lines))) :]
    text = re.sub(r"\d+", lambda found: data.draw(st.sampled_from([found.group(0), "?", "-", "9" * 30])), "\n".join(kept), count=3)
    with contextlib.suppress(IsthmusError):  # one sentence, and no other exception
        assert parse_report(text).kind
