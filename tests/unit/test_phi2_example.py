"""The example of Phi-2: its plans offline, its template and stop, and its three runs on a small model of its kind."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from models import tiny_model
from processes import inside
from rung.commands.plan import plan
from rung.config.model import ModelConfig
from rung.config.model_catalog import CATALOG
from rung.data.chat import ChatTemplate
from rung.errors import ConfigError, DataError
from rung.models import download, load
from rung.models.download import base_folder, download_base
from rung.types import Message

EXAMPLE = Path(__file__).parents[2] / "examples" / "phi2"
PHI = CATALOG["phi-2"]


@pytest.fixture
def bare_tokenizer(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> PreTrainedTokenizerFast:
    """The tiny tokenizer without a chat template, as Phi-2's."""
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "tokenizer")
    tokenizer.chat_template = None
    return tokenizer


def test_its_template_is_that_of_the_model_card(bare_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match="template"):
        ChatTemplate(bare_tokenizer)
    load._set_known_template(bare_tokenizer, "phi-2")
    chat = ChatTemplate(bare_tokenizer)
    turns = [Message("user", "What is 2 + 2?"), Message("assistant", " 4"), Message("user", "And 3 + 3?")]
    text = chat.decode([chat.prompt_ids(turns)])[0]
    assert text == "Instruct: What is 2 + 2?\nOutput:  4</s>\nInstruct: And 3 + 3?\nOutput:"
    assert chat.stop_ids == (bare_tokenizer.eos_token_id,)
    # A template of its own is left alone.
    bare_tokenizer.chat_template = "own"
    load._set_known_template(bare_tokenizer, "phi-2")
    assert bare_tokenizer.chat_template == "own"


@pytest.mark.parametrize("name", ["lora", "qlora", "full"])
def test_it_is_planned_offline_as_the_page_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_download_from_hub", lambda base: pytest.fail("a plan needs no weights"))
    row = next(line for line in (EXAMPLE / "README.md").read_text().splitlines() if line.startswith(f"| `{name}.yaml`"))
    for cell, device in zip(row.split("|")[3:6], ("t4", "rtx4090", "a100"), strict=True):
        advice = plan(str(EXAMPLE / f"{name}.yaml"), device=device)
        number = int(re.findall(r"[\d,]+", cell)[0].replace(",", ""))
        if "does not fit" in cell:
            assert not advice.plan.fits and round(advice.plan.memory.required_bytes / 1e9) == number
        else:
            assert advice.plan.fits and advice.micro_batch.tokens == number
    assert advice.shape.parameters == PHI.parameters


@pytest.mark.parametrize("name", ["lora", "qlora", "full"])
def test_its_runs_on_a_small_model_of_its_kind(
    name: str, tmp_path: Path, bare_tokenizer: PreTrainedTokenizerFast, capsys: Any
) -> None:
    base = tmp_path / "phi"
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "partial_rotary_factor": 0.4}
    tiny_model("phi", max_position_embeddings=1024, **sizes).half().save_pretrained(base)
    bare_tokenizer.save_pretrained(base)
    (tmp_path / "phi2.jinja").write_text(str(PHI.template))
    rows = [{"question": f"what is in box {i}?", "answer": "apples" if i % 2 else "pears"} for i in range(120)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [f"model.name={base}", f"model.template={tmp_path / 'phi2.jinja'}", f"output={tmp_path / 'run'}"]
    settings += [f"data.path={tmp_path / 'rows.jsonl'}", "data.group=null", "training.max_steps=3"]
    code, _, err = inside(capsys, "train", EXAMPLE / f"{name}.yaml", *settings)
    assert code == 0, err
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    assert manifest["config"]["method"]["kind"] == name and manifest["steps"] == 3
    assert all(gate["state"] == "passed" for gate in manifest["gates"])


def test_a_base_of_the_hub_comes_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    asked: list[Any] = []

    def snapshot(hub_id: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((hub_id, tuple(allow_patterns), revision))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda hub_id, file: None)
    assert base_folder(PHI) is None
    assert download_base("phi-2") == tmp_path and asked[0][0] == "microsoft/phi-2"
    assert download_base("phi-2", "v1") == tmp_path and [revision for *_, revision in asked] == [None, "v1"]
    assert not any("bin" in pattern or pattern == "*" for pattern in asked[0][1])
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda hub_id, file: str(tmp_path / file))
    assert base_folder(PHI) is None  # the config alone is no base
    (tmp_path / "model.safetensors").touch()
    assert base_folder(PHI) == tmp_path

    def offline(hub_id: str, revision: str | None, allow_patterns: list[str]) -> str:
        raise OSError("no network\nand a long story")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(DataError, match="could not download microsoft/phi-2 from the hub: no network\n"):
        download_base("phi-2")
    code, out, _ = inside(capsys, "models")
    assert code == 0 and re.search(r"phi-2 +2,780M parameters +MIT", out)


def test_a_revision_belongs_to_a_hub_id(tiny_base: Path) -> None:
    with pytest.raises(ConfigError, match="a revision is one of a hub id"):
        load.load_base(ModelConfig(name=str(tiny_base), revision="main"))
