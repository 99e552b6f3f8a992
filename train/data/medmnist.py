# SPDX-License-Identifier: Apache-2.0
"""MedMNIST sets at 28x28 from the published .npz files ({train,val,test}_images, {train,val,test}_labels), or synthetic images of the same shapes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from isthmus.errors import IsthmusError
from isthmus.train.data import Split
from isthmus.train.data.arrays import LABELS, listed, pixels, read_npz
from isthmus.train.data.images import PARTS, split_of_images
from isthmus.train.data.stand_in import NAME, stand_in

SIZE = 28


@dataclass(frozen=True)
class Description:
    """`channels` as stored; `balanced`: the test part has as many images of each class."""

    classes: tuple[str, ...]
    channels: int = 1
    balanced: bool = False


DATA_SETS = {
    "pathmnist": Description(
        (
            *("adipose", "background", "debris", "lymphocytes", "mucus", "smooth muscle", "normal colon mucosa"),
            *("cancer-associated stroma", "colorectal adenocarcinoma epithelium"),
        ),
        channels=3,
    ),
    "organamnist": Description(
        (
            *("bladder", "femur-left", "femur-right", "heart", "kidney-left", "kidney-right"),
            *("liver", "lung-left", "lung-right", "pancreas", "spleen"),
        )
    ),
    "octmnist": Description(("choroidal neovascularization", "diabetic macular edema", "drusen", "normal"), balanced=True),
    "pneumoniamnist": Description(("normal", "pneumonia")),
    "breastmnist": Description(("malignant", "normal, benign")),
}


def load(name: str, root: Path | None, channels: int = 1, seed: int = 0) -> Split:
    """The set `name` with its own three parts, [count, channels, 28, 28]; see `network_input` for the values.

    Reads root/NAME.npz or root/NAME/NAME.npz; files extra_train_*.npz (images, labels) beside it join the training part. Without `root` the
    synthetic stand-in, drawn by `seed`, whose name says so. Raises `IsthmusError` on files that are missing, damaged or wrong.
    """
    description = DATA_SETS[name]
    if root is None:
        parts = stand_in(name, len(description.classes), description.channels, seed, SIZE, description.balanced)
        return split_of_images(f"{name}, {NAME}", NAME, parts, description.classes, channels, seed)
    file = found(root, [f"{name}.npz", f"{name}/{name}.npz"])
    tail = (SIZE, SIZE) if description.channels == 1 else (SIZE, SIZE, description.channels)
    arrays = read_npz(file, {f"{part}_{what}": pixels(*tail) if what == "images" else LABELS for part in PARTS for what in ("images", "labels")})
    parts = {part: (arrays[f"{part}_images"], arrays[f"{part}_labels"].reshape(-1)) for part in PARTS}
    for extra in sorted(file.parent.glob("extra_train_*.npz")):
        more = read_npz(extra, {"images": pixels(*tail), "labels": LABELS})
        images, labels = parts["train"]
        parts["train"] = np.concatenate([images, more["images"]]), np.concatenate([labels, more["labels"].reshape(-1)])
    return split_of_images(name, str(file), parts, description.classes, channels, seed)


def found(root: Path, places: list[str]) -> Path:
    """The first of `places` under `root` that is a file. Raises `IsthmusError` naming the folder and what was looked for."""
    if not root.is_dir():
        raise IsthmusError(f"{root}: no such data folder")
    files = [root / place for place in places if (root / place).is_file()]
    if not files:
        raise IsthmusError(f"{root}: holds none of {listed(places)}; put the data set's own file there, or leave the folder out for synthetic images")
    return files[0]
