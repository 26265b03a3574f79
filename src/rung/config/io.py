"""Reading and writing configs: YAML, overrides, the origin of every value, and error messages.

The YAML is read twice, once into values and once into nodes, because only nodes have line numbers; configs are small.
With them an error names the file, the line and the nearest known key. `resolve_config` is the entry point of commands
and of the Python API; `climb_runs.py` derives the runs of a climb.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from rung.config.constitution import ConstitutionRunConfig
from rung.config.data_files import data_suffix
from rung.config.method import METHOD_CONFIGS, LayerLotteryConfig
from rung.config.run import RunConfig
from rung.config.synth import ImproveRunConfig, TeachRunConfig
from rung.errors import ConfigError, did_you_mean

KeyPath = tuple[str | int, ...]
SynthRunConfig = TeachRunConfig | ImproveRunConfig | ConstitutionRunConfig
SYNTH_CONFIGS: dict[str, type[SynthRunConfig]] = {
    "teach": TeachRunConfig,
    "improve": ImproveRunConfig,
    "constitution": ConstitutionRunConfig,
}
"""By the kind of the section `synth`, which is the verb."""
MAX_CONFIG_BYTES = 2**20  # YAML is slow: a data file given by mistake should fail at once
MAX_CONFIG_NODES = 100_000
"""Largest number of YAML nodes of a config with its aliases written out; ten aliases of ten aliases each, ten levels
deep, are 329 bytes and ten billion nodes."""
# names that pydantic puts into error locations for members of unions of plain types
_TYPE_TAGS = frozenset({"str", "float", "int", "bool"})
_UNION_GROUPS = frozenset(
    {
        *(("method",), ("objective",), ("objective", "reward")),
        *(("synth", "verifier"), ("synth", "selection", "verifier"), ("synth", "makes")),
    }
)
"""Groups with a `kind`: pydantic adds the kind to the location of errors inside them."""


def _renamed(section: str, **names: str) -> dict[str, str]:
    return {f"{section}{former}": f"{section}{current}" for former, current in names.items()}


RENAMED_KEYS = {
    **_renamed("", engine="training", evaluate="evaluation"),
    **_renamed("training.", cache_trunk="cache_frozen_layers", clip="max_grad_norm", keep="save_total_limit"),
    **_renamed("training.", optimiser="optimizer", warmup="warmup_ratio"),
    **_renamed("training.optimizer.", moments="state_dtype"),
    **_renamed("evaluation.", dequantise="dequantize"),
    **_renamed("evaluation.judge.", human="human_labels", kappa="min_kappa"),
    **_renamed("method.", double_quantised="double_quant", rate_ratio="loraplus_lr_ratio", ranks="rank_pattern"),
    **_renamed("method.", resample_every="lisa_step_interval", sampled_layers="lisa_n_layers"),
    **{f"method.{name}": f"method.lottery.{name}" for name in LayerLotteryConfig.model_fields},
    **_renamed("objective.", adapt="adaptive_kl", decay="gae_lambda", keep_states="cache_teacher_states"),
    **_renamed("objective.", bad_weight="undesirable_weight", centre="center_rewards_coefficient"),
    **_renamed("objective.", value_clip="cliprange_value", value_weight="vf_coef"),
    **_renamed("objective.rollout.", answers="num_generations", cut="truncation_penalty"),
    **_renamed("objective.rollout.", epochs="num_iterations", minibatches="num_minibatches"),
    **_renamed("objective.stops.", kl="target_kl"),
    **_renamed("climb.", stop="stop_at_target", then="on_top"),
    **_renamed("climb.on_top.*.", above="base_rung", engine="training"),
    **_renamed("climb.rungs.*.", choose="example_selection", engine="training"),
    **_renamed("climb.search.", reduction="reduction_factor"),
}
"""Former names of settings; `*` stands for a list index. They are refused with the current name as the hint."""
RENAMED_VALUES = {"label": "unpaired_preference", "prompt": "prompt_only", "normalised": "normalized"}
"""Former names of formats and metrics."""


OTHER_TOOLS_KEYS = {
    **dict.fromkeys(("model_name_or_path", "base_model", "model_id", "pretrained_model_name_or_path"), "model.name"),
    **dict.fromkeys(("dataset", "datasets", "train_file", "dataset_name", "data_path"), "data.path"),
    **dict.fromkeys(("output_dir", "save_dir"), "output"),
    **dict.fromkeys(("bf16", "fp16", "torch_dtype"), "model.dtype"),
    "chat_template": "model.template",
    **dict.fromkeys(
        ("max_seq_length", "max_seq_len", "sequence_len", "cutoff_len", "model_max_length"), "data.max_length"
    ),
    **dict.fromkeys(("val_set_size", "test_size", "validation_split"), "data.validation"),
    **dict.fromkeys(("train_on_inputs", "completion_only_loss", "assistant_only_loss"), "data.loss_on"),
    **dict.fromkeys(("num_train_epochs", "num_epochs"), "training.epochs"),
    # a step has so many rows however they are cut: the micro-batch follows from the memory
    **dict.fromkeys(
        ("per_device_train_batch_size", "gradient_accumulation_steps", "micro_batch_size", "batch_size"),
        "training.examples_per_step",
    ),
    "lr": "training.learning_rate",
    **dict.fromkeys(("lr_scheduler_type", "lr_scheduler"), "training.schedule"),
    "warmup_steps": "training.warmup_ratio",
    **dict.fromkeys(("max_grad_clip", "gradient_clipping"), "training.max_grad_norm"),
    **dict.fromkeys(("save_steps", "save_strategy", "saves_per_epoch"), "training.checkpoint_every"),
    **dict.fromkeys(("eval_steps", "eval_strategy", "evals_per_epoch"), "training.eval_every"),
    **dict.fromkeys(("early_stopping_patience", "load_best_model_at_end"), "training.patience"),
    **dict.fromkeys(("sample_packing", "group_by_length"), "training.packing"),
    **dict.fromkeys(("optim", "optimizer_type"), "training.optimizer"),
    **dict.fromkeys(("r", "lora_r", "lora_rank"), "method.rank"),
    "lora_alpha": "method.alpha",
    "lora_dropout": "method.dropout",
    **dict.fromkeys(("target_modules", "lora_target", "lora_target_modules"), "method.targets"),
    **dict.fromkeys(("use_dora", "use_rslora"), "method.dora or method.rslora"),
    **dict.fromkeys(("load_in_4bit", "load_in_8bit", "quantization_bit"), "method.kind: qlora"),
    **dict.fromkeys(("finetuning_type", "adapter", "train_type", "peft_config"), "method.kind"),
    **dict.fromkeys(("pref_beta", "dpo_beta"), "objective.beta"),
    **dict.fromkeys(("pref_loss", "loss_type", "rlhf_type", "stage"), "objective"),
}
"""Names of settings in transformers, TRL, peft, LLaMA-Factory, Axolotl and ms-swift, and what they are called here."""


@dataclass(frozen=True)
class LoadedConfig:
    """A valid config and the origin of each value."""

    config: RunConfig
    origins: Mapping[str, str]
    """Dotted name -> `file line N` or `command line`; names that are missing have their default."""


_INTEGER = re.compile(r"^[-+]?(?:0|[1-9][0-9_]*|0b[01_]+|0x[0-9a-fA-F_]+)$")
_NUMBER = re.compile(
    r"^(?:[-+]?[0-9][0-9_]*(?:\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[eE][-+]?[0-9]+)|[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)


class _Loader(yaml.SafeLoader):
    """A SafeLoader with the numbers of YAML 1.2: 1e-4 is one, and 1:30 (90 in YAML 1.1) and 010 (8) are text."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":int", ":float"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INTEGER, list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+0123456789."))


