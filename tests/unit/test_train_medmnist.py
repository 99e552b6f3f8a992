# SPDX-License-Identifier: Apache-2.0
"""The MedMNIST systems: trained in little time on the stand-in, compiled, averaged; the reference DNNs by the paper's counts; metrics."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import isthmus
from isthmus import reference
from isthmus.compare import top1_accuracy
from isthmus.dataset import Dataset
from isthmus.errors import IsthmusError
from isthmus.export.module import onnx_from_module
from isthmus.export.prepare import prepare_float
from isthmus.post_training import PostTraining
from isthmus.recipe import load_recipe
from isthmus.train.data import Split, stand_in
from isthmus.train.ensemble import mean_probabilities, probabilities, references
from isthmus.train.loop import TrainConfig, TrainResult, fit, predict
from isthmus.train.metrics import classification_metrics
from isthmus.train.system import train_system
from isthmus.train.zoo import ZooSystem, medmnist, medmnist_dnn, mobilenet_small

REAL_DATA = Path(__file__).parents[3] / "shared" / "data"
REAL = medmnist.SYSTEM  # tests put a smaller system in its place


def fewer(split: Split, train: int, rest: int = 100) -> Split:
    parts = {"train": train, "val": rest, "test": rest}
    return replace(split, **{f"{axis}_{part}": getattr(split, f"{axis}_{part}")[:count] for part, count in parts.items() for axis in "xy"})


@functools.cache
def organs(channels: int) -> Split:
    return REAL.load_data(replace(REAL.configuration("organa-nano"), input_channels=channels), 0, None)


def small(preset: str) -> ZooSystem:
    """The system with this preset for OrganAMNIST alone, on a part of its stand-in and two epochs."""
    return replace(
        REAL,
        presets={preset: REAL.presets[preset]},
        load_data=lambda config, seed, root: fewer(organs(config.input_channels), 150),
        train=TrainConfig(epochs=2, learning_rate=1e-2),
        train_presets={},
    )


@functools.cache
def trained() -> tuple[torch.nn.Module, TrainResult]:
    """C2 at a quarter of its filters, four epochs on a part of the stand-in."""
    module = REAL.network("organa-c2-quarter")
    return module, fit(module, fewer(organs(1), 1000), replace(REAL.training(0, "organa-c2-quarter"), epochs=4))


@pytest.fixture
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins of a few images, where only their shapes count."""
    monkeypatch.setattr(stand_in, "SIZES", dict.fromkeys(stand_in.SIZES, 20))


# ---- the zoo's form
@pytest.mark.usefixtures("few_images")
@pytest.mark.parametrize("system", [medmnist.SYSTEM, medmnist_dnn.SYSTEM, mobilenet_small.SYSTEM], ids=lambda system: system.name)
def test_every_preset_has_data_of_the_shape_its_network_takes(system: ZooSystem) -> None:
    seen: set[tuple[str, int, int]] = set()
    for preset, config in system.presets.items():
        key = (config.dataset, config.input_channels, config.image_size)
        if key in seen or (system is medmnist_dnn.SYSTEM and config.dataset != "breastmnist"):  # the DNNs take the same sets, three channels each
            continue
        seen.add(key)
        split = system.data(0, preset)
        assert (1, *split.sample_shape) == system.input_shape(config) and len(split.classes) == config.classes
        assert "synthetic stand-in" in split.name


def test_the_deployed_part_shares_its_weights_and_ends_before_the_softmax() -> None:
    system = medmnist.SYSTEM
    module = system.module("organa-nano").eval()
    scores = system.deployed(module)(torch.ones(2, 1, 28, 28))
    torch.testing.assert_close(scores.softmax(1), module(torch.ones(2, 1, 28, 28)))
    assert {id(p) for p in system.deployed(module).parameters()} == {id(p) for p in module.parameters()}


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [("organa-c2-quarter", 16_947), ("organa-c2-quarter-average", 4_387), ("organa-c3-quarter-average", 18_515), ("organa-nano", 1_191)],
)
def test_presets_for_fpgas_have_the_parameters_their_spec_derives(preset: str, parameters: int) -> None:
    assert sum(p.numel() for p in medmnist.SYSTEM.module(preset).parameters()) == parameters


