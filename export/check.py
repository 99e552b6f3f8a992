# SPDX-License-Identifier: Apache-2.0
"""Whether two float models compute the same: what a rewrite must prove."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime

from isthmus.errors import IsthmusError, VerificationError
from isthmus.export.accept import first_line

# Folding a BatchNorm or a bias reorders float32 sums: 1e-4 of the largest output is some hundred roundings.
RELATIVE_TOLERANCE = 1e-4


def check_equal(before: onnx.ModelProto, after: onnx.ModelProto, *, samples: int = 3, seed: int = 0, tolerance: float = RELATIVE_TOLERANCE) -> float:
    """Runs both on the same random input in ONNX Runtime (without its optimiser) and returns the largest difference found, relative
    to the largest magnitude of that output. `after` has static shapes. Raises `VerificationError` naming the output where it is above
    `tolerance`, or where names or shapes differ.
    """
    first, second = _session(before, "the model as given"), _session(after, "the prepared model")
    inputs = {value.name: tuple(value.shape) for value in second.get_inputs()}
    names = [value.name for value in second.get_outputs()]
    if [value.name for value in first.get_outputs()] != names or {value.name for value in first.get_inputs()} != set(inputs):
        raise VerificationError(f"preparing the model changed its inputs or outputs: now {sorted(inputs)} -> {names}")
    generator = np.random.default_rng(seed)
    worst = 0.0
    for _ in range(samples):
        feeds = {name: generator.standard_normal(shape).astype(np.float32) for name, shape in inputs.items()}
        results = [_run(session, names, feeds) for session in (first, second)]
        for name, a, b in zip(names, *results, strict=True):
            worst = max(worst, _difference(name, np.asarray(a), np.asarray(b), tolerance))
    return worst


def _run(session: onnxruntime.InferenceSession, names: list[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    try:
        return list(session.run(names, feeds))
    except Exception as error:  # noqa: BLE001 - onnxruntime's exceptions share no public base class
        raise IsthmusError(f"ONNX Runtime cannot run this model: {first_line(error)}") from None


def _difference(name: str, before: np.ndarray, after: np.ndarray, tolerance: float) -> float:
    if before.shape != after.shape:
        raise VerificationError(f"output {name!r} was {list(before.shape)} and is {list(after.shape)} after preparing the model")
    same = (before == after) | (np.isnan(before) & np.isnan(after))  # infinities and NaN where both have them
    magnitude = float(np.abs(before[np.isfinite(before)]).max(initial=0.0))
    difference = float(np.abs(before.astype(np.float64) - after)[~same].max(initial=0.0)) / (magnitude or 1.0)
    if not difference <= tolerance:  # also where it is NaN
        allowed = f"{tolerance:.0e} is allowed; report this with the model"
        raise VerificationError(f"output {name!r} differs by {difference:.2e} of its largest value after preparing the model, {allowed}")
    return difference


def _session(model: onnx.ModelProto, which: str) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    constants = {tensor.name for tensor in model.graph.initializer}
    if any(value.name in constants for value in model.graph.input):
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        kept = [value for value in copy.graph.input if value.name not in constants]
        del copy.graph.input[:]
        copy.graph.input.extend(kept)
        copy.ir_version = max(copy.ir_version, 4)
        model = copy
    try:
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001 - onnxruntime's exceptions share no public base class
        raise IsthmusError(f"ONNX Runtime cannot run {which}: {first_line(error)}") from None
