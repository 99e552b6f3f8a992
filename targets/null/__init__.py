# SPDX-License-Identifier: Apache-2.0
"""Target `null`: the worked example. Copy this folder, rename it, and replace what the numbered comments point at.

A target is a folder under `targets/` whose `__init__.py` has `TARGET`; `registry` finds it by that. It turns a verified `QuantGraph` into a
`BuildPlan` and starts nothing itself. With an engine under `runtimes/`, a board under `targets/profiles/` and a line in the documentation
it is complete: the conformance suite runs it on every tiny model without being told.

This one's artifact is the form as it is, and its engine computes nothing: what the harness measures of it is the harness.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from isthmus.errors import Problem
from isthmus.graph import QuantGraph
from isthmus.ops import OPS
from isthmus.plan import BuildPlan
from isthmus.profile import Profile
from isthmus.target import Target

ARTIFACT = "model.onnx"


@dataclass(frozen=True)
class NullTarget(Target):
    """Takes every graph."""

    def check(self, graph: QuantGraph, profile: Profile) -> list[Problem]:
        """Nothing to refuse where nothing is computed.

        1. A real target returns `[*super().check(graph, profile), *own_rules]`: the base compares scheme, operators and float islands with
           the tables given at the end of this file; own rules name the node, what was found, and what the user can do. All of them at once.
        """
        return []

    def plan(self, graph: QuantGraph, profile: Profile, options: Mapping[str, Any]) -> BuildPlan:
        """2. Lower from `graph.nodes` and `graph.tensors` (each node one integer operator, all defaults resolved), never from the ONNX.

        3. `files` are written first, then `steps` run in order: whatever is slow, needs a tool, or belongs on a board is a `Step` and
           its outputs are checked. This target needs none.
        4. `inputs` and `outputs` are the border as the engine sees it. Say so where it wants NHWC (`layout`) or float.
        5. `runs_here`: True is the promise that the engine, on this machine, computes what the reference computes, within `max_lsb`; the
           pipeline then verifies it and fails if not. The null engine's outputs are no result, so it promises nothing: False.
        """
        return BuildPlan(
            files={ARTIFACT: graph.to_bytes()},
            steps=(),
            artifact=ARTIFACT,
            engine="null",
            inputs=graph.inputs,
            outputs=graph.outputs,
            runs_here=False,
            notes=("computes nothing, so there is nothing to verify",),
            options=self.with_defaults(options),
        )


# 6. The tables: `ops` lists the int8 operators (rows of core/ops.py), `float_ops` the float islands, `schemes` the quantisation schemes that the
#    target really has, each shown by a test; `options` what a user may set, with defaults that give the types.
TARGET = NullTarget(name="null", ops=frozenset(OPS))
