# SPDX-License-Identifier: Apache-2.0
"""The attributes of float islands, resolved as `isthmus.op_attributes` resolves the form's: there nothing may work along the batch, here anything may."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from isthmus.op_attributes import Attributes, Call, IllegalCallError, resolve

AXES_INPUT = {"Slice": 3, "Pad": 3, "ReduceMean": 1}
AXIS_DEFAULT = {"Split": 0, "Gather": 0, "Concat": 0}


def free_of_the_batch(call: Call) -> Attributes:
    """`resolve` behind an axis of 1 that stands in for the batch, and the axes counted back. Raises `IllegalCallError`."""
    given, constants, rank = dict(call.given), dict(call.constants), call.rank
    if call.op in AXIS_DEFAULT:
        given["axis"] = _from_the_back(int(given.get("axis", AXIS_DEFAULT[call.op])), rank)
    if call.op == "Transpose":
        given["perm"] = [0, *(axis + 1 for axis in given.get("perm", range(rank)[::-1]))]
    if call.op in AXES_INPUT:
        place = AXES_INPUT[call.op]
        axes = constants.get(place)
        if axes is None:
            axes = np.arange(len(constants[1].reshape(-1)) if call.op == "Slice" else rank)
        constants[place] = np.array([_from_the_back(int(axis), rank) for axis in axes.reshape(-1)], np.int64)
    shapes = tuple(tuple((1, *shape) for shape in side) for side in (call.inputs, call.outputs))
    return _without_the_first(resolve(replace(call, given=given, constants=constants, inputs=shapes[0], outputs=shapes[1])), rank)


def _from_the_back(axis: int, rank: int) -> int:
    if not -rank <= axis < rank:
        raise IllegalCallError(f"axis {axis} of {rank}", "name an axis that is there")
    return axis - rank if axis >= 0 else axis


def _without_the_first(attributes: Attributes, rank: int) -> Attributes:
    counted = dict(attributes)
    if "axis" in counted:
        counted["axis"] -= 1
    if "axes" in counted:
        counted["axes"] = [axis - 1 for axis in counted["axes"]]
    if "perm" in counted:
        counted["perm"] = [axis - 1 for axis in counted["perm"][1:]]
    if "pads" in counted:
        counted["pads"] = [*counted["pads"][1 : rank + 1], *counted["pads"][rank + 2 :]]
    return counted


def pad_mode(call: Call) -> tuple[str, Call]:
    """The mode of a Pad, and the call as if it were the constant one, whose rules hold for every mode."""
    mode = str(call.given.get("mode", "constant"))
    if mode not in ("constant", "reflect"):
        raise IllegalCallError(f"Pad with mode {mode!r}", "pad with a constant, or reflect")
    return mode, replace(call, given={**call.given, "mode": "constant"})


def gemm_parts(given: Mapping[str, Any], constants: Mapping[int, np.ndarray]) -> tuple[np.ndarray, np.ndarray | None]:
    """Weight [out, in] and bias [out] of a float Gemm, its factors folded in. Raises `IllegalCallError`."""
    if given.get("transA", 0):
        raise IllegalCallError("Gemm with transA", "transpose the input in front of it")
    weight = np.asarray(constants[1] if given.get("transB", 0) else constants[1].T) * np.float32(given.get("alpha", 1.0))
    bias = constants.get(2)
    if bias is None:
        return weight, None
    if bias.size not in (1, len(weight)) or (bias.size > 1 and bias.shape[-1] != len(weight)):
        raise IllegalCallError(f"Gemm with a bias of shape {list(bias.shape)}", f"give one number for each of {len(weight)} outputs")
    return weight, np.resize(bias * np.float32(given.get("beta", 1.0)), len(weight))
