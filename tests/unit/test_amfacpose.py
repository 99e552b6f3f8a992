# SPDX-License-Identifier: Apache-2.0
"""AMFACPose: the architecture against the specification's counts, its blocks, its loss and a short training."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

from isthmus import pipeline
from isthmus.dataset import Dataset
from isthmus.export.module import onnx_from_module
from isthmus.export.prepare import prepare_float
from isthmus.float_model import run_float
from isthmus.post_training import PostTraining
from isthmus.quantize.single_thread import single_thread
from isthmus.recipe import load_recipe
from isthmus.train.data import Split
from isthmus.train.loop import TrainConfig, fit, predict
from isthmus.train.processing.pose import COCO, shares_of
from isthmus.train.task import Task
from isthmus.train.zoo import _amfacpose_task as task_module
from isthmus.train.zoo.amfacpose import ABLATION, FULL, LEAST_LOGIT, SYSTEM, AmfacPose, Config, Context, CoordConv, Gate, Level, TinyPose, shrunk


def script() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "amfacpose.py"
    spec = importlib.util.spec_from_file_location("benchmark_amfacpose", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules["benchmark_amfacpose"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


benchmark = script()
SMALL = replace(
    SYSTEM.configuration("ci"), height=64, width=32, blocks=(1, 1, 1, 1), widths=(8, 8, 16, 16), stem=(8, 8, 8), pyramid_channels=8, fused_channels=16,
    hidden=16, squeeze_reduction=4,
)  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks as small as these lose their time in threads that wait for each other."""
    with single_thread():
        yield


@pytest.fixture
def seeded() -> torch.Generator:
    torch.manual_seed(0)
    return torch.Generator().manual_seed(0)


def settled(config: Config, batches: int = 1) -> nn.Module:
    """A network whose batch norms have seen noise."""
    torch.manual_seed(0)
    module = AmfacPose(config).train()
    with torch.no_grad():
        for _ in range(batches):
            module(torch.randn(2, 3, config.height, config.width))
    return module.eval()


# ---- counts: the specification's own
COUNTED = {
    "r34-384x288": (3_799_629, 5_215_574_528),
    "r34-256x256": (3_605_773, 3_091_904_000),
    "r18-384x288": (2_545_893, 3_254_265_856),
    "r18-256x256": (2_352_037, 1_929_618_432),
    "r34-384x288-pool": (3_613_005, 1_947_974_912),
    "r18-256x256-pool": (2_241_445, 864_924_672),
    "tinypose_fpga": (13_569, 858_112),
}
# The pyramid's 1x1 convolutions on the means, which the specification's own count leaves out: 48 channels from 16 + 32 + 64 + 128.
MEANS = 48 * 240
COUNTED |= {"r18_lite": (290_085, 93_924_672 + MEANS), "ci": (223_077, 23_979_584 + MEANS)}


@pytest.mark.parametrize("preset", [pytest.param(name, marks=pytest.mark.slow) if "pool" in name else name for name in SYSTEM.presets])
def test_parameters_and_macs(preset: str) -> None:
    cost = benchmark.cost_of_configuration(preset, SYSTEM.configuration(preset))
    assert (cost.parameters, cost.macs) == COUNTED[preset]


def test_costs_against_the_papers_tables() -> None:
    """Table 2's four networks, table 6's ladder: within rounding; squeeze and gates cost next to nothing."""
    presets = {name: config for name, config in SYSTEM.presets.items() if name in benchmark.PAPER}
    found = {name: benchmark.cost_of_configuration(name, config) for name, config in {**presets, **ABLATION}.items()}
    found["full"] = found["r34-384x288"]
    assert found.keys() == {*benchmark.PAPER, "full"}
    for name, (parameters, macs) in benchmark.PAPER.items():
        assert abs(found[name].parameters / 1e6 - parameters) < 0.065 and abs(found[name].macs / 1e9 - macs) < 0.065, name
    ladder = [found[name].parameters for name in (*ABLATION, "full")]
    assert ladder == sorted(ladder) and len(ladder) == 6
    for more, less in (("+DGCB", "+AFPN"), ("+SE", "+SCRM")):
        assert 0 < found[more].macs - found[less].macs < 1e6
    assert found["full"].sliding == 11_328
    assert found["full"].macs / found["r34-256x256"].macs == pytest.approx(1.687, abs=1e-3)


