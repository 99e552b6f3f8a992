# SPDX-License-Identifier: Apache-2.0
"""What distillation does for the student of zoo:pneumonia_kd: `python benchmarks/pneumonia_kd.py --data FOLDER [--work FOLDER] [--json FILE]`.

For each seed: the three teachers by snapshot ensembling, then the student alone, with KD (best teacher) and with EKD (mean of the three): the same first
weights, rate, number of epochs and order, so that the loss is the only difference. `fpga-s`, which sees 64x64, learns from the same teachers. Each network is
then quantised by the portable recipe, as it is and with its bias correction, both calibrated on training images; int8 is the compiled cpu artifact on the
whole test part, which decides nothing.

FOLDER holds pneumoniamnist/pneumoniamnist.npz, and chest_xray/ or cxr_pneumonia/ with {train,test}/{NORMAL,PNEUMONIA} (cxr224_subset.zip there is read
too). The X-rays of all folders are divided anew into three folds, a patient in one of them: seed s tests on fold s, a tenth of the rest validates.

Finished cells, weights and the teachers' epochs are kept in --work: stop it at any moment and start it again; a cell whose .json is removed is quantised
and judged anew from its weights. Prints Markdown tables of what is there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from archives import unpacked

import isthmus
from isthmus.dataset import Dataset
from isthmus.export.module import onnx_from_module
from isthmus.export.prepare import prepare_float
from isthmus.post_training import PostTraining
from isthmus.recipe import load_recipe
from isthmus.train.checkpoint import Checkpoint
from isthmus.train.data import Split, cxr, medmnist
from isthmus.train.ensemble import mean_probabilities, probabilities
from isthmus.train.loop import TrainConfig, fit
from isthmus.train.metrics import classification_metrics
from isthmus.train.snapshots import Budget
from isthmus.train.zoo.pneumonia_kd import LABELS, SYSTEM, TAUGHT, Config, logits, taught_split, train_teachers

SPLIT_SEED, FOLDS = 0, 3
CALIBRATION_SAMPLES = 128
METHODS = {"alone": 0, "KD": 1, "EKD": 3}  # teachers
RECIPES: Mapping[str, Mapping[str, bool]] = {"portable": {}, "portable, bias_correction": {"bias_correction": True}}  # what is changed in the portable recipe
COLLAPSED = 0.99  # of the decisions are one class


@dataclass(frozen=True)
class Case:
    """`data` and the presets of the students; `teacher_epochs` of the whole snapshot training, `epochs` and `learning_rate` of each student by preset.

    `train_images`: so many of the training part, both classes by their shares, drawn by the seed; None for all.
    """

    data: str
    teacher: str
    teacher_epochs: int
    peak: float
    epochs: Mapping[str, int]
    learning_rate: Mapping[str, float]
    batch_size: int = 32
    train_images: int | None = None


CASES = (
    Case("PneumoniaMNIST", "teacher-28", 12, 0.1, {"student-28": 5}, {"student-28": 1e-3}),
    Case("chest X-rays", "teacher", 10, 0.03, {"student": 15, "fpga-s": 15}, {"student": 1e-3, "fpga-s": 1e-2}, batch_size=8, train_images=360),
)


@dataclass(frozen=True)
class Cell:
    """One network on the test part. `one_class`: share of the decisions that are the more frequent class; `int8_accuracy` by recipe."""

    accuracy: float
    balanced_accuracy: float
    weighted_f1: float
    auc: float
    one_class: float
    int8_accuracy: Mapping[str, float]
    samples: int
    cpu_seconds: float


class Experiment:
    """One data set with one seed; images are read and teachers trained when a cell that needs them is missing."""

    def __init__(self, case: Case, seed: int, data: Path, work: Path) -> None:
        self.case, self.seed, self.data = case, seed, data
        self.folder = work / f"{case.data}-{seed}".lower().replace(" ", "-")
        self.budget = Budget(epochs=case.teacher_epochs, batch_size=case.batch_size, peak=case.peak)
        self._teachers_name = f"teachers-{_digest([case.teacher, case.train_images, asdict(self.budget)])}"
        self._splits: dict[int, Split] = {}

    def cell(self, network: str, method: str) -> Cell:
        """`network` is a student's preset, or "teachers" with `method` "best" or "mean of three"."""
        if (found := self.finished(network, method)) is not None:
            return found
        started = time.process_time()
        cell = self._teachers_cell(method) if network == "teachers" else self._student_cell(network, method)
        cell = replace(cell, cpu_seconds=time.process_time() - started)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file(network, method).write_text(json.dumps({"settings": self._settings(network, method), "cell": asdict(cell)}, indent=1))
        print(f"{self.case.data}, seed {self.seed}, {network} {method}: {cell}", file=sys.stderr, flush=True)
        return cell

    def finished(self, network: str, method: str) -> Cell | None:
        """The kept cell, None where there is none of these settings."""
        file = self._file(network, method)
        if file.is_file() and (stored := json.loads(file.read_text()))["settings"] == self._settings(network, method):
            return Cell(**stored["cell"])
        return None

    def _file(self, network: str, method: str) -> Path:
        return self.folder / f"{network}-{method}.json".lower().replace(" ", "-")

    def _settings(self, network: str, method: str) -> object:
        return json.loads(json.dumps(asdict(self.case) | {"network": network, "method": method, "budget": asdict(self.budget)}))

    def _split(self, preset: str) -> Split:
        size = SYSTEM.configuration(preset).image_size
        if size not in self._splits:
            if self.case.data == "PneumoniaMNIST":
                self._splits[size] = medmnist.load("pneumoniamnist", self.data)
            else:
                self._splits[size] = self._fewer(cxr.load_fold(self.data, self.seed % FOLDS, FOLDS, size, SPLIT_SEED))
        return self._splits[size]

    def _fewer(self, split: Split) -> Split:
        from sklearn.model_selection import train_test_split

        if self.case.train_images is None:
            return split
        rows = np.arange(len(split.x_train))
        kept, _ = train_test_split(rows, train_size=self.case.train_images, stratify=split.y_train, random_state=self.seed)
        return replace(split, x_train=split.x_train[kept], y_train=split.y_train[kept])

    def _taught(self) -> dict[str, np.ndarray]:
        """Logits of the three teachers, the best first, on each part: (3, N, 2)."""
        kept = self.folder / f"{self._teachers_name}.npz"
        if kept.is_file():
            with np.load(kept) as stored:
                return dict(stored)
        split, config = self._split(self.case.teacher), SYSTEM.configuration(self.case.teacher)
        assert isinstance(config, Config)
        phases, started = self.folder / self._teachers_name, time.process_time()
        teachers = train_teachers(config, split, self.budget, self.seed, _say, phases, self.case.teacher)
        found = {part: np.stack([logits(teacher, getattr(split, f"x_{part}")) for teacher in teachers]) for part in ("train", "val", "test")}
        np.savez(kept, **found)  # type: ignore[arg-type]  # numpy's stub confuses **arrays with allow_pickle
        for checkpoint in phases.glob("phase-*.pt"):
            checkpoint.unlink()
        _say(f"teachers of {self.case.data}, seed {self.seed}: {time.process_time() - started:.0f} CPU s", 1.0)
        return found

    def _teachers_cell(self, method: str) -> Cell:
        found = self._taught()["test"]
        members = [probabilities(scores) for scores in (found[:1] if method == "best" else found)]
        return _judged(mean_probabilities(members), self._split(self.case.teacher).y_test, {})

    def _student_cell(self, preset: str, method: str) -> Cell:
        split, task = self._split(preset), LABELS
        learned = split
        if METHODS[method]:
            taught = self._taught()
            learned, task = taught_split(split, *(list(taught[part][: METHODS[method]]) for part in ("train", "val"))), TAUGHT
        module = SYSTEM.network(preset, self.seed)
        name = f"{preset}-{method}-{_digest(self._settings(preset, method))}".lower()
        weights = self.folder / f"{name}.weights"
        if weights.is_file():
            module.load_state_dict(torch.load(weights, weights_only=True))
        else:
            config = TrainConfig(self.case.epochs[preset], self.case.batch_size, self.case.learning_rate[preset], weight_decay=0.0, seed=self.seed)
            checkpoint = Checkpoint(self.folder / f"{name}.pt", f"{preset} {method}")
            fit(module, learned, config, _say, checkpoint=checkpoint, task=task)
            torch.save(module.state_dict(), weights)
            checkpoint.file.unlink()
        return _judged(probabilities(logits(module, split.x_test)), split.y_test, self._int8_accuracy(preset, module, split))

    def _int8_accuracy(self, preset: str, module: torch.nn.Module, split: Split) -> dict[str, float]:
        example = torch.zeros(SYSTEM.input_shape(SYSTEM.configuration(preset)))
        model = prepare_float(onnx_from_module(module, (example,)), {})
        calibration = Dataset({model.graph.input[0].name: split.x_train}, split.y_train, "training part")
        quantiser, found = PostTraining(model, calibration, _say), {}
        for name, changed in RECIPES.items():
            graph = quantiser.graph(replace(load_recipe("portable"), name=name, seed=self.seed, calibration_samples=CALIBRATION_SAMPLES, **changed))[0]
            with tempfile.TemporaryDirectory() as folder:
                bundle = isthmus.compile(graph, targets=["cpu"], tune=False, output=Path(folder) / "bundle")
                with bundle.open_session("cpu") as session:
                    (border,) = graph.inputs
                    scores = session.run_samples({border.name: border.quantise(split.x_test)})[graph.outputs[0].name]
            found[name] = float((scores.argmax(axis=1) == split.y_test).mean())
        return found


