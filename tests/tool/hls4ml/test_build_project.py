# SPDX-License-Identifier: Apache-2.0
"""The build where the vendor's tools are: step by step, with checkpoints. The tools here are stand-ins that write real reports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from isthmus.errors import IsthmusError
from isthmus.targets.hls4ml.build_project import build, main
from isthmus.targets.hls4ml.build_steps import SOLUTION, steps_of
from isthmus.targets.hls4ml.simulation import BUILD_RECORD

REPORTS = Path(__file__).parent / "reports"
# What a stand-in does: it counts its runs, and makes what the real tool makes of the script it is given.
STAND_IN = """#!/bin/sh
for script; do :; done
step=$(basename "$script" .tcl)
echo "$step" >> {runs}
if [ -e {dies}/$step ]; then rm {dies}/$step; echo "the tool died in $step"; exit 139; fi
case $step in
synthesis) mkdir -p {solution}/syn/verilog {solution}/syn/report; cp {reports}/vitis_2021.1_csynth.rpt {solution}/syn/report/model_csynth.rpt;;
cosimulation) mkdir -p {solution}/sim/report; cp {reports}/vitis_2023.2_cosim.rpt {solution}/sim/report/model_cosim.rpt;;
export) mkdir -p {solution}/impl/ip;;
kernel) mkdir -p build/model_axi/solution1/impl/ip;;
bitstream) touch bitstream/model.bit bitstream/model.hwh; cp {reports}/vivado_2019.2_timing.rpt bitstream/timing.rpt
    cp {reports}/vivado_2019.2_utilisation.rpt bitstream/utilisation.rpt;;
implementation) touch build/routed.dcp; cp {reports}/vivado_2019.2_timing.rpt build/timing.rpt; echo "in no known form" > build/utilisation.rpt;;
esac
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a project; stand-ins for the tools, and an ssh that runs its command in another folder of this machine."""
    tools, folder, far = (tmp_path / name for name in ("tools", "artifact", "far"))
    for made in (tools, folder / "project", folder / "bitstream", folder / "kernel", far, tmp_path / "dies"):
        made.mkdir(parents=True)
    (folder / "project/build_prj.tcl").write_text("# hls4ml's\n")
    (folder / "hls_config.json").write_text('{"backend": "Vitis", "board": {"processor": "zynq7"}}')
    (folder / "estimate.json").write_text('{"source": "estimated", "lut": 4000, "latency_cycles": 20, "clock_ns": 10.0, "intervals": {"lut": [3000, 5000]}}')
    text = STAND_IN.format(runs=tmp_path / "runs", dies=tmp_path / "dies", solution=SOLUTION, reports=REPORTS)
    scripts = {"vitis_hls": text, "vivado": text, "ssh": f'#!/bin/sh\nfor command; do :; done\ncd {far} && exec sh -c "$command"\n'}
    for name, script in scripts.items():
        (tools / name).write_text(script)
        (tools / name).chmod(0o755)
    # A login shell would set its own PATH: the stand-in for bash is plain.
    (tools / "bash").write_text('#!/bin/sh\nshift\nexec sh -c "$@"\n')
    (tools / "bash").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    return tmp_path


def _runs(place: Path) -> list[str]:
    return (place / "runs").read_text().split() if (place / "runs").exists() else []


@pytest.mark.parametrize("host", ["", "user@machine"])
def test_every_step_runs_once_and_its_reports_are_in_the_record(place: Path, host: str) -> None:
    folder = place / "artifact"
    record = build(folder, host)
    assert _runs(place) == ["synthesis", "cosimulation", "export", "implementation", "kernel", "bitstream"]
    assert json.loads((folder / BUILD_RECORD).read_text()) == record
    assert (record["design"]["source"], record["design"]["lut"], record["design"]["latency_cycles"]) == ("utilisation", 17192, 3555)
    assert record["design"]["intervals"] == {}
    by_name = {step["name"]: step["reports"] for step in record["steps"]}
    assert by_name["synthesis"][0]["resources"]["lut"] == 4824 and by_name["cosimulation"][0]["passed"] is True
    assert "not a report that isthmus knows" in by_name["implementation"][0]["unread"] and by_name["implementation"][1]["slack_ns"] == 0.044
    assert [step["status"] for step in build(folder, host)["steps"]] == ["done before"] * 6
    assert len(_runs(place)) == 6 and (folder / "bitstream/model.bit").is_file() and (folder / "bitstream/model.hwh").is_file()
    assert (place / "far/isthmus-build").exists() == bool(host)


@pytest.mark.parametrize("host", ["", "user@machine"])
def test_a_tool_that_dies_is_gone_on_from_its_step(place: Path, host: str) -> None:
    folder = place / "artifact"
    (place / "dies/export").touch()
    with pytest.raises(
        IsthmusError, match=r"step export \(.*\) ended with code 139, its log is .*export\.log; run the same command again(.|\n)*died in export"
    ):
        build(folder, host)
    assert [step["status"] for step in build(folder, host)["steps"]] == ["done before", "done before", *["done"] * 4]
    assert _runs(place) == ["synthesis", "cosimulation", "export", "export", "implementation", "kernel", "bitstream"]


def test_another_project_begins_anew_and_until_stops(place: Path) -> None:
    folder = place / "artifact"
    build(folder, until="synthesis")
    assert _runs(place) == ["synthesis"]
    (folder / "project/build_prj.tcl").write_text("# another\n")
    assert build(folder, until="cosimulation")["steps"][0]["status"] == "done"
    assert build(folder, until="synthesis", rebuild=True)["steps"][0]["status"] == "done"
    assert _runs(place) == ["synthesis", "synthesis", "cosimulation", "synthesis"]


def test_missing_things_are_one_sentence(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    folder = place / "artifact"
    with pytest.raises(IsthmusError, match="--host: expected user@machine, found '-oProxy'"):
        build(folder, "-oProxy")
    (place / "tools/vitis_hls").unlink()
    with pytest.raises(IsthmusError, match=r"none of vitis-run, vitis_hls is here: source AMD's settings64\.sh, or name a machine that has it: --host"):
        build(folder)
    with pytest.raises(IsthmusError, match="user@machine has none of vitis-run, vitis_hls on its PATH"):
        build(folder, "user@machine")
    (place / "tools/ssh").write_text("#!/bin/sh\necho 'ssh: Could not resolve hostname machine' >&2\nexit 255\n")
    with pytest.raises(IsthmusError, match="user@machine: ssh: Could not resolve hostname machine"):
        build(folder, "user@machine")
    with pytest.raises(IsthmusError, match=r"--until kernel: this artifact's steps are synthesis, cosimulation, export, implementation \(Vitis, no board"):
        (folder / "hls_config.json").write_text('{"backend": "Vitis", "board": null}')
        build(folder, until="kernel")
    (folder / "hls_config.json").unlink()
    monkeypatch.chdir(folder)
    assert main([]) == 1 and "compile for an FPGA board first" in capsys.readouterr().out


def test_a_step_that_makes_nothing_is_said(place: Path) -> None:
    (place / "tools/vitis_hls").write_text("#!/bin/sh\nexit 0\n")
    with pytest.raises(IsthmusError, match=r"step synthesis \(vitis_hls\) ended well but did not make project/model_prj/solution1/syn/verilog"):
        build(place / "artifact")
    assert not os.path.exists(place / "artifact/build/synthesis.json")


def test_each_tool_is_given_its_own_command() -> None:
    """As the vendors document them: `vitis-run` from 2024.2 on, `vitis_hls` before; SmartHLS and oneAPI by hls4ml's own make files."""
    first = steps_of("Vitis", board=True)[0]
    assert first.tools == ("vitis-run", "vitis_hls") and first.command("/opt/vitis-run") == ["/opt/vitis-run", "--mode", "hls", "--tcl", "build/synthesis.tcl"]
    assert first.command("vitis_hls") == ["vitis_hls", "-f", "build/synthesis.tcl"]
    assert steps_of("Vitis", board=True)[-1].command("vivado")[1:] == ["-mode", "batch", "-nojournal", "-nolog", "-source", "build/bitstream.tcl"]
    commands = {
        backend: [" ".join(step.command(step.tools[0])) for step in steps_of(backend, board=False)] for backend in ("Vivado", "Catapult", "oneAPI", "Libero")
    }
    assert commands["Vivado"][0] == "vivado_hls -f build/synthesis.tcl" and len(commands["Vivado"]) == 4
    assert commands["Libero"] == ["shls -s hw", "shls -s cosim", "shls -s fpga"]
    assert commands["oneAPI"][1:3] == ["cmake --build build/oneapi --target report", "cmake --build build/oneapi --target fpga_sim"]
    assert commands["Catapult"][0].startswith("catapult -product ultra -shell -f build_prj.tcl -eval set ::argv ")
    assert [step.name for step in steps_of("VivadoAccelerator", board=True)] == ["synthesis", "cosimulation", "export", "implementation", "bitstream"]


