# SPDX-License-Identifier: Apache-2.0
"""Latency of a bundle's artifacts on this machine, interleaved, kept in the bundle as `reports/bench-<profile>.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib import import_module
from typing import Any

import numpy as np

from isthmus.bench import Measurement, measure_interleaved
from isthmus.bundle import Bundle
from isthmus.console import grid
from isthmus.errors import IsthmusError
from isthmus.session import Session


def why_not_measured(entry: Mapping[str, Any]) -> str:
    """Why an artifact has no latency on this machine; "" where it has one."""
    if not entry["runs_here"]:
        return "needs the board"
    if getattr(import_module(f"isthmus.runtimes.{entry['engine']}"), "SIMULATOR", False):
        return "needs the board"  # a simulator's time says nothing about the hardware it simulates
    return ""


def bench_bundle(
    bundle: Bundle,
    profiles: Sequence[str],
    *,
    threads: int = 1,
    min_duration_s: float = 2.0,
    min_count: int = 1000,
    max_duration_s: float = 120.0,
    trust: bool = False,
) -> tuple[Bundle, dict[str, Measurement]]:
    """Measures `profiles` (all that run here where none is named) in turns; gives the bundle with the raw samples in it.

    Raises `IsthmusError` where a named profile needs its board, or nothing can be measured here.
    """
    entries = {profile: bundle.artifact(profile) for profile in profiles or bundle.profiles}
    reasons = {profile: why_not_measured(entry) for profile, entry in entries.items()}
    refused = [profile for profile in profiles if reasons[profile]]
    if refused:
        raise IsthmusError(f"{refused[0]}: {reasons[refused[0]]}; its latency is not to be had on this machine")
    chosen = [profile for profile, reason in reasons.items() if not reason]
    if not chosen:
        raise IsthmusError(f"{bundle.root}: no artifact that can be measured on this machine: {', '.join(entries)} need their boards")
    golden = bundle.golden()
    with ExitStack() as stack:
        sessions = {}
        for profile in chosen:
            session = stack.enter_context(bundle.open_session(profile, threads, trust))
            sessions[profile] = (session, _raw_feeds(session, golden))
        measurements = measure_interleaved(
            sessions, min_count=min_count, min_duration_s=min_duration_s, max_duration_s=max(max_duration_s, min_duration_s), threads=threads
        )
    for profile, measurement in measurements.items():
        bundle = bundle.add_report(f"bench-{profile}.json", json.dumps(measurement.to_json()).encode())
    return bundle, measurements


def read_measurements(bundle: Bundle) -> dict[str, Measurement]:
    """What `bench_bundle` left in the bundle, by profile."""
    found = {}
    for profile in bundle.profiles:
        name = f"reports/bench-{profile}.json"
        if name in bundle.manifest["files"]:
            found[profile] = Measurement.from_json(json.loads((bundle.root / name).read_bytes()))
    return found


def latency_table(measurements: Mapping[str, Measurement]) -> str:
    """One line a profile, in microseconds, then the conditions once."""
    rows = []
    for profile, m in measurements.items():
        rows.append(
            [
                profile,
                *(f"{value / 1000:.1f}" for value in (m.p50_ns, m.p90_ns, m.p99_ns, m.mean_ns)),
                str(m.count),
                str(m.warmup_count),
                "yes" if m.valid else "; ".join(m.reasons),
            ]
        )
    conditions = next(iter(measurements.values())).conditions
    shown = {key: conditions.get(key) for key in ("host", "cpu_model", "threads", "harness_overhead_ns") if conditions.get(key) is not None}
    lines = [grid(["profile", "p50 us", "p90 us", "p99 us", "mean us", "samples", "warm-up", "valid"], rows), ""]
    return "\n".join([*lines, "one inference at a time; " + ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in shown.items())])


def _raw_feeds(session: Session, golden: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The first golden sample in the engine's own layout and dtype."""
    batch = session.inputs[0].form_shape()[0]
    return {spec.name: spec.from_form(spec.from_reference(golden[f"input/{spec.name}"][:batch])) for spec in session.inputs}
