# SPDX-License-Identifier: Apache-2.0
"""Every layer of a classifier against the reference in LiteRT: exact in the portable scheme, within a step elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.graph import QuantGraph
from isthmus.targets.tflite import ROUNDING

Feeds = Mapping[str, np.ndarray]


def _conv(shape: tuple[int, ...], filters: int, kernel: tuple[int, ...], **more: Any) -> Callable[[Any], QuantGraph]:
    return lambda c: c.graph(c.conv(c.input(shape), shape[1], filters, kernel, **more))


def _unary(shape: tuple[int, ...], layer: Callable[[Any, str], str]) -> Callable[[Any], QuantGraph]:
    return lambda c: c.graph(layer(c, c.input(shape)))


def _add(a: tuple[int, ...], b: tuple[int, ...], **more: Any) -> Callable[[Any], QuantGraph]:
    return lambda c: c.graph(c.writer.add(c.input(a, "a"), c.input(b, "b"), **c.activation(), **more))


def _flatten_with_two_readers(c: Any) -> QuantGraph:
    flat = c.writer.flatten(c.input((1, 3, 4, 5)))
    c.writer.output(c.writer.concat([flat, c.writer.relu(flat)], 1), "joined")
    return c.graph(c.gemm(flat, 60, 7))


# name: (the graph, the file's operators in the portable scheme, "" where the scales of the case decide)
CASES: dict[str, tuple[Callable[[Any], QuantGraph], str]] = {
    "conv": (_conv((1, 5, 9, 11), 7, (3, 3)), "CONV_2D"),
    "conv without bias": (_conv((1, 16, 6, 6), 8, (1, 1), bias=False), "CONV_2D"),
    "conv same": (_conv((1, 5, 9, 11), 7, (3, 3), pads=(1, 1, 1, 1), activation="Relu"), "CONV_2D"),
    "conv stride, even input": (_conv((1, 5, 10, 10), 7, (3, 3), pads=(1, 1, 1, 1), strides=(2, 2), activation="Relu"), "PAD CONV_2D"),
    "conv stride, odd input": (_conv((1, 5, 11, 9), 8, (3, 3), pads=(1, 1, 1, 1), strides=(2, 2)), "CONV_2D"),
    "conv uneven pads": (_conv((1, 3, 8, 9), 4, (3, 2), pads=(0, 1, 2, 1), strides=(1, 2)), "PAD CONV_2D"),
    "conv dilation": (_conv((1, 4, 12, 12), 6, (3, 3), pads=(2, 2, 2, 2), dilations=(2, 2)), "CONV_2D"),
    "conv dilation and stride": (_conv((1, 4, 13, 13), 6, (3, 3), pads=(2, 2, 2, 2), dilations=(2, 2), strides=(2, 2)), "CONV_2D"),
    "conv in blocks": (_conv((1, 1, 49, 10), 8, (10, 4), pads=(5, 1, 5, 1), strides=(2, 2), activation="Relu"), "PAD SPACE_TO_DEPTH CONV_2D"),
    "conv in blocks, filled kernel": (_conv((2, 3, 21, 32), 8, (7, 7), pads=(3, 3, 3, 3), strides=(2, 2)), "PAD SPACE_TO_DEPTH CONV_2D"),
    "conv in blocks, patches": (_conv((1, 3, 12, 16), 5, (4, 4), strides=(4, 4), bias=False), "SPACE_TO_DEPTH CONV_2D"),
    "conv of patches with cells left over": (_conv((1, 1, 9, 9), 5, (2, 2), strides=(2, 2)), "CONV_2D"),
    "conv of three channels, small kernel": (_conv((1, 3, 10, 10), 7, (3, 3), pads=(1, 1, 1, 1), strides=(2, 2)), "PAD CONV_2D"),
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
    "reshape to rows": (_unary((1, 6, 4, 4), lambda c, x: c.writer.reshape(x, (1, 6, 16))), "RESHAPE RESHAPE"),
    "concat channels": (_unary((1, 4, 5, 6), lambda c, x: c.writer.concat([x, c.writer.relu(x)], 1)), "RELU CONCATENATION"),
    "concat rows": (_unary((1, 4, 5, 6), lambda c, x: c.writer.concat([x, c.writer.relu(x)], 2)), "RELU CONCATENATION"),
    "concat 2-d": (_unary((2, 9), lambda c, x: c.writer.concat([x, x, x, x, x, x], 1)), "CONCATENATION"),
    "requantise": (_unary((1, 4, 5, 6), lambda c, x: c.writer.requantize(x, **c.activation())), ""),
    "requantise rows": (_unary((3, 17), lambda c, x: c.writer.requantize(x, **c.activation())), ""),
    "nothing": (_unary((1, 4, 5, 6), lambda c, x: x), ""),
}  # fmt: skip


# ---- equal to the reference
@pytest.mark.parametrize("name", CASES)
def test_the_portable_scheme_is_exact(litert: Any, name: str, tmp_path: Path) -> None:
    build, operators = CASES[name]
    for seed in range(2):
        graph = build(litert.case(seed=seed))
        plan = litert.plan(graph)
        assert (plan.max_lsb, plan.why_lsb) == (0, "")
        assert operators in ("", " ".join(litert.operators(plan)))
        with litert.open(plan, tmp_path) as session:
            assert litert.difference(graph, session, litert.feeds(graph, seed)) == 0


@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("name", CASES)
def test_other_schemes_are_within_one_step(litert: Any, name: str, scheme: str, tmp_path: Path) -> None:
    graph = CASES[name][0](litert.case(scheme, seed=5))
    plan = litert.plan(graph)
    layers = sum(node.op in ROUNDING for node in graph.nodes)
    assert plan.max_lsb <= min(layers, 2)
    assert bool(plan.max_lsb) == bool(plan.why_lsb)
    with litert.open(plan, tmp_path) as session:
        assert litert.difference(graph, session, litert.feeds(graph)) <= min(plan.max_lsb, 1)


@settings(max_examples=40)
@given(data=st.data())
def test_any_convolution(litert: Any, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    rank = data.draw(st.sampled_from([1, 2]), label="rank")
    group = data.draw(st.sampled_from([1, 2, 4]), label="group")
    channels, filters = group * data.draw(st.integers(1, 3), label="depth"), group * data.draw(st.integers(1, 3), label="filters")
    axes = [
        (data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2)), data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3)))
        for _ in range(rank)
    ]  # kernel, stride, dilation, begin, end
    space = [max((k - 1) * d + 1 - b - e, 1) + data.draw(st.integers(0, 6)) for k, _, d, b, e in axes]
    case = litert.case(seed=data.draw(st.integers(0, 1000)))
    graph = case.graph(
        case.conv(
            case.input((1, channels, *space)), channels, filters, tuple(axis[0] for axis in axes), group=group,
            strides=[axis[1] for axis in axes], dilations=[axis[2] for axis in axes], pads=[*(axis[3] for axis in axes), *(axis[4] for axis in axes)],
            activation=data.draw(st.sampled_from(["", "Relu", ("Clip", 0.0, 6.0), ("Clip", -0.5, 1.5)])),
        )
    )  # fmt: skip
    with litert.open(litert.plan(graph), tmp_path_factory.mktemp("conv")) as session:
        assert litert.difference(graph, session, litert.feeds(graph)[:3]) == 0
