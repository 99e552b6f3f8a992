# SPDX-License-Identifier: Apache-2.0
"""ExecuTorch as a contestant of `cpu_vs_peers.py`: float, and int8 as its documentation has it (PT2E, XNNPACK's quantiser and partitioner).

Only where `executorch` is installed: it is no dependency of isthmus.

    pip install -c constraints.txt executorch==1.5.1 "torchao>=0.18,<0.19"
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from isthmus.session import Arrays, Session
from isthmus.spec import TensorSpec


def is_installed() -> bool:
    return importlib.util.find_spec("executorch") is not None


def export(module: nn.Module, example: torch.Tensor, calibration: np.ndarray, file: Path, *, int8: bool) -> None:
    """Writes the .pte: weights int8 by channel, activations int8, calibrated on `calibration` (N, ...); or float32."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config
    from executorch.exir import to_edge_transform_and_lower
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    program = torch.export.export(module, (example,))
    if int8:
        prepared = prepare_pt2e(program.module(), XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True)))
        for sample in torch.from_numpy(calibration):
            prepared(sample[None])
        program = torch.export.export(convert_pt2e(prepared), (example,))
    file.write_bytes(to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch().buffer)


class ExecuTorchSession(Session):
    """One method of a .pte. The number of threads belongs to the process: all sessions open at a time have the same."""

    engine = "executorch"

    def __init__(self, file: Path, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], threads: int) -> None:
        from executorch.extension.pybindings.portable_lib import _load_program, _unsafe_reset_threadpool

        super().__init__(inputs, outputs)
        _unsafe_reset_threadpool(threads)
        self._program = _load_program(str(file))
        self._method = self._program.load_method("forward")
        self._tensors: dict[int, list[Any]] = {}

    def _run_raw(self, feeds: Arrays) -> dict[str, np.ndarray]:
        first = feeds[self.inputs[0].name]
        tensors = self._tensors.get(id(first))
        if tensors is None:  # the tensors share the arrays' memory, and so keep them alive
            tensors = self._tensors.setdefault(id(first), [torch.from_numpy(feeds[spec.name]) for spec in self.inputs])
        self._method.set_inputs(tensors)
        self._method.execute()
        results = self._method.get_outputs(clone_outputs=False)
        return {spec.name: result.numpy() for spec, result in zip(self.outputs, results, strict=True)}

    def _close(self) -> None:
        del self._method, self._program
