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


def _matmul_bias(recipe: Recipe = PORTABLE) -> QuantGraph:
    """A layer on every token of a sequence."""
    maker = _Maker(recipe, (1, 5, 16), 24)
    weight, scales, bias = maker.weight(16, 8), maker.scales(8), maker.bias(8)
    return maker.done(maker.writer.matmul(maker.x, weight, scales, bias, scale=maker.step(-2), zero_point=maker.zero(5), activation="Relu"))


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


def _conv_transpose(
    recipe: Recipe = PORTABLE, shape: Sequence[int] = (1, 4, 5, 4), filters: int = 3, kernel: Sequence[int] = (3, 3), group: int = 1, **more: object
) -> QuantGraph:
    """`filters` are those of one group: the weight's second axis."""
    maker = _Maker(recipe, shape, 11)
    weight, scales, bias = maker.weight(shape[1], filters, *kernel), maker.scales(filters), maker.bias(filters * group)
    y = maker.writer.conv_transpose(maker.x, weight, scales, bias, scale=maker.step(-2), zero_point=maker.zero(6), group=group, **more)  # type: ignore[arg-type]
    return maker.done(y)


def _two(method: str, recipe: Recipe = PORTABLE, exponent: int = -3, **more: object) -> QuantGraph:
    """Two operands with scales of their own, as in `_add`."""
    maker = _Maker(recipe, (1, 4, 5, 5), 12)
    scales = maker.step(-3), maker.step(exponent)
    second = maker.writer.requantize(maker.x, scale=scales[0], zero_point=maker.zero(4))
    return maker.done(getattr(maker.writer, method)(maker.x, second, scale=scales[1], zero_point=maker.zero(9), **more))


def _with_constant(method: str, shape: Sequence[int], recipe: Recipe = PORTABLE, first: bool = False, **more: object) -> QuantGraph:
    """One operand is stored: a positional embedding, a factor a channel."""
    maker = _Maker(recipe, (1, 4, 5, 5), 21)
    steps = maker.step(-4), maker.step(-3)
    stored = maker.writer.constant_int8("stored", maker.random.integers(-128, 128, shape), scale=steps[0], zero_point=maker.zero(7))
    operands = (stored, maker.x) if first else (maker.x, stored)
    return maker.done(getattr(maker.writer, method)(*operands, scale=steps[1], zero_point=maker.zero(-9), **more))


def _concat_constant() -> QuantGraph:
    """A token in front of the others, as in a transformer's encoder."""
    maker = _Maker(ASYMMETRIC, (1, 5, 6), 22)
    scale = float(np.float32(0.0625 * 1.1))
    x = maker.writer.requantize(maker.x, scale=scale, zero_point=-3)
    token = maker.writer.constant_int8("token", maker.random.integers(-128, 128, (1, 1, 6)), scale=scale, zero_point=-3)
    return maker.done(maker.writer.concat([token, x], axis=1))


def _matmul_constant() -> QuantGraph:
    """A stored matrix from the left, which is no weight."""
    maker = _Maker(PORTABLE, (1, 2, 5, 6), 23)
    stored = maker.writer.constant_int8("stored", maker.random.integers(-128, 128, (1, 2, 3, 5)), scale=2.0**-6)
    return maker.done(maker.writer.batch_matmul(stored, maker.x, scale=2.0**-2))


def _batch_matmul(recipe: Recipe = PORTABLE) -> QuantGraph:
    """x times its own transpose, as attention has it."""
    maker = _Maker(recipe, (1, 2, 5, 6), 13)
    other = maker.writer.requantize(maker.writer.transpose(maker.x, (0, 1, 3, 2)), scale=maker.step(-5), zero_point=maker.zero(2))
    return maker.done(maker.writer.batch_matmul(maker.x, other, scale=maker.step(-1), zero_point=maker.zero(-5)))


def _squeeze_excite(recipe: Recipe) -> QuantGraph:
    """A gate a channel: global average, two layers, sigmoid, and a Mul that broadcasts."""
    maker = _Maker(recipe, (1, 8, 4, 4), 14)
    gate = maker.writer.global_average_pool(maker.x, scale=maker.step(-5), zero_point=maker.zero(3))
    gate = maker.writer.conv(gate, maker.weight(2, 8, 1, 1), 2.0**-8, maker.bias(2), scale=2.0**-5, activation="Relu")
    gate = maker.writer.conv(gate, maker.weight(8, 2, 1, 1), 2.0**-8, maker.bias(8), scale=2.0**-4)
    gate = maker.writer.function("Sigmoid", gate, scale=2.0**-8, zero_point=maker.zero(-128))
    return maker.done(maker.writer.mul(maker.x, gate, scale=maker.step(-4), zero_point=maker.zero(-1)))


