# SPDX-License-Identifier: Apache-2.0
"""Whether the artifacts of the zoo's networks equal the integer reference: `python benchmarks/zoo_exactness.py [--only NAME@PRESET ...] [--targets cpu rpi5]`.

Every preset asked for is built with seeded weights (its batch norms have seen the samples), quantised by the portable recipe and compiled; every
element of every int8 layer is compared, for samples of the usual range, noise and both extremes. Prints a Markdown table; exit code 1 where one
element differs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

import isthmus
from isthmus.layerwise import verify_layers
from isthmus.train import zoo

# Specs 05 (custom CNNs and FPGA presets) and 08 (student and teacher), then one of each other system.
NETWORKS = (
    "medmnist@organa-c2",
    "medmnist@path-c2",
    "medmnist@oct-b1",
    "medmnist@pneumonia-c2",
    "medmnist@organa-c2-quarter-average",
    "medmnist@organa-nano",
    "pneumonia_kd@student",
    "pneumonia_kd@teacher",
    "mobilenet_small@mnist",
    "exoplanet_vetting",
    "pv_soiling@small",
)
CALIBRATION_SAMPLES, EVALUATED_SAMPLES = 32, 4


def compared(reference: str, targets: list[str], folder: Path) -> list[dict[str, object]]:
    """One row a target: elements compared, elements that differ, largest difference in steps."""
    system, preset = zoo.parse(f"{zoo.PREFIX}{reference}")
    module = system.module(preset)
    shape = system.input_shape(system.configuration(preset))[1:]
    samples = np.random.default_rng(0).standard_normal((CALIBRATION_SAMPLES, *shape)).astype(np.float32)
    module.train()
    with torch.no_grad():
        for batch in torch.from_numpy(samples).split(8):
            module(batch)
    module.eval()
    bundle = isthmus.compile(module, samples[:1], targets=targets, data=samples[:EVALUATED_SAMPLES], output=folder, force=True, tune=False)
    rows = []
    for target in targets:
        layers = [layer.whole for layer in verify_layers(bundle, target).layers]
        rows.append(
            {
                "network": f"{system.name}@{preset}",
                "target": target,
                "layers": len(layers),
                "compared": sum(layer.compared for layer in layers),
                "differ": sum(layer.mismatched for layer in layers),
                "max_lsb": max(layer.max_lsb for layer in layers),
            }
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(NETWORKS), metavar="NAME@PRESET")
    parser.add_argument("--targets", nargs="+", default=["cpu", "rpi5"])
    given = parser.parse_args()
    rows = []
    print("| network | target | int8 layers | elements | differ | largest difference |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for reference in given.only:
            for row in compared(reference, given.targets, Path(folder) / "bundle"):
                rows.append(row)
                print("| {network} | {target} | {layers} | {compared:,} | {differ:,} | {max_lsb} LSB |".format(**row), flush=True)
    return 1 if any(row["differ"] or not row["compared"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
