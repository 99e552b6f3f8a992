# SPDX-License-Identifier: Apache-2.0
"""`compile` on everything it takes: files, modules, programs, int8 graphs of other writers; then what a user does with the bundle."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime.quantization as ort_quantization
import pytest
import torch
from PIL import Image
from torch import nn

import isthmus
from isthmus import cli
from isthmus.bundle import Bundle

TARGETS = ["cpu", "rpi5"]
PUBLIC_MODELS = Path(__file__).parents[3] / "shared" / "data" / "onnx_models"
EXACT = {"mismatched": 0, "max_lsb": 0, "passed": True}


class Residual(nn.Module):
    """Batch normalisation, a residual addition, a stride, two branches joined: what users' networks have."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.branch = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 8, 1))
        self.down = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.side = nn.AvgPool2d(2)
        self.head = nn.Linear(24, 5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.stem(image)
        x = torch.relu(x + self.branch(x))
        x = torch.cat([torch.relu(self.down(x)), self.side(x)], dim=1)
        return self.head(x.mean(dim=(2, 3)))


def network() -> Residual:
    torch.manual_seed(0)
    module = Residual()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.uniform_(-0.5, 0.5)
            part.running_var.uniform_(0.5, 2.0)
    return module.eval()


def _samples(count: int = 24) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, 3, 16, 16)).astype(np.float32)


def _is_exact(bundle: Bundle, targets: list[str] = TARGETS) -> None:
    for target in targets:
        rows = bundle.artifact(target)["verification"]
        assert rows and all(row["compared"] > 0 for row in rows)
        assert all({key: row[key] for key in EXACT} == EXACT for row in rows), rows


def test_a_module_from_python(tmp_path: Path) -> None:
    module = network()
    bundle = isthmus.compile(module, torch.zeros(1, 3, 16, 16), targets=TARGETS, data=_samples(), tune=False, output=tmp_path / "bundle")
    _is_exact(bundle)
    samples = _samples(4)
    with torch.no_grad():
        real = module(torch.from_numpy(samples)).numpy()
    for target in TARGETS:
        with bundle.open_session(target) as session:
            got = np.concatenate([next(iter(session.run({session.inputs[0].name: sample[None]}).values())) for sample in samples])
        assert np.abs(got - real).max() < 0.25 * np.abs(real).max()
        assert np.corrcoef(got.ravel(), real.ravel())[0, 1] > 0.98


def test_the_schemes_that_are_not_portable(tmp_path: Path) -> None:
    for recipe in ("symmetric", "asymmetric"):
        bundle = isthmus.compile(network(), torch.zeros(1, 3, 16, 16), targets=TARGETS, data=_samples(), recipe=recipe, tune=False, output=tmp_path / recipe)
        assert bundle.manifest["graph"]["scheme"] == recipe
        for target in TARGETS:
            assert all(row["passed"] and row["max_lsb"] <= 2 for row in bundle.artifact(target)["verification"])


def test_an_exported_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.export.save(torch.export.export(network(), (torch.zeros(1, 3, 16, 16),)), tmp_path / "net.pt2")
    np.save(tmp_path / "data.npy", _samples())
    _command(monkeypatch, "compile", "--no-tune", tmp_path / "net.pt2", "--data", tmp_path / "data.npy", "-t", "cpu", "-t", "rpi5", "-o", tmp_path / "bundle")
    _is_exact(Bundle.open(tmp_path / "bundle"))


