# SPDX-License-Identifier: Apache-2.0
"""`Dialect`: how a graph must be written for one generation of TensorRT's parser."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Dialect:
    """One generation of TensorRT.

    - `since`: the first version it is for.
    - `opset`, `ir_version`: what the file says.
    - `int8_constants`: whether int8 initialisers may stand behind a DequantizeLinear; where not, floats stand behind a QuantizeLinear as well.
    - `strongly_typed`: whether the types in the graph decide; where not, the builder is given the flags FP16 and INT8.
    - `spelled_out`: operators the parser has not, written as smaller ones.
    - `missing`: operators it has not and that are not written otherwise: `check` refuses them.
    - `jetpack`: the release of JetPack that brings it, for messages.
    """

    name: str
    since: tuple[int, int]
    opset: int
    ir_version: int
    int8_constants: bool
    strongly_typed: bool
    jetpack: str
    spelled_out: frozenset[str] = frozenset()
    missing: frozenset[str] = frozenset()
