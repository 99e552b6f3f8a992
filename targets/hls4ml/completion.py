# SPDX-License-Identifier: Apache-2.0
"""What hls4ml 1.3.0 leaves undone or wrong in the projects that it writes, put right where it is written. Needs hls4ml.

- Libero: a file of its writer is not in the wheel, an output that was fused into the layer in front has no struct, and the loop that writes the
  outputs runs over the inputs' size.
- VivadoAccelerator: the wrapper's types are hls4ml's own words for them ("fixed<8,4,TRN,WRAP,0>"), which are no C++.
- Catapult's and Libero's files name the folder in which they were written.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hls4ml
from hls4ml.model.types import InplaceTensorVariable
from hls4ml.writer.libero_writer import LiberoWriter

from isthmus.targets.hls4ml import simulation
from isthmus.targets.hls4ml.backends import Backend
from isthmus.targets.hls4ml.board_design import KERNEL_FILE, wrapper

STAMP = "isthmus"
PLACED = (".cpp", ".h", ".sh", ".txt", ".yml", ".tcl", "")  # text files in which a path or the stamp may stand


def prepare(model: Any, backend: Backend) -> None:
    """Before the project is written."""
    if backend.name == "Libero":
        model.config.backend.writer = _Writer()
        for variable in model.get_output_variables():
            if not hasattr(variable, "struct_name"):
                variable.struct_name = f"{variable.type.name[:-1]}array_t"


def complete(model: Any, backend: Backend, config: Mapping[str, Any]) -> None:
    """Behind the writer: the same bytes for the same model, wherever it was written."""
    if backend.name == "VivadoAccelerator":
        _name_types(Path(backend.firmware) / "model_axi.h", config["settings"])
    if config["board"] and backend.name != "VivadoAccelerator":
        (given,), (made,) = model.get_input_variables(), model.get_output_variables()
        text = wrapper(config["board"], config["io_type"], given.type.name, made.type.name, given.size(), made.size())
        Path(KERNEL_FILE).parent.mkdir(exist_ok=True)
        Path(KERNEL_FILE).write_text(text, encoding="utf-8")
    if backend.name == "oneAPI":
        weights = sorted((Path(backend.firmware) / "weights").glob("*.h"))
        Path(simulation.WEIGHTS_FILE).write_text("".join(f'#include "../{path.as_posix()}"\n' for path in weights), encoding="utf-8")
    if backend.copied:
        source, target = Path(hls4ml.__file__).parent / backend.copied[0], Path(backend.copied[1])
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    stamp, here = model.config.config["Stamp"], str(Path.cwd() / simulation.PROJECT_FOLDER)
    root = Path(simulation.PROJECT_FOLDER)
    for path in (*root.iterdir(), *(root / "src").glob("*"), *Path(backend.firmware).glob("*.[ch]*")):
        if path.is_file() and path.suffix in PLACED:
            text = path.read_text(encoding="utf-8")
            path.write_text(text.replace(stamp, STAMP).replace(here, "."), encoding="utf-8")


def missing_code(model: Any) -> list[str]:
    """Layers whose backend has no template: hls4ml leaves them out of the code without a word."""
    return [
        f"{layer.name} ({layer.class_name}): the backend has no code for it, hls4ml would leave it out"
        for layer in model.get_layers()
        if layer.class_name not in ("Input", "Constant") and not layer.get_attr("function_cpp") and not _in_place(layer)
    ]


def _in_place(layer: Any) -> bool:
    return all(isinstance(variable, InplaceTensorVariable) for variable in layer.get_variables())


def _name_types(header: Path, settings: Mapping[str, Any]) -> None:
    text = header.read_text(encoding="utf-8")
    for name, of in (("T_in", settings["input_type"]), ("T_out", settings["output_type"])):
        text = re.sub(rf"typedef [^;]* {name};", f"typedef {of} {name};", text)
    header.write_text(text, encoding="utf-8")


class _Writer(LiberoWriter):
    def write_project_cpp(self, model: Any) -> None:
        super().write_project_cpp(model)
        path = Path(model.config.get_output_dir()) / "firmware" / f"{simulation.PROJECT_NAME}.cpp"
        text = path.read_text(encoding="utf-8")
        for variable in model.get_output_variables():
            loop = rf"(\w+ {variable.name}_struct;\n +for \(unsigned i = 0; i < )[^;]*;"
            text, found = re.subn(loop, rf"\g<1>{variable.size_cpp()};", text)
            if found != 1:
                raise RuntimeError(f"{path}: the loop that writes {variable.name} is not where hls4ml 1.3.0 has it")
        path.write_text(text, encoding="utf-8")

    def write_build_script(self, model: Any) -> None:
        root, config = Path(model.config.get_output_dir()), model.config
        family, part, board = (config.get_config_value(key) for key in ("FPGAFamily", "Part", "Board"))
        clock = config.get_config_value("ClockPeriod")
        script = f"source $env(SHLS_ROOT_DIR)/examples/legup.tcl\nset_project {family} {part} {board}\nset_parameter CLOCK_PERIOD {clock}\n"
        (root / "config.tcl").write_text(script, encoding="utf-8")
        sources = f"firmware/{simulation.PROJECT_NAME}.cpp {simulation.PROJECT_NAME}_test.cpp"
        rules = f"NAME = {simulation.PROJECT_NAME}\nLOCAL_CONFIG = -legup-config=config.tcl\nSRCS = {sources}\nLEVEL = $(SHLS_ROOT_DIR)/examples\n"
        (root / "Makefile").write_text(f"{rules}include $(LEVEL)/Makefile.common\n", encoding="utf-8")
