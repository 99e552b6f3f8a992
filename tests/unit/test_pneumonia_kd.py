# SPDX-License-Identifier: Apache-2.0
"""Snapshot ensembling and distillation against the equations, chest X-ray folders good and bad, the presets' counts, and the whole way on the stand-in."""

from __future__ import annotations

import hashlib
import io
import math
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import isthmus
from isthmus.errors import IsthmusError
from isthmus.train.data import Split, cxr
from isthmus.train.distillation import distillation_loss, soft_labels
from isthmus.train.loop import TrainConfig, fit, predict
from isthmus.train.metrics import classification_metrics
from isthmus.train.processing.pneumonia_kd import decide, network_input, read_grey
from isthmus.train.schedules import SHAPES, optimiser, schedule
from isthmus.train.snapshots import RESTARTS, Budget, Snapshot, best, snapshots
from isthmus.train.system import train_system
from isthmus.train.zoo import pneumonia_kd
from isthmus.train.zoo.pneumonia_kd import SYSTEM, TAUGHT, PneumoniaNet, taught_split, train_teachers

REAL = Path(__file__).parents[3] / "shared" / "data" / "cxr_pneumonia" / "cxr224_subset.zip"
TEACHERS = [np.array([logits], np.float32) for logits in ((2, -1), (1, 0), (3, -3))]


# ---- the loss (the example was computed by hand: T = 3, alpha = 0.5)
def test_soft_labels_are_the_mean_of_the_teachers_probabilities() -> None:
    each = [soft_labels([teacher])[0] for teacher in TEACHERS]
    np.testing.assert_allclose(each, [(0.731059, 0.268941), (0.582570, 0.417430), (0.880797, 0.119203)], atol=1e-6)
    together = soft_labels(TEACHERS)
    np.testing.assert_allclose(together, [(0.731475, 0.268525)], atol=1e-6)
    of_mean_logits = soft_labels([np.mean(TEACHERS, axis=0)])
    assert abs(together - of_mean_logits).max() > 1e-3
    with pytest.raises(IsthmusError, match="no member"):
        soft_labels([])


def test_the_loss_is_that_of_the_worked_example() -> None:
    student, label, soft = torch.tensor([[0.5, -0.5]]), torch.tensor([0]), torch.from_numpy(soft_labels(TEACHERS))
    assert distillation_loss(student, label, soft).item() == pytest.approx(2.990793, abs=1e-5)
    assert distillation_loss(student, label, soft, alpha=1.0).item() == pytest.approx(0.313262, abs=1e-6)
    assert distillation_loss(student, label, soft, alpha=0.0).item() == pytest.approx(9 * 0.629814, abs=1e-5)
    entropy = -(soft * soft.log()).sum().item()  # what Kullback-Leibler in place of cross entropy takes off: nothing that a student could change
    assert distillation_loss(student, label, soft).item() - 4.5 * entropy == pytest.approx(0.372756, abs=1e-5)


def test_the_gradient_is_the_papers_and_vanishes_where_the_student_says_what_the_teachers_say() -> None:
    logits = torch.tensor([[0.3, -1.2], [2.0, 0.4]], dtype=torch.float64, requires_grad=True)
    labels, soft = torch.tensor([1, 0]), torch.tensor([[0.7, 0.3], [0.2, 0.8]], dtype=torch.float64)
    for temperature, alpha in ((3.0, 0.5), (10.0, 0.2), (1.0, 0.0)):
        (found,) = torch.autograd.grad(distillation_loss(logits, labels, soft, temperature, alpha), logits)
        hard = logits.softmax(1) - nn.functional.one_hot(labels, 2)
        expected = alpha * hard + (1 - alpha) * temperature * ((logits / temperature).softmax(1) - soft)
        torch.testing.assert_close(found, expected / len(logits))
    agreeing = (3 * soft.log()).requires_grad_()
    (found,) = torch.autograd.grad(distillation_loss(agreeing, labels, soft, alpha=0.0), agreeing)
    torch.testing.assert_close(found, torch.zeros_like(found))


