# SPDX-License-Identifier: Apache-2.0
"""Types that hold every value, and multipliers that fit the board."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.errors import ProblemsError
from isthmus.targets.hls4ml.fixed import Fixed, activation_type, average_type, exact_weights, holding, widened
from isthmus.targets.hls4ml.folding import Product, fold
from isthmus.targets.hls4ml.lower import lower


def test_accumulators_hold_the_worst_sums_and_no_more(hls: Any) -> None:
    graph = hls.classifier()
    for node in graph.nodes:
        if node.weight is None:
            continue
        found = exact_weights(node, graph.tensors[node.inputs[0]].scale or 0)
        rows = found.values.reshape(len(found.values), -1)
        highest = int((np.where(rows > 0, rows * 127, rows * -128).sum(axis=1) + np.maximum(found.bias, 0)).max())
        assert 2 ** (found.accumulator.bits - 2) <= max(highest, 2) * 2
        assert highest < 2 ** (found.accumulator.bits - 1)


@given(st.integers(1, 130), st.integers(-6, 6), st.data())
def test_an_average_is_rounded_once(cells: int, shift: int, data: st.DataObject) -> None:
    """What the HLS code does (cut towards zero, then half to even) against exact fractions."""
    total = data.draw(st.integers(-128 * cells, 127 * cells))
    of = average_type(cells, 2.0**-3, 2.0 ** (-3 + shift))
    source, target = 3, 3 - shift
    scaled = total * 2 ** (of.fraction - source)
    assert of.fraction >= source and -(2 ** (of.bits - 1)) <= scaled < 2 ** (of.bits - 1)
    cut = abs(scaled) // cells * (1 if scaled >= 0 else -1)
    assert round(Fraction(cut) / Fraction(2) ** (of.fraction - target)) == round(Fraction(total, cells) / Fraction(2) ** (source - target))
    assert of.fraction - target < of.bits


def test_widths() -> None:
    assert str(holding(-128, 127, 4)) == "ap_fixed<8,4>"
    assert str(holding(-129, 0, 0)) == "ap_fixed<9,9>"
    assert str(activation_type(2.0**3)) == "ap_fixed<8,11,AP_RND_CONV,AP_SAT>"
    assert widened(Fixed(8, 3), activation_type(2.0**6)) == Fixed(10, 3)


def test_the_multipliers_fit_the_board(hls: Any) -> None:
    products = lower(hls.classifier()).products
    folding = fold(products, "auto", 0, 60)
    assert folding.multipliers <= 60 < sum(product.products for product in products)
    assert {layer["Strategy"] for layer in folding.layers.values()} == {"resource"}
    for product in products:
        # hls4ml 1.3.0 computes wrong sums, in io_parallel, where the reuse factor is a multiple of the terms
        assert product.terms % folding.layers[product.layer]["ReuseFactor"] == 0
    assert {layer["Strategy"] for layer in fold(products, "auto", 0, 10**6).layers.values()} == {"latency"}
    assert fold([Product("n", "n", 9, 4, 1, depthwise=True)], "resource", 5, 1).layers == {"n": {"Strategy": "latency", "ReuseFactor": 1}}
    with pytest.raises(ProblemsError, match=r"5000 multiplications at once.*\[unroll-limit\]; use --set strategy=resource"):
        fold([Product("n", "wide", 50, 100, 1)], "latency", 1, 220)
