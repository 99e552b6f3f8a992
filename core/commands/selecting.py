# SPDX-License-Identifier: Apache-2.0
"""`select`: which of several candidates to deploy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from isthmus.commands.options import Json, Trust, pair, print_json, shown
from isthmus.errors import IsthmusError

if TYPE_CHECKING:
    from isthmus.candidates import Table
    from isthmus.select import Candidate, Ranking, Selection

COMPLEXITY = ("table", "parallel", "serial")


def select(
    sources: Annotated[list[str], typer.Argument(metavar="TABLE|BUNDLE...", help="A .csv or .json table, or bundles to choose between.")],
    budget: Annotated[list[str] | None, typer.Option("--budget", help="The largest cost allowed, such as size_mb=34; repeat for several.")] = None,
    ensembles: Annotated[
        int, typer.Option("--ensembles", metavar="N", help="Of bundles: ensembles of up to N of them are candidates, the mean of their probabilities.")
    ] = 1,
    include_singles: Annotated[bool, typer.Option("--include-singles", help="Single models are candidates too, beside ensembles.")] = False,
    complexity: Annotated[str, typer.Option("--complexity", help="An ensemble's costs: table (as given), parallel or serial (from its members).")] = "table",
    performance: Annotated[str | None, typer.Option("--performance", help="The metric of the Pareto fronts (default: wS, else the first).")] = None,
    metrics: Annotated[str | None, typer.Option("--metrics", help="Metrics of the radar, such as wS,wP,BA,AUC.")] = None,
    costs: Annotated[str | None, typer.Option("--costs", help="Costs of fronts and radar, such as size_mb,flops_m,time_s.")] = None,
    weighted: Annotated[
        bool | None,
        typer.Option("--weighted/--unweighted", help="Divide costs by their means, or not, whatever their unit (default: of a table yes, of bundles no)."),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write a page with the drawings here (.html).")] = None,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Pareto fronts of performance against each cost, then the largest weighted radar area, within a budget where one is given."""
    from isthmus.candidates import candidates_of
    from isthmus.select import recomputed

    if complexity not in COMPLEXITY:
        raise IsthmusError(f"--complexity {complexity!r}: expected {', '.join(COMPLEXITY)}")
    limits = _limits(budget or [])
    named_metrics, named_costs = _words(metrics, "--metrics"), _words(costs, "--costs")
    tables = [source for source in sources if Path(source).suffix.lower() in (".csv", ".json")]
    table = _table(sources, tables, ensembles, (*named_costs, *limits), trust)
    results = {}
    for dataset, rows in table.datasets.items():
        candidates = candidates_of(rows, include_singles)
        if complexity != "table":
            candidates = recomputed(candidates, {row.name: row for row in rows if row.is_single}, complexity == "serial")
        radar, chosen_costs = _columns(table, candidates, named_metrics, named_costs)
        settings = {
            "performance": performance or (radar[0] if radar else ""),
            "metrics": radar,
            "costs": chosen_costs,
            "budget": limits,
            "weighted": bool(tables) if weighted is None else weighted,
        }
        results[dataset] = candidates, _chosen(dataset, candidates, settings)
    if output is not None:
        from isthmus.report.selection import render_selection

        output.write_text(render_selection(", ".join(Path(source).name for source in sources), results), encoding="utf-8")
    if as_json:
        print_json({dataset: selection.to_json() for dataset, (_, selection) in results.items()})
        return
    print("\n\n".join(_shown(dataset, candidates, selection) for dataset, (candidates, selection) in results.items()))
    if output is not None:
        print(f"\npage: {shown(output)}")


