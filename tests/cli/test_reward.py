"""A reward model from the command line: trained, resumed, measured, refused where it cannot answer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModelForSequenceClassification
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from builders import example
from models import tiny_model
from processes import inside, log
from rung.evaluation.reward_model import RewardScorer
from rung.runs.load import open_reward_model
from rung.types import Message


@pytest.fixture
def rewarded(compared: Path) -> Path:
    compared.write_text(
        compared.read_text().replace(
            "{kind: preference, beta: 0.5}", "{kind: reward, center_rewards_coefficient: 0.01}"
        )
    )
    return compared


@pytest.mark.parametrize("method", ["{kind: lora, rank: 4}", "{kind: full}", "{kind: prompt, virtual_tokens: 3}"])
def test_it_learns_and_is_measured(method: str, rewarded: Path, tmp_path: Path, capsys: Any) -> None:
    settings = (f"method={method}", "training.epochs=3", "training.max_steps=null", "training.learning_rate=1e-2")
    code, _, err = inside(capsys, "train", rewarded, *settings)
    assert code == 0, err
    assert log(tmp_path / "run")[-1]["validation_accuracy"] > 0.9 and "gate movement: passed" in err
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    assert manifest["reward"]["pairs"] == 8 and manifest["reward"]["accuracy"]["mean"] > 0.9
    code, out, err = inside(capsys, "eval", tmp_path / "run", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["reward"]["pairs"] == found["examples"] == 12 and found["reward"]["verdict"] == "unproven"
    assert found["reward"]["accuracy"]["clusters"] == 3  # all right, and still too few to prove it
    assert inside(capsys, "eval", tmp_path / "run")[1].count("reward model: unproven") == 1
    if method == "{kind: full}":
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
        assert isinstance(model.score.weight, torch.Tensor) and model.config.pad_token_id == 0


def test_it_writes_nothing(rewarded: Path, tmp_path: Path, capsys: Any) -> None:
    assert inside(capsys, "train", rewarded)[0] == 0
    for verb in (
        ["chat", tmp_path / "run", "--question", "what?"],
        ["train", rewarded, f"model.name={tmp_path / 'run'}", f"output={tmp_path / 'next'}"],
        ["merge", tmp_path / "run", tmp_path / "merged"],
    ):
        code, _, err = inside(capsys, *verb)
        assert code == 3 and "reward model" in err, err
    assert not (tmp_path / "next").exists() and not (tmp_path / "merged").exists()
    assert inside(capsys, "fuse", tmp_path / "run", tmp_path / "run", "-o", tmp_path / "fused")[0] == 2
    code, _, err = inside(capsys, "train", rewarded, "method={kind: head}", f"output={tmp_path / 'head'}")
    assert code == 2 and "output head" in err


def test_margins_of_pairs(rewarded: Path, tmp_path: Path, capsys: Any) -> None:
    """A margin column is read, and one that says the chosen is the worse answer is refused by its line."""
    path = tmp_path / "pairs.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**row, "margin": 0.5 + i % 3}) + "\n" for i, row in enumerate(lines)))
    code, _, err = inside(capsys, "train", rewarded, "objective.margin=1.0")
    assert code == 0, err
    first = log(tmp_path / "run")[0]["loss"]
    assert inside(capsys, "train", rewarded, f"output={tmp_path / 'none'}")[0] == 0
    assert first > log(tmp_path / "none")[0]["loss"] + 0.2
    path.write_text("".join(json.dumps({**row, "margin": float(i != 4)}) + "\n" for i, row in enumerate(lines)))
    code, _, err = inside(capsys, "train", rewarded, "--overwrite")
    assert code == 2 and "line 5" in err and "margin" in err


def test_a_killed_run_goes_on_with_its_head(rewarded: Path, tmp_path: Path, capsys: Any) -> None:
    from safetensors.torch import load_file

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = ["training.max_steps=6", "training.checkpoint_every=3"]
    assert inside(capsys, "train", rewarded, *settings, f"output={whole}")[0] == 0
    assert inside(capsys, "train", rewarded, *settings, f"output={parts}")[0] == 0
    manifest = json.loads((parts / "run.json").read_text())
    (parts / "run.json").write_text(json.dumps({**manifest, "status": "running"}))
    code, _, err = inside(capsys, "train", rewarded, *settings, f"output={parts}", "--resume")
    assert code == 0 and "resumed from step-00000003" in err
    first, second = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (whole, parts))
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("padding", ["<|im_end|>", None, "<pad>"])
@pytest.mark.parametrize("method", ["{kind: full}", "{kind: lora, rank: 4}"])
def test_transformers_scores_the_stop_whatever_the_tokenizer_pads_with(
    padding: str | None, method: str, rewarded: Path, tiny_base: Path, tmp_path: Path, capsys: Any
) -> None:
    """It reads the last token that is not padding: were that the stop, it would read the one before."""
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = padding
    tokenizer.save_pretrained(base)
    rewarded.write_text(rewarded.read_text().replace(f"name: {tiny_base}", f"name: {base}"))
    assert inside(capsys, "train", rewarded, f"method={method}", "training.learning_rate=1e-2")[0] == 0
    policy, chat, objective, _ = open_reward_model(tmp_path / "run")
    asked = (("a?", "no"), ("what is in it?", "stones"))
    texts = [(chat.prompt_ids([Message("user", q)]), chat.tokenizer(a)["input_ids"]) for q, a in asked]
    documents = [example([*prompt, *answer, chat.stop_ids[0]], len(prompt)) for prompt, answer in texts]
    ours = RewardScorer(policy, objective)(documents, 4096)
    folder = tmp_path / "run" / ("model" if "full" in method else "adapter")
    saved = AutoTokenizer.from_pretrained(folder)
    if "full" in method:
        theirs = AutoModelForSequenceClassification.from_pretrained(folder)
    else:
        plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=saved.pad_token_id)
        theirs = PeftModelForSequenceClassification.from_pretrained(plain, folder)
    longest = max(map(len, documents))
    ids = torch.tensor([[*d.ids.tolist(), *[saved.pad_token_id] * (longest - len(d))] for d in documents])
    with torch.no_grad():
        found = theirs.eval()(ids, attention_mask=(ids != saved.pad_token_id).long()).logits[:, 0].tolist()
    assert found == pytest.approx(ours, abs=1e-5)


def test_a_full_reward_model_on_an_untied_base(compared: Path, tiny_base: Path, tmp_path: Path, capsys: Any) -> None:
    """The published classifier has no output head, which the score does not read."""
    model = tiny_model(max_position_embeddings=512, tie_word_embeddings=False)
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    model.save_pretrained(base)
    settings = ("objective={kind: reward}", "method={kind: full}", "training.max_steps=2", f"model.name={base}")
    code, _, err = inside(capsys, "train", compared, *settings)
    assert code == 0, err
    code, _, err = inside(capsys, "eval", tmp_path / "run")
    assert code == 0, err
