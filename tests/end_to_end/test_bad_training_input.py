# SPDX-License-Identifier: Apache-2.0
"""What users' modules, checkpoints and calibration data have wrong: each a correct result, a warning, or one sentence that names it."""

from __future__ import annotations

import ast
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import isthmus
from isthmus.bundle import Bundle
from isthmus.errors import IsthmusError
from isthmus.graph import QuantGraph
from isthmus.quantize import qat
from isthmus.recipe import Recipe

SHAPE = (1, 6, 6)
QAT = Recipe(name="short", observer="mse", qat_epochs=1)


class Net(nn.Module):
    """Two convolutions around one line of the user's."""

    def __init__(self, line: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        self.first, self.second, self.line = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 2, 3), line

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.line(self.first(x)))


def samples(count: int = 48) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, *SHAPE)).astype(np.float32)


def compiled(module: nn.Module, place: Path, recipe: Recipe | str = "portable", data: np.ndarray | None = None) -> Bundle:
    return isthmus.compile(module, torch.zeros(1, *SHAPE), data=samples() if data is None else data, recipe=recipe, tune=False, output=place / "bundle")


def apart(bundle: Bundle, expected: Tensor) -> float:
    """The largest difference of the artifact from the float module, as a share of its largest value."""
    with bundle.open_session("cpu") as session:
        parts = [next(iter(session.run({session.inputs[0].name: sample[None]}).values())) for sample in samples(8)]
    return float(np.abs(np.concatenate(parts) - expected.numpy()).max() / expected.abs().max())


