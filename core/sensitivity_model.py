# SPDX-License-Identifier: Apache-2.0
"""`isthmus sensitivity`: a model file and data as a ranked list of layers, as text and as a page."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from isthmus.console import grid
from isthmus.dataset import Preprocess
from isthmus.errors import IsthmusError
from isthmus.pipeline import datasets
from isthmus.post_training import PostTraining, layer_sensitivity
from isthmus.recipe import Recipe, load_recipe
from isthmus.source import Say, load_source

if TYPE_CHECKING:
    from isthmus.quantize.sensitivity import Fidelity, Sensitivity


def sensitivity_of(
    model: Any,
    data: Any = None,
    *,
    recipe: Recipe | str = "portable",
    metric: str = "sqnr",
    samples: int = 64,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    preprocess: Preprocess | str | None = None,
    say: Say | None = None,
) -> Sensitivity:
    """What each layer with weights costs in int8, on the first `samples` of the data; calibration takes what the recipe says of all of it.

    `model` is anything `compile` takes that is not int8 yet. Raises `IsthmusError` on a bad input.
    """
    tell: Say = say or (lambda text, share: None)
    if samples < 1:
        raise IsthmusError(f"--samples {samples}: at least 1")
    recipe = load_recipe(recipe) if isinstance(recipe, str) else recipe
    preprocess = Preprocess.parse(preprocess) if isinstance(preprocess, str) else preprocess
    source = load_source(model, None, shapes or {}, replace(recipe, qat_epochs=0), tell)
    if source.float_model is None:
        raise IsthmusError(f"{source.name} is int8 already; the sensitivity of a layer needs the float model")
    calibration, evaluation = datasets(source, data, preprocess)
    if calibration is None or evaluation is None:
        raise IsthmusError(f"{source.name}: sensitivity needs samples: --data FILE.npz, FILE.npy or a folder of images")
    quantiser = PostTraining(source.float_model, calibration, tell)
    return layer_sensitivity(quantiser, quantiser.whole_batches(evaluation, samples), recipe, metric, tell)


def sensitivity_table(result: Sensitivity) -> str:
    """One line a layer, the most sensitive first; what the columns mean below."""
    top1 = "top-1" if result.labelled else "agreement"
    rows = []
    for row in result.layers:
        spared = ["", ""] if row.spared is None else [decibels(row.spared), f"{row.spared.top1:.4f}"]
        rows.append([row.name, decibels(row.alone), f"{row.alone.top1:.4f}", *spared])
    header = ["layer", "SQNR, it alone int8", f"{top1}, it alone int8", "SQNR, it alone float", f"{top1}, it alone float"]
    reference = f"float {result.float_top1:.4f}, all int8 {result.int8.top1:.4f}" if result.labelled else f"all int8 {result.int8.top1:.4f}"
    meaning = "top-1 against the labels" if result.labelled else "agreement: share of samples with the float model's decision (the data has no labels)"
    return "\n".join(
        [
            grid(header, rows),
            "",
            f"all layers int8: SQNR {decibels(result.int8)}; {meaning}: {reference}; {result.samples} samples",
        ]
    )


def decibels(fidelity: Fidelity) -> str:
    return f"{fidelity.sqnr_db:.1f} dB" if math.isfinite(fidelity.sqnr_db) else ("exact" if fidelity.sqnr_db > 0 else "no signal")
