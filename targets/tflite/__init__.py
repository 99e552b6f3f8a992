# SPDX-License-Identifier: Apache-2.0
"""Target tflite: a full-integer `.tflite` file with the graph's own scales, for LiteRT and tflite-runtime on ARM boards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from isthmus.errors import IsthmusError, Problem
from isthmus.graph import QuantGraph, QuantNode
from isthmus.plan import BuildPlan
from isthmus.profile import Profile
from isthmus.target import Option, Target, carried_steps
from isthmus.targets.tflite.float_form import FLOAT_OPS, REDUCTIONS, float_form
from isthmus.targets.tflite.islands import island_problems
from isthmus.targets.tflite.ranges import pairs_overflow
from isthmus.targets.tflite.rounding import ROUNDING, scale_and_zero
from isthmus.targets.tflite.sampling import sampling_problems

ARTIFACT = "model.tflite"
BORDERS = ("int8", "float32")
ROUNDINGS = ("exact", "native")
WINDOW_RANKS = (3, 4)  # one or two space axes
IMAGE_OPS = frozenset({"Conv", "ConvTranspose", "MaxPool", "AveragePool", "GlobalAveragePool", "ResizeNearest", "ResizeLinear"})
# Axes that the kernels of TFLite and XNNPACK take.
LARGEST_RANKS = {"Transpose": 6, "Slice": 5, "Split": 6, "Pad": 5, "Expand": 8, "BatchMatMul": 5, "Add": 6, "Sub": 6, "Mul": 6} | dict.fromkeys(REDUCTIONS, 6)
ENGINE_NOTE = (
    "compared in LiteRT with XNNPACK, its default; tflite-runtime 2.14 opens the same file, but runs int8 layers in TFLite's own kernels, "
    "which round halves away from zero: up to 1 LSB a layer"
)
MICRO_NOTE = "its reference kernels round halves away from zero: up to 1 LSB a layer"
REQUANTISATION_LIMIT = 256.0  # XNNPACK refuses a larger input_scale * weight_scale / output_scale


class TfliteTarget(Target):
    """One file, no steps. What TFLite lacks is said by `check`, node by node."""

    def check(self, graph: QuantGraph, profile: Profile) -> list[Problem]:
        problems = super().check(graph, profile)
        graph, unresolved = float_form(graph)
        problems += unresolved
        refused = {problem.node for problem in problems}
        for node in graph.nodes:
            if node.kind == "float" and node.name in refused:
                continue  # its attributes are ONNX's own
            if node.op in IMAGE_OPS:
                problems += _window_problems(graph, node)
            problems += _weight_problems(graph, node)
            if node.weight_scale is not None or node.op == "Requantize":
                problems += _scale_problems(graph, node)
            problems += _rank_problems(graph, node)
            if node.kind == "float":
                problems += sampling_problems(graph, node) if node.op == "GridSample" else island_problems(graph, node)
        return problems

    def plan(self, graph: QuantGraph, profile: Profile, options: Mapping[str, Any]) -> BuildPlan:
        from isthmus.targets.tflite.c_array import SOURCE, c_files
        from isthmus.targets.tflite.lower import lower  # brings ai-edge-litert, which `check` and the list of targets do without

        chosen = self.with_defaults(options)
        _one_of("io", chosen["io"], BORDERS)
        _one_of("rounding", chosen["rounding"], ROUNDINGS)
        lowered = lower(graph, raw_border=chosen["io"] == "int8", exact=chosen["rounding"] == "exact")
        max_lsb, why_lsb = _difference(lowered.inexact)
        files, notes = {ARTIFACT: lowered.content}, [ENGINE_NOTE]
        if chosen["emit_c"]:
            sources, arena = c_files(lowered.content, graph.digest, lowered.inputs, lowered.outputs)
            files |= sources
            notes.append(f"{SOURCE} holds the model for TensorFlow Lite Micro, which needs an arena of about {arena.size_bytes:,} bytes; {MICRO_NOTE}")
        return BuildPlan(
            files=files,
            steps=(),
            artifact=ARTIFACT,
            engine="tflite",
            inputs=lowered.inputs,
            outputs=lowered.outputs,
            max_lsb=max_lsb,
            why_lsb=why_lsb,
            notes=tuple(notes),
            options=chosen,
        )


def _one_of(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise IsthmusError(f"option {option} of target tflite: expected {' or '.join(allowed)}, found {value!r}")


def _window_problems(graph: QuantGraph, node: QuantNode) -> list[Problem]:
    problems = []
    rank = len(graph.tensors[node.inputs[0]].shape)
    if rank not in WINDOW_RANKS:
        fix = "TFLite has one or two space axes: cut the graph there or choose another target"
        problems.append(Problem(node.name, "tflite-rank", f"{node.op} on {rank} axes", fix))
    elif node.op == "MaxPool" and any(step != 1 for step in node.attributes["dilations"]):
        found = f"MaxPool with dilations {node.attributes['dilations']}"
        problems.append(Problem(node.name, "tflite-dilation", found, "TFLite's MAX_POOL_2D has none: use dilation 1"))
    if any(pad < 0 for pad in node.attributes.get("pads", ())):
        problems.append(Problem(node.name, "tflite-padding", f"negative padding {node.attributes['pads']}", "crop in front of the layer instead"))
    return problems


def _weight_problems(graph: QuantGraph, node: QuantNode) -> list[Problem]:
    count = pairs_overflow(graph, node)
    if not count:
        return []
    found = f"{count} weights of -128 in one output channel: ARM kernels without dot product add pairs of products in int16, which -128 x -128 twice leaves"
    return [Problem(node.name, "tflite-weight-range", found, "quantise weights to [-127, 127], as TFLite's specification asks")]


def _scale_problems(graph: QuantGraph, node: QuantNode) -> list[Problem]:
    weight_scale = 1.0 if node.weight_scale is None else float(node.weight_scale.max())
    ratio = scale_and_zero(graph, node.inputs[0])[0] * weight_scale / scale_and_zero(graph, node.output)[0]
    if ratio < REQUANTISATION_LIMIT:
        return []
    found = f"input scale x weight scale / output scale is {ratio:g}, XNNPACK takes less than {REQUANTISATION_LIMIT:g}"
    return [Problem(node.name, "tflite-scale", found, "the output's scale is far too small: calibrate again")]


def _rank_problems(graph: QuantGraph, node: QuantNode) -> list[Problem]:
    """What TFLite's kernels take of axes, where that is less than any number."""
    limit = LARGEST_RANKS.get(node.op)
    rank = max((len(graph.tensors[name].shape) for name in (*node.inputs, *node.outputs)), default=0)
    if limit is None or rank <= limit:
        return []
    return [Problem(node.name, "tflite-rank", f"{node.op} on {rank} axes", f"TFLite takes up to {limit}: merge axes with a Reshape in front")]


