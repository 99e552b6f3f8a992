# SPDX-License-Identifier: Apache-2.0
"""The attributes of every int8 operator, resolved: defaults written out, axes counted from the front, constant inputs read, impossible values refused.

Only what the reference can run on any multiple of the graph's batch gets through: onnx's own checker accepts more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from isthmus.resampling import NEAREST_MODES, TRANSFORMS

Shape = tuple[int, ...]
Attributes = dict[str, Any]


@dataclass(frozen=True)
class Call:
    """One operator as the file has it: `op` is its row, `inputs` the shapes of its activations, `constants` its constant inputs by position."""

    op: str
    given: Mapping[str, Any]
    inputs: tuple[Shape, ...]
    constants: Mapping[int, np.ndarray]
    outputs: tuple[Shape, ...]

    @property
    def rank(self) -> int:
        return len(self.inputs[0])


class IllegalCallError(Exception):
    """Why an operator is not in the form; the reader makes it a `Problem`."""

    def __init__(self, found: str, fix: str) -> None:
        super().__init__(found)
        self.found, self.fix = found, fix


def resolve(call: Call) -> Attributes:
    """The attributes as `QuantNode` has them. Raises `IllegalCallError`."""
    for name, value in call.given.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise IllegalCallError(f"{name} is {value}", "give a finite number")
    rule = _RULES.get(call.op)
    return dict(call.given) if rule is None else rule(call)


# ---- parts
def _whole_numbers(call: Call, position: int, what: str) -> list[int] | None:
    """A constant input of whole numbers as a list, None where it is left out."""
    array = call.constants.get(position)
    if array is None:
        return None
    if array.dtype.kind != "i" or array.ndim > 1:
        raise IllegalCallError(f"{what} of {array.dtype}{list(array.shape)}", "give whole numbers")
    return [int(value) for value in array.reshape(-1)]


def _axis(axis: int, rank: int) -> int:
    """Counted from the front; the batch may not be touched."""
    if not -rank <= axis < rank:
        raise IllegalCallError(f"axis {axis} of {rank}", "name an axis that is there")
    if axis % rank == 0:
        raise IllegalCallError("works along the batch", "leave the first axis alone")
    return axis % rank


def _axes(axes: Sequence[int], rank: int) -> list[int]:
    resolved = [_axis(axis, rank) for axis in axes]
    if len(set(resolved)) != len(resolved):
        raise IllegalCallError(f"axes {list(axes)} name one twice", "name each once")
    return resolved


def _keeps_batch(call: Call) -> None:
    for before in call.inputs:
        for after in call.outputs:
            if not before or not after or before[0] != after[0]:
                raise IllegalCallError(f"{call.op} from {list(before)} to {list(after)} moves the batch", "keep the first axis")


def _whole(call: Call, name: str, default: int) -> int:
    value = call.given.get(name, default)
    if not isinstance(value, int):
        raise IllegalCallError(f"{name} is {value!r}", "give a whole number")
    return value


# ---- sums of products
def _gemm(call: Call) -> Attributes:
    given = dict(call.given)
    if (given.get("transB", 0), given.get("transA", 0), given.get("alpha", 1.0), given.get("beta", 1.0)) != (1, 0, 1.0, 1.0):
        raise IllegalCallError(f"Gemm with {given}", "transB=1, transA=0, alpha=beta=1")
    return given


def _matmul(call: Call) -> Attributes:
    if call.rank < 2:
        raise IllegalCallError("a vector without a batch", "give it a batch axis")
    return dict(call.given)


def _batch_matmul(call: Call) -> Attributes:
    a, b = call.inputs
    if len(a) != len(b) or len(a) < 3:
        raise IllegalCallError(f"two activations of shapes {list(a)} and {list(b)}", "give both the same number of axes, the first of them the batch")
    _keeps_batch(call)
    return dict(call.given)


def _windowed(call: Call) -> Attributes:
    """Conv, ConvTranspose and pools."""
    given = dict(call.given)
    if given.pop("auto_pad", "NOTSET") != "NOTSET":
        raise IllegalCallError(f"auto_pad {call.given['auto_pad']!r}", "write explicit pads")
    if "kernel_shape" not in given:
        raise IllegalCallError("no kernel_shape", "write it: TensorRT's parser asks for it")
    rank = len(given["kernel_shape"])
    given = {"strides": [1] * rank, "dilations": [1] * rank, "pads": [0] * (2 * rank), **given}
    if call.op in ("Conv", "ConvTranspose"):
        given.setdefault("group", 1)
    else:
        given.setdefault("ceil_mode", 0)
    if call.op == "AveragePool":
        given.setdefault("count_include_pad", 0)
    if given.pop("storage_order", 0) != 0:
        raise IllegalCallError("storage_order 1", "use row-major pooling")
    if call.op == "ConvTranspose":
        given.setdefault("output_padding", [0] * rank)
    wrong = _wrong_window(given, call.outputs[0], call.inputs[0])
    if wrong:
        raise IllegalCallError(wrong, "export the model again")
    if call.op == "ConvTranspose":
        _transposed(given, call)
    return given


def _transposed(given: Attributes, call: Call) -> None:
    if given.pop("output_shape", None) is not None:
        raise IllegalCallError("output_shape", "write pads and output_padding instead")
    extra, rank = given["output_padding"], call.rank - 2
    if len(extra) != rank or any(not 0 <= more < max(step, spread) for more, step, spread in zip(extra, given["strides"], given["dilations"], strict=False)):
        raise IllegalCallError(f"output_padding {extra} for strides {given['strides']}", "at least 0, less than the stride")
    for axis in range(rank):
        whole = (call.inputs[0][axis + 2] - 1) * given["strides"][axis] + (given["kernel_shape"][axis] - 1) * given["dilations"][axis] + 1
        if call.outputs[0][axis + 2] != whole + extra[axis] - given["pads"][axis] - given["pads"][axis + rank]:
            raise IllegalCallError(f"an output of {list(call.outputs[0])} that its pads do not give", "export the model again")


def _wrong_window(given: Mapping[str, Any], output: Shape, source: Shape) -> str:
    """What is impossible in a window's attributes; onnx's own checker lets some of it through."""
    rank = len(output) - 2
    for name, length, least in (("kernel_shape", rank, 1), ("strides", rank, 1), ("dilations", rank, 1), ("pads", 2 * rank, 0)):
        values = given[name]
        if rank < 1 or len(values) != length or any(value < least for value in values):
            return f"{name} {values} for {rank} space axes"
    if given.get("group", 1) < 1:
        return f"group {given['group']}"
    if "group" not in given and any(pad >= given["kernel_shape"][axis % rank] for axis, pad in enumerate(given["pads"])):
        return f"pads {given['pads']} as large as the kernel {given['kernel_shape']}: a window of padding alone"
    for axis in range(rank):
        # onnx 1.23's shape inference counts such a window under ceil_mode, engines do not.
        if given.get("ceil_mode") and (output[axis + 2] - 1) * given["strides"][axis] >= source[axis + 2] + given["pads"][axis]:
            return f"ceil_mode with pads {given['pads']}: the last window lies in the padding alone"
    return ""


# ---- element by element
def _p_relu(call: Call) -> Attributes:
    slope = call.constants.get(1)
    if slope is None or slope.dtype != np.float32 or not np.isfinite(slope).all():
        raise IllegalCallError("a slope that is no finite float32 constant", "give one slope, or one a channel")
    if slope.size != 1 and (call.rank < 2 or slope.ndim > call.rank or _padded(slope.shape, call.rank) != (1, call.inputs[0][1], *[1] * (call.rank - 2))):
        raise IllegalCallError(f"slopes of shape {list(slope.shape)} for {list(call.inputs[0])}", "give one slope, or one a channel")
    return dict(call.given)


def _padded(shape: Shape, rank: int) -> Shape:
    return (*[1] * (rank - len(shape)), *shape)


def _with_defaults(**defaults: Any) -> Callable[[Call], Attributes]:
    return lambda call: {**defaults, **call.given}


def _gelu(call: Call) -> Attributes:
    approximate = call.given.get("approximate", "none")
    if approximate not in ("none", "tanh"):
        raise IllegalCallError(f"approximate {approximate!r}", "none or tanh")
    return {"approximate": approximate}


# ---- reductions
def _reduce_mean(call: Call) -> Attributes:
    axes = _whole_numbers(call, 1, "axes")
    if not axes:
        raise IllegalCallError("a mean over every axis", "name the axes to reduce, without the batch")
    return {"axes": sorted(_axes(axes, call.rank)), "keepdims": int(bool(_whole(call, "keepdims", 1)))}


# ---- moves
def _shape_kept(call: Call) -> Attributes:
    _keeps_batch(call)
    return dict(call.given)


def _concat(call: Call) -> Attributes:
    axis = _whole(call, "axis", 0)
    return {"axis": _axis(axis, call.rank)}


def _split(call: Call) -> Attributes:
    axis = _axis(_whole(call, "axis", 0), call.rank)
    sizes = [shape[axis] for shape in call.outputs]
    if sum(sizes) != call.inputs[0][axis]:
        raise IllegalCallError(f"parts of {sizes} from {call.inputs[0][axis]}", "let the parts add up")
    return {"axis": axis, "sizes": sizes}


def _slice(call: Call) -> Attributes:
    """Each axis as Python's `range(start, end, step)`; an end of -1 with a negative step is in front of the first element."""
    starts, ends = _whole_numbers(call, 1, "starts"), _whole_numbers(call, 2, "ends")
    if starts is None or ends is None or len(starts) != len(ends):
        raise IllegalCallError("starts and ends that are not as many constants", "give both for each axis")
    axes, steps = _whole_numbers(call, 3, "axes"), _whole_numbers(call, 4, "steps")
    axes = list(range(len(starts))) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    if len(axes) != len(starts) or len(steps) != len(starts) or 0 in steps:
        raise IllegalCallError(f"axes {axes} and steps {steps} for {len(starts)} cuts", "one axis and one step (not 0) a cut")
    cuts = {}
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        if not -call.rank <= axis < call.rank or axis % call.rank in cuts:
            raise IllegalCallError(f"axes {axes} of {call.rank}", "name axes that are there, each once")
        cuts[axis % call.rank] = slice(start, end, step).indices(call.inputs[0][axis])
    if cuts.pop(0, (0, call.inputs[0][0], 1)) != (0, call.inputs[0][0], 1):
        raise IllegalCallError("cuts the batch", "leave the first axis alone")
    for axis, cut in cuts.items():
        if len(range(*cut)) != call.outputs[0][axis]:
            raise IllegalCallError(f"cut {cut} of axis {axis} does not give {call.outputs[0][axis]}", "export the model again")
    starts, ends, steps = ([cut[part] for cut in cuts.values()] for part in range(3))
    return {"axes": list(cuts), "starts": starts, "ends": ends, "steps": steps}


