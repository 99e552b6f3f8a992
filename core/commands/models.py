# SPDX-License-Identifier: Apache-2.0
"""What is asked of a model: `cost`, `lint`, `sensitivity`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from isthmus.commands.options import BundlePath, Json, pair, print_json, shapes, shown
from isthmus.console import Console
from isthmus.errors import IsthmusError


def cost(
    model: Annotated[str, typer.Argument(metavar="MODEL|BUNDLE", help="A .onnx (float or int8) or a bundle.")],
    convention: Annotated[str, typer.Option("--convention", help="How FLOPs are counted: mac, flop, keras or keras2.")] = "flop",
    layers: Annotated[bool, typer.Option("--layers", help="One line a layer.")] = False,
    shape: Annotated[list[str] | None, typer.Option("--shape", help="NAME=1,3,224,224 for an input with dynamic dimensions.")] = None,
    on: Annotated[list[str] | None, typer.Option("--on", help="Predict latency on this profile's board; repeat for several.")] = None,
    rows: Annotated[list[Path] | None, typer.Option("--rows", help="Your own measurements, fitted too: a .csv or a bundle measured on its board.")] = None,
    set_option: Annotated[list[str] | None, typer.Option("--set", help="With --on: a target option, NAME=VALUE.")] = None,
    as_json: Json = False,
) -> None:
    """Parameters, MACs, FLOPs, weight bytes and peak activation bytes, from the graph alone; with --on a board's latency, predicted."""
    from isthmus.cost_model import checked_convention, cost_of_loaded, cost_table, form_or_onnx
    from isthmus.estimates import estimates_json, estimates_on, estimates_table

    checked_convention(convention)
    if rows and not on:
        raise IsthmusError("--rows are what a prediction is fitted to: name a board with --on")
    if set_option and not on:
        raise IsthmusError("--set is an option of a board's target: name a board with --on")
    loaded = form_or_onnx(model, shapes(shape or []))
    result = cost_of_loaded(loaded)
    estimates = estimates_on(model, loaded, on or [], rows or [], dict(pair(word, "--set") for word in set_option or []))
    if as_json:
        counted = {"convention": convention, "count": result.count(convention)} | result.to_json()
        print_json(counted | ({"on": estimates_json(estimates)} if on else {}))
        return
    print(cost_table(result, convention, layers))
    if on:
        print(f"\n{estimates_table(estimates, layers)}")


def lint(
    bundle: BundlePath,
    target: Annotated[list[str] | None, typer.Option("--target", "-t", help="A profile; without, the bundle's own that have a linter.")] = None,
    as_json: Json = False,
) -> None:
    """Which layers a board would multiply in int8, which stay float and why, and what to change: from the graph alone."""
    from isthmus.lint_bundle import lint_json, lint_path, lint_table

    found = lint_path(bundle, target or [])
    if as_json:
        print_json(lint_json(found))
    else:
        print(lint_table(found))


def sensitivity(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A float model, as for 'compile'.")],
    data: Annotated[Path | None, typer.Option("--data", help="Samples, with labels where there are any: .npz, .npy or a folder of images.")] = None,
    metric: Annotated[str, typer.Option("--metric", help="What layers are ranked by: sqnr or top1.")] = "sqnr",
    recipe: Annotated[str, typer.Option("--recipe", help="How to quantise: a name or a .toml file.")] = "portable",
    samples: Annotated[int, typer.Option("--samples", help="How many samples each of the graphs runs on.")] = 64,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write a page with the drawing here (.html).")] = None,
    shape: Annotated[list[str] | None, typer.Option("--shape", help="NAME=1,3,224,224 for an input with dynamic dimensions.")] = None,
    preprocess: Annotated[str | None, typer.Option("--preprocess", help="How pixels become input, e.g. scale=1/255,mean=0.5,std=0.5.")] = None,
    as_json: Json = False,
) -> None:
    """What each layer costs in int8: one layer at a time in int8, and one at a time left float."""
    from isthmus.report.sensitivity import render_sensitivity
    from isthmus.sensitivity_model import sensitivity_of, sensitivity_table

    with Console(quiet=as_json) as console:
        result = sensitivity_of(model, data, recipe=recipe, metric=metric, samples=samples, shapes=shapes(shape or []), preprocess=preprocess, say=console.say)
    if output is not None:
        output.write_text(render_sensitivity(model, result.to_json()), encoding="utf-8")
    if as_json:
        print_json(result.to_json())
        return
    print(sensitivity_table(result))
    if output is not None:
        print(f"\npage: {shown(output)}")
