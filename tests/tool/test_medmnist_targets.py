# SPDX-License-Identifier: Apache-2.0
"""The custom CNNs of the MedMNIST paper as artifacts: pools that round up, bytes beside float32, the C simulation of what goes to an FPGA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import isthmus
from isthmus.dataset import Dataset
from isthmus.export.module import onnx_from_module
from isthmus.export.prepare import prepare_float
from isthmus.graph import QuantGraph
from isthmus.post_training import PostTraining
from isthmus.recipe import load_recipe
from isthmus.train.loop import TrainConfig, fit
from isthmus.train.zoo import medmnist

SYSTEM = medmnist.SYSTEM


def portable(module: nn.Module, samples: np.ndarray, count: int) -> QuantGraph:
    """The form, calibrated on the first `count` samples."""
    model = prepare_float(onnx_from_module(module, (torch.from_numpy(samples[:1]),)), {})
    recipe = replace(load_recipe("portable"), calibration_samples=count)
    return PostTraining(model, Dataset({"input": samples[:count]}, None, "samples"), lambda text, share: None).graph(recipe)[0]


def test_a_pool_rounds_up_and_int8_takes_little_more_than_a_quarter(tmp_path: Path, require: Callable[[str], str]) -> None:
    """C3 of OrganAMNIST, 28 -> 14 -> 7 -> 4; compiling compares the artifact with the reference, element by element."""
    require("litert")
    from ai_edge_litert.interpreter import Interpreter

    module = SYSTEM.network("organa-c3").eval()
    samples = np.random.default_rng(0).uniform(-1, 1, (8, 3, 28, 28)).astype(np.float32)
    graph = portable(module, samples, 8)
    assert sum(tensor.shape == (1, 128, 4, 4) for tensor in graph.tensors.values()) and not any(t.shape == (1, 128, 3, 3) for t in graph.tensors.values())
    bundle = isthmus.compile(graph, targets=["rpi5"], tune=False, output=tmp_path / "bundle")
    entry = bundle.artifact("rpi5")
    assert entry["verification"][0]["mismatched"] == 0 and entry["verification"][0]["compared"] > 0
    file = bundle.folder("rpi5") / entry["artifact"]
    shapes = [tensor["shape"].tolist() for tensor in Interpreter(model_path=str(file)).get_tensor_details()]
    assert [1, 4, 4, 128] in shapes and [1, 3, 3, 128] not in shapes
    float_bytes = 4 * sum(parameter.numel() for parameter in module.parameters())
    assert 0.25 < file.stat().st_size / float_bytes < 0.30


@pytest.mark.slow
def test_the_simulated_fpga_decides_as_the_float_network(tmp_path: Path, require: Callable[[str], str]) -> None:
    """Two blocks and an average: no pool that rounds up. The simulation equals the reference; of the float network's decisions it shares 95 in 100."""
    require("hls4ml")
    require("g++")
    split = SYSTEM.data(0, "organa-nano")
    module = SYSTEM.network("organa-nano")
    fit(module, split, TrainConfig(epochs=15, learning_rate=1e-2))
    graph = portable(module, split.x_train, 256)
    bundle = isthmus.compile(graph, targets=["pynq-z2"], tune=False, output=tmp_path / "bundle")
    with bundle.open_session("pynq-z2") as session, torch.no_grad():
        found = session.run_samples({graph.inputs[0].name: graph.inputs[0].quantise(split.x_test)})[graph.outputs[0].name]
        expected = module.eval()(torch.from_numpy(split.x_test)).numpy()
    assert bundle.artifact("pynq-z2")["verification"][0]["mismatched"] == 0
    assert (found.argmax(axis=1) == expected.argmax(axis=1)).mean() >= 0.95
