# SPDX-License-Identifier: Apache-2.0
"""TensorRT 8.2, JetPack 4.6: Nano, TX2, Xavier. Read from the parser's branch release/8.2-GA.

`docs/operators.md`: up to opset 13; no GELU, HardSwish, LayerNormalization, Mish (opset 14 and later), no GridSample. DequantizeLinear takes a QuantizeLinear's
output and no int8 initialiser (`convertOnnxWeights` knows the type, the layer behind it does not), so constants stay float behind a pair.
"""

from __future__ import annotations

from isthmus.targets.jetson.dialects.dialect import Dialect

DIALECT = Dialect(
    name="TensorRT 8.2",
    since=(8, 2),
    opset=13,
    ir_version=7,
    int8_constants=False,
    strongly_typed=False,
    jetpack="4.6",
    spelled_out=frozenset({"Gelu", "HardSwish", "LayerNormalization", "Mish"}),
    missing=frozenset({"GridSample"}),
)
