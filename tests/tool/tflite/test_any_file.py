# SPDX-License-Identifier: Apache-2.0
"""Files that isthmus did not make: MLPerf Tiny's models, and files that somebody broke."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.bench import Rules, measure
from isthmus.errors import IsthmusError
from isthmus.runtimes.tflite import open_tflite
from isthmus.runtimes.tflite.model_file import check_file

MLPERF_TINY = Path(__file__).parents[4] / "shared" / "data" / "mlperf_tiny"
# file: (its one input, its one output)
MODELS = {
    "ad01_int8": ((1, 640), (1, 640)),
    "kws_ref_model": ((1, 49, 10, 1), (1, 12)),
    "pretrainedResnet_quant": ((1, 32, 32, 3), (1, 10)),
    "str_ww_ref_model": ((1, 30, 1, 40), (1, 3)),
    "vww_96_int8": ((1, 96, 96, 3), (1, 2)),
}


@pytest.fixture
def models() -> Path:
    if not MLPERF_TINY.is_dir():
        pytest.skip("shared/data/mlperf_tiny is not here")
    return MLPERF_TINY / "models"


@pytest.fixture(scope="module")
def whole(litert: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small whole file."""
    plan = litert.plan(litert.case().conv_graph((1, 3, 6, 6), 4, (3, 3), strides=(2, 2)))
    path = tmp_path_factory.mktemp("whole") / "whole.tflite"
    path.write_bytes(plan.files[plan.artifact])
    return path


# ---- MLPerf Tiny
@pytest.mark.parametrize("name", MODELS)
def test_the_real_models_run_and_are_measured(litert: Any, name: str, models: Path) -> None:
    with open_tflite(models / f"{name}.tflite", trust=True) as session:
        (source,), (target,) = session.inputs, session.outputs
        assert (source.shape, target.shape) == MODELS[name]
        assert source.dtype == target.dtype == "int8" and source.scale and target.scale
        feeds = {source.name: np.random.default_rng(0).integers(-128, 128, source.shape).astype(np.int8)}
        first = session.run_raw(feeds)[target.name].copy()
        assert np.array_equal(session.run_raw(feeds)[target.name], first)
        measurement = measure(session, feeds, Rules(min_count=10, min_duration_s=0.01, max_duration_s=5.0, percentile=50.0))
        assert measurement.count >= 10 and measurement.conditions["engine_version"] == session.version


def test_a_real_word_is_recognised(litert: Any, models: Path) -> None:
    sample = np.load(MLPERF_TINY / "samples" / "kws_inputs_raw.npy").reshape(1, 49, 10, 1)
    for xnnpack in (True, False):
        with open_tflite(models / "kws_ref_model.tflite", xnnpack=xnnpack) as session:
            assert ("without XNNPACK" in session.version) is not xnnpack
            assert session.run_raw({session.inputs[0].name: sample})[session.outputs[0].name].argmax() == 5


def test_a_float_model_takes_real_numbers(litert: Any, models: Path) -> None:
    with open_tflite(models / "ad01_fp32.tflite", trust=True) as session:
        assert [spec.dtype for spec in (*session.inputs, *session.outputs)] == ["float32", "float32"]
        (values,) = session.run({session.inputs[0].name: np.ones((1, 640))}).values()
        assert np.isfinite(values).all() and values.any()


# ---- broken files
def test_a_whole_file_opens(whole: Path) -> None:
    with open_tflite(whole) as session:
        assert [spec.name for spec in (*session.inputs, *session.outputs)] == ["x", "y"]


def test_a_number_that_ends_the_engine_ends_a_process_of_its_own(litert: Any, whole: Path, tmp_path: Path) -> None:
    """A pool with a stride of 0: TFLite divides by it."""
    from ai_edge_litert import schema_py_generated as schema

    from isthmus.targets.tflite.flatbuffer import IDENTIFIER, aligning_builder

    plan = litert.plan(litert.case().one((1, 3, 6, 6), lambda c, x: c.writer.max_pool(x, (2, 2))))
    model = schema.ModelT.InitFromPackedBuf(plan.files[plan.artifact])
    model.subgraphs[0].operators[0].builtinOptions.strideH = 0
    builder = aligning_builder()
    builder.Finish(model.Pack(builder), IDENTIFIER)
    path = tmp_path / "stride.tflite"
    path.write_bytes(bytes(builder.Output()))
    check_file(path)
    with pytest.raises(IsthmusError, match=r"stride\.tflite: ") as caught:
        open_tflite(path)
    assert "\n" not in str(caught.value)


MUTATE = """
import sys, pathlib
from isthmus.errors import IsthmusError
from isthmus.runtimes.tflite.model_file import check_file
from isthmus.runtimes.tflite import find_engine
folder = pathlib.Path(sys.argv[1])
for path in sorted(folder.glob("*.tflite")):
    print(path.name, flush=True)
    try:
        check_file(path)
    except IsthmusError as error:
        assert "compile the bundle again" in str(error) and "\\n" not in str(error)
        continue
    module, _ = find_engine()
    try:
        module.Interpreter(model_path=str(path), num_threads=1).allocate_tensors()
    except (ValueError, RuntimeError):
        pass
"""


def test_no_broken_offset_ends_the_process(whole: Path, tmp_path: Path) -> None:
    """Every offset and index of the file set to something absurd, one at a time: said, or survived, in one process."""
    content = whole.read_bytes()
    words = np.frombuffer(content[: len(content) // 4 * 4], np.int32)
    places = [index * 4 for index in np.flatnonzero((words > 0) & (words < len(content)))]
    chosen = np.random.default_rng(0).permutation(places)[:80]
    for number, place in enumerate(chosen):
        changed = bytearray(content)
        changed[place : place + 4] = (2**31 - 1 - int(place)).to_bytes(4, "little")
        (tmp_path / f"{number:03}.tflite").write_bytes(changed)
    done = subprocess.run([sys.executable, "-c", MUTATE, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, (done.stdout.splitlines()[-1:], done.stderr[-500:])


@settings(max_examples=200)
@given(data=st.data())
def test_whatever_the_bytes_the_check_answers(data: st.DataObject, whole: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    changed = bytearray(whole.read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(changed) - 1), max_size=6)):
        changed[place] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "changed.tflite"
    path.write_bytes(changed[: data.draw(st.integers(0, len(changed)))])
    try:
        check_file(path)
    except IsthmusError as error:
        assert "\n" not in str(error) and "compile the bundle again" in str(error)
