# SPDX-License-Identifier: Apache-2.0
"""Which engines are built from which ONNX files, for one board: the files, and `engines.json`, which the build script on the board reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from isthmus.graph import QuantGraph
from isthmus.plan import Step
from isthmus.profile import Profile
from isthmus.targets.jetson.dialects import Dialect
from isthmus.targets.jetson.float_graph import beyond_fp16, float_onnx_from_graph, ranges_from_graph
from isthmus.targets.jetson.lower import onnx_from_graph

ARTIFACT = "model.onnx"  # int8, or float where the board has no int8
ENGINE = "model.engine"
FLOAT_ARTIFACT = "model_float.onnx"
FP16_ENGINE = "model_fp16.engine"
DLA_ARTIFACT = "model_dla.onnx"
DLA_ENGINE = "model_dla.engine"
DLA_RANGES = "model_dla.ranges.json"
PLAN = "engines.json"
SCRIPT = "build_engine.py"
# An engine without int8 rounds nothing where the form does: 4 steps in ONNX Runtime on the networks of tests/models. Values that saturate in int8 and
# not in float differ by more, and shall be seen.
FLOAT_STEPS = 8
# TensorRT's DLA reads QuantizeLinear from here on; before, int8 on a DLA wants a float graph and a range for each tensor.
DLA_READS_QUANTISERS = (11, 4)
# CUDA cores a multiprocessor has: 64 on Volta, 128 on Jetson's other generations, from Maxwell to Blackwell.
VOLTA, CORES_OF_VOLTA, CORES = 72, 64, 128


@dataclass(frozen=True)
class Engine:
    """One engine: what `build_engine.py` is told of it. `half`: what is not int8 may be float16; `ranges` names a file of largest values, for int8
    without quantisers; `max_lsb` is what it may differ from the reference, where that is not the artifact's own."""

    name: str
    model: str
    output: str
    precision: str
    half: bool
    ranges: str = ""
    dla: bool = False
    max_lsb: int | None = None

    @property
    def step(self) -> Step:
        step = "engine" if self.output == ENGINE else f"engine-{self.name}"
        return Step(step, ("python3", SCRIPT, "--engine", self.name), tool="tensorrt", outputs=(self.output,), where="board")


def has_int8(profile: Profile) -> bool:
    return "int8" in profile.facts["precisions"]


def engines_of(graph: QuantGraph, profile: Profile, dialect: Dialect, dla: bool, half_islands: bool) -> tuple[list[Engine], dict[str, bytes]]:
    """The engines, the first being the artifact's own, and the files they are built from."""
    if not has_int8(profile):
        engines, files = [Engine("fp16", ARTIFACT, ENGINE, "fp16", half=True)], {ARTIFACT: float_onnx_from_graph(graph, dialect)}
    else:
        engines = [Engine("int8", ARTIFACT, ENGINE, "int8", half_islands)]
        files = {ARTIFACT: onnx_from_graph(graph, dialect, half_islands)}
        if not (dialect.strongly_typed and beyond_fp16(graph)):
            engines.append(Engine("fp16", FLOAT_ARTIFACT, FP16_ENGINE, "fp16", half=True, max_lsb=FLOAT_STEPS))
            files[FLOAT_ARTIFACT] = float_onnx_from_graph(graph, dialect)
    if dla and profile.facts["dla_count"]:
        engine, more = _dla_engine(graph, profile, dialect)
        engines, files = [*engines, engine], files | more
    return engines, files | {PLAN: _plan(engines, profile, dialect)}


def _dla_engine(graph: QuantGraph, profile: Profile, dialect: Dialect) -> tuple[Engine, dict[str, bytes]]:
    version = tuple(int(part) for part in str(profile.toolchain["tensorrt"]).split(".")[:2])
    if version >= DLA_READS_QUANTISERS:
        return Engine("dla", ARTIFACT, DLA_ENGINE, "int8", half=True, dla=True), {}
    files = {DLA_ARTIFACT: float_onnx_from_graph(graph, dialect, half=False), DLA_RANGES: _json(ranges_from_graph(graph, dialect))}
    return Engine("dla", DLA_ARTIFACT, DLA_ENGINE, "int8", half=True, ranges=DLA_RANGES, dla=True), files


def _plan(engines: list[Engine], profile: Profile, dialect: Dialect) -> bytes:
    sm = int(profile.toolchain["sm"])
    return _json(
        {
            "schema": 1,
            "board": profile.board,
            "sm": sm,
            "multiprocessors": int(profile.facts["cuda_cores"]) // (CORES_OF_VOLTA if sm == VOLTA else CORES),
            "dialect": dialect.name,
            "jetpack": dialect.jetpack,
            "since": list(dialect.since),
            "engines": [asdict(engine) for engine in engines],
        }
    )


def _json(value: Mapping[str, object]) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()
