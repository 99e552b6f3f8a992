# SPDX-License-Identifier: Apache-2.0
"""The harness: percentiles, stopping rules, early ends, interleaving and the file format, on a clock and engines that the test moves."""

from __future__ import annotations

import gc
import json
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus import bench
from isthmus.bench import BLOCK_COUNT, NullSession, Rules
from isthmus.errors import IsthmusError
from isthmus.measurement import Measurement, pooled, ratio_interval, required_count
from isthmus.session import Session
from isthmus.spec import TensorSpec

MILLISECOND = 1_000_000
IMAGE = TensorSpec("image", (1, 4), "int8", scale=0.5, zero_point=0)
FEEDS = {"image": np.zeros((1, 4), np.int8)}


class Clock:
    """Stands still unless an engine moves it."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now


class Scripted(Session):
    """Takes `latency_ns(n)` of the test's clock for its n-th run, and can raise at one."""

    engine = "scripted"
    version = "7"

    def __init__(self, clock: Clock, latency_ns, fails_at: int | None = None) -> None:
        super().__init__((IMAGE,), (TensorSpec("logits", (1, 2), "int8", scale=1.0, zero_point=0),))
        self.clock = clock
        self.latency_ns = latency_ns if callable(latency_ns) else lambda run: latency_ns
        self.fails_at = fails_at
        self.runs = 0
        self.collecting = []

    def _run_raw(self, feeds):
        if self.runs == self.fails_at:
            raise RuntimeError("the device went away")
        self.clock.now += self.latency_ns(self.runs)
        self.runs += 1
        self.collecting.append(gc.isenabled())
        return {}


def taken(samples, **changes) -> Measurement:
    return Measurement("SingleStream", np.array(samples, np.int64), 0, len(samples), 1000, **changes)


def measure(session, feeds, *, clock=time.perf_counter_ns, **rules) -> Measurement:
    return bench.measure(session, feeds, Rules(**rules), clock=clock)


def measure_interleaved(sessions, *, clock=time.perf_counter_ns, **rules) -> dict[str, Measurement]:
    return bench.measure_interleaved(sessions, Rules(**rules), clock=clock)


# ---- percentiles
def test_percentiles_are_nearest_rank():
    hundred = taken(range(100, 0, -1))
    assert (hundred.p50_ns, hundred.p90_ns, hundred.p99_ns) == (50, 90, 99)
    assert hundred.percentile_ns(100) == 100
    assert hundred.percentile_ns(99.5) == 100
    assert hundred.mean_ns == 50.5
    assert taken(range(1, 1001)).percentile_ns(99.9) == 999
    assert taken([7]).p99_ns == 7


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=60), st.sampled_from([1, 10, 50, 90, 95, 99, 99.9, 100]))
def test_percentile_is_a_sample_that_enough_do_not_exceed(samples, percentile):
    value = taken(samples).percentile_ns(percentile)
    at_most = sum(sample <= value for sample in samples)
    below = sum(sample < value for sample in samples)
    assert value in samples
    assert at_most >= percentile / 100 * len(samples) - 1e-6 > below - 1e-3


def test_percentile_outside_its_range():
    for percentile in (0, -1, 100.1, float("nan")):
        with pytest.raises(IsthmusError, match="is not above 0 and at most 100"):
            taken([1]).percentile_ns(percentile)


def test_required_count_is_the_early_stopping_floor():
    # 64 and 662 are what MLPerf's loadgen asks of a single stream for p90 and p99.
    assert [required_count(percentile) for percentile in (50, 90, 99, 99.9)] == [11, 64, 662, 6636]
    with pytest.raises(IsthmusError, match="not between 0 and 100"):
        required_count(100)


# ---- stopping
def test_count_and_duration_are_both_reached():
    clock = Clock()
    by_count = measure(Scripted(clock, 2 * MILLISECOND), FEEDS, min_duration_s=0.1, percentile=90, clock=clock)
    assert by_count.valid
    assert 64 <= by_count.count < 64 + BLOCK_COUNT
    by_duration = measure(Scripted(clock, 2 * MILLISECOND), FEEDS, min_duration_s=3, percentile=90, clock=clock)
    assert by_duration.valid
    assert 1500 <= by_duration.count < 1500 + BLOCK_COUNT
    asked = measure(Scripted(clock, MILLISECOND), FEEDS, min_duration_s=0, min_count=2000, clock=clock)
    assert 2000 <= asked.count < 2000 + BLOCK_COUNT


