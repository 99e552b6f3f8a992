# SPDX-License-Identifier: Apache-2.0
"""Sums, differences, products, averages and changes of scale. All but products count in steps of their output: see `Lowering.in_steps`."""

from __future__ import annotations

import math
from typing import Any

from isthmus.graph import QuantNode
from isthmus.targets.cpu.lowering import Lowering


def add(w: Lowering, node: QuantNode) -> None:
    w.group("Add", [w.in_steps(name, node.output) for name in node.inputs], node, w.steps_of(node.output))


def sub(w: Lowering, node: QuantNode) -> None:
    """ONNX Runtime has no integer Sub; an integer Add with a negative scale is exact as well and 4 times as fast as a float Sub."""
    first, second = node.inputs
    w.group("Add", [w.in_steps(first, node.output), w.in_steps(second, node.output, -1.0)], node, w.steps_of(node.output))


def mul(w: Lowering, node: QuantNode) -> None:
    w.group("Mul", [w.dequantise(w.spec(name)) for name in node.inputs], node, w.spec(node.output))


def average_pool(w: Lowering, node: QuantNode) -> None:
    a = dict(node.attributes)
    if set(a["dilations"]) == {1}:
        del a["dilations"]  # ONNX Runtime's fused average pool refuses the attribute, even where it says nothing
    uneven = bool(a["ceil_mode"]) or (any(a["pads"]) and not a["count_include_pad"])
    _average(w, node, node.output, "AveragePool", a, 0 if uneven or "dilations" in a else math.prod(a["kernel_shape"]))


def global_average_pool(w: Lowering, node: QuantNode) -> None:
    _average(w, node, node.output, "GlobalAveragePool", {}, math.prod(w.spec(node.inputs[0]).shape[2:]))


def _average(w: Lowering, node: QuantNode, output: str, op: str, attributes: dict[str, Any], cells: int) -> None:
    """`cells` is the number every window divides by, 0 where windows differ.

    ONNX Runtime's fused average pools multiply by the reciprocal, so with 7 or 14 cells a tie is no longer a tie (1 step off, 1.32);
    the float pool divides and is exact. Only a power of two may be fused, or where scales make ties an accident anyway.
    """
    mean = w.emit(op, [w.in_steps(node.inputs[0], node.output)], w.fresh(f"{node.output}_mean"), node.name, **attributes)
    if cells and (cells & (cells - 1) == 0 or w.graph.recipe.scheme != "power_of_two"):
        w.quantise(mean, w.steps_of(node.output), output)
    else:
        w.quantise_unfused(mean, w.steps_of(node.output), output)


def reduce_mean(w: Lowering, node: QuantNode) -> None:
    """Over all of space it is a global pool, which ONNX Runtime computes channels last. Elsewhere a whole sum, divided by the quantiser's scale."""
    source, axes, keep = w.spec(node.inputs[0]).shape, node.attributes["axes"], bool(node.attributes["keepdims"])
    cells = math.prod(source[axis] for axis in axes)
    if len(source) > 2 and axes == list(range(2, len(source))):
        pooled = node.output if keep else w.fresh(f"{node.output}_pooled")
        _average(w, node, pooled, "GlobalAveragePool", {}, cells)
        if not keep:
            w.reshaped(pooled, w.spec(node.output).shape, node.output)
        return
    inputs = [w.in_steps(node.inputs[0], node.output), w.whole_numbers(f"{node.output}_axes", axes)]
    total = w.emit("ReduceSum", inputs, w.fresh(f"{node.output}_sum"), node.name, keepdims=int(keep))
    w.quantise(total, w.steps_of(node.output, cells), node.output)


def requantize(w: Lowering, node: QuantNode) -> None:
    """Of two quantisers in a row ONNX Runtime (1.32) removes one, and with it a rounding. A LeakyRelu of slope 1 in between is a table to it: 0.07 ms where
    any float operator takes 0.13 (uint8 1x64x56x56).
    """
    w.group("LeakyRelu", [w.in_steps(node.inputs[0], node.output)], node, w.steps_of(node.output), alpha=1.0)