# ---- schedules and snapshots
def rates(name: str, first: float, epochs: int, steps: int = 1) -> list[float]:
    stepped = optimiser("sgd", [nn.Parameter(torch.zeros(1))], first, 0.0)
    running = schedule(name, stepped, first, epochs, steps)  # type: ignore[arg-type]  # a parameter of the test
    found = []
    for _ in range(epochs * steps):
        found.append(stepped.param_groups[0]["lr"])
        stepped.step()
        running.step()
    return found


def test_restarts_fall_along_a_sine_and_a_cosine() -> None:
    sine = [0.0200, 0.0174, 0.0148, 0.0124, 0.0100, 0.0078, 0.0059, 0.0041, 0.0027, 0.0015, 0.0007, 0.0002]
    cosine = [0.0200, 0.0197, 0.0187, 0.0171, 0.0150, 0.0126, 0.0100, 0.0074, 0.0050, 0.0029, 0.0013, 0.0003]
    np.testing.assert_allclose(rates("sine", 0.02, 12), sine, atol=6e-5)
    np.testing.assert_allclose(rates("cosine", 0.02, 12), cosine, atol=6e-5)
    np.testing.assert_allclose(rates("linear", 0.1, 50), [0.1 * (1 - epoch / 50) for epoch in range(50)])
    assert rates("sine", 0.02, 2, steps=3) == pytest.approx([0.02] * 3 + [0.02 * (1 - math.sqrt(0.5))] * 3)
    assert SHAPES["cosine"](0.5) == pytest.approx(0.5) and SHAPES["sine"](0.5) == pytest.approx(0.2929, abs=1e-4)


def test_a_budget_of_100_epochs_takes_98_at_most() -> None:
    budget = Budget()
    assert (budget.first_epochs, budget.restart_epochs) == (50, 12)
    assert budget.first_epochs + len(RESTARTS) * budget.restart_epochs == 98
    with pytest.raises(IsthmusError, match="6 epochs leave none for 4 restarts; give at least 7"):
        Budget(epochs=6)


def blobs(count: int = 24) -> Split:
    generator = np.random.default_rng(0)
    labels = np.arange(count) % 2
    samples = (generator.normal(size=(count, 1, 6, 6)) + labels[:, None, None, None]).astype(np.float32)
    return Split("blobs", samples, labels, samples, labels, samples, labels, ("normal", "pneumonia"), 0)


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(1), nn.Linear(36, 4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 2))


def digest(state: dict[str, torch.Tensor]) -> str:
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in state.values())).hexdigest()


def test_every_restart_begins_with_the_weights_of_the_first_phase() -> None:
    module, starts = small(), []
    module.register_forward_pre_hook(lambda called, inputs: starts.append(digest(called.state_dict())) if called.training else None)
    found = snapshots(module, blobs(), Budget(epochs=12, batch_size=24))
    first = digest(found[0].state)
    assert [snapshot.phase for snapshot in found] == ["linear 0.1", "sine 0.01", "sine 0.02", "cosine 0.01", "cosine 0.02"]
    assert [snapshot.epochs for snapshot in found] == [6, 1, 1, 1, 1] and starts[6:] == [first] * 4
    assert len({digest(snapshot.state) for snapshot in found}) == 5 and digest(module.state_dict()) == first


def test_a_stopped_snapshot_training_comes_to_the_same_weights(tmp_path: Path) -> None:
    class StoppedError(Exception):
        pass

    def stop(text: str, share: float) -> None:
        if text.startswith("teachers, sine 0.02: epoch 2"):
            raise StoppedError

    budget = Budget(epochs=16, batch_size=12)
    with pytest.raises(StoppedError):
        snapshots(small(), blobs(), budget, 3, stop, tmp_path, "blobs")
    continued = snapshots(small(), blobs(), budget, 3, None, tmp_path, "blobs")
    at_once = snapshots(small(), blobs(), budget, 3)
    assert [digest(one.state) for one in continued] == [digest(one.state) for one in at_once]
    with pytest.raises(IsthmusError, match=r"is a checkpoint of blobs, teachers, linear 0\.1, not of others"):
        snapshots(small(), blobs(), budget, 3, None, tmp_path, "others")


