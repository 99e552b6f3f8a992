# SPDX-License-Identifier: Apache-2.0
"""What of the TensorRT session can be known without a GPU: what it says of files and machines that are not right, and which engine stays.

What NVIDIA's runtime writes into its log is TensorRT-RTX's own, from real files. Nothing here runs an engine: `tests/device` does.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from isthmus.bench import OFFLINE, SINGLE_STREAM, Rules, measure
from isthmus.compare import Comparison
from isthmus.errors import IsthmusError
from isthmus.graph import QuantGraph
from isthmus.measurement import Measurement
from isthmus.profile import load_profile
from isthmus.runtimes import tensorrt
from isthmus.runtimes.tensorrt.api import Binding, Enqueue, find_module, open_engine, open_log, refusal
from isthmus.runtimes.tensorrt.choice import Verdict, allowance, fastest
from isthmus.runtimes.tensorrt.cuda import Cuda, array_at
from isthmus.session import Arrays, Session
from isthmus.spec import TensorSpec
from isthmus.targets.jetson import TARGET

MODELS = Path(__file__).parents[1] / "models"
Require = Callable[[str], str]


def has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


# ---- files that TensorRT does not open, in the words of its own log
@pytest.fixture(scope="module")
def engine_bytes(require: Require) -> bytes:
    require("tensorrt_rtx")
    import tensorrt_rtx as trt

    log = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    assert parser.parse(TARGET.plan(QuantGraph.load(MODELS / "relu.onnx"), load_profile("jetson-orin-nano"), {}).files["model.onnx"])
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    return bytes(builder.build_serialized_network(network, config))


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda content: content[: len(content) // 2], "the file is cut short: build it again"),
        (lambda content: content[:40], "the file is cut short: build it again"),
        (lambda content: b"", "the file is cut short: build it again"),
        (lambda content: b"ftrt" + content[4:], "it is no engine of this TensorRT, but of another version, or no engine: build it here, with this one"),
        (lambda content: b"PK\x03\x04" * 1000, "it is no engine of this TensorRT, but of another version, or no engine: build it here, with this one"),
    ],
    ids=["half", "header", "empty", "tensorrt-10", "zip"],
)
def test_a_file_that_is_no_whole_engine_of_this_version(spoil: Callable[[bytes], bytes], sentence: str, engine_bytes: bytes) -> None:
    trt = find_module("tensorrt_rtx")
    log = open_log(trt)
    with pytest.raises(IsthmusError, match=rf"^my.engine: TensorRT-RTX {trt.__version__} does not open it: {sentence}$"):
        open_engine(trt, log, spoil(engine_bytes), "my.engine")


@pytest.mark.skipif(has_driver(), reason="a driver is here: what TensorRT says without one cannot be seen")
def test_a_driver_that_is_too_old_or_not_there_is_named(engine_bytes: bytes) -> None:
    trt = find_module("tensorrt_rtx")
    with pytest.raises(IsthmusError, match="does not open it: the GPU's driver is too old for it, or there is none: update JetPack"):
        open_engine(trt, open_log(trt), engine_bytes, "my.engine")


@pytest.mark.parametrize(
    ("errors", "sentence"),
    [
        # TensorRT's own wording, 8 to 10, as users have reported it.
        (["1: [stdArchiveReader.cpp::StdArchiveReader::40] Error Code 1: Serialization (Serialization assertion stdVersionRead == serializationVersion failed."
          "Version tag does not match. Note: Current Version: 213, Serialized Engine Version: 205)"], "of another version, or no engine"),
        (["6: The engine plan file is generated on an incompatible device, expecting compute 8.7 got compute 7.2, please rebuild."], "built for another GPU"),
        (["2: [engine.cpp::deserializeEngine] Error Code 2: OutOfMemory (no further information)"], "the memory for it is not free: stop other programs"),
        (["CUDA initialization failure with error: 35. Please check your CUDA installation"], "driver is too old for it, or there is none: update JetPack"),
        (["CUDA initialization failure with error: 999"], "CUDA finds no GPU"),
        (["\n  something new\nmore"], r"\(something new\): build it again"),
        ([], r"\(it gives no reason\): build it again"),
    ],
)  # fmt: skip
def test_what_tensorrt_writes_becomes_one_sentence(errors: list[str], sentence: str) -> None:
    trt = type("tensorrt", (), {"__version__": "10.3.0"})
    with pytest.raises(IsthmusError, match=sentence):
        raise IsthmusError(refusal(trt, errors, "my.engine"))


def test_a_runtime_that_is_not_given_is_named() -> None:
    """TensorRT's own runtime is none where CUDA does not start, of which pybind11 makes a TypeError; what it wrote says why."""
    log = type("Log", (), {"errors": ["CUDA initialization failure with error: 35. Please check your CUDA installation"]})()

    def given(log: object) -> None:
        raise TypeError("pybind11::init(): factory function returned nullptr")

    trt = type("tensorrt", (), {"__version__": "10.3.0", "Runtime": staticmethod(given)})
    with pytest.raises(IsthmusError, match=r"my.engine: TensorRT 10.3.0 does not open it: the GPU's driver is too old for it"):
        open_engine(trt, log, b"", "my.engine")


