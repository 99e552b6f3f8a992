# SPDX-License-Identifier: Apache-2.0
"""`python -m isthmus.targets.hls4ml.convert`, in the artifact's folder: qonnx.onnx and hls_config.json -> project/, by hls4ml.

A process of its own: hls4ml prints, keeps global registries and reads its backends at import. Ends with 1 where a type that hls4ml
derived is not the one that was planned: a default would otherwise round without a word.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hls4ml
import onnx

from isthmus.targets.hls4ml.backends import BACKENDS
from isthmus.targets.hls4ml.completion import complete, missing_code, prepare
from isthmus.targets.hls4ml.extension import register
from isthmus.targets.hls4ml.simulation import BUILD_OPTIONS, CONFIG_FILE, EXTENSION_FILE, PROJECT_FOLDER, PROJECT_NAME, QONNX_FILE

# No layer may end with the default: it is one that no plan contains.
DEFAULT_PRECISION = "ap_fixed<65,33>"
CHECKED = ("result", "accum", "weight", "bias")
# Layers that only move values, some of them put in by hls4ml itself (in io_stream): their result has the type of their input.
MOVES = frozenset({"ZeroPadding2D", "Clone", "Repack"})


def main() -> int:
    config = json.loads(Path(CONFIG_FILE).read_text(encoding="utf-8"))
    register(config["backend"], Path(EXTENSION_FILE))
    model = converted(config, onnx.load(QONNX_FILE))
    problems = [*type_problems(model, config["layers"]), *border_problems(model, config), *missing_code(model)]
    for problem in problems:
        print(problem)
    if problems:
        return 1
    set_depths(model, config["fifo_depths"], config["layers"])
    write(model, config)
    print(f"{len(list(model.get_layers()))} HLS layers written with hls4ml {hls4ml.__version__}")
    return 0


def converted(config: Mapping[str, Any], proto: onnx.ModelProto) -> Any:
    """hls4ml's model of the QONNX file."""
    return hls4ml.converters.convert_from_onnx_model(
        proto,
        output_dir=PROJECT_FOLDER,
        project_name=PROJECT_NAME,
        backend=config["backend"],
        **{"part": config["part"], **config["settings"]},
        clock_period=config["clock_ns"],
        io_type=config["io_type"],
        hls_config={"Model": {"Precision": DEFAULT_PRECISION, "ReuseFactor": 1, "Strategy": "Latency"}, "LayerName": config["layers"]},
    )


def planned_name(layer: str, planned: Mapping[str, Any]) -> str:
    """The planned layer behind an HLS layer: hls4ml puts `Conv2D_`, `Dense_`, `bn_`, ... in front and `_act` behind. "" where there is none."""
    found = re.search(r"(?:^|_)((?:n|in|out)\d+_.*)$", layer)
    candidates = [found.group(1), found.group(1).removesuffix("_act")] if found is not None else []
    return next((name for name in candidates if name in planned), "")


def type_problems(model: Any, planned: Mapping[str, Any]) -> list[str]:
    backend = model.config.backend
    default = backend.convert_precision_string(DEFAULT_PRECISION)
    problems = []
    for layer in model.get_layers():
        if layer.class_name in MOVES:
            if layer.get_output_variable().type.precision != layer.get_input_variable().type.precision:
                problems.append(f"{layer.name} ({layer.class_name}): changes the type of what it moves")
            continue
        name = planned_name(layer.name, planned)
        if not name:
            problems.append(f"{layer.name} ({layer.class_name}) stands in no plan")
            continue
        wanted = planned[name]["Precision"]
        for kind in CHECKED:
            found = layer.types.get(f"{kind}_t")
            if found is None:
                continue
            if found.precision == default:
                problems.append(f"{layer.name} ({layer.class_name}): {kind} fell back to a default type")
            elif kind == "result" and wanted.get(kind) == "auto":
                problems += _derived_problem(layer.name, found.precision, name, planned, backend)
            elif kind in ("result", "accum") and kind in wanted and not _as_planned(kind, found.precision, backend.convert_precision_string(wanted[kind])):
                problems.append(f"{layer.name} ({layer.class_name}): {kind} is {found.precision}, planned {wanted[kind]}")
    return problems


def _as_planned(kind: str, found: Any, wanted: Any) -> bool:
    """The planned type, or an accumulator that holds all of it: Catapult's pools take a wider one."""
    holds = found.signed and found.integer >= wanted.integer and found.fractional >= wanted.fractional
    return found == wanted or (kind == "accum" and holds and (found.rounding_mode, found.saturation_mode) == (wanted.rounding_mode, wanted.saturation_mode))


def _derived_problem(label: str, found: Any, name: str, planned: Mapping[str, Any], backend: Any) -> list[str]:
    """A derived result is right where it is the rounding planned behind it, or holds the whole accumulator."""
    if found == backend.convert_precision_string(planned[f"{name}_quant"]["Precision"]["result"]):
        return []
    exact = backend.convert_precision_string(planned[name]["Precision"]["accum"])
    if found.signed and found.integer >= exact.integer and found.fractional >= exact.fractional:
        return []
    return [f"{label}: result was derived as {found}, which does not hold {exact}"]


def border_problems(model: Any, config: Mapping[str, Any]) -> list[str]:
    """The library's arguments stand in the order of the form's inputs and outputs, with the sizes of its tensors."""
    problems = []
    for side, found in (("inputs", model.get_input_variables()), ("outputs", model.get_output_variables())):
        sizes = [variable.size() for variable in found]
        if sizes != config[side]:
            problems.append(f"{side} have sizes {sizes}, planned {config[side]}")
    return problems


def set_depths(model: Any, depths: Mapping[str, int], planned: Mapping[str, Any]) -> None:
    """The planned depth of each stream. A stream of a layer that hls4ml put in by itself keeps hls4ml's own: the whole tensor."""
    for layer in model.get_layers():
        name = planned_name(layer.name, planned)
        if layer.class_name == "Input" or not name:
            continue
        wanted = depths.get(f"{name}/pad" if layer.class_name.startswith("ZeroPadding") else name)
        for output in layer.outputs if wanted is not None else ():
            variable = layer.get_output_variable(output)
            if isinstance(variable.pragma, tuple) and variable.pragma[0] == "stream":
                variable.pragma = ("stream", wanted)


def write(model: Any, config: Mapping[str, Any]) -> None:
    """The project, the same bytes for the same model: no random stamp, no copy of the model in the YAML file."""
    backend = BACKENDS[config["backend"]]
    model.config.config.pop("OnnxModel", None)
    prepare(model, backend)
    model.write()
    complete(model, backend, config)
    if backend.name == "Vitis":
        (Path(PROJECT_FOLDER) / "build_opt.tcl").write_text(BUILD_OPTIONS, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
