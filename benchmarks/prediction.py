# SPDX-License-Identifier: Apache-2.0
"""How well latency on a Jetson is predicted: the tables of docs/prediction.md. No board and no GPU; seconds.

`python benchmarks/prediction.py` prints each published row with its prediction by parameters fitted without it, the rows that took no part in
the fit, and how often the interval holds: each network's rows against an interval made without them.
`python benchmarks/prediction.py --count MODEL.onnx --way fused` prints a network's entry for core/measured/networks.toml.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

import numpy as np

from isthmus.onnx_file import load_onnx
from isthmus.predict import RUNTIMES, WAYS, Fit, counted, fit, percents, published_fit, published_networks, published_rows, work_of_row
from isthmus.roofline import program_of_onnx

TWELVE = "amfacpose-"


def entry(model: str, way: str) -> str:
    """A network's entry in networks.toml, but for its name and source."""
    kernels = counted(WAYS[way](program_of_onnx(load_onnx(model))))
    rows = [f"  [{k.macs}, {k.read}, {k.weights}, {k.written}, {count}]," for k, count in kernels.items()]
    return "\n".join([f'way = "{way}"', "kernels = [", *rows, "]"])


def told(errors: Sequence[float]) -> str:
    off = percents(errors)
    return f"median {np.median(off):.1f} %, worst {max(off):.1f} %"


def rows_table(found: Fit) -> list[str]:
    lines = ["| network | board | precision | published | predicted without the row | error | without the network |", "|---|---|---|---|---|---|---|"]
    for row, left_out, unseen in zip(found.rows, found.errors, found.unseen, strict=True):
        published = f"{1e3 * row.seconds:.2f} ms" if row.seconds else f"{row.fps[0]:g} to {row.fps[1]:g} FPS" if row.fps else ""
        predicted = f"{1e3 * row.seconds * math.exp(left_out):.2f} ms" if row.seconds else "inside" if left_out == 0 else "outside"
        board = f"{row.boards[0]}{' ' + row.mode if row.mode else ''}"
        off = [f"{100 * math.expm1(error):+.1f} %" for error in (left_out, unseen)]
        lines.append(f"| {row.network} | {board} | {row.precision} | {published} | {predicted} | {off[0]} | {off[1]} |")
    return lines


def covered(runtime: str) -> tuple[int, int]:
    """(rows inside, rows): each network left out whole, its rows held against the interval of a fit that never saw them, its factor included."""
    rows, networks = [row for row in published_rows() if row.runtime == runtime and row.fitted], published_networks()
    inside = 0
    for name in {row.network for row in rows}:
        without = fit(runtime, [row for row in rows if row.network != name], networks)
        for row in rows:
            if row.network == name:
                error = row.error(without.coefficients.seconds(work_of_row(row, row.boards[0], networks)))
                inside += abs(error) <= math.log(without.factor)
    return inside, len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", metavar="MODEL")
    parser.add_argument("--way", choices=WAYS, default="fused")
    chosen = parser.parse_args()
    if chosen.count:
        print(entry(chosen.count, chosen.way))
        return
    networks = published_networks()
    for runtime in RUNTIMES:
        found = published_fit(runtime)
        print(f"\n{runtime}: {found.said()}; interval: a factor of {found.factor:.2f}\n", *rows_table(found), sep="\n")
        inside, count = covered(runtime)
        print(f"\n{inside} of {count} rows lie inside an interval that was made without their network")
    found = published_fit("framework")
    print("\nthe twelve:", told([error for row, error in zip(found.rows, found.errors, strict=True) if row.network.startswith(TWELVE)]))
    boards = {row.boards for row in found.rows if row.network.startswith(TWELVE)}
    by_board = []
    for board in sorted(boards):
        without = fit("framework", [row for row in published_rows() if row.boards != board], networks).coefficients
        left = [row for row in found.rows if row.boards == board]
        by_board += [row.error(without.seconds(work_of_row(row, board[0], networks))) for row in left]
    print("the twelve, each without its whole board:", told(by_board))
    print("\n| network | published | predicted |\n|---|---|---|")
    for row in published_rows():
        if not row.fitted:
            own = published_fit(row.runtime).coefficients
            seconds = {board: own.seconds(work_of_row(row, board, networks)) for board in row.boards}
            if row.fps:
                each = [f"{board} {1 / likely:.1f} FPS" for board, likely in seconds.items()]
                print(f"| {row.network} | {row.fps[0]:g} to {row.fps[1]:g} FPS, board not stated | {', '.join(each)} |")
            elif row.seconds:
                print(f"| {row.network}, {row.precision} | {1e3 * row.seconds:.2f} ms, {row.boards[0]} | {1e3 * seconds[row.boards[0]]:.2f} ms |")


if __name__ == "__main__":
    main()
