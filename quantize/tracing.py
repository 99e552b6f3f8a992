# SPDX-License-Identifier: Apache-2.0
"""Tracing a torch module with torch.fx, with the shapes of every tensor known while it is traced."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from isthmus.errors import IsthmusError
from isthmus.quantize.normalise import normalise
from isthmus.user_line import user_line

SAME = 1e-4  # what tracing and folding may change, as a share of the largest value


def trace(module: nn.Module, example_inputs: Sequence[Tensor]) -> fx.GraphModule:
    """A copy of `module` in evaluation mode as a graph of the form's operators; the function stays.

    A node's `meta["shape"]` is for the example's batch twice over, None for what is not one tensor. Raises `IsthmusError` where the module
    does not run or cannot be traced (naming the line), `ProblemsError` listing every construct that the int8 form does not have.
    """
    name = type(module).__name__
    _check_finite(module, name)
    module = copy.deepcopy(module).eval()
    doubled = [_doubled(example) for example in example_inputs]
    try:
        with torch.no_grad():
            expected = _leaves(module(*(example.clone() for example in doubled)))
    except Exception as error:  # the user's own forward may raise anything
        shapes = ", ".join(str(list(example.shape)) for example in doubled)
        raise IsthmusError(
            f"{name} does not run on samples of shape {shapes}: {_first_line(error)}{user_line(error, [__file__])}; give an example input that fits"
        ) from error
    try:
        with torch.no_grad():
            graph = fx.GraphModule(module, _ShapeTracer(doubled).trace(module), name)
    except Exception as error:  # TraceError for control flow, TypeError and others for conversions of a traced value
        raise IsthmusError(
            f"{name} cannot be traced: {_first_line(error)}{user_line(error, [__file__])}; write forward() without decisions on values"
        ) from error
    for node in graph.graph.nodes:
        value = node.meta.pop("value", None)
        node.meta["shape"] = tuple(value.shape) if isinstance(value, Tensor) else None
    normalise(graph, name)
    _check_same(graph, doubled, expected, name)
    return graph


def _check_finite(module: nn.Module, name: str) -> None:
    for path, tensor in (*module.named_parameters(), *module.named_buffers()):
        if not torch.isfinite(tensor).all():
            raise IsthmusError(f"{name}: {path} holds NaN or infinity; train the module again, or load another checkpoint")


def _doubled(example: Tensor) -> Tensor:
    """Twice the batch tells the batch from a dimension that happens to equal it; the noise tells functions apart where the example is all zeros."""
    if example.dtype != torch.float32 or example.ndim < 2:
        raise IsthmusError(f"the example input is {example.dtype} of shape {list(example.shape)}, expected float32 with the batch in front")
    return torch.cat([example, example + torch.randn(example.shape, generator=torch.Generator().manual_seed(0))])


def _check_same(graph: fx.GraphModule, examples: Sequence[Tensor], expected: Sequence[Tensor], name: str) -> None:
    """Folding a batch norm moves results by float rounding; anything larger is a network that tracing does not see through."""
    with torch.no_grad():
        found = _leaves(graph(*examples))
    for index, (new, old) in enumerate(zip(found, expected, strict=True)):
        difference, allowed = float((new - old).abs().max()), SAME * max(float(old.abs().max()), 1.0)
        if not difference <= allowed:
            raise IsthmusError(
                f"{name}: traced, output {index} differs from the module's own by {difference:g} (allowed: {allowed:g});"
                " write forward() without changing a tensor in place that is read again, and without randomness"
            )


def _leaves(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if not isinstance(value, list | tuple | dict):
        raise TypeError(f"forward() returns a {type(value).__name__}, expected tensors")
    return [leaf for item in (value.values() if isinstance(value, dict) else value) for leaf in _leaves(item)]


class _ShapedProxy(fx.Proxy):
    """A traced tensor whose shape is known, so that shape arithmetic, assertions and branches on shapes run instead of being traced."""

    @property
    def shape(self) -> torch.Size:
        return self._value().shape

    @property
    def ndim(self) -> int:
        return self._value().ndim

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self._value().size() if dim is None else self._value().size(dim)

    def dim(self) -> int:
        return self._value().dim()

    def _value(self) -> Tensor:
        value = self.node.meta["value"]
        if not isinstance(value, Tensor):
            raise TypeError(f"the result of {self.node.name} is a {type(value).__name__}, not one tensor")
        return value


class _ShapeTracer(fx.Tracer):
    """Runs every operation on the example while tracing it. Arguments beyond the example inputs keep their defaults."""

    record_stack_traces = True

    def __init__(self, examples: Sequence[Tensor]) -> None:
        super().__init__()
        self._examples = [example.clone() for example in examples]  # the network may change its input in place
        self._running = False

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _ShapedProxy(node, self)

    def create_proxy(self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *rest: Any, **named: Any) -> Any:
        if kind == "placeholder" and target.startswith("*"):
            raise TypeError(f"forward() takes {target}, an open list of arguments")
        if kind == "placeholder" and not self._examples:
            return args[0]
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **named)
        self._running = True
        try:
            proxy.node.meta["value"] = self._run(proxy.node)
        finally:
            self._running = False
        return proxy

    def _run(self, node: fx.Node) -> Any:
        target: Any = node.target
        args, kwargs = map_arg((node.args, node.kwargs), self._known)
        if node.op == "placeholder":
            return self._examples.pop(0)
        if node.op == "call_module":
            return self.root.get_submodule(target)(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        return target(*args, **kwargs) if node.op == "call_function" else operator.attrgetter(target)(self.root)

    def _known(self, node: fx.Node) -> Any:
        if "value" not in node.meta:  # a tensor made on the spot: fx stores it without asking for a proxy
            node.meta["value"] = self._run(node)
        return node.meta["value"]

    # torch.fx patches calls of modules and look-ups of parameters while it traces: not to be traced again where they are run.
    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return forward(*args, **kwargs) if self._running else super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self._running else super().getattr(attr, attr_val, parameter_proxy_cache)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:300]
