# SPDX-License-Identifier: Apache-2.0
"""Engine `openvino`: the cpu artifact of every tiny model, threads, buffers in place, files that are not what their entry says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus import reference
from isthmus.errors import IsthmusError
from isthmus.graph import QuantGraph
from isthmus.profile import load_profile
from isthmus.targets.cpu import TARGET, openvino_tolerance

MODELS = Path(__file__).parents[1] / "models"
PROFILE = load_profile("cpu")
SOME = ("network", "network_asymmetric", "residual", "squeeze_excite", "softmax_tail", "conv_depthwise", "flatten_gemm", "resize_linear_asymmetric")


@pytest.fixture(autouse=True)
def openvino(require: Callable[[str], str]) -> None:
    require("openvino")


def entry_of(graph: QuantGraph, folder: Path, **options: Any) -> dict[str, Any]:
    plan = TARGET.plan(graph, PROFILE, {"engine": "openvino", **options})
    (folder / plan.artifact).write_bytes(plan.files[plan.artifact])
    return {"artifact": plan.artifact, **{side: [spec.to_json() for spec in getattr(plan, side)] for side in ("inputs", "outputs")}}


def opened(graph: QuantGraph, folder: Path, threads: int = 1, **options: Any) -> Any:
    from isthmus.runtimes.openvino import open_session

    return open_session(folder, entry_of(graph, folder, **options), threads)


def feeds_of(graph: QuantGraph) -> dict[str, np.ndarray]:
    return {spec.name: np.random.default_rng(0).integers(-128, 128, spec.shape, np.int8) for spec in graph.inputs}


@pytest.mark.parametrize("border", ["int8", "float32"])
@pytest.mark.parametrize("model", SOME)
def test_what_it_computes_is_within_what_is_declared(model: str, border: str, tmp_path: Path) -> None:
    graph = QuantGraph.load(MODELS / f"{model}.onnx")
    feeds = feeds_of(graph)
    expected = reference.run(graph, feeds)
    with opened(graph, tmp_path, io=border) as session:
        actual = session.run_quantised(feeds)
    allowed, why = openvino_tolerance(graph)
    assert allowed and why
    for spec in graph.outputs:
        steps = np.abs(expected[spec.name].astype(np.float64) - actual[spec.name])
        assert steps.max() <= (allowed if spec.is_quantised else 1e-5)


def test_it_reads_and_writes_in_place(tmp_path: Path) -> None:
    graph = QuantGraph.load(MODELS / "network.onnx")
    feeds, expected = feeds_of(graph), reference.run(graph, feeds_of(graph))
    name, output = graph.inputs[0].name, graph.outputs[0].name
    with opened(graph, tmp_path, threads=2) as session:
        first = session.run_raw(feeds)[output]
        assert (first == expected[output]).all()
        kept = first.copy()
        feeds[name][:] = 0  # the same array with other content, no copy of it anywhere
        again = session.run_raw(feeds)[output]
        assert again is first and (again == reference.run(graph, feeds)[output]).all() and (again != kept).any()
        strided = np.asfortranarray(feeds_of(graph)[name])
        assert (session.run_raw({name: strided})[output] == kept).all()


def test_mistakes_are_one_sentence(tmp_path: Path) -> None:
    from isthmus.runtimes.openvino import open_session

    graph = QuantGraph.load(MODELS / "network.onnx")
    entry = entry_of(graph, tmp_path)
    with pytest.raises(IsthmusError, match=r"0 threads: expected at least 1"):
        open_session(tmp_path, entry, 0)
    with pytest.raises(IsthmusError, match=r"nothing\.onnx: no such file; compile the bundle again"):
        open_session(tmp_path, {**entry, "artifact": "nothing.onnx"})
    other = {**entry, "inputs": [{**entry["inputs"][0], "shape": [1, 1, 1, 1]}]}
    with pytest.raises(IsthmusError, match=r"its inputs are .* but its manifest entry says"):
        open_session(tmp_path, other)
    file = tmp_path / "model.onnx"
    for content in (file.read_bytes()[:200], b"", b"nonsense" * 9):
        file.write_bytes(content)
        with pytest.raises(IsthmusError, match=r"model\.onnx: OpenVINO .* cannot load it \(.+\); compile the bundle again"):
            open_session(tmp_path, entry)


def test_the_target_refuses_what_it_does_not_know() -> None:
    graph = QuantGraph.load(MODELS / "network.onnx")
    with pytest.raises(IsthmusError, match="option engine of target cpu: expected onnxruntime or openvino, found 'other'"):
        TARGET.plan(graph, PROFILE, {"engine": "other"})
    with pytest.raises(IsthmusError, match="option io of target cpu: expected int8 or float32, found 'uint8'"):
        TARGET.plan(graph, PROFILE, {"io": "uint8"})
