# SPDX-License-Identifier: Apache-2.0
"""Float islands: what one float operator of the form computes, by onnx's own reference evaluator (GridSample: by numpy, as that one takes seconds)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from isthmus.errors import IsthmusError

if TYPE_CHECKING:
    from isthmus.graph import QuantNode

OPSET = 20


class Island:
    """One float node, ready to run. Raises `IsthmusError` naming the node where onnx's reference has no such operator, or cannot compute it."""

    def __init__(self, node: QuantNode) -> None:
        self.node = node
        count = len(node.inputs) + len(node.constants)
        free = iter(f"x{index}" for index in range(len(node.inputs)))
        self._names = [
            "" if position in node.absent else f"c{position}" if position in node.constants else next(free) for position in range(count + len(node.absent))
        ]
        self._evaluator = self._built()

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """One run at the graph's own batch."""
        if self._is_sampling_of_images(inputs):
            attributes = self.node.attributes
            return [
                grid_sample(
                    inputs[0], inputs[1], attributes.get("mode", "linear"), attributes.get("padding_mode", "zeros"), bool(attributes.get("align_corners", 0))
                )
            ]
        feeds = {f"x{index}": array for index, array in enumerate(inputs)}
        try:
            with np.errstate(all="ignore"):
                return [np.asarray(value) for value in self._evaluator.run(None, feeds)]
        except Exception as error:  # the evaluator's operators raise whatever numpy and Python raise
            raise IsthmusError(f"float island {self.node.name!r} ({self.node.op}) cannot be computed by onnx's reference: {_first_line(error)}") from error

    def _is_sampling_of_images(self, inputs: Sequence[np.ndarray]) -> bool:
        node = self.node
        return (
            node.op == "GridSample"
            and [array.ndim for array in inputs] == [4, 4]
            and node.attributes.get("mode", "linear") in ("linear", "nearest")
            and node.attributes.get("padding_mode", "zeros") in ("zeros", "border")
        )

    def _built(self) -> ReferenceEvaluator:
        node, outputs = self.node, list(self.node.outputs)
        try:
            proto = onnx.helper.make_node(node.op, self._names, outputs, **dict(node.attributes))
            graph = onnx.helper.make_graph(
                [proto],
                "island",
                [onnx.helper.make_tensor_value_info(f"x{index}", onnx.TensorProto.FLOAT, None) for index in range(len(node.inputs))],
                [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in outputs],
                [onnx.numpy_helper.from_array(array, f"c{position}") for position, array in node.constants.items()],
            )
            return ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)]))
        except Exception as error:  # no such operator, or attributes it does not take: several unrelated types
            raise IsthmusError(f"float island {node.name!r}: onnx's reference has no {node.op} like this: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def grid_sample(x: np.ndarray, grid: np.ndarray, mode: str, padding: str, align_corners: bool) -> np.ndarray:
    """ONNX GridSample in float32: x (N, C, H, W), grid (N, h, w, 2) with (x, y) in [-1, 1] -> (N, C, h, w). Padding by zeros or by the border."""
    height, width = x.shape[2:]
    places = [_unnormalised(grid[..., axis], extent, align_corners) for axis, extent in ((1, height), (0, width))]
    if padding == "border":
        places = [np.clip(place, 0, extent - 1) for place, extent in zip(places, (height, width), strict=True)]
    if mode == "nearest":
        return _picked(x, np.rint(places[0]), np.rint(places[1]), padding)
    top, left = (np.floor(place) for place in places)
    down, right = places[0] - top, places[1] - left
    weighted = (
        (top, left, (1 - down) * (1 - right)),
        (top, left + 1, (1 - down) * right),
        (top + 1, left, down * (1 - right)),
        (top + 1, left + 1, down * right),
    )
    total = sum(_picked(x, row, column, padding) * weight[:, None] for row, column, weight in weighted)
    return np.asarray(total, np.float32)


def _unnormalised(place: np.ndarray, extent: int, align_corners: bool) -> np.ndarray:
    moved = (place + 1) / 2 * (extent - 1) if align_corners else ((place + 1) * extent - 1) / 2
    return np.asarray(moved, np.float32)


def _picked(x: np.ndarray, row: np.ndarray, column: np.ndarray, padding: str) -> np.ndarray:
    """x at whole places (N, h, w) of the last two axes; zero outside, or the border's value."""
    height, width = x.shape[2:]
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    rows, columns = (np.clip(np.nan_to_num(place), 0, extent - 1).astype(np.intp) for place, extent in ((row, height), (column, width)))
    batch = np.arange(len(x))[:, None, None]
    values = x.transpose(0, 2, 3, 1)[batch, rows, columns].transpose(0, 3, 1, 2)
    kept: np.ndarray = values if padding == "border" else np.where(inside[:, None], values, np.float32(0))
    return kept
