# SPDX-License-Identifier: Apache-2.0
"""Quantisation-aware training of the form itself: the calibrated integer program as a torch module, its weights and biases trained, its scales kept.

For what Brevitas' road (`isthmus.quantize.qat`) does not take: gates, products, Mish and SiLU, transposed convolutions, and float ONNX without a module. Every
int8 tensor is rounded and clipped where the program rounds it; gradients pass through the rounding and stop at the clipping (straight-through).
What it computes is the integer reference's result, but for ties that float32 sums decide the other way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional

from isthmus.errors import Problem, ProblemsError
from isthmus.graph import QuantGraph, QuantNode
from isthmus.quantize.program_walk import float_layers
from isthmus.recipe import Recipe
from isthmus.spec import TensorSpec

WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
Compute = Callable[[QuantNode, list[Tensor], tuple[int, ...]], Tensor]


@dataclass(frozen=True)
class TrainedLayers:
    """What training changed: int8 weights, and what is added to biases, by layer name of the float model; as `graph_from_ranges` takes them."""

    weights: Mapping[str, np.ndarray]
    corrections: Mapping[str, np.ndarray]


class FormModule(nn.Module):
    """The program of `graph` on real numbers, any batch: takes its inputs in order, gives its output, or a tuple of them.

    `model` is the prepared float model that `graph` was made of by `recipe`: training starts at its weights, not at the rounded ones. Raises
    `ProblemsError` naming the nodes that have no such form (float islands but a softmax at the end).
    """

    def __init__(self, graph: QuantGraph, model: onnx.ModelProto, recipe: Recipe) -> None:
        super().__init__()
        self.graph = graph
        unknown = [node for node in graph.nodes if node.op not in _COMPUTE and node.op not in WEIGHTED]
        if unknown:
            found = [Problem(node.name, "untrained", f"{node.op} is not known to training in the form", "quantise it by calibration") for node in unknown]
            raise ProblemsError("the int8 graph cannot be trained", found)
        held = {tensor.name: tensor for tensor in model.graph.initializer}
        self.layers = float_layers(model, graph, WEIGHTED)
        self.weights, self.biases, self.constants = nn.ParameterDict(), nn.ParameterDict(), {}
        self.limits = {name: 2 ** (recipe.for_layer(layer.name).weight_bits - 1) - 1 for name, layer in self.layers.items()}
        for node in graph.nodes:
            if node.name in self.layers:
                self.weights[_key(node)] = nn.Parameter(_tensor(numpy_helper.to_array(held[self.layers[node.name].input[1]])))
                if node.bias is not None:
                    self.biases[_key(node)] = nn.Parameter(_tensor(self._bias_of(node)))
            elif node.op == "Constant":
                self.constants[node.name] = _tensor(graph.tensors[node.output].dequantise(node.constants[0]))

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        values = {spec.name: value for spec, value in zip(self.graph.inputs, inputs, strict=True)}
        last = {name: index for index, node in enumerate(self.graph.nodes) for name in node.inputs}
        wanted = [spec.name for spec in self.graph.outputs]
        for index, node in enumerate(self.graph.nodes):
            given = [values[name] for name in node.inputs]
            values |= zip(node.outputs, self._results(node, given, len(inputs[0])), strict=True)
            for name in node.inputs:
                if last[name] == index and name not in wanted:
                    values.pop(name, None)
        results = tuple(values[name] for name in wanted)
        return results[0] if len(results) == 1 else results

    def _results(self, node: QuantNode, inputs: list[Tensor], batch: int) -> list[Tensor]:
        if node.op == "Constant":
            value = self.constants[node.name]
            return [value.repeat(batch // len(value), *[1] * (value.ndim - 1)).to(next(self.parameters()).device)]
        if node.op == "Split":
            return list(inputs[0].split(tuple(node.attributes["sizes"]), dim=node.attributes["axis"]))
        spec = self.graph.tensors[node.output]
        value = self._weighted(node, inputs[0]) if node.name in self.layers else _COMPUTE[node.op](node, inputs, spec.shape)
        return [value if node.kind == "float" or node.op == "DequantizeLinear" else _rounded(value, spec, node.clamp)]

    def _weighted(self, node: QuantNode, x: Tensor) -> Tensor:
        weight, bias = self._weight(node), self.biases.get(_key(node), None)
        if node.op == "MatMul":
            return x @ weight if bias is None else x @ weight + bias
        if node.op == "Gemm":
            return functional.linear(x, weight, bias)
        return (_convolution if node.op == "Conv" else _transposed)(node, x, weight, bias, self.graph.tensors[node.output].shape)

    def _weight(self, node: QuantNode) -> Tensor:
        """Rounded to the steps that the form has."""
        assert node.weight_scale is not None
        weight, limit = self.weights[_key(node)], self.limits[node.name]
        scale = _tensor(node.weight_scale).to(weight.device)
        axis = 1 if node.op in ("MatMul", "ConvTranspose") else 0
        if scale.numel() == 1:
            return torch.fake_quantize_per_tensor_affine(weight, float(scale), 0, -limit, limit)
        return torch.fake_quantize_per_channel_affine(weight, scale, torch.zeros_like(scale, dtype=torch.int32), axis, -limit, limit)

    def _bias_of(self, node: QuantNode) -> np.ndarray:
        """As the form has it, in real numbers."""
        assert node.bias is not None and node.weight_scale is not None
        return node.bias * (float(self.graph.tensors[node.inputs[0]].scale or 1.0) * node.weight_scale.astype(np.float64))

    def trained(self) -> TrainedLayers:
        """The integers that the weights now round to, and how far the biases moved."""
        weights, corrections = {}, {}
        for node in self.graph.nodes:
            if node.name not in self.layers:
                continue
            assert node.weight is not None and node.weight_scale is not None
            layer, shape = self.layers[node.name].name, [1] * node.weight.ndim
            shape[1 if node.op in ("MatMul", "ConvTranspose") else 0] = node.weight_scale.size
            scale = _tensor(node.weight_scale.reshape(shape))
            steps = (self._weight(node).detach().cpu() / scale).round()
            weights[layer] = steps.to(torch.int8).numpy()
            if node.bias is not None:
                corrections[layer] = self.biases[_key(node)].detach().cpu().numpy().astype(np.float64) - self._bias_of(node)
        return TrainedLayers(weights, corrections)


def _key(node: QuantNode) -> str:
    """A parameter's name may hold no dot."""
    return node.name.replace(".", "/")


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array, np.float32))


