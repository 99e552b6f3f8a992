# SPDX-License-Identifier: Apache-2.0
"""What every test of the hls4ml target and its C simulation uses: a build, its session, the comparison with the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus import reference
from isthmus.form_writer import FormWriter
from isthmus.graph import QuantGraph
from isthmus.plan import BuildPlan, execute
from isthmus.profile import load_profile
from isthmus.recipe import Recipe
from isthmus.runtimes.csim import CsimSession, open_session
from isthmus.targets.hls4ml import TARGET

SAMPLES = 40
Built = tuple[QuantGraph, BuildPlan, Path]


class Hls:
    """From a graph to its outputs."""

    profile = load_profile("pynq-z2")

    def random(self, seed: int) -> tuple[Callable[..., np.ndarray], Callable[..., np.ndarray]]:
        """(weights(*shape), bias(filters)) over the whole range of int8, and of a few output steps."""
        generator = np.random.default_rng(seed)
        return lambda *shape: generator.integers(-128, 128, shape).astype(np.int8), lambda filters: generator.integers(-3000, 3000, filters).astype(np.int32)

    def one(self, make: Callable[[FormWriter, str], str], shape: tuple[int, ...] = (1, 2, 6, 6), **recipe: Any) -> QuantGraph:
        """A graph of what `make` makes of one input."""
        writer = FormWriter(recipe=Recipe(**recipe))
        writer.output(make(writer, writer.input("x", shape, scale=2**-4)), "y")
        return writer.graph()

    def plan(self, graph: QuantGraph, **options: Any) -> BuildPlan:
        assert TARGET.check(graph, self.profile) == []
        return TARGET.plan(graph, self.profile, options)

    def build(self, graph: QuantGraph, folder: Path, **options: Any) -> Built:
        plan = self.plan(graph, **options)
        folder.mkdir()
        statuses = [(result.name, result.status) for result in execute(plan, folder)]
        assert statuses == [("convert", "done"), ("csim", "done"), ("synthesis", "planned")]
        return graph, plan, folder

    def open(self, built: Built) -> CsimSession:
        _, plan, folder = built
        return open_session(
            folder, {"artifact": plan.artifact, "inputs": [spec.to_json() for spec in plan.inputs], "outputs": [spec.to_json() for spec in plan.outputs]}
        )

    def equals_reference(self, built: Built, samples: int = SAMPLES) -> dict[str, np.ndarray]:
        """Every element of every output, over random samples and both extremes. Gives the outputs."""
        graph = built[0]
        generator = np.random.default_rng(1)
        batch = graph.inputs[0].shape[0]
        feeds = {spec.name: generator.integers(-128, 128, (samples * batch, *spec.shape[1:])).astype(np.int8) for spec in graph.inputs}
        for array in feeds.values():
            array[:batch], array[batch : 2 * batch] = -128, 127
        expected = reference.run(graph, feeds)
        with self.open(built) as session:
            parts = [session.run_quantised({name: array[start : start + batch] for name, array in feeds.items()}) for start in range(0, samples * batch, batch)]
        for spec in graph.outputs:
            actual = np.concatenate([part[spec.name] for part in parts])
            assert actual.dtype == np.dtype(spec.dtype)
            if spec.is_quantised:
                np.testing.assert_array_equal(actual, expected[spec.name], err_msg=spec.name)
            else:
                np.testing.assert_allclose(actual, expected[spec.name], atol=1e-6, err_msg=spec.name)
        return expected

    def classifier(self) -> QuantGraph:
        """Convolutions, both pools, a layer: the shape of a small network."""
        weight, bias = self.random(0)
        writer = FormWriter(recipe=Recipe())
        y = writer.input("image", (1, 1, 6, 6), scale=2**-4)
        y = writer.conv(y, weight(4, 1, 3, 3), 2**-7, bias(4), scale=2**-2, activation="Relu", pads=(1, 1, 1, 1), name="Stage/1 conv")
        y = writer.max_pool(y, kernel=(2, 2), strides=(2, 2))
        y = writer.conv(y, weight(8, 4, 3, 3), 2**-7, bias(8), scale=2**0, activation="Relu")
        y = writer.global_average_pool(y, scale=2**-1)
        y = writer.gemm(writer.flatten(y), weight(10, 8), 2**-7, bias(10), scale=2**0)
        writer.output(y, "logits")
        return writer.graph()


@pytest.fixture(scope="session")
def hls() -> Hls:
    return Hls()


@pytest.fixture(scope="session")
def tools(require: Callable[[str], str]) -> None:
    require("hls4ml")
    require("g++")


@pytest.fixture(scope="session", autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing of an earlier run is taken: what is tested is compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def classifier(tools: None, hls: Hls, tmp_path_factory: pytest.TempPathFactory) -> Built:
    return hls.build(hls.classifier(), tmp_path_factory.mktemp("hls4ml") / "classifier")
