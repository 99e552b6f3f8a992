# SPDX-License-Identifier: Apache-2.0
"""Float ONNX made canonical without changing what it computes, and what cannot be taken, by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from isthmus.errors import IsthmusError, ProblemsError, VerificationError
from isthmus.export.check import check_equal
from isthmus.export.prepare import prepare_float
from isthmus.export.to_graph import graph_from_qdq
from isthmus.graph import OPSET
from isthmus.onnx_file import load_onnx

MODELS = sorted((Path(__file__).parents[1] / "models").glob("*.onnx"))
PUBLIC = Path(__file__).parents[3] / "shared" / "data" / "onnx_models"
RNG = np.random.default_rng(7)


def weight(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def build(nodes: list[onnx.NodeProto], shape: tuple, constants: dict[str, np.ndarray], opset: int = 17, outputs: tuple[str, ...] = ("y",)) -> onnx.ModelProto:
    """A model from "x" to `outputs` (whose shapes are left to inference)."""
    return helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
            [numpy_helper.from_array(array, name) for name, array in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=8,
    )


def node(op: str, inputs: str, outputs: str, name: str = "", **attributes: object) -> onnx.NodeProto:
    """Names separated by blanks; "-" for an input left out."""
    return helper.make_node(op, ["" if part == "-" else part for part in inputs.split()], outputs.split(), name or outputs.split()[0], **attributes)


def operators(model: onnx.ModelProto) -> list[str]:
    return [entry.op_type for entry in model.graph.node]


# ---- float models
BN = {"gamma": weight(4), "beta": weight(4), "mean": weight(4), "var": np.abs(weight(4)) + 0.5}
CONV = {"w": weight(4, 3, 3, 3)}
FLOAT_MODELS: dict[str, tuple[list[onnx.NodeProto], tuple[int, ...], dict[str, np.ndarray], list[str]]] = {
    "same_upper": ([node("Conv", "x w", "y", auto_pad="SAME_UPPER", strides=[2, 2])], (1, 3, 8, 7), CONV, ["Conv"]),
    "same_lower": ([node("Conv", "x w", "y", auto_pad="SAME_LOWER", strides=[2, 1])], (1, 3, 7, 8), CONV, ["Conv"]),
    "same_pool": ([node("MaxPool", "x", "y", kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_UPPER")], (1, 3, 8, 8), {}, ["MaxPool"]),
    "batch_norm": ([node("Conv", "x w", "c"), node("BatchNormalization", "c gamma beta mean var", "y")], (1, 3, 8, 8), CONV | BN, ["Conv"]),
    "lone_batch_norm": ([node("Relu", "x", "r"), node("BatchNormalization", "r gamma beta mean var", "y")], (1, 4, 5, 5), BN, ["Relu", "Conv"]),
    "conv_add": ([node("Conv", "x w", "c"), node("Add", "c b", "y")], (1, 3, 8, 8), CONV | {"b": weight(4, 1, 1)}, ["Conv"]),
    "pad_conv": ([node("Pad", "x p", "c"), node("Conv", "c w", "y")], (1, 3, 8, 8), CONV | {"p": np.array([0, 0, 1, 2, 0, 0, 0, 1])}, ["Conv"]),
    "matmul_add": ([node("MatMul", "x w", "m"), node("Add", "b m", "y")], (2, 6), {"w": weight(6, 5), "b": weight(5)}, ["Gemm"]),
    "matmul_add_rank_3": ([node("MatMul", "x w", "m"), node("Add", "m b", "y")], (1, 4, 6), {"w": weight(6, 5), "b": weight(5)}, ["MatMul", "Add"]),
    "gemm": ([node("Gemm", "x w b", "y", alpha=0.5, beta=2.0)], (2, 6), {"w": weight(6, 5), "b": weight(1, 5)}, ["Gemm"]),
    "mean": ([node("ReduceMean", "x", "y", axes=[-1, -2], keepdims=0)], (2, 3, 4, 4), {}, ["GlobalAveragePool", "Reshape"]),
    "global_max": ([node("GlobalMaxPool", "x", "y")], (2, 3, 4, 5), {}, ["MaxPool"]),
    "nothing_but_names": ([node("Identity", "x", "i"), node("Dropout", "i", "d"), node("Relu", "d", "r"), node("Identity", "r", "y")], (2, 3), {}, ["Relu"]),
    "squeeze": ([node("Relu", "x", "r"), node("Squeeze", "r a", "y")], (2, 3, 1), {"a": np.array([2])}, ["Relu", "Reshape"]),
    "reshape": ([node("Relu", "x", "r"), node("Reshape", "r s", "y")], (2, 3, 4), {"s": np.array([0, -1])}, ["Relu", "Reshape"]),
    "scaled_input": ([node("Div", "x k", "s"), node("Conv", "s w", "y", pads=[1, 1, 1, 1])], (1, 3, 6, 6), CONV | {"k": np.float32([255.0])}, ["Conv"]),
    "normalised_input": (
        [node("Sub", "x m", "a"), node("Div", "a k", "s"), node("Conv", "s w", "y")],
        (1, 3, 6, 6), CONV | {"m": weight(1, 3, 1, 1), "k": np.abs(weight(3, 1, 1)) + 1}, ["Conv"],
    ),
    "normalised_padded": (
        [node("Sub", "x m", "a"), node("Conv", "a w", "y", pads=[1, 1, 1, 1])], (1, 3, 6, 6), CONV | {"m": weight(1, 3, 1, 1)}, ["Sub", "Conv"],
    ),
    "scaled_groups": ([node("Mul", "k x", "s"), node("Conv", "s w", "y", group=3)], (1, 6, 5, 5), {"w": weight(9, 2, 3, 3), "k": weight(6, 1, 1)}, ["Conv"]),
    "shift_gemm": ([node("Sub", "k x", "s"), node("Gemm", "s w", "y", transB=1)], (1, 6), {"w": weight(4, 6), "k": weight(6)}, ["Gemm"]),
    "gemm_then_affine": (
        [node("Gemm", "x w b", "g"), node("Mul", "k g", "m"), node("Sub", "h m", "y")],
        (2, 6), {"w": weight(6, 5), "b": weight(5), "k": weight(5), "h": weight(1)}, ["Gemm"],
    ),
    "gemm_then_row_wise": ([node("Gemm", "x w", "g"), node("Add", "g h", "y")], (2, 6), {"w": weight(6, 5), "h": weight(2, 5)}, ["Gemm", "Add"]),
    "relu6": ([node("Conv", "x w", "c"), node("Clip", "c lo hi", "y")], (1, 3, 6, 6), CONV | {"lo": np.float32(0), "hi": np.float32(6)}, ["Conv", "Clip"]),
}  # fmt: skip


@pytest.mark.parametrize("name", FLOAT_MODELS)
def test_preparing_keeps_the_function_and_gives_one_spelling(name: str) -> None:
    nodes, shape, constants, expected = FLOAT_MODELS[name]
    given_model = build(nodes, shape, constants)
    before = given_model.SerializeToString()
    prepared = prepare_float(given_model)
    assert operators(prepared) == expected
    assert check_equal(given_model, prepared) < 1e-5
    assert given_model.SerializeToString() == before, "the argument is not changed"
    assert prepared.opset_import[0].version == OPSET
    assert all(entry.name for entry in prepared.graph.node)
    for entry in prepared.graph.node:
        if entry.op_type in ("Conv", "MaxPool"):
            assert {"kernel_shape", "pads", "strides", "dilations"} <= {attribute.name for attribute in entry.attribute}
        if entry.op_type == "Gemm":
            attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in entry.attribute}
            assert attributes == {"transA": 0, "transB": 1, "alpha": 1.0, "beta": 1.0}


@pytest.mark.parametrize("opset", [7, 8, 9, 11, 13, 15, 18, 20, 21, 22, 23])
def test_every_opset_from_7_on_becomes_20(opset: int) -> None:
    nodes = [
        node("Conv", "x w", "c", pads=[1, 1, 1, 1]),
        node("BatchNormalization", "c gamma beta mean var", "b"),
        node("Relu", "b", "r"),
        node("MaxPool", "r", "p", kernel_shape=[2, 2], strides=[2, 2]),
        node("Flatten", "p", "f"),
        node("Gemm", "f g h", "l"),
        node("Softmax", "l", "y", axis=1),
    ]
    model = build(nodes, (1, 3, 8, 8), CONV | BN | {"g": weight(64, 5), "h": weight(5)}, opset)
    prepared = prepare_float(model)
    assert operators(prepared) == ["Conv", "Relu", "MaxPool", "Flatten", "Gemm", "Softmax"]
    assert check_equal(prepare_float(model), prepared) == 0
    if opset >= 9:  # below, ONNX's checker wants the weights among the inputs, as the files of that time have them
        assert check_equal(model, prepared) < 1e-5


def test_weights_among_the_inputs_are_weights() -> None:
    model = build([node("Conv", "x w", "y")], (1, 3, 8, 8), CONV, 8)
    model.ir_version = 3
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, (4, 3, 3, 3)))
    prepared = prepare_float(model)
    assert [value.name for value in prepared.graph.input] == ["x"]
    check_equal(model, prepared)


def test_local_functions_are_inlined() -> None:
    made = build([helper.make_node("Twice", ["x"], ["y"], "call", domain="mine")], (1, 4), {}, 18)
    made.opset_import.append(helper.make_opsetid("mine", 1))
    body = [helper.make_node("Add", ["a", "a"], ["s"]), helper.make_node("Relu", ["s"], ["b"])]
    made.functions.append(helper.make_function("mine", "Twice", ["a"], ["b"], body, [helper.make_opsetid("", 18)]))
    assert operators(prepare_float(made)) == ["Add", "Relu"]


# ---- shapes
def relu(shape: tuple | None) -> onnx.ModelProto:
    return build([node("Relu", "x", "y")], shape, {})  # type: ignore[arg-type]


def input_shape(model: onnx.ModelProto) -> list[int]:
    return [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]


def test_an_open_batch_becomes_1_and_is_said() -> None:
    notes: list[str] = []
    assert input_shape(prepare_float(relu(("N", 3, 8, 8)), None, notes)) == [1, 3, 8, 8]
    assert len(notes) == 1 and "batch dimension 'N' is open and was set to 1" in notes[0]
    assert input_shape(prepare_float(relu(("N", 3, 8, 8)), {"x": (4, 3, 8, 8)})) == [4, 3, 8, 8]


@pytest.mark.parametrize(
    ("shape", "shapes", "message"),
    [
        (("N", 3, "H", "W"), None, r"input 'x' is \[N, 3, H, W\]: dimension 0 \(N\), 2 \(H\), 3 \(W\) is not fixed; .* --shape x=1,3,224,224"),
        ((1, None), None, r"dimension 1 \(\?\) is not fixed"),
        (None, None, r"input 'x' has no shape in the model: give it, for example --shape x="),
        ((1, 3), {"z": (1, 3)}, r"--shape z: the model has no input of that name; its inputs are x"),
        (("N", 3), {"x": (1, 3, 4)}, r"--shape x=1,3,4: input 'x' has 2 dimensions \[N, 3\], 3 were given"),
        (("N", 3), {"x": (1, 4)}, r"dimension 1 of input 'x' is fixed to 3 in the model, 4 was given"),
        (("N", 3), {"x": (0, 3)}, r"every dimension must be at least 1"),
    ],
)
def test_open_dimensions_name_the_option(shape: tuple | None, shapes: dict | None, message: str) -> None:
    with pytest.raises(IsthmusError, match=message):
        prepare_float(relu(shape), shapes)


def test_shapes_that_contradict_each_other_are_one_sentence() -> None:
    model = build([node("Conv", "x w", "c"), node("Gemm", "f g", "y"), node("Flatten", "c", "f")][::1], ("N", 3, "H", "W"), CONV | {"g": weight(16, 5)})
    model.graph.node.sort(key=lambda entry: entry.op_type == "Gemm")
    assert prepare_float(model, {"x": (1, 3, 4, 4)})
    with pytest.raises(IsthmusError, match=r"shapes of the model do not fit together: .*; check --shape"):
        prepare_float(model, {"x": (1, 3, 9, 9)})


def test_data_dependent_shapes_name_the_node() -> None:
    nodes = [node("NonZero", "x", "n"), node("Cast", "n", "y", "late", to=TensorProto.FLOAT)]
    with pytest.raises(ProblemsError, match=r"n: the shape of 'n' is not fixed \[static-shape\]"):
        prepare_float(build(nodes, (2, 3), {}))


# ---- what is refused
def custom(model: onnx.ModelProto) -> None:
    model.graph.node[0].domain = "com.example"
    model.opset_import.append(helper.make_opsetid("com.example", 1))


def conditional(model: onnx.ModelProto) -> None:
    branch = helper.make_graph([helper.make_node("Identity", ["r"], ["z"])], "b", [], [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)])
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "which"))
    model.graph.node.append(helper.make_node("If", ["which"], ["i"], "branch", then_branch=branch, else_branch=branch))


def integers(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8


def halves(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16


def nan_weight(model: onnx.ModelProto) -> None:
    bad = weight(4, 3, 3, 3)
    bad[1, 2, 0, 0] = np.nan
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(bad, "w"))


def external(model: onnx.ModelProto) -> None:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/hostname")


def old(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 6


def future(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 99


def no_opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].domain = "elsewhere"


def integer_form(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("ConvInteger", ["r", "w"], ["i"], "int"))


def unknown_operator(model: onnx.ModelProto) -> None:
    model.graph.node[0].op_type = "Convolve"


def quantised(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("QuantizeLinear", ["r", "w"], ["i"], "q"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (custom, r"c: Conv is of domain 'com.example', not of the ONNX standard \[operator-domain\]"),
        (conditional, r"branch: If is control flow \[control-flow\]"),
        (integers, r"x: input is of type uint8 \[border-dtype\]; cut the model"),
        (halves, r"x: input is of type float16 \[border-dtype\]; convert the model to float32"),
        (nan_weight, r"w: 1 of 108 values are NaN \[finite-weights\]"),
        (external, r"w: is stored outside the file \[constant\]"),
        (old, r"opset 6, expected 7 or newer"),
        (future, r"opset 99, the installed onnx .* knows up to \d+; export it with opset"),
        (no_opset, r"imports no opset of the default ONNX domain"),
        (integer_form, r"int: ConvInteger is quantised in operator form \[operator-form\]"),
        (unknown_operator, r"not a valid ONNX model: No Op registered for Convolve"),
        (quantised, r"already holds QuantizeLinear"),
    ],
)
def test_what_cannot_be_taken_is_refused_by_name(damage: Callable[[onnx.ModelProto], None], message: str) -> None:
    model = build([node("Conv", "x w", "c"), node("Relu", "c", "r"), node("Relu", "r", "y")], (1, 3, 8, 8), CONV)
    damage(model)
    with pytest.raises(IsthmusError, match=message):
        prepare_float(model)


def test_all_problems_come_at_once() -> None:
    model = build([node("Conv", "x w", "c"), node("Relu", "c", "r"), node("Relu", "r", "y")], (1, 3, 8, 8), CONV)
    for damage in (custom, conditional, nan_weight):
        damage(model)
    with pytest.raises(ProblemsError) as caught:
        prepare_float(model)
    assert [problem.rule for problem in caught.value.problems] == ["operator-domain", "control-flow", "finite-weights"]


@settings(max_examples=60)
@given(st.data())
def test_a_damaged_file_never_crashes(data: st.DataObject) -> None:
    path = data.draw(st.sampled_from([model for model in MODELS if model.stem in ("network", "residual", "concat")]))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    model = onnx.ModelProto()
    try:
        model.ParseFromString(bytes(content))
    except Exception:  # noqa: BLE001 - the reader of files, tested elsewhere, turns this into a sentence
        return
    del model.metadata_props[:]
    try:
        graph_from_qdq(model)
    except IsthmusError:
        return


# ---- the check itself
def test_the_check_sees_a_changed_weight_a_changed_shape_and_a_changed_name() -> None:
    model = build([node("Conv", "x w", "y")], (1, 3, 8, 8), CONV)
    other = build([node("Conv", "x w", "y")], (1, 3, 8, 8), {"w": CONV["w"] * np.float32(1.001)})
    with pytest.raises(VerificationError, match=r"output 'y' differs by .*e-0[34] of its largest value"):
        check_equal(model, other)
    with pytest.raises(VerificationError, match=r"output 'y' was \[1, 4, 6, 6\] and is \[1, 4, 8, 8\]"):
        check_equal(model, build([node("Conv", "x w", "y", pads=[1, 1, 1, 1])], (1, 3, 8, 8), CONV))
    with pytest.raises(VerificationError, match="changed its inputs or outputs"):
        check_equal(model, build([node("Conv", "x w", "z")], (1, 3, 8, 8), CONV, outputs=("z",)))
    logarithm = build([node("Log", "x", "y")], (1, 3), {})
    assert check_equal(logarithm, logarithm) == 0  # NaN where both have NaN


# ---- models that others made
def public(name: str) -> onnx.ModelProto:
    if not PUBLIC.is_dir():
        pytest.skip("the folder of public models is not beside this checkout")
    return load_onnx(PUBLIC / name)


@pytest.mark.parametrize("name", ["mnist_ort_examples.onnx", "wonnx_opt-mnist.onnx"])
def test_public_models_of_opset_8(name: str) -> None:
    model = public(name)
    prepared = prepare_float(model)
    assert operators(prepared) == ["Conv", "Relu", "MaxPool", "Conv", "Relu", "MaxPool", "Reshape", "Gemm"]
    assert check_equal(model, prepared) < 1e-5


def test_public_model_with_custom_operators() -> None:
    model = public("custom_ops_negative/pytorch_superresolution_with_pre_post_processing_op18.onnx")
    with pytest.raises(ProblemsError, match=r"DecodeImage is of domain 'com.microsoft.extensions'"):
        prepare_float(model)
