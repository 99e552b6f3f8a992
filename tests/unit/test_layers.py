# SPDX-License-Identifier: Apache-2.0
"""Who may import what. The stages never import each other; a device needs numpy, one engine and a few files of the core."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAGES = ("train", "quantize", "export", "targets", "runtimes")
CORE = {path.stem for path in (ROOT / "core").glob("*.py")} - {"__init__"} | {"report", "commands"}
# The top of the core calls the stages; everything else in it is bottom, and a file that must reach a stage is added here.
TOP = {
    "pipeline",
    "cli",
    "commands",
    "console",
    "select",
    "report",
    "source",
    "zoo_source",
    "zoo_table",
    "cost_model",
    "estimates",
    "lint_bundle",
    "post_training",
    "module_training",
    "sensitivity_model",
    "auto_recipe",
    "bench_bundle",
    "foreign_model",
    "run_bundle",
    "layerwise",
    "candidates",
    "bundle_candidates",
    "report_bundle",
    "artifact",
    "tuning",
    "tree_bundle",
    "split_bundle",
}
DEVICE = {
    "spec",
    "errors",
    "bundle",
    "numpy_file",
    "session",
    "compare",
    "bench",
    "measurement",
    "conditions",
    "affinity",
    "loadgen",
}  # what `runtimes` needs of the core: numpy alone
ONNX = {"onnx", "onnx_ir", "google"}  # google.protobuf is what onnx stands on
# Libraries beside numpy, by folder; a target or an engine brings its own (OWN).
LIBRARIES = {
    "train": {"torch", "sklearn", "torchmetrics", "pycocotools", "PIL"},
    "quantize": {"torch", "brevitas", "onnxruntime", *ONNX},
    "export": {"torch", "brevitas", "onnxscript", "onnxruntime", *ONNX},
    "targets": ONNX,
    "runtimes": set(),
}
TOP_LIBRARIES = {"typer", "click", "rich", "PIL", *ONNX}
OWN = {
    # In the core only inside a function: whoever does not use it does not need it.
    "core/dataset": {"PIL"},
    "core/loadgen": {"mlperf_loadgen"},
    "core/float_model": {"onnxruntime"},
    "core/source": {"torch"},
    "core/module_training": {"torch"},
    "core/zoo_source": {"torch"},
    "targets/tflite": {"ai_edge_litert", "flatbuffers"},
    "targets/jetson": {"tensorrt_rtx", "tensorrt"},
    "targets/hls4ml": {"hls4ml"},
    "targets/trees": {"conifer"},
    "export/trees_sklearn.py": {"skops"},
    "runtimes/onnxruntime": {"onnxruntime"},
    "runtimes/pynq": {"pynq"},
    "runtimes/tflite": {"ai_edge_litert", "tflite_runtime"},  # two names of one engine
    "runtimes/tensorrt": {"tensorrt"},
    "runtimes/openvino": {"openvino"},
}


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Every imported module with a dot path, and whether the import stands inside a function. `if TYPE_CHECKING` does not run and does not count."""

    def visit(node: ast.AST, lazy: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            yield from ((alias.name, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            # `from isthmus import spec` and `from isthmus.targets import tflite` import a module, not a name of one.
            yield from ((f"{module}.{alias.name}" if module.count(".") < 2 and module.startswith("isthmus") else module, lazy) for alias in node.names)
        inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), False)


def broken_rule(file: str, module: str, lazy: bool) -> str | None:
    """Why the file (relative, with /) may not import the module; None where it may."""
    folder, name = file.split("/")[0], file.split("/")[1].removesuffix(".py")
    first, second, third = (*module.split("."), "", "")[:3]
    top = folder == "core" and (name in TOP or name == "__init__")
    if first in (*STAGES, "core"):
        return f"a second copy of our modules: import isthmus.{module}"
    if first == "isthmus" and second in STAGES:
        if folder == "core":
            return None if top and lazy else "the core reaches a stage only from its top files, inside a function"
        if folder != second:
            return "the stages never import each other"
        parts = file.split("/")
        alone = folder in ("targets", "runtimes") and len(parts) > 2 and third not in ("", parts[1]) and (ROOT / folder / third).is_dir()
        return f"one folder of {folder} never imports another" if alone else None
    if first == "isthmus":
        if folder == "core" and not top and second in TOP:
            return "a bottom file of the core imports no top file"
        limited = folder == "runtimes" or (folder == "core" and name in DEVICE)
        return "a device has only " + ", ".join(sorted(DEVICE)) if limited and second in CORE - DEVICE else None
    if folder == "core":
        own = OWN.get(f"core/{name}", set()) if lazy else set()
        allowed = own | (TOP_LIBRARIES if top else set() if name in DEVICE else ONNX)
    else:
        allowed = LIBRARIES[folder] | OWN.get("/".join(file.split("/")[:2]), set())
    if first == "numpy" or first in allowed or first in sys.stdlib_module_names:
        return None
    return f"library {first!r} does not belong here"


def sources() -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for folder in ("core", *STAGES) for path in (ROOT / folder).rglob("*.py"))


def test_every_import_keeps_to_the_table() -> None:
    files = sources()
    assert len(files) > 30
    broken = [f"{file} imports {module}: {rule}" for file in files for module, lazy in imports(ROOT / file) if (rule := broken_rule(file, module, lazy))]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("file", "module", "lazy"),
    [
        ("train/loop.py", "isthmus.quantize.qat", True),
        ("targets/tflite/lower.py", "torch", True),
        ("targets/tflite/lower.py", "isthmus.targets.cpu.lower", True),
        ("runtimes/tflite/__init__.py", "onnx", True),
        ("runtimes/tflite/__init__.py", "onnxruntime", False),
        ("runtimes/tflite/__init__.py", "isthmus.graph", True),
        ("core/bundle.py", "onnx", True),
        ("core/session.py", "isthmus.graph", True),
        ("core/form.py", "isthmus.targets", True),
        ("core/graph.py", "isthmus.pipeline", True),
        ("core/pipeline.py", "isthmus.export.to_graph", False),
        ("core/cli.py", "torch", True),
        ("core/source.py", "torch", False),
        ("export/check.py", "export", False),
    ],
)
def test_the_table_forbids(file: str, module: str, lazy: bool) -> None:
    assert broken_rule(file, module, lazy)


def test_every_source_names_its_licence() -> None:
    files = [*sources(), *(path.relative_to(ROOT).as_posix() for folder in ("tests", "benchmarks") for path in (ROOT / folder).rglob("*.py"))]
    bare = [
        file
        for file in files
        if not (ROOT / file).read_text(encoding="utf-8").removeprefix("#!/usr/bin/env python3\n").startswith("# SPDX-License-Identifier: Apache-2.0\n")
    ]
    assert not bare
