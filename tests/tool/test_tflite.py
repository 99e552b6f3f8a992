# SPDX-License-Identifier: Apache-2.0
"""The tflite target and its runtime: every operator against the reference in LiteRT, the file's structure, and bad files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from isthmus import reference
from isthmus.errors import IsthmusError
from isthmus.form_writer import FormWriter
from isthmus.graph import QuantGraph
from isthmus.plan import BuildPlan
from isthmus.profile import load_profile
from isthmus.recipe import Recipe
from isthmus.runtimes import tflite as engine
from isthmus.runtimes.tflite import TfliteSession, find_engine, open_session
from isthmus.spec import TensorSpec
from isthmus.targets.tflite import ROUNDING, TARGET
from isthmus.targets.tflite.rounding import Average

PROFILE = load_profile("rpi5")
RECIPES = {scheme: Recipe(scheme=scheme, per_channel=scheme != "power_of_two") for scheme in ("power_of_two", "symmetric", "asymmetric")}
Feeds = Mapping[str, np.ndarray]


@pytest.fixture(autouse=True)
def _litert(require: Callable[[str], str]) -> None:
    require("litert")


# ---- parts
def _plan(graph: QuantGraph, **options: str) -> BuildPlan:
    assert TARGET.check(graph, PROFILE) == []
    return TARGET.plan(graph, PROFILE, options)


def _entry(plan: BuildPlan) -> dict[str, Any]:
    return {"artifact": plan.artifact, "inputs": [spec.to_json() for spec in plan.inputs], "outputs": [spec.to_json() for spec in plan.outputs]}


def _open(plan: BuildPlan, folder: Path, threads: int = 1) -> TfliteSession:
    (folder / plan.artifact).write_bytes(plan.files[plan.artifact])
    return open_session(folder, _entry(plan), threads)


def _feeds(graph: QuantGraph, seed: int = 0) -> list[Feeds]:
    """Random over the full range, only the two ends, around zero (where ties are), all lowest, all highest."""
    generator = np.random.default_rng(seed)

    def filled(draw: Callable[[TensorSpec], np.ndarray]) -> Feeds:
        return {spec.name: draw(spec).astype(np.int8) for spec in graph.inputs}

    return [
        filled(lambda spec: generator.integers(-128, 128, spec.shape)),
        filled(lambda spec: generator.integers(-128, 128, spec.shape)),
        filled(lambda spec: generator.choice([-128, 127], spec.shape)),
        filled(lambda spec: np.clip(generator.integers(-4, 5, spec.shape) + (spec.zero_point or 0), -128, 127)),
        filled(lambda spec: np.full(spec.shape, -128)),
        filled(lambda spec: np.full(spec.shape, 127)),
    ]


def _difference(graph: QuantGraph, session: TfliteSession, feeds: list[Feeds]) -> int:
    """The largest difference from the reference in steps; an output that is empty or missing fails."""
    worst = 0
    for feed in feeds:
        expected, found = reference.run(graph, feed), session.run_quantised(feed)
        assert list(found) == [spec.name for spec in graph.outputs]
        for name, array in expected.items():
            assert array.size and found[name].dtype == array.dtype and found[name].shape == array.shape
            if array.dtype == np.int8:
                worst = max(worst, int(np.abs(array.astype(int) - found[name].astype(int)).max()))
            else:
                np.testing.assert_allclose(found[name], array, atol=1e-6)  # a float tail: exp and division of another library
    return worst


def _operators(plan: BuildPlan) -> list[str]:
    """The file's operators in order."""
    from ai_edge_litert import schema_py_generated as schema

    names = {value: name for name, value in vars(schema.BuiltinOperator).items() if isinstance(value, int)}
    model = _model(plan)
    return [names[model.operatorCodes[node.opcodeIndex].builtinCode] for node in model.subgraphs[0].operators]


def _model(plan: BuildPlan) -> Any:
    from ai_edge_litert import schema_py_generated as schema

    return schema.ModelT.InitFromPackedBuf(plan.files[plan.artifact])


