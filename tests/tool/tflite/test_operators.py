# SPDX-License-Identifier: Apache-2.0
"""Arithmetic, functions, resizing, moves and islands against the reference in LiteRT: extents and scales that the tiny models do not have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.form_writer import FormWriter
from isthmus.graph import QuantGraph

Layer = Callable[[Any, str], str]
IMAGE = (1, 6, 5, 4)


def _kept(method: str, *arguments: Any, **more: Any) -> Layer:
    """An operator that keeps its scale."""
    return lambda c, x: str(getattr(c.writer, method)(x, *arguments, **more))


def _scaled(method: str, *arguments: Any, **more: Any) -> Layer:
    return lambda c, x: str(getattr(c.writer, method)(x, *arguments, **c.activation(), **more))


def _with_constant(method: str, shape: tuple[int, ...], turned: bool = False, **more: Any) -> Layer:
    def layer(c: Any, x: str) -> str:
        stored = c.writer.constant_int8("stored", c.generator.integers(-128, 128, shape), **c.activation())
        operands = (stored, x) if turned else (x, stored)
        return str(getattr(c.writer, method)(*operands, **c.activation(), **more))

    return layer


def _with_itself(method: str, prepare: Layer, **more: Any) -> Layer:
    return lambda c, x: str(getattr(c.writer, method)(x, prepare(c, x), **c.activation(), **more))


def _transposed(filters: int, kernel: tuple[int, ...], channels: int = 6, **more: Any) -> Layer:
    def layer(c: Any, x: str) -> str:
        scales = c.weight_scale(filters)
        weight = c.weight(channels, filters, *kernel)
        return str(c.writer.conv_transpose(x, weight, scales, c.bias(filters * int(more.get("group", 1))), **c.activation(), **more))

    return layer


def _normalised(c: Any, x: str) -> str:
    w = c.writer
    gain = w.constant("gain", c.generator.uniform(0.5, 1.5, 4).astype(np.float32))
    w.float_node("LayerNormalization", [w.dequantise(x), gain], ["normalised"], "norm", axis=-1)
    return str(w.quantise("normalised", scale=2.0**-5))


def _softmaxed(axis: int) -> Layer:
    def layer(c: Any, x: str) -> str:
        c.writer.float_node("Softmax", [c.writer.dequantise(x)], ["shares"], "softmax", axis=axis)
        return str(c.writer.quantise("shares", scale=2.0**-7))

    return layer


def _attention(c: Any, x: str) -> str:
    """An image as tokens, a product with itself, tokens as an image."""
    tokens = c.writer.transpose(c.writer.reshape(x, (1, 6, 20)), (0, 2, 1))
    scores = c.writer.batch_matmul(tokens, c.writer.transpose(tokens, (0, 2, 1)), scale=2.0)
    mixed = c.writer.batch_matmul(scores, tokens, scale=2.0**3)
    return str(c.writer.reshape(c.writer.transpose(mixed, (0, 2, 1)), IMAGE))


# name: (input, layer, the file's operators in the portable scheme, "" where the case's scales decide)
CASES: dict[str, tuple[tuple[int, ...], Layer, str]] = {
    "sub": (IMAGE, _with_itself("sub", _kept("relu")), ""),
    "sub clip": (IMAGE, _with_itself("sub", _kept("relu"), activation=("Clip", -1.0, 2.0)), ""),
    "sub from a constant": (IMAGE, _with_constant("sub", (1, 6, 1, 1), turned=True), ""),
    "mul": (IMAGE, _with_itself("mul", _kept("relu"), activation="Relu"), "RELU MUL"),
    "mul by a gate": (IMAGE, _with_itself("mul", _kept("slice", (0, 0), (1, 1), (2, 3))), "SLICE MUL"),
    "mul by a constant a channel": (IMAGE, _with_constant("mul", (1, 6, 1, 1)), "MUL"),
    "mul by a map": (IMAGE, _with_constant("mul", (1, 1, 5, 4)), "MUL"),
    "mul of tokens": ((1, 7, 8), _with_constant("mul", (1, 1, 8)), "MUL"),
    "add positions": ((1, 7, 8), _with_constant("add", (1, 7, 8)), ""),
    "concat a constant": (IMAGE, lambda c, x: c.writer.concat([x, c.writer.relu(x)], 1), "RELU CONCATENATION"),
    "batch matmul": ((2, 3, 5, 5), _with_itself("batch_matmul", _kept("relu")), ""),
    "batch matmul by a constant": ((1, 3, 4, 5), _with_constant("batch_matmul", (1, 3, 5, 6)), ""),
    "batch matmul, one constant for all heads": ((1, 3, 4, 5), _with_constant("batch_matmul", (1, 1, 5, 6)), ""),
    "batch matmul of rows, relu": ((1, 5, 5), _with_itself("batch_matmul", _kept("relu"), activation="Relu"), ""),
    "attention": (IMAGE, _attention, ""),
    "mean of the last axis": ((2, 7, 9), _scaled("reduce_mean", (-1,)), "DEQUANTIZE SUM DIV QUANTIZE"),
    "mean of rows": (IMAGE, _scaled("reduce_mean", (2,)), "DEQUANTIZE SUM DIV QUANTIZE"),
    "mean of all but the batch": (IMAGE, _scaled("reduce_mean", (1, 2, 3), False), ""),
    "mean of space": ((1, 3, 11, 9), _scaled("reduce_mean", (2, 3)), ""),
    "mean of a line": ((1, 6, 40), _scaled("reduce_mean", (2,), False), ""),
    "conv transpose 2x2": (IMAGE, _transposed(5, (2, 2), strides=(2, 2)), "TRANSPOSE_CONV"),
    "conv transpose 4x4": (IMAGE, _transposed(5, (4, 4), strides=(2, 2), pads=(1, 1, 1, 1), activation="Relu"), "TRANSPOSE_CONV SLICE RELU"),
    "conv transpose to the edge": (IMAGE, _transposed(5, (2, 2), strides=(3, 3), output_padding=(2, 1)), "TRANSPOSE_CONV"),
    "conv transpose clip": (IMAGE, _transposed(5, (3, 3), strides=(2, 2), activation=("Clip", -1.5, 2.5)), "TRANSPOSE_CONV MAXIMUM MINIMUM"),
    "conv transpose depthwise": (IMAGE, _transposed(1, (4, 4), strides=(2, 2), pads=(1, 1, 1, 1), group=6), ""),
    "conv transpose depthwise twice": (IMAGE, _transposed(2, (3, 2), strides=(1, 2), group=6, activation="Relu"), ""),
    "conv transpose groups, large pads": (IMAGE, _transposed(2, (2, 2), strides=(2, 2), pads=(2, 1, 2, 1), group=3), ""),
    "conv transpose groups, dilation": (IMAGE, _transposed(2, (2, 3), strides=(1, 1), dilations=(2, 2), group=2), ""),
    "conv transpose of a line, groups": ((2, 4, 9), _transposed(2, (3,), channels=4, strides=(2,), group=2), ""),
    "resize nearest twice": (IMAGE, _kept("resize_nearest", (1, 6, 10, 8)), "RESIZE_NEAREST_NEIGHBOR"),
    "resize nearest, ceil": (IMAGE, _kept("resize_nearest", (1, 6, 7, 9), "asymmetric", "ceil"), "GATHER GATHER"),
    "resize nearest, align corners": (IMAGE, _kept("resize_nearest", (1, 6, 9, 7), "align_corners", "round_prefer_ceil"), "RESIZE_NEAREST_NEIGHBOR"),
    "resize nearest of a line": ((1, 6, 9), _kept("resize_nearest", (1, 6, 27)), ""),
    "resize linear twice": (IMAGE, _scaled("resize_linear", (1, 6, 10, 8)), "DEQUANTIZE RESIZE_BILINEAR QUANTIZE"),
    "resize linear down": ((1, 2, 9, 12), _scaled("resize_linear", (1, 2, 3, 3)), "DEQUANTIZE RESIZE_BILINEAR QUANTIZE"),
    "resize linear by thirds": ((1, 2, 6, 5), _scaled("resize_linear", (1, 2, 9, 15)), ""),
    "resize linear, align corners": (IMAGE, _scaled("resize_linear", (1, 6, 8, 11), "align_corners"), ""),
    "resize linear to a point": (IMAGE, _scaled("resize_linear", (1, 6, 1, 1), "pytorch_half_pixel"), ""),
    "resize linear of a line": ((1, 3, 8), _scaled("resize_linear", (1, 3, 16)), ""),
    "split in three": (IMAGE, lambda c, x: c.writer.concat(c.writer.split(x, (2, 2, 2))[::-1], 1), "SPLIT CONCATENATION"),
    "split of rows": ((1, 3, 7), lambda c, x: c.writer.concat(c.writer.split(x, (3, 4), axis=2)[::-1], 2), "SLICE SLICE CONCATENATION"),
    "slice": (IMAGE, _kept("slice", (1, 2), (6, 4), (1, 3)), "SLICE"),
    "slice backwards": (IMAGE, _kept("slice", (-1, 4), (-100, 0), (1, 2), (-2, -1)), "STRIDED_SLICE"),
    "slice of a line in front of a conv": (
        (1, 3, 12),
        lambda c, x: c.conv(c.writer.slice(x, (10,), (1,), (2,), (-3,)), 3, 4, (2,)),
        "RESHAPE STRIDED_SLICE CONV_2D RESHAPE",
    ),
    "pad": (IMAGE, _kept("pad", (0, 2, 0, 1, 0, 1, 3, 0)), "PAD"),
    "pad with a number": (IMAGE, _kept("pad", (0, 0, 1, 1, 0, 0, 1, 1), 1.3), ""),
    "pad rows": ((3, 7), _kept("pad", (0, 2, 0, 1), -0.7), ""),
    "transpose of tokens": ((2, 3, 4, 5), _kept("transpose", (0, 2, 1, 3)), ""),
    "transpose five axes": ((1, 2, 3, 4, 2), _kept("transpose", (0, 4, 2, 1, 3)), "TRANSPOSE"),
    "channels to the end and flat": (IMAGE, lambda c, x: c.writer.flatten(c.writer.transpose(x, (0, 2, 3, 1))), "RESHAPE RESHAPE"),
    "squeeze of an image": ((2, 6, 1, 5), _kept("squeeze", (2,)), ""),
    "unsqueeze to an image": ((2, 6, 5), lambda c, x: c.conv(c.writer.unsqueeze(x, (2,)), 6, 4, (1, 3)), ""),
    "expand": ((1, 6, 1, 4), _kept("expand", (1, 6, 3, 4)), "BROADCAST_TO"),
    "depth to space 3": ((1, 18, 2, 3), _kept("depth_to_space", 3), "DEPTH_TO_SPACE"),
    "depth to space 3, CRD": ((2, 18, 2, 3), _kept("depth_to_space", 3, "CRD"), "GATHER DEPTH_TO_SPACE"),
    "depth to space to one channel, CRD": ((1, 4, 2, 3), _kept("depth_to_space", 2, "CRD"), "DEPTH_TO_SPACE"),
    "space to depth 3": ((1, 2, 6, 9), _kept("space_to_depth", 3), "SPACE_TO_DEPTH"),
    "gather channels": (IMAGE, _kept("gather", [3, 0, 0, -1], 1), "GATHER"),
    "gather rows of tokens": ((1, 7, 8), _kept("gather", 0, 1), ""),
    "leaky relu": (IMAGE, lambda c, x: c.writer.function("LeakyRelu", x, alpha=0.25, **c.activation()), "DEQUANTIZE LEAKY_RELU QUANTIZE"),
    "prelu a channel, rows": ((3, 6), lambda c, x: c.writer.p_relu(x, c.generator.uniform(-1, 1, (6,)), **c.activation()), ""),
    "prelu a channel, five axes": ((1, 3, 2, 2, 2), lambda c, x: c.writer.p_relu(x, c.generator.uniform(-1, 1, (3, 1, 1, 1)), **c.activation()), ""),
    "sigmoid between layers": ((2, 3, 4, 5), lambda c, x: c.gemm(c.writer.function("Sigmoid", c.writer.flatten(x), **c.activation()), 60, 7), ""),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_portable_scheme_is_exact(litert: Any, name: str, tmp_path: Path) -> None:
    shape, layer, operators = CASES[name]
    for seed in range(2):
        graph = litert.case(seed=seed).one(shape, layer)
        plan = litert.plan(graph)
        assert (plan.max_lsb, plan.why_lsb) == (0, "")
        assert operators in ("", " ".join(litert.operators(plan)))
        with litert.open(plan, tmp_path) as session:
            assert litert.difference(graph, session, litert.feeds(graph, seed)) == 0


@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("name", sorted(set(CASES) - {"attention"}))
def test_other_schemes_are_within_one_step(litert: Any, name: str, scheme: str, tmp_path: Path) -> None:
    shape, layer, _ = CASES[name]
    graph = litert.case(scheme, seed=4).one(shape, layer)
    plan = litert.plan(graph)
    with litert.open(plan, tmp_path) as session:
        assert litert.difference(graph, session, litert.feeds(graph)) <= min(plan.max_lsb, 1)


@pytest.mark.parametrize("layer", [_normalised, _softmaxed(-1), _softmaxed(1), _softmaxed(2)], ids=["norm", "softmax", "softmax channels", "softmax rows"])
def test_a_float_island_declares_its_step(litert: Any, layer: Layer, tmp_path: Path) -> None:
    graph = litert.case().one(IMAGE, layer)
    plan = litert.plan(graph)
    assert plan.max_lsb == 1 and "float island" in plan.why_lsb
    with litert.open(plan, tmp_path) as session:
        assert litert.difference(graph, session, litert.feeds(graph)) <= 1


# ---- functions
FUNCTIONS: dict[str, dict[str, Any]] = {
    **{op: {} for op in ("Sigmoid", "Tanh", "HardSwish", "Mish", "Softplus")},
    "LeakyRelu": {"alpha": 0.1},
    "HardSigmoid": {"alpha": 0.2, "beta": 0.5},
    "Elu": {"alpha": 1.7},
    "Gelu": {"approximate": "none"},
}


@settings(max_examples=60)
@given(data=st.data())
def test_every_entry_of_any_table(litert: Any, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """All 256 inputs through any function at any scales: exact in every scheme, by float32 or by the table itself."""
    op = data.draw(st.sampled_from([*FUNCTIONS, "Silu", "gelu tanh"]))
    scheme = data.draw(st.sampled_from(list(litert.recipes)))
    real = st.integers(-8, 1).map(lambda n: 2.0**n) if scheme == "power_of_two" else st.floats(2.0**-8, 1.0).map(lambda scale: float(np.float32(scale)))
    zero = st.integers(-128, 127) if scheme == "asymmetric" else st.just(0)
    writer = FormWriter(recipe=litert.recipes[scheme])
    x = writer.input("x", (1, 256), scale=data.draw(real), zero_point=data.draw(zero))
    out = {"scale": data.draw(real), "zero_point": data.draw(zero)}
    if op == "Silu":
        y = writer.silu(x, **out)
    else:
        y = writer.function("Gelu", x, approximate="tanh", **out) if op == "gelu tanh" else writer.function(op, x, **FUNCTIONS[op], **out)
    writer.output(y, "y")
    graph = writer.graph()
    plan = litert.plan(graph)
    assert plan.max_lsb == 0
    every = np.arange(-128, 128).astype(np.int8).reshape(1, 256)
    with litert.open(plan, tmp_path_factory.mktemp("table")) as session:
        assert litert.difference(graph, session, [{"x": every}]) == 0


def _function(litert: Any, op: str, source: float, target: float, zero_point: int = 0, scheme: str = "power_of_two", **attributes: Any) -> QuantGraph:
    writer = FormWriter(recipe=litert.recipes[scheme])
    x = writer.input("x", (1, 4, 8, 8), scale=source)
    y = writer.silu(x, scale=target) if op == "Silu" else writer.function(op, x, scale=target, zero_point=zero_point, **attributes)
    writer.output(y, "y")
    return writer.graph()


def test_a_table_is_looked_up_where_a_tie_is_near(litert: Any, tmp_path: Path) -> None:
    """Silu of a large x is x but for its last bit, and every other x a tie: no float32 library may decide that."""
    graph = _function(litert, "Silu", 0.5, 1.0)
    plan = litert.plan(graph)
    assert litert.operators(plan) == ["CAST", "ADD", "GATHER"]
    with litert.open(plan, tmp_path) as session:
        assert litert.difference(graph, session, litert.feeds(graph)) == 0


def test_fixed_output_scales_take_the_builtin(litert: Any, tmp_path: Path) -> None:
    for op, scale, zero, scheme in (("Tanh", 2.0**-7, 0, "power_of_two"), ("Sigmoid", 2.0**-8, -128, "asymmetric")):
        graph = _function(litert, op, 0.0625, scale, zero, scheme)
        plan = litert.plan(graph)
        assert litert.operators(plan) == ["TANH" if op == "Tanh" else "LOGISTIC"]
        with litert.open(plan, tmp_path) as session:
            assert litert.difference(graph, session, litert.feeds(graph)) == 0


def test_native_functions_declare_their_step(litert: Any, tmp_path: Path) -> None:
    graph = _function(litert, "LeakyRelu", 0.0625, 0.0625, alpha=0.1)
    plan = litert.plan(graph, rounding="native")
    assert litert.operators(plan) == ["LEAKY_RELU"] and plan.max_lsb == 1 and "fixed-point" in plan.why_lsb
    with litert.open(plan, tmp_path) as session:
        assert litert.difference(graph, session, litert.feeds(graph)) <= 1


# ---- islands at the end
@pytest.mark.parametrize(("axis", "keepdims"), [(1, 0), (1, 1), (2, 1), (3, 0)])
def test_arg_max(litert: Any, axis: int, keepdims: int, tmp_path: Path) -> None:
    case = litert.case()
    w = case.writer
    w.float_node("ArgMax", [w.dequantise(case.input((1, 4, 3, 5)))], ["index"], "argmax", axis=axis, keepdims=keepdims)
    w.float_node("Cast", ["index"], ["y"], "cast", to=1)
    w.float_output("y")
    graph = case.graph(None)
    plan = litert.plan(graph)
    assert plan.max_lsb == 0 and ("TRANSPOSE" not in litert.operators(plan) or (axis, keepdims) == (3, 0))
    with litert.open(plan, tmp_path) as session:
        assert litert.difference(graph, session, litert.feeds(graph)) == 0


@pytest.mark.parametrize("align", [0, 1])
@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("mode", ["linear", "nearest"])
def test_grid_sample(litert: Any, mode: str, padding: str, align: int, tmp_path: Path) -> None:
    case = litert.case()
    w = case.writer
    image, grid = w.input("image", (2, 3, 5, 7), scale=2.0**-4), w.input("grid", (2, 4, 6, 2), scale=2.0**-6)
    attributes = {"mode": mode, "padding_mode": padding, "align_corners": align}
    w.float_node("GridSample", [w.dequantise(image), w.dequantise(grid)], ["sampled"], "island", **attributes)
    graph = case.graph(w.quantise("sampled", scale=2.0**-4))
    plan = litert.plan(graph)
    with litert.open(plan, tmp_path) as session:
        assert litert.difference(graph, session, litert.feeds(graph)) <= plan.max_lsb == 1


def test_an_image_network_has_no_transpose(litert: Any, tmp_path: Path) -> None:
    """Down, up, skip, attention over channels, pixel shuffle, class map: NHWC throughout."""
    case = litert.case(seed=3)
    w = case.writer
    x = case.conv(case.input((1, 3, 16, 16)), 3, 8, (3, 3), pads=(1, 1, 1, 1), activation="Relu")
    down = case.conv(w.max_pool(x, (2, 2)), 8, 8, (3, 3), pads=(1, 1, 1, 1))
    gate = w.function("HardSigmoid", w.reduce_mean(down, (2, 3), scale=2.0**-5), scale=2.0**-7, alpha=1 / 6, beta=0.5)
    down = w.function("HardSwish", w.mul(down, gate, scale=2.0**-4), scale=2.0**-4)
    up = w.conv_transpose(down, case.weight(8, 8, 2, 2), case.weight_scale(8), case.bias(8), strides=(2, 2), scale=2.0**-3)
    joined = w.concat([up, w.requantize(w.resize_linear(down, (1, 8, 16, 16), scale=2.0**-3), scale=2.0**-3)], 1)
    shuffled = w.depth_to_space(joined, 2, "CRD")
    w.argmax_output(case.conv(w.pad(shuffled, (0, 0, 1, 1, 0, 0, 1, 1)), 4, 5, (3, 3)), "classes")
    graph = case.graph(None)
    plan = litert.plan(graph)
    assert "TRANSPOSE" not in litert.operators(plan) and plan.max_lsb == 0
    with litert.open(plan, tmp_path) as session:
        assert litert.difference(graph, session, litert.feeds(graph)) == 0
