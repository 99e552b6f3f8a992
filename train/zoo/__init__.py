# SPDX-License-Identifier: Apache-2.0
"""The zoo: one module of this folder a paper, each with `SYSTEM`: a `ZooSystem`, or an `Architecture` where data and training are not here.

Listing names imports none of them.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isthmus.errors import IsthmusError

if TYPE_CHECKING:
    from torch import nn

    from isthmus.train.data import Split
    from isthmus.train.loop import Progress, TrainConfig
    from isthmus.train.task import Task

PREFIX = "zoo:"


@dataclass(frozen=True)
class Architecture:
    """One network: enough for its cost.

    - `presets`: the network's configuration by name; the first is the default.
    - `build(configuration)`: a new module with random weights (from torch's global generator).
    - `input_shape(configuration)`: what the module takes, batch 1 in front.
    """

    name: str
    summary: str
    paper: str
    presets: Mapping[str, Any]
    build: Callable[[Any], nn.Module]
    input_shape: Callable[[Any], tuple[int, ...]]

    @property
    def default_preset(self) -> str:
        return next(iter(self.presets))

    def configuration(self, preset: str = "") -> Any:
        """The configuration of `preset` ('' for the default). Raises `IsthmusError` that lists the names, the near ones first."""
        return self.presets[_known(preset or self.default_preset, list(self.presets), f"preset of {self.name}")]

    def module(self, preset: str = "", seed: int = 0) -> nn.Module:
        """A new network, the same weights for the same seed."""
        import torch

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.build(self.configuration(preset))


def _whole(module: nn.Module) -> nn.Module:
    return module


def _classification(configuration: Any) -> Task:
    from isthmus.train.task import CLASSIFICATION

    return CLASSIFICATION


@dataclass(frozen=True)
class ZooSystem(Architecture):
    """A network with its data and its training: what `isthmus compile zoo:NAME` takes.

    - `load_data(configuration, seed, root)`: the samples, from the data set's own files under `root`, or without it what comes along (real or synthetic).
    - `train`: how the float network is trained (a recipe sets epochs and learning rate of QAT); `train_presets` for presets that need another way,
      `rehearsal` for presets whose training is too long for synthetic samples.
    - `deployed(module)`: the part that is trained and brought to a device, sharing the module's weights; a classifier's output are scores before a softmax.
    - `task(configuration)`: what it is trained for and judged by.
    - `lesson(configuration, split, root, seed, folder, progress, device)`: the split and the task that the float network is trained with in place of
      those, for a network that has teachers; these are trained by it, on the files under `root` (None: synthetic), and kept in `folder` (None: nowhere).
    - `outputs`: names of what the deployed part returns, in order.
    - `roads`: target family (cpu, tflite, jetson, fpga) to the preset or sub-network that goes there, one phrase each.
    """

    load_data: Callable[[Any, int, Path | None], Split]
    train: TrainConfig
    deployed: Callable[[nn.Module], nn.Module] = _whole
    train_presets: Mapping[str, TrainConfig] = field(default_factory=dict)
    task: Callable[[Any], Task] = _classification
    outputs: tuple[str, ...] = ("output",)
    roads: Mapping[str, str] = field(default_factory=dict)
    rehearsal: Mapping[str, TrainConfig] = field(default_factory=dict)
    lesson: Callable[[Any, Split, Path | None, int, Path | None, Progress | None, str], tuple[Split, Task]] | None = None

    def data(self, seed: int = 0, preset: str = "", root: Path | None = None) -> Split:
        """The samples of a preset; see `load_data`."""
        return self.load_data(self.configuration(preset), seed, root)

    def network(self, preset: str = "", seed: int = 0) -> nn.Module:
        """A new network as it is trained: the deployed part of `module(preset, seed)`."""
        return self.deployed(self.module(preset, seed))

    def training(self, seed: int = 0, preset: str = "", synthetic: bool = False) -> TrainConfig:
        """How the float network of a preset is trained, on the data set's own files or on synthetic samples."""
        preset = preset or self.default_preset
        real = self.train_presets.get(preset, self.train)
        return replace(self.rehearsal.get(preset, real) if synthetic else real, seed=seed)

    def purpose(self, preset: str = "") -> Task:
        """What a preset is trained for; see `task`."""
        return self.task(self.configuration(preset))

    def taught(
        self, split: Split, preset: str, seed: int, root: Path | None, folder: Path | None = None, progress: Progress | None = None, device: str = "cpu"
    ) -> tuple[Split, Task]:
        """The split and the task that the float network of a preset is trained with; see `lesson`."""
        if self.lesson is None:
            return split, self.purpose(preset)
        return self.lesson(self.configuration(preset), split, root, seed, folder, progress, device)


def names() -> list[str]:
    """Every system, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def load(name: str) -> Architecture:
    """The system called `name`. Raises `IsthmusError` that lists the names, the near ones first."""
    system = importlib.import_module(f"{__name__}.{_known(name, names(), 'zoo system')}").SYSTEM
    if not isinstance(system, Architecture):
        raise TypeError(f"zoo module {name}: SYSTEM is a {type(system).__name__}, expected ZooSystem or Architecture")
    return system


def parse(reference: str) -> tuple[Architecture, str]:
    """'zoo:NAME' or 'zoo:NAME@PRESET' as the system and the preset's name. Raises `IsthmusError` on an unknown one."""
    name, at, preset = reference.removeprefix(PREFIX).partition("@")
    if not reference.startswith(PREFIX) or not name or (at and not preset):
        raise IsthmusError(f"{reference!r} is not a zoo model; write zoo:NAME or zoo:NAME@PRESET with NAME one of {', '.join(names())}")
    system = load(name)
    system.configuration(preset)
    return system, preset or system.default_preset


def trainable(system: Architecture) -> ZooSystem:
    """The system as one that can be trained. Raises `IsthmusError` where the zoo holds its architecture alone."""
    if isinstance(system, ZooSystem):
        return system
    ready = ", ".join(PREFIX + name for name in names() if isinstance(load(name), ZooSystem))
    raise IsthmusError(
        f"{PREFIX}{system.name} holds the architecture alone, without data and training, so it cannot be compiled;"
        f" `isthmus cost {PREFIX}{system.name}` counts it, your own trained module compiles as package.module:factory (complete here: {ready})"
    )


def _known(name: str, choices: list[str], what: str) -> str:
    if name in choices:
        return name
    near = difflib.get_close_matches(name, choices, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise IsthmusError(f"unknown {what} {name!r}: {hint}there are {', '.join(choices)}")
