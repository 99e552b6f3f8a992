# SPDX-License-Identifier: Apache-2.0
"""What several commands share: their options, and words turned into values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from isthmus.errors import IsthmusError

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Targets = Annotated[list[str] | None, typer.Option("--target", "-t", help="A profile ('isthmus targets' lists them); repeat for several.")]
BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="The folder that 'isthmus compile' wrote.")]
Trust = Annotated[bool, typer.Option("--trust-bundle", help="Run native code of a bundle that somebody else built.")]
Threads = Annotated[int, typer.Option("--threads", help="Threads of the engine.")]
DataRoot = Annotated[Path | None, typer.Option("--data-root", help="Folder of a zoo system's data set, in the files it is published as.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder of the bundle.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing bundle.")]


def pair(word: str, option: str) -> tuple[str, str]:
    name, equals, value = word.partition("=")
    if not equals or not name:
        raise IsthmusError(f"{option} {word!r}: expected NAME=VALUE")
    return name, value


def shapes(words: list[str]) -> dict[str, tuple[int, ...]]:
    found = {}
    for word in words:
        name, value = pair(word, "--shape")
        try:
            found[name] = tuple(int(extent) for extent in value.split(","))
        except ValueError:
            raise IsthmusError(f"--shape {word!r}: expected NAME=1,3,224,224") from None
        if any(extent < 1 for extent in found[name]):
            raise IsthmusError(f"--shape {word!r}: every dimension is at least 1")
    return found


def some(words: list[str], most: int = 4) -> str:
    """A long list's beginning and how many follow; --json has them all."""
    return ", ".join(words) if len(words) <= most else f"{', '.join(words[: most - 1])} and {len(words) - most + 1} more"


def shown(path: Path) -> str:
    """Relative where that is shorter."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def print_json(value: Mapping[str, Any] | list[Any]) -> None:
    print(json.dumps(value, indent=1, default=float))
