# SPDX-License-Identifier: Apache-2.0
"""The first half of the page, the answers: what came out, does it agree, how accurate, how fast, what it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from isthmus.cost import CONVENTIONS, Cost
from isthmus.measurement import Measurement, ratio_interval
from isthmus.report import charts, figures
from isthmus.report.markup import Child, Html, element, join
from isthmus.report.parts import Column, badge, bullets, code, facts, plain, section, stacked, table, tiles

Manifest = Mapping[str, Any]
Measurements = Mapping[str, Measurement]

NEEDS_THE_BOARD = "needs the board"


def compared(entry: Manifest) -> tuple[int, int]:
    """Elements compared and mismatched, over all outputs of one artifact."""
    checks = entry["verification"]
    return sum(check["compared"] for check in checks), sum(check["mismatched"] for check in checks)


def agrees(entry: Manifest) -> bool:
    """Something was compared, and all of it passed."""
    return compared(entry)[0] > 0 and all(check["passed"] and check["compared"] > 0 for check in entry["verification"])


def verdict(manifest: Manifest) -> tuple[str, bool]:
    """One sentence on the whole bundle, and whether it is good news."""
    entries = manifest["artifacts"]
    here = [name for name, entry in entries.items() if entry["runs_here"]]
    wrong = [name for name in here if not agrees(entries[name])]
    waiting = len(entries) - len(here)
    board = f" {waiting} of {len(entries)} artifacts {'needs its board' if waiting == 1 else 'need their boards'} to be run." if waiting else ""
    if wrong:
        return f"Not verified: {', '.join(wrong)}.{board}", False
    if not here:
        return f"Nothing could be run on this machine.{board}", False
    exact = all(compared(entries[name])[1] == 0 for name in here)
    how = "equals the integer reference on every compared element" if exact else "agrees with the integer reference within what its target declares"
    lead = "The artifact that runs here" if len(here) == 1 else f"Each of the {len(here)} artifacts that run here"
    return f"{lead} {how}.{board}", True


def header(manifest: Manifest) -> Html:
    text, good = verdict(manifest)
    graph = manifest["graph"]
    line = join(
        f"isthmus {manifest.get('isthmus', '')} · compiled {manifest.get('created', '')} · scheme {graph.get('scheme', '')} · form ",
        element("code", str(graph["digest"])[:12], title=graph["digest"]),
    )
    return element(
        "header",
        element("p", "Compilation report", class_="kicker"),
        element("h1", manifest.get("name", "model")),
        element("p", line, class_="quiet"),
        element("p", element("strong", "Verified. " if good else "Attention. "), text, class_=f"verdict {'good' if good else 'bad'}"),
    )


def summary(manifest: Manifest, cost: Cost, measurements: Measurements) -> Html:
    task = manifest.get("task") or {}
    pairs: list[tuple[Child, Child, Child]] = [
        (figures.whole(cost.parameters), "Parameters", f"{figures.size(cost.weight_bytes)} of int8 weights and int32 biases"),
        (figures.short(float(cost.macs)), "MACs", "multiply-accumulates, one run"),
        (figures.size(cost.activation_bytes), "Peak activations", "live at once, in the graph's order"),
    ]
    if task.get("reference") is not None:
        remark = f"{plain(task['metric'])}; float {figures.accuracy(task.get('float'))}"
        pairs.append((figures.accuracy(task["reference"]), "int8 accuracy" if _is_share(task) else f"int8 {plain(task['metric'])}", remark))
    fastest = min((m for m in measurements.items() if m[1].valid), key=lambda item: item[1].p50_ns, default=None)
    if fastest is not None:
        profile, m = fastest
        remark = f"{profile}, {figures.threads(m.conditions.get('threads'))} of {machine(m.conditions)}"
        pairs.append((figures.duration(m.p50_ns), "Fastest p50", remark))
    return section("summary", "At a glance", tiles(pairs))


def machine(conditions: Manifest) -> str:
    """What a latency was taken on: never the profile's board unless the samples come from it."""
    return plain(conditions.get("board") or conditions.get("cpu_model"))


