# SPDX-License-Identifier: Apache-2.0
"""Conv, ConvTranspose and pools with every attribute written: kernel_shape, strides, dilations, and pads instead of auto_pad (but ConvTranspose's)."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from isthmus.export.rewrites._edit import NodeRewrite, attributes_of, input_at, static_shape


class ExplicitAttributes(NodeRewrite):
    def rewrite(self, graph: ir.Graph, node: ir.Node) -> bool:
        if node.op_type not in ("Conv", "ConvTranspose", "MaxPool", "AveragePool"):
            return False
        space = static_shape(node.inputs[0])
        given = attributes_of(node)
        kernel = given.get("kernel_shape") or (static_shape(input_at(node, 1)) or ())[2:]
        if space is None or not kernel or (node.op_type == "ConvTranspose" and (given.get("auto_pad", "NOTSET") != "NOTSET" or "output_shape" in given)):
            return False
        wanted = explicit(node.op_type, given, list(space[2:]), list(kernel))
        if wanted == given:
            return False
        node.attributes.clear()
        for name, value in wanted.items():
            node.attributes[name] = ir.convenience.convert_attribute(name, value)
        return True


def explicit(op: str, given: dict[str, Any], space: list[int], kernel: list[int]) -> dict[str, Any]:
    """The attributes with every default resolved, for an input of `space` extents."""
    rank = len(kernel)
    strides, dilations = given.get("strides") or [1] * rank, given.get("dilations") or [1] * rank
    auto = given.get("auto_pad", "NOTSET")
    pads = given.get("pads") or [0] * (2 * rank)
    if auto == "VALID":
        pads = [0] * (2 * rank)
    elif auto in ("SAME_UPPER", "SAME_LOWER"):
        pads = same_pads(space, kernel, strides, dilations, upper=auto == "SAME_UPPER")
    known = {"auto_pad", "kernel_shape", "strides", "dilations", "pads"}
    wanted = {"kernel_shape": kernel, "strides": strides, "dilations": dilations, "pads": pads}
    if op in ("Conv", "ConvTranspose"):
        wanted["group"] = given.get("group", 1)
    return wanted | {name: value for name, value in given.items() if name not in known}


def same_pads(space: list[int], kernel: list[int], strides: list[int], dilations: list[int], *, upper: bool) -> list[int]:
    """ONNX's SAME: output = ceil(input / stride); an odd pad goes to the end (UPPER) or the begin (LOWER)."""
    totals = [max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0) for n, k, s, d in zip(space, kernel, strides, dilations, strict=True)]
    small = [total // 2 for total in totals]
    large = [total - half for total, half in zip(totals, small, strict=True)]
    return [*small, *large] if upper else [*large, *small]
