# SPDX-License-Identifier: Apache-2.0
"""Published synthesis reports of hls4ml projects against the estimate, each network estimated by factors fitted without it.

`python benchmarks/hls4ml_estimates.py [--docs docs/hls4ml.md]`: `--docs` writes the table between the markers of that document. Ends with 1
where a median error is above its floor.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from isthmus.targets.hls4ml.calibration import published
from isthmus.targets.hls4ml.estimate import left_out, of_published, ratios, wanted_of

BEGIN, END = "<!-- benchmarks/hls4ml_estimates.py writes this -->", "<!-- to here: estimates -->"
FLOORS = {"dsp": 0.30, "lut": 0.50, "ff": None, "bram_18k": None, "latency_cycles": 0.30}
LABELS = {"dsp": "DSP", "lut": "LUT", "ff": "FF", "bram_18k": "BRAM (18 Kb)", "latency_cycles": "latency, cycles"}
FAR = 2.0  # a factor beyond which a figure is said not to be explained


def rows() -> list[tuple[str, str, dict[str, tuple[float, float]]]]:
    """(design, network, quantity -> (published, estimated))."""
    factors = {design.network: left_out(design) for design in published()}
    found = []
    for design in published():
        estimated, wanted = of_published(design, factors[design.network]), wanted_of(design)
        found.append((design.name, design.network, {name: (float(value), estimated[name]) for name, value in wanted.items()}))
    return found


def errors(found: list[tuple[str, str, dict[str, tuple[float, float]]]]) -> dict[str, list[float]]:
    """Relative errors by quantity, of designs that have any of it."""
    result: dict[str, list[float]] = {name: [] for name in LABELS}
    for _, _, figures in found:
        for name, (wanted, estimated) in figures.items():
            if wanted > 0:
                result[name].append(abs(estimated - wanted) / wanted)
    return result


def _cell(figures: dict[str, tuple[float, float]], name: str) -> str:
    if name not in figures:
        return "-"
    wanted, estimated = figures[name]
    ratio = (estimated + 1) / (wanted + 1)
    far = not 1 / FAR <= ratio <= FAR
    return f"{wanted:.0f} / {estimated:.0f}{' **?**' if far else ''}"


def markdown(found: list[tuple[str, str, dict[str, tuple[float, float]]]]) -> str:
    lines = [f"| published / estimated | {' | '.join(LABELS.values())} |", "|---" * (len(LABELS) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(_cell(figures, quantity) for quantity in LABELS)} |" for name, _, figures in found]
    medians = {name: float(np.median(values)) for name, values in errors(found).items()}
    nothing = sum(figures["dsp"][0] == 0 for _, _, figures in found)
    right = sum(figures["dsp"][0] == 0 and figures["dsp"][1] < 0.5 for _, _, figures in found)
    within = ratios()
    lines += ["", f"| {len(found)} designs, {len({network for _, network, _ in found})} networks | {' | '.join(LABELS.values())} |"]
    lines += ["|---" * (len(LABELS) + 1) + "|"]
    lines += ["| median error, its network left out | " + " | ".join(f"{100 * medians[name]:.1f} %" for name in LABELS) + " |"]
    lines += ["| published / estimated, eight of ten within | " + " | ".join(f"{within[name][0]:.2f} to {within[name][1]:.2f}" for name in LABELS) + " |"]
    return "\n".join([*lines, "", f"No DSP in the report: {nothing} designs, estimated to have none: {right} of them (they are not in the median)."])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--docs", type=Path)
    options = parser.parse_args()
    found = rows()
    if options.docs:
        before, _, rest = options.docs.read_text(encoding="utf-8").partition(BEGIN)
        options.docs.write_text(f"{before}{BEGIN}\n{markdown(found)}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    else:
        print(markdown(found))
    medians = {name: float(np.median(values)) for name, values in errors(found).items()}
    return int(any(floor is not None and medians[name] > floor for name, floor in FLOORS.items()))


if __name__ == "__main__":
    sys.exit(main())
