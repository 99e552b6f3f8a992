# SPDX-License-Identifier: Apache-2.0
"""`Recipe`: how a network is quantised. Data, saved with the model; the TOML files stand in `quantize/recipes/`."""

from __future__ import annotations

import glob
import json
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from typing import Any

from isthmus.errors import IsthmusError

SCHEMES = ("power_of_two", "symmetric", "asymmetric")
OBSERVERS = ("minmax", "percentile", "mse")
ROUNDINGS = ("nearest", "gptq", "learned")
SCHEMA = 1
WEIGHT_BITS = range(2, 9)
# Written only where they say something: a form made before these fields existed keeps its bytes, and readers of that time take a new one without them.
LATER_FIELDS = ("weight_bits", "overrides", "float_islands", "equalise", "bias_correction", "rounding", "edge_weight_bits")


@dataclass(frozen=True)
class Override:
    """What is different for the layers whose name matches `layers` (a pattern with *, ? and [...]); None leaves the recipe's own value.

    `per_channel` and `weight_bits` concern the layer's weights, `observer` and `percentile` the range of what it writes.
    """

    layers: str
    per_channel: bool | None = None
    weight_bits: int | None = None
    observer: str | None = None
    percentile: float | None = None

    def values(self) -> dict[str, Any]:
        """The fields that are set, without the pattern."""
        return {key: value for key, value in asdict(self).items() if key != "layers" and value is not None}

    def to_dict(self) -> dict[str, Any]:
        return {"layers": self.layers} | self.values()


@dataclass(frozen=True)
class Recipe:
    """Scheme, granularity, observer, calibration and QAT length; then what differs from layer to layer.

    - `scheme`: "power_of_two" (zero point 0, scale 2^-n; every target takes it), "symmetric" (zero point 0), "asymmetric".
    - `per_channel`: one weight scale an output channel instead of one a tensor.
    - `observer`: how the range of an activation is read from calibration data.
    - `percentile`: for observer "percentile", the share of values (in percent) that stay inside the range.
    - `calibration_samples`: at most so many samples are used.
    - `qat_epochs`: epochs of quantisation-aware training from the float weights (0: post-training only).
    - `seed`: of everything random.
    - `weight_bits`: weights use this many of their 8 bits (2 to 8).
    - `overrides`: by layer name, in order; a later one wins.
    - `float_islands`: patterns of layer names that stay float.
    - `equalise`: evens out the ranges of channels between layers first (an exact rewrite of the float model).
    - `bias_correction`: moves each bias by the mean error that int8 causes in its layer on the calibration data.
    - `rounding`: of weights: to the "nearest" integer, or as "gptq" or a "learned" choice finds best on the calibration data.
    - `edge_weight_bits`: `weight_bits` of the first and the last layer with weights (0: the same as the others).
    """

    name: str = "portable"
    scheme: str = "power_of_two"
    per_channel: bool = False
    observer: str = "minmax"
    percentile: float = 99.99
    calibration_samples: int = 512
    qat_epochs: int = 0
    qat_learning_rate: float = 1e-3
    seed: int = 0
    weight_bits: int = 8
    overrides: tuple[Override, ...] = ()
    float_islands: tuple[str, ...] = ()
    equalise: bool = False
    bias_correction: bool = False
    rounding: str = "nearest"
    edge_weight_bits: int = 0

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise IsthmusError(f"recipe {self.name}: scheme {self.scheme!r} is not one of {', '.join(SCHEMES)}")
        if self.observer not in OBSERVERS:
            raise IsthmusError(f"recipe {self.name}: observer {self.observer!r} is not one of {', '.join(OBSERVERS)}")
        if not 50 < self.percentile <= 100:
            raise IsthmusError(f"recipe {self.name}: percentile {self.percentile} is not between 50 and 100")
        if self.calibration_samples < 1 or self.qat_epochs < 0 or not self.qat_learning_rate > 0:
            raise IsthmusError(f"recipe {self.name}: calibration_samples must be at least 1, qat_epochs at least 0, qat_learning_rate above 0")
        if self.weight_bits not in WEIGHT_BITS:
            raise IsthmusError(f"recipe {self.name}: weight_bits {self.weight_bits} is not between {WEIGHT_BITS[0]} and {WEIGHT_BITS[-1]}")
        if self.edge_weight_bits and self.edge_weight_bits not in WEIGHT_BITS:
            limits = f"{WEIGHT_BITS[0]} and {WEIGHT_BITS[-1]}"
            raise IsthmusError(f"recipe {self.name}: edge_weight_bits {self.edge_weight_bits} is not between {limits} (0: as weight_bits)")
        if self.rounding not in ROUNDINGS:
            raise IsthmusError(f"recipe {self.name}: rounding {self.rounding!r} is not one of {', '.join(ROUNDINGS)}")
        for override in self.overrides:
            try:
                replace(self, overrides=(), **override.values())
            except IsthmusError as error:
                raise IsthmusError(f"{error} (in the override of {override.layers!r})") from None

    def for_layer(self, name: str) -> Recipe:
        """The recipe as it holds for one layer: every override whose pattern matches applied, in order."""
        values: dict[str, Any] = {}
        for override in self.overrides:
            if fnmatchcase(name, override.layers):
                values |= override.values()
        return replace(self, **values) if values else self

    def with_edges(self, layers: Sequence[str]) -> Recipe:
        """The recipe with `edge_weight_bits` as overrides of the first and the last of these layers, in front of its own, which win."""
        edges = [Override(glob.escape(name), weight_bits=self.edge_weight_bits) for name in dict.fromkeys((*layers[:1], *layers[-1:]))]
        return replace(self, overrides=(*edges, *self.overrides), edge_weight_bits=0)

    def keeps_float(self, name: str) -> bool:
        """Whether a layer stays float by its name."""
        return any(fnmatchcase(name, pattern) for pattern in self.float_islands)

    def unmatched(self, names: Collection[str]) -> list[str]:
        """The patterns that match none of these layers: a typing mistake that would otherwise go unnoticed."""
        patterns = [*(override.layers for override in self.overrides), *self.float_islands]
        return [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names)]

    def to_json(self) -> str:
        return json.dumps({"schema": SCHEMA} | self.to_dict(), sort_keys=True)

    def to_dict(self) -> dict[str, Any]:
        """Plain data as a recipe file has it, without the schema."""
        values = asdict(self) | {"overrides": [override.to_dict() for override in self.overrides], "float_islands": list(self.float_islands)}
        defaults = {field.name: field.default for field in fields(self)}
        return {key: value for key, value in values.items() if key not in LATER_FIELDS or getattr(self, key) != defaults[key]}

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Raises `IsthmusError` where the text is not JSON, and as `from_dict`."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise IsthmusError(f"recipe: not valid JSON: {error}") from None
        return cls.from_dict(data, "recipe")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str) -> Recipe:
        """Raises `IsthmusError` on an unknown schema, an unknown field or a value of another type."""
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise IsthmusError(f"{where}: schema {data.get('schema') if isinstance(data, dict) else None!r}, this version reads schema {SCHEMA}")
        defaults = asdict(cls())
        values = {key: value for key, value in data.items() if key != "schema"}
        for key, value in values.items():
            if key not in defaults:
                raise IsthmusError(f"{where}: unknown field {key!r}; there are {', '.join(sorted(defaults))}")
            if key == "overrides":
                values[key] = _overrides(value, where)
            elif key == "float_islands":
                if not isinstance(value, list) or not all(isinstance(pattern, str) for pattern in value):
                    raise IsthmusError(f"{where}: field {key!r} expects a list of layer name patterns, found {value!r}")
                values[key] = tuple(value)
            else:
                _check_type(key, value, type(defaults[key]), where)
        return cls(**values)


