# SPDX-License-Identifier: Apache-2.0
"""What TensorRT makes of each operator of the form: `python benchmarks/jetson_support.py`. Needs the extra `tensorrt-check`, and no GPU.

Every tiny model of tests/models, lowered in each dialect: its numbers in ONNX Runtime without optimisations against the integer reference (largest
difference in steps), and what NVIDIA's TensorRT-RTX compiles it to for SM86 and for SM89. Then constructs that NVIDIA refuses, with its own
sentence. Prints the two Markdown tables of docs/jetson.md.
"""

from __future__ import annotations

import contextlib
import io
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from isthmus import reference
from isthmus.form_writer import FormWriter
from isthmus.graph import QuantGraph
from isthmus.ops import OPS
from isthmus.recipe import Recipe
from isthmus.targets.jetson.check_with_rtx import MATRIX_KERNELS, Compiled, RefusedError, compiled
from isthmus.targets.jetson.dialects import DIALECTS, Dialect
from isthmus.targets.jetson.lint import PRODUCTS
from isthmus.targets.jetson.lower import onnx_from_graph

MODELS = Path(__file__).parents[1] / "tests" / "models"
SM, SECOND_SM, OLD_SM = 86, 89, 75
RUNS = 20
# TensorRT 11 reads the file of TensorRT 10: three files for four dialects.
WRITTEN = (DIALECTS[2], DIALECTS[1], DIALECTS[0])
ISLANDS = ("ArgMax", "Cast", "GridSample", "LayerNormalization", "Softmax")


def quietly_compiled(model: bytes, sm: int = SM) -> Compiled:
    with contextlib.redirect_stdout(io.StringIO()):
        return compiled(model, sm)


