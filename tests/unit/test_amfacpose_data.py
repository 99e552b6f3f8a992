# SPDX-License-Identifier: Apache-2.0
"""A pose network's surroundings: crops and their inverse, decoding, scores against pycocotools, COCO's files and what is said of bad ones."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from isthmus.errors import IsthmusError
from isthmus.train.data import coco_keypoints as data
from isthmus.train.data.stick_figures import stick_figures
from isthmus.train.pose_metrics import SCORES, crop_average_precision, key_point_scores
from isthmus.train.processing import pose
from isthmus.train.processing.pose import COCO, CROWDPOSE, bins_of, decoded, moved, person_crop, similarity

REAL = Path(__file__).parents[3] / "shared" / "data" / "coco_keypoints"
TAKEN = (64, 48, False)
some = settings(max_examples=40, deadline=None)
coordinates = st.floats(-500, 1500)
extents = st.floats(1, 900)


def people_of(raw: dict[str, Any], **changed: Any) -> list[dict[str, Any]]:
    """The annotations as what a perfect network finds."""
    fields = ("image_id", "category_id", "keypoints")
    known = [entry for entry in raw["annotations"] if entry["num_keypoints"]]
    return [{name: entry[name] for name in fields} | {"score": 0.9 - 0.01 * i} | changed for i, entry in enumerate(known)]


# ---- crop
@some
@given(st.tuples(coordinates, coordinates, extents, extents), st.sampled_from([(384, 288), (256, 256), (64, 48)]), st.floats(-180, 180), st.floats(0.5, 2))
def test_crop_and_back(box: tuple[float, ...], size: tuple[int, int], degrees: float, zoom: float) -> None:
    crop = person_crop(np.array(box), *size, degrees, zoom)
    points = np.random.default_rng(0).uniform(-100, 1000, (20, 2))
    np.testing.assert_allclose(moved(moved(points, crop.to_crop), crop.to_image), points, atol=1e-4)
    back = moved(moved(points, crop.to_image), crop.to_crop)
    np.testing.assert_allclose(back, points, atol=1e-4)
    centre = np.array([box[0] + box[2] / 2, box[1] + box[3] / 2])
    np.testing.assert_allclose(moved(centre, crop.to_crop), [size[1] / 2, size[0] / 2], atol=1e-6)
    assert np.linalg.det(crop.to_crop[:, :2]) == pytest.approx(crop.scale**2)


def test_a_crop_shows_all_of_its_box_and_a_quarter_more() -> None:
    crop = person_crop(np.array([100.0, 50.0, 60.0, 40.0]), 64, 48)
    corners = moved(np.array([[100.0, 50.0], [160.0, 90.0]]), crop.to_crop)
    assert corners[1, 0] - corners[0, 0] == pytest.approx(48 / 1.25)
    with pytest.raises(IsthmusError, match=r"box is \[1\.0, 2\.0, 0\.0, 4\.0\].*expected numbers with a width and a height above 0"):
        person_crop(np.array([1, 2, 0, 4]), 64, 48)


def test_pixels_go_where_points_go() -> None:
    image = np.zeros((120, 160, 3), np.uint8)
    image[60:63, 80:83] = 255
    crop = person_crop(np.array([40.0, 20.0, 80.0, 90.0]), 128, 96, degrees=25)
    bright = pose.cut(image, crop, 128, 96)[..., 0]
    rows, columns = np.mgrid[:128, :96]
    found = [(bright * columns).sum() / bright.sum(), (bright * rows).sum() / bright.sum()]
    np.testing.assert_allclose(found, moved(np.array([81.0, 61.0]), crop.to_crop), atol=0.05)


def test_pixels_beyond_the_image_are_black() -> None:
    image = np.full((20, 20, 3), 200, np.uint8)
    whole = pose.cut(image, person_crop(np.array([0.0, 0.0, 16.0, 16.0]), 20, 20), 20, 20)
    assert (whole[10, 10] == 200).all()
    assert (pose.cut(image, person_crop(np.array([500.0, 500.0, 16.0, 16.0]), 20, 20), 20, 20) == 0).all()


def test_network_input() -> None:
    pixels = np.full((2, 4, 6, 3), 255.0 * 0.485)
    channels = pose.network_input(pixels, planes=True)
    assert channels.shape == (2, 5, 4, 6) and channels.dtype == np.float32
    np.testing.assert_allclose(channels[:, 0], 0, atol=1e-6)
    np.testing.assert_allclose(channels[1, 3, 0], np.linspace(-1, 1, 6), atol=1e-6)
    np.testing.assert_allclose(channels[1, 4, :, 0], np.linspace(-1, 1, 4), atol=1e-6)


def test_processing_needs_no_torch() -> None:
    code = "import sys; import isthmus.train.processing.pose; assert not {'torch', 'onnx', 'pycocotools'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- decoding
@some
@given(st.integers(1, 3), st.integers(8, 200), st.data())
def test_decoding_is_the_inverse_of_encoding(per_pixel: int, extent: int, draw: st.DataObject) -> None:
    last = extent - 1 / per_pixel
    places = np.array(draw.draw(st.lists(st.floats(0, last), min_size=1, max_size=17)))[None]
    bins = bins_of(places, extent, per_pixel)
    logits = np.full((*bins.shape, extent * per_pixel), -3.0)
    np.put_along_axis(logits, bins[..., None], 9.0, axis=-1)
    found = decoded(logits, logits, per_pixel)
    assert np.abs(found[..., 0] - places).max() <= 0.5 / per_pixel + 1e-5
    np.testing.assert_allclose(decoded(logits, logits, per_pixel, reach=0)[..., 0], bins / per_pixel, rtol=1e-12)
    assert (found[..., 0] == found[..., 1]).all() and ((found[..., 2] > 0.5) & (found[..., 2] <= 1)).all()


def test_a_joint_between_two_bins_is_found_between_them() -> None:
    apart = np.arange(96) - 40.3
    logits = (-(apart**2) / (2 * 1.5**2) * pose.TEMPERATURE)[None, None]
    steps = np.rint(logits / 0.5) * 0.5  # as coarse as int8 may be
    assert decoded(logits, logits)[0, 0, 0] == pytest.approx(20.15, abs=0.1)
    assert decoded(steps, steps)[0, 0, 0] == pytest.approx(20.15, abs=0.2)


@some
@given(st.integers(1, 2), st.integers(0, 10_000))
def test_averaging_with_the_mirror_image_of_itself_changes_nothing(per_pixel: int, seed: int) -> None:
    """A network that sees the mirrored crop exactly mirrored."""
    generator = np.random.default_rng(seed)
    shares = generator.random((2, 17, 20 * per_pixel)), generator.random((2, 17, 30 * per_pixel))
    last, order = 20 * per_pixel - per_pixel, COCO.mirrored
    flipped = generator.random(shares[0].shape)
    flipped[..., : last + 1] = shares[0][:, order, last::-1]
    found = pose.with_mirrored(shares, (flipped, shares[1][:, order]), COCO, per_pixel)
    np.testing.assert_allclose(found[0], shares[0])
    np.testing.assert_allclose(found[1], shares[1])


def test_skeletons() -> None:
    for skeleton, count in ((COCO, 17), (CROWDPOSE, 14)):
        assert len(skeleton.joints) == len(skeleton.sigmas) == count
        names = [skeleton.joints[index] for index in skeleton.mirrored]
        assert names == [joint.translate({}) if "_" not in joint else _other(joint) for joint in skeleton.joints]


def _other(joint: str) -> str:
    side, rest = joint.split("_")
    return f"{'right' if side == 'left' else 'left'}_{rest}"


# ---- scores
def test_similarity() -> None:
    truth = np.column_stack([np.full((17, 2), 50.0), np.full(17, 2)])
    assert similarity(truth, truth, 1e4, COCO) == 1
    nose_alone = truth * [1, 1, 0]
    nose_alone[0, 2] = 1
    away = truth.copy()
    away[0, 0] += 6.1225
    assert similarity(away, nose_alone, 1e4, COCO) == pytest.approx(0.5, abs=1e-4)
    away[1:] = 0  # not annotated: does not count
    assert similarity(away, nose_alone, 1e4, COCO) == pytest.approx(0.5, abs=1e-4)
    assert similarity(truth, truth * [1, 1, 0], 1e4, COCO) == 0


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.5, 30))
def test_similarity_and_ap_equal_pycocotools(seed: int, noise: float) -> None:
    """One person an image: AP of COCO's code is what the similarities say."""
    generator = np.random.default_rng(seed)
    truth = np.concatenate([generator.uniform(0, 200, (17, 2)), generator.integers(0, 3, (17, 1))], axis=1)
    truth[0, 2] = 2
    found = truth + generator.normal(0, noise, truth.shape) * [1, 1, 0]
    area = float(generator.uniform(2000, 20_000))
    raw = {"images": [{"id": 7}], "categories": [{"id": 1, "name": "person"}]}
    raw["annotations"] = [
        {"id": 1, "image_id": 7, "category_id": 1, "iscrowd": 0, "area": area, "bbox": [0, 0, 9, 9], "keypoints": truth.reshape(-1).tolist(),
         "num_keypoints": int((truth[:, 2] > 0).sum())}
    ]  # fmt: skip
    people = [{"image_id": 7, "category_id": 1, "keypoints": found.reshape(-1).tolist(), "score": 0.5}]
    reached = similarity(found, truth, area, COCO) >= np.linspace(0.5, 0.95, 10)
    scores = key_point_scores(raw, people, COCO)
    assert scores["AP"] == pytest.approx(reached.mean()) and scores["AR"] == pytest.approx(reached.mean())
    assert scores["AP50"] == pytest.approx(float(reached[0])) and scores["AP75"] == pytest.approx(float(reached[5]))


