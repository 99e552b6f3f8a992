# SPDX-License-Identifier: Apache-2.0
"""What TensorRT-RTX compiles whole networks to: `python benchmarks/jetson_networks.py pv_soiling amfacpose:r18-256x256`. No GPU; minutes a network.

Networks of the zoo, NAME or NAME:PRESET, with random weights: what runs in int8 is decided by the graph alone. Quantised on noise (recipe symmetric),
lowered for TensorRT 10.3, compiled ahead of time for SM86, and held against the linter, layer by layer. Prints a Markdown table of docs/jetson.md.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
from importlib import import_module
from pathlib import Path

import numpy as np
import torch

from isthmus import pipeline
from isthmus.graph import QuantGraph
from isthmus.profile import load_profile
from isthmus.targets.jetson import TARGET
from isthmus.targets.jetson.check_with_rtx import MATRIX_KERNELS, compiled
from isthmus.targets.jetson.dialects import dialect_of
from isthmus.targets.jetson.lint import PRODUCTS, totals
from isthmus.targets.jetson.lower import onnx_from_graph

SM = 86
SAMPLES = 16
PROFILE = load_profile("jetson-orin-nano")


def form_of(name: str, preset: str) -> QuantGraph:
    system = import_module(f"isthmus.train.zoo.{name}").SYSTEM
    shape = tuple(system.input_shape(system.configuration(preset)))
    noise = np.random.default_rng(0).standard_normal((SAMPLES, *shape[1:])).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        pipeline.compile(system.module(preset).eval(), torch.zeros(shape), targets=["null"], data=noise, recipe="symmetric", output=bundle)
        return QuantGraph.load(bundle / "model.onnx")


def row(name: str) -> str:
    system, _, preset = name.partition(":")
    graph = form_of(system, preset)
    problems = TARGET.check(graph, PROFILE)
    if problems:
        return f"| {name} | refused: {problems[0]} |"
    with contextlib.redirect_stdout(io.StringIO()):
        result = compiled(onnx_from_graph(graph, dialect_of(str(PROFILE.toolchain["tensorrt"]))), SM)
    matrix = [kernel for kernel in result.kernels if kernel.kind in MATRIX_KERNELS]
    int8 = {node: kernel.multiplies_int8 for kernel in matrix for node in kernel.nodes}
    rows = [entry for entry in TARGET.lint(graph, PROFILE) if entry.op in PRODUCTS]
    judged = [entry for entry in rows if entry.node in int8]
    otherwise = sum(int8[entry.node] != (entry.runs == "int8") for entry in judged)
    t = totals(rows)
    counts = (len(result.kernels), len(matrix), sum(kernel.multiplies_int8 for kernel in matrix), len(rows) - len(judged))
    return f"| {name} | {t.macs:,} | {100 * t.int8_macs / t.macs:.1f} % | " + " | ".join(map(str, counts)) + f" | {otherwise} of {len(judged)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="+")
    print(
        "| network | MACs | predicted in int8 | kernels | library kernels that multiply | of these int8 | layers in generated kernels | predicted otherwise |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name in parser.parse_args().networks:
        print(row(name), flush=True)


if __name__ == "__main__":
    main()
