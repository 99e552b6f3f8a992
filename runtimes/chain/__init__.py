# SPDX-License-Identifier: Apache-2.0
"""Engine `chain`: a network cut in two, the first part in one engine and the rest in another; the cut tensors are handed over as integers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from isthmus.errors import IsthmusError
from isthmus.session import Arrays, Session
from isthmus.spec import TensorSpec

RUNS_NATIVE_CODE = True  # a part may: asked for once, for the whole
PART_FIELDS = ("folder", "artifact", "engine", "inputs", "outputs")


class ChainSession(Session):
    """Runs the parts one after the other. What a part gives under a name that a later one takes is handed over, in that one's layout.

    Raises `IsthmusError` where the border of two parts does not match: shape, scale and zero point of a cut tensor are the same on both sides.
    """

    engine = "chain"

    def __init__(self, parts: Sequence[Session], inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
        super().__init__(inputs, outputs)
        self._parts = tuple(parts)
        self._handed = _checked_borders(self._parts, inputs, outputs)

    @property
    def version(self) -> str:
        return ", then ".join(f"{part.engine} {getattr(part, 'version', '')}".strip() for part in self._parts)

    def _run_raw(self, feeds: Arrays) -> dict[str, np.ndarray]:
        known = dict(feeds)
        for part, handed in zip(self._parts, self._handed, strict=True):
            taken = {spec.name: known[spec.name] for spec in part.inputs}
            for name, (given, wanted) in handed.items():
                taken[name] = _handed_over(taken[name], given, wanted)
            known.update(part.run_raw(taken))
        return {spec.name: known[spec.name] for spec in self.outputs}

    def _close(self) -> None:
        for part in self._parts:
            part.close()


def _handed_over(array: np.ndarray, given: TensorSpec, wanted: TensorSpec) -> np.ndarray:
    form = given.to_reference(given.to_form(array))
    return np.ascontiguousarray(wanted.from_form(wanted.from_reference(form)))


def _checked_borders(
    parts: Sequence[Session], inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]
) -> list[dict[str, tuple[TensorSpec, TensorSpec]]]:
    """For each part, what it takes from an earlier one: (spec as given, spec as wanted)."""
    known: dict[str, TensorSpec] = {}
    handed = []
    outer = {spec.name for spec in inputs}
    for part in parts:
        taken = {spec.name: (known[spec.name], spec) for spec in part.inputs if spec.name in known}
        for name, (given, wanted) in taken.items():
            if (given.form_shape(), given.scale, given.zero_point) != (wanted.form_shape(), wanted.scale, wanted.zero_point):
                raise IsthmusError(f"the cut tensor {name!r} is {given} on one side and {wanted} on the other; compile again")
        missing = [spec.name for spec in part.inputs if spec.name not in known and spec.name not in outer]
        if missing:
            raise IsthmusError(f"nothing gives {missing[0]!r}, which a part of the chain takes; compile again")
        known |= {spec.name: spec for spec in part.outputs}
        handed.append(taken)
    missing = [spec.name for spec in outputs if spec.name not in known]
    if missing:
        raise IsthmusError(f"no part of the chain gives the output {missing[0]!r}; compile again")
    return handed


def open_session(folder: Path, entry: Mapping[str, Any], threads: int = 1) -> ChainSession:
    """Opens every part in its engine. Raises `IsthmusError` where one cannot be opened; those before it are closed again."""
    inputs, outputs = (tuple(TensorSpec.from_json(spec) for spec in entry[side]) for side in ("inputs", "outputs"))
    opened: list[Session] = []
    try:
        for part in _parts(entry):
            engine = import_module(f"isthmus.runtimes.{part['engine']}")
            opened.append(engine.open_session(Path(folder) / part["folder"], part, threads))
        return ChainSession(opened, inputs, outputs)
    except ImportError as error:
        _close_all(opened)
        raise IsthmusError(f"a part of the chain cannot be opened: {error}; 'isthmus doctor' says what brings it") from error
    except IsthmusError:
        _close_all(opened)
        raise


def _close_all(sessions: Sequence[Session]) -> None:
    for session in sessions:
        session.close()


def _parts(entry: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    parts = entry.get("parts")
    if not isinstance(parts, list) or not parts or any(not isinstance(part, dict) or any(key not in part for key in PART_FIELDS) for part in parts):
        raise IsthmusError("the manifest entry of a chain lists no parts, or not all of one; compile again")
    for part in parts:
        if not isinstance(part["engine"], str) or not part["engine"].isidentifier() or part["engine"] == "chain":
            raise IsthmusError(f"engine {part['engine']!r} is no engine's name")
        if not isinstance(part["folder"], str) or not part["folder"].isidentifier():
            raise IsthmusError(f"{part['folder']!r} is no folder of a chain's part")
    return parts
