# SPDX-License-Identifier: Apache-2.0
"""Exact rewrites of float graphs, one a file, each an onnx-ir pass; docs/rewrites.md has the table. They run until none changes anything."""

from __future__ import annotations

from isthmus.export.rewrites._edit import NodeRewrite
from isthmus.export.rewrites.affine_into_layer import AffineIntoLayer
from isthmus.export.rewrites.batch_in_front import BatchInFront
from isthmus.export.rewrites.batch_norm_to_conv import BatchNormToConv
from isthmus.export.rewrites.bilinear_to_average_pool import BilinearToAveragePool
from isthmus.export.rewrites.ceil_pool_to_pad import CeilPoolToPad
from isthmus.export.rewrites.conv_over_concat import MergeSplitConvs, SplitConvOverConcat
from isthmus.export.rewrites.crd_to_dcr import DepthToSpaceAsDcr
from isthmus.export.rewrites.explicit_attributes import ExplicitAttributes
from isthmus.export.rewrites.grayscale_into_conv import GrayscaleIntoConv
from isthmus.export.rewrites.grid_sample_to_gathers import GridSampleToGathers
from isthmus.export.rewrites.linear_as_gemm import GemmNormalForm, MatMulAddToGemm
from isthmus.export.rewrites.mean_to_pool import ReductionsToPools
from isthmus.export.rewrites.norm_behind_relu import NormBehindRelu
from isthmus.export.rewrites.normalisation_into_conv import NormalisationIntoConv
from isthmus.export.rewrites.pool_before_pointwise import PoolBeforePointwise
from isthmus.export.rewrites.reshape_chain import ReshapeChain
from isthmus.export.rewrites.scale_into_weights import ScaleIntoWeights
from isthmus.export.rewrites.single_token_attention import SingleTokenAttention
from isthmus.export.rewrites.spelled_functions import SpelledFunctions
from isthmus.export.rewrites.static_reshape import StaticReshape

EXACT_REWRITES: tuple[type[NodeRewrite], ...] = (
    ExplicitAttributes,
    MatMulAddToGemm,
    GemmNormalForm,
    AffineIntoLayer,
    ReductionsToPools,
    BilinearToAveragePool,
    GrayscaleIntoConv,
    NormBehindRelu,  # before the next would take factor and shift forward
    ScaleIntoWeights,
    BatchNormToConv,  # what no layer took
    SingleTokenAttention,
    SpelledFunctions,
    BatchInFront,
    ReshapeChain,
    StaticReshape,
)

# Better for some targets, worse for others: `rewrite_exactly(model, [...])` runs them on a copy that is for one of those.
OFFERED_REWRITES: tuple[type[NodeRewrite], ...] = (
    CeilPoolToPad,
    NormalisationIntoConv,  # its Pad is no int8 operator of any target yet, the Sub it takes away runs as a float island
    PoolBeforePointwise,
    SplitConvOverConcat,
    MergeSplitConvs,
    DepthToSpaceAsDcr,
    GridSampleToGathers,
)

# For graphs whose weights are integers already: none of these makes or changes a weight.
QDQ_REWRITES: tuple[type[NodeRewrite], ...] = (ExplicitAttributes, ReductionsToPools, SpelledFunctions, BatchInFront, StaticReshape)
