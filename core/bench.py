# SPDX-License-Identifier: Apache-2.0
"""The harness: raw latency samples of any `Session`, with what they were taken under. numpy only: devices import it.

It knows no model and no engine. One scenario so far, "SingleStream": one request at a time, the next when the last one has ended.

- Clock: `time.perf_counter_ns` on both sides of `Session.run_raw`; raw samples are kept, in the order taken, never averaged away.
- Percentiles are nearest-rank: the smallest sample that at least p percent of all samples do not exceed. Nothing is interpolated, so a
  percentile is a latency that really occurred, and a tail is never reported below what was seen.
- Enough samples: `required_count(p)` is the smallest n for which, with 99 % confidence, at least two of n independent samples lie above
  the true percentile (p50: 11, p90: 64, p99: 662). It is the floor of MLPerf's early stopping (mlcommons/inference,
  loadgen/early_stopping.cc: one sample discarded, confidence 0.99, tolerance 0). Fewer samples: `valid` is False.
"""

from __future__ import annotations

import gc
import math
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from isthmus.conditions import host_conditions
from isthmus.errors import IsthmusError
from isthmus.session import Arrays, Session
from isthmus.spec import TensorSpec

SCHEMA = 1
SINGLE_STREAM = "SingleStream"
PERCENTILES = (50.0, 90.0, 99.0)
CONFIDENCE = 0.99

# Warm-up: caches, page faults, lazy initialisation, clock governors. A window is long enough for a governor to react.
WARMUP_WINDOW_COUNT = 5
WARMUP_WINDOW_NS = 50_000_000
WARMUP_TOLERANCE = 0.05

BLOCK_COUNT = 16  # samples in a row of one session while several take turns
OVERHEAD_COUNT = 2000
BATCHES = 50  # of consecutive samples, drawn as a whole by the bootstrap
THINNED_COUNT = 20_000

Clock = Callable[[], int]


@dataclass(frozen=True, eq=False)
class Measurement:
    """Raw samples of one session and what they were taken under. `valid` is False where `reasons` say why the figures may not be quoted.

    `energy_j` is the mean energy of one inference where a power meter was read, else None.
    """

    scenario: str
    samples_ns: np.ndarray
    warmup_count: int
    conditions: Mapping[str, Any] = field(default_factory=dict)
    energy_j: float | None = None
    valid: bool = True
    reasons: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        samples = np.array(self.samples_ns, dtype=np.int64)
        if samples.ndim != 1 or (samples.size and samples.min() < 0):
            raise IsthmusError(f"measurement: samples must be a list of times of 0 ns or more, found shape {list(samples.shape)}")
        if self.valid and (self.reasons or not samples.size):
            raise IsthmusError("measurement: a valid one has samples and no reasons against it")
        samples.setflags(write=False)
        object.__setattr__(self, "samples_ns", samples)

    @property
    def count(self) -> int:
        return int(self.samples_ns.size)

    @property
    def mean_ns(self) -> float:
        self._needs_samples()
        return float(self.samples_ns.mean())

    @property
    def p50_ns(self) -> int:
        return self.percentile_ns(50)

    @property
    def p90_ns(self) -> int:
        return self.percentile_ns(90)

    @property
    def p99_ns(self) -> int:
        return self.percentile_ns(99)

    def percentile_ns(self, percentile: float) -> int:
        """The nearest-rank percentile. Raises `IsthmusError` without samples, or where it is not above 0 and at most 100."""
        self._needs_samples()
        if not 0 < percentile <= 100:
            raise IsthmusError(f"percentile {percentile} is not above 0 and at most 100")
        # Rounding first: 99.9 / 100 * 1000 is a hair above 999 in binary and would take the rank after it.
        rank = math.ceil(round(percentile / 100 * self.count, 9))
        return int(np.partition(self.samples_ns, rank - 1)[rank - 1])

    def supports(self, percentile: float) -> bool:
        """Whether there are enough samples to quote this percentile."""
        return self.count >= required_count(percentile)

    def figures(self) -> dict[str, float | int | None]:
        """count, mean, min, max and the usual percentiles, None where there is no sample: what `--json` prints."""
        known = self.count > 0
        return {
            "count": self.count,
            "mean_ns": self.mean_ns if known else None,
            "min_ns": int(self.samples_ns.min()) if known else None,
            **{f"p{percentile:g}_ns": self.percentile_ns(percentile) if known else None for percentile in PERCENTILES},
            "max_ns": int(self.samples_ns.max()) if known else None,
        }

    def to_json(self) -> dict[str, Any]:
        """Plain data. `figures` is there for a reader of the file; `from_json` computes it anew from the samples."""
        return {
            "schema": SCHEMA,
            "scenario": self.scenario,
            "valid": self.valid,
            "reasons": list(self.reasons),
            "figures": self.figures(),
            "warmup_count": self.warmup_count,
            "conditions": dict(self.conditions),
            "energy_j": self.energy_j,
            "samples_ns": self.samples_ns.tolist(),
        }

    @classmethod
    def from_json(cls, data: Any) -> Measurement:
        """Raises `IsthmusError` on an unknown schema, a missing or unknown field, or a value of another type."""
        if not isinstance(data, Mapping) or data.get("schema") != SCHEMA:
            found = data.get("schema") if isinstance(data, Mapping) else type(data).__name__
            raise IsthmusError(f"measurement: schema {found!r}, this version reads schema {SCHEMA}")
        wrong = sorted(set(data) ^ {"schema", "figures", *_JSON_TYPES})
        if wrong:
            raise IsthmusError(f"measurement: field {wrong[0]!r} is {'unknown' if wrong[0] in data else 'missing'}")
        for name, kinds in _JSON_TYPES.items():
            if not isinstance(data[name], kinds) or (isinstance(data[name], bool) and bool not in kinds):
                raise IsthmusError(f"measurement: field {name!r} expects {' or '.join(kind.__name__ for kind in kinds)}, found {type(data[name]).__name__}")
        if not all(type(sample) is int and 0 <= sample < 2**63 for sample in data["samples_ns"]):
            raise IsthmusError("measurement: field 'samples_ns' expects whole nanoseconds from 0 to 2^63 - 1")
        if not all(isinstance(reason, str) for reason in data["reasons"]):
            raise IsthmusError("measurement: field 'reasons' expects sentences")
        values = {name: data[name] for name in _JSON_TYPES}
        return cls(**{**values, "samples_ns": np.array(data["samples_ns"], np.int64), "reasons": tuple(data["reasons"])})

    def _needs_samples(self) -> None:
        if not self.count:
            raise IsthmusError(f"measurement without samples: {'; '.join(self.reasons)}")


