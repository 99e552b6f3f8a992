# SPDX-License-Identifier: Apache-2.0
"""A cycle model of io_stream: stages that pass pixels through fifos of a depth. It gives cycles, intervals, and depths that do not deadlock.

The C simulation has no back-pressure, so it never shows a fifo that is too small: two branches of unlike length that meet again stop
for ever where the short one's fifo is full before the long one has given its first pixel.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from isthmus.errors import IsthmusError

SHALLOW = 2  # what HLS gives a stream that asks for nothing
MAX_TOKENS = 2_000_000  # of all stages together: about ten seconds of simulation


@dataclass(frozen=True)
class Stage:
    """One layer. `reads`: the stages whose pixels it takes, one fifo each.

    `rule` says when it reads and writes: "each" (one in, one out, `tokens_in` times), "window" (a line buffer: `grid` rows and columns come
    in, a result leaves wherever `kernel` fits at `strides`), "pad" (`pads` top, left, bottom, right around `grid`), "whole" (all in, then
    `tokens_out` out; one input after the other), "source" (`tokens_out` out). `cycles`: between two reads, `delay`: from the last read to the first result.
    """

    name: str
    rule: str
    reads: tuple[int, ...]
    tokens_out: int
    cycles: int = 1
    delay: int = 1
    tokens_in: tuple[int, ...] = ()  # of "whole", by input
    grid: tuple[int, int] = (1, 1)
    kernel: tuple[int, int] = (1, 1)
    strides: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)

    def steps(self) -> Iterator[tuple[tuple[int, ...], bool]]:
        """(the inputs of which it reads a pixel, whether it writes one), step by step."""
        every = tuple(range(len(self.reads)))
        if self.rule == "source":
            yield from (((), True) for _ in range(self.tokens_out))
        elif self.rule == "each":
            yield from ((every, True) for _ in range(self.tokens_out))
        elif self.rule == "window":
            for row in range(self.grid[0]):
                for column in range(self.grid[1]):
                    yield every, self._fits(row, self.kernel[0], self.strides[0]) and self._fits(column, self.kernel[1], self.strides[1])
        elif self.rule == "pad":
            top, left, bottom, right = self.pads
            for row in range(top + self.grid[0] + bottom):
                for column in range(left + self.grid[1] + right):
                    yield every if top <= row < top + self.grid[0] and left <= column < left + self.grid[1] else (), True
        else:
            for place, tokens in enumerate(self.tokens_in):
                yield from (((place,), False) for _ in range(tokens))
            yield from (((), True) for _ in range(self.tokens_out))

    @staticmethod
    def _fits(place: int, extent: int, stride: int) -> bool:
        return place >= extent - 1 and (place - extent + 1) % stride == 0

    def count(self) -> int:
        """Steps for one sample."""
        top, left, bottom, right = self.pads
        rows, columns = self.grid
        return {"window": rows * columns, "pad": (rows + top + bottom) * (columns + left + right), "whole": sum(self.tokens_in) + self.tokens_out}.get(
            self.rule, self.tokens_out
        )


Edge = tuple[int, int, int]  # (stage that writes, stage that reads, as which of its inputs)


@dataclass(frozen=True)
class Run:
    """What a simulation found. `stuck`: the stages that wait for ever, empty where every pixel came out."""

    cycles: int
    stuck: tuple[str, ...]
    occupancy: Mapping[Edge, int]  # the most pixels that lay in a fifo at once
    full: tuple[Edge, ...] = field(default=())  # fifos that a stuck stage could not write


def edges(stages: Sequence[Stage]) -> list[Edge]:
    """The fifos: a stage that reads another twice has two, as hls4ml copies what is read more than once."""
    return [(writer, reader, place) for reader, stage in enumerate(stages) for place, writer in enumerate(stage.reads)]


def simulate(stages: Sequence[Stage], depths: Mapping[Edge, int]) -> Run:
    """One sample through the stages, which stand in an order in which each reads only earlier ones. A fifo without a depth has no bound.

    Raises `IsthmusError` where there are more steps than the model is made for.
    """
    total = sum(stage.count() for stage in stages)
    if total > MAX_TOKENS:
        raise IsthmusError(f"the stream has {total} steps, the cycle model takes at most {MAX_TOKENS}")
    readers: list[list[Edge]] = [[] for _ in stages]
    for edge in edges(stages):
        readers[edge[0]].append(edge)
    written: dict[Edge, list[int]] = {edge: [] for edge in edges(stages)}  # the cycle at which each pixel lies in the fifo
    taken: dict[Edge, list[int]] = {edge: [] for edge in written}  # the cycle at which each was read
    steps = [stage.steps() for stage in stages]
    pending = [next(step, None) for step in steps]
    free = [0] * len(stages)  # the cycle at which a stage may begin its next step
    moved = True
    while moved:
        moved = False
        for index, stage in enumerate(stages):
            while (step := pending[index]) is not None:
                begin = _ready(index, stage, step, free[index], written, taken, readers[index], depths)
                if begin is None:
                    break
                reads, writes = step
                for place in reads:
                    taken[stage.reads[place], index, place].append(begin)
                for edge in readers[index] if writes else ():
                    written[edge].append(begin + stage.delay)
                free[index] = begin + (stage.cycles if reads or stage.rule == "source" else 1)
                pending[index] = next(steps[index], None)
                moved = True
    stuck = [index for index, step in enumerate(pending) if step is not None]
    full = [edge for index in stuck for edge in readers[index] if edge in depths and len(written[edge]) - len(taken[edge]) >= depths[edge]]
    last = max((free[index] + stage.delay for index, stage in enumerate(stages)), default=0)
    return Run(last, tuple(stages[index].name for index in stuck), {edge: _most(written[edge], taken[edge]) for edge in written}, tuple(full))


def _ready(
    index: int,
    stage: Stage,
    step: tuple[tuple[int, ...], bool],
    free: int,
    written: Mapping[Edge, list[int]],
    taken: Mapping[Edge, list[int]],
    outgoing: Sequence[Edge],
    depths: Mapping[Edge, int],
) -> int | None:
    """The first cycle at which the step can run; None where a pixel or a place for one is still missing."""
    begin = free
    for place in step[0]:
        edge = (stage.reads[place], index, place)
        if len(taken[edge]) >= len(written[edge]):
            return None
        begin = max(begin, written[edge][len(taken[edge])])
    if step[1]:
        for edge in outgoing:
            freed = len(written[edge]) - depths.get(edge, len(written[edge]) + 1)
            if freed >= len(taken[edge]):
                return None
            if freed >= 0:
                begin = max(begin, taken[edge][freed] - stage.delay + 1)
    return begin


def _most(written: Sequence[int], taken: Sequence[int]) -> int:
    most = place = 0
    for count, cycle in enumerate(written, start=1):
        while place < len(taken) and taken[place] < cycle:
            place += 1
        most = max(most, count - place)
    return most


def fifo_depths(stages: Sequence[Stage]) -> dict[Edge, int]:
    """A depth for every fifo with which no stage waits for ever, and the sample takes as long as without any bound.

    Only where branches meet a fifo may have to hold more than a few pixels: there it is made as deep as it fills up while every other is
    shallow. Then all are simulated together.
    """
    shallow = {edge: SHALLOW for edge in edges(stages) if len(stages[edge[1]].reads) == 1}
    deepest = simulate(stages, shallow).occupancy
    chosen = {edge: shallow.get(edge, max(SHALLOW, deepest[edge])) for edge in edges(stages)}
    run = simulate(stages, chosen)
    if run.stuck:
        raise IsthmusError(f"the stream of {', '.join(run.stuck[:3])} waits for pixels that no layer writes")
    return chosen
