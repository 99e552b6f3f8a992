# SPDX-License-Identifier: Apache-2.0
"""The device's command line: `python -m isthmus.runtimes verify|bench BUNDLE`. Needs numpy and one engine, nothing else of isthmus' host side."""

from __future__ import annotations

import argparse
import json
import sys

import numpy as np

from isthmus.affinity import parse_cpus, pinned
from isthmus.bench import SCENARIOS, Rules, measure, raw_feeds
from isthmus.bundle import Bundle
from isthmus.compare import compare_outputs
from isthmus.errors import IsthmusError
from isthmus.runtimes.power import open_meter
from isthmus.session import Session
from isthmus.spec import TensorSpec


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
    given = parser.parse_args(arguments)
    try:
        return _run(given)
    except IsthmusError as error:
        print(f"isthmus: {error}", file=sys.stderr)
        return error.exit_code


def _run(given: argparse.Namespace) -> int:
    bundle = Bundle.open(given.bundle)
    profile = given.target or _only(bundle)
    golden = bundle.golden()
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
    with pinned(cpus), bundle.open_session(profile, given.threads, given.trust_bundle) as session:
        measurement = measure(session, raw_feeds(session, golden), rules, meter=meter)
    print(json.dumps({"profile": profile} | measurement.to_json()))
    return 0


def _verify(bundle: Bundle, profile: str, session: Session, golden: dict[str, np.ndarray]) -> int:
    specs = [TensorSpec.from_json(spec) for spec in bundle.manifest["graph"]["outputs"]]
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