QUICK = ("full",)
ROWS = {**ABLATION, "full": FULL, **{name: SYSTEM.presets[name] for name in ("r34-256x256", "r18-384x288", "r18-256x256")}}


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in ROWS if name not in QUICK)])
def test_the_other_reading_of_the_papers_totals_rounds_to_all_of_them(name: str) -> None:
    """Specification, 7.1, preset match18: other widths, the same eighteen figures at one decimal."""
    other = {"stem": (40, 32, 64), "pyramid_channels": 80, "hidden": 272, "gate_reduction": 1, "depthwise_norm": True}
    cost = benchmark.cost_of_configuration(name, replace(ROWS[name], **other, coordinate_layers=min(ROWS[name].coordinate_layers, 1)))
    assert (round(cost.parameters / 1e6, 1), round(cost.macs / 1e9, 1)) == (benchmark.PAPER | {"full": (3.8, 5.2)})[name]


def test_pooling_first_saves_what_the_specification_says() -> None:
    cost = benchmark.cost_of_configuration("pooled", replace(FULL, pool_first=True))
    assert cost.macs == 4_936_882_688 + 96 * (64 + 128 + 256 + 512)


def test_crowdpose_has_fourteen_joints() -> None:
    with torch.device("meta"):
        module = AmfacPose(replace(FULL, joints=14))
    assert sum(parameter.numel() for parameter in module.parameters()) == 3_798_090


@pytest.mark.parametrize(("preset", "maps", "bins"), [("r34-384x288", (192, 144), (576, 768)), ("r18-256x256", (128, 128), (512, 512))])
def test_shapes(preset: str, maps: tuple[int, int], bins: tuple[int, int]) -> None:
    """With one block a stage: others keep the shape."""
    config = replace(SYSTEM.configuration(preset), blocks=(1, 1, 1, 1))
    with torch.device("meta"):
        module, x = AmfacPose(config).eval(), torch.zeros(2, 3, config.height, config.width)
        found: list[tuple[int, ...]] = []
        for stage in module.stages:
            stage.register_forward_hook(lambda layer, inputs, output: found.append(tuple(output.shape[1:])))
        outputs = module(x)
    assert found == [(64 << index, maps[0] >> index, maps[1] >> index) for index in range(4)]
    assert [tuple(output.shape) for output in outputs] == [(2, 17, extent) for extent in bins]


def test_tiny_trunk() -> None:
    tiny = TinyPose(SYSTEM.configuration("tinypose_fpga"))
    assert tiny.trunk(torch.zeros(1, 5, 64, 48)).shape == (1, 17, 8, 6)
    assert sum(parameter.numel() for parameter in tiny.trunk.parameters()) == 6_737


@pytest.mark.parametrize("preset", ["ci", "tinypose_fpga"])
def test_logits_of_far_bins_end_where_int8_can_follow(preset: str) -> None:
    """Wherever training pushes them: the step of int8 is 2^-3 as long as no logit reaches 16, and -16 takes no operator of its own."""
    torch.manual_seed(0)
    module = SYSTEM.build(SYSTEM.configuration(preset)).eval()
    samples = torch.randn(4, *SYSTEM.input_shape(SYSTEM.configuration(preset))[1:])
    with torch.no_grad():
        for head in (module.across, module.down):
            module.get_parameter("across.2.bias" if head is module.across else "down.2.bias").copy_(torch.linspace(-60, 12, head[2].out_features))
        outputs = module(samples)
    assert all(float(logits.min()) == LEAST_LOGIT and float(logits.max()) < -LEAST_LOGIT for logits in outputs)
    assert all((logits.argmax(-1) >= logits.shape[-1] - 8).all() for logits in outputs)
    model = prepare_float(onnx_from_module(module, (samples[:1],), outputs=SYSTEM.outputs), {})
    quantiser = PostTraining(model, Dataset({"input": samples.numpy()}, None, "noise"), lambda text, share: None)
    graph, _ = quantiser.graph(load_recipe("portable"))
    assert [spec.scale for spec in graph.outputs] == [2.0**-3] * 2
    assert {node.clamp for node in graph.nodes if node.op in ("Clip", "Gemm", "MatMul")} <= {(-128, 127), (0, 127)}


