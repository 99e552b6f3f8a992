# SPDX-License-Identifier: Apache-2.0
"""Every name, and every call's arguments, that isthmus takes from TensorRT's Python interface, held against the interface itself, without a GPU.

Two authorities: the signatures of TensorRT 10.13 and, of what 10 has dropped, of 8.5 (`tensorrt_api.json`, made by `make_tensorrt_api.py`), and the
TensorRT-RTX module that is installed. CUDA's functions are held against cuda.h where a toolkit is installed.
"""

from __future__ import annotations

import ast
import ctypes
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from isthmus.runtimes.tensorrt import cuda

ROOT = Path(__file__).parents[2]
BUILD, RUN = ROOT / "targets/jetson/build_engine.py", ROOT / "runtimes/tensorrt/api.py"
TABLES = json.loads((Path(__file__).parent / "tensorrt_api.json").read_text(encoding="utf-8"))
TENSORRT_10, TENSORRT_8 = (next(table for name, table in TABLES.items() if part in name) for part in ("stubs", "8.5"))
# What the two files call the objects of each class.
OBJECTS = {
    BUILD: {
        "builder": "Builder",
        "network": "INetworkDefinition",
        "config": "IBuilderConfig",
        "parser": "OnnxParser",
        "refused": "ParserError",
        "layer": "ILayer",
        "tensor": "ITensor",
        "config.get_timing_cache()": "ITimingCache",
    },
    RUN: {"runtime": "Runtime", "engine": "ICudaEngine", "context": "IExecutionContext", "self._context": "IExecutionContext"},
}
# By file, what TensorRT-RTX and TensorRT 10 lack: asked for only where the version has it.
NOT_IN_10 = {"IBuilderConfig.max_workspace_size", *(f"{name}.{member}" for name in ("ICudaEngine", "IExecutionContext") for member in TENSORRT_8[name])}
NOT_IN_RTX = NOT_IN_10 | {"ITensor.set_dynamic_range", "NetworkDefinitionCreationFlag.EXPLICIT_BATCH", "BuilderFlag.FP16", "BuilderFlag.INT8"}
# TensorRT-RTX alone builds for a GPU that is not here.
RTX_ALONE = {"IBuilderConfig.num_compute_capabilities", "IBuilderConfig.set_compute_capability"}


def uses(file: Path) -> Iterator[tuple[str, str, ast.Call | None]]:
    """(class, member, the call it is the function of) of every attribute that is taken from an object of TensorRT; enumerations count as classes."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or ast.unparse(node.value) == "trt.__version__":
            continue
        owner = ast.unparse(node.value)
        name = OBJECTS[file].get(owner, owner.removeprefix("trt.") if owner.startswith("trt.") else "")
        if name and not node.attr.startswith("__"):
            yield name, node.attr, calls.get(id(node))


def fits(call: ast.Call, parameters: list[str]) -> bool:
    """Whether the call's arguments are the method's: no more of them, and no keyword it has not."""
    return len(call.args) + len(call.keywords) <= len(parameters) and all(word.arg in parameters[len(call.args) :] for word in call.keywords)


def of_rtx(module: object, name: str, member: str) -> tuple[bool, list[list[str]] | None]:
    """Whether TensorRT-RTX has it, and the parameters of each overload as pybind11 wrote them down."""
    owner = getattr(module, name)
    if not hasattr(owner, member):
        return False, None
    text = getattr(owner, member).__doc__ or ""
    heads = re.findall(rf"^(?:\d+\. )?{member}\((self: [^\n]*)\) -> ", text, re.MULTILINE)
    return True, [[re.split(r"[:=]", part)[0].strip() for part in split_parameters(head)][1:] for head in heads] or None


def split_parameters(text: str) -> list[str]:
    """At the commas that stand in no bracket."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[(<") - (character in "])>")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return parts


@pytest.mark.parametrize("file", [BUILD, RUN], ids=lambda file: file.name)
def test_every_call_is_one_that_tensorrt_has(file: Path) -> None:
    found = list(uses(file))
    assert set(OBJECTS[file].values()) <= {name for name, _, _ in found}
    missing, wrong = set(), []
    for name, member, call in found:
        table = next((table[name] for table in (TENSORRT_10, TENSORRT_8) if member in table.get(name, {})), None)
        if member not in TENSORRT_10.get(name, {}):
            missing.add(f"{name}.{member}")
        if table is None:
            continue
        if call is not None and not any(fits(call, parameters) for parameters in table[member] or []):
            wrong.append(f"{file.name}:{call.lineno} {ast.unparse(call)} is none of {table[member]}")
    assert not wrong
    assert missing - RTX_ALONE == NOT_IN_10 & {f"{owner}.{member}" for owner, member, _ in found}


