# SPDX-License-Identifier: Apache-2.0
"""NVIDIA's own check that the graphs compile: parse and build them ahead of time with TensorRT-RTX, without a GPU, as a process of its own.

    python -m isthmus.targets.jetson.check_with_rtx model.onnx model_float.onnx --sm 86 89 --kernels kernels.json

TensorRT-RTX (1.7) knows SM86, desktop Ampere, and SM89, Ada, but not Orin's SM87, and a Jetson loads only engines that its own TensorRT built: what
is built here is thrown away, it shows that NVIDIA's parser and compiler take the graph. The last line says so, or names what they refuse.
`kernels.json` lists what the compiler made of each graph for the first: the kernels, the types they read and write, the ONNX nodes they hold.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

LAST_LINE_CHARACTERS = 400
# What TensorRT-RTX 1.7 calls the kernels that multiply matrices; "kgen" are those it generates, "maxpool" and others come from its library.
MATRIX_KERNELS = frozenset({"correlation", "conv", "deconv", "gemm", "fc", "batch_gemm"})


@dataclass(frozen=True)
class Kernel:
    """One layer of the compiled engine, as the compiler's log lists it. `nodes` are the names of the ONNX nodes it holds or is a part of."""

    name: str
    kind: str
    reads: tuple[str, ...]
    constants: tuple[str, ...]
    writes: tuple[str, ...]
    nodes: tuple[str, ...]

    @property
    def multiplies_int8(self) -> bool:
        """A matrix kernel whose every operand that is a tensor is int8."""
        return self.kind in MATRIX_KERNELS and set(self.reads) == {"Int8"}


@dataclass(frozen=True)
class Compiled:
    version: str
    sm: int
    seconds: float
    kernels: tuple[Kernel, ...]

    @property
    def sentence(self) -> str:
        return sentence(self.version, [self.sm], self.seconds)


def sentence(version: str, sms: Sequence[int], seconds: float) -> str:
    return f"parses and compiles with TensorRT-RTX {version} for {' and '.join(f'SM{sm}' for sm in sms)} in {seconds:.1f} s"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Parses and compiles ONNX files with TensorRT-RTX, ahead of time.")
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--sm", type=int, nargs="+", default=[86], help="compute capabilities, 86 for 8.6 (default: 86)")
    parser.add_argument("--kernels", type=Path, help="write what was compiled to this JSON file")
    options = parser.parse_args(arguments)
    try:
        line, code = _all(options.models, options.sm, options.kernels), 0
    except OSError as error:
        line, code = f"{error.filename}: {error.strerror}", 2
    except RefusedError as error:
        line, code = str(error), 1
    sys.stdout.write(line[:LAST_LINE_CHARACTERS] + "\n")
    return code


class RefusedError(Exception):
    """The graph, the SM or this installation is refused; the text is the last line of the log."""


def _all(models: list[Path], sms: list[int], kernels: Path | None) -> str:
    done: dict[str, list[Compiled]] = {}
    for model in models:
        content = model.read_bytes()
        try:
            done[model.name] = [compiled(content, sm) for sm in sms]
        except RefusedError as error:
            raise RefusedError(str(error) if len(models) == 1 else f"{model.name}: {error}") from None
    if kernels is not None:
        kernels.write_text(json.dumps({name: asdict(results[0]) for name, results in done.items()}, indent=1) + "\n", encoding="utf-8")
    every = [result for results in done.values() for result in results]
    return sentence(every[0].version, sms, sum(result.seconds for result in every)) + ("" if len(models) == 1 else f" ({', '.join(done)})")


def compiled(model: bytes, sm: int) -> Compiled:
    """Version, SM, seconds and kernels. Raises `RefusedError` with the node, its operator and NVIDIA's sentence."""
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
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the log then lists the kernels with their types
    if builder.build_serialized_network(network, config) is None:
        raise RefusedError(f"TensorRT-RTX {trt.__version__} does not build the graph for SM{sm}: {_sentence(log.errors)}")
    return Compiled(trt.__version__, sm, round(time.perf_counter() - started, 3), kernels_from_log(log.layers))


def kernels_from_log(text: str) -> tuple[Kernel, ...]:
    """The layers of the compiler's closing list ("Name: ..., LayerType: ..., Inputs: [ { ... Datatype: Int8 ...")."""
    found = []
    for line in text.splitlines():
        head = re.match(r"Name: (.*), LayerType: (\w+), Inputs: ", line)
        if head is None:
            continue
        before, _, after = line.partition("Outputs: [")
        reads, _, constants = before.partition("Constants: [")
        types = [tuple(re.findall(r"Datatype: (\w+)", part)) for part in (reads, constants, after)]
        found.append(Kernel(head[1], head[2], types[0], types[1], types[2], tuple(re.findall(r"\[ONNX Layer: ([^\]]*)\]", after))))
    return tuple(found)


def _parser_refusal(trt: Any, parser: Any) -> str:
    if not parser.num_errors:
        return f"TensorRT-RTX {trt.__version__} does not read the file, and does not say why"
    error = parser.get_error(0)
    place = f"node {error.node_name()!r} ({error.node_operator()})" if error.node_operator() else "the file"
    return f"TensorRT-RTX {trt.__version__} refuses {place}: {_sentence([error.desc()])}"


def _log(trt: Any) -> Any:
    class Log(trt.ILogger):
        """Everything but chatter goes to the step's log, errors are kept for its last line, the list of kernels for `kernels_from_log`."""

        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []
            self.layers = ""

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)
            if severity != trt.ILogger.VERBOSE:
                sys.stdout.write(f"{message}\n")
            elif message.startswith("Layers:"):
                self.layers = message
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
