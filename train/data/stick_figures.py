# SPDX-License-Identifier: Apache-2.0
"""Synthetic people for where COCO's files are not: seeded stick figures with COCO's 17 key points, as images and COCO's JSON.

Left and right limbs have different colours, else nobody could tell them apart; some joints lie behind a rectangle (visibility 1) or off the canvas (0).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from isthmus.train.processing.pose import AREA_OF_BOX, COCO

HEIGHT, WIDTH = 240, 320
NAME = "synthetic stick figures"
LEFT, RIGHT, TRUNK = (214, 70, 60), (60, 96, 210), (226, 190, 120)
TORSO = (30.0, 80.0)  # pixels from hips to neck; other lengths are shares of it
UPPER_ARM, FOREARM, THIGH, SHIN, HALF_SHOULDERS, HALF_HIPS = 0.45, 0.42, 0.62, 0.58, 0.3, 0.18
NOISE, MARGIN = 12.0, 0.1
# nose, eyes, ears: across and up from the neck, left side positive
HEAD = ((0.0, 0.36), (0.08, 0.42), (-0.08, 0.42), (0.16, 0.38), (-0.16, 0.38))
BONES = ((5, 7), (7, 9), (11, 13), (13, 15), (6, 8), (8, 10), (12, 14), (14, 16))


def stick_figures(count: int, seed: int) -> tuple[dict[str, Any], dict[int, np.ndarray]]:
    """COCO's JSON of `count` images, and the images by id, uint8 (240, 320, 3): one to three people each, the same for the same seed."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    pixels: dict[int, np.ndarray] = {}
    for number in range(1, count + 1):
        generator = np.random.default_rng([seed, number])
        pixels[number], people = _scene(generator)
        images.append({"id": number, "file_name": f"{number:012d}.png", "height": HEIGHT, "width": WIDTH})
        for joints in people:
            seen = joints[joints[:, 2] > 0]
            if len(seen) < 5:
                continue
            low, high = seen[:, :2].min(axis=0), seen[:, :2].max(axis=0)
            margin = MARGIN * (high - low)
            low, high = np.maximum(low - margin, 0), np.minimum(high + margin, (WIDTH - 1, HEIGHT - 1))
            box = [*low.tolist(), *(high - low).tolist()]
            annotations.append({
                "id": len(annotations) + 1, "image_id": number, "category_id": 1, "iscrowd": 0, "num_keypoints": len(seen),
                "bbox": box, "area": AREA_OF_BOX * box[2] * box[3], "keypoints": joints.reshape(-1).tolist(),
            })  # fmt: skip
    return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "person", "keypoints": list(COCO.joints)}]}, pixels


def _scene(generator: np.random.Generator) -> tuple[np.ndarray, list[np.ndarray]]:
    low, high = generator.integers(30, 220, (2, 1, 1, 3))
    slope = np.linspace(0, 1, WIDTH)[None, :, None] if generator.random() < 0.5 else np.linspace(0, 1, HEIGHT)[:, None, None]
    background = np.broadcast_to(low + (high - low) * slope, (HEIGHT, WIDTH, 3))
    canvas = Image.fromarray(background.astype(np.uint8))
    pen = ImageDraw.Draw(canvas)
    people = [_figure(generator) for _ in range(int(generator.integers(1, 4)))]
    for joints, torso in people:
        _draw(pen, joints, torso)
    hidden = []
    for joints, torso in people:
        hidden.append(np.zeros(len(joints), bool))
        if generator.random() < 0.3:
            x, y = joints[generator.integers(5, 17), :2]
            across, down = generator.uniform(0.1, 0.35, 2) * torso
            pen.rectangle([x - across, y - down, x + across, y + down], fill=tuple(int(value) for value in generator.integers(0, 256, 3)))
            hidden[-1] = (np.abs(joints[:, 0] - x) <= across) & (np.abs(joints[:, 1] - y) <= down)
    noisy = np.asarray(canvas) + generator.normal(0, NOISE, (HEIGHT, WIDTH, 1))
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8), [_seen(joints, behind) for (joints, _), behind in zip(people, hidden, strict=True)]


def _seen(joints: np.ndarray, behind: np.ndarray) -> np.ndarray:
    """(17, 3): visibility 2, 1 behind something, 0 (and no place) off the canvas."""
    inside = (joints >= 0).all(axis=1) & (joints[:, 0] < WIDTH) & (joints[:, 1] < HEIGHT)
    visible = np.where(inside, np.where(behind, 1, 2), 0)
    return np.column_stack([np.where(inside[:, None], joints, 0), visible])


def _figure(generator: np.random.Generator) -> tuple[np.ndarray, float]:
    """(17, 2) joints of a person who faces the viewer: his left is on the image's right. And the length of the torso."""
    torso = float(generator.uniform(*TORSO))
    lean, turn = np.clip(generator.normal(0, [0.15, 0.2]), -0.5, 0.5)
    up, across = np.array([np.sin(lean), -np.cos(lean)]), np.array([np.cos(lean), np.sin(lean)])
    hips = np.array([generator.uniform(0.1, 0.9) * WIDTH, generator.uniform(0.35, 0.8) * HEIGHT])
    neck = hips + torso * up
    joints = np.zeros((17, 2))
    nod = np.array([np.sin(lean + turn), -np.cos(lean + turn)])
    aside = np.array([np.cos(lean + turn), np.sin(lean + turn)])
    for index, (side, rise) in enumerate(HEAD):
        joints[index] = neck + torso * (side * aside + rise * nod)
    for side, sign in enumerate((1, -1)):
        joints[5 + side], joints[11 + side] = neck + sign * HALF_SHOULDERS * torso * across, hips + sign * HALF_HIPS * torso * across
        # Angles from straight down, outwards.
        arm, elbow = np.clip(generator.normal([0.7, 0.5], [0.6, 0.6]), -0.4, 2.6)
        leg, knee = np.clip(generator.normal([0.2, -0.1], [0.25, 0.3]), -0.8, 1.2)
        for start, angle, length in ((5, arm, UPPER_ARM), (7, arm + elbow, FOREARM), (11, leg, THIGH), (13, leg + knee, SHIN)):
            joints[start + 2 + side] = joints[start + side] + torso * length * (sign * np.sin(angle) * across - np.cos(angle) * up)
    return joints, torso


def _draw(pen: ImageDraw.ImageDraw, joints: np.ndarray, torso: float) -> None:
    thick = max(2, round(0.14 * torso))
    pen.polygon([tuple(joints[index]) for index in (5, 6, 12, 11)], fill=TRUNK)
    middle, radius = joints[:5].mean(axis=0), 0.2 * torso
    pen.ellipse([*(middle - radius), *(middle + radius)], fill=TRUNK)
    for begin, end in BONES:
        colour = LEFT if begin % 2 else RIGHT
        pen.line([tuple(joints[begin]), tuple(joints[end])], fill=colour, width=thick)
        for index in (begin, end):
            pen.ellipse([*(joints[index] - thick / 2), *(joints[index] + thick / 2)], fill=colour)
    dot = max(1.0, 0.04 * torso)
    for index in range(5):
        colour = (20, 20, 20) if index == 0 else LEFT if index % 2 else RIGHT
        pen.ellipse([*(joints[index] - dot), *(joints[index] + dot)], fill=colour)
