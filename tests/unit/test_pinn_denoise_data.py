# SPDX-License-Identifier: Apache-2.0
"""Noise by its statistics, folders of images good and bad, metrics against the library and closed forms, tiles against the whole image."""

from __future__ import annotations

import io
import math
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from isthmus.errors import IsthmusError
from isthmus.train.data.denoise import Degradation, divide, load, read_images
from isthmus.train.data.synthetic_aerial import CROP_ROWS, FIELD, ROAD, ROOF, synthetic_aerial
from isthmus.train.image_metrics import cnr, enl, psnr, ssim
from isthmus.train.processing.denoise import blended, network_input, padded, pixels_of, tiled

COUNTS = {"train": 6, "val": 2, "test": 4}


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# ---- noise
FLAT = np.full(200_000, 0.5)
WHOLE = np.ones(FLAT.shape, bool)


@pytest.mark.parametrize(("looks", "amplitude_mean", "amplitude_looks"), [(1, 0.8862, 3.66), (4, 0.9693, 15.55), (8, 0.9845, 31.52)])
def test_speckle_has_the_statistics_of_its_looks(looks: int, amplitude_mean: float, amplitude_looks: float) -> None:
    intensity = Degradation("intensity speckle", looks).apply(FLAT, generator(), clip=False) / 0.5
    assert intensity.mean() == pytest.approx(1, abs=0.01) and intensity.var() == pytest.approx(1 / looks, rel=0.03)
    assert enl(intensity, WHOLE) == pytest.approx(looks, rel=0.05)
    amplitude = Degradation("speckle", looks).apply(FLAT, generator(), clip=False)
    assert amplitude.mean() / 0.5 == pytest.approx(amplitude_mean, rel=0.005)
    assert enl(amplitude, WHOLE) == pytest.approx(amplitude_looks, rel=0.05)


@pytest.mark.parametrize(("sigma", "expected"), [(15, 24.61), (25, 20.17), (50, 14.15)])
def test_gaussian_noise_has_its_level(sigma: float, expected: float) -> None:
    noisy = Degradation("gaussian", sigma).apply(FLAT, generator(), clip=False)
    assert 10 * math.log10(1 / ((noisy - FLAT) ** 2).mean()) == pytest.approx(expected, abs=0.05)


def test_poisson_gaussian_counts_and_reads() -> None:
    noisy = Degradation("poisson-gaussian", 4).apply(FLAT, generator(), clip=False)
    assert noisy.mean() == pytest.approx(0.5, rel=0.01) and noisy.var() == pytest.approx(0.5 / 4 + (5 / 255) ** 2, rel=0.02)


def test_noise_is_clipped_as_a_sensor_does_and_drawn_by_its_generator() -> None:
    noise = Degradation("gaussian", 50)
    assert noise.apply(FLAT, generator()).min() == 0 and noise.apply(FLAT, generator()).max() == 1
    np.testing.assert_array_equal(noise.apply(FLAT, generator(3)), noise.apply(FLAT, generator(3)))
    assert noise.apply(FLAT, generator()).dtype == np.float32
    with pytest.raises(IsthmusError, match="degradation speckle: level 0 must be above 0"):
        Degradation("speckle", 0)


# ---- synthetic images
def test_synthetic_images_show_every_kind_and_are_seeded() -> None:
    image, kinds = synthetic_aerial(generator(), 96)
    assert image.shape == kinds.shape == (96, 96) and image.dtype == np.float32 and 0 <= image.min() < image.max() <= 1
    np.testing.assert_array_equal(image, synthetic_aerial(generator(), 96)[0])
    assert {FIELD, ROAD, ROOF} <= set(np.unique(kinds)) <= {FIELD, CROP_ROWS, ROAD, ROOF}


# ---- folders of images
def folder(root: Path, sizes: dict[str, tuple[int, int]]) -> Path:
    for number, (name, size) in enumerate(sizes.items()):
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator(number).integers(0, 256, size, dtype=np.uint8)).save(file)
    return root


FIFTEEN = {**{f"BSD68/{number:02d}.png": (24, 32) for number in range(12)}, **{f"Set12/{number}.png": (32, 24) for number in range(3)}}


def test_parts_share_no_image_and_set12_is_for_tests_alone(tmp_path: Path) -> None:
    images = read_images(folder(tmp_path / "denoise", FIFTEEN).parent)
    assert len(images) == 15 and images["BSD68/03.png"].shape == (24, 32) and images["BSD68/03.png"].dtype == np.uint8
    parts = divide(list(images), 0)
    assert {part: len(names) for part, names in parts.items()} == {"train": 10, "val": 1, "test": 4}
    assert sorted(chain.from_iterable(parts.values())) == sorted(images)
    assert [name for names in (parts["train"], parts["val"]) for name in names if name.startswith("Set12")] == []
    assert divide(list(images), 0) == parts != divide(list(images), 1)


