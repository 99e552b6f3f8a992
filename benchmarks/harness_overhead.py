# SPDX-License-Identifier: Apache-2.0
"""What the harness itself costs: a session that does nothing, timed by the harness, by a bare loop and by timeit, in one run.

    python benchmarks/harness_overhead.py [--rounds 7] [--json]

Each round takes all three in turn; the figure is the median of the rounds' medians. The harness adds two clock readings and one method
call to every sample; an inference of 10 us therefore reads some 2 % long. The figure is recorded with every measurement, never subtracted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import timeit

from isthmus.bench import NullSession, Rules, measure
from isthmus.conditions import host_conditions

LOOPS = 20_000


def _harness_ns(session: NullSession) -> float:
    return measure(session, {}, Rules(min_count=LOOPS, min_duration_s=0.05)).p50_ns


def _bare_loop_ns(session: NullSession) -> float:
    """The clock twice and nothing between: the part no harness in Python can avoid."""
    clock = time.perf_counter_ns
    samples = []
    for _ in range(LOOPS):
        before = clock()
        samples.append(clock() - before)
    return statistics.median(samples)


def _timeit_ns(session: NullSession) -> float:
    """The mean of many calls, without a clock between them: the call alone."""
    run = session.run_raw
    return timeit.timeit(lambda: run({}), number=LOOPS) / LOOPS * 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds must be at least 1, found {arguments.rounds}")
    session = NullSession()
    ways = {"harness": _harness_ns, "clock_alone": _bare_loop_ns, "call_alone_timeit": _timeit_ns}
    rounds = [{name: way(session) for name, way in ways.items()} for _ in range(arguments.rounds)]
    medians = {name: round(statistics.median(one[name] for one in rounds), 1) for name in ways}
    if arguments.json:
        print(json.dumps({"median_ns": medians, "rounds": rounds, "conditions": host_conditions()}, indent=2))
        return
    for name, value in medians.items():
        print(f"{name:20s} {value:8.1f} ns")
    conditions = host_conditions()
    print(f"{conditions['cpu_model']}, Python {conditions['python']}, load {conditions['load_average']}, {conditions['date']}")


if __name__ == "__main__":
    main()
