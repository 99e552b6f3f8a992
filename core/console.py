# SPDX-License-Identifier: Apache-2.0
"""What long work shows on a terminal: a moving bar there, one plain line a stage elsewhere; and plain tables."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn


class Console:
    """A context manager; `say(text, share)` starts a stage or moves its bar (share 0..1, None where nobody knows). Writes to stderr."""

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._stage = ""
        self._started = time.monotonic()

    def __enter__(self) -> Self:
        if not self._quiet and sys.stderr.isatty():
            columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
            self._progress = Progress(*columns, console=RichConsole(stderr=True))
            self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._progress is not None:
            if self._task is not None and error is None:
                self._progress.update(self._task, total=1.0, completed=1.0)
            self._progress.stop()

    def say(self, text: str, share: float | None) -> None:
        stage = text.partition(":")[0] if share is not None else text
        if self._quiet:
            return
        if self._progress is None:
            if stage != self._stage:
                print(f"[{time.monotonic() - self._started:6.1f} s] {text}", file=sys.stderr, flush=True)
        elif stage != self._stage:
            if self._task is not None:
                self._progress.update(self._task, total=1.0, completed=1.0)
            self._task = self._progress.add_task(text, total=None if share is None else 1.0)
        elif self._task is not None:
            self._progress.update(self._task, description=text, completed=share or 0.0)
        self._stage = stage


def grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain table: columns as wide as their widest cell, two blanks between, a rule under the header."""
    table = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
