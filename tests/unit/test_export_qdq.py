# SPDX-License-Identifier: Apache-2.0
"""QDQ graphs of other writers in the form: every int8 value stays what it was, or a sentence says why there is no such form."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from isthmus import reference
from isthmus.errors import ProblemsError
from isthmus.export.prepare import prepare_float
from isthmus.export.to_graph import graph_from_qdq
from isthmus.graph import QuantGraph
from isthmus.onnx_file import load_onnx
from isthmus.recipe import Recipe

MODELS = sorted((Path(__file__).parents[1] / "models").glob("*.onnx"))
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


BN = {"gamma": weight(4), "beta": weight(4), "mean": weight(4), "var": np.abs(weight(4)) + 0.5}
CONV = {"w": weight(4, 3, 3, 3)}


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


# The rewrites for quantised graphs have one spelling for what changes shapes alone, and for means over all space axes.
OTHER_SPELLINGS = {
    "squeeze": {"Squeeze": ["Reshape"]},
    "unsqueeze": {"Unsqueeze": ["Reshape"]},
    "reduce_mean": {"ReduceMean": ["GlobalAveragePool", "Reshape"]},
}


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_a_form_without_its_metadata_comes_back_as_the_same_program(path: Path) -> None:
    model = load_onnx(path)
    own = QuantGraph.from_model(model)
    del model.metadata_props[:]
    graph = graph_from_qdq(model)
    assert [entry.op for entry in graph.nodes] == [spelled for entry in own.nodes for spelled in OTHER_SPELLINGS.get(path.stem, {}).get(entry.op, [entry.op])]
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


def clip_between_two_steps() -> Qdq:
    """0.3 is no whole step of the pool's result, and the quantiser behind the Clip is finer."""
    made = Qdq()
    conv = made.qdq(made.op("Conv", f"{made.qdq('x', 2**-5)} {made.weight('w', ints(4, 3, 1, 1))}", "c"), 2**-2)
    made.qdq(made.op("Clip", f"{conv} - {made.hold('most', np.float32(0.3))}", "r"), 2**-6, out="y")
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


def stored_operands() -> Qdq:
    """A constant behind its own quantiser, one that a power of two makes whole, one that none does."""
    made = Qdq()
    conv = made.qdq(made.op("Conv", f"{made.qdq('x', 2**-5)} {made.weight('w', ints(4, 3, 1, 1))}", "c"), 2**-2)
    moved = made.qdq(made.op("Add", f"{conv} {made.weight('shift', ints(4, 1, 1), 0.25)}", "a"), 2**-2)
    halved = made.qdq(made.op("Mul", f"{made.hold('half', np.float32(0.5))} {moved}", "m"), 2**-3)
    made.qdq(made.op("Mul", f"{halved} {made.hold('third', np.float32(1 / 3))}", "t"), 2**-3, out="y")
    return made


def stored_token() -> Qdq:
    """A Concat whose stored part has another scale than the result, which rounds it; a Pad by a number that is a whole step."""
    made = Qdq()
    x = made.qdq("x", 2**-4)
    joined = made.qdq(made.op("Concat", f"{made.weight('token', ints(1, 1, 4, 4), 2**-5)} {x}", "k", axis=1), 2**-4)
    padded = made.op("Pad", f"{joined} {made.hold('pads', np.array([0, 0, 1, 0, 0, 0, 0, 1]))} {made.hold('level', np.float32(0.5))}", "p")
    made.qdq(made.op("Conv", f"{padded} {made.weight('w', ints(2, 4, 3, 3))}", "c"), 2**-1, out="y")
    return made


def parts() -> Qdq:
    made = Qdq()
    conv = made.op("Conv", f"{made.qdq('x', 2**-5)} {made.weight('w', ints(6, 3, 1, 1))}", "c")
    made.nodes.append(node("Split", f"{conv} {made.hold('sizes', np.array([2, 4]))}", "p q", "split", axis=1))
    left, right = made.qdq("p", 2**-2), made.qdq("q", 2**-2)
    made.qdq(made.op("Concat", f"{right} {left}", "k", axis=1), 2**-2, out="y")
    return made


