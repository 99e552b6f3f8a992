# SPDX-License-Identifier: Apache-2.0
"""Differential equations as training losses: "Physics-Informed Neural Network for Denoising Images Using Nonlinear PDE", equations 1 to 17 and algorithm 1.

An operator N takes images u (N, 1, H, W) in 0..1, spacing 1, and gives the right side of u_t = N(u), same shape: second differences with zero flux
over the border, so the mean of u stays and a constant gives 0. The paper leaves the discretisation and every constant open.
None of this is part of a network: it acts in training alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor, nn

from isthmus.errors import IsthmusError

Operator = Callable[[Tensor], Tensor]
Reading = Literal["steady", "evolution"]  # of the equation's residual

GRADIENT_SCALE = 0.1  # K of g where g sees a gradient: steps of a tenth of the range count as edges
CURVATURE_SCALE = 1.0  # K of g where it sees a curvature, in 1 / pixel
CURVATURE_FLOOR = 1e-3  # keeps the curvature finite where the image is flat
SMOOTHING = 1.0  # sigma in pixels of the Gaussian in front of the diffusion's gradient
SMOOTHING_TAPS = 5
FOURTH_ORDER = 0.1  # lambda 2 of Zhichang Guo's equation; lambda 1 is 1


# ---- differences
def laplacian(u: Tensor) -> Tensor:
    """The five-point Laplacian, the border's values repeated outwards (zero flux)."""
    return flux_divergence(torch.ones_like(u), u)


