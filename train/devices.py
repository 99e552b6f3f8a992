# SPDX-License-Identifier: Apache-2.0
"""Where a training runs: a CPU or a CUDA device, in one process or in the several that `torchrun` started."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch import distributed as dist

from isthmus.errors import IsthmusError

Value = TypeVar("Value")
TIMEOUT = datetime.timedelta(minutes=30)  # the first process may read a large data set before the others go on


def chosen_device(name: str) -> str:
    """ "cpu" or "cuda" of "cpu", "cuda", "auto" (CUDA where there is a device). Raises `IsthmusError` on another word, or where CUDA is absent."""
    if name not in ("cpu", "cuda", "auto"):
        raise IsthmusError(f"device {name!r}: expected cpu, cuda or auto")
    if name == "cuda" and not torch.cuda.is_available():
        raise IsthmusError(
            f"device cuda: torch {torch.__version__} sees no CUDA device here; train with --device cpu, or install torch for CUDA and its driver"
        )
    return name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def torch_device(name: str) -> torch.device:
    """The device of this process: under `torchrun` each process of a machine has a CUDA device of its own."""
    if chosen_device(name) == "cpu":
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", "0"))
    if index >= torch.cuda.device_count():
        raise IsthmusError(f"device cuda: process {index} of this machine, which has {torch.cuda.device_count()}; start as many processes as devices")
    return torch.device("cuda", index)


def is_first_process() -> bool:
    """Whether this process speaks for all that `torchrun` started: prints, and writes files."""
    return os.environ.get("RANK", "0") == "0"


@dataclass(frozen=True)
class Workers:
    """The processes of one training: this is number `rank` of `count`. Alone, every method gives back what it was given."""

    rank: int = 0
    count: int = 1

    @classmethod
    def now(cls) -> Workers:
        """Those that `joined` brought together, or this process alone."""
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else cls()

    def share(self, rows: Tensor) -> tuple[Tensor, float]:
        """This process's rows of a batch, and what its mean loss counts: the mean of all the processes' is then the batch's own."""
        if self.count == 1:
            return rows, 1.0
        own = rows[self.rank :: self.count]
        # A batch smaller than the processes: one row that counts nothing, as every process takes part in every step.
        return (own, len(own) * self.count / len(rows)) if len(own) else (rows[:1], 0.0)

    def together(self, module: nn.Module, device: torch.device) -> nn.Module:
        """The module as it is called in training: its gradients are the mean of all processes'."""
        if self.count == 1:
            return module
        return nn.parallel.DistributedDataParallel(module, device_ids=[device.index] if device.type == "cuda" else None)

    def agree(self, *tensors: Tensor, device: torch.device) -> None:
        """Overwrites each tensor with the first process's."""
        if self.count > 1:
            for tensor in tensors:
                shared = tensor.to(device)
                dist.broadcast(shared, 0)
                tensor.copy_(shared)

    def shared(self, make: Callable[[], Value]) -> Value:
        """What the first process makes, for all: the others may be on machines that have not its files."""
        if self.count == 1:
            return make()
        made = [make() if self.rank == 0 else None]
        dist.broadcast_object_list(made, 0)
        return cast(Value, made[0])

    def mean(self, value: Tensor) -> float:
        if self.count == 1:
            return value.item()
        summed = value.detach().clone()
        dist.all_reduce(summed)
        return summed.item() / self.count

    def gathered(self, state: Tensor, device: torch.device) -> Tensor:
        """(processes, n): the rows of all, where each has bytes (n)."""
        if self.count == 1:
            return state[None]
        rows = [torch.empty_like(state, device=device) for _ in range(self.count)]
        dist.all_gather(rows, state.to(device))
        return torch.stack(rows).cpu()


@contextmanager
def joined(device: str) -> Iterator[Workers]:
    """The processes that `torchrun` started, brought together (NCCL on CUDA, Gloo on a CPU); this one alone where none did."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield Workers.now()
        return
    place = torch_device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    dist.init_process_group("cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield Workers.now()
    finally:
        dist.destroy_process_group()


def generator_state(device: torch.device) -> Tensor:
    """The states of the generators that a training on `device` draws from, bytes (n)."""
    states = [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]
    return torch.cat(states)


def restore_generator(state: Tensor, device: torch.device) -> None:
    size = len(torch.get_rng_state())
    torch.set_rng_state(state[:size].clone())  # torch 2.13 takes no view of a larger tensor here: it crashes
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[size:].clone(), device)
