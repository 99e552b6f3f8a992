# SPDX-License-Identifier: Apache-2.0
"""`Checkpoint`: a training kept on disk after every epoch, so that it goes on from there to the same weights after a kill."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from isthmus.errors import IsthmusError
from isthmus.train.data import Split

SCHEMA = 2


@dataclass(frozen=True)
class Owner:
    """Whose a checkpoint is. Two trainings with equal owners come to the same weights.

    `model`: the caller's name of it, with its preset. `code`: digest of the network's layers. `data`: digest of name and labels. `settings`: in words.
    """

    model: str
    code: str
    data: str
    settings: str

    @classmethod
    def of(cls, model: str, module: nn.Module, split: Split, settings: str) -> Owner:
        layers = [str(module), *(f"{name} {list(tensor.shape)} {tensor.dtype}" for name, tensor in module.state_dict().items())]
        targets = hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in (split.y_train, split.y_val))).hexdigest()
        data = f"{split.name}, {list(split.x_train.shape)}, {targets}"
        return cls(model, hashlib.sha256("\n".join(layers).encode()).hexdigest(), data, settings)


@dataclass
class TrainState:
    """Everything a training needs to go on: state dicts, `epochs` as plain numbers, torch's generators (a row a process)."""

    module: Mapping[str, Tensor]
    best: Mapping[str, Tensor]
    optimiser: Mapping[str, Any]
    schedule: Mapping[str, Any]
    generators: Tensor
    epochs: list[list[float]]
    step: int


def read_checkpoint(file: Path) -> tuple[Owner, TrainState]:
    """Whose the file is, and what it keeps; nothing in it is run. Raises `IsthmusError` where it is no whole checkpoint."""
    try:
        stored = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise IsthmusError(f"{file}: cannot be read as a checkpoint ({reason}); delete it to train anew") from None
    if not isinstance(stored, dict) or stored.get("schema") != SCHEMA or set(stored) != {"schema", "owner", *(f.name for f in fields(TrainState))}:
        raise IsthmusError(f"{file}: is no checkpoint of schema {SCHEMA}; delete it to train anew, or give another file")
    return Owner(**stored["owner"]), TrainState(**{field.name: stored[field.name] for field in fields(TrainState)})


class Checkpoint:
    """One file, replaced as a whole: at any moment it is the last finished epoch's. `model` names the network and its preset."""

    def __init__(self, file: str | Path, model: str) -> None:
        self.file = Path(file)
        self.model = model

    def load(self, owner: Owner) -> TrainState | None:
        """The kept state, None where there is no file. Raises `IsthmusError` on a file that cannot be read or that another training owns."""
        if not self.file.exists():
            return None
        found, state = read_checkpoint(self.file)
        self._same(found, owner)
        return state

    def save(self, owner: Owner, state: TrainState) -> None:
        """Raises `IsthmusError` where it cannot be written; the file is then still the one before."""
        buffer = io.BytesIO()
        content = {"schema": SCHEMA, "owner": asdict(owner)} | {field.name: getattr(state, field.name) for field in fields(state)}
        torch.save(content, buffer)
        partial = self.file.with_name(self.file.name + ".partial")
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as stream:
                stream.write(buffer.getbuffer())
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(self.file)
        except OSError as error:
            with contextlib.suppress(OSError):  # where no file can be made, there is none to remove
                partial.unlink()
            kept = f"the one before (epoch {len(state.epochs) - 2}) is kept" if self.file.exists() else "there is none before it"
            raise IsthmusError(
                f"{self.file}: the checkpoint of epoch {len(state.epochs) - 1} ({buffer.getbuffer().nbytes} bytes) cannot be written: {error.strerror};"
                f" {kept}; make room or give another folder, then train again to go on"
            ) from None

    def _same(self, found: Owner, owner: Owner) -> None:
        advice = "give another file, or delete it to train anew"
        if found.model != owner.model:
            raise IsthmusError(f"{self.file}: is a checkpoint of {found.model}, not of {owner.model}; {advice}")
        if found.code != owner.code:
            raise IsthmusError(f"{self.file}: is a checkpoint of {found.model} written by other code: its layers are not those of today; {advice}")
        if found.settings != owner.settings:
            raise IsthmusError(f"{self.file}: was trained with {found.settings}, now asked for {owner.settings}; {advice}")
        if found.data != owner.data:
            raise IsthmusError(f"{self.file}: was trained on other data; {advice}")
