# SPDX-License-Identifier: Apache-2.0
"""One artifact of a bundle: built by its target, described in the manifest, checked against the outputs it must give."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from isthmus import reference
from isthmus.compare import FLOAT_TOLERANCE, Comparison, compare_outputs, top1_accuracy
from isthmus.dataset import Dataset
from isthmus.errors import VerificationError
from isthmus.graph import QuantGraph
from isthmus.layerwise import inside
from isthmus.plan import BuildPlan, StepResult, execute
from isthmus.profile import Profile
from isthmus.spec import TensorSpec
from isthmus.target import Target

GOLDEN_SAMPLES = 512
GOLDEN_BYTES = 64 * 2**20
STRESS_SAMPLES = 16
# What a layer may differ from the reference on its own inputs where layers decide: a step, on as few values as lie next to a tie (10 of 3.4 million
# measured, docs/layers.md; a weight that is not the form's moves a whole channel).
LAYER_STEPS = 1
LAYER_SHARE = 1e-3
Golden = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Job:
    """One artifact to make. `chosen`: the user set an option of this target himself."""

    profile: Profile
    target: Target
    options: Mapping[str, Any]
    chosen: bool = False


def build(graph: QuantGraph, job: Job, folder: Path) -> dict[str, Any]:
    """Plans, executes, and gives the artifact's manifest entry."""
    plan = job.target.plan(graph, job.profile, job.options)
    folder.mkdir(parents=True)
    return manifest_entry(plan, job, execute(plan, folder), folder, float_tolerance(graph, plan.max_lsb))


def manifest_entry(plan: BuildPlan, job: Job, results: Sequence[StepResult], folder: Path, tolerance: float) -> dict[str, Any]:
    """What `docs/bundle.md` says of an artifact; not verified yet."""
    return {
        "target": job.target.name,
        "board": job.profile.board,
        "arch": job.profile.arch,
        "artifact": plan.artifact,
        "engine": plan.engine,
        "size_bytes": (folder / plan.artifact).stat().st_size,
        "plan": plan.digest(),
        "inputs": [spec.to_json() for spec in plan.inputs],
        "outputs": [spec.to_json() for spec in plan.outputs],
        "options": dict(plan.options),
        "runs_here": plan.runs_here,
        "max_lsb_allowed": plan.max_lsb,
        "float_tolerance": tolerance,
        "why_lsb": plan.why_lsb,
        "steps": [asdict(result) for result in results],
        "planned": [asdict(step) for step in plan.steps if step.where != "host"],
        "notes": list(plan.notes),
        "verification": [],
        "accuracy": None,
    }


def check_artifact(
    folder: Path,
    name: str,
    entry: dict[str, Any],
    outputs: Sequence[TensorSpec],
    golden: Golden,
    judge: Callable[[Golden], float] | None = None,
    graph: QuantGraph | None = None,
) -> None:
    """Fills `verification` and `accuracy` of the entry, and `score` with what `judge` makes of the outputs.

    Where a target declares that it rounds otherwise, how far such a step grows on its way is no more than a rule of thumb: beyond it the layers of
    `graph` decide (`judged_by_layers`), and the entry then allows what was measured. Raises `VerificationError` where a difference is beyond that.
    """
    engine = import_module(f"isthmus.runtimes.{entry['engine']}")
    feeds, expected = golden_side(golden, "input"), golden_side(golden, "output")
    with engine.open_session(folder, entry, 1) as session:
        actual = session.run_samples(feeds)
    comparisons = compare_outputs(outputs, expected, actual, entry["max_lsb_allowed"], entry["float_tolerance"])
    found = ""
    if graph is not None and _may_have_grown(graph, entry, comparisons):
        allowed, found = judged_by_layers(folder, name, entry, graph, feeds, actual, comparisons)
        entry |= allowed
        comparisons = compare_outputs(outputs, expected, actual, entry["max_lsb_allowed"], entry["float_tolerance"])
    entry["verification"] = [comparison.to_json() for comparison in comparisons]
    entry["accuracy"] = accuracy_of(next(iter(actual.values())), golden["label"])
    if judge is not None:
        entry["score"] = judge(actual)
    for comparison in comparisons:
        if not comparison.passed:
            raise VerificationError(f"{name}: {difference(comparison, entry)}{found}")


def _may_have_grown(graph: QuantGraph, entry: Mapping[str, Any], comparisons: Sequence[Comparison]) -> bool:
    """Whether what is too far off are integers of an artifact that may round otherwise: with scales that are powers of two none should."""
    beyond = [comparison for comparison in comparisons if not comparison.passed]
    allowed = bool(entry["max_lsb_allowed"]) and graph.recipe.scheme != "power_of_two"
    return allowed and bool(beyond) and all(comparison.kind == "int8" and comparison.compared for comparison in beyond)


