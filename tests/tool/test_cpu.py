# SPDX-License-Identifier: Apache-2.0
"""Target `cpu` in ONNX Runtime: equal to the integer reference on every element, by integer kernels, with and without optimisation."""

from __future__ import annotations

import collections
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus import reference
from isthmus.errors import IsthmusError
from isthmus.form_writer import FormWriter
from isthmus.graph import QuantGraph
from isthmus.profile import load_profile
from isthmus.recipe import Recipe
from isthmus.runtimes.onnxruntime import OnnxRuntimeSession, open_session, session_options
from isthmus.targets.cpu import FLOAT_OPS, TARGET, tolerance

PROFILE = load_profile("cpu")
WORST = np.array([-128, 127], np.int8)


def entry_of(graph: QuantGraph, folder: Path, **options: Any) -> dict[str, Any]:
    """The artifact in `folder` and a manifest entry for it."""
    plan = TARGET.plan(graph, PROFILE, options)
    (folder / plan.artifact).write_bytes(plan.files[plan.artifact])
    borders = {"inputs": [spec.to_json() for spec in plan.inputs], "outputs": [spec.to_json() for spec in plan.outputs]}
    return {"artifact": plan.artifact, "engine": plan.engine, "options": dict(plan.options), **borders}


def opened(graph: QuantGraph, folder: Path, threads: int = 1, **options: Any) -> OnnxRuntimeSession:
    return open_session(folder, entry_of(graph, folder, **options), threads)


