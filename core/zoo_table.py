# SPDX-License-Identifier: Apache-2.0
"""`isthmus zoo table`: a row a system, from its bundles alone: every figure was computed or measured when they were compiled and benched."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from isthmus.bench_bundle import read_measurements
from isthmus.bundle import Bundle
from isthmus.console import grid
from isthmus.cost import cost_of_graph
from isthmus.errors import IsthmusError
from isthmus.estimates import estimates_on
from isthmus.form_file import load_form
from isthmus.graph import QuantGraph
from isthmus.measurement import Measurement

JETSONS = ("jetson-orin-nano", "jetson-orin-nx-16gb", "jetson-agx-orin-64gb")  # whose latency is predicted, in this order
NONE = "–"


@dataclass(frozen=True)
class Row:
    """`system` is NAME@PRESET; `onnx`, `tflite`, `tensorrt` and `hls4ml` say what the target made of it, beginning with the preset where it is another."""

    system: str
    metric: str
    samples: int | None
    data: str
    float_metric: float | None
    int8_metric: float | None
    parameters: int
    macs: int
    onnx: str
    tflite: str
    tensorrt: str
    hls4ml: str
    measured_on: tuple[str, ...]


@dataclass(frozen=True)
class _Opened:
    bundle: Bundle
    graph: QuantGraph
    measurements: Mapping[str, Measurement]

    @property
    def name(self) -> str:
        return str(self.bundle.manifest["name"])

    def artifact(self, target: str) -> tuple[str, Mapping[str, Any]] | None:
        """(profile, manifest entry) of the first artifact for `target`."""
        return next(((profile, entry) for profile, entry in self.bundle.manifest["artifacts"].items() if entry["target"] == target), None)


def zoo_rows(paths: Sequence[Path]) -> list[Row]:
    """A row for each system among the bundles, in their order: the first of a system gives its figures, each target's cell the first that has an artifact.

    Raises `IsthmusError` where a folder is no bundle of a network.
    """
    systems: dict[str, list[_Opened]] = {}
    for path in paths:
        opened = _open(path)
        systems.setdefault(opened.name.partition("@")[0], []).append(opened)
    return [_row(bundles) for bundles in systems.values()]


def _open(path: Path) -> _Opened:
    bundle = Bundle.open(path)
    form = load_form(bundle.model)
    if not isinstance(form, QuantGraph):
        raise IsthmusError(f"{path}: holds a tree model; the zoo's table is of networks")
    return _Opened(bundle, form, read_measurements(bundle))


def _row(bundles: Sequence[_Opened]) -> Row:
    first = bundles[0]
    task = first.bundle.manifest["task"] or {}
    cost = cost_of_graph(first.graph)
    data = (first.bundle.manifest["data"] or {}).get("evaluation") or ""
    return Row(
        first.name, str(task.get("metric", "")), task.get("samples"), str(data), task.get("float"), task.get("reference"), cost.parameters, cost.macs,
        onnx=_cell(bundles, "cpu", _onnx), tflite=_cell(bundles, "tflite", _tflite), tensorrt=_cell(bundles, "jetson", _tensorrt),
        hls4ml=_cell(bundles, "hls4ml", _hls4ml), measured_on=_machines(bundles),
    )  # fmt: skip


def _cell(bundles: Sequence[_Opened], target: str, described: Callable[[_Opened, str, Mapping[str, Any]], str]) -> str:
    for opened in bundles:
        found = opened.artifact(target)
        if found is not None:
            preset = "" if opened is bundles[0] else f"{opened.name.partition('@')[2]}: "
            return preset + described(opened, *found)
    return NONE


def _machines(bundles: Sequence[_Opened]) -> tuple[str, ...]:
    """The conditions of every valid measurement, each once."""
    valid = [measured for opened in bundles for measured in opened.measurements.values() if measured.valid]
    said = (f"{measured.conditions.get('cpu_model') or 'an unnamed processor'}, threads: {measured.conditions.get('threads')}" for measured in valid)
    return tuple(dict.fromkeys(said))


def _onnx(opened: _Opened, profile: str, entry: Mapping[str, Any]) -> str:
    return f"{(opened.bundle.model).stat().st_size:,} bytes, {_latency(opened, profile)}"


def _tflite(opened: _Opened, profile: str, entry: Mapping[str, Any]) -> str:
    return f"{agreement(entry)}, {_latency(opened, profile)}"


def _tensorrt(opened: _Opened, profile: str, entry: Mapping[str, Any]) -> str:
    found = estimates_on(str(opened.bundle.root), opened.graph, JETSONS)
    likely = [min((one.latency_s[1] for one in estimates if one.latency_s and "super" not in one.label), default=None)
              if not isinstance(estimates, str) else None for estimates in found.values()]  # fmt: skip
    times = " / ".join(NONE if seconds is None else f"{1e3 * seconds:.2g}" for seconds in likely)
    return f"{compiled_by_tensorrt(entry)}; {times} ms predicted"


def compiled_by_tensorrt(entry: Mapping[str, Any]) -> str:
    """Whether TensorRT-RTX took a Jetson's graph when it was compiled."""
    return "compiles" if any(step["status"] == "done" and "TensorRT-RTX" in step["detail"] for step in entry["steps"]) else "not compiled here"


