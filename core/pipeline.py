# SPDX-License-Identifier: Apache-2.0
"""`compile`: the stages in order. Whoever reads this function knows the whole program."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

import isthmus
from isthmus.artifact import Job, accuracy_of, build, check_artifact, golden_side, make_golden, real_samples, save_golden
from isthmus.auto_recipe import MAX_DROP, base_recipe, climb, is_auto
from isthmus.bench_bundle import bench_bundle, why_not_measured
from isthmus.bundle import NEEDS_BOARD, Bundle, BundleWriter
from isthmus.compare import FLOAT_TOLERANCE, Comparison, compare_outputs, top1_accuracy
from isthmus.dataset import Dataset, Preprocess, from_arrays, load_data
from isthmus.errors import IsthmusError, Problem, ProblemsError, VerificationError
from isthmus.float_model import run_float
from isthmus.form_file import load_form, run_reference
from isthmus.graph import QuantGraph
from isthmus.holdout import hold_out
from isthmus.onnx_file import load_onnx
from isthmus.post_training import PostTraining
from isthmus.profile import load_profile
from isthmus.recipe import Recipe, load_recipe
from isthmus.registry import load_target
from isthmus.report_bundle import add_report
from isthmus.source import Say, Source, load_source, made_by_factory
from isthmus.split_bundle import Halves, build_split, compare_parts
from isthmus.target import check_options
from isthmus.tools import find_tool, tool_names
from isthmus.tree_bundle import compile_trees, is_tree_model
from isthmus.tuning import TUNED_TARGET, Tuning


def compile(  # noqa: A001  # the public name is the verb; nobody imports it bare
    model: Any,
    example_inputs: Any = None,
    *,
    targets: Sequence[str] = ("cpu",),
    data: Any = None,
    recipe: Recipe | str = "portable",
    max_drop: float | None = None,
    output: str | Path = "bundle",
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    preprocess: Preprocess | str | None = None,
    options: Mapping[str, Any] | None = None,
    data_root: str | Path | None = None,
    tune: bool = True,
    threads: int = 1,
    split: Sequence[str] = (),
    bench: bool = False,
    force: bool = False,
    say: Say | None = None,
) -> Bundle:
    """Brings `model` into the int8 form, makes an artifact for each profile in `targets`, checks each against the integer reference, writes a bundle.

    `data` is a path (.npz, .npy, folder of images), an array, or arrays by input name, (N, ...) in NCHW: needed where the model is not int8
    yet. `recipe` is one, or the name or file of one; "auto" (or "auto:NAME", to start from another scheme) climbs to the first recipe whose
    accuracy is at most `max_drop` (0.005) below the float model's. `options` are target options, "name" for all targets that have it. `data_root`
    holds the data set's own files of a zoo system, which is otherwise trained on what comes along. `tune` lets target cpu take the fastest of several
    artifacts on this machine, run on `threads` (`isthmus.tuning`). `split` names tensors: each target takes the network up to
    there, the processor of its host the rest. `bench` measures what runs here. Nothing is written unless everything held.

    Raises `IsthmusError` (bad input), `ProblemsError` (every reason why a graph or target cannot do it), `VerificationError` (an artifact
    computes something else than the reference).
    """
    tell: Say = say or (lambda text, share: None)
    automatic = is_auto(recipe)
    if max_drop is not None and not automatic:
        raise IsthmusError("--max-drop says when --recipe auto may stop; with another recipe it has no meaning")
    recipe = base_recipe(str(recipe)) if automatic else load_recipe(recipe) if isinstance(recipe, str) else recipe
    if threads < 1:
        raise IsthmusError(f"--threads {threads}: target cpu is tuned for at least 1")
    preprocess = Preprocess.parse(preprocess) if isinstance(preprocess, str) else preprocess
    model = made_by_factory(model)
    if is_tree_model(model):
        if split:
            raise IsthmusError("--split cuts a network at a tensor; a tree model has none")
        return compile_trees(model, targets, data, options or {}, output, bench=bench, force=force, say=tell)
    jobs = _jobs(targets, options or {})
    with BundleWriter(output, force) as writer:
        source = load_source(model, example_inputs, shapes or {}, recipe, tell, data_root)
        calibration, evaluation = datasets(source, data, preprocess)
        divided: list[str] = []
        if calibration is not None and calibration is evaluation and source.graph is None and (automatic or recipe.qat_epochs):
            calibration, evaluation, told = hold_out(calibration, next(iter(_input_shapes(source).values()))[0], recipe.seed)
            divided.append(told)
            tell(told, None)
        if automatic:
            graph, notes = _quantised_automatically(
                source, calibration, evaluation if data is not None else source.selection, recipe, MAX_DROP if max_drop is None else max_drop, jobs, tell
            )
        else:
            graph, notes = _quantised(source, calibration, recipe, tell)
        graph.verify()
        judge = _judge(source, graph) if evaluation is not None and evaluation is source.evaluation and source.score is not None else None
        halves = Halves.of(graph, split) if split else None
        _check(_problems(graph, jobs) if halves is None else halves.problems(jobs))

        tell("running the integer reference", None)
        golden = make_golden(graph, evaluation)
        graph.save(writer.folder / "model.onnx")
        save_golden(writer.folder / "golden.npz", golden)
        entries = {}
        for job in jobs:
            tell(f"{job.profile.name}: building ({job.target.name})", None)
            folder = writer.folder / "artifacts" / job.profile.name
            entries[job.profile.name] = build(graph, job, folder) if halves is None else build_split(halves, job, golden, folder)
        for name, entry in entries.items():
            if entry["runs_here"]:
                tell(f"{name}: verifying against the reference", None)
                check_artifact(writer.folder / "artifacts" / name, name, entry, graph.outputs, golden, judge, graph)
        if tune and halves is None:
            given = source if judge is not None else replace(source, score=None)
            entries |= _tuned(given, graph, golden, calibration, evaluation, max_drop, jobs, entries, writer.folder / "artifacts", threads, tell)
        manifest = {
            "name": source.name,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "isthmus": isthmus.__version__,
            "graph": {
                "file": "model.onnx",
                "digest": graph.digest,
                "scheme": graph.recipe.scheme,
                "inputs": [spec.to_json() for spec in graph.inputs],
                "outputs": [spec.to_json() for spec in graph.outputs],
                "float_islands": list(graph.float_islands),
            },
            "recipe": graph.recipe.to_dict(),
            "preprocess": preprocess.to_json() if preprocess is not None else None,
            "data": {"calibration": calibration.source if calibration else None, "evaluation": evaluation.source if evaluation else None},
            "notes": [*source.notes, *divided, *notes],
            "tools": {tool.name: tool.version for tool in map(find_tool, tool_names()) if tool.found},
            "task": _task(source.float_model, graph, evaluation, golden) if judge is None else _scored(source, graph, judge, golden),
            "artifacts": entries,
        }
        bundle = writer.seal(manifest)
        if bench and not all(why_not_measured(entry) for entry in entries.values()):
            tell("measuring latency", None)
            bundle, _ = bench_bundle(bundle, [])
        return writer.commit(add_report(bundle))


def verify(bundle: Bundle, profiles: Sequence[str] = (), trust: bool = False) -> dict[str, list[Comparison]]:
    """Runs the golden inputs through each artifact that can run here and compares anew; profile -> one comparison an output.

    An artifact that needs its board gives an empty list, and where this is the board its engine is compared; one of two parts ("--split") is followed
    by each part alone. Also checks that the form is still the form and that the golden outputs are the reference's. Raises `VerificationError` where
    those two disagree, `IsthmusError` on an unknown profile.
    """
    _check_golden(bundle, "")
    results: dict[str, list[Comparison]] = {}
    for profile in profiles or bundle.profiles:
        entry = bundle.artifact(profile)
        if not entry["runs_here"]:
            results[profile] = _verify_built(bundle, profile, profile in profiles, trust)
            continue
        if "reference" in entry:
            _check_golden(bundle, profile)
        golden = bundle.golden(profile)
        with bundle.open_session(profile, trust=trust) as session:
            actual = session.run_samples(golden_side(golden, "input"))
        expected, allowed = golden_side(golden, "output"), entry["max_lsb_allowed"]
        results[profile] = compare_outputs(bundle.output_specs(profile), expected, actual, allowed, entry["float_tolerance"])
        results |= compare_parts(bundle.folder(profile), profile, entry)
    return results


def _verify_built(bundle: Bundle, profile: str, named: bool, trust: bool) -> list[Comparison]:
    """Through the engine that this board built, where it did. FP16 passes on the labels too (`isthmus.runtimes.tensorrt.choice`)."""
    why_not = bundle.why_not_here(profile, trust)
    if bundle.artifact(profile)["engine"] != "tensorrt" or why_not == NEEDS_BOARD or (why_not and not named):
        return []
    if why_not:
        raise IsthmusError(f"{profile}: {why_not}")
    from isthmus.runtimes.tensorrt.choice import verify_engine

    with bundle.open_session(profile, trust=trust) as session:
        verdict = verify_engine(bundle, profile, session, bundle.golden(profile))
    return [replace(comparison, passed=verdict.holds) for comparison in verdict.comparisons]


def _check_golden(bundle: Bundle, profile: str) -> None:
    """That golden outputs are what they say: the integer reference's, or of an artifact that runs the float model, that model's node by node."""
    golden, form = bundle.golden(profile), bundle.form(profile)
    feeds, tolerance = golden_side(golden, "input"), FLOAT_TOLERANCE
    if form is None:
        entry = bundle.artifact(profile)
        again, tolerance = run_float(load_onnx(str(bundle.folder(profile) / entry["artifact"])), feeds, optimise=False), entry["float_tolerance"]
    else:
        again = run_reference(load_form(form), feeds)
    broken = [c for c in compare_outputs(bundle.output_specs(profile), again, golden_side(golden, "output"), 0, tolerance) if not c.passed]
    if broken:
        where = f"golden.npz of {profile}" if profile else "golden.npz"
        raise VerificationError(f"{bundle.root}: {where} is not what the reference computes for {broken[0].tensor!r}; compile again")


# ---- the stages
def _jobs(targets: Sequence[str], options: Mapping[str, Any]) -> list[Job]:
    """Profiles and targets, looked up before anything slow starts. An option must be known to at least one of the targets."""
    if not targets:
        raise IsthmusError("no target: name at least one profile (--target cpu; 'isthmus targets' lists all)")
    profiles = [load_profile(name) for name in dict.fromkeys(targets)]
    loaded = [load_target(profile.target) for profile in profiles]
    check_options(loaded, options)
    jobs = []
    for profile, target in zip(profiles, loaded, strict=True):
        own = {name: value for name, value in options.items() if name in target.options}
        jobs.append(Job(profile, target, target.with_defaults({**profile.defaults, **own}), bool(own)))
    return jobs


def datasets(source: Source, data: Any, preprocess: Preprocess | None) -> tuple[Dataset | None, Dataset | None]:
    """(calibration, evaluation). A user's data serves as both; a zoo system brings its own splits."""
    if data is None:
        return source.calibration, source.evaluation
    inputs = _input_shapes(source)
    if isinstance(data, str | Path):
        loaded = load_data(data, inputs, preprocess)
    else:
        arrays = data if isinstance(data, Mapping) else {next(iter(inputs)): data}
        missing = [name for name in inputs if name not in arrays]
        if missing:
            raise IsthmusError(f"data: no array for input {missing[0]!r}: found {sorted(arrays)}")
        loaded = from_arrays(arrays, None, inputs, preprocess, "data")
    return loaded, loaded


