# SPDX-License-Identifier: Apache-2.0
"""MNIST from its own idx files, or with mnist_train5k.npz (500 training scans a digit) in place of the training file; or synthetic images of its shape."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from isthmus.errors import IsthmusError
from isthmus.train.data import Split
from isthmus.train.data.arrays import LABELS, MAX_ARRAY_BYTES, pixels, read_npz
from isthmus.train.data.images import Part, split_of_images
from isthmus.train.data.medmnist import found
from isthmus.train.data.stand_in import NAME, stand_in

SIZE = 28
CLASSES = tuple("0123456789")
VALIDATION_SHARE = 0.1  # of the training scans, drawn evenly from every digit
FOLDERS = ("", "mnist/", "MNIST/raw/")
UNSIGNED_BYTE = 8  # the idx format's code of the element type


def load(root: Path | None, channels: int = 1, seed: int = 0) -> Split:
    """[count, channels, 28, 28], see `network_input` for the values; the test part is MNIST's own, a tenth of the training scans validates, drawn by `seed`.

    Reads under root, root/mnist or root/MNIST/raw: {train,t10k}-{images-idx3,labels-idx1}-ubyte, plain or .gz. Without `root` the synthetic
    stand-in. Raises `IsthmusError` on files that are missing, damaged or wrong.
    """
    if root is None:
        return split_of_images(f"mnist, {NAME}", NAME, stand_in("mnist", len(CLASSES), 1, seed, SIZE), CLASSES, channels, seed)
    images, labels = _training(root)
    validates = _validation(labels, np.random.default_rng(seed))
    test = _idx(_file(root, "t10k-images-idx3-ubyte"), SIZE, SIZE), _idx(_file(root, "t10k-labels-idx1-ubyte"))
    parts = {"train": (images[~validates], labels[~validates]), "val": (images[validates], labels[validates]), "test": test}
    return split_of_images("mnist", str(root), parts, CLASSES, channels, seed)


def _training(root: Path) -> Part:
    names = [f"{folder}{name}{suffix}" for folder in FOLDERS for name in ("train-images-idx3-ubyte", "mnist_train5k.npz") for suffix in ("", ".gz")]
    file = found(root, [name for name in names if not name.endswith(".npz.gz")])
    if file.suffix == ".npz":
        arrays = read_npz(file, {"images": pixels(SIZE, SIZE), "labels": LABELS})
        return arrays["images"], arrays["labels"].reshape(-1)
    return _idx(file, SIZE, SIZE), _idx(_file(root, "train-labels-idx1-ubyte"))


def _validation(labels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    chosen = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        own = generator.permutation(np.flatnonzero(labels == label))
        chosen[own[: math.ceil(len(own) * VALIDATION_SHARE)]] = True
    return chosen


def _file(root: Path, name: str) -> Path:
    return found(root, [f"{folder}{name}{suffix}" for folder in FOLDERS for suffix in ("", ".gz")])


def _idx(file: Path, *tail: int) -> np.ndarray:
    """An idx file of unsigned bytes as uint8 (N, *tail): no more is read than its header announces and `MAX_ARRAY_BYTES` allows."""
    rank = 1 + len(tail)
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            header = stream.read(4 + 4 * rank)
            if len(header) < 4 + 4 * rank or header[:4] != bytes([0, 0, UNSIGNED_BYTE, rank]):
                raise IsthmusError(f"{file}: is no idx file of unsigned bytes with {rank} dimensions; get it again")
            shape = [int.from_bytes(header[4 * axis : 4 * axis + 4], "big") for axis in range(1, rank + 1)]
            size = math.prod(shape)
            if tuple(shape[1:]) != tail or size > MAX_ARRAY_BYTES:
                raise IsthmusError(f"{file}: holds {shape}, expected [{', '.join(['N', *map(str, tail)])}] of at most {MAX_ARRAY_BYTES} bytes")
            body = stream.read(size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise IsthmusError(f"{file}: cannot be read, it is cut short or damaged ({error}); get it again") from None
    if len(body) != size:
        raise IsthmusError(f"{file}: its header says {shape}, which is {size} bytes, but it holds {'more' if len(body) > size else len(body)}; get it again")
    return np.frombuffer(body, np.uint8).reshape(shape)
