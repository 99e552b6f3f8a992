# SPDX-License-Identifier: Apache-2.0
"""What a board builds from a bundle: records, locks, seals, damaged files. TensorRT-RTX really builds, ahead of time; nothing here runs an engine."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.main import get_command

from isthmus.bench_bundle import bench_bundle
from isthmus.bundle import Bundle
from isthmus.cli import app
from isthmus.errors import IsthmusError
from isthmus.exposure import expose_onnx
from isthmus.graph import QuantGraph
from isthmus.pipeline import compile as compile_bundle
from isthmus.pipeline import verify
from isthmus.profile import load_profile
from isthmus.run_bundle import run_bundle
from isthmus.runtimes.__main__ import main
from isthmus.runtimes.tensorrt import open_session, records
from isthmus.runtimes.tensorrt.build import BuildOptions, build_engines
from isthmus.runtimes.tensorrt.records import check_gpu, checked_engine, choose, chosen_engine, is_sealed, planned_engine, planned_engines, seal
from isthmus.targets.jetson import TARGET
from isthmus.targets.jetson.dialects import tensorrt_8_2

MODELS = Path(__file__).parents[1] / "models"
SCRIPT = Path(str(resources.files("isthmus.targets.jetson") / "build_engine.py"))
Require = Callable[[str], str]
RTX = ("--rtx", "86")


@pytest.fixture(scope="module")
def plan_files() -> dict[str, bytes]:
    return dict(TARGET.plan(QuantGraph.load(MODELS / "conv_relu.onnx"), load_profile("jetson-orin-nano"), {}).files)


@pytest.fixture
def folder(plan_files: dict[str, bytes], tmp_path: Path) -> Path:
    for name, content in plan_files.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def build(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "build_engine.py", *arguments], cwd=folder, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def built_files(plan_files: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory, require: Require) -> dict[str, bytes]:
    """An artifact's folder with its int8 engine, which TensorRT-RTX built for SM86."""
    require("tensorrt_rtx")
    place = tmp_path_factory.mktemp("built")
    for name, content in plan_files.items():
        (place / name).write_bytes(content)
    done = build(place, *RTX)
    assert done.returncode == 0, done.stderr
    return {path.name: path.read_bytes() for path in place.iterdir()}


@pytest.fixture
def built(built_files: dict[str, bytes], tmp_path: Path) -> Path:
    for name, content in built_files.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


# ---- the script
def test_an_engine_is_built_once_and_again_when_something_changed(built: Path) -> None:
    record = json.loads((built / "model.engine.json").read_text())
    engine = (built / "model.engine").read_bytes()
    assert record["sha256"] == hashlib.sha256(engine).hexdigest() and record["size_bytes"] == len(engine)
    assert record["model_sha256"] == hashlib.sha256((built / "model.onnx").read_bytes()).hexdigest()
    assert (record["module"], record["gpu"]["sm"], record["flags"]["precision"]) == ("tensorrt_rtx", 86, "int8")
    assert build(built, *RTX).stdout.startswith("model.engine is there already: int8, TensorRT ")
    assert (built / "model.engine.json").read_bytes() == json.dumps(record, indent=1, sort_keys=True).encode() + b"\n"
    other = build(built, "--rtx", "89")
    assert other.stdout.startswith("built model.engine: ")
    assert json.loads((built / "model.engine.json").read_text())["key"] != record["key"]


