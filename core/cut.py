# SPDX-License-Identifier: Apache-2.0
"""Sub-graphs of the form, cut at tensors: `extract` any part, `split` into the part before and the part behind. What comes out is the form again.

A cut int8 tensor gets a border as every graph has: the part before ends in a `DequantizeLinear`, the part behind starts with a `QuantizeLinear`
of the same scale and zero point. Both borders are named `border_name(graph, tensor)`, so the outputs of one are the feeds of the other.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

import onnx
import onnx_ir as ir
from onnx import TensorProto, helper

from isthmus.errors import IsthmusError
from isthmus.form import ISLANDS_KEY
from isthmus.graph import QuantGraph, QuantNode

SUFFIX = "_cut"


def border_name(graph: QuantGraph, tensor: str) -> str:
    """The float32 name under which a cut int8 tensor enters and leaves; a float tensor's own."""
    if graph.tensors[tensor].scale is None:
        return tensor
    name = f"{tensor}{SUFFIX}"
    while name in graph.tensors:
        name += SUFFIX
    return name


def extract(graph: QuantGraph, outputs: Sequence[str], inputs: Sequence[str] = ()) -> QuantGraph:
    """The smallest part that computes `outputs` from `inputs` and from whatever graph inputs it reaches besides.

    All are tensors of the graph: int8 ones, what float islands write, and for `outputs` graph outputs. Raises `IsthmusError` where one is
    neither, or where no output depends on one of `inputs`.
    """
    if not outputs:
        raise IsthmusError("a part of a graph needs at least one output")
    for name in (*outputs, *inputs):
        _check_tensor(graph, name, name in inputs)
    if both := [name for name in outputs if name in inputs]:
        raise IsthmusError(f"{both[0]!r} is asked for as input and as output of the same part")
    part = _Part(graph, list(dict.fromkeys(outputs)), list(dict.fromkeys(inputs)))
    return QuantGraph.from_model(part.model())


def split(graph: QuantGraph, tensors: Sequence[str]) -> tuple[QuantGraph, QuantGraph]:
    """(the part that gives `tensors`, the part that continues from them). Graph outputs that do not depend on them stay with the first.

    The second reads nothing but `tensors`. Raises `IsthmusError` where it would have to: the sentence names the tensors that cross the cut
    beside them.
    """
    behind, others = _behind(graph, tensors), crossing(graph, tensors)
    if others:
        named = ", ".join(repr(name) for name in others[:4]) + (" ..." if len(others) > 4 else "")
        raise IsthmusError(f"a cut at {', '.join(map(repr, tensors))} is not the whole cut: {named} crosses it too; name it as well, or cut elsewhere")
    read = {name for node in behind for name in node.inputs}
    if behind and (idle := [name for name in tensors if name not in read]):
        raise IsthmusError(f"nothing behind the cut reads {idle[0]!r}: leave it out")
    written = {name for node in behind for name in node.outputs}
    later = [spec.name for spec in graph.outputs if spec.name in written]
    if not later:
        raise IsthmusError(f"nothing lies behind {', '.join(map(repr, tensors))}: cut in front of it")
    earlier = [spec.name for spec in graph.outputs if spec.name not in written and spec.name not in tensors]
    return extract(graph, [*tensors, *earlier]), extract(graph, later, tensors)


def crossing(graph: QuantGraph, tensors: Sequence[str]) -> list[str]:
    """What the part behind `tensors` reads from the part before it besides them; constants apart: each part has its own copy of those."""
    behind = _behind(graph, tensors)
    within = {name for node in behind for name in node.outputs} | set(tensors)
    read = dict.fromkeys(name for node in behind for name in node.inputs if name not in within)
    return list(dict.fromkeys(_as_int8(graph, name) for name in read if (producer := graph.producer(name)) is None or producer.inputs))


def _check_tensor(graph: QuantGraph, name: str, as_input: bool) -> None:
    spec, producer = graph.tensors.get(name), graph.producer(name)
    if spec is None:
        shown = [known for known in graph.tensors if graph.tensors[known].dtype == "int8"]
        raise IsthmusError(f"the graph has no tensor {name!r}: its int8 tensors are {', '.join(shown[:8])}{' ...' if len(shown) > 8 else ''}")
    if producer is None:
        raise IsthmusError(f"{name!r} is an input of the graph: cut at a tensor that a layer writes")
    if producer.op == "Constant" and producer.kind == "int8":
        raise IsthmusError(f"{name!r} is a constant: cut at a tensor that depends on the input")
    if spec.dtype not in ("int8", "float32"):
        raise IsthmusError(f"{name!r} is {spec.dtype}, and a border is int8 or float32: cut in front of layer {producer.name!r} or behind the next one")
    if as_input and producer.kind == "border" and producer.op == "DequantizeLinear":
        raise IsthmusError(f"{name!r} is {producer.inputs[0]!r} in real numbers: cut at {producer.inputs[0]!r}")


