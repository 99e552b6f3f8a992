# SPDX-License-Identifier: Apache-2.0
"""Decisions of tree models against the libraries that trained them, on held-out samples: the reference, ONNX Runtime, and conifer's C++.

`python benchmarks/trees.py --data dataset.npz` (X and y: the Kepler light curves, for one), or without --data on scikit-learn's breast cancer
data. Needs isthmus[trees], scikit-learn and xgboost. The samples are divided 70 to 30; the test part is seen by nothing before the comparison.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import load_breast_cancer
from sklearn.ensemble import ExtraTreesClassifier, GradientBoostingClassifier, RandomForestClassifier

import isthmus
from isthmus.console import grid
from isthmus.tree_form import INPUT, OUTPUT, TreeForm

FLOOR = 0.995


def models() -> dict[str, Any]:
    """The two of the floor first."""
    from xgboost import XGBClassifier

    return {
        "forest, 32 trees, depth 6": RandomForestClassifier(32, max_depth=6, random_state=0),
        "XGBoost, 60 trees, depth 2": XGBClassifier(n_estimators=60, max_depth=2, random_state=0),
        "XGBoost, 100 trees, depth 4": XGBClassifier(n_estimators=100, max_depth=4, random_state=0),
        "extra trees, 32, depth 8": ExtraTreesClassifier(32, max_depth=8, random_state=0),
        "gradient boosting, 50, depth 3": GradientBoostingClassifier(n_estimators=50, max_depth=3, random_state=0),
    }


def samples(file: Path | None) -> tuple[np.ndarray, np.ndarray]:
    if file is None:
        x, y = load_breast_cancer(return_X_y=True)
    else:
        with np.load(file, allow_pickle=False) as archive:
            x, y = archive["X"], archive["y"]
    order = np.random.default_rng(0).permutation(len(y))
    return x.reshape(len(x), -1).astype(np.float32)[order], y[order]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--target", action="append", help="profiles (cpu, zcu104 where none is named)")
    arguments = parser.parse_args()
    profiles = arguments.target or ["cpu", "zcu104"]
    x, y = samples(arguments.data)
    train, test = slice(0, int(0.7 * len(y))), slice(int(0.7 * len(y)), None)
    rows = []
    for name, model in models().items():
        model.fit(x[train], y[train])
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            bundle = isthmus.compile(model, targets=profiles, data={INPUT: x[train]}, output=Path(folder) / "bundle")
            seconds = time.perf_counter() - started
            form = TreeForm.load(bundle.model)
            expected = model.predict(x[test])
            shares = [np.mean(form.run({INPUT: x[test]})[OUTPUT].argmax(axis=1) == expected)]
            for profile in profiles:
                with bundle.open_session(profile) as session:
                    shares.append(np.mean(session.run_samples({INPUT: x[test]})[OUTPUT].argmax(axis=1) == expected))
        accuracy = np.mean(expected == y[test])
        shown = [f"{100 * share:.2f} %" + ("" if share >= FLOOR else " BELOW") for share in shares]
        rows.append([name, f"{form.comparisons}", f"{form.feature_bits}", f"{form.score_bits}", f"{100 * accuracy:.2f} %", *shown, f"{seconds:.0f} s"])
    header = ["model", "comparisons", "feature bits", "score bits", "library's accuracy", "reference", *profiles, "compile"]
    print(f"{len(y[test])} held-out samples of {x.shape[1]} features: share of decisions equal to the library's (floor {100 * FLOOR:.1f} %)\n")
    print(grid(header, rows))


if __name__ == "__main__":
    main()