def judged_by_layers(
    folder: Path, name: str, entry: Mapping[str, Any], graph: QuantGraph, feeds: Golden, actual: Golden, comparisons: Sequence[Comparison]
) -> tuple[dict[str, Any], str]:
    """The fields of `entry` that change where every layer holds on its own inputs, {} where one does not; and then the words that name it.

    The last layers' outputs are the artifact's own, `actual`: what its inside shows has to explain them.
    """
    strict = {**entry, "layer_lsb_allowed": LAYER_STEPS, "float_tolerance": FLOAT_TOLERANCE}
    report = inside(folder, name, strict, graph, feeds, actual)
    if report is None or not report.layers:
        return {}, ""
    for layer in report.layers:
        own = layer.own
        if not own.passed or own.mismatched > 1 + LAYER_SHARE * own.compared:
            off = f"{own.mismatched} of {own.compared} elements, at most by {own.max_lsb or own.max_abs}"
            return {}, f"; on its own inputs layer {layer.layer} ({layer.op}) differs in {off}: more than a kernel that rounds otherwise"
    worst = max(comparison.max_lsb for comparison in comparisons)
    share = max(1 - comparison.exact_share for comparison in comparisons)
    steps = max(layer.own.max_lsb for layer in report.layers)
    why = (
        f"{entry['why_lsb']}; judged by layers: on its own inputs none of {len(report.layers)} is further off than {steps} step, end to end {worst} steps on"
        f" {100 * share:.2g} % of the values"
    )
    return {"max_lsb_allowed": worst, "layer_lsb_allowed": LAYER_STEPS, "why_lsb": why}, ""


def difference(comparison: Comparison, entry: Mapping[str, Any]) -> str:
    """The sentence of a comparison that did not pass."""
    return (
        f"output {comparison.tensor!r} differs from the integer reference in {comparison.mismatched} of {comparison.compared} elements,"
        f" at most by {comparison.max_lsb or comparison.max_abs} ({'steps' if comparison.kind == 'int8' else 'absolute'});"
        f" allowed: {entry['max_lsb_allowed']}"
    )


def float_tolerance(graph: QuantGraph, max_lsb: int) -> float:
    """A float tail may differ by as much as the steps it is allowed to be fed, and by what its weights make of them."""
    steps = [float(graph.tensors[node.inputs[0]].scale or 0) for node in graph.nodes if node.op == "DequantizeLinear"]
    return FLOAT_TOLERANCE + max_lsb * max(steps, default=0.0) * tail_gain(graph)


def tail_gain(graph: QuantGraph) -> float:
    """How much layers with weights that end the graph in float can enlarge a difference in every input: their largest sum of magnitudes an output."""
    largest = 1.0
    for spec in graph.outputs:
        gain, node = 1.0, graph.producer(spec.name)
        while node is not None and node.kind == "float" and node.inputs:
            weight = node.constants.get(1)
            if node.op in ("Conv", "Gemm", "MatMul") and weight is not None and weight.ndim >= 2:
                by_output = weight.T if node.op == "MatMul" or (node.op == "Gemm" and not node.attributes.get("transB", 0)) else weight
                gain *= max(1.0, float(np.abs(by_output).reshape(len(by_output), -1).sum(axis=1).max()))
            node = graph.producer(node.inputs[0])
        largest = max(largest, gain)
    return largest


# ---- golden inputs and outputs
def make_golden(graph: QuantGraph, evaluation: Dataset | None, most: int = GOLDEN_SAMPLES) -> dict[str, np.ndarray]:
    """Raw inputs, the reference's raw outputs, labels (-1 where there is none): real samples, then uniform noise over all of int8 and both extremes.

    The noise reaches saturation and ties that well-behaved samples do not. `most` real samples at most.
    """
    batch = graph.inputs[0].shape[0]
    real = min(real_samples(graph, evaluation), max(batch, most // batch * batch))
    stress = max(STRESS_SAMPLES // batch, 1) * batch
    generator = np.random.default_rng(0)
    feeds = {}
    for spec in graph.inputs:
        shape = (stress, *spec.shape[1:])
        if spec.is_quantised:
            noise = [generator.integers(-128, 128, shape, np.int8), np.full((batch, *shape[1:]), -128, np.int8), np.full((batch, *shape[1:]), 127, np.int8)]
        else:
            noise = [generator.standard_normal(shape).astype(np.float32), np.zeros((2 * batch, *shape[1:]), np.float32)]
        samples = [spec.quantise(evaluation.samples[spec.name][:real])] if evaluation and real else []
        feeds[spec.name] = np.concatenate([*samples, *noise])
    return as_golden(feeds, reference.run(graph, feeds), labels_of(evaluation, real, len(next(iter(feeds.values())))))


def real_samples(graph: QuantGraph, evaluation: Dataset | None) -> int:
    """How many samples of `evaluation` golden inputs begin with: whole batches, bounded in number and bytes."""
    batch = graph.inputs[0].shape[0]
    bytes_each = sum(spec.size for spec in (*graph.inputs, *graph.outputs)) * 4 // batch
    return min(GOLDEN_SAMPLES, max(batch, GOLDEN_BYTES // max(1, bytes_each)), len(evaluation) if evaluation else 0) // batch * batch


def labels_of(evaluation: Dataset | None, real: int, total: int) -> np.ndarray:
    labels = np.full(total, -1, np.int64)
    if evaluation is not None and evaluation.labels is not None:
        labels[:real] = evaluation.labels[:real]
    return labels


def as_golden(inputs: Golden, outputs: Golden, labels: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays of `golden.npz`, by the names they have there."""
    return {f"input/{name}": array for name, array in inputs.items()} | {f"output/{name}": array for name, array in outputs.items()} | {"label": labels}


def save_golden(file: Path, golden: Golden) -> None:
    np.savez_compressed(file, **golden)  # type: ignore[arg-type]  # numpy's stub confuses **arrays with allow_pickle


def golden_side(golden: Golden, side: str) -> dict[str, np.ndarray]:
    return {name.partition("/")[2]: array for name, array in golden.items() if name.startswith(f"{side}/")}


def accuracy_of(outputs: np.ndarray, labels: np.ndarray) -> float | None:
    """Top-1 on the samples that have a label; None without."""
    known = labels >= 0
    return top1_accuracy(outputs[known], labels[known]) if known.any() else None
