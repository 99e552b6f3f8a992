# SPDX-License-Identifier: Apache-2.0
"""Keeps this process on chosen processors while it measures. Standard library only: devices import it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from isthmus.errors import IsthmusError

MOST_CPUS = 4096


def parse_cpus(text: str) -> tuple[int, ...]:
    """ "0,2-3" -> (0, 2, 3). Raises `IsthmusError` on anything else."""
    cpus: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not (first.isascii() and first.isdigit() and (not dash or (last.isascii() and last.isdigit()))):
            raise IsthmusError(f"--pin {text!r}: expected processors such as 0 or 0,2-3")
        begin, end = int(first), int(last or first)
        if begin > end or end >= MOST_CPUS:
            raise IsthmusError(f"--pin {text!r}: {part.strip()!r} is no range of processors")
        cpus.update(range(begin, end + 1))
    return tuple(sorted(cpus))


@contextmanager
def pinned(cpus: tuple[int, ...] | None) -> Iterator[None]:
    """Threads made inside run on `cpus` only (None: no change). Open the session inside, so that the engine's threads are made there.

    Raises `IsthmusError` where the system has no such call, a processor is not there, or it is not permitted.
    """
    if cpus is None:
        yield
        return
    if not hasattr(os, "sched_setaffinity"):
        raise IsthmusError("this system cannot keep a process on a processor: leave out --pin")
    before = os.sched_getaffinity(0)
    wanted = ", ".join(map(str, cpus))
    try:
        os.sched_setaffinity(0, cpus)
    except PermissionError:
        raise IsthmusError(f"no permission to run on the processors {wanted}: leave out --pin, or ask the machine's owner") from None
    except OSError:
        raise IsthmusError(f"the processors {wanted} are not all there for this process: it may use {', '.join(map(str, sorted(before)))}") from None
    try:
        kept = os.sched_getaffinity(0)
        if kept != set(cpus):  # the kernel drops processors outside this process's cpuset in silence
            raise IsthmusError(f"of the processors {wanted} this process got only {', '.join(map(str, sorted(kept)))}")
        yield
    finally:
        os.sched_setaffinity(0, before)
