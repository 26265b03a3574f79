"""Several bases in one ladder: each rung on its own, one in memory, the same questions."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from processes import inside
from rung.commands.climb_models import ClimbModels
from rung.config.io import load_config
from rung.config.model import ModelConfig
from rung.models.license import base_license, card_license
from rung.runs import checks, load
from rung.training.run_folder import read_items

Ladder = dict[str, Any]


@pytest.fixture
def climb(config: Path, capsys: Any) -> Callable[..., Ladder]:
    """Climbs these rungs; the ladder."""

    def run(rungs: list[Any], *settings: object, **climb_settings: Any) -> Ladder:
        section = json.dumps({"rungs": rungs, **climb_settings})
        code, out, err = inside(capsys, "climb", config, f"climb={section}", *settings, "--json")
        assert code == 0, err
        ladder: Ladder = json.loads(out)
        return ladder

    return run


def refusal(capsys: Any, config: Path, rungs: list[Any], *settings: object, **climb_settings: Any) -> tuple[int, str]:
    section = json.dumps({"rungs": rungs, **climb_settings})
    code, _, err = inside(capsys, "climb", config, f"climb={section}", *settings)
    return code, err


def rows_of(ladder: Ladder) -> dict[str, Any]:
    return {row["rung"]: row for row in ladder["rows"]}


def manifest(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "run.json").read_text())
    return found


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def same_tensors(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_each_rung_is_what_a_ladder_of_its_base_alone_measures(
    climb: Callable[..., Ladder], config: Path, other_base: Path, tmp_path: Path
) -> None:
    """Another tokenizer, template and context, and nothing of one base in the other's rungs."""
    on_other = {"model": {"name": str(other_base)}}
    rungs = ["zero_shot", {"kind": "zero_shot", **on_other}, "lora", {"kind": "lora", **on_other}]
    both = climb([*rungs, {"kind": "few_shot", **on_other}])
    rows = rows_of(both)
    assert list(rows) == ["zero_shot", "zero_shot on tiny-qwen", "lora", "lora on tiny-qwen", "few_shot on tiny-qwen"]
    assert [row["model"] for row in both["rows"]] == ["tiny-llama", "tiny-qwen"] * 2 + ["tiny-qwen"]
    alone = {
        "": climb(["zero_shot", "lora"], f"output={tmp_path / 'llama'}"),
        " on tiny-qwen": climb(
            ["zero_shot", "lora", "few_shot"], f"output={tmp_path / 'qwen'}", f"model.name={other_base}"
        ),
    }
    for suffix, ladder in alone.items():
        assert ladder["models"] == []
        for name, row in rows_of(ladder).items():
            for key in ("scores", "prompt_tokens", "trainable_parameters", "sees"):
                assert rows[name + suffix][key] == row[key], (name, key)
    for run, single in (("lora", "llama"), ("lora-on-tiny-qwen", "qwen")):
        assert same_tensors(adapter(tmp_path / "run" / "rungs" / run), adapter(tmp_path / single / "rungs" / "lora"))
    folders = [tmp_path / "run" / "rungs" / name for name in ("lora", "lora-on-tiny-qwen", "zero_shot-on-tiny-qwen")]
    questions = [[item["source"] for item in read_items(folder / "items.parquet")[0]] for folder in folders]
    assert questions[0] == questions[1] == questions[2]
    fingerprints = manifest(tmp_path / "run")["fingerprints"]
    assert fingerprints["base"] == manifest(folders[0])["fingerprints"]["base"]
    assert fingerprints["base of tiny-qwen"] == manifest(folders[1])["fingerprints"]["base"] != fingerprints["base"]


