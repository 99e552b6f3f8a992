#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Builds the TensorRT engines that engines.json names, on the board: needs the tensorrt that JetPack brings, and nothing else.

    python3 build_engine.py [--engine int8] [--workspace-mib N] [--timing-cache timing.cache] [--rebuild] [--wait]

Copied next to the models by isthmus. An engine belongs to the GPU and the TensorRT version that built it: build it on the board
that runs it, and again after an update. Beside the engine stand its record (`.json`: what it was built from, by what, for which GPU) and
the trtexec line that builds the same (`.trtexec`). An engine whose record still holds is not built again; a build that was killed is redone,
with a lock against two at once. Written for Python 3.6 (JetPack 4) and later, TensorRT 8.2 to 11, and TensorRT-RTX (--rtx).
"""

import argparse
import contextlib
import ctypes
import fcntl
import glob
import hashlib
import json
import os
import re
import sys
import tempfile
import time
from typing import Any

PLAN = "engines.json"
LOCK = "build.lock"
RECORD_SCHEMA = 1
MIB = 2**20
SMALLEST_WORKSPACE = 64 * MIB
# The file, its parsed weights, their copies in other layouts and the engine: what a build holds of a model beside the workspace, at least.
MODEL_COPIES = 4
# The DLA reads QuantizeLinear from here on; before, int8 on a DLA wants a range for each tensor.
DLA_READS_QUANTISERS = (11, 4)
# Names and numbers of the CUDA driver's interface (cuda.h), the same since CUDA 5.
MULTIPROCESSORS, MAJOR, MINOR = 16, 75, 76
DRIVER_TOO_OLD = r"CUDA initialization failure with error:? 35\b|driver version is insufficient"
NO_MEMORY = ("out of memory", "outofmemory", "insufficient memory", "cudaerrormemoryallocation", "requested memory")


class BuildError(Exception):
    """One sentence for the person at the board."""


def main(arguments: Any = None) -> int:
    options = _options(arguments)
    try:
        sys.stdout.write(build(options) + "\n")
    except BuildError as error:
        sys.stderr.write(f"build_engine: {error}\n")
        return 1
    except OSError as error:
        sys.stderr.write(f"build_engine: {error.filename or 'this machine'}: {error.strerror or error}\n")
        return 1
    return 0


def _options(arguments: Any) -> argparse.Namespace:
    command_line = argparse.ArgumentParser(description="Builds a TensorRT engine from the ONNX file beside it.")
    command_line.add_argument("--engine", default="", help="which engine of " + PLAN + " (default: the first)")
    command_line.add_argument("--workspace-mib", type=int, default=0, help="memory TensorRT may use for one layer (default: half of what is free)")
    command_line.add_argument("--timing-cache", default="timing.cache", help="measured kernels, reused by the next build (default: %(default)s)")
    command_line.add_argument("--rebuild", action="store_true", help="build even where the engine is there already")
    command_line.add_argument("--wait", action="store_true", help="where another build is running in this folder: wait until it ends")
    command_line.add_argument("--other-board", action="store_true", help="build for this GPU although the plan was written for another board")
    command_line.add_argument(
        "--rtx", type=int, default=0, metavar="SM", help="ahead of time with TensorRT-RTX, for this compute capability (86); no GPU needed"
    )
    command_line.add_argument("--verbose", action="store_true", help="everything TensorRT says")
    return command_line.parse_args(arguments)


def build(options: argparse.Namespace) -> str:
    """Writes the engine, whole or not at all; gives the closing sentence. Raises BuildError."""
    plan = _plan()
    engine = _engine(plan, options.engine)
    if options.workspace_mib and options.workspace_mib * MIB < SMALLEST_WORKSPACE:
        raise BuildError(f"{options.workspace_mib} MiB for TensorRT's workspace, expected {SMALLEST_WORKSPACE // MIB} or more: pass a larger --workspace-mib")
    trt = _tensorrt_rtx(options.rtx) if options.rtx else _tensorrt(plan)
    gpu = {"name": "", "sm": options.rtx, "multiprocessors": 0} if options.rtx else gpu_here()
    if not (options.other_board or options.rtx):
        _check_board(plan, gpu)
    with _alone(options.wait):
        record = _identity(engine, trt, gpu)
        if not options.rebuild and _is_there(engine["output"], record):
            return f"{engine['output']} is there already: {engine['name']}, TensorRT {trt.__version__}"
        _remove_left_overs(engine["output"])
        return _build(engine, trt, record, options)


def _build(engine: dict, trt: Any, record: dict, options: argparse.Namespace) -> str:
    free = free_bytes()
    workspace = _workspace(engine["model"], options.workspace_mib, free)
    started = time.monotonic()
    log = _log(trt, options.verbose)
    serialised, cache = _serialised(engine, trt, log, workspace, options)
    if serialised is None:
        raise BuildError(_why_not_built(trt, log, engine["model"], workspace, free))
    output = engine["output"]
    # The record goes first and comes back last: at no instant does one stand beside an engine that it does not describe.
    for name in (output + ".json", output + ".seal"):
        if os.path.exists(name):
            os.remove(name)
    write_at_once(output, serialised)
    if cache is not None:
        content = bytes(cache)
        write_at_once(options.timing_cache, content)
        write_at_once(options.timing_cache + ".sha256", hashlib.sha256(content).hexdigest().encode())
    write_at_once(output + ".trtexec", (trtexec_line(engine, _version(trt), options.rtx, workspace, options.timing_cache) + "\n").encode())
    seconds = time.monotonic() - started
    facts = {"size_bytes": os.path.getsize(output), "sha256": _sha256(output), "workspace_bytes": workspace, "free_bytes": free, "seconds": round(seconds, 1)}
    write_at_once(output + ".json", (json.dumps(dict(record, **facts), indent=1, sort_keys=True) + "\n").encode())
    return f"built {output}: {facts['size_bytes']} bytes, {engine['name']}, TensorRT {trt.__version__}, {seconds:.0f} s"


def _serialised(engine: dict, trt: Any, log: Any, workspace: int, options: argparse.Namespace) -> tuple:
    """(the engine's bytes or None, the timing cache's or None)."""
    version = _version(trt)
    builder = _builder(trt, log)
    typed = bool(options.rtx) or (version >= (10, 0) and not (engine["dla"] and version < DLA_READS_QUANTISERS))
    network, _parser = _parsed(trt, builder, log, engine["model"], typed)
    config = builder.create_builder_config()
    _bound_workspace(trt, config, workspace)
    if options.rtx:
        _build_for(trt, config, options.rtx)
    if not typed:
        _flags(trt, config, engine)
    if engine["dla"]:
        _place_on_dla(trt, config)
    if engine["ranges"] and version < DLA_READS_QUANTISERS and not options.rtx:
        _give_ranges(network, engine["ranges"])
    config.clear_flag(trt.BuilderFlag.TF32)  # what stays float32 is computed in float32, as the reference does
    timed = not options.rtx  # TensorRT-RTX measures nothing while it builds: its timing cache does nothing
    if timed:
        _use_timing_cache(config, options.timing_cache)
    serialised = builder.build_serialized_network(network, config)
    return serialised, config.get_timing_cache().serialize() if timed and serialised is not None else None


# ---- what is built
def _plan() -> dict:
    if not os.path.isfile(PLAN):
        raise BuildError(f"{PLAN}: no such file; run this in the artifact's folder")
    with open(PLAN, encoding="utf-8") as stream:
        try:
            plan = json.load(stream)
        except ValueError as error:
            raise BuildError(f"{PLAN} cannot be read ({error}): copy the artifact's folder to the board again") from None
    return dict(plan)


def _engine(plan: dict, name: str) -> dict:
    names = [engine["name"] for engine in plan["engines"]]
    if name and name not in names:
        raise BuildError(f"no engine called {name!r} in {PLAN}: there are {', '.join(names)}")
    engine = dict(plan["engines"][names.index(name) if name else 0])
    for file in filter(None, (engine["model"], engine["ranges"])):
        if not os.path.isfile(file):
            raise BuildError(f"{file}: no such file; copy the artifact's folder to the board again")
    return engine


def _identity(engine: dict, trt: Any, gpu: dict) -> dict:
    """What an engine depends on. `key` is the digest of it: the same key, the same engine."""
    depends = {
        "model_sha256": _sha256(engine["model"]),
        "ranges_sha256": _sha256(engine["ranges"]) if engine["ranges"] else "",
        "module": trt.__name__,
        "tensorrt": trt.__version__,
        "gpu": gpu,
        "flags": {"precision": engine["precision"], "half": engine["half"], "dla": engine["dla"]},
    }
    key = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:32]
    return dict(depends, schema=RECORD_SCHEMA, engine=engine["name"], model=engine["model"], key=key)


def _is_there(output: str, record: dict) -> bool:
    """Whether the engine stands there whole, with a record of the same key."""
    try:
        with open(output + ".json", encoding="utf-8") as stream:
            found = json.load(stream)
    except (OSError, ValueError):
        return False
    if not isinstance(found, dict) or found.get("key") != record["key"] or found.get("schema") != RECORD_SCHEMA:
        return False
    return os.path.isfile(output) and found.get("size_bytes") == os.path.getsize(output) and found.get("sha256") == _sha256(output)


# ---- TensorRT: the differences between its versions
def _tensorrt(plan: dict) -> Any:
    try:
        import tensorrt
    except ImportError as error:
        raise BuildError(f"the Python module tensorrt cannot be imported ({error}): install it with 'sudo apt install tensorrt' (JetPack)") from None
    oldest = tuple(plan["since"])
    if _version(tensorrt) < oldest:
        wanted = ".".join(str(part) for part in oldest)
        raise BuildError(f"TensorRT {tensorrt.__version__} found, expected {wanted} or later: this graph is written for JetPack {plan['jetpack']}")
    return tensorrt


def _tensorrt_rtx(sm: int) -> Any:
    try:
        import tensorrt_rtx
    except ImportError as error:
        raise BuildError(f"the Python module tensorrt_rtx cannot be imported ({error}): pip install tensorrt-rtx-cu13, or leave out --rtx") from None
    if not hasattr(tensorrt_rtx.ComputeCapability, f"SM{sm}"):
        known = ", ".join(sorted(name for name in dir(tensorrt_rtx.ComputeCapability) if name[:2] == "SM"))
        raise BuildError(f"TensorRT-RTX {tensorrt_rtx.__version__} does not know SM{sm}: it has {known}")
    return tensorrt_rtx


def _version(trt: Any) -> tuple:
    return tuple(int(part) for part in trt.__version__.split(".")[:2])


def _log(trt: Any, verbose: bool) -> Any:
    class Log(trt.ILogger):
        """Warnings and errors go to stderr; errors are kept for the closing sentence."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors = []  # type: list

        def log(self, severity: Any, msg: str) -> None:
            # That CUDA does not start, some versions say in a warning.
            serious = severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR) or "CUDA initialization failure" in msg
            if serious:
                self.errors.append(msg)
            if serious or verbose or severity == trt.ILogger.WARNING:
                sys.stderr.write(msg + "\n")

    return Log()