def test_a_tool_that_takes_arguments_runs_in_the_projects_folder(place: Path) -> None:
    """SmartHLS: no script, another folder, a report of another format; the step it dies in is gone on from."""
    folder = place / "artifact"
    (folder / "hls_config.json").write_text('{"backend": "Libero", "board": null}')
    results = f"date +%N > shls.log; mkdir -p hls_output/reports hls_output/rtl; cp {REPORTS}/smarthls_cosim.rpt hls_output/reports/summary.results.rpt"
    (place / "tools/shls").write_text(f'#!/bin/sh\necho "$2" >> {place}/runs\n[ "$2" = fpga ] && [ -e {place}/dies/fpga ] && exit 3\n{results}\n')
    (place / "tools/shls").chmod(0o755)
    (place / "dies/fpga").touch()
    with pytest.raises(IsthmusError, match=r"step implementation \(shls\) ended with code 3"):
        build(folder)
    (place / "dies/fpga").unlink()
    record = build(folder)
    assert _runs(place) == ["hw", "cosim", "fpga", "fpga"] and record["design"]["latency_cycles"] == 1040408


def test_a_build_that_is_killed_goes_on_behind_its_last_step(place: Path) -> None:
    """The build itself, not the tool: nothing is left half done, and what was done is not run again."""
    folder, tool = place / "artifact", place / "tools/vitis_hls"
    plain = tool.read_text()
    tool.write_text(plain.replace("case $step in", "[ $step = export ] && kill -9 $PPID\ncase $step in"))
    words = [sys.executable, "-m", "isthmus.targets.hls4ml.build_project", "--until", "export"]
    killed = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    assert killed.returncode == -9 and _runs(place) == ["synthesis", "cosimulation", "export"]
    tool.write_text(plain)
    assert [step["status"] for step in build(folder, until="export")["steps"]] == ["done before", "done before", "done"]