def test_a_module_that_is_not_here_names_what_brings_it() -> None:
    with pytest.raises(IsthmusError, match="no TensorRT is called 'tensorflow': there are tensorrt, tensorrt_rtx"):
        find_module("tensorflow")


# ---- CUDA
def test_a_machine_without_a_driver_is_told_so() -> None:
    with pytest.raises(IsthmusError, match=r"CUDA's driver cannot be loaded \(libcuda-not-here.so.1: .*JetPack brings the driver"):
        Cuda("libcuda-not-here.so.1")


def test_a_driver_without_the_functions_is_too_old() -> None:
    with pytest.raises(IsthmusError, match=r"libc.so.6 has no cuInit: its driver is older than CUDA 10.2, .*update JetPack"):
        Cuda("libc.so.6")


@pytest.mark.skipif(has_driver(), reason="a driver is here: tests/device opens engines")
def test_a_session_without_a_gpu_ends_in_one_sentence(engine_bytes: bytes, tmp_path: Path) -> None:
    (tmp_path / "my.engine").write_bytes(engine_bytes)
    with pytest.raises(IsthmusError, match="CUDA's driver cannot be loaded"):
        tensorrt.open_engine_file(tmp_path / "my.engine", "tensorrt_rtx")
    with pytest.raises(IsthmusError, match="no such file"):
        tensorrt.open_engine_file(tmp_path / "other.engine", "tensorrt_rtx")


@pytest.mark.parametrize(("shape", "dtype"), [((1, 3, 4), "float32"), ((5,), "int8"), ((), "float32"), ((2, 0), "int64"), ((3,), "bool")])
def test_an_array_lies_where_it_is_told(shape: tuple[int, ...], dtype: str) -> None:
    memory = ctypes.create_string_buffer(64)
    array = array_at(ctypes.addressof(memory), shape, dtype)
    assert (array.shape, array.dtype) == (shape, np.dtype(dtype))
    array[...] = 1
    assert bytes(memory)[: array.nbytes] == np.ones(shape, dtype).tobytes() and not any(bytes(memory)[array.nbytes :])


# ---- the border
X, Y = Binding("x", True, (1, 3, 8, 8), "float32"), Binding("z", True, (1, 4), "int8")


def test_the_border_is_the_manifests_in_its_order() -> None:
    specs = (TensorSpec("z", (1, 4), "int8", "NC", 0.5, 0), TensorSpec("x", (1, 3, 8, 8), "float32", "NCHW", 0.5, 0))
    assert tensorrt._agreed("e", "inputs", specs, [X, Y]) == specs
    assert tensorrt._agreed("e", "inputs", None, [X]) == (TensorSpec("x", (1, 3, 8, 8), "float32"),)


@pytest.mark.parametrize(
    "found", [[], [X, Y], [Binding("x", True, (1, 3, 8, 9), "float32")], [Binding("x", True, (1, 3, 8, 8), "float16")], [Binding("y", True, X.shape, X.dtype)]]
)
def test_another_border_is_refused(found: list[Binding]) -> None:
    spec = TensorSpec("x", (1, 3, 8, 8), "float32")
    with pytest.raises(IsthmusError, match=r"my.engine: has the inputs .*, the manifest says x float32\[1, 3, 8, 8\]: build it again"):
        tensorrt._agreed("my.engine", "inputs", (spec,), found)


def test_shapes_that_are_not_fixed_are_refused() -> None:
    with pytest.raises(IsthmusError, match=r"its inputs have shapes that are not fixed \(x float32\[-1, 3\]\)"):
        tensorrt._agreed("e", "inputs", None, [Binding("x", True, (-1, 3), "float32")])


class Context82:
    """The run of TensorRT 8.2's context: addresses in a list. Its names and arguments are checked in test_tensorrt_api.py."""

    def __init__(self, starts: bool = True) -> None:
        self.calls: list[tuple] = []
        self.starts = starts

    def execute_async_v2(self, bindings: list[int], stream_handle: int) -> bool:
        self.calls.append((bindings, stream_handle))
        return self.starts