def _input_shapes(source: Source) -> dict[str, tuple[int, ...]]:
    if source.graph is not None:
        return {spec.name: spec.shape for spec in source.graph.inputs}
    model = source.float_model
    assert model is not None
    constants = {tensor.name for tensor in model.graph.initializer}
    return {value.name: tuple(extent.dim_value for extent in value.type.tensor_type.shape.dim) for value in model.graph.input if value.name not in constants}


def _quantised(source: Source, calibration: Dataset | None, recipe: Recipe, say: Say) -> tuple[QuantGraph, list[str]]:
    """The form, by the road the source asks for; and sentences worth keeping."""
    if source.graph is not None:
        return source.graph, []
    assert source.float_model is not None
    if calibration is None:
        raise IsthmusError(f"{source.name}: a float model needs calibration data: --data FILE.npz, FILE.npy or a folder of images")
    if recipe.qat_epochs:
        if source.train is None:
            without = "give the torch module (package.module:factory), or a recipe with qat_epochs = 0"
            raise IsthmusError(f"{source.name}: recipe {recipe.name} trains with the rounding in place (qat_epochs), which a file cannot; {without}")
        return source.train(calibration, recipe, say)
    return PostTraining(source.float_model, calibration, say).graph(recipe)


def _quantised_automatically(
    source: Source, calibration: Dataset | None, evaluation: Dataset | None, base: Recipe, max_drop: float, jobs: Sequence[Job], say: Say
) -> tuple[QuantGraph, list[str]]:
    if source.float_model is None:
        raise IsthmusError(f"{source.name} is int8 already: --recipe auto chooses how to quantise a float model")
    if source.score is not None and evaluation is source.selection:
        raise IsthmusError(f"{source.name}: --recipe auto judges decisions, this network is judged by {source.score.metric}; name a recipe")
    if calibration is None or evaluation is None:
        raise IsthmusError(f"{source.name}: --recipe auto needs samples, best with labels: --data FILE.npz, FILE.npy or a folder of images")
    train = source.train
    trained = None if train is None else lambda recipe: train(calibration, recipe, say)
    return climb(PostTraining(source.float_model, calibration, say), evaluation, base, max_drop, lambda graph: _problems(graph, jobs), say, trained)


