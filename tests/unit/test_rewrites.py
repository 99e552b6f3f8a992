# SPDX-License-Identifier: Apache-2.0
"""Each exact rewrite: the same function before and after over random shapes and attributes, and the graph left alone where a precondition fails.

One file: all share the small networks, and the comparison with ONNX Runtime before and after, that its first part makes.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from isthmus.errors import ProblemsError
from isthmus.export import rewrites
from isthmus.export.check import check_equal
from isthmus.export.prepare import optimise, prepare_float, prepare_graph, rewrite_exactly
from isthmus.export.rewrites import EXACT_REWRITES, OFFERED_REWRITES, QDQ_REWRITES

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-5  # of the largest output: float32 sums in another order, and weights rounded once more
some = settings(max_examples=20, deadline=None)
np.random.seed(11)  # the global generator: hypothesis seeds it anew for each example, so that a failure can be repeated

Nodes = list[onnx.NodeProto]
Constants = dict[str, np.ndarray]


def weight(*shape: int) -> np.ndarray:
    return np.random.standard_normal(shape).astype(np.float32)


def node(op: str, inputs: str, outputs: str, **attributes: object) -> onnx.NodeProto:
    """Names separated by blanks; "-" for an input left out."""
    return helper.make_node(op, ["" if part == "-" else part for part in inputs.split()], outputs.split(), outputs.split()[0], **attributes)


def build(nodes: Nodes, constants: Constants, outputs: str = "y", **inputs: tuple[int, ...]) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs.split()],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def operators(model: onnx.ModelProto) -> list[str]:
    return [entry.op_type for entry in model.graph.node]


def attributes(model: onnx.ModelProto, op: str) -> dict[str, object]:
    found = next(entry for entry in model.graph.node if entry.op_type == op)
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in found.attribute}


def constant_of(model: onnx.ModelProto, op: str, position: int) -> np.ndarray:
    name = next(entry for entry in model.graph.node if entry.op_type == op).input[position]
    return next(numpy_helper.to_array(tensor) for tensor in model.graph.initializer if tensor.name == name)


def prepared(model: onnx.ModelProto, expected: Sequence[str] | None = None) -> onnx.ModelProto:
    """`model` by `prepare_float`, which runs every default rewrite; equal, of the operators `expected`."""
    result = prepare_float(model)
    check_equal(model, result, tolerance=TOLERANCE)
    assert expected is None or operators(result) == list(expected)
    return result


def normalised(model: onnx.ModelProto, expected: Sequence[str] | None = None) -> onnx.ModelProto:
    """`prepared`, and the offered rewrite of a normalisation in front of a padded Conv."""
    result = rewrite_exactly(prepared(model), [rewrites.NormalisationIntoConv, *rewrites.EXACT_REWRITES])
    check_equal(model, result, tolerance=TOLERANCE)
    assert expected is None or operators(result) == list(expected)
    return result


def by(rewrite: str, model: onnx.ModelProto, expected: Sequence[str] | None = None) -> onnx.ModelProto:
    """`model` after the one rewrite; equal, of the operators `expected`."""
    given_bytes = model.SerializeToString()
    result = rewrite_exactly(prepare_graph(model, None, []), [getattr(rewrites, rewrite)])
    check_equal(model, result, tolerance=TOLERANCE)
    assert model.SerializeToString() == given_bytes, "the argument is not changed"
    assert expected is None or operators(result) == list(expected)
    return result


def left_alone(rewrite: str, model: onnx.ModelProto) -> None:
    by(rewrite, model, operators(model))


def norm(channels: int) -> Constants:
    return {"gamma": weight(channels), "beta": weight(channels), "mean": weight(channels), "var": np.abs(weight(channels)) + 0.5}


BATCH_NORM = "gamma beta mean var"


# ---- BatchNormalization
@some
@given(layer=st.sampled_from(["Conv", "ConvTranspose", "Gemm", "MatMul"]), group=st.sampled_from([1, 2]), bias=st.booleans(), seed=st.integers(0, 99))
def test_batch_norm_behind_a_layer_goes_into_it(layer: str, group: int, bias: bool, seed: int) -> None:
    generator = np.random.default_rng(seed)
    shape = {"Conv": (6, 4 // group, 3, 3), "ConvTranspose": (4, 6 // group, 3, 3), "Gemm": (6, 4), "MatMul": (4, 6)}[layer]
    given_attributes = {"group": group} if "Conv" in layer else {"transB": 1} if layer == "Gemm" else {}
    constants = norm(6) | {"w": generator.standard_normal(shape).astype(np.float32), "b": weight(6)}
    inputs = "x w b" if bias and layer != "MatMul" else "x w"
    nodes = [node(layer, inputs, "c", **given_attributes), node("BatchNormalization", f"c {BATCH_NORM}", "y", epsilon=1e-3)]
    shape_in = (1, 4, 5, 6) if "Conv" in layer else (3, 4)
    model = build(nodes, constants, x=shape_in)
    prepared(model, [layer if layer != "MatMul" else "Gemm"])


@some
@given(st.sampled_from(["Conv", "ConvTranspose", "Gemm"]), st.sampled_from([1, 2]), st.booleans(), st.permutations(["Mul", "Add"]), st.integers(1, 2))
def test_a_factor_or_shift_behind_a_layer_goes_into_it(layer: str, group: int, bias: bool, order: list[str], count: int) -> None:
    shape = {"Conv": (6, 4 // group, 3, 3), "ConvTranspose": (4, 6 // group, 3, 3), "Gemm": (6, 4)}[layer]
    columns = (1, 6) if layer == "Gemm" else (1, 6, 1, 1)
    nodes, value = [node(layer, "x w b" if bias else "x w", "c", **({"transB": 1} if layer == "Gemm" else {"group": group}))], "c"
    for op in order[:count]:
        nodes.append(node(op, f"{value} k{op}", f"v{op}"))
        value = f"v{op}"
    nodes.append(node("Relu", value, "y"))
    held = {"w": weight(*shape), "b": weight(6), "kMul": weight(*columns), "kAdd": weight(*columns)}
    model = build(nodes, held, x=(3, 4) if layer == "Gemm" else (1, 4, 5, 6))
    result = rewrite_exactly(prepare_graph(model, None, []), [rewrites.GemmNormalForm, rewrites.AffineIntoLayer])
    check_equal(model, result, tolerance=TOLERANCE)
    assert operators(result) == [layer, "Relu"]


@pytest.mark.parametrize("reader", ["Conv", "Gemm"])
@pytest.mark.parametrize("bias", [False, True])
def test_batch_norm_in_front_of_a_layer_without_padding_goes_into_it(reader: str, bias: bool) -> None:
    held = {"w": weight(4, 6, 3, 3) if reader == "Conv" else weight(4, 6), "b": weight(4)}
    nodes = [
        node("Relu", "x", "r"),
        node("BatchNormalization", f"r {BATCH_NORM}", "n"),
        node(reader, "n w b" if bias else "n w", "y", **({"transB": 1} if reader == "Gemm" else {})),
    ]
    model = build(nodes, norm(6) | held, x=(1, 6, 5, 5) if reader == "Conv" else (2, 6))
    prepared(model, ["Relu", reader])


def test_batch_norm_in_front_of_padding_is_a_layer_of_its_own() -> None:
    nodes = [node("Relu", "x", "r"), node("BatchNormalization", f"r {BATCH_NORM}", "n"), node("Conv", "n w", "y", pads=[1, 1, 1, 1])]
    prepared(build(nodes, norm(6) | {"w": weight(4, 6, 3, 3)}, x=(1, 6, 5, 5)), ["Relu", "Conv", "Conv"])


def test_batch_norm_stays_where_another_reads_the_layer_or_its_parameters_are_computed() -> None:
    gemm = node("Gemm", "x w", "g", transB=1)
    shared = build([gemm, node("BatchNormalization", f"g {BATCH_NORM}", "y"), node("Relu", "g", "z")], norm(6) | {"w": weight(6, 4)}, "y z", x=(2, 4))
    left_alone("AffineIntoLayer", shared)
    computed = {name: array for name, array in norm(6).items() if name != "gamma"}
    nodes = [gemm, node("BatchNormalization", f"g {BATCH_NORM}", "y")]
    left_alone("AffineIntoLayer", build(nodes, computed | {"w": weight(6, 4)}, x=(2, 4), gamma=(6,)))


def test_batch_norm_in_training_mode_stays() -> None:
    normal = node("BatchNormalization", f"g {BATCH_NORM}", "y running_mean running_var", training_mode=1)
    model = build([node("Gemm", "x w", "g", transB=1), normal], norm(6) | {"w": weight(6, 4)}, x=(2, 4))
    result = rewrite_exactly(prepare_graph(model, None, []), [rewrites.AffineIntoLayer, rewrites.BatchNormToConv])
    assert operators(result) == operators(model)  # ONNX Runtime does not run it, so nothing to compare


# ---- BatchNormalization behind a ReLU
FRONT_WEIGHTS = {"Conv": (6, 2, 3, 3), "ConvTranspose": (4, 3, 3, 3), "Gemm": (6, 4)}


def positive_norm(channels: int) -> Constants:
    return norm(channels) | {"gamma": np.abs(weight(channels)) + np.float32(0.1)}


def relu_norm(front: str, bias: bool, pools: int = 0, pad: int = 0) -> Nodes:
    """Of x (2, 4, 9, 8) or (2, 4): a layer, ReLU, BatchNormalization, max pools; the last result is p0, p1, ..."""
    return [
        node(front, "x w b" if bias else "x w", "c", **({"transB": 1} if front == "Gemm" else {"group": 2})),
        node("Relu", "c", "r"),
        node("BatchNormalization", f"r {BATCH_NORM}", "p0"),
        *(node("MaxPool", f"p{count}", f"p{count + 1}", kernel_shape=[2, 2], strides=[2, 1], pads=[pad] * 4) for count in range(pools)),
    ]


@some
@given(st.sampled_from(["Conv", "ConvTranspose"]), st.booleans(), st.integers(0, 2), st.integers(0, 1))
def test_a_norm_behind_a_relu_goes_into_the_convs_on_both_sides(front: str, bias: bool, pools: int, pad: int) -> None:
    held = positive_norm(6) | {"w": weight(*FRONT_WEIGHTS[front]), "b": weight(6), "v": weight(3, 2, 1, 2)}
    model = build([*relu_norm(front, bias, pools, pad), node("Conv", f"p{pools} v", "y", group=3)], held, x=(2, 4, 9, 8))
    prepared(model, [front, "Relu", *["MaxPool"] * pools, "Conv"])


@pytest.mark.parametrize("flatten", ["Flatten", "Reshape", ""])
def test_a_norm_behind_a_relu_goes_into_a_dense_layer(flatten: str) -> None:
    front, columns = ("Conv", 6 * 3 * 5) if flatten else ("Gemm", 6)
    held = positive_norm(6) | {"w": weight(*FRONT_WEIGHTS[front]), "b": weight(6), "v": weight(5, columns), "s": np.array([2, -1])}
    flat = [node(flatten, "p1 s" if flatten == "Reshape" else "p1", "f")] if flatten else []
    model = build(
        [*relu_norm(front, True, len(flat)), *flat, node("Gemm", "f v" if flatten else "p0 v", "y", transB=1)], held, x=(2, 4, 9, 8) if flatten else (2, 4)
    )
    result = prepared(model, [front, "Relu", *(["MaxPool", flatten] if flatten else []), "Gemm"])
    if flatten:  # half of the factor, in the logarithm, went to either side
        factor = held["gamma"] / np.sqrt(held["var"] + np.float32(1e-5))
        np.testing.assert_allclose(constant_of(result, front, 1), held["w"] * np.sqrt(factor)[:, None, None, None], rtol=1e-5)
        np.testing.assert_allclose(constant_of(result, "Gemm", 1), held["v"] * np.repeat(np.sqrt(factor), 15), rtol=1e-5)


@pytest.mark.parametrize("case", ["negative", "zero", "padded", "read twice", "relu read twice", "output", "indices", "no flatten", "leaky", "computed weight"])
def test_any_other_norm_behind_a_relu_stays(case: str) -> None:
    held = positive_norm(6) | {"w": weight(*FRONT_WEIGHTS["Conv"]), "v": weight(3, 6, 2, 1), "s": np.array([2, 3, 6, 5])}
    nodes, outputs, inputs = relu_norm("Conv", False, 1), "y", {"x": (2, 4, 9, 8)}
    reader = node("Conv", "p1 v", "y", pads=[0, 0, 1, 0] if case == "padded" else [0] * 4)
    if case in ("negative", "zero"):
        held["gamma"][2] = -0.5 if case == "negative" else 0
    elif case == "read twice":
        nodes, outputs = [*nodes, node("Sigmoid", "p1", "z")], "y z"
    elif case == "relu read twice":
        nodes, outputs = [*nodes, node("Sigmoid", "r", "z")], "y z"
    elif case == "output":
        outputs = "y p0"
    elif case == "indices":
        nodes[-1] = node("MaxPool", "p0", "p1 i", kernel_shape=[2, 2], strides=[2, 1])
        nodes, outputs = [*nodes, node("Cast", "i", "z", to=TensorProto.FLOAT)], "y z"
    elif case == "no flatten":
        nodes, held["v"] = [*nodes, node("Reshape", "p1 s", "f")], weight(5, 3, 2, 1)
        reader = node("Conv", "f v", "y")
    elif case == "leaky":
        nodes[1] = node("LeakyRelu", "c", "r")
    elif case == "computed weight":
        inputs["w"] = held.pop("w").shape
    left_alone("NormBehindRelu", build([*nodes, reader], held, outputs, **inputs))


# ---- weights that are computed
@pytest.mark.parametrize(
    "rewrite", ["NormalisationIntoConv", "PoolBeforePointwise", "MergeSplitConvs", "DepthToSpaceAsDcr", "AffineIntoLayer", "ScaleIntoWeights"]
)
def test_a_computed_weight_stays(rewrite: str) -> None:
    pads = [1, 1, 1, 1] if rewrite == "NormalisationIntoConv" else [0, 0, 0, 0]
    conv = node("Conv", "n w" if rewrite in ("NormalisationIntoConv", "ScaleIntoWeights") else "x w", "c", pads=pads)
    nodes = {
        "NormalisationIntoConv": [node("Sub", "x m", "n"), conv, node("Relu", "c", "y")],
        "ScaleIntoWeights": [node("Mul", "x m", "n"), conv, node("Relu", "c", "y")],
        "PoolBeforePointwise": [conv, node("GlobalAveragePool", "c", "y")],
        "MergeSplitConvs": [conv, node("Conv", "x v", "d"), node("Add", "c d", "y")],
        "DepthToSpaceAsDcr": [conv, node("DepthToSpace", "c", "y", mode="CRD", blocksize=2)],
        "AffineIntoLayer": [conv, node("Mul", "c m", "y")],
    }[rewrite]
    left_alone(rewrite, build(nodes, {"m": weight(1), "v": weight(8, 3, 1, 1)}, x=(1, 3, 4, 4), w=(8, 3, 1, 1)))


# ---- grayscale
def repeat(how: str, copies: int, shape: tuple[int, ...], source: str = "x") -> tuple[onnx.NodeProto, Constants]:
    if how == "Concat":
        return node("Concat", " ".join([source] * copies), "c", axis=1), {}
    after = np.array([shape[0], copies * shape[1], *shape[2:]] if how == "Expand" else [1, copies, *[1] * (len(shape) - 2)])
    return node(how, f"{source} s", "c"), {"s": after}


@some
@given(st.sampled_from(["Concat", "Expand", "Tile"]), st.integers(2, 4), st.integers(1, 2), st.sampled_from([1, 2]), st.booleans(), st.integers(0, 1))
def test_a_grey_image_is_read_once(how: str, copies: int, channels: int, rank: int, bias: bool, pad: int) -> None:
    channels = 1 if how == "Expand" else channels
    shape = (2, channels, *[7, 6][:rank])
    make, constants = repeat(how, copies, shape)
    held = {"w": weight(5, copies * channels, *[3] * rank), "b": weight(5)} | constants
    model = build([make, node("Conv", "c w b" if bias else "c w", "y", pads=[pad] * (2 * rank))], held, x=shape)
    result = prepared(model, ["Conv"])
    assert constant_of(result, "Conv", 1).shape == (5, channels, *[3] * rank)


@pytest.mark.parametrize("case", ["groups", "several", "other_axis", "computed_weight"])
def test_what_is_no_plain_repeat_stays(case: str) -> None:
    shape, held, inputs = (1, 1, 6, 6), {"w": weight(3, 3, 3, 3)}, {"x": (1, 1, 6, 6)}
    make, conv = node("Concat", "x x x", "c", axis=1), node("Conv", "c w", "y")
    if case == "groups":
        conv, held = node("Conv", "c w", "y", group=3), {"w": weight(3, 1, 3, 3)}
    elif case == "several":
        make, inputs = node("Concat", "x x z", "c", axis=1), {"x": shape, "z": shape}
    elif case == "other_axis":
        make, held = node("Concat", "x x", "c", axis=2), {"w": weight(3, 1, 3, 3)}
    else:
        held, inputs = {}, {"x": shape, "w": (3, 3, 3, 3)}
    left_alone("GrayscaleIntoConv", build([make, conv], held, **inputs))


# ---- input normalisation
@some
@given(
    channels=st.integers(1, 4),
    alike=st.booleans(),
    pads=st.sampled_from([(0, 0, 0, 0), (1, 1, 1, 1), (0, 1, 2, 0)]),
    stride=st.integers(1, 2),
    grey=st.booleans(),
    spelling=st.permutations(["Mul", "Sub", "Div", "Add"]).flatmap(lambda ops: st.integers(1, 4).map(lambda count: ops[:count])),
    seed=st.integers(0, 99),
)
def test_input_normalisation_goes_into_the_first_conv(
    channels: int, alike: bool, pads: tuple[int, ...], stride: int, grey: bool, spelling: list[str], seed: int
) -> None:
    generator = np.random.default_rng(seed)
    grey = grey and channels > 1
    nodes, constants, value = [], {"w": generator.standard_normal((4, channels, 3, 3)).astype(np.float32), "b": weight(4)}, "x"
    if grey:
        nodes, value = [node("Concat", " ".join(["x"] * channels), "rgb", axis=1)], "rgb"
    for op in spelling:
        size = 1 if alike else channels
        constants[f"k{op}"] = generator.uniform(0.5, 2.0, (size, 1, 1)).astype(np.float32)
        nodes.append(node(op, f"{value} k{op}", f"v{op}"))
        value = f"v{op}"
    model = build([*nodes, node("Conv", f"{value} w b", "y", pads=pads, strides=[stride, stride])], constants, x=(1, 1 if grey else channels, 8, 7))
    result = normalised(model)
    assert not {"Mul", "Sub", "Div", "Add"} & set(operators(result))
    shifts = {"Sub", "Add"} & set(spelling)
    if not any(pads) or not shifts:
        assert operators(result) == ["Conv"]
    elif channels == 1 or alike:
        assert operators(result) == ["Pad", "Conv"]
    else:
        assert operators(result) == [*([] if grey else ["Split"]), *["Pad"] * channels, "Concat", "Conv"]


def test_the_pad_value_is_the_raw_value_of_zero() -> None:
    nodes = [node("Div", "x half", "d"), node("Sub", "d one", "n"), node("Conv", "n w", "y", pads=[1, 1, 1, 1])]
    constants = {"half": np.float32([127.5]), "one": np.float32([1]), "w": weight(4, 3, 3, 3)}
    result = normalised(build(nodes, constants, x=(1, 3, 6, 6)), ["Pad", "Conv"])
    assert constant_of(result, "Pad", 2) == 127.5


@pytest.mark.parametrize("case", ["not_an_input", "groups", "many_channels", "two_readers", "zero_factor", "computed_bias", "auto_pad"])
def test_what_is_no_input_normalisation_stays(case: str) -> None:
    channels = 5 if case == "many_channels" else 4
    held: Constants = {"k": weight(channels, 1, 1), "m": weight(channels, 1, 1), "w": weight(4, channels, 3, 3)}
    inputs: dict[str, tuple[int, ...]] = {"x": (1, channels, 6, 6)}
    nodes, outputs = [node("Mul", "x k", "s"), node("Sub", "s m", "n"), node("Conv", "n w", "y", pads=[1, 1, 1, 1])], "y"
    if case == "not_an_input":
        nodes.insert(0, node("Relu", "x", "r"))
        nodes[1].input[0] = "r"
    elif case == "groups":
        nodes[-1] = node("Conv", "n w", "y", pads=[1, 1, 1, 1], group=2)
        held["w"] = weight(4, 2, 3, 3)
    elif case == "two_readers":
        nodes.append(node("Relu", "n", "z"))
        outputs = "y z"
    elif case == "zero_factor":
        held["k"][1] = 0
    elif case == "computed_bias":
        nodes[-1].input.append("b")
        inputs["b"] = (4,)
    elif case == "auto_pad":
        nodes[-1] = node("Conv", "n w", "y", auto_pad="SAME_UPPER")
    left_alone("NormalisationIntoConv", build(nodes, held, outputs, **inputs))


# ---- single-token attention
def attention(batch: int, tokens: int, heads: int, size: int, *, merged: bool, biased: bool, keys: int | None = None) -> onnx.ModelProto:
    """Self-attention as PyTorch spells it; `merged`: one product for query, key and value, split by Transpose and Gather."""
    width, keys = heads * size, tokens if keys is None else keys
    held: Constants = {"wo": weight(width, 3), "bo": weight(3), "heads": np.array([batch, -1, heads, size]), "whole": np.array([batch, tokens, width])}
    if merged:
        held |= {"w": weight(width, 3 * width), "b": weight(3 * width), "parts": np.array([batch, tokens, 3, heads, size])}
        nodes = [node("MatMul", "x w", "p"), node("Add", "p b", "pb"), node("Reshape", "pb parts", "r"), node("Transpose", "r", "t", perm=[2, 0, 3, 1, 4])]
        for index, name in enumerate("qkv"):
            held[f"i{name}"] = np.array(index)
            nodes.append(node("Gather", f"t i{name}", f"{name}h", axis=0))
    else:
        nodes = []
        for name in "qkv":
            held |= {f"w{name}": weight(width, width), f"b{name}": weight(width)}
            source = "x" if name == "q" or keys == tokens else "z"
            last = f"{name}p"
            nodes.append(node("MatMul", f"{source} w{name}", last))
            if biased:
                nodes.append(node("Add", f"b{name} {last}", f"{name}b"))
                last = f"{name}b"
            nodes += [node("Reshape", f"{last} heads", f"{name}r"), node("Transpose", f"{name}r", f"{name}h", perm=[0, 2, 1, 3])]
    nodes += [
        node("Transpose", "kh", "kt", perm=[0, 1, 3, 2]), node("MatMul", "qh kt", "scores"), node("Softmax", "scores", "shares", axis=-1),
        node("MatMul", "shares vh", "mix"), node("Transpose", "mix", "back", perm=[0, 2, 1, 3]), node("Reshape", "back whole", "flat"),
        node("MatMul", "flat wo", "o"), node("Add", "o bo", "y"),
    ]  # fmt: skip
    inputs = {"x": (batch, tokens, width)} | ({} if keys == tokens else {"z": (batch, keys, width)})
    return build(nodes, held, **inputs)


@some
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.booleans(), st.booleans())
def test_attention_over_one_token_is_one_layer(batch: int, heads: int, size: int, merged: bool, biased: bool) -> None:
    result = prepared(attention(batch, 1, heads, size, merged=merged, biased=biased))
    assert [op for op in operators(result) if op != "Reshape"] == ["Gemm"]
    assert constant_of(result, "Gemm", 1).shape == (3, heads * size)


@pytest.mark.filterwarnings("ignore")  # of PyTorch's own exporter
def test_a_stack_of_single_token_attentions_is_as_many_layers() -> None:
    torch = pytest.importorskip("torch")
    layers = [torch.nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(2)]

    class Stack(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(layers)

        def forward(self, x):
            x = x.unsqueeze(1)
            for layer in self.layers:
                x = layer(x, x, x, need_weights=False)[0]
            return x.squeeze(1)

    file = io.BytesIO()
    torch.onnx.export(Stack().eval(), (torch.zeros(2, 8),), file, dynamo=False, opset_version=20)
    model = onnx.load_from_string(file.getvalue())
    assert set(operators(prepared(model))) <= {"Gemm", "Reshape"} and operators(prepared(model)).count("Gemm") == 2


def test_without_layers_around_it_the_values_are_the_result() -> None:
    nodes = [node("MatMul", "q k", "s"), node("Softmax", "s", "p"), node("MatMul", "p v", "y")]
    prepared(build([*nodes[:2], node("MatMul", "p v", "m"), node("Relu", "m", "y")], {}, q=(2, 1, 4), k=(2, 4, 1), v=(2, 1, 5)), ["Relu"])
    by("SingleTokenAttention", build(nodes, {}, q=(2, 1, 4), k=(2, 4, 1), v=(2, 1, 5)), ["Reshape"])


@pytest.mark.parametrize("case", ["two_tokens", "many_queries", "other_axis"])
def test_attention_over_several_stays(case: str) -> None:
    if case == "two_tokens":
        left_alone("SingleTokenAttention", attention(1, 2, 2, 3, merged=False, biased=True))
    elif case == "many_queries":
        left_alone("SingleTokenAttention", attention(1, 2, 2, 3, merged=False, biased=True, keys=1))
    else:
        nodes = [node("Softmax", "x", "p", axis=1), node("MatMul", "p v", "y")]
        left_alone("SingleTokenAttention", build(nodes, {"v": weight(2, 1, 5)}, x=(2, 1, 1)))


def test_rows_that_are_mixed_between_the_layers_stay_two_layers() -> None:
    model = attention(2, 1, 2, 3, merged=False, biased=True)
    swap = next(entry for entry in model.graph.node if entry.op_type == "Transpose" and entry.input[0] == "mix")
    swap.attribute[0].CopyFrom(helper.make_attribute("perm", [1, 0, 2, 3]))  # heads before samples: the second layer sees other rows
    assert sorted(op for op in operators(prepared(model)) if op in ("Gemm", "MatMul", "Softmax")) == ["MatMul", "MatMul"]


@some
@given(st.permutations(range(4)), st.tuples(*[st.sampled_from([1, 1, 2, 3])] * 4))
def test_reshapes_and_transposes_of_unit_axes_become_one(order: Sequence[int], shape: tuple[int, ...]) -> None:
    nodes = [node("Relu", "x", "a"), node("Reshape", "a s", "r"), node("Transpose", "r", "t", perm=order), node("Reshape", "t u", "f"), node("Relu", "f", "y")]
    size = int(np.prod(shape))
    result = by("ReshapeChain", build(nodes, {"s": np.array(shape), "u": np.array([1, size])}, x=(size,)))
    wide = [axis for axis in order if shape[axis] > 1]
    assert ("Transpose" in operators(result)) == (wide != sorted(wide))
    assert operators(result).count("Reshape") == (2 if wide != sorted(wide) else 1)


# ---- constants
def test_subgraphs_of_constants_are_folded() -> None:
    """Prototypes through a small network, normalised, used as the weights of the last layer."""
    nodes = [
        node("MatMul", "p a", "h"), node("Add", "h c", "hb"), node("Relu", "hb", "r"), node("ReduceL2", "r axes", "l"), node("Div", "r l", "n"),
        node("Transpose", "n", "t", perm=[1, 0]), node("Shape", "t", "s"), node("ConstantOfShape", "s", "z"), node("Sub", "t z", "u"),
        node("MatMul", "x u", "y"),
    ]  # fmt: skip
    held = {"p": weight(5, 6), "a": weight(6, 4), "c": np.abs(weight(4)) + 1, "axes": np.array([1])}
    result = prepared(build(nodes, held, x=(2, 4)), ["MatMul"])
    assert constant_of(result, "MatMul", 1).shape == (4, 5)
    random = build([node("RandomNormal", "", "n", shape=[4, 5]), node("MatMul", "x n", "y")], {}, x=(2, 4))
    assert "RandomNormal" in operators(prepare_float(random)), "drawn anew at every run: no constant"


# ---- bilinear
@some
@given(
    st.sampled_from([1, 2]), st.lists(st.sampled_from([1, 2, 4, 6, 8]), min_size=2, max_size=2), st.integers(2, 4),
    st.sampled_from(["half_pixel", "pytorch_half_pixel"]), st.booleans(),
)  # fmt: skip
def test_bilinear_by_an_even_factor_is_an_average_pool(rank: int, factors: list[int], extent: int, centres: str, by_sizes: bool) -> None:
    factors = factors[:rank]
    shape = (2, 3, *[factor * extent for factor in factors])
    held: Constants = {"sizes": np.array([2, 3, *[extent] * rank])} if by_sizes else {"scales": np.float32([1, 1, *[1 / factor for factor in factors]])}
    nodes = [node("Relu", "x", "r"), node("Resize", "r - - sizes" if by_sizes else "r - scales", "y", mode="linear", coordinate_transformation_mode=centres)]
    cut = ["Slice"] if any(factor > 2 for factor in factors) else []
    expected = ["Relu", *cut, "AveragePool"] if any(factor > 1 for factor in factors) else None
    by("BilinearToAveragePool", build(nodes, held, x=shape), expected)
    prepared(build(nodes, held, x=shape))


def test_one_pixel_of_a_half_pixel_resize() -> None:
    model = build([node("Resize", "x - s", "y", mode="linear")], {"s": np.float32([1, 1, 0.25, 0.25])}, x=(1, 2, 4, 4))
    prepared(model, ["Slice", "AveragePool"])


@pytest.mark.parametrize(
    ("scales", "size", "change"),
    [
        ([1, 1, 1 / 3, 1 / 3], 6, {}),
        ([1, 1, 0.5, 0.5], 7, {}),
        ([1, 1, 0.5, 1 / 3], 6, {}),
        ([1, 1, 2, 2], 4, {}),
        ([1, 0.5, 0.5, 0.5], 8, {}),
        ([1, 1, 0.51, 0.51], 4, {}),
        ([1, 1, 0.5, 0.5], 8, {"mode": "nearest"}),
        ([1, 1, 0.5, 0.5], 8, {"mode": "cubic"}),
        ([1, 1, 0.5, 0.5], 8, {"coordinate_transformation_mode": "align_corners"}),
        ([1, 1, 0.5, 0.5], 8, {"coordinate_transformation_mode": "asymmetric"}),
        ([1, 1, 0.5, 0.5], 8, {"antialias": 1}),
        ([1, 1, 0.25, 0.25], 4, {"coordinate_transformation_mode": "pytorch_half_pixel"}),
    ],
)
def test_any_other_resize_stays(scales: list[float], size: int, change: dict[str, object]) -> None:
    model = build([node("Resize", "x - s", "y", **({"mode": "linear"} | change))], {"s": np.float32(scales)}, x=(1, 2, size, size))
    assert operators(rewrite_exactly(prepare_graph(model, None, []), [rewrites.BilinearToAveragePool])) == ["Resize"]


def test_a_resize_that_keeps_the_aspect_ratio_stays() -> None:
    resize = node("Resize", "x - - s", "y", mode="linear", axes=[2, 3], keep_aspect_ratio_policy="not_larger")
    left_alone("BilinearToAveragePool", build([resize], {"s": np.array([4, 4])}, x=(1, 2, 8, 8)))


# ---- ceil-mode pools
@settings(max_examples=60, deadline=None)
@given(data=st.data(), op=st.sampled_from(["MaxPool", "AveragePool"]), rank=st.sampled_from([1, 2]), positive=st.booleans())
def test_a_ceil_pool_is_a_pad_and_a_plain_pool(data: st.DataObject, op: str, rank: int, positive: bool) -> None:
    def draw(low: int, high: int) -> list[int]:
        return data.draw(st.lists(st.integers(low, high), min_size=rank, max_size=rank))

    kernel, strides, dilations, space = draw(1, 3), draw(1, 3), draw(1, 2), draw(5, 9)
    pads = [data.draw(st.integers(0, extent - 1)) for extent in kernel * 2]
    given_attributes = {"kernel_shape": kernel, "strides": strides, "dilations": dilations, "pads": pads, "ceil_mode": 1}
    if op == "AveragePool":
        given_attributes["count_include_pad"] = int(data.draw(st.booleans()))
    nodes = [node("Relu" if positive else "Neg", "x", "r"), node(op, "r", "y", **given_attributes)]
    model = build(nodes, {}, x=(2, 3, *space))
    ends = [extent + pads[axis] + pads[axis + rank] - (kernel[axis] - 1) * dilations[axis] - 1 for axis, extent in enumerate(space)]
    starts = [-(-end // stride) * stride - pads[axis] for axis, (end, stride) in enumerate(zip(ends, strides, strict=True))]
    if any(start >= extent for start, extent in zip(starts, space, strict=True)):
        with pytest.raises(ProblemsError, match="padding alone"):  # onnx counts such a window, ONNX Runtime and PyTorch drop it
            prepare_graph(model, None, [])
        return
    result = by("CeilPoolToPad", model)
    assert operators(result)[1] == "Pad" and operators(result)[2] == op
    found = attributes(result, op)
    assert not found.get("ceil_mode", 0) and not any(found["pads"])  # type: ignore[arg-type]  # a list of ints
    assert constant_of(result, "Pad", 2) == (0 if positive or op == "AveragePool" else np.finfo(np.float32).min)


def test_a_ceil_pool_behind_a_relu_is_padded_with_zero() -> None:
    nodes = [
        node("Clip", "x low", "c"),
        node("MaxPool", "c", "m", kernel_shape=[1, 1]),
        node("MaxPool", "m", "y", kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1),
    ]
    result = by("CeilPoolToPad", build(nodes, {"low": np.float32(0)}, x=(1, 2, 7, 7)), ["Clip", "MaxPool", "Pad", "MaxPool"])
    assert constant_of(result, "Pad", 2) == 0
    assert constant_of(result, "Pad", 1).tolist() == [0, 0, 0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize("change", [{"ceil_mode": 0}, {"auto_pad": "SAME_UPPER"}, {"indices": True}])
def test_other_pools_stay(change: dict[str, object]) -> None:
    indices = "y i" if change.pop("indices", False) else "y"
    pool = node("MaxPool", "x", indices, **({"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1} | change))
    nodes = [pool, node("Cast", "i", "z", to=TensorProto.FLOAT)] if indices == "y i" else [pool]
    left_alone("CeilPoolToPad", build(nodes, {}, "y z" if indices == "y i" else "y", x=(1, 2, 7, 7)))


def test_a_pool_whose_last_window_is_all_padding_is_refused() -> None:
    pool = node("MaxPool", "x", "y", kernel_shape=[2], strides=[2], pads=[1, 1], ceil_mode=1)
    with pytest.raises(
        ProblemsError, match=r"y: with ceil_mode its window 4 along axis 2 starts 5 into an input of 5: it would see padding alone \[pool-window\]"
    ):
        prepare_graph(build([pool], {}, x=(1, 2, 5)), None, [])


# ---- the batch in front
@some
@given(heads=st.integers(1, 3), depth=st.integers(1, 3), batch=st.integers(1, 2), place=st.integers(-3, 2))
def test_one_of_three_in_front_is_picked_before(heads: int, depth: int, batch: int, place: int) -> None:
    """Queries, keys or values out of one layer."""
    nodes = [node("Transpose", "x", "t", perm=[2, 0, 3, 1, 4]), node("Gather", "t i", "y", axis=0)]
    result = by("BatchInFront", build(nodes, {"i": np.array(place)}, x=(batch, 5, 3, heads, depth)), ["Gather", "Transpose"])
    assert attributes(result, "Gather")["axis"] == 2 and attributes(result, "Transpose")["perm"] == [0, 2, 1, 3]


@pytest.mark.parametrize("batch", [1, 2])
def test_an_axis_of_one_comes_behind_the_batch(batch: int) -> None:
    expected = ["Transpose"] if batch == 1 else ["Transpose", "Reshape"]
    result = by("BatchInFront", build([node("Transpose", "x", "y", perm=[2, 0, 3, 1])], {}, x=(batch, 5, 1, 4)), expected)
    assert attributes(result, "Transpose")["perm"] == [0, 2, 3, 1]


@pytest.mark.parametrize("case", ["extent", "several", "axis", "order", "computed"])
def test_another_axis_in_front_stays(case: str) -> None:
    nodes, held, inputs = [node("Transpose", "x", "t", perm=[1, 0, 2]), node("Gather", "t i", "y", axis=0)], {"i": np.array(1)}, {"x": (2, 3, 4)}
    if case == "extent":
        nodes, held = [node("Transpose", "x", "y", perm=[1, 0, 2])], {}
    elif case == "several":
        held = {"i": np.array([1, 0])}
    elif case == "axis":
        nodes[1] = node("Gather", "t i", "y", axis=1)
    elif case == "order":
        nodes[0] = node("Transpose", "x", "t", perm=[0, 2, 1])
    else:
        nodes = [node("ReduceMax", "x", "m", keepdims=0), node("Cast", "m", "i", to=TensorProto.INT64), *nodes]
        held = {}
    left_alone("BatchInFront", build(nodes, held, **inputs))


# ---- functions spelled out (each spelling: test_export_operators.py)
@pytest.mark.parametrize("case", ["slope", "shift", "height", "two_values", "gate", "threshold", "half", "root"])
def test_a_function_that_is_nearly_another_stays(case: str) -> None:
    numbers = {"three": 3.0, "six": 6.0, "zero": 0.0, "half": 0.5, "one": 1.0, "root": 0.7, "seven": 7.0}
    swish = [node("Add", "x three", "a"), node("Clip", "a zero six", "b"), node("Mul", "x b", "c"), node("Div", "c six", "y")]
    gelu = [node("Mul", "x root", "a"), node("Erf", "a", "b"), node("Add", "b one", "c"), node("Mul", "c x", "d"), node("Mul", "d half", "y")]
    nodes = {
        "slope": [node("HardSigmoid", "x", "a", alpha=0.2), node("Mul", "x a", "y")],
        "shift": [node("Add", "x one", "a"), *swish[1:]],
        "height": [*swish[:3], node("Div", "c seven", "y")],
        "two_values": [node("Sigmoid", "x", "z"), swish[0], swish[1], node("Mul", "z b", "c"), swish[3]],
        "gate": [node("Softplus", "x", "a"), node("Tanh", "x", "b"), node("Mul", "a b", "y")],
        "threshold": [node("Softplus", "x", "a"), node("Greater", "x three", "b"), node("Where", "b x a", "y")],
        "half": [*gelu[:4], node("Mul", "d root", "y")],
        "root": gelu,
    }[case]
    left_alone("SpelledFunctions", build(nodes, {name: np.float32(value) for name, value in numbers.items()}, x=(1, 4)))


# ---- 1x1 Conv and pools
@some
@given(st.sampled_from(["AveragePool", "GlobalAveragePool", "Slice"]), st.booleans(), st.booleans(), st.sampled_from([1, 2]), st.integers(0, 1))
def test_a_pointwise_conv_moves_behind_a_pool(op: str, bias: bool, counts: bool, group: int, pad: int) -> None:
    held: Constants = {"w": weight(6, 4 // group, 1, 1), "b": weight(6)}
    given_attributes, extra = {}, ""
    if op == "AveragePool":
        given_attributes = {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [pad] * 4, "count_include_pad": int(counts)}
    elif op == "Slice":
        held, extra = held | {"s": np.array([1]), "e": np.array([5]), "a": np.array([-1])}, " s e a"
    model = build([node("Conv", "x w b" if bias else "x w", "c", group=group), node(op, f"c{extra}", "y", **given_attributes)], held, x=(1, 4, 8, 7))
    stays = op == "AveragePool" and bias and counts and pad
    by("PoolBeforePointwise", model, ["Conv", op] if stays else [op, "Conv"])


@pytest.mark.parametrize("case", ["max_pool", "kernel", "stride", "two_readers", "between", "channels", "conv_padding"])
def test_a_conv_that_does_not_commute_stays(case: str) -> None:
    held: Constants = {"w": weight(6, 4, *([3, 3] if case == "kernel" else [1, 1]))}
    change = {"stride": {"strides": [2, 2]}, "conv_padding": {"pads": [1, 1, 1, 1]}}.get(case, {})
    nodes = [node("Conv", "x w", "c", **change), node("MaxPool" if case == "max_pool" else "AveragePool", "c", "y", kernel_shape=[2, 2])]
    if case == "between":
        nodes[1:] = [node("Relu", "c", "r"), node("AveragePool", "r", "y", kernel_shape=[2, 2])]
    if case == "channels":
        nodes[1:], held = [node("Slice", "c s e a", "y")], held | {"s": np.array([1]), "e": np.array([5]), "a": np.array([1])}
    if case == "two_readers":
        nodes.append(node("Relu", "c", "z"))
    left_alone("PoolBeforePointwise", build(nodes, held, "y z" if case == "two_readers" else "y", x=(1, 4, 8, 8)))


def test_bilinear_then_pool_first() -> None:
    """As in a feature pyramid: the 1x1 Conv ends up at the small size, no Resize remains."""
    held = {"w": weight(6, 4, 1, 1), "b": weight(6), "s": np.float32([1, 1, 0.25, 0.25])}
    model = build([node("Conv", "x w b", "c"), node("Resize", "c - s", "y", mode="linear")], held, x=(1, 4, 16, 8))
    result = rewrite_exactly(prepare_float(model), [rewrites.PoolBeforePointwise])
    check_equal(model, result, tolerance=TOLERANCE)
    assert operators(result) == ["Slice", "AveragePool", "Conv"]


# ---- Conv over Concat
@some
@given(st.lists(st.integers(1, 3), min_size=2, max_size=4), st.booleans(), st.integers(0, 1), st.integers(1, 2), st.sampled_from([1, 2]))
def test_a_conv_over_a_concat_is_a_sum(parts: list[int], bias: bool, pad: int, stride: int, rank: int) -> None:
    names = [f"x{index}" for index in range(len(parts))]
    held = {"w": weight(4, sum(parts), *[3] * rank), "b": weight(4)}
    conv = node("Conv", "c w b" if bias else "c w", "y", pads=[pad] * (2 * rank), strides=[stride] * rank)
    model = build(
        [node("Concat", " ".join(names), "c", axis=1), conv], held, **{name: (1, count, *[6, 7][:rank]) for name, count in zip(names, parts, strict=True)}
    )
    result = by("SplitConvOverConcat", model)
    assert operators(result).count("Conv") == len(parts) and operators(result).count("Add") == len(parts) - 1 and "Concat" not in operators(result)
    again = rewrite_exactly(result, [rewrites.MergeSplitConvs, rewrites.ReshapeChain])
    check_equal(model, again, tolerance=TOLERANCE)
    assert operators(again).count("Conv") == 1 or len(parts) > 2


def test_the_constant_part_of_a_concat_becomes_a_constant_map() -> None:
    """Coordinate planes beside the image (CoordConv): once split, ONNX Runtime folds their Conv."""
    nodes = [node("Concat", "x planes", "c", axis=1), node("Conv", "c w", "y", pads=[1, 1, 1, 1])]
    model = build(nodes, {"planes": weight(1, 2, 5, 5), "w": weight(4, 5, 3, 3)}, x=(1, 3, 5, 5))
    result = optimise(by("SplitConvOverConcat", model))
    check_equal(model, result, tolerance=TOLERANCE)
    assert operators(result) == ["Conv", "Add"]


@pytest.mark.parametrize("case", ["groups", "two_readers", "other_axis", "computed_weight"])
def test_a_conv_over_another_concat_stays(case: str) -> None:
    held: Constants = {"w": weight(4, 4, 3, 3)}
    inputs: dict[str, tuple[int, ...]] = {"x": (1, 2, 6, 6), "z": (1, 2, 6, 6)}
    nodes, outputs = [node("Concat", "x z", "c", axis=1), node("Conv", "c w", "y")], "y"
    if case == "groups":
        nodes[1], held = node("Conv", "c w", "y", group=2), {"w": weight(4, 2, 3, 3)}
    elif case == "two_readers":
        nodes.append(node("Relu", "c", "r"))
        outputs = "y r"
    elif case == "other_axis":
        nodes[0], held = node("Concat", "x z", "c", axis=2), {"w": weight(4, 2, 3, 3)}
    else:
        held, inputs = {}, inputs | {"w": (4, 4, 3, 3)}
    left_alone("SplitConvOverConcat", build(nodes, held, outputs, **inputs))


@pytest.mark.parametrize("case", ["pads", "kernels", "groups", "broadcast", "two_readers", "same"])
def test_convs_that_cannot_be_joined_stay(case: str) -> None:
    held: Constants = {"v": weight(4, 2, 3, 3), "w": weight(4, 2, 3, 3)}
    inputs: dict[str, tuple[int, ...]] = {"x": (1, 2, 6, 6), "z": (1, 2, 6, 6)}
    first, second, outputs = node("Conv", "x v", "a"), node("Conv", "z w", "b"), "y"
    if case == "pads":
        first, inputs = node("Conv", "x v", "a", pads=[1, 1, 1, 1]), inputs | {"x": (1, 2, 4, 4)}
    elif case == "kernels":
        held, inputs = held | {"v": weight(4, 2, 1, 1)}, inputs | {"x": (1, 2, 4, 4)}
    elif case == "groups":
        first, second, held = node("Conv", "x v", "a", group=2), node("Conv", "z w", "b", group=2), {"v": weight(4, 1, 3, 3), "w": weight(4, 1, 3, 3)}
    elif case == "broadcast":
        inputs["x"] = (1, 2, 3, 3)
    nodes = [first, second, node("Add", "a b", "y")]
    if case == "two_readers":
        nodes.append(node("Relu", "a", "r"))
        outputs = "y r"
    elif case == "same":
        nodes, inputs = [first, node("Add", "a a", "y")], {"x": (1, 2, 6, 6)}
    left_alone("MergeSplitConvs", build(nodes, held, outputs, **inputs))


# ---- DepthToSpace
@some
@given(st.integers(1, 3), st.integers(2, 3), st.booleans(), st.lists(st.sampled_from(["Relu", "LeakyRelu", "Sigmoid", "Tanh"]), max_size=2))
def test_pixel_shuffle_becomes_dcr(channels: int, block: int, bias: bool, between: list[str]) -> None:
    held = {"w": weight(channels * block**2, 3, 3, 3), "b": weight(channels * block**2)}
    nodes, value = [node("Conv", "x w b" if bias else "x w", "c", pads=[1, 1, 1, 1])], "c"
    for index, op in enumerate(between):
        nodes.append(node(op, value, f"e{index}"))
        value = f"e{index}"
    nodes.append(node("DepthToSpace", value, "y", mode="CRD", blocksize=block))
    model = build(nodes, held, x=(1, 3, 4, 5))
    result = by("DepthToSpaceAsDcr", model, operators(model))
    assert attributes(result, "DepthToSpace")["mode"] == b"DCR"
    assert check_equal(model, result) == 0, "the same sums in another order of channels: to the bit"


def test_one_channel_needs_no_conv() -> None:
    result = by("DepthToSpaceAsDcr", build([node("DepthToSpace", "x", "y", mode="CRD", blocksize=2)], {}, x=(1, 4, 3, 3)))
    assert attributes(result, "DepthToSpace")["mode"] == b"DCR"


@pytest.mark.parametrize("case", ["no_conv", "groups", "two_readers", "slope", "dcr"])
def test_a_pixel_shuffle_whose_channels_cannot_move_stays(case: str) -> None:
    held, outputs = {"w": weight(8, 2, 3, 3), "k": weight(8, 1, 1)}, "y"
    conv, shuffle = node("Conv", "x w", "c"), node("DepthToSpace", "c", "y", mode="CRD", blocksize=2)
    nodes = [conv, shuffle]
    if case == "no_conv":
        nodes = [node("ConvTranspose", "x w", "c"), shuffle]
        held["w"] = weight(2, 8, 3, 3)
    elif case == "groups":
        nodes[0], held["w"] = node("Conv", "x w", "c", group=2), weight(8, 1, 3, 3)
    elif case == "two_readers":
        nodes.append(node("Relu", "c", "z"))
        outputs = "y z"
    elif case == "slope":
        nodes[1:] = [node("PRelu", "c k", "p"), node("DepthToSpace", "p", "y", mode="CRD", blocksize=2)]
    elif case == "dcr":
        nodes[1] = node("DepthToSpace", "c", "y", mode="DCR", blocksize=2)
    result = by("DepthToSpaceAsDcr", build(nodes, held, outputs, x=(1, 2, 5, 5)))
    assert attributes(result, "DepthToSpace")["mode"] == (b"DCR" if case == "dcr" else b"CRD")
    by("DepthToSpaceAsDcr", build(nodes, held, outputs, x=(1, 2, 5, 5)), [entry.op_type for entry in nodes])


# ---- GridSample
@settings(max_examples=60, deadline=None)
@given(
    mode=st.sampled_from(["linear", "nearest"]), padding=st.sampled_from(["zeros", "border", "reflection"]), corners=st.integers(0, 1), batch=st.integers(1, 2),
    space=st.tuples(st.integers(1, 6), st.integers(1, 6)), out=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    reach=st.sampled_from([0.9, 1.0, 1.7, 3.3]), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_a_fixed_grid_is_gathers(mode: str, padding: str, corners: int, batch: int, space: tuple, out: tuple, reach: float, seed: int) -> None:
    grid = np.random.default_rng(seed).uniform(-reach, reach, (1, *out, 2)).astype(np.float32).repeat(batch, axis=0)
    sample = node("GridSample", "x g", "y", mode=mode, padding_mode=padding, align_corners=corners)
    result = by("GridSampleToGathers", build([sample], {"g": grid}, x=(batch, 3, *space)))
    assert set(operators(result)) <= {"Reshape", "Gather", "Mul", "Add"} and operators(result).count("Gather") <= 4


def test_the_identity_grid_is_one_gather() -> None:
    rows, columns = np.meshgrid(np.linspace(-1, 1, 3), np.linspace(-1, 1, 5), indexing="ij")
    grid = np.stack([columns, rows], axis=-1)[None].astype(np.float32)
    sample = node("GridSample", "x g", "y", mode="nearest", align_corners=1)
    by("GridSampleToGathers", build([sample], {"g": grid}, x=(1, 2, 3, 5)), ["Reshape", "Gather", "Reshape"])


@pytest.mark.parametrize("case", ["computed", "cubic", "by_sample", "volume"])
def test_any_other_grid_stays(case: str) -> None:
    grid = np.float32(np.random.default_rng(0).uniform(-1, 1, (2, 3, 3, 2)))
    sample, held, inputs = node("GridSample", "x g", "y"), {"g": grid[:1].repeat(2, axis=0)}, {"x": (2, 2, 4, 4)}
    if case == "computed":
        held, inputs = {}, inputs | {"g": (2, 3, 3, 2)}
    elif case == "cubic":
        sample = node("GridSample", "x g", "y", mode="cubic")
    elif case == "by_sample":
        held = {"g": grid}
    else:
        held, inputs = {"g": weight(2, 2, 3, 3, 3)}, {"x": (2, 2, 4, 4, 4)}
    left_alone("GridSampleToGathers", build([sample], held, **inputs))


# ---- the lists
def test_no_list_is_in_another_and_the_document_has_every_rewrite() -> None:
    assert not set(EXACT_REWRITES) & set(OFFERED_REWRITES)
    assert set(QDQ_REWRITES) <= set(EXACT_REWRITES)
    text = (ROOT / "docs" / "rewrites.md").read_text(encoding="utf-8")
    default, offered = text.partition("## Offered")[::2]
    assert [rewrite.__name__ for rewrite in EXACT_REWRITES if f"`{rewrite.__name__}`" not in default] == []
    assert [rewrite.__name__ for rewrite in OFFERED_REWRITES if f"`{rewrite.__name__}`" not in offered] == []
