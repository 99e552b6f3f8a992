# SPDX-License-Identifier: Apache-2.0
"""The order that needs the least memory: against every order there is, on small random graphs, with the peak that `cost` counts."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus import best_order
from isthmus.best_order import Step, least_peak_bytes
from isthmus.cost import _peak_bytes

Operator = tuple[str, tuple[str, ...], tuple[str, ...]]


def as_steps(operators: list[Operator]) -> list[Step]:
    return [Step(reads, writes, op == "Reshape", op == "Relu") for op, reads, writes in operators]


def every_order(operators: list[Operator], inputs: list[str]) -> list[list[Operator]]:
    legal = []
    for order in itertools.permutations(operators):
        known = set(inputs)
        for _, reads, writes in order:
            if not known.issuperset(reads):
                break
            known.update(writes)
        else:
            legal.append(list(order))
    return legal


@st.composite
def graphs(draw: st.DrawFn) -> tuple[list[Operator], dict[str, int]]:
    """Up to six operators on one input; element-wise ones and views keep their input's size."""
    sizes, names, operators = {"x": draw(st.integers(1, 9))}, ["x"], []
    for index in range(draw(st.integers(1, 6))):
        op = draw(st.sampled_from(["Conv", "Conv", "Add", "Relu", "Reshape"]))
        reads = tuple(draw(st.lists(st.sampled_from(names), min_size=1, max_size=2 if op == "Add" else 1, unique=True)))
        name = f"t{index}"
        sizes[name] = sizes[reads[0]] if op in ("Relu", "Reshape") else draw(st.integers(1, 9))
        operators.append((op, reads, (name,)))
        names.append(name)
    return operators, sizes


@settings(max_examples=150)
@given(graphs(), st.data())
def test_equals_the_best_of_all_orders(graph: tuple[list[Operator], dict[str, int]], data: st.DataObject) -> None:
    operators, sizes = graph
    read = {name for _, reads, _ in operators for name in reads}
    ends = [name for _, _, writes in operators for name in writes if name not in read]
    outputs = sorted({*ends, data.draw(st.sampled_from([writes[0] for _, _, writes in operators]))})
    peaks = [_peak_bytes(order, sizes, ["x"], outputs) for order in every_order(operators, ["x"])]
    assert least_peak_bytes(as_steps(operators), sizes, ["x"], outputs) == min(peaks)


def branches(count: int, length: int) -> list[Operator]:
    """`count` chains from one input, wide inside and narrow at the end, joined: finishing one before the next needs the least."""
    chains = [[("Conv", (f"b{c}_{i - 1}" if i else "x",), (f"b{c}_{i}",)) for i in range(length)] for c in range(count)]
    across = [operator for step in zip(*chains, strict=True) for operator in step]  # a breadth-first order, as some exporters write
    return [*across, ("Concat", tuple(f"b{c}_{length - 1}" for c in range(count)), ("y",))]


def sized(operators: list[Operator], length: int) -> dict[str, int]:
    return {"x": 4, "y": 3} | {name: 1 if name.endswith(f"_{length - 1}") else 100 for _, _, (name,) in operators if name != "y"}


def test_one_branch_after_the_other() -> None:
    operators = branches(3, 3)
    sizes = sized(operators, 3)
    assert _peak_bytes(operators, sizes, ["x"], ["y"]) >= 300
    assert least_peak_bytes(as_steps(operators), sizes, ["x"], ["y"]) == 4 + 1 + 200  # the second branch: the input, the first's result, two wide tensors


def test_a_search_without_end_gives_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(best_order, "STATE_LIMIT", 10)
    operators = branches(4, 4)
    assert least_peak_bytes(as_steps(operators), sized(operators, 4), ["x"], ["y"]) is None


def test_a_long_chain_is_no_search() -> None:
    operators = [("Conv", (f"t{index - 1}" if index else "x",), (f"t{index}",)) for index in range(400)]
    sizes = {"x": 7} | {f"t{index}": 10 + index % 3 for index in range(400)}
    assert least_peak_bytes(as_steps(operators), sizes, ["x"], ["t399"]) == _peak_bytes(operators, sizes, ["x"], ["t399"]) == 23
