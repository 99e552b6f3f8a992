# SPDX-License-Identifier: Apache-2.0
"""At which layer an artifact first differs from the integer reference, given what that layer was itself given.

Two ways, and the report names the one it took. `inside`: a copy of the artifact itself in which every int8 tensor is an output, opened by the
engine that runs it; outputs keep an engine from merging what lies between them, so the copy may round where the original does not, never less.
`parts`: where an artifact cannot show its inside, each layer is cut out of the form, lowered and built anew by the same target, and fed by the
reference; a fault of the stored file itself does not show that way.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from isthmus import reference
from isthmus.bundle import Bundle
from isthmus.compare import Comparison, compare_output
from isthmus.console import grid
from isthmus.cut import border_name, extract
from isthmus.errors import IsthmusError, ProblemsError
from isthmus.exposure import Exposure, expose_onnx
from isthmus.graph import QuantGraph, QuantNode
from isthmus.plan import execute
from isthmus.profile import Profile, load_profile
from isthmus.registry import load_target
from isthmus.session import Session
from isthmus.spec import TensorSpec
from isthmus.target import Target

CHUNK_BYTES = 128 * 2**20  # of activations held at once, the engine's and the reference's
PART_SAMPLES = 16  # a simulator takes long for each
GRAPH_FILE = "model.onnx"  # what is lowered for an engine that runs elsewhere
Values = dict[str, np.ndarray]


@dataclass(frozen=True)
class LayerComparison:
    """One layer: `own` compares what it computed with the reference on the same inputs, `whole` with the reference's run from the graph's inputs.

    `op` names every operator between tensors that can be seen, so more than one where the artifact merged some.
    """

    layer: str
    op: str
    own: Comparison
    whole: Comparison

    def to_json(self) -> dict[str, Any]:
        return {"layer": self.layer, "op": self.op, "own": self.own.to_json(), "whole": self.whole.to_json()}


@dataclass(frozen=True)
class LayerReport:
    """`how`: one sentence on what ran. `why`: the target's reason for a difference, "" where it declares none. `unseen`: tensors nothing was compared of."""

    profile: str
    method: str
    how: str
    why: str
    layers: tuple[LayerComparison, ...]
    unseen: tuple[str, ...]

    @property
    def first(self) -> LayerComparison | None:
        """The first layer that differs on its own inputs."""
        return next((layer for layer in self.layers if layer.own.mismatched), None)

    @property
    def passed(self) -> bool:
        """Something was compared, and no layer is further off than the artifact may be."""
        return bool(self.layers) and all(layer.own.passed for layer in self.layers)

    def to_json(self) -> dict[str, Any]:
        return {
            "profile": self.profile,
            "method": self.method,
            "how": self.how,
            "why": self.why,
            "passed": self.passed,
            "first": self.first.layer if self.first else None,
            "layers": [layer.to_json() for layer in self.layers],
            "unseen": list(self.unseen),
        }


def verify_layers(bundle: Bundle, profile: str) -> LayerReport:
    """Runs the golden inputs through the artifact, layer by layer. Raises `IsthmusError` on an unknown profile, or where nothing here computes."""
    entry, form = bundle.artifact(profile), bundle.form(profile)
    if form is None:
        raise IsthmusError(f"{profile}: runs the float model, so there are no int8 layers to compare; compile with --no-tune for an int8 artifact")
    graph = QuantGraph.load(form)
    feeds = {name.partition("/")[2]: array for name, array in bundle.golden(profile).items() if name.startswith("input/")}
    if entry["engine"] == "null":
        raise IsthmusError(f"{profile}: computes nothing, so there are no layers to compare")
    report = inside(bundle.folder(profile), profile, entry, graph, feeds)
    if report is None:
        if not entry["runs_here"]:
            raise IsthmusError(f"{profile}: its artifact needs its board, and holds no lowered graph that could run here")
        return _in_parts(profile, entry, graph, feeds)
    return report