# Table 3 prints parameters without running statistics for OrganAMNIST and OCTMNIST, with them for PathMNIST (its ResNet50 is a misprint: spec 05, 7.4).
TABLE_3 = {
    "organa-densenet121": 6_965_131,
    "organa-efficientnet_v2_b0": 5_872_795,
    "organa-resnet50": 23_557_131,
    "organa-mobilenet_v2": 2_237_963,
    "organa-mobilenet_v3": 2_982_523,
    "oct-mobilenet_v2": 2_228_996,
    "oct-resnet50": 23_542_788,
    "oct-densenet121": 6_957_956,
    "oct-mobilenet_v3": 2_975_796,
    "oct-efficientnet_v2_b0": 5_863_828,
    "path-densenet121": 7_046_729,
    "path-mobilenet_v2": 2_269_513,
    "path-efficientnet_v2_b0": 5_930_841,
    "path-mobilenet_v3": 3_005_001,
}


def untrained_dnn(preset: str) -> medmnist_dnn.ReferenceDnn:
    """Without memory: shapes and counts need no weights."""
    with torch.device("meta"):
        return medmnist_dnn.ReferenceDnn(medmnist_dnn.SYSTEM.configuration(preset)).eval()


@pytest.mark.parametrize(("preset", "published"), TABLE_3.items())
def test_reference_dnns_have_the_parameters_of_table_3(preset: str, published: int) -> None:
    module = untrained_dnn(preset)
    statistics = sum(buffer.numel() for name, buffer in module.named_buffers() if "running" in name) if preset.startswith("path") else 0
    assert sum(p.numel() for p in module.parameters()) + statistics == published


@pytest.mark.parametrize("backbone", medmnist_dnn.BACKBONES)
def test_the_last_map_of_a_backbone_is_one_pixel(backbone: str) -> None:
    """So the paper's 2x2 pool behind it does nothing."""
    system, preset = medmnist_dnn.SYSTEM, f"oct-{backbone}"
    features = untrained_dnn(preset).features(torch.zeros(system.input_shape(system.configuration(preset)), device="meta"))
    assert features.shape[2:] == (1, 1)


@pytest.mark.usefixtures("few_images")
def test_images_are_padded_with_black_for_the_networks_that_take_32() -> None:
    split = medmnist_dnn.SYSTEM.data(0, "breast-densenet121")
    assert split.sample_shape == (3, 32, 32)
    assert (split.x_train[:, :, :2] == -1).all() and (split.x_train[:, :, :, -2:] == -1).all()
    np.testing.assert_array_equal(split.x_train[:, :, 2:-2, 2:-2], medmnist.SYSTEM.data(0, "breast-c2").x_train.repeat(3, axis=1))


# ---- training
def test_a_custom_network_learns_the_stand_in() -> None:
    _, result = trained()
    assert result.epochs[0].validation_score < 0.3 and result.best.validation_score > 0.6


def test_int8_decides_as_well_as_float() -> None:
    """At most a point of accuracy on the whole test part of the stand-in; the paper's own loss is 0.1 to 0.4."""
    module, split = trained()[0], organs(1)
    model = prepare_float(onnx_from_module(module, (torch.from_numpy(split.x_test[:1]),)), {})
    recipe = replace(load_recipe("portable"), calibration_samples=64)
    graph, _ = PostTraining(model, Dataset({"input": split.x_train}, split.y_train, "training part"), lambda text, share: None).graph(recipe)
    scores = reference.run(graph, {graph.inputs[0].name: graph.inputs[0].quantise(split.x_test)})[graph.outputs[0].name]
    before = top1_accuracy(predict(module, split.x_test), split.y_test)
    assert len(scores) == 400 and before > 0.6 and top1_accuracy(scores, split.y_test) >= before - 0.01


