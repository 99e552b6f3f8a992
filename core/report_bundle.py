# SPDX-License-Identifier: Apache-2.0
"""What a bundle says of itself: the table on the terminal, the same figures as JSON, and its `report.html`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from isthmus.bench_bundle import read_measurements, why_not_measured
from isthmus.bundle import Bundle
from isthmus.console import grid
from isthmus.cost import cost_of_graph
from isthmus.form_file import load_form
from isthmus.lint_bundle import lint_bundle
from isthmus.measurement import Measurement
from isthmus.plan import tail
from isthmus.report import layers_of, render
from isthmus.report.sections import judged
from isthmus.tree_cost import cost_of_trees
from isthmus.tree_form import TreeForm

NEEDS_BOARD = "needs the board"
LOG_LINES = 12
SIMULATIONS = ("csim", "treesim")


def add_report(bundle: Bundle) -> Bundle:
    """Writes `reports/report.html` anew."""
    return bundle.add_report("report.html", render_bundle(bundle).encode())


def render_bundle(bundle: Bundle) -> str:
    """The page as text, from what the bundle holds and nothing else."""
    form = load_form(bundle.model)
    cost, layers = (cost_of_trees(form), []) if isinstance(form, TreeForm) else (cost_of_graph(form), layers_of(form))
    measurements = read_measurements(bundle)
    reasons = {name: why_not_measured(entry) or "not measured" for name, entry in bundle.manifest["artifacts"].items() if name not in measurements}
    return render(bundle.manifest, measurements, cost, layers, logs=_logs(bundle), unmeasured=reasons, lint=lint_bundle(bundle))


def summary(bundle: Bundle) -> dict[str, Any]:
    """The table's figures (`--json`): None where only the board can tell."""
    measurements = read_measurements(bundle)
    artifacts = {}
    for name, entry in bundle.manifest["artifacts"].items():
        measurement = measurements.get(name)
        artifacts[name] = {
            "target": entry["target"],
            "artifact": entry["artifact"],
            "size_bytes": entry["size_bytes"],
            "exact_share": _exact_share(entry),
            "max_lsb": _max_lsb(entry),
            "accuracy": entry["accuracy"],
            "score": entry.get("score"),
            "verification": entry["verification"],
            "latency": measurement.figures() | {"valid": measurement.valid, "reasons": list(measurement.reasons)} if measurement else None,
            "needs_board": bool(why_not_measured(entry)),
            "steps": entry["steps"],
            "notes": entry["notes"],
            "tuning": entry.get("tuning"),
        }
    return {
        "bundle": str(bundle.root),
        "digest": bundle.manifest["graph"]["digest"],
        "scheme": bundle.manifest["graph"]["scheme"],
        "task": bundle.manifest["task"],
        "notes": bundle.manifest["notes"],
        "artifacts": artifacts,
    }


def table(bundle: Bundle) -> str:
    """One line an artifact, the accuracy of the float model and the reference above, what the columns mean below."""
    measurements = read_measurements(bundle)
    rows = [_row(name, entry, measurements.get(name)) for name, entry in bundle.manifest["artifacts"].items()]
    score = "score" if any("score" in entry for entry in bundle.manifest["artifacts"].values()) else "accuracy"
    header = ["profile", "artifact", "bytes", "exact", "largest diff", score, "p50 / p99 on this machine"]
    lines = [*_accuracy_lines(bundle.manifest), grid(header, rows), ""]
    for name, entry in bundle.manifest["artifacts"].items():
        done = [step["detail"] for step in entry["steps"] if step["status"] == "done" and step["tool"] != "g++" and step["detail"]]
        planned = [step["name"] for step in entry["steps"] if step["status"] == "planned"]
        skipped = [step["detail"] for step in entry["steps"] if step["status"] == "skipped"]
        simulated = ["compared and judged in its C simulation"] if entry["engine"] in SIMULATIONS else []
        place = "the vendor's tool" if entry["engine"] in SIMULATIONS else "the board"
        left = [f"left for {place}: {', '.join(planned)}"] if planned else []
        remarks = [*_tuned(entry), *done[-1:], *simulated, *skipped, *left]
        if remarks:
            lines.append(f"{name}: {'; '.join(remarks)}")
    lines += [f"note: {note}" for note in bundle.manifest["notes"]]
    return "\n".join(lines)


def _tuned(entry: Mapping[str, Any]) -> list[str]:
    """What tuning took, and how much faster that is; nothing where the artifact was not tuned."""
    tuning = entry.get("tuning")
    if not tuning:
        return []
    taken = next(one for one in tuning["candidates"] if one["taken"])
    faster = f", {taken['ratio']['ratio']:.2f} times the untuned artifact's time" if taken["ratio"] else " (nothing was faster)"
    return [f"tuned on {tuning['cpu_model']}: {taken['candidate']}{faster}, {tuning['metric']} {taken['score']:.4f} (untuned {tuning['untuned_score']:.4f})"]


def _accuracy_lines(manifest: Mapping[str, Any]) -> list[str]:
    task = manifest["task"]
    if not task:
        return []
    known = [f"{label} {task[key]:.4f}" for key, label in (("float", "float"), ("reference", "int8 reference")) if task[key] is not None]
    return [f"{task['metric']} on {task['samples']} samples: {', '.join(known)}", ""]


def _row(name: str, entry: Mapping[str, Any], measurement: Measurement | None) -> list[str]:
    exact, lsb = _exact_share(entry), _max_lsb(entry)
    value = judged(entry)
    accuracy = f"{value:.4f}" if value is not None else ("" if entry["runs_here"] else NEEDS_BOARD)
    return [
        name,
        entry["artifact"],
        f"{entry['size_bytes']:,}",
        f"{100 * exact:.4g} %" if exact is not None else NEEDS_BOARD,
        f"{lsb} LSB" if lsb is not None else ("" if entry["runs_here"] else NEEDS_BOARD),
        accuracy,
        _latency(entry, measurement),
    ]


def _latency(entry: Mapping[str, Any], measurement: Measurement | None) -> str:
    if measurement is None:
        return why_not_measured(entry) or "not measured"
    if not measurement.valid:
        return f"not valid: {measurement.reasons[0]}"
    return f"{measurement.p50_ns / 1000:.1f} / {measurement.p99_ns / 1000:.1f} us"


def _exact_share(entry: Mapping[str, Any]) -> float | None:
    """Share of equal elements over all outputs; None where nothing was compared."""
    compared = sum(row["compared"] for row in entry["verification"])
    return 1 - sum(row["mismatched"] for row in entry["verification"]) / compared if compared else None


def _max_lsb(entry: Mapping[str, Any]) -> int | None:
    """Largest difference in steps over the int8 outputs; None where there is none."""
    return max((row["max_lsb"] for row in entry["verification"] if row["kind"] == "int8"), default=None)


def _logs(bundle: Bundle) -> dict[str, dict[str, str]]:
    logs: dict[str, dict[str, str]] = {}
    for name, entry in bundle.manifest["artifacts"].items():
        for step in entry["steps"]:
            file = f"artifacts/{name}/logs/{step['name']}.log"
            if file in bundle.manifest["files"]:
                logs.setdefault(name, {})[step["name"]] = tail(bundle.root / file, LOG_LINES)
    return logs
