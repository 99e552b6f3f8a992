# SPDX-License-Identifier: Apache-2.0
"""Target `cpu`, operator by operator: equal to the reference on every element, as ONNX Runtime optimises it and node by node, and by the kernel intended."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from isthmus import reference
from isthmus.form_writer import FormWriter
from isthmus.graph import QuantGraph
from isthmus.profile import load_profile
from isthmus.recipe import Recipe
from isthmus.runtimes.onnxruntime import session_options
from isthmus.tables import FUNCTIONS
from isthmus.targets.cpu import TARGET, tolerance

PROFILE = load_profile("cpu")
ALL_VALUES = np.arange(-128, 128, dtype=np.int8).reshape(1, 4, 8, 8)
WAYS = ("all", 1), ("off", 1)


def artifact(graph: QuantGraph) -> bytes:
    assert TARGET.check(graph, PROFILE) == []
    return TARGET.plan(graph, PROFILE, {}).files["model.onnx"]


def loaded(model: bytes, optimisation: str = "all", threads: int = 1) -> ort.InferenceSession:
    return ort.InferenceSession(model, session_options(threads, optimisation), providers=["CPUExecutionProvider"])


def operators(graph: QuantGraph, tmp_path_factory: pytest.TempPathFactory) -> collections.Counter[str]:
    """What ONNX Runtime really runs."""
    file = tmp_path_factory.mktemp("optimised") / "model.onnx"
    options = session_options(1, "all")
    options.optimized_model_filepath = str(file)
    ort.InferenceSession(artifact(graph), options, providers=["CPUExecutionProvider"])
    return collections.Counter(node.op_type for node in onnx.load(file).graph.node)


def largest_difference(graph: QuantGraph, feeds: Sequence[dict[str, np.ndarray]], ways: Sequence[tuple[str, int]] = WAYS) -> int:
    model, largest = artifact(graph), 0
    for optimisation, threads in ways:
        session = loaded(model, optimisation, threads)
        for fed in feeds:
            expected = reference.run(graph, fed)
            for spec, actual in zip(graph.outputs, session.run(None, fed), strict=True):
                largest = max(largest, int(np.abs(actual.astype(int) - expected[spec.name]).max()))
    return largest


def assert_exact(graph: QuantGraph, *feeds: dict[str, np.ndarray], ways: Sequence[tuple[str, int]] = WAYS) -> None:
    assert tolerance(graph, "all") == (0, "")
    assert largest_difference(graph, feeds or [noise(graph), noise(graph, (-128, 127))], ways) == 0


def noise(graph: QuantGraph, choice: Sequence[int] | None = None) -> dict[str, np.ndarray]:
    values = np.arange(-128, 128) if choice is None else np.array(choice)
    return {spec.name: np.random.choice(values, spec.shape).astype(np.int8) for spec in graph.inputs}


def one(shape: tuple[int, ...], body: Callable[[FormWriter, str], str], scale: float = 2.0**-4, recipe: Recipe | None = None, zero: int = 0) -> QuantGraph:
    w = FormWriter(recipe)
    w.output(body(w, w.input("x", shape, scale=scale, zero_point=zero)), "y")
    return w.graph()


def anything(*shape: int) -> np.ndarray:
    return np.random.randint(-128, 128, shape).astype(np.int8)


# ---- functions of one number
def of_function(op: str, source: float, result: float, zeros: tuple[int, int] = (0, 0)) -> QuantGraph:
    attributes: dict[str, dict[str, Any]] = {"LeakyRelu": {"alpha": 0.1}, "HardSigmoid": {"alpha": 1 / 6, "beta": 0.5}, "Elu": {"alpha": 0.7}}

    def body(w: FormWriter, x: str) -> str:
        if op == "Silu":
            return w.silu(x, scale=result, zero_point=zeros[1])
        if op.startswith("PRelu"):
            slope = np.array([0.25, -0.5, 1.5, 0.1]).reshape(-1, 1, 1) if op == "PRelu" else np.array(0.3)
            return w.p_relu(x, slope, scale=result, zero_point=zeros[1])
        return w.function(op, x, scale=result, zero_point=zeros[1], **attributes.get(op, {}))

    power = all(np.frexp(scale)[0] == 0.5 for scale in (source, result)) and zeros == (0, 0)
    recipe = None if power else Recipe(name="asymmetric", scheme="asymmetric")
    return one((1, 4, 8, 8), body, source, recipe, zeros[0])


@pytest.mark.parametrize("op", sorted({*FUNCTIONS, "PRelu", "PRelu by one slope"}))
def test_every_entry_of_every_table(op: str) -> None:
    """All 256 inputs at scales from a fine one to one where nearly everything saturates; any scheme: a table has no near misses."""
    for source in (-6, -4, -3, 0):
        for result in (-8, -7, source - 1, source):
            assert largest_difference(of_function(op, 2.0**source, 2.0**result), [{"x": ALL_VALUES}], [("all", 1), ("off", 1)]) == 0, (source, result)
    for _ in range(6):
        source, result = (float(np.float32(2.0 ** np.random.uniform(-7, 0))) for _ in range(2))
        zeros = tuple(int(zero) for zero in np.random.randint(-128, 128, 2))
        graph = of_function(op, source, result, (zeros[0], zeros[1]))
        assert tolerance(graph, "all") == (0, "")
        assert largest_difference(graph, [{"x": ALL_VALUES}], [("all", 1)]) == 0, (source, result, zeros)


@pytest.mark.parametrize(
    ("op", "result", "kernel"),
    [
        ("Sigmoid", 2.0**-7, "QLinearSigmoid"),
        ("Tanh", 2.0**-7, "QLinearSigmoid"),
        ("Tanh", 2.0**-8, "Tanh"),  # 256 steps to 1: the zero point would leave uint8
        ("LeakyRelu", 2.0**-4, "QLinearLeakyRelu"),
        ("PRelu by one slope", 2.0**-4, "QLinearLeakyRelu"),
        ("PRelu", 2.0**-4, "GatherElements"),
        ("Mish", 2.0**-4, "GatherElements"),
        ("Sigmoid", 1.0, "GatherElements"),  # Sigmoid(0) is a tie there
        ("Silu", 2.0**-4, "Sigmoid"),
        ("HardSigmoid", 2.0**-7, "HardSigmoid"),
        ("HardSwish", 2.0**-4, "QLinearMul"),
    ],
)
def test_a_function_runs_on_the_kernel_measured(op: str, result: float, kernel: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert operators(of_function(op, 2.0**-4, result), tmp_path_factory)[kernel] == 1


# ---- two operands
@pytest.mark.parametrize(("method", "kernel"), [("mul", "QLinearMul"), ("sub", "QLinearAdd")])
@pytest.mark.parametrize("scales", [(0, 0, 1), (0, -1, 1), (-4, -4, -8), (-4, -4, -1), (-7, -7, -7), (-3, -1, 4)])
def test_every_pair_of_values(method: str, kernel: str, scales: tuple[int, int, int], tmp_path_factory: pytest.TempPathFactory) -> None:
    w = FormWriter()
    a, b = (w.input(name, (1, 1, 256, 256), scale=2.0**exponent) for name, exponent in zip("ab", scales, strict=False))
    w.output(getattr(w, method)(a, b, scale=2.0 ** scales[2]), "y")
    column, row = np.meshgrid(np.arange(-128, 128, dtype=np.int8), np.arange(-128, 128, dtype=np.int8))
    graph = w.graph()
    assert_exact(graph, {"a": column[None, None].copy(), "b": row[None, None].copy()})
    assert operators(graph, tmp_path_factory)[kernel] == 1


@pytest.mark.parametrize("method", ["add", "sub", "mul"])
@pytest.mark.parametrize("shapes", [((1, 8, 5, 5), (1, 8, 1, 1)), ((1, 1, 1, 7), (1, 6, 4, 1)), ((2, 3, 4), (2, 1, 4))])
def test_operands_broadcast(method: str, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    w = FormWriter()
    a, b = (w.input(name, shape, scale=2.0**-3) for name, shape in zip("ab", shapes, strict=True))
    w.output(getattr(w, method)(a, b, scale=2.0**-2, activation="Relu"), "y")
    assert_exact(w.graph())


@pytest.mark.parametrize("shapes", [((1, 3, 9, 70), (1, 3, 70, 5)), ((2, 17, 33), (2, 33, 8))])
def test_products_of_two_activations(shapes: tuple[tuple[int, ...], tuple[int, ...]], tmp_path_factory: pytest.TempPathFactory) -> None:
    w = FormWriter()
    a, b = (w.input(name, shape, scale=2.0**-4) for name, shape in zip("ab", shapes, strict=True))
    w.output(w.batch_matmul(a, b, scale=2.0, activation=("Clip", -60.0, 90.0)), "y")
    assert_exact(w.graph())
    assert operators(w.graph(), tmp_path_factory)["QLinearMatMul"] == 1


# ---- ConvTranspose
CONV_TRANSPOSE: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    # input shape, weight shape, attributes
    "kernel = stride": ((1, 8, 5, 4), (8, 8, 2, 2), {"strides": (2, 2)}),
    "4x4 by 2": ((1, 6, 5, 4), (6, 8, 4, 4), {"strides": (2, 2), "pads": (1, 1, 1, 1), "activation": "Relu"}),
    "3x3 by 2, output padding": ((1, 4, 5, 6), (4, 9, 3, 3), {"strides": (2, 2), "pads": (1, 1, 1, 1), "output_padding": (1, 1)}),
    "uneven": ((1, 4, 5, 6), (4, 8, 3, 4), {"strides": (2, 1), "pads": (0, 2, 1, 3)}),
    "by 4 along one axis": ((2, 4, 3, 6), (4, 8, 5, 1), {"strides": (4, 1), "pads": (3, 0, 0, 0)}),
    "kernel below stride": ((1, 4, 3, 3), (4, 8, 1, 1), {"strides": (2, 2), "output_padding": (1, 0)}),
    "pads beyond the kernel": ((1, 4, 8, 8), (4, 8, 2, 2), {"strides": (2, 2), "pads": (3, 3, 4, 5)}),
    "dilated": ((1, 4, 5, 5), (4, 8, 3, 2), {"strides": (2, 1), "dilations": (2, 3), "pads": (1, 0, 2, 1)}),
    "groups": ((1, 8, 4, 4), (8, 6, 3, 3), {"strides": (2, 2), "group": 2}),
    "groups, kernel = stride": ((1, 8, 4, 4), (8, 4, 2, 2), {"strides": (2, 2), "group": 4}),
    "1-D": ((1, 4, 9), (4, 8, 5), {"strides": (3,), "pads": (2, 1)}),
    "stride 1": ((1, 4, 6, 5), (4, 8, 3, 3), {"pads": (1, 1, 1, 1)}),
    "one channel out": ((1, 12, 6, 5), (12, 1, 9, 9), {"strides": (4, 4), "pads": (3, 3, 3, 3), "output_padding": (1, 1)}),
    "one channel out, sums beyond float32": ((1, 128, 3, 3), (128, 1, 4, 4), {"strides": (1, 1)}),
}


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("name", CONV_TRANSPOSE)
def test_conv_transpose(name: str, per_channel: bool, tmp_path_factory: pytest.TempPathFactory) -> None:
    shape, extents, attributes = CONV_TRANSPOSE[name]
    weight = np.random.choice([-127, 127], extents).astype(np.int8) if "beyond" in name else anything(*extents)
    filters = extents[1] * attributes.get("group", 1)
    scales = 2.0 ** -np.random.randint(6, 9, extents[1]).astype(float) if per_channel else 2.0**-7
    bias = np.random.randint(-4000, 4000, filters).astype(np.int32)
    graph = one(shape, lambda w, x: w.conv_transpose(x, weight, scales, bias, scale=2.0**-1, **attributes))
    assert_exact(graph) if "beyond" not in name else assert_optimised_exact(graph)
    found = operators(graph, tmp_path_factory)
    integer = filters >= 8 or "beyond" in name
    assert (found["QLinearConv"] > 0, found["ConvTranspose"]) == ((True, 0) if integer else (False, 1))
    assert not {"Conv", "FusedConv"} & set(found)


def assert_optimised_exact(graph: QuantGraph) -> None:
    """Node by node every sum is float32: only the integer kernels hold these."""
    assert largest_difference(graph, [noise(graph), noise(graph, (-128, 127))], [("all", 1)]) == 0


# ---- means and resizing
@pytest.mark.parametrize(
    ("shape", "axes", "keep"),
    [
        *(((1, 6, 7, 7), (2, 3), keep) for keep in (True, False)),
        *(((1, 6, 4, 4), (2, 3), keep) for keep in (True, False)),
        ((1, 7, 5, 4), (1,), True),
        ((1, 7, 5, 12), (-1,), False),
        ((2, 14, 6), (1,), False),
        ((1, 3, 5, 7), (1, 2, 3), True),
        ((1, 49), (1,), True),
    ],
)
def test_means_keep_their_ties(shape: tuple[int, ...], axes: tuple[int, ...], keep: bool) -> None:
    graph = one(shape, lambda w, x: w.reduce_mean(x, axes, keep, scale=2.0**-5))
    assert_exact(graph, *(noise(graph, choice) for choice in (None, (-128, 127), (0, 1), (-1, 0, 0, 0))))


@pytest.mark.parametrize("transform", ["half_pixel", "align_corners", "asymmetric", "pytorch_half_pixel"])
@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ((1, 3, 7, 6), (1, 3, 14, 12)),
        ((1, 2, 3, 5), (1, 2, 9, 15)),
        ((1, 2, 5, 8), (1, 2, 3, 4)),
        ((1, 2, 6, 6), (1, 2, 6, 11)),
        ((1, 2, 4, 3), (1, 2, 7, 1)),
        ((1, 4, 9), (1, 4, 18)),
        ((1, 2, 3, 4, 4), (1, 2, 5, 4, 8)),
    ],
)
def test_linear_resizing(transform: str, shape: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    """Thirds and sevenths included: there the engine's own coordinates are not the reference's."""
    graph = one(shape, lambda w, x: w.resize_linear(x, sizes, transform, scale=2.0**-5))
    assert_exact(graph, *(noise(graph, choice) for choice in (None, (-128, 127), (0, 1), (-3, 0, 3))))


@pytest.mark.parametrize("transform", ["half_pixel", "align_corners", "asymmetric"])
@pytest.mark.parametrize("rounding", ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"])
@pytest.mark.parametrize(("shape", "sizes"), [((1, 3, 4, 6), (1, 3, 8, 12)), ((1, 3, 7, 6), (1, 3, 5, 15)), ((1, 3, 7), (1, 3, 10))])
def test_nearest_resizing(transform: str, rounding: str, shape: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    assert_exact(one(shape, lambda w, x: w.resize_nearest(x, sizes, transform, rounding)))


# ---- moves
MOVES: dict[str, tuple[tuple[int, ...], Callable[[FormWriter, str], str]]] = {
    "slice backwards": ((1, 5, 6, 7), lambda w, x: w.slice(x, (4, -1, 6), (-100, 0, 1), (1, 2, 3), (-2, -1, -3))),
    "slice to the end": ((1, 5, 6), lambda w, x: w.slice(x, (1,), (2**62,), (2,), (2,))),
    "split": ((1, 9, 2, 2), lambda w, x: w.concat(w.split(x, (2, 3, 4))[::-1], 1)),
    "pad": ((1, 3, 4), lambda w, x: w.pad(x, (0, 1, 2, 0, 0, 3))),
    "pad by a value": ((1, 3, 4), lambda w, x: w.pad(x, (0, 1, 2, 0, 0, 3), 1e9)),
    "transpose": ((1, 3, 4, 5), lambda w, x: w.transpose(x, (0, 3, 1, 2))),
    "squeeze": ((1, 3, 1, 5, 1), lambda w, x: w.unsqueeze(w.squeeze(x, (2, 4)), (1,))),
    "expand": ((1, 3, 1, 5), lambda w, x: w.expand(x, (1, 3, 4, 5))),
    "gather": ((1, 3, 4, 5), lambda w, x: w.gather(x, [[3, -1], [0, 0]], 3)),
    **{f"depth to space {mode}": ((1, 32, 3, 2), lambda w, x, mode=mode: w.depth_to_space(x, 2, mode)) for mode in ("DCR", "CRD")},
    **{
        f"depth to space {mode} behind a convolution": (
            (2, 4, 3, 2),
            lambda w, x, mode=mode: w.depth_to_space(w.conv(x, anything(36, 4, 1, 1), 2.0**-7, scale=2.0**-3), 3, mode),
        )
        for mode in ("DCR", "CRD")
    },
    "space to depth": ((1, 3, 4, 6), lambda w, x: w.space_to_depth(x, 2)),
    "space to depth behind a convolution": (
        (2, 4, 6, 9),
        lambda w, x: w.space_to_depth(w.conv(x, anything(6, 4, 1, 1), 2.0**-7, scale=2.0**-3), 3),
    ),
}


@pytest.mark.parametrize("name", MOVES)
def test_moves(name: str) -> None:
    shape, body = MOVES[name]
    assert_exact(one(shape, body))


# ---- networks
def squeeze_excite(w: FormWriter, x: str, channels: int) -> str:
    gate = w.global_average_pool(x, scale=2.0**-4)
    gate = w.conv(gate, anything(4, channels, 1, 1), 2.0**-8, scale=2.0**-3, activation="Relu")
    gate = w.function("HardSigmoid", w.conv(gate, anything(channels, 4, 1, 1), 2.0**-8, scale=2.0**-4), scale=2.0**-7, alpha=1 / 6, beta=0.5)
    return w.mul(x, gate, scale=2.0**-3)


def unet(linear: bool) -> QuantGraph:
    w = FormWriter()
    x = w.input("image", (1, 3, 12, 16), scale=2.0**-4)
    top = w.silu(w.conv(x, anything(8, 3, 3, 3), 2.0**-8, scale=2.0**-3, pads=(1, 1, 1, 1)), scale=2.0**-3)
    low = squeeze_excite(w, w.conv(w.max_pool(top, (2, 2)), anything(16, 8, 3, 3), 2.0**-9, scale=2.0**-3, pads=(1, 1, 1, 1), activation="Relu"), 16)
    sizes = (1, 16, 12, 16)
    grown = w.resize_linear(low, sizes, scale=2.0**-3) if linear else w.resize_nearest(low, sizes)
    other = w.conv_transpose(low, anything(16, 8, 2, 2), 2.0**-9, scale=2.0**-3, strides=(2, 2), activation="Relu")
    joined = w.concat([top, grown, other], 1)
    y = w.function("Mish", w.conv(joined, anything(12, 32, 3, 3), 2.0**-10, scale=2.0**-3, pads=(1, 1, 1, 1)), scale=2.0**-3)
    w.output(w.depth_to_space(w.conv(y, anything(8, 12, 1, 1), 2.0**-8, scale=2.0**-3), 2), "mask")
    return w.graph()


@pytest.mark.parametrize("linear", [False, True])
def test_a_u_net_stays_channels_last(linear: bool, tmp_path_factory: pytest.TempPathFactory) -> None:
    graph = unet(linear)
    assert_exact(graph, ways=(*WAYS, ("all", 2)))
    found = operators(graph, tmp_path_factory)
    assert found["QLinearConv"] == 7
    assert found["QLinearMul"] == 1
    assert not {"Conv", "FusedConv", "ConvTranspose"} & set(found)
    assert found["Resize"] == int(linear)


def vision_transformer_block(softmax: bool) -> QuantGraph:
    """Patches, a position, two heads, a feed-forward; attention's softmax is a float island, or left out so that all is exact."""
    heads, tokens, width = 2, 12, 16
    w = FormWriter()
    x = w.conv(w.input("image", (1, 3, 12, 16), scale=2.0**-4), anything(width, 3, 4, 4), 2.0**-9, scale=2.0**-4, strides=(4, 4))
    x = w.transpose(w.reshape(x, (1, width, tokens)), (0, 2, 1))

    def of_heads(part: str) -> str:
        y = w.matmul(x, anything(width, width), 2.0**-8, scale=2.0**-3, name=part)
        return w.transpose(w.reshape(y, (1, tokens, heads, width // heads)), (0, 2, 1, 3))

    scores = w.batch_matmul(of_heads("query"), w.transpose(of_heads("key"), (0, 1, 3, 2)), scale=2.0**-2)
    if softmax:
        w.float_node("Softmax", [w.dequantise(scores)], ["attention"], "softmax", axis=-1)
        scores = w.quantise("attention", scale=2.0**-7)
    mixed = w.reshape(w.transpose(w.batch_matmul(scores, of_heads("value"), scale=2.0**-1), (0, 2, 1, 3)), (1, tokens, width))
    x = w.add(x, mixed, scale=2.0**-3)
    y = w.function("Gelu", w.matmul(x, anything(width, 4 * width), 2.0**-8, scale=2.0**-3), scale=2.0**-4)
    x = w.add(x, w.matmul(y, anything(4 * width, width), 2.0**-9, scale=2.0**-3), scale=2.0**-3)
    w.output(w.squeeze(w.slice(x, (0,), (1,), (1,)), (1,)), "token")
    w.output(w.reduce_mean(x, (1,), False, scale=2.0**-4), "mean")
    return w.graph()


def test_a_transformer_block(tmp_path_factory: pytest.TempPathFactory) -> None:
    graph = vision_transformer_block(softmax=False)
    assert_exact(graph, ways=(*WAYS, ("all", 2)))
    found = operators(graph, tmp_path_factory)
    assert (found["QLinearMatMul"], found["QLinearAdd"], found["MatMul"]) == (7, 2, 0)
    graph = vision_transformer_block(softmax=True)
    allowed, why = tolerance(graph, "all")
    assert "float island softmax" in why
    assert largest_difference(graph, [noise(graph)]) <= allowed


# ---- what ONNX Runtime would do to a float island between two quantisers
@pytest.mark.parametrize("op", ["Conv", "ConvTranspose", "Gemm"])
def test_the_constants_of_an_island_stay_float(op: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Left alone, ONNX Runtime (1.32) quantises a float weight between DequantizeLinear and QuantizeLinear, many steps off."""
    w = FormWriter()
    shape = (1, 24) if op == "Gemm" else (1, 6, 5, 5)
    weight = np.random.standard_normal((24, 10) if op == "Gemm" else (6, 6, 3, 3)).astype(np.float32)
    weight.flat[0] = 200.0  # one scale for all: eight bits leave nothing of the others
    value = w.dequantise(w.input("x", shape, scale=2.0**-6))
    w.float_node(op, [value, w.constant("weight", weight)], ["z"], "island", **({} if op == "Gemm" else {"kernel_shape": [3, 3]}))
    w.output(w.quantise("z", scale=2.0**-4), "y")
    graph = w.graph()
    assert largest_difference(graph, [noise(graph)]) <= 1


@pytest.mark.parametrize("op", ["Softmax", "Sigmoid", "LeakyRelu", "Relu", "Tanh"])
def test_an_island_is_not_turned_into_a_table(op: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    w = FormWriter()
    w.float_node(op, [w.dequantise(w.input("x", (1, 6, 9), scale=2.0**-4))], ["z"], "island")
    w.output(w.quantise("z", scale=2.0**-7), "y")
    found = operators(w.graph(), tmp_path_factory)
    assert not [kernel for kernel in found if kernel.startswith("QLinear")]
