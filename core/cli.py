# SPDX-License-Identifier: Apache-2.0
"""The command line: parses, calls, prints. Exit code 0, 2 for the user's mistakes, 1 for a failed verification or a bug."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

import isthmus
from isthmus.bundle import Bundle
from isthmus.console import Console
from isthmus.errors import IsthmusError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help="One verified int8 ONNX graph, every edge target.")
zoo = typer.Typer(no_args_is_help=True, help="The networks that ship with isthmus.")
app.add_typer(zoo, name="zoo")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Targets = Annotated[list[str] | None, typer.Option("--target", "-t", help="A profile ('isthmus targets' lists them); repeat for several.")]
BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="The folder that 'isthmus compile' wrote.")]
Trust = Annotated[bool, typer.Option("--trust-bundle", help="Run native code of a bundle that somebody else built.")]
Threads = Annotated[int, typer.Option("--threads", help="Threads of the engine.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder of the bundle.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing bundle.")]

DEMO_TARGETS = ["cpu", "rpi5", "jetson-orin-nano", "pynq-z2"]


def main() -> None:
    """Entry point. `--debug` anywhere shows tracebacks."""
    debug = "--debug" in sys.argv
    sys.argv = [word for word in sys.argv if word != "--debug"]
    try:
        app()
    except IsthmusError as error:
        _fail(str(error), debug, error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted; nothing half-written is left", debug, 130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        _fail(f"{place}{error.strerror or error}", debug, 2)
    except Exception as error:  # noqa: BLE001  # a bug: say so in one line, and how to see where
        _fail(f"internal error, please report it: {type(error).__name__}: {error} (--debug shows where)", debug, 1)


def _fail(sentence: str, debug: bool, code: int) -> None:
    if debug:
        traceback.print_exc()
    print(f"isthmus: {sentence}", file=sys.stderr)
    sys.exit(code)


def _version(wanted: bool) -> None:
    if wanted:
        print(isthmus.__version__)
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; may stand anywhere.")] = False,
) -> None:
    return None


# ---- compile
@app.command()
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
    _compile("zoo:digits", output, as_json, bench=True, targets=targets or DEMO_TARGETS, recipe=recipe, force=force)


@app.command("compile")
def compile_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A .onnx (float or int8), a .pt2, package.module:factory, or zoo:NAME.")],
    targets: Targets = None,
    data: Annotated[Path | None, typer.Option("--data", help="Calibration samples: .npz, .npy or a folder of images.")] = None,
    recipe: Annotated[str, typer.Option("--recipe", help="How to quantise: a name, a .toml file, or auto.")] = "portable",
    max_drop: Annotated[float | None, typer.Option("--max-drop", help="With --recipe auto: how much accuracy int8 may cost (0.005 is half a point).")] = None,
    output: Output = Path("bundle"),
    shape: Annotated[list[str] | None, typer.Option("--shape", help="NAME=1,3,224,224 for an input with dynamic dimensions.")] = None,
    preprocess: Annotated[str | None, typer.Option("--preprocess", help="How pixels become input, e.g. scale=1/255,mean=0.5,std=0.5.")] = None,
    set_option: Annotated[list[str] | None, typer.Option("--set", help="A target option, NAME=VALUE.")] = None,
    bench: Annotated[bool, typer.Option("--bench", help="Measure latency of what runs here.")] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Quantise MODEL once, make an artifact for each target, check each against the integer reference, write a bundle."""
    _compile(
        model,
        output,
        as_json,
        bench=bench,
        targets=targets or ["cpu"],
        data=data,
        recipe=recipe,
        max_drop=max_drop,
        shapes=_shapes(shape or []),
        preprocess=preprocess,
        options=dict(_pair(word, "--set") for word in set_option or []),
        force=force,
    )


def _compile(model: Any, output: Path, as_json: bool, **arguments: Any) -> None:
    from isthmus import pipeline
    from isthmus.report_bundle import summary, table

    with Console(quiet=as_json) as console:
        bundle = pipeline.compile(model, output=output, say=console.say, **arguments)
    if as_json:
        _print_json(summary(bundle))
        return
    print(table(bundle))
    print(f"\nbundle: {_shown(bundle.root)}\nreport: {_shown(bundle.root / 'reports' / 'report.html')}")


