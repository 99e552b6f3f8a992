# SPDX-License-Identifier: Apache-2.0
"""Where a tool is, which version, and the one command that brings a missing one: looked up here and nowhere else."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Tool:
    """A tool as found: `version` is "" and `fix` the command that brings it where `found` is False."""

    name: str
    found: bool
    version: str
    path: str
    fix: str
    purpose: str


@dataclass(frozen=True)
class _PythonTool:
    module: str
    distribution: str
    fix: str
    purpose: str


@dataclass(frozen=True)
class _ProgramTool:
    program: str
    version_argv: tuple[str, ...]
    fix: str
    purpose: str


_PYTHON = {
    "onnxruntime": _PythonTool("onnxruntime", "onnxruntime", "pip install 'isthmus[runtime-onnx]'", "runs the cpu artifact"),
    "openvino": _PythonTool("openvino", "openvino", "pip install 'isthmus[openvino]'", "runs the cpu artifact where that is faster"),
    "litert": _PythonTool("ai_edge_litert", "ai-edge-litert", "pip install 'isthmus[tflite]'", "runs the .tflite artifact"),
    "tensorrt_rtx": _PythonTool(
        "tensorrt_rtx", "tensorrt-rtx-cu13", "pip install 'isthmus[tensorrt-check]'", "compiles the Jetson graph ahead of time, as a check"
    ),
    "hls4ml": _PythonTool("hls4ml", "hls4ml", "pip install 'isthmus[fpga]'", "writes the HLS project"),
    "conifer": _PythonTool("conifer", "conifer", "pip install 'isthmus[trees]'", "writes the HLS project of a tree model"),
    "loadgen": _PythonTool("mlperf_loadgen", "mlcommons-loadgen", "pip install 'isthmus[bench]'", "issues the queries of `bench --loadgen`"),
    "torch": _PythonTool("torch", "torch", "pip install 'isthmus[train]' -c constraints.txt", "trains and exports"),
    "brevitas": _PythonTool("brevitas", "brevitas", "pip install 'isthmus[train]' -c constraints.txt", "quantisation-aware training"),
    "tensorrt": _PythonTool("tensorrt", "tensorrt", "comes with JetPack on the board", "builds and runs the engine on a Jetson"),
}
_PROGRAMS = {
    "g++": _ProgramTool("g++", ("--version",), "apt install g++", "compiles the C simulation"),
    "vitis_hls": _ProgramTool("vitis_hls", ("-version",), "install AMD Vitis and source its settings64.sh", "C synthesis and bitstream"),
    "vitis-run": _ProgramTool("vitis-run", ("--version",), "install AMD Vitis 2024.2 or newer and source its settings64.sh", "C synthesis, as vitis_hls"),
    "vivado": _ProgramTool("vivado", ("-version",), "install AMD Vivado and source its settings64.sh", "implementation and bitstream"),
    "vivado_hls": _ProgramTool("vivado_hls", ("-version",), "install Vivado 2020.1 or older and source its settings64.sh", "C synthesis of backend Vivado"),
    "catapult": _ProgramTool("catapult", ("-version",), "install Catapult and put its bin folder on PATH", "C synthesis of backend Catapult"),
    "icpx": _ProgramTool(
        "icpx", ("--version",), "install oneAPI with its FPGA support (2025.0 or older) and source setvars.sh", "C synthesis for Intel's parts"
    ),
    "shls": _ProgramTool("shls", ("-v",), "install Libero SoC with SmartHLS and put its bin folder on PATH", "C synthesis for Microchip's parts"),
}


def tool_names() -> list[str]:
    return ["python", *_PYTHON, *_PROGRAMS]


@functools.cache
def find_tool(name: str) -> Tool:
    """The tool called `name`. A program is looked for on PATH, or where the environment variable ISTHMUS_<NAME> points."""
    if name == "python":
        return Tool(name, True, sys.version.split()[0], sys.executable, "", "runs isthmus")
    if name in _PYTHON:
        return _find_module(name, _PYTHON[name])
    return _find_program(name, _PROGRAMS[name])


def _find_module(name: str, tool: _PythonTool) -> Tool:
    spec = importlib.util.find_spec(tool.module)
    if spec is None:
        return Tool(name, False, "", "", tool.fix, tool.purpose)
    try:
        version = importlib.metadata.version(tool.distribution)
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"
    return Tool(name, True, version, spec.origin or "", "", tool.purpose)


def _find_program(name: str, tool: _ProgramTool) -> Tool:
    variable = f"ISTHMUS_{name.upper().replace('+', 'P').replace('-', '_')}"
    path = os.environ.get(variable) or shutil.which(tool.program)
    if not path:
        return Tool(name, False, "", "", f"{tool.fix}, or point {variable} at it", tool.purpose)
    try:
        done = subprocess.run([path, *tool.version_argv], capture_output=True, text=True, timeout=20, check=False)
        lines = (done.stdout + done.stderr).strip().splitlines()
    except (OSError, subprocess.TimeoutExpired):
        return Tool(name, False, "", path, f"{path} does not start; {tool.fix}", tool.purpose)
    return Tool(name, True, lines[0] if lines else "unknown", path, "", tool.purpose)
