# SPDX-License-Identifier: Apache-2.0
"""`TensorSpec`: what a tensor is at a border (of the graph, of an artifact, of a session). numpy only: devices import it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from isthmus.errors import IsthmusError

# The order of axes in the form, by rank. Other ranks have no name for their axes and are never permuted.
FORM_LAYOUTS = {2: "NC", 3: "NCW", 4: "NCHW"}


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape (in the order of `layout`), dtype, and for int8 the quantisation: real = (q - zero_point) * scale.

    `scale` and `zero_point` are None for float tensors. `axis` is the channel axis of a per-channel scale (weights only;
    activations are per tensor, so None). `layout` is a word of axis letters ("NCHW", "NHWC") or "" where axes have no names.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    layout: str = ""
    scale: float | None = None
    zero_point: int | None = None
    axis: int | None = None

    @property
    def is_quantised(self) -> bool:
        """int8. A float32 spec may carry scale and zero point as well: those of a quantiser that stands inside the artifact."""
        return self.scale is not None and self.dtype != "float32"

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    def quantise(self, real: np.ndarray) -> np.ndarray:
        """float -> int8: round half to even, saturate (ONNX QuantizeLinear, in float32 as the operator is specified)."""
        if self.scale is None or self.zero_point is None or not self.is_quantised:
            return np.ascontiguousarray(real, dtype=self.dtype)
        info = np.iinfo(self.dtype)
        steps = np.rint(np.asarray(real, np.float32) / np.float32(self.scale)) + np.float32(self.zero_point)
        saturated: np.ndarray = np.clip(steps, info.min, info.max).astype(self.dtype)
        return saturated

    def dequantise(self, q: np.ndarray) -> np.ndarray:
        """int8 -> float32 (ONNX DequantizeLinear)."""
        if self.scale is None or self.zero_point is None or not self.is_quantised:
            return np.asarray(q)
        return (q.astype(np.int32) - self.zero_point).astype(np.float32) * np.float32(self.scale)

    def from_reference(self, array: np.ndarray) -> np.ndarray:
        """The reference's values as this border has them: int8 as real numbers where the artifact quantises inside."""
        inside = self.scale is not None and not self.is_quantised
        return replace(self, dtype="int8").dequantise(array) if inside and array.dtype == np.int8 else array

    def to_reference(self, array: np.ndarray) -> np.ndarray:
        """Back: exact, as such an artifact's real numbers are steps times scale."""
        return array if self.scale is None or self.is_quantised else replace(self, dtype="int8").quantise(array)

    def form_permutation(self) -> tuple[int, ...] | None:
        """`x.transpose(p)` brings a tensor of this layout into the form's layout (NCHW); None where nothing moves."""
        form = FORM_LAYOUTS.get(len(self.shape), "")
        if not self.layout or self.layout == form:
            return None
        return tuple(self.layout.index(axis) for axis in form)

    def to_form(self, array: np.ndarray) -> np.ndarray:
        """An array in this spec's layout, brought to the form's (NHWC -> NCHW)."""
        permutation = self.form_permutation()
        return array if permutation is None else np.ascontiguousarray(array.transpose(permutation))

    def from_form(self, array: np.ndarray) -> np.ndarray:
        """An array in the form's layout, brought to this spec's (NCHW -> NHWC)."""
        permutation = self.form_permutation()
        return array if permutation is None else np.ascontiguousarray(array.transpose(np.argsort(permutation)))

    def form_shape(self) -> tuple[int, ...]:
        """The shape in the form's layout."""
        permutation = self.form_permutation()
        return self.shape if permutation is None else tuple(self.shape[axis] for axis in permutation)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"shape": list(self.shape)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TensorSpec:
        """Raises `IsthmusError` where the data is not what `to_json` writes (a manifest is read before anybody vouches for it)."""
        try:
            spec = cls(**{**data, "shape": tuple(data["shape"])})
            sound = _sound(spec)  # the fields are whatever the file held
        except (KeyError, TypeError, ValueError, OverflowError):
            sound = False
        if not sound:
            raise IsthmusError(f"not the description of a tensor: {str(data)[:200]}")
        return spec


def _sound(spec: Any) -> bool:
    """Whether every field is of its type and range. Raises `TypeError` where a comparison already shows that it is not."""
    return (
        isinstance(spec.name, str)
        and all(type(extent) is int and 0 <= extent < 2**63 for extent in spec.shape)
        and np.dtype(spec.dtype).name == spec.dtype
        and np.dtype(spec.dtype).kind in "fiub"
        and (spec.layout == "" or sorted(spec.layout) == sorted(FORM_LAYOUTS.get(len(spec.shape), "")))
        and (spec.scale is None) == (spec.zero_point is None)
        and (spec.scale is None or ((np.dtype(spec.dtype).kind == "i" or spec.dtype == "float32") and 0 < spec.scale < float("inf")))
        and (spec.zero_point is None or (type(spec.zero_point) is int and -(2**31) <= spec.zero_point < 2**31))
        and (spec.axis is None or type(spec.axis) is int)
    )
