"""Configs: overrides, origins, rungs, and errors that point at the right place."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import rung
from rung.config import io as config_io
from rung.config.base import Config
from rung.config.climb import RungConfig
from rung.config.climb_runs import rung_run_config
from rung.config.io import (
    OTHER_TOOLS_KEYS,
    RENAMED_KEYS,
    RENAMED_VALUES,
    config_to_dict,
    describe_config,
    load_config,
    parse_config,
    resolve_config,
)
from rung.config.objective import GrpoConfig, PreferenceConfig
from rung.config.run import RunConfig
from rung.config.training import TrainingConfig
from rung.errors import ConfigError, RungError, did_you_mean

TEXT = """\
data: {path: a.jsonl}
method:
  kind: lora
  rank: 8
training: {learning_rate: 1e-3}
output: runs/x
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(TEXT)
    return path


def test_scientific_notation_is_a_number(file: Path) -> None:
    assert load_config(file).config.training.learning_rate == 1e-3
    assert load_config(file, ["training.learning_rate=2E-4"]).config.training.learning_rate == 2e-4


def test_a_mapping_replaces_and_a_dotted_key_changes(file: Path) -> None:
    assert load_config(file, ["method.alpha=4"]).config.method.model_dump()["rank"] == 8
    replaced = load_config(file, ["method={kind: lora, alpha: 4}"]).config.method.model_dump()
    assert (replaced["rank"], replaced["alpha"]) == (16, 4.0)
    assert load_config(file, ["method.layers=[1, 2]", "evaluation.limit=5"]).config.evaluation.limit == 5
    assert load_config(file, ["training.max_steps=null"]).config.training.max_steps is None


def test_one_rollout_setting_leaves_the_other_defaults_of_the_objective(file: Path) -> None:
    """PPO takes four epochs of two minibatches; with 1 and 1 its ratio is always 1 and clipping never acts."""
    for section in ("rollout: {max_new_tokens: 64}", "rollout: {max_new_tokens: 64, batch: 8}"):
        objective = f"objective={{kind: ppo, reward: {{kind: exact}}, {section}}}"
        rollout = load_config(file, [objective]).config.objective.rollout
        assert rollout is not None
        assert (rollout.num_generations, rollout.num_iterations, rollout.num_minibatches) == (1, 4, 2)
        assert rollout.max_new_tokens == 64
    distill = "objective={kind: distill, teacher: x, on_policy: 0.5, rollout: {max_new_tokens: 64}}"
    config = load_config(file, [distill]).config.objective
    assert config.rollout is not None and config.rollout.num_generations == 1
    given = rung.RolloutConfig(temperature=0.7)
    in_python = rung.PpoConfig(reward=rung.VerifierConfig(kind="exact"), rollout=given).rollout
    assert (in_python.temperature, in_python.num_iterations, in_python.num_minibatches) == (0.7, 4, 2)


def _config_classes(base: type[Config] = Config) -> list[type[Config]]:
    return [c for child in base.__subclasses__() for c in (child, *_config_classes(child))]


def test_every_nested_section_keeps_the_defaults_of_its_parent() -> None:
    """Of a section whose defaults depend on the config around it, one setting changes that setting alone."""
    with_own_defaults = []
    for parent in _config_classes():
        for name, field in parent.model_fields.items():
            if isinstance(field.default, Config) and field.default.model_fields_set:
                with_own_defaults.append((parent.__name__, name))
                for setting in type(field.default).model_fields:
                    value = getattr(field.default, setting)
                    merged = parent._merge_section_defaults({name: {setting: value}})[name]  # type: ignore[operator]
                    assert type(field.default)(**merged) == field.default, (parent, name, setting)
    assert set(with_own_defaults) == {("PpoConfig", "rollout"), ("DistillConfig", "rollout")}


def test_origins_are_shown(file: Path) -> None:
    text = describe_config(load_config(file, ["training.epochs=2"]))
    assert "rank: 8" in text and f"# {file} line 4" in text
    epochs = next(line for line in text.splitlines() if "epochs:" in line)
    assert epochs.endswith("# command line")
    alpha = next(line for line in text.splitlines() if "alpha:" in line)
    assert alpha.endswith("# default")


def test_a_config_survives_its_own_json(file: Path) -> None:
    config = load_config(file).config
    assert parse_config(config_to_dict(config)) == config


