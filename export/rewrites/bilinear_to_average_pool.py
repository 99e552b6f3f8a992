# SPDX-License-Identifier: Apache-2.0
"""A bilinear Resize down by an even factor s is the mean of the middle 2x2 of every s x s tile: the centre of a tile lies between its two middle pixels.

With half-pixel centres, output i reads at (i + 1/2) * s - 1/2, half way from i * s + s/2 - 1 to the next. So: cut s/2 - 1 off the begin, then an
average pool of kernel 2 and stride s. A factor of 2 needs no cut.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from isthmus.export.rewrites._edit import NodeRewrite, add_constant, attributes_of, constant, input_at, label_of, new_node, replace, static_shape


class BilinearToAveragePool(NodeRewrite):
    def rewrite(self, graph: ir.Graph, node: ir.Node) -> bool:
        factors = shrink_factors(node) if node.op_type == "Resize" else None
        if factors is None:
            return False
        source, shape = node.inputs[0], static_shape(node.inputs[0]) or ()
        begins, new = [factor // 2 - 1 if factor > 1 else 0 for factor in factors], []
        if any(begins) and source is not None:
            label, axes = label_of(node), range(2, len(shape))
            limits = [begins, list(shape[2:]), list(axes), [1] * len(begins)]
            named = zip(("starts", "ends", "axes", "steps"), limits, strict=True)
            cut = [shape[axis] - begin for axis, begin in zip(axes, begins, strict=True)]
            inputs = [source, *(add_constant(graph, f"{label}_{name}", np.array(values, np.int64)) for name, values in named)]
            new.append(new_node("Slice", inputs, {}, f"{label}_cut", (*shape[:2], *cut)))
            source = new[-1].outputs[0]
        rank = len(factors)
        window = {"kernel_shape": [2 if factor > 1 else 1 for factor in factors], "strides": factors, "dilations": [1] * rank, "pads": [0] * (2 * rank)}
        replace(graph, [node], [*new, new_node("AveragePool", [source], window, node.name)])
        return True


def shrink_factors(node: ir.Node) -> list[int] | None:
    """How many times smaller each space axis becomes, where the Resize is one this file knows: each factor even or 1, one of them even."""
    before, after = static_shape(node.inputs[0]), static_shape(node.outputs[0])
    given = attributes_of(node)
    if before is None or after is None or len(before) not in (3, 4) or before[:2] != after[:2]:
        return None
    centres = given.get("coordinate_transformation_mode", "half_pixel")
    if given.get("mode", "nearest") != "linear" or given.get("antialias", 0) or centres not in ("half_pixel", "pytorch_half_pixel"):
        return None
    factors = [old // new for old, new in zip(before[2:], after[2:], strict=True)]
    exact = all(old == new * factor and (factor == 1 or factor % 2 == 0) for old, new, factor in zip(before[2:], after[2:], factors, strict=True))
    # PyTorch's half pixels put a single output pixel on the first input pixel, not between the middle ones.
    single = centres == "pytorch_half_pixel" and any(new == 1 < old for old, new in zip(before[2:], after[2:], strict=True))
    return factors if exact and not single and any(factor > 1 for factor in factors) and _scales_agree(node, factors) else None


def _scales_agree(node: ir.Node, factors: list[int]) -> bool:
    """Where scales are given, they and not the two extents place the pixels: 0.4 of 5 is 2 pixels, but not every 2.5th."""
    given = input_at(node, 2)
    if given is None or static_shape(given) == (0,):
        return attributes_of(node).get("keep_aspect_ratio_policy", "stretch") == "stretch"
    scales = constant(given)
    wanted = [1.0 / factor for factor in factors]
    if scales is None or len(scales) < len(factors):
        return False
    rank = len(factors) + 2
    axes = [axis % rank for axis in attributes_of(node).get("axes", range(rank))]
    held = dict(zip(axes, (float(scale) for scale in scales), strict=False))
    return [held.get(axis, 1.0) for axis in range(2, rank)] == [float(np.float32(scale)) for scale in wanted]
