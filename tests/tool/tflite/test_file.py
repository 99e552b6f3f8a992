# SPDX-License-Identifier: Apache-2.0
"""The file: a real network, its structure, its options."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus import reference
from isthmus.errors import IsthmusError
from isthmus.form_writer import FormWriter
from isthmus.graph import QuantGraph
from isthmus.targets.tflite import TARGET

Feeds = Mapping[str, np.ndarray]


# ---- a real network
def _network(litert: Any, scheme: str) -> QuantGraph:
    """28 x 28, a stem, a pool, a residual block, depthwise and pointwise, a concat, a global average, a classifier: random weights."""
    generator = np.random.default_rng(2)
    writer = FormWriter(recipe=litert.recipes[scheme])

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


def test_a_network_is_exact_and_has_no_transpose(litert: Any, tmp_path: Path) -> None:
    graph = _network(litert, "power_of_two")
    plan = litert.plan(graph)
    operators = litert.operators(plan)
    assert "TRANSPOSE" not in operators and operators.count("CONV_2D") == 4 and operators.count("DEPTHWISE_CONV_2D") == 1
    assert plan.max_lsb == 0 and plan.inputs[0].layout == "NHWC" and plan.inputs[0].shape == (1, 28, 28, 1)
    generator = np.random.default_rng(0)
    feeds: list[Feeds] = [{"image": generator.integers(-128, 128, (1, 1, 28, 28)).astype(np.int8)} for _ in range(20)]
    with litert.open(plan, tmp_path) as session, litert.open(plan, tmp_path, threads=2) as parallel:
        assert litert.difference(graph, session, feeds) == 0
        assert litert.difference(graph, parallel, feeds) == 0
        assert len(np.unique(np.concatenate([session.run_quantised(feed)["logits"] for feed in feeds]))) > 20


@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
def test_a_network_of_another_scheme_is_near(litert: Any, scheme: str, tmp_path: Path) -> None:
    graph = _network(litert, scheme)
    plan = litert.plan(graph)
    assert plan.max_lsb == 2 and "Conv" in plan.why_lsb and "Add" in plan.why_lsb
    with litert.open(plan, tmp_path) as session:
        assert litert.difference(graph, session, litert.feeds(graph)) <= plan.max_lsb


def test_xnnpack_takes_the_whole_network(litert: Any, tmp_path: Path) -> None:
    with litert.open(litert.plan(_network(litert, "power_of_two")), tmp_path) as session:
        details = session._interpreter._get_ops_details()
        delegates = [node for node in details if node["op_name"] == "DELEGATE"]
        outputs = {int(detail["index"]) for detail in session._interpreter.get_output_details()}
        assert len(delegates) == 1 and outputs <= {int(index) for index in delegates[0]["outputs"]}


# ---- options
def test_a_float_border(litert: Any, tmp_path: Path) -> None:
    case = litert.case(seed=3)
    graph = case.graph(case.conv(case.input((1, 3, 8, 8)), 3, 4, (3, 3)))
    plan = litert.plan(graph, io="float32")
    assert [spec.dtype for spec in (*plan.inputs, *plan.outputs)] == ["float32", "float32"]
    assert litert.operators(plan) == ["QUANTIZE", "CONV_2D", "DEQUANTIZE"]
    real = np.random.default_rng(0).normal(0, 3, (1, 3, 8, 8)).astype(np.float32)
    expected = reference.run(graph, {"x": graph.inputs[0].quantise(real)})["y"]
    with litert.open(plan, tmp_path) as session:
        np.testing.assert_array_equal(session.run({"x": real})["y"], graph.outputs[0].dequantise(expected))
        assert session.run_raw({"x": plan.inputs[0].from_form(real)})["y"].dtype == np.float32
        assert litert.difference(graph, session, litert.feeds(graph)) == 0  # the reference's int8 goes in and comes out as real numbers


def test_an_addition_without_ties_stays_integer(litert: Any) -> None:
    writer = FormWriter()
    writer.output(writer.add(writer.input("a", (1, 3, 4, 4), scale=0.5), writer.input("b", (1, 3, 4, 4), scale=0.25), scale=0.25), "y")
    plan = litert.plan(writer.graph())
    assert litert.operators(plan) == ["ADD"] and plan.max_lsb == 0


def test_a_sum_beyond_float32_is_declared(litert: Any) -> None:
    """4096 inputs of +-128 x 127 can reach 2^26; at a multiplier of 2^-19 that is no saturated value."""
    writer = FormWriter()
    writer.output(writer.gemm(writer.input("x", (1, 4096), scale=1.0), np.full((1, 4096), 127, np.int8), 2.0**-19, scale=1.0), "y")
    assert litert.plan(writer.graph()).max_lsb == 1


@pytest.mark.parametrize(("option", "value"), [("io", "uint8"), ("rounding", "up"), ("optimise", "yes")])
def test_an_unknown_option_is_refused(litert: Any, option: str, value: str) -> None:
    with pytest.raises(IsthmusError, match=option):
        TARGET.plan(litert.case().conv_graph((1, 3, 8, 8), 4, (3, 3)), litert.profile, {option: value})


def test_a_softmax_tail(litert: Any, tmp_path: Path) -> None:
    for shape, axis in (((3, 10), -1), ((1, 10, 3, 3), 1), ((1, 10, 3, 4), -1)):
        case = litert.case()
        case.writer.softmax_output(case.input(shape), "p", axis=axis)
        graph = case.graph(None)
        plan = litert.plan(graph)
        assert plan.outputs[0].dtype == "float32" and plan.max_lsb == 0
        with litert.open(plan, tmp_path) as session:
            assert litert.difference(graph, session, litert.feeds(graph)) == 0


# ---- the file
def test_the_file_says_what_it_is(litert: Any) -> None:
    graph = _network(litert, "power_of_two")
    plan = litert.plan(graph)
    model = litert.model(plan)
    signature = model.signatureDefs[0]
    assert signature.signatureKey == b"serving_default"
    assert [entry.name for entry in (*signature.inputs, *signature.outputs)] == [b"image", b"logits"]
    assert [entry.tensorIndex for entry in signature.inputs] == list(model.subgraphs[0].inputs)
    texts = {entry.name.decode(): bytes(model.buffers[entry.buffer].data) for entry in model.metadata}
    assert texts["isthmus.digest"].decode() == graph.digest
    assert texts["min_runtime_version"].rstrip(b"\0") == b"1.14.0"
    names = [tensor.name.decode() for tensor in model.subgraphs[0].tensors]
    assert len(set(names)) == len(names) and set(graph.tensors) & set(names) >= {node.output for node in graph.nodes if node.kind == "int8"}


def test_the_same_graph_gives_the_same_bytes(litert: Any) -> None:
    assert litert.plan(_network(litert, "asymmetric")).files == litert.plan(_network(litert, "asymmetric")).files
    assert litert.plan(_network(litert, "asymmetric")).digest() == litert.plan(_network(litert, "asymmetric")).digest()


def test_weights_lie_as_tflite_wants_them(litert: Any) -> None:
    from ai_edge_litert import schema_py_generated as schema

    case = litert.case("symmetric")
    y = case.conv(case.conv(case.input((1, 4, 8, 8)), 4, 6, (3, 2)), 6, 12, (3, 3), group=6)
    plan = litert.plan(case.graph(y))
    tensors = {tensor.name.decode(): tensor for tensor in litert.model(plan).subgraphs[0].tensors}
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


def test_gemm_with_scales_per_channel_is_a_convolution(litert: Any) -> None:
    """tflite-runtime 2.14 knows FULLY_CONNECTED with one weight scale only."""
    graph = litert.case("symmetric").one((3, 20), lambda c, x: c.gemm(x, 20, 9))
    assert litert.operators(litert.plan(graph)) == ["RESHAPE", "CONV_2D", "RESHAPE"]
