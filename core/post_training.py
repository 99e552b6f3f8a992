# SPDX-License-Identifier: Apache-2.0
"""A float model into the int8 form by calibration data: equalise, calibrate, quantise, correct biases, as the recipe says."""

from __future__ import annotations

import glob
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import onnx

from isthmus import reference
from isthmus.dataset import Dataset
from isthmus.errors import IsthmusError
from isthmus.float_model import run_float
from isthmus.graph import QuantGraph
from isthmus.recipe import Recipe
from isthmus.source import Say

if TYPE_CHECKING:
    from torch import nn

    from isthmus.quantize.sensitivity import Sensitivity

# What calibration depends on; with these equal, two recipes share their ranges.
MEASURED = ("scheme", "observer", "percentile", "calibration_samples", "seed", "overrides", "equalise")


class PostTraining:
    """One prepared float model and its calibration data, under as many recipes as one likes: what recipes share is computed once."""

    def __init__(self, model: onnx.ModelProto, calibration: Dataset, say: Say) -> None:
        self.model = model
        self.calibration = calibration
        self.say = say
        self._equalised: tuple[onnx.ModelProto, str] | None = None
        self._ranges: dict[tuple[object, ...], object] = {}

    def graph(self, recipe: Recipe, fit: Callable[[nn.Module], object] | None = None) -> tuple[QuantGraph, list[str]]:
        """The verified form and sentences worth keeping. Raises `IsthmusError` where recipe, model and data do not go together.

        `fit` trains the calibrated form as a torch module in place, with its rounding (`isthmus.quantize.form_training`).
        """
        from isthmus.export.to_graph import graph_from_ranges
        from isthmus.quantize.bias_correction import bias_corrections
        from isthmus.quantize.ranges import Calibration

        model, notes = self._model(recipe)
        recipe = recipe.with_edges(self.layers()) if recipe.edge_weight_bits else recipe
        key = tuple(getattr(recipe, field) for field in MEASURED)
        if key not in self._ranges:
            from isthmus.quantize.onnx_ptq import calibrate

            self.say(f"calibrating on {min(len(self.calibration), recipe.calibration_samples)} samples ({recipe.observer})", None)
            self._ranges[key] = calibrate(model, self.calibration.samples, recipe)
        ranges = self._ranges[key]
        assert isinstance(ranges, Calibration)
        graph = graph_from_ranges(model, ranges, recipe)
        notes += ranges.warnings
        weights = None
        if recipe.rounding != "nearest":
            weights = self._weights(model, graph, recipe)
            graph = graph_from_ranges(model, ranges, recipe, None, weights)
            notes.append(f"rounding ({recipe.rounding}): the weights of {len(weights)} layers")
        if recipe.bias_correction:
            self.say("correcting biases", None)
            corrections = bias_corrections(model, graph, self.calibration.samples, recipe)
            graph = graph_from_ranges(model, ranges, recipe, corrections, weights)
            notes.append(f"bias correction: {len(corrections)} layers")
        if fit is not None:
            from isthmus.quantize.form_training import FormModule

            module = FormModule(graph_from_ranges(model, ranges, recipe), model, recipe)
            fit(module)
            trained = module.trained()
            graph = graph_from_ranges(model, ranges, recipe, trained.corrections, trained.weights)
            notes.append(f"trained in the form, with its rounding: {len(trained.weights)} layers")
        return graph, notes

    def _weights(self, model: onnx.ModelProto, graph: QuantGraph, recipe: Recipe) -> dict[str, np.ndarray]:
        try:
            from isthmus.quantize.rounding import learnt_weights
        except ModuleNotFoundError as error:
            raise IsthmusError(f"recipe {recipe.name}: rounding {recipe.rounding!r} needs {error.name}; pip install 'isthmus[train]', or use nearest") from None

        self.say(f"rounding weights ({recipe.rounding})", None)
        return learnt_weights(model, graph, self.calibration.samples, recipe)

    def layers(self) -> tuple[str, ...]:
        """The names of the layers with weights that int8 has, in order."""
        from isthmus.export.to_graph import layers_with_weights

        return layers_with_weights(self.model)

    def whole_batches(self, data: Dataset, most: int) -> Dataset:
        """The first samples of `data`, at most `most`, in whole batches of the model; one batch at least."""
        batch = int(self.model.graph.input[0].type.tensor_type.shape.dim[0].dim_value)
        return data.take(max(batch, min(most, len(data)) // batch * batch))

    def _model(self, recipe: Recipe) -> tuple[onnx.ModelProto, list[str]]:
        if not recipe.equalise:
            return self.model, []
        if self._equalised is None:
            from isthmus.export.check import check_equal
            from isthmus.quantize.equalise import equalise

            model, pairs = equalise(self.model)
            difference = check_equal(self.model, model)
            self._equalised = model, f"equalised {pairs} pairs of layers; the float model's outputs move by at most {difference:.1e} of their largest value"
        return self._equalised[0], [self._equalised[1]]


def outputs_of(graph: QuantGraph, samples: Dataset) -> dict[str, np.ndarray]:
    """The form's outputs on float samples, as real numbers, by output name.

    The integer reference where all layers are int8; with layers kept float, ONNX Runtime on the form itself, node by node, as onnx's reference
    evaluator would take minutes for a float convolution.
    """
    if graph.recipe.float_islands:
        import onnx_ir as ir

        return run_float(ir.serde.serialize_model(graph.model), samples.samples, optimise=False)
    raw = reference.run(graph, {spec.name: spec.quantise(samples.samples[spec.name]) for spec in graph.inputs})
    return {spec.name: (replace(spec, dtype="int8") if spec.scale is not None else spec).dequantise(raw[spec.name]) for spec in graph.outputs}


def layer_sensitivity(quantiser: PostTraining, evaluation: Dataset, recipe: Recipe, metric: str, say: Say, spared: bool = True) -> Sensitivity:
    """`recipe`'s own float islands stay float throughout; rounding is to the nearest and biases are not corrected: that would take longer than all the rest."""
    from isthmus.quantize.sensitivity import sensitivity

    base = replace(recipe, bias_correction=False, rounding="nearest", qat_epochs=0)
    layers = [name for name in quantiser.layers() if not base.keeps_float(name)]

    def outputs_with(kept_float: Collection[str]) -> dict[str, np.ndarray]:
        return outputs_of(quantiser.graph(with_islands(base, kept_float))[0], evaluation)

    exact = run_float(quantiser.model, evaluation.samples)
    return sensitivity(layers, outputs_with, exact, evaluation.labels, metric, lambda text, share: say(f"sensitivity: {text}", share), spared)


def with_islands(recipe: Recipe, layers: Collection[str]) -> Recipe:
    """The recipe with these layers, by their exact names, kept float."""
    return replace(recipe, float_islands=(*recipe.float_islands, *(glob.escape(name) for name in layers)))