def test_annotations_found_as_they_are_score_one() -> None:
    raw, _ = stick_figures(6, seed=3)
    scores = key_point_scores(raw, people_of(raw), COCO)
    assert tuple(scores) == SCORES and scores["AP"] == pytest.approx(1) and scores["AR"] == pytest.approx(1)
    assert key_point_scores(raw, [], COCO)["AP"] == 0
    with pytest.raises(IsthmusError, match=r"3 people were found in images without annotations, first image 99"):
        key_point_scores(raw, people_of(raw, image_id=99)[:3], COCO)


def test_the_mean_over_crops_is_coco_s_own() -> None:
    raw, pixels = stick_figures(5, seed=1)
    people = data.annotations_of(raw, "figures").people
    _, targets = data.crops_with_targets(people, pixels.__getitem__, TAKEN)
    logits = [np.eye(extent)[bins_of(targets[:, :-1, axis], extent // 2, 2)] * 9 for axis, extent in enumerate((96, 128))]
    assert crop_average_precision((logits[0], logits[1]), targets, COCO, 2) > 0.95
    assert crop_average_precision((logits[0], np.roll(logits[1], 40, axis=-1)), targets, COCO, 2) < 0.2


def test_scores_of_people() -> None:
    assert pose.person_score(0.8, np.array([0.5, 0.1, 0.7])) == pytest.approx(0.8 * 0.6)
    assert pose.person_score(0.8, np.array([0.1, 0.2])) == 0
    person = np.random.default_rng(0).uniform(0, 100, (17, 3))
    people = np.stack([person, person + 0.1, person + 60])
    assert pose.without_doubles(people, np.array([0.5, 0.9, 0.7]), np.full(3, 5000.0), COCO) == [1, 2]


# ---- stand-in
def test_figures_are_the_same_for_the_same_seed_and_whole() -> None:
    raw, pixels = stick_figures(10, seed=5)
    again, same = stick_figures(10, seed=5)
    assert raw == again and all((pixels[name] == same[name]).all() for name in pixels)
    seen = np.array([entry["keypoints"][2::3] for entry in raw["annotations"]])
    assert {0, 1, 2} == set(seen.reshape(-1).tolist())
    assert stick_figures(1, seed=6)[0] != raw


def test_stand_in_parts_are_of_different_figures() -> None:
    split = data.load(None, (32, 24, True), figures=8)
    assert split.name == "synthetic stick figures" and split.sample_shape == (5, 32, 24) and split.y_train.shape[1:] == (18, 3)
    assert not (split.x_train[0] == split.x_val[0]).all()
    assert data.load(None, (32, 24, False), CROWDPOSE, figures=4).y_val.shape[1:] == (15, 3)


# ---- files
@pytest.fixture(scope="module")
def figures() -> tuple[dict[str, Any], dict[int, np.ndarray]]:
    return stick_figures(4, seed=2)


def written(folder: Path, figures: tuple[dict[str, Any], dict[int, np.ndarray]], name: str = "people.json") -> Path:
    raw, pixels = figures
    folder.mkdir(parents=True, exist_ok=True)
    for image in raw["images"]:
        Image.fromarray(pixels[image["id"]]).save(folder / image["file_name"])
    (folder / name).write_text(json.dumps(raw))
    return folder


def test_files_give_what_they_hold(tmp_path: Path, figures: tuple[dict[str, Any], dict[int, np.ndarray]]) -> None:
    split = data.load(written(tmp_path, figures), TAKEN)
    people = data.annotations_of(figures[0], "figures").people
    samples, targets = data.crops_with_targets(people, figures[1].__getitem__, TAKEN)
    np.testing.assert_array_equal(split.x_test, samples)
    np.testing.assert_array_equal(split.y_train, targets)
    assert "the same" in split.name


def test_cocos_own_layout(tmp_path: Path, figures: tuple[dict[str, Any], dict[int, np.ndarray]]) -> None:
    (tmp_path / "annotations").mkdir()
    for part in ("train", "val"):
        written(tmp_path / f"{part}2017", figures)
        (tmp_path / f"{part}2017" / "people.json").rename(tmp_path / "annotations" / f"person_keypoints_{part}2017.json")
    split = data.load(tmp_path, TAKEN)
    count = len(figures[0]["annotations"])
    assert split.name.startswith("COCO 2017") and len(split.x_test) == count and len(split.x_train) + len(split.x_val) == count
    (tmp_path / "annotations" / "person_keypoints_val2017.json").unlink()
    with pytest.raises(IsthmusError, match=r"person_keypoints_val2017\.json: cannot be read: No such file"):
        data.load(tmp_path, TAKEN)


def test_crowdpose_has_no_areas(figures: tuple[dict[str, Any], dict[int, np.ndarray]]) -> None:
    raw = copy.deepcopy(figures[0])
    raw["categories"][0]["keypoints"] = list(CROWDPOSE.joints)
    for entry in raw["annotations"]:
        entry["keypoints"], entry["num_keypoints"] = entry["keypoints"][15:] + entry["keypoints"][:6], 14
        del entry["area"]
    read = data.annotations_of(raw, "crowd")
    assert read.skeleton is CROWDPOSE and read.people[0].area == pytest.approx(0.53 * read.people[0].box[2] * read.people[0].box[3])
    assert key_point_scores(raw, people_of(raw), CROWDPOSE)["AP"] == pytest.approx(1)


def remove_an_image(folder: Path) -> None:
    (folder / "000000000002.png").unlink()


def cut_short(folder: Path) -> None:
    text = (folder / "people.json").read_text()
    (folder / "people.json").write_text(text[: len(text) // 2])


def shrink_an_image(folder: Path) -> None:
    Image.new("RGB", (20, 10)).save(folder / "000000000001.png")


def damage_an_image(folder: Path) -> None:
    (folder / "000000000001.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edited(folder: Path) -> None:
        raw = json.loads((folder / "people.json").read_text())
        change(raw)
        (folder / "people.json").write_text(json.dumps(raw))

    return edited


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (remove_an_image, r"1 of 4 images are missing: 000000000002\.png; copy"),
        (cut_short, r"people\.json: is no JSON, cut short or damaged \(.*\); copy the data set's file again"),
        (shrink_an_image, r"000000000001\.png: is 20x10, its annotations are for 320x240"),
        (damage_an_image, r"000000000001\.png: cannot be read as an image"),
        (lambda folder: (folder / "people.json").unlink(), r"holds 0 annotation files, expected annotations/person_keypoints_train2017\.json and"),
        (edit(lambda raw: raw["annotations"][0].update(keypoints=[1, 2, 2] * 14)), r"1 of \d+ annotations are wrong: annotation 1 has 42 numbers .* 51 and 4"),
        (edit(lambda raw: raw["categories"][0].update(keypoints=["nose"] * 21)), r"has 21 key points, expected COCO's 17 or CrowdPose's 14"),
        (edit(lambda raw: raw["categories"][0].pop("keypoints")), r"has no key points, expected"),
        (edit(lambda raw: raw["annotations"][1].update(image_id=77)), r"annotation 2 is of image 77, which the file does not list"),
        (edit(lambda raw: raw["annotations"][1].update(bbox=[1, 2, 0, 5])), r"annotation 2 has key points in a box of 0 x 5"),
        (edit(lambda raw: raw["annotations"][1].update(bbox=[1, 2, float("nan"), 5])), r"annotation 2 holds something else than numbers"),
        (edit(lambda raw: raw["images"][0].update(file_name="../secret.png")), r"an image entry is .*expected id, file_name \(a plain path inside"),
        (edit(lambda raw: [entry.update(keypoints=[0] * 51) for entry in raw["annotations"]]), r"nobody in it has key points"),
        (edit(lambda raw: raw.pop("images")), r"expected an object with lists of images, annotations and categories"),
    ],
)
def test_bad_files(tmp_path: Path, figures: tuple[dict[str, Any], dict[int, np.ndarray]], damage: Callable[[Path], None], expected: str) -> None:
    damage(written(tmp_path, figures))
    with pytest.raises(IsthmusError, match=expected):
        data.load(tmp_path, TAKEN)


def test_another_skeleton_than_the_networks(tmp_path: Path, figures: tuple[dict[str, Any], dict[int, np.ndarray]]) -> None:
    with pytest.raises(IsthmusError, match=r"has COCO's 17 key points, this network has CrowdPose's 14"):
        data.load(written(tmp_path, figures), TAKEN, CROWDPOSE)
    with pytest.raises(IsthmusError, match=r"no such data folder"):
        data.load(tmp_path / "nowhere", TAKEN)


NAMES = st.sampled_from(["images", "annotations", "categories", "id", "keypoints", "bbox", "file_name", "height", "width", "image_id"])
LEAVES = st.none() | st.booleans() | st.floats() | st.text(max_size=4)


@some
@given(st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=5), max_leaves=12))
def test_any_json_is_read_or_refused(raw: Any) -> None:
    with pytest.raises(IsthmusError):
        data.annotations_of(raw, "drawn")


@pytest.mark.skipif(not (REAL / "coco").is_dir(), reason="the real COCO images are not here")
def test_real_images() -> None:
    """Twelve people of four photographs, from the files to AP 1 with the annotations as the answer."""
    annotations = data.one_file(REAL / "coco")
    split = data.load(REAL / "coco", TAKEN)
    assert len(annotations.people) == 12 and len(split.x_test) == 12
    assert key_point_scores(annotations.raw, people_of(annotations.raw), COCO)["AP"] == pytest.approx(1)
    crowd = data.one_file(REAL / "crowdpose")
    assert crowd.skeleton is CROWDPOSE and len(data.crops_with_targets(crowd.people, data.images_in(REAL / "crowdpose", crowd), TAKEN)[0]) == len(crowd.people)
