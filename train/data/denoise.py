# SPDX-License-Identifier: Apache-2.0
"""Grey images and their degraded copies: a folder of images (Set12, BSD68, your own) cut into patches, or synthetic aerial images.

Set12 is for tests alone; of all other images a tenth validates and a tenth tests, drawn by the seed, so no image is in two parts.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from isthmus.errors import IsthmusError
from isthmus.train.data import Split
from isthmus.train.data.arrays import MAX_ARRAY_BYTES, listed
from isthmus.train.data.images import PARTS
from isthmus.train.data.stand_in import NAME
from isthmus.train.data.synthetic_aerial import synthetic_aerial

FOLDERS = ("denoise/", "")  # under the root, the first that holds images
TEST_SETS = ("Set12",)  # folders that are never trained on
HELD_OUT_SHARE = 0.1  # of the other images, for validation and for tests each
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".pgm", ".tif", ".tiff")
EIGHT_BITS = {"L", "P", "RGB", "RGBA"}  # Pillow's names; it would cut the values of deeper modes off without a word
READ_NOISE = 5 / 255  # the Gaussian part of Poisson-Gaussian

Kind = Literal["gaussian", "speckle", "intensity speckle", "poisson-gaussian"]


# ---- degradation
@dataclass(frozen=True)
class Degradation:
    """`level`: sigma in grey levels of 255 (gaussian), the number of looks (speckle: 1 is the worst), or the peak count (poisson-gaussian).

    "speckle" multiplies amplitudes by the root of a Gamma variable of mean 1 and variance 1 / looks, "intensity speckle" by the variable itself.
    """

    kind: Kind = "gaussian"
    level: float = 25.0

    def __post_init__(self) -> None:
        if not self.level > 0:
            raise IsthmusError(f"degradation {self.kind}: level {self.level} must be above 0")

    def __str__(self) -> str:
        return f"{self.kind} {self.level:g}"

    def apply(self, clean: np.ndarray, generator: np.random.Generator, clip: bool = True) -> np.ndarray:
        """Images of any shape in 0..1 as noisy ones, float32; with `clip` inside 0..1, as a sensor gives them."""
        if self.kind == "gaussian":
            noisy = clean + generator.normal(0, self.level / 255, clean.shape)
        elif self.kind == "poisson-gaussian":
            noisy = generator.poisson(self.level * clean) / self.level + generator.normal(0, READ_NOISE, clean.shape)
        else:
            factor = generator.gamma(self.level, 1 / self.level, clean.shape)
            noisy = clean * (np.sqrt(factor) if self.kind == "speckle" else factor)
        return (np.clip(noisy, 0, 1) if clip else noisy).astype(np.float32)


GAUSSIAN_25 = Degradation()


# ---- images of a folder
def read_images(root: Path) -> dict[str, np.ndarray]:
    """Every image of root (or root/denoise) and its folders, uint8 (H, W), by its path below that; colour as luma (Rec. 601).

    Raises `IsthmusError` on a folder without images, and naming the first files that cannot be read or are not of 8 bits, and their count.
    """
    if not root.is_dir():
        raise IsthmusError(f"{root}: no such data folder")
    places = [root / folder for folder in FOLDERS]
    files = next((found for place in places if (found := _image_files(place))), [])
    if not files:
        raise IsthmusError(f"{root}: holds no images ({', '.join(SUFFIXES)}), nor do its folders; put Set12 and BSD68 there, or leave it out")
    images: dict[str, np.ndarray] = {}
    faults = []
    left = MAX_ARRAY_BYTES
    for name, file in files:
        image = _grey(file, left)
        if isinstance(image, str):
            faults.append(f"{name}: {image}")
        else:
            images[name] = image
            left -= image.nbytes
    if faults:
        raise IsthmusError(f"{root}: {len(faults)} of {len(files)} images cannot be used: {listed(faults)}; repair or remove them")
    return images


def divide(names: Sequence[str], seed: int) -> dict[str, list[str]]:
    """Names (folder/file) by part. Raises `IsthmusError` where fewer than three images may be trained on."""
    reserved = [name for name in names if name.split("/")[0] in TEST_SETS]
    others = [name for name in names if name not in set(reserved)]
    if len(others) < len(PARTS):
        raise IsthmusError(f"{len(others)} images beside {' and '.join(TEST_SETS)}, which is for tests alone: at least {len(PARTS)} are needed, one a part")
    drawn = [others[index] for index in np.random.default_rng(seed).permutation(len(others))]
    share = max(1, round(HELD_OUT_SHARE * len(others)))
    return {"train": sorted(drawn[2 * share :]), "val": sorted(drawn[:share]), "test": reserved + sorted(drawn[share : 2 * share])}


def _image_files(folder: Path) -> list[tuple[str, Path]]:
    if not folder.is_dir():
        return []
    inner = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    files = [file for place in (folder, *inner) for file in sorted(place.iterdir()) if file.suffix.lower() in SUFFIXES and file.is_file()]
    return [(file.relative_to(folder).as_posix(), file) for file in files]


def _grey(file: Path, limit_bytes: int) -> np.ndarray | str:
    """The image, or what is wrong with it."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as opened:
                if opened.mode not in EIGHT_BITS:
                    return f"is of mode {opened.mode}, expected 8 bits a channel (L, RGB)"
                if opened.width * opened.height > limit_bytes:
                    return f"its {opened.width}x{opened.height} pixels are more than the {MAX_ARRAY_BYTES} that are read in all"
                return np.asarray(opened.convert("L"))
    except UnidentifiedImageError:
        return "is no image"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        return f"is cut short or damaged ({str(error)[:100]})"


