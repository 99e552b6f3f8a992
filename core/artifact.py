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
from isthmus.plan import BuildPlan, StepResult, execute
from isthmus.profile import Profile
from isthmus.spec import TensorSpec
from isthmus.target import Target

GOLDEN_SAMPLES = 512
GOLDEN_BYTES = 64 * 2**20
STRESS_SAMPLES = 16
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
    folder: Path, name: str, entry: dict[str, Any], outputs: Sequence[TensorSpec], golden: Golden, judge: Callable[[Golden], float] | None = None
) -> None:
    """Fills `verification` and `accuracy` of the entry, and `score` with what `judge` makes of the outputs.

    Raises `VerificationError` where a difference is beyond what the target declared.
    """
    engine = import_module(f"isthmus.runtimes.{entry['engine']}")
    with engine.open_session(folder, entry, 1) as session:
        actual = session.run_samples(golden_side(golden, "input"))
    comparisons = compare_outputs(outputs, golden_side(golden, "output"), actual, entry["max_lsb_allowed"], entry["float_tolerance"])
    entry["verification"] = [comparison.to_json() for comparison in comparisons]
    entry["accuracy"] = accuracy_of(next(iter(actual.values())), golden["label"])
    if judge is not None:
        entry["score"] = judge(actual)
    for comparison in comparisons:
        if not comparison.passed:
            raise VerificationError(f"{name}: {difference(comparison, entry)}")


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