def gradient(u: Tensor) -> tuple[Tensor, Tensor]:
    """Central differences along the rows' and the columns' index, the border's values repeated outwards."""
    padded = nn.functional.pad(u, (1, 1, 1, 1), mode="replicate")
    return (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2, (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2


def flux_divergence(conductance: Tensor, u: Tensor) -> Tensor:
    """div(conductance grad u): differences over the faces between pixels, conductance the mean of a face's two pixels, no flux over the border."""
    total = torch.zeros_like(u)
    for axis in (-2, -1):
        length = u.shape[axis] - 1
        face = (conductance.narrow(axis, 0, length) + conductance.narrow(axis, 1, length)) / 2
        flux = face * (u.narrow(axis, 1, length) - u.narrow(axis, 0, length))
        border = torch.zeros_like(u.narrow(axis, 0, 1))
        total = total + torch.cat([flux, border], axis) - torch.cat([border, flux], axis)
    return total


def edge_stopping(squared: Tensor, scale: float) -> Tensor:
    """g(s) = 1 / (1 + (s / scale)^2) of s squared: a root would have an infinite slope at 0."""
    return 1 / (1 + squared / scale**2)


def curvature(u: Tensor) -> Tensor:
    """Of the level lines, in 1 / pixel; its sign is that of the second difference along them."""
    down, right = gradient(u)
    padded = nn.functional.pad(u, (1, 1, 1, 1), mode="replicate")
    down_down = padded[..., 2:, 1:-1] - 2 * u + padded[..., :-2, 1:-1]
    right_right = padded[..., 1:-1, 2:] - 2 * u + padded[..., 1:-1, :-2]
    mixed = gradient(down)[1]
    return (right_right * down**2 - 2 * right * down * mixed + down_down * right**2) / (right**2 + down**2 + CURVATURE_FLOOR**2) ** 1.5


def smoothed(u: Tensor) -> Tensor:
    """By a Gaussian of `SMOOTHING`, the border's values repeated outwards."""
    offsets = torch.arange(SMOOTHING_TAPS, dtype=u.dtype, device=u.device) - SMOOTHING_TAPS // 2
    weights = torch.exp(-(offsets**2) / (2 * SMOOTHING**2))
    weights = weights / weights.sum()
    reach = SMOOTHING_TAPS // 2
    padded = nn.functional.pad(u, (reach, reach, reach, reach), mode="replicate")
    return nn.functional.conv2d(nn.functional.conv2d(padded, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))


# ---- the four equations
def heat(u: Tensor) -> Tensor:
    """u_t = Lap(u)."""
    return laplacian(u)


def diffusion(u: Tensor, scale: float = GRADIENT_SCALE) -> Tensor:
    """u_t = div(g(|grad(G * u)|) grad u): the paper's diffusion tensor read as a conductance that falls at edges of the smoothed image."""
    return flux_divergence(edge_stopping(_squared_gradient(smoothed(u)), scale), u)


def mpmc(u: Tensor, scale: float = CURVATURE_SCALE) -> Tensor:
    """u_t = div(g(|k|) grad u), k the level lines' curvature (modified Perona-Malik curvature)."""
    return flux_divergence(edge_stopping(curvature(u) ** 2, scale), u)


def zhichang_guo(u: Tensor, scale: float = GRADIENT_SCALE, fourth_order: float = FOURTH_ORDER) -> Tensor:
    """u_t = div(g(|grad u|) grad u) - lambda 2 Lap(Lap(u))."""
    return flux_divergence(edge_stopping(_squared_gradient(u), scale), u) - fourth_order * laplacian(laplacian(u))


def _squared_gradient(u: Tensor) -> Tensor:
    down, right = gradient(u)
    return down**2 + right**2


PRIORS: Mapping[str, Operator] = MappingProxyType({"heat": heat, "diffusion": diffusion, "mpmc": mpmc, "zg": zhichang_guo})


def prior(name: str) -> Operator:
    """Raises `IsthmusError` that lists the four."""
    if name not in PRIORS:
        raise IsthmusError(f"unknown PDE prior {name!r}: there are {', '.join(PRIORS)}")
    return PRIORS[name]


# ---- the loss
@dataclass(frozen=True)
class Weights:
    """Of the five terms of equation 10. Algorithm 1 has `pde` 1, which blurs: real images have texture, so their N(u) is not 0."""

    data: float = 1.0
    pde: float = 0.05
    perceptual: float = 0.1
    initial: float = 0.03
    boundary: float = 0.02


DEFAULT_WEIGHTS = Weights()
PAPER_WEIGHTS = Weights(pde=1.0)


@dataclass(frozen=True)
class DenoisingLoss:
    """Equation 10: squared error, the equation's residual, absolute error (the paper's perceptual term in pixels), initial state and border.

    `residual` "steady" (equation 17): R = N(denoised); "evolution" (equations 3 and 4): the noisy image becomes the denoised one in a unit of
    time, R = (denoised - noisy) - N(denoised). The initial state is the clean image, and so is what the border ring is held to.
    """

    prior: str
    weights: Weights = DEFAULT_WEIGHTS
    residual: Reading = "steady"

    def __call__(self, outputs: Tensor | tuple[Tensor, ...], clean: Tensor, noisy: Tensor) -> Tensor:
        """A number; images (N, 1, H, W). Of several outputs the first is the image, and the data term is the mean over all (deep supervision)."""
        maps = (outputs,) if isinstance(outputs, Tensor) else outputs
        terms = self.terms(maps[0], clean, noisy)
        terms["data"] = torch.stack([((each - clean) ** 2).mean() for each in maps]).mean()
        return torch.stack([getattr(self.weights, name) * term for name, term in terms.items()]).sum()

    def terms(self, denoised: Tensor, clean: Tensor, noisy: Tensor) -> dict[str, Tensor]:
        """The terms by their weight's name, unweighted."""
        change = prior(self.prior)(denoised)
        error = denoised - clean
        squared = (error**2).mean()
        return {
            "data": squared,
            "pde": ((change if self.residual == "steady" else denoised - noisy - change) ** 2).mean(),
            "perceptual": error.abs().mean(),
            "initial": squared,
            "boundary": border(error**2).mean(),
        }


def border(images: Tensor) -> Tensor:
    """The ring of the outermost pixels, each once: (N, C, 2 (H + W) - 4)."""
    rows, columns = images[..., [0, -1], :], images[..., 1:-1, [0, -1]]
    return torch.cat([rows.flatten(-2), columns.flatten(-2)], -1)


def self_consistency(denoised: Tensor, network: Callable[[Tensor], Tensor]) -> Tensor:
    """The residual of algorithm 1 as printed, Lap(denoised) - network(denoised): it asks the network, which the data term makes a denoiser, to be a Laplacian.

    Kept for comparison; `DenoisingLoss` has the two readings that do not contradict themselves.
    """
    return laplacian(denoised) - network(denoised)