def test_the_ladder_shows_what_each_base_is(
    climb: Callable[..., Ladder], config: Path, other_base: Path, tiny_base: Path, tmp_path: Path, capsys: Any
) -> None:
    on_other = {"model": {"name": str(other_base)}}
    ladder = climb(["zero_shot", "few_shot", {"kind": "zero_shot", **on_other}])
    rows, models = rows_of(ladder), {model["model"]: model for model in ladder["models"]}
    for name, folder in (("tiny-llama", tiny_base), ("tiny-qwen", other_base)):
        genuine = AutoModelForCausalLM.from_pretrained(folder)
        assert models[name]["parameters"] == sum(p.numel() for p in genuine.parameters())
    assert models["tiny-llama"].get("license") is None and models["tiny-qwen"]["license"] == "apache-2.0"
    assert models["tiny-llama"]["rungs"] == ["zero_shot", "few_shot"]
    tokens = [rows[name]["prompt_tokens"] for name in ("zero_shot", "few_shot")]
    assert models["tiny-llama"]["prompt_tokens"] == tokens
    seconds = sorted(rows[name]["seconds_per_query"] for name in ("zero_shot", "few_shot"))
    assert models["tiny-llama"]["seconds_per_query"] == seconds
    assert models["tiny-qwen"]["peak_memory_bytes"] == rows["zero_shot on tiny-qwen"]["peak_memory_bytes"]
    section = json.dumps({"rungs": ["zero_shot", "few_shot", {"kind": "zero_shot", **on_other}]})
    code, out, _ = inside(capsys, "climb", config, f"climb={section}")
    assert code == 0 and "unknown" in out and "apache-2.0" in out
    assert "on tiny-llama: zero_shot, few_shot" in out and "on tiny-qwen: zero_shot on tiny-qwen" in out
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<h2>Models</h2>" in page and "apache-2.0" in page and "tiny-llama, tiny-qwen" in page
    alone = climb(["zero_shot"], f"output={tmp_path / 'one'}")
    assert "model" not in alone["rows"][0]
    assert "<h2>Models</h2>" not in (tmp_path / "one" / "report.html").read_text()


def test_one_base_is_in_memory_at_a_time(
    climb: Callable[..., Ladder], other_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[tuple[str, weakref.ref[Any]]] = []
    alive: list[int] = []
    genuine = load.load_base

    def noted(model: Any, **options: Any) -> Any:
        gc.collect()
        alive.append(sum(reference() is not None for _, reference in loaded))
        base = genuine(model, **options)
        loaded.append((Path(model.name).name, weakref.ref(base.model)))
        return base

    monkeypatch.setattr(load, "load_base", noted)
    at_reset: list[list[str]] = []

    def reset(device: Any) -> None:
        gc.collect()
        at_reset.append([name for name, reference in loaded if reference() is not None])

    monkeypatch.setattr("rung.commands.climb.reset_peak_memory", reset)
    on_other = {"model": {"name": str(other_base)}}
    rungs = ["zero_shot", {"kind": "zero_shot", **on_other}, {"kind": "lora", **on_other}, "lora"]
    on_top = [{"base_rung": "lora on tiny-qwen", "objective": {"kind": "sft"}}]
    climb(rungs, "training.max_steps=1", "evaluation.limit=4", on_top=on_top)
    assert set(alive) == {0}, list(zip(loaded, alive, strict=True))
    # the peak of an untuned rung has no other base in it
    assert at_reset == [["tiny-llama"], []]
    # checked from the last to the first; an untuned and a tuned rung of one base share what was loaded
    names = [name for name, _ in loaded]
    assert names[:4] == ["tiny-qwen", "tiny-llama", "tiny-qwen", "tiny-llama"]


def test_a_climb_goes_on_with_the_bases_that_it_began_with(
    climb: Callable[..., Ladder], config: Path, other_base: Path, tmp_path: Path, capsys: Any
) -> None:
    mine = tmp_path / "tiny-qwen"
    shutil.copytree(other_base, mine)
    rungs = ["zero_shot", {"kind": "zero_shot", "model": {"name": str(mine)}}, "lora"]
    first = climb(rungs)
    result = tmp_path / "run" / "rungs" / "zero_shot-on-tiny-qwen" / "result.json"
    result.unlink()
    again = climb(rungs)
    assert [row["scores"] for row in again["rows"]] == [row["scores"] for row in first["rows"]]
    assert [model["license"] for model in again["models"]] == [None, "apache-2.0"]
    weights = load_file(mine / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in weights.items()}, mine / "model.safetensors", {"format": "pt"})
    (tmp_path / "run" / "rungs" / "lora" / "result.json").unlink()
    code, err = refusal(capsys, config, rungs)
    assert code == 3 and "the base of tiny-qwen has changed since this climb began" in err
    assert not (tmp_path / "run" / "rungs" / "lora" / "result.json").exists()