# ---- inside the artifact
def inside(
    place: Path, profile: str, entry: Mapping[str, Any], graph: QuantGraph, feeds: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray] | None = None
) -> LayerReport | None:
    """The report of the artifact in folder `place` on raw inputs `feeds`; None where it cannot show its inside.

    With `outputs`, what the artifact itself gave for `feeds`, these stand in for the copy's: then the layers also explain what the artifact, which may
    merge what the copy keeps apart, computes.
    """
    exposed = _exposed(place, entry, graph)
    if exposed is None:
        return None
    exposure, engine, how = exposed
    with tempfile.TemporaryDirectory(prefix="isthmus-layers-") as folder:
        artifact = Path(entry["artifact"]).name if engine == entry["engine"] else GRAPH_FILE
        (Path(folder) / artifact).write_bytes(exposure.content)
        described = _described(entry, graph, exposure, artifact, engine)
        with import_module(f"isthmus.runtimes.{engine}").open_session(Path(folder), described, 1) as session:
            layers, unseen = _compared_inside(session, exposure, graph, {**feeds, **(outputs or {})}, entry)
    return LayerReport(profile, "inside", how, entry.get("why_lsb", ""), layers, unseen)


def _exposed(folder: Path, entry: Mapping[str, Any], graph: QuantGraph) -> tuple[Exposure, str, str] | None:
    """The copy, the engine that opens it, and a sentence; None where the artifact cannot show its inside."""
    engine = str(entry["engine"])
    if engine == "tflite":
        content = (folder / entry["artifact"]).read_bytes()
        exposure: Exposure = import_module("isthmus.targets.tflite.expose").expose(content, graph, entry.get("options", {}))
        return exposure, engine, "a copy of the artifact whose int8 tensors are outputs: XNNPACK merges no operators across those"
    if engine in ("onnxruntime", "openvino"):
        images = import_module("isthmus.targets.cpu.lower").flattened_last(graph) if entry["target"] == "cpu" else {}
        exposure = expose_onnx((folder / entry["artifact"]).read_bytes(), graph, images)
        runtime = "ONNX Runtime" if engine == "onnxruntime" else "OpenVINO"
        return exposure, engine, f"a copy of the artifact whose int8 tensors are outputs: {runtime} merges no operators across those"
    if engine == "tensorrt" and (folder / GRAPH_FILE).is_file():
        exposure = expose_onnx((folder / GRAPH_FILE).read_bytes(), graph)
        return exposure, "onnxruntime", "the lowered graph in ONNX Runtime without optimisations: it says nothing of the engine that the board builds from it"
    return None


def _described(entry: Mapping[str, Any], graph: QuantGraph, exposure: Exposure, artifact: str, engine: str) -> dict[str, Any]:
    """The manifest entry of the copy. A float border that only quantises gets the form's scale, so that int8 samples can be fed."""
    sides = {}
    for side, form in (("inputs", graph.inputs), ("outputs", graph.outputs)):
        specs = [TensorSpec.from_json(spec) for spec in entry[side]]
        sides[side] = [
            replace(own, dtype="float32") if spec.dtype == "float32" and spec.scale is None and own.is_quantised else spec
            for spec, own in zip(specs, form, strict=True)
        ]
    sides["outputs"] += exposure.added
    options = dict(entry.get("options", {})) if engine == entry["engine"] else {"optimisation": "off"}
    return {**entry, "artifact": artifact, "options": options, **{side: [spec.to_json() for spec in specs] for side, specs in sides.items()}}


def _compared_inside(
    session: Session, exposure: Exposure, graph: QuantGraph, arrays: Mapping[str, np.ndarray], entry: Mapping[str, Any]
) -> tuple[tuple[LayerComparison, ...], tuple[str, ...]]:
    """`arrays`: every input of the graph, and outputs that replace the session's."""
    found: dict[str, LayerComparison] = {}
    for part in _chunks(graph, arrays):
        feeds = {spec.name: part[spec.name] for spec in graph.inputs}
        given = _engine_values({**session.run_samples(feeds), **part}, exposure, graph) | _fed(graph, feeds)
        expected = reference.run_all(graph, feeds)
        for layer in _compared(graph, given, expected, entry):
            name = layer.own.tensor
            found[name] = layer if name not in found else _joined(found[name], layer)
    wanted = [name for name, spec in graph.tensors.items() if spec.scale is not None and _computed(graph, name)]
    return tuple(found.values()), tuple(name for name in wanted if name not in found)


