# SPDX-License-Identifier: Apache-2.0
"""`Target`: what turns a `QuantGraph` into a `BuildPlan`. One folder under `targets/` each, found by `registry`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from isthmus.errors import IsthmusError, Problem
from isthmus.lint import LintRow
from isthmus.plan import BuildPlan
from isthmus.profile import Profile

if TYPE_CHECKING:
    from isthmus.graph import QuantGraph


def carried_steps(inexact_layers: int) -> int:
    """What a network may differ from the reference whose engine may fall to the other side of a tie, by one step, in so many layers.

    Layers behind carry such a step on. Not a bound but what was measured: 2 on a 34-layer and 3 on a 53-layer network with random weights.
    """
    return min(max(inexact_layers, 1), 2 + inexact_layers // 20)


@dataclass(frozen=True)
class Option:
    """One `--set name=value` of a target: its default gives the type."""

    default: bool | int | float | str
    help: str


def check_options(targets: Sequence[Target], options: Mapping[str, Any]) -> None:
    """Raises `IsthmusError` for an option that none of the targets has."""
    for name in options:
        if not any(name in target.options for target in targets):
            known = sorted({option for target in targets for option in target.options})
            raise IsthmusError(f"option {name!r} is known to none of the targets: there are {', '.join(known) or 'none'}")


@dataclass(frozen=True)
class Estimate:
    """What one way of running a graph on a board would take, without the board. `latency_s` is (low, likely, high), None where only resources are known.

    `resources` counts what is used by name; `basis` says in a sentence what the figures come from; `word` is "predicted" or "estimated",
    and stands beside them wherever they are shown. `layers`: what each layer of the design takes, where the target knows.
    """

    label: str
    latency_s: tuple[float, float, float] | None
    resources: Mapping[str, float]
    basis: str
    word: str = "estimated"
    layers: tuple[Mapping[str, str | int], ...] = ()


@dataclass(frozen=True)
class Target:
    """The base of every target; a subclass fills `check` and `plan`. Frozen: a target has no state.

    `ops` names the int8 operators (rows of `core/ops.py`) the target really has; `float_ops` what it runs as float islands.
    """

    name: str
    ops: frozenset[str]
    float_ops: frozenset[str] = frozenset()
    schemes: frozenset[str] = frozenset({"power_of_two", "symmetric", "asymmetric"})
    options: Mapping[str, Option] = field(default_factory=dict)

    def check(self, graph: QuantGraph, profile: Profile) -> list[Problem]:
        """Every reason why this graph cannot become an artifact for this board, at once; empty where it can.

        The base checks scheme and operator tables; a subclass adds its own rules to what `super().check` returns.
        """
        problems = []
        if graph.recipe.scheme not in self.schemes:
            problems.append(
                Problem(
                    "model",
                    "scheme",
                    f"scheme {graph.recipe.scheme!r}, but {self.name} takes {sorted(self.schemes)}",
                    "quantise with a recipe of such a scheme (--recipe portable fits every target)",
                )
            )
        for node in graph.nodes:
            if node.op in ("QuantizeLinear", "DequantizeLinear"):
                continue
            table = self.ops if node.kind == "int8" else self.float_ops
            if node.op not in table:
                problems.append(
                    Problem(
                        node.name,
                        "operator",
                        f"{node.op} ({node.kind}) is not in the table of target {self.name}",
                        f"replace the layer, cut the graph before it, or choose another target than {self.name}",
                    )
                )
        return problems

    def plan(self, graph: QuantGraph, profile: Profile, options: Mapping[str, Any]) -> BuildPlan:
        """Files and steps that make the artifact. Touches no device and starts no tool."""
        raise NotImplementedError

    def estimate(self, graph: QuantGraph, profile: Profile, options: Mapping[str, Any]) -> list[Estimate]:
        """What the artifact would take on the board, one entry a way of running it; empty where nothing is known of this board."""
        return []

    def lint(self, graph: QuantGraph, profile: Profile) -> list[LintRow] | None:
        """How each layer would run, and what to change; None where the target has no such rules."""
        return None

    def with_defaults(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """`options` completed by the defaults. Raises `IsthmusError` on an unknown name or a value of another type."""
        merged: dict[str, Any] = {name: option.default for name, option in self.options.items()}
        for name, value in options.items():
            if name not in merged:
                raise IsthmusError(f"target {self.name} has no option {name!r}: it has {sorted(merged) or 'none'}")
            kind = type(merged[name])
            try:
                if kind is bool and isinstance(value, str):
                    merged[name] = {"true": True, "1": True, "false": False, "0": False}[value.lower()]
                else:
                    merged[name] = converted = kind(value)
                    if not isinstance(value, str) and converted != value:  # int(3.7), bool(5)
                        raise ValueError
            except (KeyError, TypeError, ValueError):
                raise IsthmusError(f"option {name} of target {self.name}: expected {kind.__name__}, found {value!r}") from None
        return merged