def test_learning_rate_belongs_to_the_configs_method(file: Path) -> None:
    config = load_config(file).config
    assert rung_run_config(config, RungConfig(kind="lora"), "o", 1).learning_rate == 1e-3
    assert rung_run_config(config, RungConfig(kind="lora"), "o", 1).method.model_dump()["rank"] == 8
    assert rung_run_config(config, RungConfig(kind="full"), "o", 1).learning_rate == 5e-5
    own = rung_run_config(config, RungConfig(kind="full", training={"learning_rate": 1e-5}), "o", 4)
    assert own.learning_rate == 1e-5 and own.seed == 4 and own.output == "o"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.optimizer.beta=1", "did you mean training.optimizer.beta"),
        ("climb.rungs=[{kind: lora, shot: 2}]", "climb.rungs.0.shot"),
        ("data.path=[{path: a, wieght: 2}]", "did you mean data.path.0.weight?"),
        ("method.layers=[-1]", "method.layers.0"),
        ("data.test=1.5", "data.test"),
        ("training=3", "training"),
        ("training.epochs", "key=value"),
        ("output.x=1", "not a group"),
        ("training.learning_rate=.nan", "training.learning_rate"),
        ("method.kind=lorra", "'lora'"),
    ],
)
def test_wrong_overrides(file: Path, override: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(file, [override])
    assert words in str(caught.value) and str(caught.value).startswith(("command line", str(file)))


def test_files_that_are_no_configs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "c.yaml")
    (tmp_path / "run.yaml").write_text(TEXT)
    with pytest.raises(ConfigError, match=r"did you mean .*run\.yaml"):
        load_config(tmp_path / "runn.yaml")
    with pytest.raises(ConfigError, match=r"folder[\s\S]*run\.yaml"):
        load_config(tmp_path)
    for content in (b"\xff\xfe\x00", b"", b"a: [" * 3000, b"a: &a [*a]", b"? {a: b}\n: c\n"):
        (tmp_path / "bad.yaml").write_bytes(content)
        with pytest.raises(ConfigError):
            load_config(tmp_path / "bad.yaml")


def test_errors_say_where_what_and_what_to_do() -> None:
    error = RungError("it broke", where="here", given="x" * 1000, allowed="y", hint="do z")
    assert str(error).splitlines()[0] == "here: it broke"
    assert str(error).splitlines()[2:] == ["  allowed: y", "  do z"] and len(str(error)) < 400
    assert did_you_mean("rnak", ["rank", "alpha"]) == "rank" and did_you_mean("q", ["rank"]) is None


@pytest.mark.parametrize("old", RENAMED_KEYS)
def test_a_former_key_is_refused_with_its_present_name(file: Path, old: str) -> None:
    kinds = {
        "method": ["lora", "qlora", "lottery"],
        "objective": ["preference", "reward", "grpo", "ppo", "distill"],
    }
    needed = {
        "grpo": {"reward": {"kind": "exact"}},
        "ppo": {"reward": {"kind": "exact"}},
        "distill": {"teacher": "base"},
        "climb.rungs": {"kind": "lora"},
        "climb.on_top": {"base_rung": "lora", "objective": {"kind": "sft"}},
    }
    group, *rest = old.split(".")
    hints = []
    for kind in kinds.get(group, [None]):
        value: object = "old"
        for i, step in reversed(list(enumerate(rest, 1))):
            place = ".".join(old.split(".")[:i])
            value = [value] if step == "*" else {**needed.get(place if "*" in rest else "", {}), step: value}
        if isinstance(value, dict) and kind is not None:
            value = {"kind": kind, **needed.get(kind, {}), **value}
        with pytest.raises(ConfigError) as caught:
            load_config(file, [f"{group}={json.dumps(value)}"])
        hints.append(str(caught.value.hint))
    assert f"it is called {RENAMED_KEYS[old]} now" in hints


def test_no_present_key_is_listed_as_a_former_one(file: Path) -> None:
    assert not set(RENAMED_KEYS) & set(RENAMED_KEYS.values()) and "lottery" not in RENAMED_KEYS


@pytest.mark.parametrize(
    ("key", "old"), [("data.format", "label"), ("data.format", "prompt"), ("evaluation.metrics.0", "normalised")]
)
def test_a_former_value_is_refused_with_its_present_name(file: Path, key: str, old: str) -> None:
    value = f"data.format={old}" if key == "data.format" else "evaluation.metrics=[normalised]"
    with pytest.raises(ConfigError) as caught:
        load_config(file, [value])
    assert caught.value.hint == f"it is called {RENAMED_VALUES[old]} now"