# ---- artifacts
def artifacts(manifest: Manifest, measurements: Measurements, unmeasured: Mapping[str, str]) -> Html:
    columns = [
        Column("Profile"),
        Column("Artifact"),
        Column("Size", numeric=True),
        Column("Exact", numeric=True),
        Column("Largest difference", numeric=True),
        Column("Accuracy", numeric=True),
        Column("p50", numeric=True),
        Column("p99", numeric=True),
    ]
    rows = []
    for profile, entry in manifest["artifacts"].items():
        rows.append(
            [
                stacked(profile, entry.get("board", "")),
                stacked(code(entry["artifact"]), f"{entry['target']} · engine {entry['engine']}"),
                figures.size(entry["size_bytes"]),
                *_agreement(entry),
                figures.accuracy(judged(entry)),
                *_latency(profile, entry, measurements, unmeasured),
            ]
        )
    notes = [(profile, _notes(entry)) for profile, entry in manifest["artifacts"].items()]
    caption = (
        "Every artifact comes from the same int8 graph. Exact is the share of output elements equal to the integer reference; "
        "a difference is in steps of the output (LSB). A latency holds for the machine named under it, which need not be the profile's board."
    )
    return section(
        "artifacts",
        "Artifacts side by side",
        table(caption, columns, rows, name="artifact-comparison", cards=True),
        facts([(name, bullets(text)) for name, text in notes if text]),
        [_tuning(profile, entry["tuning"]) for profile, entry in manifest["artifacts"].items() if entry.get("tuning")],
    )


def _tuning(profile: str, tuned: Manifest) -> Html:
    """Every candidate of a tuned artifact, the fastest first; what could not be built last."""
    rows = []
    for one in sorted(tuned["candidates"], key=lambda one: one["p50_ns"] or float("inf")):
        ratio = one["ratio"]
        shown = f"{ratio['ratio']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})" if ratio else "1" if one["candidate"] == tuned["untuned"] else figures.DASH
        rows.append(
            [
                one["candidate"],
                figures.duration(one["p50_ns"]) if one["p50_ns"] else figures.DASH,
                shown,
                figures.accuracy(one["score"]),
                figures.percent(one["exact_share"]) if one["exact_share"] is not None else figures.DASH,
                "taken" if one["taken"] else plain(one["why_not"]),
            ]
        )
    columns = [Column("Candidate"), *(Column(name, numeric=True) for name in ("p50", "Of the untuned", "Score", "Exact")), Column("Taken, or why not")]
    caption = (
        f"{profile}, tuned on {plain(tuned['cpu_model'])} with {figures.threads(tuned['threads'])}. Score: {plain(tuned['metric'])} on"
        f" {tuned['samples']} samples; the untuned form has {tuned['untuned_score']:.4f}, and {tuned['least_score']:.4f} is the least that holds. Exact:"
        " against a reference of the candidate's own numbers. Times were taken in turns; the ratio has its 95 % interval."
    )
    return table(caption, columns, rows, name=f"tuning-{profile}", cards=True)


def _notes(entry: Manifest) -> list[Child]:
    allowed = [f"May differ by {entry['max_lsb_allowed']} LSB: {entry['why_lsb']}"] if entry.get("max_lsb_allowed") else []
    return [*allowed, *entry.get("notes", ())]


def _agreement(entry: Manifest) -> tuple[Child, Child]:
    """Exact share and largest difference; what was not run is not a number."""
    if not entry["runs_here"]:
        return badge(NEEDS_THE_BOARD), figures.DASH
    total, mismatched = compared(entry)
    if not total:
        return badge("failed"), "nothing compared"
    checks = entry["verification"]
    shown = figures.percent(1 - mismatched / total) if mismatched else "100 %"
    quantised = [check["max_lsb"] for check in checks if check["kind"] == "int8"]
    worst = f"{max(quantised)} LSB" if quantised else f"{max(check['max_abs'] for check in checks):.1e} (float)"
    return stacked(shown, f"of {figures.whole(total)}"), worst if agrees(entry) else join(worst, " ", badge("failed"))


def _latency(profile: str, entry: Manifest, measurements: Measurements, unmeasured: Mapping[str, str]) -> tuple[Child, Child]:
    measurement = measurements.get(profile)
    if measurement is None:
        reason = unmeasured.get(profile) or ("not measured" if entry["runs_here"] else NEEDS_THE_BOARD)
        return badge(reason), figures.DASH
    if not measurement.count:
        return badge("not valid"), figures.DASH
    mark = None if measurement.valid else join(" ", badge("not valid"))
    tail = figures.duration(measurement.p99_ns) if measurement.supports(99) else "too few samples"
    return stacked(join(figures.duration(measurement.p50_ns), mark), f"on {machine(measurement.conditions)}"), tail


