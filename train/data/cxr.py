# SPDX-License-Identifier: Apache-2.0
"""Chest X-rays of children (Kermany et al.) from the published folders {train,val,test}/{NORMAL,PNEUMONIA}/*.jpeg, or synthetic ones drawn here.

Names tell patients apart (person12_bacteria_47.jpeg, IM-0115-0001.jpeg): all images of one stay on one side of every division made here.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from isthmus.errors import IsthmusError
from isthmus.train.data import Split
from isthmus.train.data.arrays import listed
from isthmus.train.data.images import PARTS, Part, split_of_images
from isthmus.train.data.stand_in import NAME
from isthmus.train.processing.pneumonia_kd import CLASSES, read_grey, resized

FOLDERS = ("NORMAL", "PNEUMONIA")  # in the order of CLASSES
ROOTS = ("", "chest_xray", "cxr_pneumonia")
SUFFIXES = (".jpeg", ".jpg", ".png")
VALIDATION_FOLDS = 10  # one of them validates: a tenth of the training images
PATIENT = re.compile(r"person\d+|(?:NORMAL2-)?IM-\d+")
ILL = re.compile(r"bacteria|virus", re.IGNORECASE)
STAND_IN_COUNT = 32  # training images; half as many validate and test
STAND_IN_SIZE = 200
PNEUMONIA_SHARE = 0.73


@dataclass(frozen=True)
class Scans:
    """Image files, their labels, and whose they are; a file that names no patient is a patient of its own."""

    files: tuple[Path, ...]
    labels: np.ndarray
    patients: tuple[str, ...]

    def chosen(self, rows: np.ndarray) -> Scans:
        return Scans(tuple(self.files[row] for row in rows), self.labels[rows], tuple(self.patients[row] for row in rows))

    def without_fold(self, folds: int, fold: int, seed: int) -> tuple[Scans, Scans]:
        """The rest and fold number `fold`: the classes in equal shares, no patient in both (scikit-learn's StratifiedGroupKFold)."""
        from sklearn.model_selection import StratifiedGroupKFold

        divider = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
        rest, own = list(divider.split(self.labels, self.labels, self.patients))[fold]
        return self.chosen(rest), self.chosen(own)


def load(root: Path | None, size: int = 200, seed: int = 0, stand_in_count: int = STAND_IN_COUNT) -> Split:
    """[count, 1, size, size]; the parts are the folders' own, and where val is absent a tenth of the training part, drawn by `seed`.

    Reads under root, root/chest_xray or root/cxr_pneumonia. Without `root` the synthetic stand-in, whose name says so.
    Raises `IsthmusError` on folders that are missing or lack a class, and on files that cannot be read or stand in the wrong folder.
    """
    if root is None:
        return split_of_images(f"chest X-rays, {NAME}", NAME, stand_in(size, seed, stand_in_count), CLASSES, 1, seed)
    place = _place(root)
    train, test = scans(place / "train"), scans(place / "test")
    if (place / "val").is_dir():
        val = scans(place / "val")
    else:
        train, val = train.without_fold(VALIDATION_FOLDS, 0, seed)
    return split_of_scans("chest X-rays", place, {"train": train, "val": val, "test": test}, size, seed)


def load_fold(root: Path, fold: int, folds: int, size: int = 200, seed: int = 0) -> Split:
    """The images of all folders together, divided anew: fold `fold` of `folds` tests, a tenth of the rest validates. For sets whose training part is small."""
    place = _place(root)
    parts = [scans(place / part) for part in PARTS if (place / part).is_dir()]
    together = Scans(
        tuple(file for part in parts for file in part.files),
        np.concatenate([part.labels for part in parts]),
        tuple(patient for part in parts for patient in part.patients),
    )
    rest, test = together.without_fold(folds, fold, seed)
    train, val = rest.without_fold(VALIDATION_FOLDS, 0, seed)
    return split_of_scans(f"chest X-rays, fold {fold + 1} of {folds}", place, {"train": train, "val": val, "test": test}, size, seed)


def scans(folder: Path) -> Scans:
    """The image files of folder/NORMAL and folder/PNEUMONIA by name. Raises `IsthmusError` where one is absent, empty, or holds images of the other."""
    absent = [name for name in FOLDERS if not (folder / name).is_dir()]
    if absent:
        raise IsthmusError(f"{folder}: has no folder {listed(absent)}; expected {' and '.join(FOLDERS)} with images in each")
    files = [sorted(file for file in (folder / name).iterdir() if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")) for name in FOLDERS]
    empty = [str(folder / name) for name, found in zip(FOLDERS, files, strict=True) if not found]
    if empty:
        raise IsthmusError(f"{listed(empty)}: holds no image ({', '.join(SUFFIXES)}); every part needs every class")
    named_ill = [file.name for file in files[0] if ILL.search(file.name)]
    if named_ill:
        raise IsthmusError(f"{folder / FOLDERS[0]}: {len(named_ill)} images are named as pneumonia: {listed(named_ill)}; move them to {FOLDERS[1]}")
    together = [file for found in files for file in found]
    return Scans(tuple(together), np.repeat(np.arange(len(FOLDERS)), [len(found) for found in files]), tuple(_patient(file) for file in together))


def split_of_scans(name: str, place: Path, parts: dict[str, Scans], size: int, seed: int) -> Split:
    return split_of_images(name, str(place), {part: (_pixels(place, found.files, size), found.labels) for part, found in parts.items()}, CLASSES, 1, seed)


def _patient(file: Path) -> str:
    found = PATIENT.match(file.name)
    return found.group() if found else str(file)


def _place(root: Path) -> Path:
    if not root.is_dir():
        raise IsthmusError(f"{root}: no such data folder")
    places = [root / name for name in ROOTS if (root / name / "train").is_dir() and (root / name / "test").is_dir()]
    if not places:
        raise IsthmusError(f"{root}: holds no folders train and test; unpack the data set there, or leave the folder out for synthetic images")
    return places[0]


def _pixels(place: Path, files: Sequence[Path], size: int) -> np.ndarray:
    """uint8 (N, size, size). Raises `IsthmusError` naming the first files that cannot be read, and how many they are."""
    images, faults = np.empty((len(files), size, size), np.uint8), []
    for row, file in enumerate(files):
        try:
            images[row] = read_grey(file, size)
        except IsthmusError as error:
            faults.append(str(error).removeprefix(f"{place}/"))
    if faults:
        raise IsthmusError(f"{place}: {len(faults)} of {len(files)} images cannot be used: {listed(faults)}; get them again or remove them")
    return images


# ---- the stand-in
def stand_in(size: int, seed: int, count: int) -> dict[str, Part]:
    """`count` training images and half as many in the other parts; drawn at one size and then resized: networks of two sizes see the same images."""
    from PIL import Image

    return {part: (np.stack([resized(Image.fromarray(image), size) for image in images]), labels) for part, (images, labels) in _all_drawn(seed, count).items()}


@functools.lru_cache(maxsize=1)  # a network and its teachers ask one after the other
def _all_drawn(seed: int, count: int) -> dict[str, Part]:
    parts = {}
    for number, part in enumerate(PARTS):
        generator = np.random.default_rng([seed, number])
        own = count if part == "train" else count // 2
        labels = generator.permutation((np.arange(own) < round(PNEUMONIA_SHARE * own)).astype(np.uint8))
        parts[part] = np.stack([_drawn(bool(label), STAND_IN_SIZE, generator) for label in labels]), labels
    return parts


def _drawn(ill: bool, size: int, generator: np.random.Generator) -> np.ndarray:
    """Dark lungs behind bright ribs; pneumonia puts one to four bright clouds, some of them faint, into the lungs."""
    rows, columns = np.mgrid[0:size, 0:size] / size - 0.5
    image = generator.uniform(150, 200) * (1 - 0.5 * (rows**2 + columns**2))
    lungs = np.zeros((size, size), bool)
    for side in (-1, 1):
        x, y, tilt = side * generator.uniform(0.18, 0.22), generator.uniform(-0.04, 0.04), side * generator.uniform(0, 0.2)
        across, along = (columns - x) + tilt * (rows - y), (rows - y) - tilt * (columns - x)
        lung = (across / generator.uniform(0.12, 0.16)) ** 2 + (along / generator.uniform(0.28, 0.36)) ** 2 < 1
        image[lung] = generator.uniform(40, 70)
        lungs |= lung
        ribs = (rows - 0.8 * (columns - x) ** 2 - 0.2 * np.abs(columns)) * generator.integers(10, 14)
        image[(np.abs(ribs - np.rint(ribs)) < 0.07) & (side * columns > 0.04) & (np.abs(rows) < 0.38)] += 30
    image[np.abs(columns) < 0.03] += 25
    if ill:
        inside = np.argwhere(lungs)
        for row, column in inside[generator.integers(len(inside), size=generator.integers(1, 5))]:
            distance = (rows - rows[row, column]) ** 2 + (columns - columns[row, column]) ** 2
            image += lungs * generator.uniform(30, 90) * np.exp(-distance / (2 * generator.uniform(0.04, 0.10) ** 2))
    return np.clip(np.rint(image + generator.normal(0, 6, image.shape)), 0, 255).astype(np.uint8)
