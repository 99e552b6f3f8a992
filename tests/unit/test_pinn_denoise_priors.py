# SPDX-License-Identifier: Apache-2.0
"""The four operators against what must hold of the equations (spec 04, section 8), and the loss that is made of them."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from isthmus.errors import IsthmusError
from isthmus.train.pde_priors import (
    PAPER_WEIGHTS,
    PRIORS,
    DenoisingLoss,
    Operator,
    Weights,
    border,
    curvature,
    diffusion,
    heat,
    laplacian,
    mpmc,
    prior,
    self_consistency,
    zhichang_guo,
)

EXACT = {"rtol": 0, "atol": 1e-12}
every = pytest.mark.parametrize("operator", PRIORS.values(), ids=PRIORS.keys())


def image(size: int = 24, seed: int = 0) -> Tensor:
    return torch.rand(1, 1, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def grid(size: int) -> tuple[Tensor, Tensor]:
    rows, columns = torch.meshgrid(*(torch.arange(size, dtype=torch.float64),) * 2, indexing="ij")
    return rows[None, None], columns[None, None]


def inside(values: Tensor, margin: int = 4) -> Tensor:
    return values[..., margin:-margin, margin:-margin]


# ---- all four
@every
def test_a_constant_does_not_move_and_adding_one_changes_nothing(operator: Operator) -> None:
    assert torch.count_nonzero(operator(torch.full((1, 1, 16, 16), 0.3, dtype=torch.float64))) == 0
    torch.testing.assert_close(operator(image() + 0.25), operator(image()), **EXACT)


@every
def test_a_ramp_stays_in_the_interior(operator: Operator) -> None:
    rows, columns = grid(24)
    ramp = 0.02 * rows + 0.01 * columns
    torch.testing.assert_close(inside(operator(ramp)), torch.zeros_like(inside(ramp)), **EXACT)


@every
def test_the_mean_is_kept_and_energy_never_grows(operator: Operator) -> None:
    for seed in range(5):
        u = image(seed=seed)
        assert abs(operator(u).sum()) < 1e-12 * u.numel()
        assert (u * operator(u)).sum() <= 0


@every
def test_it_turns_with_the_image(operator: Operator) -> None:
    u = image()
    torch.testing.assert_close(operator(torch.rot90(u, 1, (2, 3))), torch.rot90(operator(u), 1, (2, 3)), **EXACT)
    torch.testing.assert_close(operator(u.transpose(2, 3)), operator(u).transpose(2, 3), **EXACT)


@every
def test_autograd_agrees_with_finite_differences(operator: Operator) -> None:
    assert torch.autograd.gradcheck(lambda u: (operator(u) ** 2).mean(), (image(6).requires_grad_(),))


@every
def test_gradients_are_finite_on_a_flat_image(operator: Operator) -> None:
    u = torch.full((1, 1, 8, 8), 0.5, requires_grad=True)
    (operator(u) ** 2).mean().backward()
    assert u.grad is not None and torch.isfinite(u.grad).all()


# ---- each
def test_laplacian_of_a_paraboloid_is_two_and_of_that_zero() -> None:
    rows, columns = grid(24)
    paraboloid = ((rows - 11.5) ** 2 + (columns - 11.5) ** 2) / 2
    torch.testing.assert_close(inside(laplacian(paraboloid)), torch.full((1, 1, 16, 16), 2.0, dtype=torch.float64), **EXACT)
    torch.testing.assert_close(inside(laplacian(laplacian(paraboloid))), torch.zeros(1, 1, 16, 16, dtype=torch.float64), **EXACT)


def test_the_biharmonic_impulse_has_thirteen_points() -> None:
    impulse = torch.zeros(1, 1, 9, 9, dtype=torch.float64)
    impulse[..., 4, 4] = 1
    response = laplacian(laplacian(impulse))[0, 0]
    expected = {(0, 0): 20, (0, 1): -8, (1, 0): -8, (1, 1): 2, (0, 2): 1, (2, 0): 1}
    for row in range(9):
        for column in range(9):
            assert response[row, column] == expected.get((abs(row - 4), abs(column - 4)), 0)


def test_a_product_of_cosines_is_an_eigenvector() -> None:
    rows, columns = grid(64)
    u = torch.cos(math.pi * (rows + 0.5) * 5 / 64) * torch.cos(math.pi * (columns + 0.5) * 7 / 64)
    eigenvalue = -(4 - 2 * math.cos(5 * math.pi / 64) - 2 * math.cos(7 * math.pi / 64))
    assert eigenvalue == pytest.approx(-0.176849, abs=5e-7)
    torch.testing.assert_close(heat(u), eigenvalue * u, **EXACT)


def test_circles_have_the_curvature_of_their_radius() -> None:
    rows, columns = grid(64)
    found = curvature(torch.hypot(rows - 32, columns - 32))[0, 0, 32]
    for radius, expected in ((8, 0.12452), (12, 0.08319), (20, 0.04997)):
        assert found[32 + radius].item() == pytest.approx(expected, abs=5e-6) == pytest.approx(1 / radius, rel=0.01)


@pytest.mark.parametrize("blind", [partial(diffusion, scale=1e9), partial(mpmc, scale=1e9), partial(zhichang_guo, scale=1e9, fourth_order=0)])
def test_without_edges_to_stop_at_all_are_heat(blind: Operator) -> None:
    torch.testing.assert_close(blind(image()), heat(image()), **EXACT)


@pytest.mark.parametrize("name", ["heat", "diffusion", "mpmc"])
def test_an_explicit_step_keeps_within_the_image_and_its_mean(name: str) -> None:
    u = start = image(12)
    for _ in range(50):
        u = u + 0.25 * PRIORS[name](u)
        assert start.min() - 1e-12 <= u.min() and u.max() <= start.max() + 1e-12
    assert u.mean().item() == pytest.approx(start.mean().item(), abs=1e-12)


def test_fourth_order_needs_the_smaller_step() -> None:
    """2 / (8 + 64 * 0.1) = 0.139."""
    small = large = image(12)
    for _ in range(200):
        small, large = small + 0.13 * zhichang_guo(small), large + 0.25 * zhichang_guo(large)
    assert small.min() >= 0 and small.max() <= 1
    assert large.min() < 0 or large.max() > 1


# ---- the loss
def test_terms_are_weighted_and_summed() -> None:
    clean, noisy, denoised = image(seed=1), image(seed=2), image(seed=3)
    assert (PAPER_WEIGHTS.data, PAPER_WEIGHTS.pde, PAPER_WEIGHTS.perceptual, PAPER_WEIGHTS.initial, PAPER_WEIGHTS.boundary) == (1, 1, 0.1, 0.03, 0.02)
    for residual, expected in (("steady", heat(denoised)), ("evolution", denoised - noisy - heat(denoised))):
        criterion = DenoisingLoss("heat", Weights(2, 3, 5, 7, 11), residual)
        squared = (denoised - clean) ** 2
        terms = 2 * squared.mean(), 3 * (expected**2).mean(), 5 * squared.sqrt().mean(), 7 * squared.mean(), 11 * border(squared).mean()
        torch.testing.assert_close(criterion(denoised, clean, noisy), sum(terms), **EXACT)


def test_a_perfect_image_leaves_the_equation_alone() -> None:
    rows, columns = grid(16)
    clean = 0.5 + 0.1 * torch.sin(rows / 8) * torch.cos(columns / 8)
    terms = DenoisingLoss("zg").terms(clean, clean, clean)
    assert [terms[name].item() for name in ("data", "perceptual", "initial", "boundary")] == [0, 0, 0, 0]
    assert 0 < terms["pde"] < 1e-4


def test_the_boundary_term_ignores_the_interior() -> None:
    clean = image(8)
    denoised = clean.clone()
    denoised[..., 1:-1, 1:-1] += 1
    criterion = DenoisingLoss("heat")
    assert criterion.terms(denoised, clean, clean)["boundary"] == 0
    denoised[..., 0, 3] += 1
    assert criterion.terms(denoised, clean, clean)["boundary"].item() == pytest.approx(1 / 28)
    assert border(clean).shape == (1, 1, 28)


def test_deep_supervision_averages_the_data_term_alone() -> None:
    clean = image()
    maps = (clean + 0.1, clean + 0.2, clean)
    only_data = DenoisingLoss("heat", Weights(1, 0, 0, 0, 0))
    assert only_data(maps, clean, clean).item() == pytest.approx((0.01 + 0.04) / 3)
    others = DenoisingLoss("heat", Weights(0, 1, 1, 1, 1))
    torch.testing.assert_close(others(maps, clean, clean), others(maps[0], clean, clean), **EXACT)


def test_algorithm_1_runs_on_a_network() -> None:
    network = nn.Conv2d(1, 1, 3, padding=1).double()
    (self_consistency(network(image()), network) ** 2).mean().backward()
    assert network.weight.grad is not None and torch.isfinite(network.weight.grad).all()


def test_an_unknown_prior_lists_the_four() -> None:
    with pytest.raises(IsthmusError, match="unknown PDE prior 'wave': there are heat, diffusion, mpmc, zg"):
        prior("wave")