_JSON_TYPES: dict[str, tuple[type, ...]] = {
    "scenario": (str,),
    "samples_ns": (list,),
    "warmup_count": (int,),
    "conditions": (dict,),
    "energy_j": (int, float, type(None)),
    "valid": (bool,),
    "reasons": (list,),
}


def required_count(percentile: float) -> int:
    """How many samples a percentile needs (see the module): P(Binomial(n, 1 - p) <= 1) < 1 - CONFIDENCE. Raises outside 0 < p < 100."""
    if not 0 < percentile < 100:
        raise IsthmusError(f"percentile {percentile} is not between 0 and 100")
    below = percentile / 100
    count = 2
    while below**count + count * (1 - below) * below ** (count - 1) >= 1 - CONFIDENCE:
        count += 1
    return count


def measure(
    session: Session,
    feeds_raw: Arrays,
    *,
    min_count: int = 1,
    min_duration_s: float = 1.0,
    max_duration_s: float = 60.0,
    max_warmup_s: float = 10.0,
    percentile: float = 99.0,
    threads: int = 1,
    clock: Clock = time.perf_counter_ns,
) -> Measurement:
    """Times `session.run_raw(feeds_raw)` one request after the other.

    Runs until `min_count` samples, `min_duration_s` and the samples `percentile` needs are all reached. The time limit, and an engine
    that raises, end it early: what was taken is kept and marked invalid with the reason. A single run that never returns cannot be
    interrupted from here. `threads` is recorded, not set: it is what the session was opened with.
    """
    return measure_interleaved(
        {session.engine: (session, feeds_raw)},
        min_count=min_count,
        min_duration_s=min_duration_s,
        max_duration_s=max_duration_s,
        max_warmup_s=max_warmup_s,
        percentile=percentile,
        threads=threads,
        clock=clock,
    )[session.engine]


