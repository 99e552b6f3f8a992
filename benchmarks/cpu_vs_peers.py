# SPDX-License-Identifier: Apache-2.0
"""The tuned `cpu` artifact against the fastest of its peers: `python benchmarks/cpu_vs_peers.py [--data FOLDER] [--only NETWORK ...] [--json FILE]`.

Peers: ONNX Runtime (float, and the QDQ models of its own quantiser with uint8 and with int8 activations), LiteRT (int8), OpenVINO (float, and the uint8
QDQ model) and, where it is installed, ExecuTorch with XNNPACK (float and int8; `peer_executorch.py`). Six networks (`networks.py`), one thread and two;
all take turns in one process. The cost in accuracy stands in the same table: agreement with the float model's decisions on samples nobody calibrated on,
and with --data (the folder of PneumoniaMNIST's file) top-1 of C2, trained on it. Prints Markdown; exit code 1 where the tuned artifact takes more than 1.03
times as long as the fastest peer. 20 minutes on two quiet cores.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import peer_executorch
import torch
from networks import C2, NETWORKS, trained_c2
from torch import nn

import isthmus
from isthmus.bench import Rules, measure_interleaved
from isthmus.compare import top1_accuracy
from isthmus.export.module import onnx_from_module
from isthmus.export.prepare import prepare_float
from isthmus.float_model import run_float
from isthmus.measurement import Measurement, pooled, ratio_interval
from isthmus.runtimes.onnxruntime import OnnxRuntimeSession
from isthmus.runtimes.openvino import OpenVinoSession
from isthmus.session import Session
from isthmus.spec import TensorSpec
from isthmus.tuning import agreement

FLOOR = 1.03
CALIBRATION, EVALUATION = 64, 128
FEEDS = 16
ROUNDS = 3  # every contestant is opened anew for each: where its buffers come to lie is worth several per cent
TUNED = "isthmus, tuned"
TRAINED = "c2-28"


@dataclass(frozen=True)
class Case:
    """One network with its samples, float32. `labels` of the evaluation samples where the network is trained."""

    name: str
    module: nn.Module
    model: onnx.ModelProto
    calibration: np.ndarray
    evaluation: np.ndarray
    labels: np.ndarray | None = None

    @property
    def input(self) -> str:
        return str(self.model.graph.input[0].name)


@dataclass(frozen=True)
class Row:
    """One contestant on one network: `ratio` is the tuned artifact's time over this one's, with its interval."""

    network: str
    threads: int
    contestant: str
    p50_ms: float
    ratio: float
    low: float
    high: float
    agreement: float
    top1: float | None


@dataclass(frozen=True)
class Result:
    """The rows of one network and number of threads, and what tuning took."""

    rows: tuple[Row, ...]
    taken: str
    refused: Mapping[str, str]  # peers that cannot run the network, and what they say

    @property
    def fastest(self) -> Row:
        return min((row for row in self.rows if row.contestant != TUNED), key=lambda row: row.p50_ms)

    @property
    def holds(self) -> bool:
        return self.fastest.ratio <= FLOOR


def case_of(name: str, data: Path | None) -> Case:
    network = NETWORKS[name]
    if name != TRAINED or data is None:
        module = network.module()
        return Case(name, module, _exported(module, network.example), network.samples(CALIBRATION), network.samples(EVALUATION, seed=1))
    module, split = trained_c2(data)
    return Case(name, module, _exported(module, network.example), split.x_train[:CALIBRATION], split.x_test, split.y_test)


def _exported(module: nn.Module, example: Any) -> onnx.ModelProto:
    return prepare_float(onnx_from_module(module, (example,)), {})


# ---- contestants
def peers(case: Case, folder: Path) -> dict[str, tuple[type[Session], Path]]:
    """Files by contestant, and the engine of each: ONNX, float and as ONNX Runtime's own quantiser makes it, and ExecuTorch's where it is here."""
    files = {kind: folder / f"{kind}.onnx" for kind in ("float", "uint8", "int8")}
    onnx.save(_without_default_dilations(case.model), files["float"])
    for kind in ("uint8", "int8"):
        _quantised_by_onnxruntime(files["float"], files[kind], case, kind)
    theirs: dict[str, tuple[type[Session], Path]] = {}
    for kind in ("float", "int8") if peer_executorch.is_installed() else ():
        file = folder / f"{kind}.pte"
        peer_executorch.export(case.module, torch.from_numpy(case.calibration[:1]), case.calibration, file, int8=kind == "int8")
        theirs[f"ExecuTorch {kind}"] = (peer_executorch.ExecuTorchSession, file)
    return theirs | {
        "ONNX Runtime float": (OnnxRuntimeSession, files["float"]),
        "ONNX Runtime uint8": (OnnxRuntimeSession, files["uint8"]),
        "ONNX Runtime int8": (OnnxRuntimeSession, files["int8"]),
        "OpenVINO float": (OpenVinoSession, files["float"]),
        "OpenVINO uint8": (OpenVinoSession, files["uint8"]),
    }


def refused_by(case: Case, files: Mapping[str, tuple[type[Session], Path]]) -> dict[str, str]:
    """Peers that cannot run one sample, in their own words."""
    inputs, outputs = _border(case.model)
    found = {}
    for name, (engine, file) in files.items():
        try:
            with engine(file, inputs, outputs, 1) as session:  # type: ignore[call-arg]
                session.run({case.input: case.evaluation[:1]})
        except (RuntimeError, isthmus.IsthmusError) as error:
            found[name] = str(error).partition("\n")[0]
    return found


def _without_default_dilations(model: onnx.ModelProto) -> onnx.ModelProto:
    """ONNX Runtime's fused int8 average pool refuses the attribute even where it says nothing, and with it the file that its quantiser wrote."""
    stripped = onnx.ModelProto()
    stripped.CopyFrom(model)
    for node in stripped.graph.node:
        kept = [one for one in node.attribute if one.name != "dilations" or set(one.ints) != {1}]
        if node.op_type == "AveragePool" and len(kept) < len(node.attribute):
            del node.attribute[:]
            node.attribute.extend(kept)
    return stripped