def test_a_climb_that_is_interrupted_between_two_bases_ends_as_one_that_is_not(
    climb: Callable[..., Ladder], config: Path, other_base: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    on_other = {"model": {"name": str(other_base)}}
    rungs = ["zero_shot", "lora", {"kind": "lora", **on_other}, {"kind": "few_shot", **on_other}]
    whole = climb(rungs, f"output={tmp_path / 'whole'}")

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("rung.runs.train._train", interrupt)
        assert refusal(capsys, config, rungs)[0] == 130
    with monkeypatch.context() as patch:  # between the last step of a run and the evaluation of its rung
        patch.setattr("rung.commands.climb.evaluate", interrupt)
        assert refusal(capsys, config, rungs)[0] == 130
    assert (tmp_path / "run" / "rungs" / "lora" / "run.json").exists()
    parts = climb(rungs)
    for key in ("rung", "model", "scores", "prompt_tokens", "trainable_parameters"):
        assert [row[key] for row in parts["rows"]] == [row[key] for row in whole["rows"]]
    for run in ("lora", "lora-on-tiny-qwen"):
        assert same_tensors(*(adapter(tmp_path / name / "rungs" / run) for name in ("run", "whole")))


@pytest.mark.parametrize(
    ("rung", "words"),
    [
        ({"kind": "zero_shot", "model": {"name": "no-such-model"}}, "zero_shot on no-such-model: model.name: no such"),
        ({"kind": "lora", "name": "big", "model": {"name": "smollm2-135"}}, "did you mean smollm2-135m?"),
        ({"kind": "lora", "model": {"nmae": "x"}}, "did you mean model.name?"),
        ({"kind": "zero_shot", "name": "z", "model": {"dtype": "float8"}}, "climb.rungs z: model.dtype"),
        ({"kind": "lora", "model": {"matmul": "blas"}}, "share a routine"),
    ],
)
def test_a_model_that_cannot_be_is_named_before_anything_is_trained(
    rung: dict[str, Any], words: str, config: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "load_base", lambda *_, **__: pytest.fail("a model was loaded"))
    code, err = refusal(capsys, config, ["lora" if rung["kind"] == "zero_shot" else "zero_shot", rung])
    assert code == 2 and words in err and not (tmp_path / "run").exists(), err


def test_a_prompt_without_room_in_one_of_the_bases(
    config: Path, other_base: Path, tmp_path: Path, capsys: Any, climb: Callable[..., Ladder]
) -> None:
    """384 positions there and 512 here: the room of each rung is that of its own base."""
    rungs: list[Any] = ["lora", "few_shot"]
    settings = ("evaluation.max_new_tokens=300", "training.max_steps=1", "evaluation.limit=2")
    code, err = refusal(capsys, config, [*rungs, {"kind": "few_shot", "model": {"name": str(other_base)}}], *settings)
    assert code == 2 and "tokens" in err and not (tmp_path / "run").exists(), err
    climb(rungs, *settings)


def test_a_base_that_does_not_fit_is_left_out_and_the_climb_goes_on(
    climb: Callable[..., Ladder], other_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = checks.free_memory
    monkeypatch.setattr(checks, "free_memory", lambda device: 1000)
    with pytest.raises(checks.DoesNotFitError, match="its weights and the libraries alone"):
        checks.refuse_base_if_too_large(ModelConfig(name=str(other_base)), load.device())
    monkeypatch.setattr(checks, "free_memory", genuine)
    checks.refuse_base_if_too_large(ModelConfig(name=str(other_base)), load.device())

    def refuse(model: ModelConfig, device: Any) -> None:
        raise checks.DoesNotFitError("this base needs 9 GB")

    monkeypatch.setattr(checks, "refuse_base_if_too_large", refuse)
    ladder = climb(["zero_shot", {"kind": "zero_shot", "model": {"name": str(other_base)}}, "lora"])
    assert list(rows_of(ladder)) == ["zero_shot", "lora"]
    assert ladder["skipped_rungs"] == [{"rung": "zero_shot on tiny-qwen", "why": "this base needs 9 GB"}]


def test_perplexity_decides_only_between_models_with_the_same_tokens(
    climb: Callable[..., Ladder], config: Path, tiny_base: Path, other_base: Path, tmp_path: Path, capsys: Any
) -> None:
    rungs = ["zero_shot", {"kind": "zero_shot", "model": {"name": str(other_base)}}]
    code, err = refusal(capsys, config, rungs, "evaluation.metrics=[perplexity, exact]")
    assert code == 2 and "other tokens" in err and not (tmp_path / "run").exists()
    climb(rungs, "evaluation.metrics=[exact, perplexity]")
    copy = tmp_path / "tiny-copy"
    shutil.copytree(tiny_base, copy)
    ladder = climb(
        ["zero_shot", {"kind": "zero_shot", "model": {"name": str(copy)}}],
        *("evaluation.metrics=[perplexity]", f"output={tmp_path / 'copy'}"),
    )
    first, second = (row["scores"]["perplexity"]["mean"] for row in ladder["rows"])
    assert first == second and ladder["rows"][1]["gain"]["mean"] == 0.0


def test_what_stands_on_a_rung_has_its_base(
    climb: Callable[..., Ladder], config: Path, other_base: Path, questions: Path, tmp_path: Path
) -> None:
    """Rungs on top, search, learning curve and forgetting."""
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"The capital of France is Paris, {i}."}) + "\n" for i in range(12)))
    ladder = climb(
        ["zero_shot", "lora", {"kind": "lora", "name": "qwen", "model": {"name": str(other_base)}}],
        *("data.validation=0.2", "training.max_steps=3"),
        on_top=[{"base_rung": "qwen", "objective": {"kind": "sft"}, "training": {"max_steps": 2}}],
        search={"trials": 2, "learning_rate": [1e-4, 1e-2]},
        curve=[16],
        forgetting=str(texts),
    )
    run = tmp_path / "run"
    bases = {
        folder: manifest(run / folder)["fingerprints"]["base"] for folder in ("rungs/lora", "rungs/qwen", "curve/16")
    }
    assert bases["curve/16"] == bases["rungs/qwen"] != bases["rungs/lora"]
    assert len(json.loads((run / "search" / "qwen" / "search.json").read_text())["trials"]) == 2
    top = manifest(run / "rungs" / "qwen-then-sft")
    assert top["status"] == "finished" and top["config"]["model"]["name"] == str(run / "rungs" / "qwen")
    assert rows_of(ladder)["qwen then sft"]["model"] == "tiny-qwen"
    assert ladder["curve"][0]["rung"] == "qwen"
    assert [result["rung"] for result in ladder["forgetting"]] == ["lora", "qwen", "qwen then sft"]


