# SPDX-License-Identifier: Apache-2.0
"""Latency on a GPU board not at hand: a roofline over kernels, fitted to what others measured (`measured/jetson.toml`). A prediction, never a measurement.

One inference takes the sum over its kernels of max(MACs / (c x peak), bytes / (m x bandwidth)) + o. Peak and bandwidth are the profile's facts. The
shares c and m, at most 1, and the overhead o of a kernel are fitted, three numbers a runtime, by least squares on log latency. Kernels are `roofline`'s:
fused for TensorRT, one an operator for a framework. The interval is as wide as all but a tenth of the errors on networks that the fit had not seen.
"""

from __future__ import annotations

import csv
import math
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from isthmus.errors import IsthmusError
from isthmus.profile import Profile, load_profile
from isthmus.roofline import Kernel, Program, fused, op_by_op, program_of_onnx
from isthmus.target import Estimate

WAYS: Mapping[str, Callable[[Program], list[Kernel]]] = {"fused": fused, "op_by_op": op_by_op}
RUNTIMES = {"tensorrt": "fused", "framework": "op_by_op"}
BYTES = {"fp32": 4, "fp16": 2, "int8": 1}
FACTS = ("cuda_cores", "gpu_clock_hz", "fp16_dense_flops_per_s", "int8_dense_ops_per_s", "memory_bandwidth_bytes_per_s")
SUPER_FACTS = ("gpu_clock_super_hz", "memory_bandwidth_super_bytes_per_s")
COVERED = 0.9
PARAMETERS = 3
COLUMNS = ("model", "board", "precision", "runtime", "mode", "ms", "source")


@dataclass(frozen=True)
class Rates:
    """What a board can do at most, in MACs and bytes a second. `macs_per_s` has the precisions that it has arithmetic for."""

    macs_per_s: Mapping[str, float]
    bytes_per_s: float


def missing_facts(profile: Profile, mode: str = "") -> list[str]:
    """What a prediction needs and the profile has not."""
    if mode not in ("", "super"):
        raise IsthmusError(f"unknown mode {mode!r} of {profile.name}: there is 'super', or none")
    return [name for name in (*FACTS, *(SUPER_FACTS if mode else ())) if name not in profile.facts]


def rates_of(profile: Profile, mode: str = "") -> Rates:
    """From the profile's facts. `mode` "super": at the Super clocks. Raises `IsthmusError` where the profile lacks a fact."""
    facts, missing = profile.facts, missing_facts(profile, mode)
    if missing:
        raise IsthmusError(f"{profile.name}: nothing is predicted{' in mode ' + mode if mode else ''}: its profile has no {', '.join(missing)}")
    faster = facts["gpu_clock_super_hz"] / facts["gpu_clock_hz"] if mode else 1.0
    rated = {"fp32": facts["cuda_cores"] * facts["gpu_clock_hz"], "fp16": facts["fp16_dense_flops_per_s"] / 2, "int8": facts["int8_dense_ops_per_s"] / 2}
    bandwidth = facts["memory_bandwidth_super_bytes_per_s" if mode else "memory_bandwidth_bytes_per_s"]
    return Rates({name: rate * faster for name, rate in rated.items() if rate}, bandwidth)


@dataclass(frozen=True, eq=False)
class Work:
    """A network's kernels on one board in one precision: the seconds each needs at the board's full rates, and how many like it there are."""

    arithmetic_s: np.ndarray
    memory_s: np.ndarray
    counts: np.ndarray


def work_of(kernels: Mapping[Kernel, int], rates: Rates, precision: str) -> Work:
    """Kernels without int8 arithmetic multiply in half precision. Raises `IsthmusError` where the board lacks the precision."""
    if precision not in rates.macs_per_s:
        raise IsthmusError(f"the board has no {precision}: it has {', '.join(rates.macs_per_s)}")
    done_in = ["fp16" if kernel.floating and precision == "int8" else precision for kernel in kernels]
    arithmetic = np.array([kernel.macs / rates.macs_per_s[name] for kernel, name in zip(kernels, done_in, strict=True)])
    memory = np.array([kernel.moved * BYTES[name] / rates.bytes_per_s for kernel, name in zip(kernels, done_in, strict=True)])
    return Work(arithmetic, memory, np.array(list(kernels.values()), dtype=float))


