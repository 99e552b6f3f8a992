# SPDX-License-Identifier: Apache-2.0
"""Float islands in LiteRT against ONNX Runtime on the same graph: every operator of the table, behind a float border and in the middle of an int8 network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

import isthmus
from isthmus.compare import FLOAT_TOLERANCE, compare_output
from isthmus.form_writer import FormWriter
from isthmus.graph import QuantGraph
from isthmus.profile import load_profile
from isthmus.recipe import Recipe
from isthmus.targets.tflite import TARGET
from isthmus.targets.tflite.float_form import FLOAT_OPS

Layer = Callable[[Any, str], str]
IMAGE = (2, 6, 7, 5)
LINE = (2, 6, 9)
TOKENS = (2, 5, 8)


class Islands:
    """Writes float nodes with constants from one generator."""

    def __init__(self, seed: int = 0) -> None:
        self.writer, self.generator, self.count = FormWriter(), np.random.default_rng(seed), 0

    def real(self, *shape: int) -> np.ndarray:
        return self.generator.standard_normal(shape).astype(np.float32)

    def node(self, op: str, inputs: list[str | np.ndarray | None], outputs: int = 1, **attributes: Any) -> list[str]:
        self.count += 1
        names = ["" if value is None else value if isinstance(value, str) else self._held(value, place) for place, value in enumerate(inputs)]
        made = [f"{op}_{self.count}_{index}" for index in range(outputs)]
        self.writer.float_node(op, names, made, f"{op}_{self.count}", **attributes)
        return made

    def _held(self, value: np.ndarray, place: int) -> str:
        return self.writer.constant(f"held_{self.count}_{place}", value)


def _op(op: str, *constants: Any, **attributes: Any) -> Layer:
    """An operator of `x` and constants, which may be made by a function of the generator."""
    return lambda w, x: w.node(op, [x, *(value(w) if callable(value) else value for value in constants)], **attributes)[0]


def _turned(op: str, constant: Callable[[Islands], np.ndarray]) -> Layer:
    return lambda w, x: w.node(op, [constant(w), x])[0]


def _then(*layers: Layer) -> Layer:
    def chain(w: Islands, x: str) -> str:
        for layer in layers:
            x = layer(w, x)
        return x

    return chain


def _positive(w: Islands, x: str) -> str:
    return w.node("Add", [w.node("Abs", [x])[0], np.float32(0.25)])[0]


def _normal(*shape: int) -> Callable[[Islands], np.ndarray]:
    return lambda w: w.real(*shape)


def _whole(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def _number(value: float) -> np.ndarray:
    return np.array(value, np.float32)


def _with_itself(op: str, *prepare: Layer, **attributes: Any) -> Layer:
    return lambda w, x: w.node(op, [x, *(layer(w, x) for layer in prepare)], **attributes)[0]


def _as_number(layer: Layer) -> Layer:
    """What is no float32 through a Cast: the border is float32."""
    return _then(layer, _op("Cast", to=1))


def _of_two_comparisons(op: str) -> Layer:
    return lambda w, x: w.node(op, [_op("Less", _number(1))(w, x), _op("Greater", _number(0))(w, x)])[0]


def _split(w: Islands, x: str) -> str:
    parts = w.node("Split", [x, _whole(2, 1, 3)], outputs=3, axis=1)
    return w.node("Concat", parts[::-1], axis=1)[0]


def _conv(filters: int, *kernel: int, channels: int = 6, bias: bool = True, **more: Any) -> Layer:
    weight = _normal(filters, channels // more.get("group", 1), *kernel)
    return _op("Conv", weight, *([_normal(filters)] if bias else []), kernel_shape=list(kernel), **more)


def _transposed(filters: int, *kernel: int, **more: Any) -> Layer:
    return _op("ConvTranspose", _normal(6, filters, *kernel), _normal(filters * more.get("group", 1)), kernel_shape=list(kernel), **more)


# name: (shape of x, layer, the file's operators where it lies channels last behind an int8 convolution, None where that is not the point)
CASES: dict[str, tuple[tuple[int, ...], Layer, str | None]] = {
    "Conv": (IMAGE, _conv(4, 3, 3, pads=[1, 1, 1, 1]), "CONV_2D"),
    "Conv relu": (IMAGE, _then(_conv(4, 3, 3), _op("Relu")), "CONV_2D"),
    "Conv relu6": (IMAGE, _then(_conv(4, 3, 3), _op("Clip", _number(0), _number(6))), "CONV_2D"),
    "Conv clip": (IMAGE, _then(_conv(4, 3, 3), _op("Clip", _number(-1.5), _number(2))), "CONV_2D MAXIMUM MINIMUM"),
    "Conv stride, uneven pads": (IMAGE, _conv(4, 3, 3, pads=[0, 1, 2, 1], strides=[2, 1], bias=False), "PAD CONV_2D"),
    "Conv dilation": (IMAGE, _conv(4, 3, 2, dilations=[2, 1]), "CONV_2D"),
    "Conv depthwise": (IMAGE, _conv(12, 3, 3, group=6, pads=[1, 1, 1, 1]), "DEPTHWISE_CONV_2D"),
    "Conv groups": (IMAGE, _conv(6, 3, 3, group=2), "CONV_2D"),
    "Conv line": (LINE, _conv(4, 3, pads=[1, 1]), None),
    "ConvTranspose": (IMAGE, _transposed(4, 2, 2, strides=[2, 2]), "TRANSPOSE_CONV"),
    "ConvTranspose pads, relu": (IMAGE, _then(_transposed(4, 4, 4, strides=[2, 2], pads=[1, 1, 1, 1]), _op("Relu")), "TRANSPOSE_CONV SLICE RELU"),
    "ConvTranspose depthwise": (IMAGE, _transposed(1, 3, 3, strides=[2, 2], group=6), None),
    "ConvTranspose dilation": (IMAGE, _transposed(4, 2, 3, dilations=[2, 2], output_padding=[1, 1], strides=[2, 2]), None),
    "Gemm": ((2, 7), _then(_op("Gemm", _normal(5, 7), _normal(5), transB=1), _op("Relu")), None),
    "Gemm factors": ((2, 7), _op("Gemm", _normal(7, 5), _normal(1, 5), alpha=0.5, beta=2.0), None),
    "MatMul": (TOKENS, _op("MatMul", _normal(8, 3)), None),
    "MatMul flat image": (IMAGE, _then(_op("Flatten"), _op("MatMul", _normal(210, 3))), "RESHAPE FULLY_CONNECTED"),
    "MatMul heads": ((2, 3, 4, 5), _with_itself("MatMul", _op("Transpose", perm=[0, 1, 3, 2])), None),
    "MatMul from a constant": (TOKENS, _turned("MatMul", _normal(3, 5)), None),
    "MatMul by heads of constants": ((2, 3, 4, 5), _then(_op("MatMul", _normal(3, 5, 2)), _op("Relu")), None),
    "Add": (IMAGE, _with_itself("Add", _op("Abs")), "ABS ADD"),
    "Add a number a channel, relu": (IMAGE, _then(_op("Add", _normal(6, 1, 1)), _op("Relu")), "ADD"),
    "Add positions": (TOKENS, _op("Add", _normal(1, 5, 8)), None),
    "Sub": (IMAGE, _turned("Sub", _normal(1)), "SUB"),
    "Mul": (IMAGE, _op("Mul", _normal(1, 1, 7, 5)), "MUL"),
    "Mul scalar": (IMAGE, _op("Mul", _number(0.37)), "MUL"),
    "Div": (IMAGE, _with_itself("Div", _positive), "ABS ADD DIV"),
    "Div by a constant": ((2, 7), _op("Div", _number(3)), None),
    "Pow 2": (IMAGE, _op("Pow", _number(2)), "SQUARE"),
    "Pow 0.5": (IMAGE, _then(_positive, _op("Pow", _number(0.5))), "ABS ADD SQRT"),
    "Pow 3": (IMAGE, _op("Pow", _number(3)), "POW"),
    "Pow of tensors": (TOKENS, _then(_positive, _with_itself("Pow", _op("Neg"))), None),
    "Max": (IMAGE, _with_itself("Max", _op("Neg"), _op("Floor")), "NEG FLOOR MAXIMUM MAXIMUM"),
    "Max one": (IMAGE, _then(_op("Max"), _op("Abs")), "ABS"),
    "Min": (IMAGE, _op("Min", _normal(6, 1, 1)), "MINIMUM"),
    "Sum": (TOKENS, _with_itself("Sum", _op("Neg"), _op("Abs")), None),
    **{op: (IMAGE, _as_number(_op(op, _number(0.25))), None) for op in ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")},
    "Not": (IMAGE, _as_number(_then(_op("Less", _number(0)), _op("Not"))), "LESS LOGICAL_NOT CAST"),
    **{op: (IMAGE, _as_number(_of_two_comparisons(op)), None) for op in ("And", "Or")},
    "Where": (IMAGE, lambda w, x: w.node("Where", [_op("Less", _normal(6, 1, 1))(w, x), x, _number(0.5)])[0], "LESS SELECT_V2"),
    **{op: (IMAGE, _op(op), None) for op in ("Exp", "Abs", "Neg", "Floor", "Ceil", "Round", "Sign", "Sin", "Cos", "Erf", "Softsign", "Selu", "Celu")},
    "Celu alpha": (TOKENS, _op("Celu", alpha=0.7), None),
    **{op: (IMAGE, _then(_positive, _op(op)), None) for op in ("Log", "Sqrt", "Reciprocal")},
    **{op: (IMAGE, _op(op), None) for op in ("Sigmoid", "Tanh", "LeakyRelu", "HardSigmoid", "HardSwish", "Mish", "Gelu", "Softplus", "Elu")},
    "Gelu tanh": (TOKENS, _op("Gelu", approximate="tanh"), None),
    "PRelu": (IMAGE, _op("PRelu", _normal(6, 1, 1)), "PRELU"),
    "PRelu one slope": (TOKENS, _op("PRelu", _normal(1)), None),
    "Relu": (IMAGE, _op("Relu"), "RELU"),
    "Clip": (IMAGE, _op("Clip", None, _number(0.75)), "MINIMUM"),
    "MaxPool": (IMAGE, _op("MaxPool", kernel_shape=[3, 3], strides=[2, 2]), "MAX_POOL_2D"),
    "MaxPool pads": (IMAGE, _op("MaxPool", kernel_shape=[3, 3], pads=[1, 0, 1, 1]), "PADV2 MAX_POOL_2D"),
    "MaxPool pads behind relu": (IMAGE, _then(_op("Relu"), _op("MaxPool", kernel_shape=[3, 3], pads=[1, 0, 1, 1])), "RELU PAD MAX_POOL_2D"),
    "MaxPool ceil": (IMAGE, _op("MaxPool", kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1), None),
    "AveragePool": (IMAGE, _op("AveragePool", kernel_shape=[2, 3], strides=[2, 1]), "AVERAGE_POOL_2D"),
    "AveragePool same": (IMAGE, _op("AveragePool", kernel_shape=[3, 3], pads=[1, 1, 1, 1]), "AVERAGE_POOL_2D"),
    "AveragePool count pads": (IMAGE, _op("AveragePool", kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1), None),
    "AveragePool uneven": (IMAGE, _op("AveragePool", kernel_shape=[3, 3], pads=[2, 0, 1, 1]), "PAD DEPTHWISE_CONV_2D MUL"),
    "AveragePool uneven, count pads": (IMAGE, _op("AveragePool", kernel_shape=[3, 3], pads=[2, 0, 1, 1], count_include_pad=1), "PAD AVERAGE_POOL_2D"),
    "AveragePool line": (LINE, _op("AveragePool", kernel_shape=[2], strides=[2]), None),
    "GlobalAveragePool": (IMAGE, _op("GlobalAveragePool"), "MEAN"),
    "GlobalMaxPool": (IMAGE, _op("GlobalMaxPool"), "REDUCE_MAX"),
    "ReduceMean": (IMAGE, _op("ReduceMean", _whole(2, 3), keepdims=0), "MEAN"),
    "ReduceMean channels": (IMAGE, _op("ReduceMean", _whole(1), keepdims=0), "MEAN"),
    "ReduceMean all": (TOKENS, _op("ReduceMean"), None),
    "ReduceSum": (IMAGE, _op("ReduceSum", _whole(-1)), "SUM"),
    "ReduceSum nothing": (TOKENS, _op("ReduceSum", noop_with_empty_axes=1), None),
    "ReduceMax line": (LINE, _op("ReduceMax", _whole(2), keepdims=0), None),
    "ReduceMin": (TOKENS, _op("ReduceMin", _whole(1)), None),
    "ReduceMin batch": (TOKENS, _op("ReduceMin", _whole(0), keepdims=0), None),
    "ReduceProd": (IMAGE, _op("ReduceProd", _whole(1)), "REDUCE_PROD"),
    "ReduceL2": (IMAGE, _op("ReduceL2", _whole(1)), "SQUARE SUM SQRT"),
    "Softmax": (IMAGE, _op("Softmax", axis=1), "SOFTMAX"),
    "LogSoftmax": (IMAGE, _op("LogSoftmax", axis=1), "LOG_SOFTMAX"),
    "LogSoftmax rows": (TOKENS, _op("LogSoftmax", axis=1), None),
    "LayerNormalization": (TOKENS, _op("LayerNormalization", _normal(8), _normal(8)), None),
    "InstanceNormalization": (IMAGE, _op("InstanceNormalization", _normal(6), _normal(6)), None),
    "InstanceNormalization line": (LINE, _op("InstanceNormalization", _normal(6), _normal(6)), None),
    "BatchNormalization": (
        IMAGE,
        _then(_op("BatchNormalization", _normal(6), _normal(6), _normal(6), lambda w: np.abs(w.real(6)) + np.float32(0.5)), _op("Relu")),
        "MUL ADD",
    ),
    "ArgMax": (IMAGE, _as_number(_op("ArgMax", axis=1, keepdims=0)), "ARG_MAX CAST"),
    "ArgMax moved": (IMAGE, _as_number(_then(_op("ArgMax", axis=1, keepdims=1), _op("Squeeze", _whole(1)))), None),
    "ArgMin": (IMAGE, _as_number(_op("ArgMin", axis=3, keepdims=1)), None),
    "Cast": (IMAGE, _then(_op("Cast", to=6), _op("Cast", to=1)), "CAST CAST"),
    "GridSample": (
        (2, 3, 5, 7),
        lambda w, x: w.node("GridSample", [x, _then(_op("Slice", _whole(0), _whole(2), _whole(3)), _op("Slice", _whole(0), _whole(2), _whole(1)),
                                                    _op("Transpose", perm=[0, 2, 3, 1]), _op("Tanh"))(w, x)])[0],
        None,
    ),
    "Concat": (IMAGE, lambda w, x: w.node("Concat", [x, _op("Neg")(w, x), w.real(2, 1, 7, 5)], axis=1)[0], "NEG CONCATENATION"),
    "Concat batch": (TOKENS, _with_itself("Concat", _op("Neg"), axis=0), None),
    "Split": (IMAGE, _split, "SLICE SLICE SLICE CONCATENATION"),
    "Split batch": (TOKENS, lambda w, x: w.node("Sub", w.node("Split", [x, _whole(1, 1)], outputs=2))[0], None),
    "Slice": (IMAGE, _op("Slice", _whole(1, -1), _whole(5, 0), _whole(1, 2), _whole(1, -2)), "STRIDED_SLICE"),
    "Slice batch": (TOKENS, _op("Slice", _whole(1), _whole(2)), None),
    "Pad": (IMAGE, _op("Pad", _whole(0, 0, 1, 2, 0, 1, 0, 1), _number(0.5)), "PADV2"),
    "Pad zero": (IMAGE, _op("Pad", _whole(1, 2, 1, 0), None, _whole(2, 3)), "PAD"),
    "Pad reflect": (IMAGE, _op("Pad", _whole(0, 0, 1, 2, 0, 0, 3, 1), mode="reflect"), "MIRROR_PAD"),
    "Transpose": (IMAGE, _then(_op("Transpose", perm=[0, 2, 3, 1]), _op("Reshape", _whole(2, 35, 6))), "RESHAPE RESHAPE"),
    "Transpose batch": (TOKENS, _op("Transpose", perm=[2, 0, 1]), None),
    "Transpose batch of an image": (IMAGE, _op("Transpose", perm=[1, 0, 3, 2]), None),
    "Reshape": (IMAGE, _op("Reshape", _whole(0, 3, -1)), None),
    "Reshape batch": (TOKENS, _op("Reshape", _whole(10, 8)), None),
    "Reshape space": (IMAGE, _op("Reshape", _whole(2, 6, 35)), None),
    "Flatten": (IMAGE, _op("Flatten"), None),
    "Squeeze": ((2, 6, 1, 5), _op("Squeeze", _whole(2)), None),
    "Unsqueeze": (LINE, _op("Unsqueeze", _whole(2)), None),
    "Expand": ((2, 6, 1, 5), _op("Expand", _whole(2, 6, 3, 5)), "BROADCAST_TO"),
    "Expand with an axis": (LINE, _op("Expand", _whole(3, 2, 6, 9)), None),
    "Tile": (IMAGE, _op("Tile", _whole(1, 2, 1, 3)), "TILE"),
    "Tile line": (LINE, _op("Tile", _whole(2, 1, 2)), None),
    "Gather": (IMAGE, _op("Gather", _whole(4, -1, 0), axis=1), "GATHER"),
    "Gather batch": (TOKENS, _op("Gather", np.array(1), axis=0), None),
    "Resize nearest": (IMAGE, _op("Resize", None, np.array([1, 1, 2, 2], np.float32), coordinate_transformation_mode="asymmetric", nearest_mode="floor"), None),
    "Resize linear": (IMAGE, _op("Resize", None, np.array([1, 1, 2, 2], np.float32), mode="linear"), "RESIZE_BILINEAR"),
    "Resize linear by thirds": (IMAGE, _op("Resize", None, None, _whole(2, 6, 21, 8), mode="linear"), None),
    "Resize linear corners": (
        IMAGE, _op("Resize", None, None, _whole(2, 6, 13, 9), mode="linear", coordinate_transformation_mode="align_corners"), None,
    ),
    "DepthToSpace": ((1, 8, 3, 4), _op("DepthToSpace", blocksize=2, mode="CRD"), "GATHER DEPTH_TO_SPACE"),
    "SpaceToDepth": ((1, 3, 4, 6), _op("SpaceToDepth", blocksize=2), "SPACE_TO_DEPTH"),
    "Identity": (IMAGE, _then(_op("Identity"), _op("Relu")), "RELU"),
    "Dropout": (IMAGE, _then(_op("Dropout"), _op("Relu")), "RELU"),
    "constants among themselves": (IMAGE, lambda w, x: w.node("Mul", [x, w.node("Exp", [w.real(6, 1, 1)])[0]])[0], "MUL"),
    "attention": (TOKENS, lambda w, x: _attention(w, x), None),
}  # fmt: skip


def _attention(w: Islands, x: str) -> str:
    """As exporters write it: one product for queries, keys and values, their axis brought to the front and cut."""
    joined = w.node("Add", [w.node("MatMul", [x, w.real(8, 24)])[0], w.real(24)])[0]
    heads = w.node("Transpose", [w.node("Reshape", [joined, _whole(2, 5, 3, 2, 4)])[0]], perm=[2, 0, 3, 1, 4])[0]
    query, key, value = (w.node("Gather", [heads, np.array(index)], axis=0)[0] for index in range(3))
    scores = w.node("MatMul", [w.node("Mul", [query, _number(0.5)])[0], w.node("Transpose", [key], perm=[0, 1, 3, 2])[0]])[0]
    mixed = w.node("MatMul", [w.node("Softmax", [scores], axis=-1)[0], value])[0]
    return w.node("Reshape", [w.node("Transpose", [mixed], perm=[0, 2, 1, 3])[0], _whole(2, 5, 8)])[0]


def _finished(w: Islands, y: str) -> QuantGraph:
    w.writer.float_output(y)
    return w.writer.graph()


def _alone(shape: tuple[int, ...], layer: Layer, seed: int = 0) -> QuantGraph:
    w = Islands(seed)
    return _finished(w, layer(w, w.writer.float_input("x", shape)))


def _behind_int8(shape: tuple[int, ...], layer: Layer, seed: int = 0) -> QuantGraph:
    """A 1x1 convolution in int8 in front: what the island reads lies channels last."""
    w = Islands(seed)
    channels = shape[1]
    weight = w.generator.integers(-127, 128, (channels, channels, *[1] * (len(shape) - 2))).astype(np.int8)
    x = w.writer.conv(w.writer.input("x", shape, scale=2.0**-5), weight, 2.0**-8, scale=2.0**-5)
    return _finished(w, layer(w, w.writer.dequantise(x)))


def _same_as_onnxruntime(litert: Any, graph: QuantGraph, folder: Path, seed: int = 1) -> list[str]:
    """Within the tolerance of a float tail; gives the file's operators."""
    plan = litert.plan(graph)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    other = ort.InferenceSession(graph.to_bytes(), options, providers=["CPUExecutionProvider"])
    generator = np.random.default_rng(seed)
    with litert.open(plan, folder) as session:
        for _ in range(2):
            feeds = {spec.name: generator.standard_normal(spec.shape).astype(np.float32) for spec in graph.inputs}
            found = session.run(feeds)
            for spec, expected in zip(graph.outputs, other.run(None, feeds), strict=True):
                comparison = compare_output(spec, expected, found[spec.name], plan.max_lsb, FLOAT_TOLERANCE)
                assert comparison.passed, f"{comparison}: {litert.operators(plan)}"
    return list(litert.operators(plan))