def _digest(settings: object) -> str:
    """What a file of other settings is told apart by."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def _judged(found: np.ndarray, labels: np.ndarray, int8_accuracy: Mapping[str, float]) -> Cell:
    metrics = classification_metrics(found, labels)
    one_class = float(np.bincount(found.argmax(axis=1), minlength=2).max() / len(labels))
    figures = (metrics["weighted_sensitivity"], metrics["balanced_accuracy"], metrics["weighted_f1"], metrics["auc"])
    return Cell(*figures, one_class, int8_accuracy, len(labels), 0.0)


_told: list[str] = [""]


def _say(text: str, share: float) -> None:
    """A line an epoch: what was said last is not said again."""
    if text != _told[-1]:
        _told.append(text)
        print(f"  {time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def networks(case: Case) -> list[tuple[str, str]]:
    """Every cell of a case, the first preset's first."""
    first, *others = case.epochs
    teachers = [("teachers", method) for method in ("best", "mean of three")]
    return [*((first, method) for method in METHODS), *teachers, *((preset, method) for preset in others for method in METHODS)]


def table(case: Case, cells: Mapping[tuple[str, str], list[Cell]]) -> str:
    """Markdown: mean over the seeds, and the lowest and highest."""
    lines = [
        f"| network | learns from | seeds | accuracy, % | AUC | balanced accuracy, % | {' | '.join(f'int8 minus float, points: {name}' for name in RECIPES)} |"
        " collapsed |",
        "|---" * (7 + len(RECIPES)) + "|",
    ]
    for (network, method), found in cells.items():
        if not found:
            continue
        changes = [[100 * (cell.int8_accuracy[name] - cell.accuracy) for cell in found if name in cell.int8_accuracy] for name in RECIPES]
        collapsed = sum(cell.one_class > COLLAPSED for cell in found)
        lines.append(
            f"| {network} | {method} | {len(found)} | {_spread([100 * cell.accuracy for cell in found], 1)} | {_spread([cell.auc for cell in found], 3)} |"
            f" {_spread([100 * cell.balanced_accuracy for cell in found], 1)} | {' | '.join(_of(len(found), values) for values in changes)} | {collapsed} |"
        )
    images = "all training images" if case.train_images is None else f"{case.train_images} training images"
    teachers = f"{case.teacher} {case.teacher_epochs} epochs of snapshot ensembling from {case.peak:g}"
    return f"{case.data}, {images}, batches of {case.batch_size}: {teachers}; {_students(case)}\n\n" + "\n".join(lines)


