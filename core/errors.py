# SPDX-License-Identifier: Apache-2.0
"""What a user can put right. The command line prints these as one sentence and exits with 2; anything else is a bug."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class IsthmusError(Exception):
    """A mistake or a missing thing outside this program: the text names what, where, and what to do."""

    exit_code = 2


class VerificationError(IsthmusError):
    """An artifact does not compute what the integer reference computes. Nobody's typing mistake: exit code 1."""

    exit_code = 1


@dataclass(frozen=True)
class Problem:
    """One broken rule at one place.

    `node` is the ONNX node (or tensor, or file) it is about, `rule` a short kebab-case name that tests and documents
    refer to, `found` what is there instead, `fix` what the user can do.
    """

    node: str
    rule: str
    found: str
    fix: str

    def __str__(self) -> str:
        return f"{self.node}: {self.found} [{self.rule}]; {self.fix}"


class ProblemsError(IsthmusError):
    """Several problems at once: all are reported, not just the first."""

    def __init__(self, subject: str, problems: Sequence[Problem]) -> None:
        self.subject = subject
        self.problems = tuple(problems)
        shown = "\n".join(f"  - {problem}" for problem in self.problems[:20])
        more = f"\n  ... and {len(self.problems) - 20} more" if len(self.problems) > 20 else ""
        super().__init__(f"{subject}: {len(self.problems)} problem{'s' if len(self.problems) != 1 else ''}\n{shown}{more}")