def _problems(graph: QuantGraph, jobs: Sequence[Job]) -> list[Problem]:
    return [replace(problem, node=f"{job.profile.name}: {problem.node}") for job in jobs for problem in job.target.check(graph, job.profile)]


def _check(problems: Sequence[Problem]) -> None:
    """All reasons of all targets at once, before the first slow tool starts."""
    if problems:
        raise ProblemsError("this graph cannot be compiled", problems)


def _tuned(
    source: Source,
    graph: QuantGraph,
    golden: Mapping[str, np.ndarray],
    calibration: Dataset | None,
    evaluation: Dataset | None,
    max_drop: float | None,
    jobs: Sequence[Job],
    entries: Mapping[str, dict[str, Any]],
    artifacts: Path,
    threads: int,
    say: Say,
) -> dict[str, dict[str, Any]]:
    """The entries of target cpu as tuning leaves them. Where the user set an option of that target he has chosen himself."""
    quantiser = PostTraining(source.float_model, calibration, say) if source.float_model is not None and calibration is not None else None
    found = {}
    for job in jobs:
        if job.target.name == TUNED_TARGET and not job.chosen:
            tuning = Tuning(graph, golden, evaluation, quantiser, source.float_model, max_drop, job, threads, say, source.score)
            found[job.profile.name] = tuning.run(entries[job.profile.name], artifacts / job.profile.name)
    return found


