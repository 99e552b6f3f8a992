# SPDX-License-Identifier: Apache-2.0
"""GPTQ and learned rounding: the integers are Brevitas' own, they lose less than the nearest ones, and low-bit weights stay low in every artifact."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from isthmus.dataset import Dataset
from isthmus.export.prepare import prepare_float
from isthmus.float_model import run_float
from isthmus.graph import QuantGraph
from isthmus.post_training import PostTraining, outputs_of
from isthmus.profile import load_profile
from isthmus.quantize import rounding
from isthmus.quantize.sensitivity import sqnr_db
from isthmus.recipe import Recipe, load_recipe
from isthmus.registry import load_target

LOW = Recipe(weight_bits=4)
ROUNDINGS = ("gptq", "learned")


@pytest.fixture(autouse=True)
def _brevitas(require: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    require("brevitas")
    monkeypatch.setattr(rounding, "STEPS", 200)  # the networks here are tiny
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def model(nodes: list[onnx.NodeProto], shape: tuple[int, ...], **arrays: np.ndarray) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, *shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(array, np.float32), name) for name, array in arrays.items()],
    )
    return prepare_float(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9))


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def correlated(*shape: int) -> np.ndarray:
    """Samples whose values resemble their neighbours, as pixels do: what rounding with an eye on the inputs makes use of."""
    return np.cumsum(normal(*shape, seed=3), axis=-1).astype(np.float32) / 4


def linear() -> onnx.ModelProto:
    return model([helper.make_node("Gemm", ["x", "w", "b"], ["y"], "layer", transB=1)], (24,), w=normal(10, 24), b=normal(10))


def convolutions() -> onnx.ModelProto:
    """Uneven padding, a stride, groups, a dilation, a Gemm behind."""
    nodes = [
        helper.make_node("Conv", ["x", "w0", "b0"], ["a"], "first", pads=[1, 0, 2, 1], strides=[2, 1]),
        helper.make_node("Relu", ["a"], ["ar"], "act"),
        helper.make_node("Conv", ["ar", "w1"], ["c"], "grouped", group=4, dilations=[2, 1], pads=[2, 1, 2, 1]),
        helper.make_node("Flatten", ["c"], ["f"], "flat"),
        helper.make_node("Gemm", ["f", "w2"], ["y"], "last", transB=1),
    ]
    return model(nodes, (2, 5, 5), w0=normal(8, 2, 3, 3), b0=normal(8), w1=normal(8, 2, 3, 3, seed=1), w2=normal(5, 8 * 3 * 4, seed=2) / 10)


def series() -> onnx.ModelProto:
    """1-D, then a MatMul on a tensor of rank 3."""
    nodes = [helper.make_node("Conv", ["x", "w0"], ["a"], "first", pads=[1, 1]), helper.make_node("MatMul", ["a", "w1"], ["y"], "product")]
    return model(nodes, (3, 16), w0=normal(6, 3, 3), w1=normal(16, 7, seed=1))


def made(network: onnx.ModelProto, recipe: Recipe, samples: np.ndarray) -> QuantGraph:
    return PostTraining(network, Dataset({"x": samples}, None, "test"), lambda text, share: None).graph(recipe)[0]


def weights(graph: QuantGraph) -> dict[str, np.ndarray]:
    return {node.name: node.weight for node in graph.nodes if node.weight is not None}


def loss_db(network: onnx.ModelProto, recipe: Recipe, samples: np.ndarray) -> float:
    return sqnr_db(run_float(network, {"x": samples}), outputs_of(made(network, recipe, samples), Dataset({"x": samples}, None, "test")))


def test_the_integers_of_the_form_are_what_brevitas_gptq_gives() -> None:
    """The same layer in Brevitas alone, through its own context manager, its weight in real numbers and a scale of its own."""
    import brevitas.nn as qnn
    from brevitas.graph.gptq import gptq_mode
    from brevitas.inject.enum import ScalingImplType
    from brevitas.quant.scaled_int import Int8WeightPerTensorFloat

    samples = correlated(64, 24)
    network = linear()
    graph = made(network, replace(LOW, rounding="gptq"), samples)
    node = next(node for node in graph.nodes if node.weight is not None)
    assert node.weight is not None and node.weight_scale is not None
    quantiser = Int8WeightPerTensorFloat.let(scaling_impl_type=ScalingImplType.CONST, scaling_init=float(node.weight_scale[0]) * 7, bit_width=4)
    layer = qnn.QuantLinear(24, 10, bias=False, weight_quant=quantiser)
    real = next(tensor for tensor in network.graph.initializer if len(tensor.dims) == 2)
    layer.weight.data.copy_(torch.from_numpy(numpy_helper.to_array(real).copy()))
    spec = graph.inputs[0]
    with torch.no_grad(), gptq_mode(torch.nn.Sequential(layer).eval(), use_quant_activations=True) as gptq:
        for _ in range(gptq.num_layers):
            gptq.model(torch.from_numpy(spec.quantise(samples).astype(np.float32) * np.float32(spec.scale)))
            gptq.update()
    expected = layer.quant_weight().int().numpy()
    np.testing.assert_array_equal(node.weight, expected)
    nearest = next(node for node in made(network, LOW, samples).nodes if node.weight is not None)
    assert not np.array_equal(nearest.weight, node.weight) and np.array_equal(nearest.weight_scale, node.weight_scale)


@pytest.mark.parametrize("recipe", [LOW, replace(LOW, scheme="symmetric", per_channel=True), Recipe(scheme="asymmetric", per_channel=True, weight_bits=4)])
@pytest.mark.parametrize("method", ROUNDINGS)
def test_what_is_learnt_reaches_the_form_and_loses_less(method: str, recipe: Recipe) -> None:
    for network, samples in ((convolutions(), correlated(64, 2, 5, 5)), (series(), correlated(64, 3, 16)), (linear(), correlated(64, 24))):
        learnt = replace(recipe, rounding=method)
        nearest, graph = made(network, recipe, samples), made(network, learnt, samples)
        emitted = weights(graph)
        found = rounding.learnt_weights(network, nearest, {"x": samples}, learnt)
        assert found.keys() == emitted.keys() and all(np.array_equal(found[name], weight) for name, weight in emitted.items())
        assert all(np.abs(weight).max() <= 7 for weight in emitted.values())
        assert any(not np.array_equal(weight, emitted[name]) for name, weight in weights(nearest).items())
        assert loss_db(network, learnt, samples) > loss_db(network, recipe, samples) + 1.0


@pytest.mark.parametrize("method", ROUNDINGS)
def test_an_input_that_is_always_zero_keeps_its_nearest_weights(method: str) -> None:
    samples = correlated(64, 24)
    samples[:, 5] = 0
    for recipe in (LOW, replace(LOW, bias_correction=True)):
        nearest = next(iter(weights(made(linear(), recipe, samples)).values()))
        learnt = next(iter(weights(made(linear(), replace(recipe, rounding=method), samples)).values()))
        np.testing.assert_array_equal(learnt[:, 5], nearest[:, 5])
        assert not np.array_equal(learnt, nearest)


def test_constant_samples_are_no_reason_to_fail() -> None:
    """One sample, the same everywhere: the second moment has rank 1."""
    graph = made(linear(), replace(LOW, rounding="gptq", bias_correction=True), np.ones((1, 24), np.float32))
    assert all(np.abs(weight).max() <= 7 for weight in weights(graph).values())


def test_low_bit_weights_stay_low_in_the_form_and_in_the_hls4ml_types() -> None:
    network, recipe = convolutions(), load_recipe("fpga-low-bit")
    graph = made(network, recipe, correlated(64, 2, 5, 5))
    graph.verify()
    held = weights(graph)
    assert np.abs(held["first"]).max() > 15 and np.abs(held["last"]).max() > 15  # 8 bits at the edges
    assert np.abs(held["grouped"]).max() <= 15 and held["grouped"].dtype == np.int8
    assert {override.layers: override.weight_bits for override in graph.recipe.overrides} == {"first": 8, "last": 8}
    assert all(np.log2(node.weight_scale) % 1 == 0 for node in graph.nodes if node.weight_scale is not None and node.weight_scale.size == 1)


def test_hls4ml_types_follow_the_weights() -> None:
    from isthmus.targets.hls4ml.fixed import exact_weights

    graph = made(convolutions(), load_recipe("fpga-low-bit"), correlated(64, 2, 5, 5))
    found = {
        node.name: exact_weights(node, float(graph.tensors[node.inputs[0]].scale or 0)).weight_type.bits for node in graph.nodes if node.weight is not None
    }
    assert found == {"first": 8, "grouped": 5, "last": 8}
    assert load_target("hls4ml").check(graph, load_profile("pynq-z2")) == []
