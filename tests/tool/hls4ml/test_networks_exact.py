# SPDX-License-Identifier: Apache-2.0
"""Networks that hls4ml's C simulation computes as the reference does, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from isthmus.form_writer import FormWriter
from isthmus.graph import QuantGraph
from isthmus.recipe import Recipe
from isthmus.targets.hls4ml.stream import SHALLOW


def _convolutions(hls: Any, writer: FormWriter) -> None:
    """Stride, uneven padding, depthwise, groups, dilation, both kinds of clip, one scale a channel, 1x1."""
    weight, bias = hls.random(1)
    y = writer.input("image", (1, 3, 7, 6), scale=2**-4)
    y = writer.conv(y, weight(6, 3, 3, 3), 2**-7, bias(6), scale=2**-2, activation="Relu", strides=(2, 1), pads=(1, 0, 2, 1))
    y = writer.conv(y, weight(6, 1, 3, 3), 2**-6, bias(6), scale=2**-1, pads=(1, 1, 0, 2), group=6)
    y = writer.conv(y, weight(4, 3, 3, 2), 2**-7, None, scale=2**0, activation=("Clip", -40.0, 60.0), group=2, pads=(1, 0, 1, 1))
    y = writer.conv(y, weight(4, 4, 2, 2), 2**-7, bias(4), scale=2**0, dilations=(2, 2), pads=(1, 1, 1, 1), activation=("Clip", 0.0, 90.0))
    scales = np.array([2.0**-7, 2.0**-5, 2.0**-6, 2.0**-7, 2.0**-4], np.float32)
    y = writer.conv(y, weight(5, 4, 1, 1), scales, bias(5), scale=2**1, strides=(2, 2))
    writer.output(y, "map")


def _merges(hls: Any, writer: FormWriter) -> None:
    """A residual, a tensor added to itself, a channel vector; pools that overlap, are padded and overhang; joins and reshapes; two outputs."""
    weight, bias = hls.random(2)
    x = writer.input("merged", (1, 3, 5, 5), scale=2**-3)
    y = writer.conv(x, weight(3, 3, 3, 3), 2**-7, bias(3), scale=2**0, pads=(1, 1, 1, 1))
    y = writer.add(x, y, scale=2**0, activation="Relu")
    y = writer.add(y, y, scale=2**1)
    y = writer.add(y, writer.global_average_pool(y, scale=2**-1), scale=2**1)
    joined = writer.concat(
        [
            writer.average_pool(y, kernel=(3, 3), strides=(1, 1), pads=(1, 1, 1, 1), count_include_pad=0, scale=2**1),
            writer.average_pool(y, kernel=(3, 3), strides=(1, 1), pads=(1, 1, 1, 1), count_include_pad=1, scale=2**1),
            writer.max_pool(y, kernel=(3, 3), strides=(1, 1), pads=(1, 1, 1, 1)),
        ],
        axis=1,
    )
    pooled = writer.max_pool(joined, kernel=(3, 2), strides=(2, 2), pads=(1, 0, 0, 0), ceil_mode=1)
    writer.output(writer.reshape(writer.flatten(pooled), (1, 3, 9, 3)), "reshaped")
    y = writer.gemm(writer.flatten(pooled), weight(7, 81), 2**-7, bias(7), scale=2**4, activation="Relu")
    writer.output(writer.matmul(y, weight(7, 5), 2**-7, scale=2**4), "logits")


def _ties() -> QuantGraph:
    """Every int8 value through every rounding: half steps, coarse steps that drop more bits than there are, finer steps that saturate."""
    writer = FormWriter(recipe=Recipe())
    x = writer.input("x", (1, 2, 8, 16), scale=2**-3)
    identity = np.array([[1, 0], [0, 1], [1, 1], [-1, 1], [3, -5]], np.int8).reshape(5, 2, 1, 1)
    bias = np.array([0, 1, 2, 3, -7], np.int32)
    half = writer.requantize(x, scale=2**-2)
    far = writer.requantize(x, scale=2.0**6)
    outputs = [writer.requantize(x, scale=2**-4), half, far]
    outputs += [writer.relu(x), writer.clip(x, -5.0, 9.0), writer.clip(x, 1.0, 100.0), writer.clip(x, -100.0, -2.0)]
    outputs += [writer.conv(x, identity, 2**-1, bias, scale=2**-2), writer.conv(x, identity, 2**-1, bias, scale=2**-2, activation="Relu")]
    outputs += [writer.conv(x, np.full((1, 2, 1, 1), -128, np.int8), 2**-7, scale=2**-3), writer.conv(x, identity[:1], 2**-1, scale=2.0**9, activation="Relu")]
    outputs += [writer.add(x, half, scale=2**-2), writer.add(half, far, scale=2**3, activation=("Clip", -30.0, 200.0))]
    outputs += [writer.average_pool(x, kernel=kernel, strides=(1, 1), pads=(0, 0, 0, 0), scale=2**-2) for kernel in ((1, 3), (3, 3), (5, 1), (2, 2))]
    for index, tensor in enumerate(outputs):
        writer.output(tensor, f"o{index}")
    return writer.graph()


def _streamed(hls: Any) -> QuantGraph:
    weight, bias = hls.random(5)
    writer = FormWriter(recipe=Recipe())
    y = writer.input("image", (1, 3, 8, 8), scale=2**-4)
    y = writer.conv(y, weight(4, 3, 3, 3), 2**-7, bias(4), scale=2**-2, activation="Relu", strides=(2, 1), pads=(1, 0, 2, 1))
    side = writer.conv(y, weight(4, 1, 3, 3), 2**-6, bias(4), scale=2**-1, pads=(1, 1, 1, 1), group=4)
    y = writer.concat([writer.add(y, side, scale=2**-1, activation="Relu"), side], axis=1)
    y = writer.clip(y, -20.0, 50.0)
    mean = writer.gemm(writer.flatten(writer.global_average_pool(y, scale=2**-3)), weight(5, 8), 2**-7, bias(5), scale=2**-1)  # of 35 pixels
    writer.output(mean, "mean")
    y = writer.max_pool(y, kernel=(2, 3), strides=(2, 3))
    y = writer.average_pool(writer.conv(y, weight(6, 8, 1, 1), 2**-7, bias(6), scale=2**-1, activation="Relu"), kernel=(2, 1), strides=(2, 1), scale=2**-2)
    y = writer.gemm(writer.flatten(y), weight(5, 12), 2**-7, bias(5), scale=2**1)
    writer.output(y, "logits")
    return writer.graph()


def test_operators_are_exact(hls: Any, tools: None, tmp_path: Path) -> None:
    writer = FormWriter(recipe=Recipe())
    _convolutions(hls, writer)
    _merges(hls, writer)
    for name, values in hls.equals_reference(hls.build(writer.graph(), tmp_path / "built", io_type="io_parallel")).items():
        assert values.std() > 0.01, f"{name} is constant: nothing was compared"


def test_every_rounding_is_half_to_even_and_saturates(hls: Any, tools: None, tmp_path: Path) -> None:
    outputs = hls.equals_reference(hls.build(_ties(), tmp_path / "built", io_type="io_parallel"), samples=60)
    assert {-128, 127} <= set(np.unique(outputs["o0"]))


def test_io_stream_is_exact(hls: Any, tools: None, tmp_path: Path) -> None:
    built = hls.build(_streamed(hls), tmp_path / "built", io_type="io_stream", strategy="latency")
    found = hls.equals_reference(built)
    assert found["logits"].std() > 4 and found["mean"].std() > 4
    code = (built[2] / "project/firmware/model.cpp").read_text()
    assert "nnet::global_pooling2d_cl<" in code
    depths = [int(line.rpartition("=")[2]) for line in code.splitlines() if "#pragma HLS STREAM" in line]
    assert SHALLOW in depths and any(SHALLOW < depth < 24 for depth in depths)  # the branch behind which a row of eight waits, of 24 pixels
