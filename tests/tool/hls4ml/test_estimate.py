# SPDX-License-Identifier: Apache-2.0
"""The estimate against published reports, each network estimated without itself; the search; what is said where nothing fits."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from isthmus.cli import app
from isthmus.errors import IsthmusError, ProblemsError
from isthmus.form_writer import FormWriter
from isthmus.graph import QuantGraph
from isthmus.profile import load_profile
from isthmus.recipe import Recipe
from isthmus.targets.hls4ml import TARGET, search, simulation
from isthmus.targets.hls4ml.calibration import Work, published, weight_memory
from isthmus.targets.hls4ml.constants import products_of, signed_digits
from isthmus.targets.hls4ml.design import layers_of
from isthmus.targets.hls4ml.estimate import budget, left_out, of_published, wanted_of
from isthmus.targets.hls4ml.folding import reuse_factors
from isthmus.targets.hls4ml.lower import lower
from isthmus.targets.hls4ml.reports import read_report, replaced

FLOOR = {"dsp": 0.30, "latency_cycles": 0.30, "lut": 0.50}  # median error


def _network(blocks: tuple[tuple[int, ...], ...], side: int = 28) -> QuantGraph:
    """Blocks of 3x3 convolutions, each with a pool behind it; an average; a layer: the FPGA presets of the zoo's medmnist."""
    generator = np.random.default_rng(0)
    writer = FormWriter(recipe=Recipe())
    y, channels = writer.input("image", (1, 1, side, side), scale=2**-4), 1
    for block in blocks:
        for filters in block:
            weight = np.clip(np.rint(generator.normal(0, 30, (filters, channels, 3, 3))), -127, 127).astype(np.int8)
            y = writer.conv(y, weight, 2**-7, generator.integers(-900, 900, filters).astype(np.int32), scale=2**-3, activation="Relu", pads=(1, 1, 1, 1))
            channels = filters
        y = writer.max_pool(y, kernel=(2, 2), strides=(2, 2))
    y = writer.flatten(writer.global_average_pool(y, scale=2**-4))
    writer.output(writer.gemm(y, generator.integers(-90, 90, (11, channels)).astype(np.int8), 2**-7, np.arange(11, dtype=np.int32), scale=2**-1), "logits")
    return writer.graph()


@pytest.fixture(scope="module")
def quarter() -> QuantGraph:
    """C2/4-GAP: 4,387 parameters."""
    return _network(((8, 8), (16, 16)))


def test_the_published_designs_are_met_by_factors_fitted_without_them() -> None:
    errors: dict[str, list[float]] = {name: [] for name in FLOOR}
    factors = {design.network: left_out(design) for design in published()}
    none_there = none_found = 0
    for design in published():
        estimated, wanted = of_published(design, factors[design.network]), wanted_of(design)
        none_there += wanted["dsp"] == 0
        none_found += wanted["dsp"] == 0 and estimated["dsp"] < 0.5
        for name in FLOOR:
            if wanted.get(name):
                errors[name].append(abs(estimated[name] - wanted[name]) / wanted[name])
    assert none_found == none_there > 10
    for name, floor in FLOOR.items():
        assert len(errors[name]) > 25 and np.median(errors[name]) <= floor, (name, np.median(errors[name]))


def test_every_published_design_names_its_source() -> None:
    for design in published():
        assert len(design.commit) == 40 and design.repository.count("/") == 1 and design.document.endswith(".rpt") and design.layers
    assert len({design.network for design in published()}) > 12


@given(st.lists(st.integers(-4000, 4000), min_size=1, max_size=20))
def test_signed_digits_are_the_fewest(values: list[int]) -> None:
    for value, count in zip(values, signed_digits(np.array(values)), strict=True):
        left, digits = abs(value), 0
        while left:
            if left & 1:
                left -= 2 - left % 4
                digits += 1
            left >>= 1
        assert digits == count


def test_products_by_constants_are_counted_as_hls_shares_them() -> None:
    # of one term: 7 = 8 - 1 an addition, 11 and 13 (three digits) a multiplier each, -11 another, 4 a shift, 11 shared
    assert products_of(np.array([[7, 11, 13, -11, 4, 11, 0]])) == (3, 1)
    assert products_of(np.array([[11], [11]])) == (2, 0)


