# SPDX-License-Identifier: Apache-2.0
"""`isthmus zoo show` and `zoo train`, as a newcomer types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


def test_a_system_is_shown(command):
    code, out, _ = command("zoo", "show", "mobilenet_small@pneumonia", "--json")
    shown = json.loads(out)
    assert code == 0
    assert {row["preset"]: row["parameters"] for row in shown["presets"]}["pneumonia"] == 35_186
    code, out, _ = command("zoo", "show", "mobilenet_small@ci")
    assert code == 0 and "310,000" in out and "pneumonia" not in out.splitlines()[-1]


def test_a_training_goes_on_from_its_checkpoint(command, tmp_path: Path):
    code, out, err = command("zoo", "train", "mobilenet_small@ci", "-o", tmp_path / "training", "--json")
    first = json.loads(out)
    assert code == 0 and Path(first["checkpoint"]).is_file(), err
    code, out, _ = command("zoo", "train", "mobilenet_small@ci", "-o", tmp_path / "training", "--json")
    assert code == 0 and json.loads(out)["metrics"] == first["metrics"]
    code, _, err = command("zoo", "train", "mobilenet_small@ci", "-o", tmp_path / "training", "--seed", 1)
    assert code == 2 and "checkpoint" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("zoo", "show", "nothing"), "unknown zoo system 'nothing'"),
        (("zoo", "train", "mobilenet_small@nothing"), "unknown preset of mobilenet_small 'nothing'"),
        (("zoo", "train", "amfacpose"), "holds the architecture alone"),
        (("zoo", "train", "mobilenet_small@pneumonia", "--data-root", "nowhere"), "nowhere"),
    ],
)
def test_mistakes_get_one_sentence(command, tmp_path: Path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = command(*words)
    assert (code, out) == (2, "") and message in err