def is_config_name(name: str) -> bool:
    """Whether a name is that of a config, where a command takes a data file or a config."""
    return name.endswith((".yaml", ".yml"))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Read a config and apply `key=value` overrides. Raises `ConfigError`."""
    source = Path(path)
    raw, origins = _read_yaml(source)
    config = _validate_with_overrides(raw, origins, overrides)
    return LoadedConfig(config, {_dotted(key_path): origin for key_path, origin in origins.items()})


def load_synth_config(
    source: Mapping[str, Any] | str | Path, overrides: Sequence[str] = (), *, verb: str | None = None
) -> SynthRunConfig:
    """Read and validate a config of `rung synth`, with `key=value` overrides.

    `verb` is the verb that reads it. Raises `ConfigError`, also for the config of another verb.
    """
    raw, origins = (copy.deepcopy(dict(source)), {}) if isinstance(source, Mapping) else _read_yaml(Path(source))
    for override in overrides:
        _apply_override(raw, origins, override)
    where = origins.get((), "config")
    synth = raw.get("synth")
    if not isinstance(synth, dict):
        hint = "for example synth: {kind: teach, teacher: smollm2-135m, seeds: my.jsonl, rows: 100}"
        raise ConfigError("synth is missing", where=where, hint=hint)
    kind = synth.setdefault("kind", verb)
    if kind not in SYNTH_CONFIGS:
        raise ConfigError("no such kind", where="synth.kind", given=kind, allowed=", ".join(SYNTH_CONFIGS))
    if verb not in (None, kind):
        raise ConfigError("this is the config of another verb", where=where, given=kind, hint=f"rung synth {kind}")
    if kind == "constitution" and isinstance(synth.get("principles"), str):
        synth["principles"] = _read_list(Path(synth["principles"]).expanduser())
    return _validate(raw, origins, SYNTH_CONFIGS[kind])


ConfigSource = RunConfig | Mapping[str, Any] | str | Path
"""A config as Python programs may give it: an object, a mapping of plain values, or the path of a YAML file."""


def resolve_config(source: ConfigSource, overrides: Sequence[str] = ()) -> RunConfig:
    """Validate a config from any source, with `key=value` overrides. Raises `ConfigError`."""
    if isinstance(source, str | Path):
        return load_config(source, overrides).config
    # deepcopy: overrides must not change the mapping of the caller
    raw: dict[str, Any] = config_to_dict(source) if isinstance(source, RunConfig) else copy.deepcopy(dict(source))
    return _validate_with_overrides(raw, {}, overrides)


def parse_config(raw: Mapping[str, Any], where: str = "config") -> RunConfig:
    """Validate a mapping; `where` is the origin in error messages."""
    return _validate(dict(raw), {(): where}, RunConfig)


def config_to_dict(config: BaseModel) -> dict[str, Any]:
    """The config as plain JSON values with all defaults."""
    return config.model_dump(mode="json")


def describe_config(loaded: LoadedConfig) -> str:
    """The resolved config as YAML, each value followed by its origin as a comment."""
    text = yaml.safe_dump(config_to_dict(loaded.config), sort_keys=False, allow_unicode=True, width=100)
    output_lines = []
    # the groups that the current line is in, by indentation: enough for the YAML that safe_dump writes
    stack: list[tuple[int, str]] = []
    for line in text.splitlines():
        key = re.match(r"( *)([A-Za-z_]\w*):(.*)", line)
        if not key:
            output_lines.append(line)
            continue
        indent = len(key.group(1))
        stack = [entry for entry in stack if entry[0] < indent] + [(indent, key.group(2))]
        dotted_name = ".".join(part for _, part in stack)
        is_group_header = not key.group(3).strip() and dotted_name not in loaded.origins
        output_lines.append(line if is_group_header else f"{line:<60}  # {loaded.origins.get(dotted_name, 'default')}")
    return "\n".join(output_lines) + "\n"


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[KeyPath, str]]:
    root, raw = _load_yaml(path)
    if not isinstance(raw, dict):
        raise ConfigError("a config is a mapping of settings", where=str(path), given=type(raw).__name__)
    return raw, {(): str(path), **dict(_key_origins(root, (), str(path)) if root else {})}


def _read_list(path: Path) -> list[Any]:
    _, raw = _load_yaml(path)
    if not isinstance(raw, list):
        raise ConfigError("a list is asked for", where=str(path), given=type(raw).__name__)
    return raw


def _load_yaml(path: Path) -> tuple[yaml.Node | None, Any]:
    """The nodes of a YAML file and its value. Raises `ConfigError` for what is no YAML, or too large for a config."""
    # not .json: JSON is YAML
    if data_suffix(path) not in (None, ".json") and path.exists():
        hint = "write a config whose data.path names this file"
        raise ConfigError("this is data where a config is asked for", where=str(path), allowed="YAML", hint=hint)
    try:
        if path.is_file() and (size := path.stat().st_size) > MAX_CONFIG_BYTES:
            raise ConfigError("this is too large to be a config", where=str(path), given=f"{size:,} bytes")
        # utf-8-sig: editors on Windows write a byte order mark
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        suggestion = did_you_mean(path.name, [p.name for p in path.parent.glob("*")])
        question = f"did you mean {path.parent / suggestion}?" if suggestion else None
        raise ConfigError("no such file", where=str(path), hint=question) from None
    except IsADirectoryError:
        config_files = ", ".join(sorted(p.name for p in path.glob("*.y*ml"))) or "none"
        raise ConfigError("this is a folder", where=str(path), hint=f"config files in it: {config_files}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"this is not UTF-8 text: {error.reason}", where=str(path)) from None
    except OSError as error:
        raise ConfigError(str(error.strerror), where=str(path)) from error
    try:
        root, raw = _parse_yaml(text, str(path))
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"not valid YAML: {error.problem}", where=f"{path} line {line}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"not valid YAML: {error}", where=str(path)) from None
    try:
        json.dumps(raw, default=str)
    except (ValueError, TypeError, RecursionError):  # an anchor that contains itself, a mapping as a key
        raise ConfigError("this nests in itself or has keys that are no text", where=str(path)) from None
    return root, raw


def _parse_yaml(text: str, where: str) -> tuple[yaml.Node | None, Any]:
    """The nodes of a YAML text and its value. Raises `ConfigError` where aliases make it too large, yaml's errors."""
    root = yaml.compose(text, Loader=_Loader)
    if root is not None and (count := _expanded_size(root, {})) > MAX_CONFIG_NODES:
        summary = "this is too large to be a config: aliases (*name) repeat what their anchors hold"
        given = f"{count:,} values" if count < 10**12 else "more than 10^12 values"
        raise ConfigError(summary, where=where, given=given, allowed=f"{MAX_CONFIG_NODES:,}")
    return root, yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader with the numbers of YAML 1.2


