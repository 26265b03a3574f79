"""`rung merge --by-shard`: the same model as a merge of the whole one, a file of the base at a time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from models import tiny_model
from processes import inside
from rung.publish import shards

METHODS = {
    "plain": [],
    "ranks": ["method={kind: lora, rank: 4, ranks: {q: 2, '1.down': 6}}"],
    "alpha": ["method={kind: lora, rank: 4, alpha: 12, rslora: true}"],
    "subtracted": ["method={kind: lora, rank: 4, init: pissa}"],
}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.mark.parametrize("name", METHODS)
def test_it_is_the_model_of_a_whole_merge(name: str, config: Path, tmp_path: Path, capsys: Any) -> None:
    assert inside(capsys, "train", config, *METHODS[name])[0] == 0
    assert inside(capsys, "merge", tmp_path / "run", tmp_path / "whole")[0] == 0
    code, out, err = inside(capsys, "merge", tmp_path / "run", tmp_path / "parts", "--by-shard", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["difference"] < found["limit"] and found["largest_change"] > 0
    whole, parts = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert max(float((whole[n] - parts[n]).abs().max()) for n in whole) < 1e-6
    for file in ("tokenizer.json", "generation_config.json", "rung_prompt.json", "manifest.json"):
        assert (tmp_path / "parts" / file).exists(), file
    code, _, err = inside(capsys, "train", config, f"model.name={tmp_path / 'parts'}", f"output={tmp_path / 'next'}")
    assert code == 0, err


def test_a_base_of_several_files_and_transposed_weights(
    config: Path, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: Any
) -> None:
    base = tmp_path / "gpt2"
    tiny_model("gpt2", vocab_size=len(tiny_tokenizer)).save_pretrained(base, max_shard_size="20KB")
    tiny_tokenizer.save_pretrained(base)
    files = sorted(p.name for p in base.glob("*.safetensors"))
    assert len(files) > 2
    assert inside(capsys, "train", config, f"model.name={base}")[0] == 0
    assert inside(capsys, "merge", tmp_path / "run", tmp_path / "whole")[0] == 0
    code, _, err = inside(capsys, "merge", tmp_path / "run", tmp_path / "parts", "--by-shard")
    assert code == 0, err
    assert sorted(p.name for p in (tmp_path / "parts").glob("*.safetensors")) == files
    whole, parts = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    assert max(float((whole[n] - parts[n]).abs().max()) for n in whole) < 1e-6


def test_what_does_not_fit_is_merged_so(config: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    assert inside(capsys, "train", config)[0] == 0
    monkeypatch.setattr("rung.pipeline.merge.available", lambda device: 2**20)
    code, out, err = inside(capsys, "merge", tmp_path / "run", tmp_path / "merged", "--json")
    assert code == 0 and "one file of the base at a time" in err and json.loads(out)["files"] == 1


@pytest.mark.parametrize("broken", ["scale", "lost", "untouched"])
def test_a_merge_that_is_wrong_is_not_left_behind(
    broken: str, config: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    """The mutations: an update that is scaled wrongly, one that is lost, and a tensor changed on its way."""
    assert inside(capsys, "train", config)[0] == 0
    added = shards.Update.added_to
    if broken == "scale":
        monkeypatch.setattr(shards.Update, "added_to", lambda u, w: added(replace(u, scale=1.01 * u.scale), w))
    if broken == "lost":
        monkeypatch.setattr(shards.Update, "added_to", lambda u, w: w.float())
    if broken == "untouched":
        monkeypatch.setattr(
            shards, "save_file", lambda t, f, metadata: save_file({n: v + 1e-3 for n, v in t.items()}, f)
        )
    code, _, err = inside(capsys, "merge", tmp_path / "run", tmp_path / "merged", "--by-shard")
    assert code == 3 and "publish.shards" in err
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["method={kind: lora, rank: 4, dora: true}"], "use_dora"),
        (["method={kind: bottleneck}"], "only a plain LoRA"),
        (["method={kind: qlora, rank: 4}"], "qlora on"),
        (["method={kind: lora, rank: 4, modules_to_save: [lm_head]}"], "modules_to_save"),
    ],
)
def test_what_cannot_be_merged_so(settings: list[str], words: str, config: Path, tmp_path: Path, capsys: Any) -> None:
    assert inside(capsys, "train", config, *settings)[0] == 0
    code, _, err = inside(capsys, "merge", tmp_path / "run", tmp_path / "merged", "--by-shard")
    assert code == 3 and words in err, err


def test_another_base_is_refused(config: Path, tiny_base: Path, tmp_path: Path, capsys: Any) -> None:
    base = tmp_path / "own"
    base.mkdir()
    for file in tiny_base.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    assert inside(capsys, "train", config, f"model.name={base}")[0] == 0
    (file,) = base.glob("*.safetensors")
    save_file({name: 2.0 * t for name, t in load_file(file).items()}, file, metadata={"format": "pt"})
    code, _, err = inside(capsys, "merge", tmp_path / "run", tmp_path / "merged", "--by-shard")
    assert code == 3 and "another base" in err
