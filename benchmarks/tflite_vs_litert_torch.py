# SPDX-License-Identifier: Apache-2.0
"""Our `.tflite` beside the one that litert-torch with ai-edge-quantizer makes of the same network and the same calibration samples, in one run.

    python benchmarks/tflite_vs_litert_torch.py --work FOLDER [--only NETWORK ...] [--seconds 10] [--json]

litert-torch gets an environment of its own under FOLDER (pinned below, about 2 GB, made once) and runs there as a process of its own. Both files are
then timed in this process: the same LiteRT, XNNPACK, one thread, in turns. Both are int8 at the border, channels last, asymmetric activations, weights
by output channel. Floors, each in two decimals; one that is missed ends the script with 1:

- conversion: ours at least 10 times as fast. Ours: from the int8 form's file to the `.tflite` file (reading, verifying, checking for the target, lowering,
  writing). Theirs: the faster of their two ways, from what is ready before the file is made. With ai-edge-quantizer that is the exported program and the
  calibrated ranges (convert, open, quantise, write: their quantiser knows only `.tflite` files, so the conversion belongs to it); with PT2E the quantised
  graph (convert, write). Export, calibration and imports count for neither. The fastest of `--repeats` on each side.
- file: ours at most 1.02 times theirs.
- latency: median of ours at most 1.00 times theirs, with the bootstrap interval of the ratio.

SQNR is the outputs' (in dB, against the float network, on samples that did not calibrate), so that nobody is quick by being wrong. Weights are random.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from networks import NETWORKS, Network

from isthmus.affinity import parse_cpus, pinned
from isthmus.bench import Rules, measure_interleaved
from isthmus.conditions import host_conditions
from isthmus.dataset import Dataset
from isthmus.graph import QuantGraph
from isthmus.measurement import ratio_interval
from isthmus.post_training import PostTraining
from isthmus.profile import load_profile
from isthmus.recipe import load_recipe
from isthmus.registry import load_target
from isthmus.runtimes.tflite import TfliteSession, open_tflite
from isthmus.source import load_source

# Every package of their environment. torch: the same as ours, whose CPU build pip must be able to find (see the Makefile).
REQUIREMENTS = """
absl-py==2.5.1 ai-edge-litert==2.3.0 ai-edge-quantizer==0.10.0 annotated-doc==0.0.7 annotated-types==0.8.0 anyio==4.14.2 backports.strenum==1.2.8
certifi==2026.10.18 charset-normalizer==3.5.2 click==8.5.1 filelock==4.2.11 fire==0.7.1 flatbuffers==25.12.19 fsspec==2026.9.0 h11==0.16.0 hf-xet==1.8.0
httpcore2==2.16.2 httpx2==2.16.2 huggingface_hub==2.4.0 idna==3.20 immutabledict==4.2.1 jax==0.10.2 jaxlib==0.10.2 jaxtyping==0.3.11 Jinja2==3.1.6
kagglehub==1.0.2 kagglesdk==0.1.37 lark==1.3.1 litert-converter==0.5.0 litert-lm-builder==0.18.1 litert-torch==0.10.0 markdown-it-py==4.3.0
MarkupSafe==3.0.4 mdurl==0.1.2 ml_dtypes==0.6.0 mpmath==1.3.0 multipledispatch==1.0.0 networkx==3.6.1 numpy==2.4.6 opt_einsum==3.4.0 ordered-set==4.1.0
packaging==26.3 pillow==13.0.0 protobuf==7.36.2 pydantic==2.11.10 pydantic_core==2.33.2 Pygments==2.21.0 PyYAML==6.0.3 regex==2026.11.15 requests==2.34.2
rich==15.0.0 safetensors==0.8.0 scipy==1.17.1 sentencepiece==0.2.3 shellingham==1.5.4 sympy==1.14.0 tabulate==0.10.0 termcolor==3.3.0 tokenizers==0.23.3
tomli==2.5.0 torch==2.13.0 torchao==0.18.0 tqdm==4.70.1 transformers==5.23.0 truststore==0.10.5 typer==0.29.2 typing-inspection==0.4.2
typing_extensions==4.12.2 urllib3==2.8.0 wadler_lindig==0.1.8 xdsl==0.28.0
"""
PEER = Path(__file__).with_name("peer_litert_torch.py")
RECIPE, PROFILE = "asymmetric", "rpi5"
CONVERSION_FLOOR, BYTES_FLOOR, LATENCY_FLOOR = 10.0, 1.02, 1.00
CALIBRATION_SAMPLES, EVALUATION_SAMPLES, EVALUATION_SEED = 32, 8, 1
OURS, THEIRS = "ours.tflite", "theirs"
PEER_LIMIT_S = 3600


# Steps between what is quantised or calibrated and the file, by way. The first that works is the one whose file is compared.
SPANS = {"ai_edge_quantizer": ("convert", "open", "quantise", "write"), "pt2e": ("convert", "write")}


@dataclass(frozen=True)
class Peer:
    """Their file, the seconds of each of their ways, and those from the exported program to the file."""

    file: str
    seconds: dict[str, float]
    total_s: float
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """One network: seconds, bytes, milliseconds, dB; `missed` names the floors that did not hold."""

    network: str
    our_conversion_s: float
    their_conversions_s: dict[str, float]
    our_total_s: float
    their_total_s: float
    our_bytes: int
    their_bytes: int
    our_median_ms: float
    their_median_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    sample_count: int
    our_sqnr_db: float
    their_sqnr_db: float
    missed: tuple[str, ...]
    notes: tuple[str, ...]


def peer_python(work: Path) -> Path:
    """Their environment's Python; the environment is made where it is not there or holds other versions."""
    place = work / "litert-torch"
    wanted = hashlib.sha256(REQUIREMENTS.encode()).hexdigest()
    stamp = place / "requirements.sha256"
    python = place / "bin" / "python"
    if not stamp.is_file() or stamp.read_text() != wanted:
        venv.create(place, with_pip=True, clear=True)
        listed = place / "requirements.txt"
        listed.write_text("\n".join(REQUIREMENTS.split()) + "\n", encoding="utf-8")
        subprocess.run([str(python), "-m", "pip", "install", "-qq", "-r", str(listed)], check=True)
        stamp.write_text(wanted)
    return python


