# SPDX-License-Identifier: Apache-2.0
"""Finds targets and engines by folder: `targets/<name>/` with `TARGET`, `runtimes/<name>/` with `open_session`. Listing imports nothing."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import TYPE_CHECKING

from isthmus.errors import IsthmusError

if TYPE_CHECKING:
    from isthmus.target import Target


def _folders(package: str) -> list[str]:
    module = import_module(f"isthmus.{package}")
    return sorted(entry.name for entry in pkgutil.iter_modules(module.__path__) if entry.ispkg)


def target_names() -> list[str]:
    """Every target, importable or not."""
    return _folders("targets")


def load_target(name: str) -> Target:
    """The target called `name`. Raises `IsthmusError` where there is none, or with the reason why its import fails."""
    if name not in target_names():
        raise IsthmusError(f"unknown target {name!r}: there are {', '.join(target_names())}")
    try:
        target: Target = import_module(f"isthmus.targets.{name}").TARGET
    except ImportError as error:
        raise IsthmusError(f"target {name} cannot be used: {error}; 'isthmus doctor' says what brings it") from error
    return target


def why_unusable(name: str) -> str:
    """Why a target's import fails; "" where it does not."""
    try:
        load_target(name)
    except IsthmusError as error:
        return str(error)
    return ""
