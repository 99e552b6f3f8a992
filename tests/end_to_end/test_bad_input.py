# SPDX-License-Identifier: Apache-2.0
"""Every mistake a user can make here: one sentence that names what, where and what to do; exit code 2; no traceback; nothing half-written."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from isthmus import cli

MODELS = Path(__file__).parents[1] / "models"


class Said(NamedTuple):
    code: int
    out: str
    error: str


Isthmus = Callable[..., Said]


@pytest.fixture
def isthmus(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Isthmus:
    """Runs the command line in this process."""

    def run(*words: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["isthmus", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as error:
            code = int(error.code or 0)
        said = capsys.readouterr()
        return Said(code, said.out, said.err)

    return run


def _refused(said: Said, pattern: str, folder: Path, kept: tuple[str, ...]) -> None:
    assert said.code == 2, said
    assert re.search(pattern, said.error, re.DOTALL), said.error
    assert "Traceback" not in said.error and "internal error" not in said.error
    assert sorted(entry.name for entry in folder.iterdir()) == sorted(kept)


def float_cnn(batch: int | str = 1, extra: str | None = None, opset: int = 17) -> onnx.ModelProto:
    """A small float CNN written with onnx alone: conv, relu, pool, flatten, gemm; `extra` is one more operator at its end."""
    rng = np.random.default_rng(0)
    weights = {"w": rng.normal(size=(4, 1, 3, 3)), "b": rng.normal(size=4), "v": rng.normal(size=(10, 64)), "c": rng.normal(size=10)}
    nodes = [
        helper.make_node("Conv", ["image", "w", "b"], ["h1"], "conv", pads=[1, 1, 1, 1], kernel_shape=[3, 3]),
        helper.make_node("Relu", ["h1"], ["h2"], "relu"),
        helper.make_node("MaxPool", ["h2"], ["h3"], "pool", kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Flatten", ["h3"], ["h4"], "flatten"),
        helper.make_node("Gemm", ["h4", "v", "c"], ["scores" if extra else "logits"], "fc", transB=1),
    ]
    if extra:
        nodes.append(helper.make_node(extra, ["scores"], ["logits"], "last"))
    graph = helper.make_graph(
        nodes,
        "cnn",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch, 1, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 10])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a good model and good data."""
    onnx.save(float_cnn(), tmp_path / "model.onnx")
    np.savez(tmp_path / "data.npz", image=np.random.default_rng(0).normal(size=(20, 1, 8, 8)).astype(np.float32))
    return tmp_path


GOOD = ("data.npz", "model.onnx")


def test_the_good_case_is_good(isthmus: Isthmus, place: Path) -> None:
    said = isthmus("compile", "--no-tune", place / "model.onnx", "--data", place / "data.npz", "-o", place / "out", "--json")
    assert said.code == 0, said.error
    assert json.loads(said.out)["artifacts"]["cpu"]["verification"][0]["mismatched"] == 0
    assert isthmus("verify", place / "out").code == 0


def test_missing_file(isthmus: Isthmus, place: Path) -> None:
    _refused(isthmus("compile", place / "nothing.onnx", "-o", place / "out"), r"nothing\.onnx: no such file; give", place, GOOD)


def test_not_onnx(isthmus: Isthmus, place: Path) -> None:
    (place / "text.onnx").write_text("this is no model, but it is quite a long text about models")
    _refused(isthmus("compile", place / "text.onnx", "-o", place / "out"), r"text\.onnx: not an ONNX", place, (*GOOD, "text.onnx"))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.99])
def test_truncated_onnx(isthmus: Isthmus, place: Path, share: float) -> None:
    whole = (place / "model.onnx").read_bytes()
    (place / "cut.onnx").write_bytes(whole[: int(len(whole) * share)])
    said = isthmus("compile", place / "cut.onnx", "--data", place / "data.npz", "-o", place / "out")
    _refused(said, r"isthmus: .*(cut\.onnx|model)", place, (*GOOD, "cut.onnx"))


def test_operator_no_target_has(isthmus: Isthmus, place: Path) -> None:
    onnx.save(float_cnn(extra="Erf"), place / "odd.onnx")
    said = isthmus("compile", place / "odd.onnx", "--data", place / "data.npz", "-t", "rpi5", "-t", "pynq-z2", "-o", place / "out")
    _refused(said, r"pynq-z2: last: Erf \(float\) is not in the table", place, (*GOOD, "odd.onnx"))