def _builder(trt: Any, log: Any) -> Any:
    """TensorRT gives none where CUDA does not start; pybind11 makes a TypeError of that ("factory function returned nullptr")."""
    try:
        builder = trt.Builder(log)
    except TypeError:
        builder = None
    if builder is None:
        line = first_line(log.errors)
        reason = "the GPU's driver is too old for it: update JetPack" if re.search(DRIVER_TOO_OLD, line) else line
        raise BuildError(f"TensorRT {trt.__version__} gives no builder: {reason}")
    return builder


def _parsed(trt: Any, builder: Any, log: Any, model: str, typed: bool) -> tuple:
    """The network, and the parser that owns its weights until the engine is built.

    Strongly typed from TensorRT 10 on: every type is the one the graph states, no layer becomes half precision unasked.
    """
    flag = trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED if typed else trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH
    network = builder.create_network(1 << int(flag))
    parser = trt.OnnxParser(network, log)
    with open(model, "rb") as stream:
        parsed = parser.parse(stream.read())
    if not parsed:
        refused = parser.get_error(0)
        place = f"node {refused.node_name()!r} ({refused.node_operator()})" if hasattr(refused, "node_name") else f"node {refused.node()}"  # names since 8.6
        raise BuildError(f"TensorRT {trt.__version__} refuses {model} at {place}: {refused.desc().splitlines()[0]}")
    return network, parser


