"""YAML in and out: overrides, the origin of every value, and errors that name file, line and the nearest known key."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from rung.config.climb import OnTopConfig, RungConfig
from rung.config.method import METHOD_CONFIGS, LayerLotteryConfig
from rung.config.model import WITHOUT_RUN_SETTINGS
from rung.config.run import RunConfig
from rung.errors import ConfigError, did_you_mean

KeyPath = tuple[str | int, ...]
MAX_BYTES = 2**20
DATA = frozenset({".jsonl", ".csv", ".parquet"})
"""Suffixes of files that are never configs."""
_TYPES = frozenset({"str", "float", "int", "bool"})
_UNIONS = frozenset({("method",), ("objective",), ("objective", "reward")})
"""Groups of several kinds: pydantic puts the kind into the path of an error below them."""
RENAMED_KEYS = {
    "engine": "training",
    "evaluate": "evaluation",
    "training.cache_trunk": "training.cache_frozen_layers",
    "training.clip": "training.max_grad_norm",
    "training.keep": "training.save_total_limit",
    "training.optimiser": "training.optimizer",
    "training.optimizer.moments": "training.optimizer.state_dtype",
    "training.warmup": "training.warmup_ratio",
    "evaluation.dequantise": "evaluation.dequantize",
    "evaluation.judge.human": "evaluation.judge.human_labels",
    "evaluation.judge.kappa": "evaluation.judge.min_kappa",
    "method.double_quantised": "method.double_quant",
    "method.rate_ratio": "method.loraplus_lr_ratio",
    "method.ranks": "method.rank_pattern",
    "method.resample_every": "method.lisa_step_interval",
    "method.sampled_layers": "method.lisa_n_layers",
    **{f"method.{name}": f"method.lottery.{name}" for name in LayerLotteryConfig.model_fields},
    "objective.adapt": "objective.adaptive_kl",
    "objective.bad_weight": "objective.undesirable_weight",
    "objective.centre": "objective.center_rewards_coefficient",
    "objective.decay": "objective.gae_lambda",
    "objective.keep_states": "objective.cache_teacher_states",
    "objective.rollout.answers": "objective.rollout.num_generations",
    "objective.rollout.cut": "objective.rollout.truncation_penalty",
    "objective.rollout.epochs": "objective.rollout.num_iterations",
    "objective.rollout.minibatches": "objective.rollout.num_minibatches",
    "objective.stops.kl": "objective.stops.target_kl",
    "objective.value_clip": "objective.cliprange_value",
    "objective.value_weight": "objective.vf_coef",
    "climb.on_top.*.above": "climb.on_top.*.base_rung",
    "climb.on_top.*.engine": "climb.on_top.*.training",
    "climb.rungs.*.choose": "climb.rungs.*.example_selection",
    "climb.rungs.*.engine": "climb.rungs.*.training",
    "climb.search.reduction": "climb.search.reduction_factor",
    "climb.stop": "climb.stop_at_target",
    "climb.then": "climb.on_top",
}
"""Former names of settings, `*` for a place in a list. They are refused, with the present name as the hint."""
RENAMED_VALUES = {"label": "unpaired_preference", "prompt": "prompt_only", "normalised": "normalized"}
"""Former names of formats and metrics."""


@dataclass(frozen=True)
class LoadedConfig:
    """A valid config and where each of its values came from."""

    config: RunConfig
    origins: Mapping[str, str]
    """Dotted name -> `file line N`, `command line` or, when absent, the default."""


class _Loader(yaml.SafeLoader):
    """Refuses duplicate keys and reads 1e-4 as the number it is (YAML 1.1 wants 1.0e-4)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Read a config and apply `key=value` overrides. Raises `ConfigError`."""
    source = Path(path)
    raw, lines = _read(source)
    for override in overrides:
        _apply(raw, lines, override)
    return LoadedConfig(_validate(raw, lines), {_dotted(place): origin for place, origin in lines.items()})


ConfigSource = RunConfig | Mapping[str, Any] | str | Path
"""What a Python program may give as a config: a config, a mapping of plain values, or the path of a YAML file."""


def resolve_config(source: ConfigSource, overrides: Sequence[str] = ()) -> RunConfig:
    """The config of any source, with `key=value` overrides applied. Raises `ConfigError`."""
    if isinstance(source, str | Path):
        return load_config(source, overrides).config
    raw: dict[str, Any] = config_to_dict(source) if isinstance(source, RunConfig) else copy.deepcopy(dict(source))
    lines: dict[KeyPath, str] = {}
    for override in overrides:
        _apply(raw, lines, override)
    return _validate(raw, lines)


def parse_config(raw: Mapping[str, Any], where: str = "config") -> RunConfig:
    """Validate a mapping that did not come from a file."""
    return _validate(dict(raw), {(): where})


def config_to_dict(config: BaseModel) -> dict[str, Any]:
    """Plain JSON values, every default filled in."""
    return config.model_dump(mode="json")


def rung_run_config(config: RunConfig, rung: RungConfig, output: str, seed: int) -> RunConfig:
    """The run that a tuned rung is.

    A rung of the config's own method takes `method` and `engine` from the config. Another method starts from its own
    defaults, its learning rate included, because a rate that suits one ruins the other.
    """
    raw = config_to_dict(config)
    same = rung.kind == config.method.kind
    method = {**(raw["method"] if same else {"kind": rung.kind}), **rung.method, "kind": rung.kind}
    training = {**raw["training"], **({} if same else {"learning_rate": None}), **rung.training}
    evaluation = {**raw["evaluation"], "context": rung.context_of(config.evaluation.context)}
    own = {"method": method, "training": training, "evaluation": evaluation, "output": output, "seed": seed}
    return parse_config({**raw, **own}, f"climb.rungs {rung.label}")


def on_top_run_config(config: RunConfig, then: OnTopConfig, below: str, output: str, seed: int) -> RunConfig:
    """The run that stands on top of a tuned one, whose folder is `below`; rows of its own have no test of their own."""
    raw = config_to_dict(config)
    data = raw["data"] if not then.data else {"validation": raw["data"]["validation"], "test": 0.0, **then.data}
    training = {**raw["training"], "learning_rate": None, **then.training}
    model = {**raw["model"], "name": below, **WITHOUT_RUN_SETTINGS}
    own = {"model": model, "data": data, "method": then.method, "objective": then.objective, "training": training}
    rung = next(r for r in config.climb.rungs if r.label == then.base_rung)
    context = rung.context_of(config.evaluation.context)
    evaluation = {**raw["evaluation"], "context": context, "dequantize": False}
    # what the run is checked against is its own context, not that of a climb which it is no part of
    climb = {"rungs": [{"kind": "rag" if context == "retrieved" else "zero_shot"}]}
    own |= {"evaluation": evaluation, "climb": climb, "output": output, "seed": seed}
    if context != "retrieved":
        evaluation.pop("retrieve", None)
    return parse_config({**raw, **own}, f"climb.on_top {then.label}")


def describe_config(loaded: LoadedConfig) -> str:
    """The resolved config as YAML, each value followed by where it came from."""
    text = yaml.safe_dump(config_to_dict(loaded.config), sort_keys=False, allow_unicode=True, width=100)
    shown = []
    stack: list[tuple[int, str]] = []
    for line in text.splitlines():
        key = re.match(r"( *)([A-Za-z_]\w*):(.*)", line)
        if not key:
            shown.append(line)
            continue
        indent = len(key.group(1))
        stack = [entry for entry in stack if entry[0] < indent] + [(indent, key.group(2))]
        name = ".".join(part for _, part in stack)
        nested = not key.group(3).strip() and name not in loaded.origins
        shown.append(line if nested else f"{line:<60}  # {loaded.origins.get(name, 'default')}")
    return "\n".join(shown) + "\n"


def _read(path: Path) -> tuple[dict[str, Any], dict[KeyPath, str]]:
    if path.suffix in DATA and path.exists():
        hint = "write a config whose data.path names this file"
        raise ConfigError("this is data where a config is asked for", where=str(path), allowed="YAML", hint=hint)
    try:
        if path.is_file() and path.stat().st_size > MAX_BYTES:
            raise ConfigError(
                "this is too large to be a config", where=str(path), given=f"{path.stat().st_size:,} bytes"
            )
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        near = did_you_mean(path.name, [p.name for p in path.parent.glob("*")]) if path.parent.is_dir() else None
        raise ConfigError(
            "no such file", where=str(path), hint=f"did you mean {path.parent / near}?" if near else None
        ) from None
    except IsADirectoryError:
        found = ", ".join(sorted(p.name for p in path.glob("*.y*ml"))) or "none"
        raise ConfigError("this is a folder", where=str(path), hint=f"config files in it: {found}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"this is not UTF-8 text: {error.reason}", where=str(path)) from None
    except OSError as error:
        raise ConfigError(str(error.strerror), where=str(path)) from error
    try:
        node = yaml.compose(text, Loader=_Loader)
        raw = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader with one more number format
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"not valid YAML: {error.problem}", where=f"{path} line {line}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"not valid YAML: {error}", where=str(path)) from None
    if not isinstance(raw, dict):
        raise ConfigError("a config is a mapping of settings", where=str(path), given=type(raw).__name__)
    try:
        json.dumps(raw, default=str)
    except (ValueError, TypeError, RecursionError):  # an anchor inside itself, a mapping as a key
        raise ConfigError("this nests in itself or has keys that are no text", where=str(path)) from None
    return raw, {(): str(path), **dict(_lines(node, (), str(path)) if node else {})}


def _lines(node: yaml.Node, place: KeyPath, path: str) -> Iterator[tuple[KeyPath, str]]:
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            where = f"{path} line {key.start_mark.line + 1}"
            name = str(key.value)
            if name in seen:
                raise ConfigError(f"{_dotted((*place, name))} stands twice", where=where)
            seen.add(name)
            yield (*place, name), where
            yield from _lines(value, (*place, name), path)
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            yield (*place, number), f"{path} line {value.start_mark.line + 1}"
            yield from _lines(value, (*place, number), path)


def _apply(raw: dict[str, Any], lines: dict[KeyPath, str], override: str) -> None:
    name, equals, text = override.partition("=")
    keys = tuple(name.strip().split("."))
    if not equals or not all(keys):
        raise ConfigError(
            "an override is key=value", where="command line", given=override, hint="for example training.epochs=2"
        )
    try:
        value = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader with one more number format
    except yaml.YAMLError:
        raise ConfigError("this value is not valid YAML", where="command line", given=override) from None
    target = raw
    for key in keys[:-1]:
        below = target.setdefault(key, {})
        if not isinstance(below, dict):
            raise ConfigError(f"{key} is not a group of settings", where="command line", given=override)
        target = below
    target[keys[-1]] = value
    for place in [p for p in lines if p[: len(keys)] == keys]:
        del lines[place]
    lines[keys] = "command line"
    for place in _places(value, keys):
        lines[place] = "command line"


def _places(value: Any, place: KeyPath) -> Iterator[KeyPath]:
    if isinstance(value, dict):
        for key, below in value.items():
            yield (*place, str(key))
            yield from _places(below, (*place, str(key)))


def _validate(raw: dict[str, Any], lines: Mapping[KeyPath, str]) -> RunConfig:
    if isinstance(raw.get("method"), dict) and "kind" not in raw["method"]:
        raw = {**raw, "method": {"kind": "lora", **raw["method"]}}
    try:
        config = RunConfig.model_validate(raw)
    except ValidationError as error:
        raise _explain(error, raw, lines) from None
    except RecursionError:
        raise ConfigError("nested too deeply", where=lines.get((), "config")) from None
    return config


def _explain(error: ValidationError, raw: dict[str, Any], lines: Mapping[KeyPath, str]) -> ConfigError:
    """The first problem, unknown keys before the rest: a misspelt key often makes another one missing."""
    problems = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    problem = problems[0]
    place = _without_tags(problem["loc"], raw)
    where, name = _where(place, lines), _dotted(place)
    if problem["type"] == "extra_forbidden":
        known = sorted(_known(place[:-1], raw))
        parent = _dotted(place[:-1])
        kind = f"{parent} {raw[parent].get('kind')}" if parent in ("method", "objective") else parent or "a run"
        near = did_you_mean(str(place[-1]), known)
        kinds = [k for k, s in METHOD_CONFIGS.items() if place[:-1] == ("method",) and place[-1] in s.model_fields]
        hint = f"did you mean {_dotted((*place[:-1], near))}?" if near else _elsewhere(str(place[-1]))
        if present := RENAMED_KEYS.get(".".join("*" if isinstance(step, int) else str(step) for step in place)):
            hint = f"it is called {present} now"
        elif kinds:
            hint = f"it is a setting of {', '.join(kinds)}; an override method={{kind: ...}} replaces the whole group"
        return ConfigError(
            f"{name} is not a setting of {kind}",
            where=where,
            given=problem["input"],
            allowed=", ".join(known),
            hint=hint,
        )
    if problem["type"] == "missing":
        example = {"data": "data: {path: my.jsonl}", "output": "output: runs/my-run"}.get(name)
        return ConfigError(f"{name} is missing", where=where, hint=f"for example {example}" if example else None)
    message = problem["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    present = RENAMED_VALUES.get(str(problem["input"])) if problem["type"] == "literal_error" else None
    hint = f"it is called {present} now" if present else None
    return ConfigError(f"{name}: {message}", where=where, given=problem["input"], hint=hint)


def _elsewhere(word: str) -> str | None:
    """Where in a run a setting of this name does exist."""
    for group, info in RunConfig.model_fields.items():
        for candidate in [info.annotation, *get_args(info.annotation)]:
            if isinstance(candidate, type) and issubclass(candidate, BaseModel) and word in candidate.model_fields:
                return f"did you mean {group}.{word}?"
    return None


def _known(place: KeyPath, raw: Any) -> list[str]:
    """Settings that a group of this place has."""
    model: type[BaseModel] = RunConfig
    value: Any = raw
    for step in place:
        if isinstance(step, int):
            value = value[step] if isinstance(value, list) else None
            continue
        value = value.get(step) if isinstance(value, dict) else None
        model = _below(model, step, value)
    return list(model.model_fields)


def _below(model: type[BaseModel], step: str, value: Any) -> type[BaseModel]:
    """The class of a group; of several, the one whose `kind` is given."""
    pending = [model.model_fields[step].annotation] if step in model.model_fields else []
    candidates: list[type[BaseModel]] = []
    while pending:
        candidate = pending.pop(0)
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            candidates.append(candidate)
        pending.extend(get_args(candidate))
    kind = value.get("kind") if isinstance(value, dict) else None
    named = [c for c in candidates if "kind" in c.model_fields and kind in get_args(c.model_fields["kind"].annotation)]
    return (named or candidates or [model])[0]


def _without_tags(location: tuple[int | str, ...], raw: Any) -> KeyPath:
    """Pydantic's path without the names of union members: steps that look like one and are not in the config."""
    place: list[str | int] = []
    unions: set[KeyPath] = set(_UNIONS)
    value = raw
    for step in location:
        if tuple(place) in unions and isinstance(value, dict) and step == value.get("kind"):
            unions.remove(tuple(place))
            continue
        inside = isinstance(value, dict) and step in value
        looks = isinstance(step, str) and (step[:1].isupper() or not step.isidentifier() or step in _TYPES)
        if looks and not inside:
            continue
        place.append(step)
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):  # a setting that is missing
            value = None
    return tuple(place)


def _where(place: KeyPath, lines: Mapping[KeyPath, str]) -> str:
    for length in range(len(place), -1, -1):
        if place[:length] in lines:
            return lines[place[:length]]
    return "config"


def _dotted(place: Sequence[str | int]) -> str:
    return ".".join(str(step) for step in place)
