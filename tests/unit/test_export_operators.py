# SPDX-License-Identifier: Apache-2.0
"""Every int8 operator out of a float graph: placed in int8, near the float model, and to the bit what ONNX Runtime makes of the written file."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from isthmus import reference
from isthmus.export.prepare import prepare_float
from isthmus.export.to_graph import graph_from_ranges, tensors_to_calibrate
from isthmus.graph import QuantGraph
from isthmus.ops import OPS
from isthmus.quantize.onnx_ptq import calibrate
from isthmus.recipe import Recipe

RNG = np.random.default_rng(5)
SCHEMES = ("power_of_two", "symmetric", "asymmetric")


def weight(*shape: int) -> np.ndarray:
    return (RNG.standard_normal(shape) * 0.3).astype(np.float32)


def whole(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


def node(op: str, inputs: str, outputs: str, **attributes: object) -> onnx.NodeProto:
    """Names separated by blanks; "-" for an input left out."""
    return helper.make_node(op, ["" if part == "-" else part for part in inputs.split()], outputs.split(), outputs.split()[0], **attributes)


Case = tuple[list[onnx.NodeProto], dict[str, np.ndarray]]
IMAGE, ROWS, TOKENS = (1, 4, 6, 6), (1, 6), (1, 5, 6)


def one(op: str, more: str = "", constants: dict[str, np.ndarray] | None = None, **attributes: object) -> Case:
    return [node(op, f"c {more}", "y", **attributes)], constants or {}


def two(op: str) -> Case:
    return [node("Tanh", "c", "s"), node(op, "c s", "y")], {}


# Behind a layer "c"; rows that are no ONNX operators by what they are spelled as.
CASES: dict[str, tuple[tuple[int, ...], Case]] = {
    "Conv": (IMAGE, one("Conv", "k b", {"k": weight(2, 4, 3, 3), "b": weight(2)}, kernel_shape=[3, 3], dilations=[2, 2])),
    "ConvTranspose": (
        IMAGE,
        one("ConvTranspose", "k b", {"k": weight(4, 3, 3, 2), "b": weight(6)}, kernel_shape=[3, 2], strides=[2, 2], output_padding=[1, 0], group=2),
    ),
    "Gemm": (ROWS, one("Gemm", "k b", {"k": weight(3, 6), "b": weight(3)}, transB=1)),
    "MatMul": (TOKENS, ([node("MatMul", "c k", "m"), node("Add", "b m", "a"), node("Relu", "a", "y")], {"k": weight(6, 3), "b": weight(1, 1, 3)})),
    "BatchMatMul": (TOKENS, ([node("Transpose", "c", "t", perm=[0, 2, 1]), node("MatMul", "c t", "y")], {})),
    "Add": (IMAGE, two("Add")),
    "Sub": (IMAGE, two("Sub")),
    "Mul": (IMAGE, two("Mul")),
    "AveragePool": (IMAGE, one("AveragePool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])),
    "GlobalAveragePool": (IMAGE, one("GlobalAveragePool")),
    "ReduceMean": (TOKENS, one("ReduceMean", "a", {"a": whole(1)}, keepdims=0)),
    "ResizeLinear": (IMAGE, one("Resize", "- - s", {"s": whole(1, 4, 12, 3)}, mode="linear")),
    "Constant": (IMAGE, one("Add", "k", {"k": weight(4, 1, 1)})),
    "LeakyRelu": (IMAGE, one("LeakyRelu", alpha=0.2)),
    "Sigmoid": (IMAGE, one("Sigmoid")),
    "Tanh": (IMAGE, one("Tanh")),
    "HardSigmoid": (IMAGE, one("HardSigmoid", alpha=1 / 6)),
    "HardSwish": (IMAGE, one("HardSwish")),
    "Silu": (IMAGE, ([node("Sigmoid", "c", "s"), node("Mul", "s c", "y")], {})),
    "Mish": (IMAGE, one("Mish")),
    "Gelu": (IMAGE, one("Gelu", approximate="tanh")),
    "Softplus": (IMAGE, one("Softplus")),
    "Elu": (IMAGE, one("Elu", alpha=0.5)),
    "PRelu": (IMAGE, one("PRelu", "k", {"k": weight(4, 1, 1)})),
    "MaxPool": (IMAGE, one("MaxPool", kernel_shape=[2, 2])),
    "Relu": (IMAGE, ([node("MaxPool", "c", "m", kernel_shape=[2, 2]), node("Relu", "m", "y")], {})),
    "Clip": (IMAGE, ([node("MaxPool", "c", "m", kernel_shape=[2, 2]), node("Clip", "m - k", "y")], {"k": np.float32(0.25)})),
    "Flatten": (IMAGE, one("Flatten")),
    "Reshape": (IMAGE, one("Reshape", "s", {"s": whole(1, 2, 72)})),
    "Squeeze": (IMAGE, ([node("GlobalAveragePool", "c", "g"), node("Squeeze", "g a", "y")], {"a": whole(-1)})),
    "Unsqueeze": (ROWS, one("Unsqueeze", "a", {"a": whole(1, 3)})),
    "Concat": (IMAGE, ([node("Tanh", "c", "t"), node("Concat", "t c k", "y", axis=1)], {"k": weight(1, 1, 6, 6)})),
    "Split": (IMAGE, ([node("Split", "c s", "p q", axis=-3), node("Sub", "p p", "z"), node("Concat", "q z", "y", axis=1)], {"s": whole(1, 3)})),
    "Slice": (IMAGE, one("Slice", "s e a t", {"s": whole(-1), "e": whole(-100), "a": whole(2), "t": whole(-2)})),
    "Pad": (IMAGE, one("Pad", "p v", {"p": whole(0, 0, 1, 0, 0, 0, 0, 2), "v": np.float32(9.5)})),
    "Transpose": (IMAGE, one("Transpose", perm=[0, 3, 1, 2])),
    "Expand": (IMAGE, ([node("GlobalAveragePool", "c", "g"), node("Expand", "g s", "y")], {"s": whole(1, 4, 3, 2)})),
    "DepthToSpace": (IMAGE, one("DepthToSpace", blocksize=2, mode="CRD")),
    "SpaceToDepth": (IMAGE, one("SpaceToDepth", blocksize=3)),
    "Gather": (IMAGE, one("Gather", "i", {"i": whole(2, 0, -1)}, axis=1)),
    "ResizeNearest": (IMAGE, one("Resize", "- r", {"r": np.float32([1, 1, 2, 2])}, mode="nearest", coordinate_transformation_mode="asymmetric")),
}


def model_of(shape: tuple[int, ...], case: Case) -> onnx.ModelProto:
    """A layer of the input's own shape in front of the nodes."""
    layer, first = ("Conv", weight(4, 4, 1, 1)) if len(shape) == 4 else ("MatMul", weight(6, 6))
    attributes = {"kernel_shape": [1, 1]} if layer == "Conv" else {}
    graph = helper.make_graph(
        [node(layer, "x w", "c", **attributes), *case[0]],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in ({"w": first} | case[1]).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    return onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)


