# SPDX-License-Identifier: Apache-2.0
"""Power meters: what this machine can say of its own energy, as joules since `start`. Standard library only.

- "rapl": x86, the processor package's own counter (Linux powercap). Readable by root alone on most systems (CVE-2020-8694).
- "ina": Jetson, the INA3221 sensors in sysfs, without a process beside the benchmark.
- "tegrastats": Jetson, NVIDIA's program.
- "csv:FILE": an external meter that appends lines to a file while it runs.

A board's own total is taken where it has one, else the rails that make it up are added; `source` says which.
"""

from __future__ import annotations

import csv
import itertools
import math
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from isthmus.bench import EnergyMeter
from isthmus.errors import IsthmusError

POWERCAP = Path("/sys/class/powercap")
I2C_DRIVERS = Path("/sys/bus/i2c/drivers")
INTERVAL_S = 0.02  # INA3221 on Jetson averages over some ten milliseconds: faster reading tells nothing new
TEGRASTATS_MS = 100
WAIT_S = 5.0
CSV_BYTES = 2**28

# Rails by board, first that is complete: the input of the whole module, else those that add up to it. On AGX Orin VDDQ_VDD2_1V8AO hangs
# behind VIN_SYS_5V0 and would count twice.
TOTALS: tuple[tuple[str, ...], ...] = (
    ("VDD_IN",),  # TX1, TX2, Xavier NX, Orin Nano, Orin NX
    ("POM_5V_IN",),  # Nano
    ("VIN",),  # Thor
    ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),  # AGX Orin
    ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"),  # AGX Xavier
)
# "VDD_IN 4940mW/4940mW" (now/average, JetPack 7.2 adds the largest); before JetPack 5 without the unit.
_RAIL = re.compile(r"(?<![\w@/])([A-Z][A-Z0-9_]*) (\d{1,9})(?:mW)?/(\d{1,9})(?:mW)?(?:/\d{1,9}mW)?(?=\s|$)")
_NOT_RAILS = frozenset({"RAM", "SWAP", "IRAM"})


def open_meter(name: str) -> EnergyMeter | None:
    """The meter `name` ("auto": the first that is here, None where none is; "none"). Raises `IsthmusError` where a named one cannot be read."""
    if name == "none":
        return None
    if name.startswith("csv:"):
        return CsvMeter(Path(name[4:]))
    if name == "auto":
        for opener in _OPENERS.values():
            try:
                return opener()
            except IsthmusError:
                continue
        return None
    if name not in _OPENERS:
        raise IsthmusError(f"power meter {name!r} is unknown: there are auto, none, {', '.join(_OPENERS)} and csv:FILE")
    return _OPENERS[name]()


# ---- x86
class RaplMeter:
    """The packages' energy counters, which wrap around."""

    def __init__(self, root: Path = POWERCAP) -> None:
        packages = sorted(path for path in root.glob("intel-rapl:*") if path.name.count(":") == 1) if root.is_dir() else []
        if not packages:
            raise IsthmusError("rapl: this machine shows no energy counter (/sys/class/powercap/intel-rapl:*); virtual machines hide it")
        self._counters = [path / "energy_uj" for path in packages]
        self._ranges = [_number(path / "max_energy_range_uj") for path in packages]
        self.source = f"RAPL, {len(packages)} processor package{'s' if len(packages) > 1 else ''}"
        self._read()

    def _read(self) -> list[int]:
        try:
            return [_number(counter) for counter in self._counters]
        except PermissionError:
            raise IsthmusError(f"rapl: no permission to read {self._counters[0]}: run as root, or let this user read it") from None

    def start(self) -> None:
        self._last, self._spent_uj = self._read(), 0

    def energy_j(self) -> float:
        """Counters wrap after some minutes at full power: ask more often than that."""
        now = self._read()
        self._spent_uj += sum((new - old) % (span + 1) for new, old, span in zip(now, self._last, self._ranges, strict=True))
        self._last = now
        return self._spent_uj / 1e6

    def stop(self) -> None:
        return None


