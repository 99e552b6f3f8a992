# SPDX-License-Identifier: Apache-2.0
"""`Recipe`: how a network is quantised. Data, saved with the model; the TOML files stand in `quantize/recipes/`."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from isthmus.errors import IsthmusError

SCHEMES = ("power_of_two", "symmetric", "asymmetric")
OBSERVERS = ("minmax", "percentile", "mse")
SCHEMA = 1


@dataclass(frozen=True)
class Recipe:
    """Scheme, granularity, observer, calibration and QAT length.

    - `scheme`: "power_of_two" (zero point 0, scale 2^-n; every target takes it), "symmetric" (zero point 0), "asymmetric".
    - `per_channel`: one weight scale an output channel instead of one a tensor.
    - `observer`: how the range of an activation is read from calibration data.
    - `percentile`: for observer "percentile", the share of values (in percent) that stay inside the range.
    - `calibration_samples`: at most so many samples are used.
    - `qat_epochs`: epochs of quantisation-aware training from the float weights (0: post-training only).
    - `seed`: of everything random.
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

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise IsthmusError(f"recipe {self.name}: scheme {self.scheme!r} is not one of {', '.join(SCHEMES)}")
        if self.observer not in OBSERVERS:
            raise IsthmusError(f"recipe {self.name}: observer {self.observer!r} is not one of {', '.join(OBSERVERS)}")
        if not 50 < self.percentile <= 100:
            raise IsthmusError(f"recipe {self.name}: percentile {self.percentile} is not between 50 and 100")
        if self.calibration_samples < 1 or self.qat_epochs < 0 or not self.qat_learning_rate > 0:
            raise IsthmusError(f"recipe {self.name}: calibration_samples must be at least 1, qat_epochs at least 0, qat_learning_rate above 0")

    def to_json(self) -> str:
        return json.dumps({"schema": SCHEMA} | asdict(self), sort_keys=True)

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
            kind = type(defaults[key])
            if not (isinstance(value, kind) or (kind is float and isinstance(value, int))) or (isinstance(value, bool) != (kind is bool)):
                raise IsthmusError(f"{where}: field {key!r} expects {kind.__name__}, found {value!r}")
        return cls(**values)


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
