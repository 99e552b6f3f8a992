# SPDX-License-Identifier: Apache-2.0
"""The cycle model of a stream: cycles, and fifos that are deep enough and no deeper."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.errors import IsthmusError
from isthmus.form_writer import FormWriter
from isthmus.graph import QuantGraph
from isthmus.recipe import Recipe
from isthmus.targets.hls4ml.design import layers_of
from isthmus.targets.hls4ml.lower import lower
from isthmus.targets.hls4ml.stream import MAX_TOKENS, SHALLOW, Stage, edges, fifo_depths, simulate

SIDE = 12


def _residual(filters: int = 4) -> QuantGraph:
    """x + conv(conv(x)): the short branch waits for two padded rows of each convolution."""
    generator = np.random.default_rng(3)
    writer = FormWriter(recipe=Recipe())
    x = y = writer.input("image", (1, filters, SIDE, SIDE), scale=2**-4)
    for _ in range(2):
        y = writer.conv(y, generator.integers(-9, 9, (filters, filters, 3, 3)).astype(np.int8), 2**-7, scale=2**-3, pads=(1, 1, 1, 1))
    writer.output(writer.add(x, y, scale=2**-3, activation="Relu"), "sum")
    return writer.graph()


def test_a_residual_branch_gets_the_depth_it_needs_and_one_less_deadlocks() -> None:
    stages = [layer.stage for layer in layers_of(lower(_residual(), "io_stream"), "io_stream")]
    join = next(index for index, stage in enumerate(stages) if len(stage.reads) == 2)
    depths = fifo_depths(stages)
    (deep,) = [edge for edge, depth in depths.items() if depth > SHALLOW]
    assert deep[1] == join and SIDE < depths[deep] < SIDE * SIDE  # rows, not the whole image
    assert simulate(stages, depths).cycles == simulate(stages, {}).cycles  # as fast as without any bound
    assert simulate(stages, depths).stuck == ()
    stuck = simulate(stages, {**depths, deep: depths[deep] // 2})
    assert stages[join].name in stuck.stuck and deep in stuck.full
    assert simulate(stages, dict.fromkeys(edges(stages), SHALLOW)).stuck


def test_blocks_with_a_strided_shortcut_do_not_deadlock() -> None:
    """As a ResNet's: behind the split one branch halves the size twice later than the other, and a block without a shortcut follows."""
    generator = np.random.default_rng(4)
    writer = FormWriter(recipe=Recipe())
    weight = lambda *shape: generator.integers(-9, 9, shape).astype(np.int8)  # noqa: E731
    around = (1, 1, 1, 1)
    x = writer.conv(writer.input("image", (1, 2, SIDE, SIDE), scale=2**-4), weight(4, 2, 3, 3), 2**-7, scale=2**-3, pads=around, activation="Relu")
    for filters, stride in ((8, 2), (8, 1)):
        depth = 4 if stride == 2 else 8
        y = writer.conv(x, weight(filters, depth, 3, 3), 2**-7, scale=2**-3, pads=around, strides=(stride, stride), activation="Relu")
        y = writer.conv(y, weight(filters, filters, 3, 3), 2**-7, scale=2**-3, pads=around)
        short = x if stride == 1 else writer.conv(x, weight(filters, depth, 1, 1), 2**-7, scale=2**-3, strides=(stride, stride))
        x = writer.add(y, short, scale=2**-3, activation="Relu")
    writer.output(writer.gemm(writer.flatten(writer.global_average_pool(x, scale=2**-3)), weight(3, 8), 2**-7, scale=2**-1), "logits")
    stages = [layer.stage for layer in layers_of(lower(writer.graph(), "io_stream"), "io_stream")]
    depths = fifo_depths(stages)
    assert simulate(stages, depths).stuck == () and simulate(stages, depths).cycles == simulate(stages, {}).cycles
    joins = [index for index, stage in enumerate(stages) if len(stage.reads) == 2]
    deep = {edge: depth for edge, depth in depths.items() if depth > SHALLOW}
    assert len(joins) == 2 and all(edge[1] in joins and depth < SIDE * SIDE / 2 for edge, depth in deep.items())
    assert simulate(stages, dict.fromkeys(edges(stages), SHALLOW)).stuck


def test_the_least_depth_is_what_the_long_branch_holds_back() -> None:
    """A window of three rows over a padded image gives nothing before row 1, column 1 of the image has come in."""
    stages = [
        Stage("in", "source", (), SIDE * SIDE),
        Stage("pad", "pad", (0,), (SIDE + 2) ** 2, grid=(SIDE, SIDE), pads=(1, 1, 1, 1)),
        Stage("conv", "window", (1,), SIDE * SIDE, cycles=4, grid=(SIDE + 2, SIDE + 2), kernel=(3, 3)),
        Stage("add", "each", (0, 2), SIDE * SIDE),
    ]
    shallow = dict.fromkeys(edges(stages), SHALLOW)
    works = [depth for depth in range(1, 40) if not simulate(stages, {**shallow, (0, 3, 0): depth}).stuck]
    assert works == list(range(works[0], 40)) and works[0] in range(SIDE - 2, SIDE + 3)


def test_a_layer_that_reads_one_input_after_the_other_buffers_the_second() -> None:
    stages = [Stage("in", "source", (), 20), Stage("join", "whole", (0, 0), 40, tokens_in=(20, 20))]
    depths = fifo_depths(stages)
    assert depths[0, 1, 1] >= 20 and not simulate(stages, depths).stuck
    assert simulate(stages, {**depths, (0, 1, 1): 19}).stuck == ("in", "join")


@settings(max_examples=30)
@given(st.lists(st.tuples(st.sampled_from(["each", "conv", "pool", "join"]), st.integers(1, 9)), min_size=1, max_size=6), st.data())
def test_chosen_depths_never_deadlock(plan: list[tuple[str, int]], data: st.DataObject) -> None:
    stages, sides = [Stage("in", "source", (), 64)], [8]
    for kind, cycles in plan:
        source = data.draw(st.integers(0, len(stages) - 1))
        side = sides[source]
        if kind == "conv":
            stages.append(Stage(f"p{len(stages)}", "pad", (source,), (side + 2) ** 2, grid=(side, side), pads=(1, 1, 1, 1)))
            sides.append(side + 2)
            stages.append(Stage(f"c{len(stages)}", "window", (len(stages) - 1,), side * side, cycles=cycles, grid=(side + 2, side + 2), kernel=(3, 3)))
            sides.append(side)
        elif kind == "pool" and side % 2 == 0:
            stages.append(Stage(f"m{len(stages)}", "window", (source,), side * side // 4, grid=(side, side), kernel=(2, 2), strides=(2, 2)))
            sides.append(side // 2)
        else:
            alike = [index for index, other in enumerate(sides) if other == side]
            reads = (source, data.draw(st.sampled_from(alike))) if kind == "join" else (source,)
            stages.append(Stage(f"e{len(stages)}", "each", reads, side * side))
            sides.append(side)
    depths = fifo_depths(stages)
    run = simulate(stages, depths)
    assert run.stuck == () and run.cycles == simulate(stages, {}).cycles


def test_a_stream_too_long_for_the_model_is_said() -> None:
    with pytest.raises(IsthmusError, match=f"the cycle model takes at most {MAX_TOKENS}"):
        simulate([Stage("in", "source", (), MAX_TOKENS + 1)], {})