def _pad(call: Call) -> Attributes:
    """`pads` for all axes, every begin and then every end; `value` in real numbers, to be quantised as the tensor is."""
    mode = call.given.get("mode", "constant")
    if mode != "constant":
        raise IllegalCallError(f"Pad with mode {mode!r}", "pad with a constant")
    pads = _whole_numbers(call, 1, "pads")
    axes = _whole_numbers(call, 3, "axes")
    axes = list(range(call.rank)) if axes is None else axes
    if pads is None or len(pads) != 2 * len(axes) or min(pads, default=0) < 0:
        raise IllegalCallError(f"pads {pads} for {len(axes)} axes", "give a begin and an end, at least 0, for each")
    full = [0] * (2 * call.rank)
    for index, axis in enumerate(axes):
        if pads[index] or pads[index + len(axes)]:
            place = _axis(axis, call.rank)
            full[place], full[place + call.rank] = pads[index], pads[index + len(axes)]
    value = call.constants.get(2)
    if value is not None and (value.dtype != np.float32 or value.size != 1 or np.isnan(value).any()):
        raise IllegalCallError("a padding value that is not one float32 number", "give one")
    grown = tuple(extent + full[axis] + full[axis + call.rank] for axis, extent in enumerate(call.inputs[0]))
    if grown != call.outputs[0]:
        raise IllegalCallError(f"pads {full} give {list(grown)}, not {list(call.outputs[0])}", "export the model again")
    return {"pads": full, "mode": "constant", "value": 0.0 if value is None else float(value.reshape(-1)[0])}