def test_a_rate_that_kills_the_network_is_halved_and_said() -> None:
    def bright(factor: float) -> Split:
        split = blobs()
        samples = (np.abs(split.x_train) + 1) * np.float32(factor)
        return replace(split, x_train=samples, x_val=samples, x_test=samples)

    torch.manual_seed(0)
    module, budget = nn.Sequential(nn.Flatten(1), nn.Linear(36, 4), nn.ReLU(), nn.Linear(4, 2)), Budget(epochs=8, batch_size=4)
    start = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert snapshots(module, bright(3), budget)[0].phase in ("linear 0.05", "linear 0.025", "linear 0.0125")
    module.load_state_dict(start)
    with pytest.raises(IsthmusError, match=r"says the same of every validation image after 4 epochs, at a rate of 0\.1 and"):
        snapshots(module, bright(300), budget)


def test_the_three_of_the_largest_auc_teach_and_of_equal_ones_the_earlier() -> None:
    found = [Snapshot(name, area, 1, {}) for name, area in (("a", 0.8), ("b", 0.9), ("c", 0.8), ("d", 0.7), ("e", 0.95))]
    assert [snapshot.phase for snapshot in best(found)] == ["e", "b", "a"]


def test_patience_ends_a_training_and_the_start_need_not_count() -> None:
    worse = TrainConfig(epochs=30, batch_size=24, learning_rate=1e-12, schedule="constant", patience=3)  # no step changes a score
    assert len(fit(small(), blobs(), worse).epochs) - 1 < 30
    result = fit(small(), blobs(), replace(worse, optimiser="sgd", learning_rate=5.0, weight_decay=0.0, epochs=1, start_counts=False))
    assert result.best.number == 1


