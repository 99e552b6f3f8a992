# SPDX-License-Identifier: Apache-2.0
"""The custom CNNs of the MedMNIST paper against its table 4: parameters, multiply-accumulates, FLOPs, sizes, pools; fusions; the exported graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from isthmus.candidates import read_table
from isthmus.errors import IsthmusError
from isthmus.export.module import onnx_from_module
from isthmus.float_model import run_float
from isthmus.train.data import medmnist as data
from isthmus.train.fusion import At, Fusion
from isthmus.train.loop import TrainConfig, fit, predict
from isthmus.train.zoo import medmnist
from isthmus.train.zoo.medmnist import MedMnistNet

# Preset -> trainable parameters, all with the running statistics, multiply-accumulates, FLOPs of TensorFlow's profiler: derived from the layers by script.
FIGURES = {
    "path-a": (1_123_081, 1_123_913, 247_146_560, 495_324_406),
    "path-b1": (1_618_345, 1_618_345, 9_510_656, 19_096_886),
    "path-b2": (870_953, 870_953, 19_545_856, 39_204_918),
    "path-b3": (813_865, 813_865, 30_105_344, 60_344_630),
    "path-b4": (1_436_969, 1_436_969, 43_998_976, 88_144_182),
    "path-c1": (1_635_561, 1_635_561, 23_960_192, 48_071_094),
    "path-c2": (1_091_113, 1_091_113, 73_734_784, 147_708_086),
    "path-c3": (3_402_281, 3_402_281, 175_135_360, 350_592_182),
    "path-d1": (3_242_729, 3_242_985, 25_566_976, 51_486_262),
    "path-d2": (1_896_105, 1_897_001, 74_538_752, 149_644_982),
    "path-d3": (4_455_081, 4_458_025, 176_185_088, 353_127_094),
    "organa-b1": (1_618_859, 1_618_859, 9_511_168, 19_097_922),
    "organa-b2": (871_467, 871_467, 19_546_368, 39_205_954),
    "organa-b3": (814_379, 814_379, 30_105_856, 60_345_666),
    "organa-b4": (1_437_483, 1_437_483, 43_999_488, 88_145_218),
    "organa-c1": (412_395, 412_459, 8_304_832, 16_735_426),
    "organa-c2": (267_243, 267_435, 18_942_144, 38_073_154),
    "organa-c3": (419_307, 419_755, 29_710_528, 59_643_970),
    "organa-c4": (1_239_531, 1_240_491, 43_800_768, 87_846_466),
    "organa-d1": (3_243_243, 3_243_499, 25_567_488, 51_487_298),
    "organa-d2": (1_896_619, 1_897_515, 74_539_264, 149_646_018),
    "organa-d3": (4_455_595, 4_458_539, 176_185_600, 353_128_130),
    "oct-b1": (1_617_060, 1_617_060, 9_509_376, 19_094_296),
    "oct-b2": (869_668, 869_668, 19_544_576, 39_202_328),
    "oct-b3": (812_580, 812_580, 30_104_064, 60_342_040),
    "oct-b4": (1_435_684, 1_435_684, 43_997_696, 88_141_592),
    "oct-c1": (831_908, 832_036, 23_156_480, 46_564_312),
    "oct-c2": (689_124, 689_508, 73_332_480, 147_055_064),
    "oct-c3": (2_878_436, 2_879_844, 174_610_176, 349_746_648),
    "oct-d1": (3_241_444, 3_241_700, 25_565_696, 51_483_672),
    "oct-d2": (1_894_820, 1_895_716, 74_537_472, 149_642_392),
    "oct-d3": (4_453_796, 4_456_740, 176_183_808, 353_124_504),
}
# Units in front of the first dense layer, by data set and family.
FLAT = {
    **dict.fromkeys([(dataset, "b") for dataset in ("path", "organa", "oct")], (6_272, 3_136, 2_048, 1_024)),
    ("organa", "c"): (6_272, 3_136, 2_048, 1_024),
    **dict.fromkeys([("path", "c"), ("oct", "c"), *[(dataset, "d") for dataset in ("path", "organa", "oct")]], (12_544, 6_272, 8_192)),
}
TABLE = Path(__file__).parents[2] / "benchmarks" / "data" / "medmnist_ensembles.csv"
PRINTED = {f"{name.lower()}-{row.name.lower()}": row.costs for name, rows in read_table(TABLE).datasets.items() for row in rows if row.is_single}


def untrained(preset: str) -> MedMnistNet:
    """Without memory: shapes and counts need no weights."""
    with torch.device("meta"):
        return MedMnistNet(medmnist.SYSTEM.configuration(preset)).eval()


def counted(module: nn.Module) -> tuple[int, int]:
    """(multiply-accumulates, FLOPs by the profiler's rules, with 5 a class for the softmax) of one image, layer by layer from the shapes."""
    macs = flops = 0

    def seen(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal macs, flops
        if isinstance(layer, nn.Conv2d | nn.Linear):
            products = output.numel() * layer.weight[0].numel()
            macs, flops = macs + products, flops + 2 * products + output.numel()
        elif isinstance(layer, nn.MaxPool2d):
            flops += 4 * output.numel()
        elif isinstance(layer, nn.BatchNorm2d):
            flops += 2 * output.numel() + 6 * layer.num_features

    handles = [layer.register_forward_hook(seen) for layer in module.modules()]
    classes = module(torch.zeros(1, 3, 28, 28, device="meta")).numel()
    for handle in handles:
        handle.remove()
    return macs, flops + 5 * classes


def test_every_network_of_table_4_is_here() -> None:
    assert list(FIGURES) == sorted(medmnist.PAPER, key=list(FIGURES).index) and set(FIGURES) <= set(PRINTED)


@pytest.mark.parametrize("preset", FIGURES)
def test_parameters_multiplications_flops_and_size(preset: str) -> None:
    trainable, total, macs, flops = FIGURES[preset]
    module = untrained(preset)
    assert sum(parameter.numel() for parameter in module.parameters()) == trainable
    statistics = sum(buffer.numel() for name, buffer in module.named_buffers() if "running" in name)
    assert trainable + statistics == total
    assert counted(module) == (macs, flops) and abs(flops / macs - 2) < 0.02
    printed = PRINTED[preset]
    assert abs(flops / 1e6 - printed["flops_m"]) <= 0.001 + 1e-9 and printed["params"] == trainable
    size = total * 4 / 2**20
    assert 4.284 <= size <= 4.288 if preset == "path-a" else abs(size - printed["size_mb"]) < 0.01  # A's is printed without its statistics


@pytest.mark.parametrize(("dataset", "letter"), FLAT)
def test_units_in_front_of_the_dense_layers(dataset: str, letter: str) -> None:
    """28 -> 14 -> 7 -> 4 -> 2: pools round up."""
    for number, units in enumerate(FLAT[dataset, letter], 1):
        module = untrained(f"{dataset}-{letter}{number}")
        assert isinstance(module.head, nn.Sequential) and module.head[0].in_features == units
        assert module.features(torch.zeros(1, 3, 28, 28, device="meta")).numel() == units


def test_pools_that_round_down_make_another_network() -> None:
    module = untrained("path-b3")
    for pool in module.modules():
        if isinstance(pool, nn.MaxPool2d):
            pool.ceil_mode = False
    image = torch.zeros(1, 3, 28, 28, device="meta")
    units = module.features(image).numel()
    assert units == 1_152 and FIGURES["path-b3"][0] - (2_048 - units) * 256 == 584_489
    with pytest.raises(RuntimeError, match="1152"):
        module(image)


# ---- fusions other than the mean
@pytest.mark.parametrize(
    ("members", "at", "hidden", "units", "parameters", "mb"),
    [
        ("a c2", "probabilities", (64,), 18, 1_801, (8.440, 8.447)),
        ("a b4 c2 c3", "hidden", (16,), 576, 9_385, (21.160, 21.196)),
        ("a b4 c2 c3", "flat", (8,), 28_032, 224_345, (21.160, 22.016)),
    ],
)
def test_what_a_fusion_adds(members: str, at: At, hidden: tuple[int, ...], units: int, parameters: int, mb: tuple[float, float]) -> None:
    """Against what the paper prints of A_C2_64, A_B4_C2_C3_16 and A_B4_C2_C3_8 beside the plain ensembles."""
    with torch.device("meta"):
        fusion = Fusion([untrained(f"path-{name}") for name in members.split()], at, *hidden)
        assert fusion(torch.zeros(2, 3, 28, 28)).shape == (2, 9)
    (width,) = hidden
    assert fusion.head[0].in_features == units
    learnt = sum(parameter.numel() for parameter in fusion.parameters() if parameter.requires_grad)
    assert learnt == units * width + width + width * 9 + 9 == parameters
    assert learnt * 4 / 2**20 == pytest.approx(mb[1] - mb[0], abs=1e-3)


def test_two_hidden_layers_and_none() -> None:
    members = [untrained("organa-c3"), untrained("organa-d3")]
    with torch.device("meta"):
        assert sum(p.numel() for p in Fusion(members, "probabilities", 16, 64).head.parameters()) == 22 * 16 + 16 + 16 * 64 + 64 + 64 * 11 + 11
        assert sum(p.numel() for p in Fusion(members, "probabilities").head.parameters()) == 22 * 11 + 11


def test_members_of_a_fusion_do_not_learn() -> None:
    whole = data.load("breastmnist", None)
    few = replace(whole, **{f"{axis}_{part}": getattr(whole, f"{axis}_{part}")[:64] for axis in "xy" for part in ("train", "val", "test")})
    system = medmnist.SYSTEM
    members = [system.module("breast-nano", seed) for seed in (0, 1)]
    fusion = Fusion([member for member in members if isinstance(member, MedMnistNet)], "hidden", 8)
    before = {name: tensor.clone() for name, tensor in fusion.members.state_dict().items()}
    head = fusion.head[0].weight.clone()
    fit(fusion, few, TrainConfig(epochs=1, learning_rate=1e-2))
    assert all(torch.equal(before[name], tensor) for name, tensor in fusion.members.state_dict().items())
    assert len(before) == 2 * len(members[0].state_dict()) and not torch.equal(head, fusion.head[0].weight)


def test_members_of_other_classes() -> None:
    with pytest.raises(IsthmusError, match=r"a fusion needs members of the same classes, found \[9, 11\]"):
        Fusion([untrained("path-c1"), untrained("organa-c1")], "hidden")
    with pytest.raises(IsthmusError, match="found no member"):
        Fusion([], "flat")


# ---- the exported graph
class Together(nn.Module):
    """Several networks on one input: the exporter's fixed cost is paid once."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(member(image) for member in self.members)


def exported(presets: Sequence[str]) -> onnx.ModelProto:
    """Compares probabilities of every network in ONNX Runtime with PyTorch's, and gives the graph."""
    module = Together([medmnist.SYSTEM.module(preset, seed=1) for preset in presets]).eval()
    for member in module.modules():
        if isinstance(member, nn.Linear | nn.Conv2d):  # weights as large as trained ones, or every network says 1 / classes
            nn.init.kaiming_normal_(member.weight)
    image = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    model = onnx_from_module(module, (image[:1],))
    found = [run_float(model, {model.graph.input[0].name: image[index : index + 1].numpy()}) for index in range(len(image))]
    expected = predict(module, image.numpy())
    for index, name in enumerate(value.name for value in model.graph.output):
        actual = np.concatenate([each[name] for each in found])
        np.testing.assert_allclose(actual, expected[index], atol=1e-4, rtol=0, err_msg=presets[index])
        assert actual.max() > 1.5 / actual.shape[1]
    return model


def test_exported_networks_give_the_same_probabilities() -> None:
    """One batch norm a block, none, one a convolution; a pool from 7 to 4, which stays."""
    model = exported(("organa-c3", "path-b3", "path-a"))
    shapes = [[extent.dim_value for extent in value.type.tensor_type.shape.dim] for value in onnx.shape_inference.infer_shapes(model).graph.value_info]
    assert [1, 128, 4, 4] in shapes and [1, 128, 3, 3] not in shapes


@pytest.mark.slow
def test_every_exported_network_gives_the_same_probabilities() -> None:
    exported(list(medmnist.PAPER))
