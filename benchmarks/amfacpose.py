# SPDX-License-Identifier: Apache-2.0
"""AMFACPose: what it costs, that the path from image file to AP is right, and what int8 does to it: `python benchmarks/amfacpose.py --data FOLDER`.

- costs: parameters and MACs of every preset and of the paper's ablation rows, beside the paper's figures; seconds.
- overfit: FOLDER holds COCO key-point annotations and their images. The small presets learn its people by heart and are then judged on the image files:
  read, cropped, run, decoded, moved back, scored, pycocotools. AP on the people that were trained on checks the path and says nothing of quality.
- boxes: the float networks of `overfit` once more, with a detector's boxes, which FOLDER holds too: cut otherwise, many of nobody, people found twice.
- figures: trained on synthetic stick figures, where no files are needed, and judged crop by crop on figures that neither trained nor chose.

For overfit and figures: float, int8 by calibration, and int8 trained with the rounding (QAT, a quarter of the training's epochs); both by the portable
recipe, computed by the integer reference. Checkpoints and finished rows are kept in --work: a run that was stopped goes on. One seed each; an hour and
a half on one core. Exit code 1 where a promise is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from isthmus import reference
from isthmus.dataset import Dataset
from isthmus.export.module import onnx_from_module
from isthmus.export.prepare import prepare_float
from isthmus.graph import QuantGraph
from isthmus.post_training import PostTraining
from isthmus.recipe import load_recipe
from isthmus.train.checkpoint import Checkpoint
from isthmus.train.data import Split, coco_keypoints
from isthmus.train.loop import TrainConfig, fit, predict
from isthmus.train.pose_metrics import SURE, key_point_scores
from isthmus.train.processing.pose import AREA_OF_BOX, REACH, Network, joints_in_image, person_score, without_doubles
from isthmus.train.task import Task
from isthmus.train.zoo.amfacpose import ABLATION, SYSTEM, Config, TinyConfig

INPUT, SEED = "input", 0
Boxes = Mapping[int, tuple[np.ndarray, np.ndarray]]  # image: (people, 4) x, y, width, height in its pixels, and how sure each is
R = TypeVar("R", "Row", "BoxesRow")
SMALL = ("tinypose_fpga", "ci")
# By heart: the same photographs again and again, as they are. Figures are not turned nor mirrored either: all of them stand upright and face the viewer.
BY_HEART = {"tinypose_fpga": TrainConfig(600, 12, 5e-3, 1e-2, SEED), "ci": TrainConfig(250, 12, 3e-3, 1e-2, SEED)}
FIGURES = {"tinypose_fpga": TrainConfig(60, 32, 1e-2, 1e-2, SEED), "ci": TrainConfig(30, 16, 3e-3, 1e-2, SEED)}
FIGURE_IMAGES = {"tinypose_fpga": 1600, "ci": 600}  # with about two people each; a quarter as many judge
QAT_SHARE, QAT_RATE = 4, 0.1  # of the float training's epochs and of its learning rate
LEAST_AP, MOST_DROP = 0.9, 0.02  # promised: by heart in float, and lost by int8 with QAT
# The paper's tables 2 and 6: millions of parameters, GFLOPs (which are multiply-accumulates).
PAPER = {
    "r34-384x288": (3.8, 5.2), "r34-256x256": (3.6, 3.1), "r18-384x288": (2.5, 3.2), "r18-256x256": (2.4, 1.9),
    "baseline": (3.3, 4.7), "+AFPN": (3.5, 5.0), "+DGCB": (3.6, 5.0), "+SCRM": (3.6, 5.2), "+SE": (3.8, 5.2),
}  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """`macs` of convolutions and linear layers without the context gates' sliding kernels, `sliding` of those."""

    name: str
    parameters: int
    macs: int
    sliding: int
    paper: tuple[float, float] | None


@dataclass(frozen=True)
class Row:
    """AP, 0 to 1, of the float network, of int8 by calibration, and of int8 trained with its rounding; calibrated int8 by the likeliest bin alone."""

    preset: str
    data: str
    people: int
    float_ap: float
    calibrated_ap: float
    trained_ap: float
    likeliest_bin_ap: float | None = None


@dataclass(frozen=True)
class BoxesRow:
    """AP, 0 to 1, of the float network on the photographs, with the annotated boxes and with a detector's, of which there are `boxes`."""

    preset: str
    annotated_ap: float
    detected_ap: float
    boxes: int


# ---- costs
@cache
def cost_of_configuration(name: str, config: Config | TinyConfig) -> Cost:
    """Counted on the module in evaluation mode, without memory for its weights."""
    with torch.device("meta"):
        module = SYSTEM.build(config).eval()
        counts = {"macs": 0, "sliding": 0}

        def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            assert isinstance(layer.weight, Tensor)
            counts["sliding" if isinstance(layer, nn.Conv1d) else "macs"] += output.numel() * (layer.weight.numel() // layer.weight.shape[0])

        for layer in module.modules():
            if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Linear):
                layer.register_forward_hook(count)
        module(torch.zeros(SYSTEM.input_shape(config)))
    return Cost(name, sum(parameter.numel() for parameter in module.parameters()), **counts, paper=PAPER.get(name))


