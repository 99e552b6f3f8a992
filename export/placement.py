# SPDX-License-Identifier: Apache-2.0
"""Where the quantisers of a float graph go: which nodes are int8, which values that quantises, and which of them share one scale.

Layers with weights are int8 where the form has them and the recipe does not keep them float. Operators without weights follow their
neighbours: between float islands they stay float, as quantising there would only lose accuracy. Values joined by an operator that keeps the scale
(MaxPool, Reshape, Concat, Split, ...) form a group with one scale. The graph is one that `settle` has been through.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from isthmus.errors import IsthmusError, Problem, ProblemsError
from isthmus.export.draft import activations, bounds, fits_int8, follower, is_weighted, operands, passes_scale, results
from isthmus.export.rewrites._edit import constant, input_at
from isthmus.recipe import Recipe

# A padding value beyond it stands for minus infinity ("must never win"): it saturates instead of deciding a range.
LARGEST_PADDING = 1e6


@dataclass(frozen=True)
class Placement:
    """`int8_nodes` by name; `fused` the Relu or Clip a node takes with it; `groups` maps each quantised value to its group's
    representative; `sources` are the values that decide a group's range (the others only pass values on), and `constants` the ranges that are
    known without calibration: of constant operands, and of what a Pad puts around a tensor.
    """

    int8_nodes: frozenset[str]
    fused: Mapping[str, ir.Node]
    groups: Mapping[str, str]
    sources: tuple[str, ...]
    constants: Mapping[str, tuple[float, float]]


def place(model: ir.Model, recipe: Recipe | None = None) -> Placement:
    """The placement for a prepared float graph; layers that the recipe keeps float are islands. Raises `ProblemsError` where no layer with
    weights can be int8, `IsthmusError` where a pattern of the recipe matches no layer.
    """
    nodes = list(model.graph)
    kept = _kept_float(nodes, recipe) if recipe is not None else frozenset()
    int8 = _int8_nodes(nodes, kept)
    if not any(is_weighted(node) for node in nodes if node.name in int8):
        found = f"none of its {len(nodes)} nodes is a layer with weights that int8 has (Conv, ConvTranspose, Gemm, MatMul by a constant)"
        if kept:
            found = f"the recipe keeps {len(kept)} of its {len(nodes)} nodes float, and none of the others is a layer with weights that int8 has"
        raise ProblemsError("nothing to quantise", [Problem("model", "nothing-to-quantise", found, "give a network, or run it as float")])
    fused = {name: reader for name, node in int8.items() if (reader := _fused(node, kept)) is not None}
    groups: dict[str, str] = {}
    sources: list[str] = []
    constants: dict[str, tuple[float, float]] = {}
    for name, node in int8.items():
        inputs = [value_name(value) for value in operands(node)]
        written = [value_name(value) for value in results(fused.get(name) or node)]
        for value in (*inputs, *written):
            groups.setdefault(value, value)
        produced = written if not passes_scale(node) or node.op_type == "Clip" else []
        fresh = [value_name(value) for value in activations(node) if not _from_int8(value, int8, fused)]
        sources += [value for value in dict.fromkeys((*fresh, *produced)) if value not in sources]
        constants |= {value_name(value): _range(held) for value in operands(node) if (held := constant(value)) is not None}
        constants |= _padding(node)
        if passes_scale(node):
            for value in (*inputs[1:], *written):
                _join(groups, inputs[0], value)
    return Placement(frozenset(int8), fused, {value: _root(groups, value) for value in groups}, tuple(sources), constants)


def _range(held: np.ndarray) -> tuple[float, float]:
    return float(held.min(initial=0.0)), float(held.max(initial=0.0))


def _padding(node: ir.Node) -> dict[str, tuple[float, float]]:
    """What a Pad adds to the range of its result."""
    held = constant(input_at(node, 2)) if node.op_type == "Pad" else None
    level = 0.0 if held is None else float(held.reshape(-1)[0])
    return {value_name(node.outputs[0]): (level, level)} if 0 < abs(level) <= LARGEST_PADDING and math.isfinite(level) else {}


def value_name(value: ir.Value) -> str:
    return value.name or ""


def _kept_float(nodes: list[ir.Node], recipe: Recipe) -> frozenset[str]:
    names = [str(node.name) for node in nodes]
    unmatched = recipe.unmatched(names)
    if unmatched:
        some = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        raise IsthmusError(f"recipe {recipe.name}: pattern {unmatched[0]!r} matches no layer of the prepared model; its layers are {some}")
    return frozenset(name for name in names if recipe.keeps_float(name))


def _fused(node: ir.Node, kept: frozenset[str]) -> ir.Node | None:
    reader = follower(node)
    return reader if reader is not None and str(reader.name) not in kept else None


def _int8_nodes(nodes: list[ir.Node], kept: frozenset[str]) -> dict[str, ir.Node]:
    """By name, in order: layers with weights, what is joined to them in either direction, without fused followers."""
    able = [node for node in nodes if fits_int8(node) and str(node.name) not in kept]
    chosen = {str(node.name): node for node in able if is_weighted(node)}
    while True:
        before = len(chosen)
        for node in able:
            if any(_carries_int8(value, chosen) for value in activations(node)):
                chosen[str(node.name)] = node
        for node in reversed(able):
            # Not backwards over a Relu or Clip behind an island: what it reads has the wider range, a quantiser behind it loses less.
            if bounds(node) is None and any(str(reader.name) in chosen for reader in _readers(node)):
                chosen[str(node.name)] = node
        if len(chosen) == before:
            break
    while lonely := [name for name, node in chosen.items() if _is_lonely(node, chosen)]:
        for name in lonely:
            del chosen[name]
    absorbed = {str(reader.name) for node in chosen.values() if (reader := _fused(node, kept)) is not None}
    return {str(node.name): node for node in nodes if str(node.name) in chosen and str(node.name) not in absorbed}


def _carries_int8(value: ir.Value, chosen: Mapping[str, ir.Node]) -> bool:
    producer = value.producer()
    return producer is None or str(producer.name) in chosen  # a graph input is quantised where its readers are int8


def _is_lonely(node: ir.Node, chosen: Mapping[str, ir.Node]) -> bool:
    """A node without weights that gets nothing from an int8 node and gives nothing to one."""
    if is_weighted(node):
        return False
    neighbours = [producer for value in activations(node) if (producer := value.producer()) is not None] + _readers(node)
    return not any(str(neighbour.name) in chosen for neighbour in neighbours)


def _readers(node: ir.Node) -> list[ir.Node]:
    return [reader for value in results(node) for reader in value.consumers()]


def _from_int8(value: ir.Value, int8: Mapping[str, ir.Node], fused: Mapping[str, ir.Node]) -> bool:
    producer = value.producer()
    return producer is not None and (str(producer.name) in int8 or any(reader is producer for reader in fused.values()))


def _root(groups: dict[str, str], value: str) -> str:
    while groups[value] != value:
        value = groups[value]
    return value


def _join(groups: dict[str, str], first: str, second: str) -> None:
    groups[_root(groups, second)] = _root(groups, first)
