# SPDX-License-Identifier: Apache-2.0
"""What a figure was measured on: read from the operating system, never guessed. What cannot be read is None. Standard library and numpy only."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

CPUS = Path("/sys/devices/system/cpu")
CPU_FREQUENCY = CPUS / "cpu0/cpufreq"
THERMAL = Path("/sys/class/thermal")
THROTTLED = Path("/sys/devices/platform/soc/soc:firmware/get_throttled")  # Raspberry Pi: bits for low voltage and throttling


def host_conditions() -> dict[str, Any]:
    """Machine, processor, clocks, load and versions, as plain JSON data."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "host": platform.node(),
        "board": _read(Path("/proc/device-tree/model")),
        "cpu_model": _cpu_model(),
        "cpu_count": os.cpu_count(),
        "cpu_allowed": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "governor": _read(CPU_FREQUENCY / "scaling_governor"),
        "clock_khz": _whole(_read(CPU_FREQUENCY / "scaling_cur_freq")),
        "max_clock_khz": _whole(_read(CPU_FREQUENCY / "cpuinfo_max_freq")),
        "load_average": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


def volatile_conditions() -> dict[str, Any]:
    """What changes while one measures: taken before and after. Clocks by processor, temperatures by sensor, load."""
    return {
        "clock_khz": {cpu.name: clock for cpu in _sorted(CPUS.glob("cpu[0-9]*")) if (clock := _whole(_read(cpu / "cpufreq/scaling_cur_freq"))) is not None},
        "temperature_c": _temperatures(),
        "throttled": _read(THROTTLED),
        "load_average": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
    }


def _temperatures() -> dict[str, float]:
    found = {}
    for zone in _sorted(THERMAL.glob("thermal_zone[0-9]*")):
        text = _read(zone / "temp")
        if text is not None and text.removeprefix("-").isdigit():
            found[f"{_read(zone / 'type') or 'sensor'} ({zone.name})"] = int(text) / 1000
    return found


def _sorted(paths: Iterable[Path]) -> list[Path]:
    """By the number at the end of the name: cpu10 after cpu9."""
    return sorted(paths, key=lambda path: (len(path.name), path.name))


def _read(path: Path) -> str | None:
    """The first line of a small file of the kernel, None where this machine has none (a virtual machine shows no governor)."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").split("\n")[0].strip("\0 \t") or None
    except OSError:
        return None


def _whole(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdigit() else None


def _cpu_model() -> str | None:
    """x86 names the processor in /proc/cpuinfo; most ARM kernels do not, and then the architecture is all there is."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = [line.split(":", 1)[1].strip() for line in lines if line.lower().startswith(("model name", "hardware")) and ":" in line]
    return named[0] if named else (platform.processor() or platform.machine() or None)