def _engine_values(results: Mapping[str, np.ndarray], exposure: Exposure, graph: QuantGraph) -> Values:
    """By tensor of the form: the tensors that were exposed, and the graph's outputs."""
    values = {shown.tensor: shown.in_form(results[shown.spec.name], graph.tensors[shown.tensor].shape) for shown in exposure.shown}
    for index, spec in enumerate(graph.outputs):
        array = results[spec.name]
        values[graph.raw_output(index) if array.dtype == np.int8 else spec.name] = array
    return values


def _fed(graph: QuantGraph, feeds: Mapping[str, np.ndarray]) -> Values:
    return {graph.raw_input(index) if feeds[spec.name].dtype == np.int8 else spec.name: feeds[spec.name] for index, spec in enumerate(graph.inputs)}


def _compared(graph: QuantGraph, given: Values, expected: Values, entry: Mapping[str, Any]) -> Iterator[LayerComparison]:
    """Each tensor that the engine gave, in the graph's order, from the nearest tensors before it that it gave too."""
    starts = {graph.raw_input(index) for index in range(len(graph.inputs))} | {spec.name for spec in graph.inputs}
    for node in graph.nodes:
        for name in node.outputs:
            if name not in given or name in starts:
                continue
            nodes = _between(graph, name, given)
            own = reference.run_nodes(graph, nodes, given)[name]
            spec, carried, tolerance = graph.tensors[name], entry["max_lsb_allowed"], entry["float_tolerance"]
            allowed = entry.get("layer_lsb_allowed", carried)
            label = "+".join(dict.fromkeys(part.op for part in nodes if part.kind != "border" and part.inputs)) or node.op
            comparisons = (compare_output(spec, against, given[name], most, tolerance) for against, most in ((own, allowed), (expected[name], carried)))
            yield LayerComparison(_layer_name(nodes), label, *comparisons)


def _between(graph: QuantGraph, tensor: str, known: Mapping[str, np.ndarray]) -> list[QuantNode]:
    """The nodes that compute `tensor` from tensors that are known, in order."""
    needed, chosen = {tensor}, []
    for node in reversed(graph.nodes):
        if needed.intersection(node.outputs):
            chosen.append(node)
            needed.update(name for name in node.inputs if name not in known)
            needed.difference_update(node.outputs)
    return chosen[::-1]


def _layer_name(nodes: Sequence[QuantNode]) -> str:
    """The last node that computes: what stands behind it are quantisers."""
    return next((node.name for node in reversed(nodes) if node.kind != "border"), nodes[-1].name)


def _computed(graph: QuantGraph, tensor: str) -> bool:
    """Whether a layer writes the tensor: neither a quantised input nor a constant."""
    producer = graph.producer(tensor)
    return producer is not None and bool(producer.inputs) and tensor not in {graph.raw_input(index) for index in range(len(graph.inputs))}