def _split() -> QuantGraph:
    """Uneven parts, one of which is used twice."""
    maker = _Maker(PORTABLE, (1, 5, 3, 3), 15)
    first, second = maker.writer.split(maker.x, (2, 3))
    again = maker.writer.concat([second, first, second], axis=1)
    return maker.done(again)


def _prelu(recipe: Recipe = PORTABLE, channels: int = 4) -> QuantGraph:
    maker = _Maker(recipe, (1, 4, 5, 5), 16)
    slope = maker.random.choice([0.25, 0.1, -0.5, 1.5], channels).reshape(-1, 1, 1) if channels > 1 else np.array(0.25)
    return maker.done(maker.writer.p_relu(maker.x, slope, scale=maker.step(-4), zero_point=maker.zero(8)))


def _island_inside(op: str) -> QuantGraph:
    """int8, a float operator, int8 again."""
    maker = _Maker(PORTABLE, (1, 4, 8), 17)
    w = maker.writer
    y = w.dequantise(w.requantize(maker.x, scale=2.0**-3))
    if op == "LayerNormalization":
        scale, shift = (w.constant(name, maker.random.uniform(0.5, 1.5, 8).astype(np.float32)) for name in ("gain", "shift"))
        w.float_node(op, [y, scale, shift], ["inside"], "island", axis=-1, epsilon=1e-5)
    else:
        w.float_node(op, [y], ["inside"], "island", axis=-1)
    return maker.done(w.requantize(w.quantise("inside", scale=2.0**-5), scale=2.0**-4))


def _grid_sample() -> QuantGraph:
    """Image and coordinates are both int8 tensors; sampling between them is float."""
    maker = _Maker(PORTABLE, (1, 2, 6, 5), 18)
    w = maker.writer
    grid = w.input("grid", (1, 4, 3, 2), scale=2.0**-6)
    w.float_node("GridSample", [w.dequantise(maker.x), w.dequantise(grid)], ["sampled"], "island", align_corners=1, padding_mode="zeros", mode="linear")
    return maker.done(w.quantise("sampled", scale=2.0**-4))


def _arg_max() -> QuantGraph:
    maker = _Maker(PORTABLE, (1, 5, 3, 3), 19)
    maker.writer.argmax_output(maker.writer.relu(maker.x), "y")
    return maker.writer.graph()


