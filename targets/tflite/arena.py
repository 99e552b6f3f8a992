# SPDX-License-Identifier: Apache-2.0
"""How much memory TensorFlow Lite Micro needs for a file: its activations by TFLM's own greedy plan, and what it keeps beside them.

The activations are planned as tensorflow/lite/micro/memory_planner/greedy_memory_planner.cc does: buffers in falling size, each at the lowest place
where nothing lies that lives at the same time. What the interpreter and the kernels keep (structs, scales a channel, scratch) depends on TFLM's
version and on the kernel library, so it is an upper estimate from counts, calibrated on TFLM's reference kernels on a 64-bit machine; a board's
own kernels (CMSIS-NN, ...) may want more scratch: `MicroInterpreter::arena_used_bytes()` says what it really took.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from isthmus.targets.tflite.flatbuffer import schema

ALIGNMENT = 16
FIXED_BYTES = 1536  # interpreter, planner, the border's tensors
TENSOR_BYTES = 32
OPERATOR_BYTES = 320  # node, registration, the kernel's own record
PLANNER_BYTES = 48  # a buffer while the plan is made: it lies in the arena too
CHANNEL_BYTES = 8  # multiplier and shift
MARGIN = 1.10


@dataclass(frozen=True)
class Buffer:
    """An activation that lives from one operator to another, both counted."""

    size_bytes: int
    first: int
    last: int


@dataclass(frozen=True)
class Arena:
    """`activation_bytes` is the plan, `reserve_bytes` everything else, `size_bytes` what to give the interpreter."""

    activation_bytes: int
    reserve_bytes: int

    @property
    def size_bytes(self) -> int:
        return _aligned(int((self.activation_bytes + self.reserve_bytes) * MARGIN), 1024)


def plan_arena(content: bytes) -> Arena:
    """The arena of a `.tflite` file with one subgraph."""
    classes = schema()
    model = classes.ModelT.InitFromPackedBuf(content)
    subgraph = model.subgraphs[0]
    widths = _widths(classes)
    buffers, channels = _buffers(model, subgraph, widths), _channels(model, subgraph)
    plan = greedy_bytes(buffers)
    scratch = _scratch_bytes(model, subgraph, widths, classes)
    reserve = FIXED_BYTES + TENSOR_BYTES * len(subgraph.tensors) + OPERATOR_BYTES * len(subgraph.operators) + CHANNEL_BYTES * channels + scratch
    return Arena(plan, reserve + max(0, PLANNER_BYTES * len(buffers) - plan))


def greedy_bytes(buffers: Sequence[Buffer]) -> int:
    """The height of the greedy plan."""
    placed: list[tuple[int, Buffer]] = []
    for buffer in sorted(buffers, key=lambda one: -one.size_bytes):
        place = 0
        for offset, other in sorted(((offset, other) for offset, other in placed if _meet(buffer, other)), key=lambda pair: pair[0]):
            if offset - place >= buffer.size_bytes:
                break
            place = max(place, offset + other.size_bytes)
        placed.append((place, buffer))
    return max((offset + buffer.size_bytes for offset, buffer in placed), default=0)


def _meet(a: Buffer, b: Buffer) -> bool:
    return a.first <= b.last and b.first <= a.last


def _aligned(size: int, to: int = ALIGNMENT) -> int:
    return -(-size // to) * to


def _buffers(model: Any, subgraph: Any, widths: dict[int, int]) -> list[Buffer]:
    """Every tensor without data: from the operator that writes it (the inputs: the first) to the last that reads it (the outputs: the end)."""
    end = len(subgraph.operators)
    first, last = dict.fromkeys((int(index) for index in subgraph.inputs), 0), {}
    for step, operator in enumerate(subgraph.operators):
        for index in operator.outputs:
            first.setdefault(int(index), step)
            last[int(index)] = step
        for index in operator.inputs:
            last[int(index)] = step
    last |= {int(index): end for index in subgraph.outputs}
    return [
        Buffer(_aligned(_size_bytes(subgraph.tensors[index], widths)), start, last.get(index, start))
        for index, start in first.items()
        if not _has_data(model, subgraph.tensors[index])
    ]


def _has_data(model: Any, tensor: Any) -> bool:
    return model.buffers[tensor.buffer].data is not None


def _size_bytes(tensor: Any, widths: dict[int, int]) -> int:
    return int(np.prod(tensor.shape, dtype=np.int64)) * widths[tensor.type]


def _widths(classes: Any) -> dict[int, int]:
    """Bytes an element of the types that the writer uses."""
    return {getattr(classes.TensorType, name.upper()): np.dtype(name).itemsize for name in ("int8", "uint8", "int32", "int64", "float32", "bool")}


def _channels(model: Any, subgraph: Any) -> int:
    """Output channels of layers that keep a multiplier for each."""
    tables = [subgraph.tensors[operator.inputs[1]].quantization for operator in subgraph.operators if len(operator.inputs) >= 3]
    return sum(len(table.scale) for table in tables if table is not None and table.scale is not None)


def _scratch_bytes(model: Any, subgraph: Any, widths: dict[int, int], classes: Any) -> int:
    """TRANSPOSE_CONV sums in int32, BATCH_MATMUL turns an operand round, MEAN and SUM keep their axes and sums."""
    code = {index: entry.builtinCode for index, entry in enumerate(model.operatorCodes)}
    wide = {classes.BuiltinOperator.TRANSPOSE_CONV, classes.BuiltinOperator.BATCH_MATMUL, classes.BuiltinOperator.MEAN, classes.BuiltinOperator.SUM}
    needs = [0]
    for operator in subgraph.operators:
        if code[operator.opcodeIndex] in wide:
            tensors = [subgraph.tensors[index] for index in (*operator.outputs, *operator.inputs[:2])]
            needs.append(max(int(np.prod(tensor.shape, dtype=np.int64)) for tensor in tensors) * 4)
    return _aligned(max(needs))
