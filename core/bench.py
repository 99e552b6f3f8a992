# SPDX-License-Identifier: Apache-2.0
"""The harness: latency of any `Session` in three of MLPerf's scenarios, with what it was taken under. numpy only: devices import it.

It knows no model and no engine. `time.perf_counter_ns` stands on both sides of `Session.run_raw`.

- "SingleStream": a query is one run; the next follows when the last has ended. Its figure is a percentile of latency.
- "MultiStream": a query is `samples_per_query` runs, one after the other (a frame of that many cameras); the latency is the whole query's.
- "Offline": all streams (a session each, in a thread each) run as fast as they can; its figure is inferences a second.

A measurement ends when a minimum count AND a minimum duration are reached AND the percentile asked has enough samples; otherwise it is
marked invalid, with the reason.
"""

from __future__ import annotations

import gc
import random
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from typing import Any, Protocol

import numpy as np

from isthmus.conditions import host_conditions, volatile_conditions
from isthmus.errors import IsthmusError
from isthmus.measurement import Measurement, required_count
from isthmus.session import Arrays, Session
from isthmus.spec import TensorSpec

SINGLE_STREAM = "SingleStream"
MULTI_STREAM = "MultiStream"
OFFLINE = "Offline"
SCENARIOS = (SINGLE_STREAM, MULTI_STREAM, OFFLINE)

# Warm-up: caches, page faults, lazy initialisation, clock governors. A window is long enough for a governor to react.
WARMUP_WINDOW_COUNT = 5
WARMUP_WINDOW_NS = 50_000_000
WARMUP_TOLERANCE = 0.05

BLOCK_COUNT = 16  # queries in a row of one session while several take turns
OVERHEAD_COUNT = 2000
POLL_S = 0.005
FEED_COUNT = 32  # golden samples taken in turn: no input stays in the cache alone

Clock = Callable[[], int]
Feeds = Arrays | Sequence[Arrays]


class EnergyMeter(Protocol):
    """Joules that a power meter has counted since `start`; `isthmus.runtimes.power` holds the real ones."""

    source: str

    def start(self) -> None: ...

    def energy_j(self) -> float: ...

    def stop(self) -> None: ...


@dataclass(frozen=True)
class Rules:
    """When a measurement is enough and when it must end. Limits count for each session.

    `percentile` is the one that will be quoted: it decides how many queries are needed. `threads` is recorded, not set: it is what the
    sessions were opened with. An engine that does not come back is given up `hang_grace_s` after every limit has passed.
    """

    scenario: str = SINGLE_STREAM
    min_count: int = 1
    min_duration_s: float = 1.0
    max_duration_s: float = 60.0
    max_warmup_s: float = 10.0
    percentile: float = 99.0
    samples_per_query: int = 8
    threads: int = 1
    idle_s: float = 2.0
    hang_grace_s: float = 30.0

    def __post_init__(self) -> None:
        if self.scenario not in SCENARIOS:
            raise IsthmusError(f"scenario {self.scenario!r} is unknown: there are {', '.join(SCENARIOS)}")
        for name in ("min_count", "threads", "max_duration_s", "max_warmup_s", "samples_per_query"):
            if not getattr(self, name) > 0:
                raise IsthmusError(f"{name} must be above 0, found {getattr(self, name)}")
        if not 0 <= self.min_duration_s <= self.max_duration_s:
            raise IsthmusError(f"min_duration_s must lie between 0 and max_duration_s ({self.max_duration_s}), found {self.min_duration_s}")
        required_count(self.percentile)

    @property
    def needed(self) -> int:
        """Queries to take at least. Offline quotes no percentile."""
        return self.min_count if self.scenario == OFFLINE else max(self.min_count, required_count(self.percentile))


def measure(
    session: Session, feeds: Feeds, rules: Rules | None = None, *, clock: Clock = time.perf_counter_ns, meter: EnergyMeter | None = None
) -> Measurement:
    """Times one session on raw feeds (one, or several taken in turn).

    The time limit, an engine that raises and one that hangs end it early: what was taken is kept and marked invalid with the reason. A
    session that hangs is abandoned (see `Session.abandon`). With a `meter`, idle power is read first and subtracted.
    Raises `IsthmusError` on feeds that are not the session's.
    """
    rules = rules or Rules()
    if rules.scenario == OFFLINE:
        return measure_offline([session], feeds, rules, meter=meter)
    return _interleaved({session.engine: (session, feeds)}, rules, clock, meter)[session.engine]


