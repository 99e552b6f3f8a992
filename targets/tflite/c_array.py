# SPDX-License-Identifier: Apache-2.0
"""A `.tflite` file as C source for TensorFlow Lite Micro: an array, a header with the arena's size, and the operators to register."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from isthmus.errors import IsthmusError
from isthmus.spec import TensorSpec
from isthmus.targets.tflite.arena import Arena, plan_arena
from isthmus.targets.tflite.flatbuffer import schema

SOURCE, HEADER = "model_data.c", "model_data.h"
BYTES_A_LINE = 20

# What TensorFlow Lite Micro has of the operators that this target writes, by the method of MicroMutableOpResolver that brings it.
RESOLVER: Mapping[str, str] = {
    "ABS": "AddAbs",
    "ADD": "AddAdd",
    "ARG_MAX": "AddArgMax",
    "ARG_MIN": "AddArgMin",
    "AVERAGE_POOL_2D": "AddAveragePool2D",
    "BATCH_MATMUL": "AddBatchMatMul",
    "BROADCAST_TO": "AddBroadcastTo",
    "CAST": "AddCast",
    "CEIL": "AddCeil",
    "CONCATENATION": "AddConcatenation",
    "CONV_2D": "AddConv2D",
    "COS": "AddCos",
    "DEPTHWISE_CONV_2D": "AddDepthwiseConv2D",
    "DEPTH_TO_SPACE": "AddDepthToSpace",
    "DEQUANTIZE": "AddDequantize",
    "DIV": "AddDiv",
    "ELU": "AddElu",
    "EQUAL": "AddEqual",
    "EXP": "AddExp",
    "FLOOR": "AddFloor",
    "FULLY_CONNECTED": "AddFullyConnected",
    "GATHER": "AddGather",
    "GREATER": "AddGreater",
    "GREATER_EQUAL": "AddGreaterEqual",
    "LEAKY_RELU": "AddLeakyRelu",
    "LESS": "AddLess",
    "LESS_EQUAL": "AddLessEqual",
    "LOG": "AddLog",
    "LOGICAL_AND": "AddLogicalAnd",
    "LOGICAL_NOT": "AddLogicalNot",
    "LOGICAL_OR": "AddLogicalOr",
    "LOGISTIC": "AddLogistic",
    "LOG_SOFTMAX": "AddLogSoftmax",
    "MAXIMUM": "AddMaximum",
    "MAX_POOL_2D": "AddMaxPool2D",
    "MEAN": "AddMean",
    "MINIMUM": "AddMinimum",
    "MIRROR_PAD": "AddMirrorPad",
    "MUL": "AddMul",
    "NEG": "AddNeg",
    "PAD": "AddPad",
    "PADV2": "AddPadV2",
    "PRELU": "AddPrelu",
    "QUANTIZE": "AddQuantize",
    "REDUCE_MAX": "AddReduceMax",
    "REDUCE_MIN": "AddReduceMin",
    "RELU": "AddRelu",
    "RELU6": "AddRelu6",
    "RESHAPE": "AddReshape",
    "RESIZE_BILINEAR": "AddResizeBilinear",
    "RESIZE_NEAREST_NEIGHBOR": "AddResizeNearestNeighbor",
    "ROUND": "AddRound",
    "RSQRT": "AddRsqrt",
    "SELECT_V2": "AddSelectV2",
    "SIN": "AddSin",
    "SLICE": "AddSlice",
    "SOFTMAX": "AddSoftmax",
    "SPACE_TO_DEPTH": "AddSpaceToDepth",
    "SPLIT": "AddSplit",
    "SQRT": "AddSqrt",
    "SQUARE": "AddSquare",
    "STRIDED_SLICE": "AddStridedSlice",
    "SUB": "AddSub",
    "SUM": "AddSum",
    "TANH": "AddTanh",
    "TRANSPOSE": "AddTranspose",
    "TRANSPOSE_CONV": "AddTransposeConv",
}


def c_files(content: bytes, digest: str, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> tuple[dict[str, bytes], Arena]:
    """`model_data.c` and `model_data.h` (C11 and C++11), and the arena they name. Raises `IsthmusError` naming what TFLM has no kernel for."""
    operators = _operators(content)
    missing = [op for op in operators if op not in RESOLVER]
    if missing:
        raise IsthmusError(f"option emit_c of target tflite: TensorFlow Lite Micro has no {', '.join(missing)}; replace the layer, or leave the option out")
    arena = plan_arena(content)
    header = _header(arena, digest, operators, [("input", spec) for spec in inputs] + [("output", spec) for spec in outputs])
    return {SOURCE: _source(content).encode(), HEADER: header.encode()}, arena


def _operators(content: bytes) -> list[str]:
    classes = schema()
    names = {value: name for name, value in vars(classes.BuiltinOperator).items() if isinstance(value, int)}
    return sorted({names[code.builtinCode] for code in classes.ModelT.InitFromPackedBuf(content).operatorCodes})


def _header(arena: Arena, digest: str, operators: Sequence[str], border: Sequence[tuple[str, TensorSpec]]) -> str:
    tensors = [
        f" *   {side} {_in_comment(spec.name)}: {spec.dtype}{list(spec.shape)}{f' {spec.layout}' if spec.layout else ''}{_scale(spec)}" for side, spec in border
    ]
    return "\n".join(
        [
            "/* A model for TensorFlow Lite Micro. Made by isthmus; do not edit.",
            f" * sha256 of its int8 form: {digest}",
            *tensors,
            f" * Operators, for a MicroMutableOpResolver<{len(operators)}>: {', '.join(f'{RESOLVER[op]}()' for op in operators)}",
            " * Arena: the greedy plan of the activations, an upper estimate of what the interpreter and the reference kernels keep, and 10 %.",
            " * Kernels of a vendor may need more scratch: MicroInterpreter::arena_used_bytes() tells. */",
            "#ifndef ISTHMUS_MODEL_DATA_H_",
            "#define ISTHMUS_MODEL_DATA_H_",
            "",
            f"#define ISTHMUS_ACTIVATION_BYTES {arena.activation_bytes}",
            f"#define ISTHMUS_TENSOR_ARENA_BYTES {arena.size_bytes}",
            "",
            "#ifdef __cplusplus",
            'extern "C" {',
            "#endif",
            "extern const unsigned char isthmus_model[];",
            "extern const unsigned int isthmus_model_size;",
            "#ifdef __cplusplus",
            "}",
            "#endif",
            "",
            "#endif",
            "",
        ]
    )


def _scale(spec: TensorSpec) -> str:
    return "" if spec.scale is None else f", real = (q - {spec.zero_point}) * {spec.scale!r}"


def _in_comment(name: str) -> str:
    """A name may hold anything; a comment must not end in it."""
    return "".join(letter if letter.isalnum() or letter in "_-.:[]" else "_" for letter in name)


def _source(content: bytes) -> str:
    lines = [", ".join(f"0x{byte:02x}" for byte in content[start : start + BYTES_A_LINE]) for start in range(0, len(content), BYTES_A_LINE)]
    return "\n".join(
        [
            f'#include "{HEADER}"',
            "",
            "#ifndef __cplusplus",
            "#include <stdalign.h>",
            "#endif",
            "",
            f"alignas(16) const unsigned char isthmus_model[{len(content)}] = {{",
            ",\n".join(f"  {line}" for line in lines),
            "};",
            f"const unsigned int isthmus_model_size = {len(content)};",
            "",
        ]
    )
