# SPDX-License-Identifier: Apache-2.0
"""People with key points from COCO's own files (CrowdPose's have the same form), as crops for a top-down network; without files, stick figures.

COCO's layout: annotations/person_keypoints_{train,val}2017.json, and the images in train2017/ and val2017/. A folder with one annotation file and its
images beside it is taken as well: its people then train, choose and judge, which checks the whole path and says nothing of quality.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from isthmus.errors import IsthmusError
from isthmus.train.data import Split
from isthmus.train.data.arrays import listed
from isthmus.train.data.stick_figures import NAME, stick_figures
from isthmus.train.processing.pose import AREA_OF_BOX, COCO, CROWDPOSE, SKELETONS, Skeleton, crops_of_people, moved, read_image

MAX_FILE_BYTES = 2**30  # COCO's largest has 240 MB
MAX_CROP_BYTES = 2**32  # of a part: more people than fit are drawn by lot
HELD_BACK = 0.1  # of the training images choose the epoch
Arrays = tuple[np.ndarray, np.ndarray]  # samples and targets
Input = tuple[int, int, bool]  # height and width of a crop; whether coordinate planes are appended


@dataclass(frozen=True)
class Person:
    """`box`: x, y, width, height. `joints` (K, 3): x, y, visibility (0 not annotated, 1 hidden, 2 seen). All in the image's pixels."""

    image: int
    box: np.ndarray
    joints: np.ndarray
    area: float


@dataclass(frozen=True)
class Annotations:
    """One annotation file: `raw` as it is in JSON, and the people of it that have key points, image by image."""

    source: str
    raw: Mapping[str, Any]
    skeleton: Skeleton
    people: tuple[Person, ...]

    @property
    def images(self) -> dict[int, Mapping[str, Any]]:
        return {image["id"]: image for image in self.raw["images"]}


