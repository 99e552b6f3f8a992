# SPDX-License-Identifier: Apache-2.0
"""Every tiny model through hls4ml in io_parallel and io_stream: the C simulation against the reference, or the rule that refuses.

`python benchmarks/hls4ml_models.py [MODEL ...] [--io io_stream] [--table FILE] [--docs docs/hls4ml.md]`: FILE is JSON and keeps what earlier
runs found; `--docs` writes the table between the markers of that document. A difference ends with 1.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path

import hls4ml  # noqa: F401  # for the forks of `build`
import numpy as np

from isthmus import reference
from isthmus.errors import ProblemsError
from isthmus.graph import QuantGraph
from isthmus.plan import BuildPlan, write_files
from isthmus.profile import load_profile
from isthmus.runtimes.csim import open_session
from isthmus.targets.hls4ml import TARGET

MODELS = Path(__file__).parents[1] / "tests" / "models"
IO_TYPES = ("io_parallel", "io_stream")
SAMPLES = 64
BEGIN, END = "<!-- benchmarks/hls4ml_models.py writes this -->", "<!-- to here -->"
EXACT = "exact"


def result(graph: QuantGraph, io_type: str) -> str:
    """ "exact", the rule that refuses, or how many values differ."""
    profile = load_profile("pynq-z2")
    problems = TARGET.check(graph, profile)
    if problems:
        return f"refused: {problems[0].rule}"
    try:
        plan = TARGET.plan(graph, profile, {"io_type": io_type})
    except ProblemsError as error:
        return f"refused: {error.problems[0].rule}"
    with tempfile.TemporaryDirectory() as folder:
        build(plan, Path(folder))
        return compared(graph, plan, Path(folder), noise(graph))


def build(plan: BuildPlan, folder: Path) -> None:
    """As `isthmus.plan.execute`, but each step is a fork of this process: hls4ml, half of a small model's time, is imported once."""
    write_files(plan, folder)
    for step in plan.steps:
        if step.where == "host":
            log = folder / f"{step.name}.log"
            process = multiprocessing.get_context("fork").Process(target=_run_step, args=(step.argv[-1], folder, log))
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(f"step {step.name} ended with {process.exitcode}:\n{log.read_text(encoding='utf-8')[-2000:]}")


def _run_step(module: str, folder: Path, log: Path) -> None:
    os.chdir(folder)  # noqa: TID251  # of the fork alone; the step's own process would begin there
    with log.open("w", encoding="utf-8") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        sys.exit(importlib.import_module(module).main())


def noise(graph: QuantGraph) -> dict[str, np.ndarray]:
    """Samples over all of int8."""
    generator = np.random.default_rng(7)
    return {spec.name: generator.integers(-128, 128, (SAMPLES * spec.shape[0], *spec.shape[1:])).astype(np.int8) for spec in graph.inputs}


def compared(graph: QuantGraph, plan: BuildPlan, folder: Path, feeds: dict[str, np.ndarray]) -> str:
    """What was built in `folder` against the reference: "exact", or how many values differ."""
    expected = reference.run(graph, feeds)
    entry = {"artifact": plan.artifact, "inputs": [spec.to_json() for spec in plan.inputs], "outputs": [spec.to_json() for spec in plan.outputs]}
    with open_session(folder, entry) as session:
        found = session.run_samples(feeds)
    different = total = 0
    for spec in graph.outputs:
        same = found[spec.name] == expected[spec.name] if spec.is_quantised else np.isclose(found[spec.name], expected[spec.name], atol=1e-6)
        different, total = different + int((~same).sum()), total + same.size
    return EXACT if total and not different else f"{different} of {total} values differ"


def markdown(table: dict[str, dict[str, str]]) -> str:
    lines = ["| model | io_parallel | io_stream |", "|---|---|---|"]
    lines += [f"| {name} | {row.get(IO_TYPES[0], 'not run')} | {row.get(IO_TYPES[1], 'not run')} |" for name, row in sorted(table.items())]
    counts = []
    for io_type in IO_TYPES:
        found = [row[io_type] for row in table.values() if io_type in row]
        counts.append(f"{found.count(EXACT)} of {len(found)} in {io_type}")
    return "\n".join([*lines, "", f"Exact: {', '.join(counts)}."])


def written(docs: Path, begin: str, end: str, text: str) -> None:
    """Puts `text` between the markers of a document."""
    before, _, rest = docs.read_text(encoding="utf-8").partition(begin)
    docs.write_text(f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", help="names of tiny models (default: all of the portable scheme)")
    parser.add_argument("--io", choices=IO_TYPES, action="append", help="default: both")
    parser.add_argument("--table", type=Path, help="JSON: model -> io type -> result")
    parser.add_argument("--docs", type=Path)
    parser.add_argument("--only-docs", action="store_true", help="run nothing, write what --table holds")
    options = parser.parse_args()
    table: dict[str, dict[str, str]] = json.loads(options.table.read_text()) if options.table and options.table.is_file() else {}
    for name in [] if options.only_docs else options.models or sorted(path.stem for path in MODELS.glob("*.onnx")):
        graph = QuantGraph.load(MODELS / f"{name}.onnx")
        if graph.recipe.scheme != "power_of_two":
            continue
        for io_type in options.io or IO_TYPES:
            table.setdefault(name, {})[io_type] = found = result(graph, io_type)
            print(f"{name:32} {io_type:12} {found}", flush=True)
        if options.table:
            options.table.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    if options.docs:
        written(options.docs, BEGIN, END, markdown(table))
    else:
        print(markdown(table))
    return int(any("differ" in found for row in table.values() for found in row.values()))


if __name__ == "__main__":
    sys.exit(main())
