# SPDX-License-Identifier: Apache-2.0
"""`Comparison`: what an engine computed against the integer reference, output by output. Nothing compared never passes. numpy only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from isthmus.errors import IsthmusError
from isthmus.spec import TensorSpec

# A float tail (softmax) on equal integers: engines differ in the last bits of exp and of the sum's order, no more.
FLOAT_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Comparison:
    """One output: `compared` elements, of which `mismatched` differ; the largest difference in steps (int8: `max_lsb`, exact) or as a number (`max_abs`)."""

    tensor: str
    kind: str
    compared: int
    mismatched: int
    max_lsb: int
    max_abs: float
    passed: bool

    @property
    def exact_share(self) -> float:
        """Share of equal elements, 0 where nothing was compared."""
        return 1.0 - self.mismatched / self.compared if self.compared else 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compare_output(spec: TensorSpec, expected: np.ndarray, actual: np.ndarray, max_lsb: int = 0, tolerance: float = FLOAT_TOLERANCE) -> Comparison:
    """int8: passes where no element is further off than `max_lsb` steps. float32: within `tolerance` of max(1, |expected|).

    Raises `IsthmusError` where shape or dtype differ: that is a broken engine, not a difference.
    """
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        raise IsthmusError(f"output {spec.name!r}: expected {expected.dtype}{list(expected.shape)}, the engine gave {actual.dtype}{list(actual.shape)}")
    count = int(expected.size)
    if spec.is_quantised:
        steps = np.abs(expected.astype(np.int32) - actual.astype(np.int32))
        worst = int(steps.max(initial=0))
        return Comparison(spec.name, "int8", count, int(np.count_nonzero(steps)), worst, worst * float(spec.scale or 0), count > 0 and worst <= max_lsb)
    off = np.abs(expected.astype(np.float64) - actual.astype(np.float64))
    outside = ~(off <= tolerance * np.maximum(1.0, np.abs(expected)))  # written so that NaN is outside
    return Comparison(spec.name, "float32", count, int(np.count_nonzero(outside)), 0, float(off.max(initial=0)), count > 0 and not outside.any())


def compare_outputs(
    specs: Sequence[TensorSpec], expected: Mapping[str, np.ndarray], actual: Mapping[str, np.ndarray], max_lsb: int = 0, tolerance: float = FLOAT_TOLERANCE
) -> list[Comparison]:
    """Every output of `specs`; one that the engine did not give raises `IsthmusError`."""
    missing = [spec.name for spec in specs if spec.name not in actual]
    if missing:
        raise IsthmusError(f"the engine gave no output {missing[0]!r}: it gave {sorted(actual)}")
    return [compare_output(spec, expected[spec.name], actual[spec.name], max_lsb, tolerance) for spec in specs]


def top1_accuracy(outputs: np.ndarray, labels: np.ndarray) -> float:
    """Share of samples whose largest output (first one on a tie) is the label. outputs (N, classes, ...) flattened behind N."""
    if len(outputs) != len(labels) or not len(labels):
        raise IsthmusError(f"accuracy: {len(outputs)} outputs for {len(labels)} labels, expected the same number, at least one")
    return float(np.mean(outputs.reshape(len(outputs), -1).argmax(axis=1) == labels))