def read_annotations(file: Path) -> Annotations:
    """A COCO or CrowdPose key-point file. Raises `IsthmusError` where it is missing, cut short, of another form, or contradicts itself."""
    try:
        if file.stat().st_size > MAX_FILE_BYTES:
            raise IsthmusError(f"{file}: {file.stat().st_size} bytes, at most {MAX_FILE_BYTES} are read; is this a key-point annotation file?")
        return annotations_of(json.loads(file.read_bytes()), str(file))
    except OSError as error:
        raise IsthmusError(f"{file}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise IsthmusError(f"{file}: is no JSON, cut short or damaged ({error}); copy the data set's file again") from None


def annotations_of(raw: Any, source: str) -> Annotations:
    """What was read from `source`, checked: names, shapes and numbers that everything later relies on."""
    if not isinstance(raw, dict) or any(not isinstance(raw.get(part), list) for part in ("images", "annotations", "categories")):
        raise IsthmusError(f"{source}: expected an object with lists of images, annotations and categories, as COCO's key-point files have")
    count = next((len(entry["keypoints"]) for entry in raw["categories"] if isinstance(entry, dict) and isinstance(entry.get("keypoints"), list)), None)
    if count not in SKELETONS:
        known = " or ".join(f"{skeleton.name}'s {joints}" for joints, skeleton in SKELETONS.items())
        raise IsthmusError(f"{source}: its category has {'no' if count is None else count} key points, expected {known}")
    images = {}
    for image in raw["images"]:
        if not _is_image(image):
            raise IsthmusError(f"{source}: an image entry is {str(image)[:80]}, expected id, file_name (a plain path inside the folder), height and width")
        images[image["id"]] = image
    faults, people = [], []
    for index, entry in enumerate(raw["annotations"]):
        fault = _fault(entry, images, count)
        if fault:
            faults.append(f"annotation {entry.get('id', index) if isinstance(entry, dict) else index} {fault}")
        elif not entry.get("iscrowd") and entry.get("num_keypoints", 1) and any(entry["keypoints"][2::3]):
            people.append(_person(entry))
    if faults:
        raise IsthmusError(f"{source}: {len(faults)} of {len(raw['annotations'])} annotations are wrong: {listed(faults[:3])}; repair or leave them out")
    if not people:
        raise IsthmusError(f"{source}: nobody in it has key points; take the person_keypoints file, not the instances file")
    return Annotations(source, raw, SKELETONS[count], tuple(people))


def _is_image(image: Any) -> bool:
    if not isinstance(image, dict) or not isinstance(image.get("file_name"), str) or not isinstance(image.get("id"), int):
        return False
    place = Path(image["file_name"])
    sized = all(isinstance(image.get(side), int) and image[side] > 0 for side in ("height", "width"))
    return sized and not place.is_absolute() and ".." not in place.parts and place.name != ""


def _fault(entry: Any, images: Mapping[int, Any], count: int) -> str:
    """What is wrong with an annotation, '' where nothing is."""
    if not isinstance(entry, dict) or not isinstance(entry.get("keypoints"), list) or not isinstance(entry.get("bbox"), list):
        return "has no keypoints or no bbox"
    if entry.get("image_id") not in images:
        return f"is of image {entry.get('image_id')}, which the file does not list"
    if len(entry["keypoints"]) != 3 * count or len(entry["bbox"]) != 4:
        return f"has {len(entry['keypoints'])} numbers for key points and {len(entry['bbox'])} for its box, expected {3 * count} and 4"
    numbers = [*entry["keypoints"], *entry["bbox"], entry.get("area", 1.0)]
    if not all(isinstance(value, int | float) and abs(value) < 1e6 for value in numbers):  # also refuses NaN
        return "holds something else than numbers of an image's size"
    if any(entry["keypoints"][2::3]) and min(entry["bbox"][2:]) <= 0 and not entry.get("iscrowd"):
        return f"has key points in a box of {entry['bbox'][2]} x {entry['bbox'][3]}"
    return ""


def _person(entry: Mapping[str, Any]) -> Person:
    box = np.array(entry["bbox"], np.float64)
    return Person(entry["image_id"], box, np.array(entry["keypoints"], np.float64).reshape(-1, 3), float(entry.get("area", AREA_OF_BOX * box[2] * box[3])))


# ---- images
def images_in(folder: Path, annotations: Annotations) -> Callable[[int], np.ndarray]:
    """Reads an image of `annotations` by its id. Raises `IsthmusError` now, naming the first and the count, where files of people are missing."""
    wanted = annotations.images
    files = {image: folder / wanted[image]["file_name"] for image in dict.fromkeys(person.image for person in annotations.people)}
    missing = [str(file.name) for file in files.values() if not file.is_file()]
    if missing:
        raise IsthmusError(f"{folder}: {len(missing)} of {len(files)} images are missing: {listed(missing[:3])}; copy the data set's image folder again")

    def read(image: int) -> np.ndarray:
        pixels, expected = read_image(files[image]), (wanted[image]["height"], wanted[image]["width"])
        if pixels.shape[:2] != expected:
            size = f"{pixels.shape[1]}x{pixels.shape[0]}"
            raise IsthmusError(f"{files[image]}: is {size}, its annotations are for {expected[1]}x{expected[0]}; take the images of the same data set")
        return pixels

    return read


# ---- crops
def crops_with_targets(people: Sequence[Person], image_of: Callable[[int], np.ndarray], taken: Input) -> Arrays:
    """What the network takes, (people, channels, height, width), and targets (people, joints + 1, 3), float32, in crop pixels.

    A joint is x, y and 1 where it is annotated and inside the crop, else 0; the last row is the person's area, 0, 0. People of one image stand together.
    """
    height, width, planes = taken
    inputs, targets = [], []
    rows: dict[int, list[Person]] = {}
    for person in people:
        rows.setdefault(person.image, []).append(person)
    for image, group in rows.items():
        samples, crops = crops_of_people(image_of(image), np.stack([person.box for person in group]), height, width, planes)
        inputs.append(samples)
        for person, crop in zip(group, crops, strict=True):
            joints = moved(person.joints, crop.to_crop)
            inside = (joints[:, :2] >= 0).all(axis=1) & (joints[:, 0] < width) & (joints[:, 1] < height) & (joints[:, 2] > 0)
            joints[:, 2] = inside
            joints[~inside] = 0
            targets.append(np.vstack([joints, [person.area * crop.scale**2, 0, 0]]))
    return np.concatenate(inputs), np.stack(targets).astype(np.float32)


def load(root: Path | None, taken: Input, skeleton: Skeleton = COCO, figures: int = 64, seed: int = 0) -> Split:
    """Crops of people with targets. COCO's training images train and, by tenths, choose the epoch; its validation images are the test part.

    Without `root`, people of `figures` synthetic images in the training part, of a quarter as many in the others. Raises `IsthmusError` on a bad folder.
    """
    if root is None:
        return _stand_in(taken, skeleton, figures, seed)
    if not root.is_dir():
        raise IsthmusError(f"{root}: no such data folder")
    official = [root / "annotations" / f"person_keypoints_{part}2017.json" for part in ("train", "val")]
    if not any(file.is_file() for file in official):
        annotations = one_file(root)
        _check_skeleton(annotations, skeleton)
        samples, targets = crops_with_targets(annotations.people, images_in(root, annotations), taken)
        name = f"{root.name}: the same {len(samples)} people train, choose and judge"
        return Split(name, samples, targets, samples, targets, samples, targets, (), seed)
    learnt, judged = (read_annotations(file) for file in official)
    _check_skeleton(learnt, skeleton)
    _check_skeleton(judged, skeleton)
    order = np.random.default_rng(seed).permutation(list(dict.fromkeys(person.image for person in learnt.people)))
    chosen = set(order[: max(1, int(len(order) * HELD_BACK))].tolist())
    parts = [[p for p in learnt.people if p.image not in chosen], [p for p in learnt.people if p.image in chosen], list(judged.people)]
    arrays: list[Arrays] = []
    told = []
    for people, annotations, folder in zip(parts, (learnt, learnt, judged), ("train2017", "train2017", "val2017"), strict=True):
        if not people:
            raise IsthmusError(f"{annotations.source}: too few images with people to hold any back; give at least two")
        kept = _drawn(people, taken, seed)
        told.append(f"{len(kept)} of {len(people)}")
        arrays.append(crops_with_targets(kept, images_in(root / folder, annotations), taken))
    return _split(f"{skeleton.name} 2017 ({', '.join(told)} people)", arrays, seed)


def _split(name: str, parts: list[Arrays], seed: int) -> Split:
    train, val, test = parts
    return Split(name, *train, *val, *test, (), seed)


def one_file(root: Path) -> Annotations:
    """The one annotation file of a folder. Raises `IsthmusError` where there is none or several."""
    found = []
    for file in sorted(root.glob("*.json")):
        if file.stat().st_size > MAX_FILE_BYTES:
            raise IsthmusError(f"{file}: {file.stat().st_size} bytes, at most {MAX_FILE_BYTES} are read; is this a key-point annotation file?")
        with file.open("rb") as opened:
            begin = opened.read(64).lstrip()
        if begin.startswith(b"{"):  # detections are a list
            found.append(file)
    if len(found) != 1:
        expected = "annotations/person_keypoints_train2017.json and ..._val2017.json, or one annotation file with its images"
        raise IsthmusError(f"{root}: holds {len(found)} annotation files, expected {expected}; leave the folder out for stick figures")
    return read_annotations(found[0])


def _check_skeleton(annotations: Annotations, skeleton: Skeleton) -> None:
    if annotations.skeleton is not skeleton:
        found, wanted = (f"{one.name}'s {len(one.joints)}" for one in (annotations.skeleton, skeleton))
        raise IsthmusError(f"{annotations.source}: has {found} key points, this network has {wanted}; take a preset for that data set")


def _drawn(people: list[Person], taken: Input, seed: int) -> list[Person]:
    """As many as fit into memory, drawn with `seed`."""
    height, width, planes = taken
    most = max(1, MAX_CROP_BYTES // (4 * (5 if planes else 3) * height * width))
    rows = np.sort(np.random.default_rng(seed).permutation(len(people))[:most])
    return [people[row] for row in rows]


def _stand_in(taken: Input, skeleton: Skeleton, figures: int, seed: int) -> Split:
    arrays = []
    for number, count in enumerate((figures, max(2, figures // 4), max(2, figures // 4))):
        raw, pixels = stick_figures(count, seed=3 * seed + number)
        samples, targets = crops_with_targets(annotations_of(raw, NAME).people, pixels.__getitem__, taken)
        arrays.append((samples, _as_crowdpose(targets) if skeleton is CROWDPOSE else targets))
    return _split(NAME, arrays, seed)


def _as_crowdpose(targets: np.ndarray) -> np.ndarray:
    """Limbs are the same joints; the head is between the ears, the neck between the shoulders."""
    middles = [np.column_stack([targets[:, pair, :2].mean(axis=1), targets[:, pair, 2].min(axis=1)]) for pair in ([3, 4], [5, 6])]
    return np.concatenate([targets[:, 5:17], *(middle[:, None] * middle[:, None, 2:] for middle in middles), targets[:, 17:]], axis=1).astype(np.float32)
