# SPDX-License-Identifier: Apache-2.0
"""`isthmus cost --on`: what a model would take on a board, from its target's estimate, or what was measured there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from isthmus.bench_bundle import read_measurements
from isthmus.bundle import Bundle
from isthmus.console import grid
from isthmus.cost_model import Loaded
from isthmus.errors import IsthmusError
from isthmus.graph import QuantGraph
from isthmus.predict import RUNTIMES, Fit, counted, fit, missing_facts, predictions, published_fit, published_networks, published_rows, rows_of_csv
from isthmus.predict import Row as MeasuredRow
from isthmus.profile import Profile, load_profile
from isthmus.registry import load_target
from isthmus.roofline import Kernel, fused, program_of_graph, program_of_onnx
from isthmus.target import Estimate, check_options
from isthmus.tree_form import TreeForm

Networks = dict[str, Mapping[Kernel, int]]


def estimates_on(
    model: str, loaded: Loaded, names: Sequence[str], rows: Sequence[Path] = (), options: Mapping[str, Any] | None = None
) -> dict[str, list[Estimate] | str]:
    """By profile: what its target estimates, the measurement in its place where the bundle holds one, or a sentence why there is nothing.

    `rows` are a user's own measurements, which join the published ones: a .csv (see `predict.rows_of_csv`) or a bundle measured on its board.
    `options` are target options, each for all targets that have it. Raises `IsthmusError` for one that none has.
    """
    profiles = [load_profile(name) for name in dict.fromkeys(names)]
    fits = _fits(rows) if rows else {}
    check_options([load_target(profile.target) for profile in profiles], options or {})
    return {profile.name: _measured(model, profile.name) or _estimated(loaded, profile, fits, options or {}) for profile in profiles}


def _estimated(loaded: Loaded, profile: Profile, fits: Mapping[str, Fit], options: Mapping[str, Any]) -> list[Estimate] | str:
    if isinstance(loaded, TreeForm):
        return f"{profile.name}: nothing is estimated for a tree model"
    target = load_target(profile.target)
    if profile.target != "jetson":
        if not isinstance(loaded, QuantGraph):
            return f"{profile.name}: target {profile.target} estimates int8 forms alone: compile the model, and ask for the bundle's cost"
        own = {name: value for name, value in options.items() if name in target.options}
        found = target.estimate(loaded, profile, target.with_defaults({**profile.defaults, **own}))
        return found or f"{profile.name}: target {profile.target} estimates nothing; 'isthmus bench' measures where the artifact runs"
    missing = missing_facts(profile)
    if missing:
        return f"{profile.name}: nothing is predicted: its profile has no {', '.join(missing)}, for want of a source"
    program = program_of_graph(loaded, _floating(loaded, profile)) if isinstance(loaded, QuantGraph) else program_of_onnx(loaded)
    return predictions(program, profile, fits)


def _floating(graph: QuantGraph, profile: Profile) -> list[str]:
    return [row.node for row in load_target(profile.target).lint(graph, profile) or () if row.runs == "float"]


def _measured(model: str, name: str) -> list[Estimate]:
    """The bundle's own measurement on that board; none where it has no valid one."""
    if not (Path(model) / "manifest.json").is_file():
        return []
    found = read_measurements(Bundle.open(model)).get(name)
    if found is None or not found.valid:
        return []
    tail = ("p99", found.p99_ns) if found.supports(99) else ("slowest", int(found.samples_ns.max()))
    where = found.conditions.get("measured_over_ssh_on") or "the machine its conditions name"
    seconds = (int(found.samples_ns.min()) / 1e9, found.p50_ns / 1e9, tail[1] / 1e9)
    label = ", ".join(str(found.conditions[key]) for key in ("engine", "engine_chosen") if found.conditions.get(key)) or "its artifact"
    return [Estimate(label, seconds, {}, f"{found.count:,} samples on {where}: fastest, p50 and {tail[0]}", "measured")]


def _fits(files: Sequence[Path]) -> dict[str, Fit]:
    """Fits to the published rows and a user's; of a runtime that the user's rows do not have, the published one."""
    rows: list[MeasuredRow] = []
    networks: Networks = dict(published_networks())
    for path in files:
        own, kernels = rows_of_csv(path) if path.suffix == ".csv" else _rows_of_bundle(path)
        rows += own
        networks |= kernels
    touched = {row.runtime for row in rows}
    return {name: fit(name, [*published_rows(), *rows], networks) if name in touched else published_fit(name) for name in RUNTIMES}


def _rows_of_bundle(path: Path) -> tuple[list[MeasuredRow], dict[str, dict[Kernel, int]]]:
    """The valid Jetson measurements of a bundle. Raises `IsthmusError` where it has none that says which engine ran."""
    bundle = Bundle.open(path)
    graph = QuantGraph.load(bundle.model)
    rows, networks = [], {}
    for name, found in read_measurements(bundle).items():
        entry = bundle.manifest["artifacts"].get(name)
        precision = next((word for word in ("int8", "fp16") if word in str(found.conditions.get("engine_chosen", ""))), None)
        if entry is None or entry["target"] != "jetson" or not found.valid or precision is None:
            continue
        profile = load_profile(name)
        network = f"{path.resolve()} as {precision} on {name}"
        networks[network] = counted(fused(program_of_graph(graph, _floating(graph, profile) if precision == "int8" else ())))
        rows.append(MeasuredRow(network, (name,), precision, "tensorrt", f"bundle {path.name}", found.p50_ns / 1e9))
    if not rows:
        raise IsthmusError(f"{path}: no valid measurement of a TensorRT engine on a Jetson in it; 'isthmus bench {path} --host user@board' takes one")
    return rows, networks


def estimates_json(found: Mapping[str, list[Estimate] | str]) -> dict[str, Any]:
    """By profile, a list of estimates, or the sentence why there is none."""
    return {name: one if isinstance(one, str) else [asdict(estimate) for estimate in one] for name, one in found.items()}


def estimates_table(found: Mapping[str, list[Estimate] | str], layers: bool = False) -> str:
    """A line a way of running the graph, what the figures come from below, and why a board has none. `layers`: first a line a layer, where known."""
    rows, said, tables = [], [], []
    for name, estimates in found.items():
        if isinstance(estimates, str):
            said.append(estimates)
            continue
        for estimate in estimates:
            times = [f"{1e3 * value:.3g}" for value in estimate.latency_s] if estimate.latency_s else ["", "", ""]
            rows.append([name, estimate.label, estimate.word, *times, ", ".join(f"{value:,.0f} {key}" for key, value in estimate.resources.items())])
            line = f"{estimate.word}, {estimate.label.partition(',')[0]}: {estimate.basis}"
            said += [line] if line not in said else []
            if layers and estimate.layers:
                cells = [[f"{value:,}" if isinstance(value, int) else value for value in layer.values()] for layer in estimate.layers]
                tables += [f"{name}, {estimate.label}, {estimate.word}:", grid(list(estimate.layers[0]), cells), ""]
    used = any(row[-1] for row in rows)
    header = ["board", "as", "", "low ms", "likely ms", "high ms", *(["resources"] if used else [])]
    shown = [grid(header, [row if used else row[:-1] for row in rows]), ""] if rows else []
    return "\n".join([*tables, *shown, *said])
