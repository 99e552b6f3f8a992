# SPDX-License-Identifier: Apache-2.0
"""One-input functions. An int8 tensor has 256 values, so what an engine gives for each of them can be judged beforehand.

In float32 between a DEQUANTIZE and a QUANTIZE, which XNNPACK runs thirty times as fast as a look-up, wherever that provably gives the table of
`isthmus.tables`: no entry lies so near a tie that another library's last bits decide, or every step is one that IEEE 754 fixes. Else by the
table itself: CAST, ADD 128, GATHER.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from isthmus import tables
from isthmus.graph import QuantNode
from isthmus.targets.tflite.flatbuffer import Quantisation
from isthmus.targets.tflite.lowering import LAST_AXES, Lowering, Order, Placed
from isthmus.targets.tflite.rounding import INT8_MAX, INT8_MIN, is_power_of_two, scale_and_zero

# How far a float32 library's function may lie from the true one, as a share of max(1, |f|): sixteen units in the last place.
LIBRARY_ERROR = 2.0**-20
# As a share of |f|, where nothing in the float form cancels: of Sigmoid XNNPACK and C's library keep two or three units, quantising adds two.
RELATIVE_ERRORS = {"Sigmoid": 2.0**-21, "Silu": 2.0**-21, "Mish": 2.0**-20}
EXP_SQUARED_FITS = 40.0  # exp(40)^2 is a float32
# Products, sums and bounds of float32 alone: the same bits on every engine.
STEPWISE = frozenset({"LeakyRelu", "PRelu", "HardSigmoid", "HardSwish"})
# int8 operators of TFLite whose output quantisation is fixed.
FIXED_OUTPUT = {"Sigmoid": ("LOGISTIC", 1 / 256, INT8_MIN), "Tanh": ("TANH", 1 / 128, 0)}


def lower_function(lowering: Lowering, node: QuantNode) -> None:
    order = values_order(lowering, node)
    source, target = lowering.read(node.inputs[0], order), lowering.write(node.output, order)
    safe = _is_far_from_ties(lowering, node)
    powers = is_power_of_two(scale_and_zero(lowering.graph, node.output)[0])
    fixed = FIXED_OUTPUT.get(node.op)
    if fixed is not None and (safe or not lowering.exact) and scale_and_zero(lowering.graph, node.output) == fixed[1:]:
        lowering.declare(node, safe)
        lowering.writer.operator(fixed[0], 2, [source.index], [target.index])
    elif node.op == "LeakyRelu" and not lowering.exact:
        lowering.declare(node, False)
        lowering.writer.operator("LEAKY_RELU", 2, [source.index], [target.index], "LeakyReluOptions", alpha=float(node.attributes["alpha"]))
    elif _has_float_form(node, target) and (safe or (node.op in STEPWISE and powers)):
        real = lowering.dequantise(source, f"{node.name}/real")
        lowering.quantise(FLOAT_FORMS[node.op](lowering, node, real), target)
    else:
        _look_up(lowering, node, source, target)


def values_order(lowering: Lowering, node: QuantNode) -> Order:
    """Slopes a channel want the channels last; every other function takes what it finds."""
    if node.op != "PRelu" or node.constants[1].size == 1:
        return lowering.elementwise_order(node)
    return Order.LAST if len(lowering.spec(node.output).shape) in LAST_AXES else Order.FORM


def _has_float_form(node: QuantNode, target: Placed) -> bool:
    """PRELU's slopes lie along the file's last axis, which a tensor of five axes does not have as its channels."""
    return node.op != "PRelu" or node.constants[1].size in (1, target.shape[-1])


def _is_far_from_ties(lowering: Lowering, node: QuantNode) -> bool:
    """No value that the function can give, in steps of the output, lies within the library's error of a tie that saturation would not hide."""
    step, zero = scale_and_zero(lowering.graph, node.output)
    x = lowering.spec(node.inputs[0]).dequantise(np.arange(INT8_MIN, INT8_MAX + 1).astype(np.int8))
    with np.errstate(over="ignore", under="ignore"):
        if node.op == "PRelu":
            real = np.where(x < 0, x * node.constants[1].astype(np.float32).reshape(-1, 1), x).astype(np.float64)
        else:
            real = np.asarray(tables.FUNCTIONS[node.op](x, node.attributes), np.float64)
    steps = np.clip(real / step + zero, INT8_MIN - 1.0, INT8_MAX + 1.0)
    relative = RELATIVE_ERRORS.get(node.op)
    error = (LIBRARY_ERROR * np.maximum(1.0, np.abs(real)) if relative is None else relative * np.abs(real)) / step
    return bool(np.all(np.abs(steps - np.floor(steps) - 0.5) > error))


# ---- by the table
def _look_up(lowering: Lowering, node: QuantNode, source: Placed, target: Placed) -> None:
    """GATHER takes no int8 index: the value as int32, plus where its channel's table begins."""
    writer = lowering.writer
    entries = tables.table(node, lowering.graph.tensors)
    start = np.arange(len(entries), dtype=np.int32) * tables.ENTRIES if entries.ndim == 2 else np.zeros(1, np.int32)
    if entries.ndim == 2 and len(target.shape) not in (2, 4):  # not channels last: see `_order`
        start = start.reshape(-1, *([1] * (len(target.shape) - 2)))
    wide, index = (writer.tensor(f"{node.name}/{label}", source.shape, "int32") for label in ("wide", "index"))
    writer.operator("CAST", 1, [source.index], [wide])
    none = writer.enum("ActivationFunctionType", "NONE")
    writer.operator("ADD", 1, [wide, writer.constant(f"{node.name}/start", start - INT8_MIN)], [index], "AddOptions", fusedActivationFunction=none)
    step, zero = scale_and_zero(lowering.graph, node.output)
    table = writer.constant(f"{node.name}/table", entries.reshape(-1), Quantisation((step,), zero))
    writer.operator("GATHER", 2, [table, index], [target.index], "GatherOptions", axis=0)


