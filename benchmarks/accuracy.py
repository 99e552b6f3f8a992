# SPDX-License-Identifier: Apache-2.0
"""What int8 costs in accuracy on real images, the mean of three training seeds: `python benchmarks/accuracy.py --data FOLDER [--work FOLDER]`.

The custom CNN C2 (zoo:medmnist) and a MobileNetV2-style network (zoo:mobilenet_small) on PneumoniaMNIST and MNIST. Every network is trained on the
training part, its epoch chosen on the validation part, and calibrated on training samples; int8 is the integer reference on the whole test part, which
decides nothing. Prints the Markdown table of the README; exit code 1 where a mean falls below its floor.

Finished cells are kept in --work and not computed again: give a fresh folder after a change to the quantiser. About 40 minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

import isthmus
from isthmus import reference
from isthmus.compare import top1_accuracy
from isthmus.dataset import Dataset
from isthmus.export.module import onnx_from_module
from isthmus.export.prepare import prepare_float
from isthmus.export.to_graph import graph_from_qdq
from isthmus.graph import QuantGraph
from isthmus.post_training import PostTraining
from isthmus.quantize import qat
from isthmus.recipe import Recipe, load_recipe
from isthmus.train import zoo
from isthmus.train.data import Split
from isthmus.train.loop import TrainConfig, fit, predict
from isthmus.train.zoo import ZooSystem

INPUT, OUTPUT = "input", "output"
SPLIT_SEED = 0


@dataclass(frozen=True)
class Case:
    """`epochs` of float training and of QAT."""

    data: str
    network: str
    reference: str
    epochs: int
    qat_epochs: int = 2


CASES = (
    Case("PneumoniaMNIST", "C2", "zoo:medmnist@pneumonia-c2", 4),
    Case("PneumoniaMNIST", "MobileNetV2-28", "zoo:mobilenet_small@pneumonia", 6),
    Case("MNIST", "C2", "zoo:medmnist@mnist-c2", 4),
    Case("MNIST", "MobileNetV2-28", "zoo:mobilenet_small@mnist", 6),
)
# Recipe -> the least that the mean of int8 minus float may be, in points of top-1; None where nothing is promised.
FLOORS: dict[str, float | None] = {"asymmetric": -0.5, "symmetric": -1.0, "portable": None, "portable-qat": -0.5}
TITLES = {"asymmetric": "asymmetric PTQ", "symmetric": "symmetric PTQ", "portable": "portable PTQ", "portable-qat": "portable QAT"}


@dataclass(frozen=True)
class Cell:
    """One network, seed and recipe: top-1 on the test part; of the cpu artifact the share of equal decisions and of equal output values."""

    float_top1: float
    int8_top1: float
    same_decisions: float
    same_values: float
    samples: int


@dataclass(frozen=True)
class Row:
    case: Case
    recipe: str
    cells: tuple[Cell, ...]

    @property
    def changes(self) -> list[float]:
        """int8 minus float in points, a seed each."""
        return [100 * (cell.int8_top1 - cell.float_top1) for cell in self.cells]

    @property
    def mean(self) -> float:
        return statistics.mean(self.changes)

    @property
    def holds(self) -> bool:
        floor = FLOORS[self.recipe]
        return floor is None or self.mean >= floor - 1e-9


class Experiment:
    """One network trained with one seed; what its recipes share is computed once, and only when a cell is missing."""

    def __init__(self, case: Case, seed: int, data: Path, work: Path) -> None:
        self.case, self.seed, self.data = case, seed, data
        architecture, self.preset = zoo.parse(case.reference)
        self.system: ZooSystem = zoo.trainable(architecture)
        self.settings = {"reference": case.reference, "split": SPLIT_SEED, "train": asdict(self._config())}
        self.stem = work / f"{case.data}-{case.network}-{seed}".lower()
        self._trained: tuple[nn.Module, Split] | None = None

    def cell(self, name: str) -> Cell:
        file = self.stem.with_name(f"{self.stem.name}-{name}.json")
        settings = json.loads(json.dumps(self.settings | {"recipe": self._recipe(name).to_dict()}))
        if file.is_file():
            stored = json.loads(file.read_text())
            if stored["settings"] == settings:
                return Cell(**stored["cell"])
        started = time.perf_counter()
        cell = self._measure(self._recipe(name))
        file.write_text(json.dumps({"settings": settings, "cell": asdict(cell)}, indent=1))
        told = f"float {cell.float_top1:.4f} int8 {cell.int8_top1:.4f}, artifact decides alike on {cell.same_decisions:.4%}"
        print(f"{file.stem}: {told} ({time.perf_counter() - started:.0f} s)", file=sys.stderr, flush=True)
        return cell

    def _config(self) -> TrainConfig:
        return replace(self.system.train, epochs=self.case.epochs, seed=self.seed)

    def _recipe(self, name: str) -> Recipe:
        recipe = replace(load_recipe(name), seed=self.seed)
        return replace(recipe, qat_epochs=self.case.qat_epochs) if recipe.qat_epochs else recipe

    def _measure(self, recipe: Recipe) -> Cell:
        module, split = self._network()
        graph = self._by_training(module, split, recipe) if recipe.qat_epochs else self._by_calibration(module, split, recipe)
        (border,) = graph.inputs
        feeds = {border.name: border.quantise(split.x_test)}
        expected = reference.run(graph, feeds)[graph.outputs[0].name]
        with tempfile.TemporaryDirectory() as folder:
            bundle = isthmus.compile(graph, targets=["cpu"], tune=False, output=Path(folder) / "bundle")
            with bundle.open_session("cpu") as session:
                actual = session.run_samples(feeds)[graph.outputs[0].name]
        alike = expected.argmax(axis=1) == actual.argmax(axis=1)
        floats = top1_accuracy(predict(module, split.x_test), split.y_test)
        return Cell(floats, top1_accuracy(expected, split.y_test), float(alike.mean()), float((expected == actual).mean()), len(expected))

    def _network(self) -> tuple[nn.Module, Split]:
        if self._trained is None:
            split = self.system.data(SPLIT_SEED, self.preset, self.data)
            module = self.system.network(self.preset, self.seed)
            weights = self.stem.with_suffix(".pt")
            if weights.is_file():
                stored = torch.load(weights, weights_only=True)
                if stored["settings"] != json.dumps(self.settings):
                    raise isthmus.IsthmusError(f"{weights}: belongs to other settings; give --work another folder")
                module.load_state_dict(stored["module"])
            else:
                fit(module, split, self._config())
                torch.save({"settings": json.dumps(self.settings), "module": module.state_dict()}, weights)
            self._trained = module.eval(), split
        return self._trained

    def _example(self) -> torch.Tensor:
        return torch.zeros(self.system.input_shape(self.system.configuration(self.preset)))

    def _by_calibration(self, module: nn.Module, split: Split, recipe: Recipe) -> QuantGraph:
        model = prepare_float(onnx_from_module(module, (self._example(),)), {})
        calibration = Dataset({INPUT: split.x_train}, split.y_train, "training part")
        return PostTraining(model, calibration, lambda text, share: None).graph(recipe)[0]

    def _by_training(self, module: nn.Module, split: Split, recipe: Recipe) -> QuantGraph:
        config = replace(self._config(), epochs=recipe.qat_epochs, learning_rate=recipe.qat_learning_rate)
        quantised = qat.quantise(module, self._example(), split.x_train, recipe, lambda inner: fit(inner, split, config, teacher=module))
        return graph_from_qdq(qat.to_qcdq(quantised, self._example(), [INPUT], [OUTPUT]), recipe)


def rows(data: Path, work: Path, seeds: int, cases: tuple[Case, ...] = CASES) -> list[Row]:
    """Every case under every recipe."""
    work.mkdir(parents=True, exist_ok=True)
    found = []
    for case in cases:
        experiments = [Experiment(case, seed, data, work) for seed in range(seeds)]
        cells = {(seed, name): experiment.cell(name) for seed, experiment in enumerate(experiments) for name in FLOORS}
        found += [Row(case, name, tuple(cells[seed, name] for seed in range(seeds))) for name in FLOORS]
    return found


def table(found: list[Row]) -> str:
    """Markdown; the spread is from the worst to the best seed."""
    lines = [
        "| data (test images) | network | recipe | float top-1, % | int8 top-1, % | int8 minus float, points | worst to best seed | floor | cpu artifact: equal"
        " decisions, values |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        floats, ints = (100 * statistics.mean(getattr(cell, name) for cell in row.cells) for name in ("float_top1", "int8_top1"))
        floor = FLOORS[row.recipe]
        promised = "none" if floor is None else f"{floor:+.1f}{'' if row.holds else ', MISSED'}"
        alike, equal = (100 * float(np.mean([getattr(cell, name) for cell in row.cells])) for name in ("same_decisions", "same_values"))
        lines.append(
            f"| {row.case.data} ({row.cells[0].samples:,}) | {row.case.network} | {TITLES[row.recipe]} | {floats:.2f} | {ints:.2f} | {row.mean:+.2f} |"
            f" {min(row.changes):+.2f} to {max(row.changes):+.2f} | {promised} | {alike:.2f} %, {equal:.2f} % |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds pneumoniamnist.npz and MNIST's files, or folders pneumoniamnist and mnist")
    parser.add_argument("--work", type=Path, default=Path("accuracy-work"), help="finished cells and trained weights")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", metavar="DATA", choices=sorted({case.data for case in CASES}), help="one data set's rows; several may run at once")
    given = parser.parse_args()
    cases = tuple(case for case in CASES if given.only in (None, case.data))
    try:
        found = rows(given.data, given.work, given.seeds, cases)
    except isthmus.IsthmusError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(table(found))
    missed = [row for row in found if not row.holds]
    print(f"\n{len(found)} rows, {given.seeds} seeds each; {len(missed)} below their floor")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
