# SPDX-License-Identifier: Apache-2.0
"""The state of one lowering: which form tensor lies where in the file and in which order of axes, and the parts every operator uses."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from isthmus.graph import QuantGraph, QuantNode
from isthmus.spec import TensorSpec
from isthmus.targets.tflite.flatbuffer import ModelWriter, Quantisation
from isthmus.targets.tflite.rounding import INT8_MAX, INT8_MIN

FULL_RANGE = (INT8_MIN, INT8_MAX)
FUSED = (("RELU", 0.0, np.inf), ("RELU6", 0.0, 6.0), ("RELU_N1_TO_1", -1.0, 1.0))  # what an operator's option table can name
ALONE = (*FUSED, ("RELU_0_TO_1", 0.0, 1.0))  # what is an operator of its own
LAST_AXES = {3: (0, 3, 2), 4: (0, 3, 1, 2)}  # form axis -> axis in the file, channels last, by rank


class Order(enum.Enum):
    """How the axes of a form tensor lie in the file.

    FORM: as in the form. LAST: channels last, always with two space axes ([N, C, W] lies as [N, 1, W, C]). FLAT: a flattened
    [N, C, H, W], its columns in the order of [H, W, C]: only what permutes its weights for that may read it.
    """

    FORM = "form"
    LAST = "channels last"
    FLAT = "flattened channels last"


@dataclass(frozen=True)
class Placed:
    """A form tensor in the file."""

    index: int
    shape: tuple[int, ...]


def axis_in(order: Order, rank: int, axis: int) -> int:
    """Where the form's `axis` of `rank` lies in the file."""
    return LAST_AXES[rank][axis] if order is Order.LAST else axis


def moves_nothing(shape: Sequence[int]) -> bool:
    """[N, C, ...] and its channels-last order hold their elements in the same sequence."""
    return len(shape) < 3 or shape[1] == 1 or int(np.prod(shape[2:])) == 1


def shape_in(order: Order, shape: Sequence[int]) -> tuple[int, ...]:
    """The extents in the file of a tensor that has extents `shape` in the form."""
    if order is not Order.LAST:
        return tuple(shape)
    batch, channels, *space = shape
    return (batch, *([1] if len(space) == 1 else []), *space, channels)


def real_clamp(low: float, high: float, known: Sequence[tuple[str, float, float]]) -> tuple[str, list[tuple[str, float]]]:
    """As `Lowering.activation`, for bounds in real numbers."""
    for activation, lower, upper in known:
        if (low, high) == (lower, upper):
            return activation, []
    relu = low == 0
    bounds = [] if relu or low == -np.inf else [("MAXIMUM", low)]
    return "RELU" if relu else "NONE", bounds + ([] if high == np.inf else [("MINIMUM", high)])