@dataclass(frozen=True)
class Row:
    """A published or own latency. `fps`, a range, in place of `seconds`. A check, not fitted, where `boards` are those that it may have been, or where
    `comparable` is False: the engine is not what TensorRT makes of the network's graph."""

    network: str
    boards: tuple[str, ...]
    precision: str
    runtime: str
    source: str
    seconds: float | None = None
    fps: tuple[float, float] | None = None
    mode: str = ""
    comparable: bool = True

    @property
    def fitted(self) -> bool:
        return len(self.boards) == 1 and self.comparable

    def error(self, predicted_s: float) -> float:
        """log(predicted / measured); 0 inside a range."""
        if self.fps is None:
            assert self.seconds is not None
            return math.log(predicted_s / self.seconds)
        slowest, fastest = self.fps
        if predicted_s < 1 / fastest:
            return math.log(predicted_s * fastest)
        return math.log(predicted_s * slowest) if slowest and predicted_s > 1 / slowest else 0.0


@dataclass(frozen=True)
class Coefficients:
    """Shares of the board's peak and bandwidth that are reached, and what a kernel costs beside."""

    compute_share: float
    memory_share: float
    overhead_s: float

    def seconds(self, work: Work) -> float:
        return float(self.kernel_seconds(work).sum())

    def kernel_seconds(self, work: Work) -> np.ndarray:
        """Of each kernel, times how many like it there are."""
        alone = np.maximum(work.arithmetic_s / self.compute_share, work.memory_s / self.memory_share) + self.overhead_s
        return np.asarray(alone * work.counts)


@dataclass(frozen=True)
class Fit:
    """`errors` are log(predicted / measured) of each fitted row, predicted without that row; `unseen` the same without the row's network."""

    runtime: str
    coefficients: Coefficients
    rows: tuple[Row, ...]
    errors: tuple[float, ...]
    unseen: tuple[float, ...]

    @property
    def factor(self) -> float:
        """Predictions of networks that the fit had not seen are right within this factor, but for a tenth."""
        ranked = sorted(map(abs, self.unseen))
        return math.exp(ranked[min(math.ceil(COVERED * (len(ranked) + 1)), len(ranked)) - 1])

    def said(self) -> str:
        """The fit in one sentence, its errors beside it."""
        left_out, unseen = percents(self.errors), percents(self.unseen)
        c = self.coefficients
        return (
            f"{PARAMETERS} parameters on {len(self.rows)} rows of {len({row.network for row in self.rows})} networks: {100 * c.compute_share:.0f} % of peak,"
            f" {100 * c.memory_share:.0f} % of bandwidth, {1e6 * c.overhead_s:.1f} us a kernel; leave-one-out error median {np.median(left_out):.1f} %,"
            f" worst {max(left_out):.1f} %; without the row's network median {np.median(unseen):.1f} %, worst {max(unseen):.1f} %"
        )


def percents(errors: Iterable[float]) -> list[float]:
    """|predicted / measured - 1| in percent of each log error."""
    return [100 * abs(math.expm1(error)) for error in errors]


# ---- data
@lru_cache(maxsize=1)
def published_networks() -> dict[str, dict[Kernel, int]]:
    """The kernels of each network with a published row."""
    data = tomllib.loads((resources.files("isthmus") / "measured" / "networks.toml").read_text(encoding="utf-8"))
    return {name: {Kernel(*kernel[:4]): kernel[4] for kernel in entry["kernels"]} for name, entry in data.items()}


@lru_cache(maxsize=1)
def published_rows() -> tuple[Row, ...]:
    data = tomllib.loads((resources.files("isthmus") / "measured" / "jetson.toml").read_text(encoding="utf-8"))
    return tuple(_row(entry) for entry in data["row"])


