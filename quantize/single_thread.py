# SPDX-License-Identifier: Apache-2.0
"""torch on one thread: sums are split by the number of threads, so that one gives the same floats on any machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def single_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
