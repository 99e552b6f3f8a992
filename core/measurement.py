# SPDX-License-Identifier: Apache-2.0
"""`Measurement`: raw latency samples and what they were taken under; percentiles, the count they need, ratios. numpy only: devices import it.

- Raw samples are kept, in the order taken, never averaged away.
- Percentiles are nearest-rank: the smallest sample that at least p percent of all samples do not exceed. Nothing is interpolated, so a
  percentile is a latency that really occurred, and a tail is never reported below what was seen.
- Enough samples: `required_count(p)` is the smallest n for which, with 99 % confidence, at least two of n independent samples lie above
  the true percentile (p50: 11, p90: 64, p99: 662). It is the floor of MLPerf's early stopping (mlcommons/inference,
  loadgen/early_stopping.cc: one sample discarded, confidence 0.99, tolerance 0). Fewer samples: `valid` is False.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from isthmus.errors import IsthmusError

SCHEMA = 2
PERCENTILES = (50.0, 90.0, 99.0)
CONFIDENCE = 0.99

BATCHES = 50  # of consecutive samples, drawn as a whole by the bootstrap
THINNED_COUNT = 20_000


@dataclass(frozen=True, eq=False)
class Measurement:
    """Raw samples of one session and what they were taken under. `valid` is False where `reasons` say why the figures may not be quoted.

    - `samples_ns`: one a query (see `isthmus.bench` for what a query is in each scenario).
    - `inference_count` inferences (samples of the model's batch count one each) were timed, in `elapsed_ns` of time in the engine; for
      Offline it is the wall time of all streams together.
    - `energy_j` is the mean energy of one inference, idle power subtracted, where a power meter was read, else None.
    """

    scenario: str
    samples_ns: np.ndarray
    warmup_count: int
    inference_count: int
    elapsed_ns: int
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

    @property
    def throughput_per_s(self) -> float:
        """Inferences a second over the whole measurement."""
        self._needs_samples()
        return self.inference_count / max(self.elapsed_ns, 1) * 1e9

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
            "throughput_per_s": self.throughput_per_s if known else None,
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
            "inference_count": self.inference_count,
            "elapsed_ns": self.elapsed_ns,
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


def pooled(parts: Sequence[Measurement]) -> Measurement:
    """Measurements of one artifact, opened anew for each, as one: where an engine's buffers come to lie is drawn anew each time, and moves its times.

    Conditions are the first one's. Raises `IsthmusError` on none, or where energy was read: that is a mean of its own.
    """
    if not parts or any(one.energy_j is not None for one in parts):
        raise IsthmusError(f"{len(parts)} measurements to pool, expected at least one, without energy")
    reasons = tuple(dict.fromkeys(reason for one in parts for reason in one.reasons))
    return Measurement(
        parts[0].scenario,
        np.concatenate([one.samples_ns for one in parts]),
        sum(one.warmup_count for one in parts),
        sum(one.inference_count for one in parts),
        sum(one.elapsed_ns for one in parts),
        parts[0].conditions,
        None,
        all(one.valid for one in parts),
        reasons,
    )


_JSON_TYPES: dict[str, tuple[type, ...]] = {
    "scenario": (str,),
    "samples_ns": (list,),
    "warmup_count": (int,),
    "inference_count": (int,),
    "elapsed_ns": (int,),
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