@pytest.mark.parametrize("case", CASES)
def test_an_operator_at_a_float_border(litert: Any, case: str, tmp_path: Path) -> None:
    shape, layer, _ = CASES[case]
    _same_as_onnxruntime(litert, _alone(shape, layer), tmp_path)


@pytest.mark.parametrize("case", [case for case, (shape, _, _) in CASES.items() if len(shape) in (3, 4)])
def test_an_operator_in_the_middle_of_an_int8_network(litert: Any, case: str, tmp_path: Path) -> None:
    shape, layer, expected = CASES[case]
    operators = _same_as_onnxruntime(litert, _behind_int8(shape, layer), tmp_path)
    if expected is not None:
        assert operators[operators.index("DEQUANTIZE") + 1 :] == expected.split()


def test_every_operator_of_the_table_is_tried() -> None:
    tried = {node.op for shape, layer, _ in CASES.values() for node in _alone(shape, layer).nodes if node.kind == "float"}
    assert tried == FLOAT_OPS


# ---- any extents
def _windows(data: st.DataObject, extents: tuple[int, int], fewer: int) -> dict[str, list[int]]:
    """Kernel, strides and pads that leave a window; pads smaller than the kernel by `fewer`."""
    kernel = [data.draw(st.integers(1, min(3, extent))) for extent in extents]
    return {
        "kernel_shape": kernel,
        "strides": [data.draw(st.integers(1, 2)) for _ in extents],
        "pads": [data.draw(st.integers(0, max(0, side - fewer))) for side in kernel * 2],
    }


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_windows_of_any_extents(litert: Any, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    extents = (data.draw(st.integers(1, 7)), data.draw(st.integers(1, 7)))
    op = data.draw(st.sampled_from(["Conv", "ConvTranspose", "MaxPool", "AveragePool"]))
    group, times = data.draw(st.sampled_from([1, 2, 4])), data.draw(st.integers(1, 2))
    if op in ("Conv", "ConvTranspose"):
        more = _windows(data, extents, 2 if op == "ConvTranspose" else 0)
        filters = (group * times, 4 // group) if op == "Conv" else (4, times)
        layer = _op(op, _normal(*filters, *more["kernel_shape"]), _normal(group * times), group=group, **more)
    else:
        more = _windows(data, extents, 1) | ({"count_include_pad": data.draw(st.integers(0, 1))} if op == "AveragePool" else {})
        layer = _op(op, **more)
    layer = _then(layer, _op("Relu")) if data.draw(st.booleans()) else layer
    build = data.draw(st.sampled_from([_alone, _behind_int8]))
    _same_as_onnxruntime(litert, build((1, 4, *extents), layer), tmp_path_factory.mktemp("window"))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_chains_on_any_number_of_axes(litert: Any, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Element by element, broadcast from either side, reduced, turned: the order of axes in the file follows."""
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=2, max_size=5)))
    rank = len(shape)
    layers = []
    for _ in range(data.draw(st.integers(1, 4))):
        kind = data.draw(st.sampled_from(["function", "binary", "turned", "pad", "reduce", "softmax", "transpose"]))
        axis = data.draw(st.integers(-rank, rank - 1))
        broadcast = [extent if data.draw(st.booleans()) else 1 for extent in shape][data.draw(st.integers(0, rank)) :]
        if kind == "function":
            layers.append(_op(data.draw(st.sampled_from(["Relu", "Sigmoid", "Abs", "Erf", "HardSwish", "Floor"]))))
        elif kind == "binary":
            layers.append(_op(data.draw(st.sampled_from(["Add", "Sub", "Mul", "Max", "Min"])), _normal(*broadcast)))
        elif kind == "turned":
            layers.append(_turned(data.draw(st.sampled_from(["Add", "Sub", "Mul"])), _normal(*broadcast)))
        elif kind == "pad":
            layers.append(_then(_op("Pad", _whole(1, 0), None, _whole(axis)), _op("Slice", _whole(1), _whole(99), _whole(axis))))
        elif kind == "reduce":
            layers.append(_with_itself("Sub", _op(data.draw(st.sampled_from(["ReduceMean", "ReduceMax", "ReduceSum"])), _whole(axis))))
        elif kind == "softmax":
            layers.append(_op("Softmax", axis=axis))
        else:
            swap = list(range(rank))
            swap[0], swap[axis] = swap[axis], swap[0]
            layers += [_op("Transpose", perm=swap), _op("Neg"), _op("Transpose", perm=swap)]
    build = data.draw(st.sampled_from([_alone, _behind_int8])) if rank in (3, 4) else _alone
    _same_as_onnxruntime(litert, build(shape, _then(*layers)), tmp_path_factory.mktemp("chain"))


# ---- float between int8
def _in_between(litert: Any, layers: Layer, out_channels: int) -> QuantGraph:
    """int8 convolution, float layers, int8 convolution."""
    case, w = litert.case(seed=4), Islands(2)
    w.writer = case.writer
    x = case.conv(case.input((1, 3, 12, 12)), 3, 8, (3, 3), pads=(1, 1, 1, 1), activation="Relu")
    real = layers(w, case.writer.dequantise(x))
    return case.graph(case.conv(case.writer.quantise(real, scale=2.0**-4), out_channels, 4, (3, 3)))


@pytest.mark.parametrize(
    ("layers", "out_channels", "operators"),
    [
        (_then(_conv(6, 3, 3, channels=8), _op("Relu")), 6, "CONV_2D"),
        (_then(_conv(8, 3, 3, channels=8, group=8, pads=[1, 1, 1, 1]), _op("Clip", _number(0), _number(6))), 8, "DEPTHWISE_CONV_2D"),
        (_then(_with_itself("Mul", _then(_op("ReduceMean", _whole(2, 3)), _conv(8, 1, 1, channels=8), _op("Sigmoid")))), 8, "MEAN CONV_2D LOGISTIC MUL"),
        (_then(_op("Erf"), _op("MaxPool", kernel_shape=[2, 2], strides=[2, 2]), _op("Neg")), 8, ""),
        (_op("InstanceNormalization", _normal(8), _normal(8)), 8, ""),
    ],
)  # fmt: skip
def test_float_between_int8_needs_no_transpose(litert: Any, layers: Layer, out_channels: int, operators: str, tmp_path: Path) -> None:
    graph = _in_between(litert, layers, out_channels)
    plan = litert.plan(graph)
    found = litert.operators(plan)
    assert "TRANSPOSE" not in found and plan.max_lsb >= 1 and "float island" in plan.why_lsb
    if operators:
        assert found == ["CONV_2D", "DEQUANTIZE", *operators.split(), "QUANTIZE", "CONV_2D"]
    with litert.open(plan, tmp_path) as session:
        assert litert.difference(graph, session, litert.feeds(graph)) <= plan.max_lsb


def test_a_stored_operand_is_in_the_file_once(litert: Any) -> None:
    """In the order that its reader wants, not in the form's as well."""
    plan = litert.plan(_behind_int8(IMAGE, _op("Mul", _normal(1, 6, 7, 5))))
    model = litert.model(plan)
    assert sum(len(buffer.data) == 4 * 6 * 7 * 5 for buffer in model.buffers if buffer.data is not None) == 1


# ---- a float model whose recipe keeps layers float, by the whole way
def _network() -> onnx.ModelProto:
    """Stem, depthwise, squeeze and excite, transposed convolution, joined with the input, pooled, two linear layers."""
    generator = np.random.default_rng(5)

    def held(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array((generator.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32), name)

    shapes = {
        "stem": (8, 3, 3, 3),
        "depthwise": (8, 1, 3, 3),
        "gate": (8, 8, 1, 1),
        "up": (8, 5, 2, 2),
        "last": (6, 8, 3, 3),
        "head": (7, 96),
        "logits": (4, 7),
    }
    constants = [held(f"{name}_weight", *shape) for name, shape in shapes.items()]
    constants += [held(f"{name}_bias", 5 if name == "up" else shape[0]) for name, shape in shapes.items()]
    constants.append(numpy_helper.from_array(np.array([2, 3], np.int64), "space"))

    def layer(op: str, name: str, x: str, **attributes: Any) -> onnx.NodeProto:
        return helper.make_node(op, [x, f"{name}_weight", f"{name}_bias"], [name], name, **attributes)

    same = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    nodes = [
        layer("Conv", "stem", "image", **same, strides=[2, 2]),
        helper.make_node("Relu", ["stem"], ["stem_act"], "stem_act"),
        layer("Conv", "depthwise", "stem_act", **same, group=8),
        helper.make_node("HardSwish", ["depthwise"], ["depthwise_act"], "depthwise_act"),
        helper.make_node("ReduceMean", ["depthwise_act", "space"], ["mean"], "mean"),
        layer("Conv", "gate", "mean", kernel_shape=[1, 1]),
        helper.make_node("Sigmoid", ["gate"], ["share"], "share"),
        helper.make_node("Mul", ["depthwise_act", "share"], ["gated"], "gated"),
        layer("ConvTranspose", "up", "gated", kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Concat", ["up", "image"], ["joined"], "joined", axis=1),
        layer("Conv", "last", "joined", **same, strides=[2, 2]),
        helper.make_node("Relu", ["last"], ["last_act"], "last_act"),
        helper.make_node("AveragePool", ["last_act"], ["pooled"], "pooled", kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Flatten", ["pooled"], ["flat"], "flat"),
        layer("Gemm", "head", "flat", transB=1),
        helper.make_node("Gelu", ["head"], ["head_act"], "head_act"),
        layer("Gemm", "logits", "head_act", transB=1),
    ]
    image = helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, [1, 3, 16, 16])
    graph = helper.make_graph(nodes, "network", [image], [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, [1, 4])], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


@pytest.mark.parametrize(
    ("scheme", "layers"),
    [
        ("power_of_two", ("stem*",)),
        ("power_of_two", ("depthwise*", "logits")),
        ("power_of_two", ("gate", "up", "joined", "head*")),
        ("symmetric", ("stem", "last*", "pooled", "flat", "head")),
        ("asymmetric", ("up", "share", "last")),
    ],
)
def test_a_recipe_that_keeps_layers_float(litert: Any, scheme: str, layers: tuple[str, ...], tmp_path: Path) -> None:
    recipe = Recipe(scheme=scheme, per_channel=scheme != "power_of_two", float_islands=layers)
    data = np.random.default_rng(0).standard_normal((24, 3, 16, 16)).astype(np.float32)
    bundle = isthmus.compile(_network(), targets=["rpi5"], data=data, recipe=recipe, output=tmp_path / "bundle")
    entry = bundle.artifact("rpi5")
    assert bundle.manifest["graph"]["float_islands"] and "float island" in entry["why_lsb"]
    assert all(row["passed"] and row["compared"] >= 24 for row in entry["verification"])
    assert "TRANSPOSE" not in litert.operators_of((tmp_path / "bundle" / "artifacts" / "rpi5" / "model.tflite").read_bytes())


# ---- what TFLite has not
@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (_op("Pad", _whole(0, 0, 1, 1, 0, 0, 1, 1), mode="edge"), "Pad with mode 'edge'"),
        (lambda w, x: w.node("Conv", [x, x], kernel_shape=[7, 5])[0], "computed weight"),
        (_op("MaxPool", kernel_shape=[2, 2], dilations=[2, 2]), "dilations"),
        (_op("Resize", None, np.array([1, 1, 2, 2], np.float32), mode="cubic"), "cubic"),
        (_conv(4, 3, 3, auto_pad="SAME_UPPER"), "auto_pad"),
        (_op("LpNormalization", axis=1), "LpNormalization (float)"),
    ],
)
def test_what_tflite_has_not_is_named(layer: Layer, words: str) -> None:
    graph = _alone(IMAGE, layer)
    problems = TARGET.check(graph, load_profile("rpi5"))
    assert any(words in problem.found and problem.fix and problem.node in {node.name for node in graph.nodes} for problem in problems), problems
