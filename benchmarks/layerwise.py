# SPDX-License-Identifier: Apache-2.0
"""The table of docs/layers.md: which layers of a network differ from the integer reference on their own inputs, by scheme and engine.

    python benchmarks/layerwise.py [--recipe portable,asymmetric] [--layers]

The network is untrained (seed 0): 13 convolutions, four of them depthwise, and three residual additions on 28x28. About a minute a recipe.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from isthmus import pipeline
from isthmus.console import grid
from isthmus.layerwise import LayerReport, layer_table, verify_layers

PROFILES = ("cpu", "rpi5")
SAMPLES = 256


def block(channels: int, filters: int, stride: int) -> nn.Sequential:
    """Widen, filter each channel, narrow."""
    wide = 4 * channels
    return nn.Sequential(
        *(nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()),
        *(nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()),
        *(nn.Conv2d(wide, filters, 1, bias=False), nn.BatchNorm2d(filters)),
    )


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, 1, 1), nn.ReLU())
        self.first, self.second, self.third, self.fourth = block(16, 16, 1), block(16, 32, 2), block(32, 32, 1), block(32, 32, 1)
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.first(x)
        x = self.second(x)
        x = x + self.third(x)
        x = x + self.fourth(x)
        logits: Tensor = self.head(torch.flatten(self.pool(x), 1))
        return logits


def reports(recipe: str, folder: Path) -> list[LayerReport]:
    torch.manual_seed(0)
    samples = np.random.default_rng(0).standard_normal((SAMPLES, 1, 28, 28)).astype(np.float32)
    bundle = pipeline.compile(Network().eval(), (torch.zeros(1, 1, 28, 28),), targets=PROFILES, data=samples, recipe=recipe, tune=False, output=folder)
    return [verify_layers(bundle, profile) for profile in PROFILES]


def row(recipe: str, report: LayerReport) -> list[str]:
    own = [layer.own for layer in report.layers]
    worst = max(own, key=lambda comparison: comparison.mismatched)
    return [
        recipe,
        report.profile,
        f"{sum(comparison.mismatched > 0 for comparison in own)} of {len(own)}",
        f"{worst.mismatched:,} of {worst.compared:,}",
        f"{max(comparison.max_lsb for comparison in own)} LSB",
        f"{100 * (1 - report.layers[-1].whole.exact_share):.3g} %",
        f"{sum(comparison.compared for comparison in own):,}",
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="portable,asymmetric")
    parser.add_argument("--layers", action="store_true", help="every layer too")
    arguments = parser.parse_args()
    rows, passed = [], True
    for recipe in arguments.recipe.split(","):
        with tempfile.TemporaryDirectory(prefix="isthmus-layerwise-") as folder:
            for report in reports(recipe, Path(folder) / "bundle"):
                rows.append(row(recipe, report))
                passed &= report.passed
                if arguments.layers:
                    print(layer_table(report), end="\n\n")
    print(grid(["recipe", "profile", "layers that differ", "most of one layer", "largest", "carried to the output", "elements"], rows))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
