# SPDX-License-Identifier: Apache-2.0
"""A pool with ceil_mode as a Pad of its own and a plain pool without padding.

MaxPool: the pad value must never win. It is 0 where no input can be negative (behind a Relu: nothing changes for the scales of int8), else the
lowest float32. AveragePool: it divides by the cells that count, the plain pool by all of them, so a constant factor for each position follows.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from isthmus.export.rewrites._edit import NodeRewrite, add_constant, attributes_of, constant, input_at, label_of, new_node, replace, static_shape

NEVER_NEGATIVE = ("Relu", "Sigmoid", "HardSigmoid", "Softmax", "Softplus", "Abs")
KEEPS_SIGN = ("MaxPool", "AveragePool", "GlobalAveragePool", "Reshape", "Flatten", "Transpose", "Concat", "Identity")
LOWEST = float(np.finfo(np.float32).min)


class Axis(NamedTuple):
    """One space axis of a pool: extents, window, and how far the last window reaches past the padding (`extra`)."""

    extent: int
    kernel: int
    stride: int
    dilation: int
    begin: int
    end: int
    extra: int
    positions: int

    def counts(self, *, with_padding: bool) -> np.ndarray:
        """How many cells of each window are input (or padding, if asked); what ceil_mode adds never counts."""
        cells = np.arange(self.positions)[:, None] * self.stride + np.arange(self.kernel) * self.dilation - self.begin
        low, high = (-self.begin, self.extent + self.end) if with_padding else (0, self.extent)
        return ((cells >= low) & (cells < high)).sum(axis=1)


class CeilPoolToPad(NodeRewrite):
    def rewrite(self, graph: ir.Graph, node: ir.Node) -> bool:
        given = attributes_of(node)
        others = node.outputs[1:]  # where each maximum stood: in the padded tensor it is another place
        if node.op_type not in ("MaxPool", "AveragePool") or not given.get("ceil_mode", 0) or any(value.uses() or value.is_graph_output() for value in others):
            return False
        axes = _axes(node)
        if axes is None or not all(axis.counts(with_padding=False).all() for axis in axes):
            return False  # a window of nothing but padding has no result that a pad value could give
        label, kernel = label_of(node), [axis.kernel for axis in axes]
        shape = static_shape(node.inputs[0]) or ()
        space = [axis.extent + axis.begin + axis.end + axis.extra for axis in axes]
        ends = [axis.end + axis.extra for axis in axes]
        amounts = add_constant(graph, f"{label}_pads", np.array([0, 0, *(axis.begin for axis in axes), 0, 0, *ends], np.int64))
        lowest = node.op_type == "MaxPool" and not never_negative(node.inputs[0])
        level = add_constant(graph, f"{label}_level", np.array(LOWEST if lowest else 0.0, np.float32))
        pad = new_node("Pad", [node.inputs[0], amounts, level], {"mode": "constant"}, f"{label}_pad", (*shape[:2], *space))
        steps = {"strides": [axis.stride for axis in axes], "dilations": [axis.dilation for axis in axes]}
        window = {"kernel_shape": kernel, **steps, "pads": [0] * (2 * len(axes))}
        factors = _factors(axes, bool(given.get("count_include_pad", 0)))
        pool = new_node(node.op_type, [pad.outputs[0]], window, node.name, static_shape(node.outputs[0]))
        if node.op_type == "MaxPool" or (factors == 1).all():
            replace(graph, [node], [pad, pool])
            return True
        corrected = new_node("Mul", [pool.outputs[0], add_constant(graph, f"{label}_counts", factors.astype(np.float32))], {}, f"{label}_corrected")
        replace(graph, [node], [pad, pool, corrected])
        return True


def _axes(node: ir.Node) -> list[Axis] | None:
    before, after = static_shape(node.inputs[0]), static_shape(node.outputs[0])
    given = attributes_of(node)
    if before is None or after is None or len(before) not in (3, 4) or given.get("auto_pad", "NOTSET") != "NOTSET" or given.get("storage_order", 0):
        return None
    rank = len(before) - 2
    kernel, ones = given["kernel_shape"], [1] * rank
    strides, dilations, pads = given.get("strides") or ones, given.get("dilations") or ones, given.get("pads") or [0] * (2 * rank)
    axes = []
    for index in range(rank):
        extent, positions, begin, end = before[index + 2], after[index + 2], pads[index], pads[index + rank]
        reached = (positions - 1) * strides[index] + (kernel[index] - 1) * dilations[index] + 1
        extra = max(reached - (extent + begin + end), 0)
        axes.append(Axis(extent, kernel[index], strides[index], dilations[index], begin, end, extra, positions))
    return axes


def _factors(axes: list[Axis], with_padding: bool) -> np.ndarray:
    """All cells of a window over those that count, for each position: [1, 1, H, W]."""
    counts = np.ones((1, 1))
    for axis in axes:
        counts = counts[..., None] * axis.counts(with_padding=with_padding)
    return float(np.prod([axis.kernel for axis in axes])) / counts


def never_negative(value: ir.Value | None) -> bool:
    """Whether the operators say that no element can be below zero."""
    node = None if value is None else value.producer()
    if node is None:
        return False
    if node.op_type == "Clip":
        low = constant(input_at(node, 1))
        return low is not None and bool((low >= 0).all())
    if node.op_type in NEVER_NEGATIVE:
        return True
    inputs = node.inputs if node.op_type == "Concat" else node.inputs[:1]
    return node.op_type in KEEPS_SIGN and all(never_negative(part) for part in inputs)