@pytest.mark.parametrize("file", [BUILD, RUN], ids=lambda file: file.name)
def test_every_call_is_one_that_tensorrt_rtx_has(file: Path, require: Callable[[str], str]) -> None:
    require("tensorrt_rtx")
    import tensorrt_rtx

    missing, wrong, checked = set(), [], 0
    for name, member, call in uses(file):
        there, overloads = of_rtx(tensorrt_rtx, name, member)
        if not there:
            missing.add(f"{name}.{member}")
        elif call is not None and overloads is not None:
            checked += 1
            if not any(fits(call, parameters) for parameters in overloads):
                wrong.append(f"{file.name}:{call.lineno} {ast.unparse(call)} is none of {overloads}")
    assert checked > 5 and not wrong
    assert missing == NOT_IN_RTX & {f"{owner}.{member}" for owner, member, _ in uses(file)}


@pytest.mark.parametrize("file", [BUILD, RUN], ids=lambda file: file.name)
def test_what_is_taken_from_the_module_is_there(file: Path, require: Callable[[str], str]) -> None:
    require("tensorrt_rtx")
    import tensorrt_rtx

    tree = ast.parse(file.read_text(encoding="utf-8"))
    taken = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "trt"} - {"__version__", "__name__"}
    assert taken and {name for name in taken if not hasattr(tensorrt_rtx, name)} == set()
    assert taken <= set(TENSORRT_10) | {"ComputeCapability"}  # TensorRT-RTX's own


def test_the_walk_sees_wrong_calls() -> None:
    """Names and arguments that are made up are not taken for good."""
    good, too_many, unknown = (ast.parse(text, mode="eval").body for text in ("f(1)", "f(1, 2, 3)", "f(handle=1)"))
    assert isinstance(good, ast.Call) and isinstance(too_many, ast.Call) and isinstance(unknown, ast.Call)
    parameters = TENSORRT_10["IExecutionContext"]["execute_async_v3"][0]
    assert parameters == ["stream_handle"]
    assert [fits(call, parameters) for call in (good, too_many, unknown)] == [True, False, False]
    assert "execute_async_v4" not in TENSORRT_10["IExecutionContext"]


# ---- CUDA's driver
KINDS = {"int": "int", "unsigned int": "int", "CUdevice": "int", "size_t": "size", "unsigned long long": "size", "CUdeviceptr": "size"}


def of_ctypes(kind: object) -> str:
    if kind in (ctypes.c_void_p, ctypes.c_char_p) or (isinstance(kind, type) and issubclass(kind, ctypes._Pointer)):
        return "pointer"
    return {ctypes.c_int: "int", ctypes.c_uint: "int", ctypes.c_size_t: "size", ctypes.c_ulonglong: "size"}[kind]  # type: ignore[index]


def of_c(parameter: str) -> str:
    """Of a parameter's declaration in cuda.h. Handles (CUstream, CUgraph, ...) are pointers, enumerations are ints."""
    words = parameter.replace("const ", "").strip()
    if "*" in words:
        return "pointer"
    kind = words.rpartition(" ")[0].strip()
    return KINDS.get(kind, "int" if kind in ("CUresult", "CUdevice_attribute", "CUstreamCaptureMode") else "pointer")


def test_the_drivers_functions_are_those_of_cuda_h() -> None:
    headers = sorted(Path("/usr/local").glob("cuda*/**/include/cuda.h"))
    if not headers:
        pytest.skip("cuda.h is not here: install a CUDA toolkit's headers")
    text = re.sub(r"/\*.*?\*/", " ", headers[-1].read_text(encoding="utf-8", errors="replace"), flags=re.DOTALL)
    declared: dict[str, list[str]] = {}
    for match in re.finditer(r"CUresult CUDAAPI (\w+)\(([^()]*)\);", text):  # the first of a name is today's, old ones follow
        declared.setdefault(match[1], [of_c(part) for part in " ".join(match[2].split()).split(",") if part.strip() != "void"])
    wanted = cuda.PROTOTYPES | dict([cuda.INSTANTIATE])
    for name, types in wanted.items():
        plain = re.search(rf"#define (\w+)\s+{name}\s", text)  # what programs call it; libcuda exports the other name
        assert declared[plain[1] if plain else name] == [of_ctypes(kind) for kind in types], name
    for name, number in (("MULTIPROCESSOR_COUNT", cuda.MULTIPROCESSORS), ("COMPUTE_CAPABILITY_MAJOR", cuda.MAJOR), ("COMPUTE_CAPABILITY_MINOR", cuda.MINOR)):
        assert re.search(rf"CU_DEVICE_ATTRIBUTE_{name} = {number}\b", text)
    for name, number in (("CUDA_ERROR_NO_DEVICE", cuda.NO_DEVICE), ("CUDA_ERROR_STUB_LIBRARY", cuda.STUB)):
        assert re.search(rf"{name}\s*= {number}\b", text)
    assert re.search(rf"CU_STREAM_CAPTURE_MODE_THREAD_LOCAL\s*= {cuda.CAPTURE_THREAD_LOCAL}\b", text)
    assert re.search(rf"CU_STREAM_NON_BLOCKING\s*= 0x{cuda.NON_BLOCKING}\b", text)