def test_operator_of_another_domain(isthmus: Isthmus, place: Path) -> None:
    model = float_cnn(extra="Magic")
    model.graph.node[-1].domain = "com.example"
    model.opset_import.append(helper.make_opsetid("com.example", 1))
    onnx.save(model, place / "odd.onnx")
    said = isthmus("compile", place / "odd.onnx", "--data", place / "data.npz", "-o", place / "out")
    _refused(said, r"last: Magic is of domain 'com\.example'", place, (*GOOD, "odd.onnx"))


def test_dynamic_shape_without_shape(isthmus: Isthmus, place: Path) -> None:
    model = float_cnn()
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"
    onnx.save(model, place / "open.onnx")
    said = isthmus("compile", "--no-tune", place / "open.onnx", "--data", place / "data.npz", "-o", place / "out")
    _refused(said, r"'image'.*height.*--shape", place, (*GOOD, "open.onnx"))
    again = isthmus("compile", "--no-tune", place / "open.onnx", "--data", place / "data.npz", "-o", place / "out", "--shape", "image=1,1,8,8")
    assert again.code == 0, again.error


BAD_DATA = {
    "shape": (np.zeros((5, 1, 8, 9), np.float32), r"expected shape \[N, 1, 8, 8\], found \[5, 1, 8, 9\]"),
    "dtype": (np.array(["x"]), "expected numbers, found dtype <U1"),
    "integers": (np.zeros((5, 1, 8, 8), np.uint8), "say what they become with --preprocess"),
    "empty": (np.zeros((0, 1, 8, 8), np.float32), "holds no samples"),
    "nan": (np.full((5, 1, 8, 8), np.nan, np.float32), "NaN or infinity, first in sample 0"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_calibration_data(isthmus: Isthmus, place: Path, name: str) -> None:
    array, message = BAD_DATA[name]
    np.savez(place / "bad.npz", image=array)
    said = isthmus("compile", "--no-tune", place / "model.onnx", "--data", place / "bad.npz", "-o", place / "out")
    _refused(said, rf"bad\.npz: input 'image'.*{message}", place, (*GOOD, "bad.npz"))


def test_no_calibration_data(isthmus: Isthmus, place: Path) -> None:
    _refused(isthmus("compile", "--no-tune", place / "model.onnx", "-o", place / "out"), r"a float model needs calibration data: --data", place, GOOD)


def test_unknown_profile_lists_near_ones(isthmus: Isthmus, place: Path) -> None:
    said = isthmus("compile", "--no-tune", place / "model.onnx", "-t", "jetson-nano-orin", "-o", place / "out")
    _refused(said, r"unknown profile 'jetson-nano-orin': did you mean .*jetson-orin-nano", place, GOOD)


def test_unknown_recipe_option_shape_and_preprocess(isthmus: Isthmus, place: Path) -> None:
    common = ("compile", "--no-tune", place / "model.onnx", "--data", place / "data.npz", "-o", place / "out")
    _refused(isthmus(*common, "--recipe", "best"), r"unknown recipe 'best': there are .*portable", place, GOOD)
    _refused(isthmus(*common, "--set", "speed=11"), r"option 'speed' is known to none of the targets", place, GOOD)
    _refused(isthmus(*common, "--set", "speed"), r"--set 'speed': expected NAME=VALUE", place, GOOD)
    _refused(isthmus(*common, "--shape", "image=1,x"), r"--shape 'image=1,x': expected NAME=1,3,224,224", place, GOOD)
    _refused(isthmus(*common, "--shape", "picture=1,1,8,8"), r"picture", place, GOOD)
    _refused(isthmus(*common, "--preprocess", "gamma=2"), r"--preprocess: 'gamma=2' is not understood", place, GOOD)


def test_unwritable_output(isthmus: Isthmus, place: Path) -> None:
    said = isthmus("compile", "--no-tune", place / "model.onnx", "--data", place / "data.npz", "-o", "/proc/isthmus/out")
    _refused(said, r"/proc/isthmus/out: cannot be written", place, GOOD)


def test_existing_output(isthmus: Isthmus, place: Path) -> None:
    common = ("compile", "--no-tune", place / "model.onnx", "--data", place / "data.npz", "-o", place / "out")
    assert isthmus(*common).code == 0
    before = (place / "out" / "manifest.json").read_bytes()
    _refused(isthmus(*common), r"out: exists; pass --force", place, (*GOOD, "out"))
    assert (place / "out" / "manifest.json").read_bytes() == before
    assert isthmus(*common, "--force").code == 0


def test_tampered_bundle(isthmus: Isthmus, place: Path) -> None:
    assert isthmus("compile", "--no-tune", place / "model.onnx", "--data", place / "data.npz", "-o", place / "out").code == 0
    artifact = place / "out" / "artifacts" / "cpu" / json.loads((place / "out" / "manifest.json").read_text())["artifacts"]["cpu"]["artifact"]
    content = bytearray(artifact.read_bytes())
    content[len(content) // 2] ^= 1
    artifact.write_bytes(bytes(content))
    for command in ("verify", "bench", "report", "cost"):
        _refused(isthmus(command, place / "out"), r"is not what was compiled \(its sha256 differs\)", place, (*GOOD, "out"))


def test_full_disk(place: Path) -> None:
    """Files stop growing at 6 KiB: the system's own refusal in the middle of writing, on the path a full disk takes."""
    script = f"""
        import resource, signal, sys
        from isthmus import cli
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (6144, 6144))
        sys.argv = ["isthmus", "compile", "--no-tune", {str(place / "model.onnx")!r}, "--data", {str(place / "data.npz")!r}, "-o", {str(place / "out")!r}]
        sys.dont_write_bytecode = True
        cli.main()
    """
    done = subprocess.run([sys.executable, "-B", "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
    _refused(Said(done.returncode, done.stdout, done.stderr), r"out: cannot be written: File too large; nothing half-written is left", place, GOOD)


@pytest.mark.parametrize("size", ["40k", "120k", "400k"])
def test_a_disk_that_really_fills(tmp_path: Path, size: str) -> None:
    """A small file system of its own, where this user may mount one: it fills in our writing, in hls4ml's, or in g++'s."""
    command = [
        sys.executable,
        "-B",
        "-m",
        "isthmus.cli",
        "compile",
        str(MODELS / "network.onnx"),
        "-t",
        "rpi5",
        "-t",
        "pynq-z2",
        "-o",
        str(tmp_path / "disk" / "out"),
    ]
    (tmp_path / "disk").mkdir()
    mount = f'mount -t tmpfs -o size={size} none {tmp_path}/disk && "$@"; code=$?; ls -A {tmp_path}/disk; exit $code'
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c", mount, "bash", *command], capture_output=True, text=True, check=False
    )
    if "unshare:" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()[:100]}")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "out: cannot be written: No space left on device; nothing half-written is left" in done.stderr
    assert "Traceback" not in done.stderr


def test_bundle_and_run_mistakes(isthmus: Isthmus, place: Path) -> None:
    assert isthmus("compile", "--no-tune", place / "model.onnx", "--data", place / "data.npz", "-o", place / "out").code == 0
    names = (*GOOD, "out")
    np.save(place / "x.npy", np.zeros((2, 1, 8, 8), np.float32))
    said = isthmus("run", place / "out", "-t", "cpu", "-i", place / "x.npy", "--json")
    assert said.code == 0 and np.asarray(json.loads(said.out)["logits"]).shape == (2, 10), said
    names = (*names, "x.npy")
    _refused(isthmus("run", place / "out", "-t", "rpi5", "-i", place / "x.npy"), r"no artifact for 'rpi5', there are cpu", place, names)
    _refused(isthmus("run", place / "out", "-t", "cpu", "-i", place / "y.npy"), r"y\.npy: no such", place, names)
    _refused(isthmus("run", place / "out", "-t", "cpu", "-i", place / "data.npz", "-i", "other=1"), r"other=1", place, names)
    _refused(isthmus("bench", place / "out", "--threads", "0"), r"threads must be above 0, found 0", place, names)
    _refused(isthmus("verify", place / "nowhere"), r"nowhere: no such bundle", place, names)
    _refused(isthmus("cost", place / "out", "--convention", "gigaflop"), r"unknown convention 'gigaflop': there are mac, flop, keras, keras2", place, names)


def test_modules_that_cannot_be_had(isthmus: Isthmus, place: Path) -> None:
    _refused(isthmus("compile", "no.such.module:net", "-o", place / "out"), r"no\.such\.module cannot be imported", place, GOOD)
    _refused(isthmus("compile", "isthmus.errors:nothing", "-o", place / "out"), r"module isthmus\.errors has no 'nothing'", place, GOOD)
    _refused(isthmus("compile", "zoo:digit", "-o", place / "out"), r"unknown zoo system 'digit': did you mean digits", place, GOOD)


def test_a_bug_shows_no_traceback_without_debug(isthmus: Isthmus, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from isthmus import pipeline

    def broken(*arguments: object, **named: object) -> None:
        raise KeyError("inside")

    monkeypatch.setattr(pipeline, "load_source", broken)
    said = isthmus("compile", "--no-tune", place / "model.onnx", "-o", place / "out")
    assert said.code == 1 and "internal error, please report it: KeyError" in said.error and "Traceback" not in said.error
    assert "Traceback" in isthmus("compile", "--no-tune", place / "model.onnx", "-o", place / "out", "--debug").error
    assert sorted(entry.name for entry in place.iterdir()) == sorted(GOOD)
