# SPDX-License-Identifier: Apache-2.0
"""TensorRT 11, JetPack 7.2 and later: AGX Orin and Thor. The flags INT8 and FP16 and every calibrator are gone: types in the graph decide.

The file is that of TensorRT 10, which its parser reads as well; what differs is the builder (`build_engine.py` asks for no flag).
"""

from __future__ import annotations

from isthmus.targets.jetson.dialects.dialect import Dialect

DIALECT = Dialect(name="TensorRT 11", since=(11, 0), opset=20, ir_version=9, int8_constants=True, strongly_typed=True, jetpack="7.2")
