# SPDX-License-Identifier: Apache-2.0
"""Brevitas QAT: networks of many spellings whose exported form computes, integer for integer, what the trained module computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from isthmus import reference
from isthmus.compare import top1_accuracy
from isthmus.errors import IsthmusError, ProblemsError
from isthmus.export.to_graph import graph_from_qdq
from isthmus.graph import QuantGraph
from isthmus.quantize import qat
from isthmus.quantize.observer import Observer, border_scale, fitting_scale
from isthmus.recipe import Recipe
from isthmus.train import zoo
from isthmus.train.loop import fit, predict


@pytest.fixture(autouse=True)
def _brevitas(require: Callable[[str], str]) -> Iterator[None]:
    require("brevitas")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # networks this small are slower on two
    yield
    torch.set_num_threads(threads)


# ---- networks
class Residual(nn.Module):
    """Batch norms to fold, a shortcut with a convolution, in-place addition, a shared activation, a mean, a float tail."""

    shapes = ((3, 16, 16),)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding="same", bias=False), nn.BatchNorm2d(8)
        self.first, self.first_norm = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16)
        self.second, self.second_norm = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.shortcut, self.shortcut_norm = nn.Conv2d(8, 16, 1, stride=2), nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.classifier = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.stem(x)))
        y = self.relu(self.first_norm(self.first(x)))
        y = self.second_norm(self.second(y))
        y += self.shortcut_norm(self.shortcut(x))
        return functional.softmax(self.classifier(self.relu(y).mean(dim=(2, 3))), dim=1)


class Functional(nn.Module):
    """Functions and methods in place of modules, shape arithmetic, an assertion, a branch on a shape, an optional argument."""

    shapes = ((1, 10, 10),)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.depthwise, self.pointwise = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 6, 1)
        self.hidden, self.last, self.dropout = nn.Linear(6 * 3 * 3, 10), nn.Linear(10, 3, bias=False), nn.Dropout()

    def forward(self, x: Tensor, scale: Tensor | None = None, twice: bool = False) -> Tensor:
        x = functional.max_pool2d(functional.relu6(self.first(x)), 2, padding=1)
        assert x.shape[1] == 4
        x = self.pointwise(torch.relu(self.depthwise(x)).clamp(0, 1.5))
        x = functional.relu(functional.avg_pool2d(x, 3, stride=2, padding=1))
        if scale is not None or twice or x.size(2) > 3:
            x = x * 2
        batch, _, height, width = x.shape
        x = functional.adaptive_avg_pool2d(x, (height, width)).view(batch, -1)
        return self.last(self.dropout(functional.relu(self.hidden(x))))


class Dense(nn.Module):
    """Concatenations, one with the graph input itself; batch norms that no convolution precedes; an adaptive max pool."""

    shapes = ((3, 8, 8),)

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)
        self.middle_norm, self.second = nn.BatchNorm2d(7), nn.Conv2d(7, 4, 3, padding=1)
        self.merge, self.classifier = nn.Conv2d(11, 4, 1), nn.Linear(4 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([x, self.first(functional.relu(self.norm(x)))], 1)
        z = torch.cat([y, self.second(functional.relu(self.middle_norm(y)))], dim=1)
        return self.classifier(functional.adaptive_max_pool2d(self.merge(z), 4).flatten(1))


class Series(nn.Sequential):
    shapes = ((2, 32),)

    def __init__(self) -> None:
        blocks = (nn.Conv1d(2, 8, 5, padding=2), nn.BatchNorm1d(8), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(8, 8, 3, dilation=2), nn.ReLU(), nn.AvgPool1d(2))
        super().__init__(*blocks, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


class TwoInputs(nn.Module):
    shapes = ((1, 6, 6), (2, 6, 6))

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(2, 4, 3, padding=1)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        y = self.left(left) + self.right(right)
        return functional.relu(y) + y


NETWORKS = (Residual, Functional, Dense, Series, TwoInputs)
EXACT = (Recipe(), Recipe(observer="mse", per_channel=True))
NEAR = Recipe(scheme="symmetric", per_channel=True, observer="percentile")


def trained(network: type[nn.Module]) -> tuple[nn.Module, list[Tensor]]:
    """With batch norms far from the identity, and samples."""
    torch.manual_seed(0)
    module = network()
    samples = [torch.randn(48, *shape) for shape in network.shapes]
    with torch.no_grad():
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
                norm.weight.uniform_(0.5, 2)
                norm.bias.normal_()
        for _ in range(20):
            module(*samples)
    return module.eval(), samples


def quantised(module: nn.Module, samples: Sequence[Tensor], recipe: Recipe) -> tuple[nn.Module, QuantGraph]:
    examples = [tensor[:1] for tensor in samples]
    result = qat.quantise(module, examples, [tensor.numpy() for tensor in samples], recipe)
    return result, graph_from_qdq(qat.to_qcdq(result, examples), recipe)


def steps_apart(module: nn.Module, graph: QuantGraph, samples: Sequence[Tensor]) -> np.ndarray:
    """Between the integer reference and the fake-quantised module, in steps of the (last int8) output."""
    raw = reference.run(graph, {spec.name: spec.quantise(tensor.numpy()) for spec, tensor in zip(graph.inputs, samples, strict=True)})
    spec = graph.outputs[0]
    with torch.no_grad():
        expected = module(*samples).numpy()
    found = spec.dequantise(raw[spec.name]) if spec.is_quantised else raw[spec.name]
    return np.abs(found - expected) / (spec.scale or 1)


@pytest.mark.parametrize("recipe", EXACT, ids=lambda recipe: recipe.observer)
@pytest.mark.parametrize("network", NETWORKS)
def test_the_form_computes_the_quantised_module_exactly(network: type[nn.Module], recipe: Recipe) -> None:
    module, samples = trained(network)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    result, graph = quantised(module, samples, recipe)
    tail = 1e-6 if graph.float_islands else 0  # a softmax in float
    assert steps_apart(result, graph, samples).max() <= tail
    assert all(node.kind != "float" or node.op == "Softmax" for node in graph.nodes)
    with torch.no_grad():
        exact, rounded = module(*samples), result(*samples)
    assert float((exact - rounded).square().mean()) < 3e-3 * float(exact.square().mean())
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("network", NETWORKS)
def test_float_scales_differ_only_where_float32_breaks_a_tie(network: type[nn.Module]) -> None:
    module, samples = trained(network)
    result, graph = quantised(module, samples, NEAR)
    apart = steps_apart(result, graph, samples)
    assert apart.max() < 1.01 and np.mean(apart > 0.01) < 0.05


def test_names_of_the_border_are_the_networks_own() -> None:
    module, samples = trained(TwoInputs)
    _, graph = quantised(module, samples, Recipe())
    assert [spec.name for spec in graph.inputs] == ["left", "right"]
    assert [spec.name for spec in graph.outputs] == ["logits"]


def test_the_whole_way_on_digits() -> None:
    """Train, quantise, train further: int8 accuracy near the float one, every scale a power of two, the reference equal to the module."""
    system, recipe = zoo.load("digits"), Recipe(qat_epochs=2)
    split, module = system.data(0), system.module("nano")
    fit(module, split, replace(system.train, epochs=8))
    example = torch.from_numpy(split.x_train[:1])
    validation: list[float] = []

    def train_further(quantised_module: nn.Module) -> None:
        result = fit(quantised_module, split, replace(system.train, epochs=recipe.qat_epochs, learning_rate=recipe.qat_learning_rate))
        validation.extend([result.epochs[0].validation_score, result.best.validation_score])

    result = qat.quantise(module, example, split.x_train, recipe, train_further)
    graph = graph_from_qdq(qat.to_qcdq(result, example), recipe)
    assert validation[1] >= validation[0]
    assert top1_accuracy(predict(result, split.x_val), split.y_val) == validation[1]
    float_accuracy = top1_accuracy(predict(module, split.x_val), split.y_val)
    assert float_accuracy > 0.9 and validation[1] >= float_accuracy - 0.01
    assert steps_apart(result, graph, [torch.from_numpy(split.x_test)]).max() == 0
    assert graph.inputs[0].scale == 2.0**-6
    for node in graph.nodes:
        if node.weight is not None:
            assert node.weight_scale is not None and np.all(np.log2(node.weight_scale) % 1 == 0)
            assert node.bias is not None and node.bias.dtype == np.int32


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("dead", ["a channel", "the layer"])
def test_a_channel_without_weights_keeps_its_bias(per_channel: bool, dead: str) -> None:
    module = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 1))
    with torch.no_grad():
        module[0].weight[0 if dead == "a channel" else slice(None)] = 0
        module[0].bias.copy_(torch.tensor([1.75, 0.5, -0.25]))
    samples = [torch.randn(16, 1, 6, 6)]
    result, graph = quantised(module, samples, Recipe(per_channel=per_channel))
    assert steps_apart(result, graph, samples).max() == 0
    convolution = graph.nodes[1]
    assert convolution.weight_scale is not None and convolution.bias is not None
    real = convolution.bias * convolution.weight_scale * float(graph.inputs[0].scale or 0)
    np.testing.assert_allclose(real, [1.75, 0.5, -0.25], atol=0.02)


# ---- scales
def observed(*values: float, recipe: Recipe) -> float:
    observer = Observer()
    for observer.counting in (False, True):
        observer(torch.tensor(values))
    return observer.scale(recipe)


def test_observers() -> None:
    outlier = (*np.linspace(0, 1, 10000), 40.0)
    assert observed(*outlier, recipe=Recipe()) == 2.0**-1
    assert observed(*outlier, recipe=Recipe(scheme="symmetric")) == pytest.approx(40 / 127)
    assert observed(*outlier, recipe=Recipe(observer="percentile", percentile=99.9)) == 2.0**-6
    assert observed(*outlier, recipe=Recipe(observer="mse")) <= 2.0**-2
    assert observed(0.0, 0.0, recipe=Recipe()) == 2.0**-7


def test_fitting_scale_clips_nothing() -> None:
    for limit in (0.5, 0.9921875, 0.99219, 1.0, 3.7, 127.0, 128.0):
        scale = fitting_scale(limit, Recipe())
        assert limit / scale <= 127 < 2 * limit / scale + 1


def test_border_scale_is_exact_on_a_grid_and_fine_on_pixels() -> None:
    assert border_scale(torch.arange(17) / 16, Recipe()) == 2.0**-6
    assert border_scale(torch.arange(256) / 255, Recipe()) == 2.0**-7
    assert border_scale(torch.zeros(4), Recipe()) == 2.0**-7
    assert border_scale(torch.tensor([-2.0, 1.0]), Recipe(scheme="symmetric")) == 2 / 127


# ---- what is refused
class Broken(nn.Module):
    """A network around one line."""

    def __init__(self, line: Callable[[Broken, Tensor], Tensor]) -> None:
        super().__init__()
        self.line, self.conv, self.weight = line, nn.Conv2d(1, 4, 3, padding=1), nn.Parameter(torch.ones(4, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.line(self, x)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (lambda m, x: m.conv(x) if x.sum() > 0 else x, r"Broken cannot be traced: TraceError.*control flow \(test_qat.py:\d+\)"),
        (lambda m, x: m.conv(x).tolist(), r"Broken does not run on samples .*returns a list|expected tensors"),
        (lambda m, x: m.conv(x[:, 0]), r"Broken does not run on samples of shape \[2, 1, 6, 6\]: RuntimeError"),
        (lambda m, x: functional.silu(m.conv(x)), r"silu.* \(test_qat.py:\d+\): silu has no int8 form here \[operator\]; use Conv1d"),
        (lambda m, x: m.conv(x) * 2, r"mul has no int8 form here \[operator\]"),
        (lambda m, x: m.conv(x) + 2, r"adds something else than two tensors \[operand\]"),
        (lambda m, x: torch.add(m.conv(x), m.conv.weight.sum()), r"uses the parameter or constant conv.weight directly"),
        (lambda m, x: functional.conv2d(x, m.weight), r"conv2d has no int8 form here"),
        (lambda m, x: m.conv(x)[:, :2], r"getitem has no int8 form here"),
        (lambda m, x: m.conv(x).chunk(2, 1)[0], r"getitem has no int8 form here"),
        (lambda m, x: m.conv(x).mean(1), r"is a mean over dimensions \[1\]"),
        (lambda m, x: m.conv(x).reshape(-1, 6), r"the batch moves"),
        (lambda m, x: m.conv(x).clamp(max=3), r"clamps to \(None, 3\)"),
        (lambda m, x: functional.adaptive_avg_pool2d(m.conv(x), 4), r"windows of unequal size"),
        (lambda m, x: torch.cat([m.conv(x), m.conv(x)]), r"concatenates along dimension 0"),
        (lambda m, x: functional.relu(torch.sigmoid(m.conv(x))), r"follows an operator that stays float \[float-island\]"),
        (lambda m, x: m.conv(m.conv(x)[:, :1]), r"getitem"),
        (lambda m, x: functional.relu(y := m.conv(x), inplace=True) + y, r"differs from the module's own by .* in place"),
        (lambda m, x: functional.dropout(m.conv(x), training=True) + torch.rand(1), r"uses the parameter or constant _tensor_constant0"),
    ],
)
def test_constructs_without_an_int8_form_are_named(line: Callable[[Broken, Tensor], Tensor], message: str) -> None:
    with pytest.raises(IsthmusError, match=message):
        qat.prepare(Broken(line), torch.zeros(1, 1, 6, 6), Recipe())


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([nn.ConvTranspose2d(1, 2, 3)], r"ConvTranspose2d has no int8 form here"),
        ([nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect")], r"pads with reflect"),
        ([nn.Conv2d(1, 2, 2, padding="same")], r"even kernel"),
        ([nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2, track_running_stats=False)], r"keeps no running statistics"),
        ([nn.Conv2d(1, 2, 1), nn.AvgPool2d(2, divisor_override=3)], r"divisor_override"),
        ([nn.Linear(6, 3)], r"Linear on a tensor of rank 4"),
        ([nn.Flatten(), nn.BatchNorm1d(36)], r"stands on a vector"),
        ([nn.GELU(), nn.SiLU()], r"2 problems"),
    ],
)
def test_layers_without_an_int8_form_are_named(layers: list[nn.Module], message: str) -> None:
    with pytest.raises(ProblemsError, match=message):
        qat.prepare(nn.Sequential(*layers), torch.randn(1, 1, 6, 6), Recipe())


@pytest.mark.parametrize("example", [torch.zeros(1, 1, 6, 6, dtype=torch.float64), torch.zeros(36)])
def test_example_inputs_are_checked(example: Tensor) -> None:
    with pytest.raises(IsthmusError, match=r"expected float32 with the batch in front"):
        qat.prepare(nn.Sequential(nn.Conv2d(1, 1, 1)), example, Recipe())


def test_a_layer_called_twice_is_named() -> None:
    layer = nn.Conv2d(1, 1, 1)
    with pytest.raises(ProblemsError, match=r"0 is called more than once \[shared-weights\]"):
        qat.prepare(nn.Sequential(layer, layer), torch.randn(1, 1, 6, 6), Recipe())


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (np.zeros((0, 1, 6, 6), np.float32), "arrays of 0 samples"),
        (np.full((4, 1, 6, 6), np.nan, np.float32), "NaN or infinity"),
        (np.zeros((4, 1, 6, 6)), "not float32"),
        (np.zeros((4, 2, 6, 6), np.float32), r"does not take samples of shape \[4, 2, 6, 6\]"),
        ([np.zeros((4, 1, 6, 6), np.float32)] * 2, "2 arrays of samples for 1 inputs"),
    ],
)
def test_calibration_samples_are_checked(samples: np.ndarray | list[np.ndarray], message: str) -> None:
    prepared = qat.prepare(nn.Sequential(nn.Conv2d(1, 2, 1)), torch.randn(1, 1, 6, 6), Recipe())
    with pytest.raises(IsthmusError, match=message):
        qat.calibrate(prepared, samples, Recipe())


def test_calibration_uses_a_seeded_choice_of_samples() -> None:
    samples = np.arange(1, 101, dtype=np.float32).reshape(100, 1, 1, 1)
    scales = []
    for seed in (0, 0, 1):
        recipe = Recipe(scheme="symmetric", calibration_samples=3, seed=seed)
        module = qat.calibrate(qat.prepare(nn.Sequential(nn.ReLU(), nn.Conv2d(1, 1, 1)), torch.ones(1, 1, 1, 1), recipe), samples, recipe)
        scales.append(float(module.get_submodule("quantiser_input_1")(torch.ones(1)).scale))
    assert scales[0] == scales[1] != scales[2]


def test_recipes_that_do_not_fit_are_refused() -> None:
    module, example, samples = nn.Sequential(nn.Conv2d(1, 2, 1)), torch.randn(1, 1, 6, 6), np.zeros((4, 1, 6, 6), np.float32)
    with pytest.raises(IsthmusError, match="scheme power_of_two or symmetric, not asymmetric"):
        qat.quantise(module, example, samples, Recipe(scheme="asymmetric"))
    with pytest.raises(IsthmusError, match="asks for 3 epochs of QAT, but the model has no training"):
        qat.quantise(module, example, samples, Recipe(qat_epochs=3))
