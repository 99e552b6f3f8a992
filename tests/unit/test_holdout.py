# SPDX-License-Identifier: Apache-2.0
"""A user's samples in two parts: what is learnt from, what is judged on."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.dataset import Dataset
from isthmus.holdout import LEAST, MOST_JUDGED, hold_out


def numbered(count: int, labelled: bool = True) -> Dataset:
    return Dataset({"x": np.arange(count, dtype=np.float32)[:, None]}, np.arange(count) if labelled else None, "numbers")


@given(st.integers(1, 400), st.integers(1, 9), st.integers(0, 3))
def test_no_sample_is_on_both_sides_and_none_is_lost(batches: int, batch: int, seed: int) -> None:
    data = numbered(batches * batch)
    rest, judged, told = hold_out(data, batch, seed)
    if rest is data:
        assert judged is data and told.startswith("warning:") and (len(data) < LEAST or len(data) < 2 * batch)
        return
    rows = np.concatenate([rest.samples["x"][:, 0], judged.samples["x"][:, 0]])
    assert sorted(rows) == list(range(len(data)))
    assert len(rest) % batch == 0 and len(judged) % batch == 0 and 0 < len(judged) <= MOST_JUDGED
    for part in (rest, judged):
        assert part.labels is not None
        np.testing.assert_array_equal(part.labels, part.samples["x"][:, 0])


def test_the_seed_decides() -> None:
    first, again, other = (hold_out(numbered(100, labelled=False), 1, seed)[1].samples["x"] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize(("count", "expected"), [(64, (32, 32)), (101, (51, 50)), (5000, (4000, 1000))])
def test_the_sizes(count: int, expected: tuple[int, int]) -> None:
    rest, judged, told = hold_out(numbered(count), 1, 0)
    assert (len(rest), len(judged)) == expected
    assert told == f"numbers: {expected[0]} samples learnt from, {expected[1]} others judged on (drawn with seed 0)"
    assert (rest.source, judged.source) == ("numbers: learnt from", "numbers: held out")
