# SPDX-License-Identifier: Apache-2.0
"""The denoisers as a system: data, a short training on the stand-in, int8, and tiles of the trained network against the whole image."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import isthmus
from isthmus.train.image_metrics import psnr
from isthmus.train.loop import TrainConfig, predict
from isthmus.train.pde_priors import PRIORS
from isthmus.train.processing.denoise import padded, tiled
from isthmus.train.zoo import ZooSystem
from isthmus.train.zoo.pinn_denoise import SMALL, SYSTEM, UNetConfig, margin, size_multiple


def test_every_backbone_has_a_small_preset_under_every_prior() -> None:
    for backbone, config in SMALL.items():
        for prior in PRIORS:
            found = SYSTEM.configuration(f"{backbone}-small-{prior}")
            assert found == replace(config, prior=prior)
    assert set(SYSTEM.roads) == {"cpu", "tflite", "jetson", "fpga"}


def test_every_size_has_data_of_the_shape_its_network_takes() -> None:
    configs = [replace(SYSTEM.configuration(name), patches=(2, 1, 1)) for name in SYSTEM.presets]
    for config in {config.image_size: config for config in configs}.values():
        split = SYSTEM.load_data(config, 0, None)
        assert (1, *split.sample_shape) == SYSTEM.input_shape(config) and split.y_val.shape == (1, 2, config.image_size, config.image_size)


@pytest.mark.parametrize("backbone", SMALL)
def test_a_step_under_every_prior_moves_every_weight(backbone: str) -> None:
    for index, prior in enumerate(PRIORS):
        residual = ("steady", "evolution")[index % 2]
        config = replace(SYSTEM.configuration(f"{backbone}-small-{prior}"), image_size=32, patches=(2, 1, 1), residual=residual)
        task, module = SYSTEM.task(config), SYSTEM.network(f"{backbone}-small-{prior}", 0).train()
        split = SYSTEM.load_data(config, 0, None)
        loss = task.loss(module(torch.from_numpy(split.x_train)), torch.from_numpy(split.y_train))
        loss.backward()
        assert torch.isfinite(loss)
        assert all(parameter.grad is not None and torch.isfinite(parameter.grad).all() for parameter in module.parameters())


def test_augmented_batches_hold_the_same_images_turned_under_fresh_noise() -> None:
    config = replace(SYSTEM.configuration("ci"), patches=(2, 1, 1))
    task, split = SYSTEM.task(config), SYSTEM.load_data(config, 0, None)
    assert task.augment is not None
    inputs, targets = torch.from_numpy(split.x_train), torch.from_numpy(split.y_train)
    torch.manual_seed(1)
    noisy, both = task.augment(inputs, targets)
    torch.manual_seed(1)
    torch.testing.assert_close(task.augment(inputs, targets)[0], noisy, rtol=0, atol=0)
    torch.testing.assert_close(both[:, 1:], noisy, rtol=0, atol=0)
    turned = [torch.rot90(plane, turns, (2, 3)) for plane in (targets[:, :1], targets[:, :1].flip(3)) for turns in range(4)]
    assert any(torch.equal(both[:, :1], each) for each in turned)
    assert not any(torch.equal(noisy, torch.rot90(plane, turns, (2, 3))) for plane in (inputs, inputs.flip(3)) for turns in range(4))


def test_scores_are_of_images_clipped_to_their_range() -> None:
    config = replace(SYSTEM.configuration("ci"), patches=(2, 1, 1))
    split = SYSTEM.load_data(config, 0, None)
    assert SYSTEM.task(config).score(np.full((1, 1, 32, 32), 7, np.float32), split.y_test) == pytest.approx(
        psnr(np.ones((1, 1, 32, 32), np.float32), split.y_test[:, :1])
    )


def compiled(preset: str, short: TrainConfig, output: Path) -> tuple[ZooSystem, isthmus.Bundle]:
    """A preset trained on 64 patches for less than its default."""
    system = replace(SYSTEM, presets={preset: replace(SYSTEM.configuration(preset), patches=(64, 8, 8))}, train=short, train_presets={})
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("isthmus.train.zoo.pinn_denoise.SYSTEM", system)
        return system, isthmus.compile(f"zoo:pinn_denoise@{preset}", targets=["cpu"], tune=False, output=output)


def test_a_short_training_of_the_mini_unet_removes_noise(tmp_path: Path) -> None:
    """A few seconds on the stand-in; the bundle keeps the figure, and the artifact equals the integer reference."""
    system, bundle = compiled("fpga", TrainConfig(epochs=6, batch_size=4, learning_rate=2e-2), tmp_path / "bundle")
    split = system.data(0, "fpga")
    noisy = system.purpose("fpga").score(split.x_test, split.y_test)
    figures = bundle.manifest["task"]
    assert figures["metric"] == "PSNR (dB)" and figures["float"] > noisy + 1
    assert figures["reference"] > figures["float"] - 0.3
    assert bundle.artifact("cpu")["score"] == figures["reference"]
    assert "synthetic stand-in" in " ".join(bundle.manifest["notes"])


def test_ci_compiles(tmp_path: Path) -> None:
    figures = compiled("ci", TrainConfig(epochs=1, batch_size=4), tmp_path / "bundle")[1].manifest["task"]
    assert figures["samples"] == 8 and np.isfinite(figures["reference"])


@pytest.mark.parametrize("name", ["fpga", "ci", "resunet-small-heat"])
def test_tiles_of_a_network_are_its_whole_image(name: str) -> None:
    """Odd sizes too. Float sums may differ in their order; without the margin the difference is of another size."""
    config = SYSTEM.configuration(name)
    assert isinstance(config, UNetConfig)
    module, multiple, sight = SYSTEM.network(name, 0), size_multiple(config), margin(config)
    module(torch.rand(4, 1, 32, 32))  # statistics for the batch norms
    module.eval()

    def run(batch: np.ndarray) -> np.ndarray:
        found = predict(module, batch)
        assert isinstance(found, np.ndarray)
        return found

    tile = -(-(2 * sight + multiple) // multiple) * multiple
    image = np.random.default_rng(0).random((2 * tile + 5, tile + 11)).astype(np.float32)
    expected = run(padded(image, multiple, tile)[None, None])[0, 0, : image.shape[0], : image.shape[1]]
    np.testing.assert_allclose(tiled(image, run, tile, sight, multiple), expected, rtol=0, atol=1e-5)
    assert np.abs(tiled(image, run, tile, 0, multiple) - expected).max() > 1e-3
