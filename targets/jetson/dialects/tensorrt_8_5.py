# SPDX-License-Identifier: Apache-2.0
"""TensorRT 8.5, JetPack 5.1: Xavier and Orin. Read from the parser's branch release/8.5-GA.

`docs/operators.md`: up to opset 17; "HardSwish | N", "LayerNormalization | N", no GELU and no Mish; GridSample is there. Constants as in 8.2.
"""

from __future__ import annotations

from isthmus.targets.jetson.dialects.dialect import Dialect

DIALECT = Dialect(
    name="TensorRT 8.5",
    since=(8, 5),
    opset=17,
    ir_version=8,
    int8_constants=False,
    strongly_typed=False,
    jetpack="5.1",
    spelled_out=frozenset({"Gelu", "HardSwish", "LayerNormalization", "Mish"}),
)