class _Case:
    """A writer with scales and constants that fit a scheme."""

    def __init__(self, scheme: str = "power_of_two", seed: int = 0) -> None:
        self.scheme, self.generator = scheme, np.random.default_rng(seed)
        self.writer = FormWriter(recipe=RECIPES[scheme])

    def activation(self) -> dict[str, Any]:
        if self.scheme == "power_of_two":
            return {"scale": 2.0 ** -int(self.generator.integers(2, 6))}
        zero = int(self.generator.integers(-128, 128)) if self.scheme == "asymmetric" else 0
        return {"scale": float(np.float32(self.generator.uniform(0.02, 0.3))), "zero_point": zero}

    def input(self, shape: tuple[int, ...], name: str = "x") -> str:
        return self.writer.input(name, shape, **self.activation())

    def weight(self, *shape: int) -> np.ndarray:
        return self.generator.integers(-127, 128, shape).astype(np.int8)

    def weight_scale(self, channels: int) -> np.ndarray:
        if self.scheme == "power_of_two":
            return np.float32([2.0 ** -int(self.generator.integers(7, 10))])
        return self.generator.uniform(0.002, 0.01, channels).astype(np.float32)

    def bias(self, channels: int) -> np.ndarray:
        return self.generator.integers(-5000, 5000, channels).astype(np.int32)

    def conv(self, x: str, channels: int, filters: int, kernel: tuple[int, ...], bias: bool = True, **more: Any) -> str:
        weight = self.weight(filters, channels // more.get("group", 1), *kernel)
        return self.writer.conv(x, weight, self.weight_scale(filters), self.bias(filters) if bias else None, **self.activation(), **more)

    def gemm(self, x: str, columns: int, rows: int, **more: Any) -> str:
        return self.writer.gemm(x, self.weight(rows, columns), self.weight_scale(rows), self.bias(rows), **self.activation(), **more)

    def graph(self, y: str | None) -> QuantGraph:
        if y is not None:
            self.writer.output(y, "y")
        return self.writer.graph()


def _conv(shape: tuple[int, ...], filters: int, kernel: tuple[int, ...], **more: Any) -> Callable[[_Case], QuantGraph]:
    return lambda c: c.graph(c.conv(c.input(shape), shape[1], filters, kernel, **more))


def _unary(shape: tuple[int, ...], layer: Callable[[_Case, str], str]) -> Callable[[_Case], QuantGraph]:
    return lambda c: c.graph(layer(c, c.input(shape)))


def _add(a: tuple[int, ...], b: tuple[int, ...], **more: Any) -> Callable[[_Case], QuantGraph]:
    return lambda c: c.graph(c.writer.add(c.input(a, "a"), c.input(b, "b"), **c.activation(), **more))


def _flatten_with_two_readers(c: _Case) -> QuantGraph:
    flat = c.writer.flatten(c.input((1, 3, 4, 5)))
    c.writer.output(c.writer.concat([flat, c.writer.relu(flat)], 1), "joined")
    return c.graph(c.gemm(flat, 60, 7))


# name: (the graph, the file's operators in the portable scheme, "" where the scales of the case decide)
CASES: dict[str, tuple[Callable[[_Case], QuantGraph], str]] = {
    "conv": (_conv((1, 5, 9, 11), 7, (3, 3)), "CONV_2D"),
    "conv without bias": (_conv((1, 16, 6, 6), 8, (1, 1), bias=False), "CONV_2D"),
    "conv same": (_conv((1, 5, 9, 11), 7, (3, 3), pads=(1, 1, 1, 1), activation="Relu"), "CONV_2D"),
    "conv stride, even input": (_conv((1, 5, 10, 10), 7, (3, 3), pads=(1, 1, 1, 1), strides=(2, 2), activation="Relu"), "PAD CONV_2D"),
    "conv stride, odd input": (_conv((1, 5, 11, 9), 8, (3, 3), pads=(1, 1, 1, 1), strides=(2, 2)), "CONV_2D"),
    "conv uneven pads": (_conv((1, 3, 8, 9), 4, (3, 2), pads=(0, 1, 2, 1), strides=(1, 2)), "PAD CONV_2D"),
    "conv dilation": (_conv((1, 4, 12, 12), 6, (3, 3), pads=(2, 2, 2, 2), dilations=(2, 2)), "CONV_2D"),
    "conv dilation and stride": (_conv((1, 4, 13, 13), 6, (3, 3), pads=(2, 2, 2, 2), dilations=(2, 2), strides=(2, 2)), "CONV_2D"),
    "conv groups": (_conv((1, 8, 7, 7), 24, (3, 3), group=4, pads=(1, 1, 1, 1)), "CONV_2D"),
    "conv batch": (_conv((3, 4, 8, 8), 6, (3, 3), pads=(1, 1, 1, 1)), "CONV_2D"),
    "conv one filter": (_conv((1, 8, 8, 8), 1, (3, 3)), "CONV_2D"),
    "depthwise": (_conv((1, 8, 9, 9), 8, (3, 3), group=8, pads=(1, 1, 1, 1), activation="Relu"), "DEPTHWISE_CONV_2D"),
    "depthwise multiplier, stride": (_conv((1, 6, 10, 10), 12, (3, 3), group=6, pads=(1, 1, 1, 1), strides=(2, 2)), "PAD DEPTHWISE_CONV_2D"),
    "depthwise 7x7": (_conv((1, 4, 9, 9), 4, (7, 7), group=4, pads=(3, 3, 3, 3)), "DEPTHWISE_CONV_2D"),
    "conv 1-d": (_conv((2, 3, 20), 5, (3,), pads=(1, 1), activation="Relu"), "RESHAPE CONV_2D RESHAPE"),
    "depthwise 1-d": (_conv((1, 6, 21), 6, (5,), pads=(2, 2), strides=(2,), group=6), "RESHAPE DEPTHWISE_CONV_2D RESHAPE"),
    "conv relu6": (_conv((1, 3, 8, 8), 5, (3, 3), activation=("Clip", 0.0, 6.0)), "CONV_2D"),
    "conv clip -1..1": (_conv((1, 3, 8, 8), 5, (3, 3), activation=("Clip", -1.0, 1.0)), "CONV_2D"),
    "conv clip 0..2": (_conv((1, 3, 8, 8), 5, (3, 3), activation=("Clip", 0.0, 2.0)), "CONV_2D MINIMUM"),
    "conv clip": (_conv((1, 3, 8, 8), 5, (3, 3), activation=("Clip", -1.5, 2.5)), "CONV_2D MAXIMUM MINIMUM"),
    "gemm": (_unary((5, 33), lambda c, x: c.gemm(x, 33, 10, activation="Relu")), "FULLY_CONNECTED"),
    "matmul": (_unary((4, 20), lambda c, x: c.writer.matmul(x, c.weight(20, 9), c.weight_scale(9), **c.activation())), "FULLY_CONNECTED"),
    "matmul of rows": (_unary((2, 7, 20), lambda c, x: c.writer.matmul(x, c.weight(20, 9), c.weight_scale(9), **c.activation())), "FULLY_CONNECTED"),
    "max pool": (_unary((1, 4, 9, 9), lambda c, x: c.writer.max_pool(x, (2, 2))), "MAX_POOL_2D"),
    "max pool ceil": (_unary((1, 4, 9, 9), lambda c, x: c.writer.max_pool(x, (2, 2), ceil_mode=1)), "MAX_POOL_2D"),
    "max pool pads": (_unary((1, 4, 10, 12), lambda c, x: c.writer.max_pool(x, (3, 3), (2, 2), (1, 1, 1, 1), ceil_mode=1)), "PADV2 MAX_POOL_2D"),
    "max pool behind relu": (
        _unary((1, 4, 10, 10), lambda c, x: c.writer.max_pool(c.conv(x, 4, 4, (1, 1), activation="Relu"), (3, 3), (2, 2), (1, 1, 1, 1))),
        "CONV_2D PAD MAX_POOL_2D",
    ),
    "max pool 1-d": (_unary((1, 4, 15), lambda c, x: c.writer.max_pool(x, (3,), (2,), (1, 1))), "RESHAPE MAX_POOL_2D RESHAPE"),
    "average pool": (_unary((1, 5, 14, 14), lambda c, x: c.writer.average_pool(x, (3, 3), **c.activation())), "DEPTHWISE_CONV_2D"),
    "average pool 7x7": (_unary((1, 5, 28, 28), lambda c, x: c.writer.average_pool(x, (7, 7), **c.activation())), "DEPTHWISE_CONV_2D"),
    "average pool over all": (_unary((1, 5, 8, 8), lambda c, x: c.writer.average_pool(x, (8, 8), **c.activation())), "MEAN"),
    "average pool, padding counted": (
        _unary((1, 4, 10, 12), lambda c, x: c.writer.average_pool(x, (3, 3), (2, 2), (1, 1, 1, 1), count_include_pad=1, **c.activation())),
        "PAD DEPTHWISE_CONV_2D",
    ),
    "average pool, padding not counted": (
        _unary((1, 4, 10, 12), lambda c, x: c.writer.average_pool(x, (3, 3), (2, 2), (1, 1, 1, 1), ceil_mode=1, **c.activation())),
        "PAD DEQUANTIZE DEPTHWISE_CONV_2D MUL QUANTIZE",
    ),
    "global average pool 2x2": (_unary((1, 6, 2, 2), lambda c, x: c.writer.global_average_pool(x, **c.activation())), "DEPTHWISE_CONV_2D"),
    "global average pool 7x7": (_unary((1, 6, 7, 7), lambda c, x: c.writer.global_average_pool(x, **c.activation())), "MEAN"),
    "global average pool 11x11": (_unary((1, 6, 11, 11), lambda c, x: c.writer.global_average_pool(x, **c.activation())), ""),
    "global average pool 1-d": (_unary((1, 6, 40), lambda c, x: c.writer.global_average_pool(x, **c.activation())), "RESHAPE MEAN RESHAPE"),
    "add": (_add((1, 5, 6, 7), (1, 5, 6, 7)), ""),
    "add relu": (_add((1, 5, 6, 7), (1, 5, 6, 7), activation="Relu"), ""),
    "add clip": (_add((1, 5, 6, 7), (1, 5, 6, 7), activation=("Clip", -1.0, 2.0)), ""),
    "add a channel vector": (_add((1, 5, 6, 7), (1, 5, 1, 1)), ""),
    "add a lower rank": (_add((1, 5, 6, 7), (6, 7)), ""),
    "add rows": (_add((3, 8), (3, 8)), ""),
    "relu": (_unary((1, 4, 5, 5), lambda c, x: c.writer.relu(x)), "RELU"),
    "clip 0..6": (_unary((1, 4, 5, 5), lambda c, x: c.writer.clip(x, 0.0, 6.0)), ""),
    "clip 0..1": (_unary((1, 4, 5, 5), lambda c, x: c.writer.clip(x, 0.0, 1.0)), "RELU_0_TO_1"),
    "clip -1..1": (_unary((2, 9), lambda c, x: c.writer.clip(x, -1.0, 1.0)), "RELU_N1_TO_1"),
    "clip": (_unary((2, 9), lambda c, x: c.writer.clip(x, -0.7, 0.9)), "MAXIMUM MINIMUM"),
    "clip below": (_unary((2, 9), lambda c, x: c.writer.clip(x, -0.7, None)), "MAXIMUM"),
    "flatten": (_unary((1, 3, 4, 5), lambda c, x: c.writer.flatten(x)), "TRANSPOSE RESHAPE"),
    "flatten gemm": (_unary((2, 3, 4, 5), lambda c, x: c.gemm(c.writer.flatten(x), 60, 7)), "RESHAPE FULLY_CONNECTED"),
    "flatten relu gemm": (_unary((2, 3, 4, 5), lambda c, x: c.gemm(c.writer.relu(c.writer.flatten(x)), 60, 7)), "RESHAPE RELU FULLY_CONNECTED"),
    "flatten requantise gemm": (
        _unary((1, 3, 4, 5), lambda c, x: c.gemm(c.writer.requantize(c.writer.flatten(x), **c.activation()), 60, 7)),
        "",
    ),
    "flatten, two readers": (_flatten_with_two_readers, ""),
    "reshape to an image": (_unary((1, 48), lambda c, x: c.conv(c.writer.reshape(x, (1, 3, 4, 4)), 3, 5, (3, 3))), "RESHAPE TRANSPOSE CONV_2D"),
    "reshape to rows": (_unary((1, 6, 4, 4), lambda c, x: c.writer.reshape(x, (1, 6, 16))), "TRANSPOSE RESHAPE"),
    "concat channels": (_unary((1, 4, 5, 6), lambda c, x: c.writer.concat([x, c.writer.relu(x)], 1)), "RELU CONCATENATION"),
    "concat rows": (_unary((1, 4, 5, 6), lambda c, x: c.writer.concat([x, c.writer.relu(x)], 2)), "RELU CONCATENATION"),
    "concat 2-d": (_unary((2, 9), lambda c, x: c.writer.concat([x, x, x, x, x, x], 1)), "CONCATENATION"),
    "requantise": (_unary((1, 4, 5, 6), lambda c, x: c.writer.requantize(x, **c.activation())), ""),
    "requantise rows": (_unary((3, 17), lambda c, x: c.writer.requantize(x, **c.activation())), ""),
    "nothing": (_unary((1, 4, 5, 6), lambda c, x: x), ""),
}  # fmt: skip


# ---- equal to the reference
@pytest.mark.parametrize("name", CASES)
def test_the_portable_scheme_is_exact(name: str, tmp_path: Path) -> None:
    build, operators = CASES[name]
    for seed in range(2):
        graph = build(_Case(seed=seed))
        plan = _plan(graph)
        assert (plan.max_lsb, plan.why_lsb) == (0, "")
        assert operators in ("", " ".join(_operators(plan)))
        with _open(plan, tmp_path) as session:
            assert _difference(graph, session, _feeds(graph, seed)) == 0


@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("name", CASES)
def test_other_schemes_are_within_one_step(name: str, scheme: str, tmp_path: Path) -> None:
    graph = CASES[name][0](_Case(scheme, seed=5))
    plan = _plan(graph)
    layers = sum(node.op in ROUNDING for node in graph.nodes)
    assert plan.max_lsb <= min(layers, 2)
    assert bool(plan.max_lsb) == bool(plan.why_lsb)
    with _open(plan, tmp_path) as session:
        assert _difference(graph, session, _feeds(graph)) <= min(plan.max_lsb, 1)


def _ties(layer: Callable[[FormWriter, str], str], shape: tuple[int, ...] = (1, 1, 16, 16)) -> QuantGraph:
    writer = FormWriter()
    writer.output(layer(writer, writer.input("x", shape, scale=0.5)), "y")
    return writer.graph()


ONE = np.ones((1, 1, 1, 1), np.int8)
TIES: dict[str, Callable[[], QuantGraph]] = {
    "conv": lambda: _ties(lambda w, x: w.conv(x, ONE, 1.0, scale=1.0)),
    "depthwise": lambda: _ties(lambda w, x: w.conv(x, np.ones((256, 1, 1, 1), np.int8), 1.0, scale=1.0, group=256), (1, 256, 1, 1)),
    "gemm": lambda: _ties(lambda w, x: w.gemm(w.flatten(x), np.eye(256, dtype=np.int8), 1.0, scale=1.0)),
    "requantise": lambda: _ties(lambda w, x: w.requantize(x, scale=1.0)),
    "add": lambda: _ties(lambda w, x: w.add(x, w.relu(x), scale=1.0)),
    "add relu": lambda: _ties(lambda w, x: w.add(x, w.relu(x), scale=1.0, activation="Relu")),
    "average pool": lambda: _ties(lambda w, x: w.average_pool(x, (1, 2), scale=1.0)),
    "average pool of nine": lambda: _ties(lambda w, x: w.average_pool(x, (3, 3), (1, 1), scale=1.0)),
    "average pool of the edge": lambda: _ties(lambda w, x: w.average_pool(x, (3, 3), (1, 1), (1, 1, 1, 1), scale=1.0)),
}


@pytest.mark.parametrize("name", TIES)
def test_ties_go_to_even(name: str, tmp_path: Path) -> None:
    graph = TIES[name]()
    every = {"x": np.arange(-128, 128).astype(np.int8).reshape(graph.inputs[0].shape)}
    values = reference.run_all(graph, every)
    assert len(np.unique(values[graph.raw_output()])) > 60
    with _open(_plan(graph), tmp_path) as session:
        assert _difference(graph, session, [every, *_feeds(graph)]) == 0


@pytest.mark.parametrize("kernel", [(3, 3), (3, 5), (4, 7), (2, 4)])
@pytest.mark.parametrize("padded", [False, True])
def test_the_average_of_equal_cells(kernel: tuple[int, int], padded: bool, tmp_path: Path) -> None:
    """One channel a value, every cell the same: at twice the step each odd value is a tie, whatever a window counts."""
    writer = FormWriter()
    pads = (1, 2, 1, 2) if padded and kernel[1] > 2 else (0, 0, 0, 0)
    writer.output(writer.average_pool(writer.input("x", (1, 256, 9, 10), scale=0.5), kernel, (1, 1), pads, scale=1.0), "y")
    graph = writer.graph()
    plan = _plan(graph)
    assert plan.max_lsb == 0
    with _open(plan, tmp_path) as session:
        values = np.arange(-128, 128).astype(np.int8).reshape(1, 256, 1, 1)
        assert _difference(graph, session, [{"x": np.broadcast_to(values, (1, 256, 9, 10)).copy()}]) == 0


@pytest.mark.parametrize(("height", "width"), [(5, 5), (7, 7), (8, 8), (11, 11), (14, 2)])
def test_every_sum_of_a_global_average(height: int, width: int, tmp_path: Path) -> None:
    """One channel a sum: ties (a power of two twice the step) and their neighbours, over the whole range."""
    cells = height * width
    sums = np.unique(np.concatenate([np.arange(-128, 128) * cells // 2 + near for near in (-1, 0, 1)]).clip(-128 * cells, 127 * cells))
    low, more = np.divmod(sums, cells)
    columns = low[:, np.newaxis] + (np.arange(cells) < more[:, np.newaxis])
    writer = FormWriter()
    writer.output(writer.global_average_pool(writer.input("x", (1, len(sums), height, width), scale=0.5), scale=1.0), "y")
    graph = writer.graph()
    with _open(_plan(graph), tmp_path) as session:
        assert _difference(graph, session, [{"x": columns.reshape(1, len(sums), height, width).astype(np.int8)}]) == 0


def test_some_counts_need_another_weight() -> None:
    """1 / 14 in float32 breaks a tie that 1 / (14 w) for another w keeps; every count up to 64 has such a w."""
    assert not Average(14, (1.0, 0), (1.0, 0)).exact_by_mean()
    found = [Average(count, (1.0, 0), (2.0, 0)).convolution_weight() for count in range(1, 65)]
    assert None not in found and max(weight or 0 for weight in found) > 1


@settings(max_examples=40)
@given(data=st.data())
def test_any_convolution(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    rank = data.draw(st.sampled_from([1, 2]), label="rank")
    group = data.draw(st.sampled_from([1, 2, 4]), label="group")
    channels, filters = group * data.draw(st.integers(1, 3), label="depth"), group * data.draw(st.integers(1, 3), label="filters")
    axes = [
        (data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2)), data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3)))
        for _ in range(rank)
    ]  # kernel, stride, dilation, begin, end
    space = [max((k - 1) * d + 1 - b - e, 1) + data.draw(st.integers(0, 6)) for k, _, d, b, e in axes]
    case = _Case(seed=data.draw(st.integers(0, 1000)))
    graph = case.graph(
        case.conv(
            case.input((1, channels, *space)), channels, filters, tuple(axis[0] for axis in axes), group=group,
            strides=[axis[1] for axis in axes], dilations=[axis[2] for axis in axes], pads=[*(axis[3] for axis in axes), *(axis[4] for axis in axes)],
            activation=data.draw(st.sampled_from(["", "Relu", ("Clip", 0.0, 6.0), ("Clip", -0.5, 1.5)])),
        )
    )  # fmt: skip
    with _open(_plan(graph), tmp_path_factory.mktemp("conv")) as session:
        assert _difference(graph, session, _feeds(graph)[:3]) == 0


# ---- a real network
def _network(scheme: str) -> QuantGraph:
    """28 x 28, a stem, a pool, a residual block, depthwise and pointwise, a concat, a global average, a classifier: random weights."""
    generator = np.random.default_rng(2)
    writer = FormWriter(recipe=RECIPES[scheme])

    def scale(real: float) -> float:
        return 2.0 ** round(np.log2(real)) if scheme == "power_of_two" else float(np.float32(real * generator.uniform(0.8, 1.25)))

    def layer(x: str, step: float, channels: int, filters: int, kernel: int, relu: bool = True, **more: Any) -> tuple[str, float]:
        depth = channels // more.get("group", 1)
        real = generator.normal(0, np.sqrt(2 / (depth * kernel * kernel)), (filters, depth, kernel, kernel))
        weight_scale = np.float32(scale(np.abs(real).max() / 127))
        weight = np.clip(np.rint(real / weight_scale), -127, 127).astype(np.int8)
        bias = np.rint(generator.normal(0, 0.1, filters) / (step * weight_scale)).astype(np.int32)
        out = scale(4 / 127)
        pads = (kernel // 2,) * 4
        return writer.conv(x, weight, weight_scale, bias, scale=out, activation="Relu" if relu else "", pads=pads, **more), out

    step = scale(3 / 127)
    x, step = layer(writer.input("image", (1, 1, 28, 28), scale=step), step, 1, 16, 3)
    x = writer.max_pool(x, (3, 3), (2, 2), (1, 1, 1, 1))
    y, inner = layer(x, step, 16, 16, 3)
    y, inner = layer(y, inner, 16, 16, 3, relu=False)
    step = scale(6 / 127)
    x = writer.add(y, x, scale=step, activation="Relu")
    y, inner = layer(x, step, 16, 16, 3, group=16, strides=(2, 2))
    y, inner = layer(y, inner, 16, 32, 1)
    x = writer.concat([y, writer.max_pool(y, (1, 1))], 1)
    x = writer.flatten(writer.global_average_pool(x, scale=scale(1.5 / 127)))
    weight = np.clip(np.rint(generator.normal(0, 40, (10, 64))), -127, 127).astype(np.int8)
    writer.output(writer.gemm(x, weight, np.float32(2**-8), None, scale=scale(4 / 127)), "logits")
    return writer.graph()


def test_a_network_is_exact_and_has_no_transpose(tmp_path: Path) -> None:
    graph = _network("power_of_two")
    plan = _plan(graph)
    operators = _operators(plan)
    assert "TRANSPOSE" not in operators and operators.count("CONV_2D") == 4 and operators.count("DEPTHWISE_CONV_2D") == 1
    assert plan.max_lsb == 0 and plan.inputs[0].layout == "NHWC" and plan.inputs[0].shape == (1, 28, 28, 1)
    generator = np.random.default_rng(0)
    feeds: list[Feeds] = [{"image": generator.integers(-128, 128, (1, 1, 28, 28)).astype(np.int8)} for _ in range(20)]
    with _open(plan, tmp_path) as session, _open(plan, tmp_path, threads=2) as parallel:
        assert _difference(graph, session, feeds) == 0
        assert _difference(graph, parallel, feeds) == 0
        assert len(np.unique(np.concatenate([session.run_quantised(feed)["logits"] for feed in feeds]))) > 20


@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
def test_a_network_of_another_scheme_is_near(scheme: str, tmp_path: Path) -> None:
    graph = _network(scheme)
    plan = _plan(graph)
    assert plan.max_lsb == 2 and "Conv" in plan.why_lsb and "Add" in plan.why_lsb
    with _open(plan, tmp_path) as session:
        assert _difference(graph, session, _feeds(graph)) <= plan.max_lsb


def test_xnnpack_takes_the_whole_network(tmp_path: Path) -> None:
    with _open(_plan(_network("power_of_two")), tmp_path) as session:
        details = session._interpreter._get_ops_details()
        delegates = [node for node in details if node["op_name"] == "DELEGATE"]
        outputs = {int(detail["index"]) for detail in session._interpreter.get_output_details()}
        assert len(delegates) == 1 and outputs <= {int(index) for index in delegates[0]["outputs"]}


# ---- options
def test_a_float_border(tmp_path: Path) -> None:
    case = _Case(seed=3)
    graph = case.graph(case.conv(case.input((1, 3, 8, 8)), 3, 4, (3, 3)))
    plan = _plan(graph, io="float32")
    assert [spec.dtype for spec in (*plan.inputs, *plan.outputs)] == ["float32", "float32"]
    assert _operators(plan) == ["QUANTIZE", "CONV_2D", "DEQUANTIZE"]
    real = np.random.default_rng(0).normal(0, 3, (1, 3, 8, 8)).astype(np.float32)
    expected = reference.run(graph, {"x": graph.inputs[0].quantise(real)})["y"]
    with _open(plan, tmp_path) as session:
        np.testing.assert_array_equal(session.run({"x": real})["y"], graph.outputs[0].dequantise(expected))
        assert session.run_raw({"x": plan.inputs[0].from_form(real)})["y"].dtype == np.float32
        assert _difference(graph, session, _feeds(graph)) == 0  # the reference's int8 goes in and comes out as real numbers


def test_native_rounding_declares_its_step(tmp_path: Path) -> None:
    graph = TIES["add"]()
    plan = _plan(graph, rounding="native")
    assert _operators(plan) == ["RELU", "ADD"]
    assert plan.max_lsb == ROUNDING["Add"].max_lsb == 1 and "halves up" in plan.why_lsb
    with _open(plan, tmp_path) as session:
        assert _difference(graph, session, _feeds(graph)) == 1


def test_an_addition_without_ties_stays_integer() -> None:
    writer = FormWriter()
    writer.output(writer.add(writer.input("a", (1, 3, 4, 4), scale=0.5), writer.input("b", (1, 3, 4, 4), scale=0.25), scale=0.25), "y")
    plan = _plan(writer.graph())
    assert _operators(plan) == ["ADD"] and plan.max_lsb == 0


def test_a_sum_beyond_float32_is_declared() -> None:
    """4096 inputs of +-128 x 127 can reach 2^26; at a multiplier of 2^-19 that is no saturated value."""
    writer = FormWriter()
    writer.output(writer.gemm(writer.input("x", (1, 4096), scale=1.0), np.full((1, 4096), 127, np.int8), 2.0**-19, scale=1.0), "y")
    assert _plan(writer.graph()).max_lsb == 1


@pytest.mark.parametrize(("option", "value"), [("io", "uint8"), ("rounding", "up"), ("optimise", "yes")])
def test_an_unknown_option_is_refused(option: str, value: str) -> None:
    with pytest.raises(IsthmusError, match=option):
        TARGET.plan(_conv((1, 3, 8, 8), 4, (3, 3))(_Case()), PROFILE, {option: value})


def test_a_softmax_tail(tmp_path: Path) -> None:
    for shape, axis in (((3, 10), -1), ((1, 10, 3, 3), 1), ((1, 10, 3, 4), -1)):
        case = _Case()
        case.writer.softmax_output(case.input(shape), "p", axis=axis)
        graph = case.graph(None)
        plan = _plan(graph)
        assert plan.outputs[0].dtype == "float32" and plan.max_lsb == 0
        with _open(plan, tmp_path) as session:
            assert _difference(graph, session, _feeds(graph)) == 0


# ---- the file
def test_the_file_says_what_it_is() -> None:
    graph = _network("power_of_two")
    plan = _plan(graph)
    model = _model(plan)
    signature = model.signatureDefs[0]
    assert signature.signatureKey == b"serving_default"
    assert [entry.name for entry in (*signature.inputs, *signature.outputs)] == [b"image", b"logits"]
    assert [entry.tensorIndex for entry in signature.inputs] == list(model.subgraphs[0].inputs)
    texts = {entry.name.decode(): bytes(model.buffers[entry.buffer].data) for entry in model.metadata}
    assert texts["isthmus.digest"].decode() == graph.digest
    assert texts["min_runtime_version"].rstrip(b"\0") == b"1.14.0"
    names = [tensor.name.decode() for tensor in model.subgraphs[0].tensors]
    assert len(set(names)) == len(names) and set(graph.tensors) & set(names) >= {node.output for node in graph.nodes if node.kind == "int8"}


def test_the_same_graph_gives_the_same_bytes() -> None:
    assert _plan(_network("asymmetric")).files == _plan(_network("asymmetric")).files
    assert _plan(_network("asymmetric")).digest() == _plan(_network("asymmetric")).digest()


def test_weights_lie_as_tflite_wants_them() -> None:
    from ai_edge_litert import schema_py_generated as schema

    case = _Case("symmetric")
    y = case.conv(case.conv(case.input((1, 4, 8, 8)), 4, 6, (3, 2)), 6, 12, (3, 3), group=6)
    plan = _plan(case.graph(y))
    tensors = {tensor.name.decode(): tensor for tensor in _model(plan).subgraphs[0].tensors}
    assert list(tensors["conv/weight"].shape) == [6, 3, 2, 4] and tensors["conv/weight"].quantization.quantizedDimension == 0
    assert list(tensors["conv_2/weight"].shape) == [1, 3, 3, 12] and tensors["conv_2/weight"].quantization.quantizedDimension == 3
    assert len(tensors["conv_2/weight"].quantization.scale) == 12 and not any(tensors["conv_2/weight"].quantization.zeroPoint)
    content = plan.files[plan.artifact]
    model = schema.Model.GetRootAsModel(content, 0)
    starts = [_buffer_start(model.Buffers(i)) for i in range(model.BuffersLength())]
    assert sum(start > 0 for start in starts) > 4 and all(start % 16 == 0 for start in starts)


def _buffer_start(buffer: Any) -> int:
    """Where the buffer's bytes begin in the file; 0 where it has none."""
    offset = buffer._tab.Offset(4)
    return int(buffer._tab.Vector(offset)) if offset else 0


def test_gemm_with_scales_per_channel_is_a_convolution() -> None:
    """tflite-runtime 2.14 knows FULLY_CONNECTED with one weight scale only."""
    graph = _unary((3, 20), lambda c, x: c.gemm(x, 20, 9))(_Case("symmetric"))
    assert _operators(_plan(graph)) == ["RESHAPE", "CONV_2D", "RESHAPE"]


# ---- what the target refuses
def _refused(graph: QuantGraph) -> str:
    (problem,) = TARGET.check(graph, PROFILE)
    assert problem.node in {node.name for node in graph.nodes} and problem.found and problem.fix
    return problem.rule


def test_what_tflite_lacks_is_named() -> None:
    assert _refused(_unary((1, 3, 8, 8), lambda c, x: c.writer.max_pool(x, (2, 2), (1, 1), dilations=(2, 2)))(_Case())) == "tflite-dilation"
    assert _refused(_unary((1, 3, 4, 4, 4), lambda c, x: c.writer.global_average_pool(x, scale=0.5))(_Case())) == "tflite-rank"
    writer = FormWriter()
    writer.output(writer.conv(writer.input("x", (1, 1, 4, 4), scale=1.0), ONE, 1.0, scale=2.0**-8), "y")
    assert _refused(writer.graph()) == "tflite-scale"
    writer = FormWriter()
    writer.softmax_output(writer.input("x", (1, 3, 4, 4), scale=1.0), "p", axis=2)
    assert _refused(writer.graph()) == "tflite-softmax-axis"


def test_two_weights_of_minus_128_are_refused_where_the_input_can_be_that_low() -> None:
    weight = np.full((1, 2, 1, 1), -128, np.int8)

    def graph(relu: bool, weight: np.ndarray) -> QuantGraph:
        writer = FormWriter()
        x = writer.input("x", (1, 2, 4, 4), scale=1.0)
        writer.output(writer.conv(writer.relu(x) if relu else x, weight, 0.5, scale=1.0), "y")
        return writer.graph()

    assert _refused(graph(False, weight)) == "tflite-weight-range"
    assert TARGET.check(graph(True, weight), PROFILE) == []
    assert TARGET.check(graph(False, np.array([-128, -127], np.int8).reshape(1, 2, 1, 1)), PROFILE) == []


# ---- the session
@pytest.fixture
def plan() -> BuildPlan:
    return _plan(_conv((1, 3, 6, 6), 4, (3, 3))(_Case()))


def test_outputs_outlive_the_next_run(plan: BuildPlan, tmp_path: Path) -> None:
    with _open(plan, tmp_path) as session:
        feed = {"x": np.full(plan.inputs[0].shape, 3, np.int8)}
        first = session.run_raw(feed)["y"]
        kept = first.copy()
        other = session.run_raw({"x": np.full(plan.inputs[0].shape, -90, np.int8)})["y"]
        assert np.array_equal(first, kept) and not np.array_equal(first, other)
        assert np.array_equal(session.run_raw(feed)["y"], first)


def test_the_engine_says_its_version(plan: BuildPlan, tmp_path: Path) -> None:
    with _open(plan, tmp_path) as session:
        assert session.engine == "tflite" and session.version.startswith("LiteRT ") and session.version == find_engine()[1]


def test_no_engine_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "ENGINES", (("no_such_module_here", "no-such", "none"),))
    with pytest.raises(IsthmusError, match=r"no TensorFlow Lite engine is here .*pip install"):
        find_engine()


@settings(max_examples=60)
@given(share=st.floats(0, 1, exclude_max=True))
@example(share=0.0)
@example(share=0.999)
def test_a_truncated_file_is_one_sentence(share: float, tmp_path_factory: pytest.TempPathFactory) -> None:
    plan = _plan(_conv((1, 3, 6, 6), 4, (3, 3))(_Case()))
    content = plan.files[plan.artifact]
    folder = tmp_path_factory.mktemp("cut")
    (folder / plan.artifact).write_bytes(content[: int(len(content) * share)])
    with pytest.raises(IsthmusError, match=r"model\.tflite: .*compile the bundle again") as caught:
        open_session(folder, _entry(plan))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"not a model at all", b"\x18\x00\x00\x00TFL3" + b"\xff" * 200])
