# SPDX-License-Identifier: Apache-2.0
"""Cost: against published counts of real networks (float ONNX), against hand counts (int8 form), and the peak of live buffers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from isthmus.cost import CONVENTIONS, Cost, cost_of_graph, cost_of_onnx
from isthmus.cost_model import cost_table
from isthmus.errors import IsthmusError
from isthmus.form_writer import FormWriter
from isthmus.graph import QuantGraph
from isthmus.ops import OPS
from isthmus.recipe import Recipe


class FloatNet:
    """A float ONNX model of 3x3 same convolutions, 2x2 ceil pools and dense layers, as the MedMNIST networks are made of."""

    def __init__(self, channels: int, size: int = 28) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.shape = [1, channels, size, size]
        self.last = "image"
        self.graph_input = helper.make_tensor_value_info("image", TensorProto.FLOAT, list(self.shape))

    def constant(self, *shape: int) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.ones(shape, np.float32), name))
        return name

    def node(self, op: str, *constants: str, **attributes: object) -> FloatNet:
        output = f"tensor_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, [self.last, *constants], [output], f"{op.lower()}_{len(self.nodes)}", **attributes))
        self.last = output
        return self

    def conv(self, filters: int, normalised: bool = False) -> FloatNet:
        self.node("Conv", self.constant(filters, self.shape[1], 3, 3), self.constant(filters), kernel_shape=[3, 3], pads=[1, 1, 1, 1])
        self.shape[1] = filters
        if normalised:
            self.node("BatchNormalization", *(self.constant(filters) for _ in range(4)))
        return self.node("Relu")

    def pool(self) -> FloatNet:
        self.shape[2:] = [-(-extent // 2) for extent in self.shape[2:]]
        return self.node("MaxPool", kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1)

    def flatten(self) -> FloatNet:
        self.shape = [1, int(np.prod(self.shape))]
        return self.node("Flatten")

    def global_pool(self) -> FloatNet:
        self.shape[2:] = [1, 1]
        return self.node("GlobalAveragePool")

    def dense(self, width: int) -> FloatNet:
        self.node("Gemm", self.constant(width, self.shape[1]), self.constant(width), transB=1)
        self.shape[1] = width
        return self

    def cost(self, shape: list[int | str] | None = None) -> Cost:
        return cost_of_onnx(self.model(shape))

    def model(self, shape: list[int | str] | None = None) -> onnx.ModelProto:
        given = self.graph_input if shape is None else helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)
        output = helper.make_tensor_value_info(self.last, TensorProto.FLOAT, None)
        return helper.make_model(helper.make_graph(self.nodes, "net", [given], [output], self.constants), opset_imports=[helper.make_opsetid("", 20)])


def network_a() -> FloatNet:
    net = FloatNet(3)
    for filters in (32, 64, 128, 128, 64):
        net.conv(filters, normalised=True)
    return net.pool().flatten().dense(64).node("Relu").dense(64).node("Relu").dense(9).node("Softmax", axis=-1)


def blocks(channels: int, widths: list[list[int]], hidden: int, classes: int, norm: str) -> FloatNet:
    net = FloatNet(channels)
    for block in widths:
        for index, filters in enumerate(block):
            net.conv(filters, normalised=norm == "every" or (norm == "last" and index == len(block) - 1))
        net.pool()
    return net.flatten().dense(hidden).node("Relu").dense(classes).node("Softmax", axis=-1)


# Table 4 of the MedMNIST ensemble paper (trainable parameters, TF-profiler FLOPs) with the MACs that follow from the layers.
PUBLISHED = {
    "Path A": (network_a, 1_123_081, 1_123_913, 247_146_560, 495_324_406),
    "OrganA B3": (lambda: blocks(3, [[32, 32], [64, 64], [128, 128]], 256, 11, ""), 814_379, 814_379, 30_105_856, 60_345_666),
    "OrganA C2": (lambda: blocks(3, [[32, 32], [64, 64]], 64, 11, "last"), 267_243, 267_435, 18_942_144, 38_073_154),
    "Path D3": (lambda: blocks(3, [[32, 32, 64], [64, 128, 128], [256, 256, 512]], 256, 9, "every"), 4_455_081, 4_458_025, 176_185_088, 353_127_094),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks(name):
    build, trained, total, macs, keras = PUBLISHED[name]
    cost = build().cost()
    assert (cost.parameters, cost.parameters + cost.buffers, cost.macs, cost.keras_flops) == (trained, total, macs, keras)
    assert cost.weight_bytes == 4 * total
    assert abs(cost.keras_flops / cost.macs - 2) < 0.02
    assert cost.uncounted == ()
    assert sum(row.share for row in cost.per_node) == pytest.approx(1)


def test_peak_is_the_two_largest_neighbours():
    # Network A: conv4 reads 28 x 28 x 128 and writes as much; normalisation and activation work in place.
    assert network_a().cost().activation_bytes == 4 * 28 * 28 * 256


def small_float() -> FloatNet:
    """C2/4 with a global pool: 1 channel, {8,8} {16,16}, one normalisation a block, 11 classes."""
    net = FloatNet(1)
    for filters in (8, 16):
        net.conv(filters).conv(filters, normalised=True).pool()
    return net.global_pool().flatten().dense(11).node("Softmax", axis=-1)


def small_form(batch: int = 1):
    """The same network as an int8 form: normalisation folded, softmax left out."""
    random = np.random.default_rng(0)
    w = FormWriter(recipe=Recipe())
    x, channels = w.input("image", (batch, 1, 28, 28), scale=2**-6), 1
    for filters in (8, 8, 0, 16, 16, 0):
        if not filters:
            x = w.max_pool(x, kernel=(2, 2), strides=(2, 2))
            continue
        weight = random.integers(-8, 8, (filters, channels, 3, 3)).astype(np.int8)
        x = w.conv(x, weight, 2**-5, np.zeros(filters, np.int32), scale=2**-3, activation="Relu", pads=(1, 1, 1, 1))
        channels = filters
    x = w.flatten(w.global_average_pool(x, scale=2**-3))
    x = w.gemm(x, random.integers(-8, 8, (11, 16)).astype(np.int8), 2**-5, np.zeros(11, np.int32), scale=2**-3)
    w.output(x, "logits")
    return w.graph()


def test_small_network_float_and_form():
    folded, trained = cost_of_graph(small_form()), small_float().cost()
    assert trained.parameters == 4_387
    assert folded.parameters == 4_387 - 48
    assert folded.macs == trained.macs == 1_185_584
    # int8 weights and int32 biases: 4,280 weights, 59 biases.
    assert folded.weight_bytes == 4_280 + 4 * 59
    # conv2 reads 8 x 28 x 28 and writes as much; the float border is the caller's.
    assert folded.activation_bytes == 2 * 8 * 28 * 28
    assert max(row.weight_bytes for row in folded.per_node) == 16 * 16 * 9 + 4 * 16


def test_form_by_hand():
    cost = cost_of_graph(small_form())
    conv, pool, mean = cost.per_node[0], cost.per_node[2], cost.per_node[6]
    assert (conv.op, conv.output_shape, conv.parameters) == ("Conv", (1, 8, 28, 28), 80)
    outputs = 8 * 28 * 28
    assert conv.macs == outputs * 9
    assert conv.flops == 2 * conv.macs + outputs + outputs  # bias and Relu
    assert conv.keras_flops == 2 * conv.macs + outputs  # no Relu
    assert (pool.op, pool.macs, pool.flops, pool.keras_flops) == ("MaxPool", 0, 8 * 14 * 14 * 4, 8 * 14 * 14 * 4)
    assert (mean.op, mean.flops) == ("GlobalAveragePool", 16 * 7 * 7)
    assert not any(row.op in ("QuantizeLinear", "DequantizeLinear") for row in cost.per_node)
    assert sum(row.share for row in cost.per_node) == pytest.approx(1)


def test_batch_multiplies_work_not_weights():
    one, three = cost_of_graph(small_form()), cost_of_graph(small_form(3))
    assert (three.macs, three.flops, three.activation_bytes) == (3 * one.macs, 3 * one.flops, 3 * one.activation_bytes)
    assert (three.parameters, three.weight_bytes) == (one.parameters, one.weight_bytes)


def test_residual_keeps_its_branch_alive():
    w = FormWriter(recipe=Recipe())
    x = w.input("image", (1, 4, 8, 8), scale=2**-4)
    y = w.conv(x, np.ones((4, 4, 1, 1), np.int8), 2**-4, scale=2**-4)
    y = w.conv(y, np.ones((4, 4, 1, 1), np.int8), 2**-4, scale=2**-4)
    w.output(w.add(x, y, scale=2**-3, activation="Relu"), "out")
    cost = cost_of_graph(w.graph())
    # x, the first and the second convolution's result together; then x, the second, and the sum.
    assert cost.activation_bytes == 3 * 256
    added = cost.per_node[-1]
    assert (added.op, added.macs, added.flops, added.keras_flops) == ("Add", 0, 512, 256)


def test_depthwise_and_matmul_in_the_form():
    w = FormWriter(recipe=Recipe())
    x = w.input("image", (1, 6, 5, 5), scale=2**-4)
    x = w.conv(x, np.ones((6, 1, 3, 3), np.int8), 2**-4, scale=2**-4, group=6)
    x = w.matmul(w.flatten(x), np.ones((54, 7), np.int8), 2**-4, scale=2**-2)
    w.softmax_output(x, "probabilities")
    depthwise, flat, product, softmax = cost_of_graph(w.graph()).per_node
    assert depthwise.macs == 6 * 9 * 9
    assert (flat.macs, flat.flops) == (0, 0)
    assert (product.macs, product.flops) == (54 * 7, 2 * 54 * 7)
    assert (softmax.flops, softmax.output_bytes) == (35, 28)


def test_a_stored_operand_is_weight_not_activation():
    writer = FormWriter()
    x = writer.input("x", (1, 4, 5, 5), scale=1.0)
    writer.output(writer.mul(x, writer.constant_int8("factor", np.ones((1, 4, 1, 1)), scale=1.0), scale=1.0), "y")
    cost = cost_of_graph(writer.graph())
    assert (cost.parameters, cost.weight_bytes, cost.activation_bytes, cost.macs, cost.flops) == (4, 4, 200, 0, 100)
    assert [(row.op, row.parameters, row.output_bytes) for row in cost.per_node] == [("Constant", 4, 0), ("Mul", 0, 100)]
    assert cost.uncounted == ()


def test_conventions_are_named():
    cost = cost_of_graph(small_form())
    expected = {"mac": cost.macs, "flop": cost.flops, "keras": cost.keras_flops, "keras2": cost.keras_flops}
    assert {name: cost.count(name) for name in CONVENTIONS} == expected
    with pytest.raises(IsthmusError, match="unknown convention 'gflops': there are mac, flop, keras, keras2"):
        cost.count("gflops")


def test_json_round_trip():
    cost = small_float().cost()
    assert Cost.from_json(json.loads(json.dumps(cost.to_json()))) == cost


def test_dynamic_shape_is_refused():
    with pytest.raises(IsthmusError, match=r"tensor 'image' has the shape \['N', 1, 28, 28\], which is not static; give the input's shape"):
        small_float().cost(["N", 1, 28, 28])


def test_broken_shapes_are_one_sentence():
    net = FloatNet(1)
    net.node("Gemm", net.constant(3, 5), transB=1)
    with pytest.raises(IsthmusError, match="shapes cannot be inferred"):
        net.cost()


def test_operator_without_a_rule_is_named_not_guessed():
    cost = FloatNet(1).node("LRN", size=3).cost()
    assert cost.uncounted == ("LRN (lrn_0)",)
    assert cost.flops == 0


def test_shared_weight_counts_once():
    net = FloatNet(2)
    weight = net.constant(2, 2, 1, 1)
    net.node("Conv", weight).node("Conv", weight)
    cost = net.cost()
    assert cost.parameters == 4
    assert cost.macs == 2 * 28 * 28 * 2 * 2


def test_settings_are_no_parameters():
    net = FloatNet(1)
    net.constants += [numpy_helper.from_array(np.float32(0), "low"), numpy_helper.from_array(np.array([1, -1], np.int64), "extents")]
    cost = net.node("Clip", "low").node("Reshape", "extents").node("Add", net.constant(784)).cost()
    assert [row.parameters for row in cost.per_node] == [0, 0, 784]


def test_transposed_convolution():
    net = FloatNet(4, size=8)
    cost = net.node("ConvTranspose", net.constant(4, 2, 3, 3), net.constant(2), strides=[2, 2]).cost()
    assert cost.per_node[0].output_shape == (1, 2, 17, 17)
    assert cost.macs == 4 * 8 * 8 * 2 * 9


# ---- conventions
@pytest.mark.parametrize("net", [network_a, lambda: blocks(3, [[8, 8]], 16, 4, "last")])
def test_keras2_leaves_batch_normalisation_out_and_nothing_else(net):
    """Where the papers differ: Keras 3 runs it as operators that count, Keras 2 as one that the profiler does not know."""
    cost = net().cost()
    normalised = [row for row in cost.per_node if row.op == "BatchNormalization"]
    counted = sum(2 * int(np.prod(row.output_shape)) + 6 * row.output_shape[1] for row in normalised)
    assert normalised and cost.count("keras") - cost.count("keras2") == counted
    assert all(row.count("keras2") == 0 for row in normalised) and cost.count("keras2") == sum(row.count("keras2") for row in cost.per_node)


# ---- every operator of the form
MODELS = sorted((Path(__file__).parents[1] / "models").glob("*.onnx"))
GRAPHS = {file.stem: QuantGraph.load(file) for file in MODELS}


def test_every_operator_of_the_form_has_a_rule_and_a_model():
    rows = {node.op for graph in GRAPHS.values() for node in graph.nodes if node.kind == "int8"}
    assert rows == set(OPS)
    assert {name: cost_of_graph(graph).uncounted for name, graph in GRAPHS.items() if cost_of_graph(graph).uncounted} == {}


@pytest.mark.parametrize("name", GRAPHS)
def test_figures_of_every_model_fit_together(name):
    graph = GRAPHS[name]
    cost = cost_of_graph(graph)
    nodes = {node.name: node for node in graph.nodes}
    for row in cost.per_node:
        node = nodes[row.name]
        shape = graph.tensors[node.output].shape
        if node.kind == "int8":
            assert row.macs == OPS[node.op].macs(node, graph.tensors)
        assert row.flops >= 2 * row.macs and row.keras_flops >= 2 * row.macs
        if node.kind == "int8" and OPS[node.op].passes_scale and node.op not in ("MaxPool", "Relu", "Clip"):
            assert (row.macs, row.flops, row.keras_flops) == (0, 0, 0), "moving values is no arithmetic"
        if node.op in ("Sigmoid", "Tanh", "LeakyRelu", "PRelu", "HardSigmoid", "HardSwish", "Silu", "Mish", "Gelu", "Softplus", "Elu", "Relu", "Clip"):
            assert (row.flops, row.keras_flops) == (int(np.prod(shape)), 0), "an activation is 1 an element, and nothing to Keras"
        if node.op in ("Add", "Sub", "Mul") and not node.activation:
            assert row.flops == row.keras_flops == int(np.prod(shape))
    stored = {tensor for node in graph.nodes if node.op == "Constant" for tensor in node.outputs}
    for node in graph.nodes:
        if node.kind == "int8":
            assert cost.activation_bytes >= sum(graph.tensors[tensor].size for tensor in {*node.inputs} - stored)
    assert cost.best_order_bytes is not None and cost.best_order_bytes <= cost.activation_bytes
    assert Cost.from_json(json.loads(json.dumps(cost.to_json()))) == cost


def form_of(build, shape=(1, 4, 6, 6)):
    w = FormWriter(recipe=Recipe())
    w.output(build(w, w.input("x", shape, scale=2.0**-4)), "y")
    return cost_of_graph(w.graph()).per_node[-1]


# (what is built, MACs, "flop", "keras"), by hand, on an input [1, 4, 6, 6].
BY_HAND = {
    "conv_transpose": (lambda w, x: w.conv_transpose(x, np.ones((4, 2, 3, 3), np.int8), 0.25, scale=1.0, strides=(2, 2)), 144 * 18, 2 * 144 * 18, 2 * 144 * 18),
    "resize_linear": (lambda w, x: w.resize_linear(x, (1, 4, 12, 12), scale=2.0**-4), 0, 576 * 4, 0),
    "resize_nearest": (lambda w, x: w.resize_nearest(x, (1, 4, 12, 12)), 0, 0, 0),
    "reduce_mean": (lambda w, x: w.reduce_mean(x, (1,), scale=2.0**-4), 0, 144, 144),
    "average_pool": (lambda w, x: w.average_pool(x, (2, 3), (2, 3), scale=2.0**-4), 0, 4 * 6 * 6, 4 * 6 * 6),
    "batch_matmul": (lambda w, x: w.batch_matmul(x, x, scale=1.0), 4 * 6 * 6 * 6, 2 * 4 * 216, 2 * 4 * 216),
    "mul": (lambda w, x: w.mul(x, x, scale=1.0, activation="Relu"), 0, 288, 144),
    "sub": (lambda w, x: w.sub(x, x, scale=2.0**-3), 0, 144, 144),
    "mish": (lambda w, x: w.function("Mish", x, scale=2.0**-4), 0, 144, 0),
    "p_relu": (lambda w, x: w.p_relu(x, np.full((4, 1, 1), 0.25), scale=2.0**-4), 0, 144, 0),
    "pad": (lambda w, x: w.pad(x, (0, 0, 1, 1, 0, 0, 1, 1)), 0, 0, 0),
    "depth_to_space": (lambda w, x: w.depth_to_space(x, 2), 0, 0, 0),
    "requantize": (lambda w, x: w.requantize(x, scale=2.0**-2), 0, 0, 0),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_one_operator_by_hand(name):
    build, macs, flops, keras = BY_HAND[name]
    row = form_of(build)
    assert (row.macs, row.flops, row.keras_flops) == (macs, flops, keras)


def test_slopes_are_parameters():
    assert form_of(lambda w, x: w.p_relu(x, np.full((4, 1, 1), 0.25), scale=2.0**-4)).parameters == 4


# ---- float ONNX
def float_cost(op, inputs, output, constants=(), opset=20, **attributes):
    """One operator on float inputs of these shapes, and constants behind them."""
    names = [f"x{index}" for index in range(len(inputs))]
    stored = [numpy_helper.from_array(array, f"c{index}") for index, array in enumerate(constants) if array is not None]
    held = [f"c{index}" if array is not None else "" for index, array in enumerate(constants)]
    node = helper.make_node(op, [*names, *held], ["y"], "node", **attributes)
    given = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in zip(names, inputs, strict=True)]
    made = helper.make_graph([node], "net", given, [helper.make_tensor_value_info("y", TensorProto.FLOAT, output)], stored)
    return cost_of_onnx(helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)])).per_node[0]


ones = np.ones
FLOAT = {
    "Conv 1-D in groups": (("Conv", [(1, 6, 20)], (1, 4, 18), [ones((4, 3, 3), np.float32)]), {"group": 2}, 72 * 9, 2 * 72 * 9, 2 * 72 * 9),
    "MatMul of two": (("MatMul", [(2, 3, 5), (2, 5, 7)], (2, 3, 7)), {}, 210, 420, 420),
    "Gemm turned": (("Gemm", [(5, 3)], (3, 7), [ones((5, 7), np.float32), ones(7, np.float32)]), {"transA": 1}, 105, 231, 231),
    "Resize linear": (("Resize", [(1, 2, 4, 4)], (1, 2, 8, 8), [None, None, np.array([1, 2, 8, 8])]), {"mode": "linear"}, 0, 128 * 4, 0),
    "Resize nearest": (("Resize", [(1, 2, 4, 4)], (1, 2, 8, 8), [None, None, np.array([1, 2, 8, 8])]), {}, 0, 0, 0),
    "GridSample": (("GridSample", [(1, 2, 4, 4), (1, 3, 3, 2)], (1, 2, 3, 3)), {}, 0, 72, 0),
    "LayerNormalization": (("LayerNormalization", [(2, 6)], (2, 6), [ones(6, np.float32)]), {}, 0, 96, 96),
    "Softmax": (("Softmax", [(2, 6)], (2, 6)), {}, 0, 60, 60),
    "ReduceMean": (("ReduceMean", [(2, 6, 5)], (2, 1, 1), [np.array([1, 2])]), {}, 0, 60, 60),
    "GlobalMaxPool": (("GlobalMaxPool", [(1, 3, 4, 4)], (1, 3, 1, 1)), {}, 0, 48, 48),
    "Sum of three": (("Sum", [(2, 3)] * 3, (2, 3)), {}, 0, 12, 12),
    "Erf": (("Erf", [(2, 3)], (2, 3)), {}, 0, 6, 0),
    "Transpose": (("Transpose", [(2, 3)], (3, 2)), {"perm": [1, 0]}, 0, 0, 0),
}


@pytest.mark.parametrize("name", FLOAT)
def test_one_float_operator_by_hand(name):
    call, attributes, macs, flops, keras = FLOAT[name]
    row = float_cost(*call, **attributes)
    assert (row.macs, row.flops, row.keras_flops) == (macs, flops, keras)


# ---- the best order
def test_branches_one_after_the_other_need_less():
    """As exporters write it: both branches wide at once. In the best order one is narrow again before the other starts."""
    w = FormWriter(recipe=Recipe())
    x = w.input("x", (1, 2, 8, 8), scale=2.0**-4)
    wide = [w.conv(x, np.ones((16, 2, 1, 1), np.int8), 2.0**-4, scale=2.0**-4) for _ in range(2)]
    narrow = [w.conv(y, np.ones((2, 16, 1, 1), np.int8), 2.0**-4, scale=2.0**-4) for y in wide]
    w.output(w.add(*narrow, scale=2.0**-4), "y")
    cost = cost_of_graph(w.graph())
    pixels = 64
    assert cost.activation_bytes == (16 + 16 + 2) * pixels
    assert cost.best_order_bytes == (2 + 16 + 2) * pixels
    assert "1,280" in cost_table(cost, "mac", layers=False)
