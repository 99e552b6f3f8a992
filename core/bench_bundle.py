# SPDX-License-Identifier: Apache-2.0
"""Latency of a bundle's artifacts on this machine, kept in the bundle as `reports/bench-<profile>[-<scenario>].json`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isthmus.affinity import pinned
from isthmus.bench import OFFLINE, SCENARIOS, SINGLE_STREAM, EnergyMeter, Rules, measure, measure_interleaved, measure_offline, raw_feeds
from isthmus.bundle import NEEDS_BOARD, Bundle
from isthmus.console import grid
from isthmus.errors import IsthmusError
from isthmus.foreign_model import TOOLS as FOREIGN
from isthmus.foreign_model import open_foreign
from isthmus.loadgen import measure_by_loadgen
from isthmus.measurement import Measurement, ratio_interval
from isthmus.session import Arrays, Session

if TYPE_CHECKING:
    from isthmus.runtimes.remote import Host, Say

# What `isthmus bench` asks for where nothing else is said.
BENCH_RULES = Rules(min_count=1000, min_duration_s=2.0, max_duration_s=120.0)


def why_not_measured(entry: Mapping[str, Any]) -> str:
    """Why an artifact has no latency on this machine; "" where it has one."""
    if not entry["runs_here"]:
        return NEEDS_BOARD
    if any(getattr(import_module(f"isthmus.runtimes.{part['engine']}"), "SIMULATOR", False) for part in (entry, *entry.get("parts", ()))):
        return NEEDS_BOARD  # a simulator's time says nothing about the hardware it simulates
    return ""


def bench_bundle(
    bundle: Bundle,
    profiles: Sequence[str],
    rules: Rules = BENCH_RULES,
    *,
    against: str | None = None,
    cpus: tuple[int, ...] | None = None,
    streams: int | None = None,
    meter: EnergyMeter | None = None,
    loadgen: bool = False,
    trust: bool = False,
) -> tuple[Bundle, dict[str, Measurement]]:
    """Measures `profiles` (all that run here where none is named); gives the bundle with the raw samples in it.

    Several take turns; Offline and a power meter need the machine for one alone, so they go one after the other. Of engines that this board built for
    one profile the faster that holds the accuracy is kept (`isthmus.runtimes.tensorrt.choice`). `against` names a profile of
    this bundle, another bundle's folder (the same profile of it) or somebody else's model file (`isthmus.foreign_model`): measured beside the first,
    and the ratio with its interval is kept in the first one's conditions; its own measurement is given under "profile @ folder", or the file's name.
    `cpus` pins the process, `streams` counts Offline's sessions.
    Raises `IsthmusError` where a named profile needs its board, or nothing can be measured here.
    """
    entries = _measurable(bundle, profiles, trust)
    on_gpu = [profile for profile, entry in entries.items() if entry["engine"] == "tensorrt" and against is None and not loadgen]
    turns = [profile for profile in entries if profile not in on_gpu]
    alone = rules.scenario == OFFLINE or meter is not None or loadgen
    if against is not None and (len(entries) != 1 or alone):
        raise IsthmusError("--against compares one profile (name it with --target), in turns: not in Offline, with a power meter or with LoadGen")
    if loadgen and (meter is not None or (streams or 1) > 1):
        raise IsthmusError("--loadgen drives one session and reads no power meter: leave out --streams and --power, or --loadgen")
    with pinned(cpus), ExitStack() as stack:
        if alone:
            measurements = {profile: _alone(bundle, profile, rules, 1 if loadgen else streams, meter, loadgen, trust) for profile in turns}
        elif turns:
            opened = {profile: _opened(stack, bundle, profile, rules.threads, trust) for profile in turns}
            if against is not None:
                label, opened_other = _other(stack, bundle, next(iter(entries)), against, rules.threads, trust)
                opened[label] = opened_other
            measurements = measure_interleaved(opened, rules)
        else:
            measurements = {}
        measurements |= {profile: _on_gpu(bundle, profile, rules, meter, trust) for profile in on_gpu}
    if cpus is not None:
        measurements = {name: replace(one, conditions={**one.conditions, "pinned_to": list(cpus)}) for name, one in measurements.items()}
    if against is not None:
        measurements = _compared(measurements)
    measurements |= {profile: tuned_elsewhere(entries[profile], measurements[profile]) for profile in entries}
    for profile in entries:
        bundle = bundle.add_report(_file(profile, rules.scenario), json.dumps(measurements[profile].to_json()).encode())
    return bundle, measurements


def bench_on(
    bundle: Bundle, profiles: Sequence[str], host: Host, rules: Rules = BENCH_RULES, *, pin: str | None = None, power: str = "none", say: Say
) -> tuple[Bundle, dict[str, Measurement]]:
    """Like `bench_bundle`, on a board over ssh: one profile (the bundle's only one where none is named), verified there first."""
    from isthmus.runtimes.remote import measure_on

    chosen = list(profiles or bundle.profiles)
    if len(chosen) != 1:
        raise IsthmusError(f"--host measures one artifact on its board: name it with --target ({', '.join(bundle.profiles)})")
    settings = {
        "--scenario": rules.scenario,
        "--min-duration": rules.min_duration_s,
        "--max-duration": rules.max_duration_s,
        "--min-count": rules.min_count,
        "--percentile": rules.percentile,
        "--samples-per-query": rules.samples_per_query,
        "--threads": rules.threads,
        "--power": power,
    } | ({"--pin": pin} if pin is not None else {})
    measurement = measure_on(bundle, chosen[0], host, [str(word) for pair in settings.items() for word in pair], say)
    measurement = replace(measurement, conditions={**measurement.conditions, "measured_over_ssh_on": host.address})
    measurement = tuned_elsewhere(bundle.artifact(chosen[0]), measurement)
    bundle = bundle.add_report(_file(chosen[0], rules.scenario), json.dumps(measurement.to_json()).encode())
    return bundle, {chosen[0]: measurement}


def tuned_elsewhere(entry: Mapping[str, Any], measurement: Measurement) -> Measurement:
    """With `tuned_on` in its conditions where the artifact was tuned on another processor than it was measured on."""
    tuned_on = (entry.get("tuning") or {}).get("cpu_model")
    if tuned_on in (None, measurement.conditions.get("cpu_model")):
        return measurement
    return replace(measurement, conditions={**measurement.conditions, "tuned_on": tuned_on})


def read_measurements(bundle: Bundle) -> dict[str, Measurement]:
    """What `bench_bundle` left in the bundle: by profile, and "profile Scenario" for other scenarios than SingleStream."""
    found = {}
    for profile in bundle.profiles:
        for scenario in SCENARIOS:
            name = f"reports/{_file(profile, scenario)}"
            if name in bundle.manifest["files"]:
                label = profile if scenario == SINGLE_STREAM else f"{profile} {scenario}"
                found[label] = Measurement.from_json(json.loads((bundle.root / name).read_bytes()))
    return found


def latency_table(measurements: Mapping[str, Measurement]) -> str:
    """One line a profile, in microseconds, then the conditions once."""
    rows = []
    for profile, m in measurements.items():
        known = bool(m.count)
        rows.append(
            [
                profile,
                *(f"{value / 1000:.1f}" for value in ((m.p50_ns, m.p90_ns, m.p99_ns, m.mean_ns) if known else ())),
                *([""] * (0 if known else 4)),
                f"{m.throughput_per_s:.1f}" if known else "",
                f"{1000 * m.energy_j:.3f}" if m.energy_j is not None else "",
                str(m.count),
                str(m.warmup_count),
                "yes" if m.valid else "; ".join(m.reasons),
            ]
        )
    first = next(iter(measurements.values()))
    shown = {key: first.conditions.get(key) for key in ("host", "cpu_model", "threads", "harness_overhead_ns") if first.conditions.get(key) is not None}
    header = ["profile", "p50 us", "p90 us", "p99 us", "mean us", "per second", "mJ each", "samples", "warm-up", "valid"]
    if not any(m.energy_j is not None for m in measurements.values()):
        header.remove("mJ each")
        rows = [[*row[:6], *row[7:]] for row in rows]
    lines = [grid(header, rows), "", f"{first.scenario}; " + ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in shown.items())]
    for name, m in measurements.items():
        ratio = m.conditions.get("against")
        if ratio:
            lines.append(f"{name} takes {ratio['ratio']:.3f} times as long as {ratio['name']} (95 % interval {ratio['low']:.3f} to {ratio['high']:.3f})")
        if m.conditions.get("tuned_on"):
            here = m.conditions.get("cpu_model") or "an unknown processor"
            lines.append(f"note: {name} was tuned on {m.conditions['tuned_on']}, and this is {here}: compile it here for the artifact that is fastest here")
    return "\n".join(lines)


