# SPDX-License-Identifier: Apache-2.0
"""`isthmus zoo show`, `zoo train` and `zoo table`, as a newcomer types them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from isthmus.bench import Rules
from isthmus.bench_bundle import bench_bundle
from isthmus.bundle import Bundle
from isthmus.train.loop import TrainConfig
from isthmus.train.zoo import digits


def test_a_system_is_shown(command, monkeypatch):
    monkeypatch.setattr(digits, "SYSTEM", replace(digits.SYSTEM, roads={"fpga": "nano"}))
    code, out, _ = command("zoo", "show", "digits", "--json")
    shown = json.loads(out)
    assert code == 0 and shown["roads"] == {"fpga": "nano"}
    assert {row["preset"]: row["parameters"] for row in shown["presets"]} == {"c2": 4370, "nano": 1182}
    code, out, _ = command("zoo", "show", "digits@nano")
    assert code == 0 and "1,182" in out and "fpga: nano" in out and "4,370" not in out


def test_a_training_goes_on_from_its_checkpoint(command, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(digits, "SYSTEM", replace(digits.SYSTEM, train=TrainConfig(epochs=2)))
    code, out, err = command("zoo", "train", "digits@nano", "-o", tmp_path / "training", "--json")
    first = json.loads(out)
    assert code == 0 and Path(first["checkpoint"]).is_file(), err
    code, out, _ = command("zoo", "train", "digits@nano", "-o", tmp_path / "training", "--json")
    assert code == 0 and json.loads(out)["metrics"] == first["metrics"]
    code, _, err = command("zoo", "train", "digits@nano", "-o", tmp_path / "training", "--seed", 1)
    assert code == 2 and "checkpoint" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("zoo", "show", "nothing"), "unknown zoo system 'nothing'"),
        (("zoo", "train", "mobilenet_small@nothing"), "unknown preset of mobilenet_small 'nothing': there are pneumonia, breast, mnist, ci"),
        (("zoo", "train", "covid_xai"), "holds the architecture alone"),
        (("zoo", "train", "mobilenet_small@pneumonia", "--data-root", "nowhere"), "nowhere"),
    ],
)
def test_mistakes_get_one_sentence(command, tmp_path: Path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = command(*words)
    assert (code, out) == (2, "") and message in err


def test_from_a_training_to_a_row_of_the_table(command, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(digits, "SYSTEM", replace(digits.SYSTEM, train=TrainConfig(epochs=3)))
    code, _, err = command("zoo", "train", "digits@nano", "-o", tmp_path, "--device", "cpu", "--json")
    assert code == 0, err
    words = ("--target", "cpu", "--target", "rpi5", "--target", "jetson-orin-nano", "--no-tune", "-o", tmp_path / "bundle")
    code, out, err = command("compile", tmp_path / "checkpoint.pt", *words)
    assert code == 0 and "checkpoint.pt after 3 epochs with TrainConfig(epochs=3" in out, err
    bundle = Bundle.open(tmp_path / "bundle")
    kept, judged = bundle.golden()["label"][: bundle.manifest["task"]["samples"]], digits.SYSTEM.data().y_test
    assert sorted(kept) == sorted(judged) and kept.tolist() != judged.tolist()  # by lot: a set may have one class after the other
    bench_bundle(bundle, ["cpu", "rpi5"], Rules(min_count=100, min_duration_s=0.01, percentile=50.0))
    code, out, err = command("zoo", "table", tmp_path / "bundle", tmp_path / "bundle", "--json")
    (row,) = json.loads(out)
    task = bundle.manifest["task"]
    assert code == 0 and (row["system"], row["parameters"]) == ("digits@nano", 1182 - 2 * 12), err  # batch norms are folded
    assert (row["float_metric"], row["int8_metric"], row["samples"]) == (task["float"], task["reference"], task["samples"])
    assert row["onnx"].startswith(f"{bundle.model.stat().st_size:,} bytes, ") and row["onnx"].endswith(" ms")
    assert row["tflite"].startswith("bit-exact, ") and row["tflite"].endswith(" ms") and row["hls4ml"] == "–"
    assert re.fullmatch(r"(compiles|not compiled here); [\d.]+ / [\d.]+ / [\d.]+ ms predicted", row["tensorrt"])
    code, out, _ = command("zoo", "table", tmp_path / "bundle", "--markdown")
    lines = out.splitlines()
    assert lines[2].count("|") == lines[0].count("|") and "threads: 1" in out and f"on {task['samples']} samples of digits: test part" in out


def test_a_checkpoint_that_is_not_of_today_is_no_model(command, tmp_path: Path, monkeypatch):
    system = replace(digits.SYSTEM, train=TrainConfig(epochs=1))
    monkeypatch.setattr(digits, "SYSTEM", system)
    assert command("zoo", "train", "digits@nano", "-o", tmp_path, "--json")[0] == 0
    for change, message in (
        ({"load_data": lambda config, seed, root: replace(system.load_data(config, seed, root), name="other")}, "was trained on other data than other"),
        ({"build": lambda config: system.build(system.presets["c2"])}, "written by other code: its layers are not those of today"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(digits, "SYSTEM", replace(system, **change))
            code, _, err = command("compile", tmp_path / "checkpoint.pt", "-o", tmp_path / "bundle")
            assert code == 2 and message in err
    (tmp_path / "cut.pt").write_bytes((tmp_path / "checkpoint.pt").read_bytes()[:-100])
    code, _, err = command("compile", tmp_path / "cut.pt", "-o", tmp_path / "bundle")
    assert code == 2 and "cannot be read as a checkpoint" in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens where there is no CUDA device")
def test_cuda_where_there_is_none(command, tmp_path: Path):
    code, _, err = command("zoo", "train", "digits@nano", "-o", tmp_path, "--device", "cuda")
    assert code == 2 and "sees no CUDA device here; train with --device cpu" in err and not (tmp_path / "checkpoint.pt").exists()


@pytest.mark.slow
def test_torchrun_goes_on_after_a_kill(tmp_path: Path):
    """Both processes end by SIGKILL after an epoch; the second start comes to the weights of a training nobody disturbed, and prints once."""
    programs = Path(sys.executable).parent

    def words(folder: str) -> list[str]:
        start = [programs / "torchrun", "--standalone", "--nproc-per-node", 2, "--no-python", programs / "isthmus"]
        return [str(word) for word in (*start, "zoo", "train", "digits@nano", "--device", "cpu", "--json", "-o", tmp_path / folder)]

    stopped = subprocess.Popen(words("stopped"), stdout=subprocess.PIPE, start_new_session=True)
    while not (tmp_path / "stopped" / "checkpoint.pt").exists() and stopped.poll() is None:
        time.sleep(0.02)
    os.killpg(stopped.pid, signal.SIGKILL)
    stopped.wait()
    done = len(torch.load(tmp_path / "stopped" / "checkpoint.pt", weights_only=True)["epochs"]) - 1
    assert 1 <= done < 40
    printed = [subprocess.run(words(folder), capture_output=True, text=True, check=True).stdout for folder in ("stopped", "whole")]
    metrics = [json.loads(text)["metrics"] for text in printed]  # one object each, though two processes trained
    states = [torch.load(tmp_path / folder / "checkpoint.pt", weights_only=True) for folder in ("stopped", "whole")]
    assert metrics[0] == metrics[1]
    assert all(torch.equal(states[0]["best"][name], states[1]["best"][name]) for name in states[1]["best"])