def prepare(network: Network, folder: Path) -> torch.nn.Module:
    """What both start from: the exported program, the calibration samples, and the float network's outputs on other samples."""
    module = network.module()
    torch.export.save(torch.export.export(module, (network.example,)), folder / "module.pt2")
    np.save(folder / "samples.npy", network.samples(CALIBRATION_SAMPLES))
    return module


def ours(module: torch.nn.Module, network: Network, folder: Path, repeats: int) -> tuple[float, float]:
    """(seconds from the form's file to the `.tflite` file, seconds from the module to the `.tflite` file)."""
    begun = time.perf_counter()
    recipe = load_recipe(RECIPE)
    source = load_source(module, network.example, {}, recipe, _silent)
    assert source.float_model is not None
    samples = Dataset({source.float_model.graph.input[0].name: np.load(folder / "samples.npy")}, None, "seeded")
    graph, _ = PostTraining(source.float_model, samples, _silent).graph(recipe)
    graph.save(folder / "form.onnx")
    before_s = time.perf_counter() - begun
    target, profile = load_target("tflite"), load_profile(PROFILE)
    rounds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        form = QuantGraph.load(folder / "form.onnx")
        form.verify()
        problems = target.check(form, profile)
        if problems:
            raise SystemExit(f"{network.name}: {problems[0]}")
        plan = target.plan(form, profile, {})
        (folder / OURS).write_bytes(plan.files[plan.artifact])
        rounds.append(time.perf_counter() - begun)
    return min(rounds), before_s + min(rounds)