def test_weight_memory_is_as_wide_as_the_multipliers_are_many() -> None:
    work = Work("conv", 11, 64, 16, terms=288, weight_bits=16, strategy="resource", reuse=16)
    assert weight_memory(work) == 512  # the neutrino network's report says so of 1152 multipliers
    assert weight_memory(replace(work, strategy="latency", reuse=1)) == 0


@pytest.mark.parametrize("board", ["pynq-z2", "kv260", "zcu104"])
def test_the_search_finds_a_configuration_that_fits(quarter: QuantGraph, board: str) -> None:
    profile = load_profile(board)
    layers = layers_of(lower(quarter, "io_stream"), "io_stream")
    found = search.found(layers, profile, "io_stream", float(profile.defaults["clock_ns"]), search.Goal())
    assert found.estimate.fits and found.estimate.source == "estimated" and set(found.choices) == {layer.name for layer in layers if layer.product}
    products = {layer.name: layer.product for layer in layers if layer.product}
    for name, choice in found.choices.items():
        assert choice["ReuseFactor"] in reuse_factors(products[name]) and choice["ReuseFactor"] <= products[name].terms
        assert products[name].products // choice["ReuseFactor"] <= 4096
    low, high = found.estimate.intervals["lut"]
    assert low < found.estimate.totals["lut"] < high


def test_bounds_ask_for_the_smallest_that_is_fast_enough(quarter: QuantGraph) -> None:
    profile = load_profile("kv260")
    layers = layers_of(lower(quarter, "io_stream"), "io_stream")
    front = search.front(layers, profile, "io_stream", 5.0)
    cycles, shares = [one.estimate.latency_cycles for one in front], [one.share for one in front]
    assert len(front) > 5 and cycles == sorted(cycles) and shares == sorted(shares, reverse=True)
    fastest = search.chosen(front, search.Goal(), profile)
    bounded = search.chosen(front, search.Goal(max_latency_us=4 * fastest.estimate.latency_us), profile)
    assert bounded.estimate.latency_us <= 4 * fastest.estimate.latency_us and bounded.share < fastest.share
    quick = search.chosen(front, search.Goal(min_fps=fastest.estimate.frames_a_second / 3), profile)
    assert quick.estimate.frames_a_second >= fastest.estimate.frames_a_second / 3 and quick.share <= fastest.share
    with pytest.raises(ProblemsError, match=r"the fastest in io_stream that fits AMD Kria KV260 is estimated at .* us.*not 0\.1 us \[too-slow\]; ask for less"):
        search.chosen(front, search.Goal(max_latency_us=0.1), profile)


def test_what_cannot_fit_says_what_fails_by_how_much_and_what_would() -> None:
    graph, profile = _network(((64, 64), (128, 128)), side=12), load_profile("pynq-z2")
    plan = TARGET.plan(graph, profile, {**profile.defaults})
    (note,) = [note for note in plan.notes if "too-large" in note]
    assert "with the largest reuse factors, is estimated not to fit PYNQ-Z2: LUT: " in note and "% of the channels" in note and "alveo-u250" in note
    assert json.loads(plan.files[simulation.ESTIMATE_FILE])["fits"] is False
    with pytest.raises(ProblemsError, match=r"LUT: \d+ of 53200 \(\d+ % too many\).*\[too-large\]"):
        TARGET.plan(graph, profile, {**profile.defaults, "min_fps": 1.0})


def test_the_plan_carries_the_estimate_and_the_front(hls: Any) -> None:
    graph = hls.classifier()
    plan = hls.plan(graph, pareto=True)
    said = json.loads(plan.files[simulation.ESTIMATE_FILE])
    assert said["source"] == "estimated" and said["fits"] and said["memory_fits"] and said["paper_rule"]
    assert any(note.startswith("front 1, estimated: ") for note in plan.notes)
    shown = TARGET.estimate(graph, hls.profile, {"pareto": True})
    assert shown[0].word == "estimated" and shown[0].latency_s is not None and shown[0].latency_s[0] <= shown[0].latency_s[1] <= shown[0].latency_s[2]
    fixed = hls.plan(graph, strategy="resource", reuse_factor=3)
    assert {layer["ReuseFactor"] for layer in json.loads(fixed.files[simulation.CONFIG_FILE])["layers"].values() if "ReuseFactor" in layer} <= {3, 4}
    assert any("does not divide the terms of every layer" in note for note in fixed.notes)


