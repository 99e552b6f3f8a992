# SPDX-License-Identifier: Apache-2.0
"""The device's command line: `python -m isthmus.runtimes build|verify|bench BUNDLE`. Needs numpy and one engine, nothing else of isthmus' host side."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import numpy as np

from isthmus.affinity import parse_cpus, pinned
from isthmus.bench import SCENARIOS, EnergyMeter, Rules, measure, raw_feeds
from isthmus.bundle import Bundle
from isthmus.compare import compare_outputs
from isthmus.errors import IsthmusError
from isthmus.measurement import Measurement
from isthmus.runtimes.power import open_meter
from isthmus.session import Session


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0, 1 where an artifact differs from its golden outputs, 2 on a mistake."""
    parser = argparse.ArgumentParser(prog="python -m isthmus.runtimes", description="Runs a bundle's artifact on this device.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("verify", "compare with the golden outputs, element by element"), ("bench", "measure latency, one inference at a time")):
        command = commands.add_parser(name, help=text)
        command.add_argument("bundle", metavar="BUNDLE")
        command.add_argument("--target", "-t", help="profile (default: the bundle's only one)")
        command.add_argument("--threads", type=int, default=1)
        command.add_argument("--trust-bundle", action="store_true", help="run native code of a bundle that somebody else built")
        if name == "bench":
            command.add_argument("--scenario", choices=SCENARIOS, default=SCENARIOS[0])
            command.add_argument("--min-duration", type=float, default=2.0, metavar="SECONDS")
            command.add_argument("--max-duration", type=float, default=120.0, metavar="SECONDS")
            command.add_argument("--min-count", type=int, default=1000)
            command.add_argument("--percentile", type=float, default=99.0, help="the one to be quoted: it decides how many samples are needed")
            command.add_argument("--samples-per-query", type=int, default=8, help="MultiStream: inferences in a query")
            command.add_argument("--power", default="none", metavar="METER", help="joules an inference: auto, none, ina, tegrastats, rapl or csv:FILE")
            command.add_argument("--pin", metavar="CPUS", help="processors to stay on, such as 0 or 0,2-3")
    _add_build(commands)
    given = parser.parse_args(arguments)
    try:
        return _run(given)
    except IsthmusError as error:
        print(f"isthmus: {error}", file=sys.stderr)
        return error.exit_code


def _add_build(commands: Any) -> None:
    command = commands.add_parser("build", help="build what only the board itself can build: a Jetson's TensorRT engines")
    command.add_argument("bundle", metavar="BUNDLE")
    command.add_argument("--target", "-t", help="profile (default: the bundle's only one)")
    command.add_argument(
        "--engine", action="append", default=[], metavar="NAME", help="this engine alone, such as int8 or fp16 (default: all that are planned)"
    )
    command.add_argument("--workspace-mib", type=int, default=0, metavar="N", help="memory for one layer while building (default: half of what is free)")
    command.add_argument("--rebuild", action="store_true", help="build even what is there already")
    command.add_argument("--wait", action="store_true", help="where another build is running: wait until it ends")
    command.add_argument("--other-board", action="store_true", help="build although the bundle was compiled for another board")
    command.add_argument("--rtx", type=int, default=0, metavar="SM", help="with TensorRT-RTX, ahead of time for this compute capability (86); no GPU needed")
    command.add_argument(
        "--trust-bundle", action="store_true", help="run the build script of a bundle that somebody else compiled, keep engines that are there"
    )


def _build(bundle: Bundle, profile: str, given: argparse.Namespace) -> int:
    from isthmus.runtimes.tensorrt.build import BuildOptions, build_engines, printed

    options = BuildOptions(tuple(given.engine), given.workspace_mib, given.rebuild, given.wait, given.other_board, given.rtx, given.trust_bundle)
    print(printed(profile, build_engines(bundle, profile, options)))
    return 0


def _run(given: argparse.Namespace) -> int:
    bundle = Bundle.open(given.bundle)
    profile = given.target or _only(bundle)
    if given.command == "build":
        return _build(bundle, profile, given)
    golden = bundle.golden(profile)
    if given.command == "verify":
        with bundle.open_session(profile, given.threads, given.trust_bundle) as session:
            return _verify(bundle, profile, session, golden)
    rules = Rules(
        scenario=given.scenario,
        min_count=given.min_count,
        min_duration_s=given.min_duration,
        max_duration_s=max(given.max_duration, given.min_duration),
        percentile=given.percentile,
        samples_per_query=given.samples_per_query,
        threads=given.threads,
    )
    cpus = parse_cpus(given.pin) if given.pin is not None else None
    meter = open_meter(given.power)
    with pinned(cpus):
        measurement = _measured(bundle, profile, given, golden, rules, meter)
    print(json.dumps({"profile": profile} | measurement.to_json()))
    return 0


def _measured(bundle: Bundle, profile: str, given: argparse.Namespace, golden: dict[str, np.ndarray], rules: Rules, meter: EnergyMeter | None) -> Measurement:
    if bundle.artifact(profile)["engine"] == "tensorrt":  # several engines of one artifact: the faster one that holds stays
        from isthmus.runtimes.tensorrt.choice import measure_engines

        return measure_engines(bundle, profile, golden, rules, meter, given.trust_bundle)
    with bundle.open_session(profile, given.threads, given.trust_bundle) as session:
        return measure(session, raw_feeds(session, golden), rules, meter=meter)


def _verify(bundle: Bundle, profile: str, session: Session, golden: dict[str, np.ndarray]) -> int:
    if bundle.artifact(profile)["engine"] == "tensorrt":
        from isthmus.runtimes.tensorrt.choice import verify_engine

        verdict = verify_engine(bundle, profile, session, golden)
        print(json.dumps({"profile": profile, "engine": session.engine, **verdict.to_json()}))
        return 0 if verdict.holds else 1
    specs = bundle.output_specs(profile)
    entry = bundle.artifact(profile)
    actual = session.run_samples({spec.name: golden[f"input/{spec.name}"] for spec in session.inputs})
    expected = {spec.name: golden[f"output/{spec.name}"] for spec in specs}
    comparisons = compare_outputs(specs, expected, actual, entry["max_lsb_allowed"], entry["float_tolerance"])
    print(json.dumps({"profile": profile, "engine": session.engine, "verification": [comparison.to_json() for comparison in comparisons]}))
    return 0 if all(comparison.passed for comparison in comparisons) else 1


def _only(bundle: Bundle) -> str:
    if len(bundle.profiles) != 1:
        raise IsthmusError(f"{bundle.root} holds {', '.join(bundle.profiles)}; say which with --target")
    return bundle.profiles[0]


if __name__ == "__main__":
    sys.exit(main())