def test_figures_of_a_known_series():
    clock = Clock()
    result = measure(Scripted(clock, lambda run: (1 + (run % 10 == 9)) * MILLISECOND), FEEDS, percentile=90, clock=clock)
    assert (result.p50_ns, result.p99_ns) == (MILLISECOND, 2 * MILLISECOND)
    assert result.mean_ns == pytest.approx(1.1 * MILLISECOND, rel=0.01)


def test_time_limit_keeps_the_part_and_marks_it():
    clock = Clock()
    result = measure(Scripted(clock, 100 * MILLISECOND), FEEDS, min_duration_s=1, max_duration_s=2, clock=clock)
    assert not result.valid
    assert result.count == 20
    assert result.p50_ns == 100 * MILLISECOND
    assert not result.supports(99)
    assert result.reasons == ("time limit of 2 s: 20 of 662 samples in 2.00 of 1 s",)


def test_engine_that_raises_keeps_the_part_and_marks_it():
    clock = Clock()
    session = Scripted(clock, MILLISECOND, fails_at=300)
    result = measure(session, FEEDS, clock=clock)
    assert not result.valid
    assert result.count == 300 - result.warmup_count > 0
    assert result.reasons == (f"scripted raised RuntimeError: the device went away (after {result.count} samples)",)
    assert gc.isenabled()


def test_engine_that_never_runs():
    clock = Clock()
    result = measure(Scripted(clock, MILLISECOND, fails_at=0), FEEDS, clock=clock)
    assert (result.valid, result.count) == (False, 0)
    assert result.figures() == dict.fromkeys(("mean_ns", "min_ns", "p50_ns", "p90_ns", "p99_ns", "max_ns", "throughput_per_s")) | {"count": 0}
    with pytest.raises(IsthmusError, match="without samples: scripted raised RuntimeError"):
        result.p50_ns  # noqa: B018
    assert Measurement.from_json(json.loads(json.dumps(result.to_json()))).to_json() == result.to_json()


# ---- warm-up
def test_warm_up_waits_until_the_median_settles():
    clock = Clock()
    result = measure(Scripted(clock, lambda run: max(50 - run, 10) * MILLISECOND), FEEDS, min_duration_s=0, percentile=50, clock=clock)
    assert result.valid
    assert result.warmup_count >= 40
    assert result.p99_ns == 10 * MILLISECOND


def test_warm_up_that_never_settles_is_marked():
    clock = Clock()
    slower = measure(Scripted(clock, lambda run: MILLISECOND * 2 ** min(run // 5, 30)), FEEDS, max_warmup_s=1, max_duration_s=10, percentile=50, clock=clock)
    assert not slower.valid
    assert any("warm-up did not settle" in reason for reason in slower.reasons)
    assert slower.conditions["warmup_settled"] is False


def test_warm_up_of_a_very_slow_engine_is_bounded():
    clock = Clock()
    result = measure(Scripted(clock, 6_000 * MILLISECOND), FEEDS, max_warmup_s=10, max_duration_s=20, percentile=50, clock=clock)
    assert result.warmup_count == 2


# ---- conditions
def test_conditions_say_what_a_reader_needs():
    result = measure(NullSession(), {}, min_duration_s=0.01, threads=3)
    assert result.valid
    expected = {"host", "cpu_model", "cpu_count", "governor", "clock_khz", "load_average", "date", "python", "numpy", "platform", "engine", "engine_version"}
    assert expected <= set(result.conditions)
    assert result.conditions["threads"] == 3
    assert result.conditions["clock"] == "perf_counter_ns"
    assert 0 < result.conditions["harness_overhead_ns"] < 100_000
    assert abs(result.p50_ns - result.conditions["harness_overhead_ns"]) < 20_000
    assert result.energy_j is None


def test_garbage_collector_is_off_only_while_timing():
    clock = Clock()
    session = Scripted(clock, MILLISECOND)
    measure(session, FEEDS, percentile=50, min_duration_s=0, clock=clock)
    assert not any(session.collecting)
    assert gc.isenabled()
    gc.disable()
    try:
        measure(session, FEEDS, percentile=50, min_duration_s=0, clock=clock)
        assert not gc.isenabled()
    finally:
        gc.enable()


# ---- bad input
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 0}, "threads must be above 0, found 0"),
        ({"min_count": 0}, "min_count must be above 0"),
        ({"min_count": -5}, "min_count must be above 0, found -5"),
        ({"max_duration_s": 0}, "max_duration_s must be above 0"),
        ({"max_warmup_s": float("nan")}, "max_warmup_s must be above 0"),
        ({"min_duration_s": -1}, "min_duration_s must lie between 0 and max_duration_s"),
        ({"min_duration_s": 2, "max_duration_s": 1}, "min_duration_s must lie between 0 and max_duration_s"),
        ({"percentile": 100}, "percentile 100 is not between 0 and 100"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(IsthmusError, match=message):
        measure(NullSession(), {}, **options)


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({}, r"expected the inputs \['image'\], found \[\]"),
        ({**FEEDS, "other": FEEDS["image"]}, r"found \['image', 'other'\]"),
        ({"image": np.zeros((1, 5), np.int8)}, r"expected raw int8\[1, 4\], found int8\[1, 5\]"),
        ({"image": np.zeros((1, 4), np.float32)}, r"expected raw int8\[1, 4\], found float32\[1, 4\]"),
    ],
)
def test_feeds_that_are_not_the_engines(feeds, message):
    clock = Clock()
    session = Scripted(clock, MILLISECOND)
    with pytest.raises(IsthmusError, match=message):
        measure(session, feeds, clock=clock)
    assert session.runs == 0


