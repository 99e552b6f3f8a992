# SPDX-License-Identifier: Apache-2.0
"""Takes the quantisers out of a QDQ graph: what is left is float ONNX plus `REQUANTISE` nodes, and beside it what they said.

Every QuantizeLinear -> (Clip) -> DequantizeLinear of an activation becomes one `REQUANTISE` node whose result carries a `Step`; every
DequantizeLinear of a constant becomes a float constant, its integers kept in `held`. uint8 becomes int8 by moving values and zero point
by 128: exactly the same real numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto
from onnx_ir.passes import common
from onnxscript import optimizer

from isthmus.errors import Problem, ProblemsError
from isthmus.export.accept import node_label, type_name
from isthmus.export.draft import REQUANTISE, Step, bounds
from isthmus.export.rewrites._edit import add_constant, attributes_of, constant, input_at, new_node, only_reader, replace
from isthmus.export.shapes import infer_shapes, require_static

UNSIGNED_OFFSET = 128
EVERY_SIZE = 2**31  # the optimiser's own limits keep large constants unfolded; a weight is large


@dataclass(frozen=True)
class Held:
    """The integers behind a constant: real = (values - zero_point) * scale, `scale` [] or [n] along `axis`."""

    values: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray
    axis: int

    @property
    def real(self) -> np.ndarray:
        shape = [1] * self.values.ndim
        if self.scale.size > 1:
            shape[self.axis] = self.scale.size
        steps = self.scale.astype(np.float64).reshape(shape if self.scale.size > 1 else ())
        zeros = self.zero_point.astype(np.float64).reshape(shape if self.zero_point.size > 1 else ())
        return (self.values.astype(np.float64) - zeros) * steps


@dataclass
class Unquantised:
    """`steps` by the name of a REQUANTISE node's result, `held` by the name of a float constant."""

    model: ir.Model
    steps: dict[str, Step] = field(default_factory=dict)
    held: dict[str, Held] = field(default_factory=dict)


def unquantise(model: onnx.ModelProto) -> Unquantised:
    """`model` has static inputs and opset 20. Raises `ProblemsError` for every quantiser that int8 activations and constants cannot be read from."""
    found = Unquantised(_folded(model))
    problems = [*_constants(found), *_activations(found)]
    if not problems:
        fix = "quantise activations by a QuantizeLinear with a DequantizeLinear behind it"
        problems = [
            Problem(_label(node), "quantiser", f"{node.op_type} stands alone: it pairs with no other", fix)
            for node in found.model.graph
            if node.op_type in ("QuantizeLinear", "DequantizeLinear")
        ]
    if problems:
        raise ProblemsError("the quantised model cannot be brought into int8 form", problems)
    return found


def type_problems(model: onnx.ModelProto) -> list[Problem]:
    """Quantisers of types that opset 20 does not know (int16, int4, float8): named before the conversion to opset 20 stumbles over them."""
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            types.update((node.output[0], attribute.t.data_type) for attribute in node.attribute if attribute.name == "value")
    problems = []
    for node in model.graph.node:
        zero = types.get(node.input[2]) if node.op_type in ("QuantizeLinear", "DequantizeLinear") and len(node.input) > 2 else None
        if zero is not None and zero not in (TensorProto.INT8, TensorProto.UINT8, TensorProto.INT32):
            found = f"quantises to {type_name(zero)}"
            problems.append(Problem(node_label(node), "quantiser-dtype", found, "quantise activations and weights to 8 bits"))
    return problems


def _folded(model: onnx.ModelProto) -> ir.Model:
    """Constants folded up to (not through) their DequantizeLinear: float weights behind a QuantizeLinear become int8 ones."""
    graph = ir.serde.deserialize_model(model)
    optimizer.fold_constants(graph, onnx_shape_inference=False, input_size_limit=EVERY_SIZE, output_size_limit=EVERY_SIZE, should_fold=_should_fold)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(graph)
    common.RemoveUnusedNodesPass()(graph)
    inferred = infer_shapes(ir.serde.serialize_model(graph))
    require_static(inferred)
    return ir.serde.deserialize_model(inferred)


def _should_fold(node: ir.Node) -> bool | None:
    """Quantisers are on the optimiser's own list of nodes not to fold: a QuantizeLinear of a constant shall be."""
    if node.op_type == "DequantizeLinear":
        return False
    return True if node.op_type in ("QuantizeLinear", "Clip") else None


def _label(node: ir.Node) -> str:
    return node.name or f"{node.op_type} (writes {node.outputs[0].name})"