def _hls4ml(opened: _Opened, profile: str, entry: Mapping[str, Any]) -> str:
    part = f" up to {', '.join(entry['cut'])}" if "cut" in entry else ""
    return f"{agreement(entry)}{part}, {profile}" if entry["verification"] else f"converted{part} for {profile}, not simulated"


def agreement(entry: Mapping[str, Any]) -> str:
    """How the artifact's outputs agreed with the integer reference when it was compiled."""
    compared = sum(one["compared"] for one in entry["verification"])
    unequal = sum(one["mismatched"] for one in entry["verification"])
    if not compared:
        return "not compared"
    if not unequal:
        return "bit-exact"
    return f"{100 * (1 - unequal / compared):.3f} % equal, at most {max(one['max_lsb'] for one in entry['verification'])} steps off"


def _latency(opened: _Opened, profile: str) -> str:
    measured = opened.measurements.get(profile)
    return "not measured" if measured is None or not measured.valid else f"{measured.p50_ns / 1e6:.3g} ms"


# ---- shown
HEADER = ["system", "metric", "float", "int8", "parameters", "MACs", "ONNX", "TFLite", "TensorRT", "hls4ml"]


def text_table(rows: Sequence[Row]) -> str:
    """For a terminal, with what the columns mean below."""
    return "\n".join([grid(HEADER, [_cells(row) for row in rows]), "", *explained(rows)])


def markdown_table(rows: Sequence[Row]) -> str:
    table = markdown([HEADER, ["---"] * 2 + ["---:"] * 4 + ["---"] * 4, *(_cells(row) for row in rows)])
    return "\n".join([table, "", *(f"- {line}" for line in explained(rows))])


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Cells as a table; the second line is the rule."""
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def rows_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]


def explained(rows: Sequence[Row]) -> list[str]:
    """What the figures are of: a line a system on its data, then what holds for all."""
    of = [f"{row.system}: {row.metric} on {row.samples} samples of {row.data}." for row in rows if row.samples]
    machines = dict.fromkeys(machine for row in rows for machine in row.measured_on)
    common = (
        "Parameters and MACs are the compiled graph's: batch normalisation folded, operators rewritten."
        f" Latencies of ONNX and TFLite are p50 of one inference at a time ({'; '.join(machines) or 'none was measured'}). TensorRT's are predicted, for"
        f" {', '.join(JETSONS)}, in the board's default clocks and fastest precision. Agreement is with the integer reference, on every golden sample."
    )
    return [*of, common]


def _cells(row: Row) -> list[str]:
    figures = [NONE if value is None else f"{value:.4f}" for value in (row.float_metric, row.int8_metric)]
    return [row.system, row.metric, *figures, f"{row.parameters:,}", f"{row.macs:,}", row.onnx, row.tflite, row.tensorrt, row.hls4ml]
