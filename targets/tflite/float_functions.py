# SPDX-License-Identifier: Apache-2.0
"""Float islands of one operand: the functions of the form and what else of one number TFLite can compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from isthmus.graph import QuantNode
from isthmus.targets.tflite.functions import FLOAT_FORMS, binary, bound, elu, unary, values_order
from isthmus.targets.tflite.lowering import Lowering, Placed

Form = Callable[[Lowering, QuantNode, Placed], Placed]
# Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26: |error| <= 1.5e-7. TFLite has no error function.
ERF_SCALE = 0.3275911
ERF_POLYNOMIAL = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)


def lower_function(lowering: Lowering, node: QuantNode) -> None:
    order = values_order(lowering, node)
    source = lowering.read(node.inputs[0], order)
    lowering.settle(node.output, order, FORMS[node.op](lowering, node, source))


def _reciprocal(lowering: Lowering, node: QuantNode, x: Placed) -> Placed:
    one = Placed(lowering.number(1.0), (1,))
    return _quotient(lowering, one, x, x)


def _quotient(lowering: Lowering, a: Placed, b: Placed, like: Placed) -> Placed:
    none = lowering.writer.enum("ActivationFunctionType", "NONE")
    return lowering.float_operator("DIV", [a.index, b.index], like.shape, "DivOptions", fusedActivationFunction=none)


def _softsign(lowering: Lowering, node: QuantNode, x: Placed) -> Placed:
    return _quotient(lowering, x, binary(lowering, "ADD", unary("ABS")(lowering, node, x), 1.0), x)


def _selu(lowering: Lowering, node: QuantNode, x: Placed) -> Placed:
    alpha, gamma = (float(node.attributes.get(name, default)) for name, default in (("alpha", 1.6732632423543772), ("gamma", 1.0507009873554805)))
    return binary(lowering, "MUL", elu(lowering, node, x, alpha), gamma)


def _celu(lowering: Lowering, node: QuantNode, x: Placed) -> Placed:
    """max(x, 0) + alpha * (exp(min(x, 0) / alpha) - 1)."""
    alpha = float(node.attributes.get("alpha", 1.0))
    negative = unary("ELU")(lowering, node, binary(lowering, "MUL", bound(lowering, "MINIMUM", x, 0.0), 1.0 / alpha))
    return binary(lowering, "ADD", unary("RELU")(lowering, node, x), binary(lowering, "MUL", negative, alpha))


def _erf(lowering: Lowering, node: QuantNode, x: Placed) -> Placed:
    """sign(x) * (1 - p(t) * exp(-x^2)), t = 1 / (1 + scale * |x|)."""
    magnitude = unary("ABS")(lowering, node, x)
    t = _reciprocal(lowering, node, binary(lowering, "ADD", binary(lowering, "MUL", magnitude, ERF_SCALE), 1.0))
    value = binary(lowering, "MUL", t, ERF_POLYNOMIAL[0])
    for coefficient in ERF_POLYNOMIAL[1:]:
        value = binary(lowering, "MUL", binary(lowering, "ADD", value, coefficient), t)
    decay = unary("EXP")(lowering, node, unary("NEG")(lowering, node, unary("SQUARE")(lowering, node, x)))
    rest = binary(lowering, "ADD", unary("NEG")(lowering, node, binary(lowering, "MUL", value, decay)), 1.0)
    return binary(lowering, "MUL", unary("SIGN")(lowering, node, x), rest)


FORMS: Mapping[str, Form] = {
    **FLOAT_FORMS,
    **{op: unary(op.upper()) for op in ("Exp", "Log", "Sqrt", "Abs", "Neg", "Floor", "Ceil", "Round", "Sign", "Sin", "Cos")},
    "Erf": _erf,
    "Reciprocal": _reciprocal,
    "Softsign": _softsign,
    "Selu": _selu,
    "Celu": _celu,
}
