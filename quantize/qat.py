# SPDX-License-Identifier: Apache-2.0
"""Quantisation-aware training with Brevitas, from float weights to QCDQ ONNX: prepare, calibrate, train further, export.

Every int8 operator's result has a quantiser, so the exported graph is the whole integer program. Activations are signed int8 with zero
point 0 also behind a ReLU (TensorRT takes nothing else); their scales are fixed by calibration, weight scales follow the weights.
"""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, fx, nn

from isthmus.errors import IsthmusError, Problem, ProblemsError
from isthmus.quantize.normalise import ACTIVATION, AVERAGE, COMPUTE, KEEPS_SCALE, TAIL
from isthmus.quantize.observer import Observer, border_scale
from isthmus.quantize.tracing import trace
from isthmus.recipe import LATER_FIELDS, Recipe

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Brevitas warns at import of an optional CUDA package that nothing here needs
    import brevitas.nn as qnn
    from brevitas.export import export_onnx_qcdq
    from brevitas.inject.enum import ScalingImplType
    from brevitas.quant.base import IntQuant, PerTensorFloatScaling8bit, PerTensorPoTScaling8bit
    from brevitas.quant.fixed_point import Int8WeightPerChannelFixedPoint, Int8WeightPerTensorFixedPoint
    from brevitas.quant.scaled_int import Int8WeightPerChannelFloat, Int8WeightPerTensorFloat, Int32Bias
    from brevitas.quant.solver.act import ActQuantSolver

OPSET = 20  # the newest that torch's TorchScript exporter writes; Brevitas exports quantised biases through no other
CALIBRATION_BATCH = 64
BIAS_LIMIT = 2.0**28  # steps of a bias at calibration; training and the products it is added to have the rest of int32
STEPS = 128  # Brevitas states a range as scale * 128 for signed 8 bits
READ = ("weight_bits", "edge_weight_bits")  # of the fields that calibration knows, those that training has too
SMALLEST_WEIGHT_SCALE = 2.0**-31  # of weights that are all zero; Brevitas' own floor is no power of two

Tensors = Tensor | Sequence[Tensor]
Samples = np.ndarray | Sequence[np.ndarray]  # an array an input, count first
Fit = Callable[[nn.Module], object]


class _PowerOfTwoActivation(IntQuant, PerTensorPoTScaling8bit, ActQuantSolver):
    scaling_impl_type = ScalingImplType.CONST


class _FloatActivation(IntQuant, PerTensorFloatScaling8bit, ActQuantSolver):
    scaling_impl_type = ScalingImplType.CONST


_WEIGHTS = {
    ("power_of_two", False): Int8WeightPerTensorFixedPoint,
    ("power_of_two", True): Int8WeightPerChannelFixedPoint,
    ("symmetric", False): Int8WeightPerTensorFloat,
    ("symmetric", True): Int8WeightPerChannelFloat,
}


def quantise(module: nn.Module, example_inputs: Tensors, samples: Samples, recipe: Recipe, fit: Fit | None = None) -> nn.Module:
    """`prepare`, `calibrate`, and `fit(quantised module)` where the recipe has QAT epochs; in evaluation mode.

    `fit` trains the module it is given in place, by the recipe's epochs and learning rate. Raises `IsthmusError` where it is needed and missing.
    """
    if recipe.qat_epochs and fit is None:
        raise IsthmusError(f"recipe {recipe.name} asks for {recipe.qat_epochs} epochs of QAT, but the model has no training; use one with qat_epochs = 0")
    quantised = calibrate(prepare(module, example_inputs, recipe), samples, recipe)
    if recipe.qat_epochs and fit is not None:
        fit(quantised)
    return quantised.eval()