def _function(op: str, recipe: Recipe = PORTABLE, exponent: int = -4, zero_point: int = 0, **attributes: object) -> QuantGraph:
    """Every one of the 256 values, whatever the samples."""
    maker = _Maker(recipe, (1, 4, 5, 5), 20)
    method = maker.writer.silu if op == "Silu" else lambda x, **more: maker.writer.function(op, x, **more)
    return maker.done(method(maker.x, scale=maker.step(exponent), zero_point=zero_point, **attributes))


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
    "matmul_bias": _matmul_bias,
    "matmul_bias_asymmetric": lambda: _matmul_bias(ASYMMETRIC),
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
    "conv_transpose": _conv_transpose,
    "conv_transpose_stride": lambda: _conv_transpose(strides=(2, 3), pads=(1, 0, 1, 1), output_padding=(1, 0)),
    "conv_transpose_group": lambda: _conv_transpose(filters=2, group=2, strides=(2, 2), activation="Relu"),
    "conv_transpose_dilation": lambda: _conv_transpose(dilations=(2, 1), kernel=(2, 3), pads=(1, 1, 0, 2)),
    "conv_transpose_1d": lambda: _conv_transpose(shape=(1, 3, 7), kernel=(4,), strides=(2,), pads=(1, 1)),
    "conv_transpose_asymmetric": lambda: _conv_transpose(ASYMMETRIC, filters=2, group=2, strides=(2, 2), pads=(1, 1, 1, 1)),
    "batch_matmul": _batch_matmul,
    "batch_matmul_asymmetric": lambda: _batch_matmul(ASYMMETRIC),
    "sub": lambda: _two("sub"),
    "sub_asymmetric": lambda: _two("sub", ASYMMETRIC, activation="Relu"),
    "mul": lambda: _two("mul", exponent=-1),
    "mul_asymmetric": lambda: _two("mul", ASYMMETRIC, exponent=-1),
    "add_constant": lambda: _with_constant("add", (1, 4, 5, 5), activation="Relu"),
    "add_constant_asymmetric": lambda: _with_constant("add", (1, 1, 5, 5), ASYMMETRIC),
    "sub_constant": lambda: _with_constant("sub", (1, 1, 1, 1), first=True),
    "mul_constant": lambda: _with_constant("mul", (1, 4, 1, 1)),
    "mul_constant_asymmetric": lambda: _with_constant("mul", (1, 4, 1, 1), ASYMMETRIC),
    "concat_constant": _concat_constant,
    "batch_matmul_constant": _matmul_constant,
    "squeeze_excite": lambda: _squeeze_excite(PORTABLE),
    "squeeze_excite_asymmetric": lambda: _squeeze_excite(ASYMMETRIC),
    "reduce_mean": lambda: _one("reduce_mean", (2, 3), False, scale=2.0**-6),
    "reduce_mean_channels": lambda: _one("reduce_mean", (1,), scale=2.0**-4),
    "reduce_mean_asymmetric": lambda: _one("reduce_mean", (-1,), recipe=ASYMMETRIC, scale=0.07, zero_point=3),
    "split": _split,
    "slice": lambda: _one("slice", (0, -1, 1), (2**31 - 1, -100, 6), (1, 2, 3), (2, -2, 1)),
    "pad": lambda: _one("pad", (0, 0, 1, 0, 0, 1, 2, 3)),
    "pad_value": lambda: _one("pad", (0, 1, 0, 2, 0, 0, 0, 0), -1.53),
    "pad_asymmetric": lambda: _one("pad", (0, 0, 1, 1, 0, 0, 1, 1), recipe=ASYMMETRIC),
    "transpose": lambda: _one("transpose", (0, 2, 3, 1), shape=(1, 3, 4, 2)),
    "squeeze": lambda: _one("squeeze", (-1,), shape=(1, 6, 1)),
    "unsqueeze": lambda: _one("unsqueeze", (2,), shape=(1, 6)),
    "expand": lambda: _one("expand", (1, 3, 4, 5), shape=(1, 3, 1, 1)),
    "depth_to_space": lambda: _one("depth_to_space", 2, shape=(1, 8, 3, 2)),
    "depth_to_space_crd": lambda: _one("depth_to_space", 2, "CRD", shape=(1, 8, 3, 2)),
    "space_to_depth": lambda: _one("space_to_depth", 2, shape=(1, 3, 4, 6)),
    "gather": lambda: _one("gather", [[2, 0], [-1, 2]], 1),
    "resize_nearest": lambda: _one("resize_nearest", (1, 4, 14, 14)),
    "resize_nearest_half_pixel": lambda: _one("resize_nearest", (1, 4, 10, 4), "half_pixel", "round_prefer_floor"),
    "resize_linear": lambda: _one("resize_linear", (1, 4, 14, 14), scale=2.0**-3),
    "resize_linear_align_corners": lambda: _one("resize_linear", (1, 4, 13, 4), "align_corners", scale=2.0**-4),
    "resize_linear_asymmetric": lambda: _one("resize_linear", (1, 4, 28, 14), "asymmetric", recipe=ASYMMETRIC, scale=0.08, zero_point=-9),
    "resize_linear_thirds": lambda: _one("resize_linear", (1, 2, 9, 15), recipe=SYMMETRIC, shape=(1, 2, 3, 5), scale=0.07),
    "leaky_relu": lambda: _function("LeakyRelu", alpha=0.1),
    "leaky_relu_asymmetric": lambda: _function("LeakyRelu", ASYMMETRIC, zero_point=-90, alpha=0.1),
    "prelu": _prelu,
    "prelu_scalar": lambda: _prelu(channels=1),
    "prelu_asymmetric": lambda: _prelu(ASYMMETRIC),
    "sigmoid": lambda: _function("Sigmoid", exponent=-7),
    "sigmoid_asymmetric": lambda: _function("Sigmoid", ASYMMETRIC, -8, -128),
    "tanh": lambda: _function("Tanh", exponent=-7),
    "hard_sigmoid": lambda: _function("HardSigmoid", exponent=-7, alpha=1 / 6, beta=0.5),
    "hard_swish": lambda: _function("HardSwish"),
    "hard_swish_asymmetric": lambda: _function("HardSwish", ASYMMETRIC, -5, -119),
    "silu": lambda: _function("Silu"),
    "silu_asymmetric": lambda: _function("Silu", ASYMMETRIC, -5, -119),
    "mish": lambda: _function("Mish"),
    "gelu": lambda: _function("Gelu"),
    "gelu_tanh": lambda: _function("Gelu", approximate="tanh"),
    "softplus": lambda: _function("Softplus"),
    "elu": lambda: _function("Elu", alpha=0.5),
    "layer_norm_island": lambda: _island_inside("LayerNormalization"),
    "softmax_island": lambda: _island_inside("Softmax"),
    "grid_sample_island": _grid_sample,
    "argmax_tail": _arg_max,
}


def main() -> None:
    for name, make in MODELS.items():
        make().save(FOLDER / f"{name}.onnx")


if __name__ == "__main__":
    main()
