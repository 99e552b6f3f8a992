# SPDX-License-Identifier: Apache-2.0
"""`Tuning`: target cpu takes the artifact that is fastest on this machine and whose accuracy holds; every candidate's figures go into the manifest.

Candidates are the engines that are installed, each on the compiled form and on the model quantised anew in other schemes, and the float model.
They are built by their own targets, compared with a reference of their own numbers, and timed in turns.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from isthmus.artifact import (
    Golden,
    Job,
    accuracy_of,
    as_golden,
    build,
    check_artifact,
    golden_side,
    labels_of,
    make_golden,
    manifest_entry,
    real_samples,
    save_golden,
)
from isthmus.bench import Rules, measure_interleaved, raw_feeds
from isthmus.dataset import Dataset
from isthmus.errors import IsthmusError
from isthmus.float_model import run_float
from isthmus.graph import QuantGraph
from isthmus.measurement import Measurement, pooled, ratio_interval
from isthmus.plan import BuildPlan, execute
from isthmus.post_training import PostTraining
from isthmus.recipe import Recipe
from isthmus.registry import load_target
from isthmus.session import Session
from isthmus.source import Say, Score
from isthmus.spec import TensorSpec
from isthmus.tools import find_tool

TUNED_TARGET = "cpu"
MAX_DROP = 0.01
CLOSE = 0.02  # of the range of an output without classes: what counts as the same value
COMPARED_SAMPLES = 16  # of a candidate; what is taken is compared on all golden samples
RULES = Rules(min_count=200, min_duration_s=0.2, max_duration_s=1.0, max_warmup_s=0.3, percentile=50.0)
# Those that the first round cannot tell apart: longer, and opened anew several times, since where buffers come to lie is worth several per cent.
FINAL_RULES = replace(RULES, min_duration_s=0.5, max_duration_s=2.0)
FINAL_ROUNDS = 3
LEAST_COUNT = 16  # of runs
ROOM = 1.5  # a run may take so many times as long as while the candidate was judged
FLOAT_TOLERANCE = 1e-3  # of a float model: optimised kernels add in another order, layer after layer
FLOAT = "float"
FLOAT_FILE, FORM_FILE, GOLDEN_FILE = "model.onnx", "form.onnx", "golden.npz"


@dataclass(frozen=True)
class _Way:
    """One way to run a form: a target with options, and the engine's tool that must be here."""

    engine: str
    tool: str
    target: str
    options: Mapping[str, Any]


FLOAT_BORDER = {"io": "float32"}  # both engines compute in uint8: from int8 they would go through float anyway, one step more
WAYS = (
    _Way("ONNX Runtime", "onnxruntime", "cpu", FLOAT_BORDER),
    _Way("LiteRT", "litert", "tflite", {}),
    _Way("OpenVINO", "openvino", "cpu", FLOAT_BORDER | {"engine": "openvino"}),
)


# Seven bits open the fastest kernels of these two on x86 without VNNI (targets/cpu/weighted.py); LiteRT needs none, and gains nothing.
WAYS_OF = {8: WAYS, 7: (WAYS[0], WAYS[2])}
# Of the float model as it is; their tool is the engine's name in `runtimes/` too. LiteRT has no reader of ONNX.
WAYS_OF_FLOAT = (replace(WAYS[0], options={"optimisation": "all"}), replace(WAYS[2], options={}))


@dataclass(frozen=True)
class _Form:
    """The numbers that a candidate computes: an int8 form, or without one the float model; `name` is its scheme, and how many bits its weights have."""

    name: str
    graph: QuantGraph | None
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    golden: Golden


@dataclass
class _Candidate:
    """One artifact tried. `refused` says why it cannot be taken; the fields behind it are filled as far as it came."""

    name: str
    engine: str
    form: _Form | None = None
    entry: dict[str, Any] | None = None
    folder: Path = Path()
    refused: str = ""
    score: float | None = None
    run_s: float = 0.0  # of one run, roughly: taken while it was judged
    measurement: Measurement | None = None
    ratio: tuple[float, float, float] | None = None

    def to_json(self, taken: bool) -> dict[str, Any]:
        checks = self.entry["verification"] if self.entry else []
        compared = sum(check["compared"] for check in checks)
        return {
            "candidate": self.name,
            "form": self.name.partition(", ")[2],
            "engine": self.engine,
            "p50_ns": int(self.measurement.p50_ns) if self.measurement and self.measurement.count else None,
            "ratio": dict(zip(("ratio", "low", "high"), self.ratio, strict=True)) if self.ratio else None,
            "score": self.score,
            "exact_share": 1 - sum(check["mismatched"] for check in checks) / compared if compared else None,
            "max_lsb": max((check["max_lsb"] for check in checks if check["kind"] == "int8"), default=None),
            "size_bytes": self.entry["size_bytes"] if self.entry else None,
            "taken": taken,
            "why_not": "" if taken else self.refused,
        }


