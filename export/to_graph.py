# SPDX-License-Identifier: Apache-2.0
"""The two roads into the int8 form: a float model with measured ranges, and a model that already carries quantisers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from isthmus.errors import IsthmusError, Problem, ProblemsError
from isthmus.export.accept import accept
from isthmus.export.draft import Draft, Step, is_weighted
from isthmus.export.emit import emit
from isthmus.export.placement import Placement, place
from isthmus.export.prepare import prepare_graph
from isthmus.export.qdq import draft_from_unquantised
from isthmus.export.rewrites import QDQ_REWRITES
from isthmus.export.rewrites._edit import constant, input_at
from isthmus.export.scales import is_power_of_two, quantise_weight, step_from_range
from isthmus.export.settle import settle
from isthmus.export.shapes import Shapes
from isthmus.export.unquantise import type_problems, unquantise
from isthmus.form import RECIPE_KEY
from isthmus.graph import QuantGraph
from isthmus.ops import OPS
from isthmus.recipe import Recipe

Ranges = Mapping[str, tuple[float, float]]


def tensors_to_calibrate(model: onnx.ModelProto, recipe: Recipe | None = None) -> tuple[str, ...]:
    """The tensors of a prepared float model whose ranges `graph_from_ranges` needs, in the model's order."""
    return place(_settled(model), recipe).sources


def _settled(model: onnx.ModelProto) -> ir.Model:
    graph = ir.serde.deserialize_model(model)
    settle(graph)
    return graph


def layers_with_weights(model: onnx.ModelProto) -> tuple[str, ...]:
    """The names of the layers that are int8 unless a recipe keeps them float, in the model's order."""
    graph = _settled(model)
    int8 = place(graph).int8_nodes
    return tuple(str(node.name) for node in graph.graph if node.name in int8 and is_weighted(node))


def graph_from_ranges(
    model: onnx.ModelProto,
    ranges: Ranges,
    recipe: Recipe,
    corrections: Mapping[str, np.ndarray] | None = None,
    weights: Mapping[str, np.ndarray] | None = None,
) -> QuantGraph:
    """A prepared float model (`prepare_float`) in int8 form, quantised by `recipe` with the measured range of each tensor.

    `corrections` are added to biases, by layer name, one number an output channel; they change no other integer and no scale. `weights`
    are int8 weights by layer name that take the place of the nearest integers, at the same scale.
    Raises `IsthmusError` where a range is missing or not finite, `ProblemsError` where no layer can be int8 or a rule of the form breaks.
    """
    graph = _settled(model)
    placement = place(graph, recipe)
    draft = Draft(graph, set(placement.int8_nodes), dict(placement.fused), _steps(placement, ranges, recipe))
    _quantise_weights(draft, recipe)
    for name, values in (weights or {}).items():
        draft.weights[name] = replace(draft.weights[name], values=values)
    for name, correction in (corrections or {}).items():
        draft.biases[name] = draft.biases.get(name, 0.0) + np.asarray(correction, np.float64)
    return emit(draft, recipe)


def graph_from_qdq(model: onnx.ModelProto, recipe: Recipe | None = None, shapes: Shapes | None = None) -> QuantGraph:
    """A model that carries QuantizeLinear/DequantizeLinear, of whatever writer, in int8 form; one that is in the form already comes back as it is.

    Every int8 value stays what it was (float biases are rounded to int32 steps of input x weight scale). Without a `recipe` the scheme is
    read off the scales. Raises `ProblemsError` naming node and rule where the graph has no such form.
    """
    if any(entry.key == RECIPE_KEY for entry in model.metadata_props):
        return QuantGraph.from_model(model)
    accept(model)
    problems = type_problems(model)
    if problems:
        raise ProblemsError("the quantised model cannot be brought into int8 form", problems)
    found = unquantise(prepare_graph(model, shapes, []))
    rounds = [*(rewrite() for rewrite in QDQ_REWRITES), common.RemoveUnusedNodesPass()]
    ir.passes.PassManager(rounds, steps=8, early_stop=True)(found.model)
    draft = draft_from_unquantised(found)
    return emit(draft, recipe or inferred_recipe(draft))


def inferred_recipe(draft: Draft) -> Recipe:
    """The recipe that a quantised model's scales and zero points follow."""
    scales = [step.scale for step in draft.steps.values()] + [float(scale) for weight in draft.weights.values() for scale in weight.scale]
    per_channel = any(weight.scale.size > 1 for weight in draft.weights.values())
    if any(step.zero_point for step in draft.steps.values()):
        scheme = "asymmetric"
    else:
        scheme = "power_of_two" if all(is_power_of_two(scale) for scale in scales) else "symmetric"
    return Recipe(name="imported", scheme=scheme, per_channel=per_channel)


def _steps(placement: Placement, ranges: Ranges, recipe: Recipe) -> dict[str, Step]:
    missing = [name for name in placement.sources if name not in ranges]
    if missing:
        share = f"{len(missing)} of {len(placement.sources)} are missing"
        raise IsthmusError(f"no range was measured for tensor {missing[0]!r} ({share}); calibrate the prepared model")
    joined: dict[str, tuple[float, float]] = {}
    for name, (low, high) in [*((name, ranges[name]) for name in placement.sources), *placement.constants.items()]:
        root = placement.groups[name]
        other = joined.get(root, (low, high))
        joined[root] = (min(low, other[0]), max(high, other[1]))
    steps: dict[str, Step] = {}
    for root, (low, high) in joined.items():
        try:
            steps[root] = step_from_range(low, high, recipe.scheme)
        except IsthmusError as error:
            raise IsthmusError(f"tensor {root!r}: {error}") from None
    return {value: steps[root] for value, root in placement.groups.items()}


def _quantise_weights(draft: Draft, recipe: Recipe) -> None:
    problems = []
    for node in draft.model.graph:
        name = str(node.name)
        if name not in draft.int8_nodes or not is_weighted(node):
            continue
        weight, bias = constant(node.inputs[1]), constant(input_at(node, 2))
        if weight is None or not np.isfinite(weight).all() or (bias is not None and not np.isfinite(bias).all()):
            problems.append(Problem(name, "finite-weights", "its weight or bias holds NaN or infinity", "train or export the model again"))
            continue
        input_scale = draft.steps[str(node.inputs[0].name)].scale if node.inputs[0] is not None else 1.0
        axis = OPS[node.op_type].weight_axis or 0
        largest = bias
        if bias is not None and bias.size != weight.shape[axis]:  # a ConvTranspose's groups share the scales of its second axis
            largest = np.abs(bias).reshape(-1, weight.shape[axis]).max(axis=0)
        draft.weights[name] = quantise_weight(weight, axis, recipe.for_layer(name), largest, input_scale)
        if bias is not None:
            draft.biases[name] = bias.astype(np.float64)
    if problems:
        raise ProblemsError("the model cannot be quantised", problems)
