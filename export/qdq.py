# SPDX-License-Identifier: Apache-2.0
"""From an unquantised graph with `REQUANTISE` nodes to a `Draft`: each of those nodes is taken into the operator in front of it,
moved through operators that only pass values on, or kept as a quantiser or a change of scale. No step changes a value.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from isthmus.errors import Problem, ProblemsError
from isthmus.export.draft import REQUANTISE, Draft, Step, Weight, activations, bounds, fits_int8, follower, is_weighted, operands, passes_scale, results
from isthmus.export.rewrites._edit import add_constant, attributes_of, constant, input_at, new_node, only_reader, replace, static_shape
from isthmus.export.rewrites.linear_as_gemm import NORMAL, as_bias
from isthmus.export.scales import step_from_range
from isthmus.export.settle import settle
from isthmus.export.unquantise import Held, Unquantised
from isthmus.ops import OPS

QUANTISE_AGAIN = "quantise again with a quantiser on the result of every layer"


def draft_from_unquantised(found: Unquantised) -> Draft:
    """Raises `ProblemsError` naming each layer that has int8 weights but is not int8 on both sides."""
    _linear_normal_form(found)
    settle(found.model, found.held)
    _push_up(found)
    _merge_equal(found)
    placer = _Placer(found)
    placer.run()
    if placer.problems:
        raise ProblemsError("the quantised model cannot be brought into int8 form", placer.problems)
    if not placer.draft.weights and any(is_weighted(node) for node in placer.graph):
        float_weights = "no layer has int8 weights behind a DequantizeLinear"
        problem = Problem("model", "nothing-to-quantise", float_weights, "quantise the weights too, or give the float model")
        raise ProblemsError("the quantised model cannot be brought into int8 form", [problem])
    return placer.draft


# ---- linear layers
def _linear_normal_form(found: Unquantised) -> None:
    """Gemm with int8 weight [out, in]; MatMul + Add of a constant, rank 2, as a Gemm. The integers move along."""
    graph = found.model.graph
    for node in list(graph):
        held = _held(found, node)
        if held is None or held.values.ndim != 2:
            continue
        given = attributes_of(node)
        if node.op_type == "Gemm" and not given.get("transB", 0):
            weight = _transposed(found, graph, f"{node.name}_weight", held)
            replace(graph, [node], [new_node("Gemm", [node.inputs[0], weight, *node.inputs[2:]], given | {"transB": 1}, node.name)])
        elif node.op_type == "MatMul" and len(static_shape(node.inputs[0]) or ()) == 2:
            add = only_reader(node.outputs[0])
            addend = None if add is None or add.op_type != "Add" else next((value for value in add.inputs if constant(value) is not None), None)
            bias = None if addend is None else as_bias(np.asarray(constant(addend)), held.values.shape[1])
            if add is None or bias is None or static_shape(add.outputs[0]) != static_shape(node.outputs[0]):
                continue
            inputs = [node.inputs[0], _transposed(found, graph, f"{node.name}_weight", held), add_constant(graph, f"{node.name}_bias", bias)]
            replace(graph, [node, add], [new_node("Gemm", inputs, NORMAL, node.name)])


def _held(found: Unquantised, node: ir.Node) -> Held | None:
    weight = input_at(node, 1)
    return found.held.get(str(weight.name)) if is_weighted(node) and weight is not None else None


def _transposed(found: Unquantised, graph: ir.Graph, name: str, held: Held) -> ir.Value:
    turned = Held(np.ascontiguousarray(held.values.T), held.scale, held.zero_point, 1 - held.axis)
    value = add_constant(graph, name, turned.real.astype(np.float32))
    found.held[str(value.name)] = turned
    return value


# ---- quantisers behind operators that only pass values on
def _push_up(found: Unquantised) -> None:
    """Conv -> MaxPool -> Q is Conv -> Q -> MaxPool: rounding is monotone and works on each value alone, so both are the same."""
    graph = found.model.graph
    known = {value.name for value in _int8_values(graph)}
    for node in reversed(list(graph)):
        readers = _only_readers(node) if passes_scale(node) and fits_int8(node) else []
        steps = {found.steps[str(reader.outputs[0].name)] for reader in readers if reader.op_type == REQUANTISE}
        if (
            len(steps) != 1
            or any(reader.op_type != REQUANTISE for reader in readers)
            or all(value.name in known for value in activations(node))
            or _is_fused(node)
        ):
            continue
        (step,) = steps
        for position, value in enumerate(node.inputs):
            if value is None or constant(value) is not None or found.steps.get(str(value.name)) == step:
                continue
            inserted = new_node(REQUANTISE, [value], {}, f"{node.name}_requantise{position}")
            result = inserted.outputs[0]
            result.name, result.shape, result.type = f"{node.name}.input{position}", value.shape, value.type
            found.steps[str(result.name)] = step
            graph.insert_before(node, inserted)
            node.replace_input_with(position, result)
        for reader in readers:
            value = reader.inputs[0]
            assert value is not None
            _absorb(graph, reader, value)
            found.steps[str(value.name)] = step


def _only_readers(node: ir.Node) -> list[ir.Node]:
    """The one reader of each result that has any; empty where one has several, or is a graph output."""
    readers = [only_reader(value) for value in results(node) if value.uses() or value.is_graph_output()]
    return [] if None in readers else [reader for reader in readers if reader is not None]


def _merge_equal(found: Unquantised) -> None:
    """One REQUANTISE node for all that do the same to the same value (two pools behind one layer)."""
    graph = found.model.graph
    first: dict[tuple[int, Step], ir.Value] = {}
    for node in [node for node in graph if node.op_type == REQUANTISE]:
        step, result = found.steps[str(node.outputs[0].name)], node.outputs[0]
        kept = first.setdefault((id(node.inputs[0]), step), result)
        if kept is not result and not (kept.is_graph_output() and result.is_graph_output()):
            _absorb(graph, node, kept)
            found.steps[str(kept.name)] = step


def _int8_values(graph: ir.Graph) -> Iterable[ir.Value]:
    """What is int8 already, going forward: results of REQUANTISE, and of operators that pass on nothing else."""
    known: set[int] = set()
    for node in graph:
        passed = passes_scale(node) and fits_int8(node) and all(id(value) in known for value in activations(node))
        if node.op_type == REQUANTISE or passed:
            known.update(id(value) for value in results(node))
            yield from results(node)


def _is_fused(node: ir.Node) -> bool:
    producer = node.inputs[0].producer() if node.inputs[0] is not None else None
    return producer is not None and follower(producer) is node


def _absorb(graph: ir.Graph, requantise: ir.Node, value: ir.Value) -> None:
    """Readers of a REQUANTISE node's result read `value`, which takes over its name where that is a graph output's."""
    result = requantise.outputs[0]
    border, name = result.is_graph_output(), result.name
    result.replace_all_uses_with(value, replace_graph_outputs=True)
    graph.remove(requantise, safe=True)
    if border:
        value.name = name


# ---- placing
class _Placer:
    """One pass in order: what reads int8 values and ends in a REQUANTISE node is an int8 operator."""

    def __init__(self, found: Unquantised) -> None:
        self.found = found
        self.graph = found.model.graph
        self.draft = Draft(found.model)
        self.problems: list[Problem] = []
        self.absorbed: set[int] = set()

    def run(self) -> None:
        for node in list(self.graph):
            if node.graph is not self.graph or id(node) in self.absorbed:
                continue
            ready = fits_int8(node) and all(str(value.name) in self.draft.steps for value in activations(node))
            if node.op_type == REQUANTISE:
                self._requantise(node)
            elif ready and passes_scale(node):
                self._passing(node)
            elif ready and (not is_weighted(node) or _held(self.found, node) is not None):
                self._arithmetic(node)
            elif _held(self.found, node) is not None and not all(str(value.name) in self.draft.steps for value in activations(node)):
                self._say_unready(node)  # a layer whose attributes alone do not fit is a float island

    def _requantise(self, node: ir.Node) -> None:
        step, source = self.found.steps[str(node.outputs[0].name)], node.inputs[0]
        same = source is not None and self.draft.steps.get(str(source.name)) == step
        takes_name = source is not None and source.producer() is not None and not source.is_graph_output()
        if source is not None and same and (takes_name or not node.outputs[0].is_graph_output()):
            _absorb(self.graph, node, source)
            self.draft.steps[str(source.name)] = step  # the name may have changed
            return
        self._int8(node, step)

    def _int8(self, node: ir.Node, step: Step) -> None:
        self.draft.int8_nodes.add(str(node.name))
        self.draft.steps |= {str(value.name): step for value in results(node)}

    def _passing(self, node: ir.Node) -> None:
        steps = [self.draft.steps[str(value.name)] for value in activations(node)]
        readers = _only_readers(node)
        behind = self.found.steps[str(readers[0].outputs[0].name)] if len(readers) == 1 and readers[0].op_type == REQUANTISE else None
        target = steps[0] if len(set(steps)) == 1 else behind or _widest(steps)
        stored = _stored(node)
        if behind is not None and not all(target.holds(array) for array in stored.values()):
            target = behind  # where what is stored is rounded anyway
        if target != behind and not (all(target.holds(array) for array in stored.values()) and _clips_whole(node, target)):
            return  # a number between two steps, which the quantiser behind would see: float
        for position, value in enumerate(operands(node)):
            if constant(value) is not None:
                self.draft.steps[str(value.name)] = target
            if constant(value) is not None or self.draft.steps[str(value.name)] == target:
                continue
            changed = new_node(REQUANTISE, [value], {}, f"{node.name}_requantise{position}")
            result = changed.outputs[0]
            result.name, result.shape, result.type = f"{node.name}.input{position}", value.shape, value.type
            self.graph.insert_before(node, changed)
            node.replace_input_with(position, result)
            self._int8(changed, target)
        self._int8(node, target)

    def _arithmetic(self, node: ir.Node) -> None:
        stored = {str(value.name): self._stored_step(value) for value in operands(node) if constant(value) is not None}
        fused = follower(node)
        result = (fused or node).outputs[0]
        reader = only_reader(result)
        if reader is None or reader.op_type != REQUANTISE:
            if is_weighted(node):
                self._say_unquantised_result(node, result)
            return
        if None in stored.values():
            return  # a constant that nobody quantised, and that no power of two makes whole
        self.draft.steps |= {name: step for name, step in stored.items() if step is not None}
        step = self.found.steps[str(reader.outputs[0].name)]
        _absorb(self.graph, reader, result)
        self.draft.int8_nodes.add(str(node.name))
        self.draft.steps[str(result.name)] = step
        if fused is not None:
            self.draft.fused[str(node.name)] = fused
            self.absorbed.add(id(fused))
        if is_weighted(node):
            self._weights(node)

    def _stored_step(self, value: ir.Value) -> Step | None:
        """How a constant operand is quantised: as it was, or by a power of two that holds all of it exactly."""
        held, real = self.found.held.get(str(value.name)), np.asarray(constant(value))
        if (
            held is not None
            and held.scale.size == 1
            and held.zero_point.size == 1
            and held.values.dtype == np.int8
            and abs(int(held.zero_point.reshape(-1)[0])) <= 128
        ):
            step = Step(float(held.scale.reshape(-1)[0]), int(held.zero_point.reshape(-1)[0]))
        else:
            step = step_from_range(float(real.min()), float(real.max()), "power_of_two")
        return step if step.holds(real) else None

    def _weights(self, node: ir.Node) -> None:
        held = _held(self.found, node)
        assert held is not None
        axis = OPS[node.op_type].weight_axis or 0
        name = str(node.name)
        if held.values.dtype != np.int8 or held.zero_point.any():
            found = f"its weight is {held.values.dtype}{' with a zero point' if held.zero_point.any() else ''}"
            self._say(name, "weight", found, "quantise weights symmetrically to int8 (ONNX Runtime: weight_type=QInt8)")
        elif held.scale.size > 1 and (held.axis != axis or held.scale.size != held.values.shape[axis]):
            found = f"its weight has {held.scale.size} scales along axis {held.axis}"
            self._say(name, "weight", found, f"give one scale, or one an output channel (axis {axis})")
        else:
            self.draft.weights[name] = Weight(held.values, held.scale.reshape(-1).astype(np.float32))
        bias = input_at(node, 2)
        if bias is not None:
            kept = self.found.held.get(str(bias.name))
            self.draft.biases[name] = kept.real if kept is not None else np.asarray(constant(bias), np.float64)

    # ---- what is wrong
    def _say(self, node: str, rule: str, found: str, fix: str) -> None:
        self.problems.append(Problem(node, rule, found, fix))

    def _say_unquantised_result(self, node: ir.Node, result: ir.Value) -> None:
        readers = [reader for reader in result.consumers() if reader.op_type != REQUANTISE]
        if any(reader.op_type == "BatchNormalization" for reader in readers):
            found = "a BatchNormalization stands between it and its quantiser"
            self._say(str(node.name), "batch-norm", found, "fold BatchNorm into the layers before quantising")
            return
        if not readers and len(result.consumers()) > 1:
            found = f"its result {result.name!r} is quantised in {len(result.consumers())} different ways"
        elif readers:
            found = f"its result {result.name!r} is read unquantised by {', '.join(str(reader.name) for reader in readers[:3])}"
        else:
            found = f"its result {result.name!r} is a graph output without a quantiser"
        self._say(str(node.name), "output-not-quantised", found, QUANTISE_AGAIN)

    def _say_unready(self, node: ir.Node) -> None:
        bare = [str(value.name) for value in activations(node) if str(value.name) not in self.draft.steps]
        found = f"its weight is int8, but its input {bare[0]!r} is float"
        self._say(str(node.name), "input-not-quantised", found, "quantise the input of every layer with int8 weights")


def _stored(node: ir.Node) -> dict[str, np.ndarray]:
    """Numbers that an operator without arithmetic brings in: constant operands, and what a Pad puts around a tensor."""
    values = [*operands(node), *([input_at(node, 2)] if node.op_type == "Pad" else [])]
    return {str(value.name): held for value in values if value is not None and (held := constant(value)) is not None}


def _clips_whole(node: ir.Node, step: Step) -> bool:
    """Whether a Clip's bounds are whole steps, as far as the integers reach them."""
    edges = [(end - step.zero_point) * step.scale for end in (-128, 127)]
    return all(step.holds(np.array(bound)) for bound in bounds(node) or () if edges[0] < bound < edges[1])


def _widest(steps: Iterable[Step]) -> Step:
    """One step for all: the coarsest where the zero points agree, else one whose range covers every range."""
    steps = list(steps)
    if len({step.zero_point for step in steps}) == 1:
        return max(steps)
    low = min((-128 - step.zero_point) * step.scale for step in steps)
    high = max((127 - step.zero_point) * step.scale for step in steps)
    scale = float(np.float32((high - low) / 255))
    return Step(scale, int(np.clip(round(-128 - low / scale), -128, 127)))
