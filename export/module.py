# SPDX-License-Identifier: Apache-2.0
"""PyTorch modules and exported programs as float ONNX."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnxscript.optimizer import fold_constants, remove_unused_nodes
from torch.onnx._internal.exporter._registration import ONNXRegistry

from isthmus.errors import IsthmusError
from isthmus.export.pt2 import load_pt2
from isthmus.graph import OPSET
from isthmus.user_line import user_line

Inputs = torch.Tensor | np.ndarray | Sequence[torch.Tensor | np.ndarray]


def onnx_from_module(module: torch.nn.Module, example_inputs: Inputs, *, as_written: bool = False, outputs: Sequence[str] = ()) -> onnx.ModelProto:
    """The module in evaluation mode as ONNX, with the shapes of the example (its batch too). The module is left as it was.

    `example_inputs` is one tensor (or array), or one for each argument of forward(). Inputs and outputs are named "input" and "output",
    or "input_0", "input_1", ... where there are several; `outputs` gives these other names. `as_written` keeps the module's own layers, for
    counting: the exporter otherwise folds batch normalisation and keeps one copy of equal weights.
    Raises `IsthmusError` saying which construct cannot be exported.
    """
    examples = _examples(example_inputs)
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with _quiet():
            try:
                with contextlib.redirect_stderr(io.StringIO()):  # torch 2.13 prints the graph so far where it fails
                    program = torch.export.export(module, examples, strict=False)
            except Exception as error:
                fix = "forward() must be traceable (no branches on tensor values)"
                place = user_line(error, [__file__, contextlib.__file__])
                raise IsthmusError(f"{type(module).__name__} cannot be exported: {_reason(error)}{place}; {fix}") from error
            return _onnx(program, type(module).__name__, as_written, outputs)
    finally:
        for part, mode in modes.items():
            part.training = mode


def onnx_from_pt2(path: str | Path) -> onnx.ModelProto:
    """A `.pt2` file (torch.export.save) as ONNX; nothing in the file is run. Raises `IsthmusError` where it cannot be read or exported."""
    with _quiet():
        return _onnx(load_pt2(path), str(path))


def _examples(given: Inputs) -> tuple[torch.Tensor, ...]:
    parts = [given] if isinstance(given, torch.Tensor | np.ndarray) else list(given)
    if not parts or not all(isinstance(part, torch.Tensor | np.ndarray) for part in parts):
        raise IsthmusError(f"example inputs: expected a tensor, or one tensor for each argument of forward(), found {type(given).__name__}")
    return tuple(part if isinstance(part, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(part)) for part in parts)


def _onnx(program: torch.export.ExportedProgram, subject: str, as_written: bool = False, names: Sequence[str] = ()) -> onnx.ModelProto:
    inputs = _names("input", len(program.graph_signature.user_inputs))
    outputs = list(names) or _names("output", len(program.graph_signature.user_outputs))
    if len(outputs) != len(program.graph_signature.user_outputs):
        raise IsthmusError(f"{subject} has {len(program.graph_signature.user_outputs)} outputs, named are {', '.join(outputs)}; name each of them")
    try:
        with _operators_read_once():
            exported = torch.onnx.export(
                program, dynamo=True, opset_version=OPSET, input_names=inputs, output_names=outputs, verbose=False, optimize=not as_written
            )
    except Exception as error:
        raise IsthmusError(f"{subject} cannot be exported to ONNX: {_reason(error)}; replace this operator, or export it to ONNX yourself") from error
    if exported is None:
        raise IsthmusError(f"{subject} cannot be exported to ONNX: torch.onnx.export gave no program")
    if as_written:
        _settle(exported.model)
    model: onnx.ModelProto = exported.model_proto
    return model


def _settle(model: Any) -> None:
    """What a graph nobody optimised still needs: shape arithmetic as constants, no bias that the module has not. Float constants stay apart.

    The exporter (torch 2.13) gives a convolution without a bias one of zeros, expanded in the graph: a module's own bias no node makes.
    """
    for node in model.graph:
        if node.op_type in ("Conv", "ConvTranspose") and len(node.inputs) > 2 and node.inputs[2] is not None and node.inputs[2].producer() is not None:
            node.resize_inputs(2)
    remove_unused_nodes(model)
    fold_constants(model, onnx_shape_inference=True, should_fold=lambda node: False if any(_is_float(value) for value in node.outputs) else None)
    remove_unused_nodes(model)


def _is_float(value: Any) -> bool:
    return value.dtype is not None and bool(value.dtype.is_floating_point())


def _names(stem: str, count: int) -> list[str]:
    return [stem] if count == 1 else [f"{stem}_{index}" for index in range(count)]


def _reason(error: BaseException) -> str:
    """The innermost cause's first line: the outer ones tell of torch's own stages."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


_operators = functools.cache(ONNXRegistry.from_torchlib)


@contextlib.contextmanager
def _operators_read_once() -> Iterator[None]:
    """torch 2.13 parses the source of all its operators' translations anew for each export: half the time of a small network's."""
    own = ONNXRegistry.__dict__["from_torchlib"]
    ONNXRegistry.from_torchlib = staticmethod(_operators)  # type: ignore[method-assign]  # a registry is read alone unless an export is given translations
    try:
        yield
    finally:
        ONNXRegistry.from_torchlib = own  # type: ignore[method-assign]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of its own deprecations and logs missing optional packages: nothing the user can act on."""
    noisy: list[Any] = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "torch._export", "torch.fx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in noisy]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in noisy:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(noisy, levels, strict=True):
                logger.setLevel(level)
