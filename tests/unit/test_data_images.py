# SPDX-License-Identifier: Apache-2.0
"""Loaders of MedMNIST and MNIST files, and what they say of folders that are missing, cut short, mislabelled or hostile."""

from __future__ import annotations

import gzip
import io
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isthmus.errors import IsthmusError
from isthmus.train.data import arrays, medmnist, mnist
from isthmus.train.data.images import network_input
from isthmus.train.data.stand_in import SIZES, stand_in

REAL = Path(__file__).parents[3] / "shared" / "data"


def npz_arrays(count: int = 6, classes: int = 2, colour: bool = False, column: bool = True) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    made = {}
    for part in ("train", "val", "test"):
        made[f"{part}_images"] = generator.integers(0, 256, (count, 28, 28, 3) if colour else (count, 28, 28), np.uint8)
        labels = (np.arange(count) % classes).astype(np.uint8)
        made[f"{part}_labels"] = labels[:, None] if column else labels
    return made


def saved(folder: Path, name: str, content: Mapping[str, np.ndarray]) -> Path:
    file = folder / f"{name}.npz"
    np.savez_compressed(file, **content)  # type: ignore[arg-type]  # numpy's stub confuses **arrays with allow_pickle
    return file


def idx(array: np.ndarray, magic: bytes = b"\0\0\x08") -> bytes:
    return magic + bytes([array.ndim]) + b"".join(extent.to_bytes(4, "big") for extent in array.shape) + array.tobytes()


def mnist_folder(folder: Path, compress: bool = True) -> Path:
    generator = np.random.default_rng(0)
    for name, count in (("train", 40), ("t10k", 20)):
        parts = {"images-idx3": generator.integers(0, 256, (count, 28, 28), np.uint8), "labels-idx1": (np.arange(count) % 10).astype(np.uint8)}
        for what, array in parts.items():
            file = folder / f"{name}-{what}-ubyte"
            if compress:
                file.with_name(file.name + ".gz").write_bytes(gzip.compress(idx(array)))
            else:
                file.write_bytes(idx(array))
    return folder


# ---- what a network gets
def test_every_pixel_is_a_whole_step_of_int8() -> None:
    image = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    values = network_input(image, 3)
    assert values.shape == (1, 3, 16, 16) and values.dtype == np.float32
    np.testing.assert_array_equal(values[0, 0] * 128, image[0].astype(int) - 128)
    np.testing.assert_array_equal(values[:, 0], values[:, 2])


def test_colour_goes_to_the_front_and_no_network_for_grey_takes_it() -> None:
    image = np.zeros((2, 4, 5, 3), np.uint8)
    image[..., 1] = 255
    assert network_input(image, 3).shape == (2, 3, 4, 5)
    assert network_input(image, 3)[0, 1].min() == 127 / 128
    with pytest.raises(IsthmusError, match="images of 3 channels for a network that takes 1; choose a network for colour"):
        network_input(image, 1)


# ---- MedMNIST
@pytest.mark.parametrize("place", ["", "pneumoniamnist"])
@pytest.mark.parametrize("column", [True, False])
def test_a_medmnist_file_as_published_and_as_others_saved_it(tmp_path: Path, place: str, column: bool) -> None:
    folder = tmp_path / place
    folder.mkdir(exist_ok=True)
    content = npz_arrays(column=column)
    saved(folder, "pneumoniamnist", content)
    split = medmnist.load("pneumoniamnist", tmp_path, channels=3)
    assert split.name == "pneumoniamnist" and split.sample_shape == (3, 28, 28) and split.classes == ("normal", "pneumonia")
    np.testing.assert_array_equal(split.x_test[:, 0] * 128 + 128, content["test_images"])
    np.testing.assert_array_equal(split.y_val, content["val_labels"].reshape(-1))


def test_extra_training_images_join_the_training_part(tmp_path: Path) -> None:
    saved(tmp_path, "pneumoniamnist", npz_arrays())
    saved(tmp_path, "extra_train_normals", {"images": np.full((3, 28, 28), 7, np.uint8), "labels": np.zeros(3, np.uint8)})
    split = medmnist.load("pneumoniamnist", tmp_path)
    assert len(split.x_train) == 9 and len(split.x_val) == 6 and split.y_train[-3:].tolist() == [0, 0, 0]


def test_a_colour_set(tmp_path: Path) -> None:
    saved(tmp_path, "pathmnist", npz_arrays(18, 9, colour=True))
    assert medmnist.load("pathmnist", tmp_path, channels=3).sample_shape == (3, 28, 28)


Content = dict[str, np.ndarray]


