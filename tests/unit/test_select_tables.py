# SPDX-License-Identifier: Apache-2.0
"""Tables that nobody vouches for, the page, and the command `isthmus select`."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from isthmus import cli
from isthmus.candidates import MAX_ROWS, MAX_TABLE_BYTES, candidates_of, read_table
from isthmus.errors import IsthmusError
from isthmus.report.selection import render_selection
from isthmus.select import select

ROOT = Path(__file__).parents[2]
PAPER = ROOT / "benchmarks" / "data" / "medmnist_ensembles.csv"
CSV = "name,kind,wS,wP,BA,AUC,size_mb,flops_m,time_s\na,CNN,0.9,0.9,0.9,0.9,9,300,9\nb,CNN,0.8,0.8,0.8,0.8,3,100,4\n"


def write(folder: Path, text: str | bytes, suffix: str = ".csv") -> Path:
    file = folder / f"table{suffix}"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


# ---- reading
def test_csv_and_json_say_the_same(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, "# a remark\n\n" + CSV))
    assert (table.metrics, table.costs) == (("wS", "wP", "BA", "AUC"), ("size_mb", "flops_m", "time_s"))
    heading, *lines = CSV.splitlines()
    rows = [dict(zip(heading.split(","), line.split(","), strict=True)) for line in lines]
    numbers = [{key: value if key in ("name", "kind") else float(value) for key, value in row.items()} for row in rows]
    assert read_table(write(tmp_path, json.dumps(rows), ".json")) == read_table(write(tmp_path, json.dumps(numbers), ".json")) == table


def test_the_papers_table() -> None:
    table = read_table(PAPER)
    assert {name: len(rows) for name, rows in table.datasets.items()} == {"Path": 38, "OrganA": 42, "OCT": 35}
    path = table.datasets["Path"]
    assert len(candidates_of(path, include_singles=False)) == 22 and len(candidates_of(path, include_singles=True)) == 38
    hybrid = next(row for row in path if row.name == "MobNetV2_MobV3_C2_D2")
    assert hybrid.members == ("MobileNetV2", "MobileNetV3", "C2", "D2") and hybrid.rank == 2
    assert all(row.rank is None for row in table.datasets["OCT"])


def test_singles_are_candidates_where_there_is_nothing_else(tmp_path: Path) -> None:
    rows = read_table(write(tmp_path, CSV)).datasets[""]
    assert len(candidates_of(rows, include_singles=False)) == 2


HEAD = "name,kind,wS,wP,BA,AUC,size_mb,flops_m,time_s\n"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "empty; the first line names the columns"),
        (HEAD, "no rows"),
        ("name,wS\na,0.5\n", r"columns wS: a table needs a metric and a cost \(costs: .*size_mb"),
        (HEAD + "a,CNN,0.9\n", "line 2 has 3 cells, expected 9"),
        (HEAD + "a,CNN,good,0.9,0.9,0.9,9,300,9\n", "row 2, column wS: expected a finite number, found 'good'"),
        (HEAD + "a,CNN,nan,0.9,0.9,0.9,9,300,9\n", "row 2, column wS: expected a finite number, found 'nan'"),
        (HEAD + "a,CNN,0.9,0.9,0.9,0.9,1e999,300,9\n", "row 2, column size_mb: expected a finite number"),
        (HEAD + "a,CNN,0.9,0.9,0.9,0.9,-9,300,9\n", r"row 2, column size_mb: a cost below 0 \(-9\)"),
        (HEAD + ",CNN,0.9,0.9,0.9,0.9,9,300,9\n", "row 2, column name: expected a text of at most 200 characters, found nothing"),
        (HEAD + "a" * 201 + ",CNN,0.9,0.9,0.9,0.9,9,300,9\n", "row 2, column name: expected a text of at most 200"),
        (HEAD + "a\x1b[31m,CNN,0.9,0.9,0.9,0.9,9,300,9\n", "row 2, column name: expected a text"),
        (CSV + "a,CNN,0.9,0.9,0.9,0.9,9,300,9\n", "'a' stands there twice"),
        ("name,wS,wS,size_mb\na,1,1,1\n", "column 'wS' stands twice"),
        ("name,wS,,size_mb\na,1,1,1\n", "column '' stands twice or has no name"),
        (HEAD + '"a,CNN,0.9\n', "line 2 is no CSV"),
        ("name,rank,wS,size_mb\na,1.5,0.5,1\n", "row 2, column rank: expected a whole number from 1, found '1.5'"),
        (b"name,wS\xff\xfe", "no UTF-8 text"),
    ],
)
def test_a_bad_csv_is_one_sentence(tmp_path: Path, text: str | bytes, sentence: str) -> None:
    with pytest.raises(IsthmusError, match=sentence) as caught:
        read_table(write(tmp_path, text))
    assert str(caught.value).startswith(str(tmp_path / "table.csv")) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("{}", "expected a list of objects"),
        ("[1]", "expected a list of objects"),
        ("[]", "no rows"),
        ('[{"name": 3, "wS": 0.5, "size_mb": 1}]', "row 1, column name: expected a text"),
        ('[{"name": "a", "wS": true, "size_mb": 1}]', "row 1, column wS: expected a finite number, found 'True'"),
        ('[{"name": "a", "wS": [1], "size_mb": 1}]', "row 1, column wS: expected a finite number"),
        ('[{"name": "a", "wS": NaN, "size_mb": 1}]', "row 1, column wS: expected a finite number"),
        ('[{"name": "a", "wS": 0.5, "size_mb": 1' + "0" * 400 + "}]", "row 1, column size_mb: expected a finite number"),
        ('[{"name": "a", "members": ["b"], "wS": 0.5, "size_mb": 1}]', "row 1, column members: expected a text"),
    ],
)
def test_a_bad_json_is_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(IsthmusError, match=sentence):
        read_table(write(tmp_path, text, ".json"))


def test_tables_have_an_end(tmp_path: Path) -> None:
    with pytest.raises(IsthmusError, match=f"bytes, a table ends at {MAX_TABLE_BYTES}"):
        read_table(write(tmp_path, b"#" * (MAX_TABLE_BYTES + 1)))
    with pytest.raises(IsthmusError, match=f"{MAX_ROWS + 1} rows, a table ends at {MAX_ROWS}"):
        read_table(write(tmp_path, "name,wS,size_mb\n" + "".join(f"n{i},1,1\n" for i in range(MAX_ROWS + 1))))
    with pytest.raises(IsthmusError, match=r"no such file; give a \.csv or \.json table, or bundles"):
        read_table(tmp_path / "none.csv")


@settings(max_examples=150)
@given(
    st.one_of(st.binary(max_size=200), st.lists(st.text("abc,\"'\n#\r+.1-nan", max_size=30), max_size=6).map(lambda lines: (HEAD + "\n".join(lines)).encode()))
)
def test_any_bytes_are_a_table_or_a_sentence(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("bytes")
    for suffix in (".csv", ".json"):
        try:
            table = read_table(write(folder, content, suffix))
        except IsthmusError as error:
            assert str(error)
        else:
            assert all(row.name and np.isfinite([*row.metrics.values(), *row.costs.values()]).all() for rows in table.datasets.values() for row in rows)


# ---- the command
def invoked(arguments: list[str]) -> str:
    result = CliRunner().invoke(cli.app, ["select", *arguments])
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.stdout


def refused(arguments: list[str]) -> str:
    result = CliRunner().invoke(cli.app, ["select", *arguments])
    assert isinstance(result.exception, IsthmusError), result.output
    return str(result.exception)


def test_the_command_gives_the_papers_choice() -> None:
    found: dict[str, Any] = json.loads(invoked([str(PAPER), "--budget", "size_mb=34", "--json"]))
    assert {name: part["choice"] for name, part in found.items()} == {"Path": "MobNetV2_MobV3_C2_D2", "OrganA": "MobV2_C2", "OCT": "C2_D2"}
    assert [len(part["f"]["areas"]) for part in found.values()] == [7, 10, 9]
    assert [len(part["within"]["areas"]) for part in found.values()] == [5, 5, 7]
    text = invoked([str(PAPER), "--budget", "size_mb=34"])
    assert re.findall(r"choice: (\w+)", text) == ["MobNetV2_MobV3_C2_D2", "MobV2_C2", "C2_D2"]
    assert "as good within the tables' rounding: EffB0_Dense121_C4" in invoked([str(PAPER)])


def test_a_table_by_its_ending_in_capitals(tmp_path: Path) -> None:
    rows = [{"name": "a", "wS": 0.9, "wP": 0.9, "BA": 0.9, "AUC": 0.9, "size_mb": 9, "flops_m": 300, "time_s": 9}]
    assert "choice: a" in invoked([str(write(tmp_path, CSV, ".CSV"))]) and "choice: a" in invoked([str(write(tmp_path, json.dumps(rows), ".JSON"))])


def test_the_command_can_correct_sums_and_add_singles() -> None:
    corrected = json.loads(invoked([str(PAPER), "--budget", "size_mb=34", "--complexity", "parallel", "--json"]))
    assert set(corrected["OrganA"]["kinds"]["CNN"]["q"]) == {"C3_D3", "B3_C4"} and corrected["OrganA"]["within"]["best"]["CNN"] == "B3_C4"
    singles = json.loads(invoked([str(PAPER), "--include-singles", "--json"]))
    assert "D2" in singles["OCT"]["kinds"]["CNN"]["q"]
    serial = json.loads(invoked([str(PAPER), "--complexity", "serial", "--json"]))
    assert serial["Path"]["kinds"]["CNN"]["fronts"]["time_s"] != corrected["Path"]["kinds"]["CNN"]["fronts"]["time_s"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--budget", "34"], "--budget '34': expected NAME=VALUE"),
        (["--budget", "size_mb=small"], "--budget 'size_mb=small': expected NAME=NUMBER, such as size_mb=34"),
        (["--budget", "size_mb=-1"], "expected a number above 0"),
        (["--budget", "size_mb=nan"], "expected a number above 0"),
        (["--complexity", "both"], "--complexity 'both': expected table, parallel, serial"),
        (["--performance", "F2"], "has no metric 'F2'"),
        (["--costs", "energy"], "has no cost 'energy'"),
        (["--budget", "size_mb=1"], r"Path: no candidate fits the budget \(size_mb <= 1\)"),
        (["--budget", "size_mb=34", "--budget", "size_mb=20"], r"--budget 'size_mb=20': size_mb has a limit already \(34\)"),
        (["--metrics", "wS,BA,wS"], "--metrics 'wS,BA,wS': wS stands there twice"),
        (["--costs", "size_mb,size_mb"], "--costs 'size_mb,size_mb': size_mb stands there twice"),
        (["--ensembles", "2"], r"--ensembles makes ensembles of bundles; .*\.csv names its own in the column 'members'"),
        (["other.csv"], "give one table, or bundles, not both"),
    ],
)
def test_the_commands_mistakes(arguments: list[str], sentence: str) -> None:
    assert re.search(sentence, refused([str(PAPER), *arguments]))


# ---- the page
class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.charts: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "svg":
            self.charts.append(str(dict(attributes)["aria-label"]))


def test_the_page_draws_every_front_and_the_radars(tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    assert "page: " in invoked([str(PAPER), "--budget", "size_mb=34", "--output", str(file)])
    page = Page(file.read_text(encoding="utf-8"))
    assert len([chart for chart in page.charts if "wS against" in chart]) == 3 * 3 * 3
    radars = [chart for chart in page.charts if chart.startswith("Radar of the best")]
    assert len(radars) == 2 * 3 and "MobNetV2_MobV3_C2_D2 2.4875" in radars[0] and "2.4486" in radars[1]
    assert not {"script", "img", "iframe"} & set(page.tags)


def test_names_in_the_page_are_text(tmp_path: Path) -> None:
    hostile = CSV.replace("\na,", "\n<script>alert(1)</script>,")
    candidates = read_table(write(tmp_path, hostile)).datasets[""]
    text = render_selection("<b>", {"": (candidates, select(candidates))})
    assert "<script" not in text and "&lt;script&gt;" in text and "<b>" not in text
    assert "nan" not in " ".join(re.findall(r'(?:cx|cy|points|x1|y1)="([^"]*)"', text))


def test_a_single_candidate_can_be_drawn(tmp_path: Path) -> None:
    candidates = read_table(write(tmp_path, "\n".join(CSV.splitlines()[:2]) + "\n")).datasets[""]
    text = render_selection("one", {"": (candidates, select(candidates))})
    assert Page(text).charts and "nan" not in " ".join(re.findall(r'(?:cx|cy|points)="([^"]*)"', text))
