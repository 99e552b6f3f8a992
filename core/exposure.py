# SPDX-License-Identifier: Apache-2.0
"""An artifact with its inside as further outputs: a copy in which the form's int8 tensors can be read. `isthmus.layerwise` compares them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper

from isthmus.errors import IsthmusError
from isthmus.graph import QuantGraph
from isthmus.spec import TensorSpec

SHIFT = 128  # what an artifact in uint8 adds to the form's integers
_NO_IMAGES: Mapping[str, tuple[int, ...]] = {}
_DTYPES = {TensorProto.INT8: "int8", TensorProto.UINT8: "uint8"}


@dataclass(frozen=True)
class Shown:
    """One int8 tensor of the form as an output of the copy: `spec` is that output, `image` the form shape [N, C, ...] of what lies flattened channels last."""

    tensor: str
    spec: TensorSpec
    image: tuple[int, ...] = ()

    def in_form(self, array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
        """What a session gave for `spec` (any number of batches), as the form has it: int8, `shape` behind the batch."""
        values = array.astype(np.int16) - SHIFT if array.dtype == np.uint8 else array
        if self.image:
            _, channels, *space = self.image
            values = np.moveaxis(values.reshape(len(values), *space, channels), -1, 1)
        return np.ascontiguousarray(values.reshape(len(values), *shape[1:]), np.int8)


@dataclass(frozen=True)
class Exposure:
    """A copy of an artifact: its bytes, the outputs it has beside its own, and the form's tensors that can be read in it, in the graph's order."""

    content: bytes
    added: tuple[TensorSpec, ...]
    shown: tuple[Shown, ...] = field(default=())


def expose_onnx(content: bytes, graph: QuantGraph, images: Mapping[str, tuple[int, ...]] = _NO_IMAGES) -> Exposure:
    """Of an ONNX artifact whose tensors keep the form's names, as int8 or as uint8. What carries no such name stays inside.

    `images`: the tensors that lie flattened channels last, with the form shape of what was flattened.
    Nothing else changes, but an engine that would have merged a tensor away can no longer do so. Raises `IsthmusError` on a broken file.
    """
    model = onnx.ModelProto()
    try:
        model.ParseFromString(content)
        inferred = onnx.shape_inference.infer_shapes(model)
    except (DecodeError, onnx.shape_inference.InferenceError) as error:
        raise IsthmusError(f"the artifact is no readable ONNX file ({str(error).strip()[:200] or type(error).__name__}); compile the bundle again") from None
    written = {name for node in model.graph.node for name in node.output}
    types = {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}
    present = {value.name for value in model.graph.output}
    shown = []
    for name, spec in graph.tensors.items():
        dtype = _DTYPES.get(types.get(name, TensorProto.UNDEFINED))
        if spec.scale is None or dtype is None or name not in written or name in present:
            continue
        model.graph.output.append(helper.make_tensor_value_info(name, types[name], list(spec.shape)))
        shown.append(Shown(name, TensorSpec(name, spec.shape, dtype), images.get(name, ())))
    return Exposure(model.SerializeToString(deterministic=True), tuple(tensor.spec for tensor in shown), tuple(shown))