def _transpose(call: Call) -> Attributes:
    order = call.given.get("perm", list(range(call.rank))[::-1])
    if sorted(order) != list(range(call.rank)) or order[0] != 0:
        raise IllegalCallError(f"perm {order}", "an order of all axes that leaves the first in its place")
    return {"perm": list(order)}


def _squeeze(call: Call) -> Attributes:
    """The axes of extent 1 that go, or those of the output that come."""
    axes = _whole_numbers(call, 1, "axes")
    if not axes:
        raise IllegalCallError(f"{call.op} without axes", "name them, without the batch")
    _keeps_batch(call)
    return {"axes": sorted(_axes(axes, call.rank if call.op == "Squeeze" else len(call.outputs[0])))}


def _expand(call: Call) -> Attributes:
    if len(call.outputs[0]) != call.rank:
        raise IllegalCallError(f"Expand from {list(call.inputs[0])} to {list(call.outputs[0])} adds axes", "add them with Unsqueeze")
    _keeps_batch(call)
    return {}


def _blocks(call: Call) -> Attributes:
    block, mode = _whole(call, "blocksize", 0), call.given.get("mode", "DCR")
    if call.rank != 4 or block < 1 or mode not in ("DCR", "CRD"):
        raise IllegalCallError(f"{call.op} with blocksize {block} and mode {mode!r} on {list(call.inputs[0])}", "blocksize at least 1, DCR or CRD, on NCHW")
    split = call.inputs[0][1:2] if call.op == "DepthToSpace" else call.inputs[0][2:]
    if any(extent % (block * block if call.op == "DepthToSpace" else block) for extent in split):
        raise IllegalCallError(f"blocks of {block} in {list(call.inputs[0])}", "use a blocksize that divides it")
    return {"blocksize": block, "mode": mode} if call.op == "DepthToSpace" else {"blocksize": block}


