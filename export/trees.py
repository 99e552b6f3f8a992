# SPDX-License-Identifier: Apache-2.0
"""Which reader reads a tree model: a file's ending, or an object's library. `None` for everything that is no tree model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx

from isthmus.errors import IsthmusError
from isthmus.export.trees_onnx import ensemble_from_onnx
from isthmus.export.trees_sklearn import ensemble_from_sklearn, load_skops
from isthmus.export.trees_xgboost import ensemble_from_xgboost
from isthmus.trees import TreeEnsemble, checked

MAX_FILE_BYTES = 2**30


def read_trees(model: Any) -> tuple[TreeEnsemble, list[str]]:
    """The ensemble and notes, from what `isthmus.source.is_tree_model` accepts. Raises `IsthmusError` where it cannot be read."""
    if isinstance(model, TreeEnsemble):
        return checked(model), []
    if isinstance(model, onnx.ModelProto):
        return ensemble_from_onnx(model, model.graph.name or "model")
    if isinstance(model, str | Path):
        return _from_file(Path(model))
    library = type(model).__module__.partition(".")[0]
    if library == "xgboost":
        booster = model.get_booster() if hasattr(model, "get_booster") else model
        return ensemble_from_xgboost(bytes(booster.save_raw("json")), type(model).__name__)
    return ensemble_from_sklearn(model, type(model).__name__)


def _from_file(path: Path) -> tuple[TreeEnsemble, list[str]]:
    if not path.is_file():
        raise IsthmusError(f"{path}: no such file")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise IsthmusError(f"{path}: {path.stat().st_size} bytes, a tree model ends at {MAX_FILE_BYTES}")
    if path.suffix == ".skops":
        return ensemble_from_sklearn(load_skops(path), path.name)
    return ensemble_from_xgboost(path.read_bytes(), path.name)