def prepare(module: nn.Module, example_inputs: Tensors, recipe: Recipe) -> fx.GraphModule:
    """A float copy of `module` with batch norms folded and an observer wherever a quantiser will stand. `module` is left as it is.

    Raises `IsthmusError` where the module cannot be run or traced or the scheme is asymmetric, `ProblemsError` on constructs without an int8 form.
    """
    if recipe.scheme == "asymmetric":
        raise IsthmusError(f"recipe {recipe.name}: a module is quantised in scheme power_of_two or symmetric, not asymmetric; or quantise its ONNX export")
    unread = [field for field in LATER_FIELDS if field not in READ and getattr(recipe, field) != getattr(Recipe(), field)]
    if unread:
        raise IsthmusError(f"recipe {recipe.name}: {unread[0]} is not for a module with its training; leave it out, or quantise the module's ONNX export")
    examples = [example_inputs] if isinstance(example_inputs, Tensor) else list(example_inputs)
    graph = trace(module, examples)
    _Placement(graph).run()
    return graph.eval()


def calibrate(prepared: fx.GraphModule, samples: Samples, recipe: Recipe) -> fx.GraphModule:
    """Runs a seeded choice of at most `recipe.calibration_samples` samples (an array an input, count first), then puts Brevitas' quantisers in place.

    Works on `prepared` itself and returns it. Raises `IsthmusError` on no samples, NaN, or arrays that do not fit.
    """
    chosen = _choose([samples] if isinstance(samples, np.ndarray) else list(samples), recipe)
    observers = {name: module for name, module in prepared.named_children() if isinstance(module, Observer)}
    inputs = [node for node in prepared.graph.nodes if node.op == "placeholder"]
    if len(chosen) != len(inputs):
        raise IsthmusError(f"calibration: {len(chosen)} arrays of samples for {len(inputs)} inputs ({', '.join(str(node.target) for node in inputs)})")
    for counting in (False,) if recipe.observer == "minmax" else (False, True):
        for observer in observers.values():
            observer.counting = counting
        with torch.no_grad():
            for batch in zip(*(tensor.split(CALIBRATION_BATCH) for tensor in chosen), strict=True):
                _run(prepared, batch)
    scales = {name: observer.scale(recipe) for name, observer in observers.items()}
    scales |= {_quantiser(node): border_scale(tensor, recipe) for node, tensor in zip(inputs, chosen, strict=True)}
    _convert(prepared, scales, recipe)
    return prepared


def to_qcdq(quantised: nn.Module, example_inputs: Tensors, input_names: Sequence[str] = (), output_names: Sequence[str] = ("logits",)) -> onnx.ModelProto:
    """Brevitas' QCDQ ONNX of the calibrated (and trained) module, batch as in the example, opset 20. Input names default to forward()'s."""
    examples = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    if not input_names and isinstance(quantised, fx.GraphModule):
        input_names = [str(node.target) for node in quantised.graph.nodes if node.op == "placeholder"]
    with warnings.catch_warnings(), tempfile.TemporaryDirectory(prefix="isthmus-") as folder:
        warnings.simplefilter("ignore")  # torch 2.13: the TorchScript exporter is deprecated; Brevitas' asserts on traced values
        path = str(Path(folder) / "qcdq.onnx")  # Brevitas 0.13.4 returns the model to nobody
        export_onnx_qcdq(
            quantised.eval(), args=examples, export_path=path, dynamo=False, opset_version=OPSET, keep_initializers_as_inputs=False,
            input_names=list(input_names), output_names=list(output_names),
        )  # fmt: skip
        return onnx.load(path)


# ---- where quantisers stand
def _quantiser(node: fx.Node) -> str:
    return f"quantiser_{node.name}"