def _bound_workspace(trt: Any, config: Any, workspace: int) -> None:
    if hasattr(config, "set_memory_pool_limit"):  # since 8.4
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    else:
        config.max_workspace_size = workspace


def _build_for(trt: Any, config: Any, sm: int) -> None:
    """TensorRT-RTX alone builds for a GPU that is not here."""
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), 0)


def _flags(trt: Any, config: Any, engine: dict) -> None:
    """Weakly typed networks: the kernels TensorRT may choose from. Quantisers in the graph are obeyed, but only with the flag INT8."""
    if engine["half"]:
        config.set_flag(trt.BuilderFlag.FP16)
    if engine["precision"] == "int8":
        config.set_flag(trt.BuilderFlag.INT8)


def _place_on_dla(trt: Any, config: Any) -> None:
    config.default_device_type = trt.DeviceType.DLA
    config.DLA_core = 0
    config.set_flag(trt.BuilderFlag.GPU_FALLBACK)


def _give_ranges(network: Any, path: str) -> None:
    """int8 without quantisers: the largest value of each tensor, from the form."""
    with open(path, encoding="utf-8") as stream:
        largest = json.load(stream)
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        for place in range(layer.num_outputs):
            _give_range(layer.get_output(place), largest)
    for index in range(network.num_inputs):
        _give_range(network.get_input(index), largest)


