# SPDX-License-Identifier: Apache-2.0
"""Tree models on the way of `pipeline.compile`: read, quantised on calibration data, one artifact a board, each checked against the reference."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

import isthmus
from isthmus.artifact import GOLDEN_SAMPLES, Job, as_golden, check_artifact, labels_of, manifest_entry, save_golden
from isthmus.bench_bundle import bench_bundle, why_not_measured
from isthmus.bundle import Bundle, BundleWriter
from isthmus.compare import top1_accuracy
from isthmus.dataset import Dataset, from_arrays, load_data
from isthmus.errors import IsthmusError, ProblemsError
from isthmus.onnx_file import load_onnx
from isthmus.plan import execute
from isthmus.profile import load_profile
from isthmus.registry import load_target
from isthmus.report_bundle import add_report
from isthmus.source import Made, Say
from isthmus.tools import find_tool, tool_names
from isthmus.tree_form import INPUT, OUTPUT, TreeForm, quantise
from isthmus.tree_onnx import ML_DOMAIN, form_from_model, is_tree_form
from isthmus.trees import REGRESSION, TreeEnsemble, decide

TARGET = "trees"
SUFFIXES = (".json", ".ubj", ".skops")
PICKLES = (".pkl", ".pickle", ".joblib")
LIBRARIES = ("sklearn", "xgboost")
NEAR_THRESHOLDS = 64  # golden samples on, just above and just below thresholds


def is_tree_model(model: Any) -> bool:
    """Whether `compile` takes `model` for trees: an ensemble, an estimator, a file by its ending or by what it holds. Refuses pickles."""
    if isinstance(model, Made):
        return is_tree_model(model.model)
    if isinstance(model, str | Path):
        path = Path(model)
        if path.suffix in PICKLES:
            raise IsthmusError(f"{path}: a pickle runs code when it is opened, so it is not: save the model as .json or .ubj (XGBoost), .skops or .onnx")
        if path.suffix == ".onnx" and path.is_file():
            return _holds_trees(load_onnx(path))
        return path.suffix in SUFFIXES
    if isinstance(model, onnx.ModelProto):
        return _holds_trees(model)
    return isinstance(model, TreeEnsemble | TreeForm) or type(model).__module__.partition(".")[0] in LIBRARIES


def _holds_trees(model: onnx.ModelProto) -> bool:
    return any(node.domain == ML_DOMAIN and node.op_type.startswith("TreeEnsemble") for node in model.graph.node)


def compile_trees(
    model: Any, targets: Sequence[str], data: Any, options: Mapping[str, Any], output: str | Path, *, bench: bool, force: bool, say: Say
) -> Bundle:
    """What `pipeline.compile` does for a tree model. Raises what that raises."""
    jobs = _jobs(targets, options)
    with BundleWriter(output, force) as writer:
        made, model = model, model.model if isinstance(model, Made) else model
        name = made.name if isinstance(made, Made) else Path(model).stem if isinstance(model, str | Path) else type(model).__name__
        say("reading the trees", None)
        ensemble, form, dataset, notes = _quantised(model, data)
        problems = [problem for job in jobs for problem in job.target.check(form, job.profile)]  # type: ignore[arg-type]  # target trees takes a TreeForm
        if problems:
            raise ProblemsError("these trees cannot be compiled", problems)
        golden = make_golden(form, dataset)
        form.save(writer.folder / "model.onnx")
        save_golden(writer.folder / "golden.npz", golden)
        entries = {}
        for job in jobs:
            folder = writer.folder / "artifacts" / job.profile.name
            say(f"{job.profile.name}: building ({job.target.name})", None)
            plan = job.target.plan(form, job.profile, job.options)  # type: ignore[arg-type]  # target trees takes a TreeForm
            folder.mkdir(parents=True)
            entry = manifest_entry(plan, job, execute(plan, folder), folder, 0.0)
            say(f"{job.profile.name}: verifying against the reference", None)
            check_artifact(folder, job.profile.name, entry, form.outputs, golden)
            if form.task == REGRESSION:
                entry["accuracy"] = None
            entries[job.profile.name] = entry
        manifest = {
            "name": name,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "isthmus": isthmus.__version__,
            "graph": {
                "file": "model.onnx",
                "kind": TARGET,
                "digest": form.digest,
                "scheme": f"fixed point, {form.feature_bits}-bit features, {form.score_bits}-bit scores",
                "inputs": [spec.to_json() for spec in form.inputs],
                "outputs": [spec.to_json() for spec in form.outputs],
                "float_islands": [],
            },
            "recipe": None,
            "preprocess": None,
            "data": {"calibration": dataset.source if dataset else None, "evaluation": dataset.source if dataset else None},
            "notes": notes,
            "tools": {tool.name: tool.version for tool in map(find_tool, tool_names()) if tool.found},
            "task": _task(ensemble, form, dataset),
            "artifacts": entries,
        }
        bundle = writer.seal(manifest)
        if bench and not all(why_not_measured(entry) for entry in entries.values()):
            say("measuring latency", None)
            bundle, _ = bench_bundle(bundle, [])
        return writer.commit(add_report(bundle))


def make_golden(form: TreeForm, dataset: Dataset | None) -> dict[str, np.ndarray]:
    """Real samples; then noise, both extremes of float32, and samples on, just above and just below thresholds: there integers and features part."""
    generator = np.random.default_rng(0)
    real = dataset.samples[INPUT][:GOLDEN_SAMPLES] if dataset else np.zeros((0, form.features), np.float32)
    low, high = (np.ldexp(bound.astype(np.float64), -form.exponents) for bound in (form.lowest - 1, form.highest + 1))
    largest = np.finfo(np.float32).max
    steps = generator.integers(form.lowest - 1, form.highest + 2, (NEAR_THRESHOLDS, form.features))
    trees = [tree for tree in form.trees if len(tree.inner)]
    for index, row in enumerate(steps):
        for tree in [*trees[index % max(1, len(trees)) :], *trees[: index % max(1, len(trees))]]:  # the last one of a feature stands: each tree's turn comes
            node = tree.inner[index // 2 % len(tree.inner)]
            row[tree.feature[node]] = tree.threshold[node] + index % 2
    near = np.ldexp(steps.astype(np.float64), -form.exponents).astype(np.float32)
    noise = generator.uniform(low, high, (16, form.features)).astype(np.float32)
    edges = np.stack([np.full(form.features, value, np.float32) for value in (largest, -largest, 0.0)])
    feeds = {INPUT: np.concatenate([real, noise, np.clip(near, -largest, largest), edges])}
    return as_golden(feeds, form.run(feeds), labels_of(dataset, len(real), len(feeds[INPUT])))


def _jobs(targets: Sequence[str], options: Mapping[str, Any]) -> list[Job]:
    """Whatever target a profile names for networks: trees go through their own."""
    if not targets:
        raise IsthmusError("no target: name at least one profile (--target cpu; 'isthmus targets' lists all)")
    target = load_target(TARGET)
    jobs = []
    for name in dict.fromkeys(targets):
        profile = load_profile(name)
        defaults = {key: value for key, value in profile.defaults.items() if key in target.options}
        jobs.append(Job(profile, target, target.with_defaults({**defaults, **options}), bool(options)))
    return jobs


def _quantised(model: Any, data: Any) -> tuple[TreeEnsemble | None, TreeForm, Dataset | None, list[str]]:
    if isinstance(model, str | Path) and Path(model).suffix == ".onnx":
        model = load_onnx(model)
    if isinstance(model, TreeForm) or (isinstance(model, onnx.ModelProto) and is_tree_form(model)):
        form = model if isinstance(model, TreeForm) else form_from_model(model)
        return None, form, None if data is None else _dataset(data, form.features), []
    from isthmus.export.trees import read_trees

    ensemble, notes = read_trees(model)
    if data is None:
        raise IsthmusError(f"{ensemble.source}: choosing the fixed point needs calibration data: --data FILE.npz or FILE.npy, [N, {ensemble.features}]")
    dataset = _dataset(data, ensemble.features)
    form, told = quantise(ensemble, dataset.samples[INPUT])
    return ensemble, form, dataset, [*notes, *told]


def _dataset(data: Any, features: int) -> Dataset:
    inputs = {INPUT: (1, features)}
    if isinstance(data, str | Path):
        return load_data(data, inputs, None)
    return from_arrays(data if isinstance(data, Mapping) else {INPUT: data}, None, inputs, None, "data")


def _task(ensemble: TreeEnsemble | None, form: TreeForm, dataset: Dataset | None) -> dict[str, Any] | None:
    if dataset is None or dataset.labels is None or form.task == REGRESSION:
        return None
    samples = dataset.samples[INPUT]
    decided = None if ensemble is None else float(np.mean(decide(ensemble.scores(samples), ensemble.task) == dataset.labels))
    return {
        "metric": "top-1 accuracy",
        "samples": len(samples),
        "float": decided,
        "reference": top1_accuracy(form.run({INPUT: samples})[OUTPUT], dataset.labels),
    }
