# SPDX-License-Identifier: Apache-2.0
"""NVIDIA's own check that the graph compiles: parse it and build it ahead of time with TensorRT-RTX, without a GPU, as a process of its own.

    python -m isthmus.targets.jetson.check_with_rtx model.onnx --sm 86

TensorRT-RTX (1.7) knows SM86, desktop Ampere, but not Orin's SM87, and a Jetson loads only engines that its own TensorRT built: what
is built here is thrown away, it shows that NVIDIA's parser and compiler take the graph. The last line says so, or names what they refuse.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path
from typing import Any

LAST_LINE_CHARACTERS = 400


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Parses and compiles an ONNX file with TensorRT-RTX, ahead of time.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--sm", type=int, default=86, help="compute capability, 86 for 8.6 (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        line, code = check(options.model.read_bytes(), options.sm), 0
    except OSError as error:
        line, code = f"{options.model}: {error.strerror}", 2
    except RefusedError as error:
        line, code = str(error), 1
    sys.stdout.write(line[:LAST_LINE_CHARACTERS] + "\n")
    return code


class RefusedError(Exception):
    """The graph, the SM or this installation is refused; the text is the last line of the log."""


def check(model: bytes, sm: int) -> str:
    """One sentence with version, SM and seconds. Raises `RefusedError` with the node, its operator and NVIDIA's sentence."""
    import tensorrt_rtx as trt

    capability = getattr(trt.ComputeCapability, f"SM{sm}", None)
    if capability is None:
        known = ", ".join(sorted(name for name in dir(trt.ComputeCapability) if re.fullmatch(r"SM\d+", name)))
        raise RefusedError(f"TensorRT-RTX {trt.__version__} does not know SM{sm}: it has {known}")
    log = _log(trt)
    started = time.perf_counter()
    builder = trt.Builder(log)
    if builder is None:
        raise RefusedError(f"TensorRT-RTX {trt.__version__} gives no builder on this machine: {_sentence(log.errors)}")
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)  # owns the weights: it must live until the engine is built
    if not parser.parse(model):
        raise RefusedError(_parser_refusal(trt, parser))
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(capability, 0)
    if builder.build_serialized_network(network, config) is None:
        raise RefusedError(f"TensorRT-RTX {trt.__version__} does not build the graph for SM{sm}: {_sentence(log.errors)}")
    return f"parses and compiles with TensorRT-RTX {trt.__version__} for SM{sm} in {time.perf_counter() - started:.1f} s"


def _parser_refusal(trt: Any, parser: Any) -> str:
    if not parser.num_errors:
        return f"TensorRT-RTX {trt.__version__} does not read the file, and does not say why"
    error = parser.get_error(0)
    place = f"node {error.node_name()!r} ({error.node_operator()})" if error.node_operator() else "the file"
    return f"TensorRT-RTX {trt.__version__} refuses {place}: {_sentence([error.desc()])}"


def _log(trt: Any) -> Any:
    class Log(trt.ILogger):
        """Everything goes to the step's log, errors are kept for its last line."""

        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)
            if severity != trt.ILogger.VERBOSE:
                sys.stdout.write(f"{message}\n")

    return Log()


def _sentence(texts: list[str]) -> str:
    """NVIDIA's first line that says what is wrong with the graph, without source positions; CUDA's complaints that there is no GPU are not it."""
    lines = [line.strip() for text in texts for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if "Cuda Runtime" not in line and not line.startswith("Invalid Node")]
    line = (telling or lines or ["no reason given"])[0]
    return re.sub(r"\s*In \w+ at \S+:\d+", "", line)


if __name__ == "__main__":
    sys.exit(main())
