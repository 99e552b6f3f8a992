# SPDX-License-Identifier: Apache-2.0
"""Where a training runs: words for devices, and two processes as `torchrun` starts them, brought together over Gloo."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from isthmus.errors import IsthmusError
from isthmus.train.devices import Workers, chosen_device
from isthmus.train.loop import TrainConfig

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens where there is no CUDA device")


def test_a_device_by_its_name() -> None:
    assert chosen_device("cpu") == "cpu" and chosen_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(IsthmusError, match=r"device 'gpu': expected cpu, cuda or auto"):
        chosen_device("gpu")
    with pytest.raises(IsthmusError, match=r"device must be cpu or cuda"):
        TrainConfig(epochs=1, device="auto")


@without_cuda
def test_cuda_where_there_is_none() -> None:
    with pytest.raises(IsthmusError, match=r"device cuda: torch .* sees no CUDA device here; train with --device cpu, or install torch for CUDA"):
        chosen_device("cuda")


@pytest.mark.parametrize(("rows", "count"), [(8, 2), (7, 3), (2, 4)])
def test_the_processes_shares_of_a_batch_have_its_mean(rows: int, count: int) -> None:
    losses = torch.arange(rows, dtype=torch.float32)
    shares = [Workers(rank, count).share(torch.arange(rows)) for rank in range(count)]
    assert sum(float(losses[own].mean()) * weight for own, weight in shares) / count == pytest.approx(float(losses.mean()))
    assert all(len(own) for own, _ in shares)  # every process takes part


# One interpreter imports torch and forks: what each process then does is what it does under torchrun. Only the first has the checkpoint's folder.
PROCESSES = """
import json, os, sys
sys.path.insert(0, {folder!r})
os.environ |= {{"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "{port}"}}
import torch
import torch._dynamo  # by optimisers; before the fork, or each process would take its seconds
from test_train_checkpoint import CONFIG, Checkpoint, KilledError, fit, killed_in, network, split, weights
from isthmus.errors import IsthmusError
from isthmus.train.devices import joined

def trained(module, progress=None, checkpoint=None):
    result = fit(module, split(), CONFIG, progress, checkpoint=checkpoint)
    return [part.tolist() for part in weights(module)], [epoch.loss for epoch in result.epochs[1:]]

def linear():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(1), torch.nn.Linear(16, 4))

child = os.fork()
rank = 0 if child else 1
os.environ |= {{"RANK": str(rank), "LOCAL_RANK": str(rank)}}
checkpoint = Checkpoint(os.path.join({folder_of_runs!r}, str(rank), "checkpoint.pt"), "quarters")
found = {{}}
with joined("cpu") as workers:
    assert (workers.rank, workers.count) == (rank, 2)
    found["linear"] = trained(linear())
    found["whole"] = trained(network())
    try:
        trained(network(), killed_in(3), checkpoint)
    except KilledError:
        found["resumed"] = trained(network(), None, checkpoint)
with open(os.path.join({folder_of_runs!r}, f"{{rank}}.json"), "w") as stream:
    json.dump(found, stream)
if rank:
    os._exit(0)
found = {{"linear": trained(linear())}}
try:
    trained(network(), None, checkpoint)
except IsthmusError as error:
    found["refused"] = str(error)
with open(os.path.join({folder_of_runs!r}, "alone.json"), "w") as stream:
    json.dump(found, stream)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_two_processes_train_as_one_and_go_on_where_they_stopped(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = PROCESSES.format(folder=str(Path(__file__).parent), folder_of_runs=str(tmp_path), port=port)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second, alone = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("0", "1", "alone"))
    assert first == second  # the same weights everywhere, batch norm's running statistics too
    assert first["resumed"][0] == first["whole"][0]
    assert (tmp_path / "0" / "checkpoint.pt").is_file() and not (tmp_path / "1").exists()
    # Each process's gradient is of half of the batch: the sums are the same in another order.
    for found, expected in zip(first["linear"], alone["linear"], strict=True):
        for part, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(part, other, rtol=1e-4, atol=1e-6)
    assert re.search(r"was trained with TrainConfig\(.*\) in 2 processes, now asked for TrainConfig\(.*\); give another file", alone["refused"])
