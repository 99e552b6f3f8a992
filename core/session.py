# SPDX-License-Identifier: Apache-2.0
"""`Session`: one artifact opened in one engine. Checks live here, engines fill in three hooks. numpy only."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from isthmus.errors import IsthmusError
from isthmus.spec import TensorSpec

if TYPE_CHECKING:
    from typing import Self  # novm: boards have Python 3.10, which has none

Arrays = Mapping[str, np.ndarray]


class Session:
    """An opened artifact: a context manager that owns the engine.

    `inputs` and `outputs` are the border as the engine sees it (dtype, layout, scale). `run` takes and gives float32 in the
    form's layout (NCHW); `run_raw` takes and gives exactly what the specs say (int8, the engine's layout), with no check and
    no copy beyond the engine's own: it is what the harness times.

    An engine subclasses this, fills `_run_raw` and `_close`, and may override `per_layer`; one that queues runs overrides `run_ahead` and `finish`.
    """

    engine: str = ""

    def __init__(self, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
        self.inputs = inputs
        self.outputs = outputs
        self._closed = False
        self._last: dict[str, np.ndarray] = {}

    # ---- what an engine fills in
    def _run_raw(self, feeds: Arrays) -> dict[str, np.ndarray]:
        raise NotImplementedError

    def _close(self) -> None:
        return None

    # ---- what everyone calls
    def run_raw(self, feeds: Arrays) -> dict[str, np.ndarray]:
        """Raw in, raw out (int8 where the spec is int8), in the engine's layout. Outputs may be views that the next run overwrites."""
        return self._run_raw(feeds)

    def run_ahead(self, feeds: Arrays) -> None:
        """Starts a run that may still be under way when this comes back: what Offline calls. An engine without a queue runs at once."""
        self._last = self.run_raw(feeds)

    def finish(self) -> dict[str, np.ndarray]:
        """Waits for all that `run_ahead` started; gives the raw outputs of the last."""
        return self._last

    def run(self, feeds: Arrays) -> dict[str, np.ndarray]:
        """float32 in, float32 out, form layout: quantises, permutes, checks names, shapes, dtypes and NaN.

        Raises `IsthmusError` on a missing or extra name, a wrong shape, a dtype that is not numeric, or a NaN.
        """
        raw = {spec.name: spec.from_form(spec.quantise(self._checked(feeds, spec))) for spec in self.inputs}
        self._no_extra(feeds)
        results = self.run_raw(raw)
        return {spec.name: spec.dequantise(spec.to_form(np.array(results[spec.name]))) for spec in self.outputs}

    def run_quantised(self, feeds: Arrays) -> dict[str, np.ndarray]:
        """Raw values (int8) in the form's layout on both sides: what is compared with the integer reference."""
        self._no_extra(feeds)
        raw: dict[str, np.ndarray] = {}
        for spec in self.inputs:
            array = feeds.get(spec.name)
            array = array if array is None else spec.from_reference(array)
            if array is None or tuple(array.shape) != spec.form_shape() or str(array.dtype) != spec.dtype:
                found = "nothing" if array is None else f"{array.dtype}{list(array.shape)}"
                raise IsthmusError(f"input {spec.name!r}: expected {spec.dtype}{list(spec.form_shape())}, found {found}")
            raw[spec.name] = spec.from_form(array)
        results = self.run_raw(raw)
        return {spec.name: spec.to_reference(spec.to_form(np.array(results[spec.name]))) for spec in self.outputs}

    def run_samples(self, feeds: Arrays) -> dict[str, np.ndarray]:
        """`run_quantised` for arrays of many samples (N, ...), the engine's own batch at a time."""
        batch = self.inputs[0].form_shape()[0]
        total = len(feeds[self.inputs[0].name])
        parts = [self.run_quantised({name: array[start : start + batch] for name, array in feeds.items()}) for start in range(0, total, batch)]
        return {spec.name: np.concatenate([part[spec.name] for part in parts]) for spec in self.outputs}

    def per_layer(self, feeds: Arrays, runs: int = 20) -> list[tuple[str, float]]:
        """(node's name, its mean time in ns over `runs` runs) in the order of execution, for `feeds` as `run_raw` takes them.

        The names are the engine's own: fused nodes are one entry. Timing each node costs time, so the sum is above what the harness measures.
        Raises `IsthmusError` where the engine times no single nodes, and on fewer than one run.
        """
        raise IsthmusError(f"engine {self.engine or type(self).__name__} gives no time per layer")

    def abandon(self) -> None:
        """Forgets the engine without closing it: another thread is still inside a run that does not come back."""
        self._closed = True

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # ---- checks
    def _no_extra(self, feeds: Arrays) -> None:
        extra = sorted(set(feeds) - {spec.name for spec in self.inputs})
        if extra:
            raise IsthmusError(f"unknown input {extra[0]!r}: the model's inputs are {[spec.name for spec in self.inputs]}")

    def _checked(self, feeds: Arrays, spec: TensorSpec) -> np.ndarray:
        if spec.name not in feeds:
            raise IsthmusError(f"input {spec.name!r} is missing: found {sorted(feeds)}")
        array = np.asarray(feeds[spec.name])
        if array.dtype.kind not in "fiub":
            raise IsthmusError(f"input {spec.name!r}: expected numbers, found dtype {array.dtype}")
        if tuple(array.shape) != spec.form_shape():
            raise IsthmusError(f"input {spec.name!r}: expected shape {list(spec.form_shape())}, found {list(array.shape)}")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise IsthmusError(f"input {spec.name!r} holds NaN or infinity")
        return array.astype(np.float32, copy=False)