def costs() -> list[Cost]:
    return [cost_of_configuration(name, config) for name, config in {**SYSTEM.presets, **ABLATION}.items()]


# ---- training and quantising
def as_they_are(preset: str) -> Task:
    return replace(SYSTEM.purpose(preset), augment=None)


def trained(preset: str, split: Split, config: TrainConfig, file: Path) -> nn.Module:
    module = SYSTEM.network(preset, SEED)
    fit(module, split, config, checkpoint=Checkpoint(file, preset), task=as_they_are(preset))
    return module


def learnt(preset: str, split: Split, config: TrainConfig, file: Path) -> tuple[nn.Module, QuantGraph, QuantGraph]:
    """The float network, its form by calibration, and the form trained from there towards the float network's outputs."""
    module, recipe, task = trained(preset, split, config, file), replace(load_recipe("portable"), observer="mse"), as_they_are(preset)
    model = prepare_float(onnx_from_module(module, (torch.zeros(SYSTEM.input_shape(SYSTEM.configuration(preset))),), outputs=SYSTEM.outputs), {})
    quantiser = PostTraining(model, Dataset({INPUT: split.x_train}, None, split.name), lambda text, share: None)
    qat = replace(config, epochs=config.epochs // QAT_SHARE, learning_rate=config.learning_rate * QAT_RATE)
    calibrated, _ = quantiser.graph(recipe)
    return module, calibrated, quantiser.graph(recipe, lambda inner: fit(inner, split, qat, teacher=module, task=task))[0]


def network_of(model: nn.Module | QuantGraph) -> Network:
    if isinstance(model, nn.Module):
        return lambda samples: predict(model, samples)

    def run(samples: np.ndarray) -> list[np.ndarray]:
        outputs = reference.run(model, {INPUT: model.inputs[0].quantise(samples)})
        return [spec.dequantise(outputs[spec.name]) for spec in model.outputs]

    return run


# ---- measuring
def annotated_boxes(annotations: coco_keypoints.Annotations) -> Boxes:
    images = dict.fromkeys(person.image for person in annotations.people)
    boxes = {image: np.stack([person.box for person in annotations.people if person.image == image]) for image in images}
    return {image: (found, np.full(len(found), SURE)) for image, found in boxes.items()}


def detected_boxes(folder: Path, annotations: coco_keypoints.Annotations) -> Boxes:
    """Those of a detector, from the one file of the folder that holds a list of them, as COCO's own file of detections does."""
    lists = [read for file in sorted(folder.glob("*.json")) if isinstance(read := json.loads(file.read_bytes()), list)]
    if len(lists) != 1:
        raise SystemExit(f"{folder}: holds {len(lists)} lists of detected boxes, expected one")
    found: dict[int, list[Mapping[str, Any]]] = {}
    for entry in lists[0]:
        if entry["image_id"] in annotations.images:
            found.setdefault(entry["image_id"], []).append(entry)
    return {image: (np.array([one["bbox"] for one in entries]), np.array([one["score"] for one in entries])) for image, entries in found.items()}


def ap_of_files(
    annotations: coco_keypoints.Annotations, folder: Path, network: Network, config: Config | TinyConfig, boxes: Boxes, reach: int = REACH
) -> float:
    """COCO's AP of the people in `boxes`, whoever is found twice counted once."""
    image_of, found = coco_keypoints.images_in(folder, annotations), []
    for image, (places, sure) in boxes.items():
        people = joints_in_image(image_of(image), places, network, config.height, config.width, config.bins_per_pixel, config.input_channels == 5, reach)
        scores = np.array([person_score(own, joints[:, 2]) for own, joints in zip(sure, people, strict=True)])
        for index in without_doubles(people, scores, AREA_OF_BOX * places[:, 2] * places[:, 3], annotations.skeleton):
            found.append({"image_id": image, "category_id": 1, "keypoints": people[index].reshape(-1).tolist(), "score": float(scores[index])})
    return key_point_scores(annotations.raw, found, annotations.skeleton)["AP"]


def overfit_row(preset: str, root: Path, work: Path) -> Row:
    config, annotations, split = SYSTEM.configuration(preset), coco_keypoints.one_file(root), SYSTEM.data(SEED, preset, root)
    models = learnt(preset, split, BY_HEART[preset], work / f"by-heart-{preset}.pt")
    boxes = annotated_boxes(annotations)
    found = [ap_of_files(annotations, root, network_of(model), config, boxes) for model in models]
    likeliest = ap_of_files(annotations, root, network_of(models[1]), config, boxes, reach=0)
    return Row(preset, split.name, len(split.x_train), *found, likeliest_bin_ap=likeliest)


def boxes_row(preset: str, root: Path, work: Path) -> BoxesRow:
    config, annotations, split = SYSTEM.configuration(preset), coco_keypoints.one_file(root), SYSTEM.data(SEED, preset, root)
    network = network_of(trained(preset, split, BY_HEART[preset], work / f"by-heart-{preset}.pt"))
    annotated, detected = annotated_boxes(annotations), detected_boxes(root, annotations)
    score = partial(ap_of_files, annotations, root, network, config)
    return BoxesRow(preset, score(annotated), score(detected), sum(len(places) for places, _ in detected.values()))


def figures_row(preset: str, work: Path) -> Row:
    split, task = SYSTEM.load_data(replace(SYSTEM.configuration(preset), figures=FIGURE_IMAGES[preset]), SEED, None), SYSTEM.purpose(preset)
    models = learnt(preset, split, FIGURES[preset], work / f"figures-{preset}.pt")
    told = f"{split.name}: {len(split.x_train)} people train, {len(split.x_test)} others judge"
    return Row(preset, told, len(split.x_test), *(task.score(tuple(network_of(model)(split.x_test)), split.y_test) for model in models))


def kept(file: Path, form: type[R], measure: Callable[[], R]) -> R:
    """A row that an earlier run finished, or a new one."""
    if not file.exists():
        file.write_text(json.dumps(asdict(measure())))
    return form(**json.loads(file.read_text()))


# ---- tables
def cost_table(found: list[Cost]) -> str:
    lines = ["| network | parameters | MACs | sliding kernels' MACs | paper: M parameters, G |", "|---|---|---|---|---|"]
    for cost in found:
        paper = f"{cost.paper[0]}, {cost.paper[1]}" if cost.paper else ""
        lines.append(f"| {cost.name} | {cost.parameters:,} | {cost.macs:,} | {cost.sliding:,} | {paper} |")
    return "\n".join(lines)


def table(rows: list[Row]) -> str:
    lines = ["| preset | judged on | AP float | AP int8, calibrated | AP int8, QAT | calibrated, by the likeliest bin |", "|---|---|---|---|---|---|"]
    lines += [f"| {r.preset} | {r.data} | {r.float_ap:.3f} | {r.calibrated_ap:.3f} | {r.trained_ap:.3f} | {_shown(r.likeliest_bin_ap)} |" for r in rows]
    return "\n".join(lines)


def boxes_table(rows: list[BoxesRow]) -> str:
    lines = ["| preset | AP float, annotated boxes | AP float, the detector's boxes | detected boxes |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {r.preset} | {r.annotated_ap:.3f} | {r.detected_ap:.3f} | {r.boxes} |" for r in rows)])