# ---- blocks
def test_coordinates_as_a_map_of_biases(seeded: torch.Generator) -> None:
    """conv([x, planes]) = conv(x) + conv(planes), which is affine in the position away from the padding."""
    layer = CoordConv(3, 4, stride=1, height=10, width=14)
    x = torch.rand(2, 3, 10, 14)
    with torch.no_grad():
        weight = layer.conv.weight
        alone = nn.functional.conv2d(x, weight[:, :3], padding=1)
        planes = layer(torch.zeros(1, 3, 10, 14))
        torch.testing.assert_close(layer(x), alone + planes, rtol=0, atol=1e-5)
        inside = planes[0, :, 1:-1, 1:-1].reshape(4, -1).T.numpy()
        rows, columns = np.mgrid[1:9, 1:13].reshape(2, -1)
        basis = np.column_stack([np.ones_like(rows), columns, rows]).astype(np.float64)
        assert np.abs(basis @ np.linalg.lstsq(basis, inside, rcond=None)[0] - inside).max() < 1e-5
        weight[:, 3:] = 0
        torch.testing.assert_close(layer(x), alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("part", "share"), [("squeeze", 2), ("gates", 4), ("context", 4)])
def test_gates_only_weaken(part: str, share: int, seeded: torch.Generator) -> None:
    x = torch.randn(2, 16, 6, 5)
    modules = {"squeeze": [Gate(16, 4)], "gates": [Gate(16, 4), Gate(16, 4)], "context": [Context(16).eval()]}[part]

    def gated() -> torch.Tensor:
        result = x
        for module in modules:
            result = module(result) if part == "context" else result * module(x.mean((2, 3), keepdim=True))
        return result

    with torch.no_grad():
        weak = gated()
        assert weak.shape == x.shape and bool((weak.abs() <= x.abs()).all())
        for module in modules:
            for parameter in module.parameters():
                parameter.zero_()
        torch.testing.assert_close(gated(), x / share)


