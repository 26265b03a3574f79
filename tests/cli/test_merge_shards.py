"""`rung merge --by-shard`: the same model as a merge of the whole one, a file of the base at a time."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from models import tiny_model
from processes import inside
from rung.commands import merge_shards

METHODS = {
    "plain": [],
    "rank_pattern": ["method={kind: lora, rank: 4, rank_pattern: {q: 2, '1.down': 6}}"],
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
    monkeypatch.setattr("rung.commands.merge.free_memory", lambda device: 2**20)
    code, out, err = inside(capsys, "merge", tmp_path / "run", tmp_path / "merged", "--json")
    assert code == 0 and "merged tensor by tensor" in err and json.loads(out)["files"] == 1


@pytest.mark.parametrize("broken", ["scale", "lost", "untouched"])
def test_a_merge_that_is_wrong_is_not_left_behind(
    broken: str, config: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    """The mutations: an update that is scaled wrongly, one that is lost, and a tensor changed on its way."""
    assert inside(capsys, "train", config)[0] == 0
    added = merge_shards.LoraUpdate.added_to
    if broken == "scale":
        monkeypatch.setattr(
            merge_shards.LoraUpdate, "added_to", lambda u, w: added(replace(u, scale=1.01 * u.scale), w)
        )
    if broken == "lost":
        monkeypatch.setattr(merge_shards.LoraUpdate, "added_to", lambda u, w: w.float())
    if broken == "untouched":

        def damaged(file: Any, updates: Any, target: Path) -> None:
            merge(file, updates, target)
            kept = bytearray(target.read_bytes())
            kept[-8:] = bytes(8)  # of the last tensor
            target.write_bytes(kept)

        merge = merge_shards._merge
        monkeypatch.setattr(merge_shards, "_merge", damaged)
    code, _, err = inside(capsys, "merge", tmp_path / "run", tmp_path / "merged", "--by-shard")
    assert code == 3 and "publish.shards" in err
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["method={kind: lora, rank: 4, dora: true}"], "use_dora"),
        (["method={kind: bottleneck}"], "only a plain LoRA"),
        (["method={kind: qlora, rank: 4}"], "a quantized base"),
        (["method={kind: lora, rank: 4, modules_to_save: [lm_head]}"], "modules_to_save"),
    ],
)
def test_what_cannot_be_merged_so(settings: list[str], words: str, config: Path, tmp_path: Path, capsys: Any) -> None:
    assert inside(capsys, "train", config, *settings)[0] == 0
    code, _, err = inside(capsys, "merge", tmp_path / "run", tmp_path / "merged", "--by-shard")
    assert code == 3 and words in err, err


def test_another_base_is_refused(config: Path, tiny_base: Path, tmp_path: Path, capsys: Any) -> None:
    base = tmp_path / "own"
    shutil.copytree(tiny_base, base)
    assert inside(capsys, "train", config, f"model.name={base}")[0] == 0
    (file,) = base.glob("*.safetensors")
    save_file({name: 2.0 * t for name, t in load_file(file).items()}, file, metadata={"format": "pt"})
    code, _, err = inside(capsys, "merge", tmp_path / "run", tmp_path / "merged", "--by-shard")
    assert code == 3 and "another base" in err


@pytest.mark.parametrize("rate", [1e-3, 1e-5, 1e-7])
def test_small_updates_are_no_rounding_errors(rate: float, config: Path, tmp_path: Path, capsys: Any) -> None:
    assert inside(capsys, "train", config, f"training.learning_rate={rate}", "training.max_steps=3")[0] == 0
    code, out, err = inside(capsys, "merge", tmp_path / "run", tmp_path / "merged", "--by-shard", "--json")
    assert code == 0, err
    assert 0 < json.loads(out)["difference"] < 1


def test_what_stands_beside_the_models_own_files_stays_behind(
    config: Path, tiny_base: Path, tmp_path: Path, capsys: Any
) -> None:
    base = tmp_path / "own"
    shutil.copytree(tiny_base, base)
    (file,) = base.glob("*.safetensors")
    save_file({name: t.bfloat16() for name, t in load_file(file).items()}, base / "consolidated.safetensors")
    assert inside(capsys, "train", config, f"model.name={base}")[0] == 0
    code, _, err = inside(capsys, "merge", tmp_path / "run", tmp_path / "merged", "--by-shard")
    assert code == 0, err
    assert [p.name for p in (tmp_path / "merged").glob("*.safetensors")] == [file.name]


@pytest.mark.parametrize(
    ("broken", "words"), [("half", "half of this update"), ("module", "lacks updates"), ("nan", "")]
)
def test_an_adapter_that_is_not_whole(
    broken: str, words: str, config: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    assert inside(capsys, "train", config)[0] == 0
    file = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    state = load_file(file)
    first = sorted(name for name in state if "lora_A" in name)[0]
    gone = {first} if broken == "half" else {first, first.replace("lora_A", "lora_B")} if broken == "module" else set()
    kept = {name: t * (float("nan") if broken == "nan" else 1) for name, t in state.items() if name not in gone}
    save_file(kept, file)
    monkeypatch.setattr("rung.commands.merge.require_undamaged", lambda folder: None)
    code, _, err = inside(capsys, "merge", tmp_path / "run", tmp_path / "merged", "--by-shard")
    assert code == 3 and words in err and "Traceback" not in err, err
    assert not (tmp_path / "merged").exists()


def test_a_base_that_cannot_be_merged_so_is_merged_whole(
    config: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    assert inside(capsys, "train", config, "method={kind: lora, rank: 4, dora: true}")[0] == 0
    monkeypatch.setattr("rung.commands.merge.free_memory", lambda device: 2**20)
    code, out, err = inside(capsys, "merge", tmp_path / "run", tmp_path / "merged", "--json")
    assert code == 0 and "merged whole all the same" in err and "moved_from_base" in json.loads(out)


def test_every_type_of_number_is_written_as_it_should_be(tmp_path: Path) -> None:
    """Floats are widened, all others stand as they are; what was written reads back whole."""
    base, target = tmp_path / "base", tmp_path / "merged"
    base.mkdir()
    target.mkdir()
    held = {
        "l.weight": torch.full((4, 6), 0.5, dtype=torch.bfloat16),
        "half": torch.ones(3, dtype=torch.float16),
        "eighth": torch.ones(2, 2).to(torch.float8_e4m3fn),
        "counts": torch.arange(5),
        "flags": torch.tensor([True, False, True]),
    }
    save_file(held, base / "model.safetensors")
    (base / "config.json").write_text("{}")
    update = merge_shards.LoraUpdate(torch.ones(4, 2), torch.ones(2, 6), 0.25)
    gate, moved = merge_shards.merge_shards(base, {"l": update}, target)
    found = load_file(target / "model.safetensors")
    assert gate.state == "passed" and moved == 0.5 and torch.equal(found.pop("l.weight"), torch.ones(4, 6))
    for name, tensor in found.items():
        assert tensor.dtype is (torch.float32 if held[name].is_floating_point() else held[name].dtype)
        assert torch.equal(tensor.double(), held[name].double())