def without(*names: str) -> Content:
    return {name: array for name, array in npz_arrays().items() if name not in names}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (without("val_labels"), r"1 of the 6 arrays needed do not fit: val_labels is missing; get the file again"),
        (without(*(f"{part}_{what}" for part in ("val", "test") for what in ("images", "labels"))), r"4 of the 6 .* val_images is missing, .* and 1 more;"),
        (npz_arrays() | {"test_images": np.zeros((6, 27, 28), np.uint8)}, r"test_images is uint8\[6, 27, 28\] instead of uint8 \[N, 28, 28\]"),
        (npz_arrays() | {"test_images": np.zeros((6, 28, 28))}, r"test_images is float64\[6, 28, 28\] instead of uint8"),
        (npz_arrays() | {"val_labels": np.array([0.0] * 6)}, r"val_labels is float64\[6\] instead of whole numbers \[N\] or \[N, 1\]"),
        (npz_arrays() | {"val_labels": np.zeros((2, 1), np.uint8)}, r"part val: 2 labels for 6 images"),
        (
            npz_arrays() | {"train_labels": np.array([0, 5, 1, 9, 7, 8])},
            r"part train: 4 of 6 labels are outside 0 to 1: 5 of image 1, 9 of image 3, .* and 1 more",
        ),
        (npz_arrays() | {"test_labels": np.zeros(6, np.uint8)}, r"part test: no image of 1 of the 2 classes: 'pneumonia'; every part needs every class"),
        (npz_arrays() | {"test_labels": np.array([object()] * 6)}, r"test_labels is object\[6\] instead of"),
    ],
)
def test_a_medmnist_file_that_does_not_fit(tmp_path: Path, content: Content, message: str) -> None:
    file = tmp_path / "pneumoniamnist.npz"
    np.savez(file, **content)  # type: ignore[arg-type]
    with pytest.raises(IsthmusError, match=message) as caught:
        medmnist.load("pneumoniamnist", tmp_path)
    assert str(caught.value).startswith(str(file)) and "\n" not in str(caught.value)


def test_folders_that_hold_nothing(tmp_path: Path) -> None:
    with pytest.raises(IsthmusError, match="nowhere: no such data folder"):
        medmnist.load("breastmnist", tmp_path / "nowhere")
    with pytest.raises(IsthmusError, match=r"holds none of breastmnist.npz, breastmnist/breastmnist.npz; put the data set's own file there"):
        medmnist.load("breastmnist", tmp_path)
    with pytest.raises(IsthmusError, match=r"holds none of train-images-idx3-ubyte, .* more; put"):
        mnist.load(tmp_path)