def _measurable(bundle: Bundle, profiles: Sequence[str], trust: bool = False) -> dict[str, Any]:
    entries = {profile: bundle.artifact(profile) for profile in profiles or bundle.profiles}
    reasons = {profile: why_not_measured(entry) if entry["runs_here"] else bundle.why_not_here(profile, trust) for profile, entry in entries.items()}
    refused = [profile for profile in profiles if reasons[profile]]
    if refused:
        raise IsthmusError(f"{refused[0]}: {reasons[refused[0]]}; its latency is not to be had on this machine")
    chosen = {profile: entries[profile] for profile, reason in reasons.items() if not reason}
    if not chosen:
        raise IsthmusError(f"{bundle.root}: no artifact can be measured on this machine: {'; '.join(f'{name}: {reason}' for name, reason in reasons.items())}")
    return chosen


def _opened(stack: ExitStack, bundle: Bundle, profile: str, threads: int, trust: bool) -> tuple[Session, list[Arrays]]:
    session = stack.enter_context(bundle.open_session(profile, threads, trust))
    return session, raw_feeds(session, bundle.golden(profile))


def _on_gpu(bundle: Bundle, profile: str, rules: Rules, meter: EnergyMeter | None, trust: bool) -> Measurement:
    from isthmus.runtimes.tensorrt.choice import measure_engines

    return measure_engines(bundle, profile, bundle.golden(profile), rules, meter, trust)


