#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Builds the TensorRT engines that engines.json names, on the board: needs the tensorrt that JetPack brings, and nothing else.

    python3 build_engine.py [--engine int8] [--workspace-mib N] [--timing-cache timing.cache]

Copied next to the models by isthmus. An engine belongs to the GPU and the TensorRT version that built it: build it on the board
that runs it, and again after an update. Written for Python 3.6 (JetPack 4) and later, TensorRT 8.2 to 11.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from typing import Any

PLAN = "engines.json"
MIB = 2**20
SMALLEST_WORKSPACE = 64 * MIB
# The DLA reads QuantizeLinear from here on; before, int8 on a DLA wants a range for each tensor.
DLA_READS_QUANTISERS = (11, 4)


class BuildError(Exception):
    """One sentence for the person at the board."""


def main(arguments: Any = None) -> int:
    options = _options(arguments)
    try:
        sys.stdout.write(build(options.engine, options.workspace_mib, options.timing_cache, options.verbose) + "\n")
    except (BuildError, OSError) as error:
        sys.stderr.write(f"build_engine: {error}\n")
        return 1
    return 0


def _options(arguments: Any) -> argparse.Namespace:
    command_line = argparse.ArgumentParser(description="Builds a TensorRT engine from the ONNX file beside it.")
    command_line.add_argument("--engine", default="", help="which engine of " + PLAN + " (default: the first)")
    command_line.add_argument("--workspace-mib", type=int, default=0, help="memory TensorRT may use for one layer (default: half of what is free)")
    command_line.add_argument("--timing-cache", default="timing.cache", help="measured kernels, reused by the next build (default: %(default)s)")
    command_line.add_argument("--verbose", action="store_true", help="everything TensorRT says")
    return command_line.parse_args(arguments)


def build(name: str, workspace_mib: int, timing_cache: str, verbose: bool) -> str:
    """Writes the engine, whole or not at all; gives the closing sentence. Raises BuildError."""
    plan = _plan()
    engine = _engine(plan, name)
    trt, version = _tensorrt(plan)
    workspace = workspace_mib * MIB if workspace_mib > 0 else free_bytes() // 2
    if workspace < SMALLEST_WORKSPACE:
        least = SMALLEST_WORKSPACE // MIB
        raise BuildError(f"{workspace // MIB} MiB for TensorRT's workspace, expected {least} or more: stop other programs, add swap, or pass --workspace-mib")
    started = time.monotonic()
    logger = trt.Logger(trt.Logger.VERBOSE if verbose else trt.Logger.WARNING)
    builder = trt.Builder(logger)
    typed = version >= (10, 0) and not (engine["dla"] and version < DLA_READS_QUANTISERS)
    network, _parser = _parsed(trt, builder, logger, engine["model"], typed)
    config = builder.create_builder_config()
    _bound_workspace(trt, config, workspace)
    if not typed:
        _flags(trt, config, engine)
    if engine["dla"]:
        _place_on_dla(trt, config)
    if engine["ranges"] and version < DLA_READS_QUANTISERS:
        _give_ranges(network, engine["ranges"])
    config.clear_flag(trt.BuilderFlag.TF32)  # what stays float32 is computed in float32, as the reference does
    cache = config.create_timing_cache(_bytes_if_there(timing_cache))
    if cache is None or not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")  # of another GPU or version: measured anew
        config.set_timing_cache(cache, False)
    serialised = builder.build_serialized_network(network, config)
    if serialised is None:
        raise BuildError(
            f"TensorRT {trt.__version__} could not build {engine['model']}: see its messages above; if memory ran out, try a smaller --workspace-mib"
        )
    write_at_once(engine["output"], serialised)
    write_at_once(timing_cache, config.get_timing_cache().serialize())
    seconds = time.monotonic() - started
    return f"built {engine['output']}: {os.path.getsize(engine['output'])} bytes, {engine['name']}, TensorRT {trt.__version__}, {seconds:.0f} s"


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
    if not os.path.isfile(engine["model"]):
        raise BuildError(f"{engine['model']}: no such file; copy the artifact's folder to the board again")
    return engine


def _tensorrt(plan: dict) -> tuple:
    """The module and its version (major, minor)."""
    try:
        import tensorrt
    except ImportError as error:
        raise BuildError(f"the Python module tensorrt cannot be imported ({error}): install it with 'sudo apt install tensorrt' (JetPack)") from None
    version = tuple(int(part) for part in tensorrt.__version__.split(".")[:2])
    oldest = tuple(plan["since"])
    if version < oldest:
        wanted = ".".join(str(part) for part in oldest)
        raise BuildError(f"TensorRT {tensorrt.__version__} found, expected {wanted} or later: this graph is written for JetPack {plan['jetpack']}")
    return tensorrt, version


def _parsed(trt: Any, builder: Any, logger: Any, model: str, typed: bool) -> tuple:
    """The network, and the parser that owns its weights until the engine is built.

    Strongly typed from TensorRT 10 on: every type is the one the graph states, no layer becomes half precision unasked.
    """
    flag = trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED if typed else trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH
    network = builder.create_network(1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    with open(model, "rb") as stream:
        parsed = parser.parse(stream.read())
    if not parsed:
        error = parser.get_error(0)
        place = f"node {error.node_name()!r} ({error.node_operator()})" if hasattr(error, "node_name") else f"node {error.node()}"  # names since 8.6
        raise BuildError(f"TensorRT {trt.__version__} refuses {model} at {place}: {error.desc().splitlines()[0]}")
    return network, parser


def _bound_workspace(trt: Any, config: Any, workspace: int) -> None:
    if hasattr(config, "set_memory_pool_limit"):  # since 8.4
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    else:
        config.max_workspace_size = workspace


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


def free_bytes() -> int:
    """Memory that programs can have now. On a Jetson the GPU uses the same memory."""
    with open("/proc/meminfo", encoding="ascii") as stream:
        for line in stream:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    raise BuildError("/proc/meminfo does not say what is available: pass --workspace-mib")


def _bytes_if_there(path: str) -> bytes:
    if not os.path.exists(path):
        return b""
    with open(path, "rb") as stream:
        return stream.read()


def write_at_once(path: str, content: Any) -> None:
    """A temporary file beside it, then a rename: a build that is killed leaves the old file or none. `content`: anything with the buffer protocol."""
    handle, temporary = tempfile.mkstemp(dir=os.path.dirname(os.path.abspath(path)), prefix=os.path.basename(path) + ".")
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


if __name__ == "__main__":
    sys.exit(main())
