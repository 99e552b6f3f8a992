# SPDX-License-Identifier: Apache-2.0
"""`Profile`: one board, read from one TOML file in `targets/profiles/`."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from isthmus.errors import IsthmusError


@dataclass(frozen=True)
class Profile:
    """A board and the target that serves it. `facts` holds the figures (`memory_bytes`, `clock_hz`, ...) and `sources` where each is from.

    `toolchain` holds what the target's tools need to know of the board (FPGA part, TensorRT version, SM); `defaults` are target
    options this board starts from.
    """

    name: str
    board: str
    target: str
    arch: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    toolchain: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)


def profile_names() -> list[str]:
    """Every profile that ships, by name, sorted."""
    folder = resources.files("isthmus.targets") / "profiles"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_profile(name: str) -> Profile:
    """The profile called `name`. Raises `IsthmusError` that lists the near names where there is none."""
    names = profile_names()
    if name not in names:
        near = _near(name, names)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names)}"
        raise IsthmusError(f"unknown profile {name!r}: {hint} ('isthmus targets' lists all)")
    text = (resources.files("isthmus.targets") / "profiles" / f"{name}.toml").read_text(encoding="utf-8")
    return _profile(name, tomllib.loads(text))


def _near(name: str, names: list[str]) -> list[str]:
    """Up to three: those that share most words with `name`, in whatever order, then those spelt most like it."""
    words = set(name.split("-"))
    alike = difflib.get_close_matches(name, names, n=len(names), cutoff=0.4)
    return sorted(alike, key=lambda other: -len(words & set(other.split("-"))))[:3]


def _profile(name: str, data: Mapping[str, Any]) -> Profile:
    known = {"board", "target", "arch", "facts", "sources", "toolchain", "defaults"}
    unknown, missing = set(data) - known, {"board", "target", "arch"} - set(data)
    if unknown or missing:
        raise IsthmusError(f"profile {name}: unknown keys {sorted(unknown)}, missing keys {sorted(missing)}")
    facts, sources = data.get("facts", {}), data.get("sources", {})
    unsourced = set(facts) - set(sources)
    if unsourced:
        raise IsthmusError(f"profile {name}: facts without a source: {sorted(unsourced)}")
    return Profile(name=name, **data)