def measure_interleaved(
    sessions: Mapping[str, tuple[Session, Feeds]], rules: Rules | None = None, *, clock: Clock = time.perf_counter_ns
) -> dict[str, Measurement]:
    """Like `measure`, for several sessions that take turns, so that drift of the machine hits all alike.

    They change over every BLOCK_COUNT queries, in an order drawn anew for every round: an engine whose threads still spin after a run slows
    whoever comes next. Each turn starts with one untimed run, since the session before has just emptied the caches. All stop together, so
    that sample i of each was taken at about the same time.
    """
    rules = rules or Rules()
    if rules.scenario == OFFLINE:
        raise IsthmusError("Offline takes the whole machine for one session: measure one after the other")
    return _interleaved(sessions, rules, clock, None)


def measure_offline(sessions: Sequence[Session], feeds: Feeds, rules: Rules | None = None, *, meter: EnergyMeter | None = None) -> Measurement:
    """Inferences a second of equal sessions that all run at once, a thread each.

    `samples_ns` are the single runs, in the order they ended in each; of an engine that queues runs, what starting one took.
    """
    rules = rules or Rules(scenario=OFFLINE)
    if not sessions:
        raise IsthmusError("nothing to measure: no session given")
    queue = checked_feeds(sessions[0].engine, sessions[0], feeds)
    conditions = host_conditions()
    series = [_Series(session, queue, time.perf_counter_ns, 1) for session in sessions]
    for one in series:
        one.query = one.session.run_ahead
    state = _Offline(series, rules)
    with _collector_off(), _metered(meter, rules) as energy:
        overhead_ns = _overhead_ns(time.perf_counter_ns)
        conditions["before"] = volatile_conditions()
        _guarded(lambda: series[0].warm_up(round(rules.max_warmup_s * 1e9)), series[:1], rules.max_warmup_s + rules.hang_grace_s)
        energy.begin()
        state.run()
        energy.end()
        conditions["after"] = volatile_conditions()
    conditions |= _how(rules, overhead_ns, time.perf_counter_ns, []) | {"streams": len(sessions)}
    return state.measurement(conditions, energy)


def _interleaved(sessions: Mapping[str, tuple[Session, Feeds]], rules: Rules, clock: Clock, meter: EnergyMeter | None) -> dict[str, Measurement]:
    if not sessions:
        raise IsthmusError("nothing to measure: no session given")
    runs = rules.samples_per_query if rules.scenario == MULTI_STREAM else 1
    conditions = host_conditions()
    series = {name: _Series(session, checked_feeds(name, session, feeds), clock, runs) for name, (session, feeds) in sessions.items()}
    ordered = list(series.values())
    with _collector_off(), _metered(meter, rules) as energy:
        overhead_ns = _overhead_ns(clock)
        conditions["before"] = volatile_conditions()

        def work() -> None:
            for one in ordered:
                one.warm_up(round(rules.max_warmup_s * 1e9))
            energy.begin()
            _take_turns(ordered, rules.needed, round(rules.min_duration_s * 1e9), round(rules.max_duration_s * 1e9))
            energy.end()

        _guarded(work, ordered, len(ordered) * (rules.max_warmup_s + rules.max_duration_s) + rules.hang_grace_s)
        conditions["after"] = volatile_conditions()
    conditions |= _how(rules, overhead_ns, clock, list(sessions))
    return {name: one.measurement(conditions, rules, energy) for name, one in series.items()}


def _how(rules: Rules, overhead_ns: int, clock: Clock, names: list[str]) -> dict[str, Any]:
    """What the conditions say of the harness itself."""
    settings = asdict(rules)
    settings.pop("scenario")
    if rules.scenario != MULTI_STREAM:
        settings.pop("samples_per_query")
    return settings | {
        "harness": "isthmus",
        "clock": "perf_counter_ns" if clock is time.perf_counter_ns else "given by the caller",
        "clock_resolution_ns": time.get_clock_info("perf_counter").resolution * 1e9,
        "harness_overhead_ns": overhead_ns,
        "garbage_collector": "off while timing",
        "required_count": rules.needed,
        "interleaved": names if len(names) > 1 else [],
    }


