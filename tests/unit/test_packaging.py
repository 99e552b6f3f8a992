# SPDX-License-Identifier: Apache-2.0
"""What a wheel holds, and what a device needs to import it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import isthmus
from isthmus.form_writer import FormWriter

ROOT = Path(__file__).parents[2]
STAGES = ("train", "quantize", "export", "targets", "runtimes")
HOST_ONLY = ("torch", "onnx", "onnx_ir", "onnxruntime", "pydantic", "typer", "rich", "brevitas", "hls4ml")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel, built from a copy: a `build/` left in the tree would bring old files into the next one."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for folder in ("core", *STAGES):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(out), str(tree)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    return path


def test_the_wheel_holds_every_file_of_the_stages_and_nothing_beside_isthmus(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}
    packed = {name for name in held if not re.match(r"isthmus-[^/]+\.dist-info/", name)}
    tree = {
        "/".join(("isthmus", *((folder,) if folder != "core" else ()), path.relative_to(ROOT / folder).as_posix()))
        for folder in ("core", *STAGES)
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert packed == tree
    assert {"isthmus/cli.py", "isthmus/targets/profiles/cpu.toml", "isthmus/quantize/recipes/portable.toml"} <= packed
    assert any(name.endswith("/LICENSE") for name in held)


def loaded_after(code: str, python: str = sys.executable, arguments: Sequence[str] = ()) -> set[str]:
    """Top-level modules a fresh interpreter has after running the code."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [python, "-c", f"{code}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_runtimes_import_nothing_that_only_a_host_has(wheel: Path) -> None:
    device = ("spec", "errors", "bundle", "session", "compare", "bench")
    loaded = loaded_after("import isthmus.runtimes, " + ", ".join(f"isthmus.{name}" for name in device))
    assert "numpy" in loaded
    assert not loaded & set(HOST_ONLY)


def test_every_engine_is_importable_without_its_engine_or_any_host_library() -> None:
    """The engine's library is loaded when a session opens, so that listing engines works on every machine."""
    engines = sorted(path.parent.name for path in (ROOT / "runtimes").glob("*/__init__.py"))
    assert {"onnxruntime", "tflite", "csim", "null"} <= set(engines)
    loaded = loaded_after("\n".join(f"import isthmus.runtimes.{name}" for name in engines))
    assert not loaded & {"torch", "onnx", "onnx_ir", "pydantic", "typer", "brevitas", "hls4ml"}


ON_THE_DEVICE = """
import sys
from isthmus.bundle import Bundle
bundle = Bundle.open(sys.argv[1])
golden = bundle.golden()
with bundle.open_session("rpi5") as session:
    for index in range(len(golden["input/image"])):
        (scores,) = session.run_quantised({"image": golden["input/image"][index : index + 1]}).values()
        assert (scores[0] == golden["output/scores"][index]).all()
assert index > 5
"""


def small_bundle(folder: Path) -> Path:
    """A bundle with a .tflite in it, compiled here."""
    writer = FormWriter()
    weight = np.arange(-18, 18, dtype=np.int8).reshape(4, 1, 3, 3)
    image = writer.input("image", (1, 1, 8, 8), scale=2**-5)
    hidden = writer.conv(image, weight, 2**-6, np.arange(4, dtype=np.int32), scale=2**-4, pads=(1, 1, 1, 1), activation="Relu")
    writer.output(writer.flatten(writer.global_average_pool(hidden, scale=2**-5)), "scores")
    writer.graph().save(folder / "small.onnx")
    return isthmus.compile(folder / "small.onnx", targets=["rpi5"], output=folder / "bundle").root


@pytest.mark.slow
def test_a_device_with_numpy_and_one_engine_runs_a_bundle_to_the_bit(wheel: Path, tmp_path: Path) -> None:
    """An environment of its own: the wheel, its `runtime-tflite` extra, and nothing more. The bundle comes from here."""
    venv.create(tmp_path / "device", with_pip=True)
    python = str(tmp_path / "device" / "bin" / "python")
    install = [python, "-m", "pip", "install", "-qq", "-c", str(ROOT / "constraints.txt"), f"isthmus[runtime-tflite] @ {wheel.as_uri()}"]
    subprocess.run(install, check=True)
    names = subprocess.run([python, "-m", "pip", "list", "--format=freeze"], capture_output=True, text=True, check=True).stdout.lower()
    assert not re.search(r"^(torch|onnx|onnx-ir|onnxruntime|pydantic|typer|brevitas)==", names, re.MULTILINE)
    loaded = loaded_after(ON_THE_DEVICE, python, [str(small_bundle(tmp_path))])
    assert not loaded & set(HOST_ONLY)


def test_every_extra_is_pinned_in_the_constraints() -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#"))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wanted = {re.split(r"[<>=\[]", requirement)[0] for name, requirements in extras.items() if name != "runtime-tensorrt" for requirement in requirements}
    assert wanted - {"isthmus"} <= set(pins)
    assert pins["torch"] == "2.13.0"
    assert not [name for name in pins if name.startswith(("nvidia-", "cuda-"))]


# ---- a board's Python
def oldest_python(files: Sequence[Path]) -> tuple[int, int]:
    """The oldest Python 3 that has every syntax and library call of the files, as vermin reads them."""
    program = str(Path(sys.executable).with_name("vermin"))
    done = subprocess.run([program, "--no-tips", *map(str, files)], capture_output=True, text=True, check=True)
    (found,) = re.findall(r"Minimum required versions: .*?3\.(\d+)", done.stdout)
    return 3, int(found)


def test_what_runs_on_a_board_needs_no_newer_python_than_jetpack_6_has() -> None:
    from isthmus.runtimes.remote import DEVICE_FILES

    sources = [ROOT / "core" / f"{name}.py" for name in DEVICE_FILES] + sorted((ROOT / "runtimes").rglob("*.py"))
    assert oldest_python(sources) <= (3, 10)
    assert oldest_python([ROOT / "runtimes" / "board.py"]) <= (3, 8)
