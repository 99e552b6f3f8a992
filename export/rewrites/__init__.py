# SPDX-License-Identifier: Apache-2.0
"""Exact rewrites of float graphs, one a file, each an onnx-ir pass. They run until none changes anything."""

from __future__ import annotations

from isthmus.export.rewrites._edit import NodeRewrite
from isthmus.export.rewrites.affine_into_layer import AffineIntoLayer
from isthmus.export.rewrites.batch_norm_to_conv import BatchNormToConv
from isthmus.export.rewrites.explicit_attributes import ExplicitAttributes
from isthmus.export.rewrites.linear_as_gemm import GemmNormalForm, MatMulAddToGemm
from isthmus.export.rewrites.mean_to_pool import ReductionsToPools
from isthmus.export.rewrites.scale_into_weights import ScaleIntoWeights
from isthmus.export.rewrites.static_reshape import StaticReshape

EXACT_REWRITES: tuple[type[NodeRewrite], ...] = (
    ExplicitAttributes,
    MatMulAddToGemm,
    GemmNormalForm,
    AffineIntoLayer,
    ReductionsToPools,
    BatchNormToConv,
    StaticReshape,
    ScaleIntoWeights,
)

# For graphs whose weights are integers already: none of these makes or changes a weight.
QDQ_REWRITES: tuple[type[NodeRewrite], ...] = (ExplicitAttributes, ReductionsToPools, StaticReshape)
