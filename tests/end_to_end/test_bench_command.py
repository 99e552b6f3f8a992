# SPDX-License-Identifier: Apache-2.0
"""`isthmus bench` on a real bundle with real engines: scenarios, comparisons, pinning, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

import isthmus
from isthmus.bundle import Bundle

MODELS = Path(__file__).parents[1] / "models"
QUICK = ("--min-duration", "0.02", "--min-count", "50", "--percentile", "90")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "bundle"
    isthmus.compile(MODELS / "network.onnx", targets=["cpu", "rpi5", "jetson-orin-nano"], tune=False, output=folder)
    return folder


def test_each_scenario_leaves_its_own_file(bundle, command):
    for scenario, runs in (("SingleStream", 1), ("MultiStream", 3), ("Offline", 1)):
        code, out, _ = command("bench", bundle, "--scenario", scenario, "--samples-per-query", 3, *QUICK, "--json")
        assert code == 0
        printed = json.loads(out)
        assert set(printed) == {"cpu", "rpi5"}
        for name, figures in printed.items():
            suffix = "" if scenario == "SingleStream" else f"-{scenario.lower()}"
            kept = json.loads((bundle / "reports" / f"bench-{name}{suffix}.json").read_text())
            assert kept["scenario"] == figures["scenario"] == scenario
            assert kept["inference_count"] == runs * figures["count"]
            assert figures["throughput_per_s"] == pytest.approx(kept["inference_count"] / kept["elapsed_ns"] * 1e9)
    page = (bundle / "reports" / "report.html").read_text()
    assert "cpu Offline" in page and "rpi5 MultiStream" in page


def test_one_against_another_profile_and_another_bundle(bundle, command, tmp_path):
    code, out, _ = command("bench", bundle, "-t", "cpu", "--against", "rpi5", *QUICK, "--json")
    assert code == 0
    ratio = json.loads(out)["cpu"]["conditions"]["against"]
    assert ratio["name"] == "rpi5" and ratio["low"] <= ratio["high"] and ratio["ratio"] > 0
    assert json.loads((bundle / "reports" / "bench-cpu.json").read_text())["conditions"]["interleaved"] == ["cpu", "rpi5"]
    isthmus.compile(MODELS / "gemm.onnx", targets=["cpu"], tune=False, output=tmp_path / "other")
    code, out, _ = command("bench", bundle, "-t", "cpu", "--against", tmp_path / "other", *QUICK)
    assert code == 0
    assert "cpu takes" in out and f"times as long as cpu @ {tmp_path / 'other'} (95 % interval" in out
    assert "times as long as" in (bundle / "reports" / "report.html").read_text()


def float_onnx(file: Path, shape: list[int | str | None], op: str = "Softmax", dtype: int = TensorProto.FLOAT) -> Path:
    ends = [helper.make_tensor_value_info(name, dtype, shape) for name in ("image", "y")]
    opset = helper.make_opsetid("", 17)
    onnx.save(
        helper.make_model(helper.make_graph([helper.make_node(op, ["image"], ["y"])], "g", ends[:1], ends[1:]), opset_imports=[opset], ir_version=8), file
    )
    return file


@pytest.mark.parametrize("kind", ["tflite", "onnx", "free batch"])
def test_against_a_file_that_somebody_else_made(bundle, command, tmp_path, kind):
    """What a user has now, in the same turns: the answer to whether changing is worth it."""
    file = bundle / "artifacts" / "rpi5" / "model.tflite" if kind == "tflite" else float_onnx(tmp_path / "theirs.onnx", ["N" if kind == "free batch" else 1, 8])
    before = sorted(bundle.rglob("*"))
    code, out, _ = command("bench", bundle, "-t", "cpu", "--against", file, *QUICK, "--json")
    assert code == 0
    printed = json.loads(out)
    assert printed["cpu"]["conditions"]["against"]["name"] == str(file) and printed[str(file)]["count"] >= 50
    code, out, _ = command("bench", bundle, "-t", "cpu", "--against", file, *QUICK)
    assert code == 0 and f"times as long as {file} (95 % interval" in out
    assert {place.name for place in set(bundle.rglob("*")) - set(before)} <= {"bench-cpu.json"}


def test_against_a_file_that_cannot_be_measured_is_one_sentence(bundle, command, tmp_path):
    (tmp_path / "no.onnx").write_bytes(b"no model")
    (tmp_path / "no.tflite").write_bytes(b"no model")
    places = {
        tmp_path / "missing.onnx": "no such file",
        tmp_path / "no.onnx": "not an ONNX file",
        tmp_path / "no.tflite": "no.tflite",
        float_onnx(tmp_path / "free.onnx", [1, "C", 8]): "only the batch may be free",
        float_onnx(tmp_path / "text.onnx", [1, 8], "Identity", TensorProto.STRING): "is a tensor(string)",
        float_onnx(tmp_path / "whole.onnx", [1, 8], "Erf", TensorProto.INT8): "cannot load it",
    }
    for place, message in places.items():
        code, _, err = command("bench", bundle, "-t", "cpu", "--against", place, *QUICK)
        (said,) = (line for line in err.splitlines() if "measuring latency" not in line and line)
        assert code == 2 and said.startswith("isthmus: ") and message in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("-t", "jetson-orin-nano"), "jetson-orin-nano: needs the board"),
        (("--against", "rpi5"), "--against compares one profile"),
        (("-t", "cpu", "--against", "cpu"), "that is the profile itself"),
        (
            ("-t", "cpu", "--against", "nothing"),
            "neither a profile of this bundle (cpu, rpi5, jetson-orin-nano) nor a bundle's folder nor a .tflite or .onnx file",
        ),
        (("-t", "cpu", "--against", "rpi5", "--scenario", "Offline"), "not in Offline"),
        (("--scenario", "Server"), "scenario 'Server' is unknown"),
        (("--threads", "0"), "threads must be above 0"),
        (("--percentile", "100"), "percentile 100.0 is not between 0 and 100"),
        (("--pin", "x"), "--pin 'x': expected processors"),
        (("--pin", "4000"), "the processors 4000 are not all there"),
        (("-t", "xx"), "xx"),
    ],
)
def test_mistakes_get_one_sentence(bundle, command, words, message):
    code, out, err = command("bench", bundle, *words)
    assert (code, out) == (2, "")
    assert message in err and err.count("\n") == 1 + err.count("[")


def test_a_percentile_that_the_samples_cannot_support_is_not_valid(bundle, command):
    code, out, _ = command("bench", bundle, "-t", "cpu", "--percentile", "99.99", "--min-duration", "0.02", "--max-duration", "0.05", "--json")
    assert code == 0
    figures = json.loads(out)["cpu"]
    assert figures["valid"] is False
    assert "time limit of 0.05 s" in figures["reasons"][0]


def test_pinning_is_recorded(bundle, command):
    cpu = min(os.sched_getaffinity(0))
    code, out, _ = command("bench", bundle, "-t", "cpu", "--pin", cpu, *QUICK, "--json")
    assert code == 0
    assert json.loads(out)["cpu"]["conditions"]["pinned_to"] == [cpu]


def test_loadgen_measures_a_bundle(bundle, command, require):
    require("loadgen")
    code, out, _ = command("bench", bundle, "-t", "cpu", "--loadgen", *QUICK, "--json")
    assert code == 0
    assert json.loads(out)["cpu"]["conditions"]["harness"].startswith("mlcommons-loadgen")
    code, _, err = command("bench", bundle, "-t", "cpu", "--loadgen", "--against", "rpi5")
    assert code == 2 and "LoadGen" in err


def test_the_device_command_knows_the_scenarios(bundle):
    words = [sys.executable, "-m", "isthmus.runtimes", "bench", str(bundle), "-t", "rpi5", "--scenario", "MultiStream", "--samples-per-query", "2", *QUICK]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    measured = json.loads(done.stdout)
    assert measured["scenario"] == "MultiStream" and measured["inference_count"] == 2 * measured["figures"]["count"]
    assert Bundle.open(bundle)