def _rounded(value: Tensor, spec: TensorSpec, clamp: tuple[int, int]) -> Tensor:
    scale, zero = float(spec.scale or 1.0), int(spec.zero_point or 0)
    if clamp != (-128, 127):
        value = value.clamp((clamp[0] - zero) * scale, (clamp[1] - zero) * scale)
    return torch.fake_quantize_per_tensor_affine(value, scale, zero, -128, 127)


# ---- operators, on real numbers; nodes as the form has them
def _padded(x: Tensor, pads: Sequence[int], value: float = 0.0) -> Tensor:
    """ONNX's order (every begin, then every end) of the last axes."""
    rank = len(pads) // 2
    return functional.pad(x, [edge for axis in reversed(range(rank)) for edge in (pads[axis], pads[axis + rank])], value=value) if any(pads) else x


def _convolution(node: QuantNode, x: Tensor, weight: Tensor, bias: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    a = node.attributes
    convolve = functional.conv1d if weight.ndim == 3 else functional.conv2d
    rank = weight.ndim - 2
    begin, end = tuple(a["pads"][:rank]), tuple(a["pads"][rank:])
    if begin == end:
        return convolve(x, weight, bias, tuple(a["strides"]), begin, tuple(a["dilations"]), a["group"])
    return convolve(_padded(x, a["pads"]), weight, bias, tuple(a["strides"]), 0, tuple(a["dilations"]), a["group"])


def _transposed(node: QuantNode, x: Tensor, weight: Tensor, bias: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """All that a transposed convolution reaches, cut to the form's extents."""
    a = node.attributes
    convolve = functional.conv_transpose1d if weight.ndim == 3 else functional.conv_transpose2d
    whole = convolve(x, weight, bias, tuple(a["strides"]), 0, 0, a["group"], tuple(a["dilations"]))
    rank = weight.ndim - 2
    missing = [max(begin + extent - found, 0) for begin, extent, found in zip(a["pads"][:rank], shape[2:], whole.shape[2:], strict=True)]
    if any(missing):  # output padding: what no product reaches holds the bias alone
        beyond = _padded(whole if bias is None else whole - bias.reshape(-1, *[1] * rank), [*[0] * rank, *missing])
        whole = beyond if bias is None else beyond + bias.reshape(-1, *[1] * rank)
    for axis, (begin, extent) in enumerate(zip(a["pads"][:rank], shape[2:], strict=True), 2):
        whole = whole.narrow(axis, begin, extent)
    return whole


def _max_pool(node: QuantNode, inputs: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    a, rank = node.attributes, len(node.attributes["kernel_shape"])
    pool = functional.max_pool1d if rank == 1 else functional.max_pool2d
    padded = _padded(inputs[0], a["pads"], value=float("-inf"))
    return pool(padded, tuple(a["kernel_shape"]), tuple(a["strides"]), 0, tuple(a["dilations"]), bool(a.get("ceil_mode", 0)))


def _average_pool(node: QuantNode, inputs: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    """The sum over each window divided by what counts in it."""
    a, x = node.attributes, inputs[0]
    pads, kernel, strides = a["pads"], tuple(a["kernel_shape"]), tuple(a["strides"])
    pool = functional.avg_pool1d if len(kernel) == 1 else functional.avg_pool2d
    ceil = bool(a.get("ceil_mode", 0))
    if not any(pads) or a.get("count_include_pad", 0):
        return pool(_padded(x, pads), kernel, strides, 0, ceil)
    counted = pool(_padded(torch.ones_like(x[:1, :1]), pads), kernel, strides, 0, ceil)
    return pool(_padded(x, pads), kernel, strides, 0, ceil) / counted


def _slice(node: QuantNode, inputs: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    a, cut = node.attributes, inputs[0]
    for axis, start, end, step in zip(a["axes"], a["starts"], a["ends"], a["steps"], strict=True):
        cut = cut.index_select(axis, torch.arange(start, end, step, device=cut.device))
    return cut


def _expand(node: QuantNode, inputs: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    return inputs[0].expand(len(inputs[0]), *shape[1:])


def _resize_nearest(node: QuantNode, inputs: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    from isthmus.resampling import nearest_indices

    a, x = node.attributes, inputs[0]
    for axis in range(2, len(shape)):
        chosen = nearest_indices(x.shape[axis], shape[axis], a["coordinate_transformation_mode"], a["nearest_mode"])
        x = x.index_select(axis, torch.as_tensor(np.asarray(chosen), device=x.device))
    return x


def _resize_linear(node: QuantNode, inputs: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    from isthmus.resampling import linear_taps

    x = inputs[0]
    for axis in range(2, len(shape)):
        if x.shape[axis] != shape[axis]:
            taps = linear_taps(x.shape[axis], shape[axis], node.attributes["coordinate_transformation_mode"])
            lower, upper = (x.index_select(axis, torch.as_tensor(places, device=x.device)) for places in (taps.lower, taps.upper))
            share = torch.as_tensor(taps.weight / taps.denominator, dtype=x.dtype, device=x.device)
            x = lower + (upper - lower) * share.reshape(-1, *[1] * (len(shape) - 1 - axis))
    return x


def _reshaped(node: QuantNode, inputs: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    return inputs[0].reshape(len(inputs[0]), *shape[1:])


def _same(node: QuantNode, inputs: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    return inputs[0]


def _function(compute: Callable[[Tensor, Mapping[str, Any]], Tensor]) -> Compute:
    return lambda node, inputs, shape: compute(inputs[0], node.attributes)


def _hard_sigmoid(x: Tensor, a: Mapping[str, Any]) -> Tensor:
    return (x * a["alpha"] + a["beta"]).clamp(0, 1)


def _space_axes(node: QuantNode, inputs: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    return inputs[0].mean(tuple(range(2, inputs[0].ndim)), keepdim=True)


_COMPUTE: dict[str, Compute] = {
    "QuantizeLinear": _same,
    "DequantizeLinear": _same,
    "Requantize": _same,
    "Relu": _same,  # `_rounded` clips
    "Clip": _same,
    "Constant": _same,
    "Split": _same,
    "Softmax": lambda node, inputs, shape: inputs[0].softmax(int(node.attributes.get("axis", -1))),
    "Add": lambda node, inputs, shape: inputs[0] + inputs[1],
    "Sub": lambda node, inputs, shape: inputs[0] - inputs[1],
    "Mul": lambda node, inputs, shape: inputs[0] * inputs[1],
    "BatchMatMul": lambda node, inputs, shape: inputs[0] @ inputs[1],
    "Concat": lambda node, inputs, shape: torch.cat(inputs, dim=node.attributes["axis"]),
    "Transpose": lambda node, inputs, shape: inputs[0].permute(*node.attributes["perm"]),
    "Flatten": _reshaped,
    "Reshape": _reshaped,
    "Squeeze": _reshaped,
    "Unsqueeze": _reshaped,
    "Expand": _expand,
    "Slice": _slice,
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": _space_axes,
    "ReduceMean": lambda node, inputs, shape: inputs[0].mean(tuple(node.attributes["axes"]), keepdim=bool(node.attributes["keepdims"])),
    "ResizeNearest": _resize_nearest,
    "ResizeLinear": _resize_linear,
    "Sigmoid": _function(lambda x, a: x.sigmoid()),
    "Tanh": _function(lambda x, a: x.tanh()),
    "HardSigmoid": _function(_hard_sigmoid),
    "HardSwish": _function(lambda x, a: functional.hardswish(x)),
    "Silu": _function(lambda x, a: functional.silu(x)),
    "Mish": _function(lambda x, a: functional.mish(x)),
    "Softplus": _function(lambda x, a: functional.softplus(x)),
    "Gelu": _function(lambda x, a: functional.gelu(x, approximate=a["approximate"])),
    "LeakyRelu": _function(lambda x, a: functional.leaky_relu(x, a["alpha"])),
    "Elu": _function(lambda x, a: functional.elu(x, a["alpha"])),
}
