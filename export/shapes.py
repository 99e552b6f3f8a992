# SPDX-License-Identifier: Apache-2.0
"""Static shapes: of the inputs (from the file or the user), then of every tensor by inference."""

from __future__ import annotations

from collections.abc import Mapping

import onnx

from isthmus.errors import IsthmusError, Problem, ProblemsError
from isthmus.export.accept import first_line, node_label

Shapes = Mapping[str, tuple[int, ...]]


def drop_constant_inputs(model: onnx.ModelProto) -> None:
    """Inputs that are also initialisers (IR version 3 wrote every weight so) are weights, nothing to feed."""
    constants = {tensor.name for tensor in model.graph.initializer}
    kept = [value for value in model.graph.input if value.name not in constants]
    del model.graph.input[:]
    model.graph.input.extend(kept)


def fix_input_shapes(model: onnx.ModelProto, shapes: Shapes | None, notes: list[str]) -> None:
    """Writes a static shape into every input.

    `shapes` wins; without it a single unknown *leading* dimension is a batch and becomes 1 (a sentence goes to `notes`). Raises
    `IsthmusError` on any other unknown dimension and on a shape that names no input or does not fit what the model states.
    """
    names = [value.name for value in model.graph.input]
    for name in shapes or {}:
        if name not in names:
            raise IsthmusError(f"--shape {name}: the model has no input of that name; its inputs are {', '.join(names)}")
    for value in model.graph.input:
        stated = _stated(value)
        given = (shapes or {}).get(value.name)
        extents = _given_shape(value.name, stated, given) if given is not None else _default_shape(value.name, stated, notes)
        dims = value.type.tensor_type.shape.dim
        del dims[:]
        for extent in extents:
            dims.add().dim_value = extent


def _stated(value: onnx.ValueInfoProto) -> list[int | str] | None:
    """What the file says: an int where fixed, a name ("?" for none) where not; None where not even the rank is known."""
    if not value.type.tensor_type.HasField("shape"):
        return None
    return [dim.dim_value if dim.dim_value > 0 else dim.dim_param or "?" for dim in value.type.tensor_type.shape.dim]


def _given_shape(name: str, stated: list[int | str] | None, given: tuple[int, ...]) -> tuple[int, ...]:
    shown = ",".join(str(extent) for extent in given)
    if any(extent < 1 for extent in given):
        raise IsthmusError(f"--shape {name}={shown}: every dimension must be at least 1")
    if stated is None:
        return given
    if len(stated) != len(given):
        raise IsthmusError(f"--shape {name}={shown}: input {name!r} has {len(stated)} dimensions {_shown(stated)}, {len(given)} were given")
    for axis, (fixed, extent) in enumerate(zip(stated, given, strict=True)):
        if isinstance(fixed, int) and fixed != extent:
            raise IsthmusError(f"--shape {name}={shown}: dimension {axis} of input {name!r} is fixed to {fixed} in the model, {extent} was given")
    return given


def _default_shape(name: str, stated: list[int | str] | None, notes: list[str]) -> tuple[int, ...]:
    if stated is None:
        raise IsthmusError(f"input {name!r} has no shape in the model: give it, for example --shape {name}=1,3,224,224")
    unknown = [axis for axis, extent in enumerate(stated) if isinstance(extent, str)]
    if unknown == [0]:
        notes.append(f"input {name!r}: its batch dimension {stated[0]!r} is open and was set to 1 (--shape {name}=... sets another)")
        return (1, *(int(extent) for extent in stated[1:]))
    if unknown:
        named = ", ".join(f"{axis} ({stated[axis]})" for axis in unknown)
        example = ",".join(str(extent) if isinstance(extent, int) else "1" if axis == 0 else "224" for axis, extent in enumerate(stated))
        raise IsthmusError(f"input {name!r} is {_shown(stated)}: dimension {named} is not fixed; give the whole shape, for example --shape {name}={example}")
    return tuple(int(extent) for extent in stated)


def _shown(stated: list[int | str]) -> str:
    return "[" + ", ".join(str(extent) for extent in stated) + "]"


def infer_shapes(model: onnx.ModelProto, *, strict: bool = True) -> onnx.ModelProto:
    """The model with shapes inferred anew from the inputs. Raises `IsthmusError` where they contradict each other.

    Not `strict`: keeps what the file says of its outputs and leaves open what cannot be inferred.
    """
    fresh = onnx.ModelProto()
    fresh.CopyFrom(model)
    del fresh.graph.value_info[:]
    for value in fresh.graph.output:
        if strict:
            value.type.tensor_type.ClearField("shape")
    try:
        return onnx.shape_inference.infer_shapes(fresh, check_type=strict, strict_mode=strict, data_prop=True)
    except Exception as error:  # noqa: BLE001 - InferenceError, and plain RuntimeError or TypeError out of the C++ part
        raise IsthmusError(f"the shapes of the model do not fit together: {first_line(error)}; check --shape, or export the model again") from None


def require_static(model: onnx.ModelProto) -> None:
    """Raises `ProblemsError` naming each node whose result has no static shape."""
    graph = model.graph
    static = {value.name for value in [*graph.input, *graph.value_info, *graph.output] if _is_static(value)}
    static |= {tensor.name for tensor in graph.initializer}
    problems = [
        Problem(node_label(node), "static-shape", f"the shape of {name!r} is not fixed", "fix the input shapes, or export without data-dependent shapes")
        for node in graph.node
        for name in node.output
        if name and name not in static
    ]
    if problems:
        raise ProblemsError("the ONNX model has open shapes", problems)


def _is_static(value: onnx.ValueInfoProto) -> bool:
    return value.type.tensor_type.HasField("shape") and all(dim.HasField("dim_value") and dim.dim_value > 0 for dim in value.type.tensor_type.shape.dim)
