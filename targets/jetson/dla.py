# SPDX-License-Identifier: Apache-2.0
"""The deep learning accelerator (DLA) of Xavier, Orin NX and AGX Orin: which layers it takes, by its own limits, and which fall back to the GPU.

Limits: NVIDIA, TensorRT documentation, "DLA Supported Layers and Restrictions", read for Conv, ConvTranspose and Concat; those of pooling and resize and
of padding and dilation are recalled, not read again: check before relying on them. A DLA reads FP16 or int8 tensors of four axes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from isthmus.graph import QuantGraph, QuantNode
from isthmus.profile import Profile

LARGEST_EXTENT = 8192
LARGEST_BATCH = 4096
KERNEL, STRIDE, DILATION, PADDING = (1, 32), (1, 8), (1, 32), (0, 31)
POOL_WINDOW, POOL_STRIDE = (1, 8), (1, 16)
Reason = str  # "" where the DLA takes the layer


def dla_rows(graph: QuantGraph) -> list[tuple[QuantNode, Reason]]:
    """Every layer with the reason why the DLA does not take it."""
    return [(node, why_not_on_dla(graph, node)) for node in graph.nodes if node.kind != "border"]


def dla_report(graph: QuantGraph, profile: Profile) -> list[str]:
    """Sentences for the manifest."""
    if not profile.facts["dla_count"]:
        return [f"option dla: {profile.board} has no DLA, every layer runs on the GPU"]
    rows = dla_rows(graph)
    fallen = [f"{node.name} ({node.op}: {reason})" for node, reason in rows if reason]
    said = f"option dla: the DLA's limits take {len(rows) - len(fallen)} of {len(rows)} layers"
    return [said + ("" if not fallen else "; on the GPU: " + ", ".join(fallen))]


def why_not_on_dla(graph: QuantGraph, node: QuantNode) -> Reason:
    """One reason, "" where the layer fits."""
    rule = _RULES.get(node.op) if node.kind == "int8" else None
    if rule is None:
        return "the DLA has no such layer"
    shapes = [graph.tensors[name].shape for name in (*node.inputs, *node.outputs)]
    if any(len(shape) != 4 for shape in shapes) and node.op not in ("Gemm", "Reshape", "Flatten"):
        return "tensors must have four axes"
    if any(shape[0] > LARGEST_BATCH for shape in shapes) or any(extent > LARGEST_EXTENT for shape in shapes for extent in shape[1:]):
        return f"batch above {LARGEST_BATCH} or an extent above {LARGEST_EXTENT}"
    return rule(graph, node)


def _outside(name: str, values: Sequence[int], limits: tuple[int, int]) -> Reason:
    return "" if all(limits[0] <= value <= limits[1] for value in values) else f"{name} {list(values)} outside {limits[0]} to {limits[1]}"


def _conv(graph: QuantGraph, node: QuantNode) -> Reason:
    a = node.attributes
    return (
        _outside("kernel", a["kernel_shape"], KERNEL)
        or _outside("stride", a["strides"], STRIDE)
        or _outside("padding", a["pads"], PADDING)
        or _outside("dilation", a["dilations"], DILATION)
    )


def _conv_transpose(graph: QuantGraph, node: QuantNode) -> Reason:
    a = node.attributes
    if a["group"] != 1 or set(a["dilations"]) != {1} or any(a["pads"]) or any(a["output_padding"]):
        return "a transposed convolution with groups, dilation or padding"
    return _outside("kernel", a["kernel_shape"], KERNEL) or _outside("stride", a["strides"], KERNEL)


def _pool(graph: QuantGraph, node: QuantNode) -> Reason:
    a = node.attributes
    if node.op == "AveragePool" and any(a["pads"]) and not a["count_include_pad"]:
        return "an average that leaves out its padding"
    return _outside("window", a["kernel_shape"], POOL_WINDOW) or _outside("stride", a["strides"], POOL_STRIDE)


def _global_pool(graph: QuantGraph, node: QuantNode) -> Reason:
    return _outside("window", graph.tensors[node.inputs[0]].shape[2:], POOL_WINDOW)


def _concat(graph: QuantGraph, node: QuantNode) -> Reason:
    return "" if node.attributes["axis"] == 1 else "a join along another axis than the channels"


def _resize(graph: QuantGraph, node: QuantNode) -> Reason:
    before, after = graph.tensors[node.inputs[0]].shape[2:], graph.tensors[node.output].shape[2:]
    if node.op == "ResizeNearest":
        whole = all(new % old == 0 and 1 <= new // old <= 32 for old, new in zip(before, after, strict=True))
        return "" if whole else "nearest by other than whole factors up to 32"
    return "" if all(new <= 4 * old for old, new in zip(before, after, strict=True)) else "bilinear by more than 4"


def _softless(graph: QuantGraph, node: QuantNode) -> Reason:
    return ""


_RULES: dict[str, Callable[[QuantGraph, QuantNode], Reason]] = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    **dict.fromkeys(("MaxPool", "AveragePool"), _pool),
    "GlobalAveragePool": _global_pool,
    "Concat": _concat,
    **dict.fromkeys(("ResizeNearest", "ResizeLinear"), _resize),
    **dict.fromkeys(("Gemm", "Add", "Sub", "Mul", "Relu", "Clip", "Sigmoid", "Tanh", "LeakyRelu", "PRelu", "Requantize"), _softless),
}
