# SPDX-License-Identifier: Apache-2.0
"""isthmus: one verified int8 ONNX graph, every edge target.

`isthmus.compile(...)` is the whole program; the public types are `QuantGraph` and `Bundle`. Imported lazily, so that a
device which only runs artifacts never loads onnx or torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isthmus.bundle import Bundle
    from isthmus.errors import IsthmusError
    from isthmus.graph import QuantGraph
    from isthmus.pipeline import compile
    from isthmus.recipe import Recipe

__version__ = "0.1.0"
__all__ = ["Bundle", "IsthmusError", "QuantGraph", "Recipe", "__version__", "compile"]

_PUBLIC = {"Bundle": "bundle", "IsthmusError": "errors", "QuantGraph": "graph", "Recipe": "recipe", "compile": "pipeline"}


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(f"isthmus.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'isthmus' has no attribute {name!r}")
