# SPDX-License-Identifier: Apache-2.0
"""Around a chest X-ray classifier, in numpy and Pillow as on a device: an image file to the network's input, its scores to a decision."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from isthmus.errors import IsthmusError

if TYPE_CHECKING:
    from PIL.Image import Image as GreyImage

CLASSES = ("normal", "pneumonia")
SMALLEST_SIDE, MOST_PIXELS = 32, 2**26


def read_grey(file: Path, size: int) -> np.ndarray:
    """An image file as uint8 (size, size): one grey channel, bilinear with antialiasing, the aspect not kept.

    Raises `IsthmusError` on a file that is no readable image, of a side below 32 pixels, or of more than 2^26 pixels (not decoded then).
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file, formats=("JPEG", "PNG")) as image:
            width, height = image.size
            if min(width, height) < SMALLEST_SIDE or width * height > MOST_PIXELS:
                raise IsthmusError(f"{file}: {width}x{height} pixels, expected sides of at least {SMALLEST_SIDE} and at most {MOST_PIXELS} pixels")
            return resized(image.convert("L"), size)
    except FileNotFoundError:
        raise IsthmusError(f"{file}: no such file") from None
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:  # SyntaxError: Pillow's word for a broken PNG
        raise IsthmusError(f"{file}: cannot be read as a JPEG or PNG image, it is cut short or damaged ({type(error).__name__})") from None


def resized(image: GreyImage, size: int) -> np.ndarray:
    """A grey image as uint8 (size, size)."""
    from PIL.Image import Resampling

    return np.asarray(image.resize((size, size), Resampling.BILINEAR))


def network_input(image: np.ndarray) -> np.ndarray:
    """uint8 (size, size) as float32 (1, 1, size, size): (pixel - 128) / 128, which every int8 scheme has without an error."""
    return ((image.astype(np.float32) - 128) / 128)[None, None]


def decide(scores: np.ndarray) -> tuple[str, float]:
    """Class scores (1, 2) as the class and the probability of pneumonia; the threshold is 0.5."""
    probability = 1 / (1 + np.exp(float(scores[0, 0]) - float(scores[0, 1])))
    return CLASSES[int(probability > 0.5)], float(probability)
