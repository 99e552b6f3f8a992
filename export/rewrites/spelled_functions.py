# SPDX-License-Identifier: Apache-2.0
"""Functions of one number that a model spells out in smaller operators, as the one ONNX operator they are: HardSigmoid, HardSwish, Mish, Gelu,
Softplus. ONNX Runtime's optimiser takes HardSwish and Mish apart, PyTorch's exporter writes Softplus with its threshold.
"""

from __future__ import annotations

import math

import onnx_ir as ir

from isthmus.export.rewrites._edit import NodeRewrite, attributes_of, constant, input_at, new_node, replace

CLOSE = 1e-5  # constants were written in float32, some with six digits
LINEAR_FROM = 20.0  # from here on softplus(x) is x in float32


class SpelledFunctions(NodeRewrite):
    def rewrite(self, graph: ir.Graph, node: ir.Node) -> bool:
        for find in (_hard_sigmoid, _hard_swish, _mish, _softplus, _gelu):
            found = find(node)
            if found is not None:
                replace(graph, [node], [found])  # what stood between is removed where nobody else reads it
                return True
        return False


def _made(op: str, node: ir.Node, value: ir.Value, **attributes: float | str) -> ir.Node:
    return new_node(op, [value], attributes, node.name)


# ---- what the patterns are made of
def _producer(value: ir.Value | None, op: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op else None


def _scalar(value: ir.Value | None) -> float | None:
    held = constant(value)
    return float(held.reshape(-1)[0]) if held is not None and held.size == 1 else None


def _with_number(node: ir.Node | None, op: str) -> tuple[ir.Value, float] | None:
    """The other operand of an Add or Mul of one number, and that number."""
    if node is None or node.op_type != op or len(node.inputs) != 2:
        return None
    for position in (0, 1):
        number, other = _scalar(node.inputs[position]), node.inputs[1 - position]
        if number is not None and other is not None and constant(other) is None:
            return other, number
    return None


def _scaled(node: ir.Node | None) -> tuple[ir.Value, float] | None:
    """x and the factor, of a Mul or Div by one number."""
    if node is not None and node.op_type == "Div" and node.inputs[0] is not None and (divisor := _scalar(input_at(node, 1))):
        return node.inputs[0], 1.0 / divisor
    return _with_number(node, "Mul")


def _pair(node: ir.Node | None, op: str) -> tuple[ir.Value, ir.Value] | None:
    if node is None or node.op_type != op or len(node.inputs) != 2 or node.inputs[0] is None or node.inputs[1] is None:
        return None
    return node.inputs[0], node.inputs[1]


def _orders(node: ir.Node | None, op: str) -> list[tuple[ir.Value, ir.Value]]:
    pair = _pair(node, op)
    return [] if pair is None else [pair, pair[::-1]]


def _is(number: float, expected: float) -> bool:
    return math.isclose(number, expected, rel_tol=CLOSE)


# ---- the patterns: each names the last node
def _ramp(value: ir.Value | None) -> tuple[ir.Value, float, float] | None:
    """clip(x + shift, 0, height): x, shift, height."""
    clip = _producer(value, "Clip")
    if clip is None or _scalar(input_at(clip, 1)) != 0.0:
        return None
    height, moved = _scalar(input_at(clip, 2)), _with_number(None if clip.inputs[0] is None else clip.inputs[0].producer(), "Add")
    return (moved[0], moved[1], height) if moved is not None and height is not None and height > 0 else None


def _hard_sigmoid(node: ir.Node) -> ir.Node | None:
    """clip(x + b, 0, h) / h"""
    scaled = _scaled(node)
    ramp = _ramp(scaled[0]) if scaled is not None else None
    if scaled is None or ramp is None or not _is(scaled[1] * ramp[2], 1.0):
        return None
    return _made("HardSigmoid", node, ramp[0], alpha=1.0 / ramp[2], beta=ramp[1] / ramp[2])


def _hard_swish(node: ir.Node) -> ir.Node | None:
    """x * HardSigmoid(x), or x * clip(x + 3, 0, 6) / 6"""
    for x, gate in _orders(node, "Mul"):
        hard = _producer(gate, "HardSigmoid")
        if hard is not None and hard.inputs[0] is x:
            given = {"alpha": 0.2, "beta": 0.5} | attributes_of(hard)
            return _made("HardSwish", node, x) if _is(given["alpha"], 1 / 6) and _is(given["beta"], 0.5) else None
    scaled = _scaled(node)
    if scaled is None or not _is(scaled[1], 1 / 6):
        return None
    for x, gate in _orders(scaled[0].producer(), "Mul"):
        ramp = _ramp(gate)
        if ramp is not None and ramp[0] is x and (ramp[1], ramp[2]) == (3.0, 6.0):
            return _made("HardSwish", node, x)
    return None


def _mish(node: ir.Node) -> ir.Node | None:
    """x * Tanh(Softplus(x))"""
    for x, gate in _orders(node, "Mul"):
        tanh = _producer(gate, "Tanh")
        soft = _producer(tanh.inputs[0], "Softplus") if tanh is not None else None
        if soft is not None and soft.inputs[0] is x:
            return _made("Mish", node, x)
    return None


def _softplus(node: ir.Node) -> ir.Node | None:
    """Where(x > 20, x, Softplus(x))"""
    if node.op_type != "Where" or len(node.inputs) != 3:
        return None
    condition, x, soft = _producer(node.inputs[0], "Greater"), node.inputs[1], _producer(node.inputs[2], "Softplus")
    if condition is None or soft is None or x is None or soft.inputs[0] is not x or condition.inputs[0] is not x:
        return None
    threshold = _scalar(condition.inputs[1])
    return _made("Softplus", node, x) if threshold is not None and threshold >= LINEAR_FROM else None


def _gelu(node: ir.Node) -> ir.Node | None:
    """x * 0.5 * (1 + gate), the factors in any order"""
    factors = _factors(node, 3)
    numbers = [value for value in factors if isinstance(value, float)]
    values = [value for value in factors if not isinstance(value, float)]
    if len(numbers) != 1 or not _is(numbers[0], 0.5) or len(values) != 2:
        return None
    for x, gate in (values, values[::-1]):
        moved = _with_number(gate.producer(), "Add")
        if moved is None or not _is(moved[1], 1.0):
            continue
        erf, tanh = _producer(moved[0], "Erf"), _producer(moved[0], "Tanh")
        if erf is not None and _is_scaled(erf.inputs[0], x, math.sqrt(0.5)):
            return _made("Gelu", node, x, approximate="none")
        if tanh is not None and _is_cubic(tanh.inputs[0], x):
            return _made("Gelu", node, x, approximate="tanh")
    return None


def _factors(node: ir.Node | None, left: int) -> list[ir.Value | float]:
    """A product of at most `left` factors, taken apart; numbers as numbers."""
    pair = _pair(node, "Mul") or _pair(node, "Div")
    if node is None or pair is None:
        return []
    scaled = _scaled(node)
    if scaled is not None:
        inner = _factors(scaled[0].producer(), left - 1) if left > 2 else []
        return [scaled[1], *(inner if len(inner) == left - 1 else [scaled[0]])]
    if node.op_type == "Div":
        return []
    for first, second in (pair, pair[::-1]):
        inner = _factors(first.producer(), left - 1) if left > 2 else []
        if len(inner) == left - 1:
            return [*inner, second]
    return list(pair)


def _is_scaled(value: ir.Value | None, x: ir.Value, factor: float) -> bool:
    found = _scaled(None if value is None else value.producer())
    return found is not None and found[0] is x and _is(found[1], factor)


def _is_cubic(value: ir.Value | None, x: ir.Value) -> bool:
    """sqrt(2 / pi) * (x + 0.044715 * x^3)"""
    outer = _scaled(None if value is None else value.producer())
    if outer is None or not _is(outer[1], math.sqrt(2.0 / math.pi)):
        return False
    for first, second in _orders(outer[0].producer(), "Add"):
        inner = _scaled(second.producer())
        if first is x and inner is not None and _is(inner[1], 0.044715) and _is_cube(inner[0], x):
            return True
    return False


def _is_cube(value: ir.Value, x: ir.Value) -> bool:
    power = _producer(value, "Pow")
    if power is not None:
        return power.inputs[0] is x and _scalar(input_at(power, 1)) == 3.0
    return any(last is x and _pair(square.producer(), "Mul") == (x, x) for square, last in _orders(value.producer(), "Mul"))
