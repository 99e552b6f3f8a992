# SPDX-License-Identifier: Apache-2.0
"""Learning which way each weight is rounded: Brevitas' GPTQ and learned rounding, on the layers of the form, whatever the model came from.

Layer by layer in order, on the int8 inputs that the layers before it give with their own new weights. Both methods make the layer's result
on these inputs as near to that of its float weights as they can: the squared difference is d H d' with d the change of the weights and H the
second moment of the inputs, so H is all that is kept of the samples. Where biases are corrected afterwards, a mean difference costs nothing, and H is
taken about the inputs' mean (0.4 to 1 dB better on three networks at 4 bits). Scales stay; the weight is handed to Brevitas in steps of its scale, so that
what Brevitas rounds to are the integers of the form.
"""

from __future__ import annotations

import warnings
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from isthmus.graph import QuantGraph, QuantNode
from isthmus.quantize.bias_correction import CORRECTED
from isthmus.quantize.onnx_ptq import Arrays
from isthmus.quantize.program_walk import feeds_for_walk, float_layers, walk
from isthmus.quantize.single_thread import single_thread
from isthmus.recipe import Recipe

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Brevitas warns at import of an optional CUDA package that nothing here needs
    import brevitas.nn as qnn
    from brevitas.core.function_wrapper.learned_round import LearnedRoundSte
    from brevitas.graph.gptq import GPTQ
    from brevitas.inject.enum import FloatToIntImplType, LearnedRoundImplType, ScalingImplType
    from brevitas.quant.scaled_int import Int8WeightPerTensorFloat
    from brevitas.utils.torch_utils import StopFwdException

QuantLayer = Any  # qnn.QuantConv1d, QuantConv2d or QuantLinear: Brevitas' classes carry no types
LEARNT = frozenset({"Conv", "Gemm", "MatMul"})
SAMPLES = 256
MOST_INPUTS = 8192  # of a layer: the second moment grows with their square (256 MiB)
BATCH_VALUES = 2**24  # of the unfolded input of a convolution, held at once
NEARLY_ZERO = 1e-9  # of the largest second moment of an input
BLOCKS = 100  # GPTQ's columns are brought up to date in so many blocks, Brevitas' default
STEPS, RATE = 1000, 1e-2  # learned rounding, as in the AdaRound paper (arXiv 2004.10568), with fewer steps: each sees every sample
WARM_UP, SHARP = 0.2, (20.0, 2.0)
ZETA, GAMMA = 1.1, -0.1  # of Brevitas' hard sigmoid


def learnt_weights(model: onnx.ModelProto, graph: QuantGraph, data: Arrays, recipe: Recipe) -> dict[str, np.ndarray]:
    """The int8 weight of each Conv, Gemm and MatMul by layer name, in the shape of the form; its scale is the one that `graph` has.

    `model` is the prepared float model that `graph` was made of by `recipe`, `data` its calibration samples, of which at most `SAMPLES` are used.
    A layer for which the method finds nothing better than the nearest integers keeps them; one of more than `MOST_INPUTS` inputs is left out.
    """
    feeds = feeds_for_walk(model, graph, data, recipe, SAMPLES)
    narrow = {node.name for node in graph.nodes if node.weight is not None and _inputs(node) <= MOST_INPUTS}
    layers = {name: layer for name, layer in float_layers(model, graph, LEARNT).items() if name in narrow}
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    found: dict[str, np.ndarray] = {}

    def learnt(node: QuantNode, x: np.ndarray) -> QuantNode:
        layer = layers[node.name]
        real = numpy_helper.to_array(held[layer.input[1]])
        source = graph.tensors[node.inputs[0]]
        values = torch.from_numpy((x.astype(np.float32) - int(source.zero_point or 0)) * np.float32(source.scale))
        found[layer.name] = _learnt(node, real, values, recipe.for_layer(layer.name))
        return replace(node, weight=found[layer.name])

    with single_thread():
        walk(graph, feeds, layers, learnt)
    return found


def _inputs(node: QuantNode) -> int:
    """How many values one output is a sum of."""
    assert node.weight is not None
    return int(node.weight.shape[0]) if node.op == "MatMul" else int(np.prod(node.weight.shape[1:]))


def _learnt(node: QuantNode, real: np.ndarray, values: Tensor, recipe: Recipe) -> np.ndarray:
    assert node.weight is not None and node.weight_scale is not None  # rule "weight" of the form
    axis = 1 if node.op == "MatMul" else 0
    shape = [1] * real.ndim
    shape[axis] = node.weight_scale.size
    steps = real.astype(np.float64) / node.weight_scale.astype(np.float64).reshape(shape)
    exact = torch.from_numpy((steps.T if node.op == "MatMul" else steps).astype(np.float32))
    nearest = torch.from_numpy(np.array(node.weight.T if node.op == "MatMul" else node.weight, np.float32))
    layer = _brevitas_layer(node, exact, recipe)
    gptq = _seen(layer, node, values, about_mean=recipe.bias_correction and node.op in CORRECTED)
    moment = gptq.H.clone()
    integers = _by_gptq(gptq) if recipe.rounding == "gptq" else _by_learned_round(layer, moment, exact, 2 ** (recipe.weight_bits - 1) - 1)
    if not _error(integers, exact, moment) < _error(nearest, exact, moment):
        integers = nearest
    rounded = integers.to(torch.int8).numpy()
    return np.ascontiguousarray(rounded.T if node.op == "MatMul" else rounded)


