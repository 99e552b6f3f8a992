# SPDX-License-Identifier: Apache-2.0
"""`Lowering`: what the operators share while a form becomes QONNX: values, types, the one rounding, and values that change their place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from isthmus.spec import TensorSpec
from isthmus.targets.hls4ml.fixed import INT8_HIGH, INT8_LOW, Fixed, activation_type, fraction_bits, holding, widened
from isthmus.targets.hls4ml.folding import Product
from isthmus.targets.hls4ml.kernels import constant_source, copy_kernel, move_kernel
from isthmus.targets.hls4ml.layout import element_order, hls_shape, hls_sources
from isthmus.targets.hls4ml.writer import QonnxWriter

if TYPE_CHECKING:
    from isthmus.graph import QuantGraph, QuantNode


class Lowering:
    """State of one lowering. Values are names in the QONNX graph; shapes of values are HLS shapes, with the batch of one sample."""

    def __init__(self, graph: QuantGraph, io_type: str) -> None:
        self.graph = graph
        self.streams = io_type == "io_stream"
        self.writer = QonnxWriter()
        self.values: dict[str, str] = {}  # int8 tensor of the form -> value in the QONNX graph
        self.constants: dict[str, np.ndarray] = {node.output: node.constants[0] for node in graph.nodes if node.op == "Constant" and node.kind == "int8"}
        self.orders: dict[str, np.ndarray] = {}  # flattened tensors left in HLS order: only matrix products read them
        self.products: list[Product] = []
        self.nodes: dict[str, str] = {}

    # ---- what the form says of a tensor
    def spec(self, tensor: str) -> TensorSpec:
        return self.graph.tensors[tensor]

    def scale(self, tensor: str) -> float:
        scale = self.spec(tensor).scale
        assert scale is not None
        return scale

    def type(self, tensor: str) -> Fixed:
        return activation_type(self.scale(tensor))

    def shape(self, tensor: str) -> list[int]:
        return hls_shape(self.spec(tensor).shape)

    # ---- the one rounding, and what is clamped behind it
    def finish(self, node: QuantNode, value: str, name: str, exact: Fixed, shape: list[int] | None = None) -> str:
        """Behind an operator whose result is `exact`: Relu, the one rounding, and the clamp that is left. `shape`: where it is not the tensor's own."""
        shape, of = shape or self.shape(node.output), self.type(node.output)
        if widened(exact, of) != exact:
            value = self.writer.quant(value, f"{name}_wide", replace(widened(exact, of), rounds=True), shape)
        if node.clamp[0] == 0:
            value = self.writer.node("Relu", [value], f"{name}_relu", shape)
            self.writer.layer(f"{name}_relu", result=of)
        value = self.writer.quant(value, f"{name}_quant", of, shape)
        return self.clamp(value, name, node, shape)

    def clamp(self, value: str, name: str, node: QuantNode, shape: list[int] | None = None) -> str:
        """clip(x, low, high) on int8 steps by Relu and exact additions: hls4ml's ONNX front end has no Clip.

        low + relu(x - low), then high - relu(high - that); with both, the additions in the middle are one. What `finish` has done by
        a Relu, or saturation does anyway, is left out.
        """
        low, high = node.clamp
        fraction = fraction_bits(self.scale(node.output))
        shape = shape or self.shape(node.output)
        if low not in (INT8_LOW, 0):
            value = self._shift(value, f"{name}_low", shape, fraction, -low, 1)
            value = self.relu(value, f"{name}_low_relu", shape, holding(0, INT8_HIGH - low, fraction))
        else:
            low = 0  # the value is x itself: nothing was shifted
        if high != INT8_HIGH:
            value = self._shift(value, f"{name}_high", shape, fraction, high - low, -1)
            value = self.relu(value, f"{name}_high_relu", shape, holding(0, high - INT8_LOW, fraction))
            return self._shift(value, f"{name}_back", shape, fraction, high, -1, self.type(node.output))
        return self._shift(value, f"{name}_back", shape, fraction, low, 1, self.type(node.output)) if low else value

    def relu(self, value: str, name: str, shape: list[int], of: Fixed) -> str:
        self.writer.layer(name, result=of)
        return self.writer.node("Relu", [value], name, shape)

    def _shift(self, value: str, name: str, shape: list[int], fraction: int, constant: int, sign: int, of: Fixed | None = None) -> str:
        """constant + sign * value, exactly."""
        # |value| <= 255 and |constant| <= 255 here
        self.writer.layer(name, result=of or holding(-511, 511, fraction))
        number = self.writer.weights(f"{name}_constant", np.array([constant]), holding(constant, constant, fraction))
        return self.writer.node("Add" if sign > 0 else "Sub", [value, number] if sign > 0 else [number, value], name, shape)

    def exact_or_final(self, node: QuantNode, exact: Fixed) -> Fixed:
        """The type of an operator's own result: exact where something still reads it so, else already the output's (the rounding)."""
        of = self.type(node.output)
        return exact if node.clamp[0] == 0 or widened(exact, of) != exact else of

    # ---- values that change their place
    def move(self, value: str, name: str, size: int, sources: np.ndarray, shape: Sequence[int], of: Fixed) -> str:
        """`sources` (rows, columns, channels) of `shape`: places in the HLS array of `value`, or constants. The array itself stays as it is."""
        if sources.size == size and np.array_equal(sources.reshape(-1), np.arange(size)):
            return self.reshaped(value, name, shape, of)
        return self.writer.kernel(move_kernel(sources, size), [value], name, shape, of)

    def copied(self, value: str, name: str, shape: Sequence[int], of: Fixed) -> str:
        """The same values as a layer of its own: hls4ml cannot read a graph input twice, or give one layer's result as two outputs."""
        return self.writer.kernel(copy_kernel(int(np.prod(shape[1:]))), [value], name, shape, of)

    def reshaped(self, value: str, name: str, shape: Sequence[int], of: Fixed, flat: bool = False) -> str:
        """The same array under another shape. hls4ml 1.3.0 stops at a KeyError on its own Reshape in io_stream, but for one that is `flat` before a Dense."""
        if self.streams and not flat:
            return self.copied(value, name, shape, of)
        self.writer.layer(name, result=of)
        return self.writer.node("Reshape", [value, self.writer.constant(f"{name}_shape", shape, np.int64)], name, shape)

    def placed(self, node: QuantNode, position: int, sources: np.ndarray, target: Sequence[int], name: str) -> str:
        """Input `position` of the node as a tensor of form shape `target`: `sources` are places in the form's order (one sample).

        A constant is spread behind an input that is none: its layer ignores what it reads.
        """
        tensor = node.inputs[position]
        if tensor in self.constants:
            stored = self.constants[tensor].reshape(-1)
            other = next(name for name in node.inputs if name not in self.constants)
            places = hls_sources(constant_source(stored[sources.reshape(-1)]), target, target)
            size = self.spec(other).size // self.spec(other).shape[0]
            return self.writer.kernel(move_kernel(places, size), [self.values[other]], name, hls_shape(target), self.type(tensor))
        source = self.spec(tensor).shape
        size, places = int(np.prod(source[1:])), hls_sources(sources, source, target)
        if hls_shape(source) == hls_shape(target) and np.array_equal(places.reshape(-1), np.arange(size)):
            return self.values[tensor]
        return self.move(self.values[tensor], name, size, places, hls_shape(target), self.type(tensor))

    def numbers(self, tensor: str) -> np.ndarray:
        """(1, ...): each element of one sample, as its place in the form's order; a constant is the same for every sample, and taken as it stands."""
        shape = self.spec(tensor).shape if tensor in self.constants else (1, *self.spec(tensor).shape[1:])
        return np.arange(int(np.prod(shape))).reshape(shape)

    def ordered(self, tensor: str) -> np.ndarray | None:
        """The order of a flattened tensor that was left in HLS order."""
        return self.orders.get(tensor)

    def leave_in_hls_order(self, node: QuantNode) -> None:
        self.orders[node.output] = element_order(self.spec(node.inputs[0]).shape)