# ---- which nodes lie where
def _behind(graph: QuantGraph, tensors: Sequence[str]) -> list[QuantNode]:
    """Nodes that depend on `tensors` and that none of them depends on."""
    for name in tensors:
        _check_tensor(graph, name, as_input=True)
    reached, dependent = set(tensors), []
    for node in graph.nodes:
        if reached.intersection(node.inputs):
            reached.update(node.outputs)
            dependent.append(node)
    needed = set(tensors)
    for node in reversed(graph.nodes):
        if needed.intersection(node.outputs):
            needed.update(node.inputs)
    return [node for node in dependent if not needed.intersection(node.outputs)]


def _as_int8(graph: QuantGraph, name: str) -> str:
    """The int8 tensor behind a value in real numbers: that is what can be cut."""
    producer = graph.producer(name)
    return producer.inputs[0] if producer is not None and producer.op == "DequantizeLinear" and producer.kind == "border" else name


class _Part:
    """The ONNX nodes between `inputs` and `outputs`, and the quantisers of the new border."""

    def __init__(self, graph: QuantGraph, outputs: list[str], inputs: list[str]) -> None:
        self.graph, self.outputs, self.inputs = graph, outputs, inputs
        self.source: onnx.ModelProto = ir.serde.serialize_model(graph.model)
        self.writer = {name: node for node in self.source.graph.node for name in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.source.graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def model(self) -> onnx.ModelProto:
        kept = self._kept()
        unused = [name for name in self.inputs if not any(name in node.input for node in kept) and name not in self.outputs]
        if unused:
            raise IsthmusError(f"none of the outputs {', '.join(map(repr, self.outputs))} depends on {unused[0]!r}")
        nodes = [*self._entering(), *kept, *self._leaving()]
        read = {name for node in nodes for name in node.input}
        inputs = [value for value in self.source.graph.input if value.name in read]
        model = onnx.ModelProto()
        model.CopyFrom(self.source)
        for field in ("node", "input", "output", "initializer", "value_info"):
            del getattr(model.graph, field)[:]
        model.graph.node.extend(nodes)
        model.graph.input.extend([*inputs, *(self._border(name) for name in self.inputs)])
        model.graph.output.extend(self._border(name) for name in self.outputs)
        model.graph.initializer.extend(tensor for tensor in self.source.graph.initializer if tensor.name in read)
        names = {node.name or f"{node.op_type}_{node.output[0]}" for node in nodes}
        for entry in model.metadata_props:
            if entry.key == ISLANDS_KEY:
                entry.value = json.dumps([name for name in self.graph.float_islands if name in names])
        return model

    def _kept(self) -> list[onnx.NodeProto]:
        """The nodes that `outputs` need, down to `inputs`, in the file's order; an operator with several results keeps all their quantisers."""
        wanted, kept, left = list(self.outputs), set[str](), set(self.inputs)
        while wanted:
            node = self.writer.get(wanted.pop())
            if node is None or node.output[0] in kept or (len(node.output) == 1 and node.output[0] in left):
                continue
            kept.add(node.output[0])
            wanted += node.input
            if len(node.output) > 1:
                quantisers = [reader for name in node.output for reader in self.readers.get(name, ()) if reader.op_type == "QuantizeLinear"]
                kept.update(reader.output[0] for reader in quantisers if reader.output[0] in left)
                wanted += [name for reader in quantisers for name in (*reader.input, reader.output[0])]
        return [self._apart(node) if node.output[0] in left else node for node in self.source.graph.node if node.output[0] in kept]

    def _apart(self, node: onnx.NodeProto) -> onnx.NodeProto:
        """The quantiser of a result that enters the part from outside: it writes under another name."""
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.output[0] = f"{border_name(self.graph, node.output[0])}_unused"
        return copy

    def _entering(self) -> Iterable[onnx.NodeProto]:
        for name in self.inputs:
            if self.graph.tensors[name].scale is not None:
                border, quantiser = border_name(self.graph, name), self.writer[name]
                yield helper.make_node("QuantizeLinear", [border, *quantiser.input[1:3]], [name], f"{border}_quantise")

    def _leaving(self) -> Iterable[onnx.NodeProto]:
        for name in self.outputs:
            if self.graph.tensors[name].scale is not None:
                border, quantiser = border_name(self.graph, name), self.writer[name]
                yield helper.make_node("DequantizeLinear", [name, *quantiser.input[1:3]], [border], f"{border}_dequantise")

    def _border(self, name: str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(border_name(self.graph, name), TensorProto.FLOAT, list(self.graph.tensors[name].shape))