def test_a_header_that_announces_more_than_there_is_takes_no_memory(tmp_path: Path) -> None:
    """The header says 2^40 images; the file holds none."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (2**40, 28, 28)})
    with zipfile.ZipFile(tmp_path / "pneumoniamnist.npz", "w") as archive:
        for name in npz_arrays():
            archive.writestr(f"{name}.npy", header.getvalue())
    with pytest.raises(IsthmusError, match=r"train_images of \[1099511627776, 28, 28\] takes \d+ bytes, more than the 1073741824 that are read"):
        medmnist.load("pneumoniamnist", tmp_path)


def test_an_array_shorter_than_its_header_says(tmp_path: Path) -> None:
    content = {name: io.BytesIO() for name in npz_arrays()}
    for name, array in npz_arrays().items():
        np.save(content[name], array)
    with zipfile.ZipFile(tmp_path / "pneumoniamnist.npz", "w") as archive:
        for name, stream in content.items():
            archive.writestr(f"{name}.npy", stream.getvalue()[: -5 if name == "val_images" else None])
    with pytest.raises(IsthmusError, match=r"val_images of \[6, 28, 28\] needs 4704 bytes and has 4699"):
        medmnist.load("pneumoniamnist", tmp_path)


@given(data=st.data())
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_file_is_read_or_refused_in_one_sentence(tmp_path: Path, data: st.DataObject) -> None:
    """Bytes cut off or changed anywhere: never another exception, and never labels that are no class."""
    file = saved(tmp_path, "pneumoniamnist", npz_arrays())
    content = bytearray(file.read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(bytes(content))
    try:
        split = medmnist.load("pneumoniamnist", tmp_path)
    except IsthmusError as error:
        assert "\n" not in str(error)
    else:
        assert set(split.y_train.tolist()) == {0, 1}


# ---- MNIST
@pytest.mark.parametrize("place", ["", "mnist", "MNIST/raw"])
@pytest.mark.parametrize("compress", [True, False])
def test_mnist_as_published(tmp_path: Path, place: str, compress: bool) -> None:
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    mnist_folder(tmp_path / place, compress)
    split = mnist.load(tmp_path, seed=1)
    assert [len(split.x_train), len(split.x_val), len(split.x_test)] == [30, 10, 20]
    assert np.bincount(split.y_val).tolist() == [1] * 10
    assert not {image.tobytes() for image in split.x_train} & {image.tobytes() for image in split.x_val}
    np.testing.assert_array_equal(split.x_val, mnist.load(tmp_path, seed=1).x_val)
    assert not np.array_equal(split.x_val, mnist.load(tmp_path, seed=2).x_val)


def test_mnist_with_the_small_training_file(tmp_path: Path) -> None:
    mnist_folder(tmp_path)
    for file in tmp_path.glob("train-*"):
        file.unlink()
    saved(tmp_path, "mnist_train5k", {"images": np.zeros((50, 28, 28), np.uint8), "labels": np.arange(50, dtype=np.uint8) % 10})
    assert len(mnist.load(tmp_path).x_train) == 40


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (idx(np.zeros((20, 28, 28), np.uint8))[:-1], r"its header says \[20, 28, 28\], which is 15680 bytes, but it holds 15679"),
        (idx(np.zeros((20, 28, 28), np.uint8)) + b"x", r"which is 15680 bytes, but it holds more"),
        (idx(np.zeros((20, 28), np.uint8)), r"is no idx file of unsigned bytes with 3 dimensions"),
        (idx(np.zeros((20, 28, 28), np.uint8), b"\0\0\x0d"), r"is no idx file of unsigned bytes with 3 dimensions"),
        (idx(np.zeros((20, 29, 28), np.uint8)), r"holds \[20, 29, 28\], expected \[N, 28, 28\]"),
        (b"\0\0\x08\x03" + b"\xff" * 4 + (28).to_bytes(4, "big") * 2, r"holds \[4294967295, 28, 28\], expected \[N, 28, 28\] of at most"),
        (b"", r"is no idx file"),
        (idx(np.zeros((19, 28, 28), np.uint8)), r"part test: 20 labels for 19 images"),
    ],
)
def test_mnist_files_that_do_not_fit(tmp_path: Path, content: bytes, message: str) -> None:
    mnist_folder(tmp_path, compress=False)
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(IsthmusError, match=message):
        mnist.load(tmp_path)


def test_a_compressed_file_cut_short(tmp_path: Path) -> None:
    file = mnist_folder(tmp_path) / "t10k-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(IsthmusError, match=r"t10k-images-idx3-ubyte.gz: cannot be read, it is cut short or damaged"):
        mnist.load(tmp_path)


# ---- stand-ins
@pytest.mark.parametrize("name", [*medmnist.DATA_SETS, "mnist"])
def test_stand_ins_have_the_shapes_and_every_class_and_say_what_they_are(name: str) -> None:
    split = mnist.load(None) if name == "mnist" else medmnist.load(name, None, channels=3)
    assert split.name == f"{name}, synthetic stand-in"
    assert [len(split.x_train), len(split.x_val), len(split.x_test)] == list(SIZES.values())
    assert split.sample_shape == ((1 if name == "mnist" else 3), 28, 28)
    assert split.x_train.min() >= -1 and split.x_train.max() <= 127 / 128


def test_stand_ins_are_seeded_and_their_test_part_balanced_where_the_set_is() -> None:
    first, again, other = (stand_in("octmnist", 4, 1, seed, balanced=True) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first["train"][0], again["train"][0])
    assert not np.array_equal(first["train"][0], other["train"][0])
    assert first["train"][0].dtype == np.uint8
    assert np.bincount(first["test"][1]).min() > 80 and np.bincount(first["train"][1]).min() < 300


def test_listed() -> None:
    assert arrays.listed([1, 2, 3]) == "1, 2, 3" and arrays.listed([1, 2, 3, 4, 5]) == "1, 2, 3 and 2 more"


# ---- the real files, where they are
@pytest.mark.skipif(not (REAL / "pneumoniamnist").is_dir(), reason="the real data sets are not beside this checkout")
def test_the_real_files() -> None:
    pneumonia, breast, digits = medmnist.load("pneumoniamnist", REAL), medmnist.load("breastmnist", REAL), mnist.load(REAL)
    assert [np.bincount(labels).tolist() for labels in (pneumonia.y_train, pneumonia.y_val, pneumonia.y_test)] == [[1214, 3494], [135, 389], [234, 390]]
    assert [np.bincount(labels).tolist() for labels in (breast.y_train, breast.y_val, breast.y_test)] == [[147, 399], [21, 57], [42, 114]]
    assert [len(digits.x_train), len(digits.x_val), len(digits.x_test)] == [4500, 500, 10000]
