# SPDX-License-Identifier: Apache-2.0
"""Candidates for `select`, read from a CSV or JSON table that nobody vouches for."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isthmus.errors import IsthmusError
from isthmus.select import Candidate

MAX_TABLE_BYTES = 8 * 2**20
MAX_ROWS = 10_000
MAX_CELL = 200
SEPARATOR = "+"
TEXTS = ("name", "kind", "dataset", "members")
KNOWN_COSTS = frozenset({"size_mb", "int8_mb", "flops_m", "macs_m", "params", "params_m", "time_s", "time_ms", "latency_ms", "energy_mj", "memory_mb"})


@dataclass(frozen=True)
class Table:
    """Candidates by data set ("" where the table names none); `metrics` and `costs` are its columns of figures, in the table's order."""

    datasets: Mapping[str, tuple[Candidate, ...]]
    metrics: tuple[str, ...]
    costs: tuple[str, ...]


def read_table(path: str | Path, costs: Sequence[str] = ()) -> Table:
    """A `.csv` file with a heading, or a `.json` list of objects.

    Columns: `name`; `kind`, `dataset`, `members` (joined by "+") and `rank` where wanted; every other is a figure: a cost where `KNOWN_COSTS` or
    `costs` name it, else a metric. Lines of a CSV that start with "#" are remarks. Raises `IsthmusError` naming file, row and column.
    """
    file = Path(path)
    if not file.is_file():
        raise IsthmusError(f"{file}: no such file; give a .csv or .json table, or bundles")
    size = file.stat().st_size
    if size > MAX_TABLE_BYTES:
        raise IsthmusError(f"{file}: {size} bytes, a table ends at {MAX_TABLE_BYTES}")
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise IsthmusError(f"{file}: no UTF-8 text (byte {error.start}); save the table as UTF-8") from None
    rows = _json_rows(file, text) if file.suffix.lower() == ".json" else _csv_rows(file, text)
    if not rows:
        raise IsthmusError(f"{file}: no rows; a table has at least one candidate")
    if len(rows) > MAX_ROWS:
        raise IsthmusError(f"{file}: {len(rows)} rows, a table ends at {MAX_ROWS}")
    return _table(file, rows, KNOWN_COSTS.union(costs))


def candidates_of(rows: Sequence[Candidate], include_singles: bool) -> list[Candidate]:
    """The rows to choose from: ensembles, and single models where they are asked for or where there is nothing else."""
    ensembles = [row for row in rows if not row.is_single]
    return list(rows) if include_singles or not ensembles else ensembles


# ---- text into rows
def _csv_rows(file: Path, text: str) -> list[tuple[int, dict[str, Any]]]:
    numbered = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip() and not line.startswith("#")]
    if not numbered:
        raise IsthmusError(f"{file}: empty; the first line names the columns")
    reader = csv.reader(io.StringIO("\n".join(line for _, line in numbered)), strict=True)
    try:
        parsed = list(reader)
    except csv.Error as error:
        raise IsthmusError(f"{file}: line {numbered[min(reader.line_num, len(numbered)) - 1][0]} is no CSV ({error})") from None
    if len(parsed) != len(numbered):
        raise IsthmusError(f"{file}: a cell runs over several lines; write each row on one line")
    heading = [column.strip() for column in parsed[0]]
    twice = [column for column in heading if heading.count(column) > 1]
    if twice or "" in heading:
        raise IsthmusError(f"{file}: column {twice[0] if twice else ''!r} stands twice or has no name in the first line")
    rows = []
    for (number, _), cells in zip(numbered[1:], parsed[1:], strict=True):
        if len(cells) != len(heading):
            raise IsthmusError(f"{file}: line {number} has {len(cells)} cells, expected {len(heading)}")
        rows.append((number, {column: cell.strip() for column, cell in zip(heading, cells, strict=True) if cell.strip()}))
    return rows


def _json_rows(file: Path, text: str) -> list[tuple[int, dict[str, Any]]]:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise IsthmusError(f"{file}: not JSON: {error}") from None
    if not isinstance(data, list) or not all(isinstance(row, dict) for row in data):
        raise IsthmusError(f"{file}: expected a list of objects, one a candidate")
    return [(number, {key: value for key, value in row.items() if value not in (None, "")}) for number, row in enumerate(data, 1)]


# ---- rows into candidates
def _table(file: Path, rows: Sequence[tuple[int, dict[str, Any]]], known_costs: frozenset[str]) -> Table:
    figures = list(dict.fromkeys(column for _, row in rows for column in row if column not in (*TEXTS, "rank")))
    costs = tuple(column for column in figures if column in known_costs)
    metrics = tuple(column for column in figures if column not in known_costs)
    if not metrics or not costs:
        raise IsthmusError(f"{file}: columns {', '.join(figures) or 'none'}: a table needs a metric and a cost (costs: {', '.join(sorted(known_costs))})")
    datasets: dict[str, list[Candidate]] = {}
    for number, row in rows:
        datasets.setdefault(_text(file, number, row, "dataset", ""), []).append(_candidate(file, number, row, metrics, costs))
    for candidates in datasets.values():
        _no_name_twice(file, candidates)
    return Table({name: tuple(candidates) for name, candidates in datasets.items()}, metrics, costs)


def _candidate(file: Path, number: int, row: Mapping[str, Any], metrics: Sequence[str], costs: Sequence[str]) -> Candidate:
    name = _text(file, number, row, "name")
    members = tuple(part.strip() for part in _text(file, number, row, "members", "").split(SEPARATOR) if part.strip())
    rank = _figure(file, number, row, "rank") if "rank" in row else None
    if rank is not None and (rank != int(rank) or rank < 1):
        raise IsthmusError(f"{file}: row {number}, column rank: expected a whole number from 1, found {row['rank']!r}")
    held = {column: _figure(file, number, row, column) for column in (*metrics, *costs) if column in row}
    negative = [column for column in costs if held.get(column, 0.0) < 0]
    if negative:
        raise IsthmusError(f"{file}: row {number}, column {negative[0]}: a cost below 0 ({held[negative[0]]:g})")
    chosen = [{column: held[column] for column in side if column in held} for side in (metrics, costs)]
    return Candidate(name, _text(file, number, row, "kind", "model"), chosen[0], chosen[1], members, int(rank) if rank is not None else None)


def _text(file: Path, number: int, row: Mapping[str, Any], column: str, default: str | None = None) -> str:
    value = row.get(column, default)
    if not isinstance(value, str) or len(value) > MAX_CELL or (default is None and not value) or not value.isprintable():
        found = "nothing" if value is None else f"{str(value)[:40]!r}"
        raise IsthmusError(f"{file}: row {number}, column {column}: expected a text of at most {MAX_CELL} characters, found {found}")
    return value


def _figure(file: Path, number: int, row: Mapping[str, Any], column: str) -> float:
    value = row[column]
    try:
        figure = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) and len(str(value)) <= MAX_CELL else math.nan
    except (ValueError, OverflowError):
        figure = math.nan
    if not math.isfinite(figure):
        raise IsthmusError(f"{file}: row {number}, column {str(column)[:40]}: expected a finite number, found {str(value)[:40]!r}")
    return figure


def _no_name_twice(file: Path, candidates: Sequence[Candidate]) -> None:
    seen: set[str] = set()
    for candidate in candidates:
        if candidate.name in seen:
            raise IsthmusError(f"{file}: {candidate.name!r} stands there twice; give each candidate a name of its own")
        seen.add(candidate.name)
