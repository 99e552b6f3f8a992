# SPDX-License-Identifier: Apache-2.0
"""Into the form: float ONNX made canonical without changing what it computes, and QDQ graphs of other writers read exactly."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from isthmus import reference
from isthmus.errors import IsthmusError, ProblemsError, VerificationError
from isthmus.export import draft
from isthmus.export.check import check_equal
from isthmus.export.prepare import prepare_float
from isthmus.export.to_graph import graph_from_qdq
from isthmus.graph import OPSET, QuantGraph
from isthmus.onnx_file import load_onnx
from isthmus.recipe import Recipe

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


# ---- graphs that carry quantisers
def run_float(model: onnx.ModelProto, samples: np.ndarray) -> list[np.ndarray]:
    """The QDQ graph in float arithmetic, operator by operator: what its writer meant."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    runs = [session.run(None, {session.get_inputs()[0].name: sample[None]}) for sample in samples]
    return [np.concatenate(parts) for parts in zip(*runs, strict=True)]


def run_int8(graph: QuantGraph, samples: np.ndarray) -> list[np.ndarray]:
    raw = reference.run(graph, {graph.inputs[0].name: samples})
    return [spec.dequantise(raw[spec.name]) for spec in graph.outputs]


def same(model: onnx.ModelProto, graph: QuantGraph, shape: tuple[int, ...]) -> None:
    """Exact for powers of two. Other scales round in float32 where the graph runs and not at all in the reference: a tie may fall otherwise."""
    samples = RNG.standard_normal((6, *shape)).astype(np.float32)
    exact = all(np.frexp(spec.scale)[0] == 0.5 for spec in graph.tensors.values() if spec.scale is not None)
    for spec, meant, found in zip(graph.outputs, run_float(model, samples), run_int8(graph, samples), strict=True):
        if exact:
            np.testing.assert_array_equal(found, meant)
        else:
            steps = np.abs(found - meant) / (spec.scale or 1.0)
            assert steps.max() < 1.01 and (steps > 0.5).mean() < 0.02


def _is_written_by_export(path: Path) -> bool:
    """Whether export has a row for every operator: what it has none for comes back as a float island."""
    return all(node.op in {*draft._FITS, draft.REQUANTISE, "Softmax"} for node in QuantGraph.load(path).nodes if node.kind != "border")


@pytest.mark.parametrize("path", list(filter(_is_written_by_export, MODELS)), ids=lambda path: path.stem)
def test_a_form_without_its_metadata_comes_back_as_the_same_program(path: Path) -> None:
    model = load_onnx(path)
    own = QuantGraph.from_model(model)
    del model.metadata_props[:]
    graph = graph_from_qdq(model)
    assert [entry.op for entry in graph.nodes] == [entry.op for entry in own.nodes]
    assert (graph.inputs, graph.outputs, graph.recipe.scheme) == (own.inputs, own.outputs, own.recipe.scheme)
    feeds = {spec.name: RNG.integers(-128, 128, spec.shape).astype(spec.dtype) for spec in own.inputs}
    for name, expected in reference.run(own, feeds).items():
        np.testing.assert_array_equal(reference.run(graph, feeds)[name], expected)


def test_a_form_is_taken_as_it_is() -> None:
    model = load_onnx(MODELS[0])
    assert graph_from_qdq(model).to_bytes() == QuantGraph.from_model(model).to_bytes()


