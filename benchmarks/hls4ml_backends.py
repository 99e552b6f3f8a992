# SPDX-License-Identifier: Apache-2.0
"""Tiny models through every backend of hls4ml: the C simulation that g++ compiles against the reference, or the rule that refuses.

`python benchmarks/hls4ml_backends.py [MODEL ...] [--backend Catapult] [--table FILE] [--docs docs/hls4ml.md]`: FILE is JSON and keeps what earlier
runs found; `--docs` writes the table between the markers of that document. A difference ends with 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from hls4ml_models import EXACT, MODELS, compared, noise, written

from isthmus.errors import IsthmusError, ProblemsError
from isthmus.graph import QuantGraph
from isthmus.plan import execute
from isthmus.profile import load_profile
from isthmus.targets.hls4ml import TARGET
from isthmus.targets.hls4ml.backends import BACKENDS

# A backend and an io type; Vitis has a table of its own (hls4ml_models.py).
RUNS = tuple((name, io_type) for name, backend in BACKENDS.items() if name != "Vitis" for io_type in backend.io_types)
BOARDS = {"oneAPI": "arria10-gx1150", "Libero": "polarfire-mpf300t"}
BEGIN, END = "<!-- benchmarks/hls4ml_backends.py writes this -->", "<!-- to here: backends -->"


def result(graph: QuantGraph, backend: str, io_type: str) -> str:
    """ "exact", the rule that refuses, how many values differ, or the step that failed with the last line of its log."""
    profile = load_profile(BOARDS.get(backend, "pynq-z2"))
    try:
        problems = TARGET.check(graph, profile)
        plan = None if problems else TARGET.plan(graph, profile, {"io_type": io_type, "backend": backend})
    except ProblemsError as error:
        problems, plan = list(error.problems), None
    if plan is None:
        return f"refused: {problems[0].rule}"
    with tempfile.TemporaryDirectory() as folder:
        try:
            execute(plan, Path(folder))
        except IsthmusError as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            return f"failed: {next((line for line in lines[1:] if 'error' in line.lower()), lines[-1])[:160]}"
        return compared(graph, plan, Path(folder), noise(graph))


def markdown(table: dict[str, dict[str, str]]) -> str:
    columns = [" ".join(run) for run in RUNS]
    lines = [f"| model | {' | '.join(columns)} |", f"|{'---|' * (len(columns) + 1)}"]
    lines += [f"| {name} | {' | '.join(row.get(column, 'not run') for column in columns)} |" for name, row in sorted(table.items())]
    counts = [f"{[row.get(column) for row in table.values()].count(EXACT)} of {sum(column in row for row in table.values())} in {column}" for column in columns]
    return "\n".join([*lines, "", f"Exact: {', '.join(counts)}."])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", help="names of tiny models (default: all of the portable scheme)")
    parser.add_argument("--backend", choices=sorted({name for name, _ in RUNS}), action="append", help="default: all but Vitis")
    parser.add_argument("--table", type=Path, help="JSON: model -> backend and io type -> result")
    parser.add_argument("--docs", type=Path)
    parser.add_argument("--only-docs", action="store_true", help="run nothing, write what --table holds")
    options = parser.parse_args()
    table: dict[str, dict[str, str]] = json.loads(options.table.read_text()) if options.table and options.table.is_file() else {}
    for name in [] if options.only_docs else options.models or sorted(path.stem for path in MODELS.glob("*.onnx")):
        graph = QuantGraph.load(MODELS / f"{name}.onnx")
        if graph.recipe.scheme != "power_of_two":
            continue
        for backend, io_type in RUNS:
            column = f"{backend} {io_type}"
            if (options.backend and backend not in options.backend) or column in table.get(name, {}):
                continue
            table.setdefault(name, {})[column] = found = result(graph, backend, io_type)
            print(f"{name:32} {column:32} {found}", flush=True)
            if options.table:
                options.table.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    if options.docs:
        written(options.docs, BEGIN, END, markdown(table))
    else:
        print(markdown(table))
    return int(any("differ" in found or "failed" in found for row in table.values() for found in row.values()))


if __name__ == "__main__":
    sys.exit(main())