@contextmanager
def _collector_off() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _guarded(work: Callable[[], None], series: Sequence[_Series], limit_s: float) -> None:
    """Runs `work` in a thread of its own, and leaves it behind where it is not back in time: an engine that hangs cannot be interrupted.

    Its series is marked, its session abandoned. Raises what `work` raised.
    """
    raised: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - handed to the caller's thread, which raises it
            raised.append(error)

    worker = threading.Thread(target=guarded, name="isthmus-bench", daemon=True)
    worker.start()
    try:
        worker.join(limit_s)
    finally:
        if worker.is_alive():
            for one in series:
                one.give_up(f"did not come back within {limit_s:g} s")
    if raised:
        raise raised[0]


class _Energy:
    """Joules between `begin` and `end`, above what the idle machine takes."""

    def __init__(self, meter: EnergyMeter | None, idle_w: float) -> None:
        self.meter = meter
        self.idle_w = idle_w
        self.spent_j: float | None = None
        self.wall_s = 0.0

    def begin(self) -> None:
        if self.meter is not None:
            self._begun = (time.perf_counter(), self.meter.energy_j())

    def end(self) -> None:
        if self.meter is not None:
            begun_s, begun_j = self._begun
            self.wall_s = time.perf_counter() - begun_s
            self.spent_j = self.meter.energy_j() - begun_j

    def of_one(self, inference_count: int) -> float | None:
        """None without a meter, without an inference, and where the work took no more than idling: the meter does not see it."""
        if self.spent_j is None or not inference_count:
            return None
        above_idle_j = self.spent_j - self.idle_w * self.wall_s
        return above_idle_j / inference_count if above_idle_j > 0 else None

    def conditions(self) -> dict[str, Any]:
        if self.meter is None:
            return {"energy": "no power meter was read"}
        active_w = self.spent_j / self.wall_s if self.spent_j is not None and self.wall_s else None
        return {"energy": {"source": self.meter.source, "idle_w": self.idle_w, "active_w": active_w, "wall_s": self.wall_s}}


@contextmanager
def _metered(meter: EnergyMeter | None, rules: Rules) -> Iterator[_Energy]:
    """Idle power first: the same machine, doing nothing, for `idle_s`."""
    if meter is None:
        yield _Energy(None, 0.0)
        return
    meter.start()
    try:
        before_s, before_j = time.perf_counter(), meter.energy_j()
        time.sleep(rules.idle_s)
        yield _Energy(meter, (meter.energy_j() - before_j) / (time.perf_counter() - before_s))
    finally:
        meter.stop()