class Qdq:
    """A QDQ graph in the making: float x -> ... with whatever quantisers a test wants."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}

    def op(self, op: str, inputs: str, output: str, **attributes: object) -> str:
        self.nodes.append(node(op, inputs, output, **attributes))
        return output

    def hold(self, name: str, array: np.ndarray) -> str:
        self.constants[name] = array
        return name

    def qdq(self, value: str, scale: float, zero: int = 0, dtype: type = np.int8, out: str = "", clip: tuple[int, int] | None = None) -> str:
        pair = f"{self.hold(f'{value}_s', np.float32(scale))} {self.hold(f'{value}_z', np.array(zero, dtype))}"
        integers = self.op("QuantizeLinear", f"{value} {pair}", f"{value}_int")
        if clip is not None:
            edges = [self.hold(f"{value}_{side}", np.array(edge, dtype)) for side, edge in zip("lh", clip, strict=True)]
            integers = self.op("Clip", f"{integers} {' '.join(edges)}", f"{value}_clipped")
        return self.op("DequantizeLinear", f"{integers} {pair}", out or f"{value}_real")

    def weight(self, name: str, array: np.ndarray, scale: float = 2.0**-6) -> str:
        parts = [self.hold(f"{name}_int", array.astype(np.int8)), self.hold(f"{name}_s", np.float32(scale)), self.hold(f"{name}_z", np.int8(0))]
        return self.op("DequantizeLinear", " ".join(parts), name)

    def model(self, shape: tuple[int, ...], outputs: tuple[str, ...] = ("y",)) -> onnx.ModelProto:
        return build(self.nodes, shape, self.constants, 18, outputs)


def ints(*shape: int) -> np.ndarray:
    return RNG.integers(-127, 128, shape)


def pool_before_quantiser() -> Qdq:
    made = Qdq()
    made.op("Conv", f"{made.qdq('x', 2**-5)} {made.weight('w', ints(4, 3, 3, 3))}", "c")
    made.op("MaxPool", made.op("Relu", "c", "r"), "p", kernel_shape=[2, 2], strides=[2, 2])
    made.qdq(made.op("Flatten", "p", "f"), 2**-2, out="y")
    return made


def two_pools_behind_one_layer() -> Qdq:
    made = Qdq()
    made.op("Conv", f"{made.qdq('x', 2**-5)} {made.weight('w', ints(4, 3, 3, 3))}", "c")
    left = made.qdq(made.op("MaxPool", "c", "p", kernel_shape=[2, 2]), 2**-2)
    right = made.qdq(made.op("MaxPool", "c", "q", kernel_shape=[2, 1], pads=[0, 0, 0, 0]), 2**-2)
    made.qdq("c", 2**-2)
    sides = f"{made.op('GlobalAveragePool', left, 'l')} {made.op('GlobalAveragePool', right, 'r')} {made.op('GlobalAveragePool', 'c_real', 'm')}"
    made.op("Concat", " ".join(made.qdq(side, 2**-3) for side in sides.split()), "k", axis=1)
    made.qdq("k", 2**-3, out="y")
    return made


def concat_of_two_scales() -> Qdq:
    made = Qdq()
    x = made.qdq("x", 2**-5)
    left = made.qdq(made.op("Conv", f"{x} {made.weight('w', ints(4, 3, 1, 1))}", "a"), 2**-3)
    right = made.qdq(made.op("Conv", f"{x} {made.weight('v', ints(2, 3, 1, 1))}", "b"), 2**-2)
    made.qdq(made.op("Concat", f"{left} {right}", "k", axis=1), 2**-2, out="y")
    return made


def rescaling_relu() -> Qdq:
    made = Qdq()
    conv = made.qdq(made.op("Conv", f"{made.qdq('x', 2**-5)} {made.weight('w', ints(4, 3, 1, 1))}", "c"), 2**-2)
    made.qdq(made.op("Relu", conv, "r"), 2**-3, out="y")
    return made


def small_bits() -> Qdq:
    made = Qdq()
    made.op("Conv", f"{made.qdq('x', 2**-5, clip=(-100, 90))} {made.weight('w', ints(4, 3, 1, 1))}", "c")
    narrow = made.qdq(made.op("Relu", "c", "r"), 0.5, 0, np.uint8, clip=(0, 15))
    made.qdq(made.op("Conv", f"{narrow} {made.weight('v', ints(2, 4, 1, 1))}", "d"), 2**-2, clip=(-127, 127), out="y")
    return made


def unsigned() -> Qdq:
    made = Qdq()
    made.op("Gemm", f"{made.qdq('x', 0.031, 120, np.uint8)} {made.weight('w', ints(6, 5), 0.01)}", "g")  # transB=0
    made.qdq("g", 0.07, 131, np.uint8, out="y")
    return made


def matmul_bias() -> Qdq:
    made = Qdq()
    made.op("MatMul", f"{made.qdq('x', 2**-5)} {made.weight('w', ints(6, 5))}", "m")
    made.qdq(made.op("Add", f"m {made.hold('b', (ints(5) * 2**-11).astype(np.float32))}", "s"), 2**-2, out="y")
    return made


def islands() -> Qdq:
    made = Qdq()
    conv = made.qdq(made.op("Conv", f"{made.qdq('x', 2**-5)} {made.weight('w', ints(4, 3, 1, 1))}", "c"), 2**-2)
    again = made.qdq(made.op("Sigmoid", conv, "g"), 2**-7)
    made.qdq(made.op("GlobalAveragePool", again, "a"), 2**-8, out="pooled")
    made.qdq(made.op("Softmax", "pooled", "t", axis=1), 2**-7, out="y")
    return made


def residual_with_two_readers() -> Qdq:
    made = Qdq()
    x = made.qdq("x", 2**-5)
    conv = made.qdq(made.op("Conv", f"{x} {made.weight('w', ints(3, 3, 1, 1))}", "c"), 2**-2)
    made.qdq(made.op("Add", f"{conv} {x}", "s"), 2**-2)
    made.qdq(made.op("Relu", made.op("Add", f"s_real {conv}", "t"), "u"), 2**-1, out="y")
    return made


QDQ_MODELS: dict[str, tuple[Callable[[], Qdq], tuple[int, ...], list[str], str]] = {
    "pool_before_quantiser": (pool_before_quantiser, (3, 6, 6), ["Conv", "MaxPool", "Flatten"], "power_of_two"),
    "two_pools_behind_one_layer": (two_pools_behind_one_layer, (3, 6, 6), ["Conv", "MaxPool", "MaxPool", *["GlobalAveragePool"] * 3, "Concat"], "power_of_two"),
    "concat_of_two_scales": (concat_of_two_scales, (3, 4, 4), ["Conv", "Conv", "Requantize", "Concat"], "power_of_two"),
    "rescaling_relu": (rescaling_relu, (3, 4, 4), ["Conv", "Relu", "Requantize"], "power_of_two"),
    "small_bits": (small_bits, (3, 4, 4), ["Clip", "Conv", "Conv"], "asymmetric"),
    "unsigned": (unsigned, (6,), ["Gemm"], "asymmetric"),
    "matmul_bias": (matmul_bias, (6,), ["Gemm"], "power_of_two"),
    "islands": (islands, (3, 4, 4), ["Conv", "Sigmoid", "GlobalAveragePool", "Softmax"], "power_of_two"),
    "residual_with_two_readers": (residual_with_two_readers, (3, 4, 4), ["Conv", "Add", "Add"], "power_of_two"),
}


@pytest.mark.parametrize("name", QDQ_MODELS)
def test_a_qdq_graph_keeps_every_value(name: str) -> None:
    make, shape, expected, scheme = QDQ_MODELS[name]
    model = make().model((1, *shape))
    graph = graph_from_qdq(model)
    found = [entry.op for entry in graph.nodes if entry.kind != "border"]
    assert sorted(found) == sorted(expected)
    assert graph.recipe.scheme == scheme
    same(model, graph, shape)


def test_a_value_read_by_two_outputs_and_an_operator() -> None:
    made = Qdq()
    conv = made.qdq(made.op("Conv", f"{made.qdq('x', 2**-5)} {made.weight('w', ints(4, 3, 1, 1))}", "c"), 2**-2, out="early")
    made.qdq(made.op("GlobalAveragePool", conv, "g"), 2**-3, out="y")
    made.op("DequantizeLinear", "c_int c_s c_z", "twin")
    model = made.model((1, 3, 4, 4), ("early", "twin", "y"))
    graph = graph_from_qdq(model)
    assert [spec.name for spec in graph.outputs] == ["early", "twin", "y"]
    same(model, graph, (3, 4, 4))


def test_float_weights_behind_a_quantiser_become_integers() -> None:
    made = Qdq()
    made.hold("float_w", weight(4, 3, 1, 1))
    made.hold("ws", np.float32([0.01, 0.02, 0.03, 0.04]))
    made.hold("wz", np.zeros(4, np.int8))
    made.op("QuantizeLinear", "float_w ws wz", "w_int", axis=0)
    made.op("DequantizeLinear", "w_int ws wz", "w", axis=0)
    made.qdq(made.op("Conv", f"{made.qdq('x', 2**-5)} w", "c"), 0.11, out="y")
    model = made.model((1, 3, 4, 4))
    graph = graph_from_qdq(model)
    assert graph.recipe == Recipe(name="imported", scheme="symmetric", per_channel=True)
    same(model, graph, (3, 4, 4))


@pytest.mark.parametrize("symmetric", [True, False])
def test_onnx_runtimes_quantiser(symmetric: bool, tmp_path: Path) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = [{"x": weight(1, 3, 8, 8)} for _ in range(3)]

        def get_next(self) -> dict[str, np.ndarray] | None:
            return self.left.pop() if self.left else None

    nodes = [
        node("Conv", "x w b", "c", pads=[1, 1, 1, 1]), node("Relu", "c", "r"), node("MaxPool", "r", "p", kernel_shape=[2, 2], strides=[2, 2]),
        node("Conv", "p v", "d", pads=[1, 1, 1, 1]), node("Add", "d p", "s"), node("GlobalAveragePool", "s", "g"), node("Flatten", "g", "f"),
        node("Gemm", "f k h", "y", transB=1),
    ]  # fmt: skip
    constants = CONV | {"b": weight(4), "v": weight(4, 4, 3, 3), "k": weight(5, 4), "h": weight(5)}
    onnx.save(prepare_float(build(nodes, (1, 3, 8, 8), constants)), tmp_path / "float.onnx")
    quantize_static(
        tmp_path / "float.onnx", tmp_path / "int8.onnx", Reader(), quant_format=QuantFormat.QDQ, per_channel=not symmetric,
        activation_type=QuantType.QInt8, weight_type=QuantType.QInt8, extra_options={"ActivationSymmetric": symmetric},
    )  # fmt: skip
    model = load_onnx(tmp_path / "int8.onnx")
    graph = graph_from_qdq(model)
    assert graph.recipe.scheme == ("symmetric" if symmetric else "asymmetric")
    assert graph.float_islands == ()
    same(model, graph, (3, 8, 8))


def no_output_quantiser() -> Qdq:
    made = Qdq()
    made.op("Conv", f"{made.qdq('x', 2**-5)} {made.weight('w', ints(4, 3, 1, 1))}", "y")
    return made


def read_twice() -> Qdq:
    made = Qdq()
    made.op("Conv", f"{made.qdq('x', 2**-5)} {made.weight('w', ints(4, 3, 1, 1))}", "c")
    made.op("Add", f"{made.qdq('c', 0.5)} {made.op('Sigmoid', 'c', 'side')}", "y")
    return made


def no_input_quantiser() -> Qdq:
    made = Qdq()
    made.qdq(made.op("Conv", f"x {made.weight('w', ints(4, 3, 1, 1))}", "c"), 0.5, out="y")
    return made


def batch_norm_between() -> Qdq:
    made = Qdq()
    made.op("Conv", f"{made.qdq('x', 2**-5)} {made.weight('w', ints(4, 3, 1, 1))}", "c")
    names = " ".join(made.hold(name, array) for name, array in BN.items())
    made.qdq(made.op("BatchNormalization", f"c {names}", "b"), 0.5, out="y")
    return made


def weight_with_zero_point() -> Qdq:
    made = no_output_quantiser()
    made.constants["w_z"] = np.int8(3)
    made.nodes[-1].output[0] = "c"
    made.qdq("c", 0.5, out="y")
    return made


def other_scale_behind() -> Qdq:
    made = Qdq()
    x = made.qdq("x", 2**-5)
    made.nodes[-1].input[1] = made.hold("other", np.float32(0.7))
    made.qdq(made.op("Relu", x, "r"), 0.5, out="y")
    return made


def sixteen_bits() -> Qdq:
    made = Qdq()
    made.qdq(made.op("Relu", made.qdq("x", 2**-5, 0, np.int16), "r"), 0.5, out="y")
    return made


def per_channel_activation() -> Qdq:
    made = other_scale_behind()
    made.constants |= {"x_s": np.float32([0.1, 0.2, 0.3]), "x_z": np.zeros(3, np.int8), "other": np.float32([0.1, 0.2, 0.3])}
    return made


def float_weights() -> Qdq:
    made = Qdq()
    made.qdq(made.op("Conv", f"{made.qdq('x', 2**-5)} {made.hold('w', weight(4, 3, 1, 1))}", "c"), 0.5, out="y")
    return made


def huge_bias() -> Qdq:
    made = Qdq()
    made.op("Conv", f"{made.qdq('x', 2**-5)} {made.weight('w', ints(4, 3, 1, 1), 2.0**-20)} {made.hold('b', np.float32([1e3, 0, 0, 0]))}", "c")
    made.qdq("c", 0.5, out="y")
    return made


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (no_output_quantiser, r"y: its result 'y' is a graph output without a quantiser \[output-not-quantised\]"),
        (read_twice, r"c: its result 'c' is read unquantised by side \[output-not-quantised\]"),
        (no_input_quantiser, r"c: its weight is int8, but its input 'x' is float \[input-not-quantised\]"),
        (batch_norm_between, r"c: a BatchNormalization stands between it and its quantiser \[batch-norm\]; fold BatchNorm"),
        (weight_with_zero_point, r"y: its weight is int8 with a zero point \[weight\]; quantise weights symmetrically"),
        (other_scale_behind, r"x_int: its int8 result is read with another scale or zero point \(x_real\) \[dequantiser\]"),
        (sixteen_bits, r"x_int: quantises to int16 \[quantiser-dtype\]"),
        (per_channel_activation, r"x_int: has 3 scales \[quantiser-scale\]"),
        (float_weights, r"model: no layer has int8 weights behind a DequantizeLinear \[nothing-to-quantise\]"),
        (huge_bias, r"c: a bias of .* steps of input x weight scale does not fit int32 \[bias-overflow\]"),
    ],
)
def test_a_qdq_graph_that_has_no_such_form_says_why(make: Callable[[], Qdq], message: str) -> None:
    made = make()
    model = made.model((1, 3, 4, 4))
    if make is sixteen_bits:
        model.opset_import[0].version = 21
    with pytest.raises(ProblemsError, match=message):
        graph_from_qdq(model)


def test_brevitas_four_bit_network() -> None:
    pytest.importorskip("brevitas")
    import warnings

    import torch
    from brevitas import nn as qnn
    from brevitas.export import export_onnx_qcdq
    from brevitas.quant.fixed_point import Int8ActPerTensorFixedPoint, Int8WeightPerTensorFixedPoint, Uint8ActPerTensorFixedPoint
    from brevitas.quant.scaled_int import Int32Bias

    linear = {"weight_quant": Int8WeightPerTensorFixedPoint, "bias_quant": Int32Bias, "bias": True}
    network = torch.nn.Sequential(
        qnn.QuantIdentity(act_quant=Int8ActPerTensorFixedPoint, return_quant_tensor=True),
        qnn.QuantConv2d(3, 6, 3, padding=1, weight_bit_width=4, **linear),
        qnn.QuantReLU(act_quant=Uint8ActPerTensorFixedPoint, bit_width=4, return_quant_tensor=True),
        torch.nn.MaxPool2d(2),
        torch.nn.Flatten(),
        qnn.QuantLinear(96, 5, **linear),
        qnn.QuantIdentity(act_quant=Int8ActPerTensorFixedPoint),
    )
    network(torch.randn(16, 3, 8, 8))
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        export_onnx_qcdq(network.eval(), args=torch.randn(1, 3, 8, 8), export_path=content, dynamo=False, opset_version=20)
    model = onnx.load_from_string(content.getvalue())
    graph = graph_from_qdq(model)
    assert [entry.op for entry in graph.nodes if entry.kind == "int8"] == ["Conv", "MaxPool", "Flatten", "Gemm"]
    same(model, graph, (3, 8, 8))


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


# ---- PyTorch
def test_a_module_becomes_onnx_and_is_left_as_it_was() -> None:
    torch = pytest.importorskip("torch")
    from isthmus.export.module import onnx_from_module

    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, padding="same"), torch.nn.BatchNorm2d(4), torch.nn.ReLU6(),
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 2),
    )  # fmt: skip
    module.train()
    module[1].eval()
    example = torch.randn(1, 3, 8, 8)
    model = onnx_from_module(module, example)
    assert module.training and module[0].training and not module[1].training
    prepared = prepare_float(model)
    assert operators(prepared) == ["Conv", "Clip", "GlobalAveragePool", "Reshape", "Gemm"]
    assert [value.name for value in prepared.graph.input] == ["input"] and [value.name for value in prepared.graph.output] == ["output"]
    session = onnxruntime.InferenceSession(prepared.SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"input": example.numpy()})[0], module.eval()(example).detach().numpy(), atol=1e-5)


def test_what_a_module_cannot_export_is_named() -> None:
    torch = pytest.importorskip("torch")
    from isthmus.export.module import onnx_from_module

    class Branch(torch.nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(IsthmusError, match=r"Branch cannot be exported: GuardOnDataDependentSymNode: .*no branches on tensor values"):
        onnx_from_module(Branch(), torch.ones(2))
    with pytest.raises(IsthmusError, match=r"example inputs: expected a tensor, or one tensor for each argument of forward\(\), found str"):
        onnx_from_module(Branch(), "input")


@pytest.fixture(scope="module")
def pt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch = pytest.importorskip("torch")
    path = tmp_path_factory.mktemp("pt2") / "model.pt2"
    module = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU())
    torch.export.save(torch.export.export(module.eval(), (torch.randn(2, 1, 6, 6),), dynamic_shapes=({0: torch.export.Dim("batch")},)), str(path))
    return path


def test_an_exported_program_becomes_onnx(pt2: Path) -> None:
    from isthmus.export.module import onnx_from_pt2

    notes: list[str] = []
    prepared = prepare_float(onnx_from_pt2(pt2), None, notes)
    assert operators(prepared) == ["Conv", "Relu"] and input_shape(prepared) == [1, 1, 6, 6] and len(notes) == 1


class Trap:
    """Unpickled, it would leave a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


