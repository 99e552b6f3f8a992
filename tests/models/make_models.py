# SPDX-License-Identifier: Apache-2.0
"""Writes one tiny int8 form an operator (and a few small networks) beside this file: `python tests/models/make_models.py`.

Weights and biases are random but fixed, and large enough to saturate; scales are chosen so that ties and both clamps occur.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from isthmus.form_writer import FormWriter
from isthmus.graph import QuantGraph
from isthmus.recipe import Recipe

FOLDER = Path(__file__).parent
PORTABLE = Recipe()
SYMMETRIC = Recipe(name="symmetric", scheme="symmetric", per_channel=True)
ASYMMETRIC = Recipe(name="asymmetric", scheme="asymmetric", per_channel=True)


class _Maker:
    """A writer with random constants."""

    def __init__(self, recipe: Recipe, shape: Sequence[int], seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.asymmetric = recipe.scheme == "asymmetric"
        self.portable = recipe.scheme == "power_of_two"
        self.writer = FormWriter(recipe)
        self.x = self.writer.input("x", shape, scale=self.step(-4), zero_point=self.zero(-3))

    def step(self, exponent: int) -> float:
        """2^exponent where scales are powers of two, a number near it elsewhere."""
        return 2.0**exponent if self.portable else float(2.0**exponent * self.random.uniform(0.75, 1.3))

    def zero(self, offset: int) -> int:
        return offset if self.asymmetric else 0

    def weight(self, *shape: int) -> np.ndarray:
        return self.random.integers(-127, 128, shape).astype(np.int8)

    def scales(self, channels: int, exponent: int = -8) -> np.ndarray | float:
        return 2.0**exponent if self.portable else np.array([self.step(exponent) for _ in range(channels)], np.float32)

    def bias(self, channels: int) -> np.ndarray:
        return self.random.integers(-4000, 4001, channels).astype(np.int32)

    def conv(self, x: str, depth: int, filters: int, kernel: Sequence[int], **more: object) -> str:
        scale = self.step(-2)
        return self.writer.conv(x, self.weight(filters, depth, *kernel), self.scales(filters), self.bias(filters), scale=scale, zero_point=self.zero(5), **more)  # type: ignore[arg-type]

    def done(self, tensor: str) -> QuantGraph:
        self.writer.output(tensor, "y")
        return self.writer.graph()


def _conv(
    recipe: Recipe = PORTABLE, shape: Sequence[int] = (1, 3, 6, 6), depth: int = 3, filters: int = 4, kernel: Sequence[int] = (3, 3), **more: object
) -> QuantGraph:
    maker = _Maker(recipe, shape, 1)
    return maker.done(maker.conv(maker.x, depth, filters, kernel, **more))


def _gemm(recipe: Recipe = PORTABLE, **more: object) -> QuantGraph:
    maker = _Maker(recipe, (1, 16), 2)
    scale = maker.step(-2)
    return maker.done(maker.writer.gemm(maker.x, maker.weight(10, 16), maker.scales(10), maker.bias(10), scale=scale, zero_point=maker.zero(-7), **more))  # type: ignore[arg-type]


def _matmul() -> QuantGraph:
    maker = _Maker(PORTABLE, (1, 16), 3)
    return maker.done(maker.writer.matmul(maker.x, maker.weight(16, 8), 2.0**-8, scale=2.0**-2))


def _add(recipe: Recipe = PORTABLE, **more: object) -> QuantGraph:
    """The second operand has another scale, so that one of them must be shifted; the result is coarser, so that ties occur."""
    maker = _Maker(recipe, (1, 4, 5, 5), 4)
    scales = maker.step(-3), maker.step(-3)
    second = maker.writer.requantize(maker.x, scale=scales[0], zero_point=maker.zero(4))
    return maker.done(maker.writer.add(maker.x, second, scale=scales[1], zero_point=maker.zero(9), **more))  # type: ignore[arg-type]


def _one(method: str, *arguments: object, recipe: Recipe = PORTABLE, shape: Sequence[int] = (1, 4, 7, 7), **more: object) -> QuantGraph:
    maker = _Maker(recipe, shape, 5)
    return maker.done(getattr(maker.writer, method)(maker.x, *arguments, **more))


def _concat() -> QuantGraph:
    maker = _Maker(PORTABLE, (1, 3, 4, 4), 6)
    other = maker.writer.conv(maker.x, maker.weight(2, 3, 1, 1), 2.0**-7, None, scale=2.0**-4)
    return maker.done(maker.writer.concat([maker.x, other], axis=1))


def _flatten_gemm() -> QuantGraph:
    """Channels-last targets must permute this weight."""
    maker = _Maker(PORTABLE, (1, 3, 4, 4), 7)
    flat = maker.writer.flatten(maker.conv(maker.x, 3, 3, (3, 3), pads=(1, 1, 1, 1)))
    return maker.done(maker.writer.gemm(flat, maker.weight(5, 48), 2.0**-9, maker.bias(5), scale=2.0**-1))


def _softmax_tail() -> QuantGraph:
    maker = _Maker(PORTABLE, (1, 16), 8)
    logits = maker.writer.gemm(maker.x, maker.weight(10, 16), 2.0**-9, maker.bias(10), scale=2.0**-3)
    maker.writer.softmax_output(logits, "y")
    return maker.writer.graph()


def _network(recipe: Recipe) -> QuantGraph:
    """Convolutions, a pool, a global average and a layer: the shape of a classifier."""
    maker = _Maker(recipe, (1, 1, 8, 8), 9)
    y = maker.conv(maker.x, 1, 4, (3, 3), pads=(1, 1, 1, 1), activation="Relu")
    y = maker.writer.max_pool(y, (2, 2))
    y = maker.conv(y, 4, 8, (3, 3), pads=(1, 1, 1, 1), activation="Relu")
    y = maker.writer.global_average_pool(y, scale=maker.step(-3), zero_point=maker.zero(-20))
    y = maker.writer.flatten(y)
    return maker.done(maker.writer.gemm(y, maker.weight(10, 8), maker.scales(10), maker.bias(10), scale=maker.step(-2), zero_point=maker.zero(2)))


def _residual(recipe: Recipe) -> QuantGraph:
    maker = _Maker(recipe, (1, 4, 6, 6), 10)
    branch = maker.conv(maker.x, 4, 4, (3, 3), pads=(1, 1, 1, 1), activation="Relu")
    branch = maker.conv(branch, 1, 4, (3, 3), pads=(1, 1, 1, 1), group=4)
    return maker.done(maker.writer.add(maker.x, branch, scale=maker.step(-2), zero_point=maker.zero(-11), activation="Relu"))


MODELS: dict[str, Callable[[], QuantGraph]] = {
    "conv": _conv,
    "conv_relu": lambda: _conv(activation="Relu"),
    "conv_clip": lambda: _conv(activation=("Clip", 0.0, 6.0)),
    "conv_stride": lambda: _conv(strides=(2, 2), pads=(1, 1, 1, 1)),
    "conv_same": lambda: _conv(pads=(1, 1, 1, 1)),
    "conv_pad_uneven": lambda: _conv(pads=(0, 1, 2, 1), strides=(2, 1)),
    "conv_group": lambda: _conv(shape=(1, 4, 6, 6), depth=2, filters=6, group=2),
    "conv_depthwise": lambda: _conv(shape=(1, 4, 6, 6), depth=1, filters=4, group=4, pads=(1, 1, 1, 1)),
    "conv_dilation": lambda: _conv(dilations=(2, 2), pads=(2, 2, 2, 2)),
    "conv_1d": lambda: _conv(shape=(1, 3, 12), kernel=(3,), pads=(1, 1)),
    "conv_symmetric": lambda: _conv(SYMMETRIC, pads=(1, 1, 1, 1), activation="Relu"),
    "conv_asymmetric": lambda: _conv(ASYMMETRIC, pads=(1, 1, 1, 1), activation="Relu"),
    "gemm": _gemm,
    "gemm_relu": lambda: _gemm(activation="Relu"),
    "gemm_symmetric": lambda: _gemm(SYMMETRIC),
    "gemm_asymmetric": lambda: _gemm(ASYMMETRIC),
    "matmul": _matmul,
    "add": _add,
    "add_relu": lambda: _add(activation="Relu"),
    "add_asymmetric": lambda: _add(ASYMMETRIC),
    "max_pool": lambda: _one("max_pool", (2, 2)),
    "max_pool_ceil": lambda: _one("max_pool", (2, 2), ceil_mode=1),
    "max_pool_pad": lambda: _one("max_pool", (3, 3), (2, 2), (1, 1, 1, 1)),
    "average_pool": lambda: _one("average_pool", (2, 2), scale=2.0**-4),
    "average_pool_pad": lambda: _one("average_pool", (3, 3), (2, 2), (1, 1, 1, 1), scale=2.0**-4),
    "average_pool_count_pad": lambda: _one("average_pool", (2, 2), (2, 2), (1, 1, 0, 0), count_include_pad=1, scale=2.0**-5),
    "average_pool_asymmetric": lambda: _one("average_pool", (2, 2), recipe=ASYMMETRIC, scale=0.07, zero_point=3),
    "global_average_pool": lambda: _one("global_average_pool", shape=(1, 4, 4, 4), scale=2.0**-5),
    "relu": lambda: _one("relu"),
    "clip": lambda: _one("clip", -1.0, 3.5),
    "flatten": lambda: _one("flatten", shape=(1, 3, 2, 2)),
    "reshape": lambda: _one("reshape", (1, 6, 2), shape=(1, 3, 2, 2)),
    "concat": _concat,
    "requantize": lambda: _one("requantize", scale=2.0**-3),
    "flatten_gemm": _flatten_gemm,
    "softmax_tail": _softmax_tail,
    "network": lambda: _network(PORTABLE),
    "network_symmetric": lambda: _network(SYMMETRIC),
    "network_asymmetric": lambda: _network(ASYMMETRIC),
    "residual": lambda: _residual(PORTABLE),
}


def main() -> None:
    for name, make in MODELS.items():
        make().save(FOLDER / f"{name}.onnx")


if __name__ == "__main__":
    main()
