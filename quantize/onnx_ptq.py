# SPDX-License-Identifier: Apache-2.0
"""Post-training quantisation of a float ONNX model: runs it on calibration data and reads the range of every activation."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

from isthmus.errors import IsthmusError
from isthmus.quantize.ranges import Calibration, RangeCollector
from isthmus.recipe import Recipe

Arrays = Mapping[str, np.ndarray]
Progress = Callable[[int, int], None]
SMALLEST_RANGE = 2.0**-40


def calibrate(model: onnx.ModelProto, data: Arrays, recipe: Recipe, tensors: Collection[str] | None = None, progress: Progress | None = None) -> Calibration:
    """The range of every tensor in `tensors` (all float activations where None), with `warnings`, on at most `recipe.calibration_samples` samples.

    `data` holds by input name an array (N, ...) of samples without or with the model's own batch axis in front; which samples are used
    is drawn with `recipe.seed`. `progress(done, total)` is called after each run. Raises `IsthmusError` where the data does not fit the
    model's inputs or is not finite.
    """
    shapes = input_shapes(model)
    runs = CalibrationRuns(shapes, checked_data(shapes, data), recipe)
    wanted = list(dict.fromkeys(_activations(model) if tensors is None else tensors))
    session = open_with_outputs(model, [name for name in wanted if name not in shapes])
    collectors = {name: RangeCollector() for name in wanted}
    own = _recipes_of_tensors(model, recipe)
    passes: list[Callable[[RangeCollector, np.ndarray], None]] = [RangeCollector.measure]
    if recipe.scheme == "power_of_two" or any(used.observer != "minmax" for used in (recipe, *own.values())):
        passes.append(RangeCollector.count)
    for number, see in enumerate(passes):
        for done, feeds in enumerate(runs, start=1):
            for name, values in tensor_values(session, wanted, feeds).items():
                see(collectors[name], values)
            if progress is not None:
                progress(number * len(runs) + done, len(passes) * len(runs))
    return Calibration({name: collector.range(own.get(name, recipe)) for name, collector in collectors.items()}, list(_warnings(collectors)), runs.samples)


def _recipes_of_tensors(model: onnx.ModelProto, recipe: Recipe) -> dict[str, Recipe]:
    """The recipe of each tensor that an overridden layer writes, also through the Relu or Clip behind the layer."""
    own: dict[str, Recipe] = {}
    if not recipe.overrides:
        return own
    for node in model.graph.node:
        used = recipe.for_layer(node.name)
        if used is recipe and node.op_type in ("Relu", "Clip"):
            used = own.get(node.input[0], recipe)
        if used is not recipe:
            own |= dict.fromkeys(node.output, used)
    return own


class CalibrationRuns:
    """The feeds of each run of the model, in order; can be walked through more than once."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], data: Arrays, recipe: Recipe) -> None:
        self.shapes, self.data = shapes, data
        available = len(next(iter(data.values())))
        # An array whose rank is the input's own holds batches (N = runs x batch); one rank more holds whole inputs.
        self.batch = max(shape[0] if data[name].ndim == len(shape) and shape else 1 for name, shape in shapes.items())
        count = min(available, recipe.calibration_samples) // self.batch * self.batch
        if count == 0:
            raise IsthmusError(f"calibration needs at least {self.batch} samples (the model's batch), found {min(available, recipe.calibration_samples)}")
        self.chosen = np.sort(np.random.default_rng(recipe.seed).permutation(available)[:count])
        self.samples = count

    def __len__(self) -> int:
        return self.samples // self.batch

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        for start in range(0, self.samples, self.batch):
            rows = self.chosen[start : start + self.batch]
            feeds = {}
            for name, shape in self.shapes.items():
                array = np.asarray(self.data[name])[rows].astype(np.float32).reshape(shape)
                if not np.isfinite(array).all():
                    raise IsthmusError(f"calibration data for input {name!r} holds NaN or infinity, first in sample {int(rows[0])}; remove or repair it")
                feeds[name] = array
            yield feeds