def rewritten(pt2: Path, target: Path, change: Callable[[str, bytes], bytes], extra: dict[str, bytes] | None = None) -> Path:
    with zipfile.ZipFile(pt2) as source, zipfile.ZipFile(target, "w") as out:
        for info in source.infolist():
            out.writestr(info.filename, change(info.filename, source.read(info)))
        for name, data in (extra or {}).items():
            out.writestr(name, data)
    return target


def graph_edit(edit: Callable[[dict], None]) -> Callable[[str, bytes], bytes]:
    def change(name: str, data: bytes) -> bytes:
        if not name.endswith("models/model.json"):
            return data
        program = json.loads(data)
        edit(program)
        return json.dumps(program).encode()

    return change


def test_a_strangers_exported_program_runs_nothing(pt2: Path, tmp_path: Path) -> None:
    from isthmus.export.pt2 import load_pt2

    mark = tmp_path / "mark"
    trap = pickle.dumps(Trap(mark))
    code = f"__import__('pathlib').Path('{mark}').touch()"

    def pickled(name: str, data: bytes) -> bytes:
        return data.replace(b'"use_pickle": false', b'"use_pickle": true') if name.endswith("weights_config.json") else data

    def samples(name: str, data: bytes) -> bytes:
        return trap if "sample_inputs" in name else data

    def same_bytes(name: str, data: bytes) -> bytes:
        return data

    def operator(program: dict) -> None:
        program["graph_module"]["graph"]["nodes"][0]["target"] = "torch.hub.load"

    def size(program: dict) -> None:
        text = json.dumps(program).replace("Symbol(", f"{code} or Symbol(")
        program.clear()
        program.update(json.loads(text))

    def argument(program: dict) -> None:
        text = json.dumps(program).replace('"input"', json.dumps(f"x={code}"))
        program.clear()
        program.update(json.loads(text))

    def training(program: dict) -> None:
        program["graph_module"]["graph"]["nodes"][0]["inputs"].append({"name": "training", "arg": {"as_bool": True}, "kind": 1})

    attacks: list[tuple[Callable[[str, bytes], bytes], dict[str, bytes], str]] = [
        (pickled, {}, "is stored as a pickle, which could run code"),
        (samples, {}, "its sample inputs are more than tensors, which could run code"),
        (same_bytes, {"model/data/constants/opaque_obj_0": trap}, "holds data/constants/opaque_obj_0, which is no plain tensor or graph"),
        (same_bytes, {"model/data/aotinductor/model/a.so": b"\x7fELF"}, "holds data/aotinductor/model/a.so"),
        (graph_edit(operator), {}, "calls 'torch.hub.load', expected operators of torch.ops.aten only"),
        (graph_edit(size), {}, "a size in its graph is computed by"),
        (graph_edit(argument), {}, "in its graph is no plain name, and could run code"),
        (graph_edit(training), {}, r"is in training mode; call .eval\(\)"),
    ]
    for number, (change, extra, message) in enumerate(attacks):
        with pytest.raises(IsthmusError, match=message):
            load_pt2(rewritten(pt2, tmp_path / f"attack{number}.pt2", change, extra))
    assert not mark.exists()