def feeds_of(graph: QuantGraph, values: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Raw inputs: all of int8, or only `values`."""
    choice = np.arange(-128, 128, dtype=np.int8) if values is None else values
    return {spec.name: np.random.choice(choice, spec.shape) for spec in graph.inputs}


def assert_exact(graph: QuantGraph, folder: Path, *feeds: dict[str, np.ndarray]) -> None:
    """Every int8 element equal, optimised (one thread and two) and not; float outputs to 1e-5: exp and sums differ in their last bits."""
    assert tolerance(graph, "all") == (0, "")
    for optimisation, threads in (("all", 1), ("all", 2), ("off", 1)):
        with opened(graph, folder, threads, optimisation=optimisation) as session:
            for fed in feeds or (feeds_of(graph), feeds_of(graph, WORST)):
                expected, actual = reference.run(graph, fed), session.run_quantised(fed)
                for spec in graph.outputs:
                    if spec.is_quantised:
                        np.testing.assert_array_equal(actual[spec.name], expected[spec.name], err_msg=f"{spec.name}, {optimisation}, {threads} threads")
                    else:
                        np.testing.assert_allclose(actual[spec.name], expected[spec.name], rtol=1e-5, atol=1e-6)


def operators(graph: QuantGraph, folder: Path) -> dict[str, int]:
    """What ONNX Runtime really runs, by operator."""
    options = session_options(1, "all")
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    ort.InferenceSession(TARGET.plan(graph, PROFILE, {}).files["model.onnx"], options, providers=["CPUExecutionProvider"])
    return dict(collections.Counter(node.op_type for node in onnx.load(folder / "optimised.onnx").graph.node))


def worst(*shape: int) -> np.ndarray:
    return np.random.choice(WORST, shape)


def anything(*shape: int) -> np.ndarray:
    return np.random.randint(-128, 128, shape).astype(np.int8)


def network(recipe: Recipe | None = None, step: Callable[[int], float] = lambda exponent: 2.0**exponent) -> QuantGraph:
    """A residual block, a depthwise layer, a join, a classifier with logits and probabilities."""
    w = FormWriter(recipe)
    x = w.input("image", (1, 3, 12, 12), scale=step(-4))
    y = w.conv(x, anything(8, 3, 3, 3), step(-8), np.arange(-400, 400, 100, dtype=np.int32), scale=step(-1), activation="Relu", pads=(1, 1, 1, 1))
    z = w.conv(y, anything(8, 8, 3, 3), step(-9), scale=step(0), pads=(1, 1, 1, 1))
    total = w.max_pool(w.add(y, z, scale=step(0), activation=("Clip", 0.0, 100.0)), (2, 2))
    d = w.conv(total, anything(8, 1, 3, 3), step(-9), scale=step(0), group=8, pads=(1, 1, 1, 1), activation="Relu")
    pooled = w.flatten(w.global_average_pool(w.concat([total, w.requantize(d, scale=step(0))], 1), scale=step(0)))
    logits = w.gemm(pooled, anything(10, 16), step(-7), np.arange(10, dtype=np.int32), scale=step(0))
    w.output(logits, "logits")
    w.softmax_output(logits, "probabilities")
    return w.graph()


def one(shape: tuple[int, ...], body: Callable[[FormWriter, str], str], scale: float = 2.0**-4) -> QuantGraph:
    w = FormWriter()
    w.output(body(w, w.input("x", shape, scale=scale)), "y")
    return w.graph()


EXTREME: dict[str, Callable[[], QuantGraph]] = {
    # Products of +-127 and -128 everywhere: uint8 x int8 kernels without VNNI add pairs of them in 16 bits and saturate.
    "conv": lambda: one((1, 64, 9, 9), lambda w, x: w.conv(x, worst(32, 64, 3, 3), 2.0**-7, scale=2.0**4, pads=(1, 1, 1, 1))),
    "conv_per_channel": lambda: one((1, 16, 9, 9), lambda w, x: w.conv(x, worst(4, 16, 3, 3), 2.0 ** -np.arange(5.0, 9.0), scale=2.0**3)),
    "conv_1x1": lambda: one((1, 64, 5, 5), lambda w, x: w.conv(x, worst(32, 64, 1, 1), 2.0**-7, scale=2.0, activation="Relu")),
    "conv_1d": lambda: one((1, 16, 25), lambda w, x: w.conv(x, worst(8, 16, 5), 2.0**-7, scale=2.0, strides=(2,), pads=(1, 3), dilations=(2,))),
    "depthwise": lambda: one((1, 16, 9, 9), lambda w, x: w.conv(x, worst(16, 1, 3, 3), 2.0**-7, scale=2.0, group=16, dilations=(2, 1))),
    "grouped": lambda: one((1, 8, 9, 9), lambda w, x: w.conv(x, worst(12, 4, 3, 3), 2.0**-7, scale=2.0, group=2, pads=(0, 1, 2, 1), strides=(2, 1))),
    "gemm": lambda: one((3, 512), lambda w, x: w.gemm(x, worst(17, 512), 2.0**-7, np.full(17, -999, np.int32), scale=2.0**3)),
    "matmul": lambda: one((1, 5, 256), lambda w, x: w.matmul(x, worst(256, 9), 2.0 ** -np.arange(5.0, 14.0), scale=2.0**2)),
}


@pytest.mark.parametrize("name", EXTREME)
def test_no_kernel_saturates_inside(name: str, tmp_path: Path) -> None:
    graph = EXTREME[name]()
    top, bottom = ({spec.name: np.full(spec.shape, value, np.int8) for spec in graph.inputs} for value in (127, -128))
    assert_exact(graph, tmp_path, feeds_of(graph), feeds_of(graph, WORST), top, bottom)


@pytest.mark.parametrize(("largest", "dtype"), [(64, np.int8), (-64, np.int8), (65, np.uint8), (-65, np.uint8)])
@pytest.mark.parametrize("layer", ["conv", "gemm"])
def test_small_weights_take_the_kernel_for_int8_and_stay_exact(layer: str, largest: int, dtype: type, tmp_path: Path) -> None:
    """Pairs of the largest products of one sign: what its sums of 16 bits just hold."""
    weight = np.full((8, 64, 3, 3) if layer == "conv" else (8, 512), largest, np.int8)
    weight[::2] = np.sign(largest)
    shape = (1, 64, 6, 6) if layer == "conv" else (3, 512)
    graph = one(shape, lambda w, x: w.conv(x, weight, 2.0**-7, scale=2.0**8) if layer == "conv" else w.gemm(x, weight, 2.0**-7, scale=2.0**8))
    file = onnx.load_from_string(TARGET.plan(graph, PROFILE, {}).files["model.onnx"])
    assert [onnx.numpy_helper.to_array(tensor).dtype for tensor in file.graph.initializer if tensor.name.endswith("_weight_steps")] == [dtype]
    top, bottom = ({spec.name: np.full(spec.shape, value, np.int8) for spec in graph.inputs} for value in (127, -128))
    assert_exact(graph, tmp_path, feeds_of(graph), feeds_of(graph, WORST), top, bottom)


def test_a_float_border_changes_no_number(tmp_path: Path) -> None:
    graph = one((1, 4, 6, 6), lambda w, x: w.conv(x, worst(8, 4, 3, 3), 2.0**-7, scale=2.0))
    feeds = feeds_of(graph)
    expected = reference.run(graph, feeds)
    with opened(graph, tmp_path, io="float32") as session:
        assert {spec.dtype for spec in (*session.inputs, *session.outputs)} == {"float32"}
        actual = session.run_quantised(feeds)
    assert {name: array.tolist() for name, array in actual.items()} == {name: array.tolist() for name, array in expected.items()}


@pytest.mark.parametrize("scales", [(0, 0, 1), (0, -1, 1), (-2, 0, 2), (-7, -4, -3)])
def test_every_sum_of_two_values_rounds_as_the_reference(scales: tuple[int, int, int], tmp_path: Path) -> None:
    w = FormWriter()
    a, b = (w.input(name, (1, 1, 256, 256), scale=2.0**exponent) for name, exponent in zip("ab", scales, strict=False))
    w.output(w.add(a, b, scale=2.0 ** scales[2]), "y")
    column, row = np.meshgrid(np.arange(-128, 128, dtype=np.int8), np.arange(-128, 128, dtype=np.int8))
    assert_exact(w.graph(), tmp_path, {"a": column[None, None].copy(), "b": row[None, None].copy()})


@pytest.mark.parametrize("cells", [2, 3, 7, 8, 14, 15, 49, 64])
@pytest.mark.parametrize("kind", ["global_average_pool", "average_pool"])
def test_every_tie_of_an_average_stays_a_tie(cells: int, kind: str, tmp_path: Path) -> None:
    """ONNX Runtime's own fused pools are one step off at some ties of 7, 14, 15, 49 cells."""
    for shift in (0, 1):
        twice = np.arange(-255, 254, 2)  # halves of a step, as odd numbers
        sums = (twice * cells // 2 ** (1 - shift)) if (cells % 2 == 0 or shift) else (twice * cells)
        scale = 2.0**-4 * (1 if cells % 2 == 0 and not shift else 2)
        sums = sums[np.abs(sums) <= 127 * cells]
        base, rest = np.divmod(sums, cells)
        x = (base[:, None] + (np.arange(cells) < rest[:, None])).astype(np.int8)[None, :, :, None]

        def pool(w: FormWriter, name: str, scale: float = scale) -> str:
            return w.global_average_pool(name, scale=scale) if kind == "global_average_pool" else w.average_pool(name, (cells, 1), scale=scale)

        assert_exact(one(x.shape, pool), tmp_path, {"x": x})


@pytest.mark.parametrize(
    "settings_",
    [
        {"kernel": (3, 3), "strides": (2, 2), "pads": (1, 1, 1, 1)},
        {"kernel": (3, 3), "strides": (2, 2), "pads": (1, 0, 1, 0), "count_include_pad": 1},
        {"kernel": (3, 2), "strides": (2, 2), "pads": (1, 1, 0, 0), "ceil_mode": 1},
        {"kernel": (2, 2), "strides": (2, 2), "pads": (0, 1, 0, 1), "ceil_mode": 1, "count_include_pad": 1},
    ],
)
def test_average_pools_count_the_same_cells(settings_: dict[str, Any], tmp_path: Path) -> None:
    assert_exact(one((1, 8, 11, 10), lambda w, x: w.average_pool(x, scale=2.0**-5, **settings_)), tmp_path)


def test_a_change_of_scale_keeps_its_rounding(tmp_path: Path) -> None:
    """Of two quantisers in a row ONNX Runtime would remove one."""

    def body(w: FormWriter, x: str) -> str:
        y = w.conv(x, anything(4, 3, 1, 1), 2.0**-7, scale=2.0**-2)
        y = w.requantize(w.requantize(y, scale=2.0), scale=2.0**-3)
        return w.conv(y, anything(4, 4, 1, 1), 2.0**-7, scale=2.0**-3)

    assert_exact(one((1, 3, 8, 8), body), tmp_path)


def test_a_network_runs_on_integer_kernels(tmp_path: Path) -> None:
    graph = network()
    assert_exact(graph, tmp_path)
    found = operators(graph, tmp_path)
    assert (found["QLinearConv"], found["QGemm"], found["QLinearAdd"], found["NhwcMaxPool"]) == (3, 1, 1, 1)
    assert not {"Conv", "FusedConv", "Gemm", "MatMul", "Add"} & set(found)


@pytest.mark.parametrize(
    ("name", "kernel"), [*((name, "QLinearConv") for name in EXTREME if name not in ("gemm", "matmul")), ("gemm", "QGemm"), ("matmul", "QLinearMatMul")]
)
def test_every_weighted_operator_is_fused(name: str, kernel: str, tmp_path: Path) -> None:
    found = operators(EXTREME[name](), tmp_path)
    assert found[kernel] == 1
    assert (found["DequantizeLinear"], found["QuantizeLinear"]) == (2, 2)  # the change to uint8 and back at the border, nothing else


def flattened(w: FormWriter, x: str, between: str, readers: str) -> str:
    y = w.conv(x, anything(6, 3, 3, 3), 2.0**-8, scale=2.0**-2, activation="Relu", pads=(1, 1, 1, 1))
    if between == "max pool, clip":
        y = w.clip(w.max_pool(y, (2, 2)), 0.5, 20.0)
    elif between == "transposed convolution":
        y = w.conv_transpose(y, anything(6, 4, 3, 3), 2.0**-8, scale=2.0**-1)
    flat = w.reshape(y, (2, -1)) if readers == "reshape" else w.flatten(y)
    size = w.graph().tensors[flat].shape[1]
    z = w.gemm(flat, anything(7, size), 2.0**-9, np.arange(7, dtype=np.int32), scale=2.0**2, activation="Relu")
    if readers != "two":
        return z
    return w.add(z, w.matmul(flat, anything(size, 7), 2.0 ** -np.arange(9.0, 16.0), scale=2.0**2), scale=2.0**2)


@pytest.mark.parametrize("between", ["", "max pool, clip", "transposed convolution"])
@pytest.mark.parametrize("readers", ["flatten", "reshape", "two"])
def test_an_image_is_flattened_as_it_lies_and_the_weights_move_instead(between: str, readers: str, tmp_path: Path) -> None:
    """Else ONNX Runtime's Transpose stands behind the last convolution, and what follows runs channels first."""
    graph = one((2, 3, 7, 5), lambda w, x: flattened(w, x, between, readers))
    assert_exact(graph, tmp_path)
    found = operators(graph, tmp_path)
    assert found.get("NhwcMaxPool", 0) == (between == "max pool, clip")
    if between != "transposed convolution":  # which has Transposes of its own
        assert found["Transpose"] == 1  # of the input


def test_a_flattened_image_that_something_else_reads_keeps_its_order(tmp_path: Path) -> None:
    def body(w: FormWriter, x: str) -> str:
        flat = w.flatten(w.conv(x, anything(6, 3, 3, 3), 2.0**-8, scale=2.0**-2))
        w.output(flat, "flat")
        return w.gemm(flat, anything(7, w.graph().tensors[flat].shape[1]), 2.0**-9, scale=2.0**2)

    assert_exact(one((2, 3, 7, 5), body), tmp_path)
    assert_exact(one((2, 3, 7, 5), lambda w, x: w.relu(w.flatten(w.conv(x, anything(6, 3, 3, 3), 2.0**-8, scale=2.0**-2)))), tmp_path)
    assert_exact(
        one((2, 3, 12), lambda w, x: w.gemm(w.flatten(w.conv(x, anything(6, 3, 3), 2.0**-8, scale=1.0)), anything(4, 60), 2.0**-9, scale=4.0)), tmp_path
    )


def test_duplicate_node_names_do_not_mix_up_constants(tmp_path: Path) -> None:
    model = onnx.load_from_string(network().to_bytes())
    islands = {"probabilities_softmax"}
    for node in model.graph.node:
        if node.name not in islands:
            node.name = "same"
    assert_exact(QuantGraph.from_model(model), tmp_path)


# ---- random graphs: what the fusions of a neighbourhood do to each other
def random_graph(seed: int) -> QuantGraph:
    r = np.random.default_rng(seed)
    w = FormWriter()
    shape = (int(r.integers(1, 9)), int(r.integers(4, 13)), int(r.integers(4, 13)))
    live = [(w.input("x", (1, *shape), scale=2.0**-4), shape, 2.0**-4)]
    for _ in range(int(r.integers(3, 11))):
        live.append(_random_step(w, r, live))
    tensor = live[-1][0]
    if seed % 2:
        pooled = w.flatten(w.global_average_pool(tensor, scale=2.0**-4))
        tensor = w.gemm(pooled, r.integers(-128, 128, (5, live[-1][1][0])).astype(np.int8), 2.0**-7, np.arange(5, dtype=np.int32), scale=2.0**-3)
        w.softmax_output(tensor, "probabilities")
    w.output(tensor, "y")
    w.output(live[len(live) // 2][0], "middle")
    return w.graph()


def _random_step(w: FormWriter, r: np.random.Generator, live: list[tuple[str, tuple[int, int, int], float]]) -> tuple[str, tuple[int, int, int], float]:
    tensor, (c, h, width), scale = live[int(r.integers(max(0, len(live) - 3), len(live)))]
    finer = 2.0 ** int(r.integers(-4, -1))
    activation = ("", "", "Relu", ("Clip", -3.0, 5.0))[int(r.integers(4))]
    alike = [other for other in live if other[1][1:] == (h, width)]
    other, (depth, _, _), other_scale = alike[int(r.integers(len(alike)))]
    match r.choice(["conv", "depthwise", "add", "max", "average", "relu", "clip", "concat", "requantize"]):
        case "conv" | "depthwise" as kind:
            k, out, group = min(int(r.choice([1, 3])), h, width), *((c, c) if kind == "depthwise" else (int(r.integers(1, 12)), 1))
            weight = r.integers(-128, 128, (out, c // group, k, k)).astype(np.int8)
            pads = [int(pad) for pad in r.integers(0, k, 4)]
            y = w.conv(tensor, weight, 2.0**-7, r.integers(-999, 999, out).astype(np.int32), scale=finer, activation=activation, pads=pads, group=group)
            return y, (out, h + pads[0] + pads[2] - k + 1, width + pads[1] + pads[3] - k + 1), finer
        case "add" if depth == c:
            return w.add(tensor, other, scale=finer, activation=activation), (c, h, width), finer
        case "max":
            return w.max_pool(tensor, (2, 2), (1, 1), (0, 1, 1, 0)), (c, h, width), scale
        case "average":
            k = min(int(r.integers(1, 4)), h, width)
            return w.average_pool(tensor, (k, k), (1, 1), scale=finer), (c, h - k + 1, width - k + 1), finer
        case "relu":
            return w.relu(tensor), (c, h, width), scale
        case "clip":
            return w.clip(tensor, -1.0, 3.0), (c, h, width), scale
        case "concat":
            same = other if other_scale == scale else w.requantize(other, scale=scale)
            return w.concat([tensor, same], 1), (c + depth, h, width), scale
    return w.requantize(tensor, scale=finer), (c, h, width), finer


@pytest.mark.parametrize("seed", range(40))
def test_random_graphs_are_exact(seed: int, tmp_path: Path) -> None:
    assert_exact(random_graph(seed), tmp_path)


# ---- float islands
def island(op: str) -> QuantGraph:
    attributes: dict[str, dict[str, Any]] = {
        **{key: {"axis": -1} for key in ("Softmax", "LogSoftmax", "LayerNormalization")},
        "Concat": {"axis": 1},
        "Transpose": {"perm": [0, 2, 1]},
        "Gelu": {"approximate": "tanh"},
        "Conv": {"kernel_shape": [3], "pads": [1, 1]},
        **{key: {"kernel_shape": [3], "strides": [2]} for key in ("MaxPool", "AveragePool")},
        "ConvTranspose": {"kernel_shape": [3, 3], "strides": [2, 2]},
        **{key: {"blocksize": 2} for key in ("DepthToSpace", "SpaceToDepth")},
        "Gather": {"axis": 1},
        "Resize": {"mode": "linear"},
    }
    w = FormWriter()
    images = ("ConvTranspose", "DepthToSpace", "SpaceToDepth", "GridSample", "Resize")
    shape = (1, 48) if op in ("Gemm", "Flatten") else (1, 1, 6, 8) if op == "Expand" else (1, 4, 6, 8) if op in images else (1, 6, 8)
    tensor = w.input("x", shape, scale=2.0**-5)
    value = w.dequantise(tensor)
    inputs = [value]
    if op in ("ArgMax", "Cast"):  # an index is a whole number: the border takes it through a Cast
        w.argmax_output(tensor, "y")
        return w.graph()
    if op == "Split":
        w.float_node(op, [value, w.constant("sizes", np.array([2, 4]))], ["y", "z"], "island", axis=1)
        w.float_output("y")
        w.float_output("z")
        return w.graph()
    if op == "GridSample":
        w.float_node("Tanh", [w.dequantise(w.input("grid", (1, 5, 3, 2), scale=2.0**-6))], ["places"], "places")
        inputs.append("places")
    if op in ("Log", "Sqrt", "Reciprocal", "Pow"):
        w.float_node("Exp", [value], ["positive"], "positive")
        inputs = ["positive"]
    elif op in ("Add", "Sub", "Mul", "Div", "Max", "Min", "Concat"):
        w.float_node("Sigmoid", [value], ["other"], "other")
        inputs.append("other")
    constants: dict[str, list[Any]] = {
        "Pow": [np.float32(0.5)],
        "Clip": [np.float32(-1), np.float32(2)],
        "Reshape": [np.array([1, 48])],
        **{key: [np.array([-1])] for key in ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin")},
        "PRelu": [np.linspace(0.1, 0.9, 6, dtype=np.float32).reshape(6, 1)],
        "Slice": [np.array([1]), np.array([5]), np.array([2]), np.array([2])],
        "Pad": [np.array([0, 1, 0, 0, 0, 2]), np.float32(0.5)],
        "Squeeze": [np.array([0])],
        "Unsqueeze": [np.array([1])],
        "Expand": [np.array([1, 3, 6, 8])],
        "Tile": [np.array([1, 2, 1])],
        "Gather": [np.array([3, 0])],
        "Resize": [np.array([], np.float32), np.array([], np.float32), np.array([1, 4, 12, 16])],
        "InstanceNormalization": [np.linspace(0.5, 1.5, 6, dtype=np.float32), np.ones(6, np.float32)],
        "BatchNormalization": [np.linspace(0.5, 1.5, 6, dtype=np.float32)] * 4,
        "ConvTranspose": [np.linspace(-1, 1, 72, dtype=np.float32).reshape(4, 2, 3, 3)],
        "LayerNormalization": [np.linspace(-1, 1, 8, dtype=np.float32), np.ones(8, np.float32)],
        "MatMul": [np.linspace(-1, 1, 40, dtype=np.float32).reshape(8, 5)],
        "Conv": [np.linspace(-1, 1, 90, dtype=np.float32).reshape(5, 6, 3), np.ones(5, np.float32)],
        "Gemm": [np.linspace(-1, 1, 240, dtype=np.float32).reshape(48, 5), np.ones(5, np.float32)],
    }
    inputs += [w.constant(f"c{index}", np.asarray(array)) for index, array in enumerate(constants.get(op, []))]
    w.float_node(op, inputs, ["y"], "island", **attributes.get(op, {}))
    w.float_output("y")
    return w.graph()


@pytest.mark.parametrize("op", sorted(FLOAT_OPS))
def test_every_float_island_of_the_table_runs(op: str, tmp_path: Path) -> None:
    graph = island(op)
    assert TARGET.check(graph, PROFILE) == []
    assert_exact(graph, tmp_path)


def test_an_island_between_integers_is_declared(tmp_path: Path) -> None:
    w = FormWriter()
    w.float_node("Sigmoid", [w.dequantise(w.input("x", (1, 8), scale=2.0**-4))], ["s"], "gate")
    w.output(w.quantise("s", scale=2.0**-7), "y")
    graph = w.graph()
    assert tolerance(graph, "all")[0] == 1 and "float island gate" in tolerance(graph, "all")[1]
    fed = feeds_of(graph)
    with opened(graph, tmp_path) as session:
        assert np.abs(session.run_quantised(fed)["y"].astype(int) - reference.run(graph, fed)["y"]).max() <= 1


def test_an_operator_outside_the_table_is_named() -> None:
    w = FormWriter()
    w.float_node("Sinh", [w.dequantise(w.input("x", (1, 8), scale=2.0**-4))], ["y"], "wave")
    w.float_output("y")
    (problem,) = TARGET.check(w.graph(), PROFILE)
    assert (problem.node, problem.rule) == ("wave", "operator")


# ---- tolerance and other schemes
@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
def test_other_schemes_stay_within_what_is_declared(scheme: str, tmp_path: Path) -> None:
    graph = network(Recipe(name=scheme, scheme=scheme), lambda exponent: float(np.float32(1.237 * 2.0**exponent)))
    allowed, why = tolerance(graph, "all")
    assert allowed == 2 and "float32" in why
    fed = feeds_of(graph)
    with opened(graph, tmp_path) as session:
        difference = session.run_quantised(fed)["logits"].astype(int) - reference.run(graph, fed)["logits"]
    assert np.abs(difference).max() <= allowed


def test_sums_beyond_float32_are_declared() -> None:
    def long(scale: float) -> QuantGraph:
        return one((1, 2048), lambda w, x: w.gemm(x, np.full((3, 2048), 127, np.int8), 2.0**-7, scale=scale, name="head"))

    assert tolerance(long(2.0**3), "all") == (0, "")  # a sum past 2^24 is saturated anyway
    assert tolerance(long(2.0**7), "all")[0] == 1 and "head" in tolerance(long(2.0**7), "all")[1]
    assert tolerance(long(2.0**3), "off")[0] == 1


# ---- border, session, bad input
def test_the_border_is_raw(tmp_path: Path) -> None:
    graph = network()
    entry = entry_of(graph, tmp_path)
    model = onnx.load(tmp_path / "model.onnx")
    assert [(value.name, value.type.tensor_type.elem_type) for value in (*model.graph.input, *model.graph.output)] == [
        ("image", onnx.TensorProto.INT8),
        ("logits", onnx.TensorProto.INT8),
        ("probabilities", onnx.TensorProto.FLOAT),
    ]
    assert [spec["dtype"] for spec in entry["outputs"]] == ["int8", "float32"]
    assert entry["inputs"][0]["scale"] == 2.0**-4


def test_equal_graphs_make_equal_plans() -> None:
    np.random.seed(1)
    first = TARGET.plan(network(), PROFILE, {})
    np.random.seed(1)
    assert TARGET.plan(network(), PROFILE, {}).digest() == first.digest()


def test_a_session_reads_and_writes_in_place(tmp_path: Path) -> None:
    graph = network()
    with opened(graph, tmp_path) as session:
        assert (session.engine, session.version) == ("onnxruntime", ort.__version__)
        fed = feeds_of(graph)
        first = session.run_raw(fed)["logits"]
        before = first.copy()
        fed["image"][:] = 127
        assert session.run_raw(fed)["logits"] is first
        assert not np.array_equal(first, before)
        np.testing.assert_array_equal(first, reference.run(graph, fed)["logits"])
        strided = np.asfortranarray(feeds_of(graph)["image"])
        for value in (strided, strided):
            value[0, 0, 0, 0] += 1
            np.testing.assert_array_equal(session.run_raw({"image": value})["logits"], reference.run(graph, {"image": value})["logits"])


def test_a_session_takes_real_numbers(tmp_path: Path) -> None:
    graph = network()
    fed = feeds_of(graph)
    with opened(graph, tmp_path) as session:
        real = session.run({"image": graph.inputs[0].dequantise(fed["image"])})
    np.testing.assert_array_equal(real["logits"], graph.outputs[0].dequantise(reference.run(graph, fed)["logits"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"artifact": "none.onnx"}, r"none\.onnx: no such file; compile the bundle again"),
        ({"options": {"optimisation": "some"}}, "optimisation 'some' of its manifest entry is not one of all, off"),
        ({"outputs": []}, r"its outputs are \[\('logits', 'int8', \[1, 10\]\).* but its manifest entry says \[\]"),
    ],
)
def test_an_entry_that_does_not_fit_is_one_sentence(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    entry = entry_of(network(), tmp_path)
    with pytest.raises(IsthmusError, match=message):
        open_session(tmp_path, entry | change)


def test_an_unknown_optimisation_is_refused() -> None:
    with pytest.raises(IsthmusError, match="option optimisation of target cpu: expected all or off, found 'fast'"):
        TARGET.plan(network(), PROFILE, {"optimisation": "fast"})
    with pytest.raises(IsthmusError, match="target cpu has no option 'threads'"):
        TARGET.plan(network(), PROFILE, {"threads": 2})


@settings(max_examples=60)
@given(data=st.data())
def test_a_damaged_file_is_one_sentence_or_a_model(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Cut short or with a byte changed: refused with a sentence naming the file, never another exception."""
    folder = tmp_path_factory.getbasetemp() / "damaged"
    folder.mkdir(exist_ok=True)
    np.random.seed(0)
    entry = entry_of(one((1, 4), lambda w, x: w.gemm(x, anything(3, 4), 2.0**-7, scale=1.0)), folder)
    content = bytearray((folder / "model.onnx").read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (folder / "model.onnx").write_bytes(content)
    try:
        open_session(folder, entry).close()
    except IsthmusError as error:
        assert "model.onnx: " in str(error) and "\n" not in str(error)