# ---- on a bundle
@app.command()
def verify(bundle: BundlePath, targets: Targets = None, trust: Trust = False, as_json: Json = False) -> None:
    """Run the golden inputs through each artifact that can run here; compare every element with the integer reference."""
    from isthmus import pipeline
    from isthmus.console import grid

    opened = Bundle.open(bundle)
    results = pipeline.verify(opened, targets or [], trust)
    failed = [name for name, comparisons in results.items() if not all(comparison.passed for comparison in comparisons)]
    if as_json:
        _print_json({name: [comparison.to_json() for comparison in comparisons] for name, comparisons in results.items()})
    else:
        rows = []
        for name, comparisons in results.items():
            if not comparisons:
                rows.append([name, "", "", "", "", "needs the board"])
            for c in comparisons:
                rows.append(
                    [
                        name,
                        c.tensor,
                        f"{c.compared}",
                        f"{100 * c.exact_share:.4g} %",
                        f"{c.max_lsb} LSB" if c.kind == "int8" else f"{c.max_abs:.2g}",
                        "passed" if c.passed else "FAILED",
                    ]
                )
        print(grid(["profile", "output", "compared", "equal", "largest difference", "result"], rows))
    if failed:
        raise typer.Exit(1)


@app.command()
def bench(
    bundle: BundlePath,
    targets: Targets = None,
    threads: Threads = 1,
    min_duration: Annotated[float, typer.Option("--min-duration", help="Seconds to measure at least.")] = 2.0,
    min_count: Annotated[int, typer.Option("--min-count", help="Samples to take at least.")] = 1000,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Latency of the artifacts that run here, one inference at a time, interleaved; raw samples go into the bundle."""
    from isthmus.bench_bundle import bench_bundle, latency_table
    from isthmus.report_bundle import add_report

    with Console(quiet=as_json) as console:
        console.say("measuring latency", None)
        opened, measurements = bench_bundle(Bundle.open(bundle), targets or [], threads=threads, min_duration_s=min_duration, min_count=min_count, trust=trust)
        add_report(opened)
    if as_json:
        _print_json(
            {
                name: measurement.figures()
                | {
                    "valid": measurement.valid,
                    "reasons": list(measurement.reasons),
                    "warmup_count": measurement.warmup_count,
                    "conditions": dict(measurement.conditions),
                }
                for name, measurement in measurements.items()
            }
        )
    else:
        print(latency_table(measurements))


@app.command()
def run(
    bundle: BundlePath,
    target: Annotated[str, typer.Option("--target", "-t", help="The profile whose artifact runs.")],
    inputs: Annotated[list[str], typer.Option("--input", "-i", help="x.npy or x.png; NAME=FILE where the model has several inputs.")],
    threads: Threads = 1,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Run one artifact on samples from a file and print its outputs."""
    from isthmus.run_bundle import run_bundle, shown_outputs

    outputs = run_bundle(Bundle.open(bundle), target, inputs, threads, trust)
    if as_json:
        _print_json({name: array.tolist() for name, array in outputs.items()})
    else:
        print(shown_outputs(outputs))


@app.command()
def report(
    bundle: BundlePath,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the page here instead of into the bundle.")] = None,
    as_json: Json = False,
) -> None:
    """Write the bundle's report.html anew from what the bundle holds."""
    from isthmus.report_bundle import add_report, render_bundle

    opened = Bundle.open(bundle)
    if output is None:
        add_report(opened)
        output = bundle / "reports" / "report.html"
    else:
        output.write_text(render_bundle(opened), encoding="utf-8")
    if as_json:
        _print_json({"report": str(output)})
    else:
        print(f"report: {_shown(output)}")


@app.command()
def cost(
    model: Annotated[str, typer.Argument(metavar="MODEL|BUNDLE", help="A .onnx (float or int8) or a bundle.")],
    convention: Annotated[str, typer.Option("--convention", help="How FLOPs are counted: mac, flop or keras.")] = "flop",
    layers: Annotated[bool, typer.Option("--layers", help="One line a layer.")] = False,
    shape: Annotated[list[str] | None, typer.Option("--shape", help="NAME=1,3,224,224 for an input with dynamic dimensions.")] = None,
    as_json: Json = False,
) -> None:
    """Parameters, MACs, FLOPs, weight bytes and peak activation bytes, from the graph alone."""
    from isthmus.cost_model import cost_of, cost_table

    result = cost_of(model, _shapes(shape or []), convention)
    if as_json:
        _print_json({"convention": convention, "count": result.count(convention)} | result.to_json())
    else:
        print(cost_table(result, convention, layers))


@app.command()
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
        result = sensitivity_of(model, data, recipe=recipe, metric=metric, samples=samples, shapes=_shapes(shape or []), preprocess=preprocess, say=console.say)
    if output is not None:
        output.write_text(render_sensitivity(model, result.to_json()), encoding="utf-8")
    if as_json:
        _print_json(result.to_json())
        return
    print(sensitivity_table(result))
    if output is not None:
        print(f"\npage: {_shown(output)}")


# ---- what there is
@app.command("targets")
def targets_command(as_json: Json = False) -> None:
    """The boards isthmus knows, and the target that serves each."""
    from isthmus.console import grid
    from isthmus.profile import load_profile, profile_names
    from isthmus.registry import why_unusable

    profiles = [load_profile(name) for name in profile_names()]
    reasons = {name: why_unusable(name) for name in {profile.target for profile in profiles}}
    if as_json:
        _print_json(
            [
                {"profile": p.name, "board": p.board, "target": p.target, "arch": p.arch, "facts": dict(p.facts), "unusable": reasons[p.target] or None}
                for p in profiles
            ]
        )
    else:
        print(grid(["profile", "board", "target", "usable"], [[p.name, p.board, p.target, reasons[p.target] or "yes"] for p in profiles]))


@app.command()
def doctor(as_json: Json = False) -> None:
    """Which tools were found, their versions, and the one command that brings each missing one."""
    from isthmus.console import grid
    from isthmus.tools import find_tool, tool_names

    found = [find_tool(name) for name in tool_names()]
    if as_json:
        _print_json([{"tool": t.name, "found": t.found, "version": t.version, "path": t.path, "purpose": t.purpose, "fix": t.fix} for t in found])
    else:
        print(grid(["tool", "version", "what it does here", "how to get it"], [[t.name, t.version if t.found else "missing", t.purpose, t.fix] for t in found]))


@zoo.command("list")
def zoo_list(as_json: Json = False) -> None:
    """The systems, their presets, and the paper behind each."""
    from isthmus.console import grid
    from isthmus.train import zoo as systems

    loaded = [systems.load(name) for name in systems.names()]
    if as_json:
        _print_json(
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
                [[s.name, here[isinstance(s, systems.ZooSystem)], _some(list(s.presets)), s.summary] for s in loaded],
            )
        )


# ---- words into values
def _pair(word: str, option: str) -> tuple[str, str]:
    name, equals, value = word.partition("=")
    if not equals or not name:
        raise IsthmusError(f"{option} {word!r}: expected NAME=VALUE")
    return name, value


def _shapes(words: list[str]) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for word in words:
        name, value = _pair(word, "--shape")
        try:
            shapes[name] = tuple(int(extent) for extent in value.split(","))
        except ValueError:
            raise IsthmusError(f"--shape {word!r}: expected NAME=1,3,224,224") from None
        if any(extent < 1 for extent in shapes[name]):
            raise IsthmusError(f"--shape {word!r}: every dimension is at least 1")
    return shapes


def _some(words: list[str], most: int = 4) -> str:
    """A long list's beginning and how many follow; --json has them all."""
    return ", ".join(words) if len(words) <= most else f"{', '.join(words[: most - 1])} and {len(words) - most + 1} more"


def _shown(path: Path) -> str:
    """Relative where that is shorter."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _print_json(value: Mapping[str, Any] | list[Any]) -> None:
    print(json.dumps(value, indent=1, default=float))


if __name__ == "__main__":
    main()
