# SPDX-License-Identifier: Apache-2.0
"""Writes a `.tflite` file: tensors, constants, operators, one signature. Knows the file format and nothing of networks."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from isthmus.errors import IsthmusError

IDENTIFIER = b"TFL3"
SCHEMA_VERSION = 3
SIGNATURE = "serving_default"
# TensorFlow's schema demands this of buffers (force_align); the Python builder knows only an element's own alignment.
BUFFER_ALIGNMENT = 16
RUNTIME_VERSION_BYTES = 16

# The first TensorFlow Lite that reads an operator at that version (tools/versioning/runtime_version.cc); the smallest version that
# has what we write, so that an old runtime on a board still loads the file.
MIN_RUNTIME: Mapping[tuple[str, int], str] = {
    ("ABS", 1): "1.13.0",
    ("ADD", 1): "1.5.0",
    ("ADD", 2): "1.14.0",
    ("ARG_MAX", 1): "1.9.0",
    ("ARG_MIN", 1): "1.9.0",
    ("AVERAGE_POOL_2D", 1): "1.5.0",
    ("BATCH_MATMUL", 1): "2.3.0",
    ("BROADCAST_TO", 3): "2.5.0",
    ("CAST", 1): "1.5.0",
    ("CEIL", 1): "1.14.0",
    ("CONCATENATION", 1): "1.5.0",
    ("CONCATENATION", 2): "1.14.0",
    ("CONV_2D", 3): "1.14.0",
    ("CONV_2D", 6): "2.9.0",
    ("COS", 1): "1.14.0",
    ("DEPTHWISE_CONV_2D", 2): "1.12.0",
    ("DEPTHWISE_CONV_2D", 3): "1.14.0",
    ("DEPTH_TO_SPACE", 1): "2.1.0",
    ("DEQUANTIZE", 2): "1.14.0",
    ("DIV", 1): "1.6.0",
    ("ELU", 1): "1.14.0",
    ("EQUAL", 1): "1.14.0",
    ("EXP", 1): "1.7.0",
    ("FLOOR", 1): "1.9.0",
    ("FULLY_CONNECTED", 4): "1.14.0",
    ("FULLY_CONNECTED", 5): "2.0.0",
    ("GATHER", 1): "1.6.0",
    ("GATHER", 2): "1.14.0",
    ("GATHER", 5): "2.5.0",
    ("GELU", 1): "2.9.0",
    ("GREATER", 1): "1.14.0",
    ("GREATER_EQUAL", 1): "1.14.0",
    ("LEAKY_RELU", 1): "1.13.1",
    ("LEAKY_RELU", 2): "2.3.0",
    ("LESS", 1): "1.14.0",
    ("LESS_EQUAL", 1): "1.14.0",
    ("LOG", 1): "1.14.0",
    ("LOGICAL_AND", 1): "1.11.0",
    ("LOGICAL_NOT", 1): "1.11.0",
    ("LOGICAL_OR", 1): "1.11.0",
    ("LOGISTIC", 1): "1.14.0",
    ("LOGISTIC", 2): "1.14.0",
    ("LOG_SOFTMAX", 1): "1.14.0",
    ("MAXIMUM", 1): "1.14.0",
    ("MAXIMUM", 2): "1.14.0",
    ("MAX_POOL_2D", 2): "1.14.0",
    ("MEAN", 1): "1.6.0",
    ("MEAN", 2): "1.14.0",
    ("MINIMUM", 1): "1.14.0",
    ("MINIMUM", 2): "1.14.0",
    ("MIRROR_PAD", 1): "1.13.1",
    ("MUL", 1): "1.5.0",
    ("MUL", 2): "1.14.0",
    ("NEG", 1): "1.9.0",
    ("PAD", 2): "1.14.0",
    ("PADV2", 2): "1.14.0",
    ("POW", 1): "1.10.0",
    ("PRELU", 1): "1.8.0",
    ("QUANTIZE", 1): "1.14.0",
    ("REDUCE_MAX", 1): "1.11.0",
    ("REDUCE_MIN", 1): "1.11.0",
    ("REDUCE_PROD", 1): "1.11.0",
    ("RELU", 1): "1.5.0",
    ("RELU", 2): "2.1.0",
    ("RELU6", 1): "1.5.0",
    ("RELU6", 2): "1.14.0",
    ("RELU_0_TO_1", 1): "2.10.0",
    ("RELU_N1_TO_1", 1): "1.5.0",
    ("RESHAPE", 1): "1.5.0",
    ("RESIZE_BILINEAR", 1): "1.7.0",
    ("RESIZE_BILINEAR", 3): "2.2.0",
    ("RESIZE_NEAREST_NEIGHBOR", 3): "2.3.0",
    ("ROUND", 1): "1.14.0",
    ("RSQRT", 1): "1.10.0",
    ("SELECT_V2", 1): "2.2.0",
    ("SIGN", 1): "2.12.0",
    ("SIN", 1): "1.9.0",
    ("SLICE", 1): "1.14.0",
    ("SLICE", 2): "1.14.0",
    ("SOFTMAX", 1): "1.5.0",
    ("SPACE_TO_DEPTH", 2): "1.14.0",
    ("SPLIT", 2): "1.14.0",
    ("SQRT", 1): "1.10.0",
    ("SQUARE", 1): "1.12.0",
    ("SQUARED_DIFFERENCE", 1): "1.13.1",
    ("STRIDED_SLICE", 2): "1.14.0",
    ("SUB", 1): "1.6.0",
    ("SUB", 2): "1.14.0",
    ("SUM", 1): "1.10.0",
    ("TANH", 1): "1.14.0",
    ("TANH", 2): "1.14.0",
    ("TILE", 1): "1.10.1",
    ("TRANSPOSE", 2): "1.14.0",
    ("TRANSPOSE_CONV", 3): "2.3.0",
}


@functools.cache
def schema() -> ModuleType:
    """TensorFlow Lite's schema as Python classes. Raises `IsthmusError` where ai-edge-litert is missing."""
    try:
        from ai_edge_litert import schema_py_generated
    except ImportError as error:
        raise IsthmusError(f"target tflite writes files with ai-edge-litert, which is not here ({error}): pip install 'isthmus[tflite]'") from None
    return schema_py_generated


