# SPDX-License-Identifier: Apache-2.0
"""QAT of a user's own module: by labels and without, from the file to the bundle, and as a step of `--recipe auto`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import isthmus
from isthmus.auto_recipe import base_recipe, climb
from isthmus.dataset import Dataset
from isthmus.errors import IsthmusError, Problem
from isthmus.float_model import run_float
from isthmus.graph import QuantGraph
from isthmus.post_training import PostTraining, outputs_of
from isthmus.quantize import qat
from isthmus.quantize.fine_tune import fine_tune
from isthmus.quantize.sensitivity import sqnr_db
from isthmus.recipe import Recipe
from isthmus.source import Source, load_source

SHORT = Recipe(name="short", observer="mse", qat_epochs=1)


@pytest.fixture(autouse=True)
def _brevitas(require: Callable[[str], str]) -> Iterator[None]:
    require("brevitas")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class TwoHeads(nn.Module):
    """Batch norm, an in-place activation, a residual addition, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.body = nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.classes, self.value = nn.Linear(6, 3), nn.Linear(6, 1)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(image)
        x = torch.relu(x + self.body(x)).mean(dim=(2, 3))
        return self.classes(x), self.value(x)


def network(kind: type[nn.Module] = TwoHeads) -> nn.Module:
    torch.manual_seed(1)
    module = kind()
    for _ in range(10):  # running statistics
        module(torch.randn(16, 1, 8, 8))
    return module


def samples(count: int = 96) -> tuple[np.ndarray, np.ndarray]:
    """Noise with a bright row, whose place is the class."""
    generator = np.random.default_rng(5)
    labels = generator.integers(0, 3, count)
    images = generator.standard_normal((count, 1, 8, 8)).astype(np.float32) / 2
    images[np.arange(count), 0, 2 * labels + 1] += 1.5
    return images, labels


def quiet(text: str, share: float | None) -> None:
    return None


@cache
def source_of(kind: type[nn.Module] = TwoHeads) -> tuple[nn.Module, Source]:
    module = network(kind)
    return module, load_source(module, torch.zeros(1, 1, 8, 8), {}, Recipe(), quiet)


def trained(recipe: Recipe, labelled: bool, kind: type[nn.Module] = TwoHeads) -> tuple[QuantGraph, list[str], float]:
    """The form, what is said, and how near it is to the float module in dB."""
    images, labels = samples()
    source = source_of(kind)[1]
    assert source.train is not None and source.float_model is not None
    graph, notes = source.train(Dataset({"input": images}, labels if labelled else None, "rows"), recipe, quiet)
    other = Dataset({"input": samples(160)[0][96:]}, None, "rows")
    return graph, notes, sqnr_db(run_float(source.float_model, other.samples), outputs_of(graph, other))


def test_without_labels_it_learns_from_the_float_module() -> None:
    module = source_of()[0]
    before = {name: value.clone() for name, value in module.state_dict().items()}
    low = replace(SHORT, weight_bits=4, qat_epochs=6)
    graph, notes, near = trained(low, labelled=False)
    _, _, untrained = trained(replace(low, qat_epochs=0), labelled=False)
    assert near > untrained + 2
    assert re.fullmatch(
        r"quantisation-aware training: towards the float model's outputs, 77 samples, loss \S+ before, \S+ at best, after epoch [1-6] of 6"
        r" \(on 19 samples\), \d+\.\d s",
        notes[0],
    )
    assert [spec.name for spec in graph.outputs] == ["output_0", "output_1"] and [spec.name for spec in graph.inputs] == ["input"]
    assert all(np.abs(node.weight).max() <= 7 for node in graph.nodes if node.weight is not None)
    assert module.training and all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_labels_are_used_where_the_first_output_has_their_classes() -> None:
    _, notes, _ = trained(SHORT, labelled=True)
    assert "cross entropy by the labels" in notes[0]

    class Binary(TwoHeads):
        def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(image)[::-1]

    _, notes, _ = trained(SHORT, labelled=True, kind=Binary)
    assert "towards the float model's outputs" in notes[0]