# ---- sampled power
class _Sampled:
    """Integrates a power that a thread reads: each reading counts until the next."""

    source = ""

    def start(self) -> None:
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._spent_j, self._power_w, self._since_s = 0.0, math.nan, time.perf_counter()
        self._failure = ""
        self._first = threading.Event()
        self._thread = threading.Thread(target=self._run, name="isthmus-power", daemon=True)
        self._thread.start()
        if not self._first.wait(WAIT_S) or self._failure:
            self.stop()
            raise IsthmusError(f"{self.source}: {self._failure or f'no reading within {WAIT_S:g} s'}")

    def energy_j(self) -> float:
        with self._lock:
            if self._failure:
                raise IsthmusError(f"{self.source}: {self._failure}")
            self._account()
            return self._spent_j

    def stop(self) -> None:
        self._ended.set()
        self._thread.join(WAIT_S)

    def _run(self) -> None:
        raise NotImplementedError

    def _reading(self, power_w: float) -> None:
        with self._lock:
            self._account()
            self._power_w = power_w
        self._first.set()

    def _account(self) -> None:
        now = time.perf_counter()
        held = self._power_w if not math.isnan(self._power_w) else 0.0
        self._spent_j += held * (now - self._since_s)
        self._since_s = now

    def _fail(self, why: str) -> None:
        with self._lock:
            self._failure = self._failure or why
        self._first.set()


class InaMeter(_Sampled):
    """Jetson's INA3221: hwmon since JetPack 5 (in*_label, mV and mA), iio before (rail_name_*, mW)."""

    def __init__(self, root: Path = I2C_DRIVERS) -> None:
        rails = {**_hwmon_rails(root), **_iio_rails(root)}
        if not rails:
            raise IsthmusError("ina: this machine shows no INA3221 sensor: it is no Jetson, or its driver is not loaded")
        chosen = _total(rails)
        if chosen is None:
            raise IsthmusError(f"ina: the rails {', '.join(sorted(rails))} are none of a board that is known")
        self._rails = [rails[name] for name in chosen]
        self.source = f"INA3221, {' + '.join(chosen)}"
        _power_w(self._rails)

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                self._reading(_power_w(self._rails))
            except (IsthmusError, OSError) as error:
                self._fail(str(error))
                return
            self._ended.wait(INTERVAL_S)