def test_patches_are_pieces_of_their_images(tmp_path: Path) -> None:
    root = folder(tmp_path, FIFTEEN)
    split = load(root, 16, Degradation("gaussian", 25), COUNTS)
    assert split.x_train.shape == (6, 1, 16, 16) and split.y_test.shape == (4, 2, 16, 16) and split.classes == ()
    np.testing.assert_array_equal(split.y_test[:, 1:], split.x_test)
    image = read_images(root)[divide(list(read_images(root)), 0)["test"][0]] / np.float32(255)
    windows = np.lib.stride_tricks.sliding_window_view(image, (16, 16))
    assert (windows == split.y_test[0, 0]).all(axis=(2, 3)).sum() == 1
    more = load(root, 16, Degradation("gaussian", 25), COUNTS | {"train": 9})
    np.testing.assert_array_equal(more.x_test, split.x_test)  # whatever the number of training patches


def test_colour_becomes_luma(tmp_path: Path) -> None:
    for number in range(3):
        Image.fromarray(np.full((20, 20, 3), (200, 100, 50), np.uint8)).save(tmp_path / f"{number}.png")
    assert np.unique(read_images(tmp_path)["1.png"]).tolist() == [round(0.299 * 200 + 0.587 * 100 + 0.114 * 50)]


def test_without_a_folder_images_are_synthetic_and_the_name_says_so() -> None:
    split = load(None, 32, Degradation("speckle", 4), COUNTS)
    assert "synthetic stand-in" in split.name and "speckle 4" in split.name
    assert {part: len(getattr(split, f"x_{part}")) for part in COUNTS} == COUNTS


