# SPDX-License-Identifier: Apache-2.0
"""One-input functions as tables: an int8 tensor has 256 values, so quantise(f(dequantise(q))) is 256 entries, exact by construction.

ONNX defines these functions on float32. Each step of the operator's own definition is worked out in float64 and rounded to float32 once: what a
float32 engine computes where its steps are correctly rounded. Engines' exp and tanh are some units in the last place away from that,
which a table shows only where the function's value lies within 1e-6 of a tie between two int8 values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from isthmus.spec import TensorSpec

if TYPE_CHECKING:
    from isthmus.graph import QuantNode

ENTRIES = 256
Function = Callable[[np.ndarray, Mapping[str, Any]], np.ndarray]


def table(node: QuantNode, tensors: Mapping[str, TensorSpec]) -> np.ndarray:
    """int8 (256,), entry q + 128 is the output for input q; PRelu with a slope a channel: int8 (channels, 256)."""
    q = np.arange(-128, 128).astype(np.int8)
    x = tensors[node.inputs[0]].dequantise(q)
    with np.errstate(over="ignore", under="ignore"):  # infinity saturates, as it does in an engine
        if node.op == "PRelu":
            slope = node.constants[1].astype(np.float32).reshape(-1, 1)
            real = np.where(x < 0, x * slope, x)
            real = real[0] if len(slope) == 1 else real
        else:
            real = FUNCTIONS[node.op](x, node.attributes)
        return tensors[node.output].quantise(real)


def look_up(entries: np.ndarray, x: np.ndarray) -> np.ndarray:
    """x int8 (N, C, ...) through a table of (256,), or of (C, 256) by channel."""
    index = x.view(np.uint8) ^ np.uint8(128)  # q + 128
    channels = np.arange(len(entries)).reshape(-1, *([1] * (x.ndim - 2)))
    found: np.ndarray = entries[index] if entries.ndim == 1 else entries[channels, index]
    return found


def _single(values: np.ndarray) -> np.ndarray:
    """One rounding to float32, the values continue in float64."""
    return values.astype(np.float32).astype(np.float64)


def _logistic(x: np.ndarray) -> np.ndarray:
    return _single(1.0 / (1.0 + np.exp(-x)))


def _leaky_relu(x: np.ndarray, attributes: Mapping[str, Any]) -> np.ndarray:
    return np.where(x < 0, x * np.float32(attributes["alpha"]), x)


def _hard_sigmoid(x: np.ndarray, attributes: Mapping[str, Any]) -> np.ndarray:
    line = x * np.float32(attributes["alpha"]) + np.float32(attributes["beta"])
    clipped: np.ndarray = np.clip(line, np.float32(0), np.float32(1))
    return clipped


def _hard_swish(x: np.ndarray, attributes: Mapping[str, Any]) -> np.ndarray:
    gated: np.ndarray = x * _hard_sigmoid(x, {"alpha": 1 / 6, "beta": 0.5})
    return gated


def _gelu(x: np.ndarray, attributes: Mapping[str, Any]) -> np.ndarray:
    wide = x.astype(np.float64)
    if attributes["approximate"] == "tanh":
        return 0.5 * wide * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (wide + 0.044715 * wide**3)))
    return 0.5 * wide * (1.0 + np.array([math.erf(value) for value in wide / math.sqrt(2.0)]))


def _softplus(x: np.ndarray) -> np.ndarray:
    return _single(np.logaddexp(0.0, x))


FUNCTIONS: dict[str, Function] = {
    "LeakyRelu": _leaky_relu,
    "Sigmoid": lambda x, _: _logistic(x.astype(np.float64)),
    "Tanh": lambda x, _: np.tanh(x.astype(np.float64)),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _hard_swish,
    "Silu": lambda x, _: x * _logistic(x.astype(np.float64)),
    "Mish": lambda x, _: x * _single(np.tanh(_softplus(x.astype(np.float64)))),
    "Gelu": _gelu,
    "Softplus": lambda x, _: _softplus(x.astype(np.float64)),
    "Elu": lambda x, a: np.where(x < 0, np.float64(np.float32(a["alpha"])) * _single(np.expm1(x.astype(np.float64))), x),
}
