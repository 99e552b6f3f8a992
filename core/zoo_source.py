# SPDX-License-Identifier: Apache-2.0
"""A zoo system as a `Source`: trained here, quantised with Brevitas where the recipe has QAT epochs, judged on scans it never saw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import onnx

from isthmus.dataset import Dataset
from isthmus.module_training import train_module
from isthmus.recipe import Recipe
from isthmus.source import Say, Source

if TYPE_CHECKING:
    from torch import Tensor, nn

    from isthmus.graph import QuantGraph
    from isthmus.train.data import Split
    from isthmus.train.loop import TrainResult
    from isthmus.train.zoo import Architecture, ZooSystem

INPUT, OUTPUT = "input", "output"  # the names export gives
SPLIT_SEED = 0


def zoo_source(reference: str, recipe: Recipe, say: Say, data_root: Path | None = None) -> Source:
    """Trains the system of "zoo:NAME[@PRESET]" from scratch with the recipe's seed, on the data set's files under `data_root` or on what comes along.

    Training and calibration use the training part, the best epoch is chosen on the validation part, accuracy is reported on the test part.
    """
    from isthmus.export.prepare import prepare_float
    from isthmus.train import zoo
    from isthmus.train.loop import fit

    architecture, preset = zoo.parse(reference)
    system = zoo.trainable(architecture)
    split = system.data(SPLIT_SEED, preset, data_root)
    module = system.network(preset, recipe.seed)
    trained = fit(module, split, system.training(recipe.seed, preset), _progress("training", say))
    notes = [
        f"{system.name}@{preset}: data {split.name}: {len(split.x_train)} training, {len(split.x_val)} validation and {len(split.x_test)} test samples,"
        f" split seed {SPLIT_SEED}, training seed {recipe.seed}",
        _told("float training", trained),
    ]
    graph = None
    if recipe.qat_epochs:
        graph, note = _qat(system, preset, module, split, recipe, say)
        notes.append(note)
    return Source(
        f"{system.name}@{preset}",
        float_model=prepare_float(_float_onnx(module, _example(system, preset)), {}),
        graph=graph,
        calibration=Dataset({INPUT: split.x_train}, split.y_train, f"{split.name}: training part"),
        selection=Dataset({INPUT: split.x_val}, split.y_val, f"{split.name}: validation part"),
        evaluation=Dataset({INPUT: split.x_test}, split.y_test, f"{split.name}: test part"),
        notes=tuple(notes),
        train=lambda data, chosen, tell: train_module(module, [_example(system, preset)], ([INPUT], [OUTPUT]), data, chosen, tell),
    )


def untrained_onnx(reference: str) -> onnx.ModelProto:
    """The float network of a zoo system with random weights and every layer as its module has it: enough for its cost."""
    from isthmus.export.module import onnx_from_module
    from isthmus.train import zoo

    system, preset = zoo.parse(reference)
    return onnx_from_module(system.module(preset), (_example(system, preset),), as_written=True)


def _qat(system: ZooSystem, preset: str, module: nn.Module, split: Split, recipe: Recipe, say: Say) -> tuple[QuantGraph, str]:
    from isthmus.export.to_graph import graph_from_qdq
    from isthmus.quantize import qat
    from isthmus.train.loop import fit

    config = replace(system.train, epochs=recipe.qat_epochs, learning_rate=recipe.qat_learning_rate, seed=recipe.seed)
    results: list[TrainResult] = []
    example = _example(system, preset)
    progress = _progress("quantisation-aware training", say)
    quantised = qat.quantise(module, example, split.x_train, recipe, lambda inner: results.append(fit(inner, split, config, progress, teacher=module)))
    return graph_from_qdq(qat.to_qcdq(quantised, example, [INPUT], [OUTPUT]), recipe), _told("quantisation-aware training", results[0])


def _told(stage: str, result: TrainResult) -> str:
    best = result.best
    return f"{stage}: {len(result.epochs) - 1} epochs in {result.seconds:.1f} s, best epoch {best.number} by validation accuracy {best.validation_accuracy:.4f}"


def _example(system: Architecture, preset: str) -> Tensor:
    import torch

    return torch.zeros(system.input_shape(system.configuration(preset)))


def _float_onnx(module: nn.Module, example: Tensor) -> onnx.ModelProto:
    from isthmus.export.module import onnx_from_module

    return onnx_from_module(module, (example,))


def _progress(stage: str, say: Say) -> Callable[[str, float], None]:
    def moved(text: str, share: float) -> None:
        say(f"{stage}: {text}", share)

    return moved