def test_bad_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(IsthmusError, match="no such data folder"):
        read_images(tmp_path / "none")
    with pytest.raises(IsthmusError, match="holds no images"):
        read_images(tmp_path)
    root = folder(tmp_path / "bad", FIFTEEN)
    whole = (root / "BSD68/01.png").read_bytes()
    (root / "BSD68/01.png").write_bytes(whole[: len(whole) // 2])
    (root / "BSD68/02.png").write_bytes(b"no image")
    Image.fromarray(np.zeros((24, 24), np.uint16)).save(root / "BSD68/03.png")
    with pytest.raises(IsthmusError, match=r"3 of 15 images cannot be used: .*01.png: is cut short or damaged.*02.png: is no image.*03.png: is of mode I;16"):
        read_images(root)


def test_images_smaller_than_a_patch_and_too_few_are_named(tmp_path: Path) -> None:
    root = folder(tmp_path / "small", FIFTEEN | {"BSD68/05.png": (15, 40)})
    with pytest.raises(IsthmusError, match=r"1 of 15 images are smaller than a patch of 16x16: BSD68/05.png \(40x15\)"):
        load(root, 16, Degradation(), COUNTS)
    with pytest.raises(IsthmusError, match="2 images beside Set12, which is for tests alone: at least 3 are needed"):
        load(folder(tmp_path / "few", {"a.png": (20, 20), "b.png": (20, 20), "Set12/1.png": (20, 20)}), 16, Degradation(), COUNTS)


@settings(max_examples=25)
@given(st.data())
def test_a_damaged_image_is_read_or_refused_in_one_sentence(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    root = tmp_path_factory.mktemp("damaged")
    buffer = io.BytesIO()
    Image.fromarray(generator().integers(0, 256, (6, 6), dtype=np.uint8)).save(buffer, "PNG")
    content = bytearray(buffer.getvalue()[: data.draw(st.integers(0, len(buffer.getvalue())))])
    for place, value in data.draw(st.lists(st.tuples(st.integers(0, max(len(content) - 1, 0)), st.integers(0, 255)), max_size=4)):
        if content:
            content[place] = value
    (root / "a.png").write_bytes(bytes(content))
    try:
        assert read_images(root)["a.png"].ndim == 2
    except IsthmusError as error:
        assert "a.png" in str(error) and "\n" not in str(error)


# ---- metrics
def test_psnr_is_ten_times_the_logarithm_of_the_error() -> None:
    images = generator().random((3, 1, 16, 16)).astype(np.float32) * 0.8
    assert psnr(images + np.float32(0.1), images) == pytest.approx(20, abs=1e-4)
    unequal = images + np.array([0.1, 0.01, 0.2], np.float32)[:, None, None, None]
    assert psnr(unequal, images) == pytest.approx(np.mean([20, 40, 20 * math.log10(5)]), abs=1e-3)  # of each image, then the mean
    assert psnr(images, images) == math.inf


def test_ssim_is_that_of_the_original_definition() -> None:
    """Gaussian window of sigma 1.5, 11x11, K1 = 0.01, K2 = 0.03, the border mirrored (scipy's filter as the second computation)."""
    from scipy.ndimage import gaussian_filter

    clean = generator(0).random((1, 1, 40, 40)).astype(np.float32)
    noisy = np.clip(clean + generator(1).normal(0, 0.1, clean.shape), 0, 1).astype(np.float32)
    assert ssim(clean, clean) == pytest.approx(1, abs=1e-6)

    def mean(values: np.ndarray) -> np.ndarray:
        return gaussian_filter(values, 1.5, truncate=5 / 1.5, mode="mirror")

    x, y = clean[0, 0].astype(np.float64), noisy[0, 0].astype(np.float64)
    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    whole = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    assert ssim(noisy, clean) == pytest.approx(whole.mean(), abs=1e-5)


def test_enl_and_cnr_are_closed_forms_on_two_levels() -> None:
    image = np.zeros((4, 8))
    image[:, :4] = np.where(np.arange(4) % 2, 0.3, 0.5)  # mean 0.4, variance 0.01
    image[:, 4:] = np.where(np.arange(4) % 2, 0.7, 0.9)
    left = np.zeros(image.shape, bool)
    left[:, :4] = True
    assert enl(image, left) == pytest.approx(0.16 / 0.01)
    assert cnr(image, ~left, left) == pytest.approx(0.4 / math.sqrt(0.02))
    flat = np.full((4, 8), 0.5)
    assert enl(flat, left) == math.inf and cnr(flat, left, ~left) == math.inf
    with pytest.raises(IsthmusError, match=r"bool mask of the image's shape \[4, 8\] with at least 2 pixels set, found bool\[4, 8\] with 0"):
        enl(image, np.zeros(image.shape, bool))


# ---- around the network
@settings(max_examples=30)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(0, 3), st.sampled_from([1, 2, 4]), st.integers(0, 3))
def test_tiles_are_the_whole_where_a_network_sees_no_further_than_the_margin(height: int, width: int, reach: int, multiple: int, spare: int) -> None:
    """The network: the maximum over the block of `multiple` pixels, then the sum of what lies within `reach` blocks, 0 outside."""
    margin = multiple * (reach + 1) - 1
    tile = -(-(2 * margin + multiple) // multiple) * multiple + spare * multiple

    def run(batch: np.ndarray) -> np.ndarray:
        image = batch[0, 0]
        blocks = image.reshape(image.shape[0] // multiple, multiple, image.shape[1] // multiple, multiple).max((1, 3))
        edge = np.pad(blocks, reach)
        windows = np.lib.stride_tricks.sliding_window_view(edge, (2 * reach + 1, 2 * reach + 1)).sum((2, 3))
        return (windows.repeat(multiple, 0).repeat(multiple, 1) + image)[None, None]

    image = generator(height * 100 + width).integers(0, 1000, (height, width)).astype(np.float64)
    expected = run(padded(image, multiple, tile)[None, None])[0, 0, :height, :width]
    np.testing.assert_array_equal(tiled(image, run, tile, margin, multiple), expected)


def test_a_tile_too_small_for_what_the_network_sees_is_refused() -> None:
    image = np.zeros((100, 100), np.float32)
    with pytest.raises(IsthmusError, match=r"tiles of 64 pixels: expected a multiple of 8 of at least 128, as the network sees 58 pixels"):
        tiled(image, lambda batch: batch, 64, 58, 8)
    with pytest.raises(IsthmusError, match=r"tiles of 32 pixels cannot overlap by 16: expected 1 to 15"):
        blended(image, lambda batch: batch, 32, 16)


@pytest.mark.parametrize("size", [(64, 64), (70, 33), (20, 150)])
def test_blending_adds_up_to_the_image(size: tuple[int, int]) -> None:
    image = generator().random(size).astype(np.float32)
    found = blended(image, lambda batch: 2 * batch, 64, 16)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, 2 * image, rtol=1e-6)


def test_pixels_go_in_and_come_out() -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    np.testing.assert_array_equal(pixels_of(network_input(pixels)), pixels)
    np.testing.assert_array_equal(pixels_of(np.array([[-1.0, 0.5, 2.0]])), [[0, 128, 255]])
    colour = np.full((2, 2, 3), (200, 100, 50), np.uint8)
    np.testing.assert_allclose(network_input(colour), (0.299 * 200 + 0.587 * 100 + 0.114 * 50) / 255, rtol=1e-6)
    with pytest.raises(IsthmusError, match=r"an image is uint8 \(height, width\).*found float64\[2, 2\]"):
        network_input(np.zeros((2, 2)))
