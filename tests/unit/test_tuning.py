# SPDX-License-Identifier: Apache-2.0
"""Tuning of target cpu: candidates, what holds, what is taken, and a bundle whose artifact computes numbers of its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import isthmus
from isthmus import pipeline, tuning
from isthmus.artifact import golden_side
from isthmus.bench_bundle import latency_table, tuned_elsewhere
from isthmus.bundle import Bundle
from isthmus.dataset import Dataset
from isthmus.errors import IsthmusError, VerificationError
from isthmus.export.prepare import prepare_float
from isthmus.float_model import run_float
from isthmus.graph import QuantGraph
from isthmus.layerwise import verify_layers
from isthmus.measurement import Measurement
from isthmus.runtimes.__main__ import main as on_device
from isthmus.source import Score, Source
from isthmus.tuning import agreement

MODELS = Path(__file__).parents[1] / "models"
ENGINES = ("ONNX Runtime", "LiteRT", "OpenVINO")
FORMS = ("power_of_two", "asymmetric", "symmetric")
SEVEN_BITS = [f"{engine}, {scheme}, 7-bit weights" for scheme in ("asymmetric", "symmetric") for engine in ("ONNX Runtime", "OpenVINO")]
FLOATS = ("ONNX Runtime, float", "OpenVINO, float")
EVERY_CANDIDATE = {*(f"{engine}, {form}" for engine in ENGINES for form in FORMS), *SEVEN_BITS, *FLOATS, "untuned: ONNX Runtime, power_of_two"}


def network() -> onnx.ModelProto:
    """Conv, Relu, mean, Gemm on 1x8x8 images, the first two of three classes by where the image is bright."""
    generator = np.random.default_rng(0)
    weights = {"w": generator.normal(0, 0.4, (8, 1, 3, 3)), "b": generator.normal(0, 0.1, 8), "v": generator.normal(0, 0.5, (3, 8 * 64)), "c": np.zeros(3)}
    nodes = [
        helper.make_node("Conv", ["image", "w", "b"], ["conv"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["conv"], ["relu"], "relu"),
        helper.make_node("Flatten", ["relu"], ["flat"], "flat"),
        helper.make_node("Gemm", ["flat", "v", "c"], ["scores"], "gemm", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 1, 8, 8])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, 3])],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def images() -> np.ndarray:
    return np.random.default_rng(1).uniform(-1, 1, (24, 1, 8, 8)).astype(np.float32)


def compiled(folder: Path, model: Any = None, **given: Any) -> Bundle:
    return isthmus.compile(network() if model is None else model, output=folder / "bundle", **({"data": images()} | given))


def made_fast(monkeypatch: pytest.MonkeyPatch, fastest: str, spread: float = 0.0) -> None:
    """Times by decree, the sessions are real: `fastest` takes half as long as all others. With `spread`, noise that hides it."""

    random = np.random.default_rng(0)
    noise = np.linspace(1 - spread, 1 + spread, 64)  # the same for all, each time in another order: whatever looks like a difference is none

    def measured(sessions: Mapping[str, Any], rules: Any) -> dict[str, Measurement]:
        found = {}
        for name, (session, feeds) in sessions.items():
            session.run_raw(feeds[0])
            base = 500 if name == fastest else 1000
            samples = (base * random.permutation(noise)).astype(np.int64)
            conditions = {"cpu_model": "a processor", "warmup_settled": True}
            found[name] = Measurement("SingleStream", samples, 1, 64, int(samples.sum()), conditions, None, True, ())
        return found

    monkeypatch.setattr(tuning, "measure_interleaved", measured)


@pytest.fixture(scope="module")
def tuned_to(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    """`tuned_to(NAME)`: the network for cpu and rpi5, with that candidate the fastest; compiled once."""
    made: dict[str, Bundle] = {}

    def bundle_of(fastest: str) -> Bundle:
        if fastest not in made:
            with pytest.MonkeyPatch.context() as patch:
                made_fast(patch, fastest)
                made[fastest] = compiled(tmp_path_factory.mktemp("tuned"), targets=["cpu", "rpi5"])
        return Bundle.open(made[fastest].root)

    return bundle_of


def copied(bundle: Bundle, folder: Path) -> Bundle:
    return Bundle.open(shutil.copytree(bundle.root, folder / "copy"))


def candidates(bundle: Bundle) -> dict[str, dict[str, Any]]:
    return {row["candidate"]: row for row in bundle.artifact("cpu")["tuning"]["candidates"]}


def test_every_candidate_is_built_timed_and_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real harness, shorter; which one wins is the machine's."""
    for name in ("RULES", "FINAL_RULES"):
        monkeypatch.setattr(tuning, name, replace(getattr(tuning, name), min_count=50, min_duration_s=0.02, max_warmup_s=0.02))
    bundle = compiled(tmp_path)
    tuned, rows = bundle.artifact("cpu")["tuning"], candidates(bundle)
    assert set(rows) == EVERY_CANDIDATE
    assert sum(row["taken"] for row in rows.values()) == 1
    assert tuned["untuned"] == "untuned: ONNX Runtime, power_of_two" and tuned["threads"] == 1 and tuned["samples"] == 24
    assert tuned["metric"] == "agreement with the decisions of the float model" and tuned["least_score"] == pytest.approx(tuned["untuned_score"] - 0.01)
    for row in rows.values():
        assert row["p50_ns"] > 0 and 0 <= row["score"] <= 1 and 0 < row["exact_share"] <= 1 and row["taken"] == (not row["why_not"]), row
        assert row["candidate"] == tuned["untuned"] or row["ratio"]["low"] <= row["ratio"]["ratio"] <= row["ratio"]["high"]
    page = (bundle.root / "reports" / "report.html").read_text()
    assert "tuning-cpu" in page
    assert all(name in page for name in EVERY_CANDIDATE)


