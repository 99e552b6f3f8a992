# SPDX-License-Identifier: Apache-2.0
"""What is done with a bundle: `verify`, `bench`, `run`, `report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from isthmus.bundle import Bundle
from isthmus.commands.options import BundlePath, Json, Targets, Threads, Trust, print_json, shown
from isthmus.console import Console


def verify(bundle: BundlePath, targets: Targets = None, trust: Trust = False, as_json: Json = False) -> None:
    """Run the golden inputs through each artifact that can run here; compare every element with the integer reference."""
    from isthmus import pipeline
    from isthmus.console import grid

    opened = Bundle.open(bundle)
    results = pipeline.verify(opened, targets or [], trust)
    failed = [name for name, comparisons in results.items() if not all(comparison.passed for comparison in comparisons)]
    if as_json:
        print_json({name: [comparison.to_json() for comparison in comparisons] for name, comparisons in results.items()})
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
        print_json(
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
        print_json({name: array.tolist() for name, array in outputs.items()})
    else:
        print(shown_outputs(outputs))


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
        print_json({"report": str(output)})
    else:
        print(f"report: {shown(output)}")
