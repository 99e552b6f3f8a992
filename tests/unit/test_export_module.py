# SPDX-License-Identifier: Apache-2.0
"""PyTorch modules and exported programs as float ONNX; a file of a stranger runs nothing."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.errors import IsthmusError
from isthmus.export.prepare import prepare_float


def operators(model: onnx.ModelProto) -> list[str]:
    return [entry.op_type for entry in model.graph.node]


# ---- PyTorch
def test_a_module_becomes_onnx_and_is_left_as_it_was() -> None:
    torch = pytest.importorskip("torch")
    from isthmus.export.module import onnx_from_module

    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, padding="same"), torch.nn.BatchNorm2d(4), torch.nn.ReLU6(),
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 2),
    )  # fmt: skip
    module.train()
    module[1].eval()
    example = torch.randn(1, 3, 8, 8)
    model = onnx_from_module(module, example)
    assert module.training and module[0].training and not module[1].training
    prepared = prepare_float(model)
    assert operators(prepared) == ["Conv", "Clip", "GlobalAveragePool", "Reshape", "Gemm"]
    assert [value.name for value in prepared.graph.input] == ["input"] and [value.name for value in prepared.graph.output] == ["output"]
    session = onnxruntime.InferenceSession(prepared.SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"input": example.numpy()})[0], module.eval()(example).detach().numpy(), atol=1e-5)


def test_what_a_module_cannot_export_is_named() -> None:
    torch = pytest.importorskip("torch")
    from isthmus.export.module import onnx_from_module

    class Branch(torch.nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(IsthmusError, match=r"Branch cannot be exported: GuardOnDataDependentSymNode: .*no branches on tensor values"):
        onnx_from_module(Branch(), torch.ones(2))
    with pytest.raises(IsthmusError, match=r"example inputs: expected a tensor, or one tensor for each argument of forward\(\), found str"):
        onnx_from_module(Branch(), "input")


@pytest.fixture(scope="module")
def pt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch = pytest.importorskip("torch")
    path = tmp_path_factory.mktemp("pt2") / "model.pt2"
    module = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU())
    torch.export.save(torch.export.export(module.eval(), (torch.randn(2, 1, 6, 6),), dynamic_shapes=({0: torch.export.Dim("batch")},)), str(path))
    return path


def test_an_exported_program_becomes_onnx(pt2: Path) -> None:
    from isthmus.export.module import onnx_from_pt2

    notes: list[str] = []
    prepared = prepare_float(onnx_from_pt2(pt2), None, notes)
    assert (
        operators(prepared) == ["Conv", "Relu"]
        and [dim.dim_value for dim in prepared.graph.input[0].type.tensor_type.shape.dim] == [1, 1, 6, 6]
        and len(notes) == 1
    )


class Trap:
    """Unpickled, it would leave a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


def rewritten(pt2: Path, target: Path, change: Callable[[str, bytes], bytes], extra: dict[str, bytes] | None = None) -> Path:
    with zipfile.ZipFile(pt2) as source, zipfile.ZipFile(target, "w") as out:
        for info in source.infolist():
            out.writestr(info.filename, change(info.filename, source.read(info)))
        for name, data in (extra or {}).items():
            out.writestr(name, data)
    return target


def graph_edit(edit: Callable[[dict], None]) -> Callable[[str, bytes], bytes]:
    def change(name: str, data: bytes) -> bytes:
        if not name.endswith("models/model.json"):
            return data
        program = json.loads(data)
        edit(program)
        return json.dumps(program).encode()

    return change


def test_a_strangers_exported_program_runs_nothing(pt2: Path, tmp_path: Path) -> None:
    from isthmus.export.pt2 import load_pt2

    mark = tmp_path / "mark"
    trap = pickle.dumps(Trap(mark))
    code = f"__import__('pathlib').Path('{mark}').touch()"

    def pickled(name: str, data: bytes) -> bytes:
        return data.replace(b'"use_pickle": false', b'"use_pickle": true') if name.endswith("weights_config.json") else data

    def samples(name: str, data: bytes) -> bytes:
        return trap if "sample_inputs" in name else data

    def same_bytes(name: str, data: bytes) -> bytes:
        return data

    def operator(program: dict) -> None:
        program["graph_module"]["graph"]["nodes"][0]["target"] = "torch.hub.load"

    def size(program: dict) -> None:
        text = json.dumps(program).replace("Symbol(", f"{code} or Symbol(")
        program.clear()
        program.update(json.loads(text))

    def argument(program: dict) -> None:
        text = json.dumps(program).replace('"input"', json.dumps(f"x={code}"))
        program.clear()
        program.update(json.loads(text))

    def training(program: dict) -> None:
        program["graph_module"]["graph"]["nodes"][0]["inputs"].append({"name": "training", "arg": {"as_bool": True}, "kind": 1})

    attacks: list[tuple[Callable[[str, bytes], bytes], dict[str, bytes], str]] = [
        (pickled, {}, "is stored as a pickle, which could run code"),
        (samples, {}, "its sample inputs are more than tensors, which could run code"),
        (same_bytes, {"model/data/constants/opaque_obj_0": trap}, "holds data/constants/opaque_obj_0, which is no plain tensor or graph"),
        (same_bytes, {"model/data/aotinductor/model/a.so": b"\x7fELF"}, "holds data/aotinductor/model/a.so"),
        (graph_edit(operator), {}, "calls 'torch.hub.load', expected operators of torch.ops.aten only"),
        (graph_edit(size), {}, "a size in its graph is computed by"),
        (graph_edit(argument), {}, "in its graph is no plain name, and could run code"),
        (graph_edit(training), {}, r"is in training mode; call .eval\(\)"),
    ]
    for number, (change, extra, message) in enumerate(attacks):
        with pytest.raises(IsthmusError, match=message):
            load_pt2(rewritten(pt2, tmp_path / f"attack{number}.pt2", change, extra))
    assert not mark.exists()


def test_guards_of_an_exported_program_are_dropped(pt2: Path, tmp_path: Path) -> None:
    from isthmus.export.pt2 import load_pt2

    mark = tmp_path / "mark"
    changed = graph_edit(lambda program: program.update(guards_code=[f"__import__('pathlib').Path('{mark}').touch()"]))
    program = load_pt2(rewritten(pt2, tmp_path / "guards.pt2", changed))
    program.module()
    assert not mark.exists()


@pytest.mark.parametrize(("content", "message"), [(b"", "not a .pt2 archive"), (b"PK\x03\x04 no", "not a .pt2 archive"), (None, "no such file")])
def test_what_is_no_exported_program_is_one_sentence(content: bytes | None, message: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from isthmus.export.module import onnx_from_pt2

    path = tmp_path / "x.pt2"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(IsthmusError, match=message):
        onnx_from_pt2(path)


@settings(max_examples=40)
@given(cut=st.integers(0, 4000), flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 7)), max_size=4))
def test_a_damaged_exported_program_never_crashes(pt2: Path, tmp_path_factory: pytest.TempPathFactory, cut: int, flips: list[tuple[int, int]]) -> None:
    from isthmus.export.pt2 import load_pt2

    content = bytearray(pt2.read_bytes())
    for place, bit in flips:
        content[place % len(content)] ^= 1 << bit
    path = tmp_path_factory.mktemp("damaged") / "x.pt2"
    path.write_bytes(bytes(content[: len(content) - cut] if not flips else content))
    try:
        load_pt2(path)
    except IsthmusError:
        return
