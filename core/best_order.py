# SPDX-License-Identifier: Apache-2.0
"""The order of operators that needs the least memory for activations. A chain has one order; branches that can take turns have many."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

STATE_LIMIT = 2_000  # sets of finished operators that are looked at: about a second; a network of a hundred layers with residuals has some hundred


@dataclass(frozen=True)
class Step:
    """One operator. `is_view`: its result is its first input by another name; `in_place`: it may write over its first input where nobody else reads that."""

    reads: tuple[str, ...]
    writes: tuple[str, ...]
    is_view: bool = False
    in_place: bool = False


def least_peak_bytes(steps: Sequence[Step], sizes: Mapping[str, int], inputs: Sequence[str], outputs: Sequence[str]) -> int | None:
    """The smallest peak of live bytes over all orders in which every operator finds its inputs; None where there are too many to look at.

    `inputs` live from the start and are never written over, `outputs` to the end. The search goes from one set of finished operators to the
    next, always on from the one whose peak so far is the smallest: which bytes live depends on the set alone, not on the order behind it. An
    operator that raises no peak and leaves no more bytes behind than before is run at once: putting it off gains nothing.
    """
    memory = _Memory(steps, sizes, inputs, outputs)
    done = (1 << len(memory.steps)) - 1
    queue: list[tuple[int, int, int, int]] = [(memory.least(), 0, 0, memory.at_start)]
    seen: set[int] = set()
    while queue:
        peak, _, finished, alive = heapq.heappop(queue)
        if finished == done:
            return peak
        if finished in seen:
            continue
        seen.add(finished)
        if len(seen) > STATE_LIMIT:
            return None
        moves = [(index, *memory.run(index, finished, alive)) for index in memory.ready(finished)]
        free = next((move for move in moves if move[1] <= peak and move[2] <= alive), None)
        for index, during, after in moves if free is None else [free]:
            following = finished | 1 << index
            if following not in seen:
                heapq.heappush(queue, (max(peak, during), -following.bit_count(), following, after))
    return None


class _Memory:
    """Buffers, and which operators read and write them as bit sets; views are resolved."""

    def __init__(self, steps: Sequence[Step], sizes: Mapping[str, int], inputs: Sequence[str], outputs: Sequence[str]) -> None:
        self.sizes = sizes
        self.inputs = set(inputs)
        buffer_of = {name: name for name in inputs}
        self.steps: list[Step] = []
        for step in steps:
            reads = tuple(dict.fromkeys(buffer_of.get(name, name) for name in step.reads))
            if step.is_view and step.reads and step.reads[0] in buffer_of and sizes[step.writes[0]] <= sizes[reads[0]]:
                buffer_of[step.writes[0]] = reads[0]
                continue
            buffer_of.update({name: name for name in step.writes})
            self.steps.append(Step(reads, step.writes, False, step.in_place))
        self.kept = {buffer_of[name] for name in outputs if name in buffer_of}
        writer = {name: index for index, step in enumerate(self.steps) for name in step.writes}
        self.needs = [sum({1 << writer[name] for name in step.reads if name in writer}) for step in self.steps]
        self.readers: dict[str, int] = {}
        for index, step in enumerate(self.steps):
            for name in step.reads:
                self.readers[name] = self.readers.get(name, 0) | 1 << index
        self.at_start = sum(sizes[name] for name in self.inputs)

    def least(self) -> int:
        """What no order can do without: some operator's own inputs and results, those written over counted once."""
        alone = [
            sum(self.sizes[name] for name in step.reads) + sum(self.sizes[name] for name in step.writes[1 if step.in_place else 0 :]) for step in self.steps
        ]
        return max([self.at_start, *alone])

    def ready(self, finished: int) -> list[int]:
        return [index for index, needed in enumerate(self.needs) if not finished >> index & 1 and needed & ~finished == 0]

    def run(self, index: int, finished: int, alive: int) -> tuple[int, int]:
        """(bytes while the operator runs, bytes behind it)."""
        step, following = self.steps[index], finished | 1 << index
        over = self._written_over(step, following)
        during = alive + sum(self.sizes[name] for name in step.writes[1 if over else 0 :])
        gone = [name for name in step.reads if name != over and self._is_idle(name, following)]
        gone += [name for name in step.writes if self._is_idle(name, following)]
        return during, during - sum(self.sizes[name] for name in gone)

    def _written_over(self, step: Step, following: int) -> str | None:
        first = step.reads[0] if step.in_place and step.reads else None
        if first is None or first in self.inputs or not self._is_idle(first, following) or self.sizes[step.writes[0]] > self.sizes[first]:
            return None
        return first

    def _is_idle(self, name: str, finished: int) -> bool:
        return name not in self.kept and self.readers.get(name, 0) & ~finished == 0
