# SPDX-License-Identifier: Apache-2.0
"""What there is: `targets`, `doctor`."""

from __future__ import annotations

from isthmus.commands.options import Json, print_json


def targets_command(as_json: Json = False) -> None:
    """The boards isthmus knows, and the target that serves each."""
    from isthmus.console import grid
    from isthmus.profile import load_profile, profile_names
    from isthmus.registry import why_unusable

    profiles = [load_profile(name) for name in profile_names()]
    reasons = {name: why_unusable(name) for name in {profile.target for profile in profiles}}
    if as_json:
        print_json(
            [
                {"profile": p.name, "board": p.board, "target": p.target, "arch": p.arch, "facts": dict(p.facts), "unusable": reasons[p.target] or None}
                for p in profiles
            ]
        )
    else:
        print(grid(["profile", "board", "target", "usable"], [[p.name, p.board, p.target, reasons[p.target] or "yes"] for p in profiles]))


def doctor(as_json: Json = False) -> None:
    """Which tools were found, their versions, and the one command that brings each missing one."""
    from isthmus.console import grid
    from isthmus.tools import find_tool, tool_names

    found = [find_tool(name) for name in tool_names()]
    if as_json:
        print_json([{"tool": t.name, "found": t.found, "version": t.version, "path": t.path, "purpose": t.purpose, "fix": t.fix} for t in found])
    else:
        print(grid(["tool", "version", "what it does here", "how to get it"], [[t.name, t.version if t.found else "missing", t.purpose, t.fix] for t in found]))