# ---- accuracy
def accuracy(manifest: Manifest) -> Html | None:
    task = manifest.get("task")
    if not task:
        return None
    base = task.get("float")
    rows: list[Sequence[Child]] = []
    if base is not None:
        rows.append(["Float model", "float32", figures.accuracy(base), figures.DASH])
    rows.append(["Integer reference", "int8 form, numpy", figures.accuracy(task.get("reference")), _change(task.get("reference"), base, _is_share(task))])
    for profile, entry in manifest["artifacts"].items():
        measured = judged(entry)
        rows.append(
            [
                profile,
                entry["engine"],
                badge(NEEDS_THE_BOARD) if measured is None and not entry["runs_here"] else figures.accuracy(measured),
                _change(measured, base, _is_share(task)),
            ]
        )
    columns = [Column("What ran"), Column("In"), Column(plain(task.get("metric", "accuracy")), numeric=True), Column("Against float", numeric=True)]
    samples, metric = task.get("samples"), plain(task.get("metric", "accuracy"))
    held_out = f"{metric[:1].upper()}{metric[1:]} on {samples} held-out samples"
    caption = "Accuracy." if not samples else f"{held_out}; one sample is {100 / samples:.2f} points." if _is_share(task) else f"{held_out}; larger is better."
    return section("accuracy", "Float against int8", table(caption, columns, rows, name="accuracy-comparison"))


def judged(entry: Manifest) -> float | None:
    """An artifact's accuracy, or what else its outputs were judged by."""
    accuracy = entry.get("accuracy")
    return entry.get("score") if accuracy is None else accuracy


def _is_share(task: Manifest) -> bool:
    """Whether the metric counts samples, so that a difference is in points."""
    return str(task.get("metric", "accuracy")).endswith("accuracy")


def _change(value: float | None, base: float | None, share: bool) -> str:
    if value is None or base is None:
        return figures.DASH
    difference = f"{100 * (value - base):+.2f} points" if share else f"{value - base:+.4f}"
    return "equal" if value == base else difference.replace("-", "−")


# ---- latency
def latency(manifest: Manifest, measurements: Measurements, unmeasured: Mapping[str, str]) -> Html:
    drawn = {profile: m for profile, m in measurements.items() if m.count}
    missing = []
    for profile, entry in manifest["artifacts"].items():
        if profile not in drawn:
            failed = measurements[profile].reasons if profile in measurements else ()
            missing.append((profile, "; ".join(failed) or unmeasured.get(profile) or ("not measured" if entry["runs_here"] else NEEDS_THE_BOARD)))
    intro = element(
        "p",
        "Raw int8 in and out, timed with a nanosecond clock on both sides of the engine's call; one inference at a time where no other scenario is "
        "named. Percentiles are nearest-rank: each is a latency that occurred. A figure holds for the machine and conditions named here and for no other.",
    )
    cards = [_card(profile, m) for profile, m in drawn.items()]
    comparison = _comparison(drawn) if len(drawn) > 1 else None
    none = element("p", "Nothing was measured on this machine.") if not drawn else None
    absent = facts([(profile, reason) for profile, reason in missing])
    return section("latency", "Latency", intro, none, comparison, cards, absent if missing else None)


def _comparison(drawn: Measurements) -> Html:
    """All on one axis, and how many times as long as the fastest each takes, with the interval that the noise allows."""
    usable = {profile: m for profile, m in drawn.items() if m.valid and m.count > 1 and m.scenario == "SingleStream"}
    sentences = []
    if len(usable) > 1:
        fastest = min(usable, key=lambda profile: usable[profile].p50_ns)
        for profile, m in usable.items():
            if profile != fastest:
                ratio, low, high = ratio_interval(m, usable[fastest])
                sentences.append(f" The median of {profile} is {ratio:.2f} times that of {fastest} (95 % interval {low:.2f} to {high:.2f}).")
    caption = element("figcaption", "p50 (dot) to p99 (end of the line), logarithmic axis.", sentences)
    return element("figure", charts.overview(drawn), caption, class_="overview")


