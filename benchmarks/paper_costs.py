# SPDX-License-Identifier: Apache-2.0
"""The zoo's architectures against the figures of their papers: parameters, multiply-accumulates and FLOPs, counted on the exported ONNX graphs.

    python benchmarks/paper_costs.py [--only medmnist,amfacpose] [--json]

Exit code 1 where a figure differs. The presets of one system go through the exporter together and are cut apart behind it: its fixed cost is
then paid once. `isthmus cost zoo:NAME@PRESET` counts the same graph, one at a time.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from onnx.utils import Extractor
from torch import Tensor, nn

from isthmus.console import grid
from isthmus.cost import Cost, NodeCost, cost_of_onnx
from isthmus.export.module import onnx_from_module
from isthmus.train import zoo


@dataclass(frozen=True)
class Figure:
    """What a paper says of one preset. `what`: "parameters" or a convention of `isthmus.cost`; `source`: where the figure stands, or how it follows.

    `leave_out`: operators that the published count does not see, said in `source`.
    """

    reference: str
    what: str
    published: int
    source: str
    tolerance: int = 0
    leave_out: Callable[[NodeCost], bool] | None = None


@dataclass(frozen=True)
class Row:
    figure: Figure
    computed: int
    module_parameters: int

    @property
    def agrees(self) -> bool:
        """Parameters must also be those of the module: the graph neither loses nor invents a weight."""
        if self.figure.what == "parameters" and self.computed != self.module_parameters:
            return False
        return abs(self.computed - self.figure.published) <= self.figure.tolerance


# Table 4 of the MedMNIST paper: trainable parameters, and FLOPs in millions with three decimals.
_MEDMNIST = {
    "path-a": (1_123_081, 495.324),
    "path-b1": (1_618_345, 19.097),
    "path-b2": (870_953, 39.205),
    "path-b3": (813_865, 60.345),
    "path-b4": (1_436_969, 88.144),
    "path-c1": (1_635_561, 48.071),
    "path-c2": (1_091_113, 147.708),
    "path-c3": (3_402_281, 350.592),
    "path-d1": (3_242_729, 51.486),
    "path-d2": (1_896_105, 149.645),
    "path-d3": (4_455_081, 353.127),
    "organa-b1": (1_618_859, 19.097),
    "organa-b2": (871_467, 39.206),
    "organa-b3": (814_379, 60.346),
    "organa-b4": (1_437_483, 88.145),
    "organa-c1": (412_395, 16.735),
    "organa-c2": (267_243, 38.073),
    "organa-c3": (419_307, 59.644),
    "organa-c4": (1_239_531, 87.846),
    "organa-d1": (3_243_243, 51.487),
    "organa-d2": (1_896_619, 149.646),
    "organa-d3": (4_455_595, 353.128),
    "oct-b1": (1_617_060, 19.094),
    "oct-b2": (869_668, 39.202),
    "oct-b3": (812_580, 60.342),
    "oct-b4": (1_435_684, 88.142),
    "oct-c1": (831_908, 46.564),
    "oct-c2": (689_124, 147.055),
    "oct-c3": (2_878_436, 349.747),
    "oct-d1": (3_241_444, 51.484),
    "oct-d2": (1_894_820, 149.642),
    "oct-d3": (4_453_796, 353.125),
}


def _slides_over_channels(node: NodeCost) -> bool:
    """The kernel of three over neighbouring channels in each context gate."""
    return node.op == "Conv" and len(node.output_shape) == 3


def _medmnist() -> Iterable[Figure]:
    for preset, (parameters, mega_flops) in _MEDMNIST.items():
        yield Figure(f"zoo:medmnist@{preset}", "parameters", parameters, "table 4")
        yield Figure(f"zoo:medmnist@{preset}", "keras", round(mega_flops * 1e6), "table 4, +-0.001 M", tolerance=1000)


FIGURES = (
    *_medmnist(),
    Figure("zoo:pneumonia_kd@student", "parameters", 4_737_698, "table 3"),
    Figure("zoo:pneumonia_kd@student", "keras2", 382_573_292, "table 3"),
    Figure("zoo:pneumonia_kd@teacher", "parameters", 6_795_394, "a third of table 3's three teachers"),
    Figure("zoo:pneumonia_kd@teacher", "keras2", 828_968_140, "a third of table 3's three teachers"),
    Figure("zoo:amfacpose@r34-384x288", "parameters", 3_799_629, "from the layers; table 2 prints 3.8 M"),
    Figure(
        "zoo:amfacpose@r34-384x288",
        "mac",
        5_215_574_528,
        "from the layers without the gates' sliding kernels; table 2 prints 5.2 G",
        leave_out=_slides_over_channels,
    ),
    Figure("zoo:exoplanet_vetting@vgg19", "parameters", 6_678_080, "from the layers; the paper prints none"),
    Figure("zoo:exoplanet_vetting@vgg19", "mac", 144_262_848, "from the layers; the paper prints none"),
    Figure("zoo:pv_soiling@small", "parameters", 1_519_906, "from the layers; the paper's 2.5 M has 1000 classes"),
    Figure("zoo:pv_soiling@small", "mac", 55_488_448, "from the layers; the paper prints none"),
    Figure("zoo:prex_netii@blocks-3", "parameters", 2_112_586, "from the layers; table 2 prints 2.11 M"),
    Figure("zoo:prex_netii@blocks-6", "parameters", 3_851_869, "from the layers; table 2 prints 3.85 M"),
    Figure("zoo:prex_netii@blocks-9", "parameters", 5_634_370, "from the layers; table 2 prints 5.63 M"),
    Figure("zoo:prex_netii@blocks-12", "parameters", 7_460_089, "from the layers; table 2 prints 7.46 M"),
    Figure("zoo:covid_xai@paper", "parameters", 20_809_289, "from the layers; the paper prints none"),
)


class _Together(nn.Module):
    """Several networks on one input."""

    def __init__(self, members: Iterable[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        results: list[Tensor] = []
        for member in self.members:
            result = member(x)
            results += result if isinstance(result, tuple) else [result]
        return tuple(results)


def costs(references: list[str]) -> dict[str, tuple[Cost, int]]:
    """The cost of each preset's graph, and its module's parameters. All presets take the same input shape."""
    parsed = [zoo.parse(reference) for reference in references]
    modules = [system.module(preset).eval() for system, preset in parsed]
    system, preset = parsed[0]
    example = torch.zeros(system.input_shape(system.configuration(preset)))
    model = onnx_from_module(_Together(modules), (example,), as_written=True)
    inputs, outputs = [value.name for value in model.graph.input], [value.name for value in model.graph.output]
    each = len(outputs) // len(modules)  # presets of one system have the same outputs
    cut = Extractor(model)
    graphs = [cut.extract_model(inputs, outputs[index * each : (index + 1) * each]) for index in range(len(modules))]
    counted = [sum(parameter.numel() for parameter in module.parameters()) for module in modules]
    return {reference: (cost_of_onnx(graph), count) for reference, graph, count in zip(references, graphs, counted, strict=True)}


def rows(figures: Iterable[Figure] = FIGURES) -> list[Row]:
    """The figures beside what the graphs give."""
    figures = list(figures)
    groups: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for reference in dict.fromkeys(figure.reference for figure in figures):
        system, preset = zoo.parse(reference)
        groups.setdefault((system.name, system.input_shape(system.configuration(preset))), []).append(reference)
    known: dict[str, tuple[Cost, int]] = {}
    for references in groups.values():
        known |= costs(references)
    return [Row(figure, _computed(figure, known[figure.reference][0]), known[figure.reference][1]) for figure in figures]


def _computed(figure: Figure, cost: Cost) -> int:
    left = [node for node in cost.per_node if figure.leave_out is None or not figure.leave_out(node)]
    return sum(node.parameters if figure.what == "parameters" else node.count(figure.what) for node in left)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="systems, separated by commas")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    wanted = [name for name in arguments.only.split(",") if name]
    figures = [figure for figure in FIGURES if not wanted or figure.reference.removeprefix(zoo.PREFIX).partition("@")[0] in wanted]
    if not figures:
        parser.error(f"--only {arguments.only}: no figure of these systems")
    found = rows(figures)
    different = [row for row in found if not row.agrees]
    if arguments.json:
        described = [
            {
                "model": r.figure.reference,
                "what": r.figure.what,
                "published": r.figure.published,
                "computed": r.computed,
                "agrees": r.agrees,
                "source": r.figure.source,
            }
            for r in found
        ]
        print(json.dumps(described, indent=1))
    else:
        table = [
            [
                row.figure.reference,
                row.figure.what,
                f"{row.figure.published:,}",
                f"{row.computed:,}",
                "yes" if row.agrees else "NO",
                row.figure.source,
            ]
            for row in found
        ]
        print(grid(["model", "figure", "published", "computed", "agrees", "where it is published"], table))
        print(f"\n{len(found) - len(different)} of {len(found)} figures agree; parameters of the graph are also the module's own.")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