def _give_range(tensor: Any, largest: dict) -> None:
    if tensor.name in largest:
        tensor.set_dynamic_range(-largest[tensor.name], largest[tensor.name])


def _use_timing_cache(config: Any, path: str) -> None:
    """A cache that is damaged, or of another GPU or version, is left aside and said to be: kernels are then measured anew."""
    content = whole_timing_cache(path)
    cache = config.create_timing_cache(content)
    if cache is None or not config.set_timing_cache(cache, False):
        sys.stderr.write(f"build_engine: {path} is of another GPU or TensorRT: kernels are measured anew\n")
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)


def whole_timing_cache(path: str) -> bytes:
    """The cache's content; none where it is not there, or not what was written (its digest stands beside it; trtexec writes none)."""
    content, digest = _bytes_if_there(path), _bytes_if_there(path + ".sha256").strip()
    if content and digest and hashlib.sha256(content).hexdigest().encode() != digest:
        sys.stderr.write(f"build_engine: {path} is damaged (its sha256 differs): kernels are measured anew\n")
        return b""
    return content


def trtexec_line(engine: dict, version: tuple, rtx: int, workspace: int, timing_cache: str) -> str:
    """What builds the same engine with NVIDIA's program, /usr/src/tensorrt/bin/trtexec on a Jetson."""
    if rtx:
        return f"tensorrt_rtx --onnx={engine['model']} --saveEngine={engine['output']}"  # which builds for every GPU it knows
    words = ["/usr/src/tensorrt/bin/trtexec", "--onnx=" + engine["model"], "--saveEngine=" + engine["output"], "--noTF32"]
    mib = workspace // MIB
    words.append(f"--memPoolSize=workspace:{mib}" if version >= (8, 4) else f"--workspace={mib}")
    words.append("--timingCacheFile=" + timing_cache)
    typed = version >= (10, 0) and not (engine["dla"] and version < DLA_READS_QUANTISERS)
    if typed and version < (11, 0):
        words.append("--stronglyTyped")  # 11 knows nothing else
    if not typed:
        words += ["--fp16"] * bool(engine["half"]) + ["--int8"] * (engine["precision"] == "int8")
    if engine["dla"]:
        words += ["--useDLACore=0", "--allowGPUFallback"]
    if engine["ranges"] and version < DLA_READS_QUANTISERS:
        words.append(f"# trtexec takes no ranges: {engine['ranges']} is left out, which is right for timing alone")
    return " ".join(words)