def test_a_softmax_at_the_end_is_seen_as_probabilities() -> None:
    """Cross entropy of the logarithm: the loss before training is that of the module without its softmax."""
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval()
    images, labels = samples()
    losses = []
    for exact in (module, nn.Sequential(*module, nn.Softmax(dim=1)).eval()):
        quantised = qat.quantise(exact, torch.zeros(1, 1, 8, 8), images, replace(SHORT, qat_epochs=0))
        losses.append(fine_tune(quantised, exact, [images], labels, replace(SHORT, qat_epochs=1), lambda text, share: None).losses[0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_same_seed_gives_the_same_integers() -> None:
    first, again, other = (trained(replace(SHORT, seed=seed), labelled=True)[0].digest for seed in (0, 0, 1))
    assert first == again != other


def test_edges_keep_eight_bits_in_training_too() -> None:
    graph, _, _ = trained(replace(SHORT, weight_bits=4, edge_weight_bits=8), labelled=False)
    largest = [int(np.abs(node.weight).max()) for node in graph.nodes if node.weight is not None]
    assert largest[0] > 7 and largest[-1] > 7 and max(largest[1:-1]) <= 7


def test_a_learning_rate_that_explodes_is_named() -> None:
    with pytest.raises(IsthmusError, match=r"recipe short: QAT: the loss is \w+ at step \d+ of \d+ .*lower qat_learning_rate \(now 1e\+30\)"):
        trained(replace(SHORT, qat_learning_rate=1e30, qat_epochs=2), labelled=False)


def test_a_file_cannot_be_trained_and_says_so(tmp_path: Path) -> None:
    model = source_of()[1].float_model
    with pytest.raises(IsthmusError, match=r"recipe portable-qat trains with the rounding in place \(qat_epochs\), which a file cannot; give the torch module"):
        isthmus.compile(model, data=samples()[0], recipe="portable-qat", tune=False, output=tmp_path / "bundle")


def test_rounding_and_training_do_not_mix() -> None:
    with pytest.raises(IsthmusError, match="rounding is not for a module with its training"):
        trained(replace(SHORT, rounding="gptq"), labelled=False)


def test_the_command_trains_a_factory_with_a_checkpoint(tmp_path: Path) -> None:
    """What a user types: weights by `torch.load(weights_only=True)`, labelled samples, the recipe that ships."""
    torch.save(network().state_dict(), tmp_path / "weights.pth")
    body = Path(__file__).read_text().split("class TwoHeads")[1].split("\n\n\n")[0]
    (tmp_path / "users_heads.py").write_text(
        f"import torch\nfrom torch import Tensor, nn\n\n\nclass TwoHeads{body}\n\n\ndef make():\n    module = TwoHeads()\n"
        "    module.load_state_dict(torch.load('weights.pth', weights_only=True))\n    return module, torch.zeros(1, 1, 8, 8)\n"
    )
    images, labels = samples()
    np.savez(tmp_path / "data.npz", x=images, y=labels)
    words = ["compile", "--no-tune", "users_heads:make", "--data", "data.npz", "--recipe", "portable-qat", "-t", "cpu", "-o", "bundle", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "isthmus.cli", *words], cwd=tmp_path, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert any("48 samples learnt from, 48 others judged on" in note for note in manifest["notes"])
    assert any(note.startswith("quantisation-aware training: cross entropy by the labels") for note in manifest["notes"])
    assert manifest["task"]["samples"] == 48 and manifest["recipe"]["qat_epochs"] == 8
    assert all(row["mismatched"] == 0 for row in manifest["artifacts"]["cpu"]["verification"])


# ---- a step of auto
def test_auto_trains_after_the_corrections_and_before_float_layers() -> None:
    images, labels = samples(128)
    source = source_of()[1]
    assert source.train is not None and source.float_model is not None
    train, learnt, judged = source.train, Dataset({"input": images[:64]}, labels[:64], "a"), Dataset({"input": images[64:]}, labels[64:], "b")

    def only_trained(graph: QuantGraph) -> list[Problem]:
        return [] if graph.recipe.qat_epochs else [Problem("net", "test", "is not trained", "train it")]

    quantiser = PostTraining(source.float_model, learnt, quiet)
    graph, notes = climb(quantiser, judged, base_recipe("auto"), 0.9, only_trained, quiet, lambda recipe: train(learnt, recipe, quiet))
    tried = [note for note in notes if note.startswith("tried ")]
    assert graph.recipe.qat_epochs == 8 and graph.recipe.name == "auto"
    assert re.search(r"trained with the rounding \(QAT\), 8 epochs: 0\.\d+ .* dB, \d+\.\d s: holds$", tried[-1])
    assert len(tried) == 7 and "biases corrected" in tried[-2]
    assert notes[-1].startswith("quantisation-aware training: ")
