# SPDX-License-Identifier: Apache-2.0
"""`python -m isthmus.targets.trees.check_project [SAMPLES]`, in the artifact's folder: the HLS code of project/, by g++, against conifer's C++ backend.

Not part of a compile: every node is code, and g++ takes about ten seconds for five hundred comparisons. Ends with 1 at the first difference.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from isthmus.targets.trees import simulation
from isthmus.targets.trees.compile_simulation import compiled

SAMPLES = 200


def main(arguments: Sequence[str]) -> int:
    if len(arguments) > 1 or any(not word.isdecimal() or int(word) < 1 for word in arguments):
        sys.stdout.write("expected at most one argument, how many samples\n")
        return 2
    if not Path(simulation.SIDE_FILE).is_file() or not Path(simulation.LIBRARY_FILE).is_file():
        sys.stdout.write(f"no tree artifact here ({Path.cwd()}): compile trees for an FPGA board, and run this in artifacts/<profile>/\n")
        return 1
    ensemble = json.loads(Path(simulation.SIDE_FILE).read_bytes())
    code = compiled(simulation.PROJECT_SOURCE_FILE, simulation.PROJECT_LIBRARY_FILE, (*simulation.PROJECT_FLAGS, f"-I{simulation.PROJECT_FOLDER}/firmware"))
    if code:
        return code
    samples = _samples(ensemble, int(arguments[0]) if arguments else SAMPLES)
    expected, found = (np.zeros((len(samples), ensemble["sums"])) for _ in range(2))
    backend, project = (ctypes.CDLL(str(Path(name).resolve())) for name in (simulation.LIBRARY_FILE, simulation.PROJECT_LIBRARY_FILE))
    backend.trees_open.restype = ctypes.c_void_p
    model = ctypes.c_void_p(backend.trees_open(str(Path(simulation.MODEL_FILE).resolve()).encode()))
    for sample, wanted, given in zip(samples, expected, found, strict=True):
        backend.trees_run(model, sample.ctypes.data_as(ctypes.c_void_p), len(sample), wanted.ctypes.data_as(ctypes.c_void_p), len(wanted))
        project.project_run(sample.ctypes.data_as(ctypes.c_void_p), given.ctypes.data_as(ctypes.c_void_p))
    different = int((expected != found).any(axis=1).sum())
    spread = len(np.unique(expected, axis=0))
    sys.stdout.write(f"{different} of {len(samples)} samples differ between the HLS project and conifer's C++ backend ({spread} different results)\n")
    return int(different > 0)


def _samples(ensemble: dict[str, list[int]], count: int) -> np.ndarray:
    """float64 (count, features) of integers over each feature's range; in every second sample each feature is a threshold of its own, or one above."""
    generator = np.random.default_rng(0)
    low, high = np.array(ensemble["lowest"]), np.array(ensemble["highest"])
    samples = generator.integers(low, high + 1, (count, len(low)))
    thresholds: dict[int, list[int]] = {}
    for tree in ensemble["trees"]:
        for feature, threshold in zip(tree["feature"], tree["threshold"], strict=True):  # type: ignore[index]  # a tree is a dictionary
            if feature >= 0:
                thresholds.setdefault(feature, []).append(threshold)
    for feature, values in thresholds.items():
        near = generator.choice(values, len(samples[::2])) + generator.integers(0, 2, len(samples[::2]))
        samples[::2, feature] = np.clip(near, low[feature], high[feature])
    return np.ascontiguousarray(samples, np.float64)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
