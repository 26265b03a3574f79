"""What a run unlearned of other data: its base and itself on the same rows, paired."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from processes import inside

TEXTS = ["the answer is that of the user", "in the system of the tool", "What is the capital of France?"] * 6


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """Rows of another task."""
    file = tmp_path / "elsewhere.jsonl"
    rows = [{"question": f"how many apples, {i}?", "answer": f"{i} apples", "box": i % 5} for i in range(15)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def measured(capsys: Any, *arguments: object) -> dict[str, Any]:
    code, out, err = inside(capsys, "eval", *arguments, "--json")
    assert code == 0, err
    return json.loads(out)  # type: ignore[no-any-return]


@pytest.mark.parametrize("method", ["{kind: lora, rank: 4}", "{kind: full}"])
def test_the_base_is_the_base_and_the_run_is_the_run(
    method: str, config: Path, elsewhere: Path, tiny_base: Path, tmp_path: Path, capsys: Any
) -> None:
    assert inside(capsys, "train", config, f"method={method}")[0] == 0
    run = tmp_path / "run"
    found = measured(capsys, run, "--forgetting", elsewhere)
    assert found["examples"] == 15 and list(found["metrics"]) == ["exact", "numeric", "perplexity"]
    nats = found["metrics"]["perplexity"]
    assert nats["difference"]["mean"] == pytest.approx(math.log(nats["after"]["mean"] / nats["before"]["mean"]))
    task = tmp_path / "task.yaml"
    one = tmp_path / "one.jsonl"
    one.write_text(json.dumps({"question": "q", "answer": "a"}) + "\n")
    task.write_text(
        f"data: {{path: {one}, test: {elsewhere}, validation: 0}}\n"
        f"evaluation: {{metrics: [perplexity], max_new_tokens: 8}}\noutput: {tmp_path / 'none'}\n"
        "model: {dtype: float32}\n"
    )
    for target, side in ((tiny_base, "before"), (run, "after")):  # the same as scoring each by itself
        alone = measured(capsys, target, "--config", task)["scores"]["perplexity"]
        assert nats[side]["mean"] == pytest.approx(alone["mean"], rel=1e-5)
    by_config = measured(capsys, run, "--forgetting", task)
    assert list(by_config["metrics"]) == ["perplexity"]
    assert by_config["metrics"]["perplexity"]["difference"]["mean"] == pytest.approx(nats["difference"]["mean"])
    assert measured(capsys, run, "--forgetting", task, "--limit", 4)["examples"] == 4
    assert measured(capsys, run, "--forgetting", elsewhere, "--limit", 4)["examples"] == 4


def test_plain_text_has_perplexity_and_what_is_too_long_is_counted(
    config: Path, tiny_base: Path, tmp_path: Path, capsys: Any
) -> None:
    assert inside(capsys, "train", config)[0] == 0
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*TEXTS, "far too long " * 400]))
    found = measured(capsys, tmp_path / "run", "--forgetting", texts)
    assert list(found["metrics"]) == ["perplexity"] and found["dropped"] == 1 and found["examples"] == len(TEXTS)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_base), AutoTokenizer.from_pretrained(tiny_base)
    nats, tokens = 0.0, 0
    with torch.no_grad():
        for text in TEXTS:
            ids = torch.tensor([[*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]])
            nats += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
            tokens += ids.shape[1] - 1
    assert found["metrics"]["perplexity"]["before"]["mean"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    code, out, _ = inside(capsys, "eval", tmp_path / "run", "--forgetting", texts)
    assert code == 0 and "nats a token" in out and "1 texts were longer" in out


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("{run}", "--forgetting", "{data}", "--baseline", "{run}"), "--baseline"),
        (("{run}", "--forgetting", "{data}", "--config", "x.yaml"), "--config"),
        (("{base}", "--forgetting", "{data}"), "not a run"),
    ],
)
def test_what_cannot_be_asked(
    given: tuple[str, ...], words: str, elsewhere: Path, tiny_base: Path, tmp_path: Path, capsys: Any
) -> None:
    places = {"run": tmp_path / "run", "data": elsewhere, "base": tiny_base}
    code, _, err = inside(capsys, "eval", *(part.format(**places) for part in given))
    assert code == 2 and words in err, err


def test_a_ladder_says_what_each_tuned_rung_forgets(
    config: Path, elsewhere: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    """The same numbers as by hand, measured once; a climb that was stopped before goes on with it."""
    from rung.commands import climb as climbing

    settings = ["climb.rungs=[zero_shot, lora]", f"climb.forgetting={elsewhere}"]

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(climbing, "measure_forgetting", killed)
        assert inside(capsys, "climb", config, *settings)[0] == 130
    code, out, err = inside(capsys, "climb", config, *settings, "--json")
    assert code == 0 and "what lora has forgotten" in err, err
    (lost,) = json.loads(out)["forgetting"]
    by_hand = measured(capsys, tmp_path / "run" / "rungs" / "lora", "--forgetting", elsewhere)["metrics"]
    assert lost["rung"] == "lora" and lost["metrics"] == by_hand
    assert "nats a token" in lost["text"] and lost["text"] in (tmp_path / "run" / "report.html").read_text()
    code, again, err = inside(capsys, "climb", config, *settings, "--json")
    assert code == 0 and "forgotten" not in err and json.loads(again)["forgetting"] == [lost]
    code, out, _ = inside(capsys, "climb", config, *settings)
    assert "".join(lost["text"].split()) in "".join(out.split())  # wherever a line was broken


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["climb.rungs=[zero_shot]", "climb.forgetting=x.jsonl"], "there is none"),
        (["climb.rungs=[zero_shot, lora]", "climb.forgetting=nowhere.jsonl"], "no such file"),
    ],
)
def test_what_cannot_be_forgotten_is_said_before_anything_is_spent(
    settings: list[str], words: str, config: Path, tmp_path: Path, capsys: Any
) -> None:
    code, _, err = inside(capsys, "climb", config, *settings)
    assert code == 2 and words in err, err
    assert not (tmp_path / "run").exists()


def test_another_file_is_measured_without_training_again(
    config: Path, elsewhere: Path, tmp_path: Path, capsys: Any
) -> None:
    """A single row has no interval; and one that is too long is refused before anything is trained."""
    climb = ["climb.rungs=[zero_shot, lora]"]
    long, one = tmp_path / "long.jsonl", tmp_path / "one.jsonl"
    long.write_text(json.dumps({"question": "the answer " * 5000, "answer": "a"}) + "\n")
    one.write_text(json.dumps({"question": "what is in it?", "answer": "a"}) + "\n")
    code, _, err = inside(capsys, "climb", config, *climb, f"climb.forgetting={long}")
    assert code == 2 and "tokens and the model takes" in err and not (tmp_path / "run" / "rungs").exists()
    assert inside(capsys, "climb", config, *climb)[0] == 0
    weights = tmp_path / "run" / "rungs" / "lora" / "adapter" / "adapter_model.safetensors"
    before = weights.stat().st_mtime_ns
    for other in (one, elsewhere):
        code, out, err = inside(capsys, "climb", config, *climb, f"climb.forgetting={other}", "--json")
        assert code == 0, err
        (lost,) = json.loads(out)["forgetting"]
        assert lost["data"] == str(other) and "None" not in lost["text"]
    kept = tmp_path / "run" / "rungs" / "lora" / "forgetting.json"
    kept.write_text("{")
    code, out, _ = inside(capsys, "climb", config, *climb, f"climb.forgetting={elsewhere}", "--json")
    assert code == 0 and json.loads(out)["forgetting"] == [lost] and json.loads(kept.read_text())["examples"] == 15
    assert weights.stat().st_mtime_ns == before
    assert json.loads((tmp_path / "run" / "run.json").read_text())["config"]["climb"]["forgetting"] == str(elsewhere)