class Lowering:
    """Filled by `lower.py` operator by operator. `exact`: where TFLite rounds unlike the reference, take a way around.

    `inexact` collects the nodes that stay different from the reference.
    """

    def __init__(self, graph: QuantGraph, exact: bool) -> None:
        self.graph = graph
        self.exact = exact
        self.writer = ModelWriter()
        self.inexact: list[QuantNode] = []
        self.flat_source: dict[str, tuple[int, ...]] = {}  # FLAT tensor -> form shape before it was flattened
        self._placed: dict[tuple[str, Order], Placed] = {}
        self._order: dict[str, Order] = {}
        self._constants: dict[str, np.ndarray] = {}
        self._stored: dict[int, np.ndarray] = {}  # constant in the file -> its real numbers

    # ---- tensors
    def spec(self, name: str) -> TensorSpec:
        return self.graph.tensors[name]

    def quantisation(self, name: str) -> Quantisation | None:
        spec = self.spec(name)
        return None if spec.scale is None else Quantisation((spec.scale,), int(spec.zero_point or 0))

    def order(self, name: str) -> Order:
        """The order in which the tensor was first written."""
        return self._order[name]

    def orders(self) -> dict[str, tuple[Order, tuple[int, ...]]]:
        """Every tensor that was written or taken: its order, and the form shape of the image where that is flattened."""
        return {name: (order, self.flat_source.get(name, ()) if order is Order.FLAT else ()) for name, order in self._order.items()}

    def is_placed(self, name: str) -> bool:
        return name in self._order

    def place(self, name: str, order: Order, placed: Placed) -> None:
        self._placed[name, order] = placed
        self._order.setdefault(name, order)

    def settle(self, name: str, order: Order, placed: Placed) -> None:
        """A scratch tensor turns out to be what a node writes."""
        self.writer.rename(placed.index, name)
        self.place(name, order, placed)

    def place_constant(self, name: str, values: np.ndarray) -> None:
        """A form tensor whose values are known: every order of axes is written as it is asked for."""
        self._constants[name] = values
        self._order.setdefault(name, Order.FORM)

    def is_constant(self, name: str) -> bool:
        return name in self._constants

    def constant_number(self, name: str) -> float | None:
        """The one number that a constant holds; None of anything else."""
        held = self._constants.get(name)
        return float(held.reshape(-1)[0]) if held is not None and held.size == 1 else None

    def widened_constant(self, name: str, full: Sequence[int], order: Order) -> Placed:
        """A constant of lower rank with the leading ones that broadcasting gives it, in that order."""
        values = self._constants[name].reshape(full)
        if order is Order.LAST:
            values = values.transpose(0, *range(2, len(full)), 1).reshape(shape_in(order, full))
        return self._store(name, name if values.shape == self.spec(name).shape and order is Order.FORM else f"{name}/{order.value}", values)

    def _store(self, name: str, label: str, values: np.ndarray) -> Placed:
        index = self.writer.constant(label, values, self.quantisation(name))
        self._stored[index] = self.spec(name).dequantise(values)
        return Placed(index, values.shape)

    def common_order(self, node: QuantNode) -> Order:
        """Channels last where one of the operands lies so; the form's order else."""
        known = [self.order(name) for name in node.inputs if name not in self._constants]
        return Order.LAST if Order.LAST in known and len(self.spec(node.output).shape) in LAST_AXES else Order.FORM

    def elementwise_order(self, node: QuantNode) -> Order:
        """A one-input operator that treats every element alike works in the order it finds."""
        order = self.order(node.inputs[0])
        if order is Order.FLAT:
            self.flat_source[node.output] = self.flat_source[node.inputs[0]]
        return order

    def write(self, name: str, order: Order) -> Placed:
        """A new tensor for what a node writes."""
        shape = shape_in(order, self.spec(name).shape)
        placed = Placed(self.writer.tensor(name, shape, self.spec(name).dtype, self.quantisation(name)), shape)
        self.place(name, order, placed)
        return placed

    def scratch(self, label: str, shape: Sequence[int], like: str) -> Placed:
        """A tensor between two operators of one node, with the dtype and quantisation of form tensor `like`."""
        return Placed(self.writer.tensor(label, shape, self.spec(like).dtype, self.quantisation(like)), tuple(shape))

    def scratch_float(self, label: str, shape: Sequence[int]) -> Placed:
        return Placed(self.writer.tensor(label, shape, "float32"), tuple(shape))

    def read(self, name: str, order: Order) -> Placed:
        """The tensor in that order: as it lies, or behind one RESHAPE or TRANSPOSE, which later readers share."""
        if (name, order) not in self._placed:
            self._placed[name, order] = self._converted(name, order)
        return self._placed[name, order]

    def _converted(self, name: str, order: Order) -> Placed:
        present = self.order(name)
        if Order.FLAT in (present, order):
            raise RuntimeError(f"tensor {name} is wanted {order.value}, but lies {present.value}")  # the look-ahead in `reshaping` rules it out
        shape = self.spec(name).shape
        wanted = shape_in(order, shape)
        batch, channels, *space = shape
        if name in self._constants:
            return self.widened_constant(name, shape, order)
        held = self._placed[name, present]
        if moves_nothing(shape):
            return self.reshape(held, f"{name}/{order.value}", wanted, like=name)
        if order is Order.LAST:
            moved = (batch, *space, channels)
            turned = self.transpose(held, f"{name}/nhwc", (0, *range(2, len(shape)), 1), moved, like=name)
            return turned if moved == wanted else self.reshape(turned, f"{name}/{order.value}", wanted, like=name)
        flat = (batch, *space, channels)
        held = held if held.shape == flat else self.reshape(held, f"{name}/nwc", flat, like=name)
        return self.transpose(held, f"{name}/nchw", (0, len(shape) - 1, *range(1, len(shape) - 1)), shape, like=name)

    # ---- small operators
    def reshape(self, source: Placed, label: str, shape: Sequence[int], like: str) -> Placed:
        placed = self.scratch(label, shape, like)
        self.emit_reshape(source, placed)
        return placed

    def emit_reshape(self, source: Placed, target: Placed) -> None:
        extents = np.asarray(target.shape, np.int32)
        self.writer.operator("RESHAPE", 1, [source.index, self.writer.constant("shape", extents)], [target.index], "ReshapeOptions", newShape=extents)

    def slice(self, source: Placed, target: Placed, begins: Sequence[int]) -> None:
        """A block of `source` that starts at `begins` and has the extents of `target`."""
        begin, size = (self.writer.constant(label, np.asarray(values, np.int32)) for label, values in (("begin", begins), ("size", target.shape)))
        self.writer.operator("SLICE", 2, [source.index, begin, size], [target.index], "SliceOptions")

    def gather(self, source: Placed, target: Placed, indices: np.ndarray, axis: int) -> None:
        """Constant indices along one axis."""
        places = self.writer.constant("indices", np.asarray(indices, np.int32))
        self.writer.operator("GATHER", 2, [source.index, places], [target.index], "GatherOptions", axis=axis)

    def transpose(self, source: Placed, label: str, permutation: Sequence[int], shape: Sequence[int], like: str) -> Placed:
        placed = self.scratch(label, shape, like)
        axes = self.writer.constant("permutation", np.asarray(permutation, np.int32))
        self.writer.operator("TRANSPOSE", 2, [source.index, axes], [placed.index], "TransposeOptions")
        return placed

    def pad(self, source: Placed, label: str, begins: Sequence[int], ends: Sequence[int], like: str, value: float | None = None) -> Placed:
        """Pads height and width of a tensor that lies channels last: with real zero, or with `value` of its own dtype."""
        batch, height, width, channels = source.shape
        placed = self.scratch(label, (batch, height + begins[0] + ends[0], width + begins[1] + ends[1], channels), like)
        amounts = self.writer.constant("paddings", np.array([[0, 0], [begins[0], ends[0]], [begins[1], ends[1]], [0, 0]], np.int32))
        if value is None:
            self.writer.operator("PAD", 2, [source.index, amounts], [placed.index], "PadOptions")
        else:
            fill = self.writer.constant("fill", np.array([value], self.spec(like).dtype), self.quantisation(like))
            self.writer.operator("PADV2", 2, [source.index, amounts, fill], [placed.index], "PadV2Options")
        return placed

    def real(self, source: Placed, label: str) -> Placed:
        """An operand of float32 arithmetic: real numbers that are stored where it is a constant, behind a DEQUANTIZE else."""
        if source.index not in self._stored:
            return self.dequantise(source, label)
        return Placed(self.writer.constant(label, self._stored[source.index]), source.shape)

    def dequantise(self, source: Placed, label: str) -> Placed:
        placed = self.scratch_float(label, source.shape)
        self.writer.operator("DEQUANTIZE", 2, [source.index], [placed.index], "DequantizeOptions")
        return placed

    def quantise(self, source: Placed, target: Placed) -> None:
        self.writer.operator("QUANTIZE", 1, [source.index], [target.index], "QuantizeOptions")

    # ---- float32 arithmetic
    def number(self, value: float) -> int:
        return self.writer.constant("number", np.array([value], np.float32))

    def float_operator(self, op: str, inputs: Sequence[int], shape: Sequence[int], options: str = "", version: int = 1, **fields: object) -> Placed:
        """One float32 operator with one result of extents `shape`."""
        result = self.scratch_float(op.lower(), shape)
        self.writer.operator(op, version, inputs, [result.index], options, **fields)
        return result

    def quantise_bounded(self, node: QuantNode, real: Placed, target: Placed) -> None:
        """What of the node's clamp no fused activation says, then QUANTIZE."""
        _, bounds = self.activation(node.clamp, node.output)
        spec = self.spec(node.output)
        for op, bound in bounds:
            limit = self.number((bound - int(spec.zero_point or 0)) * float(spec.scale or 1.0))
            real = self.float_operator(op, [real.index, limit], target.shape, "MaximumMinimumOptions")
        self.quantise(real, target)

    # ---- clamps
    def clamp(self, node: QuantNode, known: Sequence[tuple[str, float, float]] = FUSED) -> tuple[str, Sequence[tuple[str, float]]]:
        """TFLite's activation for what is fused to a node, and what it cannot say: (MAXIMUM | MINIMUM, bound) in order, in the output's dtype."""
        return real_clamp(*node.activation_range, known) if node.kind == "float" else self.activation(node.clamp, node.output, known)

    def activation(self, clamp: tuple[int, int], name: str, known: Sequence[tuple[str, float, float]] = FUSED) -> tuple[str, list[tuple[str, int]]]:
        """TFLite's activation for a clamp in steps of tensor `name`, and what it cannot say: (MAXIMUM | MINIMUM, bound) in order."""
        zero = int(self.spec(name).zero_point or 0)
        if clamp == FULL_RANGE:
            return "NONE", []
        for activation, low, high in known:
            if clamp == (self._bound(low, name), self._bound(high, name)):
                return activation, []
        relu = clamp[0] == zero > INT8_MIN
        lower = [] if relu or clamp[0] == INT8_MIN else [("MAXIMUM", clamp[0])]
        upper = [] if clamp[1] == INT8_MAX else [("MINIMUM", clamp[1])]
        return "RELU" if relu else "NONE", lower + upper

    def _bound(self, bound: float, name: str) -> int | None:
        """A real bound in steps, where TFLite (halves away from zero) and XNNPACK (halves to even) agree on it."""
        spec = self.spec(name)
        steps = np.float32(bound) / np.float32(spec.scale or 1.0)
        away = np.copysign(np.floor(np.abs(steps) + np.float32(0.5)), steps)
        found = {int(np.clip(rounded + int(spec.zero_point or 0), INT8_MIN, INT8_MAX)) for rounded in (np.rint(steps), away)}
        return found.pop() if len(found) == 1 else None

    def emit_clamped(self, node: QuantNode, target: Placed, emit: Callable[[Placed, int], None]) -> None:
        """`emit(tensor, fused activation)` writes the operator; MAXIMUM and MINIMUM behind it say what of the clamp the activation cannot."""
        activation, bounds = self.clamp(node)
        first = target if not bounds else self.scratch(f"{node.output}/unclamped", target.shape, node.output)
        emit(first, self.writer.enum("ActivationFunctionType", activation))
        self.emit_bounds(first, target, bounds, node.output)

    def emit_clamp(self, source: Placed, target: Placed, node: QuantNode) -> None:
        """A node's clamp as operators of its own: one of TFLite's four, or MAXIMUM and MINIMUM."""
        name, (activation, bounds) = node.output, self.clamp(node, ALONE)
        if activation != "NONE":
            middle = target if not bounds else self.scratch(f"{name}/unbounded", target.shape, name)
            self.writer.operator(activation, 2 if activation in ("RELU", "RELU6") else 1, [source.index], [middle.index])
            source = middle
        self.emit_bounds(source, target, bounds, name)

    def emit_bounds(self, source: Placed, target: Placed, bounds: Sequence[tuple[str, float]], name: str) -> None:
        """A chain of MAXIMUM and MINIMUM, its bounds in the dtype of tensor `name`."""
        for position, (op, bound) in enumerate(bounds):
            after = target if position == len(bounds) - 1 else self.scratch(f"{name}/bounded", target.shape, name)
            limit = self.writer.constant("bound", np.array([bound], self.spec(name).dtype), self.quantisation(name))
            self.writer.operator(op, 2, [source.index, limit], [after.index], "MaximumMinimumOptions")
            source = after

    def declare(self, node: QuantNode, exact: bool) -> None:
        """Remembers a node whose result may differ from the reference."""
        if not exact:
            self.inexact.append(node)
