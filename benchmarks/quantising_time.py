# SPDX-License-Identifier: Apache-2.0
"""How long and how much memory MobileNetV2 at 224x224 takes from float ONNX to a verified int8 form: `python benchmarks/quantising_time.py`.

1000 classes, seeded weights, 128 synthetic calibration images. Each recipe is measured in a process of its own that does what `compile` does with a
user's .onnx: read and prepare it, calibrate, quantise; then write the form, load it again and verify it. Prints a Markdown table; exit code 1 where a
limit is missed: 3 minutes and 6 GB for quantising, 5 s for writing, loading and verifying.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from isthmus.dataset import load_data
from isthmus.graph import QuantGraph
from isthmus.post_training import PostTraining
from isthmus.recipe import load_recipe
from isthmus.source import load_source

SIZE, IMAGES, CLASSES = 224, 128, 1000
RECIPES = ("asymmetric", "symmetric", "portable")
QUANTISING_LIMIT_S, PEAK_LIMIT_BYTES, FORM_LIMIT_S = 180.0, 6e9, 5.0


def make_inputs(folder: Path) -> None:
    """model.onnx and images.npz: coarse patches of colour with grain over them, in -1 to 1."""
    import torch
    from torch import nn

    from isthmus.export.module import onnx_from_module
    from isthmus.train.networks import mobilenet_v2

    torch.manual_seed(0)
    module = nn.Sequential(mobilenet_v2.features(), nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(mobilenet_v2.CHANNELS, CLASSES))
    generator = np.random.default_rng(0)
    coarse = generator.uniform(-0.8, 0.8, (IMAGES, 3, SIZE // 16, SIZE // 16)).repeat(16, axis=2).repeat(16, axis=3)
    images = np.clip(coarse + generator.normal(0, 0.1, coarse.shape), -1, 1).astype(np.float32)
    with torch.no_grad():  # batch norms that have seen data: activations of the size they have in a trained network
        for batch in torch.from_numpy(images[:32]).split(16):
            module.train()(batch)
    (folder / "model.onnx").write_bytes(onnx_from_module(module.eval(), (torch.zeros(1, 3, SIZE, SIZE),)).SerializeToString())
    np.savez(folder / "images.npz", images=images)


def measure(folder: Path, recipe_name: str) -> dict[str, float]:
    """Seconds by stage, and the largest resident memory of this process up to the quantised form and in all."""
    recipe = load_recipe(recipe_name)
    seconds: dict[str, float] = {}

    def done(stage: str, since: float) -> float:
        now = time.perf_counter()
        seconds[stage] = now - since
        return now

    clock = time.perf_counter()
    source = load_source(folder / "model.onnx", None, {}, recipe, lambda text, share: None)
    assert source.float_model is not None
    shape = tuple(extent.dim_value for extent in source.float_model.graph.input[0].type.tensor_type.shape.dim)
    calibration = load_data(folder / "images.npz", {source.float_model.graph.input[0].name: shape}, None)
    clock = done("read", clock)
    graph, _ = PostTraining(source.float_model, calibration, lambda text, share: None).graph(recipe)
    clock = done("quantise", clock)
    quantising_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    file = folder / f"{recipe_name}.onnx"
    graph.save(file)
    clock = done("write", clock)
    loaded = QuantGraph.load(file)
    clock = done("load", clock)
    loaded.verify()
    done("verify", clock)
    if loaded.digest != graph.digest:
        raise RuntimeError(f"{file}: the form read back is another one than was written")
    return seconds | {"nodes": len(graph.nodes), "peak_bytes": quantising_peak, "processor_s": time.process_time()}


def missed(found: dict[str, float]) -> list[str]:
    quantising, form = found["read"] + found["quantise"], found["write"] + found["load"] + found["verify"]
    limits = (("s for quantising", quantising, QUANTISING_LIMIT_S), ("bytes", found["peak_bytes"], PEAK_LIMIT_BYTES), ("s for the form", form, FORM_LIMIT_S))
    return [f"{value:,.1f} {what} is not under {limit:,.0f}" for what, value, limit in limits if not value < limit]


def row(recipe: str, found: dict[str, float]) -> str:
    cells = [f"{found[stage]:.2f}" for stage in ("read", "quantise", "write", "load", "verify")]
    return f"| {recipe} | {int(found['nodes'])} | {' | '.join(cells)} | {found['peak_bytes'] / 1e9:.2f} | {'MISSED' if missed(found) else 'held'} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "RECIPE"), help="one recipe in this process; prints JSON")
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(Path(given.measure[0]), given.measure[1])))
        return 0
    broken = []
    with tempfile.TemporaryDirectory(prefix="isthmus-quantising-") as place:
        folder = Path(place)
        make_inputs(folder)
        print("| recipe | nodes of the form | read and prepare, s | quantise, s | write, s | load, s | verify, s | peak memory, GB | limits |")
        print("|---|---|---|---|---|---|---|---|---|")
        for recipe in RECIPES:
            done = subprocess.run([sys.executable, __file__, "--measure", place, recipe], stdout=subprocess.PIPE, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            print(row(recipe, found), flush=True)
            broken += [f"{recipe}: {sentence}" for sentence in missed(found)]
    for sentence in broken:
        print(sentence, file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
