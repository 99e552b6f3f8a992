# SPDX-License-Identifier: Apache-2.0
"""`demo` and `compile`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from isthmus.commands.options import DataRoot, Force, Json, Output, Targets, pair, print_json, shapes, shown
from isthmus.console import Console

DEMO_TARGETS = ["cpu", "rpi5", "jetson-orin-nano", "pynq-z2"]


def demo(
    targets: Targets = None,
    output: Output = Path("isthmus-demo"),
    force: Force = False,
    seed: Annotated[int, typer.Option(help="Seed of training.")] = 0,
    as_json: Json = False,
) -> None:
    """The whole way on handwritten digits that ship with scikit-learn: train, quantise, compile, verify, benchmark, report."""
    from dataclasses import replace

    from isthmus.recipe import load_recipe

    recipe = replace(load_recipe("portable-qat"), seed=seed)
    _compile("zoo:digits", output, as_json, tune=False, bench=True, targets=targets or DEMO_TARGETS, recipe=recipe, force=force)


def compile_command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A .onnx (float, int8 or trees), .pt2, package.module:factory, zoo:NAME; trees: .json, .ubj, .skops.")
    ],
    targets: Targets = None,
    data: Annotated[Path | None, typer.Option("--data", help="Calibration samples: .npz, .npy or a folder of images.")] = None,
    recipe: Annotated[str, typer.Option("--recipe", help="How to quantise: a name, a .toml file, or auto.")] = "portable",
    max_drop: Annotated[float | None, typer.Option("--max-drop", help="With --recipe auto: how much accuracy int8 may cost (0.005 is half a point).")] = None,
    data_root: DataRoot = None,
    output: Output = Path("bundle"),
    shape: Annotated[list[str] | None, typer.Option("--shape", help="NAME=1,3,224,224 for an input with dynamic dimensions.")] = None,
    preprocess: Annotated[str | None, typer.Option("--preprocess", help="How pixels become input, e.g. scale=1/255,mean=0.5,std=0.5.")] = None,
    set_option: Annotated[list[str] | None, typer.Option("--set", help="A target option, NAME=VALUE.")] = None,
    tune: Annotated[
        bool, typer.Option("--tune/--no-tune", help="Target cpu: take the fastest artifact on this machine whose accuracy holds, or the plain one.")
    ] = True,
    threads: Annotated[int, typer.Option("--threads", help="Threads that target cpu is tuned for.")] = 1,
    split: Annotated[
        list[str] | None, typer.Option("--split", help="A tensor: the board takes the network up to it, its host's processor the rest; repeat for a wider cut.")
    ] = None,
    bench: Annotated[bool, typer.Option("--bench", help="Measure latency of what runs here.")] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Quantise MODEL once, make an artifact for each target, check each against the integer reference, write a bundle."""
    from isthmus.split_bundle import split_names

    _compile(
        model,
        output,
        as_json,
        tune=tune,
        threads=threads,
        split=split_names(split or []),
        bench=bench,
        targets=targets or ["cpu"],
        data=data,
        recipe=recipe,
        max_drop=max_drop,
        data_root=data_root,
        shapes=shapes(shape or []),
        preprocess=preprocess,
        options=dict(pair(word, "--set") for word in set_option or []),
        force=force,
    )


def _compile(model: Any, output: Path, as_json: bool, **arguments: Any) -> None:
    from isthmus import pipeline
    from isthmus.report_bundle import summary, table

    with Console(quiet=as_json) as console:
        bundle = pipeline.compile(model, output=output, say=console.say, **arguments)
    if as_json:
        print_json(summary(bundle))
        return
    print(table(bundle))
    print(f"\nbundle: {shown(bundle.root)}\nreport: {shown(bundle.root / 'reports' / 'report.html')}")
