# SPDX-License-Identifier: Apache-2.0
"""The inside of a `.tflite` artifact: a copy of the file in which the form's int8 tensors are outputs of the graph."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

from isthmus.errors import IsthmusError
from isthmus.exposure import Exposure, Shown
from isthmus.graph import QuantGraph
from isthmus.spec import TensorSpec
from isthmus.targets.tflite.flatbuffer import IDENTIFIER, aligning_builder, schema
from isthmus.targets.tflite.lower import lower
from isthmus.targets.tflite.lowering import Order, shape_in


def expose(content: bytes, graph: QuantGraph, options: Mapping[str, Any]) -> Exposure:
    """`options`: those the artifact was made with; how its tensors lie follows from them. Raises `IsthmusError` where the file is no whole `.tflite`.

    XNNPACK merges no operators across an output: what it would have merged runs apart in the copy.
    """
    classes = schema()
    try:
        model = classes.ModelT.InitFromPackedBuf(bytearray(content), 0)
        graph_in_file = model.subgraphs[0]
        tensors = {tensor.name.decode(): (index, tensor) for index, tensor in enumerate(graph_in_file.tensors)}
    except (struct.error, IndexError, TypeError, AttributeError, ValueError) as error:
        raise IsthmusError(f"the artifact is no readable .tflite file ({type(error).__name__}: {error}); compile the bundle again") from None
    orders = lower(graph, raw_border=options.get("io", "int8") == "int8", exact=options.get("rounding", "exact") == "exact").orders
    present = {int(index) for index in (*graph_in_file.inputs, *graph_in_file.outputs)}
    shown, added = [], []
    for name, spec in graph.tensors.items():
        index, tensor = tensors.get(name, (-1, None))
        if tensor is None or name not in orders or spec.scale is None or index in present or tensor.type != classes.TensorType.INT8:
            continue
        order, image = orders[name]
        shape = shape_in(order, spec.shape)
        if tuple(tensor.shape) != shape:
            continue
        layout = "NHWC" if order is Order.LAST else ""
        shown.append(Shown(name, TensorSpec(name, shape, "int8", layout, spec.scale, spec.zero_point), image))
        added.append(index)
    graph_in_file.outputs = np.asarray([*graph_in_file.outputs, *added], np.int32)
    model.signatureDefs = None  # a signature lists all outputs or none
    builder = aligning_builder()
    builder.Finish(model.Pack(builder), IDENTIFIER)
    return Exposure(bytes(builder.Output()), tuple(tensor.spec for tensor in shown), tuple(shown))
