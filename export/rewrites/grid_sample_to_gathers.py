# SPDX-License-Identifier: Apache-2.0
"""GridSample by a grid that never changes: each output pixel is a weighted sum of up to four input pixels, all known when compiling.

So: flatten the pixels, one Gather for each tap, times its weights, summed. Bilinear and nearest; zeros, border and reflection padding.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from isthmus.export.rewrites._edit import NodeRewrite, add_constant, attributes_of, constant, input_at, label_of, new_node, replace, static_shape

MODES = {"linear": "linear", "bilinear": "linear", "nearest": "nearest"}  # "bilinear" until opset 19


class GridSampleToGathers(NodeRewrite):
    def rewrite(self, graph: ir.Graph, node: ir.Node) -> bool:
        shape = static_shape(node.inputs[0]) if node.op_type == "GridSample" else None
        grid, given = constant(input_at(node, 1)), attributes_of(node)
        mode = MODES.get(given.get("mode", "linear"))
        if shape is None or len(shape) != 4 or grid is None or mode is None or not np.isfinite(grid).all() or (grid != grid[:1]).any():
            return False
        found = taps(grid[0], shape[2:], mode, given.get("padding_mode", "zeros"), bool(given.get("align_corners", 0)))
        new = self._nodes(graph, node, shape, found)
        replace(graph, [node], new)
        return True

    def _nodes(self, graph: ir.Graph, node: ir.Node, shape: tuple[int, ...], found: list[tuple[np.ndarray, np.ndarray]]) -> list[ir.Node]:
        label, after = label_of(node), static_shape(node.outputs[0]) or ()
        pixels = found[0][0].size
        flat = (*shape[:2], pixels)
        rows = add_constant(graph, f"{label}_pixels", np.array([*shape[:2], shape[2] * shape[3]], np.int64))
        new = [new_node("Reshape", [node.inputs[0], rows], {}, f"{label}_flat", (*shape[:2], shape[2] * shape[3]))]
        terms: list[ir.Value] = []
        for index, (places, weights) in enumerate(found):
            picked = add_constant(graph, f"{label}_places_{index}", places.reshape(-1))
            new.append(new_node("Gather", [new[0].outputs[0], picked], {"axis": 2}, f"{label}_tap_{index}", flat))
            if (weights != 1).any():
                factor = add_constant(graph, f"{label}_weights_{index}", weights.reshape(1, 1, -1))
                new.append(new_node("Mul", [new[-1].outputs[0], factor], {}, f"{label}_weighted_{index}", flat))
            terms.append(new[-1].outputs[0])
        total = terms[0]
        for index, term in enumerate(terms[1:], 1):
            new.append(new_node("Add", [total, term], {}, f"{label}_sum_{index}", flat))
            total = new[-1].outputs[0]
        whole = add_constant(graph, f"{label}_shape", np.array(after, np.int64))
        return [*new, new_node("Reshape", [total, whole], {}, node.name)]


def taps(grid: np.ndarray, space: tuple[int, ...], mode: str, padding: str, corners: bool) -> list[tuple[np.ndarray, np.ndarray]]:
    """(flat pixel indices int64, weights float32) for each tap with any weight, of `grid` [H, W, 2] (x, y in -1..1); one tap at least."""
    along = [_axis_taps(grid[..., 1 - axis], extent, mode, padding, corners) for axis, extent in enumerate(space)]
    found = []
    for row, row_weight in along[0]:
        for column, column_weight in along[1]:
            weight = (row_weight * column_weight).astype(np.float32)
            found.append((row * space[1] + column, weight))
    return [tap for tap in found if tap[1].any()] or found[:1]


def _axis_taps(positions: np.ndarray, extent: int, mode: str, padding: str, corners: bool) -> list[tuple[np.ndarray, np.ndarray]]:
    # In float32 like the engines: which of two pixels is the nearest must not depend on our precision.
    one, size = np.float32(1), np.float32(extent)
    positions = positions.astype(np.float32)
    at = (positions + one) / np.float32(2) * (size - one) if corners else ((positions + one) * size - one) / np.float32(2)
    if mode == "nearest":
        return [_inside(np.rint(at).astype(np.int64), np.ones_like(at), extent, padding, corners)]
    low = np.floor(at)
    share = at - low
    pixel = low.astype(np.int64)
    return [_inside(pixel, one - share, extent, padding, corners), _inside(pixel + 1, share, extent, padding, corners)]


def _inside(pixel: np.ndarray, weight: np.ndarray, extent: int, padding: str, corners: bool) -> tuple[np.ndarray, np.ndarray]:
    """The pixel that a tap outside reads, by the padding mode; with "zeros" it weighs nothing."""
    if padding == "reflection":
        period = max(2 * (extent - 1), 1) if corners else 2 * extent
        folded = np.mod(pixel, period)
        pixel = np.minimum(folded, period - folded) if corners else np.minimum(folded, period - 1 - folded)
    elif padding == "zeros":
        weight = np.where((pixel < 0) | (pixel >= extent), np.float32(0), weight)
    return np.clip(pixel, 0, extent - 1), weight