class Context85(Context82):
    def set_tensor_address(self, name: str, memory: int) -> bool:
        self.calls.append((name, memory))
        return memory > 0

    def execute_async_v3(self, stream_handle: int) -> bool:
        self.calls.append((stream_handle,))
        return self.starts


def test_addresses_go_by_index_to_old_versions_and_by_name_to_new_ones() -> None:
    old, new, addresses = Context82(), Context85(), {"z": 20, "x": 10}
    Enqueue(old, [X, Y], addresses)(7)
    Enqueue(new, [X, Y], addresses)(7)
    assert old.calls == [([10, 20], 7)]
    assert new.calls == [("z", 20), ("x", 10), (7,)]
    with pytest.raises(IsthmusError, match="TensorRT did not start the run"):
        Enqueue(Context82(starts=False), [X, Y], addresses)(7)
    with pytest.raises(IsthmusError, match="TensorRT takes no memory for tensor 'x'"):
        Enqueue(Context85(), [X], {"x": 0})


# ---- which engine stays
def measured(times_ns: list[int], valid: bool = True, scenario: str = SINGLE_STREAM) -> Measurement:
    return Measurement(scenario, np.array(times_ns, np.int64), 0, len(times_ns), sum(times_ns), {}, None, valid, () if valid else ("too few",))


def test_the_faster_valid_engine_stays() -> None:
    rules, offline = Rules(), Rules(scenario=OFFLINE)
    assert fastest({"int8": measured([300, 310]), "fp16": measured([200, 210])}, rules) == "fp16"
    assert fastest({"int8": measured([300, 310]), "fp16": measured([200, 210], valid=False)}, rules) == "int8"
    assert fastest({"int8": measured([300], valid=False), "fp16": measured([200], valid=False)}, rules) == "fp16"
    assert fastest({"int8": measured([], valid=False), "fp16": measured([200], valid=False)}, rules) == "fp16"
    assert fastest({"int8": measured([], valid=False), "fp16": measured([], valid=False)}, rules) == "int8"
    assert fastest({"int8": measured([100], scenario=OFFLINE), "fp16": measured([200], scenario=OFFLINE)}, offline) == "int8"


def test_an_engine_holds_within_the_steps_or_on_the_labels() -> None:
    close, far = (Comparison("y", "int8", 10, 4, steps, steps * 0.5, steps < 3) for steps in (1, 9))
    assert Verdict("int8", (close,), None, None).holds
    assert not Verdict("int8", (far,), 0.9, 0.9).holds, "an int8 engine computes what the reference computes, or it is wrong"
    assert not Verdict("fp16", (far,), None, None).holds
    assert Verdict("fp16", (far,), 0.91, 0.9).holds and not Verdict("fp16", (far,), 0.89, 0.9).holds
    assert not Verdict("fp16", (), None, None).holds, "nothing compared never passes"


def test_an_engine_of_half_precision_has_steps_of_its_own() -> None:
    entry = {"max_lsb_allowed": 2, "float_tolerance": 1e-5 + 2 * 0.25}
    assert allowance(entry, {"max_lsb": None}) == (2, entry["float_tolerance"])
    assert allowance(entry, {"max_lsb": 8}) == (8, pytest.approx(1e-5 + 8 * 0.25))
    assert allowance(entry, {"max_lsb": "8"}) == (2, entry["float_tolerance"])
    planned = json.loads(TARGET.plan(QuantGraph.load(MODELS / "relu.onnx"), load_profile("jetson-orin-nano"), {}).files["engines.json"])["engines"]
    assert [engine["max_lsb"] for engine in planned] == [None, 8]


class Queued(Session):
    """Starts runs that end later; counts what is still under way."""

    engine = "queued"

    def __init__(self) -> None:
        super().__init__((TensorSpec("x", (1, 1), "float32"),), ())
        self.started = self.under_way = 0
        self.finished = False

    def _run_raw(self, feeds: Arrays) -> dict[str, np.ndarray]:
        raise AssertionError("Offline starts runs, it does not wait for each")

    def run_ahead(self, feeds: Mapping[str, np.ndarray]) -> None:
        self.started += 1
        self.under_way = min(2, self.under_way + 1)

    def finish(self) -> dict[str, np.ndarray]:
        self.under_way, self.finished = 0, True
        return {}


def test_offline_keeps_the_queue_full_and_waits_for_its_end() -> None:
    session = Queued()
    found = measure(session, {"x": np.zeros((1, 1), np.float32)}, Rules(scenario=OFFLINE, min_count=50, min_duration_s=0.01, max_warmup_s=0.1))
    assert session.finished and session.under_way == 0
    assert session.started >= found.inference_count >= 50