def _brevitas_layer(node: QuantNode, exact: Tensor, recipe: Recipe) -> QuantLayer:
    """The layer without bias and padding, its weight in steps: a quantiser of scale 1."""
    bits = recipe.weight_bits
    quantiser = Int8WeightPerTensorFloat.let(scaling_impl_type=ScalingImplType.CONST, scaling_init=float(2 ** (bits - 1) - 1), bit_width=bits)
    if recipe.rounding == "learned":
        quantiser = quantiser.let(float_to_int_impl_type=FloatToIntImplType.LEARNED_ROUND, learned_round_impl_type=LearnedRoundImplType.HARD_SIGMOID)
    layer: QuantLayer
    if node.op == "Conv":
        group, kind = int(node.attributes["group"]), qnn.QuantConv1d if exact.ndim == 3 else qnn.QuantConv2d
        layer = kind(
            exact.shape[1] * group, exact.shape[0], tuple(exact.shape[2:]), stride=tuple(node.attributes["strides"]),
            dilation=tuple(node.attributes["dilations"]), groups=group, bias=False, weight_quant=quantiser,
        )  # fmt: skip
    else:
        layer = qnn.QuantLinear(exact.shape[1], exact.shape[0], bias=False, weight_quant=quantiser)
    layer.weight.data.copy_(exact)
    return layer.eval()


def _seen(layer: QuantLayer, node: QuantNode, values: Tensor, about_mean: bool) -> GPTQ:
    """Brevitas' GPTQ of this layer, with the second moment of its inputs measured, about their mean or about zero."""
    if node.op == "Conv":
        pads = node.attributes["pads"]
        rank = len(pads) // 2
        values = nn.functional.pad(values, [edge for axis in reversed(range(rank)) for edge in (pads[axis], pads[axis + rank])])
    else:
        values = values.reshape(-1, values.shape[-1])
    gptq = GPTQ(layer, node.name, act_order=False, len_parallel_layers=1, create_weight_orig=False, num_blocks=BLOCKS)
    each = values[0].numel() * (layer.weight[0, 0].numel() if node.op == "Conv" else 1)
    total, count = torch.zeros(gptq.groups, int(gptq.columns), dtype=torch.float64), 0
    with torch.no_grad():
        for batch in values.split(max(1, BATCH_VALUES // each)):
            with suppress(StopFwdException):  # how Brevitas ends a forward pass that only looks
                gptq.update_batch(layer, (batch,), _Seen())
            if about_mean:
                columns = gptq.process_input((batch,))
                total += columns.sum(dim=-1, dtype=torch.float64)
                count += columns.shape[-1]
        if about_mean:
            mean = (total / count).float()
            gptq.H -= 2 * mean[:, :, None] * mean[:, None, :]  # Brevitas' H is twice the second moment
    # Brevitas sets weights of inputs that are zero on every sample to zero; other data may need them.
    diagonal = gptq.H.diagonal(dim1=1, dim2=2)
    diagonal.clamp_(min=max(float(diagonal.max()), 1e-30) * NEARLY_ZERO)
    return gptq


class _Seen:
    """What Brevitas counts forward passes in."""

    def __init__(self) -> None:
        self.layer_names: set[str] = set()
        self.forward_count = 0


def _by_gptq(gptq: GPTQ) -> Tensor:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no inverse: the weights stay, and so do the nearest integers
        gptq.single_layer_update()
        weight: Tensor = gptq.layer.quant_weight().value
    return weight.round()


def _by_learned_round(layer: QuantLayer, moment: Tensor, exact: Tensor, limit: int) -> Tensor:
    """Minimises d H d' over a share of rounding up a weight, which is driven towards 0 and 1 on the way."""
    rounding = next(part for part in layer.weight_quant.modules() if isinstance(part, LearnedRoundSte))
    rest = exact - exact.floor()
    with torch.no_grad():  # the share starts at what is left behind the point: the float weight
        rounding.value.copy_(torch.logit(((rest - GAMMA) / (ZETA - GAMMA)).clamp(1e-4, 1 - 1e-4)))
    layer.train()
    optimiser = torch.optim.Adam([rounding.value], lr=RATE)
    moment = moment / _error(exact.round(), exact, moment).clamp(min=1e-30)
    for step in range(STEPS):
        loss = _error(rounding(exact).clamp(-limit, limit), exact, moment)
        progress = (step / STEPS - WARM_UP) / (1 - WARM_UP)
        if progress > 0:
            sharpness = SHARP[1] + 0.5 * (SHARP[0] - SHARP[1]) * (1 + np.cos(np.pi * progress))
            share = (torch.sigmoid(rounding.value) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)
            loss = loss + (1 - (2 * share - 1).abs().pow(sharpness)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    layer.eval()
    with torch.no_grad():
        weight: Tensor = layer.quant_weight().value
    return weight.round()


def _error(integers: Tensor, exact: Tensor, moment: Tensor) -> Tensor:
    """The squared difference of the layer's results, over all samples and outputs."""
    change = (integers - exact).reshape(moment.shape[0], -1, moment.shape[1])
    return ((change @ moment) * change).sum()