# ---- what a student learns
def test_a_student_is_given_the_label_and_the_teachers_word() -> None:
    split = blobs(6)
    logits = [np.tile(teacher, (6, 1)) for teacher in TEACHERS]
    learned = taught_split(split, logits, logits)
    np.testing.assert_array_equal(learned.y_train[:, 0], split.y_train)
    np.testing.assert_allclose(learned.y_train[:, 1:].sum(axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(learned.y_test[:, 1:], np.eye(2)[split.y_test])  # no teacher saw those
    assert TAUGHT.score(np.eye(2, dtype=np.float32)[split.y_test], learned.y_test) == 1.0


def test_teachers_are_trained_and_asked_on_the_device_of_the_training() -> None:
    cuda, teacher = torch.cuda.is_available(), replace(pneumonia_kd.TEACHER_CI, stand_in=24)
    for device in ("cpu", *(["cuda"] if cuda else [])):
        teachers = train_teachers(replace(teacher, image_size=6), blobs(), Budget(epochs=7, device=device), 0)
        assert {parameter.device.type for teacher in teachers for parameter in teacher.parameters()} == {device}
    if not cuda:  # asked for all the same: teachers that were trained elsewhere would show
        with pytest.raises(IsthmusError, match=r"device cuda: torch .* sees no CUDA device here"):
            replace(SYSTEM, presets={"ci": replace(SYSTEM.presets["ci"], teacher=teacher)}).taught(blobs(), "ci", 0, None, device="cuda")


def test_the_hidden_layer_alone_is_penalised_and_in_training_alone() -> None:
    network = SYSTEM.module("student-28")
    scores = SYSTEM.deployed(network)
    images, labels = torch.rand(4, 1, 28, 28), torch.tensor([0, 1, 0, 1])
    with torch.no_grad():
        outputs = scores.train()(images)
        penalty = 0.01 * network.head[0].weight.square().sum()
        torch.testing.assert_close(pneumonia_kd.LABELS.loss(outputs, labels), nn.functional.cross_entropy(outputs[0], labels) + penalty)
        assert isinstance(scores.eval()(images), torch.Tensor)
        torch.testing.assert_close(scores(images).softmax(1), network.eval()(images))
        assert isinstance(SYSTEM.deployed(SYSTEM.module("teacher-28")).train()(images), torch.Tensor)


def test_scores_have_nothing_in_common_before_and_behind_a_training() -> None:
    module, split = SYSTEM.network("ci"), blobs()
    for _ in range(2):
        scores = predict(module, split.x_test)
        assert isinstance(scores, np.ndarray) and abs(scores.mean(axis=1)).max() < 1e-5 < abs(scores).max()
        fit(module, split, TrainConfig(epochs=3, batch_size=8, start_counts=False), task=pneumonia_kd.LABELS)


# ---- counts
def test_counts_that_no_table_prints() -> None:
    with torch.device("meta"):
        counts = {
            name: sum(p.numel() for p in PneumoniaNet(config).parameters())
            for name, config in (*SYSTEM.presets.items(), ("one output", replace(pneumonia_kd.TEACHER, classes=1)))
        }
    assert counts["teacher"] == 6_795_394 and counts["one output"] == 6_794_881
    assert counts["student"] == 4_737_698 and 147_456 * 32 + 32 == 4_718_624 > 0.995 * counts["student"]
    assert counts["fpga-s"] - 2 * (8 + 16 + 16) == 3_602 and counts["ci"] - 2 * (4 + 8) == 354


def test_sizes_and_products_of_every_layer() -> None:
    sizes, products, weights = {}, {}, {}
    for name in ("student", "teacher", "fpga-s"):
        with torch.device("meta"):
            network, image = PneumoniaNet(SYSTEM.presets[name]), torch.empty(SYSTEM.input_shape(SYSTEM.presets[name]))
        sizes[name], products[name] = [], sum(layer.weight.numel() for layer in network.head if isinstance(layer, nn.Linear))
        weights[name] = max(parameter.numel() for parameter in network.parameters())
        for layer in network.features:
            image = layer(image)
            sizes[name] += [image.shape[2]] if isinstance(layer, nn.Conv2d | nn.MaxPool2d) else []
            products[name] += layer.weight.numel() * image.shape[2] * image.shape[3] if isinstance(layer, nn.Conv2d) else 0
        sizes[name].append(image.numel())
    assert sizes["student"] == [198, 99, 97, 48, 147_456] and sizes["teacher"] == [198, 99, 97, 48, 46, 23, 21, 10, 12_800]
    assert sizes["fpga-s"] == [64, 32, 32, 16, 16, 8, 16]  # the mean of 64 values is a shift
    assert products == {"student": 189_436_096, "teacher": 412_308_608, "fpga-s": 2_064_416} and weights["fpga-s"] == 2_304 < 4_096


# ---- metrics
def test_a_predictor_of_the_majority() -> None:
    labels = np.arange(10_000) < 7_296
    metrics = classification_metrics(np.tile(np.array([[0.1, 0.9]]), (len(labels), 1)), labels.astype(np.int64))
    assert metrics["weighted_sensitivity"] == pytest.approx(0.7296) and metrics["weighted_f1"] == pytest.approx(0.616, abs=5e-4)
    assert metrics["balanced_accuracy"] == metrics["auc"] == 0.5


# ---- chest X-rays
def picture(shade: int = 90, size: tuple[int, int] = (48, 40)) -> Image.Image:
    pixels = np.add.outer(np.arange(size[1]), np.arange(size[0])) + shade
    return Image.fromarray(pixels.astype(np.uint8))


def folders(root: Path, parts: tuple[str, ...] = ("train", "test"), patients: int = 12) -> Path:
    for part in parts:
        for name, pattern in (("NORMAL", "IM-{0:04d}-{1:04d}.jpeg"), ("PNEUMONIA", "person{0}_virus_{1}.png")):
            (root / part / name).mkdir(parents=True)
            for patient in range(patients):
                for image in range(1 + patient % 2):
                    picture(30 if name == "NORMAL" else 120).save(root / part / name / pattern.format(patient, image))
    return root


def test_the_published_folders_are_read(tmp_path: Path) -> None:
    root = folders(tmp_path / "chest_xray")
    (root / "train" / "NORMAL" / ".DS_Store").write_bytes(b"no image")
    split = cxr.load(tmp_path, size=32)
    assert split.classes == ("normal", "pneumonia") and split.sample_shape == (1, 32, 32)
    assert len(split.x_test) == 36 and len(split.x_train) + len(split.x_val) == 36 and set(split.y_val) == {0, 1}
    assert split.x_test[split.y_test == 0].mean() < split.x_test[split.y_test == 1].mean()
    np.testing.assert_array_equal(split.x_test[:1], network_input(read_grey(root / "test" / "NORMAL" / "IM-0000-0000.jpeg", 32)))


def test_no_patient_stands_on_two_sides(tmp_path: Path) -> None:
    found = cxr.scans(folders(tmp_path) / "train")
    tested: list[Path] = []
    for fold in range(3):
        rest, own = found.without_fold(3, fold, 0)
        assert not set(rest.patients) & set(own.patients) and set(own.labels) == {0, 1}
        tested += own.files
    assert sorted(tested) == sorted(found.files) and len(set(found.patients)) == 24
    whole = cxr.load_fold(tmp_path, 1, 3, size=32)
    assert sum(len(part) for part in (whole.x_train, whole.x_val, whole.x_test)) == 72


def damaged(root: Path, what: str) -> None:
    image = root / "test" / "PNEUMONIA" / "person1_virus_0.png"
    if what == "no class":
        (root / "train" / "NORMAL").rename(root / "train" / "normal images")
    elif what == "empty class":
        for file in (root / "train" / "NORMAL").iterdir():
            file.unlink()
    elif what == "mislabelled":
        image.rename(root / "test" / "NORMAL" / "person1_virus_0.png")
    elif what == "cut short":
        image.write_bytes(image.read_bytes()[:60])
    elif what == "no image":
        image.write_text("an X-ray", encoding="utf-8")
    elif what == "too small":
        picture(size=(20, 60)).save(image)
    else:
        assert what == "no test part"
        (root / "test").rename(root / "tests")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no test part", "holds no folders train and test"),
        ("no class", r"train: has no folder NORMAL; expected NORMAL and PNEUMONIA"),
        ("empty class", r"NORMAL: holds no image .*; every part needs every class"),
        ("mislabelled", r"test/NORMAL: 1 images are named as pneumonia: person1_virus_0.png; move them to PNEUMONIA"),
        ("cut short", r"1 of 4 images cannot be used: test/PNEUMONIA/person1_virus_0.png: cannot be read as a JPEG or PNG"),
        ("no image", r"1 of 4 images cannot be used: test/PNEUMONIA/person1_virus_0.png: cannot be read as a JPEG or PNG"),
        ("too small", r"person1_virus_0.png: 20x60 pixels, expected sides of at least 32"),
    ],
)
def test_bad_folders_get_one_sentence(tmp_path: Path, what: str, message: str) -> None:
    root = folders(tmp_path, ("train", "val", "test"), patients=3 if what == "empty class" else 2)
    if what not in ("no test part", "no class", "empty class"):
        extra = root / "test" / "PNEUMONIA" / "person1_virus_1.png"
        extra.unlink(missing_ok=True)
        (root / "test" / "NORMAL" / "IM-0001-0001.jpeg").unlink(missing_ok=True)
    damaged(root, what)
    with pytest.raises(IsthmusError, match=message):
        cxr.load(root, size=32)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(IsthmusError, match="no such data folder"):
        cxr.load(tmp_path / "nowhere")


