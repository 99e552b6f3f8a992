# SPDX-License-Identifier: Apache-2.0
"""Around a top-down pose network, in plain numpy as on a device: a person's crop, its exact inverse, decoding, scores. Torch is not needed here.

Points are in pixels, x then y, with whole numbers at pixel centres. A crop is "height x width"; bins are `bins_per_pixel` to each crop pixel.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from isthmus.errors import IsthmusError

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, red, green, blue
PADDING = 1.25  # a crop shows so many times the person's box
TEMPERATURE = 0.8  # of the logits, in the loss (spec of the paper: section 3.3) and for confidence; it never moves the largest
Network = Callable[[np.ndarray], Sequence[np.ndarray]]
REACH = 2  # bins to either side of the likeliest that a coordinate is the mean of
AREA_OF_BOX = 0.53  # where a person's area is not annotated, as CrowdPose's evaluation has it
CONFIDENT = 0.2  # joints below do not count in a person's score


@dataclass(frozen=True)
class Skeleton:
    """The joints of a data set in its order, which of them are mirror images, and how far annotators disagree (`sigmas`, shares of a person's size)."""

    name: str
    joints: tuple[str, ...]
    pairs: tuple[tuple[int, int], ...]
    sigmas: tuple[float, ...]

    @property
    def mirrored(self) -> np.ndarray:
        """int64 (joints,): whose place each joint takes in the mirrored image."""
        order = np.arange(len(self.joints))
        for left, right in self.pairs:
            order[[left, right]] = right, left
        return order


_LIMBS = tuple(f"{side}_{joint}" for joint in ("shoulder", "elbow", "wrist", "hip", "knee", "ankle") for side in ("left", "right"))
_LIMB_SIGMAS = (0.079, 0.079, 0.072, 0.072, 0.062, 0.062, 0.107, 0.107, 0.087, 0.087, 0.089, 0.089)
COCO = Skeleton(
    "COCO",
    ("nose", "left_eye", "right_eye", "left_ear", "right_ear", *_LIMBS),
    tuple((index, index + 1) for index in range(1, 17, 2)),
    (0.026, 0.025, 0.025, 0.035, 0.035, *_LIMB_SIGMAS),
)
CROWDPOSE = Skeleton("CrowdPose", (*_LIMBS, "head", "neck"), tuple((index, index + 1) for index in range(0, 12, 2)), (*_LIMB_SIGMAS, 0.079, 0.079))
SKELETONS = {len(skeleton.joints): skeleton for skeleton in (COCO, CROWDPOSE)}


# ---- the crop and its inverse
@dataclass(frozen=True)
class Crop:
    """Two 2x3 matrices, each other's inverse: image pixels to crop pixels and back. `scale`: crop pixels for one image pixel."""

    to_crop: np.ndarray
    to_image: np.ndarray
    scale: float


def person_crop(box: np.ndarray, height: int, width: int, degrees: float = 0.0, zoom: float = 1.0) -> Crop:
    """The crop of `box` (x, y, width, height): widened to the crop's shape, a quarter larger, turned by `degrees` about its centre; `zoom` enlarges it.

    u = s R(-a) (p - c) + (W/2, H/2). Raises `IsthmusError` on a box without area.
    """
    x, y, across, down = (float(value) for value in box)
    if not (across > 0 and down > 0 and np.isfinite([x, y, across, down]).all() and zoom > 0):
        raise IsthmusError(f"a person's box is {[x, y, across, down]} (x, y, width, height), expected numbers with a width and a height above 0")
    scale = zoom * width / (PADDING * max(across, down * width / height))
    turn = np.deg2rad(degrees)
    rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    centre, middle = np.array([x + across / 2, y + down / 2]), np.array([width / 2, height / 2])
    forth, back = scale * rotation, rotation.T / scale
    return Crop(np.column_stack([forth, middle - forth @ centre]), np.column_stack([back, centre - back @ middle]), scale)


def moved(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """`points` (..., 2) by a 2x3 matrix, float64; further columns stay as they are."""
    result = np.array(points, np.float64)
    result[..., :2] = points[..., :2] @ matrix[:, :2].T + matrix[:, 2]
    return result


def cut(image: np.ndarray, crop: Crop, height: int, width: int) -> np.ndarray:
    """`image` uint8 (h, w, 3) through the crop, float32 (height, width, 3) in 0 to 255: bilinear, black beyond the image's edge."""
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    places = moved(np.stack([columns, rows], axis=-1), crop.to_image)
    begin = np.floor(places).astype(np.int64)
    share = (places - begin).astype(np.float32)
    framed = np.pad(image, ((1, 1), (1, 1), (0, 0)))  # its border is the black that everything beyond reads
    total = np.zeros((height, width, 3), np.float32)
    for right, below in ((0, 0), (1, 0), (0, 1), (1, 1)):
        weight = np.abs(1 - right - share[..., 0]) * np.abs(1 - below - share[..., 1])
        x = np.clip(begin[..., 0] + right + 1, 0, framed.shape[1] - 1)
        y = np.clip(begin[..., 1] + below + 1, 0, framed.shape[0] - 1)
        total += weight[..., None] * framed[y, x]
    return total


def network_input(pixels: np.ndarray, planes: bool = False) -> np.ndarray:
    """Pixels (..., H, W, 3) in 0 to 255 as the network takes them: (..., 3, H, W) float32, by ImageNet's mean and deviation.

    `planes` appends column and row, each from -1 to 1, for networks that do not know their position themselves.
    """
    scaled = (pixels.astype(np.float32) / 255 - np.array(MEAN, np.float32)) / np.array(DEVIATION, np.float32)
    channels = np.moveaxis(scaled, -1, -3)
    if planes:
        height, width = channels.shape[-2:]
        across = np.broadcast_to(np.linspace(-1, 1, width, dtype=np.float32), (*channels.shape[:-3], 1, height, width))
        down = np.broadcast_to(np.linspace(-1, 1, height, dtype=np.float32)[:, None], across.shape)
        channels = np.concatenate([channels, across, down], axis=-3)
    return np.ascontiguousarray(channels, np.float32)


def read_image(file: str | Path) -> np.ndarray:
    """An image file as uint8 (h, w, 3). Raises `IsthmusError` where it is missing, damaged, or so large that it would take all memory."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as opened:
                return np.asarray(opened.convert("RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise IsthmusError(f"{file}: cannot be read as an image: {error}") from None


def crops_of_people(image: np.ndarray, boxes: np.ndarray, height: int, width: int, planes: bool = False) -> tuple[np.ndarray, list[Crop]]:
    """What the network takes for each of `boxes` (people, 4) in one image, (people, channels, height, width), and the crops that lead back."""
    crops = [person_crop(box, height, width) for box in boxes]
    return network_input(np.stack([cut(image, crop, height, width) for crop in crops]), planes), crops


# ---- coordinates as classes
def bins_of(points: np.ndarray, extent: int, bins_per_pixel: int) -> np.ndarray:
    """The class of each coordinate of crop pixels, 0 to extent * bins_per_pixel - 1, int64: at most half a bin away inside the crop."""
    return np.clip(np.rint(points * bins_per_pixel), 0, extent * bins_per_pixel - 1).astype(np.int64)


def decoded(logits_x: np.ndarray, logits_y: np.ndarray, bins_per_pixel: int = 2, reach: int = REACH) -> np.ndarray:
    """(people, joints, bins) twice as (people, joints, 3), float64; see `located`."""
    return located(shares_of(logits_x), shares_of(logits_y), bins_per_pixel, reach)


def located(across: np.ndarray, down: np.ndarray, bins_per_pixel: int = 2, reach: int = REACH) -> np.ndarray:
    """Shares of bins (people, joints, bins) as (people, joints, 3): x and y in crop pixels, and the largest share on the less sure axis.

    A coordinate is the centre of mass of the likeliest bin and of `reach` bins to either side; the paper's is that bin alone (`reach` 0), which a
    step of int8 moves wherever neighbours are nearly as likely.
    """
    places = []
    for shares in (across, down):
        bins, likeliest = np.arange(shares.shape[-1]), shares.argmax(axis=-1)[..., None]
        near = np.where(np.abs(bins - likeliest) <= reach, shares, 0)
        places.append((near * bins).sum(axis=-1) / near.sum(axis=-1) / bins_per_pixel)
    return np.stack([*places, np.minimum(across.max(axis=-1), down.max(axis=-1))], axis=-1)


def shares_of(logits: np.ndarray) -> np.ndarray:
    """The softmax along the last axis, at the loss's temperature; float64."""
    exponents = (logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)) / TEMPERATURE
    powers = np.exp(exponents)
    return powers / powers.sum(axis=-1, keepdims=True)


def with_mirrored(shares: tuple[np.ndarray, np.ndarray], flipped: tuple[np.ndarray, np.ndarray], skeleton: Skeleton, bins_per_pixel: int) -> list[np.ndarray]:
    """The mean of the shares (x, y) of a crop and of its mirror image (reversed columns): joints change sides, x runs the other way.

    Pixel c lies at W - 1 - c in the mirror, so bin j at k (W - 1) - j; the k - 1 last bins have no image there and keep their own shares.
    """
    (across, down), (across_mirrored, down_mirrored) = shares, flipped
    order, last = skeleton.mirrored, across.shape[-1] - bins_per_pixel
    found = across.copy()
    found[..., : last + 1] = (across[..., : last + 1] + across_mirrored[:, order, last::-1]) / 2
    return [found, (down + down_mirrored[:, order]) / 2]


# ---- scores
def similarity(found: np.ndarray, truth: np.ndarray, area: float, skeleton: Skeleton) -> float:
    """OKS: mean over the annotated joints of exp(-d^2 / (2 area k^2)) with k = 2 sigma. Both (joints, >= 2 or 3); truth's third is its visibility.

    0 where nothing is annotated. Source: COCO's evaluation code (area is the annotation's).
    """
    known = truth[:, 2] > 0
    if not known.any():
        return 0.0
    squared = ((found[:, :2] - truth[:, :2]) ** 2).sum(axis=1)
    allowed = 2 * (area + np.spacing(1)) * (2 * np.asarray(skeleton.sigmas)) ** 2
    return float(np.exp(-squared / allowed)[known].mean())


def person_score(box_score: float, confidences: np.ndarray) -> float:
    """The box's score times the mean confidence of the joints that are above `CONFIDENT`; 0 where none is."""
    sure = confidences[confidences > CONFIDENT]
    return float(box_score * sure.mean()) if sure.size else 0.0


def without_doubles(people: np.ndarray, scores: np.ndarray, areas: np.ndarray, skeleton: Skeleton, most: float = 0.9) -> list[int]:
    """Indices of the people kept, best first: one that is more similar than `most` to a better one is the same person found twice (OKS-NMS)."""
    kept: list[int] = []
    for index in np.argsort(-scores, kind="stable"):
        seen = np.column_stack([people[index][:, :2], np.ones(len(skeleton.joints))])
        if all(similarity(people[other], seen, float(areas[index] + areas[other]) / 2, skeleton) <= most for other in kept):
            kept.append(int(index))
    return kept


# ---- all of it
def joints_in_image(
    image: np.ndarray,
    boxes: np.ndarray,
    network: Network,
    height: int,
    width: int,
    bins_per_pixel: int = 2,
    planes: bool = False,
    reach: int = REACH,
) -> np.ndarray:
    """The joints of the people in `boxes` (people, 4) of one image, (people, joints, 3): x and y in the image's pixels, confidence 0 to 1.

    `network` takes crops (people, 3, height, width), 5 channels with `planes`, and gives logits of x and of y; `reach`: see `located`.
    """
    samples, crops = crops_of_people(image, boxes, height, width, planes)
    across, down = network(samples)
    found = decoded(across, down, bins_per_pixel, reach)
    return np.stack([moved(joints, crop.to_image) for joints, crop in zip(found, crops, strict=True)])
