# SPDX-License-Identifier: Apache-2.0
"""GridSample as TFLite's own operators: places in float32, four GATHERs of whole pixels, a weighted sum."""

from __future__ import annotations

import numpy as np

from isthmus.errors import Problem
from isthmus.graph import QuantGraph, QuantNode
from isthmus.targets.tflite.lowering import Lowering, Order, Placed
from isthmus.targets.tflite.rounding import EXACT_FLOAT32

MODES = ("linear", "nearest")
PADDINGS = ("zeros", "border")


def sampling_problems(graph: QuantGraph, node: QuantNode) -> list[Problem]:
    mode, padding = node.attributes.get("mode", "linear"), node.attributes.get("padding_mode", "zeros")
    image = graph.tensors[node.inputs[0]].shape
    found = f"GridSample with mode {mode!r}, padding_mode {padding!r} on {list(image)}"
    if len(node.inputs) == 2 and len(image) == 4 and mode in MODES and padding in PADDINGS and image[0] * image[2] * image[3] < EXACT_FLOAT32:
        return []
    fix = "sample computed images of fewer than 2^24 pixels at computed places, linear or nearest, padded with zeros or the border"
    return [Problem(node.name, "tflite-island", found, fix)]


def lower_grid_sample(lowering: Lowering, node: QuantNode) -> None:
    image, grid = lowering.read(node.inputs[0], Order.LAST), lowering.read(node.inputs[1], Order.FORM)
    target = lowering.write(node.output, Order.LAST)
    sampler = _Sampler(lowering, node, image, grid)
    result = sampler.nearest() if node.attributes.get("mode", "linear") == "nearest" else sampler.linear()
    lowering.emit_reshape(result, target)


class _Sampler:
    """One GridSample while it is written; every place is a float32 tensor [batch, height, width, 1] of the result."""

    def __init__(self, lowering: Lowering, node: QuantNode, image: Placed, grid: Placed) -> None:
        self.lowering, self.node = lowering, node
        self.batch, self.height, self.width, self.channels = image.shape
        self.shape = (*grid.shape[:3], 1)
        self.zeros = node.attributes.get("padding_mode", "zeros") == "zeros"
        self.pixels = lowering.reshape(image, f"{node.name}/pixels", (self.batch * self.height * self.width, self.channels), like=node.inputs[0])
        self.x, self.y = (self._place(grid, axis, extent) for axis, extent in ((0, self.width), (1, self.height)))

    def nearest(self) -> Placed:
        return self._picked(self._unary("ROUND", self.y), self._unary("ROUND", self.x), None)

    def linear(self) -> Placed:
        top, left = self._unary("FLOOR", self.y), self._unary("FLOOR", self.x)
        down, right = self._binary("SUB", self.y, top), self._binary("SUB", self.x, left)
        up, back = (self._binary("ADD", self._unary("NEG", share), 1.0) for share in (down, right))
        bottom, beside = self._binary("ADD", top, 1.0), self._binary("ADD", left, 1.0)
        corners = ((top, left, up, back), (top, beside, up, right), (bottom, left, down, back), (bottom, beside, down, right))
        parts = [self._picked(row, column, self._binary("MUL", a, b)) for row, column, a, b in corners]
        total = parts[0]
        for part in parts[1:]:
            total = self._binary("ADD", total, part)
        return total

    # ---- parts
    def _unary(self, op: str, a: Placed) -> Placed:
        return self.lowering.float_operator(op, [a.index], a.shape)

    def _binary(self, op: str, a: Placed, b: Placed | float | np.ndarray) -> Placed:
        if isinstance(b, Placed):
            other = b.index
        else:
            other = self.lowering.writer.constant("number", np.atleast_1d(np.asarray(b, np.float32)))
        options = "MaximumMinimumOptions" if op in ("MAXIMUM", "MINIMUM") else f"{op.capitalize()}Options"
        none = self.lowering.writer.enum("ActivationFunctionType", "NONE")
        fields = {} if op in ("MAXIMUM", "MINIMUM") else {"fusedActivationFunction": none}
        return self.lowering.float_operator(op, [a.index, other], a.shape, options, **fields)

    def _place(self, grid: Placed, axis: int, extent: int) -> Placed:
        """The grid's -1..1 in cells of the image."""
        part = self.lowering.scratch_float(f"{self.node.name}/place", self.shape)
        begin, size = (self.lowering.writer.constant(label, np.array(values, np.int32)) for label, values in (("begin", [0, 0, 0, axis]), ("size", self.shape)))
        self.lowering.writer.operator("SLICE", 1, [grid.index, begin, size], [part.index], "SliceOptions")
        place = self._binary("ADD", part, 1.0)
        if self.node.attributes.get("align_corners", 0):
            place = self._binary("MUL", self._binary("MUL", place, 0.5), float(extent - 1))
        else:
            place = self._binary("MUL", self._binary("SUB", self._binary("MUL", place, float(extent)), 1.0), 0.5)
        return place if self.zeros else self._within(place, extent)

    def _within(self, place: Placed, extent: int) -> Placed:
        return self._binary("MINIMUM", self._binary("MAXIMUM", place, 0.0), float(extent - 1))

    def _picked(self, row: Placed, column: Placed, weight: Placed | None) -> Placed:
        """The pixels at whole places, times `weight`, and nothing outside the image where the padding is zeros."""
        inner_row, inner_column = self._within(row, self.height), self._within(column, self.width)
        first = np.arange(self.batch, dtype=np.float32).reshape(-1, 1, 1, 1) * self.height * self.width
        place = self._binary("ADD", self._binary("ADD", self._binary("MUL", inner_row, float(self.width)), inner_column), first)
        writer = self.lowering.writer
        index = writer.tensor(f"{self.node.name}/index", self.shape, "int32")
        writer.operator("CAST", 1, [place.index], [index])
        flat = Placed(writer.tensor(f"{self.node.name}/index", self.shape[:3], "int32"), self.shape[:3])
        self.lowering.emit_reshape(Placed(index, self.shape), flat)
        found = self.lowering.float_operator("GATHER", [self.pixels.index, flat.index], (*self.shape[:3], self.channels), "GatherOptions", axis=0)
        for place, inner in ((row, inner_row), (column, inner_column)) if self.zeros else ():
            outside = self._binary("MINIMUM", self._unary("ABS", self._binary("SUB", place, inner)), 1.0)
            inside = self._binary("ADD", self._unary("NEG", outside), 1.0)
            weight = inside if weight is None else self._binary("MUL", weight, inside)
        return found if weight is None else self._binary("MUL", found, weight)
