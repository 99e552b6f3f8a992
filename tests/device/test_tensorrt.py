# SPDX-License-Identifier: Apache-2.0
"""TensorRT on a real GPU: a Jetson, or any machine with one and `tensorrt` or `tensorrt_rtx`. Where there is none every test says why it did not run.

On a board with the test dependencies: `python -m pytest tests/device`. It needs the host's side too (it compiles what it builds).
"""

from __future__ import annotations

import ctypes
import json
import resource
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from isthmus.bench import Rules, raw_feeds
from isthmus.bench_bundle import bench_bundle, read_measurements
from isthmus.bundle import Bundle
from isthmus.errors import IsthmusError
from isthmus.exposure import expose_onnx
from isthmus.graph import QuantGraph
from isthmus.layerwise import _compared_inside, _described
from isthmus.pipeline import compile as compile_bundle
from isthmus.pipeline import verify
from isthmus.profile import load_profile
from isthmus.run_bundle import run_bundle
from isthmus.runtimes.__main__ import main
from isthmus.runtimes.tensorrt import TensorRtSession, open_engine_file, open_session
from isthmus.runtimes.tensorrt.api import find_module
from isthmus.runtimes.tensorrt.build import BuildOptions, build_engines
from isthmus.runtimes.tensorrt.cuda import Cuda
from isthmus.runtimes.tensorrt.records import planned_engine, read_record
from isthmus.spec import TensorSpec

MODELS = Path(__file__).parents[1] / "models"
PROFILE = "jetson-orin-nano"
RUNS = 10_000
# Drivers and allocators take their pools in steps; a leak of one byte a run would not pass.
GROWTH_BYTES = 8 * 2**20
LAYER_STEPS = 1


@dataclass(frozen=True)
class Machine:
    """The GPU that is here, and how engines are built for it. `rtx`: 0 for TensorRT, the compute capability for TensorRT-RTX."""

    gpu: dict
    module: str
    rtx: int

    @property
    def options(self) -> BuildOptions:
        return BuildOptions(other_board=True, rtx=self.rtx)


@pytest.fixture(scope="module")
def machine() -> Machine:
    try:
        cuda = Cuda()
    except IsthmusError as error:
        pytest.skip(f"no NVIDIA GPU here: {error}")
    gpu = cuda.gpu()
    cuda.close()
    reasons = []
    for module in ("tensorrt", "tensorrt_rtx"):
        try:
            trt = find_module(module)
        except IsthmusError as error:
            reasons.append(str(error))
            continue
        if module == "tensorrt" and int(trt.__version__.split(".")[0]) < 10:
            reasons.append(f"TensorRT {trt.__version__}: the bundle of these tests is for 10 and later")
        elif module == "tensorrt_rtx" and not hasattr(trt.ComputeCapability, f"SM{gpu['sm']}"):
            reasons.append(f"TensorRT-RTX {trt.__version__} does not know SM{gpu['sm']}")
        else:
            return Machine(gpu, module, gpu["sm"] if module == "tensorrt_rtx" else 0)
    pytest.skip("; ".join(reasons))


@pytest.fixture(scope="module")
def bundle(machine: Machine, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """`network.onnx`, compiled for a board with TensorRT 10, with both of its engines built here."""
    made = compile_bundle(MODELS / "network.onnx", targets=[PROFILE], output=tmp_path_factory.mktemp("device") / "bundle")
    build_engines(made, PROFILE, machine.options)
    return made


@pytest.fixture
def session(bundle: Bundle) -> Iterator[TensorRtSession]:
    with open_session(bundle.folder(PROFILE), bundle.artifact(PROFILE), engine="int8") as opened:
        yield opened


def copies(outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: array.copy() for name, array in outputs.items()}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all((a[name] == b[name]).all() for name in a)


def test_the_engine_belongs_to_this_gpu(bundle: Bundle, machine: Machine) -> None:
    folder = bundle.folder(PROFILE)
    record = read_record(folder, planned_engine(folder))
    assert record["module"] == machine.module
    assert record["gpu"] == (machine.gpu if not machine.rtx else {"name": "", "sm": machine.rtx, "multiprocessors": 0})


def test_the_script_and_the_session_see_the_same_gpu(machine: Machine, bundle: Bundle) -> None:
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("build_engine", bundle.folder(PROFILE) / "build_engine.py")
    assert spec is not None and spec.loader is not None
    script = module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.gpu_here() == machine.gpu


def test_the_outputs_are_the_references(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(bundle.root), "-t", PROFILE]) == 0
    reply = json.loads(capsys.readouterr().out)
    assert reply["engine"] == "tensorrt" and reply["verification"][0]["compared"] > 0


