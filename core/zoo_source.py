# SPDX-License-Identifier: Apache-2.0
"""A zoo system as a `Source`: trained here, quantised with Brevitas where the recipe has QAT epochs, judged on samples it never saw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx

from isthmus.dataset import Dataset
from isthmus.errors import IsthmusError, ProblemsError
from isthmus.module_training import train_module
from isthmus.post_training import PostTraining
from isthmus.recipe import Recipe
from isthmus.source import Say, Score, Source

if TYPE_CHECKING:
    from torch import Tensor, nn

    from isthmus.graph import QuantGraph
    from isthmus.train.data import Split
    from isthmus.train.loop import TrainResult
    from isthmus.train.task import Task
    from isthmus.train.zoo import Architecture, ZooSystem

INPUT = "input"  # the name export gives
SPLIT_SEED = 0


def zoo_source(reference: str, recipe: Recipe, say: Say, data_root: Path | None = None) -> Source:
    """Trains the system of "zoo:NAME[@PRESET]" from scratch with the recipe's seed, on the data set's files under `data_root` or on what comes along.

    Training and calibration use the training part, the best epoch is chosen on the validation part, the task's figure is reported on the test part.
    """
    from isthmus.train import zoo
    from isthmus.train.loop import fit

    architecture, preset = zoo.parse(reference)
    system = zoo.trainable(architecture)
    split = system.data(SPLIT_SEED, preset, data_root)
    module, progress = system.network(preset, recipe.seed), _progress("training", say)
    learned, task = system.taught(split, preset, recipe.seed, data_root, progress=progress)
    trained = fit(module, learned, system.training(recipe.seed, preset, synthetic=data_root is None), progress, task=task)
    notes = [f"{_data_note(system, preset, split)}, training seed {recipe.seed}", _told("float training", trained, task)]
    return _source(system, preset, module, split, notes, recipe, say)


def checkpoint_source(file: Path, recipe: Recipe, say: Say, data_root: Path | None = None) -> Source:
    """The system that `isthmus zoo train` trained into `file`, in its best state so far, with the data it was trained on.

    Raises `IsthmusError` where the file is no checkpoint of a zoo system as it is today, or the data are others: its test part may have been learnt.
    """
    from isthmus.train import zoo
    from isthmus.train.checkpoint import Owner, read_checkpoint

    owner, kept = read_checkpoint(file)
    architecture, preset = zoo.parse(owner.model)
    system = zoo.trainable(architecture)
    split = system.data(SPLIT_SEED, preset, data_root)
    module, task = system.network(preset), system.purpose(preset)
    now = Owner.of(owner.model, module, split, owner.settings)
    if now.code != owner.code:
        raise IsthmusError(f"{file}: is a checkpoint of {owner.model} written by other code: its layers are not those of today; train anew")
    # A network with teachers learnt their targets: of its data set name and shape are known.
    if (system.lesson is None and now.data != owner.data) or now.data.rpartition(",")[0] != owner.data.rpartition(",")[0]:
        raise IsthmusError(f"{file}: was trained on other data than {split.name}; give the same --data-root as to 'isthmus zoo train'")
    module.load_state_dict(kept.best)
    module.eval()
    trained = f"float training: {file.name} after {len(kept.epochs) - 1} epochs with {owner.settings}"
    notes = [_data_note(system, preset, split), f"{trained}, its best state by validation {task.metric}"]
    return _source(system, preset, module, split, notes, recipe, say)


def _data_note(system: ZooSystem, preset: str, split: Split) -> str:
    counts = f"{len(split.x_train)} training, {len(split.x_val)} validation and {len(split.x_test)} test samples"
    return f"{system.name}@{preset}: data {split.name}: {counts}, split seed {SPLIT_SEED}"


def _source(system: ZooSystem, preset: str, module: nn.Module, split: Split, notes: list[str], recipe: Recipe, say: Say) -> Source:
    """The trained module as a source, and its int8 graph too where the recipe trains with the rounding in place."""
    from isthmus.export.prepare import prepare_float

    task, example = system.purpose(preset), _example(system, preset)
    # A bundle keeps the first samples alone where there are many, and some sets have their classes one after the other.
    order = np.random.default_rng(SPLIT_SEED).permutation(len(split.x_test))
    x_test, y_test = split.x_test[order], split.y_test[order]
    model = prepare_float(_float_onnx(module, example, system.outputs), {})
    calibration = Dataset({INPUT: split.x_train}, _labels(task, split.y_train), f"{split.name}: training part")
    graph = None
    if recipe.qat_epochs:
        graph, told = _qat(system, preset, module, split, task, recipe, say, PostTraining(model, calibration, say))
        notes = [*notes, *told]
    return Source(
        f"{system.name}@{preset}",
        float_model=model,
        graph=graph,
        calibration=calibration,
        selection=Dataset({INPUT: split.x_val}, _labels(task, split.y_val), f"{split.name}: validation part"),
        evaluation=Dataset({INPUT: x_test}, _labels(task, y_test), f"{split.name}: test part"),
        score=None if task.labels is not None else _score(task, y_test),
        notes=tuple(notes),
        train=lambda data, chosen, tell: train_module(module, [example], ([INPUT], system.outputs), data, chosen, tell),
    )


def _labels(task: Task, targets: np.ndarray) -> np.ndarray | None:
    return None if task.labels is None else task.labels(targets)


def _score(task: Task, targets: np.ndarray) -> Score:
    def of(outputs: Sequence[np.ndarray]) -> float:
        return task.score(outputs[0] if len(outputs) == 1 else tuple(outputs), targets[: len(outputs[0])])

    return Score(task.metric, of)


def untrained_onnx(reference: str) -> onnx.ModelProto:
    """The float network of a zoo system with random weights and every layer as its module has it: enough for its cost."""
    from isthmus.export.module import onnx_from_module
    from isthmus.train import zoo

    system, preset = zoo.parse(reference)
    return onnx_from_module(system.module(preset), (_example(system, preset),), as_written=True)


def _qat(
    system: ZooSystem, preset: str, module: nn.Module, split: Split, task: Task, recipe: Recipe, say: Say, quantiser: PostTraining
) -> tuple[QuantGraph, list[str]]:
    """By Brevitas; a network with constructs that it has not (gates, products, transposed convolutions) in the calibrated form itself, and that is told."""
    from isthmus.export.to_graph import graph_from_qdq
    from isthmus.quantize import qat
    from isthmus.train.loop import TrainConfig, fit

    float_config = system.training(recipe.seed, preset)
    config = TrainConfig(recipe.qat_epochs, float_config.batch_size, recipe.qat_learning_rate, float_config.weight_decay, recipe.seed)
    results: list[TrainResult] = []
    example = _example(system, preset)
    progress = _progress("quantisation-aware training", say)

    def train(inner: nn.Module) -> None:
        results.append(fit(inner, split, config, progress, teacher=module, task=task))

    try:
        quantised = qat.quantise(module, example, split.x_train, recipe, train)
    except ProblemsError as refused:
        graph, notes = quantiser.graph(recipe, train)
        stage = f"quantisation-aware training in the form (Brevitas' road does not take {refused.problems[0].node}: {refused.problems[0].found})"
        return graph, [*notes, _told(stage, results[0], task)]
    return graph_from_qdq(qat.to_qcdq(quantised, example, [INPUT], system.outputs), recipe), [_told("quantisation-aware training", results[0], task)]


def _told(stage: str, result: TrainResult, task: Task) -> str:
    epochs = f"{stage}: {len(result.epochs) - 1} epochs in {result.seconds:.1f} s"
    return f"{epochs}, best epoch {result.best.number} by validation {task.metric} {result.best.validation_score:.4f}"


def _example(system: Architecture, preset: str) -> Tensor:
    import torch

    return torch.zeros(system.input_shape(system.configuration(preset)))


def _float_onnx(module: nn.Module, example: Tensor, outputs: Sequence[str]) -> onnx.ModelProto:
    from isthmus.export.module import onnx_from_module

    return onnx_from_module(module, (example,), outputs=outputs)


def _progress(stage: str, say: Say) -> Callable[[str, float], None]:
    def moved(text: str, share: float) -> None:
        say(f"{stage}: {text}", share)

    return moved