def test_training_into_a_folder_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(medmnist, "SYSTEM", small("organa-nano"))

    class StoppedError(Exception):
        pass

    def stop(text: str, share: float) -> None:
        if share > 0.6:
            raise StoppedError

    whole = train_system("zoo:medmnist@organa-nano", tmp_path / "whole")
    with pytest.raises(StoppedError):
        train_system("zoo:medmnist@organa-nano", tmp_path / "stopped", progress=stop)
    resumed = train_system("zoo:medmnist@organa-nano", tmp_path / "stopped")
    assert resumed.metrics == whole.metrics and resumed.result.best == whole.result.best
    with pytest.raises(IsthmusError, match=r"was trained with .*seed=0.*, now asked for .*seed=1"):
        train_system("zoo:medmnist@organa-nano", tmp_path / "stopped", seed=1)


def test_compile_a_preset_on_its_stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(medmnist, "SYSTEM", small("organa-nano"))
    bundle = isthmus.compile("zoo:medmnist@organa-nano", targets=["cpu"], tune=False, output=tmp_path / "bundle")
    assert bundle.manifest["graph"]["float_islands"] == []
    assert "data organamnist, synthetic stand-in: 150 training" in bundle.manifest["notes"][0]
    assert bundle.manifest["data"]["evaluation"] == "organamnist, synthetic stand-in: test part"
    (border,) = bundle.manifest["graph"]["inputs"]
    assert border["scale"] == 2.0**-7 and border["zero_point"] == 0


def breast_images(folder: Path) -> tuple[Path, int]:
    """The folder of the real BreastMNIST where that is beside this checkout, else one with random images; and how many train."""
    if (REAL_DATA / "breastmnist").is_dir():
        return REAL_DATA, 546
    generator = np.random.default_rng(0)
    labels = (np.arange(40) % 2).astype(np.uint8)
    content = {f"{part}_{what}": generator.integers(0, 256, (40, 28, 28), np.uint8) if what == "images" else labels
               for part in ("train", "val", "test") for what in ("images", "labels")}  # fmt: skip
    np.savez(folder / "breastmnist.npz", **content)  # type: ignore[arg-type]  # numpy's stub confuses **arrays with allow_pickle
    return folder, 40


def test_compile_a_residual_network_with_a_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, count = breast_images(tmp_path)
    config = replace(mobilenet_small.SYSTEM.configuration("ci"), dataset="breastmnist", classes=2)
    monkeypatch.setattr(mobilenet_small, "SYSTEM", replace(mobilenet_small.SYSTEM, presets={"tiny": config}, train=TrainConfig(epochs=1)))
    recipe = replace(load_recipe("symmetric"), calibration_samples=40)
    bundle = isthmus.compile("zoo:mobilenet_small", targets=["cpu"], recipe=recipe, tune=False, output=tmp_path / "bundle", data_root=root)
    assert f"data breastmnist: {count} training" in bundle.manifest["notes"][0]
    with pytest.raises(IsthmusError, match=r"--data-root is the folder of a zoo system's data set; give your own model's samples with --data"):
        isthmus.compile(bundle.model, targets=["cpu"], tune=False, output=tmp_path / "other", data_root=root)


# ---- ensembles
def test_probabilities_of_scores_of_any_size() -> None:
    scores = np.array([[1000.0, 999.0], [-1e4, 1e4], [0.0, 0.0]], np.float32)
    found = probabilities(scores)
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(found[0], [1 / (1 + np.exp(-1)), 1 / (1 + np.exp(1))], rtol=1e-6)
    np.testing.assert_allclose(found, torch.from_numpy(scores).softmax(1).numpy(), rtol=1e-6)


