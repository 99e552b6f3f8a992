# SPDX-License-Identifier: Apache-2.0
"""The zoo's architectures against their papers' figures. `benchmarks/paper_costs.py` holds the figures and counts every one of them on the graph.

Here: every parameter count on the module, and on the graph the networks whose export takes little.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from isthmus.cost import cost_of_onnx
from isthmus.cost_model import cost_of, cost_table
from isthmus.errors import IsthmusError
from isthmus.export.module import onnx_from_module
from isthmus.recipe import load_recipe
from isthmus.source import load_source
from isthmus.train import zoo
from isthmus.train.zoo import amfacpose, medmnist


def script() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "paper_costs.py"
    spec = importlib.util.spec_from_file_location("paper_costs", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules["paper_costs"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


paper_costs = script()
# One network of each kind of family: the others have the same layers, fewer or more of them.
ON_GRAPH = {f"zoo:medmnist@{preset}" for preset in ("path-a", "path-b3", "path-d1", "organa-c2", "oct-c1")}
ON_GRAPH |= {"zoo:pneumonia_kd@student", "zoo:pneumonia_kd@teacher", "zoo:exoplanet_vetting@vgg19", "zoo:pv_soiling@small"}


def untrained(reference: str) -> nn.Module:
    """Without memory: shapes and counts need no weights."""
    system, preset = zoo.parse(reference)
    with torch.device("meta"):
        return system.build(system.configuration(preset)).eval()


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_every_preset_of_the_medmnist_tables_has_its_figures() -> None:
    assert {f.reference for f in paper_costs.FIGURES if "medmnist" in f.reference} == {f"zoo:medmnist@{p}" for p in medmnist.PAPER}


@pytest.mark.parametrize("figure", [f for f in paper_costs.FIGURES if f.what == "parameters"], ids=lambda f: f.reference)
def test_parameters_of_every_module(figure) -> None:
    assert parameters(untrained(figure.reference)) == figure.published


@pytest.mark.slow
def test_figures_on_the_graph() -> None:
    rows = paper_costs.rows(figure for figure in paper_costs.FIGURES if figure.reference in ON_GRAPH)
    assert len(rows) == 2 * len(ON_GRAPH)
    assert [(row.figure.reference, row.figure.what, row.figure.published, row.computed) for row in rows if not row.agrees] == []


def test_a_figure_that_differs_is_found() -> None:
    figure = paper_costs.FIGURES[0]
    assert paper_costs.Row(figure, figure.published, figure.published).agrees
    assert not paper_costs.Row(figure, figure.published + 1, figure.published + 1).agrees
    assert not paper_costs.Row(figure, figure.published, figure.published + 1).agrees


# Beside the papers' own: other sizes of the same layers.
@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("zoo:amfacpose@r34-256x256", 3_605_773),
        ("zoo:amfacpose@r18-384x288", 2_545_893),
        ("zoo:amfacpose@r18-256x256", 2_352_037),
        ("zoo:amfacpose@r34-384x288-pool", 3_613_005),
        ("zoo:amfacpose@r18-256x256-pool", 2_241_445),
        ("zoo:exoplanet_vetting@vgg19-trained", 6_689_088 + 7_683),
        ("zoo:exoplanet_vetting@width-4", 418_448),
        ("zoo:exoplanet_vetting@width-8", 104_968),
        ("zoo:exoplanet_vetting@width-16", 26_420),
        ("zoo:pv_soiling@small-1000", 2_542_856),
        ("zoo:covid_xai@edge", 1_371_209),
        ("zoo:covid_xai@ci", 725_369),
        ("zoo:covid_xai@imagenet", 22_855_952),
    ],
)
def test_parameters_of_the_other_presets(reference: str, expected: int) -> None:
    assert parameters(untrained(reference)) == expected


@pytest.mark.parametrize(
    ("reference", "shapes"),
    [
        ("zoo:medmnist@path-b4", [(1, 9)]),
        ("zoo:pneumonia_kd@teacher", [(1, 2)]),
        ("zoo:amfacpose", [(1, 17, 576), (1, 17, 768)]),
        ("zoo:exoplanet_vetting", [(1, 2560)]),
        ("zoo:pv_soiling", [(1, 2)]),
        ("zoo:prex_netii@blocks-12", [(1, 49, 96, 96)]),
        ("zoo:covid_xai", [(1, 1)]),
    ],
)
def test_outputs(reference: str, shapes: list[tuple[int, ...]]) -> None:
    system, preset = zoo.parse(reference)
    result = untrained(reference)(torch.zeros(system.input_shape(system.configuration(preset)), device="meta"))
    assert [tuple(part.shape) for part in (result if isinstance(result, tuple) else (result,))] == shapes


@pytest.mark.parametrize(("letter", "sizes"), [("b", (6_272, 3_136, 2_048, 1_024)), ("d", (12_544, 6_272, 8_192))])
def test_medmnist_pools_round_up(letter: str, sizes: tuple[int, ...]) -> None:
    """28 -> 14 -> 7 -> 4 -> 2: a pool that rounds down would give 3 after 7."""
    for number, size in enumerate(sizes, 1):
        head = untrained(f"zoo:medmnist@oct-{letter}{number}").head
        assert isinstance(head, nn.Sequential) and head[0].in_features == size


def test_light_field_of_odd_size() -> None:
    assert untrained("zoo:prex_netii@blocks-3")(torch.zeros(1, 4, 37, 41, device="meta")).shape == (1, 49, 37, 41)


def test_light_field_without_its_last_convolution_is_the_initial_one() -> None:
    config = replace(zoo.load("prex_netii").configuration("blocks-3"), blocks=1, initial=(8, 4, 4))
    net = zoo.load("prex_netii").build(config).eval()
    nn.init.zeros_(net.last.weight)
    nn.init.zeros_(net.last.bias)
    corners = torch.rand(1, 4, 7, 6)
    torch.testing.assert_close(net(corners), net.initial(corners), rtol=0, atol=0)


def test_coordinates_run_from_minus_one_to_one() -> None:
    layer = amfacpose.CoordConv(1, 2, stride=1, height=4, width=6)
    with torch.no_grad():
        layer.conv.weight.zero_()
        layer.conv.weight[0, 1, 1, 1] = layer.conv.weight[1, 2, 1, 1] = 1  # the first output is the column, the second the row
        across, down = layer(torch.rand(1, 1, 4, 6))[0]
    torch.testing.assert_close(across, torch.linspace(-1, 1, 6).expand(4, 6))
    torch.testing.assert_close(down, torch.linspace(-1, 1, 4)[:, None].expand(4, 6))


# ---- the graph that is counted
def test_a_graph_as_written_has_the_parameters_of_its_module() -> None:
    """Coordinates are no weights, convolutions without a bias get none, equal normalisations stay two, and a bias of zeros that the module has stays."""
    stem = amfacpose.CoordConv(3, 8, stride=2, height=8, width=8)
    module = nn.Sequential(stem, nn.BatchNorm2d(8), nn.Mish(), amfacpose.Context(8), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1))
    nn.init.zeros_(module[-1].bias)
    cost = cost_of_onnx(onnx_from_module(module, torch.zeros(1, 3, 8, 8), as_written=True))
    assert cost.parameters == parameters(module)
    assert cost.buffers == sum(buffer.numel() for name, buffer in module.named_buffers() if "running" in name)
    assert sum(node.op == "BatchNormalization" for node in cost.per_node) == 4


# ---- the command line's side
def test_cost_of_an_architecture() -> None:
    cost = cost_of("zoo:medmnist@organa-c1", {}, "keras")
    assert (cost.parameters, cost.buffers, cost.macs, cost.keras_flops) == (412_395, 64, 8_304_832, 16_735_426)
    assert "FLOPs, convention 'keras'  16,735,426" in cost_table(cost, "keras", layers=False)


def test_an_architecture_cannot_be_compiled() -> None:
    expected = (
        r"zoo:covid_xai holds the architecture alone, .* so it cannot be compiled; `isthmus cost zoo:covid_xai` counts it, .*\(complete here: .*zoo:digits"
    )
    with pytest.raises(IsthmusError, match=expected):
        load_source("zoo:covid_xai@edge", None, {}, load_recipe("portable"), lambda text, share: None)
