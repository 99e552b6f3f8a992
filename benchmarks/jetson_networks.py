# SPDX-License-Identifier: Apache-2.0
"""What TensorRT-RTX compiles the zoo's networks to, and whether the lowered graph still holds the reference's numbers. No GPU; minutes a large network.

    python benchmarks/jetson_networks.py [NAME@PRESET ...] [--without-numbers]

Weights are random (seeded, batch norms have seen the samples): what runs in int8 is decided by the graph alone. Quantised by the portable recipe on
coarse patches with grain. At the real size the graph is lowered for TensorRT 10.3, compiled ahead of time for SM86 and SM89, and SM86's kernels are
held against the linter, layer by layer. At a smaller size, where the network has one, ONNX Runtime runs the lowered graph without optimisations and
every int8 tensor is held against the integer reference. Prints the Markdown tables of docs/jetson.md; exit code 1 where one layer is further off than
1 step.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnxruntime
import torch

from isthmus import reference
from isthmus.dataset import from_arrays
from isthmus.exposure import expose_onnx
from isthmus.graph import QuantGraph
from isthmus.lint import LintRow, totals
from isthmus.post_training import PostTraining
from isthmus.profile import load_profile
from isthmus.recipe import load_recipe
from isthmus.source import load_source
from isthmus.targets.jetson import TARGET
from isthmus.targets.jetson.check_with_rtx import MATRIX_KERNELS, Compiled, Kernel, RefusedError, compiled
from isthmus.targets.jetson.dialects import dialect_of
from isthmus.targets.jetson.lint import PRODUCTS
from isthmus.targets.jetson.lower import onnx_from_graph
from isthmus.train import zoo

SM, SECOND_SM = 86, 89
CALIBRATION_SAMPLES, COMPARED_SAMPLES = 4, 2
MAX_LSB = 1
PROFILE = load_profile("jetson-orin-nano")
DIALECT = dialect_of(str(PROFILE.toolchain["tensorrt"]))
RECIPE = replace(load_recipe("portable"), bias_correction=False)  # it moves biases, not the graph, and takes longest

# Specs 01, 03, 04, 05, 08 and 10, and the size at which numbers are compared; without one, the network's own.
SMALLER: dict[str, dict[str, int]] = {
    "covid_xai@paper": {"image_size": 96},
    "pv_soiling@small": {"image_size": 96},
    "pinn_denoise@unet": {"image_size": 64},
    "pinn_denoise@unet-transposed": {"image_size": 64},
    "pinn_denoise@resunet": {"image_size": 64},
    "pinn_denoise@u2net": {"image_size": 64},
    "pinn_denoise@resu2net": {"image_size": 64},
    "pinn_denoise@fpga": {},
    "medmnist@organa-c2": {},
    "medmnist@pneumonia-c2": {},
    "medmnist@path-d3": {},
    "pneumonia_kd@student": {"image_size": 62},
    "pneumonia_kd@teacher": {"image_size": 62},
    "amfacpose@r34-384x288": {"height": 64, "width": 48},
    "amfacpose@r34-256x256": {"height": 64, "width": 64},
    "amfacpose@r18-384x288": {"height": 64, "width": 48},
    "amfacpose@r18-256x256": {"height": 64, "width": 64},
}


@dataclass(frozen=True)
class Difference:
    """What one layer computed in ONNX Runtime against the reference on the same inputs, and what it carried along from the graph's own."""

    node: str
    elements: int
    own_lsb: int
    own_differ: int
    whole_lsb: int


