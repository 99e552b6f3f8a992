# SPDX-License-Identifier: Apache-2.0
"""Which engine computes which operator as the integer reference does: `python benchmarks/exactness.py [--samples 256] [--data FOLDER] [--images 1000]`.

First every portable tiny model of tests/models, on noise over all of int8, in several engines as their users run them, and in ours. Then a network of six
convolutions, trained here, on real images: MNIST's files under --data, else the scans of handwritten digits that come with scikit-learn; as a whole, and
each layer by itself on what the reference gave it. Prints the Markdown tables of docs/exactness.md: share of elements that differ and the
largest difference in steps; 0 where all are equal.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort

import isthmus
from isthmus import reference
from isthmus.cut import border_name, extract
from isthmus.graph import QuantGraph
from isthmus.profile import load_profile
from isthmus.registry import load_target
from isthmus.runtimes.onnxruntime import session_options
from isthmus.runtimes.tflite import TfliteSession
from isthmus.spec import TensorSpec

MODELS = Path(__file__).parents[1] / "tests" / "models"
FLOAT_TOLERANCE = 1e-5  # of a float tail: engines' exp and sums differ in their last bits
Arrays = Mapping[str, np.ndarray]
Engine = Callable[[QuantGraph, Arrays], "dict[str, np.ndarray] | None"]


def form_in_onnx_runtime(level: str) -> Engine:
    """The form as it is, float border."""

    def run(graph: QuantGraph, feeds: Arrays) -> dict[str, np.ndarray]:
        session = ort.InferenceSession(graph.to_bytes(), session_options(1, level), providers=["CPUExecutionProvider"])
        inputs = _specs(graph.inputs)
        real = {name: inputs[name].dequantise(array) for name, array in feeds.items()}
        names = [spec.name for spec in graph.outputs]
        parts = [session.run(names, sample) for sample in _samples(real, graph)]
        return {spec.name: spec.quantise(np.concatenate(values)) for spec, values in zip(graph.outputs, zip(*parts, strict=True), strict=True)}

    return run


def our_cpu(graph: QuantGraph, feeds: Arrays) -> dict[str, np.ndarray] | None:
    target, profile = load_target("cpu"), load_profile("cpu")
    if target.check(graph, profile):
        return None
    plan = target.plan(graph, profile, {})
    session = ort.InferenceSession(plan.files[plan.artifact], session_options(1, "all"), providers=["CPUExecutionProvider"])
    names = [spec.name for spec in graph.outputs]
    parts = [session.run(names, dict(sample)) for sample in _samples(feeds, graph)]
    return {name: np.concatenate(values) for name, values in zip(names, zip(*parts, strict=True), strict=True)}


def our_tflite(xnnpack: bool) -> Engine:
    def run(graph: QuantGraph, feeds: Arrays) -> dict[str, np.ndarray] | None:
        target, profile = load_target("tflite"), load_profile("rpi5")
        if target.check(graph, profile):
            return None
        plan = target.plan(graph, profile, {})
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.tflite"
            file.write_bytes(plan.files[plan.artifact])
            with TfliteSession(file, plan.inputs, plan.outputs, xnnpack=xnnpack) as session:
                return session.run_samples(feeds)

    return run


ENGINES: dict[str, Engine] = {
    "ONNX Runtime, form as it is, optimisations off": form_in_onnx_runtime("off"),
    "ONNX Runtime, form as it is, all optimisations": form_in_onnx_runtime("all"),
    "target cpu": our_cpu,
    "target tflite, LiteRT with XNNPACK": our_tflite(True),
    "target tflite, LiteRT without XNNPACK": our_tflite(False),
}


def _samples(feeds: Arrays, graph: QuantGraph) -> Iterator[dict[str, np.ndarray]]:
    batch = graph.inputs[0].shape[0]
    for start in range(0, len(next(iter(feeds.values()))), batch):
        yield {name: array[start : start + batch] for name, array in feeds.items()}


def _specs(specs: tuple[TensorSpec, ...]) -> dict[str, TensorSpec]:
    return {spec.name: spec for spec in specs}


# ---- tables
def cell(graph: QuantGraph, expected: Arrays, actual: Arrays | None) -> str:
    if actual is None:
        return "refused"
    differing, compared, largest = 0, 0, 0.0
    for spec in graph.outputs:
        distance = np.abs(expected[spec.name].astype(np.float64) - actual[spec.name])
        differing += int(np.count_nonzero(distance > (0 if spec.is_quantised else FLOAT_TOLERANCE)))
        compared, largest = compared + distance.size, max(largest, float(distance.max()))
    if compared == 0:
        raise SystemExit(f"{[spec.name for spec in graph.outputs]}: nothing was compared")
    unit = " LSB" if all(spec.is_quantised for spec in graph.outputs) else ""
    return f"{100 * differing / compared:.2g} %, {largest:.3g}{unit}" if differing else "0"


def header(*titles: str) -> None:
    print("\n| " + " | ".join((*titles, *ENGINES)) + " |")
    print("|---|" + "---|" * (len(titles) - 1 + len(ENGINES)), flush=True)


def row(title: str, graph: QuantGraph, feeds: Arrays) -> None:
    expected = reference.run(graph, feeds)
    cells = [cell(graph, expected, engine(graph, feeds)) for engine in ENGINES.values()]
    print(f"| {title} | {sum(array.size for array in expected.values()):,} | {' | '.join(cells)} |", flush=True)


def tiny_models(samples: int) -> None:
    header("model", "elements")
    for file in sorted(MODELS.glob("*.onnx")):
        graph = QuantGraph.load(file)
        if graph.recipe.scheme == "power_of_two":
            generator = np.random.default_rng(0)
            row(file.stem, graph, {spec.name: generator.integers(-128, 128, (samples, *spec.shape[1:]), np.int8) for spec in graph.inputs})


# ---- six convolutions on real images
def trained(data: Path | None) -> tuple[QuantGraph, np.ndarray, str]:
    """The portable form, images it was not trained on first, and which images."""
    import torch

    from isthmus.train.data import digits, mnist
    from isthmus.train.loop import TrainConfig, fit
    from isthmus.train.zoo.medmnist import SYSTEM

    split = digits.load(0) if data is None else mnist.load(data)
    given = SYSTEM.configuration("organa-c3-quarter-average")
    config = replace(given, dataset="mnist", classes=len(split.classes), image_size=split.sample_shape[-1])
    torch.manual_seed(0)
    network = SYSTEM.deployed(SYSTEM.build(config))
    fit(network, split, TrainConfig(epochs=3 if data else 20))
    with tempfile.TemporaryDirectory() as folder:
        example = torch.zeros(1, *split.sample_shape)
        bundle = isthmus.compile(network, example, targets=["cpu"], data=split.x_train[:256], recipe="portable", tune=False, output=Path(folder) / "bundle")
        graph = QuantGraph.load(bundle.root / "model.onnx")
    return graph, np.concatenate([split.x_test, split.x_val, split.x_train]), split.name


def six_convolutions(data: Path | None, count: int) -> None:
    graph, images, name = trained(data)
    if len(images) < count:
        raise SystemExit(f"{name} has {len(images)} images, not {count}")
    (spec,) = graph.inputs
    feeds = {spec.name: spec.quantise(images[:count])}
    print(f"\nSix convolutions, {count:,} images of {name}:")
    header("layer", "elements")
    row("**the whole network**", graph, feeds)
    for node in graph.nodes:
        if node.kind != "int8" or node.op in ("Relu", "Clip"):
            continue
        known = [tensor for tensor in node.inputs if (producer := graph.producer(tensor)) is not None and producer.kind == "int8"]
        before = reference.run(extract(graph, known), feeds) if known else {}
        part = extract(graph, [node.output], known)
        row(f"{node.op} `{node.name}`", part, before if known else feeds)
        assert set(before) == {border_name(graph, tensor) for tensor in known}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--data", type=Path, help="folder with MNIST's files")
    parser.add_argument("--only", choices=("models", "network"))
    given = parser.parse_args()
    if given.only != "network":
        tiny_models(given.samples)
    if given.only != "models":
        six_convolutions(given.data, given.images)


if __name__ == "__main__":
    main()