def test_the_chosen_instruction_stands_before_the_questions_of_all_bases(
    climb: Callable[..., Ladder], config: Path, other_base: Path, capsys: Any
) -> None:
    on_other = {"model": {"name": str(other_base)}}
    rungs = ["zero_shot", {"kind": "few_shot", **on_other}, {"kind": "distilled_prompt", **on_other}]
    settings = ("data.validation=0.2", "evaluation.stop=['a', 'e', 'i', 'o', ' ']", "training.max_steps=2")
    rows = rows_of(climb(rungs, *settings, instructions=["Say which fruit it is."]))
    chosen = rows["zero_shot"]["instruction"]
    assert rows["few_shot on tiny-qwen"]["instruction"] == chosen
    assert rows["distilled_prompt on tiny-qwen"]["sees"].endswith("in place of the prompt of few_shot on tiny-qwen")
    code, err = refusal(capsys, config, [{"kind": "zero_shot", **on_other}], "data.validation=0.2", instructions=["x"])
    assert code == 2 and "on the climb's model" in err
    code, err = refusal(capsys, config, ["few_shot", {"kind": "distilled_prompt", **on_other}])
    assert code == 2 and "with the same `model`" in err


def test_a_quantized_rung_on_a_base_of_its_own(climb: Callable[..., Ladder], other_base: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    ladder = climb(
        ["zero_shot", {"kind": "qlora", "name": "q", "method": {"rank": 4}, "model": {"name": str(other_base)}}]
    )
    assert rows_of(ladder)["q"]["model"] == "tiny-qwen" and ladder["models"][1]["license"] == "apache-2.0"
    assert manifest(tmp_path / "run" / "rungs" / "q")["config"]["model"]["name"] == str(other_base)


def test_no_rung_on_the_section_model(
    climb: Callable[..., Ladder], other_base: Path, config: Path, tiny_base: Path
) -> None:
    """The section names a default that nobody uses: it is neither loaded nor downloaded."""
    rungs = [{"kind": "zero_shot", "model": {"name": str(base)}} for base in (tiny_base, other_base)]
    ladder = climb(rungs, "model={name: smollm2-135m, dtype: float32}")
    assert [model["model"] for model in ladder["models"]] == ["tiny-llama", "tiny-qwen"]


def test_licenses_are_read_and_never_guessed(tmp_path: Path, tiny_base: Path, other_base: Path) -> None:
    assert base_license(ModelConfig()) == "Apache-2.0" and base_license(ModelConfig(name="phi-2")) == "MIT"
    assert base_license(ModelConfig(name=str(tiny_base))) is None
    assert base_license(ModelConfig(student_of=str(other_base))) == "apache-2.0"
    assert base_license(ModelConfig(name="owner/no-such-model")) is None
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"config": {"model": {"name": str(other_base)}}}))
    assert base_license(ModelConfig(name=str(run))) == "apache-2.0"
    peft = tmp_path / "peft"
    peft.mkdir()
    (peft / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(other_base)}))
    assert base_license(ModelConfig(name=str(peft))) == "apache-2.0"
    card = tmp_path / "README.md"
    for text, license in (
        ("---\nlicense: other\nlicense_name: llama3.2\n---\n", "llama3.2"),
        ("---\nlicense: other\n---\n", "other"),
        ("---\nlicense: [\n---\n", None),
        ("# A model under the MIT license\n", None),
    ):
        card.write_text(text)
        assert card_license(card) == license


def test_each_base_keeps_the_arithmetic_that_it_began_with(config: Path, tiny_base: Path, other_base: Path) -> None:
    """`auto` of one base is not the setting of another."""
    rungs = [{"kind": "zero_shot"}, {"kind": "zero_shot", "model": {"name": str(other_base), "dtype": "auto"}}]
    settings = (f"climb={json.dumps({'rungs': rungs})}", f"model={{name: {tiny_base}, dtype: float32}}")
    run = load_config(config, settings).config
    recorded = {"compute_dtype": "float32", "matmul": "blas", "compute_dtype of tiny-qwen": "bfloat16"}
    models = ClimbModels(run, recorded)
    kept = {title: models.with_recorded_arithmetic(models.config_on(title), title).model for title in models.titles}
    assert (kept["tiny-llama"].dtype, kept["tiny-llama"].matmul) == ("float32", "blas")
    assert (kept["tiny-qwen"].dtype, kept["tiny-qwen"].matmul) == ("bfloat16", "auto")