class _Series:
    """The queries of one session while they are timed."""

    def __init__(self, session: Session, feeds: Sequence[Arrays], clock: Clock, runs: int) -> None:
        self.session = session
        self.clock = clock
        self.runs = runs
        self.query: Callable[[Any], object] = session.run_raw if runs == 1 else self._several
        self.queue: Iterator[Any] = cycle(feeds) if runs == 1 else self._queries(feeds)
        self.samples_ns = array("q")
        self.spent_ns = 0
        self.warmup_count = 0
        self.warmup_change: float | None = None
        self.failure = ""

    def _several(self, feeds: tuple[Arrays, ...]) -> None:
        run = self.session.run_raw
        for one in feeds:
            run(one)

    def _queries(self, feeds: Sequence[Arrays]) -> Iterator[tuple[Arrays, ...]]:
        queue = cycle(feeds)
        while True:
            yield tuple(islice(queue, self.runs))

    @property
    def inference_count(self) -> int:
        batch = self.session.inputs[0].form_shape()[0] if self.session.inputs else 1
        return len(self.samples_ns) * self.runs * batch

    def give_up(self, why: str) -> None:
        """Leaves an engine that is still inside a run: its session must not be closed under it."""
        if not self.failure:
            self.failure = f"{self.session.engine or 'the engine'} {why}"
        self.session.abandon()

    def block(self, count: int, limit_ns: int, into: array[int] | None = None) -> None:
        """At most `count` timed queries, ended early once `limit_ns` of time in the engine are spent. An engine's error is kept as `failure`."""
        query, clock = self.query, self.clock
        samples = self.samples_ns if into is None else into
        spent = 0
        try:
            for feeds in islice(self.queue, count):
                before = clock()
                query(feeds)
                taken = clock() - before
                if self.failure:  # given up meanwhile: whoever reads the samples has read them already
                    return
                samples.append(taken)
                spent += taken
                if spent >= limit_ns:
                    break
        except Exception as error:  # noqa: BLE001 - an engine raises what it likes; the samples before it are worth keeping, marked invalid
            self.failure = self.failure or f"{self.session.engine or 'the engine'} raised {type(error).__name__}: {str(error)[:300]}"
        if into is None:
            self.spent_ns += spent

    def warm_up(self, limit_ns: int) -> None:
        """Windows of queries until two medians in a row differ by less than WARMUP_TOLERANCE, two windows at least."""
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
        """WARMUP_WINDOW_COUNT queries and WARMUP_WINDOW_NS at least; of an engine so slow that two of these pass the limit, half the limit."""
        window = array("q")
        spent = 0
        while not self.failure and (len(window) < WARMUP_WINDOW_COUNT or spent < WARMUP_WINDOW_NS) and spent < max(1, limit_ns // 2):
            start = len(window)
            self.block(max(WARMUP_WINDOW_COUNT, start), WARMUP_WINDOW_NS, into=window)
            spent += sum(window[start:])
        return window

    def lead_in(self) -> None:
        """One untimed query."""
        self.block(1, 1, into=array("q"))

    def finish(self) -> None:
        """Waits for the runs that are still under way: they were counted."""
        try:
            if not self.failure:
                self.session.finish()
        except Exception as error:  # noqa: BLE001 - as in `block`
            self.failure = self.failure or f"{self.session.engine or 'the engine'} raised {type(error).__name__}: {str(error)[:300]}"

    def is_enough(self, count: int, duration_ns: int) -> bool:
        return bool(self.failure) or (len(self.samples_ns) >= count and self.spent_ns >= duration_ns)

    def settled(self) -> tuple[bool, str]:
        """Whether warm-up settled, and the sentence where it did not."""
        settled = self.warmup_change is not None and self.warmup_change <= WARMUP_TOLERANCE
        if settled or self.failure:
            return settled, ""
        return False, f"warm-up did not settle: the last two windows differ by {self.warmup_change or 0:.0%}, {WARMUP_TOLERANCE:.0%} is allowed"

    def measurement(self, conditions: Mapping[str, Any], rules: Rules, energy: _Energy) -> Measurement:
        # A session that was given up may still add to its own array: what is judged is this copy.
        samples = np.array(self.samples_ns, np.int64)
        elapsed_ns = int(samples.sum())
        reasons = []
        if self.failure:
            reasons.append(f"{self.failure} (after {len(samples)} samples)")
        elif not self.is_enough(rules.needed, round(rules.min_duration_s * 1e9)):
            taken = f"{len(samples)} of {rules.needed} samples in {elapsed_ns / 1e9:.2f} of {rules.min_duration_s:g} s"
            reasons.append(f"time limit of {rules.max_duration_s:g} s: {taken}")
        settled, why = self.settled()
        reasons += [why] if why else []
        own = {"engine": self.session.engine, "engine_version": str(getattr(self.session, "version", "")), "warmup_settled": settled} | energy.conditions()
        joules = energy.of_one(self.inference_count) if not self.failure else None
        return Measurement(
            rules.scenario, samples, self.warmup_count, self.inference_count, elapsed_ns, {**conditions, **own}, joules, not reasons, tuple(reasons)
        )


def _take_turns(series: Sequence[_Series], count: int, duration_ns: int, limit_ns: int) -> None:
    draw = random.Random(0)
    while not all(one.is_enough(count, duration_ns) for one in series):
        running = [one for one in series if not one.failure]
        if any(one.spent_ns >= limit_ns for one in running):
            return
        draw.shuffle(running)
        for one in running:
            if len(series) > 1:
                one.lead_in()
            if not one.failure:
                one.block(BLOCK_COUNT, limit_ns - one.spent_ns)


class _Offline:
    """All streams at once, until the rules are met."""

    def __init__(self, series: Sequence[_Series], rules: Rules) -> None:
        self.series = series
        self.rules = rules
        self.stop = threading.Event()
        self.elapsed_ns = 0

    def run(self) -> None:
        threads = [threading.Thread(target=self._stream, args=(one,), name="isthmus-stream", daemon=True) for one in self.series]
        begun = time.perf_counter_ns()
        for thread in threads:
            thread.start()
        limit = begun + round(self.rules.max_duration_s * 1e9)
        try:
            while not self._enough(time.perf_counter_ns() - begun) and time.perf_counter_ns() < limit:
                time.sleep(POLL_S)
        finally:
            self.stop.set()
            deadline = time.monotonic() + self.rules.hang_grace_s
            for thread, one in zip(threads, self.series, strict=True):
                thread.join(max(0.0, deadline - time.monotonic()))
                if thread.is_alive():
                    one.give_up(f"did not come back within {self.rules.hang_grace_s:g} s of the end")
            self.elapsed_ns = time.perf_counter_ns() - begun

    def _stream(self, one: _Series) -> None:
        while not self.stop.is_set() and not one.failure:
            one.block(1, 1)
        one.finish()

    def _enough(self, elapsed_ns: int) -> bool:
        if any(one.failure for one in self.series):
            return True
        return sum(len(one.samples_ns) for one in self.series) >= self.rules.needed and elapsed_ns >= self.rules.min_duration_s * 1e9

    def measurement(self, conditions: Mapping[str, Any], energy: _Energy) -> Measurement:
        first = self.series[0]
        samples = np.concatenate([np.array(one.samples_ns, np.int64) for one in self.series])
        inferences = sum(one.inference_count for one in self.series)
        failures = [one.failure for one in self.series if one.failure]
        reasons = [f"{failures[0]} (after {len(samples)} samples)"] if failures else []
        if not failures and (len(samples) < self.rules.needed or self.elapsed_ns < self.rules.min_duration_s * 1e9):
            taken = f"{len(samples)} of {self.rules.needed} samples in {self.elapsed_ns / 1e9:.2f} of {self.rules.min_duration_s:g} s"
            reasons.append(f"time limit of {self.rules.max_duration_s:g} s: {taken}")
        settled, why = first.settled()
        reasons += [why] if why else []
        own = {"engine": first.session.engine, "engine_version": str(getattr(first.session, "version", "")), "warmup_settled": settled} | energy.conditions()
        joules = energy.of_one(inferences) if not failures else None
        return Measurement(OFFLINE, samples, first.warmup_count, inferences, self.elapsed_ns, {**conditions, **own}, joules, not reasons, tuple(reasons))


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
    null = _Series(NullSession(), [{}], clock, 1)
    null.block(OVERHEAD_COUNT, 1_000_000_000)
    return int(np.median(null.samples_ns))


def raw_feeds(session: Session, golden: Mapping[str, np.ndarray], count: int = FEED_COUNT) -> list[Arrays]:
    """Golden samples in the engine's own layout and dtype, `count` batches at most."""
    batch = session.inputs[0].form_shape()[0]
    total = len(golden[f"input/{session.inputs[0].name}"]) // batch
    starts = range(0, min(count, total) * batch, batch)
    return [
        {spec.name: spec.from_form(spec.from_reference(golden[f"input/{spec.name}"][start : start + batch])) for spec in session.inputs} for start in starts
    ]


def checked_feeds(name: str, session: Session, feeds: Feeds) -> Sequence[Arrays]:
    """The feeds as a list, each checked: `run_raw` checks nothing, so a wrong feed would be timed, or crash, in the engine."""
    queue = [feeds] if isinstance(feeds, Mapping) else list(feeds)
    if not queue:
        raise IsthmusError(f"session {name!r}: no feeds to measure with")
    names = [spec.name for spec in session.inputs]
    for one in queue:
        if sorted(one) != sorted(names):
            raise IsthmusError(f"session {name!r}: expected the inputs {names}, found {sorted(one)}")
        for spec in session.inputs:
            found = one[spec.name]
            if tuple(found.shape) != spec.shape or str(found.dtype) != spec.dtype:
                raise IsthmusError(
                    f"session {name!r}, input {spec.name!r}: expected raw {spec.dtype}{list(spec.shape)}, found {found.dtype}{list(found.shape)}"
                )
    return queue