def _students(case: Case) -> str:
    return ", ".join(f"{preset} {epochs} epochs at {case.learning_rate[preset]:g}" for preset, epochs in case.epochs.items())


def _of(seeds: int, changes: list[float]) -> str:
    """With the number of seeds where it is not that of the row."""
    return _spread(changes, 2) + (f", {len(changes)} of {seeds} seeds" if 0 < len(changes) < seeds else "")


def _spread(values: list[float], digits: int) -> str:
    if not values:
        return ""
    return f"{statistics.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def _folder(data: Path, work: Path) -> Path:
    """Where the X-rays' folders are: unpacked into `work` where there is an archive alone."""
    archive = data / "cxr_pneumonia" / "cxr224_subset.zip"
    return unpacked(archive, work / "images") if archive.is_file() else data


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("pneumonia-kd-work"), help="finished cells, teachers, checkpoints")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", choices=[case.data for case in CASES])
    parser.add_argument("--finished", action="store_true", help="print the cells that --work has and compute none")
    parser.add_argument("--json", type=Path, help="file for every cell")
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.work.mkdir(parents=True, exist_ok=True)
    cases = [case for case in CASES if given.only in (None, case.data)]
    found: dict[str, dict[tuple[str, str], list[Cell]]] = {case.data: {name: [] for name in networks(case)} for case in cases}
    failed = 0
    try:
        for case in cases:
            data = given.data if case.data == "PneumoniaMNIST" else _folder(given.data, given.work)
            for seed in range(given.seeds):
                experiment = Experiment(case, seed, data, given.work)
                for name in networks(case):
                    cell = experiment.finished(*name) if given.finished else experiment.cell(*name)
                    found[case.data][name] += [] if cell is None else [cell]
    except isthmus.IsthmusError as error:
        print(f"error: {error}", file=sys.stderr)
        failed = error.exit_code  # what was finished is still printed
    for case in cases:
        print(table(case, found[case.data]), end="\n\n")
    if given.json:
        cells = [
            {"data": data, "network": name[0], "method": name[1], "seed": seed} | asdict(cell)
            for data, by_name in found.items()
            for name, row in by_name.items()
            for seed, cell in enumerate(row)
        ]
        given.json.write_text(json.dumps(cells, indent=1))
    return failed


if __name__ == "__main__":
    sys.exit(main())
