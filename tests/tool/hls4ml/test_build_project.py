# SPDX-License-Identifier: Apache-2.0
"""The build where AMD's tools are: step by step, with checkpoints. The tools here are stand-ins that write real reports."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from isthmus.errors import IsthmusError
from isthmus.targets.hls4ml.build_project import SOLUTION, STEPS, build, main
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
implementation) touch build/routed.dcp; cp {reports}/vivado_2019.2_timing.rpt build/timing.rpt; echo "in no known form" > build/utilisation.rpt;;
esac
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a project; stand-ins for the tools, and an ssh that runs its command in another folder of this machine."""
    tools, folder, far = (tmp_path / name for name in ("tools", "artifact", "far"))
    for made in (tools, folder / "project", far, tmp_path / "dies"):
        made.mkdir(parents=True)
    (folder / "project/build_prj.tcl").write_text("# hls4ml's\n")
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
    assert _runs(place) == [step.name for step in STEPS] == ["synthesis", "cosimulation", "export", "implementation"]
    assert json.loads((folder / BUILD_RECORD).read_text()) == record
    assert (record["design"]["source"], record["design"]["lut"], record["design"]["latency_cycles"]) == ("co-simulation", 4824, 3555)
    assert record["design"]["intervals"] == {}
    by_name = {step["name"]: step["reports"] for step in record["steps"]}
    assert by_name["synthesis"][0]["resources"]["lut"] == 4824 and by_name["cosimulation"][0]["passed"] is True
    assert "not a report that isthmus knows" in by_name["implementation"][0]["unread"] and by_name["implementation"][1]["slack_ns"] == 0.044
    assert [step["status"] for step in build(folder, host)["steps"]] == ["done before"] * 4
    assert len(_runs(place)) == 4
    assert (place / "far/isthmus-build").exists() == bool(host)


@pytest.mark.parametrize("host", ["", "user@machine"])
def test_a_tool_that_dies_is_gone_on_from_its_step(place: Path, host: str) -> None:
    folder = place / "artifact"
    (place / "dies/export").touch()
    with pytest.raises(
        IsthmusError, match=r"step export \(.*\) ended with code 139, its log is .*export\.log; run the same command again(.|\n)*died in export"
    ):
        build(folder, host)
    assert [step["status"] for step in build(folder, host)["steps"]] == ["done before", "done before", "done", "done"]
    assert _runs(place) == ["synthesis", "cosimulation", "export", "export", "implementation"]


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
    with pytest.raises(IsthmusError, match=r"none of vitis_hls, vitis-run is here: source AMD's settings64\.sh, or name a machine that has it: --host"):
        build(folder)
    with pytest.raises(IsthmusError, match="user@machine has none of vitis_hls, vitis-run on its PATH"):
        build(folder, "user@machine")
    (place / "tools/ssh").write_text("#!/bin/sh\necho 'ssh: Could not resolve hostname machine' >&2\nexit 255\n")
    with pytest.raises(IsthmusError, match="user@machine: ssh: Could not resolve hostname machine"):
        build(folder, "user@machine")
    shutil.rmtree(folder / "project")
    monkeypatch.chdir(folder)
    assert main([]) == 1 and "no HLS project here: compile for an FPGA board first" in capsys.readouterr().out


def test_a_step_that_makes_nothing_is_said(place: Path) -> None:
    (place / "tools/vitis_hls").write_text("#!/bin/sh\nexit 0\n")
    with pytest.raises(IsthmusError, match=r"step synthesis \(vitis_hls\) ended well but did not make project/model_prj/solution1/syn/verilog"):
        build(place / "artifact")
    assert not os.path.exists(place / "artifact/build/synthesis.json")