def measure_interleaved(
    sessions: Mapping[str, tuple[Session, Arrays]],
    *,
    min_count: int = 1,
    min_duration_s: float = 1.0,
    max_duration_s: float = 60.0,
    max_warmup_s: float = 10.0,
    percentile: float = 99.0,
    threads: int = 1,
    clock: Clock = time.perf_counter_ns,
) -> dict[str, Measurement]:
    """Like `measure`, for several sessions that take turns, so that drift of the machine hits all alike.

    They change over every BLOCK_COUNT samples and who begins rotates; each turn starts with one untimed run, since the session before has
    just emptied the caches. All stop together, so that sample i of each was taken at about the same time. Limits count for each session.
    """
    if not sessions:
        raise IsthmusError("nothing to measure: no session given")
    for text, value in (("min_count", min_count), ("threads", threads), ("max_duration_s", max_duration_s), ("max_warmup_s", max_warmup_s)):
        if not value > 0:
            raise IsthmusError(f"{text} must be above 0, found {value}")
    if not 0 <= min_duration_s <= max_duration_s:
        raise IsthmusError(f"min_duration_s must lie between 0 and max_duration_s ({max_duration_s}), found {min_duration_s}")
    needed = max(min_count, required_count(percentile))
    for name, (session, feeds) in sessions.items():
        _check_feeds(name, session, feeds)

    conditions = host_conditions()
    series = {name: _Series(session, feeds, clock) for name, (session, feeds) in sessions.items()}
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        overhead_ns = _overhead_ns(clock)
        for one in series.values():
            one.warm_up(round(max_warmup_s * 1e9))
        _take_turns(list(series.values()), needed, round(min_duration_s * 1e9), round(max_duration_s * 1e9))
    finally:
        if was_enabled:
            gc.enable()

    conditions |= {
        "threads": threads,
        "clock": "perf_counter_ns" if clock is time.perf_counter_ns else "given by the caller",
        "clock_resolution_ns": time.get_clock_info("perf_counter").resolution * 1e9,
        "harness_overhead_ns": overhead_ns,
        "garbage_collector": "off while timing",
        "percentile": percentile,
        "required_count": needed,
        "min_duration_s": min_duration_s,
        "max_duration_s": max_duration_s,
        "interleaved": list(sessions) if len(sessions) > 1 else [],
    }
    return {name: one.measurement(conditions, needed, min_duration_s, max_duration_s) for name, one in series.items()}