# ---- the board
def gpu_here() -> dict:
    """Name, compute capability and number of multiprocessors: boards of one generation share the first two. Asks CUDA's driver."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise BuildError(f"CUDA's driver cannot be loaded ({error}): build on the board; on a Jetson, JetPack brings it") from None
    device, name, value = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_int()
    code = cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0) or cuda.cuDeviceGetName(name, len(name), device)
    found = []
    for attribute in (MAJOR, MINOR, MULTIPROCESSORS):
        code = code or cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        found.append(value.value)
    if code:
        raise BuildError(f"CUDA does not start (error {code}): see that the GPU's driver is loaded and this user may use it (group video)")
    return {"name": name.value.decode("utf-8", "replace"), "sm": 10 * found[0] + found[1], "multiprocessors": found[2]}


def _check_board(plan: dict, gpu: dict) -> None:
    if plan.get("sm") and int(plan["sm"]) != gpu["sm"]:
        raise BuildError(
            f"the plan is for {plan.get('board', 'another board')} (SM {plan['sm']}), this GPU is {gpu['name']} (SM {gpu['sm']}): compile for this board's"
            " own profile, or pass --other-board"
        )
    wanted = plan.get("multiprocessors")
    if wanted and wanted != gpu["multiprocessors"]:
        raise BuildError(
            f"the plan is for {plan.get('board', 'another board')} with {wanted} multiprocessors, this GPU has {gpu['multiprocessors']}: compile for this"
            " board's own profile, choose a power mode that leaves all of them on (sudo nvpmodel -m 0), or pass --other-board"
        )


def _workspace(model: str, asked_mib: int, free: int) -> int:
    """At most half of the free memory. Raises BuildError, with the needed and the free, where even the least is too much."""
    held = MODEL_COPIES * os.path.getsize(model)
    workspace = asked_mib * MIB if asked_mib > 0 else max(SMALLEST_WORKSPACE, min(free // 2, free - held))
    if workspace + held > free:
        needed, advice = -(-(workspace + held) // MIB), "pass a smaller --workspace-mib" if asked_mib > 0 else "add swap"
        raise BuildError(
            f"{free // MIB} MiB of memory are free, {needed} MiB are needed ({workspace // MIB} for the workspace, the rest for {model}):"
            f" stop other programs, or {advice}"
        )
    return workspace


def _why_not_built(trt: Any, log: Any, model: str, workspace: int, free: int) -> str:
    text = " ".join(log.errors).lower()
    if any(words in text for words in NO_MEMORY):
        return (
            f"TensorRT {trt.__version__} ran out of memory building {model}: {free // MIB} MiB were free, {workspace // MIB} MiB of them for the workspace;"
            " stop other programs, or pass a smaller --workspace-mib"
        )
    return f"TensorRT {trt.__version__} could not build {model}: {first_line(log.errors)}"


def first_line(texts: list) -> str:
    lines = [line.strip() for text in texts for line in text.splitlines() if line.strip()]
    return lines[0] if lines else "it gave no reason"


def free_bytes() -> int:
    """Memory that programs can have now. On a Jetson the GPU uses the same memory."""
    with open("/proc/meminfo", encoding="ascii") as stream:
        for line in stream:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    raise BuildError("/proc/meminfo does not say what is available: pass --workspace-mib")


# ---- files
@contextlib.contextmanager
def _alone(wait: bool) -> Any:
    """One build in this folder. The kernel drops the lock with its process: what a killed build leaves is a file, not a lock."""
    with open(LOCK, "a+", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            holder = stream.read().strip() or "not known"
            if not wait:
                raise BuildError(f"another build is running here (process {holder}): wait for it, or pass --wait") from None
            sys.stderr.write(f"build_engine: waiting for another build (process {holder})\n")
            fcntl.flock(stream, fcntl.LOCK_EX)
        stream.truncate(0)
        stream.write(f"{os.getpid()}, since {time.strftime('%H:%M:%S')}\n")
        stream.flush()
        yield


def _remove_left_overs(output: str) -> None:
    """Temporary files of builds that were killed; the lock says that no other is alive."""
    for name in glob.glob(glob.escape(output) + "*.partial-*"):
        os.remove(name)


def _bytes_if_there(path: str) -> bytes:
    if not os.path.exists(path):
        return b""
    with open(path, "rb") as stream:
        return stream.read()


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        for block in iter(lambda: stream.read(MIB), b""):
            digest.update(block)
    return digest.hexdigest()


def write_at_once(path: str, content: Any) -> None:
    """A temporary file beside it, then a rename: a build that is killed leaves the old file or none. `content`: anything with the buffer protocol."""
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=os.path.basename(path) + ".partial-")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    folder_handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(folder_handle)  # the rename itself
    finally:
        os.close(folder_handle)


if __name__ == "__main__":
    sys.exit(main())
