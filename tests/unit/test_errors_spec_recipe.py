# SPDX-License-Identifier: Apache-2.0
"""The small types of the core: errors, specs, sessions, recipes, profiles, plans, tools, targets."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from isthmus.errors import IsthmusError, Problem, ProblemsError, VerificationError
from isthmus.plan import BuildPlan, Step, execute, write_files
from isthmus.profile import load_profile, profile_names
from isthmus.recipe import SCHEMES, Recipe, load_recipe, recipe_names
from isthmus.session import Arrays, Session
from isthmus.spec import TensorSpec
from isthmus.target import Option, Target
from isthmus.tools import find_tool, tool_names

IMAGE = TensorSpec("image", (1, 4, 4, 3), "int8", "NHWC", 0.5, -1)
SCORE = TensorSpec("score", (1, 3, 4, 4), "int8", "NCHW", 0.5, -1)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


# ---- errors
def test_every_problem_is_shown_with_node_rule_found_and_fix() -> None:
    error = ProblemsError("model.onnx", [Problem("conv1", "opset", "opset 9", "export with opset 20"), Problem("add", "scale", "scale 0", "calibrate")])
    assert str(error) == "model.onnx: 2 problems\n  - conv1: opset 9 [opset]; export with opset 20\n  - add: scale 0 [scale]; calibrate"
    assert error.exit_code == 2
    assert VerificationError.exit_code == 1


def test_a_long_list_of_problems_is_cut_in_the_text_but_kept_in_the_error() -> None:
    error = ProblemsError("m", [Problem(f"n{i}", "r", "f", "x") for i in range(25)])
    assert str(error).endswith("... and 5 more")
    assert len(error.problems) == 25


# ---- spec
@given(scale=st.floats(2**-12, 2**6, width=32), zero_point=st.integers(-128, 127))
def test_every_int8_value_survives_dequantise_and_quantise(scale: float, zero_point: int) -> None:
    spec = TensorSpec("x", (256,), "int8", "", scale, zero_point)
    q = np.arange(-128, 128, dtype=np.int8)
    assert np.array_equal(spec.quantise(spec.dequantise(q)), q)


def test_quantise_rounds_half_to_even_and_saturates() -> None:
    spec = TensorSpec("x", (6,), "int8", "", 1.0, 0)
    assert spec.quantise(np.array([0.5, 1.5, 2.5, -0.5, 1e9, -1e9])).tolist() == [0, 2, 2, 0, 127, -128]


@given(st.integers(2, 4), st.randoms(use_true_random=False))
def test_layouts_go_to_the_form_and_back(rank: int, random: Any) -> None:
    letters = list({2: "NC", 3: "NCW", 4: "NCHW"}[rank])
    random.shuffle(letters)
    spec = TensorSpec("x", tuple(random.randint(1, 4) for _ in letters), "float32", "".join(letters))
    array = np.arange(spec.size, dtype=np.float32).reshape(spec.shape)
    assert spec.to_form(array).shape == spec.form_shape()
    assert np.array_equal(spec.from_form(spec.to_form(array)), array)


SHAPES = st.sampled_from([((), ""), ((0, 2**31), "NC"), ((1, 3, 8), "NWC"), ((1, 8, 8, 3), "NHWC"), ((2, 2, 2, 2, 2), "")])
QUANTISATIONS = st.none() | st.tuples(st.floats(1e-30, 1e30), st.integers(-128, 127))


@given(name=st.text(), shape=SHAPES, quantisation=QUANTISATIONS, axis=st.none() | st.integers(0, 3))
def test_a_spec_survives_json(name: str, shape: tuple[tuple[int, ...], str], quantisation: tuple[float, int] | None, axis: int | None) -> None:
    spec = TensorSpec(name, shape[0], "int8" if quantisation else "float32", shape[1], *(quantisation or (None, None)), axis)
    assert TensorSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@given(JSON | st.dictionaries(st.sampled_from(list(IMAGE.to_json())), JSON).map(lambda fields: IMAGE.to_json() | fields))
def test_any_json_is_a_spec_or_one_clear_error(data: Any) -> None:
    try:
        spec = TensorSpec.from_json(data)
    except IsthmusError as error:
        assert str(error).startswith("not the description of a tensor")
    else:
        assert TensorSpec.from_json(spec.to_json()) == spec
        assert spec.size >= 0
        assert spec.form_shape() is not None


# ---- session
class Transposing(Session):
    """A real, if small, engine: NHWC in, NCHW out."""

    engine = "transposing"

    def __init__(self) -> None:
        super().__init__((IMAGE,), (SCORE,))
        self.closed = 0

    def _run_raw(self, feeds: Arrays) -> dict[str, np.ndarray]:
        return {"score": feeds["image"].transpose(0, 3, 1, 2)}

    def _close(self) -> None:
        self.closed += 1


def test_a_session_takes_and_gives_the_form_layout_in_float() -> None:
    values = np.arange(48, dtype=np.float32).reshape(1, 3, 4, 4) / 2
    with Transposing() as session:
        assert np.array_equal(session.run({"image": values})["score"], values)
    session.close()
    assert session.closed == 1


def test_a_session_compares_raw_integers_in_the_form_layout() -> None:
    q = np.arange(-24, 24, dtype=np.int8).reshape(1, 3, 4, 4)
    assert np.array_equal(Transposing().run_quantised({"image": q})["score"], q)


GOOD = np.zeros((1, 3, 4, 4), np.float32)


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({}, r"input 'image' is missing: found \[\]"),
        ({"image": GOOD, "mask": GOOD}, r"unknown input 'mask': the model's inputs are \['image'\]"),
        ({"image": GOOD.transpose(0, 2, 3, 1)}, r"input 'image': expected shape \[1, 3, 4, 4\], found \[1, 4, 4, 3\]"),
        ({"image": GOOD.astype(str)}, r"input 'image': expected numbers, found dtype <U"),
        ({"image": np.full_like(GOOD, np.nan)}, r"input 'image' holds NaN or infinity"),
    ],
)
def test_a_session_names_what_is_wrong_with_a_feed(feeds: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(IsthmusError, match=message):
        Transposing().run(feeds)


@pytest.mark.parametrize(
    ("feeds", "message"),
    [({}, r"expected int8\[1, 3, 4, 4\], found nothing"), ({"image": GOOD}, r"expected int8\[1, 3, 4, 4\], found float32\[1, 3, 4, 4\]")],
)
def test_raw_runs_take_only_the_raw_type(feeds: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(IsthmusError, match=message):
        Transposing().run_quantised(feeds)


# ---- recipe
@given(
    st.builds(
        Recipe,
        name=st.text(max_size=20),
        scheme=st.sampled_from(SCHEMES),
        per_channel=st.booleans(),
        percentile=st.floats(51, 100),
        calibration_samples=st.integers(1, 10**6),
        qat_epochs=st.integers(0, 1000),
        qat_learning_rate=st.floats(1e-9, 10),
        seed=st.integers(0, 2**32),
    )
)
def test_a_recipe_survives_json(recipe: Recipe) -> None:
    assert Recipe.from_json(recipe.to_json()) == recipe


@given(
    st.text() | JSON.map(json.dumps) | st.dictionaries(st.sampled_from([*Recipe().__dict__, "schema", "x"]), JSON).map(lambda d: json.dumps({"schema": 1} | d))
)
def test_any_text_is_a_recipe_or_one_clear_error(text: str) -> None:
    try:
        assert isinstance(Recipe.from_json(text), Recipe)
    except IsthmusError as error:
        assert str(error).startswith("recipe")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schema": 2}, "schema 2, this version reads schema 1"),
        ({"schema": 1, "bits": 4}, "unknown field 'bits'; there are bias_correction, calibration_samples, "),
        ({"schema": 1, "per_channel": 1}, "field 'per_channel' expects bool, found 1"),
        ({"schema": 1, "seed": True}, "field 'seed' expects int, found True"),
        ({"schema": 1, "scheme": "log"}, "scheme 'log' is not one of power_of_two, symmetric, asymmetric"),
        ({"schema": 1, "observer": "best"}, "observer 'best' is not one of minmax, percentile, mse"),
        ({"schema": 1, "percentile": 5}, "percentile 5 is not between 50 and 100"),
        ({"schema": 1, "calibration_samples": 0}, "calibration_samples must be at least 1"),
    ],
)
def test_a_recipe_names_the_wrong_field(fields: dict[str, object], message: str) -> None:
    with pytest.raises(IsthmusError, match=message):
        Recipe.from_dict(fields, "recipe r")


def test_every_recipe_that_ships_loads() -> None:
    assert "portable" in recipe_names()
    assert {load_recipe(name).name for name in recipe_names()} == set(recipe_names())


def test_a_recipe_is_also_read_from_a_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('schema = 1\nname = "mine"\nseed = 7\n')
    assert load_recipe(str(path)) == Recipe(name="mine", seed=7)
    path.write_text("schema = \n")
    with pytest.raises(IsthmusError, match=r"mine\.toml: not valid TOML"):
        load_recipe(str(path))
    with pytest.raises(IsthmusError, match=r"unknown recipe 'portabel': there are .*portable"):
        load_recipe("portabel")


# ---- profile
def test_every_profile_that_ships_loads_and_gives_a_source_for_each_figure() -> None:
    assert {"cpu", "rpi5", "jetson-orin-nano", "pynq-z2"} <= set(profile_names())
    for name in profile_names():
        profile = load_profile(name)
        assert profile.board
        assert set(profile.facts) <= set(profile.sources)


def test_an_unknown_profile_lists_the_near_ones() -> None:
    with pytest.raises(IsthmusError, match=r"unknown profile 'jetson-orin-nan': did you mean jetson-orin-nano"):
        load_profile("jetson-orin-nan")
    with pytest.raises(IsthmusError, match=r"unknown profile '../../x': there are .*cpu"):
        load_profile("../../x")


@pytest.fixture
def profile_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Writes the text as the only profile there is, called "mine"."""
    monkeypatch.setattr("isthmus.profile.resources.files", lambda package: tmp_path)
    (tmp_path / "profiles").mkdir()

    def write(text: str) -> None:
        (tmp_path / "profiles" / "mine.toml").write_text(text)

    return write


