# SPDX-License-Identifier: Apache-2.0
"""What the documents say is so: commands exist, links lead somewhere, the table of rules is the table of rules."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.main import get_command

from isthmus.cli import app
from isthmus.form import RULES

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def test_every_command_in_the_documents_exists_and_every_command_is_in_the_readme() -> None:
    commands = set(get_command(app).commands)  # type: ignore[attr-defined]  # a group, as it has several commands
    named = {(path.name, word) for path in DOCUMENTS for word in re.findall(r"(?:`|^|bin/)isthmus ([a-z]+)", path.read_text(encoding="utf-8"), re.MULTILINE)}
    assert {word for _, word in named} <= commands
    assert commands <= {word for file, word in named if file == "README.md"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_relative_link_leads_to_a_file(document: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text(encoding="utf-8"))
    assert [link for link in links if not (document.parent / link).exists()] == []


def test_the_documented_rules_are_the_rules_of_the_form() -> None:
    rows = re.findall(r"^\| `([a-z0-9-]+)` \| (.*) \|$", (ROOT / "docs" / "form.md").read_text(encoding="utf-8").partition("## Rules")[2], re.MULTILINE)
    assert dict(rows) == RULES


def test_every_folder_in_the_readme_exists() -> None:
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Folders")[2].partition("Each root folder")[0]
    folders = re.findall(r"`([a-z]+)/`", "\n".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `")))
    assert len(folders) >= 6
    assert [folder for folder in folders if not (ROOT / folder).is_dir()] == []
