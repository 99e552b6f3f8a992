# SPDX-License-Identifier: Apache-2.0
"""Reading a user's ONNX file: one sentence where it cannot be, and weights stored beside it only from the same folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import onnx
from google.protobuf.message import DecodeError
from onnx.external_data_helper import load_external_data_for_tensor

from isthmus.errors import IsthmusError

MAX_MODEL_BYTES = 2**31 - 1  # protobuf's own limit for one message


def load_onnx(path: str | Path) -> onnx.ModelProto:
    """The model with all its weights inside.

    Weights may lie in files of their own (as torch.onnx.export leaves them): in the model's folder or below it, never elsewhere.
    Raises `IsthmusError`: missing, a folder, too large, not ONNX, cut short, no nodes, weights missing or outside the folder.
    """
    file = Path(path)
    if not file.exists():
        raise IsthmusError(f"{file}: no such file; give the path of a .onnx model")
    if not file.is_file():
        raise IsthmusError(f"{file}: is a folder, expected a .onnx file")
    if file.stat().st_size > MAX_MODEL_BYTES:
        raise IsthmusError(f"{file}: {file.stat().st_size} bytes, a model ends at {MAX_MODEL_BYTES}")
    data = file.read_bytes()
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError:
        raise IsthmusError(f"{file}: not an ONNX file, or cut short (unreadable after {len(data)} bytes); export it again") from None
    if not model.graph.node or not model.opset_import:
        raise IsthmusError(f"{file}: not an ONNX model: no nodes or no opset; export it again")
    external = [tensor for tensor in _tensors(model.graph) if tensor.data_location == onnx.TensorProto.EXTERNAL]
    total = len(data) + sum(_external_bytes(file, tensor) for tensor in external)
    if total > MAX_MODEL_BYTES:
        raise IsthmusError(f"{file}: {total} bytes with its weights, a model ends at {MAX_MODEL_BYTES}")
    for tensor in external:
        load_external_data_for_tensor(tensor, str(file.parent))
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]
    return model


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Initialisers and constants; those of subgraphs are left: control flow is refused later on."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                yield attribute.t


def _external_bytes(file: Path, tensor: onnx.TensorProto) -> int:
    """How many bytes a tensor takes from its own file, after checking that the file is there, inside the folder, and long enough."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    parts = PurePosixPath(location).parts
    if not parts or PurePosixPath(location).is_absolute() or ".." in parts or "\\" in location or "\0" in location:
        raise IsthmusError(f"{file}: the weights of {tensor.name!r} are said to lie in {location!r}, which is no path inside the model's folder")
    place = file.parent.joinpath(*parts)
    if not place.resolve().is_relative_to(file.parent.resolve()):
        raise IsthmusError(f"{file}: the weights of {tensor.name!r} lie behind a link out of the model's folder ({location!r})")
    if not place.is_file():
        raise IsthmusError(f"{file}: its weights {location!r} are missing; keep both files in one folder")
    try:
        offset, length = int(entries.get("offset") or 0), int(entries.get("length") or 0)
    except ValueError:
        raise IsthmusError(f"{file}: the weights of {tensor.name!r} have offset {entries.get('offset')!r} and length {entries.get('length')!r}") from None
    size = place.stat().st_size
    length = length or size - offset
    if offset < 0 or length < 0 or offset + length > size:
        raise IsthmusError(f"{file}: the weights of {tensor.name!r} end at byte {offset + length} of {location!r}, which has {size}; export the model again")
    return length