# ---- samples
def load(root: Path | None, size: int, degradation: Degradation, counts: Mapping[str, int], seed: int = 0) -> Split:
    """Noisy patches (count, 1, size, size) in 0..1 and their targets (count, 2, size, size): the clean patch, and the noisy one for losses that need it.

    `counts`: patches a part, drawn evenly over its images at random places; without `root` as many synthetic aerial images of that size.
    Raises `IsthmusError` on a folder that cannot be used, and naming the first images smaller than a patch.
    """
    generators = {part: np.random.default_rng([seed, number]) for number, part in enumerate(PARTS)}  # a part is the same whatever the others' counts
    if root is None:
        clean = {part: np.stack([synthetic_aerial(generators[part], size)[0] for _ in range(counts[part])]) for part in PARTS}
        return _split(f"aerial images, {NAME}, {degradation}", clean, degradation, generators, seed)
    images = read_images(root)
    small = [f"{name} ({image.shape[1]}x{image.shape[0]})" for name, image in images.items() if min(image.shape) < size]
    if small:
        raise IsthmusError(f"{root}: {len(small)} of {len(images)} images are smaller than a patch of {size}x{size}: {listed(small)}; take a smaller preset")
    parts = divide(list(images), seed)
    clean = {part: patches([images[name] for name in parts[part]], size, counts[part], generators[part]) for part in PARTS}
    return _split(f"{len(images)} images, patches of {size}x{size}, {degradation}", clean, degradation, generators, seed)


def patches(images: Sequence[np.ndarray], size: int, count: int, generator: np.random.Generator) -> np.ndarray:
    """`count` patches of uint8 images at random places, float32 (count, size, size) in 0..1; image after image in turn."""
    cut = np.empty((count, size, size), np.float32)
    for index in range(count):
        image = images[index % len(images)]
        top, left = (int(generator.integers(extent - size + 1)) for extent in image.shape)
        cut[index] = image[top : top + size, left : left + size] / np.float32(255)
    return cut


def _split(name: str, clean: Mapping[str, np.ndarray], degradation: Degradation, generators: Mapping[str, np.random.Generator], seed: int) -> Split:
    arrays = {}
    for part in PARTS:
        targets = clean[part].astype(np.float32)[:, None]
        noisy = degradation.apply(targets, generators[part])
        arrays[f"x_{part}"], arrays[f"y_{part}"] = noisy, np.concatenate([targets, noisy], axis=1)
    return Split(name, **arrays, classes=(), seed=seed)