def test_nothing_to_measure():
    with pytest.raises(IsthmusError, match="no session given"):
        measure_interleaved({})


# ---- several
def test_drift_hits_all_alike():
    clock = Clock()

    def slowing(factor):  # both slow down together, to three times the latency
        return lambda run: round(factor * MILLISECOND * (1 + 2 * min(clock.now / 10e9, 1)))

    sessions = {"a": (Scripted(clock, slowing(2)), FEEDS), "b": (Scripted(clock, slowing(1)), FEEDS)}
    results = measure_interleaved(sessions, min_duration_s=3, clock=clock)
    assert results["a"].valid
    assert results["b"].valid
    assert results["a"].count == results["b"].count
    ratio, low, high = ratio_interval(results["a"], results["b"])
    assert low <= ratio <= high
    assert ratio == pytest.approx(2, rel=0.03)
    assert high - low < 0.1
    assert results["a"].conditions["interleaved"] == ["a", "b"]


def test_one_that_fails_does_not_stop_the_other():
    clock = Clock()
    sessions = {"good": (Scripted(clock, MILLISECOND), FEEDS), "bad": (Scripted(clock, MILLISECOND, fails_at=150), FEEDS)}
    results = measure_interleaved(sessions, clock=clock, percentile=90)
    assert results["good"].valid
    assert results["good"].count >= 1000
    assert not results["bad"].valid
    assert "raised RuntimeError" in results["bad"].reasons[0]


def test_ratio_interval_covers_the_truth():
    random = np.random.default_rng(3)
    inside = 0
    for _ in range(40):
        a, b = (taken(np.round(scale * random.lognormal(0, 0.2, 700))) for scale in (3e6, 2e6))
        ratio, low, high = ratio_interval(a, b, resamples=300)
        assert low <= ratio <= high or ratio == pytest.approx(1.5, rel=0.1)
        inside += low <= 1.5 <= high
    assert inside >= 33  # 95 % nominal: 33 or fewer of 40 happens once in 1,000


def test_ratio_needs_samples():
    with pytest.raises(IsthmusError, match="at least 2 samples on each side, found 1 and 2"):
        ratio_interval(taken([1]), taken([1, 2]))
    with pytest.raises(IsthmusError, match="confidence between 0 and 1"):
        ratio_interval(taken([1, 2]), taken([1, 2]), confidence=1)


# ---- the file
def test_json_round_trip_of_a_real_run():
    result = measure(NullSession(), {}, min_duration_s=0.01)
    again = Measurement.from_json(json.loads(json.dumps(result.to_json())))
    assert again.to_json() == result.to_json()
    assert again.samples_ns.dtype == np.int64
    assert np.array_equal(again.samples_ns, result.samples_ns)
    assert result.to_json()["figures"]["p99_ns"] == result.p99_ns