class Tuning:
    """One artifact of target cpu, tuned. `golden` are the bundle's; `quantiser` where the model came as float with samples to calibrate on.

    The truth that candidates are judged by: labels; without them the float model's decisions; without that the compiled form's. A candidate may
    lie at most `MAX_DROP` below the compiled form's reference; where `--recipe auto` was given a `max_drop`, at most that below the float model.
    Where the task decides no class, `task` says in the entry what the artifact's outputs are worth; the choice stays one by decisions and values.
    """

    def __init__(
        self,
        graph: QuantGraph,
        golden: Golden,
        evaluation: Dataset | None,
        quantiser: PostTraining | None,
        float_model: onnx.ModelProto | None,
        max_drop: float | None,
        job: Job,
        threads: int,
        say: Say,
        task: Score | None = None,
    ) -> None:
        self.threads, self.task = threads, task
        self.graph, self.evaluation, self.quantiser, self.float_model, self.job, self.say = graph, evaluation, quantiser, float_model, job, say
        self.real = real_samples(graph, evaluation)
        self.form = _Form(_title(graph.recipe.scheme, graph.recipe.weight_bits), graph, graph.inputs, graph.outputs, golden)
        self.judge = _Judge(self.form, evaluation, self.real, float_model, max_drop)

    def run(self, entry: dict[str, Any], folder: Path) -> dict[str, Any]:
        """The entry of the artifact that is taken, its files in `folder`; the untuned one's, as given, where nothing is faster."""
        with tempfile.TemporaryDirectory(prefix="isthmus-tuning-") as place:
            untuned = _Candidate(f"untuned: {WAYS[0].engine}, {self.form.name}", WAYS[0].engine, self.form, entry, folder)
            candidates = [untuned, *self._candidates(Path(place))]
            for candidate in candidates:
                if not candidate.refused:
                    self._judged(candidate)
            self._timed(candidates, untuned)
            taken = self._taken(candidates, untuned)
            two_threads = self._on_two_threads(taken, untuned)
            if taken is not untuned:
                shutil.rmtree(folder)
                shutil.copytree(taken.folder, folder)
        assert taken.entry is not None
        return taken.entry | {"tuning": self._record(candidates, taken, untuned, two_threads)}

    # ---- building
    def _candidates(self, place: Path) -> list[_Candidate]:
        found = [self._built(way, self.form, place) for way in WAYS]
        for recipe in self._recipes():
            try:
                form = self._form(recipe)
            except IsthmusError as error:
                found += [_Candidate(f"{way.engine}, {recipe.name}", way.engine, refused=str(error)) for way in WAYS_OF[recipe.weight_bits]]
                continue
            found += [self._built(way, form, place) for way in WAYS_OF[recipe.weight_bits]]
        if self.float_model is not None and self.evaluation is not None:
            inputs, outputs = (tuple(TensorSpec(spec.name, spec.shape, "float32") for spec in side) for side in (self.graph.inputs, self.graph.outputs))
            form = _Form(FLOAT, None, inputs, outputs, self._float_golden(COMPARED_SAMPLES))
            found += [self._float(way, form, place) for way in WAYS_OF_FLOAT]
        return found

    def _recipes(self) -> list[Recipe]:
        """Other schemes, with whatever else the user's recipe says; training and learnt rounding are left out, as they take minutes."""
        if self.quantiser is None:
            return []
        own = replace(self.graph.recipe, per_channel=True, qat_epochs=0, rounding="nearest", edge_weight_bits=0)
        recipes = [replace(own, name=_title(scheme, bits), scheme=scheme, weight_bits=bits) for scheme in ("asymmetric", "symmetric") for bits in (8, 7)]
        return [recipe for recipe in recipes if recipe.scheme != self.graph.recipe.scheme or recipe.weight_bits != self.graph.recipe.weight_bits]

    def _form(self, recipe: Recipe) -> _Form:
        assert self.quantiser is not None
        self.say(f"{self.job.profile.name}: quantising for comparison ({recipe.name})", None)
        graph, _ = self.quantiser.graph(recipe)
        return _Form(recipe.name, graph, graph.inputs, graph.outputs, make_golden(graph, self.evaluation, COMPARED_SAMPLES))

    def _built(self, way: _Way, form: _Form, place: Path) -> _Candidate:
        candidate = _Candidate(f"{way.engine}, {form.name}", way.engine, form, folder=place / f"{way.engine}, {form.name}")
        tool = find_tool(way.tool)
        if not tool.found:
            candidate.refused = f"{way.engine} is not here: {tool.fix}"
            return candidate
        assert form.graph is not None
        target = load_target(way.target)
        try:
            problems = target.check(form.graph, self.job.profile)
            if problems:
                candidate.refused = str(problems[0])
                return candidate
            job = Job(self.job.profile, target, target.with_defaults(way.options))
            candidate.entry = build(form.graph, job, candidate.folder)
            judge = self._worth(form) if form is self.form else None  # others are asked with all golden samples, if they are taken
            check_artifact(candidate.folder, candidate.name, candidate.entry, form.outputs, form.golden, judge, form.graph)
        except IsthmusError as error:
            candidate.refused = str(error)
        return candidate

    def _worth(self, form: _Form) -> Callable[[Golden], float] | None:
        """What raw outputs in the numbers of `form` for all golden samples are worth to the task."""
        task = self.task
        return None if task is None else lambda raw: task.of(list(_real_numbers(form.outputs, raw, self.real).values()))

    def _float(self, way: _Way, form: _Form, place: Path) -> _Candidate:
        """The float model as it is. It is compared with itself, node by node, without ONNX Runtime's optimiser."""
        assert self.float_model is not None
        candidate = _Candidate(f"{way.engine}, {FLOAT}", way.engine, form, folder=place / f"{way.engine}, {FLOAT}")
        tool = find_tool(way.tool)
        if not tool.found:
            candidate.refused = f"{way.engine} is not here: {tool.fix}"
            return candidate
        content = self.float_model.SerializeToString(deterministic=True)
        why = "the float model: compared with itself without optimisation"
        plan = BuildPlan({FLOAT_FILE: content}, (), FLOAT_FILE, way.tool, form.inputs, form.outputs, notes=(why,), options=way.options)
        candidate.folder.mkdir()
        try:
            candidate.entry = manifest_entry(plan, self.job, execute(plan, candidate.folder), candidate.folder, FLOAT_TOLERANCE)
            check_artifact(candidate.folder, candidate.name, candidate.entry, form.outputs, form.golden)
        except IsthmusError as error:
            candidate.refused = str(error)
        return candidate

    def _float_golden(self, most: int) -> dict[str, np.ndarray]:
        assert self.float_model is not None and self.evaluation is not None
        batch = self.graph.inputs[0].shape[0]
        count = min(self.real, max(batch, most // batch * batch))
        feeds = {spec.name: np.ascontiguousarray(self.evaluation.samples[spec.name][:count], np.float32) for spec in self.graph.inputs}
        return as_golden(feeds, run_float(self.float_model, feeds, optimise=False), labels_of(self.evaluation, count, count))

    # ---- judging and timing
    def _judged(self, candidate: _Candidate) -> None:
        with _opened(candidate) as session:
            begun = time.perf_counter()
            candidate.score = self.judge.score(session, candidate.form or self.form)
            candidate.run_s = (time.perf_counter() - begun) / self.judge.runs
        if not self.judge.holds(candidate.score):
            candidate.refused = f"{self.judge.metric} {candidate.score:.4f} is below {self.judge.least:.4f}"

    def _timed(self, candidates: Sequence[_Candidate], untuned: _Candidate) -> None:
        """All that could be built, in turns: also those whose accuracy does not hold, so that the table says what it would have bought.

        Then once more, and longer, those that may be the fastest by their intervals.
        """
        self.say(f"{self.job.profile.name}: timing {sum(1 for one in candidates if one.score is not None)} candidates", None)
        self._compared([one for one in candidates if one.score is not None], untuned, RULES)
        able = [one for one in candidates if not one.refused and one.ratio is not None]
        if able:
            least = min(one.ratio[2] for one in able if one.ratio)
            near = [one for one in able if one.ratio and one.ratio[1] <= least]
            if len(near) > 1 or least >= 1:
                self.say(f"{self.job.profile.name}: timing {len(near)} of them again", None)
                self._compared([untuned, *near], untuned, FINAL_RULES, FINAL_ROUNDS)

    def _compared(self, candidates: Sequence[_Candidate], untuned: _Candidate, rules: Rules, rounds: int = 1) -> None:
        """Each one's measurement, and its ratio to the untuned's."""
        measured = _measured(candidates, replace(rules, threads=self.threads), rounds)
        for candidate in candidates:
            candidate.measurement = measured[candidate.name]
            why = _unusable(candidate.measurement)
            candidate.refused = candidate.refused or why
            if not why and not _unusable(measured[untuned.name]) and candidate is not untuned:
                candidate.ratio = ratio_interval(candidate.measurement, measured[untuned.name])

    def _taken(self, candidates: Sequence[_Candidate], untuned: _Candidate) -> _Candidate:
        """The fastest whose accuracy holds and that is faster than the untuned beyond the noise; the others learn why not."""
        ready = [one for one in candidates if not one.refused and one.ratio is not None and one is not untuned]
        taken = untuned
        for one in sorted(ready, key=lambda one: one.ratio or (1.0,)):
            assert one.ratio is not None
            if taken is not untuned:
                one.refused = f"slower than {taken.name}"
            elif one.ratio[2] >= 1:
                one.refused = f"not faster than {untuned.name} beyond the noise"
            elif self._completed(one):
                taken = one
        if taken is not untuned:
            untuned.refused = untuned.refused or f"slower than {taken.name}"
        return taken

    def _completed(self, candidate: _Candidate) -> bool:
        """Whether what is to be taken passes on all golden samples; where it computes other numbers than the bundle's form, these go with it."""
        form, entry = candidate.form, candidate.entry
        assert form is not None and entry is not None
        if form is self.form:
            return True
        golden = self._float_golden(self.real) if form.graph is None else make_golden(form.graph, self.evaluation)
        try:
            check_artifact(candidate.folder, candidate.name, entry, form.outputs, golden, self._worth(form), form.graph)
        except IsthmusError as error:
            candidate.refused = str(error)
            return False
        save_golden(candidate.folder / GOLDEN_FILE, golden)
        if form.graph is not None:
            form.graph.save(candidate.folder / FORM_FILE)
        entry["reference"] = {
            "form": FORM_FILE if form.graph is not None else None,
            "golden": GOLDEN_FILE,
            "scheme": form.graph.recipe.scheme if form.graph is not None else FLOAT,
            "digest": form.graph.digest if form.graph is not None else None,
            "outputs": [spec.to_json() for spec in form.outputs],
        }
        return True

    def _on_two_threads(self, taken: _Candidate, untuned: _Candidate) -> dict[str, int]:
        """p50 in ns of what is taken and of the untuned; empty where tuned for several threads, or on one processor."""
        if self.threads != 1 or len(os.sched_getaffinity(0)) < 2:
            return {}
        measured = _measured([untuned, *([taken] if taken is not untuned else [])], replace(RULES, threads=2))
        return {name: int(one.p50_ns) for name, one in measured.items() if not _unusable(one)}

    def _record(self, candidates: Sequence[_Candidate], taken: _Candidate, untuned: _Candidate, two_threads: Mapping[str, int]) -> dict[str, Any]:
        base = untuned.measurement
        return {
            "cpu_model": base.conditions.get("cpu_model") if base else None,
            "threads": self.threads,
            "metric": self.judge.metric,
            "samples": self.judge.samples,
            "untuned": untuned.name,
            "untuned_score": self.judge.untuned,
            "least_score": self.judge.least,
            "p50_ns_two_threads": dict(two_threads),
            "candidates": [one.to_json(one is taken) for one in candidates],
        }


class _Judge:
    """What candidates are judged by, and the least that holds (see `Tuning`)."""

    def __init__(self, form: _Form, evaluation: Dataset | None, real: int, float_model: onnx.ModelProto | None, max_drop: float | None) -> None:
        self.golden, self.evaluation, self.real = form.golden, evaluation, real
        self.labels = form.golden["label"][:real]
        self.runs = max(1, (real or len(form.golden["label"])) // form.inputs[0].shape[0])  # that `score` takes
        floats: Mapping[str, np.ndarray] = {}
        if float_model is not None and evaluation is not None and real:
            floats = run_float(float_model, {name: array[:real] for name, array in evaluation.samples.items()})
        untuned = _real_numbers(form.outputs, golden_side(form.golden, "output"), real)
        if real and (self.labels >= 0).any():
            self.metric, self.samples = "top-1 accuracy", int((self.labels >= 0).sum())
            self.truth: Mapping[str, np.ndarray] | None = None
        else:
            self.metric = f"agreement with the decisions of the {'float model' if floats else 'compiled form'}"
            self.truth, self.samples = floats or untuned, real or len(form.golden["label"])
        self.untuned = self._score(untuned)
        self.least = self.untuned - MAX_DROP
        if max_drop is not None and floats:
            self.least = min(self.untuned, self._score(floats) - max_drop)

    def score(self, session: Session, form: _Form) -> float:
        if self.evaluation is not None and self.real:
            feeds = {spec.name: spec.quantise(self.evaluation.samples[spec.name][: self.real]) for spec in form.inputs}
        else:
            feeds = golden_side(self.golden, "input")
        return self._score(_real_numbers(form.outputs, session.run_samples(feeds), self.real))

    def holds(self, score: float) -> bool:
        return score >= self.least - 1e-9  # shares of a count: a drop of exactly the allowed size is allowed

    def _score(self, outputs: Mapping[str, np.ndarray]) -> float:
        if self.truth is not None:
            return agreement(self.truth, outputs)
        accuracy = accuracy_of(next(iter(outputs.values())), self.labels)
        assert accuracy is not None  # there are labels
        return accuracy


def agreement(expected: Mapping[str, np.ndarray], actual: Mapping[str, np.ndarray]) -> float:
    """The share of equal decisions, of the output where it is least: the largest of the classes, at each place where there are several.

    Classes lie along axis 1 of (N, C) and (N, C, H, W), and along the last of (N, places, C). Where there is a single one, a value counts as equal
    within `CLOSE` of the expected values' range.
    """
    return min(_equal_share(array, actual[name]) for name, array in expected.items())


def _equal_share(expected: np.ndarray, actual: np.ndarray) -> float:
    axis = -1 if expected.ndim == 3 else 1
    if expected.ndim < 2 or expected.shape[axis] == 1:
        span = float(expected.max() - expected.min())
        return float((np.abs(expected.astype(np.float64) - actual) <= CLOSE * span).mean())
    return float((expected.argmax(axis=axis) == actual.argmax(axis=axis)).mean())


def _title(scheme: str, weight_bits: int) -> str:
    return scheme if weight_bits == 8 else f"{scheme}, {weight_bits}-bit weights"


def _real_numbers(specs: Sequence[TensorSpec], raw: Mapping[str, np.ndarray], real: int) -> dict[str, np.ndarray]:
    return {spec.name: spec.dequantise(raw[spec.name][: real or None]) for spec in specs}


def _opened(candidate: _Candidate, threads: int = 1) -> Session:
    assert candidate.entry is not None
    session: Session = import_module(f"isthmus.runtimes.{candidate.entry['engine']}").open_session(candidate.folder, candidate.entry, threads)
    return session


def _measured(candidates: Sequence[_Candidate], rules: Rules, rounds: int = 1) -> dict[str, Measurement]:
    """All stop with the first that meets the time limit, so the limit is one in which the slowest has its samples."""
    rules = replace(rules, max_duration_s=max(rules.max_duration_s, ROOM * LEAST_COUNT * max(one.run_s for one in candidates)))
    found = [_measured_once(candidates, rules) for _ in range(rounds)]
    return {one.name: pooled([measured[one.name] for measured in found]) for one in candidates}


def _measured_once(candidates: Sequence[_Candidate], rules: Rules) -> dict[str, Measurement]:
    with ExitStack() as stack:
        sessions = {}
        for one in candidates:
            assert one.form is not None
            session = stack.enter_context(_opened(one, rules.threads))
            sessions[one.name] = (session, raw_feeds(session, one.form.golden))
        return measure_interleaved(sessions, rules)


def _unusable(measurement: Measurement) -> str:
    """Why a measurement is no ground for a choice. An unsettled warm-up and the time limit are none: all took turns, and the ratio has its interval."""
    failures = [reason for reason in measurement.reasons if not reason.startswith(("warm-up", "time limit"))]
    if measurement.count >= LEAST_COUNT and not failures:
        return ""
    return "; ".join(failures) or f"{measurement.count} samples in {measurement.elapsed_ns / 1e9:.1f} s, {LEAST_COUNT} are needed"
