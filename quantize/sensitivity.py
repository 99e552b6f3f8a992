# SPDX-License-Identifier: Apache-2.0
"""Which layer costs accuracy in int8: each alone in int8 with the others float, and each alone float with the others in int8."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from isthmus.compare import top1_accuracy
from isthmus.errors import IsthmusError

METRICS = ("sqnr", "top1")
Outputs = Mapping[str, np.ndarray]
OutputsWith = Callable[[Collection[str]], Outputs]  # the outputs with these layers float and all others in int8
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Fidelity:
    """How near outputs are to the float model's: `sqnr_db` (infinite where they are equal), and `top1`, see `Sensitivity.labelled`."""

    sqnr_db: float
    top1: float

    def to_json(self) -> dict[str, float | None]:
        return {"sqnr_db": self.sqnr_db if math.isfinite(self.sqnr_db) else None, "top1": self.top1}


@dataclass(frozen=True)
class LayerSensitivity:
    """One layer: `alone` with it in int8 and the others float, `spared` with it float and the others in int8 (None where it is the only layer)."""

    name: str
    alone: Fidelity
    spared: Fidelity | None


@dataclass(frozen=True)
class Sensitivity:
    """`layers`, the most sensitive first by `metric`; `int8` with all of them in int8.

    `labelled`: top1 is accuracy against labels, and `float_top1` the float model's; else it is the share of samples on which the largest output is
    the float model's.
    """

    metric: str
    samples: int
    labelled: bool
    float_top1: float
    int8: Fidelity
    layers: tuple[LayerSensitivity, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data; a SQNR that is infinite is None."""
        layers = [{"name": row.name, "alone": row.alone.to_json(), "spared": row.spared.to_json() if row.spared else None} for row in self.layers]
        return asdict(self) | {"int8": self.int8.to_json(), "layers": layers}


def sensitivity(
    layers: Sequence[str],
    outputs_with: OutputsWith,
    exact: Outputs,
    labels: np.ndarray | None,
    metric: str = "sqnr",
    progress: Progress | None = None,
    spared: bool = True,
) -> Sensitivity:
    """Tries every layer twice (once without `spared`). `exact` are the float model's outputs, top-1 is read from the first of them.

    Raises `IsthmusError` on an unknown metric or where there is no layer.
    """
    if metric not in METRICS:
        raise IsthmusError(f"unknown metric {metric!r}: there are {', '.join(METRICS)}")
    if not layers:
        raise IsthmusError("no layer is left to try: every one is kept float by the recipe")
    first = next(iter(exact))
    truth = decisions(exact[first]) if labels is None else labels
    total, done = len(layers) * (2 if spared else 1) + 1, 0

    def tried(kept_float: Collection[str]) -> Fidelity:
        nonlocal done
        outputs = outputs_with(kept_float)
        done += 1
        if progress is not None:
            progress(f"{done} of {total} graphs", done / total)
        return Fidelity(sqnr_db(exact, outputs), top1_accuracy(outputs[first], truth))

    everything = tried(())
    rows = []
    for name in layers:
        others = [other for other in layers if other != name]
        alone = tried(others) if others else everything
        rows.append(LayerSensitivity(name, alone, tried([name]) if others and spared else None))
    rows.sort(key=lambda row: (row.alone.top1, row.alone.sqnr_db) if metric == "top1" else (row.alone.sqnr_db, row.alone.top1))
    return Sensitivity(metric, len(truth), labels is not None, top1_accuracy(exact[first], truth), everything, tuple(rows))


def sqnr_db(exact: Outputs, found: Outputs) -> float:
    """10 log10 of the power of the exact outputs over that of the error, all outputs together; infinite where nothing differs."""
    power = sum(float(np.square(np.asarray(values, np.float64)).sum()) for values in exact.values())
    error = sum(float(np.square(np.asarray(values, np.float64) - found[name]).sum()) for name, values in exact.items())
    if error == 0:
        return math.inf
    return 10 * math.log10(power / error) if power > 0 else -math.inf


def decisions(outputs: np.ndarray) -> np.ndarray:
    """The index of the largest output of each sample."""
    largest: np.ndarray = outputs.reshape(len(outputs), -1).argmax(axis=1)
    return largest