@given(
    st.lists(st.integers(0, 2**63 - 1), max_size=8),
    st.integers(0, 10**6),
    st.dictionaries(st.text(max_size=5), st.none() | st.integers() | st.text(max_size=5), max_size=3),
    st.none() | st.floats(0, 1e3),
    st.lists(st.text(max_size=9), max_size=2),
)
def test_json_round_trip(samples, warmup, conditions, energy, reasons):
    result = taken(samples, conditions=conditions, energy_j=energy, valid=bool(samples) and not reasons, reasons=tuple(reasons))
    data = json.loads(json.dumps({**result.to_json(), "warmup_count": warmup}))
    again = Measurement.from_json(data)
    assert again.to_json() == data
    assert again.reasons == tuple(reasons)


@given(
    st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3), lambda inner: st.lists(inner, max_size=3), max_leaves=6),
    st.data(),
)
def test_damaged_file_is_refused_in_one_sentence(value, data):
    good = taken([1, 2, 3]).to_json()
    field = data.draw(st.sampled_from([*good, "surprise"]))
    broken = {**good, field: value}
    try:
        assert Measurement.from_json(broken).count >= 0
    except IsthmusError as error:
        assert str(error).startswith("measurement")


def test_damaged_file_by_name():
    good = taken([1, 2, 3]).to_json()
    for broken, message in [
        ({**good, "schema": 1}, "schema 1, this version reads schema 2"),
        ([], "schema 'list'"),
        ({key: value for key, value in good.items() if key != "reasons"}, "field 'reasons' is missing"),
        ({**good, "extra": 1}, "field 'extra' is unknown"),
        ({**good, "samples_ns": [1, -2]}, "whole nanoseconds"),
        ({**good, "samples_ns": [1.5]}, "whole nanoseconds"),
        ({**good, "samples_ns": [2**63]}, "whole nanoseconds"),
        ({**good, "valid": 1}, "field 'valid' expects bool, found int"),
        ({**good, "samples_ns": []}, "a valid one has samples"),
    ]:
        with pytest.raises(IsthmusError, match=message):
            Measurement.from_json(broken)


def test_samples_cannot_be_changed():
    result = taken([3, 1, 2])
    with pytest.raises(ValueError, match="read-only"):
        result.samples_ns[0] = 0
    assert result.samples_ns.tolist() == [3, 1, 2]
    with pytest.raises(IsthmusError, match="0 ns or more"):
        taken([-1])


# ---- the scenarios
def test_multi_stream_times_whole_queries():
    clock = Clock()
    session = Scripted(clock, MILLISECOND)
    result = measure(session, FEEDS, scenario="MultiStream", samples_per_query=8, percentile=90, clock=clock)
    assert result.valid
    assert set(result.samples_ns.tolist()) == {8 * MILLISECOND}
    assert result.inference_count == 8 * result.count
    assert result.throughput_per_s == pytest.approx(1000)
    assert Measurement.from_json(json.loads(json.dumps(result.to_json()))).to_json() == result.to_json()


def test_feeds_are_taken_in_turn():
    clock = Clock()
    seen = []

    class Watching(Scripted):
        def _run_raw(self, feeds):
            seen.append(int(feeds["image"][0, 0]))
            return super()._run_raw(feeds)

    feeds = [{"image": np.full((1, 4), value, np.int8)} for value in range(3)]
    measure(Watching(clock, MILLISECOND), feeds, percentile=50, min_duration_s=0, clock=clock)
    assert seen[:7] == [0, 1, 2, 0, 1, 2, 0]


class Sleeping(Session):
    """A real engine's ways: it takes time, and another thread may run meanwhile."""

    engine = "sleeping"
    version = "1"

    def __init__(self, seconds: float = 0.001, hangs_at: int = -1) -> None:
        super().__init__((IMAGE,), (TensorSpec("logits", (1, 2), "int8", scale=1.0, zero_point=0),))
        self.seconds, self.hangs_at, self.runs, self.closed = seconds, hangs_at, 0, False
        self.release = threading.Event()

    def _run_raw(self, feeds):
        self.runs += 1
        if self.runs == self.hangs_at:
            self.release.wait(60)
        time.sleep(self.seconds)
        return {}

    def _close(self):
        self.closed = True