def _expanded_size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Number of nodes of a tree whose aliases are written out; each node is visited once. `sizes`: by id."""
    if id(node) not in sizes:
        sizes[id(node)] = 1  # of a node within itself, which is refused later
        children = [part for entry in node.value for part in (entry if isinstance(entry, tuple) else (entry,))]
        is_scalar = isinstance(node, yaml.ScalarNode)
        sizes[id(node)] = 1 if is_scalar else 1 + sum(_expanded_size(child, sizes) for child in children)
    return sizes[id(node)]


def _key_origins(node: yaml.Node, key_path: KeyPath, path: str) -> Iterator[tuple[KeyPath, str]]:
    entries: list[tuple[str | int, yaml.Node, yaml.Node]] = []  # key, node with the line number, value
    if isinstance(node, yaml.MappingNode):
        entries = [(str(key.value), key, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        entries = [(index, value, value) for index, value in enumerate(node.value)]
    keys: set[str | int] = set()
    for key, line_node, value in entries:
        nested_path, origin = (*key_path, key), f"{path} line {line_node.start_mark.line + 1}"
        if key in keys:  # PyYAML keeps the last of two equal keys without a word
            raise ConfigError(f"{_dotted(nested_path)} stands twice", where=origin)
        keys.add(key)
        yield nested_path, origin
        yield from _key_origins(value, nested_path, path)


def _validate_with_overrides(raw: dict[str, Any], origins: dict[KeyPath, str], overrides: Sequence[str]) -> RunConfig:
    """Apply overrides, which changes `raw` and `origins`, and validate."""
    for override in overrides:
        _apply_override(raw, origins, override)
    return _validate(raw, origins, RunConfig)


C = TypeVar("C", bound=BaseModel)


def _apply_override(raw: dict[str, Any], origins: dict[KeyPath, str], override: str) -> None:
    name, separator, text = override.partition("=")
    keys = tuple(name.strip().split("."))
    if not separator or not all(keys):
        hint = "for example training.epochs=2"
        raise ConfigError("an override is key=value", where="command line", given=override, hint=hint)
    try:
        _, value = _parse_yaml(text, "command line")
    except (yaml.YAMLError, RecursionError, ValueError):
        raise ConfigError("this value is not valid YAML", where="command line", given=override) from None
    parent = raw
    for key in keys[:-1]:
        group = parent.setdefault(key, {})
        if not isinstance(group, dict):
            raise ConfigError(f"{key} is not a group of settings", where="command line", given=override)
        parent = group
    parent[keys[-1]] = value
    # origins of values that the override replaces; a whole group may be replaced by one value
    for key_path in [p for p in origins if p[: len(keys)] == keys]:
        del origins[key_path]
    origins |= dict.fromkeys([keys, *_nested_keys(value, keys)], "command line")


def _nested_keys(value: Any, key_path: KeyPath) -> Iterator[KeyPath]:
    if isinstance(value, dict):
        for key, nested in value.items():
            yield (*key_path, str(key))
            yield from _nested_keys(nested, (*key_path, str(key)))


def _validate(raw: dict[str, Any], origins: Mapping[KeyPath, str], config_class: type[C]) -> C:
    if isinstance(raw.get("method"), dict) and "kind" not in raw["method"]:
        # `method: {rank: 8}` means lora, the default method; pydantic would refuse a group without its `kind`
        raw = {**raw, "method": {"kind": "lora", **raw["method"]}}
    try:
        return config_class.model_validate(raw)
    except ValidationError as error:
        raise _explain(error, raw, origins, config_class) from None
    except RecursionError:
        raise ConfigError("nested too deeply", where=origins.get((), "config")) from None


def _explain(
    error: ValidationError, raw: dict[str, Any], origins: Mapping[KeyPath, str], config_class: type[BaseModel]
) -> ConfigError:
    """The error message for the first problem. Unknown keys come first: a misspelled key makes another one missing."""
    problem = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    key_path = _strip_union_tags(problem["loc"], raw)
    where, name = _origin_of(key_path, origins), _dotted(key_path)
    if problem["type"] == "extra_forbidden":
        known_settings = sorted(_known_settings(key_path[:-1], raw, config_class))
        parent = _dotted(key_path[:-1])
        whole = "a run" if config_class is RunConfig else f"rung synth {raw['synth'].get('kind')}"
        kind = f"{parent} {raw[parent].get('kind')}" if parent in ("method", "objective") else parent or whole
        summary, allowed = f"{name} is not a setting of {kind}", ", ".join(known_settings)
        hint = _hint_for_unknown(key_path, known_settings)
        hint = "rung synth reads it" if key_path == ("synth",) else hint
        return ConfigError(summary, where=where, given=problem["input"], allowed=allowed, hint=hint)
    if problem["type"] == "missing":
        example = {"data": "data: {path: my.jsonl}", "output": "output: runs/my-run"}.get(name)
        return ConfigError(f"{name} is missing", where=where, hint=f"for example {example}" if example else None)
    message = problem["msg"].removeprefix("Value error, ")
    current_name = RENAMED_VALUES.get(str(problem["input"])) if problem["type"] == "literal_error" else None
    hint = f"it is called {current_name} now" if current_name else None
    # a check of several settings has a whole section as its input, and its message names them
    is_of_section = problem["type"] == "value_error" and isinstance(problem["input"], Mapping | BaseModel)
    given = None if is_of_section else problem["input"]
    summary = f"{message[:1].lower()}{message[1:]}"
    return ConfigError(f"{name}: {summary}" if name else summary, where=where, given=given, hint=hint)


def _hint_for_unknown(key_path: KeyPath, known_settings: list[str]) -> str | None:
    """The current name, methods with the setting, a similar name, or another section with a setting of this name."""
    *parent, name = map(str, key_path)
    if current_name := RENAMED_KEYS.get(_dotted(["*" if isinstance(step, int) else step for step in key_path])):
        return f"it is called {current_name} now"
    if name in OTHER_TOOLS_KEYS and name not in known_settings:
        return f"here it is {OTHER_TOOLS_KEYS[name]}"
    kinds = [kind for kind, c in METHOD_CONFIGS.items() if parent == ["method"] and name in c.model_fields]
    if kinds:
        return f"it is a setting of {', '.join(kinds)}; an override method={{kind: ...}} replaces the whole group"
    if suggestion := did_you_mean(name, known_settings):
        return f"did you mean {_dotted([*parent, suggestion])}?"
    for group, info in RunConfig.model_fields.items():
        if any(name in c.model_fields for c in _config_classes(info.annotation)):
            return f"did you mean {group}.{name}?"
    return None


def _known_settings(key_path: KeyPath, raw: Any, config_class: type[BaseModel]) -> list[str]:
    """Settings of the group at a key path."""
    model, value = config_class, raw
    for step in key_path:
        if isinstance(step, int):
            value = value[step] if isinstance(value, list) else None
            continue
        value = value.get(step) if isinstance(value, dict) else None
        model = _group_class(model, step, value)
    return list(model.model_fields)


def _config_classes(annotation: Any) -> list[type[BaseModel]]:
    """The config classes of an annotation, which nests: Annotated, Optional, unions and tuples."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [c for part in get_args(annotation) for c in _config_classes(part)]


