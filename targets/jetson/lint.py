# SPDX-License-Identifier: Apache-2.0
"""The fusion linter: from the graph alone, what TensorRT will multiply in int8, what stays float and why, and where a tensor changes its type.

Rules, each seen in what TensorRT-RTX 1.7 compiled (`benchmarks/jetson_support.py`) or named in NVIDIA's documents:

- a sum of products runs in int8 where its inputs and its output are quantised; a layer that is a float island does not (TensorRT issues 2067, 3197);
- an addition with one branch that is not quantised stays float, and so does the layer in front of that branch;
- ConvTranspose is multiplied in float by TensorRT-RTX 1.7, an average pool that leaves out its padding is computed in float;
- the parsers of TensorRT 8 list MatMul for FP32 and FP16 only (their docs/operators.md); Gemm has int8;
- a change between int8 and float inside the graph is a pass over the tensor that fusion may or may not hide.
"""

from __future__ import annotations

from collections.abc import Sequence

from isthmus.cost import cost_of_graph
from isthmus.graph import QuantGraph, QuantNode
from isthmus.lint import LintRow, totals
from isthmus.profile import Profile
from isthmus.targets.jetson.dialects import dialect_of

PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "BatchMatMul"})
PADDED_TO = 4  # int8 convolutions read channels in fours: fewer, or a rest, are padded with zeros


def lint(graph: QuantGraph, profile: Profile) -> list[LintRow]:
    """A row for each layer with MACs, each float island, and each other layer that has something to say; in the graph's order."""
    macs = {row.name: row.macs for row in cost_of_graph(graph).per_node}
    int8 = "int8" in profile.facts["precisions"]
    rows = []
    for node in graph.nodes:
        if node.kind == "border":
            continue
        count = macs.get(node.name, 0)
        row = _row(graph, node, count, profile) if int8 else _without_int8(node, count, profile)
        if row.macs or row.why or node.kind == "float":
            rows.append(row)
    return rows


def summary(rows: Sequence[LintRow]) -> str:
    """One sentence for notes and reports."""
    t = totals(rows)
    share = 100.0 * t.int8_macs / t.macs if t.macs else 0.0
    said = (
        f"predicted from the graph: {t.int8_macs:,} of {t.macs:,} MACs ({share:.1f} %) in int8, {t.int8_layers} of {t.layers} layers, {t.reformats} reformats"
    )
    named = [f"{row.node} ({row.op}): {row.why}" for row in rows if row.runs == "float" and row.macs][:3]
    return said + ("; float: " + "; ".join(named) if named else "")


def _without_int8(node: QuantNode, macs: int, profile: Profile) -> LintRow:
    fix = "choose a board with int8, or take the FP16 engine as it is" if macs else ""
    return LintRow(node.name, node.op, "float", macs, 0, f"{profile.board} has no int8" if macs else "", fix)


def _row(graph: QuantGraph, node: QuantNode, macs: int, profile: Profile) -> LintRow:
    if node.kind == "float":
        return _island(graph, node, macs)
    if node.op == "ConvTranspose":
        why = "TensorRT-RTX 1.7 multiplies transposed convolutions in float, whatever its quantisers say"
        return _float_row(node, macs, why, "resize (nearest) and convolve, or make the channels with a convolution and use DepthToSpace")
    if node.op in ("MatMul", "BatchMatMul") and dialect_of(str(profile.toolchain["tensorrt"])).since < (10, 0):
        fix = "write it as Gemm" if node.op == "MatMul" else "take a board with JetPack 6"
        return _float_row(node, macs, f"the parser of TensorRT {profile.toolchain['tensorrt']} lists MatMul for FP32 and FP16 only", fix)
    if node.op == "AveragePool" and not node.attributes["count_include_pad"] and _pads(graph, node):
        why = "an average that leaves out its padding has no int8 kernel"
        return _float_row(node, macs, why, "count_include_pad=1, or pool without padding")
    if node.op == "Requantize":
        return LintRow(node.name, node.op, "int8", macs, 1, "two scales for one tensor: a pass of its own", "let both readers share one scale")
    if node.op == "Conv" and node.weight is not None and node.attributes["group"] == 1 and (depth := node.weight.shape[1]) % PADDED_TO:
        why = f"{depth} channels are padded to {-(-depth // PADDED_TO) * PADDED_TO}"
        return LintRow(node.name, node.op, "int8", macs, 0, why, "" if depth < PADDED_TO else f"a multiple of {PADDED_TO} channels")
    return LintRow(node.name, node.op, "int8", macs, 0)


def _pads(graph: QuantGraph, node: QuantNode) -> bool:
    """Whether some window sees padding, or hangs over."""
    a = node.attributes
    space, out = graph.tensors[node.inputs[0]].shape[2:], graph.tensors[node.output].shape[2:]
    reach = [(n - 1) * s + k for n, s, k in zip(out, a["strides"], a["kernel_shape"], strict=True)]
    return any(a["pads"]) or any(needed > extent for needed, extent in zip(reach, space, strict=True))


def _float_row(node: QuantNode, macs: int, why: str, fix: str) -> LintRow:
    return LintRow(node.name, node.op, "float", macs, len(node.inputs) + len(node.outputs), why, fix)


def _island(graph: QuantGraph, node: QuantNode, macs: int) -> LintRow:
    """A float island: what keeps it from int8."""
    before = [producer for name in node.inputs if (producer := graph.producer(name)) is not None and producer.op == "DequantizeLinear"]
    after = [reader for name in node.outputs for reader in graph.consumers(name) if reader.op == "QuantizeLinear"]
    reformats = len(before) + len(after)
    if node.op == "Add" and len(node.inputs) == 2 and 0 < len(before) < len(node.inputs):
        loose = next(name for name in node.inputs if getattr(graph.producer(name), "op", "") != "DequantizeLinear")
        why = f"its branch {loose!r} is not quantised, so the addition and what writes that branch stay float"
        return LintRow(node.name, node.op, "float", macs, reformats, why, "quantise both branches of the addition")
    if node.op in PRODUCTS:
        readers = [reader for name in node.outputs for reader in graph.consumers(name)]
        if len(before) == len(node.inputs) and readers and not after:
            why = f"its output goes to {readers[0].name!r} ({readers[0].op}) without a quantiser"
            return LintRow(node.name, node.op, "float", macs, reformats, why, f"quantise the output, in front of {readers[0].name!r}")
        why = "its inputs are quantised, its weights or its place in the recipe are not" if len(before) == len(node.inputs) else "its input is not quantised"
        return LintRow(node.name, node.op, "float", macs, reformats, why, "quantise its input, its weights and its output")
    alone = bool(before) and bool(after)
    why = f"a float island between int8 layers: {reformats} changes of type" if alone else ""
    fix = "an int8 function where the form has one, or move it to the end of the graph" if alone else ""
    return LintRow(node.name, node.op, "float", macs, reformats, why, fix)
