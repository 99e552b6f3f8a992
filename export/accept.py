# SPDX-License-Identifier: Apache-2.0
"""What a user's ONNX model must be before anything is done to it. Every check names the node or tensor and says what to do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from isthmus.errors import IsthmusError, Problem, ProblemsError

OLDEST_OPSET = 7  # BatchNormalization, Dropout and broadcasting took their present meaning there
DEFAULT_DOMAINS = ("", "ai.onnx")
INTEGER_OPERATORS = frozenset({"QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear"})
FLOATS = {TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16}


def default_opset(model: onnx.ModelProto) -> int:
    """The opset of the default domain. Raises `IsthmusError` where the model imports none."""
    versions = [entry.version for entry in model.opset_import if entry.domain in DEFAULT_DOMAINS]
    if not versions:
        raise IsthmusError("the model imports no opset of the default ONNX domain; export it again with standard operators")
    return int(max(versions))


def has_quantisers(model: onnx.ModelProto) -> bool:
    """Whether the model already carries QuantizeLinear or DequantizeLinear (it then goes through `graph_from_qdq`)."""
    return any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph.node)


def accept(model: onnx.ModelProto) -> None:
    """Raises `IsthmusError` or `ProblemsError` (all at once) where the model cannot be worked on at all; changes nothing."""
    _require_text(model)
    opset, known = default_opset(model), onnx.defs.onnx_opset_version()
    if opset < OLDEST_OPSET:
        raise IsthmusError(f"the model is of opset {opset}, expected {OLDEST_OPSET} or newer; export it again with a current exporter")
    if opset > known:
        fix = f"export it with opset {known} or older, or update onnx"
        raise IsthmusError(f"the model is of opset {opset}, the installed onnx {onnx.__version__} knows up to {known}; {fix}")
    problems = [*_operator_problems(model), *_border_problems(model), *_constant_problems(model)]
    if problems:
        raise ProblemsError("the ONNX model cannot be taken", problems)


def check_valid(model: onnx.ModelProto) -> None:
    """ONNX's own checker. Raises `IsthmusError` with its first line. An output may be without a shape: it is inferred later."""
    checked = onnx.ModelProto()
    checked.CopyFrom(model)
    for value in checked.graph.output:
        value.type.tensor_type.shape.SetInParent()
    try:
        onnx.checker.check_model(checked)
    except Exception as error:  # noqa: BLE001 - ValidationError, and plain RuntimeError out of the C++ part
        raise IsthmusError(f"not a valid ONNX model: {first_line(error)}; export it again") from None


def _require_text(message: Any) -> None:
    """protobuf reads a file with damaged names without a word and stumbles later: every string is looked at once."""
    try:
        for field, value in message.ListFields():
            if field.type in (field.TYPE_MESSAGE, field.TYPE_STRING):
                parts = [value] if isinstance(value, str) or hasattr(value, "ListFields") else value
                for part in parts:
                    _require_text(part) if field.type == field.TYPE_MESSAGE else part.encode()
    except (UnicodeError, AttributeError):
        raise IsthmusError("the ONNX model holds names that are not UTF-8 text: the file is damaged; export it again") from None


def first_line(error: Exception) -> str:
    """The first line of a tool's message: the rest is its stack."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


def node_label(node: onnx.NodeProto) -> str:
    return node.name or f"{node.op_type} (writes {node.output[0] if node.output else 'nothing'})"


def type_name(kind: int) -> str:
    """ "float16" for TensorProto.FLOAT16; the number where a damaged file holds one that is no type."""
    names = {number: name.lower() for name, number in TensorProto.DataType.items()}
    return names.get(kind, str(kind))


def _operator_problems(model: onnx.ModelProto) -> Iterator[Problem]:
    own = {(function.domain, function.name) for function in model.functions}
    for node in model.graph.node:
        if node.domain not in DEFAULT_DOMAINS and (node.domain, node.op_type) not in own:
            found = f"{node.op_type} is of domain {node.domain!r}, not of the ONNX standard"
            fix = "export with standard operators (Brevitas: export_onnx_qcdq), or cut this node off the model"
            yield Problem(node_label(node), "operator-domain", found, fix)
        elif any(attribute.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) for attribute in node.attribute):
            fix = "export a straight graph: trace the model with fixed conditions and trip counts"
            yield Problem(node_label(node), "control-flow", f"{node.op_type} is control flow", fix)
        elif node.op_type in INTEGER_OPERATORS:
            fix = "quantise to QuantizeLinear/DequantizeLinear form (QuantFormat.QDQ), or give the float model"
            yield Problem(node_label(node), "operator-form", f"{node.op_type} is quantised in operator form", fix)


def _border_problems(model: onnx.ModelProto) -> Iterator[Problem]:
    constants = {tensor.name for tensor in model.graph.initializer}
    sides = (("input", model.graph.input), ("output", model.graph.output))
    for side, values in sides:
        for value in values:
            kind = value.type.tensor_type.elem_type if value.type.HasField("tensor_type") else None
            if value.name in constants or kind == TensorProto.FLOAT:
                continue
            found = f"{side} is {'of type ' + type_name(kind) if kind else 'no tensor'}"
            fix = "convert the model to float32" if kind in FLOATS else "cut the model so that it takes and gives float32 tensors"
            yield Problem(value.name, "border-dtype", found, fix)
    if not any(value.name not in constants for value in model.graph.input):
        yield Problem("model", "border-dtype", "has no input", "export a model that computes something from an input")


def _constant_problems(model: onnx.ModelProto) -> Iterator[Problem]:
    tensors = [(tensor.name, tensor) for tensor in model.graph.initializer]
    for node in model.graph.node:
        tensors += [(node_label(node), attribute.t) for attribute in node.attribute if attribute.type == AttributeProto.TENSOR]
    if model.graph.sparse_initializer:
        yield Problem(model.graph.sparse_initializer[0].values.name, "constant", "is a sparse initialiser", "export with dense weights")
    for name, tensor in tensors:
        if tensor.data_location == TensorProto.EXTERNAL:
            yield Problem(name, "constant", "is stored outside the file", "save the model in one file (onnx.save with save_as_external_data=False)")
            continue
        try:
            array = numpy_helper.to_array(tensor)
        except Exception as error:  # noqa: BLE001 - numpy_helper raises ValueError, TypeError or IndexError on damaged data
            yield Problem(name, "constant", f"its data cannot be read ({first_line(error)})", "export the model again")
            continue
        bad = int(np.isnan(array).sum()) if tensor.data_type in FLOATS else 0
        if bad:
            yield Problem(name, "finite-weights", f"{bad} of {array.size} values are NaN", "train or export the model again: a NaN weight spoils every output")


def opset_imports(version: int) -> list[onnx.OperatorSetIdProto]:
    return [helper.make_opsetid("", version)]