def exact(module: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = module(torch.from_numpy(samples(8)))
    return found


@pytest.fixture(params=["portable", QAT], ids=["ptq", "qat"])
def recipe(request: pytest.FixtureRequest) -> Recipe | str:
    chosen: Recipe | str = request.param
    return chosen


# ---- calibration data
def test_a_tensor_that_is_always_zero_is_named_and_gets_a_scale(tmp_path: Path) -> None:
    module = Net()
    with torch.no_grad():
        assert module.first.bias is not None
        module.first.bias.fill_(-100.0)  # nothing passes the activation
    bundle = compiled(module, tmp_path)
    assert any("is zero on all calibration data" in note for note in bundle.manifest["notes"])
    graph = QuantGraph.load(bundle.model)
    assert all(spec.scale is None or (np.isfinite(spec.scale) and spec.scale > 0) for spec in graph.tensors.values())


def test_samples_of_one_value_are_named(tmp_path: Path) -> None:
    bundle = compiled(Net(), tmp_path, data=np.full((8, *SHAPE), 0.5, np.float32))
    assert any("'input' has the one value 0.5 on all calibration data" in note for note in bundle.manifest["notes"])


def test_a_channel_that_is_always_zero_leaves_the_others_correct(tmp_path: Path, recipe: Recipe | str) -> None:
    module = Net()
    with torch.no_grad():
        assert module.first.bias is not None
        module.first.weight[1] = 0
        module.first.bias[1] = 0
    bundle = compiled(module, tmp_path, recipe)
    assert apart(bundle, exact(module)) < 0.15


def test_saturated_samples_keep_finite_scales(tmp_path: Path) -> None:
    """A sensor at its end stop: two values, nothing between; and numbers near the end of float32."""
    stops = np.where(samples() > 0, np.float32(1), np.float32(-1))
    assert all(row["passed"] for row in compiled(Net(), tmp_path / "stops", data=stops).artifact("cpu")["verification"])
    with pytest.raises(IsthmusError, match=r"tensor '\S+': its range \[.*inf.*\] cannot be quantised; calibrate with data on which the model stays finite"):
        compiled(Net(), tmp_path / "huge", data=stops * np.float32(3e38))


def test_a_layer_whose_scale_underflows_is_still_a_layer(tmp_path: Path, recipe: Recipe | str) -> None:
    module = Net()
    with torch.no_grad():
        module.first.weight *= 1e-30
        assert module.first.bias is not None
        module.first.bias.fill_(0.5)
    bundle = compiled(module, tmp_path, recipe)
    graph = QuantGraph.load(bundle.model)
    for node in graph.nodes:
        if node.weight_scale is not None:
            product = node.weight_scale.astype(np.float32) * np.float32(graph.tensors[node.inputs[0]].scale)
            assert np.isfinite(product).all() and (product >= np.finfo(np.float32).tiny).all()
    assert apart(bundle, exact(module)) < 0.15


# ---- modules
def test_weights_with_nan_are_named(tmp_path: Path) -> None:
    module = Net()
    with torch.no_grad():
        module.second.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(IsthmusError, match=r"second\.weight: 1 of 72 values are NaN \[finite-weights\]"):
        compiled(module, tmp_path)
    with pytest.raises(IsthmusError, match=r"Net: second\.weight holds NaN or infinity; train the module again"):
        qat.prepare(module, torch.zeros(1, *SHAPE), QAT)


def test_control_flow_on_data_is_named_with_its_line(tmp_path: Path) -> None:
    def line(x: Tensor) -> Tensor:
        return torch.relu(x) if x.sum() > 0 else x

    place = rf"\(test_bad_training_input\.py:{line.__code__.co_firstlineno + 1}\)"
    with pytest.raises(IsthmusError, match=rf"Net cannot be exported: GuardOnDataDependentSymNode.* {place}; forward\(\) must be traceable"):
        compiled(Net(line), tmp_path)
    with pytest.raises(IsthmusError, match=rf"Net cannot be traced: TraceError: .*control flow {place}; write forward\(\) without decisions"):
        qat.prepare(Net(line), torch.zeros(1, *SHAPE), QAT)


def test_a_construct_that_training_does_not_know_is_named_with_its_line() -> None:
    with pytest.raises(IsthmusError, match=r"erf.* \(test_bad_training_input\.py:\d+\): erf has no int8 form here \[operator\]; use Conv1d"):
        qat.prepare(Net(lambda x: torch.relu(torch.erf(x))), torch.zeros(1, *SHAPE), QAT)


def test_a_layer_called_twice(tmp_path: Path) -> None:
    """Calibrated: one set of weights, read twice. Trained: it would need two scales for one weight, and says so."""
    layer = nn.Conv2d(4, 4, 3, padding=1)
    module = Net(nn.Sequential(layer, nn.ReLU(), layer))
    assert apart(compiled(module, tmp_path), exact(module)) < 0.15
    with pytest.raises(IsthmusError, match=r"line\.0 is called more than once \[shared-weights\]; give every call a layer of its own"):
        qat.prepare(module, torch.zeros(1, *SHAPE), QAT)


def test_operations_in_place(tmp_path: Path, recipe: Recipe | str) -> None:
    def line(x: Tensor) -> Tensor:
        y = nn.functional.relu_(x)
        y += y.clone()
        return y.relu_()

    module = Net(line)
    bundle = compiled(module, tmp_path, recipe)
    assert apart(bundle, exact(module)) < 0.15


def test_a_value_read_after_it_was_changed_in_place(tmp_path: Path) -> None:
    """x.relu_() changes what the second reader sees. Calibrated: as torch computes it. Trained: refused, never silently another function."""

    def line(x: Tensor) -> Tensor:
        y = torch.relu_(x)
        return x + y

    module = Net(line)
    assert apart(compiled(module, tmp_path), exact(module)) < 0.15
    with pytest.raises(IsthmusError, match=r"differs from the module's own by .* write forward\(\) without changing a tensor in place"):
        qat.prepare(module, torch.zeros(1, *SHAPE), QAT)


def test_a_module_in_training_mode(tmp_path: Path, recipe: Recipe | str) -> None:
    """Dropout and batch statistics must not be in the result; the module stays in its mode."""
    module = Net(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.9)))
    module(torch.from_numpy(samples()))
    module.train()
    bundle = compiled(module, tmp_path, recipe)
    assert module.training
    assert apart(bundle, exact(module.eval())) < 0.15


# ---- checkpoints
class Payload:
    """What unpickles into a call of the attacker's choice."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path(self.trace),)  # type: ignore[return-value]


def test_a_hostile_checkpoint_runs_nothing(tmp_path: Path) -> None:
    """`weights_only=True`, which the documentation asks of a factory and which every reader of isthmus uses, refuses it before it runs."""
    trace = tmp_path / "executed"
    torch.save({"weight": Payload(trace)}, tmp_path / "hostile.pth")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "hostile.pth", weights_only=True)
    assert not trace.exists()
    torch.load(tmp_path / "hostile.pth", weights_only=False)
    assert trace.exists()  # the file does carry what it must not get to do


def test_no_part_of_isthmus_unpickles() -> None:
    """Every torch.load of the program is a safe one; nothing calls pickle, torch.jit.load, or numpy with pickles."""
    root = Path(isthmus.__file__).parents[1]
    files = [file for folder in ("core", "train", "quantize", "export", "targets", "runtimes") for file in (root / folder).rglob("*.py")]
    found = []
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called, safe = ast.unparse(node.func), {word.arg for word in node.keywords if ast.unparse(word.value) == "True"}
            if (called == "torch.load" and "weights_only" not in safe) or called in ("pickle.load", "pickle.loads", "torch.jit.load") or "allow_pickle" in safe:
                found.append(f"{file.relative_to(root)}:{node.lineno}")
    assert len(files) > 100 and not found
