# SPDX-License-Identifier: Apache-2.0
"""ONNX files whose weights lie beside them: read from the same folder, refused from anywhere else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from isthmus.errors import IsthmusError
from isthmus.onnx_file import load_onnx


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model saved with its weight in weights.bin."""
    weight = np.arange(1024, dtype=np.float32).reshape(32, 32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", 1, [1, 32])],
        [helper.make_tensor_value_info("y", 1, [1, 32])],
        [numpy_helper.from_array(weight, "w")],
    )
    (tmp_path / "m").mkdir()
    onnx.save(helper.make_model(graph), tmp_path / "m" / "model.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    return tmp_path / "m" / "model.onnx"


def _edit(file: Path, **entries: str) -> None:
    model = onnx.load(file, load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        entry.value = entries.get(entry.key, entry.value)
    file.write_bytes(model.SerializeToString())


def test_weights_beside_the_model_are_read(model: Path) -> None:
    loaded = load_onnx(model)
    assert loaded.graph.initializer[0].data_location == onnx.TensorProto.DEFAULT
    assert numpy_helper.to_array(loaded.graph.initializer[0])[3, 4] == 100
    assert not loaded.graph.initializer[0].external_data


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/passwd", "a/../../secret.bin", "", "..\\secret.bin"])
def test_weights_from_elsewhere_are_refused(model: Path, location: str) -> None:
    (model.parent.parent / "secret.bin").write_bytes(bytes(4096))
    _edit(model, location=location)
    with pytest.raises(IsthmusError, match="no path inside the model's folder"):
        load_onnx(model)


def test_weights_behind_a_link_are_refused(model: Path) -> None:
    (model.parent / "weights.bin").unlink()
    (model.parent.parent / "secret.bin").write_bytes(bytes(4096))
    (model.parent / "weights.bin").symlink_to(model.parent.parent / "secret.bin")
    with pytest.raises(IsthmusError, match="behind a link out of"):
        load_onnx(model)


def test_missing_short_and_nonsense_weights(model: Path) -> None:
    whole = (model.parent / "weights.bin").read_bytes()
    (model.parent / "weights.bin").write_bytes(whole[:-1])
    with pytest.raises(IsthmusError, match=r"end at byte 4096 of 'weights\.bin', which has 4095"):
        load_onnx(model)
    _edit(model, offset="many")
    with pytest.raises(IsthmusError, match="offset 'many'"):
        load_onnx(model)
    (model.parent / "weights.bin").unlink()
    with pytest.raises(IsthmusError, match=r"its weights 'weights\.bin' are missing"):
        load_onnx(model)
