# SPDX-License-Identifier: Apache-2.0
"""What every test of the tflite target and its runtime uses: a writer whose scales fit a scheme, a plan, its session, the difference from the reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus import reference
from isthmus.form_writer import FormWriter
from isthmus.graph import QuantGraph
from isthmus.plan import BuildPlan
from isthmus.profile import load_profile
from isthmus.recipe import Recipe
from isthmus.runtimes.tflite import TfliteSession, open_session
from isthmus.spec import TensorSpec
from isthmus.targets.tflite import TARGET

PROFILE = load_profile("rpi5")
RECIPES = {scheme: Recipe(scheme=scheme, per_channel=scheme != "power_of_two") for scheme in ("power_of_two", "symmetric", "asymmetric")}
Feeds = Mapping[str, np.ndarray]


class Case:
    """A writer with scales and constants that fit a scheme."""

    def __init__(self, scheme: str = "power_of_two", seed: int = 0) -> None:
        self.scheme, self.generator = scheme, np.random.default_rng(seed)
        self.writer = FormWriter(recipe=RECIPES[scheme])

    def activation(self) -> dict[str, Any]:
        if self.scheme == "power_of_two":
            return {"scale": 2.0 ** -int(self.generator.integers(2, 6))}
        zero = int(self.generator.integers(-128, 128)) if self.scheme == "asymmetric" else 0
        return {"scale": float(np.float32(self.generator.uniform(0.02, 0.3))), "zero_point": zero}

    def input(self, shape: tuple[int, ...], name: str = "x") -> str:
        return self.writer.input(name, shape, **self.activation())

    def weight(self, *shape: int) -> np.ndarray:
        return self.generator.integers(-127, 128, shape).astype(np.int8)

    def weight_scale(self, channels: int) -> np.ndarray:
        if self.scheme == "power_of_two":
            return np.float32([2.0 ** -int(self.generator.integers(7, 10))])
        return self.generator.uniform(0.002, 0.01, channels).astype(np.float32)

    def bias(self, channels: int) -> np.ndarray:
        return self.generator.integers(-5000, 5000, channels).astype(np.int32)

    def conv(self, x: str, channels: int, filters: int, kernel: tuple[int, ...], bias: bool = True, **more: Any) -> str:
        weight = self.weight(filters, channels // more.get("group", 1), *kernel)
        return self.writer.conv(x, weight, self.weight_scale(filters), self.bias(filters) if bias else None, **self.activation(), **more)

    def gemm(self, x: str, columns: int, rows: int, **more: Any) -> str:
        return self.writer.gemm(x, self.weight(rows, columns), self.weight_scale(rows), self.bias(rows), **self.activation(), **more)

    def graph(self, y: str | None) -> QuantGraph:
        if y is not None:
            self.writer.output(y, "y")
        return self.writer.graph()

    def conv_graph(self, shape: tuple[int, ...], filters: int, kernel: tuple[int, ...], **more: Any) -> QuantGraph:
        return self.graph(self.conv(self.input(shape), shape[1], filters, kernel, **more))

    def one(self, shape: tuple[int, ...], layer: Callable[[Case, str], str]) -> QuantGraph:
        """A graph of what `layer` makes of one input."""
        return self.graph(layer(self, self.input(shape)))


class Litert:
    """From a graph to its outputs."""

    profile = PROFILE
    recipes = RECIPES

    def case(self, scheme: str = "power_of_two", seed: int = 0) -> Case:
        return Case(scheme, seed)

    def plan(self, graph: QuantGraph, **options: str) -> BuildPlan:
        assert TARGET.check(graph, PROFILE) == []
        return TARGET.plan(graph, PROFILE, options)

    def entry(self, plan: BuildPlan) -> dict[str, Any]:
        return {"artifact": plan.artifact, "inputs": [spec.to_json() for spec in plan.inputs], "outputs": [spec.to_json() for spec in plan.outputs]}

    def open(self, plan: BuildPlan, folder: Path, threads: int = 1) -> TfliteSession:
        (folder / plan.artifact).write_bytes(plan.files[plan.artifact])
        return open_session(folder, self.entry(plan), threads)

    def feeds(self, graph: QuantGraph, seed: int = 0) -> list[Feeds]:
        """Random over the full range, only the two ends, around zero (where ties are), all lowest, all highest."""
        generator = np.random.default_rng(seed)

        def filled(draw: Callable[[TensorSpec], np.ndarray]) -> Feeds:
            return {spec.name: draw(spec).astype(np.int8) for spec in graph.inputs}

        return [
            filled(lambda spec: generator.integers(-128, 128, spec.shape)),
            filled(lambda spec: generator.integers(-128, 128, spec.shape)),
            filled(lambda spec: generator.choice([-128, 127], spec.shape)),
            filled(lambda spec: np.clip(generator.integers(-4, 5, spec.shape) + (spec.zero_point or 0), -128, 127)),
            filled(lambda spec: np.full(spec.shape, -128)),
            filled(lambda spec: np.full(spec.shape, 127)),
        ]

    def difference(self, graph: QuantGraph, session: TfliteSession, feeds: list[Feeds]) -> int:
        """The largest difference from the reference in steps; an output that is empty or missing fails."""
        worst = 0
        for feed in feeds:
            expected, found = reference.run(graph, feed), session.run_quantised(feed)
            assert list(found) == [spec.name for spec in graph.outputs]
            for name, array in expected.items():
                assert array.size and found[name].dtype == array.dtype and found[name].shape == array.shape
                if array.dtype == np.int8:
                    worst = max(worst, int(np.abs(array.astype(int) - found[name].astype(int)).max()))
                else:
                    np.testing.assert_allclose(found[name], array, atol=1e-6)  # a float tail: exp and division of another library
        return worst

    def operators(self, plan: BuildPlan) -> list[str]:
        """The file's operators in order."""
        return self.operators_of(plan.files[plan.artifact])

    def operators_of(self, content: bytes) -> list[str]:
        from ai_edge_litert import schema_py_generated as schema

        names = {value: name for name, value in vars(schema.BuiltinOperator).items() if isinstance(value, int)}
        model = schema.ModelT.InitFromPackedBuf(content)
        return [names[model.operatorCodes[node.opcodeIndex].builtinCode] for node in model.subgraphs[0].operators]

    def model(self, plan: BuildPlan) -> Any:
        from ai_edge_litert import schema_py_generated as schema

        return schema.ModelT.InitFromPackedBuf(plan.files[plan.artifact])


@pytest.fixture(scope="session")
def litert(require: Callable[[str], str]) -> Litert:
    require("litert")
    return Litert()
