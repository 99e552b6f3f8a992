# SPDX-License-Identifier: Apache-2.0
"""The form as QONNX for hls4ml: one rounding a layer, at the type of its output; everything before it in a type that holds it exactly."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from isthmus.graph import QuantGraph, QuantNode
from isthmus.spec import TensorSpec
from isthmus.targets.hls4ml.fixed import INT8_HIGH, INT8_LOW, Fixed, activation_type, average_type, exact_weights, fraction_bits, holding, sum_type, widened
from isthmus.targets.hls4ml.folding import Product
from isthmus.targets.hls4ml.layout import element_order, hls_axis, hls_shape, keeps_order
from isthmus.targets.hls4ml.tail import fpga_output, fpga_outputs
from isthmus.targets.hls4ml.windows import dense_kernel, is_depthwise, pool_window, two_axes
from isthmus.targets.hls4ml.writer import CHANNELS_LAST, QonnxWriter


@dataclass(frozen=True)
class Lowered:
    """The QONNX file; hls4ml's layer section; the products to be folded; HLS layer -> node of the form."""

    model: bytes
    layers: Mapping[str, Mapping[str, Any]]
    products: tuple[Product, ...]
    nodes: Mapping[str, str]


def lower(graph: QuantGraph) -> Lowered:
    """`graph` must have passed the target's `check`."""
    return _Lowering(graph).run()


def feeds_products(node: QuantNode, graph: QuantGraph) -> bool:
    """Whether only matrix products read a flattened tensor: then its elements may stay in HLS order and the weights move instead."""
    readers = graph.consumers(node.output)
    flat = len(graph.tensors[node.output].shape) == 2 and node.output not in fpga_outputs(graph)
    return flat and bool(readers) and all(reader.op in ("Gemm", "MatMul") for reader in readers)


def safe_name(prefix: str, index: int, name: str) -> str:
    """A C identifier that no other layer has: hls4ml writes layer names into the code, and compares them without case."""
    return f"{prefix}{index}_{re.sub(r'[^a-z0-9]+', '_', name.lower()).strip('_')[:40].rstrip('_') or 'x'}"


