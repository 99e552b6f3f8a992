# SPDX-License-Identifier: Apache-2.0
"""The custom CNNs and FPGA presets of the MedMNIST paper on real 28x28 sets, alone and as ensembles, float and int8, the mean of three training seeds.

    python benchmarks/medmnist.py --data FOLDER [--work FOLDER] [--only breast] [--networks c1,nano] [--seeds 3] [--json]

Every network is trained on the training part for the epochs in `EPOCHS` (the epoch chosen on the validation part), calibrated on training samples by the
portable recipe, and compiled; int8 is what the artifact of target cpu computes on the whole test part, which decides nothing. An ensemble is the mean of
its members' softmax. Prints Markdown tables.

Finished networks are kept in --work (scores, and a bundle that `isthmus select` takes) and not computed again: give a fresh folder after a change to
training or quantiser. About 20 minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

import isthmus
from isthmus.dataset import Dataset
from isthmus.export.module import onnx_from_module
from isthmus.export.prepare import prepare_float
from isthmus.post_training import PostTraining
from isthmus.recipe import load_recipe
from isthmus.train.data import Split
from isthmus.train.ensemble import mean_probabilities, probabilities
from isthmus.train.loop import TrainConfig, fit, predict
from isthmus.train.metrics import classification_metrics
from isthmus.train.zoo.medmnist import FPGA, SYSTEM

TITLES = {"breast": "BreastMNIST", "pneumonia": "PneumoniaMNIST", "mnist": "MNIST"}
NETWORKS = ("c1", "c2", "c2-quarter", "nano")
ENSEMBLES = ("c1_c2", "c2-quarter_nano", "c1_c2-quarter_nano", "c1_c2_c2-quarter_nano")
# Data set -> epochs of the networks of the paper, and of those for FPGAs.
EPOCHS = {"breast": (12, 32), "pneumonia": (2, 4), "mnist": (2, 4)}
RECIPE = "portable"
SPLIT_SEED = 0
INPUT = "input"


@dataclass(frozen=True)
class Trained:
    """One network and seed: probabilities (N, classes) on the test part, float and int8; parameters; bytes of the .tflite file."""

    float_: np.ndarray
    int8: np.ndarray
    labels: np.ndarray
    parameters: int
    int8_bytes: int


def trained(dataset: str, network: str, seed: int, data: Path, work: Path) -> Trained:
    """Trains, quantises and compiles, or reads what an earlier run kept."""
    preset, stem = f"{dataset}-{network}", f"{dataset}-{network}-{seed}"
    config = replace(SYSTEM.training(seed, preset), epochs=EPOCHS[dataset][preset in FPGA])
    settings = json.dumps({"preset": preset, "network": asdict(SYSTEM.configuration(preset)), "train": asdict(config), "recipe": RECIPE}, sort_keys=True)
    file = work / f"{stem}.npz"
    if file.is_file():
        with np.load(file, allow_pickle=False) as kept:
            if str(kept["settings"]) != settings:
                raise isthmus.IsthmusError(f"{file}: belongs to other settings; give --work another folder")
            return Trained(kept["float"], kept["int8"], kept["labels"], int(kept["parameters"]), int(kept["int8_bytes"]))
    started = time.perf_counter()
    result = _train(preset, seed, config, data, work / stem)
    arrays = {"float": result.float_, "int8": result.int8, "labels": result.labels, "parameters": result.parameters, "int8_bytes": result.int8_bytes}
    np.savez_compressed(file, settings=settings, **arrays)  # type: ignore[arg-type]  # numpy's stub confuses **arrays with allow_pickle
    tops = [float((side.argmax(1) == result.labels).mean()) for side in (result.float_, result.int8)]
    print(f"{stem}: float {tops[0]:.4f} int8 {tops[1]:.4f} ({time.perf_counter() - started:.0f} s)", file=sys.stderr, flush=True)
    return result


def _train(preset: str, seed: int, config: TrainConfig, data: Path, bundle_folder: Path) -> Trained:
    split = SYSTEM.data(SPLIT_SEED, preset, data)
    module = SYSTEM.network(preset, seed)
    fit(module, split, config)
    bundle = _compiled(module, split, seed, bundle_folder)
    with bundle.open_session("cpu") as session:
        (border,), (result,) = session.inputs, session.outputs
        scores = result.dequantise(session.run_samples({border.name: border.quantise(split.x_test)})[result.name])
    float_scores = predict(module, split.x_test)
    assert isinstance(float_scores, np.ndarray)
    counted = sum(parameter.numel() for parameter in module.parameters())
    return Trained(probabilities(float_scores), probabilities(scores), split.y_test, counted, bundle.artifact("rpi5")["size_bytes"])


def _compiled(module: nn.Module, split: Split, seed: int, folder: Path) -> isthmus.Bundle:
    """A bundle whose golden samples are the first of the test part, labelled."""
    model = prepare_float(onnx_from_module(module, (torch.zeros(1, *split.sample_shape),)), {})
    calibration = Dataset({INPUT: split.x_train}, split.y_train, "training part")
    graph = PostTraining(model, calibration, lambda text, share: None).graph(replace(load_recipe(RECIPE), seed=seed))[0]
    test = folder.with_name(f"{split.name}-test.npz")
    if not test.is_file():
        np.savez_compressed(test, x=split.x_test, y=split.y_test)
    return isthmus.compile(graph, targets=["cpu", "rpi5"], data=test, tune=False, force=True, output=folder)


@dataclass(frozen=True)
class Row:
    """One network or ensemble of a data set; a list holds a figure a seed."""

    dataset: str
    name: str
    samples: int
    parameters: int
    int8_bytes: int
    float_: dict[str, list[float]]
    int8: dict[str, list[float]]

    @property
    def changes(self) -> list[float]:
        """int8 minus float in points of accuracy."""
        return [100 * (after - before) for before, after in zip(self.float_["weighted_sensitivity"], self.int8["weighted_sensitivity"], strict=True)]


def rows(dataset: str, networks: Sequence[str], data: Path, work: Path, seeds: int) -> list[Row]:
    """The networks of a data set, then every ensemble of them."""
    members = {network: [trained(dataset, network, seed, data, work) for seed in range(seeds)] for network in networks}
    ensembles = [name for name in ENSEMBLES if set(name.split("_")) <= set(networks)]
    return [_row(dataset, name, [members[member] for member in name.split("_")]) for name in (*networks, *ensembles)]


def _row(dataset: str, name: str, members: Sequence[Sequence[Trained]]) -> Row:
    by_seed = list(zip(*members, strict=True))
    first = by_seed[0]
    sides = []
    for side in ("float_", "int8"):
        found = [classification_metrics(mean_probabilities([getattr(one, side) for one in seed]), seed[0].labels) for seed in by_seed]
        sides.append({metric: [figures[metric] for figures in found] for metric in found[0]})
    samples = len(first[0].labels)
    return Row(dataset, name, samples, sum(one.parameters for one in first), round(statistics.mean(sum(o.int8_bytes for o in s) for s in by_seed)), *sides)


def table(found: Sequence[Row]) -> str:
    """Markdown; the spread is from the worst to the best seed."""
    lines = [
        "| data (test images) | network or ensemble | parameters | .tflite, KiB | float: wS, BA, AUC | int8: wS, BA, AUC | int8 minus float, points |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found:
        means = [", ".join(f"{statistics.mean(side[m]):.3f}" for m in ("weighted_sensitivity", "balanced_accuracy", "auc")) for side in (row.float_, row.int8)]
        spread = f"{statistics.mean(row.changes):+.2f} ({min(row.changes):+.2f} to {max(row.changes):+.2f})"
        name = " + ".join(row.name.split("_"))
        cells = [f"{TITLES[row.dataset]} ({row.samples:,})", name, f"{row.parameters:,}", f"{row.int8_bytes / 1024:.0f}", *means, spread]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the sets' own files, or a folder for each")
    parser.add_argument("--work", type=Path, default=Path("medmnist-work"), help="finished networks and their bundles")
    parser.add_argument("--only", choices=sorted(TITLES), help="one data set")
    parser.add_argument("--networks", default=",".join(NETWORKS), help="some of them")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    networks = given.networks.split(",")
    if not set(networks) <= set(NETWORKS):
        parser.error(f"--networks {given.networks}: there are {', '.join(NETWORKS)}")
    given.work.mkdir(parents=True, exist_ok=True)
    try:
        found = [row for dataset in TITLES if given.only in (None, dataset) for row in rows(dataset, networks, given.data, given.work, given.seeds)]
    except isthmus.IsthmusError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps([asdict(row) for row in found], indent=1) if given.json else table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
