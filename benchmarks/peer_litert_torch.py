# SPDX-License-Identifier: Apache-2.0
"""litert-torch with ai-edge-quantizer on one exported program; runs in an environment of its own, which `tflite_vs_litert_torch.py` makes.

    python peer_litert_torch.py FOLDER [--repeats 3]

Reads `module.pt2` (torch.export) and `samples.npy` from FOLDER; writes `theirs.tflite` and `theirs.json`: seconds of each step of each repetition.

As their documentation has it: channels last at the border (`to_channel_last_io`), `static_wi8_ai8` (int8 weights by channel, int8 activations), calibrated
on the samples. The PT2E path, where quantisation stands in the exported graph before the conversion, is timed beside it. What LiteRT refuses of their
making is made again from the program with its constant parts computed beforehand ("constants folded"; litert-torch 0.10 turns
`torch.linspace(...).expand(...)` into a BROADCAST_TO of the wrong axes).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import litert_torch
import numpy as np
import torch
from ai_edge_litert.interpreter import Interpreter
from ai_edge_quantizer import quantizer, recipe
from litert_torch.quantize.pt2e_quantizer import PT2EQuantizer, get_symmetric_quantization_config
from litert_torch.quantize.quant_config import QuantConfig
from torch._inductor.constant_folding import constant_fold
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

SIGNATURE = "serving_default"
PACKAGES = ("litert-torch", "ai-edge-quantizer", "litert-converter", "torch", "torchao")


class Clock:
    """Seconds by step, in the order they were taken."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, step: str, work: Callable[[], Any]) -> Any:
        begun = time.perf_counter()
        result = work()
        self.seconds[step] = time.perf_counter() - begun
        return result


def channels_last(program: torch.export.ExportedProgram, fold_constants: bool) -> torch.nn.Module:
    """The module with its images channels last at the border, so that no file starts or ends with a TRANSPOSE."""
    example = program.example_inputs[0]
    module = program.module()
    if fold_constants:
        constant_fold(module)
    found = module(*example)
    results = found if isinstance(found, tuple | list) else (found,)
    images = [index for index, tensor in enumerate(results) if tensor.ndim == 4]
    return litert_torch.to_channel_last_io(module, args=[index for index, tensor in enumerate(example) if tensor.ndim == 4], outputs=images or None)


def by_ai_edge_quantizer(module: torch.nn.Module, samples: np.ndarray, path: Path) -> dict[str, float]:
    """convert (float .tflite), calibrate, quantise, write: the steps' seconds."""
    clock = Clock()
    example = (torch.from_numpy(samples[:1]),)
    edge = clock("convert", lambda: litert_torch.convert(module, example))
    content = edge.model_content()
    maker = clock("open", lambda: quantizer.Quantizer(content, recipe.static_wi8_ai8()))
    name = next(iter(edge._get_interpreter().get_signature_list()[SIGNATURE]["inputs"]))
    feeds = {SIGNATURE: [{name: sample[np.newaxis]} for sample in samples]}
    ranges = clock("calibrate", lambda: maker.calibrate(feeds, num_threads=1))
    made = clock("quantise", lambda: maker.quantize(ranges, enable_progress_report=False))
    clock("write", lambda: path.write_bytes(bytes(made.quantized_model)))
    return clock.seconds


def by_pt2e(module: torch.nn.Module, samples: np.ndarray, path: Path) -> dict[str, float]:
    """export, prepare, calibrate, quantise in the graph, then convert it: the steps' seconds."""
    clock = Clock()
    example = (torch.from_numpy(samples[:1]),)
    maker = PT2EQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True, is_dynamic=False))
    program = clock("export", lambda: torch.export.export(module, example).module())
    prepared = clock("prepare", lambda: prepare_pt2e(program, maker))

    def calibrate() -> None:
        with torch.no_grad():
            for sample in samples:
                prepared(torch.from_numpy(sample[np.newaxis]))

    clock("calibrate", calibrate)
    quantised = clock("quantise", lambda: convert_pt2e(prepared, fold_quantize=False))
    edge = clock("convert", lambda: litert_torch.convert(quantised, example, quant_config=QuantConfig(pt2e_quantizer=maker)))
    clock("write", lambda: edge.export(str(path)))
    return clock.seconds


WAYS: dict[str, tuple[Callable[[torch.nn.Module, np.ndarray, Path], dict[str, float]], str]] = {
    "ai_edge_quantizer": (by_ai_edge_quantizer, "theirs.tflite"),
    "pt2e": (by_pt2e, "theirs_pt2e.tflite"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    torch.set_num_threads(1)
    samples = np.ascontiguousarray(np.load(folder / "samples.npy").transpose(0, 2, 3, 1))
    record: dict[str, Any] = {"versions": {name: importlib.metadata.version(name) for name in PACKAGES}}
    for way, (make, file) in WAYS.items():
        for fold_constants in (False, True):
            try:
                rounds = []
                for _ in range(arguments.repeats):
                    rounds.append(make(channels_last(torch.export.load(folder / "module.pt2"), fold_constants), samples, folder / file))
                    Interpreter(model_path=str(folder / file)).allocate_tensors()
            except Exception as error:  # noqa: BLE001 - whatever a peer's converter raises is its result, which the table shows
                record.setdefault(way, {"errors": []})["errors"].append(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
            else:
                record[way] = {"rounds_s": rounds, "file": file, "constants_folded": fold_constants}
                break
    (folder / "theirs.json").write_text(json.dumps(record, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
