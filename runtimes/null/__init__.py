# SPDX-License-Identifier: Apache-2.0
"""Engine `null`: computes nothing. The worked example of an engine, and what the harness itself costs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from isthmus.errors import IsthmusError
from isthmus.session import Arrays, Session
from isthmus.spec import TensorSpec


def open_session(folder: Path, entry: Mapping[str, Any], threads: int = 1) -> NullSession:
    """What every engine has: opens the artifact of a manifest entry, or raises `IsthmusError` with one sentence."""
    file = Path(folder) / entry["artifact"]
    if not file.is_file():
        raise IsthmusError(f"{file}: no such file; compile the bundle again")
    inputs, outputs = (tuple(TensorSpec.from_json(spec) for spec in entry[side]) for side in ("inputs", "outputs"))
    return NullSession(inputs, outputs)


class NullSession(Session):
    """Zeros of the right shape and dtype, made once. They are no result: never compare them with the reference."""

    engine = "null"
    version = "1"

    def __init__(self, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
        super().__init__(inputs, outputs)
        self._results = {spec.name: np.zeros(spec.shape, spec.dtype) for spec in outputs}

    def _run_raw(self, feeds: Arrays) -> dict[str, np.ndarray]:
        """A real engine reads `feeds` in place and writes into buffers it owns: no check and no copy, this is what is timed."""
        return self._results