# ---- what it takes
def largest_difference(graph: QuantGraph, model: bytes) -> float:
    """In steps; for a float output the largest relative difference."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    generator, worst = np.random.default_rng(0), 0.0
    for _ in range(RUNS):
        fed = {spec.name: generator.integers(-128, 128, spec.shape, np.int8) for spec in graph.inputs}
        expected = reference.run(graph, fed)
        values = session.run([spec.name for spec in graph.outputs], {spec.name: spec.dequantise(fed[spec.name]) for spec in graph.inputs})
        for spec, value in zip(graph.outputs, values, strict=True):
            if spec.is_quantised:
                worst = max(worst, float(np.abs(spec.quantise(value).astype(int) - expected[spec.name]).max()))
            elif not np.allclose(value, expected[spec.name], rtol=1e-5, atol=1e-6):
                worst = max(worst, 1.0)
    return worst


def kernels_of(op: str, graph: QuantGraph, result: Compiled) -> set[str]:
    """The kernels that hold the operator's nodes. Generated kernels hold whole chains of elements; the others are of NVIDIA's library."""
    names = {node.name for node in graph.nodes if node.op == op}
    held = [kernel for kernel in result.kernels if any(node == name or node.startswith(f"{name}_") for node in kernel.nodes for name in names)]
    named = [kernel for kernel in held if kernel.kind in MATRIX_KERNELS or kernel.kind.endswith("pool")]
    inside = "" if op in PRODUCTS or op in ("MaxPool", "AveragePool") else "part of "
    return {f"{inside}{kernel.kind}, {'int8' if set(kernel.reads) == {'Int8'} else 'float'}" for kernel in named} or ({"generated"} if held else set())


def cell(dialect: Dialect, op: str, graphs: Iterable[QuantGraph]) -> str:
    if op in dialect.missing:
        return "refused: the parser has no such operator"
    worst = 0.0
    for graph in graphs:
        model = onnx_from_graph(graph, dialect)
        quietly_compiled(model)
        worst = max(worst, largest_difference(graph, model))
    return f"{worst:g}" + (", spelled out" if op in dialect.spelled_out else "")


def taken() -> None:
    graphs: dict[str, list[QuantGraph]] = defaultdict(list)
    for file in sorted(MODELS.glob("*.onnx")):
        graph = QuantGraph.load(file)
        if graph.recipe.scheme != "asymmetric":
            for op in {node.op for node in graph.nodes if node.kind != "border"}:
                graphs[op].append(graph)
    numbers = " | ".join(f"steps off, {dialect.name} (opset {dialect.opset})" for dialect in WRITTEN)
    print(f"| operator | models | compiled to | for SM{SECOND_SM} | {numbers} |")
    print("|---|---|---|---|" + "---|" * len(WRITTEN))
    for op in (*OPS, *ISLANDS):
        own = [graph for graph in graphs[op] if len(graph.nodes) < 8] or graphs[op]
        first, second = (every_kernel_of(op, own, sm) for sm in (SM, SECOND_SM))
        label = f"{op} (float island)" if op in ISLANDS else op
        cells = [label, str(len(own)), first, "the same" if second == first else second, *(cell(dialect, op, own) for dialect in WRITTEN)]
        print(f"| {' | '.join(cells)} |", flush=True)


def every_kernel_of(op: str, graphs: Iterable[QuantGraph], sm: int) -> str:
    found: set[str] = set().union(*(kernels_of(op, graph, quietly_compiled(onnx_from_graph(graph, WRITTEN[0]), sm)) for graph in graphs))
    return "; ".join(sorted(found)) or "no node of its own"


# ---- what it refuses
def written(body: Callable[[FormWriter, str], str], shape: tuple[int, ...] = (1, 4, 8, 8), recipe: Recipe | None = None, zero_point: int = 0) -> QuantGraph:
    w = FormWriter(recipe)
    w.output(body(w, w.input("x", shape, scale=2.0**-4, zero_point=zero_point)), "y")
    return w.graph()


def convolution(w: FormWriter, x: str) -> str:
    return w.conv(x, np.ones((4, 4, 3, 3), np.int8), 2.0**-7, np.arange(4, dtype=np.int32), scale=0.5, name="layer")


def without_kernel_shape() -> bytes:
    model = onnx.load_from_string(onnx_from_graph(written(convolution), DIALECTS[2]))
    for node in model.graph.node:
        kept = [attribute for attribute in node.attribute if attribute.name != "kernel_shape"]
        del node.attribute[:]
        node.attribute.extend(kept)
    return model.SerializeToString()


def dilated() -> bytes:
    return onnx_from_graph(written(lambda w, x: w.max_pool(x, (2, 2), (1, 1), dilations=(2, 2), name="layer")), DIALECTS[2])


def asymmetric() -> bytes:
    return written(lambda w, x: w.relu(x, name="layer"), recipe=Recipe(name="a", scheme="asymmetric"), zero_point=3).to_bytes()


def island(op: str, **attributes: object) -> bytes:
    w = FormWriter()
    w.float_node(op, [w.dequantise(w.input("x", (1, 4, 8, 8), scale=2.0**-4))], ["y"], "layer", **attributes)
    w.float_output("y")
    return onnx_from_graph(w.graph(), DIALECTS[2])


PROBES: dict[str, tuple[Callable[[], bytes], int, str]] = {
    "int32 bias behind a DequantizeLinear (the form itself)": (lambda: written(convolution).to_bytes(), SM, "biases become float32 initialisers"),
    "a zero point that is not 0": (asymmetric, SM, "schemes with zero point 0; a board without int8 takes any, in float"),
    "Conv with a computed weight and no `kernel_shape`": (without_kernel_shape, SM, "`kernel_shape` is always written"),
    "MaxPool with dilations": (dilated, SM, "refused by rule `pool-dilation`"),
    "Det, an operator the parser has not": (lambda: island("Det"), SM, "refused by rule `operator`"),
    "Gemm in float32 for Turing": (lambda: gemm_in_float(), OLD_SM, "boards older than Ampere are checked for SM86 as well"),
}


def gemm_in_float() -> bytes:
    w = FormWriter()
    w.float_node("Gemm", [w.dequantise(w.input("x", (1, 64), scale=2.0**-4)), w.constant("matrix", np.ones((64, 10), np.float32))], ["y"], "layer")
    w.float_output("y")
    return onnx_from_graph(w.graph(), DIALECTS[2])


def refused() -> None:
    print("| construct | TensorRT-RTX | what isthmus does |")
    print("|---|---|---|")
    for name, (make, sm, answer) in PROBES.items():
        try:
            sentence = f"takes it ({quietly_compiled(make(), sm).sentence})"
        except RefusedError as error:
            sentence = str(error).replace("|", "\\|")[:300]
        print(f"| {name} | {sentence} | {answer} |", flush=True)


def main() -> None:
    taken()
    print()
    refused()


if __name__ == "__main__":
    main()
