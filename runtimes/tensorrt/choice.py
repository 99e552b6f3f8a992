# SPDX-License-Identifier: Apache-2.0
"""Which engine of an artifact runs: at batch 1 FP16 may be as fast as int8, so both are built, measured side by side, and the faster one that holds stays."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from isthmus.bench import OFFLINE, EnergyMeter, Rules, measure, measure_interleaved, raw_feeds
from isthmus.bundle import Bundle
from isthmus.compare import FLOAT_TOLERANCE, Comparison, compare_outputs, top1_accuracy
from isthmus.errors import IsthmusError, VerificationError
from isthmus.measurement import Measurement
from isthmus.runtimes.tensorrt import TensorRtSession, open_session
from isthmus.runtimes.tensorrt.records import choose, is_built, planned_engine, planned_engines
from isthmus.session import Session

Golden = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Verdict:
    """How an engine compares with the integer reference. `accuracy` and `reference_accuracy`: top-1 on the labelled golden samples, where there are any."""

    engine: str
    comparisons: tuple[Comparison, ...]
    accuracy: float | None
    reference_accuracy: float | None

    @property
    def holds(self) -> bool:
        """Within its allowance; for FP16, which rounds less than the reference does, also no worse on labels."""
        within = bool(self.comparisons) and all(comparison.passed for comparison in self.comparisons)
        by_label = self.engine == "fp16" and self.accuracy is not None and self.reference_accuracy is not None and self.accuracy >= self.reference_accuracy
        return within or by_label

    def to_json(self) -> dict[str, Any]:
        return {
            "engine_name": self.engine,
            "verification": [comparison.to_json() for comparison in self.comparisons],
            "accuracy": self.accuracy,
            "reference_accuracy": self.reference_accuracy,
            "holds": self.holds,
        }


def verify_engine(bundle: Bundle, profile: str, session: Session, golden: Golden) -> Verdict:
    """The golden inputs through an opened engine of the artifact. Raises `IsthmusError` where the session is none."""
    if not isinstance(session, TensorRtSession):
        raise IsthmusError(f"{profile}: {session.engine!r} is no TensorRT engine")
    entry, specs = bundle.artifact(profile), bundle.output_specs(profile)
    actual = session.run_samples({spec.name: golden[f"input/{spec.name}"] for spec in session.inputs})
    expected = {spec.name: golden[f"output/{spec.name}"] for spec in specs}
    comparisons = compare_outputs(specs, expected, actual, *allowance(entry, planned_engine(bundle.folder(profile), session.engine_name)))
    first, known = specs[0].name, golden["label"] >= 0
    accuracies = [top1_accuracy(outputs[first][known], golden["label"][known]) if known.any() else None for outputs in (actual, expected)]
    return Verdict(session.engine_name, tuple(comparisons), *accuracies)


def allowance(entry: Mapping[str, Any], planned: Mapping[str, Any]) -> tuple[int, float]:
    """(steps, tolerance of float outputs): the artifact's, or those of an engine with steps of its own, whose float outputs may differ by as much more."""
    steps, own, tolerance = entry["max_lsb_allowed"], planned.get("max_lsb"), entry["float_tolerance"]
    if type(own) is not int or own <= steps:
        return steps, tolerance
    by_step = (tolerance - FLOAT_TOLERANCE) / steps if steps else 0.0
    return own, FLOAT_TOLERANCE + by_step * own


def measure_engines(bundle: Bundle, profile: str, golden: Golden, rules: Rules, meter: EnergyMeter | None = None, trust: bool = False) -> Measurement:
    """Judges and measures every engine that is built, keeps the fastest one that holds for later sessions, and gives its measurement.

    They take turns; in Offline and with a power meter one has the board for itself after the other. Raises `VerificationError` where none holds.
    """
    folder = bundle.folder(profile)
    names = [planned["name"] for planned in planned_engines(folder) if is_built(folder, planned)] or [""]  # none: opening says what to do
    with ExitStack() as stack:
        sessions = [stack.enter_context(open_session(folder, bundle.artifact(profile), 1, trust, name)) for name in names]
        verdicts = {session.engine_name: verify_engine(bundle, profile, session, golden) for session in sessions}
        holding = [session for session in sessions if verdicts[session.engine_name].holds]
        if not holding:
            worst = verdicts[sessions[0].engine_name].comparisons[0]
            found = f"{worst.mismatched} of {worst.compared} elements, at most by {worst.max_lsb or worst.max_abs:g}"
            raise VerificationError(f"{profile}: no engine ({', '.join(verdicts)}) holds the accuracy: {worst.tensor!r} differs from the reference in {found}")
        measurements = _measured(holding, golden, rules, meter)
    best = fastest(measurements, rules)
    told = {name: {"verdict": verdict.to_json(), **_figures(measurements.get(name))} for name, verdict in verdicts.items()}
    choose(folder, best, {"engines": told})
    return replace(measurements[best], conditions={**measurements[best].conditions, "engine_chosen": best, "engines": told})


def fastest(measurements: Mapping[str, Measurement], rules: Rules) -> str:
    """The valid measurement with the least time an inference; of invalid ones only where there is no valid one, and of those without samples the first."""
    known = {name: one for name, one in measurements.items() if one.count}
    sound = {name: one for name, one in known.items() if one.valid} or known or dict(measurements)
    if not known:
        return next(iter(sound))
    if rules.scenario == OFFLINE:
        return max(sound, key=lambda name: sound[name].throughput_per_s)
    return min(sound, key=lambda name: sound[name].p50_ns)


def _measured(sessions: list[TensorRtSession], golden: Golden, rules: Rules, meter: EnergyMeter | None) -> dict[str, Measurement]:
    if len(sessions) == 1 or rules.scenario == OFFLINE or meter is not None:
        return {session.engine_name: measure(session, raw_feeds(session, golden), rules, meter=meter) for session in sessions}
    return measure_interleaved({session.engine_name: (session, raw_feeds(session, golden)) for session in sessions}, rules)


def _figures(measurement: Measurement | None) -> dict[str, Any]:
    if measurement is None or not measurement.count:
        return {"p50_ns": None, "per_second": None}
    return {"p50_ns": measurement.p50_ns, "per_second": measurement.throughput_per_s}


__all__ = ["Verdict", "fastest", "measure_engines", "verify_engine"]
