# SPDX-License-Identifier: Apache-2.0
"""How good a restored image is: PSNR and SSIM by torchmetrics, and the two figures of speckle that it lacks. Images are 0..1."""

from __future__ import annotations

import math

import numpy as np

from isthmus.errors import IsthmusError


def psnr(images: np.ndarray, clean: np.ndarray) -> float:
    """Peak signal to noise in dB, 10 log10(1 / MSE), the mean over images (N, 1, H, W); infinite where one is equal."""
    import torch
    from torchmetrics.functional.image import peak_signal_noise_ratio

    return float(peak_signal_noise_ratio(torch.from_numpy(images), torch.from_numpy(clean), data_range=1.0, dim=(1, 2, 3)))


def ssim(images: np.ndarray, clean: np.ndarray) -> float:
    """Structural similarity, Gaussian window of 11x11 and sigma 1.5 over the mirrored border, the mean over images (N, 1, H, W) of at least 11x11 pixels."""
    import torch
    from torchmetrics.functional.image import structural_similarity_index_measure

    found = structural_similarity_index_measure(torch.from_numpy(images), torch.from_numpy(clean), data_range=1.0)
    assert isinstance(found, torch.Tensor)
    return float(found)


def enl(image: np.ndarray, region: np.ndarray) -> float:
    """Equivalent number of looks, mean^2 / variance where the mask `region` is set: a homogeneous area; the smoother, the higher, infinite where flat."""
    pixels = _region(image, region)
    variance = pixels.var()
    return float(pixels.mean() ** 2 / variance) if variance else math.inf


def cnr(image: np.ndarray, target: np.ndarray, background: np.ndarray) -> float:
    """Contrast to noise, |mean - mean| / sqrt(variance + variance) of two areas given as masks; 20 log10 of it is dB."""
    one, other = _region(image, target), _region(image, background)
    noise = math.sqrt(one.var() + other.var())
    contrast = abs(float(one.mean() - other.mean()))
    return contrast / noise if noise else math.inf


def _region(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    if mask.shape != image.shape or mask.dtype != np.bool_ or mask.sum() < 2:
        raise IsthmusError(
            f"metrics: a region is a bool mask of the image's shape {list(image.shape)} with at least 2 pixels set,"
            f" found {mask.dtype}{list(mask.shape)} with {np.count_nonzero(mask)}"
        )
    return image[mask].astype(np.float64)
