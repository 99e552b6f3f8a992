# SPDX-License-Identifier: Apache-2.0
"""A user's torch module trained further with the rounding in place (QAT), into the int8 form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from isthmus.dataset import Dataset
from isthmus.graph import QuantGraph
from isthmus.recipe import Recipe
from isthmus.source import Say

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def train_module(
    module: torch.nn.Module, example_inputs: Sequence[Tensor], names: tuple[Sequence[str], Sequence[str]], data: Dataset, recipe: Recipe, say: Say
) -> tuple[QuantGraph, list[str]]:
    """The form of `module`, calibrated and trained on `data` by the recipe; `names` are those of its inputs and outputs. `module` is left as it is.

    Raises `IsthmusError` where it cannot be traced or the recipe is not for QAT, `ProblemsError` on constructs that have no int8 form there.
    """
    import copy

    from isthmus.export.to_graph import graph_from_qdq
    from isthmus.quantize import qat
    from isthmus.quantize.fine_tune import FineTuning, fine_tune

    exact = copy.deepcopy(module).eval()
    inputs, outputs = names
    samples = [data.samples[name] for name in inputs]
    told: list[FineTuning] = []

    def fit(quantised: torch.nn.Module) -> None:
        told.append(fine_tune(quantised, exact, samples, data.labels, recipe, lambda text, share: say(f"quantisation-aware training: {text}", share)))

    quantised = qat.quantise(exact, example_inputs, samples, recipe, fit)
    graph = graph_from_qdq(qat.to_qcdq(quantised, example_inputs, inputs, outputs), recipe)
    return graph, [f"quantisation-aware training: {result}" for result in told]


def as_examples(example_inputs: object) -> list[Tensor]:
    """One tensor for each argument of forward()."""
    import torch

    parts = [example_inputs] if isinstance(example_inputs, torch.Tensor | np.ndarray) else example_inputs
    assert isinstance(parts, list | tuple)  # export took them
    return [part if isinstance(part, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(part)) for part in parts]
