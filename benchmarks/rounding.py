# SPDX-License-Identifier: Apache-2.0
"""How weights are rounded, at 8 and 4 bits: nearest, with corrections, GPTQ, learned. The table of docs/quantisation.md.

python benchmarks/rounding.py [--data ../shared/data] [--networks digits,plain,mobile] [--epochs 4]

The float networks are trained here from seed 0: the demo's on scikit-learn's digits, two on PneumoniaMNIST (left out where its file is not there). Portable
scheme, ranges by least squared error, first and last layer always 8 bits. SQNR: signal over int8's error at the output, on the test part.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from isthmus.compare import top1_accuracy
from isthmus.console import grid
from isthmus.dataset import Dataset
from isthmus.export.module import onnx_from_module
from isthmus.export.prepare import prepare_float
from isthmus.float_model import run_float
from isthmus.post_training import PostTraining, outputs_of
from isthmus.quantize.sensitivity import decisions, sqnr_db
from isthmus.recipe import Recipe
from isthmus.train import zoo
from isthmus.train.data import Split
from isthmus.train.loop import TrainConfig, fit

WAYS = {
    "nearest": {},
    "biases corrected": {"bias_correction": True},
    "equalised, biases corrected": {"equalise": True, "bias_correction": True},
    "GPTQ": {"rounding": "gptq"},
    "GPTQ, biases corrected": {"rounding": "gptq", "bias_correction": True},
    "learned, biases corrected": {"rounding": "learned", "bias_correction": True},
}


def block(channels: int, filters: int, kernel: int = 3, stride: int = 1, groups: int = 1, act: bool = True) -> nn.Sequential:
    conv = nn.Conv2d(channels, filters, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(filters), *([nn.ReLU6()] if act else []))


class Inverted(nn.Module):
    """MobileNetV2's block."""

    def __init__(self, channels: int, filters: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = channels * expansion
        self.layers = nn.Sequential(block(channels, inner, 1), block(inner, inner, 3, stride, inner), block(inner, filters, 1, act=False))
        self.residual = stride == 1 and channels == filters

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


def mobile() -> nn.Module:
    body = [Inverted(16, 16, 1, 2), Inverted(16, 24, 2, 3), Inverted(24, 24, 1, 3), Inverted(24, 32, 2, 3), Inverted(32, 32, 1, 3)]
    return nn.Sequential(block(1, 16, 3, 2), *body, block(32, 64, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 2))


def plain() -> nn.Module:
    layers: list[nn.Module] = []
    for channels, filters, pool in ((1, 16, True), (16, 16, False), (16, 32, True), (32, 32, False)):
        layers += [nn.Conv2d(channels, filters, 3, padding=1), nn.BatchNorm2d(filters), nn.ReLU(), *([nn.MaxPool2d(2)] if pool else [])]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 49, 32), nn.ReLU(), nn.Linear(32, 2))


def pneumonia(folder: Path) -> Split:
    held = np.load(folder / "pneumoniamnist" / "pneumoniamnist.npz")
    images = {part: (held[f"{part}_images"][:, None] / 255).astype(np.float32) for part in ("train", "val", "test")}
    labels = {part: held[f"{part}_labels"].reshape(-1).astype(np.int64) for part in images}
    parts = [array for part in images for array in (images[part], labels[part])]
    return Split("pneumoniamnist", *parts, classes=("normal", "pneumonia"), seed=0)


def trained(name: str, folder: Path, epochs: int) -> tuple[nn.Module, Split]:
    torch.manual_seed(0)
    if name == "digits":
        system = zoo.trainable(zoo.load("digits"))
        module, split, config = system.module(), system.data(0), system.train
    else:
        module, split, config = {"plain": plain, "mobile": mobile}[name](), pneumonia(folder), TrainConfig(epochs=epochs, learning_rate=4e-3)
    fit(module, split, config)
    return module, split


def rows(name: str, module: nn.Module, split: Split, bits: int) -> list[list[str]]:
    model = prepare_float(onnx_from_module(module, torch.from_numpy(split.x_test[:1])))
    quantiser = PostTraining(model, Dataset({"input": split.x_train}, None, "training part"), lambda text, share: None)
    test = Dataset({"input": split.x_test}, split.y_test, "test part")
    exact = run_float(model, test.samples)
    scores = next(iter(exact.values()))
    made = []
    for way, fields in WAYS.items():
        recipe = replace(Recipe(observer="mse", weight_bits=bits, edge_weight_bits=8), **fields)
        started = time.perf_counter()
        graph, _ = quantiser.graph(recipe)
        seconds = time.perf_counter() - started
        outputs = outputs_of(graph, test)
        found = next(iter(outputs.values()))
        figures = [f"{top1_accuracy(scores, split.y_test):.4f}", f"{top1_accuracy(found, split.y_test):.4f}", f"{top1_accuracy(found, decisions(scores)):.4f}"]
        made.append([name, str(bits), way, *figures, f"{sqnr_db(exact, outputs):.1f} dB", f"{seconds:.1f} s"])
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description="Nearest, corrected, GPTQ and learned rounding side by side.")
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--networks", default="digits,plain,mobile")
    parser.add_argument("--epochs", type=int, default=4)
    given = parser.parse_args()
    torch.set_num_threads(1)
    header = ["network", "bits", "weights", "float top-1", "int8 top-1", "same decision", "SQNR", "time"]
    table: list[list[str]] = []
    for name in given.networks.split(","):
        if name != "digits" and not (given.data / "pneumoniamnist").is_dir():
            print(f"{name}: left out, {given.data} holds no pneumoniamnist")
            continue
        module, split = trained(name, given.data, given.epochs)
        for bits in (8, 4):
            table += rows(name, module, split, bits)
    print(grid(header, table))


if __name__ == "__main__":
    main()
