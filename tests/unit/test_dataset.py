# SPDX-License-Identifier: Apache-2.0
"""Calibration data: what fits is read, what does not is named before anything slow starts."""

from __future__ import annotations

import contextlib
import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from isthmus.dataset import Preprocess, load_data, load_image
from isthmus.errors import IsthmusError

INPUTS = {"image": (1, 1, 4, 4)}
GOOD = np.linspace(0, 1, 3 * 16, dtype=np.float32).reshape(3, 1, 4, 4)


def _npz(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize("name", ["image", "x", "images"])
def test_npz_by_name_or_by_habit(tmp_path: Path, name: str) -> None:
    data = load_data(_npz(tmp_path / "d.npz", **{name: GOOD, "y": np.array([1, 0, 2])}), INPUTS, None)
    np.testing.assert_array_equal(data.samples["image"], GOOD)
    assert data.labels is not None and data.labels.tolist() == [1, 0, 2]
    assert len(data.take(2)) == 2


def test_npy(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", GOOD.astype(np.float64))
    assert load_data(tmp_path / "d.npy", INPUTS, None).samples["image"].dtype == np.float32


def test_integers_need_to_be_told_what_they_mean(tmp_path: Path) -> None:
    pixels = (GOOD * 255).astype(np.uint8)
    np.save(tmp_path / "d.npy", pixels)
    with pytest.raises(IsthmusError, match="say what they become with --preprocess"):
        load_data(tmp_path / "d.npy", INPUTS, None)
    scaled = load_data(tmp_path / "d.npy", INPUTS, Preprocess.parse("scale=1/255,mean=0.5,std=0.5")).samples["image"]
    np.testing.assert_allclose(scaled, (pixels / 255 - 0.5) / 0.5, atol=1e-6)
    assert load_data(tmp_path / "d.npy", INPUTS, Preprocess.parse("raw")).samples["image"].max() == 255


WRONG = {
    "wrong shape": ({"image": np.zeros((3, 1, 4, 5), np.float32)}, r"expected shape \[N, 1, 4, 4\], found \[3, 1, 4, 5\]"),
    "wrong rank": ({"image": np.zeros((3, 4, 4), np.float32)}, r"found \[3, 4, 4\]"),
    "text": ({"image": np.array(["a"] * 3)}, "expected numbers, found dtype <U1"),
    "complex": ({"image": GOOD.astype(np.complex64)}, "expected numbers, found dtype complex64"),
    "empty": ({"image": np.zeros((0, 1, 4, 4), np.float32)}, "holds no samples"),
    "nan": ({"image": np.where(np.arange(3).reshape(3, 1, 1, 1) == 1, np.nan, GOOD)}, "NaN or infinity, first in sample 1"),
    "infinity": ({"image": np.full((3, 1, 4, 4), np.inf, np.float32)}, "NaN or infinity, first in sample 0"),
    "another name": ({"picture": GOOD}, r"no array for input 'image': it holds \['picture'\]"),
    "too few labels": ({"image": GOOD, "y": np.array([1])}, r"expected one integer label a sample \(3\), found int64\[1\]"),
    "float labels": ({"image": GOOD, "y": np.array([1.0, 0, 2])}, "found float64"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_named(tmp_path: Path, name: str) -> None:
    arrays, message = WRONG[name]
    with pytest.raises(IsthmusError, match=message) as caught:
        load_data(_npz(tmp_path / "d.npz", **arrays), INPUTS, None)
    assert "d.npz" in str(caught.value)


def test_several_inputs_must_agree(tmp_path: Path) -> None:
    inputs = {"a": (1, 2), "b": (1, 3)}
    with pytest.raises(IsthmusError, match=r"different numbers of samples: \{'a': 3, 'b': 2\}"):
        load_data(_npz(tmp_path / "d.npz", a=np.zeros((3, 2)), b=np.zeros((2, 3))), inputs, None)
    with pytest.raises(IsthmusError, match="one array, but the model has the inputs"):
        np.save(tmp_path / "d.npy", np.zeros((3, 2)))
        load_data(tmp_path / "d.npy", inputs, None)


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(IsthmusError, match="no such calibration data"):
        load_data(tmp_path / "nothing.npz", INPUTS, None)
    (tmp_path / "d.csv").write_text("1,2")
    with pytest.raises(IsthmusError, match=r"expected a \.npz, a \.npy or a folder"):
        load_data(tmp_path / "d.csv", INPUTS, None)
    with pytest.raises(IsthmusError, match="no images"):
        (tmp_path / "empty").mkdir()
        load_data(tmp_path / "empty", INPUTS, Preprocess())


def test_pickled_data_is_never_unpickled(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (Path(tmp_path / "ran"),))  # type: ignore[return-value]

    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|O", "fortran_order": False, "shape": (1,)})
    (tmp_path / "d.npy").write_bytes(buffer.getvalue() + pickle.dumps(Evil()))
    with pytest.raises(IsthmusError, match="cannot be read"):
        load_data(tmp_path / "d.npy", INPUTS, None)
    assert not (tmp_path / "ran").exists()


def test_a_zip_bomb_is_refused_before_it_unpacks(tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (2**31, 1, 4, 4)})
    with zipfile.ZipFile(tmp_path / "d.npz", "w", zipfile.ZIP_DEFLATED) as archive, archive.open("image.npy", "w", force_zip64=True) as stream:
        stream.write(header.getvalue())
    info = bytearray((tmp_path / "d.npz").read_bytes())
    with pytest.raises(IsthmusError, match="cannot be read"):
        load_data(tmp_path / "d.npz", INPUTS, None)
    assert len(info) < 1000


@settings(max_examples=60, deadline=None)
@given(raw=st.binary(max_size=200), npz=st.booleans())
def test_any_bytes_are_read_or_named(tmp_path_factory: pytest.TempPathFactory, raw: bytes, npz: bool) -> None:
    file = tmp_path_factory.mktemp("data") / ("d.npz" if npz else "d.npy")
    file.write_bytes(raw)
    with pytest.raises(IsthmusError):
        load_data(file, INPUTS, None)


def saved(name: str) -> bytes:
    buffer = io.BytesIO()
    if name == "npy":
        np.save(buffer, GOOD)
    else:
        save = np.savez_compressed if name == "npz, compressed" else np.savez
        save(buffer, image=GOOD, label=np.arange(len(GOOD)))
    return buffer.getvalue()


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(["npy", "npz", "npz, compressed"]), changes=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=5))
def test_a_damaged_file_is_read_or_named(tmp_path_factory: pytest.TempPathFactory, name: str, changes: list[tuple[int, int]]) -> None:
    """Also what numpy's own readers raise beside ValueError: zlib's errors, an unknown compression, a password, a header that never ends."""
    raw = bytearray(saved(name))
    for place, value in changes:
        raw[place % len(raw)] = value
    file = tmp_path_factory.mktemp("data") / f"d.{name[:3]}"
    file.write_bytes(raw)
    with contextlib.suppress(IsthmusError):
        load_data(file, INPUTS, None)


def test_damage_to_a_compressed_file_is_one_sentence(tmp_path: Path) -> None:
    raw = bytearray(saved("npz, compressed"))
    raw[60:80] = bytes(20)
    (tmp_path / "d.npz").write_bytes(raw)
    with pytest.raises(IsthmusError, match=r"d\.npz: cannot be read as a \.npz file, it is cut short or damaged \(.*\); get or make it again"):
        load_data(tmp_path / "d.npz", INPUTS, None)


def test_a_folder_of_images_and_its_classes(tmp_path: Path) -> None:
    for label, level in enumerate((0, 255)):
        folder = tmp_path / f"class{label}"
        folder.mkdir()
        for index in range(2):
            Image.new("L", (8, 6), level).save(folder / f"{index}.png")
    data = load_data(tmp_path, INPUTS, Preprocess.parse("scale=1/255"))
    assert data.labels is not None and data.labels.tolist() == [0, 0, 1, 1]
    assert data.samples["image"].shape == (4, 1, 4, 4)
    assert data.samples["image"][:2].max() == 0 and data.samples["image"][2:].min() == 1
    with pytest.raises(IsthmusError, match="images need --preprocess"):
        load_data(tmp_path, INPUTS, None)


def test_images_are_resized_as_asked(tmp_path: Path) -> None:
    picture = np.zeros((4, 8, 3), np.uint8)
    picture[:, 2:6] = 200
    Image.fromarray(picture).save(tmp_path / "wide.png")
    shape = (1, 3, 4, 4)
    assert load_image(tmp_path / "wide.png", shape, Preprocess.parse("resize=crop")).min() == 200
    assert load_image(tmp_path / "wide.png", shape, Preprocess.parse("resize=stretch")).min() < 200
    with pytest.raises(IsthmusError, match="is 8x4, the model takes 4x4"):
        load_image(tmp_path / "wide.png", shape, Preprocess.parse("resize=none"))
    (tmp_path / "no.png").write_bytes(b"text")
    with pytest.raises(IsthmusError, match=r"no\.png: cannot be read as an image"):
        load_image(tmp_path / "no.png", shape, Preprocess())
    with pytest.raises(IsthmusError, match="needs an input of shape"):
        load_image(tmp_path / "wide.png", (1, 7), Preprocess())


@pytest.mark.parametrize("text", ["scale", "scale=x", "scale=1/0", "mean=", "resize=big", "gamma=2", "std=0", "scale=0"])
def test_preprocess_names_the_wrong_part(text: str) -> None:
    with pytest.raises(IsthmusError, match="--preprocess"):
        Preprocess.parse(text)


@settings(max_examples=100)
@given(st.text(max_size=30))
def test_preprocess_parses_or_names(text: str) -> None:
    try:
        made = Preprocess.parse(text)
    except IsthmusError:
        return
    assert Preprocess.from_json(made.to_json()) == made


def test_preprocess_by_channel() -> None:
    made = Preprocess.parse("scale=1/255,mean=0.4:0.5:0.6,std=0.2:0.2:0.2")
    result = made.apply(np.full((2, 3, 2, 2), 255, np.uint8))
    np.testing.assert_allclose(result[0, :, 0, 0], [3.0, 2.5, 2.0], atol=1e-6)
    with pytest.raises(IsthmusError, match="3 numbers in mean or std, the input has 1 channels"):
        made.apply(np.zeros((2, 1, 2, 2), np.uint8))
