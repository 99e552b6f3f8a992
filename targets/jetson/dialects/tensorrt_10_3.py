# SPDX-License-Identifier: Apache-2.0
"""TensorRT 10, JetPack 6: Orin. Read from the parser's branches 10.0-GA and 10.1-GA: opset 9 to 20, int8 constants behind a DequantizeLinear."""

from __future__ import annotations

from isthmus.targets.jetson.dialects.dialect import Dialect

DIALECT = Dialect(name="TensorRT 10.3", since=(10, 0), opset=20, ir_version=9, int8_constants=True, strongly_typed=True, jetpack="6")