class _Lowering:
    def __init__(self, graph: QuantGraph) -> None:
        self.graph = graph
        self.writer = QonnxWriter()
        self.values: dict[str, str] = {}  # int8 tensor of the form -> value in the QONNX graph
        self.orders: dict[str, np.ndarray] = {}  # flattened tensors left in HLS order: only matrix products read them
        self.products: list[Product] = []
        self.nodes: dict[str, str] = {}

    def run(self) -> Lowered:
        graph = self.graph
        for index, spec in enumerate(graph.inputs):
            name = safe_name("in", index, spec.name)
            self.values[graph.raw_input(index)] = self.writer.input(name, hls_shape(spec.shape), self._type(graph.raw_input(index)))
        for index, node in enumerate(graph.nodes):
            if node.kind == "int8":
                name = safe_name("n", index, node.name)
                self.nodes[name] = node.name
                self.values[node.output] = _OPERATORS[node.op](self, node, name)
        for index, spec in enumerate(graph.outputs):
            name, raw = safe_name("out", index, spec.name), fpga_output(graph, index)
            self.writer.output(self.values[raw], name, self._shape(raw), self._type(raw))
        return Lowered(self.writer.model("isthmus"), self.writer.layers, tuple(self.products), self.nodes)

    # ---- what every operator needs
    def _spec(self, tensor: str) -> TensorSpec:
        return self.graph.tensors[tensor]

    def _scale(self, tensor: str) -> float:
        scale = self._spec(tensor).scale
        assert scale is not None
        return scale

    def _type(self, tensor: str) -> Fixed:
        return activation_type(self._scale(tensor))

    def _shape(self, tensor: str) -> list[int]:
        return hls_shape(self._spec(tensor).shape)

    def _finish(self, node: QuantNode, value: str, name: str, exact: Fixed) -> str:
        """Behind an operator whose result is `exact`: Relu, the one rounding, and the clamp that is left."""
        shape, of = self._shape(node.output), self._type(node.output)
        if widened(exact, of) != exact:
            value = self.writer.quant(value, f"{name}_wide", replace(widened(exact, of), rounds=True), shape)
        if node.clamp[0] == 0:
            value = self.writer.node("Relu", [value], f"{name}_relu", shape)
            self.writer.layer(f"{name}_relu", result=of)
        value = self.writer.quant(value, f"{name}_quant", of, shape)
        return self._clamp(value, name, node)

    def _clamp(self, value: str, name: str, node: QuantNode) -> str:
        """clip(x, low, high) on int8 steps by Relu and exact additions: hls4ml's ONNX front end has no Clip.

        low + relu(x - low), then high - relu(high - that); with both, the additions in the middle are one. What `_finish` has done by
        a Relu, or saturation does anyway, is left out.
        """
        low, high = node.clamp
        fraction = fraction_bits(self._scale(node.output))
        shape = self._shape(node.output)
        if low not in (INT8_LOW, 0):
            value = self._shift(value, f"{name}_low", shape, fraction, -low, 1)
            value = self._relu(value, f"{name}_low_relu", shape, holding(0, INT8_HIGH - low, fraction))
        else:
            low = 0  # the value is x itself: nothing was shifted
        if high != INT8_HIGH:
            value = self._shift(value, f"{name}_high", shape, fraction, high - low, -1)
            value = self._relu(value, f"{name}_high_relu", shape, holding(0, high - INT8_LOW, fraction))
            return self._shift(value, f"{name}_back", shape, fraction, high, -1, self._type(node.output))
        return self._shift(value, f"{name}_back", shape, fraction, low, 1, self._type(node.output)) if low else value

    def _relu(self, value: str, name: str, shape: list[int], of: Fixed) -> str:
        self.writer.layer(name, result=of)
        return self.writer.node("Relu", [value], name, shape)

    def _shift(self, value: str, name: str, shape: list[int], fraction: int, constant: int, sign: int, of: Fixed | None = None) -> str:
        """constant + sign * value, exactly."""
        # |value| <= 255 and |constant| <= 255 here
        self.writer.layer(name, result=of or holding(-511, 511, fraction))
        number = self.writer.weights(f"{name}_constant", np.array([constant]), holding(constant, constant, fraction))
        return self.writer.node("Add" if sign > 0 else "Sub", [value, number] if sign > 0 else [number, value], name, shape)

    def _exact_or_final(self, node: QuantNode, exact: Fixed) -> Fixed:
        """The type of an operator's own result: exact where something still reads it so, else already the output's (the rounding)."""
        of = self._type(node.output)
        return exact if node.clamp[0] == 0 or widened(exact, of) != exact else of

    # ---- operators
    def conv(self, node: QuantNode, name: str) -> str:
        found = exact_weights(node, self._scale(node.inputs[0]))
        attributes = two_axes(node.attributes)
        depthwise = is_depthwise(node)
        values = found.values if node.weight is not None and node.weight.ndim == 4 else found.values[:, :, None, :]
        kernel = dense_kernel(values, attributes["dilations"], 1 if depthwise else attributes["group"])
        filters, depth, *window = kernel.shape
        weight = self.writer.weights(f"{name}_weight", np.moveaxis(kernel, 1, -1), found.weight_type)
        bias = self.writer.weights(f"{name}_bias", found.bias, found.bias_type)
        value = self.writer.node(
            "Conv", [self.values[node.inputs[0]], weight, bias], name, self._shape(node.output), domain=CHANNELS_LAST,
            kernel_shape=window, strides=attributes["strides"], pads=attributes["pads"], dilations=[1, 1], group=filters if depthwise else 1,
        )  # fmt: skip
        self.writer.layer(name, weight=found.weight_type, bias=found.bias_type, accum=found.accumulator, result=self._exact_or_final(node, found.accumulator))
        pixels = int(np.prod(self._shape(node.output)[1:3]))
        terms = int(np.prod(window)) * (filters if depthwise else depth)
        self.products.append(Product(name, node.name, terms, filters, pixels, depthwise))
        return self._finish(node, value, name, found.accumulator)

    def gemm(self, node: QuantNode, name: str) -> str:
        found = exact_weights(node, self._scale(node.inputs[0]))
        values = found.values if node.op == "MatMul" else found.values.T
        order = self.orders.get(node.inputs[0])
        values = values if order is None else values[order]
        terms, filters = values.shape
        shape = self._shape(node.output)
        weight = self.writer.weights(f"{name}_weight", values, found.weight_type)
        bias = self.writer.weights(f"{name}_bias", found.bias, found.bias_type)
        value = self.writer.node("MatMul", [self.values[node.inputs[0]], weight], name, shape)
        value = self.writer.node("Add", [value, bias], f"{name}_add", shape)
        # "auto" lets hls4ml put the bias, and a rounding right behind it, into the Dense layer; convert checks the type it derived.
        self.writer.layer(name, weight=found.weight_type, bias=found.bias_type, accum=found.accumulator, result="auto")
        self.writer.layer(f"{name}_add", scale=Fixed(2, 0), bias=found.bias_type, result=found.accumulator)
        self.products.append(Product(name, node.name, terms, filters, 1))
        return self._finish(node, value, name, found.accumulator)

    def add(self, node: QuantNode, name: str) -> str:
        exact = sum_type(self._scale(node.inputs[0]), self._scale(node.inputs[1]))
        value = self.writer.node("Add", [self.values[tensor] for tensor in node.inputs], name, self._shape(node.output))
        self.writer.layer(name, result=self._exact_or_final(node, exact))
        return self._finish(node, value, name, exact)

    def max_pool(self, node: QuantNode, name: str) -> str:
        of = self._type(node.output)
        self.writer.layer(name, result=of, accum=of)
        return self._pool("MaxPool", node, name)

    def average_pool(self, node: QuantNode, name: str) -> str:
        window = pool_window(node, self._spec(node.inputs[0]).shape, self._spec(node.output).shape)
        exact = average_type(int(np.prod(window.kernel)), self._scale(node.inputs[0]), self._scale(node.output))
        self.writer.layer(name, result=self._type(node.output), accum=exact)
        return self.writer.quant(self._pool("AveragePool", node, name), f"{name}_quant", self._type(node.output), self._shape(node.output))

    def _pool(self, op: str, node: QuantNode, name: str) -> str:
        window = pool_window(node, self._spec(node.inputs[0]).shape, self._spec(node.output).shape)
        value, pads = self.values[node.inputs[0]], window.pads
        if window.counts_padding:
            # hls4ml's ONNX front end does not read count_include_pad and averages over the cells inside: zeros written out are inside.
            value, pads = self._pad(value, f"{name}_pad", self._shape(node.inputs[0]), pads, self._type(node.inputs[0])), [0, 0, 0, 0]
        return self.writer.node(
            op, [value], name, self._shape(node.output), domain=CHANNELS_LAST, kernel_shape=window.kernel, strides=window.strides, pads=pads
        )

    def _pad(self, value: str, name: str, shape: list[int], pads: list[int], of: Fixed) -> str:
        top, left, bottom, right = pads
        padded = [1, shape[1] + top + bottom, shape[2] + left + right, shape[3]]
        amounts = self.writer.constant(f"{name}_amounts", [0, top, left, 0, 0, bottom, right, 0], np.int64)
        self.writer.layer(name, result=of)
        return self.writer.node("Pad", [value, amounts], name, padded, mode="constant")

    def relu(self, node: QuantNode, name: str) -> str:
        value = self._relu(self.values[node.inputs[0]], f"{name}_relu", self._shape(node.output), self._type(node.output))
        return self._clamp(value, name, node)

    def clip(self, node: QuantNode, name: str) -> str:
        return self.relu(node, name) if node.clamp[0] == 0 else self._clamp(self.values[node.inputs[0]], name, node)

    def requantise(self, node: QuantNode, name: str) -> str:
        return self._finish(node, self.values[node.inputs[0]], name, self._type(node.inputs[0]))

    def concat(self, node: QuantNode, name: str) -> str:
        """hls4ml joins two at a time."""
        axis = int(node.attributes["axis"]) % len(self._spec(node.output).shape)
        along, of = hls_axis(axis, len(self._spec(node.output).shape)), self._type(node.output)
        value, shape = self.values[node.inputs[0]], self._shape(node.inputs[0])
        for position, tensor in enumerate(node.inputs[1:]):
            part = f"{name}_{position}"
            shape = [extent + (self._shape(tensor)[along] if axis_ == along else 0) for axis_, extent in enumerate(shape)]
            value = self.writer.node("Concat", [value, self.values[tensor]], part, shape, axis=along)
            self.writer.layer(part, result=of)
        return value

    def reshape(self, node: QuantNode, name: str) -> str:
        source, target = self._spec(node.inputs[0]).shape, self._spec(node.output).shape
        value, shape = self.values[node.inputs[0]], hls_shape(source)
        if feeds_products(node, self.graph):
            self.orders[node.output] = element_order(source)
        elif not (element_order(source) == element_order(target)).all():
            if not keeps_order(source):
                value = self._transpose(value, f"{name}_first", node, [0, 3, 1, 2], shape)
            if not keeps_order(target):
                channels_first = [1, hls_shape(target)[3], *hls_shape(target)[1:3]]
                value = self._reshape_to(value, f"{name}_middle", node, channels_first)
                return self._transpose(value, f"{name}_last", node, [0, 2, 3, 1], channels_first)
        return self._reshape_to(value, name, node, hls_shape(target))

    def _transpose(self, value: str, name: str, node: QuantNode, permutation: list[int], shape: list[int]) -> str:
        self.writer.layer(name, result=self._type(node.output))
        return self.writer.node("Transpose", [value], name, [shape[axis] for axis in permutation], perm=permutation)

    def _reshape_to(self, value: str, name: str, node: QuantNode, shape: list[int]) -> str:
        self.writer.layer(name, result=self._type(node.output))
        return self.writer.node("Reshape", [value, self.writer.constant(f"{name}_shape", shape, np.int64)], name, shape)


_OPERATORS = {
    "Conv": _Lowering.conv,
    "Gemm": _Lowering.gemm,
    "MatMul": _Lowering.gemm,
    "Add": _Lowering.add,
    "MaxPool": _Lowering.max_pool,
    "AveragePool": _Lowering.average_pool,
    "GlobalAveragePool": _Lowering.average_pool,
    "Relu": _Lowering.relu,
    "Clip": _Lowering.clip,
    "Flatten": _Lowering.reshape,
    "Reshape": _Lowering.reshape,
    "Concat": _Lowering.concat,
    "Requantize": _Lowering.requantise,
}
OPERATORS = frozenset(_OPERATORS)