def samples(shape: tuple[int, ...], count: int, seed: int) -> np.ndarray:
    """Coarse patches with grain over them, in -1 to 1: edges and flat areas, as images have."""
    generator = np.random.default_rng(seed)
    side = max(2, min(shape[2:]) // 8)
    coarse = generator.uniform(-0.8, 0.8, (count, shape[1], -(-shape[2] // side), -(-shape[3] // side)))
    patches = coarse.repeat(side, axis=2).repeat(side, axis=3)[:, :, : shape[2], : shape[3]]
    return np.clip(patches + generator.normal(0, 0.1, patches.shape), -1, 1).astype(np.float32)


def form_of(system: zoo.Architecture, configuration: Any) -> QuantGraph:
    shape = tuple(system.input_shape(configuration))
    given = samples(shape, CALIBRATION_SAMPLES, 0)
    torch.manual_seed(0)
    module = system.build(configuration).train()
    with torch.no_grad():
        module(torch.from_numpy(given))
    module.eval()
    deployed = system.deployed(module) if isinstance(system, zoo.ZooSystem) else module
    source = load_source(deployed, torch.zeros(shape), {}, RECIPE, _quiet)
    assert source.float_model is not None
    name = source.float_model.graph.input[0].name
    graph, _ = PostTraining(source.float_model, from_arrays({name: given}, None, {name: shape}, None, "patches"), _quiet).graph(RECIPE)
    graph.verify()
    return graph


def _quiet(text: str, share: float | None) -> None:
    """Stages tell how far they are; here a row is printed when all are through."""


def compiled_row(name: str, graph: QuantGraph) -> str:
    problems = TARGET.check(graph, PROFILE)
    if problems:
        return f"| {name} | refused: {problems[0]} |"
    rows = TARGET.lint(graph, PROFILE)
    products = [row for row in rows if row.op in PRODUCTS]
    t = totals(products)
    head = f"| {name} | {t.macs:,} | {t.int8_macs:,} | {stays_float(rows)} | "
    content = onnx_from_graph(graph, DIALECT)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            result, second = compiled(content, SM), compiled(content, SECOND_SM)
    except RefusedError as refusal:
        return f"{head} {refusal} |"
    matrix = matrix_kernels(result)
    int8 = {node: kernel.multiplies_int8 for kernel in matrix for node in kernel.nodes}
    judged = [row for row in products if row.node in int8]
    otherwise = sum(int8[row.node] != (row.runs == "int8") for row in judged)
    last = f"{kernels_of(second)} | {result.seconds:.0f}, {second.seconds:.0f} |"
    return head + f"{kernels_of(result)} | {len(products) - len(judged)} | {otherwise} of {len(judged)} | {last}"


def matrix_kernels(result: Compiled) -> list[Kernel]:
    return [kernel for kernel in result.kernels if kernel.kind in MATRIX_KERNELS]


def kernels_of(result: Compiled) -> str:
    """All kernels, those from NVIDIA's library that multiply, those of them that read int8."""
    matrix = matrix_kernels(result)
    return f"{len(result.kernels)}, {len(matrix)}, {sum(kernel.multiplies_int8 for kernel in matrix)}"


def stays_float(rows: list[LintRow]) -> str:
    """The operators that the linter says stay float, with their reason, or 'none'."""
    found = Counter((row.op, row.why) for row in rows if row.runs == "float")
    return "; ".join(f"{count} {op}{f': {why}' if why else ' (island at the end)'}" for (op, why), count in found.items()) or "none"


def differences(graph: QuantGraph) -> Iterator[Difference]:
    """Noise-like images and both extremes, every int8 layer of the lowered graph."""
    (border,) = graph.inputs
    given = border.quantise(samples(border.shape, COMPARED_SAMPLES, 1))
    given = np.concatenate([given, np.random.default_rng(2).choice(np.array([-128, 127], np.int8), border.shape)])
    exposure = expose_onnx(onnx_from_graph(graph, DIALECT), graph)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(exposure.content, options, providers=["CPUExecutionProvider"])
    names = [shown.spec.name for shown in exposure.shown]
    for sample in np.split(given, len(given)):
        values = session.run(names, {border.name: border.dequantise(sample)})
        actual = {shown.tensor: value for shown, value in zip(exposure.shown, values, strict=True)}
        actual |= {node.output: node.constants[0] for node in graph.nodes if node.op == "Constant"}
        expected = reference.run_all(graph, {border.name: sample})
        for node in graph.nodes:
            if node.kind != "int8" or not node.inputs:
                continue
            own = reference.run_nodes(graph, [node], {name: actual[name] for name in node.inputs})
            for output in node.outputs:
                apart = np.abs(actual[output].astype(np.int16) - own[output])
                carried = np.abs(actual[output].astype(np.int16) - expected[output])
                yield Difference(node.name, apart.size, int(apart.max()), int(np.count_nonzero(apart)), int(carried.max()))


def numbers_row(name: str, shape: tuple[int, ...], found: list[Difference]) -> str:
    layers, elements, differ = len({row.node for row in found}), sum(row.elements for row in found), sum(row.own_differ for row in found)
    size = "x".join(map(str, shape[2:]))
    return f"| {name} | {size} | {layers} | {elements:,} | {differ:,} | {max(row.own_lsb for row in found)} | {max(row.whole_lsb for row in found)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(SMALLER), metavar="NAME@PRESET")
    parser.add_argument("--without-numbers", action="store_true", help="compile only")
    parser.add_argument("--without-compiler", action="store_true", help="compare numbers only")
    given = parser.parse_args()
    compiles, numbers, worst = [], [], 0
    for name in given.networks:
        system, preset = zoo.parse(f"{zoo.PREFIX}{name}")
        configuration, began = system.configuration(preset), time.monotonic()
        if not given.without_compiler:
            compiles.append(compiled_row(name, form_of(system, configuration)))
        if not given.without_numbers:
            graph = form_of(system, replace(configuration, **SMALLER.get(name, {})))
            found = list(differences(graph))
            worst = max(worst, *(row.own_lsb for row in found))
            numbers.append(numbers_row(name, graph.inputs[0].shape, found))
        sys.stderr.write(f"{name}: {time.monotonic() - began:.0f} s\n{compiles[-1] if compiles else ''}\n{numbers[-1] if numbers else ''}\n")
    kernels = f"kernels, that multiply, in int8 | generated | predicted otherwise | the same for SM{SECOND_SM}"
    print(f"| network | MACs | in int8, by the linter | layers that stay float | {kernels} | s, for each |")
    print("|---|---|---|---|---|---|---|---|---|", *compiles, sep="\n")
    print("\n| network | input | int8 layers | elements | differ | largest difference, a layer alone | carried along |\n|---|---|---|---|---|---|---|")
    print(*numbers, sep="\n")
    return 1 if worst > MAX_LSB else 0


if __name__ == "__main__":
    sys.exit(main())
