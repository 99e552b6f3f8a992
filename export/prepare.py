# SPDX-License-Identifier: Apache-2.0
"""A user's float ONNX model, made canonical: opset 20, static shapes, constants folded, every layer in one spelling. The function stays.

ONNX Runtime's BASIC optimiser does most of it (constant folding, BatchNorm, bias Add, Pad and Identity go into their layers; what it
writes is standard ONNX); `export/rewrites` holds the few exact rewrites it does not have.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime
from onnx import inliner, version_converter
from onnx_ir.passes import common

from isthmus.errors import IsthmusError
from isthmus.export.accept import DEFAULT_DOMAINS, accept, check_valid, default_opset, first_line, has_quantisers, opset_imports
from isthmus.export.rewrites import EXACT_REWRITES
from isthmus.export.rewrites._edit import NodeRewrite
from isthmus.export.shapes import Shapes, drop_constant_inputs, fix_input_shapes, infer_shapes, require_static
from isthmus.export.windows import require_windows
from isthmus.graph import IR_VERSION, OPSET

# Undone by hand otherwise: for a product of rank 3 and more it merges the batch into the rows, which the form forbids.
DISABLED_OPTIMISERS = ["MatMulAddFusion"]
MOST_ROUNDS = 100  # each changes something; a chain of n affine nodes takes n
SILENT = 4  # ONNX Runtime's log level "fatal": its warnings about the model are not the user's


def prepare_float(model: onnx.ModelProto, shapes: Shapes | None = None, notes: list[str] | None = None) -> onnx.ModelProto:
    """The canonical form of a float model (opset 7 and newer); the argument is not changed, input and output names are kept.

    `shapes` fixes open input dimensions by input name; sentences about what was decided for the user are appended to `notes`.
    Raises `IsthmusError` or `ProblemsError` (all problems at once) naming node or tensor.
    """
    if has_quantisers(model):
        raise IsthmusError("the model already holds QuantizeLinear or DequantizeLinear; it is read as a quantised model, not quantised again")
    prepared = prepare_graph(model, shapes, [] if notes is None else notes)
    prepared = optimise(prepared)
    return rewrite_exactly(prepared)


def prepare_graph(model: onnx.ModelProto, shapes: Shapes | None, notes: list[str]) -> onnx.ModelProto:
    """What float and quantised models share: accepted, functions inlined, inputs static, opset 20, shapes inferred."""
    accept(model)
    prepared = onnx.ModelProto()
    prepared.CopyFrom(model)
    if prepared.functions:
        prepared = inliner.inline_local_functions(prepared, convert_version=True)
        accept(prepared)  # again: the functions' bodies have now been seen
    drop_constant_inputs(prepared)
    prepared.ir_version = max(prepared.ir_version, 4)  # older ones knew no initialiser that is not an input
    fix_input_shapes(prepared, shapes, notes)
    name_nodes(prepared)
    prepared = infer_shapes(prepared, strict=False)
    check_valid(prepared)
    prepared = infer_shapes(convert_opset(prepared))
    require_windows(prepared)
    return prepared


def convert_opset(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model in opset 20 and IR version 9. Raises `IsthmusError` where onnx's converter has no way."""
    opset = default_opset(model)
    converted = onnx.ModelProto()
    converted.CopyFrom(model)
    if opset != OPSET:
        try:
            converted = version_converter.convert_version(converted, OPSET)
        except Exception as error:  # noqa: BLE001 - ConvertError, and plain RuntimeError out of the C++ adapters
            raise IsthmusError(f"the model cannot be converted from opset {opset} to {OPSET}: {first_line(error)}; export it with opset {OPSET}") from None
    converted.ir_version = IR_VERSION
    del converted.opset_import[:]
    converted.opset_import.extend(opset_imports(OPSET))
    for node in converted.graph.node:
        node.domain = ""
    return converted


def optimise(model: onnx.ModelProto) -> onnx.ModelProto:
    """ONNX Runtime's BASIC graph optimisations. Raises `IsthmusError` where ONNX Runtime cannot run the model."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = SILENT
    with tempfile.TemporaryDirectory(prefix="isthmus-") as folder:
        path = Path(folder) / "optimised.onnx"
        options.optimized_model_filepath = str(path)
        try:
            onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"], disabled_optimizers=DISABLED_OPTIMISERS)
        except Exception as error:  # noqa: BLE001 - onnxruntime's exceptions share no public base class
            raise IsthmusError(f"ONNX Runtime cannot run this model: {first_line(error)}") from None
        optimised = onnx.load(path)
    foreign = [node for node in optimised.graph.node if node.domain not in DEFAULT_DOMAINS]
    if foreign:
        raise IsthmusError(f"ONNX Runtime's optimiser wrote {foreign[0].op_type} of domain {foreign[0].domain!r}; report this with the model")
    del optimised.opset_import[:]
    optimised.opset_import.extend(opset_imports(OPSET))
    optimised.ir_version = IR_VERSION
    return optimised


def rewrite_exactly(model: onnx.ModelProto, rewrites: Sequence[type[NodeRewrite]] = EXACT_REWRITES) -> onnx.ModelProto:
    """Every one of `rewrites` until nothing changes, then clean names and shapes; the argument is not changed. The model is of opset 20."""
    graph = ir.serde.deserialize_model(infer_shapes(model))
    tidy = [common.RemoveUnusedNodesPass(), common.NameFixPass(), common.ClearMetadataAndDocStringPass()]
    rounds = [*(rewrite() for rewrite in rewrites), common.RemoveUnusedNodesPass()]  # what is no longer read must not count as a reader
    passes = ir.passes.Sequential(ir.passes.PassManager(rounds, steps=MOST_ROUNDS, early_stop=True), *tidy)
    rewritten = ir.serde.serialize_model(passes(graph).model)
    name_nodes(rewritten)
    inferred = infer_shapes(rewritten)
    require_static(inferred)
    return inferred


def name_nodes(model: onnx.ModelProto) -> None:
    """Gives each node a name of its own: problems, recipes and reports refer to nodes by name."""
    taken: set[str] = set()
    for node in model.graph.node:
        base = node.name or f"{node.op_type.lower()}"
        name, count = base, 1
        while name in taken:
            count += 1
            name = f"{base}_{count}"
        taken.add(name)
        node.name = name