def test_an_ensemble_is_the_mean_whatever_the_order_of_its_members() -> None:
    generator = np.random.default_rng(0)
    members = [probabilities(generator.normal(size=(50, 4)).astype(np.float32)) for _ in range(3)]
    mean = mean_probabilities(members)
    np.testing.assert_allclose(mean.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(mean_probabilities([members[2], members[0], members[1]]).argmax(1), mean.argmax(1))
    np.testing.assert_allclose(mean_probabilities([members[0]] * 5), members[0], rtol=1e-6)


@pytest.mark.parametrize("members", [[], [np.zeros((2, 3)), np.zeros((2, 4))], [np.zeros(3)]])
def test_members_that_do_not_go_together(members: list[np.ndarray]) -> None:
    with pytest.raises(IsthmusError, match=r"an ensemble needs members' probabilities of one shape \(samples, classes\), found"):
        mean_probabilities(members)


def test_members_that_disagree_can_be_worse_together_or_better() -> None:
    """No promise that an ensemble beats its best member: two poor ones outvote a good one."""
    labels = np.zeros(10, np.int64)
    good, poor = np.tile([0.6, 0.4], (10, 1)), np.tile([0.3, 0.7], (10, 1))
    assert top1_accuracy(good, labels) == 1 and top1_accuracy(mean_probabilities([good, poor, poor]), labels) == 0


def test_members_by_the_names_of_the_tables() -> None:
    assert references("organa", "C3_D2_MobV3_MobNetV2") == [
        "zoo:medmnist@organa-c3",
        "zoo:medmnist@organa-d2",
        "zoo:medmnist_dnn@organa-mobilenet_v3",
        "zoo:medmnist_dnn@organa-mobilenet_v2",
    ]
    assert references("path", "EffB0_Dense121_Res50_A")[3] == "zoo:medmnist@path-a"
    with pytest.raises(IsthmusError, match=r"unknown preset of medmnist 'oct-c7': did you mean oct-c"):
        references("oct", "C7")


def test_a_trained_ensemble_of_two() -> None:
    system = small("organa-nano")
    split = system.data()
    members = []
    for seed in (0, 1):
        module = system.network(seed=seed)
        fit(module, split, system.training(seed))
        members.append(probabilities(predict(module, split.x_test)))
    assert top1_accuracy(mean_probabilities(members), split.y_test) >= min(top1_accuracy(member, split.y_test) for member in members)


# ---- metrics
def test_metrics_of_perfect_and_of_random_decisions() -> None:
    labels = np.arange(3000) % 3
    assert set(classification_metrics(np.eye(3)[labels], labels).values()) == {1.0}
    generator = np.random.default_rng(0)
    scores = generator.dirichlet(np.ones(3), 3000)
    found = classification_metrics(scores, labels)
    assert found["weighted_sensitivity"] == top1_accuracy(scores, labels)
    assert found["balanced_accuracy"] == pytest.approx(found["weighted_sensitivity"]) and abs(found["balanced_accuracy"] - 1 / 3) < 0.03
    assert abs(found["auc"] - 0.5) < 0.03


def test_the_auc_counts_ranks_alone() -> None:
    """The mean over classes of each one against the rest: raising a class's scores to a power, which keeps their order, changes nothing."""
    from sklearn.metrics import roc_auc_score

    generator = np.random.default_rng(0)
    labels = np.arange(300) % 3
    scores = generator.dirichlet(np.ones(3), 300) / 2 + np.eye(3)[labels] / 2 * generator.uniform(0, 1, (300, 1))
    scores /= scores.sum(axis=1, keepdims=True)
    powers = [roc_auc_score(labels == label, scores[:, label] ** (3.0 + label)) for label in range(3)]
    assert classification_metrics(scores, labels)["auc"] == pytest.approx(np.mean(powers), abs=1e-12) and 0.6 < np.mean(powers) < 0.99


def test_metrics_of_two_classes() -> None:
    labels = np.array([0, 0, 1, 1])
    scores = np.array([[0.9, 0.1], [0.4, 0.6], [0.3, 0.7], [0.2, 0.8]])
    assert classification_metrics(scores, labels)["auc"] == 1.0 and classification_metrics(scores, labels)["weighted_sensitivity"] == 0.75


@pytest.mark.parametrize(
    ("labels", "message"), [(np.zeros(4, np.int64), r"no sample of the classes \[1\] for 4 rows of 2 classes"), (np.array([0, 1]), "2 labels for 4 rows")]
)
def test_metrics_that_would_mean_nothing(labels: np.ndarray, message: str) -> None:
    with pytest.raises(IsthmusError, match=message):
        classification_metrics(np.full((4, 2), 0.5), labels)
