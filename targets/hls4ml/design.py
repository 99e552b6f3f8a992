# SPDX-License-Identifier: Apache-2.0
"""The layers that the HLS project will have, in order, each with what it reads: for the estimate (`Work`) and for the stream (`Stage`)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from isthmus.targets.hls4ml.calibration import Work
from isthmus.targets.hls4ml.folding import Product
from isthmus.targets.hls4ml.stream import Stage
from isthmus.targets.hls4ml.writer import GLOBAL_MEAN, KERNEL

if TYPE_CHECKING:
    from isthmus.targets.hls4ml.lower import Lowered

Grid = tuple[int, int, int]  # rows, columns, channels


@dataclass(frozen=True)
class Layer:
    """One layer of the project. `reads`: places of the layers in front; `work` has the folding 1, `folded` gives it another."""

    name: str
    work: Work
    stage: Stage
    product: Product | None = None

    def folded(self, choice: Mapping[str, Any]) -> Layer:
        """With `choice`, what hls4ml's configuration says of it: Strategy and ReuseFactor."""
        if self.product is None:
            return self
        return replace(self, work=replace(self.work, strategy=str(choice["Strategy"]), reuse=int(choice["ReuseFactor"])))


def layers_of(lowered: Lowered, io_type: str) -> tuple[Layer, ...]:
    """Every layer of the project."""
    builder = _Builder(lowered, io_type == "io_stream")
    graph = onnx.load_from_string(lowered.model).graph
    for value in (*graph.value_info, *graph.input):
        builder.shapes[value.name] = [dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
    builder.constants = {constant.name for constant in graph.initializer}
    for value in graph.input:
        rows, columns, channels = builder.grid(value.name)
        builder.add(value.name, value.name, Work("source", rows * columns, channels, 8), "source", [], rows * columns)
    for node in graph.node:
        builder.node(node)
    return tuple(builder.layers)


class _Builder:
    def __init__(self, lowered: Lowered, streams: bool) -> None:
        self.streams = streams
        self.types = lowered.layers
        self.products = {product.layer: product for product in lowered.products}
        self.layers: list[Layer] = []
        self.made: dict[str, int] = {}  # value -> layer
        self.widths: dict[str, int] = {}  # value -> bits
        self.shapes: dict[str, list[int]] = {}
        self.constants: set[str] = set()

    def grid(self, value: str) -> Grid:
        rows, columns, channels = ([1, 1, *self.shapes[value][1:]])[-3:]
        return rows, columns, channels

    def bits(self, layer: str) -> int | None:
        """Of the layer's result; None where hls4ml derives it."""
        found = re.match(r"ap_fixed<(\d+)", str(self.types[layer]["Precision"].get("result", "")))
        return int(found.group(1)) if found else None

    def add(self, value: str, name: str, work: Work, rule: str, inputs: Sequence[str], tokens: int, product: Product | None = None, **more: Any) -> None:
        # Each name once: hls4ml reads the same tensor twice through one copy.
        reads = tuple(self.made[given] for given in inputs)
        self.layers.append(Layer(name, replace(work, name=name), Stage(name, rule, reads, tokens, **more), product))
        self.made[value] = len(self.layers) - 1
        self.widths[value] = work.out_bits

    def alias(self, value: str, source: str, bits: int | None = None) -> None:
        self.made[value] = self.made[source]
        self.widths[value] = bits or self.widths[source]

    # ---- nodes
    def node(self, node: onnx.NodeProto) -> None:
        value = node.output[0]
        inputs = [given for given in node.input if given not in self.constants]
        if not inputs:
            self.constants.add(value)  # a weight behind its quantiser
            return
        if node.op_type == "Quant":
            self._quant(node, value, inputs[0])
        elif node.op_type == "Conv":
            self._conv(node, value, inputs[0])
        elif node.op_type == "MatMul":
            self._dense(node, value, inputs[0])
        elif node.op_type == "Reshape" or (node.op_type == "Add" and node.name.endswith("_add") and node.name[: -len("_add")] in self.products):
            self.alias(value, inputs[0])
        elif node.op_type == "Pad":
            before, after = self.grid(inputs[0]), self.grid(value)
            self._pad(value, node.name, inputs[0], (0, 0, after[0] - before[0], after[1] - before[1]))
        elif node.op_type in ("MaxPool", "AveragePool"):
            self._pool(node, value, inputs[0])
        elif node.op_type == GLOBAL_MEAN:
            self._global_mean(node, value, inputs[0])
        elif node.op_type == KERNEL:
            self._kernel(node, value, inputs)
        else:
            self._each(value, node.name, inputs)

    def _quant(self, node: onnx.NodeProto, value: str, source: str) -> None:
        bits = self.bits(node.name)
        behind = self.layers[self.made[source]]
        fused = behind.work.kind == "dense" and behind.name == node.name.removesuffix("_quant")
        if fused or bits == self.widths[source]:
            self.alias(value, source, bits)
        else:
            self._each(value, node.name, [source])

    def _each(self, value: str, name: str, inputs: Sequence[str]) -> None:
        """One pixel of each input in, one out."""
        rows, columns, channels = self.grid(value)
        bits = max(self.widths[given] for given in inputs)
        work = self._all_at_once(Work("activation", rows * columns, channels, bits, out_bits=self.bits(name) or bits))
        self.add(value, name, work, "each", inputs, rows * columns, delay=2)

    def _all_at_once(self, work: Work) -> Work:
        """In io_parallel every pixel is computed beside the others."""
        return work if self.streams else replace(work, pixels=1, filters=work.filters * work.pixels)

    def _pad(self, value: str, name: str, source: str, pads: tuple[int, int, int, int]) -> None:
        rows, columns, channels = self.grid(source)
        top, left, bottom, right = pads
        total = (rows + top + bottom) * (columns + left + right)
        work = Work("pad", total if self.streams else 1, channels if self.streams else 0, self.widths[source], out_bits=self.widths[source])
        self.add(value, f"{name}/pad", work, "pad", [source], total, grid=(rows, columns), pads=pads)

    def _conv(self, node: onnx.NodeProto, value: str, source: str) -> None:
        attributes = {attribute.name: list(attribute.ints) or attribute.i for attribute in node.attribute}
        product = self.products[node.name]
        pads = tuple(attributes["pads"])
        if any(pads) and self.streams:
            padded = f"{value}_padded"
            self._pad(padded, node.name, source, (pads[0], pads[1], pads[2], pads[3]))
            rows, columns, channels = self.grid(source)
            self.shapes[padded] = [1, rows + pads[0] + pads[2], columns + pads[1] + pads[3], channels]
            source = padded
        rows, columns, _ = self.grid(source)
        work = self._weighted("conv", product, rows * columns if self.streams else product.pixels, self.widths[source], self.bits(node.name))
        window: dict[str, Any] = {"grid": (rows, columns), "kernel": tuple(attributes["kernel_shape"]), "strides": tuple(attributes["strides"])}
        self.add(value, node.name, work, "window", [source], product.pixels, product, **window)

    def _weighted(self, kind: str, product: Product, pixels: int, in_bits: int, out_bits: int | None) -> Work:
        return Work(
            kind,
            pixels,
            product.filters,
            in_bits,
            product.terms,
            product.weight_bits,
            out_bits or product.accumulator_bits,
            product.zeros,
            depthwise=product.depthwise,
            multiplied=product.multiplied,
            shifted=product.shifted,
        )

    def _dense(self, node: onnx.NodeProto, value: str, source: str) -> None:
        product = self.products[node.name]
        rows, columns, _ = self.grid(source)
        tokens = self.layers[self.made[source]].stage.tokens_out if self.streams else rows * columns
        work = self._weighted("dense", product, 1, self.widths[source], None)
        self.add(value, node.name, work, "whole", [source], 1, product, tokens_in=(tokens,))

    def _pool(self, node: onnx.NodeProto, value: str, source: str) -> None:
        attributes = {attribute.name: list(attribute.ints) for attribute in node.attribute}
        rows, columns, channels = self.grid(source)
        out_rows, out_columns, _ = self.grid(value)
        kernel, strides = attributes["kernel_shape"], attributes["strides"]
        bits, outside = self.widths[source], out_rows * out_columns
        work = Work("pool", rows * columns if self.streams else 1, channels if self.streams else channels * outside, bits, int(np.prod(kernel)), out_bits=bits)
        window: dict[str, Any] = {"grid": (rows, columns), "kernel": tuple(kernel), "strides": tuple(strides)}
        self.add(value, node.name, work, "window", [source], outside, delay=3, **window)

    def _global_mean(self, node: onnx.NodeProto, value: str, source: str) -> None:
        """One sum a channel, wide enough for all of them: never published, counted as a pool of two terms of that width."""
        rows, columns, channels = self.grid(source)
        sum_bits = self.widths[source] + (rows * columns - 1).bit_length()
        work = Work("pool", rows * columns, channels, sum_bits, terms=2, out_bits=self.widths[source])
        whole = (rows, columns)
        self.add(value, node.name, work, "window", [source], 1, delay=3, grid=whole, kernel=whole, strides=whole)

    def _kernel(self, node: onnx.NodeProto, value: str, inputs: Sequence[str]) -> None:
        function = next(attribute.s.decode() for attribute in node.attribute if attribute.name == "kernel")
        if function == "isthmus_table":
            self._each(value, node.name, inputs)
            return
        rows, columns, channels = self.grid(value)
        read = [self.grid(given) for given in inputs]
        tokens = max(grid[0] * grid[1] for grid in read)
        size = sum(int(np.prod(grid)) for grid in read)
        product = self.products.get(node.name)
        if product is not None:
            work = Work("dense", 1, product.filters * product.pixels, 8, product.terms, 8, product.accumulator_bits, strategy="resource")
        elif function == "isthmus_copy" or not self.streams:
            # In io_parallel a move is wires; an interpolation is sums of four terms, counted like a pool's.
            many = channels if self.streams else rows * columns * channels
            moved = function in ("isthmus_move", "isthmus_join", "isthmus_copy")
            work = Work("activation" if moved else "pool", tokens if self.streams else 1, 0 if moved else many, 8, 1 if moved else 4)
        else:
            work = Work("buffer", tokens + rows * columns, channels, 8, depth_pixels=size)
        rule = "each" if function == "isthmus_copy" and tokens == rows * columns else "whole"
        self.add(value, node.name, work, rule, inputs, rows * columns, product, tokens_in=tuple(grid[0] * grid[1] for grid in read))