def test_guards_of_an_exported_program_are_dropped(pt2: Path, tmp_path: Path) -> None:
    from isthmus.export.pt2 import load_pt2

    mark = tmp_path / "mark"
    changed = graph_edit(lambda program: program.update(guards_code=[f"__import__('pathlib').Path('{mark}').touch()"]))
    program = load_pt2(rewritten(pt2, tmp_path / "guards.pt2", changed))
    program.module()
    assert not mark.exists()


@pytest.mark.parametrize(("content", "message"), [(b"", "not a .pt2 archive"), (b"PK\x03\x04 no", "not a .pt2 archive"), (None, "no such file")])
def test_what_is_no_exported_program_is_one_sentence(content: bytes | None, message: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from isthmus.export.module import onnx_from_pt2

    path = tmp_path / "x.pt2"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(IsthmusError, match=message):
        onnx_from_pt2(path)


@settings(max_examples=40)
@given(cut=st.integers(0, 4000), flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 7)), max_size=4))
def test_a_damaged_exported_program_never_crashes(pt2: Path, tmp_path_factory: pytest.TempPathFactory, cut: int, flips: list[tuple[int, int]]) -> None:
    from isthmus.export.pt2 import load_pt2

    content = bytearray(pt2.read_bytes())
    for place, bit in flips:
        content[place % len(content)] ^= 1 << bit
    path = tmp_path_factory.mktemp("damaged") / "x.pt2"
    path.write_bytes(bytes(content[: len(content) - cut] if not flips else content))
    try:
        load_pt2(path)
    except IsthmusError:
        return