# ---- constants
def _constants(found: Unquantised) -> Iterator[Problem]:
    graph = found.model.graph
    for node in list(graph):
        values = constant(input_at(node, 0)) if node.op_type == "DequantizeLinear" else None
        if values is None:
            continue
        scale, zero = constant(input_at(node, 1)), constant(input_at(node, 2))
        if scale is None or scale.dtype != np.float32 or scale.ndim > 1 or not (np.isfinite(scale).all() and (scale > 0).all()):
            stated = "its scales are no finite positive float32 constants, one or one a channel"
            yield Problem(_label(node), "quantiser-scale", stated, "quantise with constant scales")
            continue
        if values.dtype not in (np.int8, np.uint8, np.int32):
            yield Problem(_label(node), "constant-dtype", f"dequantises {values.dtype} constants", "quantise weights to int8 and biases to int32")
            continue
        zero = np.zeros((), np.int64) if zero is None else zero.astype(np.int64)
        if values.dtype == np.uint8:
            values, zero = (values.astype(np.int16) - UNSIGNED_OFFSET).astype(np.int8), zero - UNSIGNED_OFFSET
        axis = attributes_of(node).get("axis", 1)
        held = Held(values, scale, zero, axis % values.ndim if values.ndim else 0)
        real = add_constant(graph, f"{node.outputs[0].name}_real", held.real.astype(np.float32))
        found.held[str(real.name)] = held
        node.outputs[0].replace_all_uses_with(real)
        graph.remove(node, safe=True)
    _turn_constants(found)


def _turn_constants(found: Unquantised) -> None:
    """A Transpose of dequantised integers (a linear layer's weight, as Brevitas writes it) is the DequantizeLinear of transposed ones."""
    graph = found.model.graph
    for node in list(graph):
        held = found.held.get(str(node.inputs[0].name)) if node.op_type == "Transpose" and node.inputs[0] is not None else None
        if held is None or node.outputs[0].is_graph_output():
            continue
        order = attributes_of(node).get("perm", list(range(held.values.ndim))[::-1])
        turned = Held(np.ascontiguousarray(held.values.transpose(order)), held.scale, held.zero_point, order.index(held.axis) if order else 0)
        real = add_constant(graph, f"{node.outputs[0].name}_real", turned.real.astype(np.float32))
        found.held[str(real.name)] = turned
        node.outputs[0].replace_all_uses_with(real)
        graph.remove(node, safe=True)


# ---- activations
@dataclass
class _Quantised:
    """One value quantised one way: the first QuantizeLinear of it, and the DequantizeLinear nodes that read it so."""

    step: Step
    low: int
    high: int
    place: ir.Node
    readers: list[ir.Node]

    @property
    def source(self) -> ir.Value:
        """Asked for late: what stood in front may have been rewritten meanwhile."""
        value = self.place.inputs[0]
        assert value is not None
        return value


def _activations(found: Unquantised) -> Iterator[Problem]:
    graph = found.model.graph
    gathered: dict[tuple[int, Step, int, int], _Quantised] = {}
    quantisers = [node for node in graph if node.op_type == "QuantizeLinear"]
    for node in quantisers:
        step = _step(node)
        source = node.inputs[0]
        if isinstance(step, Problem) or source is None:
            if isinstance(step, Problem):
                yield step
            continue
        for low, high, reader in _readers(node.outputs[0], -128, 127, _offset(node)):
            if reader.op_type != "DequantizeLinear" or isinstance(_step(reader), Problem) or _step(reader) != step:
                found_there = "with another scale or zero point" if reader.op_type == "DequantizeLinear" else f"by {reader.op_type}"
                fix = "read it by a DequantizeLinear with the same scale and zero point"
                yield Problem(_label(node), "dequantiser", f"its int8 result is read {found_there} ({_label(reader)})", fix)
                continue
            entry = gathered.setdefault((id(source), step, low, high), _Quantised(step, low, high, node, []))
            entry.readers.append(reader)
        if node.outputs[0].is_graph_output():
            yield Problem(_label(node), "border-dtype", "its integers are a graph output", "dequantise the output: the form gives float32")
    for entry in gathered.values():
        _write(found, entry)
    common.RemoveUnusedNodesPass()(found.model)


