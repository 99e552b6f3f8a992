# SPDX-License-Identifier: Apache-2.0
"""Operators that a dialect's parser has not, written in smaller ones: each as ONNX defines it, on float values."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from isthmus.graph import QuantNode
from isthmus.onnx_writer import OnnxWriter


class _Chain:
    """Emits the operators of one spelling; nodes are named `<node>_<operator>`, so that a message of TensorRT names the layer they stand for."""

    def __init__(self, writer: OnnxWriter, node: QuantNode) -> None:
        self.writer, self.node = writer, node

    def __call__(self, op: str, *inputs: str, output: str = "", **attributes: object) -> str:
        name = output or self.writer.fresh(f"{self.node.output}_{op.lower()}")
        return self.writer.emit(op, list(inputs), name, f"{self.node.name}_{op}", **attributes)

    def number(self, value: float) -> str:
        return self.writer.constant(f"number_{float(np.float32(value)).hex()}", np.array(value, np.float32))


def _hard_swish(writer: OnnxWriter, node: QuantNode, x: str) -> str:
    """x * HardSigmoid(x, 1/6, 1/2)."""
    chain = _Chain(writer, node)
    return chain("Mul", x, chain("HardSigmoid", x, alpha=1 / 6, beta=0.5))


def _mish(writer: OnnxWriter, node: QuantNode, x: str) -> str:
    """x * tanh(softplus(x))."""
    chain = _Chain(writer, node)
    return chain("Mul", x, chain("Tanh", chain("Softplus", x)))


def _gelu(writer: OnnxWriter, node: QuantNode, x: str) -> str:
    """x / 2 * (1 + erf(x / sqrt 2)), or its approximation by tanh."""
    chain = _Chain(writer, node)
    if node.attributes.get("approximate") == "tanh":
        cube = chain("Mul", chain("Mul", x, x), x)
        inner = chain("Mul", chain("Add", x, chain("Mul", cube, chain.number(0.044715))), chain.number(math.sqrt(2 / math.pi)))
        bent = chain("Tanh", inner)
    else:
        bent = chain("Erf", chain("Mul", x, chain.number(math.sqrt(0.5))))
    return chain("Mul", chain("Mul", x, chain.number(0.5)), chain("Add", bent, chain.number(1.0)))


SPELLINGS: dict[str, Callable[[OnnxWriter, QuantNode, str], str]] = {"HardSwish": _hard_swish, "Mish": _mish, "Gelu": _gelu}


def spell_layer_normalization(writer: OnnxWriter, node: QuantNode, inputs: Sequence[str], rank: int) -> None:
    """A float island: (x - mean) / sqrt(variance + epsilon) * scale + bias over the last axes. ReduceMean with its axes as an attribute, as before opset 18."""
    chain = _Chain(writer, node)
    axis = int(node.attributes.get("axis", -1)) % rank
    axes = list(range(axis, rank))
    centred = chain("Sub", inputs[0], chain("ReduceMean", inputs[0], axes=axes, keepdims=1))
    variance = chain("ReduceMean", chain("Mul", centred, centred), axes=axes, keepdims=1)
    deviation = chain("Sqrt", chain("Add", variance, chain.number(node.attributes.get("epsilon", 1e-5))))
    parts = [chain("Div", centred, deviation)]
    for op, parameter in zip(("Mul", "Add"), inputs[1:], strict=False):
        last = parameter is inputs[-1]
        parts.append(chain(op, parts[-1], parameter, output=node.output if last else ""))
