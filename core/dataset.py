# SPDX-License-Identifier: Apache-2.0
"""Samples from a user's files: `.npz`, `.npy` or a folder of images, checked against the model's inputs before anything slow starts."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from isthmus.errors import IsthmusError
from isthmus.numpy_file import read_npy, read_npz

MAX_DATA_BYTES = 8 * 2**30
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".pgm", ".ppm")
LABEL_NAMES = ("y", "label", "labels")
SAMPLE_NAMES = ("x", "data", "images", "samples")


@dataclass(frozen=True)
class Dataset:
    """`samples`: float32 (N, ...) by input name, N equal for all. `labels`: int64 (N), or None. `source`: one phrase for reports."""

    samples: Mapping[str, np.ndarray]
    labels: np.ndarray | None
    source: str

    def __len__(self) -> int:
        return len(next(iter(self.samples.values())))

    def take(self, count: int) -> Dataset:
        """The first `count` samples."""
        return Dataset({name: array[:count] for name, array in self.samples.items()}, None if self.labels is None else self.labels[:count], self.source)


@dataclass(frozen=True)
class Preprocess:
    """How stored pixels become the model's input: (pixel * scale - mean) / std, after a resize for images. Kept in the manifest, so `run` does the same.

    Text form, comma separated: "scale=1/255,mean=0.485:0.456:0.406,std=0.229:0.224:0.225,resize=stretch". `mean` and `std` are one
    number or one a channel. `resize` is "stretch" (default), "crop" (shorter side, then centre) or "none".
    """

    scale: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    resize: str = "stretch"

    @classmethod
    def parse(cls, text: str) -> Preprocess:
        """Raises `IsthmusError` naming the part that is wrong. "raw" alone leaves the values as they are."""
        values: dict[str, Any] = {}
        for part in filter(None, (word.strip() for word in text.split(","))):
            key, _, value = part.partition("=")
            if part == "raw":
                continue
            if key == "scale":
                values[key] = _number(value, part)
            elif key in ("mean", "std"):
                values[key] = tuple(_number(word, part) for word in value.split(":"))
            elif key == "resize" and value in ("stretch", "crop", "none"):
                values[key] = value
            else:
                raise IsthmusError(f"--preprocess: {part!r} is not understood; write for example scale=1/255,mean=0.5,std=0.5,resize=crop, or raw")
        made = cls(**values)
        if made.scale == 0 or any(step == 0 for step in made.std):
            raise IsthmusError("--preprocess: scale and std must not be 0")
        return made

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Preprocess:
        return cls(float(data["scale"]), tuple(data["mean"]), tuple(data["std"]), str(data["resize"]))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def apply(self, array: np.ndarray) -> np.ndarray:
        """array (..., C, H, W) of any number type -> float32, same shape; mean and std along C where they have several numbers."""
        mean, std = (np.asarray(values, np.float64) for values in (self.mean, self.std))
        if mean.size > 1 or std.size > 1:
            channels = array.shape[-3] if array.ndim >= 3 else 0
            if any(values.size not in (1, channels) for values in (mean, std)):
                raise IsthmusError(f"--preprocess: {max(mean.size, std.size)} numbers in mean or std, the input has {channels} channels")
            mean, std = (values.reshape(-1, 1, 1) for values in (mean, std))
        return ((array.astype(np.float64) * self.scale - mean) / std).astype(np.float32)


def load_data(path: str | Path, inputs: Mapping[str, Sequence[int]], preprocess: Preprocess | None) -> Dataset:
    """Samples for `inputs` (name -> shape with the model's own batch in front) from a file or a folder of images.

    `.npz`: arrays under the inputs' names, or one array under x/data/images/samples for a model with one input; integer labels under
    y/label/labels if known. `.npy`: one array. A folder: images, or one folder of images a class. Integers need a `preprocess`: whether
    a model wants 0..255 or 0..1 is not guessed. Raises `IsthmusError` on anything that does not fit.
    """
    place = Path(path)
    if not place.exists():
        raise IsthmusError(f"{place}: no such calibration data; give a .npz, a .npy or a folder of images")
    if place.is_dir():
        return _from_images(place, inputs, preprocess)
    if place.suffix not in (".npz", ".npy"):
        raise IsthmusError(f"{place}: expected a .npz, a .npy or a folder of images")
    if place.suffix == ".npy":
        if len(inputs) != 1:
            raise IsthmusError(f"{place}: one array, but the model has the inputs {list(inputs)}; give a .npz with these names")
        arrays = {next(iter(inputs)): read_npy(place, MAX_DATA_BYTES)}
    else:
        arrays = read_npz(place, MAX_DATA_BYTES)
    labels = next((arrays.pop(name) for name in LABEL_NAMES if name in arrays and name not in inputs), None)
    if len(inputs) == 1 and next(iter(inputs)) not in arrays:
        known = [name for name in SAMPLE_NAMES if name in arrays]
        if len(known) == 1:
            arrays = {next(iter(inputs)): arrays[known[0]]}
    missing = [name for name in inputs if name not in arrays]
    if missing:
        raise IsthmusError(f"{place}: no array for input {missing[0]!r}: it holds {sorted(arrays)}, the model's inputs are {list(inputs)}")
    return from_arrays({name: arrays[name] for name in inputs}, labels, inputs, preprocess, str(place))


def from_arrays(
    arrays: Mapping[str, np.ndarray], labels: np.ndarray | None, inputs: Mapping[str, Sequence[int]], preprocess: Preprocess | None, source: str
) -> Dataset:
    """Arrays as a checked `Dataset`: numbers, right shape, at least one sample, all finite, as many labels as samples."""
    samples = {}
    for name, shape in inputs.items():
        array = np.asarray(arrays[name])
        where = f"{source}: input {name!r}"
        if array.dtype.kind not in "fiu":
            raise IsthmusError(f"{where}: expected numbers, found dtype {array.dtype}")
        if array.ndim != len(shape) or tuple(array.shape[1:]) != tuple(shape[1:]):
            raise IsthmusError(f"{where}: expected shape [N, {', '.join(str(extent) for extent in shape[1:])}], found {list(array.shape)}")
        if not len(array):
            raise IsthmusError(f"{where}: holds no samples; give at least one, better a hundred")
        if array.dtype.kind in "iu" and preprocess is None:
            raise IsthmusError(
                f"{where}: {array.dtype} values, but the model takes float32; say what they become with --preprocess (scale=1/255, or raw to keep 0..255)"
            )
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            first = int(np.flatnonzero(~np.isfinite(array.reshape(len(array), -1)).all(axis=1))[0])
            raise IsthmusError(f"{where}: NaN or infinity, first in sample {first}; remove it")
        samples[name] = preprocess.apply(array) if preprocess is not None else array.astype(np.float32, copy=False)
        if len(array) % shape[0]:
            raise IsthmusError(f"{where}: {len(array)} samples are no multiple of the model's batch {shape[0]}")
    counts = {name: len(array) for name, array in samples.items()}
    if len(set(counts.values())) != 1:
        raise IsthmusError(f"{source}: different numbers of samples: {counts}")
    if labels is not None:
        labels = np.asarray(labels).reshape(-1)
        if labels.dtype.kind not in "iu" or len(labels) != next(iter(counts.values())):
            raise IsthmusError(f"{source}: expected one integer label a sample ({next(iter(counts.values()))}), found {labels.dtype}{list(labels.shape)}")
        labels = labels.astype(np.int64)
    return Dataset(samples, labels, source)


def load_image(path: str | Path, shape: Sequence[int], preprocess: Preprocess) -> np.ndarray:
    """One image as float32 (1, C, H, W). Raises `IsthmusError` where it is no image or the input is no image's shape."""
    from PIL import Image, UnidentifiedImageError

    if len(shape) != 4 or shape[1] not in (1, 3):
        raise IsthmusError(f"{path}: an image needs an input of shape [N, 1 or 3, H, W], the model's is {list(shape)}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                image = opened.convert("L" if shape[1] == 1 else "RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise IsthmusError(f"{path}: cannot be read as an image: {error}") from None
    height, width = int(shape[2]), int(shape[3])
    if preprocess.resize == "stretch":
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    elif preprocess.resize == "crop":
        factor = max(width / image.width, height / image.height)
        image = image.resize((max(width, round(image.width * factor)), max(height, round(image.height * factor))), Image.Resampling.BILINEAR)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    elif image.size != (width, height):
        raise IsthmusError(f"{path}: is {image.width}x{image.height}, the model takes {width}x{height}; drop resize=none")
    pixels = np.asarray(image)
    planes = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return preprocess.apply(planes[None])


def _from_images(folder: Path, inputs: Mapping[str, Sequence[int]], preprocess: Preprocess | None) -> Dataset:
    if len(inputs) != 1:
        raise IsthmusError(f"{folder}: a folder of images feeds one input, the model has {list(inputs)}; give a .npz")
    if preprocess is None:
        raise IsthmusError(f"{folder}: images need --preprocess, so that pixels become what the model was trained on (for example scale=1/255)")
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    files: list[tuple[Path, int]] = []
    for label, place in enumerate(classes or [folder]):
        files += [(file, label) for file in sorted(place.iterdir()) if file.suffix.lower() in IMAGE_SUFFIXES]
    if not files:
        raise IsthmusError(f"{folder}: no images ({', '.join(IMAGE_SUFFIXES)}) in it")
    name, shape = next(iter(inputs.items()))
    images = np.concatenate([load_image(file, shape, preprocess) for file, _ in files])
    labels = np.array([label for _, label in files], np.int64) if classes else None
    return from_arrays({name: images}, labels, inputs, None, str(folder))


def _number(text: str, part: str) -> float:
    try:
        return float(Fraction(text.strip()))
    except (ValueError, ZeroDivisionError):
        raise IsthmusError(f"--preprocess: {part!r}: {text!r} is no number (write 0.5 or 1/255)") from None