def _difference(nodes: tuple[QuantNode, ...]) -> tuple[int, str]:
    """What the whole graph may differ. One such layer by its own bound; behind several a step can become two (seen: 34 layers, 1 logit in 600)."""
    if not nodes:
        return 0, ""
    ops = sorted({node.op for node in nodes})
    reasons = {ROUNDING[op].why: [other for other in ops if ROUNDING[other].why == ROUNDING[op].why] for op in ops}
    return max(max(ROUNDING[op].max_lsb for op in ops), carried_steps(len(nodes))), "; ".join(f"{', '.join(names)}: {why}" for why, names in reasons.items())


TARGET = TfliteTarget(
    name="tflite",
    ops=frozenset({
        "Conv", "ConvTranspose", "Gemm", "MatMul", "BatchMatMul", "Add", "Sub", "Mul", "Constant",
        "MaxPool", "AveragePool", "GlobalAveragePool", "ReduceMean", "ResizeNearest", "ResizeLinear",
        "Relu", "Clip", "Requantize", "LeakyRelu", "PRelu", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "Silu", "Mish", "Gelu", "Softplus", "Elu",
        "Flatten", "Reshape", "Squeeze", "Unsqueeze", "Concat", "Split", "Slice", "Pad", "Transpose", "Expand", "DepthToSpace", "SpaceToDepth", "Gather",
    }),
    float_ops=FLOAT_OPS,
    options={
        "io": Option("int8", "what the file takes and gives: int8 (raw, no conversion inside) or float32"),
        "emit_c": Option(False, "also model_data.c and model_data.h: the file as a C array with its arena's size, for TensorFlow Lite Micro"),
        "rounding": Option("exact", "exact: Add and Requantize round as the reference does; native: TFLite's own kernels, up to 1 LSB apart"),
    },
)  # fmt: skip

__all__ = ["ROUNDING", "TARGET", "TfliteTarget"]