# ---- in float32
def unary(op: str) -> Callable[[Lowering, QuantNode, Placed], Placed]:
    return lambda lowering, node, x: lowering.float_operator(op, [x.index], x.shape)


def binary(lowering: Lowering, op: str, a: Placed, b: Placed | float, activation: str = "NONE") -> Placed:
    """ADD, SUB or MUL of a tensor and a tensor or number."""
    other = b.index if isinstance(b, Placed) else lowering.number(b)
    fused = lowering.writer.enum("ActivationFunctionType", activation)
    return lowering.float_operator(op, [a.index, other], a.shape, f"{op.capitalize()}Options", fusedActivationFunction=fused)


def bound(lowering: Lowering, op: str, x: Placed, limit: float) -> Placed:
    return lowering.float_operator(op, [x.index, lowering.number(limit)], x.shape, "MaximumMinimumOptions")


def _leaky_relu(lowering: Lowering, node: QuantNode, x: Placed) -> Placed:
    return lowering.float_operator("LEAKY_RELU", [x.index], x.shape, "LeakyReluOptions", alpha=float(node.attributes["alpha"]))


def _p_relu(lowering: Lowering, node: QuantNode, x: Placed) -> Placed:
    slope = node.constants[1].astype(np.float32).reshape(-1)
    slopes = np.broadcast_to(slope, x.shape[-1:]).reshape(*[1] * (len(x.shape) - 2), -1)
    return lowering.float_operator("PRELU", [x.index, lowering.writer.constant(f"{node.name}/slope", slopes)], x.shape)


def _line(lowering: Lowering, x: Placed, slope: float, offset: float) -> Placed:
    """min(max(x * slope + offset, 0), 1)."""
    line = binary(lowering, "ADD", binary(lowering, "MUL", x, slope), offset, "RELU")
    return bound(lowering, "MINIMUM", line, 1.0)


def _hard_sigmoid(lowering: Lowering, node: QuantNode, x: Placed) -> Placed:
    return _line(lowering, x, float(node.attributes["alpha"]), float(node.attributes["beta"]))


def _hard_swish(lowering: Lowering, node: QuantNode, x: Placed) -> Placed:
    return binary(lowering, "MUL", x, _line(lowering, x, 1 / 6, 0.5))


def _silu(lowering: Lowering, node: QuantNode, x: Placed) -> Placed:
    return binary(lowering, "MUL", x, unary("LOGISTIC")(lowering, node, x))


def _softplus(lowering: Lowering, node: QuantNode, x: Placed) -> Placed:
    """max(x, 0) + log(1 + exp(-|x|)): exp cannot overflow."""
    magnitude = unary("ABS")(lowering, node, x)
    small = lowering.float_operator("EXP", [unary("NEG")(lowering, node, magnitude).index], x.shape)
    tail = lowering.float_operator("LOG", [binary(lowering, "ADD", small, 1.0).index], x.shape)
    return binary(lowering, "ADD", unary("RELU")(lowering, node, x), tail)


def _mish(lowering: Lowering, node: QuantNode, x: Placed) -> Placed:
    """x * tanh(softplus(x)) = x * n / (n + 2) with n = e * (e + 2), e = exp(x): one function of a library instead of three, and nothing cancels.
    Long before exp's square overflows float32 the quotient is 1."""
    spec = lowering.spec(node.inputs[0])
    largest = np.inf if spec.scale is None else (INT8_MAX - int(spec.zero_point or 0)) * spec.scale
    e = unary("EXP")(lowering, node, x if largest <= EXP_SQUARED_FITS else bound(lowering, "MINIMUM", x, EXP_SQUARED_FITS))
    n = binary(lowering, "MUL", e, binary(lowering, "ADD", e, 2.0))
    fields = {"fusedActivationFunction": lowering.writer.enum("ActivationFunctionType", "NONE")}
    share = lowering.float_operator("DIV", [n.index, binary(lowering, "ADD", n, 2.0).index], x.shape, "DivOptions", **fields)
    return binary(lowering, "MUL", x, share)


def _gelu(lowering: Lowering, node: QuantNode, x: Placed) -> Placed:
    return lowering.float_operator("GELU", [x.index], x.shape, "GeluOptions", approximate=node.attributes["approximate"] == "tanh")


def elu(lowering: Lowering, node: QuantNode, x: Placed, alpha: float) -> Placed:
    """TFLite's ELU has alpha 1: the negative side alone goes through it."""
    negative = unary("ELU")(lowering, node, bound(lowering, "MINIMUM", x, 0.0))
    return binary(lowering, "ADD", unary("RELU")(lowering, node, x), binary(lowering, "MUL", negative, alpha))


FLOAT_FORMS: Mapping[str, Callable[[Lowering, QuantNode, Placed], Placed]] = {
    "LeakyRelu": _leaky_relu,
    "PRelu": _p_relu,
    "Sigmoid": unary("LOGISTIC"),
    "Tanh": unary("TANH"),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _hard_swish,
    "Silu": _silu,
    "Mish": _mish,
    "Gelu": _gelu,
    "Softplus": _softplus,
    "Elu": lambda lowering, node, x: elu(lowering, node, x, float(node.attributes["alpha"])),
}