@pytest.mark.parametrize(
    ("loss", "beta"),
    [
        *((loss, 0.1) for loss in ("dpo", "ipo", "hinge", "robust", "orpo", "kto", "apo_zero")),
        ("simpo", 2.0),
        ("sigmoid_norm", 5.0),  # of nats per token; it had 0.1, that of whole answers
    ],
)
def test_a_loss_of_nats_per_token_has_a_beta_of_its_own(loss: str, beta: float) -> None:
    smoothing = {"label_smoothing": 0.1} if loss == "robust" else {}
    assert PreferenceConfig(loss=loss, **smoothing).resolved_beta == beta  # type: ignore[arg-type]
    assert PreferenceConfig(loss=loss, beta=0.3, **smoothing).resolved_beta == 0.3  # type: ignore[arg-type]


@pytest.mark.parametrize(("loss", "beta"), [("grpo", 0.04), ("dr_grpo", 0.0), ("rloo", 0.03)])
def test_a_variant_of_grpo_has_the_beta_of_its_paper(loss: str, beta: float) -> None:
    """RLOO's divergence is of whole answers and GRPO's per token; Dr. GRPO has none, so it loads no reference."""
    config = GrpoConfig(loss=loss, reward={"kind": "exact"})  # type: ignore[arg-type]
    assert config.kl_weight == beta
    assert (config.reference_model is None) == (beta == 0.0)
    assert GrpoConfig(loss=loss, beta=0.2, reward={"kind": "exact"}).kl_weight == 0.2  # type: ignore[arg-type]


@pytest.mark.parametrize("name", OTHER_TOOLS_KEYS)
def test_a_name_of_another_tool_is_told_its_name_here(name: str) -> None:
    """Wherever it stands: people paste the sections of the config that they have."""
    given = {"data": {"path": "x.jsonl"}, "output": "x"}
    known = set(TrainingConfig.model_fields)
    for raw in ({**given, name: 1}, {**given, "training": {name: 1}}):
        if name in RunConfig.model_fields or ("training" in raw and name in known):
            continue
        with pytest.raises(ConfigError) as error:
            resolve_config(raw)
        assert error.value.hint == f"here it is {OTHER_TOOLS_KEYS[name]}"


def test_names_for_other_tools_exist() -> None:
    for target in OTHER_TOOLS_KEYS.values():
        for setting in re.split(" or ", target.partition(": ")[0]):
            section, _, key = setting.partition(".")
            info = RunConfig.model_fields[section]
            classes = config_io._config_classes(info.annotation)
            assert not key or any(key in c.model_fields for c in classes), setting


@pytest.mark.parametrize("override", ["training.max_steps=on", "seed=no", "training.learning_rate=yes"])
def test_a_truth_value_is_no_number(file: Path, override: str) -> None:
    """`max_steps: on` was one step."""
    with pytest.raises(ConfigError, match=r"is (true|false), a truth value"):
        load_config(file, [override])
    assert load_config(file, ["model.fused=no"]).config.model.fused is False


def test_the_output_is_a_path_of_the_user(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No shell has read it: a folder of the name ~ was made."""
    monkeypatch.setenv("HOME", "/home/of/user")
    assert load_config(file, ["output=~/runs/a"]).config.output == "/home/of/user/runs/a"
    with pytest.raises(ConfigError, match="output: .*NUL"):
        load_config(file, [r'output="a\0b"'])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("10", 10),
        ("-3", -3),
        ("0", 0),
        ("1_000", 1000),
        ("0x10", 16),
        ("1.5", 1.5),
        (".5", 0.5),
        ("1e-4", 1e-4),
        ("2.0e3", 2e3),
    ],
)
def test_numbers_of_a_config(text: str, value: float) -> None:
    _, parsed = config_io._parse_yaml(text, "here")
    assert parsed == value and type(parsed) is type(value)


def test_a_time_is_no_number() -> None:
    """YAML 1.1 reads 1:30 as 90 and 010 as 8, without a word."""
    given = {"data": {"path": "x.jsonl"}, "output": "x"}
    with pytest.raises(ConfigError, match="max_steps"):
        resolve_config(given, ["training.max_steps=1:30"])
    with pytest.raises(ConfigError, match="learning_rate"):
        resolve_config(given, ["training.learning_rate=1:30.5"])
    assert resolve_config(given, ["seed=010"]).seed == 10
