# SPDX-License-Identifier: Apache-2.0
"""Average precision of key points, by pycocotools: COCO's own evaluation code is the metric, not a copy of it."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import coco
from pycocotools.cocoeval import COCOeval

from isthmus.errors import IsthmusError
from isthmus.train.processing.pose import AREA_OF_BOX, Skeleton, decoded, person_score

SCORES = ("AP", "AP50", "AP75", "APM", "APL", "AR", "AR50", "AR75", "ARM", "ARL")
SURE = 1.0  # score of an annotated box


def key_point_scores(annotations: Mapping[str, Any], people: Sequence[Mapping[str, Any]], skeleton: Skeleton) -> dict[str, float]:
    """The ten figures of COCO's key-point evaluation, 0 to 1; -1 where nothing of that size is annotated.

    `annotations` as in COCO's JSON; `people` found: image_id, category_id, keypoints (3 a joint), score. Raises `IsthmusError` on an unknown image.
    """
    known = {image["id"] for image in annotations["images"]}
    strange = [person["image_id"] for person in people if person["image_id"] not in known]
    if strange:
        raise IsthmusError(f"key points: {len(strange)} people were found in images without annotations, first image {strange[0]}; take the same set for both")
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports to stdout
        truth = coco.COCO()
        truth.dataset = {**annotations, "annotations": [_with_area(entry) for entry in annotations["annotations"]]}
        truth.createIndex()
        if not people:
            return dict.fromkeys(SCORES, 0.0)
        evaluation = COCOeval(truth, truth.loadRes([dict(person) for person in people]), "keypoints")
        evaluation.params.kpt_oks_sigmas = np.array(skeleton.sigmas)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {name: float(value) for name, value in zip(SCORES, evaluation.stats, strict=True)}


def _with_area(annotation: Mapping[str, Any]) -> dict[str, Any]:
    box = annotation["bbox"]
    return {"area": AREA_OF_BOX * box[2] * box[3], **annotation}


def crop_average_precision(logits: tuple[np.ndarray, np.ndarray], targets: np.ndarray, skeleton: Skeleton, bins_per_pixel: int) -> float:
    """AP with each crop as an image of one person: what training chooses its epoch by. `targets` as `coco_keypoints` gives them, in crop pixels.

    OKS knows no scale, so it is that of the image; but joints beyond the crop do not count, and nobody is lost to a false person.
    """
    found = decoded(*logits, bins_per_pixel)
    truth, areas = targets[:, :-1], targets[:, -1, 0]
    images = [{"id": index} for index in range(len(found))]
    annotated = [
        {
            "id": index + 1, "image_id": index, "category_id": 1, "iscrowd": 0, "area": float(area), "bbox": [0, 0, 1, 1],
            "keypoints": joints.reshape(-1).tolist(), "num_keypoints": int((joints[:, 2] > 0).sum()),
        }
        for index, (joints, area) in enumerate(zip(truth.astype(np.float64), areas, strict=True))
    ]  # fmt: skip
    people = [
        {"image_id": index, "category_id": 1, "keypoints": joints.reshape(-1).tolist(), "score": person_score(SURE, joints[:, 2])}
        for index, joints in enumerate(found)
    ]
    return key_point_scores({"images": images, "annotations": annotated, "categories": [{"id": 1, "name": "person"}]}, people, skeleton)["AP"]
