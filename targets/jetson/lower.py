# SPDX-License-Identifier: Apache-2.0
"""The form as TensorRT's ONNX parser takes it: explicit QuantizeLinear/DequantizeLinear, float border, the same integers.

- Opset, IR version and what is spelled out are the dialect's (`isthmus.targets.jetson.dialects`).
- Biases become float32 initialisers: the parser refuses a DequantizeLinear on int32. int32 x scale is exact in the power-of-two scheme.
- Every zero point is written out, is 0 and has the size of its scale: the parser asks for all three.
- `kernel_shape` is always there: parsers up to TensorRT 10 refuse a convolution without it whose weight is computed, as one behind a DequantizeLinear is.
- ceil_mode becomes padding at the end: what TensorRT counts in a window that hangs over is documented nowhere.
- One DequantizeLinear a tensor, shared by its readers, and a QuantizeLinear behind every operator: no branch of an addition or a join is left float.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from isthmus.graph import QuantGraph, QuantNode
from isthmus.kernels import pads_to_fill
from isthmus.onnx_writer import OnnxWriter
from isthmus.spec import TensorSpec
from isthmus.targets.jetson.dialects import Dialect
from isthmus.targets.jetson.half_islands import with_half_islands
from isthmus.targets.jetson.spellings import SPELLINGS, spell_layer_normalization

BEFORE_THE_FIRST = -(2**31)  # the end of a Slice that runs backwards through index 0


def onnx_from_graph(graph: QuantGraph, dialect: Dialect, half_islands: bool = False) -> bytes:
    """The int8 ONNX file: float32 inputs and outputs with the graph's own names. `half_islands`: float islands in float16, where types in the graph decide."""
    lowering = Lowering(graph, dialect)
    model = lowering.model()
    if half_islands and dialect.strongly_typed and lowering.islands:
        model = with_half_islands(model, lowering.islands)
        onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString(deterministic=True)


def end_pads(graph: QuantGraph, node: QuantNode) -> list[int]:
    """The pads of a pool without ceil_mode: every begin, then every end, grown so that the last window lies inside."""
    a = node.attributes
    space, out = graph.tensors[node.inputs[0]].shape[2:], graph.tensors[node.output].shape[2:]
    return pads_to_fill(space, out, a["kernel_shape"], a["strides"], a["pads"], a["dilations"])


