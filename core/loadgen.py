# SPDX-License-Identifier: Apache-2.0
"""The same three scenarios driven by MLCommons' own LoadGen (`pip install mlcommons-loadgen`), for figures that are to stand beside MLPerf's.

LoadGen reaches Python through callbacks: some microseconds a query that count as latency, where the loop of `isthmus.bench` takes some
150 ns (`benchmarks/harness_overhead.py` measures both). It takes one session, and several cannot take turns in it.
numpy only, beside LoadGen itself.
"""

from __future__ import annotations

import json
import tempfile
import time
from array import array
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from isthmus.bench import MULTI_STREAM, SINGLE_STREAM, Feeds, Rules, checked_feeds
from isthmus.conditions import host_conditions, volatile_conditions
from isthmus.errors import IsthmusError
from isthmus.measurement import Measurement
from isthmus.session import Session

PACKAGE = "mlcommons-loadgen"
WARMUP_COUNT = 50
LOG_LINE = ":::MLLOG "
DETAIL_BYTES = 2**26


def measure_by_loadgen(session: Session, feeds: Feeds, rules: Rules) -> Measurement:
    """One session under LoadGen. `samples_ns` are the runs as this process timed them; LoadGen's own verdict and figures stand in the conditions.

    `valid` is LoadGen's verdict. Raises `IsthmusError` where LoadGen is not installed, or an engine raises.
    """
    try:
        import mlperf_loadgen as lg

        package = version(PACKAGE)
    except (ImportError, PackageNotFoundError):
        raise IsthmusError(f"LoadGen is not installed: pip install {PACKAGE}, or measure without --loadgen") from None
    queue = checked_feeds(session.engine, session, feeds)
    conditions = host_conditions() | {"before": volatile_conditions()}
    for index in range(WARMUP_COUNT):
        session.run_raw(queue[index % len(queue)])
    samples_ns = array("q")
    failures: list[Exception] = []
    at_once = rules.samples_per_query if rules.scenario == MULTI_STREAM else 1  # of Offline's one huge query each run is timed

    def issue(query: list[Any]) -> None:
        try:
            for start in range(0, len(query) if not failures else 0, at_once):
                before = time.perf_counter_ns()
                for sample in query[start : start + at_once]:
                    session.run_raw(queue[sample.index])
                samples_ns.append(time.perf_counter_ns() - before)
        except Exception as error:  # noqa: BLE001 - must not pass through LoadGen's C++ frames; raised once it is back
            failures.append(error)
        lg.QuerySamplesComplete([lg.QuerySampleResponse(sample.id, 0, 0) for sample in query])

    with tempfile.TemporaryDirectory(prefix="isthmus-loadgen-") as folder:
        settings, logs = _settings(lg, rules, _expected_ns(session, queue)), lg.LogSettings()
        logs.enable_trace = False
        logs.log_output.outdir, logs.log_output.copy_summary_to_stdout = folder, False
        system = lg.ConstructSUT(issue, lambda: None)
        library = lg.ConstructQSL(len(queue), len(queue), lambda indices: None, lambda indices: None)
        try:
            # A file of that name in the working folder would change the rules: none is read.
            lg.StartTestWithLogSettings(system, library, settings, logs, str(Path(folder) / "no-audit.config"))
        finally:
            lg.DestroyQSL(library)
            lg.DestroySUT(system)
        if failures:
            raise IsthmusError(f"{session.engine} raised {type(failures[0]).__name__}: {str(failures[0])[:300]}")
        figures = _figures(Path(folder) / "mlperf_log_detail.txt")
    valid = figures.get("result_validity") == "VALID"
    reasons = () if valid else (f"LoadGen: {figures.get('result_invalid_reason') or figures.get('result_validity') or 'no verdict'}",)
    samples = np.array(samples_ns, np.int64)
    conditions |= {
        "after": volatile_conditions(),
        "harness": f"{PACKAGE} {package}",
        "loadgen": figures,
        "threads": rules.threads,
        "percentile": rules.percentile,
        "engine": session.engine,
        "engine_version": str(getattr(session, "version", "")),
    }
    return Measurement(rules.scenario, samples, WARMUP_COUNT, len(samples) * at_once, int(samples.sum()), conditions, None, valid, reasons)


def _settings(lg: Any, rules: Rules, expected_ns: int) -> Any:
    settings = lg.TestSettings()
    settings.scenario = getattr(lg.TestScenario, rules.scenario)
    settings.mode = lg.TestMode.PerformanceOnly
    settings.min_query_count = rules.needed
    settings.min_duration_ms = round(rules.min_duration_s * 1000)
    settings.max_duration_ms = round(rules.max_duration_s * 1000)
    if rules.scenario == SINGLE_STREAM:
        settings.single_stream_expected_latency_ns = expected_ns
        settings.single_stream_target_latency_percentile = rules.percentile / 100
    elif rules.scenario == MULTI_STREAM:
        settings.multi_stream_samples_per_query = rules.samples_per_query
        settings.multi_stream_expected_latency_ns = expected_ns * rules.samples_per_query
        settings.multi_stream_target_latency_percentile = rules.percentile / 100
    else:
        settings.offline_expected_qps = 1e9 / expected_ns
    return settings


def _expected_ns(session: Session, queue: Any) -> int:
    """LoadGen sizes its queries by a latency it is told: the median of a few runs."""
    taken = []
    for index in range(10):
        before = time.perf_counter_ns()
        session.run_raw(queue[index % len(queue)])
        taken.append(time.perf_counter_ns() - before)
    return max(1, int(np.median(taken)))


def _figures(detail: Path) -> dict[str, Any]:
    """Key and value of each line of LoadGen's log that is a result."""
    if not detail.is_file() or detail.stat().st_size > DETAIL_BYTES:
        return {}
    found = {}
    for line in detail.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith(LOG_LINE):
            try:
                entry = json.loads(line[len(LOG_LINE) :])
            except json.JSONDecodeError:
                continue
            if isinstance(entry, dict) and str(entry.get("key", "")).startswith(("result_", "effective_min_")):
                found[str(entry["key"])] = entry.get("value")
    return found