def _gather(call: Call) -> Attributes:
    indices = call.constants.get(1)
    axis = _axis(_whole(call, "axis", 0), call.rank)
    extent = call.inputs[0][axis]
    if indices is None or indices.dtype.kind != "i" or indices.size == 0 or indices.min() < -extent or indices.max() >= extent:
        raise IllegalCallError(f"indices that are no constants within {extent}", "give whole numbers that are there")
    return {"axis": axis, "indices": np.where(indices < 0, indices + extent, indices).tolist()}


def _resize(call: Call) -> Attributes:
    """`sizes` and `scales` end as the output's extents; scales that give no whole extent would leave the engine to round."""
    given = call.given
    mode, transform = given.get("mode", "nearest"), given.get("coordinate_transformation_mode", "half_pixel")
    rounding = given.get("nearest_mode", "round_prefer_floor")
    if mode not in ("nearest", "linear") or transform not in TRANSFORMS or rounding not in NEAREST_MODES:
        raise IllegalCallError(f"mode {mode!r}, {transform!r}, {rounding!r}", f"nearest or linear, {', '.join(TRANSFORMS)}, {', '.join(NEAREST_MODES)}")
    if given.get("antialias", 0) or given.get("exclude_outside", 0) or given.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise IllegalCallError("antialias, exclude_outside or keep_aspect_ratio_policy", "leave them at their defaults")
    before, after = call.inputs[0], call.outputs[0]
    if call.rank < 3 or before[:2] != after[:2]:
        raise IllegalCallError(f"from {list(before)} to {list(after)}", "resize space axes only")
    scales = call.constants.get(2)
    if scales is not None and scales.size:
        axes = [axis % call.rank for axis in given.get("axes", range(call.rank))]
        if scales.size != len(axes) or any(abs(float(scale) * before[axis] - after[axis]) > 1e-3 for axis, scale in zip(axes, scales.reshape(-1), strict=True)):
            raise IllegalCallError(f"scales {scales.tolist()} of {list(before)}, which give no whole extents", "give sizes")
    resolved: Attributes = {"mode": mode, "coordinate_transformation_mode": transform, "sizes": list(after[2:])}
    return resolved | ({"nearest_mode": rounding} if mode == "nearest" else {})


_RULES: dict[str, Callable[[Call], Attributes]] = {
    "Gemm": _gemm,
    "MatMul": _matmul,
    "BatchMatMul": _batch_matmul,
    **dict.fromkeys(("Conv", "ConvTranspose", "MaxPool", "AveragePool"), _windowed),
    "PRelu": _p_relu,
    "LeakyRelu": _with_defaults(alpha=0.01),
    "HardSigmoid": _with_defaults(alpha=0.2, beta=0.5),
    "Elu": _with_defaults(alpha=1.0),
    "Gelu": _gelu,
    "ReduceMean": _reduce_mean,
    **dict.fromkeys(("Reshape", "Flatten"), _shape_kept),
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Pad": _pad,
    "Transpose": _transpose,
    **dict.fromkeys(("Squeeze", "Unsqueeze"), _squeeze),
    "Expand": _expand,
    **dict.fromkeys(("DepthToSpace", "SpaceToDepth"), _blocks),
    "Gather": _gather,
    **dict.fromkeys(("ResizeNearest", "ResizeLinear"), _resize),
}