def quantised(model: onnx.ModelProto, samples: np.ndarray, scheme: str = "power_of_two") -> QuantGraph:
    recipe = Recipe(name=scheme, scheme=scheme, per_channel=scheme != "power_of_two", observer="minmax")
    return graph_from_ranges(model, calibrate(model, {"x": samples}, recipe, tensors_to_calibrate(model)), recipe)


def run(model: bytes, samples: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"x": sample[None]})[0] for sample in samples])


def test_every_row_of_the_table_is_written() -> None:
    assert set(CASES) == set(OPS) - {"Requantize"}  # only a graph that brings its own quantisers changes a scale without an operator


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("op", CASES)
def test_an_operator_of_a_float_graph_comes_out_in_int8(op: str, scheme: str) -> None:
    shape, case = CASES[op]
    model = model_of(shape, case)
    samples = np.random.default_rng(1).standard_normal((8, *shape[1:])).astype(np.float32)
    graph = quantised(model, samples, scheme)
    assert graph.float_islands == ()
    assert op in {entry.op for entry in graph.nodes if entry.kind == "int8"}
    spec = graph.outputs[0]
    ours = reference.run(graph, {"x": samples})[spec.name]
    steps = np.abs(spec.quantise(run(graph.to_bytes(), samples)).astype(int) - ours)
    assert steps.max() <= (0 if scheme == "power_of_two" else 1)
    meant = run(model.SerializeToString(), samples)
    noise = np.abs(spec.dequantise(ours) - meant).mean() / np.abs(meant).mean()
    assert noise < (0.12 if op == "Sub" else 0.06), noise  # a difference of nearly equal numbers is small


UNUSUAL: dict[str, tuple[tuple[int, ...], Case]] = {
    "output_shape": (IMAGE, one("ConvTranspose", "k", {"k": weight(4, 3, 2, 2)}, kernel_shape=[2, 2], strides=[2, 2], output_shape=[13, 12])),
    "volume": (
        IMAGE, ([node("Reshape", "c s", "v"), node("Conv", "v k", "y", kernel_shape=[1, 1, 1])], {"s": whole(1, 4, 2, 3, 6), "k": weight(2, 4, 1, 1, 1)}),
    ),
    "Gemm's factor": (ROWS, one("Gemm", "k", {"k": weight(3, 6)}, transB=1, alpha=0.5)),
    "dilated average": (IMAGE, one("AveragePool", kernel_shape=[2, 2], dilations=[2, 2])),
    "cubic": (IMAGE, one("Resize", "- r", {"r": np.float32([1, 1, 2, 2])}, mode="cubic")),
    "channels resized": (IMAGE, one("Resize", "- r", {"r": np.float32([1, 2, 1, 1])}, mode="nearest")),
    "reflect": (IMAGE, one("Pad", "p", {"p": whole(0, 0, 1, 0, 0, 0, 0, 2)}, mode="reflect")),
    "batch moved": (IMAGE, one("Transpose", perm=[1, 0, 2, 3])),
    "batch gone": (IMAGE, one("Reshape", "s", {"s": whole(4, 36)})),
    "mean of all": (IMAGE, ([node("ReduceMean", "c", "m", keepdims=1), node("Mul", "c m", "y")], {})),
    "infinite constant": (IMAGE, one("Add", "k", {"k": np.float32([-np.inf])})),
    "constant of more axes": (ROWS, one("Add", "k", {"k": weight(1, 2, 6)})),
    "other slope": (IMAGE, one("PRelu", "k", {"k": weight(1, 6, 6)})),
    "places of the maximum": (IMAGE, ([node("MaxPool", "c", "m i", kernel_shape=[2, 2]), node("Cast", "i", "y", to=TensorProto.FLOAT)], {})),
    "batch concatenated": (IMAGE, one("Concat", "c", axis=0)),
}  # fmt: skip