def test_offline_counts_all_streams():
    sessions = [Sleeping(), Sleeping()]
    result = bench.measure_offline(sessions, FEEDS, Rules(scenario="Offline", min_count=40, min_duration_s=0.05, max_warmup_s=0.1))
    assert result.scenario == "Offline"
    assert result.inference_count == result.count >= 40
    assert all(session.runs > 1 for session in sessions)
    assert result.throughput_per_s == pytest.approx(result.count / result.elapsed_ns * 1e9)
    assert result.conditions["streams"] == 2
    one = measure(Sleeping(), FEEDS, scenario="Offline", min_count=5, min_duration_s=0, max_warmup_s=0.1)
    assert one.count >= 5
    assert one.conditions["streams"] == 1


def test_offline_that_is_too_slow_is_marked():
    result = measure(Sleeping(), FEEDS, scenario="Offline", min_count=10**6, min_duration_s=0.01, max_duration_s=0.05, max_warmup_s=0.1)
    assert not result.valid
    assert any(f"time limit of 0.05 s: {result.count} of 1000000 samples" in reason for reason in result.reasons)


def test_offline_needs_the_machine_for_itself():
    with pytest.raises(IsthmusError, match="one after the other"):
        measure_interleaved({"a": (Sleeping(), FEEDS)}, scenario="Offline")


@pytest.mark.parametrize("scenario", ["SingleStream", "Offline"])
def test_an_engine_that_hangs_is_given_up(scenario):
    session = Sleeping(0.0001, hangs_at=100)  # warm-up ends after 5 ms: at most 50 runs; on a busy machine each of the others may take milliseconds
    result = measure(session, FEEDS, scenario=scenario, min_count=10**6, min_duration_s=0.1, max_duration_s=2.0, max_warmup_s=0.005, hang_grace_s=0.1)
    assert not result.valid
    assert "did not come back within" in result.reasons[0]
    assert 0 < result.count < 100
    session.close()
    assert not session.closed, "a session whose run has not ended must not be closed"
    session.release.set()
    assert gc.isenabled()


def test_an_unknown_scenario_is_named():
    with pytest.raises(IsthmusError, match="scenario 'Server' is unknown: there are SingleStream, MultiStream, Offline"):
        Rules(scenario="Server")
    with pytest.raises(IsthmusError, match="no feeds"):
        measure(Sleeping(), [])


# ---- energy
class Meter:
    """Ten watts idle; one joule more for each run of the session."""

    source = "a meter of the test"

    def __init__(self, session: Sleeping, joules_each: float) -> None:
        self.session, self.joules_each, self.running = session, joules_each, False

    def start(self):
        self.running, self.begun = True, time.perf_counter()

    def energy_j(self):
        assert self.running
        return 10 * (time.perf_counter() - self.begun) + self.joules_each * self.session.runs

    def stop(self):
        self.running = False


def test_idle_power_is_subtracted():
    session = Sleeping()
    meter = Meter(session, 1.0)
    result = bench.measure(session, FEEDS, Rules(min_duration_s=0.1, percentile=50, idle_s=0.05, max_warmup_s=0.1), meter=meter)
    assert result.energy_j == pytest.approx(1.0, rel=0.05)
    assert result.conditions["energy"]["source"] == "a meter of the test"
    assert result.conditions["energy"]["idle_w"] == pytest.approx(10, rel=0.02)
    assert not meter.running


def test_energy_that_does_not_rise_above_idle_is_not_quoted():
    session = Sleeping()
    result = bench.measure(session, FEEDS, Rules(min_duration_s=0.05, percentile=50, idle_s=0.05, max_warmup_s=0.1), meter=Meter(session, -1.0))
    assert result.energy_j is None
    assert measure(Sleeping(), FEEDS, percentile=50, min_duration_s=0, max_warmup_s=0.1).conditions["energy"] == "no power meter was read"


# ---- pooling
def test_rounds_are_pooled_into_one():
    parts = [taken([10, 20], conditions={"round": index}) for index in range(2)] + [taken([30, 40], valid=False, reasons=("too few",))]
    whole = pooled(parts)
    assert whole.samples_ns.tolist() == [10, 20, 10, 20, 30, 40]
    assert (whole.inference_count, whole.elapsed_ns, whole.conditions["round"]) == (6, 3000, 0)
    assert not whole.valid and whole.reasons == ("too few",)
    with pytest.raises(IsthmusError, match="0 measurements to pool"):
        pooled([])