class Lowering(OnnxWriter):
    """One pass over the nodes; tensors keep their names, `<name>_real` is the float value of an int8 tensor.

    What writes quantisers is `quantise`, `real`, `stored` and the border behind a DequantizeLinear: the float graph replaces just those.
    """

    def __init__(self, graph: QuantGraph, dialect: Dialect) -> None:
        super().__init__(graph.tensors)
        self.graph = graph
        self.dialect = dialect
        self.reals: dict[str, str] = {}  # int8 tensor -> its float value
        self.islands: set[str] = set()  # names of the nodes that stand for float islands

    def model(self) -> onnx.ModelProto:
        for node in self.graph.nodes:
            if node.kind == "float":
                first = len(self.nodes)
                self.island(node)
                self.islands.update(written.name for written in self.nodes[first:])
            elif node.op == "QuantizeLinear":
                self.quantise_border(node)
            elif node.op == "DequantizeLinear":
                self.dequantise_border(node)
            else:
                LOWERINGS[node.op](self, node)
        inputs, outputs = (
            [helper.make_tensor_value_info(spec.name, TensorProto.FLOAT, list(spec.shape)) for spec in side] for side in (self.graph.inputs, self.graph.outputs)
        )
        model = self.finish("isthmus_jetson", inputs, outputs, self.dialect.opset)
        model.ir_version = self.dialect.ir_version
        onnx.checker.check_model(model, full_check=True)
        return model

    # ---- where values are quantised
    def quantise_border(self, node: QuantNode) -> None:
        self.quantise(node.inputs[0], node.output)

    def dequantise_border(self, node: QuantNode) -> None:
        """A DequantizeLinear of its own: the border's name is fixed."""
        source = node.inputs[0]
        producer = self.graph.producer(source)
        if producer is not None and producer.op == "Constant":
            self.emit("Identity", [self.real(source)], node.output, node.name)
        else:
            self.emit("DequantizeLinear", [source, *self._scale_and_zero(self.graph.tensors[source])], node.output, node.name)

    def quantise(self, value: str, tensor: str) -> None:
        self.emit("QuantizeLinear", [value, *self._scale_and_zero(self.graph.tensors[tensor])], tensor)

    def real(self, tensor: str) -> str:
        """The float value of an int8 tensor: one DequantizeLinear, shared by its readers."""
        if tensor not in self.reals:
            self.reals[tensor] = self.emit("DequantizeLinear", [tensor, *self._scale_and_zero(self.graph.tensors[tensor])], self.fresh(f"{tensor}_real"))
        return self.reals[tensor]

    def stored(self, name: str, steps: np.ndarray, scale: np.ndarray, axis: int) -> str:
        """Constant integers behind a DequantizeLinear; where the parser wants float initialisers, behind a pair that gives back the same integers."""
        if self.dialect.int8_constants:
            return self.real_constant(name, steps, scale, 0, axis)
        shape = [-1 if place == axis else 1 for place in range(steps.ndim)]
        real = self.constant(f"{name}_float", steps.astype(np.float32) * (scale.reshape(shape) if scale.ndim else scale))
        pair = [self.constant(f"{name}_scale", scale), self.constant(f"{name}_zero", np.zeros(scale.shape, np.int8))]
        attributes: dict[str, Any] = {"axis": axis} if scale.ndim else {}
        quantised = self.emit("QuantizeLinear", [real, *pair], self.fresh(f"{name}_quantised"), **attributes)
        return self.emit("DequantizeLinear", [quantised, *pair], self.fresh(f"{name}_real"), **attributes)

    # ---- border and float islands
    def island(self, node: QuantNode) -> None:
        settings, attributes = dict(node.constants), dict(node.attributes)
        if node.op in self.dialect.spelled_out:
            self._spelled_island(node)
            return
        if node.op in ("ReduceMean", "ReduceMax", "ReduceMin") and self.dialect.opset < 18 and 1 in settings:
            attributes["axes"] = [int(axis) for axis in settings.pop(1).reshape(-1)]
        if node.op == "GridSample" and self.dialect.opset < 20:  # opset 20 renamed the modes
            attributes["mode"] = {"linear": "bilinear", "cubic": "bicubic"}.get(attributes.get("mode", "linear"), "nearest")
        inputs = self.float_inputs(replace(node, constants=settings), node.inputs)
        self.node(node.op, inputs, node.outputs, node.name, attributes)

    def _spelled_island(self, node: QuantNode) -> None:
        if node.op == "LayerNormalization":
            spell_layer_normalization(self, node, self.float_inputs(node, node.inputs), len(self.graph.tensors[node.output].shape))
        else:
            self.emit("Identity", [SPELLINGS[node.op](self, node, node.inputs[0])], node.output, f"{node.name}_Identity")

    # ---- int8 operators: DequantizeLinear -> operator -> (Relu | Clip) -> QuantizeLinear
    def conv(self, node: QuantNode) -> None:
        self._weighted(node, 0, dict(node.attributes))

    def conv_transpose(self, node: QuantNode) -> None:
        self._weighted(node, 1, dict(node.attributes))

    def gemm(self, node: QuantNode) -> None:
        self._weighted(node, 0, {"transB": 1})

    def matmul(self, node: QuantNode) -> None:
        self._weighted(node, 1, {})

    def _weighted(self, node: QuantNode, axis: int, attributes: dict[str, Any]) -> None:
        assert node.weight is not None and node.weight_scale is not None  # rule "weight" of the form
        scale = node.weight_scale.reshape(()) if node.weight_scale.size == 1 else node.weight_scale
        along = scale[: node.weight.shape[axis]] if scale.ndim else scale  # the groups of a ConvTranspose share their scales
        inputs = [self.real(node.inputs[0]), self.stored(f"{node.output}_weight", node.weight, along, axis)]
        if node.bias is not None:
            step = np.float32(self.graph.tensors[node.inputs[0]].scale) * scale
            inputs.append(self.constant(f"{node.output}_bias", (node.bias * step.astype(np.float64)).astype(np.float32)))
        self._group(node, node.op, inputs, attributes)

    def pool(self, node: QuantNode) -> None:
        attributes = {"kernel_shape": node.attributes["kernel_shape"], "strides": node.attributes["strides"], "pads": end_pads(self.graph, node)}
        if set(node.attributes["dilations"]) != {1}:
            attributes["dilations"] = node.attributes["dilations"]  # `check` has refused it; dropping it here would change the numbers
        if node.op == "AveragePool":
            # Without padding the attribute changes no number; with it NVIDIA's compiler takes an int8 kernel, without it a float one (TensorRT-RTX 1.7).
            attributes["count_include_pad"] = node.attributes["count_include_pad"] if any(attributes["pads"]) else 1
        self._group(node, node.op, [self.real(node.inputs[0])], attributes)

    def plain(self, node: QuantNode) -> None:
        """The operator on real values, with its attributes: Add, Concat, Sigmoid, Transpose, ..."""
        self._group(node, node.op, [self.real(name) for name in node.inputs], dict(node.attributes))

    def batch_matmul(self, node: QuantNode) -> None:
        self._group(node, "MatMul", [self.real(name) for name in node.inputs], {})

    def reduce_mean(self, node: QuantNode) -> None:
        axes, keep = list(node.attributes["axes"]), {"keepdims": int(node.attributes["keepdims"])}
        if self.dialect.opset < 18:
            self._group(node, "ReduceMean", [self.real(node.inputs[0])], {"axes": axes} | keep)
        else:
            self._with_settings(node, "ReduceMean", {"axes": np.array(axes)}, keep)

    def resize(self, node: QuantNode) -> None:
        """By whole factors as `scales`: the parser makes output dimensions of `sizes`, and a DLA takes no resize that has them (NvInfer.h)."""
        before, after = self.graph.tensors[node.inputs[0]].shape, self.graph.tensors[node.output].shape
        if all(new % old == 0 for old, new in zip(before, after, strict=True)):
            factors = np.array([new // old for old, new in zip(before, after, strict=True)], np.float32)
            extent = [self.constant(f"{node.output}_scales", factors)]
        else:
            extent = ["", self.constant(f"{node.output}_sizes", np.array(after, np.int64))]
        attributes = {name: value for name, value in node.attributes.items() if name != "sizes"}
        self._group(node, "Resize", [self.real(node.inputs[0]), "", *extent], attributes)

    def p_relu(self, node: QuantNode) -> None:
        self._group(node, "PRelu", [self.real(node.inputs[0]), self.constant(f"{node.output}_slope", node.constants[1])], {})

    def spelled(self, node: QuantNode) -> None:
        """HardSwish, Mish, GELU: one operator where the parser has it."""
        if node.op in self.dialect.spelled_out:
            self._close(node, SPELLINGS[node.op](self, node, self.real(node.inputs[0])))
        else:
            self.plain(node)

    def silu(self, node: QuantNode) -> None:
        x = self.real(node.inputs[0])
        gate = self.emit("Sigmoid", [x], self.fresh(f"{node.output}_gate"), f"{node.name}_sigmoid")
        self._group(node, "Mul", [x, gate], {})

    # ---- what moves values
    def reshape(self, node: QuantNode) -> None:
        self._with_settings(node, "Reshape", {"shape": np.array(self.graph.tensors[node.output].shape)}, {})

    def expand(self, node: QuantNode) -> None:
        self._with_settings(node, "Expand", {"shape": np.array(self.graph.tensors[node.output].shape)}, {})

    def split(self, node: QuantNode) -> None:
        values = [self.fresh(f"{output}_value") for output in node.outputs]
        sizes = self.constant(f"{node.output}_sizes", np.array(node.attributes["sizes"], np.int64))
        self.node("Split", [self.real(node.inputs[0]), sizes], values, node.name, {"axis": node.attributes["axis"]})
        for value, output in zip(values, node.outputs, strict=True):
            self.quantise(value, output)

    def slice(self, node: QuantNode) -> None:
        """The form's ends are those of Python's range: -1 is in front of the first, not the last."""
        bounds = {name: np.array(node.attributes[name]) for name in ("starts", "ends", "axes", "steps")}
        bounds["ends"][bounds["ends"] < 0] = BEFORE_THE_FIRST
        self._with_settings(node, "Slice", bounds, {})

    def pad(self, node: QuantNode) -> None:
        """The value as the tensor holds it: an infinite one is the end of its range."""
        spec = self.graph.tensors[node.output]
        value = spec.dequantise(spec.quantise(np.array(node.attributes["value"], np.float32)))
        pads = self.constant(f"{node.output}_pads", np.array(node.attributes["pads"], np.int64))
        self._group(node, "Pad", [self.real(node.inputs[0]), pads, self.constant(f"{node.output}_border", value)], {"mode": "constant"})

    def gather(self, node: QuantNode) -> None:
        self._with_settings(node, "Gather", {"indices": np.array(node.attributes["indices"])}, {"axis": node.attributes["axis"]})

    def clip(self, node: QuantNode) -> None:
        self.quantise(self._activation(self.real(node.inputs[0]), node, node.op, node.name), node.output)

    def requantize(self, node: QuantNode) -> None:
        self.quantise(self.real(node.inputs[0]), node.output)

    def operand(self, node: QuantNode) -> None:
        """A constant int8 tensor that other operators read."""
        spec, steps = self.graph.tensors[node.output], node.constants[0]
        if spec.zero_point:  # only a float graph comes from an asymmetric form
            steps = steps.astype(np.int16) - spec.zero_point
        self.reals[node.output] = self.stored(node.output, steps, np.array(spec.scale, np.float32), 0)

    # ---- parts
    def _with_settings(self, node: QuantNode, op: str, settings: Mapping[str, np.ndarray], attributes: Mapping[str, Any]) -> None:
        inputs = [self.constant(f"{node.output}_{name}", values.astype(np.int64)) for name, values in settings.items()]
        self._group(node, op, [self.real(node.inputs[0]), *inputs], attributes)

    def _group(self, node: QuantNode, op: str, inputs: list[str], attributes: Mapping[str, Any]) -> None:
        biased = op == "MatMul" and len(inputs) > 2  # ONNX's MatMul takes none
        value = self.emit(op, inputs[:2] if biased else inputs, self.fresh(f"{node.output}_value"), node.name, **attributes)
        if biased:
            value = self.emit("Add", [value, inputs[2]], self.fresh(f"{node.output}_sum"), f"{node.name}_add")
        self._close(node, value)

    def _close(self, node: QuantNode, value: str) -> None:
        if node.activation:
            value = self._activation(value, node, node.activation, f"{node.name}_{node.activation}")
        self.quantise(value, node.output)

    def _activation(self, value: str, node: QuantNode, kind: str, name: str) -> str:
        bounds = []
        if kind == "Clip":
            given = enumerate(node.activation_range)
            bounds = [self.constant(f"{node.output}_bound_{i}", np.array(bound, np.float32)) if np.isfinite(bound) else "" for i, bound in given]
            bounds = bounds[: max((i + 1 for i, bound in enumerate(bounds) if bound), default=0)]  # no empty inputs at the end
        return self.emit(kind, [value, *bounds], self.fresh(f"{node.output}_active"), name)

    def _scale_and_zero(self, spec: TensorSpec) -> tuple[str, str]:
        return self.constant(f"{spec.name}_scale", np.array(spec.scale, np.float32)), self.constant("zero", np.array(0, np.int8))


# The operator table of the target: what stands here is what `check` accepts.
LOWERINGS: dict[str, Callable[[Lowering, QuantNode], None]] = {
    "Conv": Lowering.conv,
    "ConvTranspose": Lowering.conv_transpose,
    "Gemm": Lowering.gemm,
    "MatMul": Lowering.matmul,
    "BatchMatMul": Lowering.batch_matmul,
    **dict.fromkeys(("Add", "Sub", "Mul", "Concat", "GlobalAveragePool"), Lowering.plain),
    **dict.fromkeys(("Sigmoid", "Tanh", "LeakyRelu", "HardSigmoid", "Softplus", "Elu"), Lowering.plain),
    **dict.fromkeys(("Transpose", "DepthToSpace", "SpaceToDepth"), Lowering.plain),
    **dict.fromkeys(("HardSwish", "Mish", "Gelu"), Lowering.spelled),
    "Silu": Lowering.silu,
    "PRelu": Lowering.p_relu,
    **dict.fromkeys(("AveragePool", "MaxPool"), Lowering.pool),
    "ReduceMean": Lowering.reduce_mean,
    **dict.fromkeys(("ResizeLinear", "ResizeNearest"), Lowering.resize),
    **dict.fromkeys(("Relu", "Clip"), Lowering.clip),
    **dict.fromkeys(("Flatten", "Reshape", "Squeeze", "Unsqueeze"), Lowering.reshape),
    "Expand": Lowering.expand,
    "Split": Lowering.split,
    "Slice": Lowering.slice,
    "Pad": Lowering.pad,
    "Gather": Lowering.gather,
    "Requantize": Lowering.requantize,
    "Constant": Lowering.operand,
}