class _Placement:
    """Finds the tensors that share a scale, and puts one observer a scale behind every int8 tensor.

    An operator that keeps the scale (pool, reshape, lone activation, concatenation) is followed by its input's own quantiser once more:
    exactly the identity on values of that grid, and the explicit QuantizeLinear that the form has there.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        self.module = graph
        self.graph = graph.graph
        self.parent: dict[fx.Node, fx.Node] = {}
        self.floats: set[fx.Node] = set()
        self.problems: list[Problem] = []

    def run(self) -> None:
        for node in self.graph.nodes:
            self._visit(node)
        if self.problems:
            raise ProblemsError("the network cannot be quantised", self.problems)
        for node in list(self.graph.nodes):
            if node in self.parent:
                self._insert(node)
        self._requantise_borders()
        self.graph.lint()
        self.module.recompile()

    def _visit(self, node: fx.Node) -> None:
        module = self.module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if node.op == "output":
            return
        if isinstance(module, TAIL):
            self.floats.add(node)
        elif any(source in self.floats for source in node.all_input_nodes):
            self.problems.append(Problem(node.name, "float-island", "follows an operator that stays float", "keep softmax, sigmoid, tanh for the end"))
            self.floats.add(node)
        elif node.op == "placeholder" or node.target is torch.add or isinstance(module, (*COMPUTE, *AVERAGE)):
            if not self._activated(node, module):
                self.parent[node] = node
        elif isinstance(module, (*ACTIVATION, *KEEPS_SCALE)):
            source = node.all_input_nodes[0]
            self.parent[node] = self._root(source) if source in self.parent else node
        elif node.target is torch.cat:
            self.parent[node] = node
            for source in node.all_input_nodes:
                if self._root(source).op != "placeholder":
                    self.parent[self._root(source)] = self._root(node)

    def _activated(self, node: fx.Node, module: nn.Module | None) -> bool:
        """Whether an activation behind the node is computed in the same step, before rounding."""
        users = list(node.users)
        fuses = node.target is torch.add or isinstance(module, COMPUTE)
        return fuses and len(users) == 1 and users[0].op == "call_module" and isinstance(self.module.get_submodule(str(users[0].target)), ACTIVATION)

    def _root(self, node: fx.Node) -> fx.Node:
        while self.parent[node] is not node:
            node = self.parent[node]
        return node

    def _insert(self, node: fx.Node) -> None:
        name = _quantiser(self._root(node))
        if not hasattr(self.module, name):
            self.module.add_submodule(name, Observer())
        with self.graph.inserting_after(node):
            quantised = self.graph.call_module(name, (node,))
        node.replace_all_uses_with(quantised, delete_user_cb=lambda user: user is not quantised)

    def _requantise_borders(self) -> None:
        """A graph input in a concatenation keeps its own scale outside, and changes to the common one there."""
        for node in self.graph.nodes:
            if node.target is not torch.cat:
                continue
            name = _quantiser(self._root(node))
            for source in node.all_input_nodes:
                if source.target != name:
                    with self.graph.inserting_before(node):
                        node.replace_input_with(source, self.graph.call_module(name, (source,)))


# ---- calibration
def _choose(arrays: list[np.ndarray], recipe: Recipe) -> list[Tensor]:
    counts = sorted({len(array) for array in arrays})
    if len(counts) != 1 or counts[0] == 0:
        raise IsthmusError(f"calibration: arrays of {' and '.join(map(str, counts)) or 'no'} samples, expected the same number, at least one, for every input")
    if any(array.dtype != np.float32 or not np.isfinite(array).all() for array in arrays):
        raise IsthmusError("calibration: samples hold NaN or infinity or are not float32; repair or convert them")
    order = np.sort(np.random.default_rng(recipe.seed).permutation(counts[0])[: recipe.calibration_samples])
    return [torch.from_numpy(array[order]) for array in arrays]


def _run(prepared: fx.GraphModule, batch: Sequence[Tensor]) -> None:
    try:
        prepared(*batch)
    except RuntimeError as error:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in batch)
        raise IsthmusError(f"calibration: the network does not take samples of shape {shapes}: {str(error).splitlines()[0]}") from error


def _convert(prepared: fx.GraphModule, scales: dict[str, float], recipe: Recipe) -> None:
    """Observers become quantisers, layers become Brevitas' layers; the quantised tensor carries its scale to the layers alone (their biases need it)."""
    layers = [node for node in prepared.graph.nodes if isinstance(_called(prepared, node), COMPUTE)]
    for node in layers:
        bits = recipe.edge_weight_bits if node in (layers[0], layers[-1]) else 0
        _replace_layer(prepared, node, scales, replace(recipe, weight_bits=bits or recipe.weight_bits))
    for name, scale in scales.items():
        prepared.add_submodule(name, _quant_identity(scale, recipe))
    for node in list(prepared.graph.nodes):
        if node.op == "call_module" and node.target in scales:
            _unpack(prepared, node)
    prepared.graph.lint()
    prepared.recompile()