@settings(max_examples=40, deadline=None)
@given(start=st.sampled_from(["JPEG", "PNG", ""]), cut=st.integers(0, 400), noise=st.binary(max_size=60))
def test_whatever_a_file_holds_it_is_an_image_or_a_sentence(tmp_path_factory: pytest.TempPathFactory, start: str, cut: int, noise: bytes) -> None:
    stored = io.BytesIO()
    if start:
        picture().save(stored, start)
    file = tmp_path_factory.mktemp("scan") / "scan.png"
    file.write_bytes(stored.getvalue()[:cut] + noise + stored.getvalue()[cut:])
    try:
        image = read_grey(file, 32)
    except IsthmusError as error:
        assert str(file) in str(error)
    else:
        assert image.shape == (32, 32) and image.dtype == np.uint8


def test_real_x_rays_have_patients_and_both_classes(tmp_path: Path) -> None:
    if not REAL.is_file():
        pytest.skip(f"{REAL} is not here")
    with zipfile.ZipFile(REAL) as stored:
        places = [f"{part}/{label}/" for part in ("train", "test") for label in cxr.FOLDERS]
        chosen = [name for place in places for name in [n for n in stored.namelist() if n.startswith(place)][:12]]
        stored.extractall(tmp_path, chosen)
    split = cxr.load(tmp_path, size=64)
    assert len(split.x_test) == 24 and len(split.x_train) + len(split.x_val) == 24 and 0 < (split.x_train > 0).mean() < 1
    assert all(patient.startswith(("person", "IM-", "NORMAL2-IM-")) for patient in cxr.scans(tmp_path / "train").patients)


