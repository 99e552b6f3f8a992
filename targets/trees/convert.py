# SPDX-License-Identifier: Apache-2.0
"""`python -m isthmus.targets.trees.convert`, in the artifact's folder: features.json -> project/ (Vitis HLS) and csim/model.json, by conifer."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from isthmus.targets.trees import simulation

NO_FEATURE = -2  # conifer's mark of a leaf, from scikit-learn


def main() -> int:
    from conifer.model import make_model

    ensemble = json.loads(Path(simulation.SIDE_FILE).read_bytes())
    config = json.loads(Path(simulation.CONFIG_FILE).read_bytes())
    precision = {
        "InputPrecision": f"ap_fixed<{ensemble['feature_bits']},{ensemble['feature_bits']}>",
        "ThresholdPrecision": f"ap_fixed<{ensemble['feature_bits']},{ensemble['feature_bits']}>",
        "WeightPrecision": "ap_ufixed<1,1>",
        "ScorePrecision": f"ap_fixed<{ensemble['score_bits']},{ensemble['score_bits']}>",
    }
    common = {"ProjectName": simulation.PROJECT_NAME, **precision}
    project = {"Backend": "xilinxhls", "OutputDir": simulation.PROJECT_FOLDER, "XilinxPart": config["part"], "ClockPeriod": config["clock_ns"], "Unroll": True}
    model = make_model(conifer_ensemble(ensemble), {**common, **project})
    model._metadata = []  # the name of this machine and of its user
    model.write()
    emulation = make_model(conifer_ensemble(ensemble), {**common, "Backend": "cpp", "OutputDir": "csim"})
    emulation._metadata = []
    emulation.save(simulation.MODEL_FILE)
    for path in (Path(simulation.MODEL_FILE), Path(simulation.PROJECT_FOLDER) / f"{simulation.PROJECT_NAME}.json"):
        _without_paths(path)
    sys.stdout.write(f"{len(ensemble['trees'])} trees to a Vitis HLS project for {config['part']}\n")
    return 0


def conifer_ensemble(ensemble: Mapping[str, Any]) -> dict[str, Any]:
    """conifer's dictionary: one list of trees an output, as long as the longest, filled up with leaves of 0."""
    features = len(ensemble["used"])
    columns = [[tree for tree in ensemble["trees"] if any(row[output] for row in tree["value"])] for output in range(ensemble["sums"])]
    count = max(1, *(len(column) for column in columns))
    trees = [
        [_conifer_tree(column[index] if index < len(column) else None, output, features) for output, column in enumerate(columns)] for index in range(count)
    ]
    return {
        "max_depth": max(1, *(_depth(tree) for row in trees for tree in row)),
        "n_trees": count,
        "n_classes": ensemble["sums"] if ensemble["sums"] > 2 else 2,  # 2 means one output to conifer
        "n_features": features,
        "trees": trees,
        "init_predict": ensemble["base"],
        "norm": 1,
        "library": "isthmus",
        "splitting_convention": "<=",
    }


def _conifer_tree(tree: Mapping[str, Any] | None, output: int, features: int) -> dict[str, Any]:
    if tree is None:
        return _columns([NO_FEATURE], [0], [-1], [-1], [0], features)
    leaf = [feature < 0 for feature in tree["feature"]]
    values = [row[output] if is_leaf else 0 for row, is_leaf in zip(tree["value"], leaf, strict=True)]
    left, right = ([-1 if is_leaf else child for child, is_leaf in zip(tree[side], leaf, strict=True)] for side in ("left", "right"))
    feature = [NO_FEATURE if is_leaf else index for index, is_leaf in zip(tree["feature"], leaf, strict=True)]
    return _columns(feature, tree["threshold"], left, right, values, features)


def _columns(
    feature: Sequence[int], threshold: Sequence[int], left: Sequence[int], right: Sequence[int], value: Sequence[int], features: int
) -> dict[str, Any]:
    weight = [[1 if index == chosen else 0 for index in range(features)] for chosen in feature]  # conifer multiplies every feature: one-hot picks
    return {
        "feature": list(feature),
        "threshold": list(threshold),
        "children_left": list(left),
        "children_right": list(right),
        "value": value,
        "weight": weight,
    }


def _depth(tree: Mapping[str, Any], node: int = 0) -> int:
    depth, level = 0, [node]
    while level := [index for index in level if tree["children_left"][index] >= 0]:
        level = [child for index in level for child in (tree["children_left"][index], tree["children_right"][index])]
        depth += 1
    return depth


def _without_paths(path: Path) -> None:
    """conifer writes its absolute output folder into the model's file."""
    model = json.loads(path.read_bytes())
    model["config"]["output_dir"] = "."
    path.write_text(json.dumps(model, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