def input_shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    constants = {tensor.name for tensor in model.graph.initializer}
    shapes = {}
    for value in model.graph.input:
        if value.name not in constants:
            shape = tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
            if 0 in shape:
                raise IsthmusError(f"input {value.name!r} has an open dimension; prepare the model with a static shape before calibrating it")
            shapes[value.name] = shape
    return shapes


def checked_data(shapes: Mapping[str, tuple[int, ...]], data: Arrays) -> Arrays:
    missing, extra = sorted(set(shapes) - set(data)), sorted(set(data) - set(shapes))
    if missing or extra:
        found = f"input {missing[0]!r} has no array" if missing else f"array {extra[0]!r} fits no input"
        raise IsthmusError(f"calibration data: {found}; the model's inputs are {sorted(shapes)}, the data holds {sorted(data)}")
    counts = {name: len(array) if np.ndim(array) else 0 for name, array in data.items()}
    if 0 in counts.values():
        raise IsthmusError(f"calibration data for input {next(name for name, count in counts.items() if not count)!r} is empty; give at least one sample")
    if len(set(counts.values())) != 1:
        raise IsthmusError(f"calibration data: every input needs as many samples as the others, found {counts}")
    for name, shape in shapes.items():
        array = np.asarray(data[name])
        if array.dtype.kind not in "fiu":
            raise IsthmusError(f"calibration data for input {name!r}: expected numbers, found dtype {array.dtype}")
        if array.shape[1:] != shape and (not shape or array.shape[1:] != shape[1:]):
            expected = f"expected an array [N, {', '.join(str(extent) for extent in shape[1:])}]"
            raise IsthmusError(f"calibration data for input {name!r}: {expected}, found {list(array.shape)}")
    return data


def _activations(model: onnx.ModelProto) -> list[str]:
    """Graph inputs and every tensor a node writes that is known to be float32."""
    known = {value.name for value in (*model.graph.value_info, *model.graph.output) if value.type.tensor_type.elem_type == TensorProto.FLOAT}
    return [*input_shapes(model), *(name for node in model.graph.node for name in node.output if name in known)]


def open_with_outputs(model: onnx.ModelProto, outputs: list[str]) -> onnxruntime.InferenceSession:
    """The model with `outputs` as its outputs, opened in ONNX Runtime."""
    opened = onnx.ModelProto()
    opened.CopyFrom(model)
    written = {name for node in model.graph.node for name in node.output}
    unknown = [name for name in outputs if name not in written]
    if unknown:
        raise IsthmusError(f"tensor {unknown[0]!r} cannot be calibrated: no node of the model writes it")
    del opened.graph.output[:]
    opened.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs or [model.graph.output[0].name])
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        return onnxruntime.InferenceSession(opened.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001 - onnxruntime's exceptions share no public base class
        raise IsthmusError(f"ONNX Runtime cannot run the model for calibration: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def tensor_values(session: onnxruntime.InferenceSession, wanted: list[str], feeds: Arrays) -> dict[str, np.ndarray]:
    computed = [value.name for value in session.get_outputs()]
    try:
        results = session.run(computed, dict(feeds))
    except Exception as error:  # noqa: BLE001 - onnxruntime's exceptions share no public base class
        raise IsthmusError(f"ONNX Runtime cannot run the model on the calibration data: {_first_line(error)}") from None
    found = dict(zip(computed, results, strict=True)) | dict(feeds)
    return {name: np.asarray(found[name]) for name in wanted}


def _warnings(collectors: Mapping[str, RangeCollector]) -> Iterator[str]:
    for name, collector in collectors.items():
        if not collector.low <= collector.high or math.inf in (abs(collector.low), abs(collector.high)):
            yield f"tensor {name!r} becomes NaN or infinite on the calibration data and has no range; check the data's scale and the model's weights"
        elif max(abs(collector.low), abs(collector.high)) < SMALLEST_RANGE:
            yield f"tensor {name!r} is zero on all calibration data; it gets a scale of no meaning, use more varied data if it should not be"
        elif collector.low == collector.high:
            yield f"tensor {name!r} has the one value {collector.low:.6g} on all calibration data; its range ends there, use more varied data if it should not"
