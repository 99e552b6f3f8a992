# SPDX-License-Identifier: Apache-2.0
"""A network cut in two: each half alone and both together compute what the whole computes, and a damaged chain is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus import pipeline
from isthmus.artifact import make_golden
from isthmus.bench_bundle import why_not_measured
from isthmus.bundle import Bundle
from isthmus.errors import IsthmusError, ProblemsError, VerificationError
from isthmus.form_writer import FormWriter
from isthmus.graph import QuantGraph
from isthmus.runtimes import chain
from isthmus.split_bundle import Halves, _between, split_names

MODELS = Path(__file__).parents[1] / "models"
NETWORK = MODELS / "network.onnx"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The cut tensor leaves a TFLite model in NHWC and enters an ONNX model in NCHW."""
    return pipeline.compile(NETWORK, targets=["rpi5", "cpu"], split=["maxpool_q"], output=tmp_path_factory.mktemp("split") / "bundle")


def test_each_half_and_both_together_are_exact(bundle: Bundle) -> None:
    results = pipeline.verify(bundle, trust=True)
    assert list(results) == [name for profile in ("rpi5", "cpu") for name in (profile, f"{profile}, first part", f"{profile}, rest part")]
    assert all(comparison.mismatched == 0 and comparison.compared > 0 for comparisons in results.values() for comparison in comparisons)


def test_the_manifest_says_how_the_parts_chain(bundle: Bundle) -> None:
    entry = bundle.artifact("rpi5")
    assert [(part["folder"], part["profile"], part["engine"]) for part in entry["parts"]] == [("first", "rpi5", "tflite"), ("rest", "cpu", "onnxruntime")]
    assert entry["cut"] == ["maxpool_q"] and entry["engine"] == "chain"
    assert json.loads((bundle.folder("rpi5") / "chain.json").read_bytes())["cut"] == ["maxpool_q"]
    first, rest = (QuantGraph.load(bundle.folder("rpi5") / part / "form.onnx") for part in ("first", "rest"))
    assert [spec.name for spec in first.outputs] == [spec.name for spec in rest.inputs]
    assert entry["size_bytes"] == sum(part["size_bytes"] for part in entry["parts"])


def test_real_numbers_go_in_and_come_out(bundle: Bundle) -> None:
    golden = bundle.golden()
    (spec,) = QuantGraph.load(bundle.model).inputs
    with bundle.open_session("rpi5", trust=True) as session:
        for index in range(3):
            sample = spec.dequantise(golden[f"input/{spec.name}"][index : index + 1])
            (made,) = session.run({spec.name: sample}).values()
            assert np.array_equal(session.outputs[0].quantise(made), golden["output/y"][index : index + 1])
        assert "tflite" in session.version and "onnxruntime" in session.version


def test_a_chain_is_measured_where_its_parts_are(bundle: Bundle) -> None:
    entry = bundle.artifact("rpi5")
    assert why_not_measured(entry) == ""
    simulated = {**entry, "parts": [{**entry["parts"][0], "engine": "csim"}, entry["parts"][1]]}
    assert why_not_measured(simulated) == "needs the board"


