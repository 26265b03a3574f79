"""docs/defaults.md has every default that decides a result, with its value and its source."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from rung.config.base import Config
from rung.config.climb import RungConfig
from rung.config.climb_runs import rung_data
from rung.config.method import METHOD_CONFIGS, SUBTRACTED_INITS, BottleneckConfig, Init, MixtureConfig
from rung.config.objective import GrpoConfig, PreferenceConfig, PreferenceLoss
from rung.config.run import RunConfig
from rung.methods.registry import METHODS
from rung.objectives.registry import OBJECTIVES

PAGE = Path(__file__).parents[2] / "docs" / "defaults.md"
EXACT = {"kind": "exact"}


def config_classes(base: type[Config] = Config) -> Iterator[type[Config]]:
    for config in base.__subclasses__():
        if config.__module__.startswith("rung.config"):
            yield config
        yield from config_classes(config)


def settings() -> Iterator[tuple[str, Any, str]]:
    """Place, default and description of every setting, where it is first given or given anew."""
    for config in dict.fromkeys(config_classes()):
        for name in config.__annotations__:
            field = config.model_fields.get(name)
            if field is None or name == "kind" or field.is_required():
                continue
            place, default = f"`{config.__name__}.{name}`", field.get_default(call_default_factory=True)
            if isinstance(default, Config):  # only what this class sets otherwise than the section itself
                for inner in sorted(default.model_fields_set - {"kind"}):
                    if getattr(default, inner) != type(default).model_fields[inner].default:
                        yield f"`{config.__name__}.{name}.{inner}`", getattr(default, inner), ""
                continue
            yield place, default, field.description or ""


def fixed() -> dict[str, Any]:
    """Defaults that are numbers, switches or a choice; names of files and empty collections decide nothing."""
    chosen = {}
    for place, default, _ in settings():
        items = default if isinstance(default, tuple) else (default,)
        if items and all(isinstance(item, bool | int | float | str) for item in items) and default != "":
            chosen[place] = list(default) if isinstance(default, tuple) else default
    return chosen


def elsewhere() -> set[str]:
    """Settings without a value whose description names a default: it is taken from elsewhere."""
    return {place for place, default, text in settings() if default is None and "efault" in text}


def dependent() -> dict[str, Any]:
    """Defaults that another setting decides."""
    lora, found = METHOD_CONFIGS["lora"], dict[str, Any]()
    for init in get_args(get_args(Init)[1]) + tuple(i for i in get_args(Init) if isinstance(i, str)):
        kind = METHOD_CONFIGS["qlora" if init == "loftq" else "lora"]
        found[f"alpha at rank 16, `init: {init}`"] = kind(init=init).resolved_alpha
    found["alpha at any rank, `rslora: true`"] = lora(rslora=True, rank=64).resolved_alpha
    for placement in ("houlsby", "pfeiffer", "parallel"):
        found[f"scale of an adapter, `placement: {placement}`"] = BottleneckConfig(placement=placement).resolved_scale
    found["balance of a mixture without `top_k`"] = MixtureConfig().balance_weight
    found["balance of a mixture with `top_k`"] = MixtureConfig(top_k=2).balance_weight
    for kind in METHODS:
        found[f"learning rate of `{kind}`"] = METHOD_CONFIGS[kind].DEFAULT_LEARNING_RATE
    rates = {lora(init=init).default_learning_rate for init in SUBTRACTED_INITS}
    assert len(rates) == 1
    found["learning rate of `lora`, start subtracted"] = rates.pop()
    found["learning rate of `lora`, `loraplus_lr_ratio` above 1"] = lora(loraplus_lr_ratio=16.0).default_learning_rate
    for kind in OBJECTIVES:
        found[f"learning rate, `objective: {kind}`, times"] = objective_config(kind).LEARNING_RATE_SCALE
    for loss in get_args(PreferenceLoss):
        smoothing = {"label_smoothing": 0.1} if loss == "robust" else {}
        preference = PreferenceConfig(loss=loss, **smoothing)
        found[f"beta, `loss: {loss}`"] = preference.resolved_beta
        if loss in ("dpo", "orpo"):
            found[f"sft, `loss: {loss}`"] = preference.sft_weight
    own: dict[str, Any] = {"name": "r", "data": {"path": "made.jsonl"}}
    climb = RunConfig.model_validate({"data": {"path": "a.jsonl"}, "output": "o"})
    tuned, shown = (rung_data(climb, RungConfig(kind=kind, **own)) for kind in ("lora", "few_shot"))
    found["validation of a rung's own `data`"], found["test of a rung's own `data`"] = tuned.validation, tuned.test
    found["validation of a few_shot rung's own `data`"] = shown.validation
    for variant in ("grpo", "dr_grpo", "rloo"):
        found[f"beta, `loss: {variant}`"] = GrpoConfig(loss=variant, reward=EXACT).kl_weight
    return found


def objective_config(kind: str) -> Any:
    return next(c for c in config_classes() if getattr(c, "LEARNING_RATE_SCALE", None) and _kind(c) == kind)


def _kind(config: type[Config]) -> object:
    field = config.model_fields.get("kind")
    return None if field is None else field.default


def rows() -> dict[str, tuple[str, str]]:
    """First column to default and source; a place stands once."""
    table: dict[str, tuple[str, str]] = {}
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]
        if line.startswith("|") and cells[0] != "default of" and not set(cells[0]) <= set("-: "):
            assert len(cells) == 3 and cells[0] not in table, line
            table[cells[0]] = (cells[1], cells[2])
    return table


@pytest.mark.parametrize("place", [*fixed(), *dependent()])
def test_a_default_is_in_the_table_with_its_value(place: str) -> None:
    expected = {**fixed(), **dependent()}[place]
    assert place in rows(), f"docs/defaults.md lacks {place}: {expected}"
    value = yaml.safe_load(rows()[place][0].strip("`"))
    value = float(value) if isinstance(expected, float) else value
    assert value == expected and type(value) is type(expected), f"{place}: {value!r} is written, {expected!r} is so"


def test_no_default_goes_without_a_source() -> None:
    """A paper, a library with its version, a measurement, or a convention with its reason."""
    known = re.compile(r"\b(19|20)\d\d\b|[A-Za-z]+ \d+\.\d+|^measured: |^convention: .{12,}")
    assert {place: source for place, (_, source) in rows().items() if not known.search(source)} == {}


def test_the_table_names_nothing_that_is_not_there() -> None:
    assert set(rows()) == {*fixed(), *dependent(), *elsewhere()}
