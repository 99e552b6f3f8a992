# SPDX-License-Identifier: Apache-2.0
"""`OnnxWriter`: nodes and shared constants of an ONNX model that a target lowers the form into. Names are made unique."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from isthmus.graph import IR_VERSION, QuantNode


class OnnxWriter:
    """Collects; `finish` checks and gives the model. `taken` holds every tensor name that is in use."""

    def __init__(self, taken: Iterable[str]) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self.taken = set(taken)
        self._node_names: set[str] = set()

    def finish(self, name: str, inputs: Sequence[onnx.ValueInfoProto], outputs: Sequence[onnx.ValueInfoProto], opset: int) -> onnx.ModelProto:
        """The model, passed by onnx's checker."""
        body = helper.make_graph(self.nodes, name, inputs, outputs, list(self.constants.values()))
        model = helper.make_model(body, opset_imports=[helper.make_opsetid("", opset)], ir_version=IR_VERSION, producer_name="isthmus")
        onnx.checker.check_model(model)
        return model

    def constant(self, name: str, array: np.ndarray) -> str:
        """An initialiser, one for all that ask for the same name and the same numbers; other numbers get another name."""
        unique = f"constant/{name}"
        proto = numpy_helper.from_array(np.asarray(array, order="C"), unique)
        if self.constants.get(unique, proto) != proto:
            return self.initialiser(self.fresh(unique), array)
        self.taken.add(unique)
        self.constants[unique] = proto
        return unique

    def initialiser(self, tensor: str, array: np.ndarray) -> str:
        """A constant under the tensor's own name."""
        self.taken.add(tensor)
        self.constants[tensor] = numpy_helper.from_array(np.asarray(array, order="C"), tensor)
        return tensor

    def real_constant(self, name: str, values: np.ndarray, scale: np.ndarray, zero: int, axis: int) -> str:
        """Integers behind a DequantizeLinear: one scale, or one along `axis`."""
        parts = [
            self.constant(f"{name}_{part}", array) for part, array in (("steps", values), ("scale", scale), ("zero", np.full(scale.shape, zero, values.dtype)))
        ]
        attributes: dict[str, Any] = {"axis": axis} if scale.ndim else {}
        return self.emit("DequantizeLinear", parts, self.fresh(f"{name}_real"), **attributes)

    def emit(self, op: str, inputs: Sequence[str], output: str, name: str = "", **attributes: Any) -> str:
        """One node with one output, whose name it gives back."""
        self.node(op, inputs, [output], name or f"{output}_{op}", attributes)
        return output

    def node(self, op: str, inputs: Sequence[str], outputs: Sequence[str], name: str, attributes: Mapping[str, Any]) -> None:
        """ONNX does not ask for unique node names; ONNX Runtime does, and TensorRT's messages name nodes."""
        self.nodes.append(helper.make_node(op, list(inputs), list(outputs), _unique(name, self._node_names), **attributes))

    def float_inputs(self, node: QuantNode, names: Sequence[str]) -> list[str]:
        """All inputs of a float island by position: `names` for its activations, its constants, "" for an optional one left out."""
        inputs = list(names)
        for position in sorted(node.constants):
            inputs.extend([""] * (position - len(inputs)))
            inputs.insert(position, self.constant(f"{node.output}_constant_{position}", node.constants[position]))
        return inputs

    def fresh(self, name: str) -> str:
        """A tensor name that nothing has yet."""
        return _unique(name, self.taken)


def _unique(name: str, taken: set[str]) -> str:
    candidate, count = name, 1
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    taken.add(candidate)
    return candidate
