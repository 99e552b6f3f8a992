# SPDX-License-Identifier: Apache-2.0
"""The zoo's table: `python benchmarks/zoo.py WORK [--data DIR] [--only NAME@PRESET ...] [--measure] [--docs docs/zoo.md] [--json]`.

Trains the presets below, each with its own budget and seed 0, compiles the checkpoints, measures what runs here and prints `isthmus zoo table` of the
bundles. A preset for the FPGA is a bundle of its own in the row of its system. Everything is kept in WORK: what was stopped goes on, and bundles that
are there are not made again. With --data the real files found under it are trained on and judged by, else synthetic ones; the table says which. With
--docs the table is also written between that file's markers.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import isthmus
from isthmus.bench import Rules
from isthmus.bench_bundle import bench_bundle, read_measurements, why_not_measured
from isthmus.bundle import Bundle
from isthmus.train.system import CHECKPOINT, train_system
from isthmus.zoo_table import markdown_table, rows_json, text_table, zoo_rows

BOARDS = ("cpu", "rpi5", "jetson-orin-nano")
FPGA = ("pynq-z2",)
BEGIN, END = "<!-- table: python benchmarks/zoo.py -->", "<!-- end of table -->"
RULES = Rules(min_count=100, min_duration_s=1.0, max_duration_s=60.0, percentile=50.0)


@dataclass(frozen=True)
class Plan:
    """One bundle. `data`: folder under --data; `split`: tensors at which the target hands over to the processor of its host."""

    preset: str
    targets: tuple[str, ...] = BOARDS
    recipe: str = "portable"
    data: str = ""
    split: tuple[str, ...] = ()


PLANS = (
    Plan("medmnist@pneumonia-c2", data="pneumoniamnist"),
    Plan("medmnist@pneumonia-nano", FPGA, data="pneumoniamnist"),
    Plan("pneumonia_kd@student"),
    Plan("pneumonia_kd@ci", (*BOARDS, *FPGA)),
    Plan("amfacpose@ci"),
    Plan("amfacpose@tinypose_fpga", FPGA, split=("node_conv2d_3_q",)),  # the trunk
    Plan("pinn_denoise@ci", data="denoise"),
    Plan("pinn_denoise@fpga-8-16", FPGA, data="denoise"),
)


def made(plan: Plan, work: Path, data: Path | None, again: bool) -> Path:
    """The bundle of a plan, trained, compiled and measured; as it is where it is there already."""
    folder = work / plan.preset
    if not folder.exists():
        started = time.monotonic()
        root = data / plan.data if data is not None and plan.data and (data / plan.data).is_dir() else None
        training = work / "training" / plan.preset
        train_system(f"zoo:{plan.preset}", training, data_root=root)
        trained = time.monotonic()
        isthmus.compile(training / CHECKPOINT, targets=plan.targets, recipe=plan.recipe, split=plan.split, tune=False, data_root=root, output=folder)
        print(f"{plan.preset}: trained in {trained - started:.0f} s, compiled in {time.monotonic() - trained:.0f} s", file=sys.stderr, flush=True)
    bundle = Bundle.open(folder)
    here = [profile for profile, entry in bundle.manifest["artifacts"].items() if not why_not_measured(entry)]
    measured = read_measurements(bundle)
    missing = [profile for profile in here if again or profile not in measured or not measured[profile].valid]
    if missing:
        bench_bundle(bundle, missing, RULES)
    return folder


def write_table(document: Path, table: str) -> None:
    """Puts the table between the document's markers. Exits where it has not both of them."""
    text = document.read_text(encoding="utf-8")
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        sys.exit(f"{document}: has no lines {BEGIN} and {END} for the table to stand between")
    document.write_text(f"{head}{BEGIN}\n\n{table}\n\n{END}{tail}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("work", type=Path, help="folder of the trainings and bundles")
    parser.add_argument("--data", type=Path, help="folder with pneumoniamnist/ and denoise/ (without: synthetic stand-ins)")
    parser.add_argument("--only", nargs="*", choices=[plan.preset for plan in PLANS], help="these bundles alone")
    parser.add_argument("--measure", action="store_true", help="measure every bundle anew, for instance when the machine is quiet")
    parser.add_argument("--docs", type=Path, help="document to write the table into")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    rows = zoo_rows([made(plan, given.work, given.data, given.measure) for plan in PLANS if not given.only or plan.preset in given.only])
    print(json.dumps(rows_json(rows), indent=1) if given.json else text_table(rows))
    if given.docs is not None:
        write_table(given.docs, markdown_table(rows))


if __name__ == "__main__":
    main()
