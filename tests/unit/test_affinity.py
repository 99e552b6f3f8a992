# SPDX-License-Identifier: Apache-2.0
"""Processors by number: what is read, what the system grants, and what is said where it does not."""

from __future__ import annotations

import contextlib
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus import affinity
from isthmus.affinity import parse_cpus, pinned
from isthmus.errors import IsthmusError


@pytest.mark.parametrize(("text", "cpus"), [("0", (0,)), ("0,2-3", (0, 2, 3)), ("3-3, 1", (1, 3)), ("1,1", (1,))])
def test_what_is_read(text, cpus):
    assert parse_cpus(text) == cpus


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "3-2", "0-99999999", "1,,2", "²"])
def test_what_is_not(text):
    with pytest.raises(IsthmusError, match="--pin"):
        parse_cpus(text)


@given(st.text(alphabet="0123456789,- x", max_size=12))
def test_any_text_is_read_or_refused(text):
    with contextlib.suppress(IsthmusError):
        assert all(0 <= cpu < affinity.MOST_CPUS for cpu in parse_cpus(text))


def test_the_process_is_pinned_and_let_go():
    before = os.sched_getaffinity(0)
    one = min(before)
    with pinned((one,)):
        assert os.sched_getaffinity(0) == {one}
    assert os.sched_getaffinity(0) == before
    with pinned(None):
        assert os.sched_getaffinity(0) == before


def test_a_processor_that_is_not_there():
    before = os.sched_getaffinity(0)
    with pytest.raises(IsthmusError, match=r"the processors 4095 are not all there for this process: it may use"), pinned((4095,)):
        pass
    with pytest.raises(IsthmusError, match="got only"), pinned((min(before), 4095)):
        pass
    assert os.sched_getaffinity(0) == before


def test_a_system_that_forbids_it(monkeypatch):
    def refuses(process: int, cpus: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "sched_setaffinity", refuses)
    with pytest.raises(IsthmusError, match="no permission to run on the processors 0"), pinned((0,)):
        pass
    monkeypatch.delattr(os, "sched_setaffinity")
    with pytest.raises(IsthmusError, match="cannot keep a process on a processor"), pinned((0,)):
        pass
