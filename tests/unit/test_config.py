"""Configs: overrides, origins, rungs, and errors that point at the right place."""

from __future__ import annotations

from pathlib import Path

import pytest

from rung.config.climb import RungSpec
from rung.config.io import config_to_dict, for_rung, load_config, parse_config, show
from rung.errors import ConfigError, RungError, did_you_mean

TEXT = """\
data: {path: a.jsonl}
method:
  kind: lora
  rank: 8
engine: {learning_rate: 1e-3}
output: runs/x
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(TEXT)
    return path


def test_scientific_notation_is_a_number(file: Path) -> None:
    assert load_config(file).spec.engine.learning_rate == 1e-3
    assert load_config(file, ["engine.learning_rate=2E-4"]).spec.engine.learning_rate == 2e-4


def test_a_mapping_replaces_and_a_dotted_key_changes(file: Path) -> None:
    assert load_config(file, ["method.alpha=4"]).spec.method.model_dump()["rank"] == 8
    replaced = load_config(file, ["method={kind: lora, alpha: 4}"]).spec.method.model_dump()
    assert (replaced["rank"], replaced["alpha"]) == (16, 4.0)
    assert load_config(file, ["method.layers=[1, 2]", "evaluate.limit=5"]).spec.evaluate.limit == 5
    assert load_config(file, ["engine.max_steps=null"]).spec.engine.max_steps is None


def test_origins_are_shown(file: Path) -> None:
    text = show(load_config(file, ["engine.epochs=2"]))
    assert "rank: 8" in text and f"# {file} line 4" in text
    epochs = next(line for line in text.splitlines() if "epochs:" in line)
    assert epochs.endswith("# command line")
    alpha = next(line for line in text.splitlines() if "alpha:" in line)
    assert alpha.endswith("# default")


def test_a_config_survives_its_own_json(file: Path) -> None:
    spec = load_config(file).spec
    assert parse_config(config_to_dict(spec)) == spec


def test_learning_rate_belongs_to_the_configs_method(file: Path) -> None:
    spec = load_config(file).spec
    assert for_rung(spec, RungSpec(kind="lora"), "o", 1).learning_rate == 1e-3
    assert for_rung(spec, RungSpec(kind="lora"), "o", 1).method.model_dump()["rank"] == 8
    assert for_rung(spec, RungSpec(kind="full"), "o", 1).learning_rate == 5e-5
    own = for_rung(spec, RungSpec(kind="full", engine={"learning_rate": 1e-5}), "o", 4)
    assert own.learning_rate == 1e-5 and own.seed == 4 and own.output == "o"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("engine.optimiser.beta=1", "did you mean engine.optimiser.beta"),
        ("climb.rungs=[{kind: lora, shot: 2}]", "climb.rungs.0.shot"),
        ("data.path=[{path: a, wieght: 2}]", "did you mean data.path.0.weight?"),
        ("method.layers=[-1]", "method.layers.0"),
        ("data.test=1.5", "data.test"),
        ("engine=3", "engine"),
        ("engine.epochs", "key=value"),
        ("output.x=1", "not a group"),
        ("engine.learning_rate=.nan", "engine.learning_rate"),
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
