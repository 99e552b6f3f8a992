# SPDX-License-Identifier: Apache-2.0
"""What is done with a bundle: `verify`, `bench`, `run`, `report`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from isthmus.bundle import Bundle
from isthmus.commands.options import BundlePath, Json, Targets, Threads, Trust, print_json, shown
from isthmus.console import Console
from isthmus.errors import IsthmusError

if TYPE_CHECKING:
    from isthmus.bench import Rules
    from isthmus.measurement import Measurement
    from isthmus.runtimes.remote import Host


def verify(
    bundle: BundlePath,
    targets: Targets = None,
    layers: Annotated[bool, typer.Option("--layers", help="At which layer an artifact first differs, and why.")] = False,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Run the golden inputs through each artifact that can run here; compare every element with the integer reference."""
    from isthmus import pipeline
    from isthmus.console import grid

    opened = Bundle.open(bundle)
    if layers:
        _verify_layers(opened, targets or [], as_json)
        return
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


def _verify_layers(bundle: Bundle, targets: list[str], as_json: bool) -> None:
    from isthmus.layerwise import layer_table, verify_layers

    profiles = targets or [name for name in bundle.profiles if bundle.artifact(name)["engine"] != "null"]
    with Console(quiet=as_json) as console:
        reports = []
        for name in profiles:
            console.say(f"{name}: comparing layer by layer", None)
            reports.append(verify_layers(bundle, name))
    if as_json:
        print_json([report.to_json() for report in reports])
    else:
        print("\n\n".join(layer_table(report) for report in reports))
    if not reports or not all(report.passed for report in reports):
        raise typer.Exit(1)


def bench(
    bundle: BundlePath,
    targets: Targets = None,
    scenario: Annotated[
        str, typer.Option("--scenario", help="SingleStream (latency of one), MultiStream (of several in a row) or Offline (throughput).")
    ] = "SingleStream",
    against: Annotated[
        str | None,
        typer.Option("--against", help="A profile of this bundle, another bundle, or any .tflite or .onnx file: measured in turns, the ratio printed."),
    ] = None,
    threads: Threads = 1,
    pin: Annotated[str | None, typer.Option("--pin", help="Processors to stay on, such as 0 or 0,2-3.")] = None,
    percentile: Annotated[float, typer.Option("--percentile", help="The percentile to be quoted: it decides how many samples are needed.")] = 99.0,
    min_duration: Annotated[float, typer.Option("--min-duration", help="Seconds to measure at least.")] = 2.0,
    min_count: Annotated[int, typer.Option("--min-count", help="Samples to take at least.")] = 1000,
    max_duration: Annotated[
        float, typer.Option("--max-duration", help="Seconds after which a measurement ends, and is not valid if it had not enough.")
    ] = 120.0,
    samples_per_query: Annotated[int, typer.Option("--samples-per-query", help="MultiStream: inferences in a query.")] = 8,
    host: Annotated[str | None, typer.Option("--host", help="user@board: measure there, over ssh.")] = None,
    port: Annotated[int | None, typer.Option("--port", help="The board's ssh port.")] = None,
    identity: Annotated[Path | None, typer.Option("--identity", help="The ssh key to log in with.")] = None,
    board_python: Annotated[str, typer.Option("--board-python", help="The board's Python, 3.10 or newer.")] = "python3",
    streams: Annotated[int | None, typer.Option("--streams", help="Offline: sessions that run at once (default: processors / threads).")] = None,
    power: Annotated[str, typer.Option("--power", help="A power meter for joules an inference: auto, none, ina, tegrastats, rapl or csv:FILE.")] = "none",
    loadgen: Annotated[bool, typer.Option("--loadgen", help="Let MLPerf's LoadGen issue the queries (isthmus[bench]).")] = False,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Latency or throughput of the artifacts that run here; several take turns; raw samples go into the bundle."""
    from isthmus.affinity import parse_cpus
    from isthmus.bench import Rules
    from isthmus.bench_bundle import bench_bundle
    from isthmus.report_bundle import add_report
    from isthmus.runtimes.power import open_meter
    from isthmus.runtimes.remote import Host

    rules = Rules(
        scenario=scenario,
        min_count=min_count,
        min_duration_s=min_duration,
        max_duration_s=max(max_duration, min_duration),
        percentile=percentile,
        samples_per_query=samples_per_query,
        threads=threads,
    )
    cpus = parse_cpus(pin) if pin is not None else None
    if host is not None:
        if against is not None or loadgen or streams is not None:
            raise IsthmusError("--host measures one artifact on its board: without --against, --loadgen and --streams")
        _bench_on(bundle, targets or [], Host.named(host, port, board_python, identity), rules, pin, power, as_json)
        return
    meter = open_meter(power)
    with Console(quiet=as_json) as console:
        console.say("measuring latency", None)
        opened, measurements = bench_bundle(
            Bundle.open(bundle), targets or [], rules, against=against, cpus=cpus, streams=streams, meter=meter, loadgen=loadgen, trust=trust
        )
        add_report(opened)
    _show(measurements, as_json)


def _bench_on(bundle: Path, profiles: list[str], host: Host, rules: Rules, pin: str | None, power: str, as_json: bool) -> None:
    from isthmus.bench_bundle import bench_on
    from isthmus.report_bundle import add_report

    with Console(quiet=as_json) as console:
        opened, measurements = bench_on(Bundle.open(bundle), profiles, host, rules, pin=pin, power=power, say=console.say)
        add_report(opened)
    _show(measurements, as_json)


def _show(measurements: Mapping[str, Measurement], as_json: bool) -> None:
    from isthmus.bench_bundle import latency_table

    if not as_json:
        print(latency_table(measurements))
        return
    print_json(
        {
            name: measurement.figures()
            | {
                "scenario": measurement.scenario,
                "valid": measurement.valid,
                "reasons": list(measurement.reasons),
                "warmup_count": measurement.warmup_count,
                "energy_j": measurement.energy_j,
                "conditions": dict(measurement.conditions),
            }
            for name, measurement in measurements.items()
        }
    )


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
