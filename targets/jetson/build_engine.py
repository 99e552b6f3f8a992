#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Builds model.engine from model.onnx on the board: needs the tensorrt that JetPack 6 brings, and nothing else.

    python3 build_engine.py [--model model.onnx] [--output model.engine] [--workspace-mib N] [--timing-cache timing.cache]

Copied next to the model by isthmus. An engine belongs to the GPU and the TensorRT version that built it: build it on the board
that runs it, and again after an update. Written for Python 3.8 and later; TensorRT 10, and 11 where its calls are the same.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from typing import Any

# The graph is opset 20 with int8 weights, which the parsers of TensorRT 8 do not read.
OLDEST = (10, 0)
MIB = 2**20
SMALLEST_WORKSPACE = 64 * MIB


class BuildError(Exception):
    """One sentence for the person at the board."""


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    try:
        sys.stdout.write(build(options.model, options.output, options.workspace_mib, options.timing_cache, options.verbose) + "\n")
    except (BuildError, OSError) as error:
        sys.stderr.write(f"build_engine: {error}\n")
        return 1
    return 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    command_line = argparse.ArgumentParser(description="Builds a TensorRT engine from the ONNX file beside it.")
    command_line.add_argument("--model", default="model.onnx", help="the ONNX file (default: %(default)s)")
    command_line.add_argument("--output", default="model.engine", help="the engine (default: %(default)s)")
    command_line.add_argument("--workspace-mib", type=int, default=0, help="memory TensorRT may use for one layer (default: half of what is free)")
    command_line.add_argument("--timing-cache", default="timing.cache", help="measured kernels, reused by the next build (default: %(default)s)")
    command_line.add_argument("--verbose", action="store_true", help="everything TensorRT says")
    return command_line.parse_args(arguments)


def build(model: str, output: str, workspace_mib: int, timing_cache: str, verbose: bool) -> str:
    """Writes the engine, whole or not at all; gives the closing sentence. Raises BuildError."""
    trt = _tensorrt()
    workspace = workspace_mib * MIB if workspace_mib > 0 else free_bytes() // 2
    if workspace < SMALLEST_WORKSPACE:
        least = SMALLEST_WORKSPACE // MIB
        raise BuildError(f"{workspace // MIB} MiB for TensorRT's workspace, expected {least} or more: stop other programs, add swap, or pass --workspace-mib")
    started = time.monotonic()
    logger = trt.Logger(trt.Logger.VERBOSE if verbose else trt.Logger.WARNING)
    builder = trt.Builder(logger)
    network, _parser = _parsed(trt, builder, logger, model)
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    config.clear_flag(trt.BuilderFlag.TF32)  # what stays float is computed in float32, as the reference does
    cache = config.create_timing_cache(_bytes_if_there(timing_cache))
    if cache is None or not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")  # of another GPU or version: measured anew
        config.set_timing_cache(cache, False)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BuildError(f"TensorRT {trt.__version__} could not build {model}: see its messages above; if memory ran out, try a smaller --workspace-mib")
    write_at_once(output, plan)
    write_at_once(timing_cache, config.get_timing_cache().serialize())
    return f"built {output}: {os.path.getsize(output)} bytes, TensorRT {trt.__version__}, {time.monotonic() - started:.0f} s"


def _tensorrt() -> Any:
    try:
        import tensorrt
    except ImportError as error:
        raise BuildError(f"the Python module tensorrt cannot be imported ({error}): install it with 'sudo apt install tensorrt' (JetPack)") from None
    version = tuple(int(part) for part in tensorrt.__version__.split(".")[:2])
    if version < OLDEST:
        raise BuildError(f"TensorRT {tensorrt.__version__} found, expected 10.0 or later: this graph is written for JetPack 6")
    return tensorrt


def _parsed(trt: Any, builder: Any, logger: Any, model: str) -> Any:
    """The network, and the parser that owns its weights until the engine is built.

    Strongly typed: every type is the one the graph states, no layer becomes half precision unasked.
    """
    if not os.path.isfile(model):
        raise BuildError(f"{model}: no such file; run this in the artifact's folder, or pass --model")
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    with open(model, "rb") as stream:
        parsed = parser.parse(stream.read())
    if not parsed:
        error = parser.get_error(0)
        raise BuildError(f"TensorRT {trt.__version__} refuses {model} at node {error.node_name()!r} ({error.node_operator()}): {error.desc().splitlines()[0]}")
    return network, parser


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
