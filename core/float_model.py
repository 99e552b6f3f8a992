# SPDX-License-Identifier: Apache-2.0
"""A float ONNX model on samples, by ONNX Runtime: what int8 is measured against."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx

from isthmus.errors import IsthmusError


def run_float(model: onnx.ModelProto, samples: Mapping[str, np.ndarray], optimise: bool = True) -> dict[str, np.ndarray]:
    """samples (N, ...) by input name -> outputs (N, ...) by output name, the model's own batch at a time.

    Without `optimise` node by node as the file has them: so an int8 form computes what the reference does (docs/exactness.md), and its float
    islands take no longer than in a float model.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001  # ONNX Runtime raises unrelated types from its C++ side
        raise IsthmusError(f"ONNX Runtime does not load the float model: {str(error).splitlines()[0]}") from None
    names = [value.name for value in session.get_outputs()]
    batch = int(session.get_inputs()[0].shape[0])
    total = len(next(iter(samples.values())))
    parts = [session.run(names, {name: array[start : start + batch] for name, array in samples.items()}) for start in range(0, total // batch * batch, batch)]
    return {name: np.concatenate([part[index] for part in parts]) for index, name in enumerate(names)}