def _card(profile: str, m: Measurement) -> Html:
    figures_table = table(
        f"{figures.whole(m.count)} samples after {figures.whole(m.warmup_count)} warm-up runs",
        [Column("Engine"), *(Column(name, numeric=True) for name in ("mean", "fastest", "p50", "p90", "p99", "slowest"))],
        [
            [
                f"{plain(m.conditions.get('engine'))} {plain(m.conditions.get('engine_version'))}",
                figures.duration(m.mean_ns),
                figures.duration(int(m.samples_ns.min())),
                *(figures.duration(m.percentile_ns(p)) if m.supports(p) else "too few samples" for p in (50, 90, 99)),
                figures.duration(int(m.samples_ns.max())),
            ]
        ],
        name=f"latency-{profile}",
        cards=True,
    )
    warning = element("p", badge("not valid"), " ", "; ".join(m.reasons), class_="warning") if not m.valid else None
    drawings = [
        element("figure", charts.histogram(profile, m), element("figcaption", "Distribution")),
        element("figure", charts.timeline(profile, m), element("figcaption", "In the order taken: range and median of each slice")),
    ]
    heading = element("h3", f"{profile} ", element("small", f"on {machine(m.conditions)}"))
    remarks = element("p", _remarks(m), class_="quiet")
    return element("article", heading, warning, figures_table, element("div", drawings, class_="pair"), remarks, class_="card")


def _remarks(m: Measurement) -> str:
    c = m.conditions
    parts = [f"{figures.threads(c.get('threads'))} of {machine(c)}"]
    overhead = c.get("harness_overhead_ns")
    if overhead is not None:
        parts.append(f"the harness itself takes {figures.duration(overhead)} of each sample ({overhead / max(m.p50_ns, 1):.1%} of p50), not subtracted")
    parts.append(f"{m.scenario}: {m.throughput_per_s:,.1f} inferences a second")
    if m.energy_j is not None:
        parts.append(f"{1000 * m.energy_j:.3g} mJ each above idle ({plain((c.get('energy') or {}).get('source'))})")
    against = c.get("against")
    if against:
        parts.append(f"{against['ratio']:.3f} times as long as {against['name']} (95 % interval {against['low']:.3f} to {against['high']:.3f})")
    others = list(c.get("interleaved") or [])
    if len(others) > 1:
        parts.append(f"taken in turns: {', '.join(others)}")
    load, count = c.get("load_average"), c.get("cpu_count")
    if load and count:
        parts.append(f"load average before {load[0]} on {count} cores" + (": the machine was busy with something else" if load[0] >= 0.75 * count else ""))
    return "; ".join(parts) + "."


# ---- layers
def layers(cost: Cost, rows: Sequence[Mapping[str, Any]]) -> Html:
    """`rows` are `layers_of(graph)`, in the order of `cost.per_node`."""
    by_name = {row["name"]: row for row in rows}
    columns = [
        Column("Layer"),
        Column("Operator"),
        Column("Output"),
        Column("MACs", numeric=True),
        Column("Share of MACs", wide=True),
        Column("Weights", numeric=True),
        Column("Output scale", numeric=True),
        Column("Zero point", numeric=True),
    ]
    body: list[Sequence[Child]] = []
    for node in cost.per_node:
        row = by_name.get(node.name, {})
        activation = f" + {row['activation']}" if row.get("activation") else ""
        share = join(charts.share_bar(node.share), element("span", figures.portion(node.share), class_="number")) if node.macs else figures.DASH
        body.append(
            [
                node.name,
                stacked(node.op + activation, "float" if row.get("kind") == "float" else ""),
                element("span", figures.shape(node.output_shape), class_="together"),
                figures.whole(node.macs) if node.macs else figures.DASH,
                share,
                figures.size(node.weight_bytes) if node.weight_bytes else figures.DASH,
                figures.scale(row.get("scale")),
                figures.DASH if row.get("zero_point") is None else row["zero_point"],
            ]
        )
    foot: Sequence[Child] = ["Sum", "", "", figures.whole(cost.macs), "", figures.size(cost.weight_bytes), "", ""]
    caption = f"The integer program in order. MACs: {CONVENTIONS['mac']}, for one run at the graph's batch size."
    return section("layers", "Layers and their cost", table(caption, columns, body, foot, name="layers-table"), _conventions(cost))


def _conventions(cost: Cost) -> Html:
    rows: list[Sequence[Child]] = [[name, figures.whole(cost.count(name)), text] for name, text in CONVENTIONS.items()]
    counted = table(
        "The whole graph by each convention: a FLOP figure means nothing without its own.",
        [Column("Convention"), Column("Count", numeric=True), Column("Counts")],
        rows,
        name="conventions",
    )
    missing = element("p", f"Not counted, for want of a rule: {', '.join(cost.uncounted)}.", class_="warning") if cost.uncounted else None
    return join(counted, missing)
