# SPDX-License-Identifier: Apache-2.0
"""Candidates for `select` out of bundles: every artifact that runs here, and ensembles of them, with the bytes, times and decisions measured there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from isthmus.artifact import golden_side
from isthmus.bench_bundle import read_measurements
from isthmus.bundle import Bundle
from isthmus.candidates import Table
from isthmus.cost import cost_of_graph
from isthmus.errors import IsthmusError
from isthmus.graph import QuantGraph
from isthmus.select import METRICS, Candidate, combined_cost, subsets
from isthmus.spec import TensorSpec

MIB = 2**20
# What fronts and radar look at by default. `size_mb`, the same weights in float32, is there for a budget that was set for float models.
COSTS = ("int8_mb", "macs_m", "latency_ms")
METRIC_NAMES = dict(zip(METRICS, ("weighted_sensitivity", "weighted_precision", "balanced_accuracy", "auc"), strict=True))


@dataclass(frozen=True)
class Artifact:
    """One that runs here. `latency_ms` is among `costs` where it was measured."""

    name: str
    bundle: Bundle
    profile: str
    accuracy: float
    costs: Mapping[str, float]


def table_of_bundles(paths: Sequence[str | Path], ensembles: int = 1, trust: bool = False) -> Table:
    """One candidate an artifact that runs here, of the kind of its profile: accuracy as the manifest has it, bytes of the file, MACs, measured latency.

    `ensembles` above 1: beside them every ensemble of two to so many artifacts of one profile, which is the mean of their probabilities; the members
    then run on the golden samples, and all metrics of `METRICS` come from there. Costs add up, latencies are those of the slowest member.
    A cost that not every artifact has is left out. Raises `IsthmusError` where samples have no labels, or bundles hold different samples.
    """
    artifacts = [artifact for name, path in _named(paths).items() for artifact in _artifacts(name, path)]
    if not artifacts:
        raise IsthmusError(f"{', '.join(map(str, paths))}: no artifact there runs here, so nothing is known to choose by")
    shared = [cost for cost in artifacts[0].costs if all(cost in artifact.costs for artifact in artifacts)]
    artifacts = [Artifact(a.name, a.bundle, a.profile, a.accuracy, {cost: a.costs[cost] for cost in shared}) for a in artifacts]
    costs = tuple(cost for cost in COSTS if cost in shared)
    if ensembles > 1:
        return Table({"": tuple(_ensembles(artifacts, ensembles, trust))}, METRICS, costs)
    return Table({"": tuple(Candidate(a.name, a.profile, {"top1": a.accuracy}, a.costs) for a in artifacts)}, ("top1",), costs)


def _named(paths: Sequence[str | Path]) -> dict[str, Path]:
    """Bundles by the names of their folders, or where two are called alike by their paths. Raises `IsthmusError` on one that is given twice."""
    folders = [Path(path) for path in paths]
    twice = [folder for index, folder in enumerate(folders) if folder.resolve() in [other.resolve() for other in folders[:index]]]
    if twice:
        raise IsthmusError(f"{twice[0]}: is given twice; name each bundle once")
    short = [folder.resolve().name for folder in folders]
    names = short if len(set(short)) == len(short) else [str(folder) for folder in folders]
    return dict(zip(names, folders, strict=True))


def _artifacts(name: str, path: Path) -> list[Artifact]:
    bundle = Bundle.open(path)
    measurements = read_measurements(bundle)
    cost = cost_of_graph(QuantGraph.load(bundle.model))
    found = []
    for profile in bundle.profiles:
        entry = bundle.artifact(profile)
        if not entry["runs_here"]:
            continue
        if entry.get("accuracy") is None:
            raise IsthmusError(f"{bundle.root}: artifact {profile!r} has no accuracy: compile it with labelled samples (--data)")
        costs = {"int8_mb": entry["size_bytes"] / MIB, "macs_m": cost.macs / 1e6, "size_mb": cost.parameters * 4 / MIB}
        if profile in measurements:
            costs["latency_ms"] = measurements[profile].p50_ns / 1e6
        found.append(Artifact(f"{name}:{profile}", bundle, profile, float(entry["accuracy"]), costs))
    return found


# ---- ensembles
def _ensembles(artifacts: Sequence[Artifact], most: int, trust: bool) -> list[Candidate]:
    """Single artifacts, and every ensemble of up to `most` of one profile."""
    from isthmus.train.ensemble import mean_probabilities

    _same_samples([artifact.bundle for artifact in artifacts])
    found = []
    for profile in dict.fromkeys(artifact.profile for artifact in artifacts):
        own = {artifact.name: artifact for artifact in artifacts if artifact.profile == profile}
        decided = {name: _probabilities(artifact, trust) for name, artifact in own.items()}
        labels = _labels(next(iter(own.values())).bundle)
        for members in subsets(list(own)):
            if len(members) > most:
                continue
            chosen = [own[name] for name in members]
            costs = {cost: combined_cost(cost, [member.costs[cost] for member in chosen]) for cost in chosen[0].costs}
            metrics = _metrics(mean_probabilities([decided[name] for name in members]), labels)
            name = "+".join(member.removesuffix(f":{profile}") for member in members) + f":{profile}"
            found.append(Candidate(name, profile, metrics, costs, members))
    return found


def _metrics(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    try:
        from isthmus.train.metrics import classification_metrics

        figures = classification_metrics(probabilities, labels)
    except ModuleNotFoundError as error:
        raise IsthmusError(f"the metrics of ensembles need {error.name}; pip install 'isthmus[train]'") from None
    return {name: figures[metric] for name, metric in METRIC_NAMES.items()}


def _probabilities(artifact: Artifact, trust: bool) -> np.ndarray:
    """(samples, classes) of the labelled golden samples, as the artifact decides them."""
    bundle, profile = artifact.bundle, artifact.profile
    golden, spec = bundle.golden(profile), bundle.output_specs(profile)[0]
    labelled = golden["label"] >= 0
    with bundle.open_session(profile, trust=trust) as session:
        outputs = session.run_samples({name: array[labelled] for name, array in golden_side(golden, "input").items()})
    scores = spec.dequantise(outputs[spec.name])
    return _as_probabilities(scores.reshape(len(scores), -1), bundle, spec.name)


def _as_probabilities(scores: np.ndarray, bundle: Bundle, output: str) -> np.ndarray:
    """Of a graph that ends in a softmax its outputs, brought to sum 1 where they were rounded; of any other their softmax."""
    from isthmus.train.ensemble import probabilities

    graph = QuantGraph.load(bundle.model)
    node = graph.producer(output)
    while node is not None and (node.kind == "border" or node.op == "Requantize"):
        node = graph.producer(node.inputs[0])
    if node is None or node.op != "Softmax":
        return probabilities(scores)
    shares: np.ndarray = scores / np.maximum(scores.sum(axis=1, keepdims=True), np.finfo(np.float32).tiny)
    return shares


def _labels(bundle: Bundle) -> np.ndarray:
    labels = bundle.golden()["label"]
    return np.asarray(labels[labels >= 0])


def _same_samples(bundles: Sequence[Bundle]) -> None:
    """That labels are equal, and where inputs have one shape, what they show: members decide on the same samples, or their mean says nothing."""
    first = bundles[0]
    for other in bundles[1:]:
        if not np.array_equal(_labels(first), _labels(other)) or _shown_differently(first, other):
            raise IsthmusError(f"{first.root} and {other.root} hold different samples, so no ensemble can be judged: compile both with the same test data")


def _shown_differently(first: Bundle, other: Bundle) -> bool:
    (one, step), (two, other_step) = (_first_input(bundle) for bundle in (first, other))
    return one.shape == two.shape and bool(np.abs(one - two).max(initial=0) > max(step, other_step))


def _first_input(bundle: Bundle) -> tuple[np.ndarray, float]:
    """The first input of the labelled golden samples in real numbers, and its step (0 where it is float)."""
    spec = TensorSpec.from_json(bundle.manifest["graph"]["inputs"][0])
    golden = bundle.golden()
    return spec.dequantise(golden[f"input/{spec.name}"][golden["label"] >= 0]), float(spec.scale or 0)
