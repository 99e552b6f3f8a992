# SPDX-License-Identifier: Apache-2.0
"""What `compile` is given, read into one form: a float ONNX model, an int8 one, or a network that is trained first."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from isthmus.dataset import Dataset
from isthmus.errors import IsthmusError
from isthmus.form import RECIPE_KEY
from isthmus.graph import QuantGraph
from isthmus.onnx_file import load_onnx
from isthmus.recipe import Recipe

if TYPE_CHECKING:
    import torch

Say = Callable[[str, float | None], None]
Train = Callable[[Dataset, Recipe, Say], tuple[QuantGraph, list[str]]]


@dataclass(frozen=True)
class Score:
    """What outputs are worth, where no class is decided; larger is better.

    `of(outputs)`: float32 arrays in the order of the model's outputs, for the first samples of the source's evaluation data.
    """

    metric: str
    of: Callable[[Sequence[np.ndarray]], float]


@dataclass(frozen=True)
class Source:
    """A model as brought: `graph` where it is int8 already, else `float_model`; a network that was trained here with its rounding brings both.

    `calibration`, `selection` (what a choice among recipes may look at) and `evaluation` (what accuracy is reported on) are data that came
    with the model (a zoo system's training, validation and test part), None for a user's file. `score` judges outputs for `evaluation` where
    its samples have other targets than labels. `train` trains a torch module further with the rounding in place, on samples and by a recipe
    with QAT epochs, into an int8 graph; None for a model that holds no module.
    """

    name: str
    float_model: onnx.ModelProto | None = None
    graph: QuantGraph | None = None
    calibration: Dataset | None = None
    selection: Dataset | None = None
    evaluation: Dataset | None = None
    score: Score | None = None
    notes: tuple[str, ...] = ()
    train: Train | None = None


@dataclass(frozen=True)
class Made:
    """What a factory gave, called once: a module with its example inputs, or the estimator of a tree model."""

    name: str
    model: Any
    example_inputs: Any


def made_by_factory(model: Any) -> Any:
    """`Made` where `model` names a factory, else `model` itself. Raises `IsthmusError` where there is no such factory."""
    text = str(model) if isinstance(model, str) else ""
    if ":" not in text or text.startswith("zoo:") or text.endswith((".pt2", ".onnx")) or Path(text).exists():
        return model
    return Made(text, *_from_factory(text))


def load_source(
    model: Any, example_inputs: Any, shapes: Mapping[str, tuple[int, ...]], recipe: Recipe, say: Say, data_root: str | Path | None = None
) -> Source:
    """Reads `model`: a path (.onnx, .pt2, .pt), "package.module:factory", "zoo:NAME[@PRESET]", a `torch.nn.Module`, an `onnx.ModelProto` or a `QuantGraph`.

    A zoo system is trained on its data set's own files under `data_root`, or without it on what comes along; a .pt is the checkpoint of such a training.

    Raises `IsthmusError` where it is none of these, or cannot be read.
    """
    if data_root is not None and not (isinstance(model, str | Path) and (str(model).startswith("zoo:") or str(model).endswith(".pt"))):
        raise IsthmusError("--data-root is the folder of a zoo system's data set; give your own model's samples with --data")
    model = made_by_factory(model)
    if isinstance(model, Made):
        return _from_module(model.model, example_inputs if example_inputs is not None else model.example_inputs, model.name, shapes, say)
    if isinstance(model, QuantGraph):
        return Source("graph", graph=model)
    if isinstance(model, onnx.ModelProto):
        return _from_onnx(model, model.graph.name or "model", shapes)
    if isinstance(model, str | Path):
        text = str(model)
        if text.startswith("zoo:") or (text.endswith(".pt") and Path(text).is_file()):
            return _from_zoo(text, recipe, say, None if data_root is None else Path(data_root))
        if text.endswith(".pt2"):
            from isthmus.export.module import onnx_from_pt2

            say("reading the exported program", None)
            return _from_onnx(onnx_from_pt2(text), Path(text).stem, shapes)
        if text.endswith(".onnx") or Path(text).exists():
            return _from_onnx(load_onnx(text), Path(text).stem, shapes)
        raise IsthmusError(f"{text}: no such file; give a .onnx, a .pt2, a zoo checkpoint .pt, package.module:factory or zoo:NAME")
    if hasattr(model, "forward") and hasattr(model, "state_dict"):
        return _from_module(model, example_inputs, type(model).__name__, shapes, say)
    raise IsthmusError(f"a {type(model).__name__} is no model: give a path, a torch.nn.Module, an onnx.ModelProto or a QuantGraph")


def _from_onnx(model: onnx.ModelProto, name: str, shapes: Mapping[str, tuple[int, ...]]) -> Source:
    if any(entry.key == RECIPE_KEY for entry in model.metadata_props):
        return Source(name, graph=QuantGraph.from_model(model))
    from isthmus.export.accept import has_quantisers

    if has_quantisers(model):
        from isthmus.export.to_graph import graph_from_qdq

        return Source(name, graph=graph_from_qdq(model, None, shapes))
    from isthmus.export.check import check_equal
    from isthmus.export.prepare import prepare_float

    notes: list[str] = []
    prepared = prepare_float(model, shapes, notes)
    check_equal(model, prepared)
    return Source(name, float_model=prepared, notes=tuple(notes))


def _from_module(module: torch.nn.Module, example_inputs: Any, name: str, shapes: Mapping[str, tuple[int, ...]], say: Say) -> Source:
    from isthmus.export.module import onnx_from_module

    if example_inputs is None:
        raise IsthmusError(
            f"{name}: a module needs example inputs (isthmus.compile(module, example_inputs=...)), or a factory that returns (module, example_inputs)"
        )
    say("exporting the module to ONNX", None)
    exported = onnx_from_module(module, example_inputs)
    inputs, outputs = ([value.name for value in values] for values in (exported.graph.input, exported.graph.output))

    def train(data: Dataset, recipe: Recipe, tell: Say) -> tuple[QuantGraph, list[str]]:
        from isthmus.module_training import as_examples, train_module

        return train_module(module, as_examples(example_inputs), (inputs, outputs), data, recipe, tell)

    return replace(_from_onnx(exported, name, shapes), train=train)


def _from_factory(text: str) -> tuple[Any, Any]:
    """`package.module:factory` is code the user names himself: it is imported (the current folder counts) and called without arguments."""
    place, _, attribute = text.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        factory = getattr(importlib.import_module(place), attribute)
    except ImportError as error:
        raise IsthmusError(f"{text}: {place} cannot be imported: {error}") from error
    except AttributeError:
        raise IsthmusError(f"{text}: module {place} has no {attribute!r}") from None
    if not callable(factory):
        raise IsthmusError(f"{text}: {attribute} is a {type(factory).__name__}, expected a function that returns the model or (module, example_inputs)")
    made = factory()
    if isinstance(made, tuple) and len(made) != 2:
        raise IsthmusError(f"{text}: returned {len(made)} values, expected the model alone or (module, example_inputs)")
    return made if isinstance(made, tuple) else (made, None)


def _from_zoo(text: str, recipe: Recipe, say: Say, data_root: Path | None) -> Source:
    from isthmus.zoo_source import checkpoint_source, zoo_source

    return zoo_source(text, recipe, say, data_root) if text.startswith("zoo:") else checkpoint_source(Path(text), recipe, say, data_root)