def _alone(bundle: Bundle, profile: str, rules: Rules, streams: int | None, meter: EnergyMeter | None, loadgen: bool, trust: bool) -> Measurement:
    count = 1
    if rules.scenario == OFFLINE:
        count = streams or max(1, len(os.sched_getaffinity(0)) // rules.threads)
    with ExitStack() as stack:
        opened = [_opened(stack, bundle, profile, rules.threads, trust) for _ in range(count)]
        if loadgen:
            return measure_by_loadgen(*opened[0], rules)
        if rules.scenario == OFFLINE:
            return measure_offline([session for session, _ in opened], opened[0][1], rules, meter=meter)
        return measure(*opened[0], rules, meter=meter)


def _other(stack: ExitStack, bundle: Bundle, profile: str, against: str, threads: int, trust: bool) -> tuple[str, tuple[Session, list[Arrays]]]:
    """A label, and what `--against` names, opened: a profile of this bundle first, else a bundle's folder, else a model file."""
    if against in bundle.profiles:
        if against == profile:
            raise IsthmusError(f"--against {against}: that is the profile itself; name another one, another bundle's folder or a model file")
        _measurable(bundle, [against], trust)
        return against, _opened(stack, bundle, against, threads, trust)
    place = Path(against)
    if place.suffix in FOREIGN and not place.is_dir():
        session, feeds = open_foreign(place, threads, trust)
        return against, (stack.enter_context(session), feeds)
    if not place.is_dir():
        known, files = ", ".join(bundle.profiles), " or ".join(FOREIGN)
        raise IsthmusError(f"--against {against!r}: neither a profile of this bundle ({known}) nor a bundle's folder nor a {files} file")
    other = Bundle.open(against)
    chosen = profile if profile in other.profiles else next(iter(other.profiles)) if len(other.profiles) == 1 else ""
    if not chosen:
        raise IsthmusError(f"--against {against}: holds {', '.join(other.profiles)}, and not {profile}")
    _measurable(other, [chosen], trust)
    return f"{chosen} @ {against}", _opened(stack, other, chosen, threads, trust)


def _compared(measurements: Mapping[str, Measurement]) -> dict[str, Measurement]:
    """The ratio of the first to the second, kept with the first; none where one of them has no samples."""
    (name, first), (other, second) = measurements.items()
    if min(first.count, second.count) < 2:
        return dict(measurements)
    ratio, low, high = ratio_interval(first, second)
    kept = {"name": other, "ratio": ratio, "low": low, "high": high, "other_p50_ns": second.p50_ns, "other_valid": second.valid}
    return {name: replace(first, conditions={**first.conditions, "against": kept}), other: second}


def _file(profile: str, scenario: str) -> str:
    return f"bench-{profile}.json" if scenario == SINGLE_STREAM else f"bench-{profile}-{scenario.lower()}.json"