def theirs(python: Path, folder: Path, repeats: int) -> Peer:
    """Runs their process on the folder. Ends the script where neither of their ways gives a file that LiteRT opens."""
    with open(folder / "theirs.log", "w", encoding="utf-8") as log:
        command = [str(python), str(PEER), str(folder), "--repeats", str(repeats)]
        done = subprocess.run(command, stdout=log, stderr=log, timeout=PEER_LIMIT_S, check=False)
    if done.returncode:
        raise SystemExit(f"litert-torch failed on {folder.name}: see {log.name}")
    record = json.loads((folder / "theirs.json").read_text(encoding="utf-8"))
    made = [way for way in SPANS if "errors" not in record[way]]
    if not made:
        raise SystemExit(f"litert-torch failed on {folder.name}: {record['ai_edge_quantizer']['errors'][-1]}")
    seconds = {way: min(sum(one[step] for step in SPANS[way]) for one in record[way]["rounds_s"]) for way in made}
    total_s = min(sum(one.values()) for one in record[made[0]]["rounds_s"])
    notes = [f"{way} made no file that LiteRT opens: {record[way]['errors'][-1]}" for way in SPANS if way not in made]
    notes += [f"{way}: constants folded for it, else LiteRT refuses its file" for way in made if record[way]["constants_folded"]]
    return Peer(record[made[0]]["file"], seconds, total_s, tuple(notes))


def real_outputs(session: TfliteSession, images: np.ndarray) -> list[np.ndarray]:
    """Each output of each sample, as real numbers with the channels where the float network has them."""
    spec = session.inputs[0]
    rows = []
    for image in images.transpose(0, 2, 3, 1):
        raw = session.run_raw({spec.name: spec.quantise(image[np.newaxis])})
        found = [one.dequantise(raw[one.name]) for one in session.outputs]
        rows.append(np.concatenate([(one.transpose(0, 3, 1, 2) if one.ndim == 4 else one).reshape(-1) for one in found]))
    return rows


def sqnr_db(session: TfliteSession, images: np.ndarray, expected: list[np.ndarray]) -> float:
    found = np.stack(real_outputs(session, images)).astype(np.float64)
    wanted = np.stack(expected).astype(np.float64)
    return float(10 * np.log10(np.sum(wanted**2) / max(np.sum((found - wanted) ** 2), 1e-30)))


def float_outputs(module: torch.nn.Module, images: np.ndarray) -> list[np.ndarray]:
    rows = []
    with torch.no_grad():
        for image in images:
            found = module(torch.from_numpy(image[np.newaxis]))
            rows.append(np.concatenate([one.numpy().reshape(-1) for one in (found if isinstance(found, tuple | list) else (found,))]))
    return rows


def compare(network: Network, work: Path, python: Path, arguments: argparse.Namespace) -> Row:
    folder = work / network.name
    folder.mkdir(parents=True, exist_ok=True)
    module = prepare(network, folder)
    our_conversion_s, our_total_s = ours(module, network, folder, arguments.repeats)
    peer = theirs(python, folder, arguments.repeats)
    files = {OURS: folder / OURS, THEIRS: folder / peer.file}
    images = network.samples(EVALUATION_SAMPLES, EVALUATION_SEED)
    expected = float_outputs(module, images)
    with pinned(parse_cpus(arguments.pin) if arguments.pin else None), _opened(files) as sessions:
        sqnr = {name: sqnr_db(session, images, expected) for name, session in sessions.items()}
        feeds = {name: (session, _feeds(session, images)) for name, session in sessions.items()}
        rules = Rules(min_duration_s=arguments.seconds, max_duration_s=10 * arguments.seconds, percentile=50)
        taken = measure_interleaved(feeds, rules)
    ratio, low, high = ratio_interval(taken[OURS], taken[THEIRS])
    our_bytes, their_bytes = (path.stat().st_size for path in files.values())
    missed = [reason for one in taken.values() for reason in one.reasons]
    missed += ["conversion"] if round(min(peer.seconds.values()) / our_conversion_s, 2) < CONVERSION_FLOOR else []
    missed += ["file"] if round(our_bytes / their_bytes, 2) > BYTES_FLOOR else []
    missed += ["latency"] if round(ratio, 2) > LATENCY_FLOOR else []
    return Row(
        network.name, our_conversion_s, peer.seconds, our_total_s, peer.total_s, our_bytes, their_bytes,
        taken[OURS].p50_ns / 1e6, taken[THEIRS].p50_ns / 1e6, ratio, low, high, taken[OURS].count, sqnr[OURS], sqnr[THEIRS], tuple(missed), peer.notes,
    )  # fmt: skip


