# SPDX-License-Identifier: Apache-2.0
"""Whole networks from PyTorch into the form: which operators come out in int8, what stays float, and that ONNX Runtime computes the same integers."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional

from isthmus import reference
from isthmus.export.check import check_equal
from isthmus.export.module import onnx_from_module
from isthmus.export.prepare import prepare_float
from isthmus.export.to_graph import graph_from_qdq, graph_from_ranges, tensors_to_calibrate
from isthmus.graph import QuantGraph
from isthmus.quantize.onnx_ptq import calibrate
from isthmus.recipe import Recipe

SAMPLES = 6


class Mobile(nn.Module):
    """MobileNetV3's block: HardSwish, depthwise, a gate a channel by HardSigmoid; PReLU and a channel shuffle behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise, self.point = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 1, bias=False)
        self.norm, self.squeeze, self.excite = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.slope, self.side, self.head = nn.PReLU(8), nn.Conv2d(4, 4, 1), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.hardswish(self.stem(x))
        y = self.depthwise(y)
        gate = functional.hardsigmoid(self.excite(functional.relu(self.squeeze(functional.adaptive_avg_pool2d(y, 1)))))
        y = self.slope(self.norm(self.point(y * gate)) + y)
        left, right = y.chunk(2, 1)
        y = torch.cat([left, functional.silu(self.side(right))], 1)
        n, c, h, w = y.shape
        y = y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.head(y.mean((2, 3)))


class Unet(nn.Module):
    """Down, up by ConvTranspose and by both interpolations, joined with what came before; Mish and ELU on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.down, self.deep = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)
        self.up, self.join, self.head = nn.ConvTranspose2d(8, 8, 2, 2), nn.Conv2d(16, 4, 3, padding=1), nn.Conv2d(12, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = functional.relu(self.enter(x))
        b = functional.mish(self.down(a))
        c = functional.elu(self.deep(b))
        d = self.join(torch.cat([self.up(c), b], 1))
        e = functional.interpolate(d, scale_factor=2, mode="bilinear", align_corners=False)
        return self.head(torch.cat([functional.pad(e[:, :, 1:, 1:], (1, 0, 1, 0)), a, functional.interpolate(functional.leaky_relu(d), scale_factor=2)], 1))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, c = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        weights = ((q @ k.transpose(-2, -1)) * (c // self.heads) ** -0.5).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(n, t, c))


class Transformer(nn.Module):
    """A vision transformer: patches, a class token, positions, one block with GELU, the token's head."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.token, self.position = nn.Conv2d(3, 8, 4, 4), nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 5, 8))
        self.first, self.second, self.attention = nn.LayerNorm(8), nn.LayerNorm(8), Attention(8, 2)
        self.grow, self.shrink, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(tokens.shape[0], -1, -1), tokens], 1) + self.position
        x = x + self.attention(self.first(x))
        x = x + self.shrink(functional.gelu(self.grow(self.second(x))))
        return self.head(x[:, 0])


NETWORKS: dict[str, tuple[type[nn.Module], tuple[int, ...], dict[str, int], dict[str, int]]] = {
    "mobile": (
        Mobile,
        (1, 3, 12, 12),
        {"Conv": 6, "HardSwish": 1, "GlobalAveragePool": 2, "HardSigmoid": 1, "Mul": 1, "Add": 1, "PRelu": 1, "Split": 1, "Silu": 1}
        | {"Concat": 1, "Reshape": 3, "Transpose": 1, "Gemm": 1},
        {},
    ),
    "unet": (
        Unet,
        (1, 2, 8, 8),
        {"Conv": 5, "ConvTranspose": 1, "Mish": 1, "Elu": 1, "Concat": 2, "ResizeLinear": 1, "ResizeNearest": 1, "LeakyRelu": 1, "Slice": 2, "Pad": 1},
        {},
    ),
    "transformer": (
        Transformer,
        (1, 3, 8, 8),
        {"Conv": 1, "Reshape": 6, "Constant": 3, "Concat": 1, "Add": 3, "MatMul": 4, "Slice": 3, "Gather": 1, "BatchMatMul": 2, "Mul": 1, "Gelu": 1}
        | {"Gemm": 1, "Transpose": 5},
        {"LayerNormalization": 2, "Softmax": 1},
    ),
}  # fmt: skip


def _exported(name: str, recipe: Recipe) -> tuple[QuantGraph, np.ndarray]:
    made, shape, *_ = NETWORKS[name]
    torch.manual_seed(3)
    exported = onnx_from_module(made(), torch.zeros(shape))
    prepared = prepare_float(exported)
    assert check_equal(exported, prepared) < 1e-4
    samples = np.random.default_rng(3).standard_normal((SAMPLES, *shape[1:])).astype(np.float32)
    return graph_from_ranges(prepared, calibrate(prepared, {"input": samples}, recipe, tensors_to_calibrate(prepared)), recipe), samples


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_comes_out_in_int8(name: str) -> None:
    graph, samples = _exported(name, Recipe())
    assert Counter(node.op for node in graph.nodes if node.kind == "int8") == NETWORKS[name][2]
    assert Counter(node.op for node in graph.nodes if node.kind == "float") == NETWORKS[name][3]
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(graph.to_bytes(), options, providers=["CPUExecutionProvider"])
    theirs = np.concatenate([session.run(None, {"input": sample[None]})[0] for sample in samples])
    spec = graph.outputs[0]
    np.testing.assert_array_equal(spec.quantise(theirs), reference.run(graph, {"input": samples})[spec.name])
    model = onnx.load_from_string(graph.to_bytes())
    del model.metadata_props[:]
    again = graph_from_qdq(model)
    np.testing.assert_array_equal(reference.run(again, {"input": samples})[spec.name], reference.run(graph, {"input": samples})[spec.name])
