# SPDX-License-Identifier: Apache-2.0
"""What AMFACPose is trained for: the divergence from each joint's bins (section 3.3, equations 20 and 21), turned, zoomed and mirrored crops, AP."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from isthmus.train.pose_metrics import crop_average_precision
from isthmus.train.processing.pose import DEVIATION, MEAN, SKELETONS, TEMPERATURE, Skeleton
from isthmus.train.task import Arrays, Outputs, Task

SMOOTHING = 0.1  # the share of a target that is spread over all bins; the paper names the method, not the number
HARD = {"elbow": 1.2, "knee": 1.2, "wrist": 1.5, "ankle": 1.5}  # the paper weighs hands and feet more, without numbers
TURN, ZOOM, MIRROR = 30.0, (0.7, 1.3), 0.5  # section 4.1: degrees either way, factor, share of the crops


class Sized(Protocol):
    @property
    def height(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def joints(self) -> int: ...
    @property
    def bins_per_pixel(self) -> int: ...
    @property
    def spread(self) -> float: ...


def pose_task(config: Sized) -> Task:
    """Targets are those of `isthmus.train.data.coco_keypoints`, outputs logits of x and of y."""
    skeleton = SKELETONS[config.joints]

    def loss(outputs: Outputs, targets: Tensor) -> Tensor:
        return pose_loss(_pair(outputs), targets, skeleton, config.bins_per_pixel, config.spread)

    def score(outputs: Arrays, targets: np.ndarray) -> float:
        assert isinstance(outputs, tuple)
        across, down = outputs
        return crop_average_precision((across, down), targets, skeleton, config.bins_per_pixel)

    return Task("AP", loss, score, distil, augment=lambda inputs, targets: augmented(inputs, targets, skeleton))


def _pair(outputs: Outputs) -> tuple[Tensor, Tensor]:
    assert isinstance(outputs, tuple)
    across, down = outputs
    return across, down


# ---- loss
def joint_weights(skeleton: Skeleton) -> Tensor:
    return torch.tensor([HARD.get(joint.rpartition("_")[2], 1.0) for joint in skeleton.joints])


def bin_targets(places: Tensor, bins: int, bins_per_pixel: int, spread: float = 0.0) -> Tensor:
    """The distribution over `bins` for coordinates in crop pixels: one bin smoothed over all, or a Gaussian of `spread` bins. Sums to 1."""
    exact = places * bins_per_pixel
    if spread:
        apart = torch.arange(bins, device=places.device) - exact[..., None].clamp(0, bins - 1)
        return torch.softmax(-(apart**2) / (2 * spread**2), dim=-1)
    nearest = exact.round().clamp(0, bins - 1).long()
    return functional.one_hot(nearest, bins) * (1 - SMOOTHING) + SMOOTHING / bins


def divergences(logits: Tensor, wanted: Tensor) -> Tensor:
    """KL(wanted || softmax(logits / T)) of each joint, summed over the bins."""
    return functional.kl_div(functional.log_softmax(logits / TEMPERATURE, dim=-1), wanted, reduction="none").sum(-1)


def pose_loss(logits: tuple[Tensor, Tensor], targets: Tensor, skeleton: Skeleton, bins_per_pixel: int, spread: float = 0.0) -> Tensor:
    """Mean over joints and people of weight times both axes' divergence; joints that are not in the crop weigh nothing."""
    joints = targets[:, :-1]
    weights = joint_weights(skeleton).to(targets.device) * (joints[..., 2] > 0)
    total = torch.zeros_like(weights)
    for axis, scores in enumerate(logits):
        total = total + divergences(scores, bin_targets(joints[..., axis], scores.shape[-1], bins_per_pixel, spread))
    return (weights * total).mean()


def distil(outputs: Outputs, taught: Outputs) -> Tensor:
    """Towards the float network's own distributions, both axes."""
    pairs = zip(_pair(outputs), _pair(taught), strict=True)
    return torch.stack([divergences(one, torch.softmax(other / TEMPERATURE, dim=-1)).mean() for one, other in pairs]).sum()


# ---- augmentation
def augmented(inputs: Tensor, targets: Tensor, skeleton: Skeleton) -> tuple[Tensor, Tensor]:
    """Crops turned, zoomed and mirrored about their middle, joints with them; what comes in from outside is black. Coordinate planes stay."""
    count, device = len(inputs), inputs.device
    height, width = inputs.shape[2:]
    turn = torch.empty(count).uniform_(-TURN, TURN).deg2rad()
    zoom = torch.empty(count).uniform_(*ZOOM)
    mirror = torch.rand(count) < MIRROR
    cosine, sine = zoom * turn.cos(), zoom * turn.sin()
    sign = torch.where(mirror, -1.0, 1.0)
    forth = torch.stack([torch.stack([sign * cosine, -sign * sine], -1), torch.stack([sine, cosine], -1)], 1).to(device)
    middle = torch.tensor([(width - 1) / 2, (height - 1) / 2], device=device)
    moved = torch.cat([_warped(inputs[:, :3], forth, middle), inputs[:, 3:]], dim=1)
    joints, area = targets[:, :-1].clone(), targets[:, -1:].clone()
    joints[..., :2] = (joints[..., :2] - middle) @ forth.transpose(1, 2) + middle
    order = torch.from_numpy(skeleton.mirrored).to(device)
    joints = torch.where(mirror.to(device)[:, None, None], joints[:, order], joints)
    places = joints[..., :2]
    inside = (places >= 0).all(-1) & (places[..., 0] < width) & (places[..., 1] < height) & (joints[..., 2] > 0)
    joints = joints * inside[..., None]
    area[:, 0, 0] *= zoom.to(device) ** 2
    return moved, torch.cat([joints, area], dim=1)


def _warped(images: Tensor, forth: Tensor, middle: Tensor) -> Tensor:
    """Each output pixel read at the place that `forth` (about `middle`) brings there."""
    height, width = images.shape[2:]
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    pixels = torch.stack([columns, rows], -1).reshape(-1, 2).to(images) - middle
    places = pixels @ torch.linalg.inv(forth).transpose(1, 2) + middle
    grid = (2 * places + 1) / torch.tensor([width, height], device=images.device) - 1
    black = (-torch.tensor(MEAN) / torch.tensor(DEVIATION)).to(images).reshape(1, 3, 1, 1)
    shape = (len(images), height, width, 2)
    return functional.grid_sample(images - black, grid.reshape(shape), mode="bilinear", padding_mode="zeros", align_corners=False) + black
