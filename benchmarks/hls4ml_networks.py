# SPDX-License-Identifier: Apache-2.0
"""The FPGA networks through hls4ml: the C simulation against the integer reference, or what refuses it, and the designs that the search finds.

`python benchmarks/hls4ml_networks.py [NETWORK ...] [--io io_stream] [--boards pynq-z2 ...] [--fresh] [--table FILE] [--docs docs/hls4ml.md]`: FILE is JSON
and keeps what earlier runs found; `--docs` writes the tables between the markers of that document. `--fresh` takes no simulation that an earlier run
compiled: only then do the seconds say what g++ takes. Ends with 1 where a value differs or a search takes a minute.

The demo's network is trained and fine-tuned on its scans. Of the others the weights are seeded random numbers; their batch norms have seen 32 stand-in
samples, and the ranges are calibrated on them. Compared are 64 other samples, stand-ins or scans, and 64 of noise and blocks
over all of int8, which saturate.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hls4ml_models import IO_TYPES, SAMPLES, compared, noise, written
from networks import NETWORKS as TIMED
from torch import nn

import isthmus
from isthmus import reference
from isthmus.errors import ProblemsError
from isthmus.graph import QuantGraph
from isthmus.plan import execute
from isthmus.profile import load_profile
from isthmus.targets.hls4ml import TARGET, calibration, estimate, simulation
from isthmus.train import zoo
from isthmus.train.data import digits
from isthmus.train.zoo import exoplanet_vetting

BEGIN, END = "<!-- benchmarks/hls4ml_networks.py writes this -->", "<!-- to here: networks -->"
BOARDS = ("pynq-z2", "kv260", "zcu104")
CALIBRATION = 32
SEARCH_LIMIT_S = 60.0
DEMO = "digits@c2"


@dataclass(frozen=True)
class Subject:
    """`name` is the zoo's, or that of a network made here; `build()` gives it with random weights."""

    name: str
    shape: tuple[int, ...]
    build: Callable[[], nn.Module]

    def samples(self, count: int, seed: int) -> np.ndarray:
        """Coarse patches with grain over them, in -1 to 1: edges and flat areas, as images and folded light curves have."""
        generator = np.random.default_rng(seed)
        patches = generator.uniform(-0.8, 0.8, (count, self.shape[0], *(-(-extent // 4) for extent in self.shape[1:])))
        for axis, extent in enumerate(self.shape[1:], start=2):
            patches = patches.repeat(4, axis=axis).take(np.arange(extent), axis=axis)
        return np.clip(patches + generator.normal(0, 0.1, patches.shape), -1, 1).astype(np.float32)

    def form(self, folder: Path) -> tuple[QuantGraph, np.ndarray]:
        """The int8 form, and samples it was not calibrated on."""
        if self.name == DEMO:
            bundle = isthmus.compile(f"{zoo.PREFIX}{self.name}", targets=["null"], recipe="portable-qat", tune=False, output=folder / "bundle")
            return QuantGraph.load(bundle.model), digits.load(0).x_test[:SAMPLES]
        torch.manual_seed(0)
        module, samples = self.build().train(), self.samples(CALIBRATION, 0)
        with torch.no_grad():
            for batch in torch.from_numpy(samples).split(8):
                module(batch)
        bundle = isthmus.compile(module.eval(), torch.from_numpy(samples[:1]), targets=["null"], data=samples, tune=False, output=folder / "bundle")
        return QuantGraph.load(bundle.model), self.samples(SAMPLES, 1)


def _of_zoo(name: str, part: str = "") -> Subject:
    """A preset as it is deployed, or one `part` of it."""
    system, preset = zoo.parse(f"{zoo.PREFIX}{name}")
    build = system.network if isinstance(system, zoo.ZooSystem) and not part else system.module
    shape = system.input_shape(system.configuration(preset))[1:]
    return Subject(f"{name}, {part}" if part else name, shape, lambda: build(preset).get_submodule(part))


def _light_curves() -> nn.Module:
    """VGG11 in one dimension: 8, 16, 16, 32 and 32 channels, a pool of 3 with stride 2 behind each."""
    return exoplanet_vetting.SYSTEM.build(exoplanet_vetting.Config(((8,), (16,), (16,), (32,), (32,)), norm=False, classes=2))


def _light_field() -> nn.Module:
    """From four corner views, laid one on the other, what all 49 add to an interpolation: on the host."""
    return nn.Sequential(nn.Conv2d(4, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 49, 1))


SUBJECTS = {
    subject.name: subject
    for subject in (
        _of_zoo(DEMO),
        _of_zoo("medmnist@organa-nano"),
        _of_zoo("medmnist@organa-c2-quarter-average"),
        _of_zoo("medmnist@organa-c3-quarter-average"),
        _of_zoo("pneumonia_kd@fpga-s"),
        _of_zoo("pinn_denoise@fpga"),
        Subject("5 convolutions of exoplanet_vetting", (1, 201), _light_curves),
        Subject("student of prex_netii", (4, 16, 16), _light_field),
        _of_zoo("amfacpose@tinypose_fpga", "trunk"),
        Subject("resnet-8-32", TIMED["resnet-8-32"].input_shape[1:], TIMED["resnet-8-32"].build),
    )
}


# ---- the C simulation
def simulated(graph: QuantGraph, samples: np.ndarray, io_type: str, fresh: bool) -> dict[str, Any]:
    """`result`: "exact", what refuses, or how many values differ; with the processor seconds of both steps and of one sample."""
    profile = load_profile("pynq-z2")
    try:
        plan = TARGET.plan(graph, profile, {**profile.defaults, "io_type": io_type})
    except ProblemsError as error:
        return {"result": f"refused, {error.problems[0].rule}: {error.problems[0].found}"}
    (spec,) = graph.inputs
    feeds = {spec.name: np.concatenate([spec.quantise(samples), extremes(graph)[spec.name]])}
    with tempfile.TemporaryDirectory() as folder:
        if fresh:
            os.environ["XDG_CACHE_HOME"] = str(Path(folder) / "cache")
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        built = execute(plan, Path(folder) / "artifact")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        begun = time.process_time()
        found = compared(graph, plan, Path(folder) / "artifact", feeds)
        code = (Path(folder) / "artifact" / simulation.PROJECT_FOLDER / "firmware" / "model.cpp").read_text(encoding="utf-8")
    return {
        "result": found,
        "samples": len(feeds[spec.name]),
        "build_cpu_s": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "run_cpu_s": round(time.process_time() - begun, 2),
        "cached": "cache" in next(step.detail for step in built if step.name == "csim"),
        "deepest_fifo": max((int(line.rpartition("=")[2]) for line in code.splitlines() if "#pragma HLS STREAM" in line), default=0),
    }


def extremes(graph: QuantGraph) -> dict[str, np.ndarray]:
    """Noise over all of int8, and blocks of its two ends, which drive sums far beyond what was calibrated."""
    feeds = noise(graph)
    for array in feeds.values():
        blocks = array[::2]
        for axis in range(1, array.ndim):
            blocks = blocks.take(np.arange(array.shape[axis]) // 7 * 7 if axis > 1 else np.zeros(array.shape[axis], int), axis=axis)
        array[::2] = np.where(blocks < 0, -128, 127)
    return feeds


def saturated(graph: QuantGraph) -> float:
    """The share of all layers' results, on those, that lie at an end of int8."""
    values = reference.run_all(graph, extremes(graph))
    names = [node.output for node in graph.nodes if node.kind == "int8" and node.op != "Constant"]
    return float(np.mean([np.mean((values[name] == 127) | (values[name] == -128)) for name in names]))


# ---- the search
def searched(graph: QuantGraph, board: str) -> dict[str, Any]:
    """What the search finds for a board, and how long it takes with nothing known before: the fit to the published reports is part of it."""
    for cache in (estimate.factors, estimate.ratios, estimate._layer_quantity, calibration.published):
        cache.cache_clear()
    profile = load_profile(board)
    begun = time.process_time()
    plan = TARGET.plan(graph, profile, {**profile.defaults})
    seconds = time.process_time() - begun
    config = json.loads(plan.files[simulation.CONFIG_FILE])
    too_large = next((note for note in plan.notes if "[too-large]" in note), "")
    found = json.loads(plan.files[simulation.ESTIMATE_FILE])
    return {"search_cpu_s": round(seconds, 1), "io_type": config["io_type"], "too_large": too_large, **found}


# ---- the tables
def markdown(table: dict[str, dict[str, Any]]) -> str:
    lines = ["| network | parameters | saturated | io_parallel | io_stream | g++ and hls4ml, CPU s | 128 samples, CPU s |", "|---|---|---|---|---|---|---|"]
    for name, row in table.items():
        made = [row[io_type] for io_type in IO_TYPES if row.get(io_type, {}).get("samples")]
        shown = [row.get(io_type, {}).get("result", "not run") for io_type in IO_TYPES]
        seconds = [", ".join("cached" if one["cached"] else f"{one['build_cpu_s']:.0f}" for one in made), ", ".join(f"{one['run_cpu_s']:.1f}" for one in made)]
        lines.append(f"| {name} | {row['parameters']:,} | {100 * row['saturated']:.2g} % | {' | '.join(shown)} | {' | '.join(seconds)} |")
    lines += ["", "| network | board | design, estimated | latency, one sample every | search, CPU s |", "|---|---|---|---|---|"]
    for name, row in table.items():
        for board, one in row.get("boards", {}).items():
            used = ", ".join(f"{one[key]:,} of {one['available'][key]:,} {label}" for key, label in estimate.LABELS.items())
            speed = f"{one['latency_us']:.1f} us, {one['interval_cycles'] * one['clock_ns'] / 1000:.1f} us"
            lines.append(f"| {name} | {board} | {one['io_type']}{'' if one['fits'] else ', **does not fit**'}: {used} | {speed} | {one['search_cpu_s']:.1f} |")
    said = [
        f"- {name}: {one['too_large'].removeprefix('model: ')}" for name, row in table.items() for one in row.get("boards", {}).values() if one["too_large"]
    ]
    return "\n".join([*lines, "", "What does not fit says so:", "", *said] if said else lines)


def failed(table: dict[str, dict[str, Any]]) -> list[str]:
    """What does not hold: a difference, and a search that takes too long."""
    results = {f"{name} in {io_type}": row[io_type]["result"] for name, row in table.items() for io_type in IO_TYPES if io_type in row}
    wrong = [f"{name}: {result}" for name, result in results.items() if "differ" in result]
    searches = [(name, board, one["search_cpu_s"]) for name, row in table.items() for board, one in row.get("boards", {}).items()]
    return wrong + [f"{name} on {board}: the search took {seconds} s" for name, board, seconds in searches if seconds > SEARCH_LIMIT_S]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"default: all of {', '.join(SUBJECTS)}")
    parser.add_argument("--io", choices=IO_TYPES, action="append", help="default: both")
    parser.add_argument("--boards", nargs="*", default=list(BOARDS))
    parser.add_argument("--no-simulation", action="store_true", help="the search alone")
    parser.add_argument("--fresh", action="store_true", help="compile anew what was compiled before")
    parser.add_argument("--table", type=Path, help="JSON: network -> results")
    parser.add_argument("--docs", type=Path)
    parser.add_argument("--only-docs", action="store_true", help="run nothing, write what --table holds")
    options = parser.parse_args()
    if unknown := [name for name in options.networks if name not in SUBJECTS]:
        parser.error(f"no network {unknown[0]!r}: there are {', '.join(SUBJECTS)}")
    table: dict[str, dict[str, Any]] = json.loads(options.table.read_text()) if options.table and options.table.is_file() else {}
    for name in [] if options.only_docs else options.networks or list(SUBJECTS):
        with tempfile.TemporaryDirectory() as folder:
            graph, samples = SUBJECTS[name].form(Path(folder))
        parameters = sum(part.size for node in graph.nodes for part in (node.weight, node.bias) if part is not None)
        row = table.setdefault(name, {}) | {"parameters": parameters, "saturated": saturated(graph)}
        row["boards"] = row.get("boards", {}) | {board: searched(graph, board) for board in options.boards}
        for io_type in () if options.no_simulation else options.io or IO_TYPES:
            row[io_type] = simulated(graph, samples, io_type, options.fresh)
        table[name] = row
        print(json.dumps({name: row}, indent=1), flush=True)
        if options.table:
            options.table.write_text(json.dumps(table, indent=1) + "\n")
    table = {name: table[name] for name in SUBJECTS if name in table}
    if options.docs:
        written(options.docs, BEGIN, END, markdown(table))
    else:
        print(markdown(table))
    print(*failed(table), sep="\n")
    return int(bool(failed(table)))


if __name__ == "__main__":
    sys.exit(main())
