# SPDX-License-Identifier: Apache-2.0
"""Power meters: recorded lines of real boards, sysfs trees as the drivers lay them out, and what is said where nothing can be read.

The tegrastats lines were recorded on boards by others and published: Nano, TX1, TX2, AGX Xavier and AGX Orin in the tests of Datadog's agent,
Orin Nano in those of beszel, AGX Orin under JetPack 5 and 7.2 in users' logs.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.errors import IsthmusError
from isthmus.runtimes import power
from isthmus.runtimes.power import CsvMeter, InaMeter, RaplMeter, TegrastatsMeter, integrate, open_meter, parse_tegrastats

NANO = (
    "RAM 613/3964MB (lfb 634x4MB) SWAP 0/1982MB (cached 0MB) CPU [2%@102,1%@102,0%@102,0%@102] EMC_FREQ 0% GR3D_FREQ 0% PLL@39C CPU@40.5C PMIC@100C "
    "GPU@41C AO@46C thermal@41C POM_5V_IN 900/943 POM_5V_GPU 0/0 POM_5V_CPU 123/123"
)
TX1 = (
    "RAM 1179/3983MB (lfb 120x4MB) IRAM 0/252kB(lfb 252kB) CPU [1%@102,4%@102,0%@102,0%@102] EMC_FREQ 7%@408 GR3D_FREQ 0%@76 APE 25 AO@42.5C CPU@37.5C "
    "GPU@39C PLL@37C Tdiode@42.75C PMIC@100C Tboard@42C thermal@38.5C VDD_IN 2532/2698 VDD_CPU 76/178 VDD_GPU 19/19"
)
TX2 = (
    "RAM 1345/7829MB (lfb 1290x4MB) SWAP 0/512MB (cached 0MB) CPU [2%@345,off,off,off,off,off] EMC_FREQ 13%@40 GR3D_FREQ 0%@114 APE 150 BCPU@35C MCPU@35C "
    "GPU@41C PLL@35C AO@35.5C Tboard@35C Tdiode@36C PMIC@100C thermal@35.5C VDD_IN 2003/2658 VDD_CPU 320/518 VDD_GPU 400/735 VDD_SOC 400/415 VDD_WIFI 0/0 "
    "VDD_DDR 240/348"
)
AGX_XAVIER = (
    "RAM 1903/15692MB (lfb 3251x4MB) CPU [1%@1190,1%@1190,2%@1190,0%@1190,0%@1190,0%@1190,0%@1190,0%@1190] EMC_FREQ 0% GR3D_FREQ 0% AO@32.5C GPU@32C "
    "Tboard@32C Tdiode@34.75C AUX@31.5C CPU@33.5C thermal@32.9C PMIC@100C GPU 0/0 CPU 216/216 SOC 864/864 CV 0/0 VDDRQ 144/144 SYS5V 1889/1889"
)
AGX_ORIN = (
    "10-16-2023 10:59:22 RAM 1205/30623MB (lfb 6429x4MB) SWAP 0/15311MB (cached 0MB) CPU [0%@729,0%@729,1%@729,0%@729,0%@729,0%@730,0%@730,0%@729,0%@729,"
    "0%@729,0%@729,0%@729] EMC_FREQ 0%@204 GR3D_FREQ 0%@114 GR3D2_FREQ 0%@114 NVJPG1 729 VIC_FREQ 729 APE 233 CV0@-256C CPU@43.5C Tdiode@32.5C SOC2@40.062C "
    "SOC0@40.5C CV1@-256C GPU@38.156C SOC1@39.125C CV2@-256C VDD_GPU_SOC 4788mW/4788mW VDD_CPU_CV 798mW/798mW VIN_SYS_5V0 3842mW/3842mW NC 0mW/0mW "
    "VDDQ_VDD2_1V8AO 707mW/707mW NC 0mW/0mW"
)
ORIN_NANO = (
    "11-15-2024 08:38:09 RAM 6185/7620MB (lfb 8x2MB) SWAP 851/3810MB (cached 1MB) CPU [15%@729,11%@729,14%@729,13%@729,11%@729,8%@729] EMC_FREQ 43%@2133 "
    "GR3D_FREQ 63%@[621] NVDEC off NVJPG off NVJPG1 off VIC off OFA off APE 200 cpu@53.968C soc2@52.437C soc0@50.75C gpu@53.343C tj@53.968C soc1@51.656C "
    "VDD_IN 12479mW/12479mW VDD_CPU_GPU_CV 4667mW/4667mW VDD_SOC 2817mW/2817mW"
)
JETPACK_7 = (
    "07-17-2026 15:15:27 RAM 8179/62817MB (lfb 1x4MB) CPU [35%@729,24%@729,16%@729,18%@729,21%@729,21%@729,15%@729,15%@729,27%@1113,20%@1113,28%@1113,"
    "32%@1113] GR3D_FREQ 32% cpu@51.968C/51.968C soc2@48.968C/48.968C soc0@49.406C/49.5C gpu@47.125C/47.125C tj@51.968C/51.968C soc1@47.906C/48.093C "
    "VDD_GPU_SOC 4385mW/3787mW/4385mW VDD_CPU_CV 1196mW/897mW/1196mW VIN_SYS_5V0 5552mW/5274mW/5552mW"
)


@pytest.mark.parametrize(
    ("line", "rails", "total_mw"),
    [
        (NANO, {"POM_5V_IN": 900, "POM_5V_GPU": 0, "POM_5V_CPU": 123}, 900),
        (TX1, {"VDD_IN": 2532, "VDD_CPU": 76, "VDD_GPU": 19}, 2532),
        (TX2, {"VDD_IN": 2003, "VDD_CPU": 320, "VDD_GPU": 400, "VDD_SOC": 400, "VDD_WIFI": 0, "VDD_DDR": 240}, 2003),
        (AGX_XAVIER, {"GPU": 0, "CPU": 216, "SOC": 864, "CV": 0, "VDDRQ": 144, "SYS5V": 1889}, 3113),
        (AGX_ORIN, {"VDD_GPU_SOC": 4788, "VDD_CPU_CV": 798, "VIN_SYS_5V0": 3842, "NC": 0, "VDDQ_VDD2_1V8AO": 707}, 9428),
        (ORIN_NANO, {"VDD_IN": 12479, "VDD_CPU_GPU_CV": 4667, "VDD_SOC": 2817}, 12479),
        (JETPACK_7, {"VDD_GPU_SOC": 4385, "VDD_CPU_CV": 1196, "VIN_SYS_5V0": 5552}, 11133),
    ],
    ids=["nano", "tx1", "tx2", "agx-xavier", "agx-orin", "orin-nano", "jetpack-7"],
)
def test_recorded_lines(line, rails, total_mw):
    found = parse_tegrastats(line)
    assert found == rails
    assert sum(found[name] for name in power._total(found)) == total_mw


@given(st.text(max_size=80) | st.lists(st.sampled_from(ORIN_NANO.split()), max_size=12).map(" ".join))
def test_any_line_is_read(line):
    assert all(value >= 0 for value in parse_tegrastats(line).values())


# ---- tegrastats, as a program
def program(folder: Path, *lines: str, more: str = "sleep 60") -> str:
    file = folder / "tegrastats"
    printed = "\n".join(f"echo '{line}'" for line in lines)
    file.write_text(f"#!/bin/sh\n{printed}\nexec {more}\n")
    file.chmod(0o755)
    return str(file)


def test_tegrastats_is_integrated(tmp_path):
    meter = TegrastatsMeter(program(tmp_path, ORIN_NANO))
    meter.start()
    before, begun = meter.energy_j(), time.perf_counter()
    time.sleep(0.1)
    joules, seconds = meter.energy_j() - before, time.perf_counter() - begun
    meter.stop()
    assert joules == pytest.approx(12.479 * seconds, rel=0.1)
    assert meter.source == "tegrastats, VDD_IN"


@pytest.mark.parametrize(("lines", "message"), [(("RAM 1/2MB nothing else",), "a line without a total"), ((), "the program ended")])
def test_tegrastats_that_tells_nothing(tmp_path, lines, message):
    meter = TegrastatsMeter(program(tmp_path, *lines, more="true"))
    with pytest.raises(IsthmusError, match=message):
        meter.start()


def test_tegrastats_that_cannot_be_started(tmp_path):
    with pytest.raises(IsthmusError, match="cannot be started"):
        TegrastatsMeter(str(tmp_path / "nothing")).start()


# ---- sysfs
def tree(root: Path, files: dict[str, object]) -> Path:
    for name, value in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{value}\n")
    return root


HWMON = "ina3221/1-0040/hwmon/hwmon3/"
ORIN_TREE = {f"{HWMON}in1_label": "VDD_IN", f"{HWMON}in1_input": 5000, f"{HWMON}curr1_input": 1200} | {
    f"{HWMON}in2_label": "VDD_CPU_GPU_CV", f"{HWMON}in2_input": 4900, f"{HWMON}curr2_input": 300
}  # fmt: skip
IIO = "ina3221x/6-0040/iio:device0/"
NANO_TREE = {f"{IIO}rail_name_0": "POM_5V_IN", f"{IIO}in_power0_input": 2500, f"{IIO}rail_name_1": "POM_5V_GPU", f"{IIO}in_power1_input": 40}


@pytest.mark.parametrize(("files", "watts", "source"), [(ORIN_TREE, 6.0, "INA3221, VDD_IN"), (NANO_TREE, 2.5, "INA3221, POM_5V_IN")])
def test_ina_is_integrated(tmp_path, files, watts, source):
    meter = InaMeter(tree(tmp_path, files))
    assert meter.source == source
    meter.start()
    before, begun = meter.energy_j(), time.perf_counter()
    time.sleep(0.1)
    joules, seconds = meter.energy_j() - before, time.perf_counter() - begun
    meter.stop()
    assert joules == pytest.approx(watts * seconds, rel=0.1)


def test_ina_that_changes_is_followed(tmp_path):
    meter = InaMeter(tree(tmp_path, ORIN_TREE))
    meter.start()
    (tmp_path / HWMON / "curr1_input").write_text("0\n")
    time.sleep(0.1)
    before = meter.energy_j()
    time.sleep(0.05)
    assert meter.energy_j() == before
    (tmp_path / HWMON / "curr1_input").unlink()
    time.sleep(0.1)
    with pytest.raises(IsthmusError, match="curr1_input"):
        meter.energy_j()
    meter.stop()


def test_ina_of_another_board(tmp_path):
    with pytest.raises(IsthmusError, match="no INA3221 sensor"):
        InaMeter(tmp_path)
    with pytest.raises(IsthmusError, match="the rails VDD_SOMETHING are none of a board"):
        InaMeter(tree(tmp_path, {f"{HWMON}in1_label": "VDD_SOMETHING", f"{HWMON}in1_input": 1, f"{HWMON}curr1_input": 1}))


def test_rapl_counts_on_when_it_wraps(tmp_path):
    files = {"intel-rapl:0/energy_uj": 900_000, "intel-rapl:0/max_energy_range_uj": 999_999, "intel-rapl:0:0/energy_uj": 5}
    meter = RaplMeter(tree(tmp_path, files))
    meter.start()
    assert meter.energy_j() == 0
    tree(tmp_path, {"intel-rapl:0/energy_uj": 400_000})
    assert meter.energy_j() == pytest.approx(0.5)
    tree(tmp_path, {"intel-rapl:0/energy_uj": 500_000})
    assert meter.energy_j() == pytest.approx(0.6)
    assert meter.source == "RAPL, 1 processor package"


def test_rapl_without_permission_or_counter(tmp_path, monkeypatch):
    with pytest.raises(IsthmusError, match="shows no energy counter"):
        RaplMeter(tmp_path)
    root = tree(tmp_path, {"intel-rapl:0/energy_uj": 1, "intel-rapl:0/max_energy_range_uj": 10})
    if os.getuid() == 0:  # root reads everything

        def refuse(path: Path) -> int:
            raise PermissionError

        monkeypatch.setattr(power, "_number", lambda path: 10 if path.name.startswith("max") else refuse(path))
    else:
        (root / "intel-rapl:0/energy_uj").chmod(0)
    with pytest.raises(IsthmusError, match="no permission to read"):
        RaplMeter(root)


# ---- an external meter
def test_trapezoids():
    assert integrate([(0, 2.0), (10, 4.0)], 0, 10) == pytest.approx(30)
    assert integrate([(0, 2.0), (10, 4.0)], 5, 10) == pytest.approx(17.5)
    assert integrate([(0, 2.0), (10, 4.0)], 10, 12) == pytest.approx(8)
    assert integrate([], 0, 10) is None
    assert integrate([(20, 1.0)], 0, 10) is None
    assert integrate([(0, 2.0)], 1000, 1001) is None


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 50)), min_size=1, max_size=20), st.floats(0, 100), st.floats(0, 100))
def test_energy_lies_between_the_extremes(rows, one, other):
    begin, end = sorted((one, other))
    joules = integrate(rows, begin, end)
    if joules is not None:
        powers = [watts for _, watts in rows]
        assert -1e-6 <= joules <= max(powers) * (end - begin) * (1 + 1e-6) + 1e-6


def test_csv_meter_follows_its_file(tmp_path):
    file = tmp_path / "meter.csv"
    now = time.time()
    file.write_text(f"time_s,voltage_v,current_a\n{now - 1},5,2\n")
    meter = CsvMeter(file)
    meter.start()
    with file.open("a") as stream:
        stream.write(f"{time.time() + 0.001},5,2\n{time.time()},5")
    time.sleep(0.05)
    spent = time.time() - meter._begun_s
    assert meter.energy_j() == pytest.approx(10 * spent, rel=0.2)
    assert meter.source == "external meter, meter.csv"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "expected the columns time_s and power_w"),
        ("time_s,power_w\nx,1\n2,3\n", "line 2: not numbers"),
        ("time_s,power_w\n1,nan\n2,3\n", "line 2: not a finite number"),
    ],
)
def test_csv_that_is_none(tmp_path, text, message):
    (tmp_path / "meter.csv").write_text(text)
    with pytest.raises(IsthmusError, match=message):
        CsvMeter(tmp_path / "meter.csv")
    with pytest.raises(IsthmusError, match="no such file; start the meter first"):
        CsvMeter(tmp_path / "nothing.csv")


@given(st.text(max_size=200))
def test_any_csv_is_read_or_refused(tmp_path_factory, text):
    file = tmp_path_factory.mktemp("csv") / "meter.csv"
    file.write_text(text, errors="replace")
    try:
        CsvMeter(file)
    except IsthmusError as error:
        assert str(file) in str(error)


# ---- by name
def test_a_meter_by_name(tmp_path):
    assert open_meter("none") is None
    (tmp_path / "m.csv").write_text("time_s,power_w\n1,2\n")
    assert isinstance(open_meter(f"csv:{tmp_path / 'm.csv'}"), CsvMeter)
    with pytest.raises(IsthmusError, match=r"power meter 'watt' is unknown: there are auto, none, ina, tegrastats, rapl and csv:FILE"):
        open_meter("watt")


def test_a_machine_without_a_meter(monkeypatch, tmp_path):
    monkeypatch.setattr(power, "_OPENERS", {"ina": lambda: InaMeter(tmp_path), "rapl": lambda: RaplMeter(tmp_path)})
    assert open_meter("auto") is None
    with pytest.raises(IsthmusError, match="no INA3221"):
        open_meter("ina")
