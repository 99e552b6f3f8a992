# SPDX-License-Identifier: Apache-2.0
"""`isthmus cost`: a model file or a bundle as figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx

from isthmus.bundle import Bundle
from isthmus.console import grid
from isthmus.cost import CONVENTIONS, Cost, cost_of_graph, cost_of_onnx
from isthmus.errors import IsthmusError
from isthmus.form import RECIPE_KEY
from isthmus.form_file import load_form
from isthmus.graph import QuantGraph
from isthmus.onnx_file import load_onnx
from isthmus.recipe import load_recipe
from isthmus.source import load_source
from isthmus.tree_cost import cost_of_trees
from isthmus.tree_form import TreeForm

Loaded = QuantGraph | TreeForm | onnx.ModelProto


def cost_of(model: str, shapes: Mapping[str, tuple[int, ...]], convention: str) -> Cost:
    """The cost of a bundle, an int8 form, or any model `compile` takes. Raises `IsthmusError` on an unknown convention or model."""
    checked_convention(convention)
    return cost_of_loaded(form_or_onnx(model, shapes))


def checked_convention(convention: str) -> None:
    if convention not in CONVENTIONS:
        raise IsthmusError(f"unknown convention {convention!r}: there are {', '.join(CONVENTIONS)}")


def cost_of_loaded(loaded: Loaded) -> Cost:
    if isinstance(loaded, TreeForm):
        return cost_of_trees(loaded)
    return cost_of_graph(loaded) if isinstance(loaded, QuantGraph) else cost_of_onnx(loaded)


def form_or_onnx(model: str, shapes: Mapping[str, tuple[int, ...]]) -> Loaded:
    """The form of a bundle or a file, else the float model as it is: batch normalisation stands where the file has it. Raises `IsthmusError`."""
    if (Path(model) / "manifest.json").is_file():
        return load_form(Bundle.open(model).model)
    if model.startswith("zoo:"):
        from isthmus.zoo_source import untrained_onnx

        return untrained_onnx(model)
    if model.endswith(".onnx") and not shapes:
        loaded = load_onnx(model)
        if all(entry.key != RECIPE_KEY for entry in loaded.metadata_props):
            return loaded
    source = load_source(model, None, shapes, load_recipe("portable"), lambda text, share: None)
    if source.graph is not None:
        return source.graph
    assert source.float_model is not None
    return source.float_model


def cost_table(cost: Cost, convention: str, layers: bool) -> str:
    """Totals with the convention named; one line a layer in front where asked for."""
    lines = []
    if layers:
        rows = [
            [
                n.name,
                n.op,
                "x".join(map(str, n.output_shape)),
                f"{n.parameters:,}",
                f"{n.macs:,}",
                f"{n.count(convention):,}",
                f"{100 * n.share:.1f} %",
                f"{n.weight_bytes:,}",
            ]
            for n in cost.per_node
        ]
        lines += [grid(["layer", "operator", "output", "parameters", "MACs", f"FLOPs ({convention})", "share", "weight bytes"], rows), ""]
    totals = [
        ["parameters", f"{cost.parameters:,}"],
        ["MACs", f"{cost.macs:,}"],
        [f"FLOPs, convention '{convention}'", f"{cost.count(convention):,}"],
        ["weight bytes", f"{cost.weight_bytes:,}"],
        ["peak activation bytes", f"{cost.activation_bytes:,}"],
        ["peak in the best order", f"{cost.best_order_bytes:,}" if cost.best_order_bytes is not None else "too many orders to search"],
    ]
    lines += [grid(["figure", "value"], totals), "", f"{convention}: {CONVENTIONS[convention]}"]
    if cost.uncounted:
        lines.append(f"not counted (no rule): {', '.join(cost.uncounted)}")
    return "\n".join(lines)
