# SPDX-License-Identifier: Apache-2.0
"""The layers that isthmus adds to hls4ml: tables, moves, joins, products of activations, interpolation, in arrays and in streams."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.form_writer import FormWriter
from isthmus.graph import QuantGraph
from isthmus.recipe import Recipe
from isthmus.targets.hls4ml import simulation
from isthmus.targets.hls4ml.kernels import NOWHERE, _separated, constant_source, interpolate_kernel, move_kernel, table_kernel
from isthmus.targets.hls4ml.layout import element_order, hls_sources
from isthmus.targets.hls4ml.pools import _taps


def _everything(hls: Any) -> QuantGraph:
    """An input and an output that others read, a gate that is spread, constants, joins along a row, five axes, a batch of rows."""
    weight, bias = hls.random(11)
    writer = FormWriter(recipe=Recipe())
    x = writer.input("image", (1, 4, 5, 6), scale=2**-4)
    gate = writer.function("Sigmoid", writer.reduce_mean(x, (2, 3), scale=2**-5), scale=2**-7)
    y = writer.mul(x, gate, scale=2**-4)
    stored = writer.constant_int8("stored", np.arange(-12, 12).reshape(1, 4, 1, 6) * 5, scale=2.0**-3)
    y = writer.sub(stored, y, scale=2**-3, activation="Relu")
    writer.output(y, "early")
    y = writer.conv_transpose(y, weight(4, 3, 2, 3), 2**-7, bias(3), scale=2**-1, strides=(2, 1), pads=(0, 1, 1, 0), activation=("Clip", -20.0, 50.0))
    y = writer.concat([y, writer.slice(y, (1, -1), (9, -100), (2, 3), (2, -1))], axis=2)
    y = writer.resize_linear(y, (1, 3, 25, 14), "half_pixel", scale=2**-2)
    y = writer.max_pool(y, (3, 2), (2, 1), (1, 0, 0, 1))
    y = writer.average_pool(y, (2, 3), (1, 1), (0, 1, 1, 0), count_include_pad=1, scale=2**-2)
    y = writer.p_relu(y, np.array([0.25, -0.5, 1.5]).reshape(3, 1, 1), scale=2**-2)
    writer.output(writer.gather(y, [[2, 0], [1, 2]], 1), "five_axes")
    rows = writer.reshape(writer.slice(y, (0, 0), (12, 12), (2, 3)), (1, 36, 12))
    rows = writer.matmul(rows, weight(12, 5), 2**-8, scale=2**0)
    writer.output(writer.batch_matmul(rows, writer.transpose(writer.requantize(rows, scale=2**1), (0, 2, 1)), scale=2**6), "products")
    writer.output(x, "unchanged")
    writer.output(writer.flatten(x), "unchanged_too")
    return writer.graph()


@pytest.mark.parametrize("io_type", ["io_parallel", "io_stream"])
def test_they_are_exact(hls: Any, tools: None, io_type: str, tmp_path: Path) -> None:
    built = hls.build(_everything(hls), tmp_path / "built", io_type=io_type)
    assert json.loads((built[2] / simulation.CONFIG_FILE).read_text())["io_type"] == io_type
    for name, values in hls.equals_reference(built).items():
        assert values.std() > 1, f"{name} is constant: nothing was compared"


@given(st.permutations([0, 1, 2]), st.integers(1, 3), st.booleans(), st.data())
def test_a_move_by_sums_names_the_places_it_stands_for(order: list[int], step: int, padded: bool, data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=3, max_size=3)))
    places = np.arange(int(np.prod(shape))).reshape(shape).transpose(order)[::-step]
    places = np.pad(places, ((1, 0), (0, 2), (0, 0)), constant_values=int(constant_source(np.array(7)))) if padded else places
    found = _separated(places)
    assert found is not None
    (rows, columns, channels), fill = found
    total = rows[:, None, None] + columns[None, :, None] + channels[None, None, :]
    assert np.array_equal(np.where(total < 0, -1 if fill is None else fill, total), places)
    assert 3 * NOWHERE >= -(2**31)


def test_a_move_without_such_sums_lists_every_place() -> None:
    places = np.array([0, 3, 1, 2]).reshape(2, 2, 1)
    assert _separated(places) is None
    assert "places[4] = {\n            0, 3, 1, 2}" in move_kernel(places, 4).body
    constants = constant_source(np.array([-128, 127]))
    assert constants.max() < 0 and _separated(constants.reshape(1, 1, 2)) is None


def test_hls_places_are_the_form_places_of_the_same_elements() -> None:
    source, target = (1, 3, 2, 4), (1, 4, 6)
    sources = hls_sources(np.arange(24), source, target).reshape(-1)
    values = np.arange(24)
    assert np.array_equal(values[element_order(source)][sources], values[element_order(target)])


def test_a_table_is_read_by_the_bits_of_its_input() -> None:
    body = table_kernel(np.arange(-128, 128).astype(np.int8), 10).body
    numbers = [int(number) for number in body.partition("{\n            ")[2].partition("}")[0].replace("\n", "").split(",")]
    assert numbers == [*range(128), *range(-128, 0)]


def test_wide_interpolations_count_in_64_bits() -> None:
    assert "typedef int accum_t" in interpolate_kernel(_taps(4, 8, "half_pixel"), _taps(4, 8, "half_pixel"), [1, 4, 4, 1], 0).body
    wide = interpolate_kernel(_taps(100, 9973, "half_pixel"), _taps(100, 9973, "half_pixel"), [1, 100, 100, 1], 0)
    assert "typedef long long accum_t" in wide.body
