# SPDX-License-Identifier: Apache-2.0
"""Test accuracy of the demo's network, float and int8, over training seeds: `python benchmarks/demo_seeds.py [--seeds 5]`.

The split stays the same; the test part is used for these two figures only. Prints a table and the spread.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

import isthmus
from isthmus.console import grid
from isthmus.recipe import load_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    given = parser.parse_args()
    recipe = load_recipe("portable-qat")
    rows, changes = [], []
    for seed in range(given.seeds):
        with tempfile.TemporaryDirectory() as folder:
            bundle = isthmus.compile("zoo:digits", targets=["cpu"], recipe=replace(recipe, seed=seed), tune=False, output=Path(folder) / "bundle")
            task = bundle.manifest["task"]
            rows.append([str(seed), f"{task['float']:.4f}", f"{task['reference']:.4f}", f"{bundle.artifact('cpu')['accuracy']:.4f}", str(task["samples"])])
            changes.append(task["reference"] - task["float"])
    print(grid(["seed", "float", "int8 reference", "int8 cpu artifact", "test samples"], rows))
    print(f"\nint8 minus float: mean {statistics.mean(changes):+.4f}, worst {min(changes):+.4f}")


if __name__ == "__main__":
    main()
