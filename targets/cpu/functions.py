# SPDX-License-Identifier: Apache-2.0
"""Functions of one number, which the form defines by tables of 256 entries: ONNX Runtime's own code where it gives that table, a look-up otherwise.

Measured with ONNX Runtime 1.32 on uint8 1x64x56x56, one thread, ms added to two 1x1 convolutions with the function in between:

| how | ms |
|---|---|
| DequantizeLinear, Sigmoid or LeakyRelu, QuantizeLinear: fused into a table look-up | 0.07 |
| DequantizeLinear, Tanh, QuantizeLinear | 0.18 |
| ... HardSwish (HardSigmoid, Mul) | 0.20 |
| HardSwish as an integer product (Clip, QLinearMul) | 0.09 |
| ... Silu (Sigmoid, Mul) | 0.24 |
| ... Gelu; PRelu as Mul and Max | 0.56 |
| ... Mish by Exp and a division | 0.70 |
| ... PRelu | 1.56 |
| ... Mish, Softplus (alone, not between convolutions) | 2.9, 2.7 |
| Cast, GatherElements from the table | 0.41 |
| Cast, Gather from the table | 2.17 |

Sigmoid, LeakyRelu, Tanh (2 Sigmoid(2x) - 1, where the zero point moves so far), HardSigmoid, HardSwish and Silu are written as functions, where every
entry is the table's on any machine: LeakyRelu is one rounding; HardSigmoid and HardSwish are checked with and without fused multiply-add; of the others no
entry may lie nearer to a tie than ten times the error of an engine's exp. Where 3 is a whole number of steps, HardSwish is x times a clipped copy of x with
another zero point. The rest, and what fails its check, is looked up: exact whatever the function is.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from onnx import TensorProto

from isthmus.graph import QuantNode
from isthmus.spec import TensorSpec
from isthmus.tables import ENTRIES, FUNCTIONS, table
from isthmus.targets.cpu.lowering import SHIFT, Lowering

ROWS = 64  # of a look-up: threads share rows
VALUES = np.arange(-128, 128).astype(np.int8)
ENGINE_ERROR = 1e-6  # of exp, logistic and tanh in float32, absolute and relative: ten times the largest seen
QUANTISER_ERROR = 1e-4  # steps: value / scale in float32, up to 256 steps


def function(w: Lowering, node: QuantNode) -> None:
    source, result = w.spec(node.inputs[0]), w.spec(node.output)
    if node.op == "LeakyRelu" or (node.op == "PRelu" and node.constants[1].size == 1):
        slope = node.attributes["alpha"] if node.op == "LeakyRelu" else float(node.constants[1].reshape(()))
        w.group("LeakyRelu", [w.dequantise(source)], node, result, alpha=slope)
    elif node.op in ("Sigmoid", "Tanh") and _far_from_ties(node, source, result):
        _logistic(w, node, source, result)
    elif node.op == "Silu" and _far_from_ties(node, source, result):
        value = w.dequantise(source)
        gate = w.emit("Sigmoid", [value], w.fresh(f"{node.output}_gate"), f"{node.name}_Sigmoid")
        w.group("Mul", [value, gate], node, result)
    elif node.op == "HardSwish" and (product := _product(node, source, result)) is not None:
        _hard_swish(w, node, *product)
    elif node.op in ("HardSigmoid", "HardSwish") and _fused_alike(node, source, result):
        attributes = node.attributes if node.op == "HardSigmoid" else {}
        w.group(node.op, [w.dequantise(source)], node, result, **attributes)
    else:
        _looked_up(w, node, source)


def _logistic(w: Lowering, node: QuantNode, source: TensorSpec, result: TensorSpec) -> None:
    """Sigmoid, or Tanh by it: tanh(x) = 2 Sigmoid(2x) - 1, and the 1 goes into the zero point where it is a whole number of steps and fits."""
    scale, zero = float(result.scale or 1), int(result.zero_point or 0)
    if node.op == "Tanh":
        steps = 1.0 / scale
        if not (steps.is_integer() and zero + SHIFT - steps >= 0):
            w.group("Tanh", [w.dequantise(source)], node, result)
            return
        source, result = replace(source, scale=2.0 * float(source.scale or 0)), replace(result, scale=scale / 2, zero_point=zero - int(steps))
    w.group("Sigmoid", [w.dequantise(source)], node, result)


def _product(node: QuantNode, source: TensorSpec, result: TensorSpec) -> tuple[int, float] | None:
    """(steps in 3, divisor): HardSwish in steps is (q - z) * (clip(q, z - steps, z + steps) - (z - steps)) / divisor. None where that is not the table.

    Node by node there is a true division; QLinearMul multiplies by a rounded reciprocal, and adds the zero point before it rounds: all orders must agree.
    """
    scale, zero, target = float(source.scale or 1), int(source.zero_point or 0), int(result.zero_point or 0) + SHIFT
    steps, divisor = round(3.0 / scale), np.float32(6.0 * float(result.scale or 1) / scale**2)
    if steps * scale != 3.0 or zero + SHIFT < steps:
        return None
    q = VALUES.astype(np.int64) - zero
    exact = (q * (np.clip(q, -steps, steps) + steps)).astype(np.float32)
    reciprocal, zero_point = np.float32(1) / divisor, np.float32(target)
    ways = (
        np.rint(exact / divisor) + zero_point,
        np.rint(exact * reciprocal + zero_point),
        np.rint(exact * reciprocal) + zero_point,
        np.rint((exact.astype(np.float64) * reciprocal + zero_point).astype(np.float32)),  # fused multiply-add
    )
    wanted = table(node, {source.name: source, result.name: result}).astype(np.float32) + SHIFT
    return (steps, float(divisor)) if all(np.array_equal(np.clip(way, 0, 255), wanted) for way in ways) else None


def _hard_swish(w: Lowering, node: QuantNode, steps: int, divisor: float) -> None:
    source, result = w.spec(node.inputs[0]), w.spec(node.output)
    zero = int(source.zero_point or 0)
    bounds = [w.constant(f"uint8_{bound}", np.array(bound, np.uint8)) for bound in (zero + SHIFT - steps, min(zero + SHIFT + steps, 255))]
    gate = w.emit("Clip", [source.name, *bounds], w.fresh(f"{node.output}_gate"), f"{node.name}_Clip")
    real = [w.dequantise(replace(source, scale=1.0)), w.dequantise(replace(source, name=gate, scale=1.0, zero_point=zero - steps))]
    w.group("Mul", real, node, replace(result, scale=divisor))


def _looked_up(w: Lowering, node: QuantNode, source: TensorSpec) -> None:
    """GatherElements along rows of indices; a table a channel, or one that every row shares (ONNX Runtime copies it once, when the file is loaded)."""
    entries = (table(node, w.graph.tensors).astype(np.int16) + SHIFT).astype(np.uint8)
    if entries.ndim == 2:
        rows = source.shape[0] * source.shape[1]
        held = w.constant(f"{node.output}_table", np.tile(entries, (source.shape[0], 1)))
    else:
        rows = math.gcd(source.size, ROWS)
        held = w.constant(f"{node.output}_table", entries.reshape(1, ENTRIES))
        held = w.emit("Expand", [held, w.whole_numbers(f"{node.output}_table_shape", [rows, ENTRIES])], w.fresh(f"{node.output}_tables"))
    indices = w.emit("Cast", [source.name], w.fresh(f"{source.name}_index"), to=TensorProto.INT32)
    found = w.emit("GatherElements", [held, w.reshaped(indices, [rows, source.size // rows])], w.fresh(f"{node.output}_found"), node.name, axis=1)
    w.reshaped(found, source.shape, node.output)


def _far_from_ties(node: QuantNode, source: TensorSpec, result: TensorSpec) -> bool:
    """Whether an error of the engine's function cannot decide a rounding; entries that are clamped anyway do not matter."""
    real, scale, zero = source.dequantise(VALUES), float(result.scale or 1), int(result.zero_point or 0)
    with np.errstate(over="ignore"):
        steps = FUNCTIONS[node.op](real, node.attributes).astype(np.float64) / scale
    slack = ENGINE_ERROR * np.maximum(1.0, np.abs(real)) / scale + QUANTISER_ERROR
    clamped = (steps + zero < -128.5 - slack) | (steps + zero > 127.5 + slack)
    return bool((clamped | (np.abs(steps - np.floor(steps) - 0.5) > slack)).all())


def _fused_alike(node: QuantNode, source: TensorSpec, result: TensorSpec) -> bool:
    """Whether alpha * x + beta with one rounding (a machine's fused multiply-add) gives the same table as with two."""
    alpha, beta = (1 / 6, 0.5) if node.op == "HardSwish" else (node.attributes["alpha"], node.attributes["beta"])
    real = source.dequantise(VALUES)
    line = real.astype(np.float64) * np.float64(np.float32(alpha)) + np.float64(np.float32(beta))
    gate = np.clip(line.astype(np.float32), np.float32(0), np.float32(1))
    fused = result.quantise(real * gate if node.op == "HardSwish" else gate)
    return bool(np.array_equal(fused, table(node, {source.name: source, result.name: result})))