def _group_class(model: type[BaseModel], step: str, value: Any) -> type[BaseModel]:
    """The class of a group; for a union, the member with the given `kind`."""
    candidates = _config_classes(model.model_fields[step].annotation) if step in model.model_fields else []
    kind = value.get("kind") if isinstance(value, dict) else None
    kinds = {c: get_args(c.model_fields["kind"].annotation) for c in candidates if "kind" in c.model_fields}
    matching = [c for c in kinds if kind in kinds[c]]
    return (matching or candidates or [model])[0]


def _strip_union_tags(location: tuple[int | str, ...], raw: Any) -> KeyPath:
    """The key path of a pydantic error location: without names of union members, which are not keys of the config."""
    key_path: list[str | int] = []
    open_unions: set[KeyPath] = set(_UNION_GROUPS)
    value = raw
    for step in location:
        if tuple(key_path) in open_unions and isinstance(value, dict) and step == value.get("kind"):
            open_unions.remove(tuple(key_path))
            continue
        is_key = isinstance(value, dict) and step in value
        # class names, names of validators such as function-after[...], and type names
        looks_like_tag = isinstance(step, str) and (step[:1].isupper() or not step.isidentifier() or step in _TYPE_TAGS)
        if looks_like_tag and not is_key:
            continue
        key_path.append(step)
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):  # a setting that is missing
            value = None
    return tuple(key_path)


def _origin_of(key_path: KeyPath, origins: Mapping[KeyPath, str]) -> str:
    # the nearest enclosing key that has an origin: a missing setting has none
    enclosing = (key_path[:length] for length in range(len(key_path), -1, -1))
    return next((origins[group] for group in enclosing if group in origins), "config")


def _dotted(key_path: Sequence[str | int]) -> str:
    return ".".join(str(step) for step in key_path)
