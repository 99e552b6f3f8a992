# SPDX-License-Identifier: Apache-2.0
"""`zoo list`, `zoo show`, `zoo train`, `zoo table`."""

from __future__ import annotations

from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from isthmus.commands.options import DataRoot, Force, Json, print_json, shown, some
from isthmus.console import Console
from isthmus.errors import IsthmusError

Reference = Annotated[str, typer.Argument(metavar="NAME[@PRESET]", help="A system of 'isthmus zoo list'.")]


def zoo_list(as_json: Json = False) -> None:
    """The systems, their presets, and the paper behind each."""
    from isthmus.console import grid
    from isthmus.train import zoo as systems

    loaded = [systems.load(name) for name in systems.names()]
    if as_json:
        print_json(
            [
                {"name": s.name, "summary": s.summary, "paper": s.paper, "presets": list(s.presets), "architecture_only": not isinstance(s, systems.ZooSystem)}
                for s in loaded
            ]
        )
    else:
        here = {True: "network, data, training", False: "architecture only"}
        print(
            grid(
                ["name", "what is here", "presets", "what it is"],
                [[s.name, here[isinstance(s, systems.ZooSystem)], some(list(s.presets)), s.summary] for s in loaded],
            )
        )


def zoo_show(reference: Reference, as_json: Json = False) -> None:
    """One system: its presets with parameters and MACs, its paper."""
    from isthmus.console import grid
    from isthmus.cost_model import cost_of
    from isthmus.train import zoo as systems

    architecture, chosen = systems.parse(_prefixed(reference))
    rows: list[dict[str, Any]] = []
    for preset in [chosen] if "@" in reference else list(architecture.presets):
        cost = cost_of(f"{systems.PREFIX}{architecture.name}@{preset}", {}, "mac")
        configuration = architecture.presets[preset]
        rows.append(
            {
                "preset": preset,
                "input": list(architecture.input_shape(configuration)),
                "parameters": cost.parameters,
                "macs": cost.macs,
                "configuration": asdict(configuration) if is_dataclass(configuration) and not isinstance(configuration, type) else str(configuration),
            }
        )
    roads = dict(architecture.roads) if isinstance(architecture, systems.ZooSystem) else {}
    if as_json:
        print_json({"name": architecture.name, "summary": architecture.summary, "paper": architecture.paper, "presets": rows, "roads": roads})
        return
    print(f"{architecture.name}: {architecture.summary}\n{architecture.paper}\n")
    print(
        grid(["preset", "input", "parameters", "MACs"], [[r["preset"], "x".join(map(str, r["input"])), f"{r['parameters']:,}", f"{r['macs']:,}"] for r in rows])
    )
    if roads:
        print("\n" + "\n".join(f"{family}: {road}" for family, road in roads.items()))


def zoo_train(
    reference: Reference,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the checkpoint; a training that was stopped goes on from it.")] = Path("training"),
    data_root: DataRoot = None,
    seed: Annotated[int, typer.Option(help="Seed of weights, order and augmentation.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: CUDA where there is a device.")] = "auto",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Train a system; stopped at any moment, it goes on from the last epoch to the same weights. torchrun starts it on several devices or machines."""
    from isthmus.train.devices import is_first_process
    from isthmus.train.system import CHECKPOINT, train_system

    if force:
        (output / CHECKPOINT).unlink(missing_ok=True)
    if output.exists() and not output.is_dir():
        raise IsthmusError(f"{output}: is a file; give a folder (-o)")
    output.mkdir(parents=True, exist_ok=True)
    with Console(quiet=as_json or not is_first_process()) as console:
        trained = train_system(_prefixed(reference), output, seed, data_root, lambda text, share: console.say(f"training: {text}", share), device)
    if not is_first_process():
        return
    if as_json:
        print_json({"checkpoint": str(output / CHECKPOINT), "data": trained.split.name, "metrics": trained.metrics})
        return
    print(f"{trained.split.name}\n" + "\n".join(f"{name:24s} {value:.4f}" for name, value in trained.metrics.items()))
    print(f"\ncheckpoint: {shown(output / CHECKPOINT)} ('isthmus compile' takes it as a model)")


def zoo_table(
    bundles: Annotated[list[Path], typer.Argument(metavar="BUNDLE...", help="Bundles of zoo systems; several of one system make one row.")],
    markdown: Annotated[bool, typer.Option("--markdown", help="As a table for a Markdown page.")] = False,
    as_json: Json = False,
) -> None:
    """One row a system, from its compiled and measured bundles: float and int8 metric, cost, and what each target made of it."""
    from isthmus.zoo_table import markdown_table, rows_json, text_table, zoo_rows

    rows = zoo_rows(bundles)
    if as_json:
        print_json(rows_json(rows))
    else:
        print(markdown_table(rows) if markdown else text_table(rows))


def _prefixed(reference: str) -> str:
    return reference if reference.startswith("zoo:") else f"zoo:{reference}"