def _step(node: ir.Node) -> Step | Problem:
    """The quantisation a Q or DQ node states, in int8 terms."""
    scale, zero = constant(input_at(node, 1)), constant(input_at(node, 2))
    if input_at(node, 2) is None:
        zero = np.zeros((), np.uint8)  # ONNX's default type
    if scale is None or zero is None:
        return Problem(_label(node), "quantiser-scale", "its scale or zero point is computed at run time", "quantise statically, with calibrated constants")
    if zero.dtype not in (np.int8, np.uint8):
        return Problem(_label(node), "quantiser-dtype", f"quantises to {zero.dtype}", "quantise activations to 8 bits")
    if scale.size != 1 or zero.size != 1:
        return Problem(_label(node), "quantiser-scale", f"has {scale.size} scales", "quantise activations with one scale a tensor")
    step = float(scale.reshape(-1)[0])
    if scale.dtype != np.float32 or not (math.isfinite(step) and step > 0):
        return Problem(_label(node), "quantiser-scale", f"has the {scale.dtype} scale {step}", "quantise with finite positive float32 scales")
    return Step(step, int(zero.reshape(-1)[0]) - _offset(node))


def _offset(node: ir.Node) -> int:
    zero = constant(input_at(node, 2))
    return UNSIGNED_OFFSET if zero is None or zero.dtype == np.uint8 else 0


def _readers(value: ir.Value, low: int, high: int, offset: int) -> Iterator[tuple[int, int, ir.Node]]:
    """Who reads the integers, with the range that Clips on the way leave (Brevitas' narrow ranges and smaller bit widths)."""
    for reader in value.consumers():
        limits = bounds(reader) if reader.op_type == "Clip" and reader.inputs[0] is value else None
        if limits is None:
            yield low, high, reader
        else:
            yield from _readers(reader.outputs[0], int(max(low, limits[0] - offset)), int(min(high, limits[1] - offset)), offset)


def _write(found: Unquantised, entry: _Quantised) -> None:
    """One REQUANTISE node (behind a float Clip where the integers had one) for every reader of this value."""
    graph = found.model.graph
    source = _clipped(graph, entry)
    outputs = [reader.outputs[0] for reader in entry.readers]
    chief = next((value for value in outputs if value.is_graph_output()), outputs[0])
    first = _requantise(found, graph, source, entry.step, str(chief.name), entry.place)
    for value in outputs:
        second_border = value is not chief and value.is_graph_output()
        target = _requantise(found, graph, first, entry.step, str(value.name), entry.place) if second_border else first
        value.replace_all_uses_with(target, replace_graph_outputs=True)
    for reader in entry.readers:
        graph.remove(reader, safe=True)


def _requantise(found: Unquantised, graph: ir.Graph, source: ir.Value, step: Step, name: str, place: ir.Node) -> ir.Value:
    node = new_node(REQUANTISE, [source], {}, f"{name}_requantise")
    result = node.outputs[0]
    result.name, result.shape, result.type = name, source.shape, source.type
    found.steps[name] = step
    behind = source.producer()
    graph.insert_after(behind if behind is not None and behind.op_type in ("Clip", REQUANTISE) else place, node)
    return result


def _clipped(graph: ir.Graph, entry: _Quantised) -> ir.Value:
    """The source, behind a Clip at the real bounds where the integers are clipped and the source is not so already."""
    low = -math.inf if entry.low <= -128 else (entry.low - entry.step.zero_point) * entry.step.scale
    high = math.inf if entry.high >= 127 else (entry.high - entry.step.zero_point) * entry.step.scale
    source, producer = entry.source, entry.source.producer()
    limits = bounds(producer) if producer is not None else None
    if limits is not None:
        low, high = (-math.inf if limits[0] >= low else low), (math.inf if limits[1] <= high else high)
    if low == -math.inf and high == math.inf:
        return source
    merge = producer is not None and limits is not None and only_reader(source) is entry.place
    if merge and limits is not None:
        low, high = max(low, limits[0]), min(high, limits[1])
    label = f"{source.name}_clip"
    sides = (("low", low), ("high", high))
    edges = [add_constant(graph, f"{label}_{side}", np.array(bound, np.float32)) if math.isfinite(bound) else None for side, bound in sides]
    if merge and producer is not None:
        clip = new_node("Clip", [producer.inputs[0], *edges], {}, producer.name)
        replace(graph, [producer], [clip])
        return clip.outputs[0]
    clip = new_node("Clip", [source, *edges], {}, label)
    clip.outputs[0].name, clip.outputs[0].shape, clip.outputs[0].type = label, source.shape, source.type
    graph.insert_after(entry.place, clip)
    return clip.outputs[0]