def _chunks(graph: QuantGraph, arrays: Mapping[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    """All samples of inputs and outputs, as many at once as their activations leave room for; the reference's sums are as wide as eight int8 values."""
    one = sum(spec.size for spec in graph.tensors.values()) * 4
    times = len(arrays[graph.inputs[0].name]) // graph.inputs[0].shape[0]
    step = max(1, CHUNK_BYTES // one)
    for start in range(0, times, step):
        yield {
            spec.name: arrays[spec.name][start * spec.shape[0] : (start + step) * spec.shape[0]]
            for spec in (*graph.inputs, *graph.outputs)
            if spec.name in arrays
        }


def _joined(first: LayerComparison, second: LayerComparison) -> LayerComparison:
    return replace(first, own=_sum(first.own, second.own), whole=_sum(first.whole, second.whole))


def _sum(a: Comparison, b: Comparison) -> Comparison:
    return Comparison(
        a.tensor, a.kind, a.compared + b.compared, a.mismatched + b.mismatched, max(a.max_lsb, b.max_lsb), max(a.max_abs, b.max_abs), a.passed and b.passed
    )


# ---- layers built apart
def _in_parts(profile: str, entry: Mapping[str, Any], graph: QuantGraph, feeds: Mapping[str, np.ndarray]) -> LayerReport:
    board = load_profile(profile)
    target = load_target(board.target)
    options = {name: value for name, value in entry.get("options", {}).items() if name in target.options}
    batch = graph.inputs[0].shape[0]
    count = max(batch, min(PART_SAMPLES, len(next(iter(feeds.values())))) // batch * batch)
    expected = reference.run_all(graph, {name: array[-count:] for name, array in feeds.items()})  # the last are noise and both extremes
    layers: list[LayerComparison] = []
    unseen: list[str] = []
    for node in graph.nodes:
        if node.kind != "int8" or not node.inputs:
            continue
        try:
            layers += _built_apart(graph, node, expected, board, target, options, entry)
        except ProblemsError:  # a target may refuse alone what it takes within a network: hls4ml has no graph of one Flatten
            unseen += node.outputs
    how = f"each layer cut out of the form, built anew by target {target.name} and fed by the reference: a fault of the stored artifact does not show"
    return LayerReport(profile, "parts", how, entry.get("why_lsb", ""), tuple(layers), tuple(unseen))


def _built_apart(
    graph: QuantGraph, node: QuantNode, values: Values, profile: Profile, target: Target, options: Mapping[str, Any], entry: Mapping[str, Any]
) -> list[LayerComparison]:
    inputs = list(dict.fromkeys(name for name in node.inputs if (producer := graph.producer(name)) is not None and producer.inputs))
    part = extract(graph, node.outputs, inputs)
    problems = target.check(part, profile)
    if problems:
        raise ProblemsError(f"layer {node.name} alone", problems)
    plan = target.plan(part, profile, target.with_defaults(options))
    described = {
        "artifact": plan.artifact,
        "options": dict(plan.options),
        "inputs": [spec.to_json() for spec in plan.inputs],
        "outputs": [spec.to_json() for spec in plan.outputs],
    }
    with tempfile.TemporaryDirectory(prefix="isthmus-layer-") as folder:
        execute(replace(plan, steps=tuple(step for step in plan.steps if step.where == "host")), Path(folder))
        with import_module(f"isthmus.runtimes.{plan.engine}").open_session(Path(folder), described, 1) as session:
            results = session.run_samples({border_name(graph, name): values[name] for name in inputs})
    compared = []
    for name in node.outputs:
        comparison = compare_output(graph.tensors[name], values[name], results[border_name(graph, name)], entry["max_lsb_allowed"], entry["float_tolerance"])
        compared.append(LayerComparison(node.name, node.op, comparison, comparison))
    return compared


# ---- words
def layer_table(report: LayerReport) -> str:
    """One line a layer, the first difference marked; then what ran, and why the target says that it may differ."""
    first = report.first
    rows = [
        [
            layer.layer,
            layer.op,
            f"{layer.own.compared:,}",
            f"{layer.own.mismatched:,}",
            _difference(layer.own),
            f"{100 * (1 - layer.whole.exact_share):.3g} %" if layer.whole.mismatched else "0",
            "<- first difference" if layer is first else "" if layer.own.passed else "too far off",
        ]
        for layer in report.layers
    ]
    header = ["layer", "operator", "compared", "mismatched", "largest difference", "carried along", ""]
    lines = [f"{report.profile}: {report.how}", grid(header, rows) if rows else "nothing was compared"]
    if report.unseen:
        lines.append(f"not visible: {', '.join(report.unseen[:8])}{' ...' if len(report.unseen) > 8 else ''}")
    lines.append(first_difference(report))
    return "\n".join(lines)


def first_difference(report: LayerReport) -> str:
    """One sentence."""
    first = report.first
    if first is None:
        return f"{report.profile}: no layer differs from the reference on its own inputs ({len(report.layers)} compared)"
    why = report.why or "the target declares no difference: the artifact, its lowering or the engine is at fault"
    if not first.own.passed:
        why = f"more than the target declares ({report.why or 'nothing'}): the artifact, its lowering or the engine is at fault"
    share = f"{first.own.mismatched:,} of {first.own.compared:,} elements"
    return f"{report.profile}: the first difference is in {first.layer} ({first.op}): {share}, at most {_difference(first.own)}; {why}"


def _difference(comparison: Comparison) -> str:
    return f"{comparison.max_lsb} LSB" if comparison.kind == "int8" else f"{comparison.max_abs:.2g}"
