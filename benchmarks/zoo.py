# SPDX-License-Identifier: Apache-2.0
"""The zoo's table: `python benchmarks/zoo.py WORK [--data DIR] [--only NAME@PRESET ...] [--measure] [--docs docs/zoo.md] [--json]`.

Trains the presets below, each with its own budget and seed 0, compiles the checkpoints, measures what runs here and prints `isthmus zoo table` of the
bundles. A preset for the FPGA is a bundle of its own in the row of its system. Everything is kept in WORK: what was stopped goes on, and bundles that
are there are not made again. With --data the real files found under it (pneumoniamnist/, cxr_pneumonia/ with its archive, coco_keypoints/coco/,
denoise/) are trained on and judged by, else synthetic ones; the table says which. Four of COCO's photographs cannot be divided: their twelve people are
learnt by heart and judged on themselves, which shows that the road works and what int8 costs, and says nothing of quality. Half an hour on one core.
With --docs the table is also written between that file's markers.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from amfacpose import BY_HEART
from archives import unpacked

import isthmus
from isthmus.bench import Rules
from isthmus.bench_bundle import bench_bundle, read_measurements, why_not_measured
from isthmus.bundle import Bundle
from isthmus.train import zoo
from isthmus.train.checkpoint import Checkpoint
from isthmus.train.loop import TrainConfig, fit
from isthmus.train.snapshots import Budget
from isthmus.train.system import CHECKPOINT, SPLIT_SEED, train_system
from isthmus.zoo_table import markdown_table, rows_json, text_table, zoo_rows

BOARDS = ("cpu", "rpi5", "jetson-orin-nano")
FPGA = ("pynq-z2",)
BEGIN, END = "<!-- table: python benchmarks/zoo.py -->", "<!-- end of table -->"
RULES = Rules(min_count=100, min_duration_s=1.0, max_duration_s=60.0, percentile=50.0)


@dataclass(frozen=True)
class Plan:
    """One bundle. `data`: folder under --data; `split`: tensors at which the target hands over to the processor of its host.

    For real files, where the preset's own budget is too long for this table: `train`, and `teachers` of a student. `by_heart`: samples are not varied.
    """

    preset: str
    targets: tuple[str, ...] = BOARDS
    data: str = ""
    split: tuple[str, ...] = ()
    train: TrainConfig | None = None
    teachers: Budget | None = None
    by_heart: bool = False


PLANS = (
    Plan("medmnist@pneumonia-c2", data="pneumoniamnist"),
    Plan("medmnist@pneumonia-nano", FPGA, data="pneumoniamnist"),
    Plan(
        "pneumonia_kd@student",
        data="cxr_pneumonia",
        train=TrainConfig(epochs=8, batch_size=8, learning_rate=1e-3, weight_decay=0.0),
        teachers=Budget(epochs=7, batch_size=8, peak=0.03),
    ),
    Plan("pneumonia_kd@ci", (*BOARDS, *FPGA), data="cxr_pneumonia"),
    Plan("amfacpose@ci", data="coco_keypoints/coco", train=BY_HEART["ci"], by_heart=True),
    Plan(  # the trunk on the fabric
        "amfacpose@tinypose_fpga", FPGA, data="coco_keypoints/coco", split=("node_conv2d_3_q",), train=BY_HEART["tinypose_fpga"], by_heart=True
    ),
    Plan("pinn_denoise@ci", data="denoise"),
    Plan("pinn_denoise@fpga-8-16", FPGA, data="denoise"),
)


def train(plan: Plan, folder: Path, root: Path | None) -> None:
    """What `isthmus zoo train` does, on real files within the plan's own budget where it has one."""
    if root is None or plan.train is None:
        train_system(f"zoo:{plan.preset}", folder, data_root=root)
        return
    architecture, preset = zoo.parse(f"zoo:{plan.preset}")
    system = zoo.trainable(architecture)
    if plan.teachers is not None:
        system = replace(system, presets={preset: replace(system.configuration(preset), budget=plan.teachers)})
    split = system.data(SPLIT_SEED, preset, root)
    learned, task = system.taught(split, preset, plan.train.seed, root, folder)
    checkpoint = Checkpoint(folder / CHECKPOINT, f"zoo:{plan.preset}")
    fit(system.network(preset, plan.train.seed), learned, plan.train, checkpoint=checkpoint, task=replace(task, augment=None) if plan.by_heart else task)


def real_files(plan: Plan, data: Path | None, work: Path) -> Path | None:
    """The folder of the plan's data set, its archive unpacked into `work`; None where it is not at hand."""
    root = data / plan.data if data is not None and plan.data else None
    if root is None or not root.is_dir():
        return None
    archives = list(root.glob("*.zip"))
    return unpacked(archives[0], work / "data" / plan.data) if archives else root


def made(plan: Plan, work: Path, data: Path | None, again: bool) -> Path:
    """The bundle of a plan, trained, compiled and measured; as it is where it is there already."""
    folder = work / plan.preset
    if not folder.exists():
        started = time.monotonic()
        root, training = real_files(plan, data, work), work / "training" / plan.preset
        train(plan, training, root)
        trained = time.monotonic()
        isthmus.compile(training / CHECKPOINT, targets=plan.targets, split=plan.split, tune=False, data_root=root, output=folder)
        print(f"{plan.preset}: trained in {trained - started:.0f} s, compiled in {time.monotonic() - trained:.0f} s", file=sys.stderr, flush=True)
    bundle = Bundle.open(folder)
    here = [profile for profile, entry in bundle.manifest["artifacts"].items() if not why_not_measured(entry)]
    measured = read_measurements(bundle)
    missing = [profile for profile in here if again or profile not in measured or not measured[profile].valid]
    if missing:
        bench_bundle(bundle, missing, RULES)
    return folder


def write_between(document: Path, begin: str, end: str, table: str) -> None:
    """Puts the table between the document's markers. Exits where it has not both of them."""
    text = document.read_text(encoding="utf-8")
    head, begun, rest = text.partition(begin)
    _, ended, tail = rest.partition(end)
    if not begun or not ended:
        sys.exit(f"{document}: has no lines {begin} and {end} for the table to stand between")
    document.write_text(f"{head}{begin}\n\n{table}\n\n{end}{tail}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("work", type=Path, help="folder of the trainings and bundles")
    parser.add_argument("--data", type=Path, help="folder of the real data sets (without: synthetic stand-ins)")
    parser.add_argument("--only", nargs="*", choices=[plan.preset for plan in PLANS], help="these bundles alone")
    parser.add_argument("--measure", action="store_true", help="measure every bundle anew, for instance when the machine is quiet")
    parser.add_argument("--docs", type=Path, help="document to write the table into")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    rows = zoo_rows([made(plan, given.work, given.data, given.measure) for plan in PLANS if not given.only or plan.preset in given.only])
    print(json.dumps(rows_json(rows), indent=1) if given.json else text_table(rows))
    if given.docs is not None:
        write_between(given.docs, BEGIN, END, markdown_table(rows))


if __name__ == "__main__":
    main()
