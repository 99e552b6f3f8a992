# SPDX-License-Identifier: Apache-2.0
"""Whether every preset of the zoo's edge systems compiles from nothing: `python benchmarks/zoo_presets.py WORK [--only NAME[@PRESET] ...] [--docs FILE]`.

`isthmus compile zoo:NAME@PRESET --no-tune` for cpu, rpi5 and jetson-orin-nano, of presets for FPGAs for pynq-z2 (hls4ml's C simulation), with no data
folder: trained on the synthetic stand-in, quantised by the portable recipe. Says how long that took, and how each artifact agrees with the integer
reference. A finished preset is kept in WORK as one file and not compiled again: stop it at any moment. Everything is several hours of one core, the
presets of 256x256 and more being most of it. Exit code 1 where a preset does not compile or a `ci` preset takes two minutes.

Prints a row a preset; with --docs, networks below half a GMAC in a row a system, between that document's markers. --finished computes nothing.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from zoo import write_between

import isthmus
from isthmus.console import grid
from isthmus.cost import cost_of_graph
from isthmus.form_file import load_form
from isthmus.graph import QuantGraph
from isthmus.train.zoo import amfacpose, medmnist, medmnist_dnn, pinn_denoise, pneumonia_kd
from isthmus.zoo_table import NONE, agreement, compiled_by_tensorrt, markdown

SYSTEMS = (medmnist, medmnist_dnn, pneumonia_kd, amfacpose, pinn_denoise)
BOARDS, FPGA_BOARD = ("cpu", "rpi5", "jetson-orin-nano"), "pynq-z2"
FPGA = {*(f"medmnist@{preset}" for preset in medmnist.FPGA), "pneumonia_kd@fpga-s", "amfacpose@tinypose_fpga", "pinn_denoise@fpga", "pinn_denoise@fpga-8-16"}
SPLIT = {"amfacpose@tinypose_fpga": ("node_conv2d_3_q",)}  # the trunk on the fabric
CI_SECONDS = 120
LARGE_MACS = 500_000_000  # from here on a preset has a row of its own
BEGIN, END = "<!-- table: python benchmarks/zoo_presets.py -->", "<!-- end of presets -->"


@dataclass(frozen=True)
class Row:
    """One preset. `cpu_seconds`: training and compiling, with every tool that was started. `results`: what each target came to; or `error`."""

    preset: str
    cpu_seconds: float
    parameters: int = 0
    macs: int = 0
    samples: int = 0
    results: Mapping[str, str] | None = None
    error: str = ""


def compiled(preset: str, work: Path) -> Row:
    """Compiles into `work`, reads what came of it, and removes the bundle."""
    folder, started = work / "bundle", _cpu_seconds()
    targets = (FPGA_BOARD,) if preset in FPGA else BOARDS
    try:
        bundle = isthmus.compile(f"zoo:{preset}", targets=targets, split=SPLIT.get(preset, ()), tune=False, output=folder, force=True)
    except isthmus.IsthmusError as error:
        return Row(preset, _cpu_seconds() - started, error=str(error).replace("\n", " "))
    seconds, form = _cpu_seconds() - started, load_form(bundle.model)
    assert isinstance(form, QuantGraph)
    cost, samples = cost_of_graph(form), len(bundle.golden("")["label"])
    results = {name: _result(entry) for name, entry in bundle.manifest["artifacts"].items()}
    shutil.rmtree(folder)
    return Row(preset, seconds, cost.parameters, cost.macs, samples, results)


def _result(entry: Mapping[str, Any]) -> str:
    return compiled_by_tensorrt(entry) if entry["target"] == "jetson" else agreement(entry)


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def kept(preset: str, work: Path, finished: bool) -> Row | None:
    """What an earlier run found, or a new row; a preset that failed is tried again."""
    file = work / f"{preset}.json"
    if file.is_file():
        row = Row(**json.loads(file.read_text()))
        if finished or not row.error:
            return row
    if finished:
        return None
    print(f"{time.strftime('%H:%M:%S')} {preset}", file=sys.stderr, flush=True)
    row = compiled(preset, work)
    file.write_text(json.dumps(asdict(row), indent=1))
    print(f"  {row.cpu_seconds:.0f} CPU s: {row.error or row.results}", file=sys.stderr, flush=True)
    return row


# ---- shown
def rows_table(rows: Sequence[Row]) -> str:
    header = ["preset", "CPU s", "parameters", "MACs", "samples", "what came of it"]
    return grid(header, [[r.preset, f"{r.cpu_seconds:.0f}", f"{r.parameters:,}", f"{r.macs:,}", str(r.samples), _told(r)] for r in rows])


def _told(row: Row) -> str:
    return row.error or "; ".join(f"{target}: {result}" for target, result in (row.results or {}).items())


def compact_table(rows: Sequence[Row]) -> str:
    """Markdown: a row for each large preset, and one for the others of a system, those for FPGAs apart."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        system = row.preset.partition("@")[0]
        part = f"{system}, for FPGAs" if row.preset in FPGA else f"{system}, the others"
        groups.setdefault(row.preset if row.macs >= LARGE_MACS else part, []).append(row)
    lines = []
    for name, group in sorted(groups.items(), key=lambda item: (item[0].partition(",")[0].partition("@")[0], -item[1][0].macs)):
        shown = f"{name} ({len(group)})" if len(group) > 1 else group[0].preset
        cells = (_range([f"{value:,.0f}" for value in sorted(values)]) for values in ([r.macs / 1e6 for r in group], [r.cpu_seconds for r in group]))
        found = [{"refused" if row.error else (row.results or {}).get(target, NONE) for row in group} for target in (*BOARDS, FPGA_BOARD)]
        lines.append([shown, *cells, *(" or ".join(sorted(results)) for results in found)])
    return markdown([["preset", "million MACs", "CPU seconds", *BOARDS, FPGA_BOARD], ["---", "---:", "---:", *["---"] * 4], *lines])


def _range(values: Sequence[str]) -> str:
    return values[0] if values[0] == values[-1] else f"{values[0]} to {values[-1]}"


def missed(rows: Sequence[Row]) -> list[str]:
    faults = [f"{row.preset}: {row.error}" for row in rows if row.error]
    return faults + [f"{r.preset}: {r.cpu_seconds:.0f} CPU s, promised {CI_SECONDS}" for r in rows if r.preset.endswith("@ci") and r.cpu_seconds > CI_SECONDS]


def main() -> int:
    every = [f"{module.SYSTEM.name}@{preset}" for module in SYSTEMS for preset in module.SYSTEM.presets]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder of the finished presets")
    parser.add_argument("--only", nargs="*", help="these systems and presets, in this order")
    parser.add_argument("--finished", action="store_true", help="show what WORK holds and compile nothing")
    parser.add_argument("--docs", type=Path, help="document to write the compact table into")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    wanted = [preset for name in given.only for preset in every if preset in (name, f"{name}@{preset.partition('@')[2]}")] if given.only else every
    if not wanted:
        parser.error(f"--only {' '.join(given.only)}: is none of {', '.join(every)}")
    given.work.mkdir(parents=True, exist_ok=True)
    rows = [row for preset in wanted if (row := kept(preset, given.work, given.finished)) is not None]
    print(json.dumps([asdict(row) for row in rows], indent=1) if given.json else rows_table(rows))
    faults = missed(rows)
    print(*faults, sep="\n", file=sys.stderr)
    if given.docs is not None:
        write_between(given.docs, BEGIN, END, compact_table(rows))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
