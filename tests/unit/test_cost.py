# SPDX-License-Identifier: Apache-2.0
"""Cost: against published counts of real networks (float ONNX), against hand counts (int8 form), and the peak of live buffers."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from isthmus.cost import CONVENTIONS, Cost, cost_of_graph, cost_of_onnx
from isthmus.errors import IsthmusError
from isthmus.form_writer import FormWriter
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


def test_conventions_are_named():
    cost = cost_of_graph(small_form())
    assert {name: cost.count(name) for name in CONVENTIONS} == {"mac": cost.macs, "flop": cost.flops, "keras": cost.keras_flops}
    with pytest.raises(IsthmusError, match="unknown convention 'gflops': there are mac, flop, keras"):
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
