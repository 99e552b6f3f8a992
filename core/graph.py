# SPDX-License-Identifier: Apache-2.0
"""`QuantGraph`: a verified int8 QDQ ONNX graph, and the list of integer nodes that targets lower from.

The ONNX model is the truth; `nodes` and `tensors` are what it says once each DequantizeLinear -> operator -> (Relu | Clip) ->
QuantizeLinear group is read as one integer operator (see `isthmus.form`). Everything is derived, nothing is stored twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from isthmus.errors import Problem, ProblemsError
from isthmus.onnx_file import load_onnx
from isthmus.recipe import Recipe
from isthmus.spec import TensorSpec

# The form's versions. Opset 20 has every operator of the zoo (GELU, Mish, GridSample); each target's dialect lowers from it.
OPSET = 20
IR_VERSION = 9


@dataclass(frozen=True)
class QuantNode:
    """One step of the integer program.

    - `kind` "int8": reads int8 tensors, accumulates in int32, writes an int8 tensor.
    - `kind` "float": a float island, on float tensors.
    - `kind` "border": `QuantizeLinear` (float tensor in, int8 out) or `DequantizeLinear` (int8 in, float out); also "Requantize" is
      an int8 node (int8 in, int8 out with another scale).

    `inputs` and `output(s)` are keys of `QuantGraph.tensors`. `weight` (int8) has the operator's own ONNX shape: Conv
    [out, in/groups, *kernel], ConvTranspose [in, out/groups, *kernel], Gemm [out, in] (transB), MatMul [in, out]. `weight_scale` is
    float32 [out] or [1]. `bias` is int32 [out] at scale input_scale * weight_scale, None where there is none. `clamp` is the range of
    the result in steps of the output
    (a fused Relu or Clip; (-128, 127) where nothing is fused), and `activation` its name: "", "Relu" or "Clip" with
    `activation_range` in real numbers. `attributes` holds the ONNX attributes as Python values, defaults and `auto_pad` resolved
    (Conv: strides, pads, dilations, group, kernel_shape; pools: strides, pads, kernel_shape, ceil_mode, count_include_pad, dilations).
    `constants` holds other constant inputs of the operator (a float island's parameters, PRelu's slope), by input position, and of a
    "Constant" (an int8 operand that is stored: no inputs, one output with scale and zero point) its array at 0; `absent` the
    positions that an island leaves out in between. `op` is a row of `isthmus.ops`: not always an ONNX name (see `ops.row_name`).
    """

    name: str
    op: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    weight: np.ndarray | None = None
    weight_scale: np.ndarray | None = None
    bias: np.ndarray | None = None
    clamp: tuple[int, int] = (-128, 127)
    activation: str = ""
    activation_range: tuple[float, float] = (-np.inf, np.inf)
    constants: Mapping[int, np.ndarray] = field(default_factory=dict)
    absent: tuple[int, ...] = ()

    @property
    def output(self) -> str:
        return self.outputs[0]


@dataclass(frozen=True)
class QuantGraph:
    """The int8 form (design: section 4). Make one with `QuantGraph.load`, `QuantGraph.from_model` or the `export` stage.

    - `nodes`: the integer program in order.
    - `tensors`: every activation, by name; int8 ones carry scale and zero point.
    - `inputs`, `outputs`: the border; a graph input whose first and only use is a QuantizeLinear has the int8 dtype and scale of that
      quantiser (an artifact may take it raw), likewise an output behind a DequantizeLinear. Names are the ONNX model's own.
    """

    model: ir.Model
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    nodes: tuple[QuantNode, ...]
    tensors: Mapping[str, TensorSpec]
    float_islands: tuple[str, ...]
    recipe: Recipe

    # ---- making one
    @classmethod
    def from_model(cls, model: ir.Model | onnx.ModelProto) -> QuantGraph:
        """Reads and verifies. Raises `ProblemsError` listing every broken rule with its node."""
        from isthmus.form import read_form

        graph, problems = read_form(model)
        if problems or graph is None:
            raise ProblemsError("not a graph in int8 form", problems)
        return graph

    @classmethod
    def load(cls, path: str | Path) -> QuantGraph:
        """Reads a `.onnx` file in int8 form. Raises `IsthmusError` where the file is missing, not ONNX, or not in the form."""
        return cls.from_model(load_onnx(path))

    def save(self, path: str | Path) -> None:
        Path(path).write_bytes(self.to_bytes())

    def to_bytes(self) -> bytes:
        """The ONNX file, byte for byte the same for the same graph."""
        return bytes(ir.serde.serialize_model(self.model).SerializeToString(deterministic=True))

    @cached_property
    def digest(self) -> str:
        """sha256 of the ONNX file."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    # ---- what it says
    def verify(self) -> None:
        """The contract. Raises `ProblemsError` unless the model, read anew, follows every rule of the form."""
        QuantGraph.from_model(self.model)

    def problems(self) -> list[Problem]:
        from isthmus.form import read_form

        return read_form(self.model)[1]

    def producer(self, tensor: str) -> QuantNode | None:
        """The node that writes `tensor`, None for a graph input."""
        return self._producers.get(tensor)

    def consumers(self, tensor: str) -> tuple[QuantNode, ...]:
        return tuple(node for node in self.nodes if tensor in node.inputs)

    def raw_input(self, index: int = 0) -> str:
        """The name of the int8 tensor behind graph input `index` (the input's own name where it stays float)."""
        name = self.inputs[index].name
        uses = self.consumers(name)
        return uses[0].output if len(uses) == 1 and uses[0].op == "QuantizeLinear" else name

    def raw_output(self, index: int = 0) -> str:
        """The name of the int8 tensor in front of graph output `index` (the output's own name where it is float)."""
        producer = self.producer(self.outputs[index].name)
        return producer.inputs[0] if producer is not None and producer.op == "DequantizeLinear" else self.outputs[index].name

    @cached_property
    def _producers(self) -> dict[str, QuantNode]:
        return {name: node for node in self.nodes for name in node.outputs}
