# SPDX-License-Identifier: Apache-2.0
"""The report page: complete, well formed, self-contained, honest about what was not run, and deaf to hostile names."""

from __future__ import annotations

import base64
import copy
import hashlib
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.cost import cost_of_graph
from isthmus.errors import IsthmusError
from isthmus.form_writer import FormWriter
from isthmus.measurement import Measurement
from isthmus.recipe import Recipe
from isthmus.report import figures, layers_of, render
from isthmus.report.markup import Html, element, join, style

VOID = {"meta", "link", "br", "hr"}


class Page(HTMLParser):
    """Checks nesting while it reads; keeps tags, attributes, and the text by table id."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[tuple[str, str | None]] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag in VOID:
            return
        self.open.append((tag, dict(attrs).get("id")))
        table = self.table()
        if tag == "table":
            self.tables[table] = []
        elif tag == "tr":
            self.tables[table].append([])
        elif tag in ("td", "th"):
            self.tables[table][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        self.text += data
        if any(tag in ("td", "th") for tag, _ in self.open):
            self.tables[self.table()][-1][-1] += data

    def table(self):
        return next((name for tag, name in reversed(self.open) if tag == "table"), None)

    def rows(self, table: str) -> dict[str, list[str]]:
        return {row[0]: row[1:] for row in self.tables[table]}


def graph():
    w = FormWriter(recipe=Recipe())
    x = w.input("image", (1, 1, 8, 8), scale=2**-6)
    x = w.conv(x, np.ones((4, 1, 3, 3), np.int8), 2**-5, np.zeros(4, np.int32), scale=2**-3, activation="Relu", pads=(1, 1, 1, 1), name="first")
    x = w.gemm(w.flatten(w.max_pool(x, kernel=(2, 2))), np.ones((3, 64), np.int8), 2**-5, scale=2**-2, name="last")
    w.output(x, "logits")
    return w.graph()


GRAPH = graph()
COST = cost_of_graph(GRAPH)


def check(**changes):
    return {"tensor": "logits", "kind": "int8", "compared": 600, "mismatched": 0, "max_lsb": 0, "max_abs": 0.0, "passed": True} | changes


def artifact(target: str, engine: str, **changes):
    return {
        "target": target,
        "board": f"board of {target}",
        "artifact": f"model.{target}",
        "engine": engine,
        "size_bytes": 9216,
        "inputs": [],
        "outputs": [],
        "options": {},
        "runs_here": True,
        "max_lsb_allowed": 0,
        "why_lsb": "",
        "steps": [],
        "notes": [f"note on {target}"],
        "verification": [check()],
        "accuracy": 0.975,
    } | changes


def step(name: str, status: str, **changes):
    return {"name": name, "status": status, "tool": "g++", "tool_version": "12.2", "seconds": 1.25, "detail": f"{name} ended"} | changes


def manifest(**changes):
    planned = step("engine", "planned", tool="tensorrt", tool_version="", seconds=0.0, detail="runs on the board")
    return {
        "schema": 1,
        "name": "digits",
        "created": "2026-11-22T20:00:00+00:00",
        "isthmus": "0.1.0",
        "graph": {
            "file": "model.onnx",
            "digest": GRAPH.digest,
            "scheme": "power_of_two",
            "inputs": [spec.to_json() for spec in GRAPH.inputs],
            "outputs": [spec.to_json() for spec in GRAPH.outputs],
            "float_islands": [],
        },
        "recipe": {"name": "portable", "scheme": "power_of_two", "seed": 0},
        "tools": {"python": "3.11.7", "g++": "12.2"},
        "task": {"metric": "top-1 accuracy", "float": 0.98, "reference": 0.975, "samples": 360},
        "artifacts": {
            "cpu": artifact("cpu", "onnxruntime"),
            "rpi5": artifact("tflite", "tflite", steps=[step("write", "done"), step("extra", "skipped")]),
            "jetson": artifact("jetson", "tensorrt", runs_here=False, verification=[], accuracy=None, steps=[planned]),
        },
        "files": {"model.onnx": "ab" * 32},
    } | changes


def measurement(count: int = 1000, **changes) -> Measurement:
    samples = np.random.default_rng(1).lognormal(10, 0.2, count).astype(np.int64)
    conditions = {"engine": "onnxruntime", "engine_version": "1.32.0", "threads": 1, "cpu_model": "Test CPU", "cpu_count": 2, "load_average": [0.1, 0.1, 0.1]}
    conditions |= {"harness_overhead_ns": 150, "interleaved": ["cpu", "rpi5"], "host": "testhost", "governor": None}
    return Measurement("SingleStream", samples, 40, len(samples), int(samples.sum()), conditions, **changes)


MEASUREMENTS = {"cpu": measurement(), "rpi5": measurement(700)}


def page(data=None, measurements=None, **options) -> Page:
    return Page(text(data, measurements, **options))


def text(data=None, measurements=None, **options) -> str:
    return render(data or manifest(), MEASUREMENTS if measurements is None else measurements, COST, layers_of(GRAPH), **options)


# ---- what it shows
def test_comparison_table():
    rows = page().rows("artifact-comparison")
    assert list(rows["cpuboard of cpu"][:5]) == ["model.cpucpu · engine onnxruntime", "9.0 KiB", "100 %of 600", "0 LSB", "0.9750"]
    p50, p99 = rows["cpuboard of cpu"][5:]
    assert p50 == f"{figures.duration(MEASUREMENTS['cpu'].p50_ns)}on Test CPU"
    assert p99 == figures.duration(MEASUREMENTS["cpu"].p99_ns)


def test_what_needs_the_board_has_no_figure():
    rows = page().rows("artifact-comparison")
    assert rows["jetsonboard of jetson"] == ["model.jetsonjetson · engine tensorrt", "9.0 KiB", "needs the board", "–", "–", "needs the board", "–"]


def test_a_simulators_latency_is_not_shown():
    rows = page(measurements={}, unmeasured={"rpi5": "needs the board"}).rows("artifact-comparison")
    assert rows["rpi5board of tflite"][5:] == ["needs the board", "–"]
    assert rows["cpuboard of cpu"][5:] == ["not measured", "–"]


def test_layers_with_cost_and_scale():
    rows = page().rows("layers-table")
    assert rows["first"] == ["Conv + Relu", "1 × 4 × 8 × 8", "2,304", "92.3 %", "52 B", "2−3", "0"]
    assert rows["flatten"][2:5] == ["–", "–", "–"]
    assert rows["Sum"][2] == figures.whole(COST.macs)
    assert page().rows("conventions")["keras"][0] == figures.whole(COST.keras_flops)


def test_histogram_and_course_of_each_measured_profile():
    seen = page()
    labels = [value for tag, name, value in seen.attributes if tag == "svg" and name == "aria-label"]
    for profile in ("cpu", "rpi5"):
        assert any(
            label.startswith(f"Latency histogram of {profile}: 1,000" if profile == "cpu" else f"Latency histogram of {profile}: 700") for label in labels
        )
        assert any(label.startswith(f"Course of latency of {profile}:") for label in labels)
    assert "the harness itself takes 150 ns of each sample (0.7% of p50), not subtracted" in seen.text
    assert "taken in turns: cpu, rpi5" in seen.text
    assert re.search(r"The median of (cpu|rpi5) is 1\.0\d times that of (cpu|rpi5) \(95 % interval \d\.\d\d to \d\.\d\d\)", seen.text)


def test_accuracy_against_float():
    rows = page().rows("accuracy-comparison")
    assert rows["Float model"] == ["float32", "0.9800", "–"]
    assert rows["cpu"] == ["onnxruntime", "0.9750", "−0.50 points"]
    assert rows["jetson"] == ["tensorrt", "needs the board", "–"]
    assert "one sample is 0.28 points" in page().text


def test_build_steps_and_logs():
    seen = page(logs={"rpi5": {"write": "line one\nlast <line>"}})
    steps = [row for row in seen.tables["build-steps"] if row[0] in ("rpi5", "jetson", "cpu")]
    assert steps == [
        ["cpu", "–", "–", "–", "–", "written directly from the graph, no tool needed"],
        ["rpi5", "write", "done", "g++ 12.2", "1.2 s", "write ended"],
        ["rpi5", "extra", "skipped", "g++ 12.2", "–", "extra ended"],
        ["jetson", "engine", "planned", "tensorrt", "–", "runs on the board"],
    ]
    assert "line one\nlast <line>" in seen.text


def test_verdicts():
    assert "Each of the 2 artifacts that run here equals the integer reference on every compared element. 1 of 3 artifacts needs its board" in page().text
    data = manifest()
    data["artifacts"]["cpu"]["verification"] = [check(mismatched=2, max_lsb=1, passed=True)]
    data["artifacts"]["cpu"] |= {"max_lsb_allowed": 1, "why_lsb": "the engine rounds twice"}
    seen = page(data)
    assert "agrees with the integer reference within what its target declares" in seen.text
    assert "May differ by 1 LSB: the engine rounds twice" in seen.text
    assert seen.rows("artifact-comparison")["cpuboard of cpu"][2:4] == ["99.666 %of 600", "1 LSB"]


@pytest.mark.parametrize("checks", [[], [check(compared=0)], [check(mismatched=1, max_lsb=3, passed=False)], [check(), check(passed=False)]])
def test_what_does_not_pass_is_never_called_verified(checks):
    data = manifest()
    data["artifacts"]["cpu"]["verification"] = checks
    seen = page(data)
    assert "Not verified: cpu." in seen.text
    assert "Verified. " not in seen.text
    assert "failed" in [cell for row in seen.tables["verification-table"] if row[0] == "cpu" for cell in row]


def test_almost_all_is_not_all():
    data = manifest()
    data["artifacts"]["cpu"]["verification"] = [check(compared=10_000_000, mismatched=1, max_lsb=1)]
    assert page(data).rows("artifact-comparison")["cpuboard of cpu"][2].startswith("99.999 %")


def test_float_tail_is_named_as_one():
    data = manifest()
    data["artifacts"]["cpu"]["verification"] = [check(kind="float32", max_abs=3e-8)]
    assert page(data).rows("artifact-comparison")["cpuboard of cpu"][3] == "3.0e-08 (float)"


def test_measurement_that_is_not_valid_says_so():
    short = measurement(100, valid=False, reasons=("time limit of 1 s: 100 of 662 samples",))
    empty = Measurement("SingleStream", np.zeros(0, np.int64), 0, 0, 0, {}, None, False, ("engine raised RuntimeError: gone",))
    seen = page(measurements={"cpu": short, "rpi5": empty})
    rows = seen.rows("artifact-comparison")
    assert rows["cpuboard of cpu"][5].startswith(figures.duration(short.p50_ns) + " not valid")
    assert rows["cpuboard of cpu"][6] == "too few samples"
    assert rows["rpi5board of tflite"][5:] == ["not valid", "–"]
    assert "time limit of 1 s: 100 of 662 samples" in seen.text
    assert "engine raised RuntimeError: gone" in seen.text
    assert "(too few samples)" in seen.text


@pytest.mark.parametrize("samples", [[1], [5, 5, 5], [0, 0], [0, 10**9], [1, 2**62, 2**62, 2**62], list(range(1, 3000, 7))])
def test_drawings_of_odd_series(samples):
    odd = Measurement("SingleStream", np.array(samples, np.int64), 0, len(samples), 1, {}, None, False, ("for the test",))
    drawn = text(measurements={"cpu": odd, "rpi5": odd})
    Page(drawn)
    numbers = re.findall(r' (?:x|y|x1|x2|y1|y2|cx|cy|width|height|r)="([^"]*)"', drawn)
    assert len(numbers) > 50
    assert all(np.isfinite(float(number)) for number in numbers)


def test_without_labels_or_measurements():
    data = manifest(task=None)
    seen = page(data, measurements={})
    assert "accuracy-comparison" not in seen.tables
    assert ("a", "href", "#accuracy") not in seen.attributes
    assert "Nothing was measured on this machine." in seen.text


def test_uncounted_operators_are_named():
    from dataclasses import replace

    drawn = render(manifest(), {}, replace(COST, uncounted=("Resize (up)",)), layers_of(GRAPH))
    assert "Not counted, for want of a rule: Resize (up)." in Page(drawn).text


def test_damaged_manifest_is_one_sentence():
    for broken in (
        manifest(graph={}),
        manifest(artifacts={"cpu": {}}),
        manifest(artifacts={"cpu": artifact("cpu", "x", size_bytes="much")}),
        manifest(task="none"),
    ):
        with pytest.raises(IsthmusError, match="no report can be made of this manifest"):
            text(broken)


def test_not_finite_numbers_do_not_break_it():
    data = manifest(task={"metric": "m", "float": float("nan"), "reference": float("nan"), "samples": 3})
    data["graph"]["inputs"][0]["scale"] = float("inf")
    page(data)


# ---- what it must not do
def test_loads_nothing_and_runs_nothing():
    drawn = text()
    seen = Page(drawn)
    assert not {"script", "iframe", "object", "embed", "img", "form", "base"} & set(seen.tags)
    for tag, name, value in seen.attributes:
        assert not name.startswith("on")
        assert name not in ("src", "srcset", "action", "style")
        if name == "href":
            assert value.startswith("#") or (tag, value) == ("link", "data:,")
    assert "://" not in drawn
    assert "url(" not in drawn
    assert "@import" not in drawn


def test_policy_allows_only_its_own_style():
    drawn = text()
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', drawn)[1]
    css = re.search(r"<style>(.*)</style>", drawn, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    assert drawn.index("Content-Security-Policy") < drawn.index("<style>")


HOSTILE = '</title></style><script>alert(1)</script><img src=x onerror="alert(2)">\'"&\x00\x07'


def poisoned(value, poison: str):
    """Every text in it, keys of free tables included, becomes the poison."""
    if isinstance(value, dict):
        fixed = {"name", "created", "isthmus", "graph", "recipe", "tools", "task", "artifacts", "files", "schema", "file", "digest", "inputs", "outputs"}
        fixed |= {"scheme", "float_islands", "metric", "float", "reference", "samples", *artifact("a", "b"), *step("a", "b"), *check()}
        fixed |= set(value.get("inputs", [{}])[0]) if value.get("inputs") else set()
        fixed |= {"shape", "dtype", "layout", "scale", "zero_point", "axis"}
        return {(key if key in fixed else f"{poison}{index}"): poisoned(inner, poison) for index, (key, inner) in enumerate(value.items())}
    if isinstance(value, list):
        return [poisoned(inner, poison) for inner in value]
    return poison if isinstance(value, str) else value


def test_hostile_names_stay_text():
    clean = Page(text())
    data = poisoned(manifest(), HOSTILE)
    names = list(data["artifacts"])
    conditions = dict.fromkeys(("engine", "engine_version", "cpu_model", "board", HOSTILE), HOSTILE) | {"interleaved": [HOSTILE, HOSTILE]}
    bad = Measurement("SingleStream", np.arange(1000), 1, 1000, 499_500, conditions, None, False, (HOSTILE,))
    layers = [{**row, "name": HOSTILE, "activation": HOSTILE} for row in layers_of(GRAPH)]
    drawn = render(data, {names[0]: bad, names[1]: bad}, COST, layers, logs={names[1]: {HOSTILE: HOSTILE}}, unmeasured={names[2]: HOSTILE})
    seen = Page(drawn)
    assert "<script" not in drawn
    assert "<img" not in drawn
    assert set(seen.tags) <= set(clean.tags) | {"pre", "details", "summary"}
    assert not any(name.startswith("on") for _, name, _ in seen.attributes)
    assert "\x00" not in drawn
    assert "\x07" not in drawn
    assert seen.text.count("<script>alert(1)</script>") > 30


@settings(max_examples=60)
@given(st.text(max_size=40))
def test_any_text_comes_back_as_text(name):
    data = manifest(name=name, notes=[name])
    data["artifacts"]["cpu"]["notes"] = [name]
    seen = page(data, measurements={})
    shown = "".join(character if character >= " " or character in "\n\t" else "�" for character in name).replace("\r", "\n")
    assert shown in seen.text
    assert set(seen.tags) == set(page(measurements={}).tags) | {"p"}


def test_markup_escapes_whatever_is_not_markup():
    assert (
        element("td", "<b>", Html("<i></i>"), None, ["&", 2.5], class_='"x"', hidden=True, lang=None)
        == '<td class="&quot;x&quot;" hidden>&lt;b&gt;<i></i>&amp;2.5</td>'
    )
    assert join("a", None, ("<", ">")) == "a&lt;&gt;"
    with pytest.raises(ValueError, match="attribute name"):
        element("td", **{"x onload": "1"})
    with pytest.raises(ValueError, match="cannot hold '</'"):
        style("a{}</style><script>")


# ---- numbers
@pytest.mark.parametrize(
    ("ns", "shown"),
    [(0, "0 ns"), (871, "871 ns"), (1000, "1.00 µs"), (12_340, "12.3 µs"), (999_600, "1,000 µs"), (8_497_000, "8.50 ms"), (61_000_000_000, "61.0 s")],
)
def test_durations(ns, shown):
    assert figures.duration(ns) == shown


def test_other_figures():
    assert [figures.size(n) for n in (0, 1023, 1024, 1536 * 1024)] == ["0 B", "1023 B", "1.0 KiB", "1.50 MiB"]
    assert [figures.percent(share) for share in (1, 0.9999999, 0.5, 0)] == ["100 %", "99.999 %", "50.000 %", "0.000 %"]
    assert [figures.portion(share) for share in (0, 0.0001, 0.381)] == ["0.0 %", "< 0.1 %", "38.1 %"]
    assert [figures.scale(value) for value in (2**-5, 1.0, 0.0123, None)] == ["2<sup>−5</sup>", "2<sup>0</sup>", "0.0123", "–"]
    assert [figures.short(value) for value in (999, 1234, 1_185_584, 2.5e9)] == ["999", "1.23 k", "1.19 M", "2.50 G"]


def test_input_is_left_as_it_was():
    data = manifest()
    before = copy.deepcopy(data)
    text(data)
    assert data == before