HEAD = 'board = "B"\ntarget = "cpu"\narch = "x86_64"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('board = "B"\n', r"profile mine: unknown keys \[\], missing keys \['arch', 'target'\]"),
        (HEAD + "speed = 3\n", r"profile mine: unknown keys \['speed'\]"),
        (HEAD + "[facts]\nclock_hz = 1\n", r"profile mine: facts without a source: \['clock_hz'\]"),
    ],
)
def test_a_profile_names_what_is_wrong(profile_file: Callable[[str], None], text: str, message: str) -> None:
    profile_file(text)
    with pytest.raises(IsthmusError, match=message):
        load_profile("mine")


# ---- target
def test_options_are_completed_and_converted() -> None:
    target = Target("t", frozenset(), options={"reuse": Option(1, ""), "strip": Option(False, ""), "part": Option("xc7", "")})
    assert target.with_defaults({"reuse": "4", "strip": "true"}) == {"reuse": 4, "strip": True, "part": "xc7"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reus": 1}, r"target t has no option 'reus': it has \['reuse'\]"),
        ({"reuse": "many"}, "option reuse of target t: expected int, found 'many'"),
        ({"reuse": 3.7}, "option reuse of target t: expected int, found 3.7"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(IsthmusError, match=message):
        Target("t", frozenset(), options={"reuse": Option(1, "")}).with_defaults(options)


# ---- plan
def python_step(code: str, **fields: Any) -> Step:
    return Step("work", ("{python}", "-c", code), "python", **({"outputs": ()} | fields))


PLAN = BuildPlan({"a/in.txt": b"hello"}, (), "a/in.txt", "null", (IMAGE,), (SCORE,))


def test_a_plan_writes_its_files_runs_its_steps_and_keeps_the_log(tmp_path: Path) -> None:
    copy = python_step("import pathlib; pathlib.Path('out').write_bytes(pathlib.Path('a/in.txt').read_bytes()); print('copied 5 bytes')", outputs=("out",))
    (result,) = execute(replace(PLAN, steps=(copy,)), tmp_path)
    assert (tmp_path / "out").read_bytes() == b"hello"
    assert (result.status, result.detail, result.tool_version) == ("done", "copied 5 bytes", sys.version.split()[0])
    assert (tmp_path / "logs" / "work.log").read_text() == "copied 5 bytes\n"


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (python_step("print('no such part'); raise SystemExit(3)"), r"step work \(.*\) ended with code 3:\nno such part"),
        (python_step("print('done')", outputs=("model.bin",)), r"step work ended well but did not make model\.bin"),
        (python_step("import time; time.sleep(30)", timeout_s=1), r"step work did not end within 1 s; its log is .*work\.log"),
        (Step("work", ("./absent",), "python", ()), r"step work: \./absent could not be started: No such file"),
    ],
)
def test_a_step_that_fails_names_itself_and_shows_its_log(step: Step, message: str, tmp_path: Path) -> None:
    with pytest.raises(IsthmusError, match=message):
        execute(replace(PLAN, steps=(step,)), tmp_path)