def _shown(score: float | None) -> str:
    return "" if score is None else f"{score:.3f}"


def missed(overfit: list[Row], figures: list[Row]) -> list[str]:
    faults = [f"{row.preset}: AP {row.float_ap:.3f} by heart, promised {LEAST_AP}" for row in overfit if row.float_ap < LEAST_AP]
    lost = [(row, row.float_ap - row.trained_ap) for row in (*overfit, *figures)]
    return faults + [f"{row.preset}, {row.data}: int8 loses {drop:.3f} AP, promised at most {MOST_DROP}" for row, drop in lost if drop > MOST_DROP]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of one COCO key-point annotation file and its images")
    parser.add_argument("--work", type=Path, help="where checkpoints are kept")
    parser.add_argument("--only", default="costs,overfit,boxes,figures", help="parts, separated by commas")
    parser.add_argument("--presets", default=",".join(SMALL))
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    parts, presets = given.only.split(","), given.presets.split(",")
    if {"overfit", "boxes"} & set(parts) and given.data is None:
        parser.error("parts overfit and boxes need --data")
    with tempfile.TemporaryDirectory() as temporary:
        work = given.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        counted = costs() if "costs" in parts else []
        overfit = [kept(work / f"by-heart-{p}.json", Row, lambda p=p: overfit_row(p, given.data, work)) for p in presets] if "overfit" in parts else []
        boxes = [kept(work / f"boxes-{p}.json", BoxesRow, lambda p=p: boxes_row(p, given.data, work)) for p in presets] if "boxes" in parts else []
        figures = [kept(work / f"figures-{p}.json", Row, lambda p=p: figures_row(p, work)) for p in presets] if "figures" in parts else []
    faults = missed(overfit, figures)
    if given.json:
        described: dict[str, Any] = {"costs": counted, "overfit": overfit, "boxes": boxes, "figures": figures}
        print(json.dumps({name: [asdict(row) for row in rows] for name, rows in described.items()} | {"missed": faults}, indent=1))
    else:
        tables = [shown(rows) for shown, rows in ((cost_table, counted), (table, overfit), (boxes_table, boxes), (table, figures)) if rows]
        print("\n\n".join([*tables, *faults]))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
