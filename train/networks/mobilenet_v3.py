# SPDX-License-Identifier: Apache-2.0
"""MobileNetV3-Large: inverted residuals with squeeze-and-excite and hard swish (Howard, Sandler, Chu et al.)."""

from __future__ import annotations

from torch import Tensor, nn

CHANNELS = 960
# (kernel, expanded channels, channels, squeeze-and-excite, hard swish instead of ReLU, stride)
BLOCKS = (
    (3, 16, 16, False, False, 1),
    (3, 64, 24, False, False, 2),
    (3, 72, 24, False, False, 1),
    (5, 72, 40, True, False, 2),
    (5, 120, 40, True, False, 1),
    (5, 120, 40, True, False, 1),
    (3, 240, 80, False, True, 2),
    (3, 200, 80, False, True, 1),
    (3, 184, 80, False, True, 1),
    (3, 184, 80, False, True, 1),
    (3, 480, 112, True, True, 1),
    (3, 672, 112, True, True, 1),
    (5, 672, 160, True, True, 2),
    (5, 960, 160, True, True, 1),
    (5, 960, 160, True, True, 1),
)


class SqueezeExcite(nn.Module):
    """Each channel times a gate computed from the means of all channels."""

    def __init__(self, channels: int, squeezed: int, inner: nn.Module, gate: nn.Module) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, squeezed, 1), inner, nn.Conv2d(squeezed, channels, 1), gate)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


class _Block(nn.Module):
    def __init__(self, channels: int, kernel: int, width: int, out: int, excite: bool, swish: bool, stride: int) -> None:
        super().__init__()
        layers = _conv_norm(channels, width, 1, 1, swish) if width != channels else []
        layers += _conv_norm(width, width, kernel, stride, swish, groups=width)
        if excite:
            layers.append(SqueezeExcite(width, _multiple_of_8(width / 4), nn.ReLU(), nn.Hardsigmoid()))
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out))
        self.residual = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


def features() -> nn.Sequential:
    """(N, 3, H, W) as (N, 960, H / 32, W / 32)."""
    layers = _conv_norm(3, 16, 3, 2, True)
    channels = 16
    for kernel, width, out, excite, swish, stride in BLOCKS:
        layers.append(_Block(channels, kernel, width, out, excite, swish, stride))
        channels = out
    return nn.Sequential(*layers, *_conv_norm(channels, CHANNELS, 1, 1, True))


def _conv_norm(channels: int, out: int, kernel: int, stride: int, swish: bool, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(channels, out, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(out, eps=1e-3), nn.Hardswish() if swish else nn.ReLU()]


def _multiple_of_8(value: float) -> int:
    """The nearest multiple of 8, at most a tenth below."""
    rounded = max(8, int(value + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * value else rounded + 8