def _quant_identity(scale: float, recipe: Recipe) -> nn.Module:
    kind = _PowerOfTwoActivation if recipe.scheme == "power_of_two" else _FloatActivation
    return qnn.QuantIdentity(act_quant=kind, scaling_init=scale * STEPS, return_quant_tensor=True)


def _unpack(prepared: fx.GraphModule, node: fx.Node) -> None:
    """Plain values for every reader but Brevitas' layers."""
    plain = [user for user in node.users if not isinstance(_called(prepared, user), qnn.QuantConv1d | qnn.QuantConv2d | qnn.QuantLinear)]
    if plain:
        with prepared.graph.inserting_after(node):
            value = prepared.graph.call_function(getattr, (node, "value"))
        for user in plain:
            user.replace_input_with(node, value)


def _called(graph: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return graph.get_submodule(str(node.target)) if node.op == "call_module" else None


def _replace_layer(prepared: fx.GraphModule, node: fx.Node, scales: dict[str, float], recipe: Recipe) -> None:
    layer = prepared.get_submodule(str(node.target))
    input_scale = scales[str(node.all_input_nodes[0].target)]
    quantised = _quant_layer(layer, recipe, _weight_scale_floor(layer, input_scale))
    parent, _, name = str(node.target).rpartition(".")
    setattr(prepared.get_submodule(parent), name, quantised)


def _weight_scale_floor(layer: nn.Module, input_scale: float) -> float:
    """The least weight scale at which the bias, in steps of input x weight scale, stays inside int32: matters for a channel of (nearly) no weights."""
    bias = layer.bias
    largest = float(bias.detach().abs().max()) if isinstance(bias, Tensor) else 0.0
    return 2.0 ** math.ceil(math.log2(max(largest / (input_scale * BIAS_LIMIT), SMALLEST_WEIGHT_SCALE)))


def _quant_layer(layer: nn.Module, recipe: Recipe, floor: float) -> nn.Module:
    bits = recipe.weight_bits
    weight_quant = _WEIGHTS[recipe.scheme, recipe.per_channel].let(bit_width=bits, scaling_min_val=floor * 2 ** (bits - 1))
    has_bias = isinstance(layer.bias, Tensor)
    bias_quant = Int32Bias if has_bias else None
    quantised: nn.Module
    if isinstance(layer, nn.Linear):
        if not has_bias:  # torch exports a Linear without bias as Transpose and MatMul, with one as the form's Gemm
            layer.bias = nn.Parameter(torch.zeros(layer.out_features), requires_grad=False)
        quantised = qnn.QuantLinear(layer.in_features, layer.out_features, bias=True, weight_quant=weight_quant, bias_quant=Int32Bias)
        quantised.bias.requires_grad = has_bias
    else:
        assert isinstance(layer, nn.Conv1d | nn.Conv2d)
        kind = qnn.QuantConv1d if isinstance(layer, nn.Conv1d) else qnn.QuantConv2d
        quantised = kind(
            layer.in_channels, layer.out_channels, layer.kernel_size, stride=layer.stride, padding=layer.padding, dilation=layer.dilation,
            groups=layer.groups, bias=has_bias, weight_quant=weight_quant, bias_quant=bias_quant,
        )  # fmt: skip
    quantised.load_state_dict(layer.state_dict())
    return quantised