@pytest.mark.parametrize("name", ["network", "residual", "concat", "conv_transpose", "squeeze_excite", "sigmoid"])
def test_every_layer_is_within_one_step_of_the_reference(name: str, machine: Machine, tmp_path: Path) -> None:
    """A copy of the lowered graph whose int8 tensors are outputs, built and run; each layer is compared from the tensors the engine itself gave before."""
    bundle = compile_bundle(MODELS / f"{name}.onnx", targets=[PROFILE], output=tmp_path / "bundle")
    graph, entry, folder = QuantGraph.load(bundle.model), bundle.artifact(PROFILE), tmp_path / "bundle" / "artifacts" / PROFILE
    exposure = expose_onnx((folder / "model.onnx").read_bytes(), graph)
    (folder / "model.onnx").write_bytes(exposure.content)
    build_engines(bundle, PROFILE, BuildOptions(engines=("int8",), other_board=True, rtx=machine.rtx))
    described = _described(entry, graph, exposure, "model.onnx", "tensorrt") | {"max_lsb_allowed": LAYER_STEPS}
    feeds = {key.partition("/")[2]: array for key, array in bundle.golden().items() if key.startswith("input/")}
    with open_session(folder, described, engine="int8") as session:
        layers, _ = _compared_inside(session, exposure, graph, feeds, described)
    assert layers and all(layer.own.compared for layer in layers)
    assert [(layer.layer, layer.own.max_lsb) for layer in layers if layer.own.max_lsb > LAYER_STEPS] == []


def test_the_graph_of_a_run_gives_what_the_run_gives(bundle: Bundle, session: TensorRtSession) -> None:
    assert session.has_graph and session.version.endswith("CUDA graph")
    folder, entry = bundle.folder(PROFILE), bundle.artifact(PROFILE)
    record = read_record(folder, planned_engine(folder))
    content = (folder / "model.engine").read_bytes()
    with TensorRtSession(content, session.inputs, session.outputs, module=record["module"], graphs=False) as plain:
        assert not plain.has_graph and plain.version.endswith("no CUDA graph (not asked for)")
        for feeds in raw_feeds(session, bundle.golden()):
            assert same(copies(session.run_raw(feeds)), copies(plain.run_raw(feeds)))
    assert entry["engine"] == session.engine


def test_runs_in_flight_give_what_single_runs_give(bundle: Bundle, session: TensorRtSession) -> None:
    queue = raw_feeds(session, bundle.golden())
    expected = [copies(session.run_raw(feeds)) for feeds in queue]
    assert not all(same(expected[0], other) for other in expected[1:])
    for count in (1, 2, 3, len(queue)):
        for feeds in queue[:count]:
            session.run_ahead(feeds)
        assert same(copies(session.finish()), expected[count - 1])
    session.run_ahead(queue[1])
    assert same(copies(session.run_raw(queue[0])), expected[0]), "a run waits for those under way"


def test_a_session_runs_in_another_thread(bundle: Bundle, session: TensorRtSession) -> None:
    feeds = raw_feeds(session, bundle.golden())[0]
    expected, found = copies(session.run_raw(feeds)), {}
    thread = threading.Thread(target=lambda: found.update(copies(session.run_raw(feeds))))
    thread.start()
    thread.join(60)
    assert same(found, expected)


def test_the_profile_names_layers_and_times(bundle: Bundle, session: TensorRtSession) -> None:
    feeds = raw_feeds(session, bundle.golden())[0]
    before = copies(session.run_raw(feeds))
    layers = session.per_layer(feeds, runs=10)
    assert len(layers) >= 1 and all(name and time_ns > 0 for name, time_ns in layers)
    assert same(copies(session.run_raw(feeds)), before)
    with pytest.raises(IsthmusError, match="expected at least 1"):
        session.per_layer(feeds, runs=0)


