# SPDX-License-Identifier: Apache-2.0
"""`--recipe auto`: climbs from the plainest recipe to layers kept float, and stops at the first that keeps the accuracy and that every target takes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from isthmus.compare import top1_accuracy
from isthmus.dataset import Dataset
from isthmus.errors import IsthmusError, Problem
from isthmus.float_model import run_float
from isthmus.graph import QuantGraph
from isthmus.post_training import PostTraining, layer_sensitivity, outputs_of, with_islands
from isthmus.recipe import Recipe, load_recipe
from isthmus.source import Say

MAX_DROP = 0.005
JUDGED_SAMPLES = 1000
RANKED_SAMPLES = 64  # for the order of the layers; each of them is tried once
FLOAT_SHARE = 0.5  # of the layers at most: with more of them float the network is no int8 network

Check = Callable[[QuantGraph], Sequence[Problem]]
Train = Callable[[Recipe], tuple[QuantGraph, list[str]]]


@dataclass(frozen=True)
class Attempt:
    """One recipe tried: `score` as `Climb.metric` says, None where it was `refused` (by a target, or by the form) in these words."""

    what: str
    recipe: Recipe
    score: float | None = None
    sqnr_db: float = -math.inf
    refused: str = ""
    seconds: float = 0.0


def is_auto(recipe: object) -> bool:
    return isinstance(recipe, str) and (recipe == "auto" or recipe.startswith("auto:"))


def base_recipe(text: str) -> Recipe:
    """What "auto" (the portable scheme) or "auto:NAME_OR_FILE" starts from."""
    return replace(load_recipe(text.partition(":")[2] or "portable"), name="auto", qat_epochs=0)


def climb(
    quantiser: PostTraining, evaluation: Dataset, base: Recipe, max_drop: float, check: Check, say: Say, train: Train | None = None
) -> tuple[QuantGraph, list[str]]:
    """The first graph that holds, and in sentences what was tried. `train` makes a graph by training (QAT), where the model is a module.

    Judged by top-1 on the labels of `evaluation`, or without labels by how often the decision is the float model's; on at most `JUDGED_SAMPLES`.
    Raises `IsthmusError` listing every attempt with its figures where none holds.
    """
    if not 0 <= max_drop < 1:
        raise IsthmusError(f"--max-drop {max_drop}: expected a share from 0 to below 1, for example 0.005")
    return _Climb(quantiser, evaluation, base, max_drop, check, say, train).run()


class _Climb:
    def __init__(self, quantiser: PostTraining, evaluation: Dataset, base: Recipe, max_drop: float, check: Check, say: Say, train: Train | None = None) -> None:
        self.quantiser, self.base, self.max_drop, self.check, self.say, self.train = quantiser, base, max_drop, check, say, train
        self.samples = quantiser.whole_batches(evaluation, JUDGED_SAMPLES)
        self.exact = run_float(quantiser.model, self.samples.samples)
        self.first = next(iter(self.exact))
        decided = self.exact[self.first].reshape(len(self.samples), -1).argmax(axis=1)
        self.labelled = self.samples.labels is not None
        self.truth: np.ndarray = decided if self.samples.labels is None else self.samples.labels
        self.float_score = top1_accuracy(self.exact[self.first], self.truth)
        self.metric = "top-1" if self.labelled else "agreement with the float model's decisions (the data has no labels)"
        self.attempts: list[Attempt] = []

    def run(self) -> tuple[QuantGraph, list[str]]:
        for what, recipe in self._steps():
            started = time.perf_counter()
            graph, notes, attempt = self._tried(what, recipe)
            attempt = replace(attempt, seconds=time.perf_counter() - started)
            self.attempts.append(attempt)
            self.say(f"recipe auto: {self._told(attempt)}", None)
            if graph is not None and self._holds(attempt):
                return graph, [self._goal(), *(f"tried {self._told(each)}" for each in self.attempts), *notes]
        lines = "\n".join(f"  - {self._told(attempt)}" for attempt in self.attempts)
        raise IsthmusError(
            f"no recipe holds: {self._goal()}; tried\n{lines}\nAllow a larger --max-drop, give more or better calibration data, choose targets that take float"
            " layers (cpu), or train with the rounding in place (QAT)"
        )

    # ---- the steps, each built on the best so far
    def _steps(self) -> Iterator[tuple[str, Recipe]]:
        for observer, name in (("minmax", "min-max"), ("percentile", f"percentile {self.base.percentile:g}"), ("mse", "least squared error")):
            yield f"{self.base.scheme}, ranges by {name}", replace(self.base, observer=observer)
        if not self.base.per_channel:
            yield "one weight scale a channel", replace(self._best(), per_channel=True)
        for equalised in (False, True):
            best = replace(self._best(), equalise=False, bias_correction=False)
            what = "channels equalised, biases corrected" if equalised else "biases corrected"
            yield f"{_described(best)}, {what}", replace(best, equalise=equalised, bias_correction=True)
        best = self._best()
        if self.train is not None:
            yield self._training()
        yield from self._islands(best)

    def _training(self) -> tuple[str, Recipe]:
        """Training takes scheme and granularity of what the user began with, and the epochs and rate of the recipe that ships for it."""
        shipped = load_recipe("portable-qat")
        plain = replace(self.base, equalise=False, bias_correction=False, rounding="nearest")  # what follows is calibration alone
        recipe = replace(plain, observer=shipped.observer, qat_epochs=shipped.qat_epochs, qat_learning_rate=shipped.qat_learning_rate)
        return f"trained with the rounding (QAT), {recipe.qat_epochs} epochs", recipe

    def _islands(self, recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
        names = [name for name in self.quantiser.layers() if not recipe.keeps_float(name)]
        if len(names) < 2:
            return
        refusals = {name: self._refusal(with_islands(replace(recipe, bias_correction=False, rounding="nearest"), [name])) for name in names}
        if all(refusals.values()):
            self.attempts.append(Attempt("layers kept float", recipe, refused=refusals[names[0]]))
            return
        samples = self.quantiser.whole_batches(self.samples, RANKED_SAMPLES)
        ranked = [row.name for row in layer_sensitivity(self.quantiser, samples, recipe, "sqnr", self.say, spared=False).layers if not refusals[row.name]]
        count, most = 1, max(1, int(len(names) * FLOAT_SHARE))
        while True:
            kept = ranked[: min(count, most)]
            yield f"{_described(recipe)}, float: {', '.join(kept)}", with_islands(recipe, kept)
            if count >= min(most, len(ranked)):
                return
            count *= 2

    def _refusal(self, recipe: Recipe) -> str:
        try:
            problems = self.check(self.quantiser.graph(recipe)[0])
        except IsthmusError as error:
            return str(error)
        return str(problems[0]) if problems else ""

    def _best(self) -> Recipe:
        accepted = [attempt for attempt in self.attempts if attempt.score is not None]
        return max(accepted, key=lambda attempt: (attempt.score, attempt.sqnr_db)).recipe if accepted else self.base

    # ---- one step
    def _tried(self, what: str, recipe: Recipe) -> tuple[QuantGraph | None, list[str], Attempt]:
        from isthmus.quantize.sensitivity import sqnr_db

        try:
            graph, notes = self.train(recipe) if recipe.qat_epochs and self.train is not None else self.quantiser.graph(recipe)
        except IsthmusError as error:
            if not self.attempts:
                raise  # wrong data or a wrong model, no matter of the recipe
            return None, [], Attempt(what, recipe, refused=str(error))
        problems = self.check(graph)
        if problems:
            return None, [], Attempt(what, recipe, refused=str(problems[0]))
        outputs = outputs_of(graph, self.samples)
        return graph, notes, Attempt(what, recipe, top1_accuracy(outputs[self.first], self.truth), sqnr_db(self.exact, outputs))

    def _holds(self, attempt: Attempt) -> bool:
        # Shares of a count: a drop of exactly the allowed size is allowed, whatever float64 makes of the difference.
        return attempt.score is not None and self.float_score - attempt.score <= self.max_drop + 1e-9

    def _told(self, attempt: Attempt) -> str:
        if attempt.score is None:
            return f"{attempt.what}: refused: {attempt.refused}"
        figures = f"{attempt.score:.4f} ({attempt.score - self.float_score:+.4f}), SQNR {attempt.sqnr_db:.1f} dB, {attempt.seconds:.1f} s"
        return f"{attempt.what}: {figures}: {'holds' if self._holds(attempt) else 'too low'}"

    def _goal(self) -> str:
        value = f"float {self.float_score:.4f}" if self.labelled else "1 for float"
        return f"recipe auto: {self.metric}, {value}, on {len(self.samples)} samples, at most {self.max_drop:g} lower"


def _described(recipe: Recipe) -> str:
    words = [recipe.observer, *(["per channel"] if recipe.per_channel else []), *(["equalised"] if recipe.equalise else [])]
    return ", ".join([*words, *(["biases corrected"] if recipe.bias_correction else [])])