@pytest.mark.parametrize(("where", "said"), [("board", "runs on the board"), ("toolhost", "runs where python is")])
def test_a_step_for_elsewhere_is_planned_and_not_run(where: str, said: str, tmp_path: Path) -> None:
    (result,) = execute(replace(PLAN, steps=(python_step("open('ran', 'w')", where=where),)), tmp_path)
    assert (result.status, result.detail) == ("planned", said)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["../out", "a/../../out", "/tmp/out"])
def test_a_plan_writes_nothing_outside_its_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(IsthmusError, match="lies outside its folder"):
        write_files(replace(PLAN, files={name: b""}), tmp_path / "inner")


def test_a_digest_follows_everything_that_makes_the_artifact() -> None:
    changed = [
        replace(PLAN, files={"a/in.txt": b"hallo"}),
        replace(PLAN, steps=(python_step("pass"),)),
        replace(PLAN, engine="csim"),
        replace(PLAN, inputs=(replace(IMAGE, scale=0.25),)),
        replace(PLAN, options={"reuse": 2}),
    ]
    assert len({plan.digest() for plan in (PLAN, *changed)}) == 6
    assert replace(PLAN, notes=("said",)).digest() == PLAN.digest()


# ---- tools
@pytest.fixture
def fresh_tools() -> Iterator[None]:
    find_tool.cache_clear()
    yield
    find_tool.cache_clear()


def test_every_tool_is_found_or_says_what_brings_it() -> None:
    for tool in map(find_tool, tool_names()):
        assert tool.version if tool.found else tool.fix
        assert tool.purpose


@pytest.mark.usefixtures("fresh_tools")
def test_a_missing_tool_skips_an_optional_step_and_stops_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    step = Step("synthesis", ("vitis_hls",), "vitis_hls", (), optional=True)
    (result,) = execute(replace(PLAN, steps=(step,)), tmp_path)
    assert result.status == "skipped"
    assert "ISTHMUS_VITIS_HLS" in result.detail
    with pytest.raises(IsthmusError, match=r"step synthesis needs vitis_hls, which is not here: install AMD Vitis"):
        execute(replace(PLAN, steps=(replace(step, optional=False),)), tmp_path)


@pytest.mark.usefixtures("fresh_tools")
def test_a_tool_that_does_not_start_is_not_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "g++"
    broken.write_bytes(b"not a program")
    broken.chmod(0o755)
    monkeypatch.setenv("ISTHMUS_GPP", str(broken))
    assert not find_tool("g++").found
    assert "does not start" in find_tool("g++").fix