def test_memory_does_not_grow(bundle: Bundle, session: TensorRtSession) -> None:
    queue = raw_feeds(session, bundle.golden())
    for index in range(100):
        session.run_raw(queue[index % len(queue)])
        session.run_ahead(queue[index % len(queue)])
    session.finish()
    cuda = Cuda()
    free, peak = cuda.free_bytes(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for index in range(RUNS):
        session.run_raw(queue[index % len(queue)])
    for index in range(RUNS):
        session.run_ahead(queue[index % len(queue)])
    session.finish()
    assert free - cuda.free_bytes() < GROWTH_BYTES
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024 < GROWTH_BYTES
    cuda.close()


def test_an_error_leaves_a_session_that_runs_and_closes(bundle: Bundle) -> None:
    folder, entry = bundle.folder(PROFILE), bundle.artifact(PROFILE)
    cuda = Cuda()
    with open_session(folder, entry, engine="int8") as session:
        feeds = raw_feeds(session, bundle.golden())[0]
        expected = copies(session.run_raw(feeds))
        for wrong in ({}, {"x": np.zeros((2, 3), np.float32)}, {"x": feeds["x"].astype(np.float64)}):
            with pytest.raises((KeyError, ValueError, TypeError)):
                session.run_raw(wrong)
        assert same(copies(session.run_raw(feeds)), expected)
    free = cuda.free_bytes()
    for _ in range(5):  # opened and closed: nothing stays
        with pytest.raises(RuntimeError, match="in the middle"), open_session(folder, entry, engine="int8"):
            raise RuntimeError("in the middle")
    assert free - cuda.free_bytes() < GROWTH_BYTES
    cuda.close()


def test_bench_keeps_the_faster_engine_that_holds(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--min-duration", "0.2", "--min-count", "50", "--percentile", "90"]
    for scenario in ("SingleStream", "Offline"):
        assert main(["bench", str(bundle.root), "-t", PROFILE, "--scenario", scenario, *words]) == 0
        conditions = json.loads(capsys.readouterr().out)["conditions"]
        told = conditions["engines"]
        assert told["int8"]["verdict"]["holds"] and conditions["engine_chosen"] in told
        assert json.loads((bundle.folder(PROFILE) / "chosen.json").read_text())["engine"] == conditions["engine_chosen"]


def test_the_commands_of_the_host_take_the_engine(bundle: Bundle, tmp_path: Path) -> None:
    """`isthmus verify`, `run` and `bench` on the board itself."""
    comparisons = verify(bundle, [PROFILE])[PROFILE]
    assert comparisons and all(comparison.passed and comparison.compared for comparison in comparisons)
    (given,), golden = bundle.artifact(PROFILE)["inputs"], bundle.golden()
    spec = TensorSpec.from_json(given)
    np.save(tmp_path / "x.npy", spec.dequantise(golden[f"input/{spec.name}"]))
    outputs = run_bundle(bundle, PROFILE, [str(tmp_path / "x.npy")])
    assert {name: len(array) for name, array in outputs.items()} == {key.partition("/")[2]: len(golden[key]) for key in golden if key.startswith("output/")}
    measured, measurements = bench_bundle(bundle, [PROFILE], Rules(min_count=50, min_duration_s=0.2, percentile=90.0))
    assert measurements[PROFILE].count >= 50 and read_measurements(measured)[PROFILE].count == measurements[PROFILE].count


def test_a_cut_engine_is_refused_by_tensorrt_itself(bundle: Bundle, machine: Machine, tmp_path: Path) -> None:
    whole = (bundle.folder(PROFILE) / "model.engine").read_bytes()
    for index, content in enumerate((b"", whole[:10], whole[: len(whole) // 2], b"PK\x03\x04" + whole[4:])):
        file = tmp_path / f"{index}.engine"
        file.write_bytes(content)
        with pytest.raises(IsthmusError, match=f"^{file}: .* does not open it"):
            open_engine_file(file, machine.module)
    with open_engine_file(bundle.folder(PROFILE) / "model.engine", machine.module) as session:
        assert [spec.shape for spec in session.inputs] == [tuple(spec["shape"]) for spec in bundle.artifact(PROFILE)["inputs"]]


def test_the_driver_is_asked_by_its_own_name(machine: Machine) -> None:
    """libcuda.so.1 is what TensorRT itself has loaded: not a second driver."""
    cuda = Cuda()
    major = int(cuda.version.split(".")[0])
    assert ctypes.CDLL("libcuda.so.1") and major >= 10 and machine.gpu["name"]
    assert int(load_profile(PROFILE).toolchain["sm"]) > 0
    cuda.close()
