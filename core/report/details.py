# SPDX-License-Identifier: Apache-2.0
"""The second half of the page, the evidence: build steps, what was compared, where everything came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from isthmus.measurement import Measurement
from isthmus.report import figures
from isthmus.report.markup import Child, Html, element, join
from isthmus.report.parts import Column, badge, code, facts, fold, plain, section, table

Manifest = Mapping[str, Any]
Logs = Mapping[str, Mapping[str, str]]


# ---- build
def build(manifest: Manifest, logs: Logs) -> Html:
    columns = [Column("Profile"), Column("Step"), Column("Status"), Column("Tool"), Column("Time", numeric=True), Column("Last line", wide=True)]
    rows = [row for profile, entry in manifest["artifacts"].items() for row in _steps(profile, entry)]
    caption = "Done ran here and ended well; skipped is an optional step whose tool is not here; planned is left for the board or the tool's own host."
    folded = [
        fold(f"{profile}: the end of the log of {step}", element("pre", text, tabindex="0"))
        for profile, steps in logs.items()
        for step, text in steps.items()
        if text
    ]
    options = [(profile, plain(entry["options"])) for profile, entry in manifest["artifacts"].items() if entry.get("options")]
    chosen = join(element("h3", "Target options"), facts(options)) if options else None
    return section("build", "Build steps", table(caption, columns, rows, name="build-steps"), folded, chosen)


def _steps(profile: str, entry: Manifest) -> list[Sequence[Child]]:
    if not entry["steps"]:
        return [[profile, figures.DASH, figures.DASH, figures.DASH, figures.DASH, "written directly from the graph, no tool needed"]]
    return [
        [
            profile,
            step["name"],
            badge(step["status"]),
            _tool(step["tool"], step["tool_version"]),
            f"{step['seconds']:.1f} s" if step["status"] == "done" else figures.DASH,
            step["detail"],
        ]
        for step in entry["steps"]
    ]


def _tool(name: str, version: str) -> str:
    """Some programs begin their version line with their own name."""
    return version if version.startswith(name) else f"{name} {version}".strip()


# ---- verification
def verification(manifest: Manifest) -> Html:
    columns = [
        Column("Profile"),
        Column("Output"),
        Column("Compared", numeric=True),
        Column("Different", numeric=True),
        Column("Largest difference", numeric=True),
        Column("Allowed", numeric=True),
        Column("Result"),
    ]
    rows: list[Sequence[Child]] = []
    for profile, entry in manifest["artifacts"].items():
        for check in entry["verification"]:
            steps = check["kind"] == "int8"
            rows.append(
                [
                    profile,
                    code(check["tensor"]),
                    figures.whole(check["compared"]),
                    figures.whole(check["mismatched"]),
                    f"{check['max_lsb']} LSB" if steps else f"{check['max_abs']:.2e}",
                    f"{entry.get('max_lsb_allowed', 0)} LSB" if steps else "float tolerance",
                    badge("passed" if check["passed"] and check["compared"] else "failed"),
                ]
            )
        if not entry["verification"]:
            result = badge("needs the board") if not entry["runs_here"] else badge("failed")
            rows.append([profile, figures.DASH, "0", figures.DASH, figures.DASH, f"{entry.get('max_lsb_allowed', 0)} LSB", result])
    text = element(
        "p",
        "The golden inputs were run through each artifact that this machine can run, and every element of every output was compared with the integer "
        "reference: int8 in, int32 accumulation, one rounding half to even, saturation. A simulator runs under its own name. What needs its board was "
        "not run, and nothing is claimed for it.",
    )
    return section("verification", "What was verified", text, table("One line for each output of each artifact", columns, rows, name="verification-table"))


# ---- provenance
def provenance(manifest: Manifest, measurements: Mapping[str, Measurement]) -> Html:
    graph = manifest["graph"]
    data = manifest.get("data") or {}
    pairs: list[tuple[Child, Child]] = [
        ("Form", join(code(graph.get("file", "model.onnx")), " sha256 ", code(graph["digest"]))),
        ("Calibration data", data.get("calibration")),
        ("Evaluation data", data.get("evaluation")),
        ("Preprocessing", plain(manifest["preprocess"]) if manifest.get("preprocess") else None),
        ("Float islands", ", ".join(map(str, graph.get("float_islands") or [])) or "none"),
    ]
    notes = [element("p", note) for note in manifest.get("notes", ())]
    parts: list[Child] = [
        element("h3", "Graph"),
        facts(pairs),
        _border(graph),
        notes,
        element("h3", "Recipe"),
        facts([(name, plain(value)) for name, value in (manifest.get("recipe") or {}).items()]),
        element("h3", "Tools at compile time"),
        facts([(name, plain(version)) for name, version in (manifest.get("tools") or {}).items()]),
    ]
    if measurements:
        conditions = next(iter(measurements.values())).conditions
        shown = [
            (name.replace("_", " "), plain(value))
            for name, value in conditions.items()
            if name not in ("engine", "engine_version") and value not in (None, "", [])
        ]
        parts += [element("h3", "Host while measuring"), facts(shown)]
    parts.append(_files(manifest))
    return section("provenance", "Where it comes from", *parts)


def _border(graph: Manifest) -> Html:
    columns = [Column("Tensor"), Column("Side"), Column("Type"), Column("Shape"), Column("Scale", numeric=True), Column("Zero point", numeric=True)]
    rows: list[Sequence[Child]] = [
        [
            code(spec["name"]),
            side,
            f"{spec['dtype']} {spec.get('layout') or ''}".strip(),
            figures.shape(spec["shape"]),
            figures.scale(spec.get("scale")),
            figures.DASH if spec.get("zero_point") is None else spec["zero_point"],
        ]
        for side in ("inputs", "outputs")
        for spec in graph.get(side, ())
    ]
    rows = [[row[0], str(row[1])[:-1], *row[2:]] for row in rows]
    return table("Inputs and outputs of the form: real value = (integer − zero point) × scale", columns, rows, name="border")


def _files(manifest: Manifest) -> Html | None:
    files = manifest.get("files") or {}
    if not files:
        return None
    rows: list[Sequence[Child]] = [[code(name), code(digest)] for name, digest in files.items()]
    return fold(
        f"All {len(files)} files of the bundle with their sha256",
        table("Checked whenever the bundle is opened", [Column("File"), Column("sha256")], rows, name="files"),
    )