def test_scores_to_a_decision() -> None:
    assert decide(np.array([[2.0, -1.0]])) == ("normal", pytest.approx(1 / (1 + math.exp(3))))
    assert decide(np.array([[0.0, 1.0]]))[0] == "pneumonia"


# ---- the whole way, on the synthetic stand-in
def test_a_training_keeps_its_teachers_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shorter = replace(SYSTEM.presets["ci"], stand_in=24, teacher=replace(pneumonia_kd.TEACHER_CI, stand_in=24), rehearsal=Budget(epochs=8))
    system = replace(SYSTEM, presets={"ci": shorter, "kd": replace(shorter, distil="kd")}, train=TrainConfig(epochs=2), train_presets={})
    monkeypatch.setattr(pneumonia_kd, "SYSTEM", system)
    said: list[str] = []
    first = train_system("zoo:pneumonia_kd@ci", tmp_path, progress=lambda text, share: said.append(text))
    phases = ["0-linear-0.1", "1-sine-0.01", "2-sine-0.02", "3-cosine-0.01", "4-cosine-0.02"]
    assert sorted(file.name for file in (tmp_path / "teachers").iterdir()) == [f"phase-{phase}.pt" for phase in phases]
    assert said[0].startswith("teachers, linear 0.1: epoch 1/4") and said[-1].startswith("epoch 2/2")
    again: list[str] = []
    second = train_system("zoo:pneumonia_kd@ci", tmp_path, progress=lambda text, share: again.append(text))
    assert not again and second.metrics == first.metrics and set(first.metrics) >= {"auc", "weighted_sensitivity"}
    alone = train_system("zoo:pneumonia_kd@kd", tmp_path / "kd")
    assert digest(alone.module.state_dict()) != digest(first.module.state_dict())


def test_the_ci_preset_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shorter = replace(SYSTEM.presets["ci"], stand_in=24, teacher=replace(pneumonia_kd.TEACHER_CI, stand_in=24), rehearsal=Budget(epochs=8))
    monkeypatch.setattr(pneumonia_kd, "SYSTEM", replace(SYSTEM, presets={"ci": shorter}, train=TrainConfig(epochs=2), train_presets={}))
    bundle = isthmus.compile("zoo:pneumonia_kd@ci", targets=["cpu"], recipe="portable", tune=False, output=tmp_path / "bundle")
    assert [border["shape"] for border in bundle.manifest["graph"]["inputs"]] == [[1, 1, 32, 32]]
