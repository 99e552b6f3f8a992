# SPDX-License-Identifier: Apache-2.0
"""A network cut in two for one board: up to a tensor by the board's own target, the rest on its host's processor; one artifact of two parts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from isthmus import reference
from isthmus.artifact import Golden, Job, as_golden, build, check_artifact, golden_side, labels_of, make_golden, save_golden
from isthmus.bundle import load_golden
from isthmus.compare import Comparison, compare_outputs
from isthmus.cut import split
from isthmus.errors import IsthmusError, Problem, VerificationError
from isthmus.graph import QuantGraph
from isthmus.profile import load_profile
from isthmus.registry import load_target

FIRST, REST = "first", "rest"
REST_PROFILE = "cpu"
CHAIN_FILE, FORM_FILE, GOLDEN_FILE = "chain.json", "form.onnx", "golden.npz"


@dataclass(frozen=True)
class Halves:
    """The two parts of a graph, each a legal form, and the tensors between them."""

    graph: QuantGraph
    tensors: tuple[str, ...]
    first: QuantGraph
    rest: QuantGraph

    @classmethod
    def of(cls, graph: QuantGraph, tensors: Sequence[str]) -> Halves:
        """Raises `IsthmusError` where `tensors` are no whole cut of the graph."""
        first, rest = split(graph, list(tensors))
        for part, place in ((first, "in front of"), (rest, "behind")):
            if all(node.kind == "border" for node in part.nodes):
                raise IsthmusError(f"nothing is computed {place} {', '.join(map(repr, tensors))}: cut between two layers")
        return cls(graph, tuple(tensors), first, rest)

    def problems(self, jobs: Sequence[Job]) -> list[Problem]:
        """Why a target cannot take its half: each job's own the first, the processor's the rest."""
        found = [
            replace(problem, node=f"{job.profile.name}, first part: {problem.node}") for job in jobs for problem in job.target.check(self.first, job.profile)
        ]
        host = _host()
        return [*found, *(replace(problem, node=f"the rest: {problem.node}") for problem in host.target.check(self.rest, host.profile))]


def build_split(halves: Halves, job: Job, golden: Golden, folder: Path) -> dict[str, Any]:
    """Builds both halves under `folder`, checks each alone against its own reference; gives the manifest entry of the whole.

    Raises `VerificationError` where a half computes something else than its reference, or the two references together not the whole one's.
    """
    between, samples = _between(halves, golden)
    parts = []
    for name, graph, own, half in ((FIRST, halves.first, job, between[0]), (REST, halves.rest, _host(), between[1])):
        entry = build(graph, own, folder / name)
        graph.save(folder / name / FORM_FILE)
        save_golden(folder / name / GOLDEN_FILE, half)
        if entry["runs_here"]:
            check_artifact(folder / name, f"{job.profile.name}, {name} part", entry, graph.outputs, half, graph=graph)
            entry["accuracy"] = None  # a half decides nothing
        parts.append({"folder": name, "profile": own.profile.name, **entry})
    chain = {"schema": 1, "cut": list(halves.tensors), "parts": [{key: part[key] for key in ("folder", "profile", "engine", "artifact")} for part in parts]}
    (folder / CHAIN_FILE).write_text(json.dumps(chain, indent=1) + "\n", encoding="utf-8")
    return _entry(halves, job, parts, samples)


def _between(halves: Halves, golden: Golden) -> tuple[tuple[Golden, Golden], int]:
    """Golden inputs and outputs of each half, and how many samples there are.

    The second half's inputs are the first's outputs, and then noise over all of int8, which the first half may never give.
    """
    inputs = golden_side(golden, "input")
    given = reference.run(halves.first, inputs)
    taken = {spec.name: given[spec.name] for spec in halves.rest.inputs}
    made = reference.run(halves.rest, taken)
    for name, expected in golden_side(golden, "output").items():
        if not np.array_equal({**given, **made}[name], expected):
            raise VerificationError(f"the two halves do not compute {name!r} as the whole does: a fault of isthmus, please report it with the model")
    total = len(next(iter(inputs.values())))
    noise = make_golden(halves.rest, None)
    taken, made = (
        {name: np.concatenate([array, golden_side(noise, side)[name]]) for name, array in arrays.items()}
        for arrays, side in ((taken, "input"), (made, "output"))
    )
    rest_total = len(next(iter(taken.values())))
    return (as_golden(inputs, given, labels_of(None, 0, total)), as_golden(taken, made, labels_of(None, 0, rest_total))), total


def compare_parts(folder: Path, profile: str, entry: Mapping[str, Any]) -> dict[str, list[Comparison]]:
    """Each part of a chain alone, anew, by its own golden file; "profile, first part" -> one comparison an output."""
    found = {}
    for part in entry.get("parts", ()):
        place = folder / part["folder"]
        graph = QuantGraph.load(place / FORM_FILE)
        golden = load_golden(place / GOLDEN_FILE)
        expected = golden_side(golden, "output")
        again = reference.run(graph, golden_side(golden, "input"))
        if any(not np.array_equal(again[name], array) for name, array in expected.items()):
            raise VerificationError(f"{place / GOLDEN_FILE} is not what the reference computes; compile again")
        with import_module(f"isthmus.runtimes.{part['engine']}").open_session(place, part, 1) as session:
            actual = session.run_samples(golden_side(golden, "input"))
        compared = compare_outputs(graph.outputs, expected, actual, part["max_lsb_allowed"], part["float_tolerance"])
        found[f"{profile}, {part['folder']} part"] = compared
    return found


def _entry(halves: Halves, job: Job, parts: Sequence[Mapping[str, Any]], samples: int) -> dict[str, Any]:
    first = parts[0]
    by_name = {spec["name"]: spec for part in parts for spec in part["outputs"]}
    crossing = sum(spec.size * np.dtype(spec.dtype).itemsize for spec in halves.rest.inputs)
    inexact = [part for part in parts if part["max_lsb_allowed"]]
    return {
        **{key: first[key] for key in ("target", "board", "arch", "plan", "options")},
        "artifact": CHAIN_FILE,
        "engine": "chain",
        "size_bytes": sum(part["size_bytes"] for part in parts),
        "inputs": first["inputs"],
        "outputs": [by_name[spec.name] for spec in halves.graph.outputs],
        "runs_here": all(part["runs_here"] for part in parts),
        # A step in front may become several behind: no bound is known but what each half is allowed, one after the other.
        "max_lsb_allowed": sum(part["max_lsb_allowed"] for part in parts),
        "float_tolerance": max(part["float_tolerance"] for part in parts),
        "why_lsb": "; ".join(f"{part['folder']} part: {part['why_lsb']}" for part in inexact),
        "steps": [{**step, "name": f"{part['folder']}-{step['name']}"} for part in parts for step in part["steps"]],
        "planned": [
            {**step, "name": f"{part['folder']}-{step['name']}", "outputs": [f"{part['folder']}/{output}" for output in step["outputs"]]}
            for part in parts
            for step in part["planned"]
        ],
        "notes": [
            f"cut at {', '.join(halves.tensors)}: {len(halves.first.nodes)} nodes by target {job.target.name}, {len(halves.rest.nodes)} on the host's"
            f" processor; {crossing} bytes cross at each run",
            f"each half compared alone with its own reference on {samples} samples, then both together",
            *(note for part in parts for note in part["notes"]),
        ],
        "verification": [],
        "accuracy": None,
        "cut": list(halves.tensors),
        "parts": [dict(part) for part in parts],
    }


def split_names(words: Sequence[str]) -> list[str]:
    """`--split a,b --split c` as names. Raises `IsthmusError` on an empty one."""
    names = [name.strip() for word in words for name in word.split(",")]
    if not all(names):
        raise IsthmusError("--split: an empty name; give the tensor to cut at, or several with commas between")
    return list(dict.fromkeys(names))


def _host() -> Job:
    profile = load_profile(REST_PROFILE)
    target = load_target(profile.target)
    return Job(profile, target, target.with_defaults(profile.defaults), True)
