# SPDX-License-Identifier: Apache-2.0
"""A softmax at the end of the network: the FPGA gives the int8 values in front of it, the host that reads them computes the rest."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from isthmus.spec import TensorSpec

if TYPE_CHECKING:
    from isthmus.graph import QuantGraph, QuantNode

TAIL_FILE = "host_tail.json"
TAIL_SCHEMA = 1
TAIL_OPERATORS = frozenset({"Softmax"})


def softmax_tail(graph: QuantGraph, index: int) -> QuantNode | None:
    """The Softmax that writes output `index` straight from dequantised values; None where there is none."""
    node = graph.producer(graph.outputs[index].name)
    if node is None or node.kind != "float" or node.op not in TAIL_OPERATORS:
        return None
    source = graph.producer(node.inputs[0])
    return node if source is not None and source.op == "DequantizeLinear" else None


def fpga_output(graph: QuantGraph, index: int) -> str:
    """The int8 tensor that the FPGA gives for output `index`."""
    tail = softmax_tail(graph, index)
    source = graph.producer(tail.inputs[0]) if tail is not None else None
    return source.inputs[0] if source is not None else graph.raw_output(index)


def fpga_outputs(graph: QuantGraph) -> tuple[str, ...]:
    return tuple(fpga_output(graph, index) for index in range(len(graph.outputs)))


def tail_file(graph: QuantGraph, raw: tuple[TensorSpec, ...]) -> bytes | None:
    """What the session computes behind the FPGA: by output, the raw border and the softmax axis (in the form's layout, None: no softmax)."""
    tails = [softmax_tail(graph, index) for index in range(len(graph.outputs))]
    if not any(tails):
        return None
    outputs = []
    for spec, border, tail in zip(graph.outputs, raw, tails, strict=True):
        axis = None if tail is None else int(tail.attributes.get("axis", -1))
        outputs.append({"name": spec.name, "raw": border.to_json(), "softmax_axis": axis})
    return (json.dumps({"schema": TAIL_SCHEMA, "outputs": outputs}, indent=1, sort_keys=True) + "\n").encode()