@dataclass(frozen=True)
class Quantisation:
    """real = (q - zero_point) * scale; one scale a tensor, or one an index of `axis`."""

    scales: tuple[float, ...]
    zero_point: int = 0
    axis: int = 0

    @classmethod
    def per_channel(cls, scales: np.ndarray | np.float32, channels: int, axis: int) -> Quantisation:
        """Always `channels` scales, also where one would do: XNNPACK's per-channel kernels round half to even on every CPU, its
        per-tensor ones of 2023 (tflite-runtime 2.14) round half up on ARM."""
        return cls(tuple(float(scale) for scale in np.broadcast_to(np.asarray(scales, np.float32).reshape(-1), channels)), 0, axis)


class ModelWriter:
    """Collects one subgraph and gives the file's bytes: the same for the same calls. Tensors are indices."""

    def __init__(self) -> None:
        self._schema = schema()
        self._tensors: list[Any] = []
        self._operators: list[Any] = []
        self._codes: dict[tuple[str, int], int] = {}
        self._buffers: list[Any] = [self._schema.BufferT()]  # buffer 0 is empty by convention
        self._constants: dict[bytes, int] = {}
        self._names: set[str] = set()

    def tensor(self, name: str, shape: Sequence[int], dtype: str, quantisation: Quantisation | None = None) -> int:
        """An activation."""
        return self._tensor(name, shape, dtype, quantisation, 0)

    def constant(self, name: str, array: np.ndarray, quantisation: Quantisation | None = None) -> int:
        """A tensor with data; equal bytes are stored once."""
        content = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
        return self._tensor(name, array.shape, str(array.dtype), quantisation, self._buffer(content))

    def operator(self, op: str, version: int, inputs: Sequence[int], outputs: Sequence[int], options: str = "", **fields: Any) -> None:
        """One operator; `options` names its option table ("Conv2DOptions"), `fields` what stands in it."""
        node = self._schema.OperatorT()
        node.opcodeIndex = self._codes.setdefault((op, version), len(self._codes))
        node.inputs, node.outputs = np.asarray(inputs, np.int32), np.asarray(outputs, np.int32)
        if options:
            table = getattr(self._schema, f"{options}T")()
            for field, value in fields.items():
                if not hasattr(table, field):
                    raise AttributeError(f"{options} has no field {field}")
                setattr(table, field, value)
            node.builtinOptionsType, node.builtinOptions = getattr(self._schema.BuiltinOptions, options), table
        self._operators.append(node)

    def rename(self, index: int, name: str) -> None:
        """Another name for a tensor."""
        self._tensors[index].name = self._fresh(name)

    def enum(self, kind: str, name: str) -> int:
        """A value of one of the schema's enumerations: `enum("Padding", "SAME")`."""
        return int(getattr(getattr(self._schema, kind), name))

    def to_bytes(self, inputs: Sequence[tuple[str, int]], outputs: Sequence[tuple[str, int]], metadata: Mapping[str, bytes], description: str) -> bytes:
        """The file. `inputs` and `outputs` pair the signature's names with tensors."""
        model = self._schema.ModelT()
        model.version, model.description = SCHEMA_VERSION, description
        model.metadata = [self._metadata(name, content) for name, content in {"min_runtime_version": self._min_runtime(), **metadata}.items()]
        model.operatorCodes = [self._code(op, version) for op, version in self._codes]
        model.subgraphs = [self._subgraph([index for _, index in inputs], [index for _, index in outputs])]
        model.signatureDefs = [self._signature(inputs, outputs)]
        model.buffers = self._buffers
        builder = aligning_builder()
        builder.Finish(model.Pack(builder), IDENTIFIER)
        return bytes(builder.Output())

    # ---- parts
    def _tensor(self, name: str, shape: Sequence[int], dtype: str, quantisation: Quantisation | None, buffer: int) -> int:
        tensor = self._schema.TensorT()
        tensor.name, tensor.shape, tensor.buffer = self._fresh(name), np.asarray(shape, np.int32), buffer
        tensor.type = self.enum("TensorType", dtype.upper())
        if quantisation is not None:
            table = self._schema.QuantizationParametersT()
            table.scale = np.asarray(quantisation.scales, np.float32)
            table.zeroPoint = np.full(len(quantisation.scales), quantisation.zero_point, np.int64)
            table.quantizedDimension = quantisation.axis
            tensor.quantization = table
        self._tensors.append(tensor)
        return len(self._tensors) - 1

    def _buffer(self, content: bytes) -> int:
        if content not in self._constants:
            buffer = self._schema.BufferT()
            buffer.data = np.frombuffer(content, np.uint8)
            self._constants[content] = len(self._buffers)
            self._buffers.append(buffer)
        return self._constants[content]

    def _fresh(self, name: str) -> str:
        candidate, count = name, 1
        while candidate in self._names:
            count += 1
            candidate = f"{name}_{count}"
        self._names.add(candidate)
        return candidate

    def _code(self, op: str, version: int) -> Any:
        code = self._schema.OperatorCodeT()
        code.builtinCode = getattr(self._schema.BuiltinOperator, op)
        code.deprecatedBuiltinCode = min(code.builtinCode, 127)  # what readers before TensorFlow 2.4 look at; 127 says "see the other"
        code.version = version
        return code

    def _subgraph(self, inputs: list[int], outputs: list[int]) -> Any:
        subgraph = self._schema.SubGraphT()
        subgraph.name, subgraph.tensors, subgraph.operators = "main", self._tensors, self._operators
        subgraph.inputs, subgraph.outputs = np.asarray(inputs, np.int32), np.asarray(outputs, np.int32)
        return subgraph

    def _signature(self, inputs: Sequence[tuple[str, int]], outputs: Sequence[tuple[str, int]]) -> Any:
        signature = self._schema.SignatureDefT()
        signature.signatureKey, signature.subgraphIndex = SIGNATURE, 0
        signature.inputs, signature.outputs = self._tensor_maps(inputs), self._tensor_maps(outputs)
        return signature

    def _tensor_maps(self, pairs: Sequence[tuple[str, int]]) -> list[Any]:
        maps = []
        for name, index in pairs:
            entry = self._schema.TensorMapT()
            entry.name, entry.tensorIndex = name, index
            maps.append(entry)
        return maps

    def _metadata(self, name: str, content: bytes) -> Any:
        entry = self._schema.MetadataT()
        entry.name, entry.buffer = name, self._buffer(content)
        return entry

    def _min_runtime(self) -> bytes:
        needed = max((MIN_RUNTIME[key] for key in self._codes), key=_version_order, default="1.5.0")
        return needed.encode().ljust(RUNTIME_VERSION_BYTES, b"\0")


def _version_order(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def aligning_builder() -> Any:
    import flatbuffers

    class AligningBuilder(flatbuffers.Builder):
        """Byte vectors start at multiples of 16: they hold weights and biases, which kernels on ARM read as wider integers. Equal vectors of
        numbers are stored once: a zero point an output channel, for weights and biases of every layer, is a tenth of a small network's file."""

        def __init__(self, size: int) -> None:
            super().__init__(size)
            self._vectors: dict[tuple[str, bytes], int] = {}

        def StartVector(self, elemSize: int, numElems: int, alignment: int) -> int:  # noqa: N802, N803  # the base class's names
            return int(super().StartVector(elemSize, numElems, BUFFER_ALIGNMENT if elemSize == 1 and numElems else alignment))

        def CreateNumpyVector(self, x: np.ndarray) -> int:  # noqa: N802
            if x.dtype == np.uint8:  # a buffer's content, of which the writer stores equal ones once
                return int(super().CreateNumpyVector(x))
            key = (x.dtype.str, x.tobytes())
            if key not in self._vectors:
                self._vectors[key] = int(super().CreateNumpyVector(x))
            return self._vectors[key]

    return AligningBuilder(1024)
