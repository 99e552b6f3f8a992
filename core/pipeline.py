# SPDX-License-Identifier: Apache-2.0
"""`compile`: the stages in order. Whoever reads this function knows the whole program."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

import isthmus
from isthmus import reference
from isthmus.auto_recipe import MAX_DROP, base_recipe, climb, is_auto
from isthmus.bench_bundle import bench_bundle, why_not_measured
from isthmus.bundle import Bundle, BundleWriter
from isthmus.compare import FLOAT_TOLERANCE, Comparison, compare_outputs, top1_accuracy
from isthmus.dataset import Dataset, Preprocess, from_arrays, load_data
from isthmus.errors import IsthmusError, Problem, ProblemsError, VerificationError
from isthmus.graph import QuantGraph
from isthmus.holdout import hold_out
from isthmus.plan import BuildPlan, StepResult, execute
from isthmus.post_training import PostTraining
from isthmus.profile import Profile, load_profile
from isthmus.recipe import Recipe, load_recipe
from isthmus.registry import load_target
from isthmus.report_bundle import add_report
from isthmus.source import Say, Source, load_source
from isthmus.target import Target
from isthmus.tools import find_tool, tool_names

GOLDEN_SAMPLES = 512
GOLDEN_BYTES = 64 * 2**20
STRESS_SAMPLES = 16


@dataclass(frozen=True)
class _Job:
    """One artifact to make."""

    profile: Profile
    target: Target
    options: Mapping[str, Any]


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
    bench: bool = False,
    force: bool = False,
    say: Say | None = None,
) -> Bundle:
    """Brings `model` into the int8 form, makes an artifact for each profile in `targets`, checks each against the integer reference, writes a bundle.

    `data` is a path (.npz, .npy, folder of images), an array, or arrays by input name, (N, ...) in NCHW: needed where the model is not int8
    yet. `recipe` is one, or the name or file of one; "auto" (or "auto:NAME", to start from another scheme) climbs to the first recipe whose
    accuracy is at most `max_drop` (0.005) below the float model's. `options` are target options, "name" for all targets that have it. `data_root`
    holds the data set's own files of a zoo system, which is otherwise trained on what comes along. `bench` measures what runs here. Nothing is
    written unless everything held.

    Raises `IsthmusError` (bad input), `ProblemsError` (every reason why a graph or target cannot do it), `VerificationError` (an artifact
    computes something else than the reference).
    """
    tell: Say = say or (lambda text, share: None)
    automatic = is_auto(recipe)
    if max_drop is not None and not automatic:
        raise IsthmusError("--max-drop says when --recipe auto may stop; with another recipe it has no meaning")
    recipe = base_recipe(str(recipe)) if automatic else load_recipe(recipe) if isinstance(recipe, str) else recipe
    preprocess = Preprocess.parse(preprocess) if isinstance(preprocess, str) else preprocess
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
        _check(graph, jobs)

        tell("running the integer reference", None)
        golden = make_golden(graph, evaluation)
        graph.save(writer.folder / "model.onnx")
        np.savez_compressed(writer.folder / "golden.npz", **golden)  # type: ignore[arg-type]  # numpy's stub confuses **arrays with allow_pickle
        entries = {}
        for job in jobs:
            tell(f"{job.profile.name}: building ({job.target.name})", None)
            entries[job.profile.name] = _build(graph, job, writer.folder / "artifacts" / job.profile.name)
        for name, entry in entries.items():
            if entry["runs_here"]:
                tell(f"{name}: verifying against the reference", None)
                _verify_entry(writer.folder / "artifacts" / name, name, entry, graph, golden)
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
            "task": _task(source.float_model, graph, evaluation, golden),
            "artifacts": entries,
        }
        bundle = writer.seal(manifest)
        if bench and not all(why_not_measured(entry) for entry in entries.values()):
            tell("measuring latency", None)
            bundle, _ = bench_bundle(bundle, [])
        return writer.commit(add_report(bundle))


def verify(bundle: Bundle, profiles: Sequence[str] = (), trust: bool = False) -> dict[str, list[Comparison]]:
    """Runs the golden inputs through each artifact that can run here and compares anew; profile -> one comparison an output.

    An artifact that needs its board gives an empty list. Also checks that the form is still the form and that the golden outputs are the
    reference's. Raises `VerificationError` where those two disagree, `IsthmusError` on an unknown profile.
    """
    graph = QuantGraph.load(bundle.model)
    golden = bundle.golden()
    expected = _golden_side(golden, "output")
    again = reference.run(graph, _golden_side(golden, "input"))
    broken = [c for c in compare_outputs(graph.outputs, again, expected) if not c.passed]
    if broken:
        raise VerificationError(f"{bundle.root}: golden.npz is not what the reference computes for {broken[0].tensor!r}; compile again")
    results: dict[str, list[Comparison]] = {}
    for profile in profiles or bundle.profiles:
        entry = bundle.artifact(profile)
        if not entry["runs_here"]:
            results[profile] = []
            continue
        with bundle.open_session(profile, trust=trust) as session:
            results[profile] = compare_outputs(
                graph.outputs, expected, session.run_samples(_golden_side(golden, "input")), entry["max_lsb_allowed"], entry["float_tolerance"]
            )
    return results


def make_golden(graph: QuantGraph, evaluation: Dataset | None) -> dict[str, np.ndarray]:
    """Raw inputs, the reference's raw outputs, labels (-1 where there is none): real samples, then uniform noise over all of int8 and both extremes.

    The noise reaches saturation and ties that well-behaved samples do not.
    """
    batch = graph.inputs[0].shape[0]
    bytes_each = sum(spec.size for spec in (*graph.inputs, *graph.outputs)) * 4 // batch
    real = min(GOLDEN_SAMPLES, max(batch, GOLDEN_BYTES // max(1, bytes_each)), len(evaluation) if evaluation else 0) // batch * batch
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
    total = len(next(iter(feeds.values())))
    labels = np.full(total, -1, np.int64)
    if evaluation is not None and evaluation.labels is not None:
        labels[:real] = evaluation.labels[:real]
    outputs = reference.run(graph, feeds)
    return {f"input/{name}": array for name, array in feeds.items()} | {f"output/{name}": array for name, array in outputs.items()} | {"label": labels}


# ---- the stages
def _jobs(targets: Sequence[str], options: Mapping[str, Any]) -> list[_Job]:
    """Profiles and targets, looked up before anything slow starts. An option must be known to at least one of the targets."""
    if not targets:
        raise IsthmusError("no target: name at least one profile (--target cpu; 'isthmus targets' lists all)")
    profiles = [load_profile(name) for name in dict.fromkeys(targets)]
    loaded = [load_target(profile.target) for profile in profiles]
    for name in options:
        if not any(name in target.options for target in loaded):
            known = sorted({option for target in loaded for option in target.options})
            raise IsthmusError(f"option {name!r} is known to none of the targets: there are {', '.join(known) or 'none'}")
    jobs = []
    for profile, target in zip(profiles, loaded, strict=True):
        own = {name: value for name, value in options.items() if name in target.options}
        jobs.append(_Job(profile, target, target.with_defaults({**profile.defaults, **own})))
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
    source: Source, calibration: Dataset | None, evaluation: Dataset | None, base: Recipe, max_drop: float, jobs: Sequence[_Job], say: Say
) -> tuple[QuantGraph, list[str]]:
    if source.float_model is None:
        raise IsthmusError(f"{source.name} is int8 already: --recipe auto chooses how to quantise a float model")
    if calibration is None or evaluation is None:
        raise IsthmusError(f"{source.name}: --recipe auto needs samples, best with labels: --data FILE.npz, FILE.npy or a folder of images")
    train = source.train
    trained = None if train is None else lambda recipe: train(calibration, recipe, say)
    return climb(PostTraining(source.float_model, calibration, say), evaluation, base, max_drop, lambda graph: _problems(graph, jobs), say, trained)


def _problems(graph: QuantGraph, jobs: Sequence[_Job]) -> list[Problem]:
    return [replace(problem, node=f"{job.profile.name}: {problem.node}") for job in jobs for problem in job.target.check(graph, job.profile)]


def _check(graph: QuantGraph, jobs: Sequence[_Job]) -> None:
    """All reasons of all targets at once, before the first slow tool starts."""
    problems = _problems(graph, jobs)
    if problems:
        raise ProblemsError("this graph cannot be compiled", problems)


def _build(graph: QuantGraph, job: _Job, folder: Path) -> dict[str, Any]:
    """Plans, executes, and gives the artifact's manifest entry."""
    plan = job.target.plan(graph, job.profile, job.options)
    folder.mkdir(parents=True)
    results = execute(plan, folder)
    return _entry(plan, job, results, folder, _float_tolerance(graph, plan.max_lsb))


