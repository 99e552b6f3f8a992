# SPDX-License-Identifier: Apache-2.0
"""The denoisers of the zoo against their paper's spec: parameters to the unit, multiply-accumulates, sizes, and what a graph of them may hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from isthmus.errors import IsthmusError
from isthmus.export.module import onnx_from_module
from isthmus.train import zoo
from isthmus.train.task import as_tuple
from isthmus.train.zoo.pinn_denoise import SIZE_MULTIPLE, SYSTEM, Config, Nested, NestedConfig, NestedUNet, UNetConfig, build, margin, size_multiple

DATA_DEPENDENT = {"Shape", "Slice", "Gather", "Loop", "If"}  # shapes are known: none of these is left


def preset(name: str, **changes: object) -> Config:
    return replace(SYSTEM.configuration(name), **changes)


def on_meta(config: Config) -> nn.Module:
    """Without memory: shapes and counts need no weights."""
    with torch.device("meta"):
        return build(config).eval()


def counted(config: Config) -> tuple[int, int]:
    """Parameters, and multiply-accumulates of convolutions."""
    module = on_meta(config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(torch.zeros(SYSTEM.input_shape(config), device="meta"))
    return sum(parameter.numel() for parameter in module.parameters()), counter.get_total_flops() // 2


# ---- spec 04, section 2.4, and the sizes of section 6
@pytest.mark.parametrize(
    ("config", "parameters", "giga_macs"),
    [
        (preset("unet-transposed", norm=False), 1_925_025, 9.181),
        (preset("unet-transposed"), 1_927_841, 9.181),
        (preset("unet", norm=False), 2_140_065, 12.403),
        (preset("unet"), 2_142_881, 12.403),
        (preset("resunet"), 2_014_593, 9.687),
        (preset("u2net", side_kernel=3), 44_008_717, 37.427),
        (preset("u2net"), 43_996_429, 37.378),
        (preset("resu2net", side_kernel=3, add_skips=False), 1_130_029, 12.568),  # U2Net-p
        (preset("resu2net"), 1_126_957, 12.524),
        (preset("resu2net-full"), 43_996_429, 37.378),
        (preset("unet", widths=(8, 16, 32, 64)), 134_825, 0.779),
        (preset("unet-edge"), 536_913, 3.106),
        (preset("resu2net-edge"), 141_133, 1.170),
        (preset("fpga"), 1_361, 0.000705),
        (preset("fpga", image_size=64), 1_361, 0.002818),
        (preset("fpga-8-16"), 5_313, 0.002736),
        (preset("fpga-8-16", image_size=64), 5_313, 0.010945),
    ],
)
def test_counts_of_the_spec(config: Config, parameters: int, giga_macs: float) -> None:
    found, macs = counted(config)
    assert found == parameters
    assert macs / 1e9 == pytest.approx(giga_macs, rel=1e-3)


@pytest.mark.parametrize(("name", "parameters"), [("u2net", 44_009_869), ("resu2net", 1_131_181)])
def test_with_three_channels_and_wide_sides_they_are_the_published_networks(name: str, parameters: int) -> None:
    assert counted(preset(name, side_kernel=3, input_channels=3))[0] == parameters


@pytest.mark.parametrize("name", ["unet-transposed", "resunet", "resu2net-edge", "fpga"])
def test_the_image_keeps_its_size(name: str) -> None:
    """U2Net and the wider ones have the layers of these; at their own size all presets are counted above."""
    module = on_meta(preset(name))
    for size in ((256, 256), (64, 64), (128, 96)):
        assert all(extent % SIZE_MULTIPLE == 0 for extent in size)
        assert module(torch.zeros(2, 1, *size, device="meta")).shape == (2, 1, *size)


def test_in_training_every_map_comes_out() -> None:
    torch.manual_seed(0)
    for name, bounded in (("u2net", True), ("resu2net-edge", False)):
        config = SYSTEM.configuration(name)
        assert isinstance(config, NestedConfig) and config.bounded == bounded
        module = build(replace(config, middles=(4,) * 11, outputs=(8,) * 11)).train()
        maps = module(torch.rand(2, 1, 64, 64))
        assert [tuple(each.shape) for each in maps] == [(2, 1, 64, 64)] * 7
        assert isinstance(module, NestedUNet)
        with torch.no_grad():
            module.fuse.bias.fill_(3)  # type: ignore[union-attr]  # it has one
        image = module.eval()(torch.rand(1, 1, 64, 64))
        assert torch.is_tensor(image) and bool((image > 1).any()) == (not bounded)


@pytest.mark.parametrize("name", ["unet-small-zg", "resunet-small-zg", "u2net-small-zg", "resu2net-small-zg"])
def test_every_map_starts_as_near_to_images_as_grey_paper(name: str) -> None:
    """ResU2Net's maps have no bounds, and began with squared errors of up to 4: a short training then ended below its noisy input."""
    for seed in range(3):
        module = SYSTEM.network(name, seed).train()
        maps = as_tuple(module(torch.rand(4, 1, 64, 64)))
        assert all(((each - 0.5) ** 2).mean() < 0.25 for each in maps)  # a black or a white image's