@contextlib.contextmanager
def _opened(files: dict[str, Path]) -> Iterator[dict[str, TfliteSession]]:
    with contextlib.ExitStack() as stack:
        yield {name: stack.enter_context(open_tflite(path, threads=1, trust=True)) for name, path in files.items()}


def _feeds(session: TfliteSession, images: np.ndarray) -> list[dict[str, np.ndarray]]:
    spec = session.inputs[0]
    return [{spec.name: spec.quantise(image[np.newaxis])} for image in images.transpose(0, 2, 3, 1)]


def _silent(text: str, share: float | None) -> None:
    pass


COLUMNS = (
    "network",
    "graph to file, s: ours / AI Edge Quantizer / PT2E",
    "module to file, s: ours / theirs",
    "file, bytes: ours / theirs",
    "one thread, ms: ours / theirs",
    "latency ratio (95 %)",
    "SQNR, dB: ours / theirs",
    "floors",
)


def table(rows: list[Row]) -> str:
    lines = [COLUMNS, ("---",) * len(COLUMNS), *map(_cells, rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cells(row: Row) -> tuple[str, ...]:
    ways = " / ".join(f"{row.their_conversions_s[way]:.2f}" if way in row.their_conversions_s else "none" for way in SPANS)
    return (
        row.network,
        f"{row.our_conversion_s:.2f} / {ways}: {min(row.their_conversions_s.values()) / row.our_conversion_s:.0f} times",
        f"{row.our_total_s:.1f} / {row.their_total_s:.1f}",
        f"{row.our_bytes:,} / {row.their_bytes:,}: {row.our_bytes / row.their_bytes:.3f}",
        f"{row.our_median_ms:.3f} / {row.their_median_ms:.3f}",
        f"{row.ratio:.3f} ({row.ratio_low:.3f} to {row.ratio_high:.3f})",
        f"{row.our_sqnr_db:.1f} / {row.their_sqnr_db:.1f}",
        "hold" if not row.missed else f"missed: {', '.join(row.missed)}",
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="a folder for their environment and both sides' files")
    parser.add_argument("--only", nargs="+", choices=list(NETWORKS), default=list(NETWORKS), metavar="NETWORK", help=", ".join(NETWORKS))
    parser.add_argument("--seconds", type=float, default=10.0, help="of timed inference for each file")
    parser.add_argument("--repeats", type=int, default=3, help="conversions on each side, of which the fastest counts")
    parser.add_argument("--pin", help="processors to stay on while measuring, such as 1")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.repeats < 1 or not arguments.seconds > 0:
        parser.error("--repeats must be at least 1 and --seconds above 0")
    torch.set_num_threads(1)
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    python = peer_python(work)
    rows = []
    for name in arguments.only:
        rows.append(compare(NETWORKS[name], work, python, arguments))
        print(f"{name}: done", file=sys.stderr, flush=True)
    conditions = host_conditions()
    if arguments.json:
        print(json.dumps({"rows": [asdict(row) for row in rows], "conditions": conditions}, indent=2))
    else:
        print(table(rows))
        for row in rows:
            for note in row.notes:
                print(f"\n{row.network}: {note}")
        print(f"\n{conditions['cpu_model']}, Python {conditions['python']}, load {conditions['load_average']}, {conditions['date']}")
    return 1 if any(row.missed for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
