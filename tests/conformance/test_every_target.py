# SPDX-License-Identifier: Apache-2.0
"""Every target on every tiny model: an artifact that equals the reference, or a refusal that is expected, named, and says what to do."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest

from isthmus import pipeline
from isthmus.bundle import Bundle
from isthmus.errors import ProblemsError
from isthmus.form import ISLANDS_KEY
from isthmus.graph import QuantGraph
from isthmus.profile import load_profile
from isthmus.registry import load_target

MODELS = sorted((Path(__file__).parents[1] / "models").glob("*.onnx"))
TOOLS = {"cpu": ("onnxruntime",), "rpi5": ("litert",), "jetson-orin-nano": ("tensorrt_rtx",), "pynq-z2": ("hls4ml", "g++"), "null": ()}
SAMPLES = 64
# Targets whose compilers take seconds to start: what they must take is compiled a dozen models at a time, side by side in one graph.
TOGETHER = {"jetson-orin-nano": 24, "pynq-z2": 12}

# Operators of the form that a target has no lowering for: every model with one of them is refused by name. A target that learns one takes it
# out of its own set.
FUNCTIONS = frozenset(
    {"LeakyRelu", "PRelu", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "Silu", "Mish", "Gelu", "Softplus", "Elu"},
)
ARITHMETIC = frozenset({"ConvTranspose", "BatchMatMul", "Sub", "Mul", "ReduceMean", "ResizeLinear"})
MOVES = frozenset({"Split", "Slice", "Pad", "Transpose", "Squeeze", "Unsqueeze", "Expand", "DepthToSpace", "SpaceToDepth", "Gather", "ResizeNearest"})
ISLANDS = frozenset({"ArgMax", "Cast", "GridSample"})
CONSTANTS = frozenset({"Constant"})
NOT_LOWERED: dict[str, frozenset[str]] = {
    "cpu": frozenset(),
    "rpi5": frozenset(),
    "null": frozenset(),
    "jetson-orin-nano": frozenset(),
    "pynq-z2": ISLANDS | {"LayerNormalization"},
}
SCHEMES = {"cpu": "power_of_two symmetric asymmetric", "rpi5": "power_of_two symmetric asymmetric", "null": "power_of_two symmetric asymmetric"} | {
    "jetson-orin-nano": "power_of_two symmetric",
    "pynq-z2": "power_of_two",
}
# What else a target refuses, and by which rule. A model that is in none of these tables must become an artifact.
REFUSED: dict[str, dict[str, str]] = {"cpu": {}, "rpi5": {}, "null": {}, "jetson-orin-nano": {}} | {
    "pynq-z2": {"softmax_island": "float-tail"},
}
# Two compilers' runs a model would cost this file most of its time; benchmarks/jetson_support.py compiles each for both GPUs.
OPTIONS = {"jetson-orin-nano": {"check_nearest": True}}


def _refusal(profile: str, name: str, graph: QuantGraph) -> str | None:
    """The rule by which a target refuses a model, None where it must take it."""
    if graph.recipe.scheme not in SCHEMES[profile].split():
        return "scheme"
    if any(node.op in NOT_LOWERED[profile] for node in graph.nodes):
        return "operator"
    return REFUSED[profile].get(name)


def _samples(graph: QuantGraph) -> dict[str, np.ndarray]:
    """Real numbers that reach every int8 value, and a little beyond both ends."""
    generator = np.random.default_rng(3)
    return {spec.name: (generator.uniform(-140, 140, (SAMPLES, *spec.shape[1:])) * float(spec.scale or 1)).astype(np.float32) for spec in graph.inputs}


@pytest.mark.parametrize("file", MODELS, ids=lambda file: file.stem)
@pytest.mark.parametrize("profile", TOOLS)
def test_equals_the_reference_or_refuses(profile: str, file: Path, tmp_path: Path, require: Callable[[str], str]) -> None:
    graph = QuantGraph.load(file)
    expected = _refusal(profile, file.stem, graph)
    if expected is None and profile in TOGETHER:
        loaded = load_profile(profile)
        assert load_target(loaded.target).check(graph, loaded) == []  # its artifact is built and compared below
        return
    for tool in TOOLS[profile]:
        require(tool)
    try:
        _is_built_and_exact(profile, graph, tmp_path / "bundle")
    except ProblemsError as error:
        assert expected in {problem.rule for problem in error.problems}, str(error)
        assert all(problem.fix for problem in error.problems)
        assert list(tmp_path.iterdir()) == []
        return
    assert expected is None, f"{profile} took {file.stem}, which the table says it refuses"


def _taken(profile: str) -> list[list[Path]]:
    """The models that a target must take, by scheme, so many at a time."""
    schemes: dict[str, list[Path]] = {}
    for file in MODELS:
        graph = QuantGraph.load(file)
        if _refusal(profile, file.stem, graph) is None:
            schemes.setdefault(graph.recipe.scheme, []).append(file)
    return [files[first : first + TOGETHER[profile]] for files in schemes.values() for first in range(0, len(files), TOGETHER[profile])]


@pytest.mark.parametrize(
    ("profile", "files"), [pytest.param(profile, files, id=f"{profile}-{files[0].stem}-and-more") for profile in TOGETHER for files in _taken(profile)]
)
def test_side_by_side_they_equal_the_reference(profile: str, files: Sequence[Path], tmp_path: Path, require: Callable[[str], str]) -> None:
    for tool in TOOLS[profile]:
        require(tool)
    _is_built_and_exact(profile, _side_by_side(files), tmp_path / "bundle")


def _side_by_side(files: Sequence[Path]) -> QuantGraph:
    """One graph of several that share nothing; each name begins with its file's."""
    whole, islands = onnx.load(files[0]), []
    del whole.graph.node[:], whole.graph.initializer[:], whole.graph.input[:], whole.graph.output[:], whole.graph.value_info[:]
    for file in files:
        model = onnx.compose.add_prefix(onnx.load(file), f"{file.stem}_")
        for field in ("node", "initializer", "input", "output", "value_info"):
            getattr(whole.graph, field).extend(getattr(model.graph, field))
        islands += [f"{file.stem}_{name}" for one in model.metadata_props if one.key == ISLANDS_KEY for name in json.loads(one.value)]
    for one in whole.metadata_props:
        if one.key == ISLANDS_KEY:
            one.value = json.dumps(islands)
    return QuantGraph.from_model(whole)


def _is_built_and_exact(profile: str, graph: QuantGraph, folder: Path) -> None:
    bundle = pipeline.compile(graph, targets=[profile], data=_samples(graph), options=OPTIONS.get(profile), tune=False, output=folder)
    entry = bundle.artifact(profile)
    assert all(step["status"] == ("planned" if step["name"] in {s["name"] for s in entry["planned"]} else "done") for step in entry["steps"]), entry["steps"]
    comparisons = pipeline.verify(Bundle.open(folder))[profile]
    if not entry["runs_here"]:
        assert comparisons == []
        return
    assert len(comparisons) == len(graph.outputs)
    for comparison in comparisons:
        assert comparison.passed and comparison.compared >= SAMPLES
        if graph.recipe.scheme == "power_of_two":
            allowed = 0 if not entry["why_lsb"] else entry["max_lsb_allowed"]
            assert comparison.max_lsb <= allowed, f"{comparison}: {entry['why_lsb']}"
        else:
            assert comparison.max_lsb <= 1, comparison


@pytest.mark.parametrize("profile", TOOLS)
def test_the_profile_names_its_sources(profile: str) -> None:
    loaded = load_profile(profile)
    assert loaded.board and set(loaded.facts) <= set(loaded.sources)