class TegrastatsMeter(_Sampled):
    """NVIDIA's tegrastats, a line every TEGRASTATS_MS."""

    source = "tegrastats"

    def __init__(self, program: str | None = None) -> None:
        self._program = program or shutil.which("tegrastats") or ""
        if not self._program:
            raise IsthmusError("tegrastats is not on the PATH: this machine is no Jetson")

    def start(self) -> None:
        try:
            self._process = subprocess.Popen([self._program, "--interval", str(TEGRASTATS_MS)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        except OSError as error:
            raise IsthmusError(f"tegrastats: cannot be started: {error.strerror or error}") from None
        super().start()

    def _run(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            rails = parse_tegrastats(line)
            chosen = _total(rails)
            if chosen is None:
                self._fail(f"a line without a total that is known: {line.strip()[:200]!r}")
                return
            self.source = f"tegrastats, {' + '.join(chosen)}"
            self._reading(sum(rails[name] for name in chosen) / 1000)
        self._fail("the program ended")

    def stop(self) -> None:
        self._process.kill()
        super().stop()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


def parse_tegrastats(line: str) -> dict[str, int]:
    """Power by rail in mW, the present value of each. Lines of JetPack 4 to 7 look different; temperatures and loads are passed over."""
    return {name: int(now) for name, now, _ in _RAIL.findall(line) if name not in _NOT_RAILS}


# ---- an external meter
class CsvMeter:
    """A file with a header that a meter appends to: `time_s` (seconds since 1970, by this machine's clock) and `power_w`, or `voltage_v` and `current_a`."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.source = f"external meter, {file.name}"
        _csv_rows(file)

    def start(self) -> None:
        self._begun_s = time.time()

    def energy_j(self) -> float:
        """Trapezoids between the lines from `start` to now. Raises `IsthmusError` where the meter wrote nothing in that time."""
        now_s = time.time()
        rows = _csv_rows(self._file)
        energy = integrate(rows, self._begun_s, now_s)
        if energy is None and now_s - self._begun_s > WAIT_S:
            raise IsthmusError(f"{self._file}: has no line between {self._begun_s:.0f} and {now_s:.0f} s: is the meter running, with this machine's time?")
        return energy or 0.0

    def stop(self) -> None:
        return None


def integrate(rows: Iterable[tuple[float, float]], begin_s: float, end_s: float) -> float | None:
    """Joules between two times: power is a straight line between two readings and stays as it was after the last. None without a reading before the end."""
    ordered = sorted(row for row in rows if row[0] <= end_s)
    if not ordered or ordered[-1][0] < begin_s - 60:
        return None
    points = [*ordered, (end_s, ordered[-1][1])]
    joules = 0.0
    for (first_s, first_w), (second_s, second_w) in itertools.pairwise(points):
        low, high = max(first_s, begin_s), min(second_s, end_s)
        if high > low:
            share = min(1.0, ((low + high) / 2 - first_s) / (second_s - first_s))
            joules += (first_w + share * (second_w - first_w)) * (high - low)
    return joules


def _csv_rows(file: Path) -> list[tuple[float, float]]:
    try:
        if file.stat().st_size > CSV_BYTES:
            raise IsthmusError(f"{file}: {file.stat().st_size:,} bytes, at most {CSV_BYTES:,} are read")
        with file.open(newline="", encoding="utf-8", errors="replace") as stream:
            lines = list(csv.DictReader(stream, restkey="more", restval=""))
    except FileNotFoundError:
        raise IsthmusError(f"{file}: no such file; start the meter first") from None
    names = set(lines[0]) if lines else set()
    if lines and not ("time_s" in names and ("power_w" in names or {"voltage_v", "current_a"} <= names)):
        raise IsthmusError(f"{file}: expected the columns time_s and power_w (or voltage_v and current_a), found {', '.join(sorted(map(str, names)))}")
    rows = []
    for number, line in enumerate(lines):
        try:
            power = float(line["power_w"]) if "power_w" in names else float(line["voltage_v"]) * float(line["current_a"])
            row = (float(line["time_s"]), power)
        except ValueError:
            if number == len(lines) - 1:  # the meter is in the middle of it
                break
            raise IsthmusError(f"{file}, line {number + 2}: not numbers: {str(dict(line))[:120]}") from None
        if not all(map(math.isfinite, row)):
            raise IsthmusError(f"{file}, line {number + 2}: not a finite number")
        rows.append(row)
    return rows


# ---- sysfs
_Rail = Callable[[], float]


def _hwmon_rails(root: Path) -> dict[str, _Rail]:
    rails: dict[str, _Rail] = {}
    for label in sorted(root.glob("ina3221/*/hwmon/hwmon*/in*_label")):
        channel = label.name.removeprefix("in").removesuffix("_label")
        volts, amperes = label.with_name(f"in{channel}_input"), label.with_name(f"curr{channel}_input")
        if volts.exists() and amperes.exists():
            rails[_text(label)] = lambda volts=volts, amperes=amperes: _number(volts) * _number(amperes) / 1e6  # type: ignore[misc]
    return rails


def _iio_rails(root: Path) -> dict[str, _Rail]:
    rails: dict[str, _Rail] = {}
    for label in sorted(root.glob("ina3221x/*/iio:device*/rail_name_*")):
        power = label.with_name(f"in_power{label.name.rpartition('_')[2]}_input")
        if power.exists():
            rails[_text(label)] = lambda power=power: _number(power) / 1e3  # type: ignore[misc]
    return rails


def _total(rails: Iterable[str]) -> tuple[str, ...] | None:
    present = set(rails)
    return next((names for names in TOTALS if present.issuperset(names)), None)


def _power_w(rails: Iterable[_Rail]) -> float:
    return sum(rail() for rail in rails)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace").strip()


def _number(path: Path) -> int:
    text = _text(path)
    if not (text.isascii() and text.isdigit()):
        raise IsthmusError(f"{path}: expected a whole number, found {text[:40]!r}")
    return int(text)


_OPENERS: dict[str, Callable[[], EnergyMeter]] = {"ina": InaMeter, "tegrastats": TegrastatsMeter, "rapl": RaplMeter}


__all__ = ["CsvMeter", "InaMeter", "RaplMeter", "TegrastatsMeter", "integrate", "open_meter", "parse_tegrastats"]
