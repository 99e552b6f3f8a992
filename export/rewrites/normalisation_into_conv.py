# SPDX-License-Identifier: Apache-2.0
"""Input normalisation, (x * scale - mean) / std in any spelling, goes into the Conv that reads it, so that the border takes raw pixels.

The Conv's padding is zero *after* normalisation. Its raw counterpart is p = -shift / factor, so the raw input is padded with p by a Pad of
its own, and the Conv pads no more. Pad knows one value: where the channels have several, each is padded alone.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from isthmus.export.rewrites._edit import (
    NodeRewrite,
    add_constant,
    affine,
    attributes_of,
    constant,
    input_at,
    label_of,
    new_node,
    only_reader,
    replace,
    static_shape,
)
from isthmus.export.rewrites.grayscale_into_conv import repeated

MOST_CHANNELS = 4  # an image's; a Pad for each of many channels would cost more than the normalisation


class NormalisationIntoConv(NodeRewrite):
    def rewrite(self, graph: ir.Graph, node: ir.Node) -> bool:
        weight, bias = constant(input_at(node, 1)), constant(input_at(node, 2))
        given = attributes_of(node)
        if node.op_type != "Conv" or weight is None or given.get("group", 1) != 1 or (bias is None and input_at(node, 2) is not None):
            return False
        found = normalisation(node.inputs[0])
        pads = given.get("pads", [])
        if found is None or not any(pads) or given.get("auto_pad", "NOTSET") != "NOTSET":
            return False  # without padding `scale_into_weights` does it
        source, factor, shift = found
        shape = static_shape(source) or ()
        if len(shape) != weight.ndim or shape[1] > MOST_CHANNELS or not factor.all():
            return False
        columns = (1, -1, *[1] * (weight.ndim - 2))
        moved = (weight.astype(np.float64) * shift.reshape(columns)).reshape(weight.shape[0], -1).sum(axis=1)
        scaled = weight.astype(np.float64) * factor.reshape(columns)
        *nodes, padded = _padded(graph, label_of(node), source, shape, pads, np.asarray(-shift / factor, np.float32))
        inputs = [
            padded.outputs[0],
            add_constant(graph, f"{label_of(node)}_weight", scaled.astype(np.float32)),
            add_constant(graph, f"{label_of(node)}_bias", (moved + (0.0 if bias is None else bias)).astype(np.float32)),
        ]
        conv = new_node("Conv", inputs, given | {"pads": [0] * len(pads)}, node.name)
        replace(graph, [node], [*nodes, padded, conv])
        return True


def normalisation(value: ir.Value | None) -> tuple[ir.Value, np.ndarray, np.ndarray] | None:
    """(source, factor [C], shift [C]) where the value is source times factor plus shift, by nodes that nothing else reads, and the source
    is a graph input or a grey one repeated along the channels.
    """
    factor, shift = None, None
    while value is not None and not value.is_graph_input() and _grey(value) is None:
        node = value.producer()
        found = affine(node) if node is not None and only_reader(value) is not None else None
        if found is None:
            return None
        value, inner, added = found
        outer = np.ones_like(inner) if factor is None else factor
        moved = np.zeros_like(inner) if shift is None else shift
        factor, shift = outer * inner, moved + (0.0 if added is None else outer * added)
    return None if value is None or factor is None or shift is None or not shift.any() else (value, factor, shift)


def _grey(value: ir.Value) -> ir.Value | None:
    """The graph input of one channel that the value repeats, if it does."""
    source = repeated(value.producer())
    return source if source is not None and source.is_graph_input() and (static_shape(source) or ())[1] == 1 else None


def _padded(graph: ir.Graph, label: str, source: ir.Value, shape: tuple[int, ...], pads: list[int], values: np.ndarray) -> list[ir.Node]:
    """The nodes that pad each channel of `source` with its own value; the last one's result is the whole."""
    rank = len(shape) - 2
    amounts = add_constant(graph, f"{label}_pads", np.array([0, 0, *pads[:rank], 0, 0, *pads[rank:]], np.int64))
    space = [extent + begin + end for extent, begin, end in zip(shape[2:], pads[:rank], pads[rank:], strict=True)]

    def pad(part: ir.Value, channels: int, value: np.float32, suffix: str) -> ir.Node:
        level = add_constant(graph, f"{label}_level{suffix}", np.array(value, np.float32))
        return new_node("Pad", [part, amounts, level], {"mode": "constant"}, f"{label}_pad{suffix}", (shape[0], channels, *space))

    grey, alike = _grey(source), bool((values == values[0]).all())
    if alike and grey is None:
        return [pad(source, shape[1], values[0], "")]
    if grey is not None:
        nodes = []
        pads_of = [pad(grey, 1, value, f"_{channel}") for channel, value in enumerate(values[:1] if alike else values)]
    else:
        sizes = add_constant(graph, f"{label}_split", np.ones(shape[1], np.int64))
        split = ir.node("Split", [source, sizes], {"axis": 1}, num_outputs=shape[1], name=f"{label}_channels")
        for part in split.outputs:
            part.shape, part.type = ir.Shape((shape[0], 1, *shape[2:])), ir.TensorType(ir.DataType.FLOAT)
        nodes = [split]
        pads_of = [pad(part, 1, value, f"_{channel}") for channel, (part, value) in enumerate(zip(split.outputs, values, strict=True))]
    joined = [node.outputs[0] for node in pads_of] * (shape[1] // len(pads_of))
    return [*nodes, *pads_of, new_node("Concat", joined, {"axis": 1}, f"{label}_padded", (*shape[:2], *space))]