def test_a_cut_or_changed_engine_is_built_anew(built: Path) -> None:
    engine = (built / "model.engine").read_bytes()
    (built / "model.engine").write_bytes(engine[: len(engine) // 2])
    assert build(built, *RTX).stdout.startswith("built model.engine: ")
    (built / "model.engine.json").write_text("{")
    assert build(built, *RTX).stdout.startswith("built model.engine: ")


def test_what_a_killed_build_left_is_removed_and_its_lock_is_none(built: Path) -> None:
    (built / "model.engine.partial-abc").write_bytes(b"half")
    (built / "build.lock").write_text("99999, since 00:00:00\n")
    assert build(built, *RTX, "--rebuild").returncode == 0
    assert not list(built.glob("*.partial-*"))


def test_two_builds_at_once_take_turns(built: Path) -> None:
    with (built / "build.lock").open("a+") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        holder.truncate(0)
        holder.write("4711, since 12:00:00\n")
        holder.flush()
        done = build(built, *RTX)
        assert (done.returncode, done.stderr) == (
            1,
            "build_engine: another build is running here (process 4711, since 12:00:00): wait for it, or pass --wait\n",
        )
        waiting = subprocess.Popen([sys.executable, "build_engine.py", *RTX, "--wait"], cwd=built, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert waiting.stderr is not None and waiting.stdout is not None
        assert waiting.stderr.readline() == "build_engine: waiting for another build (process 4711, since 12:00:00)\n"
    assert waiting.stdout.read().startswith("model.engine is there already")
    assert waiting.wait() == 0
    waiting.stderr.close()
    waiting.stdout.close()


def test_a_build_that_is_killed_leaves_no_half_engine_and_is_redone(folder: Path, require: Require) -> None:
    require("tensorrt_rtx")
    process = subprocess.Popen([sys.executable, "build_engine.py", *RTX], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (folder / "build.lock").is_file() and time.monotonic() < deadline:  # it holds the lock: TensorRT-RTX is loaded, the build has begun
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "model.engine.json").exists()
    assert build(folder, *RTX).stdout.startswith("built model.engine: ")


def test_too_little_memory_is_said_with_the_needed_and_the_free(folder: Path, require: Require) -> None:
    require("tensorrt_rtx")
    done = build(folder, *RTX, "--workspace-mib", "99999999")
    assert done.returncode == 1
    assert "MiB of memory are free, " in done.stderr
    assert "MiB are needed (99999999 for the workspace, the rest for model.onnx): stop other programs, or pass a smaller --workspace-mib" in done.stderr


def test_the_workspace_is_at_most_half_of_what_is_free() -> None:
    script = load_script()
    model, mib = str(MODELS / "conv_relu.onnx"), 2**20
    assert script["_workspace"](model, 0, 4096 * mib) == 2048 * mib
    assert script["_workspace"](model, 0, 100 * mib) == 64 * mib
    with pytest.raises(
        script["BuildError"], match=r"^60 MiB of memory are free, 65 MiB are needed \(64 for the workspace, .*: stop other programs, or add swap$"
    ):
        script["_workspace"](model, 0, 60 * mib)


def load_script() -> dict:
    """The script's own names. It is no module of the package: it runs on a board alone."""
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("build_engine", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return vars(module)


@pytest.mark.parametrize(
    ("errors", "sentence"),
    [
        (
            ["[E] Error Code 2: OutOfMemory (no further information)\n"],
            "ran out of memory building model.onnx: 900 MiB were free, 450 MiB of them for the workspace",
        ),
        (["\n [E] Could not find any implementation for node x.\nmore"], "could not build model.onnx: [E] Could not find any implementation for node x."),
        ([], "could not build model.onnx: it gave no reason"),
    ],
)
def test_why_tensorrt_did_not_build(errors: list[str], sentence: str) -> None:
    script = load_script()
    log, trt = type("Log", (), {"errors": errors}), type("Trt", (), {"__version__": "10.3.0"})
    assert script["_why_not_built"](trt, log, "model.onnx", 450 * 2**20, 900 * 2**20).startswith(f"TensorRT 10.3.0 {sentence}")


def test_a_machine_without_a_driver_is_told_to_build_on_the_board(folder: Path) -> None:
    """A module called tensorrt that says its version: the GPU is asked for before anything is built."""
    (folder / "tensorrt.py").write_text('__version__ = "10.3.0"\n')
    done = build(folder)
    if done.stderr.startswith("build_engine: CUDA's driver cannot be loaded (libcuda.so.1"):
        assert done.stderr.endswith("build on the board; on a Jetson, JetPack brings it\n")
    else:  # a machine with a GPU, or with a driver that finds none
        assert "build_engine: CUDA does not start" in done.stderr or "this GPU is" in done.stderr
    assert done.returncode == 1


OLD_DRIVER = """
from tensorrt_rtx import *

__version__ = "10.3.0"


def Builder(log):  # what TensorRT does where CUDA does not start: a warning, and pybind11's error
    log.log(ILogger.WARNING, "CUDA initialization failure with error{colon} {number}. Please check your CUDA installation: https://docs.nvidia.com")
    raise TypeError("pybind11::init(): factory function returned nullptr")


import __main__
__main__.gpu_here = lambda: {{"name": "Orin", "sm": 87, "multiprocessors": 8}}
"""


@pytest.mark.parametrize(
    ("colon", "number", "reason"),
    [(":", 35, "the GPU's driver is too old for it: update JetPack"), ("", 2, "CUDA initialization failure with error 2. Please check your CUDA installation")],
)
def test_a_tensorrt_whose_cuda_does_not_start_says_why(folder: Path, require: Require, colon: str, number: int, reason: str) -> None:
    require("tensorrt_rtx")
    (folder / "tensorrt.py").write_text(OLD_DRIVER.format(colon=colon, number=number))
    done = build(folder)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"build_engine: TensorRT 10.3.0 gives no builder: {reason}")


def test_a_plan_for_another_board_is_refused() -> None:
    script = load_script()
    plan = {"board": "NVIDIA Jetson Orin Nano 8GB", "sm": 87}
    script["_check_board"](plan, {"name": "Orin", "sm": 87, "multiprocessors": 8})
    with pytest.raises(
        script["BuildError"], match=r"for NVIDIA Jetson Orin Nano 8GB \(SM 87\), this GPU is Xavier \(SM 72\): compile .* or pass --other-board"
    ):
        script["_check_board"](plan, {"name": "Xavier", "sm": 72, "multiprocessors": 8})
    with pytest.raises(
        script["BuildError"], match=r"for NVIDIA Jetson Orin Nano 8GB with 8 multiprocessors, this GPU has 16: compile .* or pass --other-board"
    ):
        script["_check_board"]({**plan, "multiprocessors": 8}, {"name": "Orin", "sm": 87, "multiprocessors": 16})


@pytest.mark.parametrize(
    ("board", "count"), [("jetson-nano", 1), ("jetson-agx-xavier", 8), ("jetson-xavier-nx", 6), ("jetson-orin-nano-4gb", 4), ("jetson-thor", 20)]
)
def test_the_plan_names_its_boards_multiprocessors(board: str, count: int) -> None:
    plan = TARGET.plan(QuantGraph.load(MODELS / "relu.onnx"), load_profile(board), {}).files["engines.json"]
    assert json.loads(plan)["multiprocessors"] == count


def test_a_damaged_timing_cache_is_left_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = load_script()
    cache = tmp_path / "timing.cache"
    assert script["whole_timing_cache"](str(cache)) == b""
    cache.write_bytes(b"measured kernels")
    assert script["whole_timing_cache"](str(cache)) == b"measured kernels", "trtexec writes no digest beside it"
    Path(f"{cache}.sha256").write_text(hashlib.sha256(b"measured kernels").hexdigest())
    assert script["whole_timing_cache"](str(cache)) == b"measured kernels"
    cache.write_bytes(b"measured ker")
    assert script["whole_timing_cache"](str(cache)) == b""
    assert capsys.readouterr().err == f"build_engine: {cache} is damaged (its sha256 differs): kernels are measured anew\n"


class Config:
    """What TensorRT's builder says of a cache of another GPU or version: none of `create_timing_cache`, or False of `set_timing_cache`. TensorRT-RTX, whose
    caches do nothing, says neither. Names and arguments are held against TensorRT's in test_tensorrt_api.py."""

    def __init__(self, takes: tuple[bytes, ...], makes: tuple[bytes, ...]) -> None:
        self.takes, self.makes, self.kept = takes, makes, b"none"

    def create_timing_cache(self, serialized_timing_cache: bytes) -> bytes | None:
        return serialized_timing_cache if serialized_timing_cache in self.makes else None

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        self.kept = cache if cache in self.takes else self.kept
        return cache in self.takes


@pytest.mark.parametrize(
    ("config", "kept", "told"),
    [
        (Config((b"", b"cache"), (b"", b"cache")), b"cache", False),
        (Config((b"",), (b"", b"cache")), b"", True),
        (Config((b"",), (b"",)), b"", True),
    ],
    ids=["own", "of another GPU", "unreadable"],
)
def test_a_timing_cache_of_another_gpu_is_left_aside(config: Config, kept: bytes, told: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "timing.cache").write_bytes(b"cache")
    load_script()["_use_timing_cache"](config, str(tmp_path / "timing.cache"))
    assert config.kept == kept
    assert capsys.readouterr().err.endswith("timing.cache is of another GPU or TensorRT: kernels are measured anew\n") == told


def engine(**changes: object) -> dict:
    return {"name": "int8", "model": "model.onnx", "output": "model.engine", "precision": "int8", "half": True, "ranges": "", "dla": False} | changes


@pytest.mark.parametrize(
    ("version", "changes", "words"),
    [
        ((8, 2), {}, ["--workspace=512", "--fp16", "--int8"]),
        ((8, 5), {"half": False}, ["--memPoolSize=workspace:512", "--int8"]),
        ((10, 3), {}, ["--memPoolSize=workspace:512", "--stronglyTyped"]),
        ((11, 0), {}, ["--memPoolSize=workspace:512"]),
        ((10, 3), {"dla": True, "ranges": "r.json"}, ["--memPoolSize=workspace:512", "--fp16", "--int8", "--useDLACore=0", "--allowGPUFallback"]),
        ((11, 4), {"dla": True}, ["--memPoolSize=workspace:512", "--useDLACore=0", "--allowGPUFallback"]),
    ],
)
def test_the_line_for_trtexec(version: tuple[int, int], changes: dict, words: list[str]) -> None:
    line = load_script()["trtexec_line"](engine(**changes), version, 0, 512 * 2**20, "timing.cache")
    command, _, comment = line.partition(" # ")
    constant = ["/usr/src/tensorrt/bin/trtexec", "--onnx=model.onnx", "--saveEngine=model.engine", "--noTF32", "--timingCacheFile=timing.cache"]
    assert sorted(command.split()) == sorted([*constant, *words])
    assert bool(comment) == bool(changes.get("ranges"))


def test_the_oldest_dialect_is_the_scripts_oldest_tensorrt() -> None:
    assert tensorrt_8_2.DIALECT.since == (8, 2)


# ---- the subcommand
@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory, require: Require) -> Bundle:
    require("tensorrt_rtx")
    return compile_bundle(MODELS / "conv_relu.onnx", targets=["jetson-orin-nano", "null"], output=tmp_path_factory.mktemp("compiled") / "bundle")


@pytest.fixture
def bundle(compiled: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """A copy, as a board has it: another user's key, so that the bundle itself is not sealed here."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(compiled.root, tmp_path / "bundle")
    return Bundle.open(tmp_path / "bundle")


def test_the_subcommand_builds_every_engine_seals_it_and_leaves_the_manifest_alone(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    folder = bundle.folder("jetson-orin-nano")
    with pytest.raises(IsthmusError, match=r"needs the board: there, in artifacts/jetson-orin-nano, run python3 build_engine.py --engine int8"):
        bundle.open_session("jetson-orin-nano")
    assert main(["build", str(bundle.root), "-t", "jetson-orin-nano", *RTX]) == 0
    reply = json.loads(capsys.readouterr().out)
    assert [(one["engine"], one["file"]) for one in reply["engines"]] == [("int8", "model.engine"), ("fp16", "model_fp16.engine")]
    assert all(one["said"].startswith("built ") for one in reply["engines"])
    assert [is_sealed(folder, planned) for planned in planned_engines(folder)] == [True, True]
    assert Bundle.open(bundle.root).manifest == bundle.manifest
    assert main(["build", str(bundle.root), "-t", "jetson-orin-nano", *RTX]) == 0
    assert all("is there already" in one["said"] for one in json.loads(capsys.readouterr().out)["engines"])
    assert main(["verify", str(bundle.root), "-t", "jetson-orin-nano"]) in (0, 2)  # 2: no GPU here
    told = capsys.readouterr()
    assert told.out or told.err.startswith(("isthmus: CUDA", "isthmus: libcuda", f"isthmus: {folder / 'model.engine'}"))


def without_gpu(told: str) -> bool:
    return "CUDA's driver cannot be loaded" in told or "CUDA finds no GPU" in told or "does not start" in told


def test_the_commands_of_the_host_take_the_engine_that_was_built_here(bundle: Bundle, tmp_path: Path) -> None:
    """On the board itself: what was built is measured, compared and run by `isthmus` too. Here each gets as far as the GPU that is not there."""
    board = "jetson-orin-nano"
    assert bundle.why_not_here(board) == "needs the board"
    assert verify(bundle)[board] == []
    with pytest.raises(IsthmusError, match=f"^{board}: needs the board; its latency is not to be had on this machine$"):
        bench_bundle(bundle, [board])
    build_engines(bundle, board, BuildOptions(rtx=86))
    why = bundle.why_not_here(board)
    if not why:
        pytest.skip("a GPU is here that runs the engine: tests/device")
    assert without_gpu(why) or "was built for" in why
    for call in (lambda: bench_bundle(bundle, [board]), lambda: verify(bundle, [board]), lambda: run_bundle(bundle, board, ["x.npy"])):
        with pytest.raises(IsthmusError, match=re.escape(why)):
            call()
    assert verify(bundle)[board] == [], "not named: the other artifacts are compared, and this one needs its board"
    (bundle.folder(board) / "model.engine").write_bytes(b"short")
    with pytest.raises(IsthmusError, match=r"jetson-orin-nano: .*model.engine: 5 bytes, .*: it is cut short; build it again"):
        verify(bundle, [board])


def test_an_engine_that_somebody_else_put_there_is_built_anew(bundle: Bundle) -> None:
    """Reading an engine runs code of it: what this user's key does not vouch for is not adopted, and not opened without trust."""
    folder, options = bundle.folder("jetson-orin-nano"), BuildOptions(engines=("int8",), rtx=86)
    assert build(folder, *RTX).returncode == 0  # by hand: no seal
    with pytest.raises(IsthmusError, match=r"this user's 'python -m isthmus.runtimes build BUNDLE' did not build it, .*pass --trust-bundle"):
        bundle.open_session("jetson-orin-nano")
    (record,) = build_engines(bundle, "jetson-orin-nano", options)
    assert record["said"].startswith("built model.engine")
    (folder / "model.engine.seal").write_text("0" * 64)
    assert not is_sealed(folder, planned_engine(folder))


def test_the_script_of_a_bundle_is_run_where_it_is_known(bundle: Bundle) -> None:
    """The digest in `records` is the script's: change it with the script."""
    assert hashlib.sha256(SCRIPT.read_bytes()).hexdigest() == records.SCRIPT_SHA256
    script = bundle.folder("jetson-orin-nano") / "build_engine.py"
    script.write_text("raise SystemExit(5)\n")
    with pytest.raises(IsthmusError, match="is not the script that this version of isthmus writes: compile again with it, or pass --trust-bundle"):
        build_engines(bundle, "jetson-orin-nano", BuildOptions(rtx=86))
    with pytest.raises(IsthmusError, match=r"engine int8: the build ended with code 5: it said nothing; its log is .*build-int8.log"):
        build_engines(bundle, "jetson-orin-nano", BuildOptions(rtx=86, trust=True))
    script.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    with pytest.raises(IsthmusError, match=r"the build was killed \(signal 9\): the system does that when memory runs out; .* smaller --workspace-mib"):
        build_engines(bundle, "jetson-orin-nano", BuildOptions(rtx=86, trust=True))


def test_a_build_goes_on_where_the_terminal_is_gone(bundle: Bundle) -> None:
    """The script reports whether a hang-up would end it."""
    script = bundle.folder("jetson-orin-nano") / "build_engine.py"
    script.write_text("import signal, sys\nsys.stderr.write('build_engine: ' + signal.getsignal(signal.SIGHUP).name)\nraise SystemExit(1)\n")
    before = signal.getsignal(signal.SIGHUP)
    with pytest.raises(IsthmusError, match="SIG_IGN"):
        build_engines(bundle, "jetson-orin-nano", BuildOptions(trust=True))
    assert signal.getsignal(signal.SIGHUP) == before


def test_two_subcommands_take_turns(bundle: Bundle) -> None:
    with (bundle.folder("jetson-orin-nano") / "seal.lock").open("a+") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        with pytest.raises(IsthmusError, match="another build is running here: wait for it, or pass --wait"):
            build_engines(bundle, "jetson-orin-nano", BuildOptions(rtx=86))


def test_what_cannot_be_built_is_said(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", str(bundle.root), "-t", "null"]) == 2
    assert "null: nothing is built on the board for engine null: its artifact runs as it is" in capsys.readouterr().err
    assert main(["build", str(bundle.root), "-t", "jetson-orin-nano", "--engine", "int4", *RTX]) == 2
    assert "no engine is called 'int4', there are int8, fp16" in capsys.readouterr().err
    assert main(["build", str(bundle.root), "-t", "jetson-orin-nano", "--rtx", "87"]) == 2
    assert "does not know SM87: it has SM120, SM121, SM75, SM80, SM86, SM89; its log is " in capsys.readouterr().err


# ---- the records, as a session reads them
def spoilt(folder: Path, **changes: object) -> None:
    file = folder / "model.engine.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    seal_as_it_is(folder)


def seal_as_it_is(folder: Path) -> None:
    from isthmus.bundle import user_seal

    (folder / "model.engine.seal").write_bytes(user_seal((folder / "model.engine.json").read_bytes()))


def test_an_engine_of_another_tensorrt_is_named(built: Path) -> None:
    spoilt(built, tensorrt="1.2.0")
    with pytest.raises(
        IsthmusError, match=r"model.engine: was built by TensorRT-RTX 1.2.0, this machine has [0-9.]+, and an engine belongs to one version; build"
    ):
        checked_engine(built, planned_engine(built))


def test_an_engine_of_another_gpu_is_named(tmp_path: Path) -> None:
    orin = {"name": "Orin", "sm": 87, "multiprocessors": 8}
    check_gpu(tmp_path, orin, dict(orin), "again")
    check_gpu(tmp_path, {"name": "", "sm": 86, "multiprocessors": 0}, {"name": "NVIDIA A10", "sm": 86, "multiprocessors": 72}, "again")
    wanted = r"was built for Orin \(SM 87, 8 multiprocessors\), this machine has Orin \(SM 87, 16 multiprocessors\); again"
    with pytest.raises(IsthmusError, match=wanted):
        check_gpu(tmp_path, orin, {**orin, "multiprocessors": 16}, "again")
    with pytest.raises(IsthmusError, match=r"was built for any GPU \(SM 86\), this machine has Orin"):
        check_gpu(tmp_path, {"name": "", "sm": 86, "multiprocessors": 0}, orin, "again")


def test_a_cut_changed_or_outdated_engine_is_named(built: Path) -> None:
    seal(built, planned_engine(built))
    whole = (built / "model.engine").read_bytes()
    (built / "model.engine").write_bytes(whole[:100])
    with pytest.raises(IsthmusError, match=rf"model.engine: 100 bytes, its record says {len(whole):,}: it is cut short; build it again"):
        open_session(built, {})
    with pytest.raises(IsthmusError, match="cut short"):
        seal(built, planned_engine(built))
    (built / "model.engine").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(IsthmusError, match=r"is not what was built \(its sha256 differs\)"):
        open_session(built, {})
    (built / "model.engine").write_bytes(whole)
    (built / "model.onnx").write_bytes((built / "model.onnx").read_bytes() + b" ")
    with pytest.raises(IsthmusError, match=r"was built from another model.onnx; build it again"):
        open_session(built, {})
    (built / "model.engine").unlink()
    with pytest.raises(IsthmusError, match=r"the int8 engine is not built yet: on the board run 'python -m isthmus.runtimes build BUNDLE'"):
        open_session(built, {})


def test_the_choice_of_bench_is_what_opens(built: Path) -> None:
    assert chosen_engine(built)["name"] == "int8"
    choose(built, "fp16", {"engines": {}})
    assert chosen_engine(built)["name"] == "fp16" and chosen_engine(built, "int8")["name"] == "int8"
    with pytest.raises(IsthmusError, match="the fp16 engine is not built yet"):
        open_session(built, {})
    for content, wanted in (("{}", "names no engine; remove it, or run bench again"), ("[", "not JSON"), ('{"engine": "x"}', "no engine is called 'x'")):
        (built / "chosen.json").write_text(content)
        with pytest.raises(IsthmusError, match=wanted):
            chosen_engine(built)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
)


@given(plan=JSON | st.fixed_dictionaries({"schema": st.just(1), "engines": JSON | st.lists(st.just(engine()), max_size=2)}), record=JSON)
def test_any_json_ends_in_engines_or_one_sentence(plan: object, record: object, tmp_path_factory: pytest.TempPathFactory) -> None:
    place = tmp_path_factory.mktemp("any")
    (place / "engines.json").write_text(json.dumps(plan))
    for name, content in (("model.engine", ""), ("model.onnx", ""), ("model.engine.json", json.dumps(record))):
        (place / name).write_text(content)
    with pytest.raises(IsthmusError, match=r"compile the bundle again|build"):
        open_session(place, {})


@pytest.mark.parametrize("name", ["../model.engine", "/tmp/x", "..", ""])
def test_a_plan_names_files_of_its_own_folder_alone(name: str, tmp_path: Path) -> None:
    (tmp_path / "engines.json").write_text(json.dumps({"schema": 1, "engines": [engine(output=name)]}))
    with pytest.raises(IsthmusError, match="not the plan of a TensorRT build"):
        planned_engines(tmp_path)


def test_the_owner_of_the_key_alone_can_read_it(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    seal(built, planned_engine(built))
    assert is_sealed(built, planned_engine(built))
    assert os.stat(tmp_path / "data" / "isthmus" / "seal.key").st_mode & 0o077 == 0
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "another"))
    assert not is_sealed(built, planned_engine(built))


# ---- what the tests on a device build, and what the documents name
@pytest.mark.parametrize("name", ["network", "residual", "squeeze_excite"])
def test_the_copy_whose_layers_are_outputs_builds(name: str, tmp_path: Path, require: Require) -> None:
    """`tests/device` compares every layer by it."""
    require("tensorrt_rtx")
    graph = QuantGraph.load(MODELS / f"{name}.onnx")
    for file, content in TARGET.plan(graph, load_profile("jetson-orin-nano"), {}).files.items():
        (tmp_path / file).write_bytes(content)
    exposure = expose_onnx((tmp_path / "model.onnx").read_bytes(), graph)
    assert len(exposure.shown) > 3
    (tmp_path / "model.onnx").write_bytes(exposure.content)
    done = build(tmp_path, *RTX)
    assert done.returncode == 0, done.stderr


def test_the_documents_name_subcommands_and_options_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "jetson.md").read_text(encoding="utf-8")
    named = set(re.findall(r"python -m isthmus\.runtimes ([a-z]+)", text))
    assert named == {"build", "verify", "bench"}
    helped = ""
    for words in [[name] for name in sorted(named)]:
        with pytest.raises(SystemExit):
            main([*words, "--help"])
        helped += capsys.readouterr().out
    script = subprocess.run([sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True, check=True).stdout
    options = set(re.findall(r"`[^`\n]*?(--[a-z][a-z-]+)", text)) - {"--target", "--host", "--set", "--runtime", "--ignore-requires-python"}
    assert {"--rebuild", "--workspace-mib", "--wait", "--other-board", "--rtx", "--trust-bundle", "--scenario"} <= options
    assert [option for option in options if option not in helped + script] == []


@pytest.mark.parametrize("document", ["jetson.md", "prediction.md"])
def test_every_line_of_isthmus_in_the_documents_has_options_that_exist(document: str) -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]  # a group, as it has several commands
    text = (Path(__file__).parents[2] / "docs" / document).read_text(encoding="utf-8")
    lines = re.findall(r"^isthmus (.+)$|`isthmus ([^`]+)`", text, re.MULTILINE)
    for line in [fenced or inline for fenced, inline in lines]:
        word, *options = [part for part in shlex.split(line, comments=True) if part.startswith("-") or part in commands]
        known = {option for parameter in commands[word].params for option in parameter.opts}
        assert set(options) <= known, line
    assert len(lines) >= 3