def _overrides(found: Any, where: str) -> tuple[Override, ...]:
    if not isinstance(found, list):
        raise IsthmusError(f"{where}: field 'overrides' expects a list of tables ([[overrides]]), found {found!r}")
    kinds: dict[str, type] = {"layers": str, "per_channel": bool, "weight_bits": int, "observer": str, "percentile": float}
    made = []
    for number, entry in enumerate(found, start=1):
        place = f"{where}: override {number}"
        if not isinstance(entry, dict) or "layers" not in entry:
            raise IsthmusError(f"{place}: expected a table with 'layers' (a pattern of layer names), found {entry!r}")
        for key, value in entry.items():
            if key not in kinds:
                raise IsthmusError(f"{place}: unknown field {key!r}; there are {', '.join(kinds)}")
            _check_type(key, value, kinds[key], place)
        made.append(Override(**entry))
    return tuple(made)


def _check_type(key: str, value: Any, kind: type, where: str) -> None:
    if not (isinstance(value, kind) or (kind is float and isinstance(value, int))) or (isinstance(value, bool) != (kind is bool)):
        raise IsthmusError(f"{where}: field {key!r} expects {kind.__name__}, found {value!r}")


def recipe_names() -> list[str]:
    folder = resources.files("isthmus.quantize") / "recipes"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_recipe(name_or_path: str) -> Recipe:
    """A recipe by name ('portable') or by the path of a TOML file."""
    if name_or_path in recipe_names():
        text = (resources.files("isthmus.quantize") / "recipes" / f"{name_or_path}.toml").read_text(encoding="utf-8")
    elif name_or_path.endswith(".toml") and Path(name_or_path).is_file():
        text = Path(name_or_path).read_text(encoding="utf-8")
    else:
        raise IsthmusError(f"unknown recipe {name_or_path!r}: there are {', '.join(recipe_names())}, or give the path of a .toml file")
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise IsthmusError(f"recipe {name_or_path}: not valid TOML: {error}") from None
    return Recipe.from_dict(data, f"recipe {name_or_path}")