def _task(float_model: onnx.ModelProto | None, graph: QuantGraph, evaluation: Dataset | None, golden: Mapping[str, np.ndarray]) -> dict[str, Any] | None:
    """Accuracy of the float model and of the reference on the labelled golden samples; None without labels."""
    labels = golden["label"]
    known = labels >= 0
    if evaluation is None or not known.any():
        return None
    first = graph.outputs[0].name
    result = {
        "metric": "top-1 accuracy",
        "samples": int(known.sum()),
        "float": None,
        "reference": accuracy_of(golden[f"output/{first}"], labels),
    }
    if float_model is not None:
        real = {name: array[: int(known.sum())] for name, array in evaluation.samples.items()}
        result["float"] = top1_accuracy(next(iter(run_float(float_model, real).values())), labels[known])
    return result


def _judge(source: Source, graph: QuantGraph) -> Callable[[Mapping[str, np.ndarray]], float]:
    """Raw outputs for the golden inputs, by name, to what those of the real samples are worth."""
    score, rows = source.score, real_samples(graph, source.evaluation)
    assert score is not None
    return lambda outputs: score.of([spec.dequantise(outputs[spec.name][:rows]) for spec in graph.outputs])


def _scored(source: Source, graph: QuantGraph, judge: Callable[[Mapping[str, np.ndarray]], float], golden: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The score of the float model and of the reference on the real golden samples."""
    assert source.score is not None and source.evaluation is not None
    rows = real_samples(graph, source.evaluation)
    exact = None
    if source.float_model is not None:
        outputs = run_float(source.float_model, source.evaluation.take(rows).samples)
        exact = source.score.of([outputs[spec.name] for spec in graph.outputs])
    return {"metric": source.score.metric, "samples": rows, "float": exact, "reference": judge(golden_side(golden, "output"))}
