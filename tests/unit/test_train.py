# SPDX-License-Identifier: Apache-2.0
"""The zoo's names, the digits data, the training loop."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from isthmus.compare import top1_accuracy
from isthmus.errors import IsthmusError
from isthmus.train import zoo
from isthmus.train.data import Split, digits
from isthmus.train.loop import TrainConfig, fit, predict


def small_split() -> Split:
    whole = digits.load()
    return dataclasses.replace(whole, x_train=whole.x_train[:200], y_train=whole.y_train[:200])


# ---- data
def test_digits_split_is_fixed_stratified_and_disjoint() -> None:
    split, again = digits.load(), digits.load()
    assert [len(part) for part in (split.x_train, split.x_val, split.x_test)] == [1078, 359, 360]
    assert split.sample_shape == (1, 8, 8) and split.seed == 0
    np.testing.assert_array_equal(split.x_test, again.x_test)
    assert not np.array_equal(split.x_test, digits.load(seed=1).x_test)
    for labels in (split.y_train, split.y_val, split.y_test):
        shares = np.bincount(labels, minlength=10) / len(labels)
        assert shares.min() > 0.09 and shares.max() < 0.11
    scans = [{(image.tobytes()) for image in part} for part in (split.x_train, split.x_val, split.x_test)]
    assert not scans[0] & scans[2] and not scans[1] & scans[2] and not scans[0] & scans[1]


def test_digits_pixels_lie_on_the_grid_of_every_scale_from_a_16th_to_a_64th() -> None:
    pixels = digits.load().x_train
    assert pixels.min() == 0 and pixels.max() == 1
    for scale in (2.0**-4, 2.0**-5, 2.0**-6):
        steps = pixels / scale
        np.testing.assert_array_equal(steps, np.round(steps))
        assert steps.max() <= 127


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_val": np.zeros((2, 1, 8, 8))}, r"part val: samples are float64 .* expected float32"),
        ({"y_test": np.zeros(3, np.int64)}, r"part test: 360 samples and targets of shape \(3,\)"),
        ({"x_test": np.zeros((360, 1, 9, 8), np.float32)}, r"part test: a sample has shape \(1, 9, 8\), in the training part \(1, 8, 8\)"),
        ({"x_val": np.full((359, 1, 8, 8), np.nan, np.float32)}, r"part val: sample 0 holds NaN"),
        ({"classes": ("0", "1")}, r"part train: labels run from 0 to 9, expected 0 to 1"),
    ],
)
def test_split_refuses_parts_that_do_not_fit(change: dict[str, object], message: str) -> None:
    with pytest.raises(IsthmusError, match=message):
        dataclasses.replace(digits.load(), **change)


# ---- metrics
def test_top1_accuracy_counts_rows() -> None:
    scores = np.array([[1, 2, 0], [3, 0, 0], [0, 0, 1], [5, 5, 0]], np.float32)
    assert top1_accuracy(scores, np.array([1, 0, 0, 0])) == 0.75


@pytest.mark.parametrize(("rows", "labels"), [(0, 0), (3, 2)])
def test_top1_accuracy_of_nothing_is_no_figure(rows: int, labels: int) -> None:
    with pytest.raises(IsthmusError, match=r"accuracy: "):
        top1_accuracy(np.zeros((rows, 4), np.float32), np.zeros(labels, np.int64))


@pytest.mark.slow
# ---- zoo
def test_every_zoo_system_says_what_it_is_and_builds_every_preset() -> None:
    assert "digits" in zoo.names()
    for name in zoo.names():
        system = zoo.load(name)
        assert system.name == name and system.summary and system.paper
        for preset in system.presets:
            with torch.device("meta"):  # shapes alone: some of the networks take seconds
                system.module(preset).eval()(torch.zeros(system.input_shape(system.configuration(preset))))


@pytest.mark.parametrize(("preset", "parameters"), [("c2", 4370), ("nano", 1182)])
def test_digits_network_has_the_parameters_of_its_paper(preset: str, parameters: int) -> None:
    assert sum(parameter.numel() for parameter in zoo.load("digits").module(preset).parameters()) == parameters


def test_zoo_references() -> None:
    system, preset = zoo.parse("zoo:digits")
    assert (system.name, preset) == ("digits", "c2")
    assert zoo.parse("zoo:digits@nano")[1] == "nano"


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("zoo:digit", "unknown zoo system 'digit': did you mean digits"),
        ("zoo:qqqq", "unknown zoo system 'qqqq': there are .*digits"),
        ("zoo:digits@nanno", "unknown preset of digits 'nanno': did you mean nano"),
        ("zoo:digits@", "write zoo:NAME or zoo:NAME@PRESET"),
        ("zoo:", "write zoo:NAME"),
        ("digits", "'digits' is not a zoo model"),
    ],
)
def test_zoo_references_that_name_nothing(reference: str, message: str) -> None:
    with pytest.raises(IsthmusError, match=message):
        zoo.parse(reference)


def test_a_module_is_the_same_for_the_same_seed_and_leaves_the_global_generator_alone() -> None:
    system = zoo.load("digits")
    state = torch.get_rng_state()
    first, second, other = system.module(seed=3), system.module(seed=3), system.module(seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(next(first.parameters()), next(other.parameters()))


# ---- loop
def test_training_is_repeatable_learns_and_reports() -> None:
    system, split, config = zoo.load("digits"), small_split(), TrainConfig(epochs=4, batch_size=32)
    seen: list[float] = []
    first, second = system.module("nano"), system.module("nano")
    threads = torch.get_num_threads()
    result = fit(first, split, config, lambda text, share: seen.append(share))
    fit(second, split, config)
    assert torch.get_num_threads() == threads
    np.testing.assert_array_equal(predict(first, split.x_test), predict(second, split.x_test))
    assert result.steps == 4 * 7 == len(seen) and seen == sorted(seen) and seen[-1] == 1
    assert [epoch.number for epoch in result.epochs] == [0, 1, 2, 3, 4]
    assert result.best.validation_score > result.epochs[0].validation_score
    assert not first.training


def test_the_best_state_by_validation_is_kept() -> None:
    """At an absurd learning rate every epoch is worse than the start, which must come back."""
    system, split = zoo.load("digits"), small_split()
    module = system.module("nano")
    fit(module, split, TrainConfig(epochs=4, batch_size=32))
    before = predict(module, split.x_test)
    result = fit(module, split, TrainConfig(epochs=1, learning_rate=3.0))
    assert result.best.number == 0
    np.testing.assert_array_equal(predict(module, split.x_test), before)


def test_the_test_part_decides_nothing() -> None:
    system, split = zoo.load("digits"), small_split()
    other = dataclasses.replace(split, x_test=np.zeros_like(split.x_test), y_test=np.zeros_like(split.y_test))
    modules = [system.module("nano"), system.module("nano")]
    for module, data in zip(modules, (split, other), strict=True):
        fit(module, data, TrainConfig(epochs=1))
    assert all(torch.equal(a, b) for a, b in zip(modules[0].parameters(), modules[1].parameters(), strict=True))


def test_a_loss_that_is_not_finite_names_its_step() -> None:
    module = zoo.load("digits").module("nano")
    with torch.no_grad():
        module.classifier.bias[0] = torch.nan
    with pytest.raises(IsthmusError, match=r"the loss is nan at step 1 of 4 \(epoch 1\); lower the learning rate \(now 0.01\)"):
        fit(module, small_split(), TrainConfig(epochs=1))


@pytest.mark.parametrize("change", [{"epochs": -1}, {"batch_size": 0}, {"learning_rate": 0.0}, {"threads": 0}, {"weight_decay": -1.0}])
def test_training_configuration_is_checked(change: dict[str, float]) -> None:
    with pytest.raises(IsthmusError, match="epochs and weight_decay must be at least 0"):
        TrainConfig(**({"epochs": 1} | change))