def _table(sources: Sequence[str], tables: Sequence[str], ensembles: int, costs: Sequence[str], trust: bool) -> Table:
    """What there is to choose from. `tables`: those of the sources that are files."""
    from isthmus.bundle_candidates import table_of_bundles
    from isthmus.candidates import read_table

    if tables and len(sources) > 1:
        raise IsthmusError(f"{tables[0]}: give one table, or bundles, not both")
    if tables:
        if ensembles != 1:
            raise IsthmusError(f"--ensembles makes ensembles of bundles; {tables[0]} names its own in the column 'members'")
        return read_table(tables[0], costs)
    if not 1 <= ensembles <= len(sources):
        raise IsthmusError(f"--ensembles {ensembles}: expected 2 to {len(sources)}, as many as there are bundles (1: none)")
    return table_of_bundles(sources, ensembles, trust)


def _chosen(dataset: str, candidates: Sequence[Candidate], settings: Mapping[str, Any]) -> Selection:
    """The selection of one data set, which a refusal names where the table has several."""
    from isthmus.select import select as choose

    try:
        return choose(candidates, **settings)
    except IsthmusError as error:
        raise IsthmusError(f"{dataset}: {error}" if dataset else str(error)) from None


def _limits(words: Sequence[str]) -> dict[str, float]:
    limits: dict[str, float] = {}
    for word in words:
        name, value = pair(word, "--budget")
        if name in limits:
            raise IsthmusError(f"--budget {word!r}: {name} has a limit already ({limits[name]:g}); give each cost one")
        try:
            limits[name] = float(value)
        except ValueError:
            raise IsthmusError(f"--budget {word!r}: expected NAME=NUMBER, such as size_mb=34") from None
        if not 0 < limits[name] < float("inf"):
            raise IsthmusError(f"--budget {word!r}: expected a number above 0")
    return limits


def _words(text: str | None, option: str) -> tuple[str, ...]:
    words = tuple(word.strip() for word in text.split(",") if word.strip()) if text else ()
    twice = [word for word in words if words.count(word) > 1]
    if twice:
        raise IsthmusError(f"{option} {text!r}: {twice[0]} stands there twice; name each once")
    return words


def _columns(table: Table, candidates: Sequence[Candidate], metrics: tuple[str, ...], costs: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The paper's columns where the table has them, else every one that each candidate has."""
    from isthmus.select import COSTS, METRICS

    if not metrics:
        metrics = METRICS if set(METRICS) <= set(table.metrics) else tuple(m for m in table.metrics if all(m in c.metrics for c in candidates))
    if not costs:
        costs = COSTS if set(COSTS) <= set(table.costs) else tuple(cost for cost in table.costs if all(cost in c.costs for c in candidates))
    return metrics, costs


def _shown(dataset: str, candidates: Sequence[Candidate], selection: Selection) -> str:
    from isthmus.console import grid

    lines = [f"{dataset + ': ' if dataset else ''}{len(candidates)} candidates, {selection.performance} against {', '.join(selection.costs)}"]
    rows = [[kind, str(len(found.u)), ", ".join(found.q) or "none"] for kind, found in selection.kinds.items()]
    lines += [grid(["kind", "on any front", "on every front"], rows), ""]
    lines.append(_ranked("area of the radar", selection.f))
    if selection.within is not None:
        limits = ", ".join(f"{cost} <= {limit:g}" for cost, limit in selection.budget.items())
        lines += ["", _ranked(f"area, {limits}", selection.within)]
    lines += ["", f"choice: {selection.choice}{_near(selection.within or selection.f)}"]
    return "\n".join(lines)


def _ranked(heading: str, ranking: Ranking) -> str:
    from isthmus.console import grid

    best: Mapping[str, list[str]] = {name: [kind for kind, winner in ranking.best.items() if winner == name] for name in ranking.areas}
    return grid(["candidate", heading, "best of"], [[name, f"{area:.5f}", ", ".join(best[name])] for name, area in ranking.areas.items()])


def _near(ranking: Ranking) -> str:
    others = ranking.tied["overall"][1:]
    return f" (as good within the tables' rounding: {', '.join(others)})" if others else ""