class _Series:
    """The samples of one session while they are taken."""

    def __init__(self, session: Session, feeds: Arrays, clock: Clock) -> None:
        self.session = session
        self.feeds = feeds
        self.clock = clock
        self.samples_ns = array("q")
        self.spent_ns = 0
        self.warmup_count = 0
        self.warmup_change: float | None = None
        self.failure = ""

    def block(self, count: int, limit_ns: int, into: array[int] | None = None) -> None:
        """At most `count` timed runs, ended early once `limit_ns` of time in the engine are spent. An engine's error is kept as `failure`."""
        run, feeds, clock = self.session.run_raw, self.feeds, self.clock
        samples = self.samples_ns if into is None else into
        spent = 0
        try:
            for _ in range(count):
                before = clock()
                run(feeds)
                taken = clock() - before
                samples.append(taken)
                spent += taken
                if spent >= limit_ns:
                    break
        except Exception as error:  # noqa: BLE001 - an engine raises what it likes; the samples before it are worth keeping, marked invalid
            self.failure = f"{self.session.engine or 'the engine'} raised {type(error).__name__}: {str(error)[:300]}"
        if into is None:
            self.spent_ns += spent

    def warm_up(self, limit_ns: int) -> None:
        """Windows of runs until two medians in a row differ by less than WARMUP_TOLERANCE, two windows at least."""
        last: float | None = None
        spent = 0
        while True:
            window = self._window(limit_ns)
            self.warmup_count += len(window)
            if self.failure:
                return
            spent += sum(window)
            median = float(np.median(window))
            if last is not None:
                self.warmup_change = abs(median - last) / max(last, 1.0)
                if self.warmup_change <= WARMUP_TOLERANCE or spent >= limit_ns:
                    return
            last = median

    def _window(self, limit_ns: int) -> array[int]:
        """WARMUP_WINDOW_COUNT runs and WARMUP_WINDOW_NS at least; of an engine so slow that two of these pass the limit, half the limit."""
        window = array("q")
        spent = 0
        while not self.failure and (len(window) < WARMUP_WINDOW_COUNT or spent < WARMUP_WINDOW_NS) and spent < max(1, limit_ns // 2):
            start = len(window)
            self.block(max(WARMUP_WINDOW_COUNT, start), WARMUP_WINDOW_NS, into=window)
            spent += sum(window[start:])
        return window

    def lead_in(self) -> None:
        """One untimed run."""
        self.block(1, 1, into=array("q"))

    def is_enough(self, count: int, duration_ns: int) -> bool:
        return bool(self.failure) or (len(self.samples_ns) >= count and self.spent_ns >= duration_ns)

    def measurement(self, conditions: Mapping[str, Any], needed: int, min_duration_s: float, max_duration_s: float) -> Measurement:
        reasons = []
        if self.failure:
            reasons.append(f"{self.failure} (after {len(self.samples_ns)} samples)")
        elif not self.is_enough(needed, round(min_duration_s * 1e9)):
            taken = f"{len(self.samples_ns)} of {needed} samples in {self.spent_ns / 1e9:.2f} of {min_duration_s:g} s"
            reasons.append(f"time limit of {max_duration_s:g} s: {taken}")
        settled = self.warmup_change is not None and self.warmup_change <= WARMUP_TOLERANCE
        if not settled and not self.failure:
            reasons.append(f"warm-up did not settle: the last two windows differ by {self.warmup_change or 0:.0%}, {WARMUP_TOLERANCE:.0%} is allowed")
        own = {"engine": self.session.engine, "engine_version": str(getattr(self.session, "version", "")), "warmup_settled": settled}
        return Measurement(SINGLE_STREAM, np.array(self.samples_ns, np.int64), self.warmup_count, {**conditions, **own}, None, not reasons, tuple(reasons))


def _take_turns(series: Sequence[_Series], count: int, duration_ns: int, limit_ns: int) -> None:
    turn = 0
    while not all(one.is_enough(count, duration_ns) for one in series):
        running = [one for one in series if not one.failure]
        if any(one.spent_ns >= limit_ns for one in running):
            return
        for index in range(len(running)):
            one = running[(turn + index) % len(running)]
            if len(series) > 1:
                one.lead_in()
            if not one.failure:
                one.block(BLOCK_COUNT, limit_ns - one.spent_ns)
        turn += 1


class NullSession(Session):
    """Takes anything, does nothing: what the harness measures of it is the harness."""

    engine = "null"
    version = "1"

    def __init__(self) -> None:
        super().__init__((), (TensorSpec("nothing", (0,), "float32"),))
        self._result: dict[str, np.ndarray] = {}

    def _run_raw(self, feeds: Arrays) -> dict[str, np.ndarray]:
        return self._result


def _overhead_ns(clock: Clock) -> int:
    """The median of an empty run, through the same loop: what each sample holds of the harness itself. Recorded, never subtracted."""
    null = _Series(NullSession(), {}, clock)
    null.block(OVERHEAD_COUNT, 1_000_000_000)
    return int(np.median(null.samples_ns))


def _check_feeds(name: str, session: Session, feeds: Arrays) -> None:
    """`run_raw` checks nothing, so a wrong feed would be timed, or crash, in the engine."""
    names = [spec.name for spec in session.inputs]
    if sorted(feeds) != sorted(names):
        raise IsthmusError(f"session {name!r}: expected the inputs {names}, found {sorted(feeds)}")
    for spec in session.inputs:
        found = feeds[spec.name]
        if tuple(found.shape) != spec.shape or str(found.dtype) != spec.dtype:
            raise IsthmusError(f"session {name!r}, input {spec.name!r}: expected raw {spec.dtype}{list(spec.shape)}, found {found.dtype}{list(found.shape)}")


def ratio_interval(a: Measurement, b: Measurement, *, confidence: float = 0.95, resamples: int = 1000, seed: int = 0) -> tuple[float, float, float]:
    """(median a / median b, low, high): how many times as long `a` takes as `b`, with its bootstrap interval.

    Samples that follow each other are not independent (clocks, neighbours), so whole batches of consecutive samples are drawn, the same
    batches for both: after `measure_interleaved` a drift both went through cancels. Raises `IsthmusError` below 2 samples each.
    """
    batches = min(BATCHES, a.count, b.count)
    if batches < 2:
        raise IsthmusError(f"a ratio needs at least 2 samples on each side, found {a.count} and {b.count}")
    if not 0 < confidence < 1 or resamples < 1:
        raise IsthmusError(f"a ratio needs a confidence between 0 and 1 and at least one resample, found {confidence} and {resamples}")
    pieces_a, pieces_b = (np.array_split(_thinned(one.samples_ns), batches) for one in (a, b))
    random = np.random.default_rng(seed)
    ratios = np.empty(resamples)
    for index in range(resamples):
        drawn = random.integers(0, batches, batches)
        ratios[index] = _median_ratio(np.concatenate([pieces_a[i] for i in drawn]), np.concatenate([pieces_b[i] for i in drawn]))
    low, high = np.quantile(ratios, [(1 - confidence) / 2, (1 + confidence) / 2])
    return _median_ratio(a.samples_ns, b.samples_ns), float(low), float(high)


def _median_ratio(a: np.ndarray, b: np.ndarray) -> float:
    """Of nearest-rank medians, as `p50_ns` gives them."""
    medians = [int(np.partition(samples, (samples.size - 1) // 2)[(samples.size - 1) // 2]) for samples in (a, b)]
    return medians[0] / max(medians[1], 1)


def _thinned(samples: np.ndarray) -> np.ndarray:
    """At most THINNED_COUNT samples, evenly spaced in time: the bootstrap's cost stays bounded, its width hardly changes."""
    return samples[:: max(1, math.ceil(samples.size / THINNED_COUNT))]
