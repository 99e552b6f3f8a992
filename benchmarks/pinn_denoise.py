# SPDX-License-Identifier: Apache-2.0
"""The four denoising backbones under the four PDE priors on real grey images, float and int8: `python benchmarks/pinn_denoise.py --data FOLDER`.

FOLDER holds Set12 and BSD68 (images in folders). Set12 is for tests alone; of BSD68 a tenth validates and a tenth tests, drawn by the split's seed.
Each `zoo:pinn_denoise@BACKBONE-small-PRIOR` trains from scratch on patches of 64x64 of the training images, Gaussian noise of sigma 25 anew in every batch,
the epoch chosen on the validation images; `BUDGETS` says for how long. PSNR and SSIM are means over patches of the test images (four an image), which
decide nothing, their noise drawn once. int8 is the integer reference on the same patches, by calibration; where the portable recipe loses too much that
way, its form is trained for one epoch towards the float network (`QAT`).

Prints a Markdown table; exit code 1 where a promise is missed (`GAIN_DB`, `INT8_DB`). `--whole NAME` prints a network's PSNR on each whole test image
instead, in tiles, and how far tiles differ from the image in one piece. Checkpoints and finished figures are kept in --work: a run that was stopped goes
on from the last epoch. Give a fresh folder after a change to training or quantiser. One seed each; about half an hour on a core of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

import isthmus
from isthmus.dataset import Dataset
from isthmus.export.module import onnx_from_module
from isthmus.export.prepare import prepare_float
from isthmus.graph import QuantGraph
from isthmus.post_training import PostTraining, outputs_of
from isthmus.recipe import Recipe, load_recipe
from isthmus.train.checkpoint import Checkpoint
from isthmus.train.data import Split
from isthmus.train.data.denoise import divide, read_images
from isthmus.train.image_metrics import psnr, ssim
from isthmus.train.loop import fit, predict
from isthmus.train.pde_priors import PRIORS
from isthmus.train.processing.denoise import network_input, padded, tiled
from isthmus.train.zoo.pinn_denoise import SMALL, SYSTEM, UNetConfig, margin, size_multiple

INPUT = "input"  # the name export gives
SPLIT_SEED, SEED = 0, 0
HELD_OUT = (28, 76)  # validation and test patches: four of each held-out image


@dataclass(frozen=True)
class Budget:
    """`patches` of the training images, seen so many `epochs`."""

    patches: int
    epochs: int
    batch_size: int


# A step of a nested network takes four times as long.
BUDGETS = {"unet": Budget(1024, 3, 4), "resunet": Budget(1024, 3, 4), "u2net": Budget(768, 2, 4), "resu2net": Budget(768, 2, 4)}
PROMISED = ("unet-heat", "unet-zg")
PORTABLE, QAT = "portable", "portable, QAT"
RECIPES = ("asymmetric", PORTABLE)  # by calibration alone
CALIBRATION = 64  # patches
QAT_RATE = 0.1  # of the float training's
GAIN_DB, INT8_DB = 6.0, -0.3  # over the noisy input, for PROMISED (the others: above 0); int8 minus float
TILE = 256  # of --whole


@dataclass(frozen=True)
class Quality:
    psnr: float
    ssim: float


@dataclass(frozen=True)
class Row:
    """One network on the test patches; `int8` by recipe."""

    name: str
    parameters: int
    budget: Budget
    noisy: Quality
    exact: Quality
    int8: dict[str, Quality]

    @property
    def gain(self) -> float:
        return self.exact.psnr - self.noisy.psnr

    def change(self, recipe: str) -> float:
        return self.int8[recipe].psnr - self.exact.psnr


class Experiment:
    """One backbone under one prior; what is finished is read from `work`."""

    def __init__(self, backbone: str, prior: str, data: Path, work: Path) -> None:
        self.name, self.data, self.work = f"{backbone}-{prior}", data, work
        self.preset = f"{backbone}-small-{prior}"
        self.budget = BUDGETS[backbone]
        self.config = replace(SYSTEM.configuration(self.preset), patches=(self.budget.patches, *HELD_OUT))
        self.task = SYSTEM.task(self.config)
        self.training = replace(SYSTEM.training(SEED, self.preset), epochs=self.budget.epochs, batch_size=self.budget.batch_size)
        self.module = SYSTEM.network(self.preset, SEED)
        self.settings = json.loads(json.dumps({"config": asdict(self.config), "training": asdict(self.training), "split": SPLIT_SEED}))

    def row(self, recipes: Sequence[Recipe]) -> Row:
        split = self.split()
        self.train(split)
        exact = quality(predict_image(self.module, split.x_test), split)
        int8 = {recipe.name: Quality(**self._kept(recipe.name, partial(self._int8, recipe, split))) for recipe in recipes}
        for recipe in recipes:
            if recipe.name == PORTABLE and int8[PORTABLE].psnr - exact.psnr < INT8_DB:
                int8[QAT] = Quality(**self._kept(QAT.replace(", ", "-"), partial(self._int8, recipe, split, self._towards_float(split))))
        parameters = sum(parameter.numel() for parameter in self.module.parameters())
        return Row(self.name, parameters, self.budget, quality(split.x_test, split), exact, int8)

    def split(self) -> Split:
        return SYSTEM.load_data(self.config, SPLIT_SEED, self.data)

    def train(self, split: Split) -> None:
        """Leaves the best state in `self.module`."""
        checkpoint = Checkpoint(self.work / f"{self.name}.pt", f"{SYSTEM.name}@{self.preset}")
        fit(self.module, split, self.training, told(self.name), checkpoint=checkpoint, task=self.task)

    def _kept(self, what: str, compute: Callable[[], dict[str, float]]) -> dict[str, float]:
        file = self.work / f"{self.name}-{what}.json"
        if file.is_file():
            stored = json.loads(file.read_text())
            if stored["settings"] != self.settings:
                raise isthmus.IsthmusError(f"{file}: belongs to other settings; give --work another folder")
            return stored["found"]
        found = compute()
        file.write_text(json.dumps({"settings": self.settings, "found": found}, indent=1))
        print(f"{self.name}, {what}: {found}", file=sys.stderr, flush=True)
        return found

    def graph(self, recipe: Recipe, split: Split, train: Callable[[nn.Module], None] | None = None) -> QuantGraph:
        example = torch.zeros(SYSTEM.input_shape(self.config))
        model = prepare_float(onnx_from_module(self.module, (example,)), {})
        return PostTraining(model, Dataset({INPUT: split.x_train}, None, "training patches"), lambda text, share: None).graph(recipe, train)[0]

    def _int8(self, recipe: Recipe, split: Split, train: Callable[[nn.Module], None] | None = None) -> dict[str, float]:
        images = outputs_of(self.graph(recipe, split, train), Dataset({INPUT: split.x_test}, None, "test patches"))
        return asdict(quality(next(iter(images.values())), split))

    def _towards_float(self, split: Split) -> Callable[[nn.Module], None]:
        config = replace(self.training, epochs=1, learning_rate=self.training.learning_rate * QAT_RATE)

        def train(form: nn.Module) -> None:
            fit(form, split, config, told(f"{self.name}, QAT"), teacher=self.module.eval(), task=self.task)

        return train


def recipe_of(name: str) -> Recipe:
    return replace(load_recipe(name), name=name, calibration_samples=CALIBRATION)


def predict_image(module: nn.Module, samples: np.ndarray) -> np.ndarray:
    found = predict(module, samples)
    assert isinstance(found, np.ndarray)
    return found


def quality(images: np.ndarray, split: Split) -> Quality:
    """Of the test patches, clipped to 0..1 as the host does."""
    clean = split.y_test[:, :1]
    clipped = np.clip(images, 0, 1).astype(np.float32)
    return Quality(psnr(clipped, clean), ssim(clipped, clean))


def told(name: str) -> Callable[[str, float], None]:
    last = time.monotonic()

    def progress(text: str, share: float) -> None:
        nonlocal last
        if time.monotonic() - last > 30:
            last = time.monotonic()
            print(f"{name}: {text} ({share:.0%})", file=sys.stderr, flush=True)

    return progress


# ---- whole images
def whole(experiment: Experiment) -> str:
    """A Markdown table: PSNR of each whole test image in tiles, and the largest difference from the image in one piece."""
    config = experiment.config
    if not isinstance(config, UNetConfig):
        raise isthmus.IsthmusError(f"{experiment.name}: --whole is for UNet and ResUNet; what the nested networks see is wider than a tile")
    experiment.train(experiment.split())
    images = read_images(experiment.data)
    module, multiple = experiment.module.eval(), size_multiple(config)

    def run(batch: np.ndarray) -> np.ndarray:
        return predict_image(module, batch)

    lines = ["| image | size | noisy, dB | denoised, dB | SSIM | tiles minus one piece, largest |", "|---|---|---|---|---|---|"]
    gains = []
    for number, name in enumerate(divide(list(images), SPLIT_SEED)["test"]):
        clean = network_input(images[name])
        noisy = config.degradation.apply(clean, np.random.default_rng([SEED, number]))
        found = tiled(noisy, run, TILE, margin(config), multiple)
        one_piece = run(padded(noisy, multiple, TILE)[None, None])[0, 0, : clean.shape[0], : clean.shape[1]]
        before, after = (psnr(np.clip(each, 0, 1)[None, None], clean[None, None]) for each in (noisy, found))
        similar = ssim(np.clip(found, 0, 1)[None, None], clean[None, None])
        gains.append((before, after, similar))
        lines.append(f"| {name} | {clean.shape[1]}x{clean.shape[0]} | {before:.2f} | {after:.2f} | {similar:.3f} | {np.abs(found - one_piece).max():.1e} |")
    before, after, similar = np.mean(gains, axis=0)
    return "\n".join([*lines, f"| mean of {len(gains)} | | {before:.2f} | {after:.2f} | {similar:.3f} | |"])


# ---- the table
def missed(row: Row) -> list[str]:
    found = []
    if row.name in PROMISED and row.gain < GAIN_DB:
        found.append(f"{row.name}: {row.gain:+.2f} dB over the noisy input, promised {GAIN_DB:+.1f}")
    if row.gain <= 0:
        found.append(f"{row.name}: {row.gain:+.2f} dB: worse than the noisy input")
    final = {recipe for recipe in row.int8 if recipe != PORTABLE or QAT not in row.int8}
    lost = [recipe for recipe in row.int8 if recipe in final and row.change(recipe) < INT8_DB]
    return found + [f"{row.name}: int8 ({recipe}) {row.change(recipe):+.2f} dB from float, promised {INT8_DB:+.1f}" for recipe in lost]


def table(rows: Sequence[Row]) -> str:
    recipes = tuple(dict.fromkeys(recipe for row in rows for recipe in row.int8))
    head = [
        "network",
        "parameters",
        "patches x epochs, batch",
        "noisy, dB / SSIM",
        "float, dB / SSIM",
        "gain, dB",
        *(f"int8 {recipe}, dB" for recipe in recipes),
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        budget = f"{row.budget.patches} x {row.budget.epochs}, {row.budget.batch_size}"
        before, after = (f"{each.psnr:.2f} / {each.ssim:.3f}" for each in (row.noisy, row.exact))
        changes = [f"{row.change(recipe):+.2f}" if recipe in row.int8 else "" for recipe in recipes]
        lines.append("| " + " | ".join([row.name, f"{row.parameters:,}", budget, before, after, f"{row.gain:+.2f}", *changes]) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [f"{backbone}-{prior}" for backbone in SMALL for prior in PRIORS]
    parser.add_argument("--data", type=Path, required=True, help="folder with Set12 and BSD68, or with a folder denoise that has them")
    parser.add_argument("--work", type=Path, default=Path("pinn-denoise-work"), help="checkpoints and finished figures")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=names, default=names, help="BACKBONE-PRIOR; several runs may share --work")
    parser.add_argument("--recipes", nargs="*", choices=RECIPES, default=RECIPES, help="none: float alone")
    parser.add_argument("--whole", metavar="NAME", choices=names, help="whole test images of one network instead")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.work.mkdir(parents=True, exist_ok=True)
    try:
        if given.whole:
            print(whole(Experiment(*given.whole.split("-"), given.data, given.work)))
            return 0
        recipes = [recipe_of(name) for name in given.recipes]
        rows = []
        for name in given.only:
            rows.append(Experiment(*name.split("-"), given.data, given.work).row(recipes))
            print(f"{name}: {rows[-1].exact.psnr:.2f} dB, noisy {rows[-1].noisy.psnr:.2f} dB", file=sys.stderr, flush=True)
    except isthmus.IsthmusError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(table(rows))
    if given.json:
        given.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    faults = [fault for row in rows for fault in missed(row)]
    print("\n" + "\n".join(faults or [f"all {len(rows)} networks hold what is promised"]))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