@pytest.mark.parametrize("fastest", ["LiteRT, asymmetric", "ONNX Runtime, symmetric, 7-bit weights", "OpenVINO, power_of_two"])
def test_what_is_taken_has_its_own_reference(tuned_to: Callable[[str], Bundle], capsys: pytest.CaptureFixture[str], fastest: str) -> None:
    bundle = tuned_to(fastest)
    rows, entry = candidates(bundle), bundle.artifact("cpu")
    assert [name for name, row in rows.items() if row["taken"]] == [fastest]
    assert rows["untuned: ONNX Runtime, power_of_two"]["why_not"] == f"slower than {fastest}"
    own = "power_of_two" not in fastest
    assert ("reference" in entry) == own
    form = bundle.form("cpu")
    assert form is not None and QuantGraph.load(form).recipe.scheme in fastest
    assert own == (form != bundle.model) and (not own or entry["reference"]["digest"] == QuantGraph.load(form).digest)
    assert all(row.passed for row in pipeline.verify(bundle)["cpu"])
    assert on_device(["verify", str(bundle.root), "-t", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["verification"][0]["passed"]
    with bundle.open_session("cpu") as session:
        assert session.engine == {"LiteRT": "tflite", "ONNX Runtime": "onnxruntime", "OpenVINO": "openvino"}[fastest.partition(",")[0]]
    assert verify_layers(bundle, "cpu").passed


@pytest.mark.parametrize("fastest", FLOATS)
def test_the_float_model_is_compared_with_itself(tuned_to: Callable[[str], Bundle], fastest: str) -> None:
    bundle = tuned_to(fastest)
    assert bundle.form("cpu") is None and bundle.form("rpi5") == bundle.model
    assert bundle.golden("cpu")["output/scores"].dtype == np.float32 and bundle.golden("rpi5")["output/scores"].dtype == np.int8
    results = pipeline.verify(bundle)
    assert results["cpu"][0].kind == "float32" and all(row.passed for rows in results.values() for row in rows)
    with pytest.raises(IsthmusError, match=r"cpu: runs the float model, so there are no int8 layers .* --no-tune"):
        verify_layers(bundle, "cpu")


@pytest.mark.parametrize("fastest", ["LiteRT, asymmetric", "ONNX Runtime, float"])
def test_golden_outputs_of_its_own_are_checked_too(tmp_path: Path, tuned_to: Callable[[str], Bundle], fastest: str) -> None:
    bundle = copied(tuned_to(fastest), tmp_path)
    golden = bundle.golden("cpu")
    golden["output/scores"] = golden["output/scores"] + golden["output/scores"].dtype.type(1)
    np.savez(bundle.folder("cpu") / "golden.npz", **golden)  # type: ignore[arg-type]
    with pytest.raises(VerificationError, match=r"golden\.npz of cpu is not what the reference computes"):
        pipeline.verify(bundle)


def test_the_slowest_has_its_samples_before_the_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a network that takes 0.4 s the usual limit of 1 s saw 3 runs: nothing could be chosen."""
    limits = []
    monkeypatch.setattr(tuning, "_measured_once", lambda candidates, rules: limits.append(rules.max_duration_s) or {one.name: None for one in candidates})
    monkeypatch.setattr(tuning, "pooled", lambda found: found)
    fast, slow = tuning._Candidate("fast", "an engine", run_s=1e-4), tuning._Candidate("slow", "an engine", run_s=0.4)
    tuning._measured([fast], tuning.RULES)
    tuning._measured([fast, slow], tuning.RULES)
    assert limits == [tuning.RULES.max_duration_s, pytest.approx(tuning.ROOM * tuning.LEAST_COUNT * 0.4)]


def test_noise_takes_nothing_from_the_untuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_fast(monkeypatch, "nothing", spread=0.9)
    bundle = compiled(tmp_path)
    rows = candidates(bundle)
    assert rows["untuned: ONNX Runtime, power_of_two"]["taken"] and "reference" not in bundle.artifact("cpu")
    assert {row["why_not"] for name, row in rows.items() if not row["taken"]} == {"not faster than untuned: ONNX Runtime, power_of_two beyond the noise"}


def test_what_costs_accuracy_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels are what the compiled form decides on images near its borders: a form that decides otherwise on one of 48 is below."""
    made_fast(monkeypatch, "ONNX Runtime, float")
    many = np.random.default_rng(2).uniform(-1, 1, (4000, 1, 8, 8)).astype(np.float32)
    exact = run_float(network(), {"image": many})["scores"]
    near = many[np.argsort(np.diff(np.sort(exact, axis=1))[:, 1])[:48]]
    labels = compiled(tmp_path, data=near, tune=False).golden()["output/scores"][:48].argmax(axis=1)
    np.savez(tmp_path / "data.npz", images=near, labels=labels)
    bundle = isthmus.compile(network(), data=tmp_path / "data.npz", output=tmp_path / "tuned")
    tuned, rows = bundle.artifact("cpu")["tuning"], candidates(bundle)
    assert tuned["metric"] == "top-1 accuracy" and tuned["untuned_score"] == 1.0 and tuned["least_score"] == 0.99
    below = {name: row for name, row in rows.items() if row["score"] < 0.99}
    assert "ONNX Runtime, float" in below
    assert all(row["why_not"] == f"top-1 accuracy {row['score']:.4f} is below 0.9900" and not row["taken"] for row in below.values())


@pytest.mark.parametrize("fastest", ["LiteRT, power_of_two", "ONNX Runtime, asymmetric"])
def test_what_is_taken_says_what_it_is_worth_to_a_task_without_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fastest: str) -> None:
    """The figure is that of the artifact's own outputs for the real golden samples, beside the float model's and the reference's."""
    made_fast(monkeypatch, fastest)
    inputs = images()
    wanted = np.random.default_rng(2).normal(0, 1, (len(inputs), 3))
    score = Score("closeness", lambda outputs: -float(np.abs(outputs[0] - wanted[: len(outputs[0])]).mean()))
    data = Dataset({"image": inputs}, None, "images")
    monkeypatch.setattr(pipeline, "load_source", lambda *given: Source("net", prepare_float(network(), {}), calibration=data, evaluation=data, score=score))
    bundle = isthmus.compile("anything", output=tmp_path / "bundle")
    entry, task = bundle.artifact("cpu"), bundle.manifest["task"]
    with bundle.open_session("cpu") as session:
        raw = session.run_samples({name: array[: len(inputs)] for name, array in golden_side(bundle.golden("cpu"), "input").items()})
    own = score.of([spec.dequantise(raw[spec.name]) for spec in bundle.output_specs("cpu")])
    assert candidates(bundle)[fastest]["taken"] and entry["score"] == pytest.approx(own, abs=1e-6)
    assert task["metric"] == "closeness" and task["samples"] == len(inputs) and task["float"] != task["reference"]
    assert (entry["score"] == task["reference"]) == ("power_of_two" in fastest)  # another scheme has figures of its own


def test_an_int8_model_has_the_engines_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_fast(monkeypatch, "LiteRT, power_of_two")
    bundle = compiled(tmp_path, MODELS / "network.onnx", data=None)
    assert set(candidates(bundle)) == {"untuned: ONNX Runtime, power_of_two", *(f"{engine}, power_of_two" for engine in ENGINES)}
    assert bundle.artifact("cpu")["tuning"]["metric"] == "agreement with the decisions of the compiled form"
    assert bundle.artifact("cpu")["engine"] == "tflite" and "reference" not in bundle.artifact("cpu")


@pytest.mark.parametrize("given", [{"tune": False}, {"options": {"optimisation": "all"}}])
def test_who_chooses_himself_gets_that(tmp_path: Path, given: dict[str, Any]) -> None:
    entry = compiled(tmp_path, MODELS / "network.onnx", data=None, **given).artifact("cpu")
    assert entry["engine"] == "onnxruntime" and "tuning" not in entry


def test_an_engine_that_is_not_here_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: Callable[[str], Any] = tuning.find_tool
    monkeypatch.setattr(tuning, "find_tool", lambda name: replace(found(name), found=name != "openvino", fix="pip install it"))
    made_fast(monkeypatch, "LiteRT, power_of_two")
    row = candidates(compiled(tmp_path, MODELS / "network.onnx", data=None))["OpenVINO, power_of_two"]
    assert row["why_not"] == "OpenVINO is not here: pip install it" and row["p50_ns"] is None and row["exact_share"] is None


def test_a_broken_reference_is_refused(tmp_path: Path, tuned_to: Callable[[str], Bundle]) -> None:
    root = copied(tuned_to("LiteRT, asymmetric"), tmp_path).root
    whole = (root / "manifest.json").read_text()
    for change, sentence in (
        ({"golden": "nothing.npz"}, r"'nothing\.npz' is not among the bundle's files"),
        ({"form": "../../model.onnx"}, r"is not among the bundle's files"),
        ({"outputs": None}, r"field 'reference' of its manifest entry is not complete"),
    ):
        manifest = json.loads(whole)
        manifest["artifacts"]["cpu"]["reference"] |= change
        (root / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(IsthmusError, match=sentence):
            Bundle.open(root)


def test_another_processor_is_said() -> None:
    measured = Measurement("SingleStream", np.array([5, 6, 7]), 1, 3, 18, {"cpu_model": "new"}, None, True, ())
    assert tuned_elsewhere({}, measured) is measured and tuned_elsewhere({"tuning": {"cpu_model": "new"}}, measured) is measured
    told = latency_table({"cpu": tuned_elsewhere({"tuning": {"cpu_model": "old"}}, measured)})
    assert "note: cpu was tuned on old, and this is new: compile it here" in told


def test_agreement_of_decisions() -> None:
    scores = np.array([[1.0, 2.0], [4.0, 3.0], [0.0, 1.0], [5.0, 4.0]])
    assert agreement({"y": scores}, {"y": 2 * scores}) == 1.0
    assert agreement({"y": scores, "z": scores}, {"y": scores, "z": scores[:, ::-1]}) == 0.0  # the worst output counts
    maps = np.zeros((1, 2, 2, 2))
    maps[0, 1, 0, 0] = 1.0
    other = maps.copy()
    other[0, 1, 1, 1] = 1.0
    assert agreement({"y": maps}, {"y": other}) == 0.75  # classes along axis 1, each place for itself
    joints = np.eye(4)[None]
    assert agreement({"y": joints}, {"y": joints[:, :, ::-1]}) == 0.0 and agreement({"y": joints}, {"y": joints + 0.1}) == 1.0
    single = np.array([[0.0], [1.0], [2.0], [10.0]])
    assert agreement({"y": single}, {"y": single + 0.15}) == 1.0 and agreement({"y": single}, {"y": single * np.array([[1], [1], [1], [1.1]])}) == 0.75
    assert agreement({"y": single}, {"y": np.full_like(single, np.nan)}) == 0.0
