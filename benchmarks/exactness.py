# SPDX-License-Identifier: Apache-2.0
"""Which engine computes which operator as the integer reference does: `python benchmarks/exactness.py [--samples 256]`.

Every portable tiny model of tests/models, on noise over all of int8, in several engines as their users run them, and in ours. Prints the Markdown
table of docs/exactness.md: share of elements that differ and the largest difference in steps; 0 where all are equal.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
from ai_edge_litert.interpreter import Interpreter, OpResolverType

from isthmus import reference
from isthmus.graph import QuantGraph
from isthmus.profile import load_profile
from isthmus.registry import load_target
from isthmus.spec import TensorSpec

MODELS = Path(__file__).parents[1] / "tests" / "models"
Engine = Callable[[QuantGraph, dict[str, np.ndarray]], np.ndarray]


def form_in_onnx_runtime(level: ort.GraphOptimizationLevel) -> Engine:
    """The form as it is, float border."""

    def run(graph: QuantGraph, feeds: dict[str, np.ndarray]) -> np.ndarray:
        options = ort.SessionOptions()
        options.graph_optimization_level = level
        options.log_severity_level = 3
        session = ort.InferenceSession(graph.to_bytes(), options, providers=["CPUExecutionProvider"])
        spec = graph.outputs[0]
        real = {name: _spec(graph, name).dequantise(array) for name, array in feeds.items()}
        count = len(next(iter(feeds.values())))
        return np.concatenate([spec.quantise(session.run([spec.name], {name: array[i : i + 1] for name, array in real.items()})[0]) for i in range(count)])

    return run


def our_cpu(graph: QuantGraph, feeds: dict[str, np.ndarray]) -> np.ndarray:
    plan = load_target("cpu").plan(graph, load_profile("cpu"), {})
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(plan.files[plan.artifact], options, providers=["CPUExecutionProvider"])
    count = len(next(iter(feeds.values())))
    return np.concatenate([session.run([graph.outputs[0].name], {name: array[i : i + 1] for name, array in feeds.items()})[0] for i in range(count)])


def our_tflite(delegate: bool) -> Engine:
    def run(graph: QuantGraph, feeds: dict[str, np.ndarray]) -> np.ndarray:
        plan = load_target("tflite").plan(graph, load_profile("rpi5"), {})
        kind = OpResolverType.AUTO if delegate else OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        interpreter = Interpreter(model_content=plan.files[plan.artifact], experimental_op_resolver_type=kind)
        interpreter.allocate_tensors()
        (entry,), (result,) = interpreter.get_input_details(), interpreter.get_output_details()
        parts = []
        for sample in next(iter(feeds.values())):
            interpreter.set_tensor(entry["index"], plan.inputs[0].from_form(sample[None]))
            interpreter.invoke()
            parts.append(plan.outputs[0].to_form(interpreter.get_tensor(result["index"])))
        return np.concatenate(parts)

    return run


ENGINES: dict[str, Engine] = {
    "ONNX Runtime, form as it is, optimisations off": form_in_onnx_runtime(ort.GraphOptimizationLevel.ORT_DISABLE_ALL),
    "ONNX Runtime, form as it is, all optimisations": form_in_onnx_runtime(ort.GraphOptimizationLevel.ORT_ENABLE_ALL),
    "target cpu": our_cpu,
    "target tflite, LiteRT with XNNPACK": our_tflite(True),
    "target tflite, LiteRT without XNNPACK": our_tflite(False),
}


def _spec(graph: QuantGraph, name: str) -> TensorSpec:
    return next(spec for spec in graph.inputs if spec.name == name)


def cell(expected: np.ndarray, actual: np.ndarray) -> str:
    steps = np.abs(expected.astype(int) - actual.astype(int))
    return "0" if not steps.any() else f"{100 * np.count_nonzero(steps) / steps.size:.2g} %, {steps.max()} LSB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=256)
    given = parser.parse_args()
    print("| model | elements | " + " | ".join(ENGINES) + " |")
    print("|---|---|" + "---|" * len(ENGINES))
    for file in sorted(MODELS.glob("*.onnx")):
        graph = QuantGraph.load(file)
        refused = any(load_target(name).check(graph, load_profile(profile)) for name, profile in (("cpu", "cpu"), ("tflite", "rpi5")))
        if graph.recipe.scheme != "power_of_two" or not graph.outputs[0].is_quantised or len(graph.inputs) != 1 or refused:
            continue
        generator = np.random.default_rng(0)
        feeds = {spec.name: generator.integers(-128, 128, (given.samples, *spec.shape[1:]), np.int8) for spec in graph.inputs}
        expected = reference.run(graph, feeds)[graph.outputs[0].name]
        cells = [cell(expected, engine(graph, feeds)) for engine in ENGINES.values()]
        print(f"| {file.stem} | {expected.size:,} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