def test_somebody_elses_chain_needs_trust(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    with pytest.raises(IsthmusError, match="pass --trust-bundle"):
        bundle.open_session("rpi5")


def test_a_wider_cut_and_an_output_before_it(tmp_path: Path) -> None:
    """Two tensors cross, and the graph's first output stays with the first half."""
    writer = FormWriter()
    image = writer.input("image", (1, 2, 6, 6), scale=2**-5)
    weight = np.random.default_rng(0).integers(-20, 20, (2, 2, 3, 3), np.int8)
    left = writer.conv(image, weight, 2**-6, np.arange(2, dtype=np.int32), scale=2**-4, pads=(1, 1, 1, 1), activation="Relu")
    right = writer.conv(image, weight[::-1].copy(), 2**-6, np.arange(2, dtype=np.int32), scale=2**-4, pads=(1, 1, 1, 1))
    writer.output(left, "early")
    writer.output(writer.add(left, right, scale=2**-3), "late")
    made = pipeline.compile(writer.graph(), targets=["cpu"], split=[left, right], output=tmp_path / "bundle")
    assert [spec["name"] for spec in made.artifact("cpu")["outputs"]] == ["early", "late"]
    assert all(comparison.mismatched == 0 for comparisons in pipeline.verify(made, trust=True).values() for comparison in comparisons)


# ---- bad input
@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (["nowhere"], "the graph has no tensor 'nowhere': its int8 tensors are"),
        (["x_quantised", "conv_q"], "asked for|not the whole cut|nothing behind the cut reads"),
        (["gemm_q"], "nothing is computed behind 'gemm_q': cut between two layers"),
        (["x_quantised"], "nothing is computed in front of 'x_quantised'"),
    ],
)
def test_cuts_that_are_none(tensors: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(IsthmusError, match=message):
        pipeline.compile(NETWORK, targets=["cpu"], split=tensors, output=tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_names_are_taken_apart() -> None:
    assert split_names(["a, b", "c", "a"]) == ["a", "b", "c"]
    with pytest.raises(IsthmusError, match="--split: an empty name"):
        split_names(["a,,b"])


def test_a_half_that_its_target_cannot_take_is_a_problem(tmp_path: Path) -> None:
    """An asymmetric form is not for an FPGA, whole or in part: the sentence says which part."""
    asymmetric = next(path for path in sorted(MODELS.glob("*.onnx")) if QuantGraph.load(path).recipe.scheme == "asymmetric" and _cut_of(path))
    with pytest.raises(ProblemsError, match="pynq-z2, first part: model: scheme 'asymmetric'"):
        pipeline.compile(asymmetric, targets=["pynq-z2"], split=[_cut_of(asymmetric)], output=tmp_path / "bundle")


def _cut_of(path: Path) -> str:
    """A tensor that cuts the model in two, "" where no single one does."""
    graph = QuantGraph.load(path)
    for node in graph.nodes:
        if node.kind == "int8" and node.inputs:
            try:
                Halves.of(graph, [node.output])
            except IsthmusError:
                continue
            return node.output
    return ""


def test_references_that_disagree_end_the_compile() -> None:
    graph = QuantGraph.load(NETWORK)
    golden = dict(make_golden(graph, None))
    golden["output/y"] = golden["output/y"] ^ 1
    with pytest.raises(VerificationError, match="the two halves do not compute 'y' as the whole does"):
        _between(Halves.of(graph, ["maxpool_q"]), golden)


def change(entry: dict[str, Any], what: str) -> dict[str, Any]:
    changed = json.loads(json.dumps(entry))
    first, rest = changed["parts"]
    if what == "scale":
        rest["inputs"][0]["scale"] *= 2
    elif what == "name":
        first["outputs"][0]["name"] = "other"
    elif what == "output":
        changed["outputs"][0]["name"] = "other"
    elif what == "engine":
        first["engine"] = "../evil"
    elif what == "folder":
        first["folder"] = ".."
    elif what == "itself":
        first["engine"] = "chain"
    elif what == "missing":
        del rest["inputs"]
    else:
        changed["parts"] = "both"
    return changed


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("scale", "the cut tensor 'maxpool_q_cut' is"),
        ("name", "compile the bundle again|nothing gives|compile again"),
        ("output", "no part of the chain gives the output 'other'"),
        ("engine", "is no engine's name"),
        ("folder", "is no folder of a chain's part"),
        ("itself", "engine 'chain' is no engine's name"),
        ("missing", "lists no parts, or not all of one"),
        ("parts", "lists no parts, or not all of one"),
    ],
)
def test_a_changed_entry_is_refused(what: str, message: str, bundle: Bundle) -> None:
    with pytest.raises(IsthmusError, match=message):
        chain.open_session(bundle.folder("cpu"), change(bundle.artifact("cpu"), what))