@pytest.mark.parametrize("masked", [False, True])
def test_a_level_squares_what_it_gates(masked: bool, seeded: torch.Generator) -> None:
    level = Level(8, replace(SMALL, masked=masked)).eval()
    with torch.no_grad():
        found = level(torch.randn(2, 8, 16, 8), (4, 2))
    assert bool((found >= 0).all()) != masked


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_bilinear_down_is_the_mean_of_the_middle_four(factor: int, seeded: torch.Generator) -> None:
    x = torch.randn(1, 3, 16, 24, dtype=torch.float64)
    size = (16 // factor, 24 // factor)
    wanted = nn.functional.interpolate(x, size=size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(shrunk(x, size), wanted, rtol=0, atol=2e-15)


def test_pooling_first_changes_no_number() -> None:
    module = settled(SMALL)
    x = torch.randn(2, 3, 64, 32)
    with torch.no_grad():
        pooled = module(x)
        for level in module.levels:
            assert level.pool_first
            level.pool_first = False
        for one, other in zip(pooled, module(x), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def test_the_exported_network_finds_the_same_bins() -> None:
    """In the paper's order, levels resized last: rewritten for a device no Resize is left, and 16 crops come to the same logits."""
    module = settled(replace(SMALL, pool_first=False))
    model = prepare_float(onnx_from_module(module, (torch.zeros(1, 3, 64, 32),), outputs=SYSTEM.outputs), {})
    assert "Resize" not in {node.op_type for node in model.graph.node}
    crops = SYSTEM.load_data(replace(SMALL, figures=10), 0, None).x_train[:16]
    found, wanted = run_float(model, {"input": crops}), predict(module, crops)
    assert len(crops) == 16
    for name, logits in zip(SYSTEM.outputs, wanted, strict=True):
        np.testing.assert_allclose(found[name], logits, rtol=0, atol=1e-4)
        assert (found[name].argmax(-1) == logits.argmax(-1)).mean() >= 0.99


def test_mish() -> None:
    places = torch.tensor([0.0, 1.0, -1.19243], dtype=torch.float64)
    torch.testing.assert_close(nn.Mish()(places), torch.tensor([0.0, 0.865098, -0.308843], dtype=torch.float64), rtol=0, atol=1e-6)


# ---- loss
def person(x: float, y: float, weight: float = 1.0) -> torch.Tensor:
    """Everybody's joints at one place, and an area."""
    return torch.cat([torch.tensor([[x, y, weight]]).expand(17, 3), torch.tensor([[900.0, 0, 0]])])[None]


def uniform_divergence(bins: int) -> float:
    """Of a smoothed target from equal shares: the loss of an axis whose network knows nothing."""
    low, high = 0.1 / bins, 0.9 + 0.1 / bins
    return math.log(bins) + high * math.log(high) + (bins - 1) * low * math.log(low)


@pytest.mark.parametrize("spread", [0.0, 6.0])
def test_targets_are_distributions_about_the_joint(spread: float) -> None:
    wanted = task_module.bin_targets(torch.tensor([[0.0, 17.3, 30.26]]), 64, 2, spread)
    torch.testing.assert_close(wanted.sum(-1), torch.ones(1, 3))
    assert wanted.argmax(-1).tolist() == [[0, 35, 61]]
    if not spread:
        assert float(wanted.min()) == pytest.approx(0.1 / 64)


def test_loss() -> None:
    uniform = (torch.zeros(1, 17, 576), torch.zeros(1, 17, 768))
    assert uniform_divergence(576) == pytest.approx(5.3971, abs=1e-4)
    knows_nothing = task_module.pose_loss(uniform, person(20, 30), COCO, 2)
    weights = task_module.joint_weights(COCO)
    assert sorted(set(weights.tolist())) == pytest.approx([1.0, 1.2, 1.5]) and int((weights > 1.4).sum()) == 4
    expected = float(weights.mean()) * (uniform_divergence(576) + uniform_divergence(768))
    assert float(knows_nothing) == pytest.approx(expected, rel=1e-5)
    wanted = [task_module.bin_targets(torch.full((1, 17), place), bins, 2) for place, bins in ((20.0, 576), (30.0, 768))]
    right = tuple(task_module.TEMPERATURE * part.log() for part in wanted)
    assert float(task_module.pose_loss(right, person(20, 30), COCO, 2)) == pytest.approx(0, abs=1e-5)


def test_gradient_of_the_loss() -> None:
    """weight * (softmax(o / T) - q) / T before the mean; nothing for a joint that is not there."""
    across = torch.randn(1, 17, 64, requires_grad=True)
    target = person(10, 10)
    target[0, 3, 2] = 0
    task_module.pose_loss((across, torch.zeros(1, 17, 64)), target, COCO, 2).backward()
    assert across.grad is not None
    shares, wanted = shares_of(across.detach().numpy()), task_module.bin_targets(target[:, :-1, 0], 64, 2).numpy()
    expected = task_module.joint_weights(COCO).numpy()[None, :, None] * (shares - wanted) / task_module.TEMPERATURE / 17
    expected[0, 3] = 0
    np.testing.assert_allclose(across.grad.numpy(), expected, atol=1e-6)


def test_distilling_ends_at_the_teachers_outputs() -> None:
    outputs = torch.randn(2, 17, 32), torch.randn(2, 17, 48)
    assert float(task_module.distil(outputs, outputs)) == pytest.approx(0, abs=1e-5)
    assert float(task_module.distil(outputs, tuple(part.flip(-1) for part in outputs))) > 0.5


# ---- augmentation
def test_augmented_joints_stay_on_their_pixels() -> None:
    """A white spot on black moves with its joint, and changes sides with it."""
    torch.manual_seed(0)
    black = -torch.tensor(task_module.MEAN) / torch.tensor(task_module.DEVIATION)
    images = black.reshape(1, 3, 1, 1).repeat(24, 1, 64, 48)
    images[:, :, 30:33, 27:30] = 1.0
    moved, targets = task_module.augmented(images, person(28, 31).repeat(24, 1, 1), COCO)
    bright = moved.sum(1) - float(black.sum())
    rows, columns = torch.meshgrid(torch.arange(64.0), torch.arange(48.0), indexing="ij")
    total = bright.sum((1, 2))
    found = torch.stack([(bright * columns).sum((1, 2)) / total, (bright * rows).sum((1, 2)) / total], -1)
    assert bool((targets[:, 0, 2] == 1).all())
    torch.testing.assert_close(found, targets[:, 0, :2], rtol=0, atol=0.1)
    assert len(set(targets[:, -1, 0].tolist())) > 20  # areas zoom


def test_mirrored_joints_change_sides() -> None:
    torch.manual_seed(1)
    target = person(24, 32).repeat(40, 1, 1)
    target[:, 5, 0] = 40.0  # the left shoulder
    _, found = task_module.augmented(torch.zeros(40, 3, 64, 48), target, COCO)
    _, unswapped = (torch.manual_seed(1), task_module.augmented(torch.zeros(40, 3, 64, 48), target, replace(COCO, pairs=())))[1]
    apart = (found[:, 5, :2] - found[:, 6, :2]).norm(dim=1)
    assert bool((apart > 8).all())
    mirrored = found[:, 6, 0] != unswapped[:, 6, 0]
    assert 5 < int(mirrored.sum()) < 35
    torch.testing.assert_close(found[mirrored][:, 6], unswapped[mirrored][:, 5])


# ---- training
def _task() -> Task:
    return replace(SYSTEM.task(SYSTEM.configuration("tinypose_fpga")), augment=None)


def test_a_short_training_on_stick_figures_halves_the_loss() -> None:
    config = replace(SYSTEM.configuration("tinypose_fpga"), figures=8)
    split = SYSTEM.load_data(config, 0, None)
    torch.manual_seed(0)
    module = SYSTEM.build(config)
    result = fit(module, split, TrainConfig(30, 16, 1e-2), task=_task())
    assert result.epochs[-1].loss < 0.5 * result.epochs[1].loss
    across, down = predict(module, split.x_test)
    assert across.shape == (len(split.x_test), 17, 48) and down.shape == (len(split.x_test), 17, 64)


def test_a_mirrored_person_s_left_is_on_the_other_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """People who look the same in a mirror: without the joints' change of sides nobody could tell which of two wrists is the left one."""
    monkeypatch.setattr(task_module, "TURN", 0.0)
    monkeypatch.setattr(task_module, "ZOOM", (1.0, 1.0))
    config = replace(SYSTEM.configuration("tinypose_fpga"), figures=4)
    split = symmetric(SYSTEM.load_data(config, 0, None), config.width)
    found = {}
    for pairs in (COCO.pairs, ()):
        skeleton = replace(COCO, pairs=pairs)
        task = replace(SYSTEM.task(config), augment=lambda inputs, targets, skeleton=skeleton: task_module.augmented(inputs, targets, skeleton))
        torch.manual_seed(0)
        module = SYSTEM.build(config)
        fit(module, split, TrainConfig(60, 16, 1e-2), task=task)
        found[bool(pairs)] = task.score(predict(module, split.x_test), split.y_test)
    assert found[True] > 0.5 and found[False] < 0.5 * found[True]


def symmetric(split: Split, width: int) -> Split:
    """Those of the training part of whom everything is seen, each laid over his own mirror image."""
    whole = split.y_train[:, :-1, 2].all(axis=1)
    x, y = split.x_train[whole].copy(), split.y_train[whole].copy()
    x[:, :3] = (x[:, :3] + x[:, :3, :, ::-1]) / 2
    mirrored = y[:, COCO.mirrored] * (-1, 1, 1) + (width - 1, 0, 0)
    y[:, :-1] = (y[:, :-1] + mirrored) / 2
    assert len(x) > 3
    return Split("symmetric", x, y, x[:1], y[:1], x, y, (), 0)


def test_the_large_network_learns_too() -> None:
    config = replace(SMALL, figures=2)
    split = SYSTEM.load_data(config, 0, None)
    module = settled(config)
    result = fit(module, split, TrainConfig(4, 8, 1e-2), task=SYSTEM.task(config))
    assert result.epochs[-1].loss < result.epochs[1].loss
    assert all(math.isfinite(epoch.validation_loss) for epoch in result.epochs)


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "recipe"), [("tinypose_fpga", "portable-qat"), ("ci", "portable")])
def test_compiled_from_stick_figures(preset: str, recipe: str, tmp_path: Path) -> None:
    """Trained, quantised, and equal to the integer reference in both engines; the gates' road of training says itself."""
    bundle = pipeline.compile(f"zoo:amfacpose@{preset}", targets=["cpu", "rpi5"], recipe=recipe, output=tmp_path / "bundle", tune=False)
    assert bundle.manifest["task"]["metric"] == "AP" and bundle.manifest["task"]["samples"] > 0
    for comparisons in pipeline.verify(bundle).values():
        assert len(comparisons) == 2 and all(comparison.passed and comparison.compared for comparison in comparisons)
    if recipe == "portable-qat":
        assert any("training in the form" in note for note in bundle.manifest["notes"])
