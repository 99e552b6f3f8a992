# SPDX-License-Identifier: Apache-2.0
"""The deep learning accelerator (DLA) of Xavier, Orin NX and AGX Orin: which layers it takes, by its own limits, and which fall back to the GPU.

Read in: NVIDIA/TensorRT, `include/NvInfer.h` of the branches release/8.5 and release/10.3 (JetPack 5 and 6), which states the DLA's limits at each layer;
NVIDIA/Deep-Learning-Accelerator-SW, `operators/README.md`, for which ONNX operators TensorRT gives to Orin's DLA; batch and extents: TensorRT documentation,
"DLA Supported Layers and Restrictions"; which layer an operator becomes: onnx/onnx-tensorrt, branches 8.5-GA and 10.1-GA. A DLA reads FP16 or int8
tensors of four axes. A layer whose limits were not read is counted for the GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from isthmus.graph import QuantGraph, QuantNode
from isthmus.profile import Profile

LARGEST_EXTENT = 8192
LARGEST_BATCH = 4096
KERNEL, STRIDE, DILATION, PADDING = (1, 32), (1, 8), (1, 32), (0, 31)
LONG_KERNELS = frozenset({64, 96, 128})  # of a transposed convolution along one axis, 1 along the other; strides alike
POOL_WINDOW, POOL_STRIDE, POOL_PADDING = (1, 8), (1, 16), (0, 7)
NEAREST_FACTOR, LINEAR_FACTOR = (1, 32), (1, 4)
# (coordinates, rounding) in ONNX's words; NvInfer.h: asymmetric with floor, half pixels rounded half down or half up.
NEAREST = frozenset({("asymmetric", "floor"), ("half_pixel", "round_prefer_floor"), ("half_pixel", "round_prefer_ceil")})
LINEAR = frozenset({"half_pixel", "pytorch_half_pixel"})
ORIN = 87
Reason = str  # "" where the DLA takes the layer


def dla_rows(graph: QuantGraph, profile: Profile) -> list[tuple[QuantNode, Reason]]:
    """Every layer with the reason why the DLA does not take it."""
    return [(node, why_not_on_dla(graph, node, int(profile.toolchain["sm"]))) for node in graph.nodes if node.kind != "border"]


def dla_report(graph: QuantGraph, profile: Profile) -> list[str]:
    """Sentences for the manifest."""
    if not profile.facts["dla_count"]:
        return [f"option dla: {profile.board} has no DLA, every layer runs on the GPU"]
    rows = dla_rows(graph, profile)
    fallen = [f"{node.name} ({node.op}: {reason})" for node, reason in rows if reason]
    said = f"option dla: the DLA's limits take {len(rows) - len(fallen)} of {len(rows)} layers"
    return [said + ("" if not fallen else "; on the GPU: " + ", ".join(fallen))]


def why_not_on_dla(graph: QuantGraph, node: QuantNode, sm: int = ORIN) -> Reason:
    """One reason, "" where the layer fits. `sm`: the GPU generation of the board, 72 for Xavier, whose DLA takes less."""
    rule = _RULES.get(node.op) if node.kind == "int8" else None
    if rule is None:
        return "the DLA has no such layer"
    shapes = [graph.tensors[name].shape for name in (*node.inputs, *node.outputs)]
    if any(len(shape) != 4 for shape in shapes) and node.op != "Gemm":
        return "tensors must have four axes"
    if any(shape[0] > LARGEST_BATCH for shape in shapes) or any(extent > LARGEST_EXTENT for shape in shapes for extent in shape[1:]):
        return f"batch above {LARGEST_BATCH} or an extent above {LARGEST_EXTENT}"
    return rule(graph, node, sm)


def _outside(name: str, values: Sequence[int], limits: tuple[int, int]) -> Reason:
    return "" if all(limits[0] <= value <= limits[1] for value in values) else f"{name} {list(values)} outside {limits[0]} to {limits[1]}"


def _conv(graph: QuantGraph, node: QuantNode, sm: int) -> Reason:
    a = node.attributes
    kernel, pads = a["kernel_shape"], a["pads"]
    wider = any(pad >= extent for pad, extent in zip(pads, (*kernel, *kernel), strict=True))
    return (
        _outside("kernel", kernel, KERNEL)
        or _outside("stride", a["strides"], STRIDE)
        or _outside("padding", pads, PADDING)
        or (f"padding {list(pads)} not below the kernel {list(kernel)}" if wider else "")
        or _outside("dilation", a["dilations"], DILATION)
    )


def _conv_transpose(graph: QuantGraph, node: QuantNode, sm: int) -> Reason:
    a = node.attributes
    if a["group"] != 1 or set(a["dilations"]) != {1} or any(a["pads"]) or any(a["output_padding"]):
        return "a transposed convolution with groups, dilation or padding"
    return _long("kernel", a["kernel_shape"]) or _long("stride", a["strides"])


def _long(name: str, values: Sequence[int]) -> Reason:
    return "" if min(values) == 1 and max(values) in LONG_KERNELS else _outside(name, values, KERNEL)


def _pool(graph: QuantGraph, node: QuantNode, sm: int) -> Reason:
    a = node.attributes
    if node.op == "AveragePool" and any(a["pads"]) and not a["count_include_pad"] and sm < ORIN:
        return "an average that leaves out its padding"
    return (
        _outside("window", a["kernel_shape"], POOL_WINDOW)
        or _outside("stride", a["strides"], POOL_STRIDE)
        or _outside("padding", a["pads"], POOL_PADDING)
        or _one_scale(graph, "input and output", [*node.inputs, *node.outputs])
    )


def _concat(graph: QuantGraph, node: QuantNode, sm: int) -> Reason:
    return "" if node.attributes["axis"] == 1 else "a join along another axis than the channels"


def _resize(graph: QuantGraph, node: QuantNode, sm: int) -> Reason:
    a = node.attributes
    before, after = graph.tensors[node.inputs[0]].shape[2:], graph.tensors[node.output].shape[2:]
    linear = node.op == "ResizeLinear"
    least, most = LINEAR_FACTOR if linear else NEAREST_FACTOR
    if any(new % old or not least <= new // old <= most for old, new in zip(before, after, strict=True)):
        return f"{'bilinear' if linear else 'nearest'} by other than whole factors up to {most}"
    transform, rounding = a["coordinate_transformation_mode"], a.get("nearest_mode", "")
    if transform in LINEAR if linear else (transform, rounding) in NEAREST:
        return ""
    return f"its coordinates ({transform}{f', {rounding}' if rounding else ''}) are none of the DLA's"


def _two_operands(graph: QuantGraph, node: QuantNode, sm: int) -> Reason:
    return _one_scale(graph, "both operands", node.inputs)


def _one_scale(graph: QuantGraph, what: str, names: Sequence[str]) -> Reason:
    return "" if len({graph.tensors[name].scale for name in names}) == 1 else f"in int8 {what} must share one scale"


def _slice(graph: QuantGraph, node: QuantNode, sm: int) -> Reason:
    a = node.attributes
    axes, steps = ([a["axis"]], []) if node.op == "Split" else (a["axes"], a["steps"])
    if sm < ORIN:
        return "read for Orin's DLA alone"
    return "a slice of the batch, or with steps" if 0 in axes or any(step != 1 for step in steps) else ""


def _global_average(graph: QuantGraph, node: QuantNode, sm: int) -> Reason:
    return "the parser makes a reduction of it, and TensorRT gives the DLA no average over an image"


def _not_read(graph: QuantGraph, node: QuantNode, sm: int) -> Reason:
    return "NVIDIA's limits for a Shuffle layer were not read"


def _no_limit(graph: QuantGraph, node: QuantNode, sm: int) -> Reason:
    return ""


_RULES: dict[str, Callable[[QuantGraph, QuantNode, int], Reason]] = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    **dict.fromkeys(("MaxPool", "AveragePool"), _pool),
    **dict.fromkeys(("GlobalAveragePool", "ReduceMean"), _global_average),
    "Concat": _concat,
    **dict.fromkeys(("ResizeNearest", "ResizeLinear"), _resize),
    **dict.fromkeys(("Add", "Sub", "Mul"), _two_operands),
    **dict.fromkeys(("Slice", "Split"), _slice),
    **dict.fromkeys(("Reshape", "Transpose"), _not_read),
    **dict.fromkeys(("Gemm", "MatMul", "Relu", "Clip", "Sigmoid", "Tanh", "LeakyRelu", "PRelu", "Requantize"), _no_limit),
}
