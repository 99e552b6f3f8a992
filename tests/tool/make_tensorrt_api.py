# SPDX-License-Identifier: Apache-2.0
"""Writes `tensorrt_api.json`: names and parameters of the TensorRT classes that isthmus calls, from NVIDIA's interface as `tensorrt-stubs` describes it.

    pip download --no-deps tensorrt-stubs==10.13.0.35.1 -d WHEEL
    python tests/tool/make_tensorrt_api.py WHEEL/tensorrt_stubs-10.13.0.35.1-py3-none-any.whl

The stubs themselves are not installed for the tests: their folder `tensorrt` would make `import tensorrt` succeed where there is none.
"""

from __future__ import annotations

import ast
import json
import sys
import zipfile
from pathlib import Path

PLACE = Path(__file__).with_name("tensorrt_api.json")
STUB = "tensorrt_bindings/tensorrt.pyi"
CLASSES = (
    *("Builder", "IBuilderConfig", "INetworkDefinition", "OnnxParser", "ParserError", "ILayer", "ITensor", "ITimingCache", "IHostMemory"),
    *("Runtime", "ICudaEngine", "IExecutionContext", "IProfiler", "ILogger"),
    *("BuilderFlag", "NetworkDefinitionCreationFlag", "MemoryPoolType", "DeviceType", "DataType", "TensorIOMode"),
)
# TensorRT 8.5 has both interfaces, by index and by name. Read in NVIDIA/TensorRT, commit 768d994b, python/src/infer/pyCore.cpp: what 10 has dropped.
VERSION_8_5 = {
    "ICudaEngine": {
        "num_bindings": None,
        "get_binding_name": [["index"]],
        "binding_is_input": [["index"], ["name"]],
        "get_binding_shape": [["index"], ["name"]],
        "get_binding_dtype": [["index"], ["name"]],
    },
    "IExecutionContext": {"execute_async_v2": [["bindings", "stream_handle", "input_consumed"]]},
    "IBuilderConfig": {"max_workspace_size": None},
}


def main(wheel: Path) -> None:
    tree = readable(zipfile.ZipFile(wheel).read(STUB).decode())
    classes = {node.name: members(node) for node in tree.body if isinstance(node, ast.ClassDef) and node.name in CLASSES}
    missing = set(CLASSES) - set(classes)
    if missing:
        raise SystemExit(f"{wheel}: has no {', '.join(sorted(missing))}")
    version = wheel.name.split("-")[1]
    table = {f"tensorrt-stubs {version}": classes, "NVIDIA/TensorRT 768d994b (8.5)": VERSION_8_5}
    PLACE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def readable(text: str) -> ast.Module:
    """The stub's tree without the few signatures that are no Python (a parameter without a default behind one that has one)."""
    lines = text.splitlines()
    while True:
        try:
            return ast.parse("\n".join(lines))
        except SyntaxError as error:
            line = lines[(error.lineno or 1) - 1]
            if not line.lstrip().startswith("def "):
                raise
            lines[(error.lineno or 1) - 1] = line[: len(line) - len(line.lstrip())] + "def _unreadable(self):" + " ..." * line.rstrip().endswith("...")
            sys.stdout.write(f"left out: {line.strip()[:100]}\n")


def members(node: ast.ClassDef) -> dict[str, list[list[str]] | None]:
    """Name -> the parameters of each overload, or None for what is no method."""
    found: dict[str, list[list[str]] | None] = {}
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            found[item.target.id] = None
        elif isinstance(item, ast.FunctionDef):
            is_property = any(ast.unparse(decorator).endswith(("property", ".setter")) for decorator in item.decorator_list)
            if is_property and not item.name.startswith("__"):
                found[item.name] = None
            elif not is_property and (not item.name.startswith("__") or item.name == "__init__"):
                names = [argument.arg for argument in (*item.args.posonlyargs, *item.args.args, *item.args.kwonlyargs)][1:]
                overloads = found.setdefault(item.name, [])
                assert overloads is not None
                overloads.append(names)
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