def _row(entry: Mapping[str, Any]) -> Row:
    boards = tuple(entry["boards"]) if "boards" in entry else (entry["board"],)
    seconds = entry["ms"] / 1e3 if "ms" in entry else None
    fps = (entry["fps"][0], entry["fps"][1]) if "fps" in entry else None
    return Row(entry["network"], boards, entry["precision"], entry["runtime"], entry["source"], seconds, fps, entry.get("mode", ""), entry.get("fit", True))


def rows_of_csv(path: Path) -> tuple[list[Row], dict[str, dict[Kernel, int]]]:
    """A user's own rows: columns model (a float .onnx beside the file), board, precision, runtime, mode, ms, source. Raises `IsthmusError` on a wrong one."""
    from isthmus.onnx_file import load_onnx

    with path.open(encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise IsthmusError(f"{path.name}: expected the columns {','.join(COLUMNS)}, found {','.join(reader.fieldnames or ()) or 'none'}")
        lines = list(reader)
    rows, networks = [], dict[str, dict[Kernel, int]]()
    for number, line in enumerate(lines, start=2):
        where = f"{path.name}, line {number}"
        try:
            milliseconds = float(line["ms"])
        except (TypeError, ValueError):
            milliseconds = math.nan
        if not 0 < milliseconds < math.inf:
            raise IsthmusError(f"{where}: ms is {line['ms']!r}, expected a time above 0")
        for column, known in (("precision", BYTES), ("runtime", RUNTIMES)):
            if line[column] not in known:
                raise IsthmusError(f"{where}: {column} is {line[column]!r}, expected one of {', '.join(known)}")
        network = f"{line['model']} as {RUNTIMES[line['runtime']]}"
        work_of({}, rates_of(load_profile(line["board"]), line["mode"] or ""), line["precision"])
        if network not in networks:
            networks[network] = counted(WAYS[RUNTIMES[line["runtime"]]](program_of_onnx(load_onnx(str(path.parent / line["model"])))))
        rows.append(
            Row(network, (line["board"],), line["precision"], line["runtime"], line["source"] or path.name, milliseconds / 1e3, mode=line["mode"] or "")
        )
    return rows, networks


def counted(kernels: Iterable[Kernel]) -> dict[Kernel, int]:
    """Each kernel and how many like it."""
    found: dict[Kernel, int] = {}
    for kernel in kernels:
        found[kernel] = found.get(kernel, 0) + 1
    return found


# ---- fit
@lru_cache(maxsize=len(RUNTIMES))
def published_fit(runtime: str) -> Fit:
    """The fit to the published rows of a runtime."""
    return fit(runtime, published_rows(), published_networks())


def fit(runtime: str, rows: Sequence[Row], networks: Mapping[str, Mapping[Kernel, int]]) -> Fit:
    """Least squares on log latency over the rows of a runtime; then again without each row, and without each network. No number belongs to a row.

    Raises `IsthmusError` where fewer rows than parameters and one more are left.
    """
    chosen = [row for row in rows if row.runtime == runtime and row.fitted]
    seen = {row.network for row in chosen}
    if len(chosen) < PARAMETERS + 2 or len(seen) < 2:
        raise IsthmusError(f"runtime {runtime}: {len(chosen)} rows of {len(seen)} networks fit no model of {PARAMETERS} parameters")
    works = [work_of_row(row, row.boards[0], networks) for row in chosen]
    whole = _least_squares(chosen, works, START)
    errors, unseen = [], []
    without = {name: _least_squares(*_without(chosen, works, lambda row, name=name: row.network == name), whole) for name in seen}  # type: ignore[misc]
    for row, work in zip(chosen, works, strict=True):
        errors.append(row.error(_coefficients(_least_squares(*_without(chosen, works, lambda other, row=row: other is row), whole)).seconds(work)))  # type: ignore[misc]
        unseen.append(row.error(_coefficients(without[row.network]).seconds(work)))
    return Fit(runtime, _coefficients(whole), tuple(chosen), tuple(errors), tuple(unseen))


def work_of_row(row: Row, board: str, networks: Mapping[str, Mapping[Kernel, int]]) -> Work:
    return work_of(networks[row.network], rates_of(load_profile(board), row.mode), row.precision)


def _without(rows: Sequence[Row], works: Sequence[Work], left_out: Callable[[Row], bool]) -> tuple[list[Row], list[Work]]:
    kept = [(row, work) for row, work in zip(rows, works, strict=True) if not left_out(row)]
    return [row for row, _ in kept], [work for _, work in kept]


# Shares go through the logistic function, so that none exceeds 1; the overhead through exp. 27 %, 62 %, 12 us.
START = np.array([-1.0, 0.5, math.log(12e-6)])
STEPS = 60


def _coefficients(theta: np.ndarray) -> Coefficients:
    compute, memory = 1 / (1 + np.exp(-np.clip(theta[:2], -20, 20)))
    return Coefficients(float(compute), float(memory), float(np.exp(np.clip(theta[2], -25, 0))))


def _least_squares(rows: Sequence[Row], works: Sequence[Work], start: np.ndarray) -> np.ndarray:
    """Levenberg and Marquardt's steps with a numerical Jacobian."""
    kernels = Work(*(np.concatenate([getattr(work, name) for work in works]) for name in ("arithmetic_s", "memory_s", "counts")))
    starts = np.cumsum([0, *(work.counts.size for work in works[:-1])])

    def residuals(theta: np.ndarray) -> np.ndarray:
        seconds = np.add.reduceat(_coefficients(theta).kernel_seconds(kernels), starts)
        return np.array([row.error(float(predicted)) for row, predicted in zip(rows, seconds, strict=True)])

    theta, damping = start, 1e-3
    errors = residuals(theta)
    for _ in range(STEPS):
        jacobian = np.stack([(residuals(theta + step) - errors) / 1e-5 for step in 1e-5 * np.eye(theta.size)], axis=1)
        curvature = jacobian.T @ jacobian
        step = np.linalg.solve(curvature + damping * np.eye(theta.size), -jacobian.T @ errors)
        new = residuals(theta + step)
        if new @ new < errors @ errors:
            gained = errors @ errors - new @ new
            theta, errors, damping = theta + step, new, damping / 5
            if gained < 1e-10 * (1e-12 + new @ new):
                break
        else:
            damping *= 5
            if damping > 1e8:
                break
    return theta


# ---- prediction
def predict(program: Program, profile: Profile, precision: str, runtime: str = "tensorrt", *, fitted: Fit | None = None, mode: str = "") -> Estimate:
    """The latency of one inference: likely, and the interval. Raises `IsthmusError` where the board lacks the precision."""
    used = fitted or published_fit(runtime)
    likely = used.coefficients.seconds(work_of(counted(WAYS[RUNTIMES[runtime]](program)), rates_of(profile, mode), precision))
    label = f"{RUNTIME_NAMES[runtime]}, {precision}{', ' + mode if mode else ''}"
    basis = f"interval: a factor of {used.factor:.2f} either way, {100 * COVERED:.0f} % of networks that the fit had not seen; {used.said()}"
    return Estimate(label, (likely / used.factor, likely, likely * used.factor), {}, basis, "predicted")


RUNTIME_NAMES = {"tensorrt": "TensorRT", "framework": "one kernel an operator"}


def predictions(program: Program, profile: Profile, fits: Mapping[str, Fit] | None = None) -> list[Estimate]:
    """What a board's engine takes in each precision it has, in each clock mode of its profile; for a float model what a framework
    takes too. Empty where the profile lacks a fact."""
    modes = [mode for mode in ("", "super") if not missing_facts(profile, mode)]
    fits = fits or {}
    half = replace(program, operators=tuple(replace(operator, floating=False) for operator in program.operators))
    estimates = []
    for mode in modes:
        known = rates_of(profile, mode).macs_per_s
        if "int8" in known:
            estimates.append(predict(program, profile, "int8", fitted=fits.get("tensorrt"), mode=mode))
        estimates.append(predict(half, profile, "fp16", fitted=fits.get("tensorrt"), mode=mode))
        if not program.fused_already:
            estimates.append(predict(program, profile, "fp32", "framework", fitted=fits.get("framework"), mode=mode))
    return estimates
