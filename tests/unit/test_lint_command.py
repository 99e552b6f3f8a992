# SPDX-License-Identifier: Apache-2.0
"""`isthmus lint` and the lint table of a report."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from isthmus.bundle import Bundle
from isthmus.cli import app
from isthmus.errors import IsthmusError
from isthmus.form_writer import FormWriter
from isthmus.lint_bundle import lint_bundle
from isthmus.pipeline import compile as compile_model
from isthmus.report_bundle import render_bundle


def compiled(folder: Path, *targets: str) -> Bundle:
    """A convolution of three channels, which int8 pads to four."""
    writer = FormWriter()
    image = writer.input("image", (1, 3, 8, 8), scale=2**-5)
    hidden = writer.conv(image, np.ones((4, 3, 3, 3), np.int8), 2**-6, np.zeros(4, np.int32), scale=2**-4, pads=(1, 1, 1, 1), activation="Relu")
    writer.output(writer.flatten(writer.global_average_pool(hidden, scale=2**-5)), "scores")
    writer.graph().save(folder / "small.onnx")
    return compile_model(folder / "small.onnx", targets=list(targets), output=folder / f"bundle-{targets[0]}")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return compiled(tmp_path_factory.mktemp("lint"), "jetson-orin-nano", "cpu")


def said(*words: str | Path) -> str:
    done = CliRunner().invoke(app, list(map(str, words)))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.stdout


def test_without_a_target_the_bundles_own_are_linted(bundle: Bundle) -> None:
    text = said("lint", bundle.root)
    assert "3 channels are padded to 4" in text
    assert "predicted for jetson-orin-nano from the graph: 6,912 of 6,912 MACs (100.0 %) in int8, 1 of 1 layers, 0 reformats" in text
    assert "cpu" not in text


def test_any_board_of_a_target_with_a_linter_may_be_named(bundle: Bundle) -> None:
    data = json.loads(said("lint", bundle.root, "--target", "jetson-nano", "-t", "jetson-orin-nx-16gb", "--json"))
    assert {name: entry["totals"]["int8_macs"] for name, entry in data.items()} == {"jetson-nano": 0, "jetson-orin-nx-16gb": 6912}
    assert data["jetson-nano"]["rows"][0]["why"] == "NVIDIA Jetson Nano 4GB has no int8"
    assert data["jetson-nano"]["rows"][0]["runs"] == "float"


def test_a_target_without_a_linter_and_a_bundle_without_one_are_told(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(IsthmusError, match=r"cpu: target cpu has no linter"):
        said("lint", bundle.root, "-t", "cpu")
    with pytest.raises(IsthmusError, match=r"unknown profile 'jetson-orin'"):
        said("lint", bundle.root, "-t", "jetson-orin")
    other = compiled(tmp_path, "null")
    with pytest.raises(IsthmusError, match=r"no artifact of it is for a target with a linter; name a board"):
        said("lint", other.root)
    assert lint_bundle(other) == {}
    assert 'id="lint"' not in render_bundle(other)


def test_the_report_of_a_bundle_with_a_jetson_artifact_has_the_table(bundle: Bundle) -> None:
    page = (bundle.root / "reports" / "report.html").read_text(encoding="utf-8")
    text = re.sub(r"<[^>]+>", " ", page)
    assert page.count("lint-table") == 1
    assert "3 channels are padded to 4" in text
    assert re.search(r"jetson-orin-nano: \S+ of \S+ MACs \(100 %\) in int8, 1 of 1 layers", text)
