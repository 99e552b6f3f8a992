# SPDX-License-Identifier: Apache-2.0
"""The report in a real browser: nothing on its console, everything in its document, and no wider than a phone."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from isthmus.bench import NullSession, Rules, measure_interleaved
from isthmus.cost import cost_of_graph
from isthmus.form_writer import FormWriter
from isthmus.recipe import Recipe
from isthmus.report import layers_of, render

# Also without a network: what a page asks for must fail, not wait. Chromium's own services are switched off for the same reason.
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--enable-logging=stderr",
    "--v=0",
]
CONSOLE = re.compile(r":CONSOLE[:(\]]")


@pytest.fixture(scope="module")
def report() -> str:
    """A real graph, its real cost, real samples of two sessions; the third artifact waits for its board."""
    w = FormWriter(recipe=Recipe())
    x = w.input("image", (1, 1, 8, 8), scale=2**-6)
    x = w.conv(x, np.ones((4, 1, 3, 3), np.int8), 2**-5, np.zeros(4, np.int32), scale=2**-3, activation="Relu", name="first")
    x = w.gemm(w.flatten(w.global_average_pool(x, scale=2**-3)), np.ones((3, 4), np.int8), 2**-5, scale=2**-2, name="last")
    w.output(x, "logits")
    graph = w.graph()
    check = {"tensor": "logits", "kind": "int8", "compared": 600, "mismatched": 0, "max_lsb": 0, "max_abs": 0.0, "passed": True}
    entry = {"artifact": "model.bin", "size_bytes": 9216, "engine": "null", "options": {"depth": 3}, "notes": ["a note"], "steps": [], "accuracy": 0.975}
    step = {"name": "engine", "status": "planned", "tool": "tensorrt", "tool_version": "", "seconds": 0.0, "detail": "runs on the board"}
    manifest = {
        "name": "digits <script>alert(1)</script>",
        "created": "2026-11-22T20:00:00+00:00",
        "isthmus": "0.1.0",
        "graph": {
            "digest": graph.digest,
            "scheme": "power_of_two",
            "inputs": [s.to_json() for s in graph.inputs],
            "outputs": [s.to_json() for s in graph.outputs],
        },
        "recipe": {"name": "portable"},
        "tools": {"python": "3.11"},
        "task": {"metric": "top-1 accuracy", "float": 0.98, "reference": 0.975, "samples": 360},
        "artifacts": {
            "cpu": {**entry, "target": "cpu", "runs_here": True, "verification": [check]},
            "rpi5": {**entry, "target": "tflite", "runs_here": True, "verification": [check]},
            "jetson": {**entry, "target": "jetson", "runs_here": False, "verification": [], "accuracy": None, "steps": [step]},
        },
        "files": {"model.onnx": "ab" * 32},
    }
    measurements = measure_interleaved({"cpu": (NullSession(), {}), "rpi5": (NullSession(), {})}, Rules(min_duration_s=0.001))
    return render(manifest, measurements, cost_of_graph(graph), layers_of(graph), logs={"jetson": {"engine": "nothing yet"}})


@pytest.fixture
def browse(require, tmp_path):
    """`browse(html, *flags)` opens a page in Chromium; gives its document and the lines on its console."""
    chromium = require("chromium")

    def opened(html: str, *flags: str) -> tuple[str, list[str]]:
        page = tmp_path / "report.html"
        page.write_text(html, encoding="utf-8")
        profile = tmp_path / "profile"
        argv = [chromium, *FLAGS, *flags, f"--user-data-dir={profile}", "--dump-dom", page.as_uri()]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "</html>" in done.stdout, done.stderr[-2000:]
        return done.stdout, [line for line in done.stderr.splitlines() if CONSOLE.search(line)]

    return opened


def test_console_is_watched(browse):
    """The check itself: a page with a script error and a blocked style is noticed."""
    _, console = browse("<html><body><script>undefinedFunction()</script></body></html>")
    assert any("undefinedFunction is not defined" in line for line in console)
    policy = "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'\">"
    _, console = browse(f"<html><head>{policy}</head><body style='color:red'></body></html>")
    assert any("Content Security Policy" in line for line in console)


def test_opens_without_a_word_on_the_console(browse, report):
    document, console = browse(report)
    assert console == []
    for table in ("artifact-comparison", "layers-table", "build-steps", "verification-table", "latency-cpu"):
        assert f'<table id="{table}"' in document
    for profile in ("cpu", "rpi5"):
        assert f"Latency histogram of {profile}:" in document
    assert document.count("<svg") >= 5
    assert "needs the board" in document
    assert "<script" not in document
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in document


def test_no_wider_than_a_phone(browse, report, tmp_path):
    """A frame of 390 pixels, measured from outside: the page itself does not scroll sideways, only its tables do."""
    (tmp_path / "inner.html").write_text(report, encoding="utf-8")
    # Frames of files count as foreign to each other unless this is allowed.
    outer = (
        "<html><body><iframe src='inner.html' width=390 height=800></iframe><p id=result></p><script>"
        "onload = () => { const page = document.querySelector('iframe').contentDocument.documentElement;"
        "document.querySelector('#result').textContent = `client ${page.clientWidth} scroll ${page.scrollWidth}`; }"
        "</script></body></html>"
    )
    document, console = browse(outer, "--allow-file-access-from-files")
    assert console == []
    client, scroll = map(int, re.search(r"client (\d+) scroll (\d+)", document).groups())
    assert client > 300
    assert scroll <= client


def test_it_is_drawn(browse, report, tmp_path):
    """A picture in both colour schemes: not blank, and not the same."""
    pictures = []
    for scheme in ("0", "1"):
        picture = Path(tmp_path / f"picture-{scheme}.png")
        browse(report, f"--screenshot={picture}", "--window-size=1280,2400", f"--blink-settings=preferredColorScheme={scheme}")
        pictures.append(picture)
    from PIL import Image

    dark, light = (np.asarray(Image.open(picture).convert("L")) for picture in pictures)
    assert dark.shape == light.shape == (2400, 1280)
    assert dark.mean() < 100 < 180 < light.mean()
    assert min(dark.std(), light.std()) > 8
