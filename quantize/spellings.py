# SPDX-License-Identifier: Apache-2.0
"""The ways to write an operator in torch (functions, methods), and the one module that each becomes."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional


class NotInFormError(Exception):
    """(rule, found, fix) of the `Problem` it becomes."""


class Reshape(nn.Module):
    """To (batch, *shape): the static shape behind any view, reshape, squeeze or unsqueeze."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, *self.shape)


def spelling(node: fx.Node) -> str:
    """What the user wrote, for an error message."""
    return str(node.target) if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _clamp(min: float | None = None, max: float | None = None) -> nn.Module:  # noqa: A002  # torch's names
    if max is None and min == 0:
        return nn.ReLU()
    if not isinstance(min, int | float) or not isinstance(max, int | float):
        raise NotInFormError("operand", f"clamps to ({min}, {max})", "give two numbers")
    return nn.Hardtanh(float(min), float(max))


def _max_pool(flat: bool) -> Callable[..., nn.Module]:
    def build(
        kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False, return_indices: bool = False
    ) -> nn.Module:  # fmt: skip
        return (nn.MaxPool1d if flat else nn.MaxPool2d)(kernel_size, stride, padding, dilation, return_indices, ceil_mode)

    return build


def _average_pool_1d(kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False, count_include_pad: bool = True) -> nn.Module:
    return nn.AvgPool1d(kernel_size, stride, padding, ceil_mode, count_include_pad)


def _average_pool_2d(
    kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False, count_include_pad: bool = True, divisor_override: int | None = None
) -> nn.Module:
    return nn.AvgPool2d(kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)


def _softmax(dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> nn.Module:
    return nn.Softmax(dim)


def _log_softmax(dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> nn.Module:
    return nn.LogSoftmax(dim)


def _nothing(*args: Any, **kwargs: Any) -> nn.Module:
    return nn.Identity()


ADD = {operator.add, operator.iadd, torch.add, "add", "add_"}
CONCATENATE = {torch.cat, torch.concat, torch.concatenate}
RESHAPE = {"view", "reshape", "flatten", "squeeze", "unsqueeze", torch.reshape, torch.flatten, torch.squeeze, torch.unsqueeze}
MEAN = {"mean", torch.mean}
BUILDERS: dict[Any, Callable[..., nn.Module]] = {
    **dict.fromkeys([functional.relu, functional.relu_, torch.relu, torch.relu_, "relu", "relu_"], lambda inplace=False: nn.ReLU()),
    functional.relu6: lambda inplace=False: nn.ReLU6(),
    functional.hardtanh: lambda min_val=-1.0, max_val=1.0, inplace=False: nn.Hardtanh(min_val, max_val),
    **dict.fromkeys([torch.clamp, torch.clip, "clamp", "clamp_", "clip"], _clamp),
    **dict.fromkeys([functional.max_pool1d, torch.max_pool1d], _max_pool(flat=True)),
    **dict.fromkeys([functional.max_pool2d, torch.max_pool2d], _max_pool(flat=False)),
    functional.avg_pool1d: _average_pool_1d,
    functional.avg_pool2d: _average_pool_2d,
    functional.adaptive_avg_pool1d: lambda output_size: nn.AdaptiveAvgPool1d(output_size),
    functional.adaptive_avg_pool2d: lambda output_size: nn.AdaptiveAvgPool2d(output_size),
    functional.adaptive_max_pool1d: lambda output_size, return_indices=False: nn.AdaptiveMaxPool1d(output_size, return_indices),
    functional.adaptive_max_pool2d: lambda output_size, return_indices=False: nn.AdaptiveMaxPool2d(output_size, return_indices),
    **dict.fromkeys([functional.softmax, torch.softmax, "softmax"], _softmax),
    **dict.fromkeys([functional.log_softmax, torch.log_softmax, "log_softmax"], _log_softmax),
    **dict.fromkeys([functional.sigmoid, torch.sigmoid, "sigmoid"], lambda: nn.Sigmoid()),
    **dict.fromkeys([functional.tanh, torch.tanh, "tanh"], lambda: nn.Tanh()),
    **dict.fromkeys([functional.dropout, functional.dropout1d, functional.dropout2d, "contiguous", "clone", "detach"], _nothing),
}


def module_for(node: fx.Node) -> nn.Module:
    """The module that does what the call of a `BUILDERS` entry does; its tensor comes first, the rest are plain values."""
    arguments, named = list(node.args), dict(node.kwargs)
    if not arguments or not isinstance(arguments[0], fx.Node) or any(isinstance(value, fx.Node) for value in [*arguments[1:], *named.values()]):
        raise NotInFormError("operand", f"{spelling(node)} depends on more than one tensor", "compute its settings from numbers")
    builder = BUILDERS[node.target]
    try:
        bound = inspect.signature(builder).bind(*arguments[1:], **named)
    except TypeError as error:
        raise NotInFormError("operand", f"{spelling(node)}: {error}", "call it in the documented way") from None
    return builder(*bound.args, **bound.kwargs)
