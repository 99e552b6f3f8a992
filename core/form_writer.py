# SPDX-License-Identifier: Apache-2.0
"""`FormWriter`: builds a legal int8 form, operator by operator. What `export` and the tiny test models are written with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from isthmus.errors import IsthmusError
from isthmus.form import ISLANDS_KEY, RECIPE_KEY
from isthmus.graph import IR_VERSION, OPSET, QuantGraph
from isthmus.recipe import Recipe

Activation = str | tuple[str, float, float]


class FormWriter:
    """Every method takes and gives the name of an int8 tensor; `graph()` verifies and returns the `QuantGraph`.

    Scales are float32; shapes are inferred by onnx at the end, so a mistake shows there, named by node.
    """

    def __init__(self, recipe: Recipe | None = None) -> None:
        self.recipe = recipe or Recipe()
        self._nodes: list[onnx.NodeProto] = []
        self._initialisers: dict[str, onnx.TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._islands: list[str] = []
        self._quantisers: dict[str, tuple[str, str]] = {}  # int8 tensor -> names of its scale and zero point
        self._dequantised: dict[str, str] = {}
        self._taken: set[str] = set()

    # ---- border
    def input(self, name: str, shape: Sequence[int], *, scale: float, zero_point: int = 0) -> str:
        """A float32 graph input, quantised at once."""
        self._inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape)))
        return self.quantise(name, scale=scale, zero_point=zero_point, name=f"{name}_quantised")

    def float_input(self, name: str, shape: Sequence[int]) -> str:
        """A float32 graph input that is not quantised here (a float island reads it)."""
        self._inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape)))
        return name

    def output(self, tensor: str, name: str) -> None:
        """A float32 graph output: the int8 tensor, dequantised."""
        self._node("DequantizeLinear", [tensor, *self._quantisers[tensor]], [name], f"{name}_dequantise")
        self.float_output(name)

    def float_output(self, name: str) -> None:
        """A float tensor that some node already writes becomes a graph output."""
        self._outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))

    def softmax_output(self, tensor: str, name: str, axis: int = -1) -> None:
        """Dequantise and softmax: a float tail."""
        self.float_node("Softmax", [self.dequantise(tensor)], [name], f"{name}_softmax", axis=axis)
        self.float_output(name)

    def argmax_output(self, tensor: str, name: str, axis: int = 1) -> None:
        """The index of the largest value (the first one on a tie) as a float32 number: a float tail, as the border is float32."""
        self.float_node("ArgMax", [self.dequantise(tensor)], [f"{name}_index"], f"{name}_argmax", axis=axis, keepdims=0)
        self.float_node("Cast", [f"{name}_index"], [name], f"{name}_cast", to=TensorProto.FLOAT)
        self.float_output(name)

    def float_node(self, op: str, inputs: Sequence[str], outputs: Sequence[str], name: str | None = None, **attributes: Any) -> None:
        """A float island on float tensors (or constants made with `constant`)."""
        self._islands.append(self._node(op, list(inputs), list(outputs), name, **attributes))

    def constant(self, name: str, array: np.ndarray) -> str:
        """An initialiser."""
        self._initialisers[name] = numpy_helper.from_array(np.asarray(array, order="C"), name)  # ascontiguousarray would turn a scalar into a vector
        return name

    def constant_int8(self, name: str, values: np.ndarray, *, scale: float, zero_point: int = 0) -> str:
        """An int8 tensor that is a constant: an operand of Add, Sub, Mul, Concat or BatchMatMul. As many axes as the operator's result has."""
        tensor = self._fresh(name)
        self._quantisers[tensor] = self._step_constants(scale, zero_point)
        return self.constant(tensor, np.asarray(values, np.int8))

    # ---- int8 operators
    def conv(
        self, x: str, weight: np.ndarray, weight_scale: np.ndarray | float, bias: np.ndarray | None = None, *, scale: float, zero_point: int = 0,
        activation: Activation = "", strides: Sequence[int] | None = None, pads: Sequence[int] | None = None, dilations: Sequence[int] | None = None,
        group: int = 1, name: str | None = None,
    ) -> str:  # fmt: skip
        """weight int8 [out, in/group, *kernel]; bias int32 [out] at scale input x weight."""
        rank = weight.ndim - 2
        attributes = {
            "kernel_shape": list(weight.shape[2:]),
            "strides": list(strides or [1] * rank),
            "pads": list(pads or [0] * (2 * rank)),
            "dilations": list(dilations or [1] * rank),
            "group": group,
        }
        return self._weighted("Conv", x, weight, 0, weight_scale, bias, scale, zero_point, activation, name, attributes)

    def gemm(
        self, x: str, weight: np.ndarray, weight_scale: np.ndarray | float, bias: np.ndarray | None = None, *, scale: float, zero_point: int = 0,
        activation: Activation = "", name: str | None = None,
    ) -> str:  # fmt: skip
        """weight int8 [out, in]."""
        return self._weighted("Gemm", x, weight, 0, weight_scale, bias, scale, zero_point, activation, name, {"transB": 1})

    def matmul(
        self,
        x: str,
        weight: np.ndarray,
        weight_scale: np.ndarray | float,
        bias: np.ndarray | None = None,
        *,
        scale: float,
        zero_point: int = 0,
        activation: Activation = "",
        name: str | None = None,
    ) -> str:
        """weight int8 [in, out]; bias int32 [out], added by a node of its own: ONNX's MatMul has none."""
        return self._weighted("MatMul", x, weight, 1, weight_scale, bias, scale, zero_point, activation, name, {})

    def conv_transpose(
        self, x: str, weight: np.ndarray, weight_scale: np.ndarray | float, bias: np.ndarray | None = None, *, scale: float, zero_point: int = 0,
        activation: Activation = "", strides: Sequence[int] | None = None, pads: Sequence[int] | None = None, dilations: Sequence[int] | None = None,
        output_padding: Sequence[int] | None = None, group: int = 1, name: str | None = None,
    ) -> str:  # fmt: skip
        """weight int8 [in, out/group, *kernel] with one scale, or one an entry of axis 1; bias int32 [out]."""
        rank = weight.ndim - 2
        attributes = {
            "kernel_shape": list(weight.shape[2:]),
            "strides": list(strides or [1] * rank),
            "pads": list(pads or [0] * (2 * rank)),
            "dilations": list(dilations or [1] * rank),
            "output_padding": list(output_padding or [0] * rank),
            "group": group,
        }
        return self._weighted("ConvTranspose", x, weight, 1, weight_scale, bias, scale, zero_point, activation, name, attributes, group)

    def batch_matmul(self, a: str, b: str, *, scale: float, zero_point: int = 0, activation: Activation = "", name: str | None = None) -> str:
        """MatMul of two int8 tensors (N, ..., R, K) and (N, ..., K, M)."""
        return self._two("MatMul", a, b, scale, zero_point, activation, name or "batch_matmul")

    def add(self, a: str, b: str, *, scale: float, zero_point: int = 0, activation: Activation = "", name: str | None = None) -> str:
        return self._two("Add", a, b, scale, zero_point, activation, name)

    def sub(self, a: str, b: str, *, scale: float, zero_point: int = 0, activation: Activation = "", name: str | None = None) -> str:
        return self._two("Sub", a, b, scale, zero_point, activation, name)

    def mul(self, a: str, b: str, *, scale: float, zero_point: int = 0, activation: Activation = "", name: str | None = None) -> str:
        return self._two("Mul", a, b, scale, zero_point, activation, name)

    def reduce_mean(self, x: str, axes: Sequence[int], keepdims: bool = True, *, scale: float, zero_point: int = 0, name: str | None = None) -> str:
        inputs = [self.dequantise(x), self._whole_numbers("axes", axes)]
        return self._group("ReduceMean", inputs, scale, zero_point, "", self._fresh(name or "reducemean"), {"keepdims": int(keepdims)})

    def resize_linear(
        self, x: str, sizes: Sequence[int], transform: str = "half_pixel", *, scale: float, zero_point: int = 0, name: str | None = None
    ) -> str:  # fmt: skip
        """Bilinear (linear in 1-D) to `sizes`, the whole output shape."""
        inputs = [self.dequantise(x), "", "", self._whole_numbers("sizes", sizes)]
        attributes = {"mode": "linear", "coordinate_transformation_mode": transform}
        return self._group("Resize", inputs, scale, zero_point, "", self._fresh(name or "resize"), attributes)

    def function(self, op: str, x: str, *, scale: float, zero_point: int = 0, name: str | None = None, **attributes: Any) -> str:
        """A function of one number: Sigmoid, Tanh, LeakyRelu (alpha=), HardSigmoid (alpha=, beta=), HardSwish, Mish, Gelu (approximate=), Softplus, Elu."""
        return self._group(op, [self.dequantise(x)], scale, zero_point, "", self._fresh(name or op.lower()), attributes)

    def p_relu(self, x: str, slope: np.ndarray, *, scale: float, zero_point: int = 0, name: str | None = None) -> str:
        """slope float32: one number, or [channels, 1, ...]."""
        inputs = [self.dequantise(x), self.constant(self._fresh("slope"), np.asarray(slope, np.float32))]
        return self._group("PRelu", inputs, scale, zero_point, "", self._fresh(name or "prelu"), {})

    def silu(self, x: str, *, scale: float, zero_point: int = 0, name: str | None = None) -> str:
        """x * Sigmoid(x), with one quantiser behind both."""
        name, value = self._fresh(name or "silu"), self.dequantise(x)
        self._node("Sigmoid", [value], [f"{name}_gate"], f"{name}_sigmoid")
        return self._group("Mul", [value, f"{name}_gate"], scale, zero_point, "", name, {})

    def max_pool(
        self, x: str, kernel: Sequence[int], strides: Sequence[int] | None = None, pads: Sequence[int] | None = None, ceil_mode: int = 0,
        dilations: Sequence[int] | None = None, name: str | None = None,
    ) -> str:  # fmt: skip
        attributes = self._pool(kernel, strides, pads, ceil_mode) | {"dilations": list(dilations or [1] * len(kernel))}
        return self._same_scale("MaxPool", [x], [], name, attributes)

    def average_pool(
        self, x: str, kernel: Sequence[int], strides: Sequence[int] | None = None, pads: Sequence[int] | None = None, ceil_mode: int = 0,
        count_include_pad: int = 0, *, scale: float, zero_point: int = 0, name: str | None = None,
    ) -> str:  # fmt: skip
        attributes = self._pool(kernel, strides, pads, ceil_mode) | {"count_include_pad": count_include_pad}
        return self._group("AveragePool", [self.dequantise(x)], scale, zero_point, "", self._fresh(name or "averagepool"), attributes)

    def global_average_pool(self, x: str, *, scale: float, zero_point: int = 0, name: str | None = None) -> str:
        return self._group("GlobalAveragePool", [self.dequantise(x)], scale, zero_point, "", self._fresh(name or "globalaveragepool"), {})

    def relu(self, x: str, name: str | None = None) -> str:
        return self._same_scale("Relu", [x], [], name, {})

    def clip(self, x: str, low: float | None, high: float | None, name: str | None = None) -> str:
        return self._same_scale("Clip", [x], self._clip_bounds(low, high), name, {})

    def flatten(self, x: str, axis: int = 1, name: str | None = None) -> str:
        return self._same_scale("Flatten", [x], [], name, {"axis": axis})

    def reshape(self, x: str, shape: Sequence[int], name: str | None = None) -> str:
        return self._same_scale("Reshape", [x], [self._whole_numbers("shape", shape)], name, {})

    def concat(self, tensors: Sequence[str], axis: int, name: str | None = None) -> str:
        return self._same_scale("Concat", tensors, [], name, {"axis": axis})

    def split(self, x: str, sizes: Sequence[int], axis: int = 1, name: str | None = None) -> list[str]:
        """The parts, in order."""
        name, (scale, zero) = self._fresh(name or "split"), self._step(x)
        parts = [f"{name}_out{index}" for index in range(len(sizes))]
        self._node("Split", [self.dequantise(x), self._whole_numbers("sizes", sizes)], parts, name, axis=axis)
        return [self.quantise(part, scale=scale, zero_point=zero, name=f"{part}_q") for part in parts]

    def slice(
        self, x: str, starts: Sequence[int], ends: Sequence[int], axes: Sequence[int], steps: Sequence[int] | None = None, name: str | None = None
    ) -> str:
        bounds = {"starts": starts, "ends": ends, "axes": axes, "steps": steps or [1] * len(starts)}
        return self._same_scale("Slice", [x], [self._whole_numbers(part, values) for part, values in bounds.items()], name, {})

    def pad(self, x: str, pads: Sequence[int], value: float | None = None, name: str | None = None) -> str:
        """`pads` in ONNX order, for every axis; None pads with zero."""
        extra = [self._whole_numbers("pads", pads)]
        if value is not None:
            extra.append(self.constant(self._fresh("value"), np.array(value, np.float32)))
        return self._same_scale("Pad", [x], extra, name, {"mode": "constant"})

    def transpose(self, x: str, order: Sequence[int], name: str | None = None) -> str:
        return self._same_scale("Transpose", [x], [], name, {"perm": list(order)})

    def squeeze(self, x: str, axes: Sequence[int], name: str | None = None) -> str:
        return self._same_scale("Squeeze", [x], [self._whole_numbers("axes", axes)], name, {})

    def unsqueeze(self, x: str, axes: Sequence[int], name: str | None = None) -> str:
        return self._same_scale("Unsqueeze", [x], [self._whole_numbers("axes", axes)], name, {})

    def expand(self, x: str, shape: Sequence[int], name: str | None = None) -> str:
        return self._same_scale("Expand", [x], [self._whole_numbers("shape", shape)], name, {})

    def depth_to_space(self, x: str, block: int, mode: str = "DCR", name: str | None = None) -> str:
        return self._same_scale("DepthToSpace", [x], [], name, {"blocksize": block, "mode": mode})

    def space_to_depth(self, x: str, block: int, name: str | None = None) -> str:
        return self._same_scale("SpaceToDepth", [x], [], name, {"blocksize": block})

    def gather(self, x: str, indices: np.ndarray | Sequence[int], axis: int, name: str | None = None) -> str:
        return self._same_scale("Gather", [x], [self._whole_numbers("indices", indices)], name, {"axis": axis})

    def resize_nearest(self, x: str, sizes: Sequence[int], transform: str = "asymmetric", nearest_mode: str = "floor", name: str | None = None) -> str:
        """To `sizes`, the whole output shape."""
        attributes = {"mode": "nearest", "coordinate_transformation_mode": transform, "nearest_mode": nearest_mode}
        return self._same_scale("Resize", [x], ["", "", self._whole_numbers("sizes", sizes)], name, attributes)

    def requantize(self, x: str, *, scale: float, zero_point: int = 0, name: str | None = None) -> str:
        return self.quantise(self.dequantise(x), scale=scale, zero_point=zero_point, name=name)

    # ---- quantisers
    def quantise(self, value: str, *, scale: float, zero_point: int = 0, name: str | None = None) -> str:
        """QuantizeLinear of a float value."""
        pair, tensor = self._step_constants(scale, zero_point), self._fresh(name or f"{value}_q")
        self._node("QuantizeLinear", [value, *pair], [tensor], f"{tensor}_quantise")
        self._quantisers[tensor] = pair
        return tensor

    def dequantise(self, tensor: str) -> str:
        """The float value that stands for an int8 tensor: one DequantizeLinear, shared by its readers."""
        if tensor not in self._quantisers:
            raise IsthmusError(f"{tensor!r} is not an int8 tensor of this form: there are {sorted(self._quantisers)}")
        if tensor not in self._dequantised:
            value = self._fresh(f"{tensor}_real")
            self._node("DequantizeLinear", [tensor, *self._quantisers[tensor]], [value], f"{tensor}_dequantise")
            self._dequantised[tensor] = value
        return self._dequantised[tensor]

    def graph(self) -> QuantGraph:
        """The finished graph, verified. Raises `ProblemsError` where it breaks a rule."""
        return QuantGraph.from_model(self.model())

    def model(self) -> onnx.ModelProto:
        """The ONNX model, not verified."""
        graph = helper.make_graph(self._nodes, "isthmus", self._inputs, self._outputs, list(self._initialisers.values()))
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="isthmus")
        helper.set_model_props(model, {RECIPE_KEY: self.recipe.to_json(), ISLANDS_KEY: json.dumps(self._islands)})
        return onnx.shape_inference.infer_shapes(model, data_prop=True)

    # ---- parts
    def _weighted(
        self, op: str, x: str, weight: np.ndarray, axis: int, weight_scale: np.ndarray | float, bias: np.ndarray | None, scale: float, zero_point: int,
        activation: Activation, name: str | None, attributes: dict[str, Any], group: int = 1,
    ) -> str:  # fmt: skip
        name = self._fresh(name or op.lower())
        steps = np.asarray(weight_scale, np.float32)
        steps = steps.reshape(()) if steps.size == 1 else steps.reshape(-1)
        inputs = [self.dequantise(x), self._constant_real(f"{name}_weight", np.asarray(weight, np.int8), steps, axis)]
        if bias is not None:
            input_scale = numpy_helper.to_array(self._initialisers[self._quantisers[x][0]])
            outputs = np.tile(steps, group) if steps.ndim and op == "ConvTranspose" else steps
            inputs.append(self._constant_real(f"{name}_bias", np.asarray(bias, np.int32), (input_scale * outputs).astype(np.float32), 0))
        return self._group(op, inputs, scale, zero_point, activation, name, attributes)

    def _constant_real(self, name: str, values: np.ndarray, scale: np.ndarray, axis: int) -> str:
        parts = [
            self.constant(f"{name}_int", values),
            self.constant(f"{name}_scale", scale),
            self.constant(f"{name}_zero", np.zeros(scale.shape, values.dtype)),
        ]
        attributes = {"axis": axis} if scale.ndim else {}
        self._node("DequantizeLinear", parts, [name], f"{name}_dequantise", **attributes)
        return name

    def _group(self, op: str, inputs: Sequence[str], scale: float, zero_point: int, activation: Activation, name: str, attributes: dict[str, Any]) -> str:
        """One int8 group; `name` is already reserved."""
        value, bias = f"{name}_out", list(inputs[2:]) if op == "MatMul" else []
        self._node(op, list(inputs[:2]) if bias else list(inputs), [value], name, **attributes)
        if bias:
            self._node("Add", [value, *bias], [f"{name}_biased"], f"{name}_add")
            value = f"{name}_biased"
        if activation:
            kind, *bounds = (activation,) if isinstance(activation, str) else activation
            extra = self._clip_bounds(float(bounds[0]), float(bounds[1])) if bounds else []
            self._node(kind, [value, *extra], [f"{name}_active"], f"{name}_{kind.lower()}")
            value = f"{name}_active"
        return self.quantise(value, scale=scale, zero_point=zero_point, name=f"{name}_q")

    def _same_scale(self, op: str, tensors: Sequence[str], extra: Sequence[str], name: str | None, attributes: dict[str, Any]) -> str:
        scale, zero = self._step(tensors[0])
        return self._group(op, [*(self.dequantise(tensor) for tensor in tensors), *extra], scale, zero, "", self._fresh(name or op.lower()), attributes)

    def _two(self, op: str, a: str, b: str, scale: float, zero_point: int, activation: Activation, name: str | None) -> str:
        return self._group(op, [self.dequantise(a), self.dequantise(b)], scale, zero_point, activation, self._fresh(name or op.lower()), {})

    def _step_constants(self, scale: float, zero_point: int) -> tuple[str, str]:
        return self.constant(self._fresh("scale"), np.array(scale, np.float32)), self.constant(self._fresh("zero"), np.array(zero_point, np.int8))

    def _step(self, tensor: str) -> tuple[float, int]:
        """Scale and zero point of an int8 tensor."""
        scale, zero = (numpy_helper.to_array(self._initialisers[part]) for part in self._quantisers[tensor])
        return float(scale), int(zero)

    def _whole_numbers(self, name: str, values: np.ndarray | Sequence[int]) -> str:
        return self.constant(self._fresh(name), np.asarray(values, np.int64))

    def _clip_bounds(self, low: float | None, high: float | None) -> list[str]:
        return ["" if bound is None else self.constant(self._fresh("bound"), np.array(bound, np.float32)) for bound in (low, high)]

    @staticmethod
    def _pool(kernel: Sequence[int], strides: Sequence[int] | None, pads: Sequence[int] | None, ceil_mode: int) -> dict[str, Any]:
        rank = len(kernel)
        return {"kernel_shape": list(kernel), "strides": list(strides or kernel), "pads": list(pads or [0] * (2 * rank)), "ceil_mode": ceil_mode}

    def _node(self, op: str, inputs: list[str], outputs: list[str], name: str | None = None, **attributes: Any) -> str:
        name = name or self._fresh(op.lower())
        self._nodes.append(helper.make_node(op, inputs, outputs, name, **attributes))
        return name

    def _fresh(self, name: str) -> str:
        candidate, count = name, 1
        while candidate in self._taken:
            count += 1
            candidate = f"{name}_{count}"
        self._taken.add(candidate)
        return candidate