def test_the_command_shows_the_layers_the_front_and_mistakes(tmp_path: Path) -> None:
    _network(((4, 4),), side=8).save(tmp_path / "form.onnx")

    def said(*words: str) -> str:
        done = CliRunner().invoke(app, ["cost", str(tmp_path / "form.onnx"), *words])
        return done.stdout if done.exception is None else str(done.exception)

    on = ("--on", "pynq-z2", "--set", "io_type=io_stream")
    (shown,) = json.loads(said(*on, "--json"))["on"]["pynq-z2"]
    folded = [layer for layer in shown["layers"] if layer["strategy"]]
    assert len(folded) == 3 and max(layer["interval_cycles"] for layer in shown["layers"]) == shown["resources"]["interval_cycles"]
    assert sum(layer["lut"] for layer in shown["layers"]) == pytest.approx(shown["resources"]["lut"], rel=0.1)  # fifos are nobody's
    text = said(*on, "--layers", "--set", "max_latency_us=500")
    assert re.search(r"conv +resource +\d+ ", text) and "estimated:" in text and "LUT 0.71 to 1.29" in text
    front = [line for line in said(*on, "--set", "pareto=true").splitlines() if line.startswith("pynq-z2 ")]
    cycles = [int(line.split(" latency_cycles")[0].split()[-1].replace(",", "")) for line in front]
    assert len(front) > 5 and cycles == sorted(cycles)
    assert "option 'latency' is known to none of the targets: there are" in said(*on, "--set", "latency=3")
    assert "name a board with --on" in said("--set", "pareto=true")


def test_a_global_mean_of_a_stream_is_one_sum_a_channel(quarter: QuantGraph) -> None:
    (mean,) = [layer for layer in layers_of(lower(quarter, "io_stream"), "io_stream") if "global" in layer.name]
    assert (mean.work.pixels, mean.work.filters, mean.work.terms, mean.work.in_bits) == (49, 16, 2, 8 + 6)
    assert mean.stage.tokens_out == 1 and mean.stage.kernel == mean.stage.grid == (7, 7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"strategy": "resource", "reuse_factor": 1000},
            "reuse_factor of target hls4ml: 1000 divides the terms of no layer; these divide at least one: 1, 2, 3, ",
        ),
        ({"reuse_factor": 3, "min_fps": 10.0}, "belong to the search, which an explicit strategy or reuse_factor switches off"),
        ({"max_latency_us": -1.0}, "max_latency_us of target hls4ml: -1.0 is not a number from 0 on"),
    ],
)
def test_bad_folding_options(hls: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(IsthmusError, match=message):
        hls.plan(hls.classifier(), **options)


def test_a_tools_report_replaces_the_estimate(hls: Any) -> None:
    said = json.loads(hls.plan(hls.classifier()).files[simulation.ESTIMATE_FILE])
    reports = [read_report(Path(__file__).parent / "reports" / name) for name in ("vitis_2021.1_csynth.rpt", "vivado_2019.2_timing.rpt")]
    found = replaced(said, reports)
    assert (said["source"], found["source"], found["lut"], found["latency_cycles"], found["latency_us"]) == ("estimated", "c-synthesis", 4824, 18, 0.18)
    assert said["intervals"] and found["intervals"] == {} and found["fits"]
    later = replaced(found, [read_report(Path(__file__).parent / "reports" / "vivado_2019.2_utilisation.rpt")])
    assert (later["source"], later["lut"], later["latency_cycles"]) == ("utilisation", 17192, 18)


def test_the_budget_of_the_paper(quarter: QuantGraph) -> None:
    said = budget(quarter, load_profile("pynq-z2"))
    parameters = 4387 - 2 * (8 + 16)  # the batch normalisations are folded
    assert said["memory_fits"] and said["paper_rule"] and said["fp32_mb"] == pytest.approx(4 * parameters / 2**20)
    assert said["needed_bytes"] >= parameters + 28 * 28 * 8
    assert not budget(quarter, replace(load_profile("pynq-z2"), facts={"on_chip_bytes": 4000}))["memory_fits"]
    with pytest.raises(IsthmusError, match=r"needs facts\.on_chip_bytes"):
        budget(quarter, replace(load_profile("pynq-z2"), facts={}))