def functions() -> Qdq:
    """Silu and HardSwish in two operators each, Mish in three: with a quantiser behind the last they are one table."""
    made = Qdq()
    conv = made.qdq(made.op("Conv", f"{made.qdq('x', 2**-5)} {made.weight('w', ints(4, 3, 1, 1))}", "c"), 2**-4)
    silu = made.qdq(made.op("Mul", f"{made.op('Sigmoid', conv, 'gate')} {conv}", "s"), 2**-4)
    swish = made.qdq(made.op("Mul", f"{silu} {made.op('HardSigmoid', silu, 'hard', alpha=1 / 6)}", "h"), 2**-4)
    made.qdq(made.op("Mul", f"{swish} {made.op('Tanh', made.op('Softplus', swish, 'soft'), 'tanh')}", "t"), 2**-4, out="y")
    return made


def tokens() -> Qdq:
    """Linear layers on every token, with the weight as Brevitas writes it: transposed behind its DequantizeLinear."""
    made = Qdq()
    first = made.op("MatMul", f"{made.qdq('x', 2**-5)} {made.op('Transpose', made.weight('w', ints(5, 6)), 'wt', perm=[1, 0])}", "m")
    first = made.qdq(made.op("Add", f"{made.hold('b', (ints(5) * 2**-11).astype(np.float32))} {first}", "a"), 2**-2)
    made.qdq(made.op("MatMul", f"{first} {made.op('Transpose', made.weight('v', ints(3, 5)), 'vt')}", "n"), 2**-1, out="y")
    return made


def unusual_attributes() -> Qdq:
    """A volume's convolution and a cubic Resize are not in the form: float islands."""
    made = Qdq()
    conv = made.qdq(made.op("Conv", f"{made.qdq('x', 2**-5)} {made.weight('w', ints(4, 3, 1, 1))}", "c"), 2**-2)
    big = made.qdq(made.op("Resize", f"{conv} - {made.hold('scales', np.float32([1, 1, 2, 2]))}", "r", mode="cubic"), 2**-2)
    volume = made.op("Reshape", f"{big} {made.hold('shape', np.array([1, 4, 2, 4, 8]))}", "v")
    made.qdq(made.op("Conv", f"{volume} {made.weight('k', ints(2, 4, 1, 1, 1))}", "d"), 2**-1, out="y")
    return made


def transposed_convolution() -> Qdq:
    made = Qdq()
    names = [made.hold("w_int", ints(4, 2, 2, 2).astype(np.int8)), made.hold("w_s", np.float32([0.01, 0.02])), made.hold("w_z", np.zeros(2, np.int8))]
    made.op("DequantizeLinear", " ".join(names), "w", axis=1)
    made.op("ConvTranspose", f"{made.qdq('x', 0.03)} w {made.hold('b', np.float32([0.5, -0.25, 1, 2]))}", "c", strides=[2, 2], group=2)
    made.qdq("c", 0.11, out="y")
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
    "clip_between_two_steps": (clip_between_two_steps, (3, 4, 4), ["Conv", "Clip"], "power_of_two"),
    "small_bits": (small_bits, (3, 4, 4), ["Clip", "Conv", "Conv"], "asymmetric"),
    "unsigned": (unsigned, (6,), ["Gemm"], "asymmetric"),
    "matmul_bias": (matmul_bias, (6,), ["Gemm"], "power_of_two"),
    "islands": (islands, (3, 4, 4), ["Conv", "Sigmoid", "GlobalAveragePool", "Softmax"], "power_of_two"),
    "stored_operands": (stored_operands, (3, 4, 4), ["Conv", "Constant", "Add", "Constant", "Mul", "Mul"], "power_of_two"),
    "stored_token": (stored_token, (3, 4, 4), ["Constant", "Concat", "Pad", "Conv"], "power_of_two"),
    "parts": (parts, (3, 4, 4), ["Conv", "Split", "Concat"], "power_of_two"),
    "functions": (functions, (3, 4, 4), ["Conv", "Silu", "HardSwish", "Mish"], "power_of_two"),
    "tokens": (tokens, (4, 6), ["MatMul", "MatMul"], "power_of_two"),
    "unusual_attributes": (unusual_attributes, (3, 4, 4), ["Conv", "Resize", "Reshape", "Conv"], "power_of_two"),
    "transposed_convolution": (transposed_convolution, (4, 3, 3), ["ConvTranspose"], "symmetric"),
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
