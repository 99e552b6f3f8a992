# SPDX-License-Identifier: Apache-2.0
"""`isthmus lint`: what of a bundle's graph a board would multiply in int8, what stays float and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from isthmus.bundle import Bundle
from isthmus.console import grid
from isthmus.errors import IsthmusError
from isthmus.form_file import load_form
from isthmus.lint import LintRow, totals
from isthmus.profile import load_profile, profile_names
from isthmus.registry import load_target, why_unusable
from isthmus.tree_form import TreeForm


def lint_bundle(bundle: Bundle, names: Sequence[str] = ()) -> dict[str, list[LintRow]]:
    """By profile, each layer as the target would run it: the named ones, else the bundle's own that have a linter.

    Raises `IsthmusError` on a named one without, or a tree model.
    """
    graph = load_form(bundle.model)
    if isinstance(graph, TreeForm):
        if names:
            raise IsthmusError(f"{bundle.root}: holds a tree model; only a network's layers are linted")
        return {}
    found = {}
    for name in dict.fromkeys(names) or _usable(bundle):
        profile = load_profile(name)
        rows = load_target(profile.target).lint(graph, profile)
        if rows is not None:
            found[name] = rows
        elif names:
            raise IsthmusError(f"{name}: target {profile.target} has no linter; 'isthmus targets' lists the boards, those of target jetson have one")
    return found


def _usable(bundle: Bundle) -> list[str]:
    """A report is made on any machine: a target that cannot be imported here, or a profile of another version, says nothing."""
    known = profile_names()
    return [name for name in bundle.profiles if name in known and not why_unusable(load_profile(name).target)]


def lint_path(path: Path, names: Sequence[str]) -> dict[str, list[LintRow]]:
    """`lint_bundle`, and `IsthmusError` where nothing was linted."""
    found = lint_bundle(Bundle.open(path), names)
    if not found:
        raise IsthmusError(f"{path}: no artifact of it is for a target with a linter; name a board: --target jetson-orin-nano")
    return found


def lint_sentence(rows: Sequence[LintRow]) -> str:
    t = totals(rows)
    share = 100 * t.int8_macs / t.macs if t.macs else 0.0
    return f"{t.int8_macs:,} of {t.macs:,} MACs ({share:.1f} %) in int8, {t.int8_layers} of {t.layers} layers, {t.reformats} reformats"


def lint_json(found: Mapping[str, Sequence[LintRow]]) -> dict[str, Any]:
    return {name: {"totals": asdict(totals(rows)), "rows": [asdict(row) for row in rows]} for name, rows in found.items()}


def lint_table(found: Mapping[str, Sequence[LintRow]]) -> str:
    parts = []
    for name, rows in found.items():
        cells = [[row.node, row.op, row.runs, f"{row.macs:,}" if row.macs else "", str(row.reformats or ""), row.why, row.fix] for row in rows]
        table = grid(["layer", "operator", "runs in", "MACs", "reformats", "why", "what to change"], cells)
        parts.append(f"{table}\n\npredicted for {name} from the graph: {lint_sentence(rows)}")
    return "\n\n".join(parts)
