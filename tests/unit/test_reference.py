# SPDX-License-Identifier: Apache-2.0
"""The integer reference against ONNX Runtime with its optimisations off, which computes the QDQ graph in float as ONNX defines it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from isthmus import kernels, reference
from isthmus.errors import IsthmusError
from isthmus.graph import QuantGraph

MODELS = sorted((Path(__file__).parents[1] / "models").glob("*.onnx"))
SAMPLES = 64


def _plain_session(graph: QuantGraph) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(graph.to_bytes(), options, providers=["CPUExecutionProvider"])


def _noise(graph: QuantGraph) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(1)
    return {spec.name: generator.integers(-128, 128, (SAMPLES, *spec.shape[1:]), np.int8) for spec in graph.inputs}


@pytest.mark.parametrize("file", MODELS, ids=lambda file: file.stem)
def test_equals_onnx_runtime_without_optimisations(file: Path) -> None:
    """Powers of two: every element. Other scales: float32 against float64 may fall on the other side of a tie, by one step."""
    graph = QuantGraph.load(file)
    feeds = _noise(graph)
    expected = reference.run(graph, feeds)
    session = _plain_session(graph)
    for index in range(SAMPLES):
        real = {spec.name: spec.dequantise(feeds[spec.name][index : index + 1]) for spec in graph.inputs}
        for spec, value in zip(graph.outputs, session.run([spec.name for spec in graph.outputs], real), strict=True):
            ours = expected[spec.name][index : index + 1]
            if not spec.is_quantised:
                np.testing.assert_allclose(value, ours, atol=1e-6)
            elif graph.recipe.scheme == "power_of_two":
                np.testing.assert_array_equal(spec.quantise(value), ours)
            else:
                assert np.abs(spec.quantise(value).astype(int) - ours).max() <= 1


@pytest.mark.parametrize("file", [file for file in MODELS if file.stem in ("network", "residual", "average_pool_pad")], ids=lambda file: file.stem)
def test_batches_and_float_feeds_agree(file: Path) -> None:
    graph = QuantGraph.load(file)
    feeds = _noise(graph)
    whole = reference.run(graph, feeds)
    real = {spec.name: spec.dequantise(feeds[spec.name]) for spec in graph.inputs}
    single = [reference.run(graph, {name: array[i : i + 1] for name, array in feeds.items()}) for i in range(3)]
    for name, array in whole.items():
        np.testing.assert_array_equal(reference.run(graph, real)[name], array)
        np.testing.assert_array_equal(np.concatenate([part[name] for part in single]), array[:3])


def test_rounds_half_to_even_and_saturates() -> None:
    values = np.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 1000, -1000])
    np.testing.assert_array_equal(kernels.requantise(values, 1.0, 0, (-128, 127)), [-2, -2, 0, 0, 2, 2, 127, -128])


def test_large_sums_stay_exact() -> None:
    """4,096 products of extremes pass float32's 2^24: the wide accumulator must take over."""
    x = np.full((1, 4096), -128, np.int8)
    weight = np.full((4096, 1), -128, np.int8)
    weight[0, 0] = -127
    assert kernels.matmul_accumulate(x, 0, weight, None)[0, 0] == 4096 * 128 * 128 - 128


def test_wrong_feeds_are_named() -> None:
    graph = QuantGraph.load(next(file for file in MODELS if file.stem == "conv"))
    with pytest.raises(IsthmusError, match="input 'x' is missing"):
        reference.run(graph, {})
    with pytest.raises(IsthmusError, match=r"expected shape \[1, 3, 6, 6\].*found \[1, 3, 6, 5\]"):
        reference.run(graph, {"x": np.zeros((1, 3, 6, 5), np.int8)})
