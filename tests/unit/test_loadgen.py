# SPDX-License-Identifier: Apache-2.0
"""MLCommons' LoadGen over a session: the same scenarios, its verdict, and what it says where an engine fails."""

from __future__ import annotations

import sys
import time

import numpy as np
import pytest

from isthmus.bench import Rules
from isthmus.errors import IsthmusError
from isthmus.loadgen import measure_by_loadgen
from isthmus.session import Session
from isthmus.spec import TensorSpec

IMAGE = TensorSpec("image", (1, 4), "int8", scale=0.5, zero_point=0)
FEEDS = [{"image": np.full((1, 4), value, np.int8)} for value in range(3)]


class Sleeping(Session):
    engine = "sleeping"
    version = "1"

    def __init__(self, fails: bool = False) -> None:
        super().__init__((IMAGE,), (IMAGE,))
        self.fails = fails

    def _run_raw(self, feeds):
        if self.fails:
            raise RuntimeError("the device went away")
        time.sleep(0.0005)
        return {}


@pytest.mark.parametrize(("scenario", "runs"), [("SingleStream", 1), ("MultiStream", 4), ("Offline", 1)])
def test_loadgen_drives_each_scenario(scenario, runs, require):
    require("loadgen")
    result = measure_by_loadgen(Sleeping(), FEEDS, Rules(scenario=scenario, min_count=20, min_duration_s=0.05, percentile=50, samples_per_query=4))
    assert result.valid, result.reasons
    assert result.inference_count == runs * result.count >= 20
    assert result.p50_ns >= runs * 500_000
    assert str(result.conditions["harness"]).startswith("mlcommons-loadgen")
    assert result.conditions["loadgen"]["result_validity"] == "VALID"


def test_loadgen_says_what_is_not_valid(require):
    require("loadgen")
    result = measure_by_loadgen(Sleeping(), FEEDS, Rules(min_count=10**6, min_duration_s=0.01, max_duration_s=0.05, percentile=90))
    assert not result.valid
    assert result.reasons[0].startswith("LoadGen: ")


def test_an_engine_that_raises_under_loadgen(require):
    require("loadgen")
    session = Sleeping()
    session.run_raw = _Later(session)
    with pytest.raises(IsthmusError, match="sleeping raised RuntimeError: the device went away"):
        measure_by_loadgen(session, FEEDS, Rules(min_duration_s=0.05, percentile=50))


class _Later:
    """Works through the warm-up, then fails."""

    def __init__(self, session: Sleeping) -> None:
        self.session, self.runs = session, 0

    def __call__(self, feeds):
        self.runs += 1
        self.session.fails = self.runs > 70
        return self.session._run_raw(feeds)


def test_loadgen_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlperf_loadgen", None)
    with pytest.raises(IsthmusError, match="pip install mlcommons-loadgen"):
        measure_by_loadgen(Sleeping(), FEEDS, Rules())