def test_the_lite_network_adds_every_skip_and_the_full_one_those_that_fit() -> None:
    assert on_meta(preset("resu2net")).add_skips == [True] * 5
    assert on_meta(preset("resu2net-full")).add_skips == [True, False, False, False, True]  # 512 and 512, then 64 and 64
    assert on_meta(preset("u2net")).add_skips == [False] * 5


def test_a_nested_block_sees_as_far_as_its_dilations_reach() -> None:
    """RSU-4F: 1, 2, 4 down, 8 at the bottom, 4, 2, 1 up and 1 in front: 23 pixels to each side, and no pool."""
    torch.manual_seed(0)
    block = Nested(1, 2, 2, 4, dilated=True).double().eval()
    for parameter in block.parameters():
        nn.init.constant_(parameter, 0.1)
    image = torch.zeros(1, 1, 64, 64, dtype=torch.float64)
    touched = image.clone()
    touched[0, 0, 32, 32] = 1
    with torch.no_grad():
        changed = (block(touched) - block(image)).abs().sum((0, 1)) > 0
    assert changed.any(0).nonzero().flatten().tolist() == list(range(32 - 23, 32 + 24))


def blocks() -> nn.Module:
    """What U2Net and ResU2Net are made of, and the widest enlargement."""
    pooled, dilated = Nested(1, 2, 2, 4, dilated=False), Nested(2, 2, 1, 4, dilated=True)
    return nn.Sequential(pooled, dilated, nn.Upsample(scale_factor=32, mode="bilinear", align_corners=False), nn.Sigmoid())


@pytest.mark.parametrize("make", [lambda: build(preset("resunet", widths=(4, 8, 16, 32))), blocks], ids=["resunet", "blocks"])
def test_the_exported_graph_computes_the_same_and_holds_no_shapes(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    module = make().eval()
    image = torch.rand(1, 1, 16, 16)
    model = onnx_from_module(module, image)
    assert not DATA_DEPENDENT & {node.op_type for node in model.graph.node}
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(found, module(image).numpy(), atol=1e-5)


def test_presets_are_named_where_one_is_unknown() -> None:
    with pytest.raises(IsthmusError, match=r"unknown preset of pinn_denoise 'resu2nett': did you mean resu2net"):
        zoo.load("pinn_denoise").configuration("resu2nett")


# ---- how far it sees
SIGHTS = [
    UNetConfig(widths=(2, 2), upsampling="nearest", norm=False, convolutions=1),
    UNetConfig(widths=(2, 2, 2)),
    UNetConfig(widths=(2, 2, 2), residual_blocks=True, upsampling="transposed", convolutions=1),  # which has two all the same
]


@pytest.mark.parametrize("config", SIGHTS, ids=["mini-unet", "unet", "resunet"])
def test_an_output_pixel_sees_its_margin_and_not_a_pixel_more(config: UNetConfig) -> None:
    module = build(config).double().eval()
    for parameter in module.parameters():
        nn.init.constant_(parameter, 0.5)  # above 0, so that nothing cancels and a bright pixel wins every pool
    dark = torch.zeros(1, 1, 64, 64, dtype=torch.float64)
    distances = set()
    with torch.no_grad():
        without = module(dark)
        for pixel in range(32, 32 + size_multiple(config)):
            lit = dark.clone()
            lit[..., pixel, pixel] = 1e6
            rows = (module(lit) != without)[0, 0].any(1).nonzero()[:, 0]
            distances |= {pixel - int(rows[0]), int(rows[-1]) - pixel}
    assert max(distances) == margin(config)


def test_margins_of_the_presets() -> None:
    expected = {"unet": 58, "unet-transposed": 51, "resunet": 51, "unet-edge": 58, "unet-small-zg": 17, "resunet-small-zg": 23, "ci": 17, "fpga": 7}
    assert {name: margin(SYSTEM.configuration(name)) for name in expected} == expected
