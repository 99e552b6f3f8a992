# SPDX-License-Identifier: Apache-2.0
"""A traced torch network as a flat fx graph of the form's operators: every spelling turned into one module, batch norms folded.

Nothing is quantised here. What remains: placeholders, calls of the modules below, `torch.add`, `torch.cat` and the output.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from isthmus.errors import Problem, ProblemsError
from isthmus.quantize.spellings import ADD, BUILDERS, CONCATENATE, MEAN, RESHAPE, NotInFormError, Reshape, module_for, spelling

COMPUTE = (nn.Conv1d, nn.Conv2d, nn.Linear)
AVERAGE = (nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)
ACTIVATION = (nn.ReLU, nn.Hardtanh)  # Hardtanh includes ReLU6
KEEPS_SCALE = (nn.MaxPool1d, nn.MaxPool2d, nn.Flatten, Reshape)
TAIL = (nn.Softmax, nn.LogSoftmax, nn.Sigmoid, nn.Tanh)  # stay float, behind the last int8 tensor only
NOTHING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d)  # in evaluation mode
BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d)
KNOWN = "Conv1d, Conv2d, Linear, BatchNorm, ReLU, ReLU6, clamp, add, cat, max and average pools, flatten, reshape; softmax, sigmoid and tanh at the end"


def normalise(graph: fx.GraphModule, name: str) -> None:
    """Rewrites a traced module (`isthmus.quantize.tracing`) in place. Raises `ProblemsError` listing every construct that the int8 form does not have."""
    _Normaliser(graph, name).run()


class _Normaliser:
    """Rewrites the graph in place, collects what cannot be."""

    def __init__(self, graph: fx.GraphModule, name: str) -> None:
        self.module = graph
        self.graph = graph.graph
        self.name = name
        self.problems: list[Problem] = []

    def run(self) -> None:
        for step in (self._one_spelling, self._fold_batch_norm, self._check_module):
            for node in list(self.graph.nodes):
                try:
                    step(node)
                except NotInFormError as reason:
                    self.problems.append(Problem(f"{node.name}{_line(node)}", *reason.args))
            self._raise_problems()
            self._clean()

    def _raise_problems(self) -> None:
        if self.problems:
            raise ProblemsError(f"{self.name} cannot be brought into the int8 form", self.problems)

    def _clean(self) -> None:
        for node in list(self.graph.nodes):
            if node.op == "call_function" and node.target is torch._assert:
                self.graph.erase_node(node)
        self.graph.eliminate_dead_code()
        self.graph.lint()
        self.module.recompile()
        self.module.delete_all_unused_submodules()

    # ---- one spelling: modules, torch.add, torch.cat
    def _one_spelling(self, node: fx.Node) -> None:
        if node.op not in ("call_function", "call_method", "call_module", "get_attr") or node.meta["shape"] is None or node.target is torch._assert:
            return  # no tensor: whatever reads it is refused
        if "input" in node.kwargs and not node.args:
            node.args, node.kwargs = (node.kwargs["input"],), {name: value for name, value in node.kwargs.items() if name != "input"}
        if node.op == "get_attr":
            raise NotInFormError("operand", f"uses the parameter or constant {node.target} directly", "use it through a layer (nn.Conv2d, nn.Linear, ...)")
        if node.op == "call_module":
            self._called_module(node)
            return
        if node.target in ADD:
            self._add(node)
        elif node.target in CONCATENATE:
            self._concatenate(node)
        elif node.target in RESHAPE:
            self._replace(node, _reshape(node))
        elif node.target in MEAN:
            self._mean(node)
        elif node.target in BUILDERS:
            self._replace(node, module_for(node))
        else:
            raise NotInFormError("operator", f"{spelling(node)} has no int8 form here", f"use {KNOWN}")

    def _called_module(self, node: fx.Node) -> None:
        module = self._called(node)
        if isinstance(module, NOTHING):
            node.replace_all_uses_with(node.all_input_nodes[0])
        elif isinstance(module, ACTIVATION):
            module.inplace = False  # a quantiser's result may have other readers
        elif isinstance(module, nn.Flatten | nn.Unflatten):
            self._replace(node, _reshape(node))

    def _replace(self, node: fx.Node, module: nn.Module) -> fx.Node:
        """Puts a call of `module` in the node's place (nothing at all for an Identity)."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if isinstance(module, NOTHING):
            node.replace_all_uses_with(source)
            return source
        new = self._call(node, module, source, node.meta["shape"])
        node.replace_all_uses_with(new)
        return new

    def _call(self, before: fx.Node, module: nn.Module, source: fx.Node, shape: tuple[int, ...]) -> fx.Node:
        name = f"{before.name}_{type(module).__name__.lower()}"
        self.module.add_submodule(name, module)
        with self.graph.inserting_before(before):
            new = self.graph.call_module(name, (source,))
        new.meta["shape"], new.stack_trace = shape, before.stack_trace
        return new

    def _add(self, node: fx.Node) -> None:
        left, right = node.args if len(node.args) == 2 else (None, None)
        if set(node.kwargs) - {"alpha"} or node.kwargs.get("alpha", 1) != 1 or not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
            raise NotInFormError("operand", "adds something else than two tensors", "move constants and factors into the layer before")
        if not left.meta["shape"] or not right.meta["shape"]:
            raise NotInFormError("operand", "adds a number", "move it into the bias of the layer before")
        node.op, node.target, node.kwargs = "call_function", torch.add, {}

    def _concatenate(self, node: fx.Node) -> None:
        tensors = node.args[0] if node.args else node.kwargs.get("tensors")
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
        rank = len(node.meta["shape"])
        if not isinstance(tensors, list | tuple) or not isinstance(dim, int) or dim % rank == 0:
            raise NotInFormError("operand", f"concatenates along dimension {dim}", "concatenate a list of tensors along a dimension other than the batch")
        node.target, node.args, node.kwargs = torch.cat, (list(tensors), dim % rank), {}

    def _mean(self, node: fx.Node) -> None:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        shape, values = source.meta["shape"], dict(zip(("dim", "keepdim"), node.args[1:], strict=False)) | dict(node.kwargs)
        dims = values.get("dim", ())
        dims = sorted(dim % len(shape) for dim in (dims if isinstance(dims, list | tuple) else (dims,)))
        if len(shape) not in (3, 4) or dims != list(range(2, len(shape))):
            raise NotInFormError("operator", f"is a mean over dimensions {dims}", "average over all of height and width (a global average pool)")
        pool = nn.AdaptiveAvgPool1d(1) if len(shape) == 3 else nn.AdaptiveAvgPool2d(1)
        pooled = (*shape[:2], *(1 for _ in dims))
        if node.meta["shape"] == pooled:
            self._replace(node, pool)
            return
        node.args = (self._call(node, pool, source, pooled),)
        self._replace(node, nn.Flatten(1))

    # ---- batch norm
    def _fold_batch_norm(self, node: fx.Node) -> None:
        """Into the layer before; where that is not possible exactly (an activation or a second reader between), into a 1x1 depthwise convolution."""
        norm = self._called(node)
        if not isinstance(norm, BATCH_NORM):
            return
        if norm.running_mean is None or norm.running_var is None:
            raise NotInFormError("batch-norm", "keeps no running statistics", "train with track_running_stats=True")
        source = node.all_input_nodes[0]
        layer = self._called(source)
        if isinstance(layer, COMPUTE) and len(source.users) == 1 and self._calls()[str(source.target)] == 1:
            fused = fuse_linear_bn_eval(layer, norm) if isinstance(layer, nn.Linear) else fuse_conv_bn_eval(layer, norm)
            self._set_module(str(source.target), fused)
            node.replace_all_uses_with(source)
        elif len(node.meta["shape"]) > 2:
            self._replace(node, _depthwise(norm, rank=len(node.meta["shape"])))
        else:
            raise NotInFormError("batch-norm", "stands on a vector, not behind a Linear", "put it behind the Linear, before its activation")

    def _set_module(self, path: str, module: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        setattr(self.module.get_submodule(parent), name, module)

    # ---- what is left
    def _check_module(self, node: fx.Node) -> None:
        module = self._called(node)
        if module is None:
            return
        if not isinstance(module, (*COMPUTE, *AVERAGE, *ACTIVATION, *KEEPS_SCALE, *TAIL, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d)):
            raise NotInFormError("operator", f"{type(module).__name__} has no int8 form here", f"use {KNOWN}")
        if len(node.all_input_nodes) != 1 or node.kwargs:
            raise NotInFormError("operand", f"{type(module).__name__} is called with more than one tensor", "call it with one tensor")
        if isinstance(module, COMPUTE):
            self._check_compute(node, module)
        elif isinstance(module, (*AVERAGE, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d)):
            self._check_pool(node, module)

    def _check_compute(self, node: fx.Node, module: nn.Module) -> None:
        if self._calls()[str(node.target)] > 1:
            raise NotInFormError("shared-weights", f"{node.target} is called more than once", "give every call a layer of its own")
        if isinstance(module, nn.Linear):
            if len(node.meta["shape"]) != 2:
                raise NotInFormError("operand", f"Linear on a tensor of rank {len(node.meta['shape'])}", "flatten to (batch, features) first")
            return
        assert isinstance(module, nn.Conv1d | nn.Conv2d)
        if module.padding_mode != "zeros":
            raise NotInFormError("operand", f"pads with {module.padding_mode}", "pad with zeros")
        if isinstance(module.padding, str):
            spans = [step * (size - 1) for step, size in zip(module.dilation, module.kernel_size, strict=True)]
            if module.padding == "same" and any(span % 2 for span in spans):
                raise NotInFormError("operand", "padding='same' with an even kernel pads one side more", "use an odd kernel")
            module.padding = tuple(span // 2 for span in spans) if module.padding == "same" else tuple(0 for _ in spans)

    def _check_pool(self, node: fx.Node, module: nn.Module) -> None:
        """An adaptive pool becomes a plain one; the global average stays as it is."""
        if getattr(module, "divisor_override", None) is not None:
            raise NotInFormError("operand", "divides by divisor_override", "divide by the size of the window")
        source = node.all_input_nodes[0]
        if not isinstance(module, nn.AdaptiveAvgPool1d | nn.AdaptiveAvgPool2d | nn.AdaptiveMaxPool1d | nn.AdaptiveMaxPool2d):
            return
        sizes, results = source.meta["shape"][2:], node.meta["shape"][2:]
        if any(size % result for size, result in zip(sizes, results, strict=True)):
            raise NotInFormError("operand", f"pools {sizes} to {results}: windows of unequal size", "pool to a divisor of the size")
        kernel = tuple(size // result for size, result in zip(sizes, results, strict=True))
        average, flat = isinstance(module, nn.AdaptiveAvgPool1d | nn.AdaptiveAvgPool2d), len(sizes) == 1
        if all(step == 1 for step in kernel):
            node.replace_all_uses_with(source)
        elif not average:
            self._replace(node, nn.MaxPool1d(kernel[0]) if flat else nn.MaxPool2d(kernel))
        elif any(result != 1 for result in results):
            self._replace(node, nn.AvgPool1d(kernel[0]) if flat else nn.AvgPool2d(kernel))

    def _called(self, node: fx.Node) -> nn.Module | None:
        return self.module.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _calls(self) -> Counter[str]:
        return Counter(str(node.target) for node in self.graph.nodes if node.op == "call_module")


def _reshape(node: fx.Node) -> nn.Module:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    before, after = source.meta["shape"], node.meta["shape"]
    if before == after:
        return nn.Identity()
    if not after or after[0] != before[0]:
        raise NotInFormError("operand", f"{spelling(node)} turns {before} into {after}: the batch moves", "keep the batch as the first dimension")
    return nn.Flatten(1) if len(after) == 2 else Reshape(after[1:])


def _depthwise(norm: nn.Module, rank: int) -> nn.Module:
    assert isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)
    channels = norm.num_features
    layer: nn.Conv1d | nn.Conv2d = nn.Conv1d(channels, channels, 1, groups=channels) if rank == 3 else nn.Conv2d(channels, channels, 1, groups=channels)
    nn.init.ones_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return fuse_conv_bn_eval(layer.eval(), norm)


# ---- words for errors
def _line(node: fx.Node) -> str:
    """' (model.py:12)': the user's line, read from the recorded stack."""
    for line in reversed((node.stack_trace or "").splitlines()):
        if line.strip().startswith('File "'):
            _, path, rest = line.split('"', 2)
            if "torch" not in Path(path).parts and Path(path).parent != Path(__file__).parent:
                return f" ({Path(path).name}:{rest.split('line ')[1].split(',')[0]})"
    return ""