def _quantised_by_onnxruntime(source: Path, target: Path, case: Case, activations: str) -> None:
    """As its documentation does it: preprocessed, one weight scale a channel, ranges by min and max."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
        def __init__(self) -> None:
            self.feeds = iter([{case.input: sample[None]} for sample in case.calibration])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.feeds, None)

    prepared = target.with_suffix(".prepared.onnx")
    quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    kind = QuantType.QUInt8 if activations == "uint8" else QuantType.QInt8
    symmetric = {"ActivationSymmetric": activations == "int8", "WeightSymmetric": True}
    quantize_static(
        str(prepared),
        str(target),
        Reader(),
        quant_format=QuantFormat.QDQ,
        activation_type=kind,
        weight_type=QuantType.QInt8,
        per_channel=True,
        extra_options=symmetric,
    )


def _border(model: onnx.ModelProto) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    return tuple(  # type: ignore[return-value]  # two sides
        tuple(TensorSpec(value.name, tuple(extent.dim_value for extent in value.type.tensor_type.shape.dim), "float32") for value in side)
        for side in (model.graph.input, model.graph.output)
    )


# ---- one network
def measured(case: Case, threads: int, folder: Path, rules: Rules, files: Mapping[str, tuple[type[Session], Path]], refused: Mapping[str, str]) -> Result:
    bundle = isthmus.compile(
        case.model,
        targets=["cpu", "rpi5"],
        data={case.input: case.calibration},
        recipe="asymmetric",
        threads=threads,
        output=folder / f"bundle-{threads}",
    )
    inputs, outputs = _border(case.model)
    able = {name: one for name, one in files.items() if name not in refused}
    exact = run_float(case.model, {case.input: case.evaluation})

    def opened(stack: ExitStack) -> dict[str, Session]:
        return {
            TUNED: stack.enter_context(bundle.open_session("cpu", threads)),
            "LiteRT int8": stack.enter_context(bundle.open_session("rpi5", threads)),
            **{name: stack.enter_context(engine(file, inputs, outputs, threads)) for name, (engine, file) in able.items()},  # type: ignore[call-arg]
        }

    with ExitStack() as stack:
        shares = {name: _accuracy(session, case, exact) for name, session in opened(stack).items()}
    rounds = []
    for _ in range(ROUNDS):
        with ExitStack() as stack:
            rounds.append(measure_interleaved({name: (session, _feeds(session, case)) for name, session in opened(stack).items()}, rules))
    timed = {name: pooled([one[name] for one in rounds]) for name in shares}
    rows = [_row(case.name, threads, name, timed[TUNED], timed[name], *shares[name]) for name in timed]
    taken = next(one["candidate"] for one in bundle.artifact("cpu")["tuning"]["candidates"] if one["taken"])
    return Result(tuple(rows), taken, refused)


def _feeds(session: Session, case: Case) -> list[dict[str, np.ndarray]]:
    (spec,) = session.inputs
    return [{spec.name: spec.from_form(spec.quantise(sample[None]))} for sample in case.evaluation[:FEEDS]]


def _accuracy(session: Session, case: Case, exact: Mapping[str, np.ndarray]) -> tuple[float, float | None]:
    results = [session.run({case.input: sample[None]}) for sample in case.evaluation]
    outputs = {name: np.concatenate([one[name] for one in results]) for name in exact}
    return agreement(exact, outputs), None if case.labels is None else top1_accuracy(next(iter(outputs.values())), case.labels)


def _row(network: str, threads: int, name: str, tuned: Measurement, own: Measurement, agreed: float, top1: float | None) -> Row:
    ratio = ratio_interval(tuned, own) if name != TUNED else (1.0, 1.0, 1.0)
    return Row(network, threads, name, own.p50_ns / 1e6, *ratio, agreed, top1)


# ---- the table
def markdown(results: Sequence[Result]) -> str:
    lines = [
        "| network | threads | contestant | p50, ms | tuned takes times as long (95 % interval) | decisions equal to float's | top-1 | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        for row in sorted(result.rows, key=lambda row: row.p50_ms):
            name = f"**{row.contestant}**: {result.taken}" if row.contestant == TUNED else row.contestant
            ratio = "" if row.contestant == TUNED else f"{row.ratio:.3f} ({row.low:.3f} to {row.high:.3f})"
            mark = "" if row is not result.fastest else "fastest peer" if result.holds else f"fastest peer; {FLOOR} MISSED"
            top1 = "" if row.top1 is None else f"{row.top1:.4f}"
            lines.append(f"| {row.network} | {row.threads} | {name} | {row.p50_ms:.3f} | {ratio} | {row.agreement:.2%} | {top1} | {mark} |")
    unable = {(result.rows[0].network, name): said for result in results for name, said in result.refused.items()}
    lines += ["", *(f"- {network}: {name} cannot run it: {said}" for (network, name), said in unable.items())] if unable else []
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help=f"folder of pneumoniamnist.npz: C2 ({C2}) is trained on it")
    parser.add_argument("--only", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--min-count", type=int, default=100, help="runs of each contestant in each of the rounds")
    parser.add_argument("--json", type=Path, help="every row, as JSON")
    given = parser.parse_args()
    results = []
    for name in given.only:
        with tempfile.TemporaryDirectory(prefix="isthmus-peers-") as place:
            case = case_of(name, given.data)
            files = peers(case, Path(place))
            refused = refused_by(case, files)
            for threads in given.threads:
                rules = Rules(min_count=given.min_count, min_duration_s=0.5, max_duration_s=10.0, percentile=50.0, threads=threads)
                results.append(measured(case, threads, Path(place), rules, files, refused))
                print(f"{name}, {threads} threads: {results[-1].fastest.ratio:.3f}", file=sys.stderr, flush=True)
    print(markdown(results))
    print(f"\nload average at the end: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; samples {EVALUATION}")
    if given.json:
        given.json.write_text(json.dumps([asdict(result) for result in results], indent=1))
    return 0 if all(result.holds for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
