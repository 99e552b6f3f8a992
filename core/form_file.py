# SPDX-License-Identifier: Apache-2.0
"""The two kinds of form a bundle's `model.onnx` may be, a network's and a tree model's, and the reference of each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from isthmus import reference
from isthmus.graph import QuantGraph
from isthmus.onnx_file import load_onnx
from isthmus.tree_form import TreeForm
from isthmus.tree_onnx import form_from_model, is_tree_form


def load_form(path: str | Path) -> QuantGraph | TreeForm:
    """Raises `IsthmusError` where the file is missing, not ONNX, or neither form."""
    model = load_onnx(path)
    return form_from_model(model) if is_tree_form(model) else QuantGraph.from_model(model)


def run_reference(form: QuantGraph | TreeForm, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Raw outputs for raw inputs (N, ...), by the form's own reference."""
    return form.run(feeds) if isinstance(form, TreeForm) else reference.run(form, feeds)