@pytest.mark.parametrize("name", UNUSUAL)
def test_an_unusual_attribute_leaves_its_operator_float(name: str) -> None:
    shape, case = UNUSUAL[name]
    model = model_of(shape, case)
    samples = np.random.default_rng(1).standard_normal((4, *shape[1:])).astype(np.float32)
    graph = quantised(model, samples)
    assert graph.float_islands and "c" in {entry.name for entry in graph.nodes if entry.kind == "int8"}
    assert set(graph.float_islands) <= {entry.name for entry in model.graph.node}


SPELLED = {
    "x * relu6(x + 3) / 6": ("HardSwish", [node("Add", "three c", "a"), node("Clip", "a zero six", "b"), node("Mul", "c b", "m"), node("Div", "m six", "y")]),
    "x * (relu6(x + 3) / 6)": ("HardSwish", [node("Add", "c three", "a"), node("Clip", "a zero six", "b"), node("Div", "b six", "m"), node("Mul", "m c", "y")]),
    "relu6(x + 3) / 6": ("HardSigmoid", [node("Add", "c three", "a"), node("Clip", "a zero six", "b"), node("Div", "b six", "d"), node("Sub", "d c", "y")]),
    "x * hardsigmoid(x)": ("HardSwish", [node("HardSigmoid", "c", "a", alpha=1 / 6), node("Mul", "a c", "y")]),
    "x * tanh(softplus(x))": ("Mish", [node("Softplus", "c", "a"), node("Tanh", "a", "b"), node("Mul", "b c", "y")]),
    "softplus with a threshold": ("Softplus", [node("Softplus", "c", "a"), node("Greater", "c twenty", "b"), node("Where", "b c a", "y")]),
    "x * sigmoid(x)": ("Silu", [node("Sigmoid", "c", "a"), node("Mul", "a c", "y")]),
    "0.5 x (1 + erf(x / sqrt 2))": (
        "Gelu", [node("Div", "c root", "a"), node("Erf", "a", "b"), node("Add", "b one", "d"), node("Mul", "half c", "e"), node("Mul", "e d", "y")],
    ),
    "0.5 x (1 + tanh(...))": (
        "Gelu",
        [
            node("Pow", "c three", "p"), node("Mul", "cubic p", "q"), node("Add", "c q", "r"), node("Mul", "r gauss", "a"), node("Tanh", "a", "b"),
            node("Add", "one b", "d"), node("Mul", "d c", "e"), node("Mul", "e half", "y"),
        ],
    ),
    "x / 4": ("Mul", [node("Div", "c four", "d"), node("Tanh", "c", "t"), node("Sub", "d t", "y")]),
    "-x": ("Mul", [node("Tanh", "c", "t"), node("Neg", "t", "n"), node("Sub", "n c", "y")]),
}  # fmt: skip
NUMBERS = {"zero": 0.0, "half": 0.5, "one": 1.0, "three": 3.0, "four": 4.0, "six": 6.0, "twenty": 20.0} | {
    "root": 2**0.5, "cubic": 0.044715, "gauss": (2 / np.pi) ** 0.5,
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLED)
def test_a_function_spelled_out_is_one_operator(name: str) -> None:
    expected, nodes = SPELLED[name]
    used = {part for entry in nodes for part in entry.input}
    constants = {number: np.float32(value) for number, value in NUMBERS.items() if number in used}
    model = model_of(IMAGE, (nodes, constants))
    samples = np.random.default_rng(1).standard_normal((4, *IMAGE[1:])).astype(np.float32) * 4
    prepared = prepare_float(model)
    np.testing.assert_allclose(run(prepared.SerializeToString(), samples), run(model.SerializeToString(), samples), rtol=1e-5, atol=1e-5)
    graph = quantised(prepared, samples)
    assert expected in {entry.op for entry in graph.nodes} and graph.float_islands == ()
    if expected not in ("Mul", "HardSigmoid"):
        assert len([entry for entry in graph.nodes if entry.kind == "int8"]) == 2