def test_a_factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "users_network.py").write_text(
        "import torch\nfrom torch import nn\n\n\ndef make():\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(784, 3)), torch.zeros(1, 3, 16, 16)\n"
    )
    np.save(tmp_path / "data.npy", _samples())
    monkeypatch.chdir(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "isthmus.cli", "compile", "users_network:make", "--data", "data.npy", "-t", "rpi5", "-o", "bundle", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["artifacts"]["rpi5"]["exact_share"] == 1.0


def test_a_form_is_taken_as_it_is(tmp_path: Path) -> None:
    file = Path(__file__).parents[1] / "models" / "network.onnx"
    bundle = isthmus.compile(file, targets=TARGETS, tune=False, output=tmp_path / "bundle")
    _is_exact(bundle)
    assert bundle.model.read_bytes() == file.read_bytes()


def test_an_int8_graph_of_another_writer(tmp_path: Path) -> None:
    """ONNX Runtime's own static quantiser, QDQ, symmetric int8."""
    from isthmus.export.module import onnx_from_module

    onnx.save(onnx_from_module(network(), torch.zeros(1, 3, 16, 16)), tmp_path / "float.onnx")

    class Reader(ort_quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.left = [{"input": sample[None]} for sample in _samples(8)]

        def get_next(self) -> dict[str, np.ndarray] | None:
            return self.left.pop() if self.left else None

    ort_quantization.quantize_static(
        tmp_path / "float.onnx", tmp_path / "int8.onnx", Reader(), quant_format=ort_quantization.QuantFormat.QDQ,
        activation_type=ort_quantization.QuantType.QInt8, weight_type=ort_quantization.QuantType.QInt8, extra_options={"ActivationSymmetric": True},
    )  # fmt: skip
    bundle = isthmus.compile(tmp_path / "int8.onnx", targets=TARGETS, data=_samples(), tune=False, output=tmp_path / "bundle")
    assert bundle.manifest["graph"]["scheme"] == "symmetric"
    for target in TARGETS:
        assert all(row["passed"] and row["max_lsb"] <= 2 for row in bundle.artifact(target)["verification"])


@pytest.mark.parametrize("name", ["mnist_ort_examples", "wonnx_opt-mnist"])
def test_a_public_model(tmp_path: Path, name: str) -> None:
    """Files that other people exported, years ago."""
    file = next(PUBLIC_MODELS.rglob(f"{name}*.onnx"), None)
    if file is None:
        pytest.skip("the public models are not beside this repository")
    digits = np.random.default_rng(0).integers(0, 256, (32, 1, 28, 28)).astype(np.float32)
    bundle = isthmus.compile(file, targets=[*TARGETS, "jetson-orin-nano"], data=digits, tune=False, output=tmp_path / "bundle")
    _is_exact(bundle)


def test_images_from_a_folder_to_a_prediction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    generator = np.random.default_rng(0)
    for label in range(2):
        folder = tmp_path / "images" / f"class{label}"
        folder.mkdir(parents=True)
        for index in range(4):
            Image.fromarray(generator.integers(0, 256, (20, 24, 3), np.uint8)).save(folder / f"{index}.png")
    torch.onnx.export(network(), (torch.zeros(1, 3, 16, 16),), tmp_path / "net.onnx", dynamo=True, verbose=False)
    _command(
        monkeypatch, "compile", "--no-tune", tmp_path / "net.onnx", "--data", tmp_path / "images",
        "--preprocess", "scale=1/255,mean=0.5,std=0.5,resize=crop", "-t", "rpi5", "-o", tmp_path / "bundle",
    )  # fmt: skip
    assert Bundle.open(tmp_path / "bundle").manifest["task"]["samples"] == 8
    capsys.readouterr()
    _command(monkeypatch, "run", tmp_path / "bundle", "-t", "rpi5", "-i", tmp_path / "images" / "class0" / "0.png", "--json")
    outputs = json.loads(capsys.readouterr().out)
    assert np.asarray(next(iter(outputs.values()))).shape == (1, 5)


def test_bench_gives_the_same_figures_as_text_and_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    isthmus.compile(Path(__file__).parents[1] / "models" / "network.onnx", targets=TARGETS, tune=False, output=tmp_path / "bundle")
    capsys.readouterr()
    _command(monkeypatch, "bench", tmp_path / "bundle", "--min-duration", "0.1", "--json")
    printed = json.loads(capsys.readouterr().out)
    for target in TARGETS:
        kept = json.loads((tmp_path / "bundle" / "reports" / f"bench-{target}.json").read_text())
        samples = np.sort(kept["samples_ns"])
        assert printed[target]["count"] == len(samples) >= 1000
        assert printed[target]["p50_ns"] == samples[int(np.ceil(0.50 * len(samples))) - 1]
        assert printed[target]["p99_ns"] == samples[int(np.ceil(0.99 * len(samples))) - 1]
        assert printed[target]["mean_ns"] == pytest.approx(samples.mean())
        assert kept["conditions"]["threads"] == 1 and kept["conditions"]["host"] and printed[target]["warmup_count"] > 0
    _command(monkeypatch, "bench", tmp_path / "bundle", "-t", "cpu", "--min-duration", "0.1")
    text = capsys.readouterr().out
    assert all(word in text for word in ("p50", "p90", "p99", "mean", "samples", "warm-up", "threads 1"))


def test_the_device_command_verifies_and_measures(tmp_path: Path) -> None:
    isthmus.compile(Path(__file__).parents[1] / "models" / "network.onnx", targets=["rpi5"], output=tmp_path / "bundle")
    device = [sys.executable, "-m", "isthmus.runtimes"]
    verified = subprocess.run([*device, "verify", str(tmp_path / "bundle")], capture_output=True, text=True, check=True)
    assert json.loads(verified.stdout)["verification"][0]["mismatched"] == 0
    measured = subprocess.run([*device, "bench", str(tmp_path / "bundle"), "--min-duration", "0.1"], capture_output=True, text=True, check=True)
    assert json.loads(measured.stdout)["figures"]["count"] >= 1000
    wrong = subprocess.run([*device, "verify", str(tmp_path / "nothing")], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and "no such bundle" in wrong.stderr and "Traceback" not in wrong.stderr


def test_native_code_of_a_foreign_bundle_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The C simulation is a shared library: only its own maker's bundle opens it unasked."""
    from isthmus.errors import IsthmusError

    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "maker"))
    bundle = isthmus.compile(Path(__file__).parents[1] / "models" / "gemm.onnx", targets=["pynq-z2"], output=tmp_path / "bundle")
    bundle.open_session("pynq-z2").close()
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "somebody-else"))
    with pytest.raises(IsthmusError, match="native code, and this user did not build"):
        Bundle.open(tmp_path / "bundle").open_session("pynq-z2")
    Bundle.open(tmp_path / "bundle").open_session("pynq-z2", trust=True).close()


def _command(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["isthmus", *map(str, words)])
    try:
        cli.main()
    except SystemExit as error:
        assert not error.code, error.code