def test_something_else_is_one_sentence(content: bytes, plan: BuildPlan, tmp_path: Path) -> None:
    (tmp_path / plan.artifact).write_bytes(content)
    with pytest.raises(IsthmusError, match=r"model\.tflite: "):
        open_session(tmp_path, _entry(plan))


def test_a_missing_file_another_border_and_no_thread(plan: BuildPlan, tmp_path: Path) -> None:
    with pytest.raises(IsthmusError, match="no such file"):
        open_session(tmp_path, _entry(plan))
    (tmp_path / plan.artifact).write_bytes(plan.files[plan.artifact])
    with pytest.raises(IsthmusError, match="threads: expected 1 or more, found 0"):
        open_session(tmp_path, _entry(plan), threads=0)
    entry = _entry(plan)
    entry["inputs"][0]["shape"] = [1, 3, 6, 6]
    with pytest.raises(IsthmusError, match=r"has the inputs \['int8\[1, 6, 6, 3\]'\], the manifest says \['int8\[1, 3, 6, 6\]'\]"):
        open_session(tmp_path, entry)


@pytest.mark.parametrize("name", ["rpi4", "rpi5"])
def test_the_boards_come_here(name: str) -> None:
    profile = load_profile(name)
    assert profile.target == "tflite" and profile.arch == "aarch64" and set(profile.facts) == set(profile.sources)