def _entry(plan: BuildPlan, job: _Job, results: Sequence[StepResult], folder: Path, float_tolerance: float) -> dict[str, Any]:
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
        "float_tolerance": float_tolerance,
        "why_lsb": plan.why_lsb,
        "steps": [asdict(result) for result in results],
        "planned": [asdict(step) for step in plan.steps if step.where != "host"],
        "notes": list(plan.notes),
        "verification": [],
        "accuracy": None,
    }


def _verify_entry(folder: Path, name: str, entry: dict[str, Any], graph: QuantGraph, golden: Mapping[str, np.ndarray]) -> None:
    """Fills in what the artifact computed; a difference beyond what the target declared ends the compile."""
    from importlib import import_module

    engine = import_module(f"isthmus.runtimes.{entry['engine']}")
    with engine.open_session(folder, entry, 1) as session:
        actual = session.run_samples(_golden_side(golden, "input"))
    comparisons = compare_outputs(graph.outputs, _golden_side(golden, "output"), actual, entry["max_lsb_allowed"], entry["float_tolerance"])
    entry["verification"] = [comparison.to_json() for comparison in comparisons]
    for comparison in comparisons:
        if not comparison.passed:
            raise VerificationError(
                f"{name}: output {comparison.tensor!r} differs from the integer reference in {comparison.mismatched} of {comparison.compared} elements,"
                f" at most by {comparison.max_lsb or comparison.max_abs} ({'steps' if comparison.kind == 'int8' else 'absolute'});"
                f" allowed: {entry['max_lsb_allowed']}"
            )
    entry["accuracy"] = _accuracy(next(iter(actual.values())), golden["label"])


def _float_tolerance(graph: QuantGraph, max_lsb: int) -> float:
    """A float tail may differ by as much as the steps it is allowed to be fed, and by what its weights make of them."""
    steps = [float(graph.tensors[node.inputs[0]].scale or 0) for node in graph.nodes if node.op == "DequantizeLinear"]
    return FLOAT_TOLERANCE + max_lsb * max(steps, default=0.0) * _tail_gain(graph)


def _tail_gain(graph: QuantGraph) -> float:
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
        "reference": _accuracy(golden[f"output/{first}"], labels),
    }
    if float_model is not None:
        from isthmus.float_model import run_float

        real = {name: array[: int(known.sum())] for name, array in evaluation.samples.items()}
        result["float"] = top1_accuracy(next(iter(run_float(float_model, real).values())), labels[known])
    return result


def _accuracy(outputs: np.ndarray, labels: np.ndarray) -> float | None:
    known = labels >= 0
    return top1_accuracy(outputs[known], labels[known]) if known.any() else None


def _golden_side(golden: Mapping[str, np.ndarray], side: str) -> dict[str, np.ndarray]:
    return {name.partition("/")[2]: array for name, array in golden.items() if name.startswith(f"{side}/")}
