# SPDX-License-Identifier: Apache-2.0
"""`isthmus run`: samples from files through one artifact, float in and float out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from isthmus.bundle import Bundle
from isthmus.dataset import IMAGE_SUFFIXES, Dataset, Preprocess, from_arrays, load_data, load_image
from isthmus.errors import IsthmusError
from isthmus.session import Session
from isthmus.spec import TensorSpec

SHOWN_ROWS, SHOWN_VALUES = 20, 10


def run_bundle(bundle: Bundle, profile: str, files: Sequence[str], threads: int = 1, trust: bool = False) -> dict[str, np.ndarray]:
    """float32 outputs (N, ...) by name for the samples in `files`: one file, or NAME=FILE an input.

    Images and integer arrays go through the preprocessing the bundle was compiled with. Raises `IsthmusError` on anything that does not fit.
    """
    with bundle.open_session(profile, threads, trust) as session:
        saved = bundle.manifest.get("preprocess")
        samples = _samples(session, files, Preprocess.from_json(saved) if saved else None)
        batch = session.inputs[0].form_shape()[0]
        parts = [session.run({name: array[start : start + batch] for name, array in samples.samples.items()}) for start in range(0, len(samples), batch)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def shown_outputs(outputs: Mapping[str, np.ndarray]) -> str:
    """A few lines a sample: the largest value's index, and the values as far as they fit."""
    lines = []
    for name, array in outputs.items():
        rows = array.reshape(len(array), -1)
        for index, row in enumerate(rows[:SHOWN_ROWS]):
            values = " ".join(f"{value:.5g}" for value in row[:SHOWN_VALUES]) + (" ..." if row.size > SHOWN_VALUES else "")
            lines.append(f"{name}[{index}]  argmax {int(row.argmax())}  {values}")
        if len(rows) > SHOWN_ROWS:
            lines.append(f"... and {len(rows) - SHOWN_ROWS} more samples (--json prints all)")
    return "\n".join(lines)


def _samples(session: Session, files: Sequence[str], preprocess: Preprocess | None) -> Dataset:
    inputs = {spec.name: spec for spec in session.inputs}
    by_name: dict[str, str] = {}
    for word in files:
        name, equals, file = word.partition("=")
        if equals and name in inputs:
            by_name[name] = file
        elif len(inputs) == 1:
            by_name[next(iter(inputs))] = word
        else:
            raise IsthmusError(f"--input {word!r}: the model has the inputs {list(inputs)}; write NAME=FILE")
    missing = [name for name in inputs if name not in by_name]
    if missing:
        raise IsthmusError(f"input {missing[0]!r} is missing: give --input {missing[0]}=FILE")
    arrays = {name: _one(Path(file), inputs[name], preprocess) for name, file in by_name.items()}
    return from_arrays(arrays, None, {name: spec.form_shape() for name, spec in inputs.items()}, None, "--input")


def _one(file: Path, spec: TensorSpec, preprocess: Preprocess | None) -> np.ndarray:
    shape = spec.form_shape()
    if file.suffix.lower() in IMAGE_SUFFIXES:
        if not file.is_file():
            raise IsthmusError(f"{file}: no such file")
        if preprocess is None:
            raise IsthmusError(
                f"{file}: this bundle was compiled without --preprocess, so how pixels become input is not known;"
                " give a .npy of float32, or compile with --preprocess"
            )
        return load_image(file, shape, preprocess)
    return load_data(file, {spec.name: shape}, preprocess).samples[spec.name]
