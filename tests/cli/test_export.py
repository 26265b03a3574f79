"""`rung export`: files that other tools serve, proved, with a card; and what is refused."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from gguf import GGUFReader
from transformers import PreTrainedTokenizerFast

from conftest import CHATML
from models import tiny_model
from processes import files_below, inside
from rung.commands.export import ExportRequest, export
from rung.exporting import gguf_file, llama_cpp_process
from rung.files import require_undamaged
from rung.methods import adapter_files

METHODS = {
    "plain": [],
    "rank_pattern": ["method={kind: lora, rank: 4, rank_pattern: {q: 2, '1.down': 6}, rslora: true}"],
    "dora": ["method={kind: lora, rank: 4, dora: true}"],
    "qlora": ["method={kind: qlora, rank: 4}"],
    "full": ["method={kind: full}", "training.learning_rate=1e-3"],
    "head": ["method={kind: head}"],
}


@pytest.fixture
def run(config: Path, tmp_path: Path, capsys: Any) -> Path:
    assert inside(capsys, "train", config)[0] == 0
    return tmp_path / "run"


@pytest.mark.parametrize("name", METHODS)
def test_a_run_of_every_method_in_llama_cpp(name: str, config: Path, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("xllamacpp")
    if name == "qlora":
        pytest.importorskip("bitsandbytes")
    assert inside(capsys, "train", config, *METHODS[name])[0] == 0
    code, out, err = inside(capsys, "export", tmp_path / "run", tmp_path / "out", "--type", "f32", "--json")
    assert code == 0, err
    (file,) = json.loads(out)["files"]
    assert file["gate"]["state"] == "passed" and file["largest_difference"] < 1e-4
    assert files_below(tmp_path / "out") == {"README.md", "manifest.json", "out-f32.gguf"}


def test_types_with_their_scores(run: Path, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("xllamacpp")
    assert inside(capsys, "eval", run)[0] == 0
    arguments = ("export", run, tmp_path / "out", "--type", "f16,q8_0, Q4_K_M", "--measure", 12)
    code, out, err = inside(capsys, *arguments, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert [file["type"] for file in result["files"]] == ["f16", "q8_0", "q4_k_m"] and result["questions"] == 12
    for file in result["files"]:
        score = file["scores"]["exact"]
        assert score["before"]["examples"] == score["after"]["examples"] == 12
        # the same greedy answers to sixteen bits, and a difference with an interval around zero
        assert abs(score["difference"]["mean"]) < 0.5 and score["difference"]["low"] <= 0 <= score["difference"]["high"]
        assert file["seconds_per_query"] > 0 and sum(file["kinds"].values()) < file["bytes"]
    assert result["files"][0]["scores"]["exact"]["difference"]["mean"] == 0
    assert result["files"][2]["kinds"].keys() == {"Q5_0", "Q8_0", "F16"}
    card = (tmp_path / "out/README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["tags"] == ["rung", "gguf"] and front["model-index"][0]["results"]
    assert "| `out-q4_k_m.gguf` |" in card and "lora, rank 4" in card and "More" not in card
    shutil.rmtree(tmp_path / "out")
    code, out, _ = inside(capsys, *arguments)
    assert code == 0 and "the run" in out and "q4_k_m" in out and "llama-server -m" in out
    # the command for transformers works as it is printed
    (command,) = (line for line in out.splitlines() if line.endswith("# in transformers"))
    words = shlex.split(command, comments=True)
    assert subprocess.run([sys.executable, *words[1:]], capture_output=True, check=False).returncode == 0


def test_an_adapter_for_the_base(run: Path, tiny_base: Path, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("xllamacpp")
    code, out, err = inside(capsys, "export", run, tmp_path / "out", "--adapter", "--json")
    assert code == 0, err
    (file,) = json.loads(out)["files"]
    assert file["type"] == "adapter" and file["largest_difference"] < 1e-4
    # the base that proves it is gone
    assert files_below(tmp_path / "out") == {"README.md", "manifest.json", "out-adapter.gguf", "chat_template.jinja"}
    names = {tensor.name for tensor in GGUFReader(tmp_path / "out/out-adapter.gguf").tensors}
    assert "blk.1.attn_q.weight.lora_b" in names and len(names) == 2 * 7 * 2
    code, out, _ = inside(capsys, "export", tiny_base, tmp_path / "base", "--type", "f16", "--json")
    assert code == 0 and json.loads(out)["files"][0]["gate"]["state"] == "passed"


BROKEN = ("scale of rsLoRA", "rank pattern", "order of q and k")


@pytest.mark.parametrize("broken", BROKEN)
def test_a_file_that_is_not_the_run_is_not_left_behind(
    broken: str, config: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    """The mutations: the root of rsLoRA forgotten, one rank for all, rows of q and k in the order of transformers."""
    pytest.importorskip("xllamacpp")
    assert inside(capsys, "train", config, *METHODS["rank_pattern"])[0] == 0
    if broken == "order of q and k":
        monkeypatch.setattr("rung.exporting.gguf_layout.interleaved_rows", lambda rows, heads: slice(None))
    else:
        setting = "use_rslora" if broken == "scale of rsLoRA" else "rank_pattern"
        scale = adapter_files.saved_scale
        monkeypatch.setattr(adapter_files, "saved_scale", lambda c, module: scale({**c, setting: None}, module))
    code, _, err = inside(capsys, "export", tmp_path / "run", tmp_path / "out", "--type", "f32")
    assert code == 3 and "publish.gguf" in err
    assert not [p for p in tmp_path.iterdir() if "out" in p.name]


def test_without_llama_cpp_or_memory_it_says_that_nothing_is_proved(
    run: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(llama_cpp_process, "is_installed", lambda: False)
        code, out, err = inside(capsys, "export", run, tmp_path / "out")
        assert code == 0, err
        assert "not proved" in out and "rung[export]" in out
        assert "nothing proves them" in (tmp_path / "out/README.md").read_text()
        code, _, err = inside(capsys, "export", run, tmp_path / "other", "--measure", 3)
        assert code == 3 and "rung[export]" in err
    pytest.importorskip("xllamacpp")
    monkeypatch.setattr("rung.commands.merge.free_memory", lambda device: 2**20)
    code, out, err = inside(capsys, "export", run, tmp_path / "small")
    assert code == 0 and "not proved: the whole model needs" in out, err


def test_an_ollama_folder(run: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    # a proxy gets nothing of what goes to llama.cpp on this machine
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    code, out, err = inside(capsys, "export", run, tmp_path / "out", "--as", "ollama", "--type", "f16")
    assert code == 0, err
    text = (tmp_path / "out/Modelfile").read_text()
    assert "FROM ./out-f16.gguf" in text and 'PARAMETER stop "<|im_end|>"' in text
    assert '{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>' in text
    assert "ollama create out -f" in out
    code, _, err = inside(capsys, "export", run, tmp_path / "two", "--as", "ollama", "--type", "f16,q8_0")
    assert code == 2 and "one model" in err


def test_a_folder_for_vllm(config: Path, tmp_path: Path, tiny_base: Path, capsys: Any) -> None:
    assert inside(capsys, "train", config, "method={kind: lora, rank: 4, rank_pattern: {q: 12}}")[0] == 0
    code, out, err = inside(capsys, "export", tmp_path / "run", tmp_path / "out", "--as", "vllm")
    assert code == 0, err
    options = f"--enable-lora --max-lora-rank 16 --lora-modules out={tmp_path / 'out'}"
    assert f"vllm serve {tiny_base} {options}" in out
    assert (tmp_path / "out/adapter_model.safetensors").exists() and (tmp_path / "out/README.md").exists()
    require_undamaged(tmp_path / "out")
    assert inside(capsys, "train", config, "method={kind: lora, rank: 4, dora: true}", "--overwrite")[0] == 0
    code, _, err = inside(capsys, "export", tmp_path / "run", tmp_path / "dora", "--as", "vllm")
    assert code == 3 and "--as merged" in err
    code, out, err = inside(capsys, "export", tmp_path / "run", tmp_path / "dora", "--as", "merged")
    assert code == 0 and "largest difference of log-probabilities" in out, err
    assert (tmp_path / "dora/model.safetensors").exists()


REFUSED: dict[str, tuple[list[str], list[str]]] = {
    "prompt": (["method={kind: prompt}"], ["merge"]),
    "mixture": (["method={kind: mixture, experts: 2, rank: 2}"], ["its router"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_method_that_no_file_holds(name: str, config: Path, tmp_path: Path, capsys: Any) -> None:
    settings, words = REFUSED[name]
    assert inside(capsys, "train", config, *settings)[0] == 0
    code, _, err = inside(capsys, "export", tmp_path / "run", tmp_path / "out")
    assert code == 3 and any(word in err for word in words), err
    assert not [p for p in tmp_path.iterdir() if "out" in p.name]


def test_bad_input(run: Path, tmp_path: Path, tiny_base: Path, capsys: Any, monkeypatch: Any) -> None:
    """One message each, and nothing half-written."""
    out = tmp_path / "out"

    def refused(*arguments: object) -> tuple[int, str]:
        code, _, err = inside(capsys, "export", *arguments)
        assert "Traceback" not in err and not [p for p in tmp_path.iterdir() if "out" in p.name]
        return code, err

    assert refused(run, out, "--type", "q9_z")[0] == 3
    assert "q4_k_m" in refused(run, out, "--type", "q9_z")[1]
    assert refused(run, out, "--as", "onnx")[0] == 2
    assert refused(tmp_path / "nowhere", out)[0] == 2
    assert refused("http://localhost:1/v1", out)[0] == 2
    assert "exists already" in refused(run, run)[1]
    for option in (["--type", "f16"], ["--adapter"], ["--measure", 3]):
        code, err = refused(run, out, "--as", "merged", *option)
        assert code == 2 and "no GGUF file" in err
    assert "f32" in refused(run, out, "--adapter", "--type", "f16")[1]
    assert refused(run, out, "--type", "f16,")[0] == refused(run, out, "--type", "")[0] == 3
    assert "its own" in refused(tiny_base, out, "--measure", 3)[1]
    assert "adapter" in refused(tiny_base, out, "--adapter")[1]
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
        code, err = refused(run, out)
        assert code == 3 and "disk is too small" in err
    with monkeypatch.context() as patch:

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(gguf_file, "quantize", full)
        code, err = refused(run, out)
        assert code == 3 and "No space left" in err
    unfinished = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**unfinished, "status": "training"}))
    assert "not finished" in refused(run, out)[1]


def test_a_base_that_is_gone_or_another(
    config: Path, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: Any
) -> None:
    base = tmp_path / "base"
    tiny_model(max_position_embeddings=512).save_pretrained(base)
    tiny_tokenizer.save_pretrained(base)
    assert inside(capsys, "train", config, f"model.name={base}")[0] == 0
    tiny_model(seed=1, max_position_embeddings=512).save_pretrained(base)
    code, _, err = inside(capsys, "export", tmp_path / "run", tmp_path / "exported")
    assert code == 3 and "another base" in err
    shutil.rmtree(base)
    code, _, err = inside(capsys, "export", tmp_path / "run", tmp_path / "exported")
    assert code == 2 and str(base) in err and not (tmp_path / "exported").exists()


def test_from_python(run: Path, tmp_path: Path) -> None:
    result = export(run, tmp_path / "out", ExportRequest("vllm"))
    assert result.kind == "vllm" and result.to_json()["path"] == str(tmp_path / "out")


def test_a_killed_llama_cpp_is_an_error_and_no_hang(run: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    """ggml ends its process at an error; the export says so and removes the file."""
    pytest.importorskip("xllamacpp")
    started = subprocess.Popen

    def dies(command: list[str], **options: Any) -> Any:
        return started(
            [sys.executable, "-c", "import sys; print('error: no', file=sys.stderr); sys.exit(6)"], **options
        )

    monkeypatch.setattr(llama_cpp_process.subprocess, "Popen", dies)
    code, _, err = inside(capsys, "export", run, tmp_path / "out")
    assert code == 3 and "does not load" in err and "error: no" in err
    assert not (tmp_path / "out").exists()


def test_what_an_adapter_cannot_hold(config: Path, tiny_base: Path, tmp_path: Path, capsys: Any) -> None:
    """A template of the run's own goes beside the adapter; a stop of its own, a student or another base is refused."""
    template = tmp_path / "other.jinja"
    template.write_text(CHATML.replace("<|im_end|>", "<|eot_id|>"))
    assert inside(capsys, "train", config, f"model.template={template}")[0] == 0
    for arguments in (["--as", "vllm"], ["--adapter"]):
        code, _, err = inside(capsys, "export", tmp_path / "run", tmp_path / "out", *arguments)
        assert code == 3 and "another token than its base" in err
    template.write_text(CHATML.replace("<|im_start|>", "<|start_header_id|>"))
    assert inside(capsys, "train", config, f"model.template={template}", "--overwrite")[0] == 0
    code, out, err = inside(capsys, "export", tmp_path / "run", tmp_path / "out", "--as", "vllm")
    assert code == 0 and f"--chat-template {tmp_path / 'out/chat_template.jinja'}" in out, err
    code, out, err = inside(capsys, "export", tmp_path / "run", tmp_path / "lora", "--adapter")
    assert code == 0 and f"--chat-template-file {tmp_path / 'lora/chat_template.jinja'}" in out, err
    assert "<|start_header_id|>" in (tmp_path / "lora/chat_template.jinja").read_text()
    student = [f"model={{student_of: {tiny_base}, dtype: float32, matmul: onednn}}", "--overwrite"]
    assert inside(capsys, "train", config, *student)[0] == 0
    code, _, err = inside(capsys, "export", tmp_path / "run", tmp_path / "student", "--as", "vllm")
    assert code == 3 and "made of another one" in err and "--as merged" in err


def test_a_folder_that_is_made_meanwhile_stays(run: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    written = gguf_file.GgufModel.write

    def slow(*arguments: Any) -> Any:
        (tmp_path / "out").mkdir()
        (tmp_path / "out/mine.txt").write_text("mine")
        return written(*arguments)

    monkeypatch.setattr(gguf_file.GgufModel, "write", slow)
    code, _, err = inside(capsys, "export", run, tmp_path / "out")
    assert code == 3 and "meanwhile" in err
    assert files_below(tmp_path / "out") == {"mine.txt"}


def test_measuring_what_is_not_answered(config: Path, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("xllamacpp")
    assert inside(capsys, "train", config, "evaluation.metrics=[perplexity]")[0] == 0
    code, _, err = inside(capsys, "export", tmp_path / "run", tmp_path / "out", "--measure", 3)
    assert code == 2 and "no metric of answers" in err and not (tmp_path / "out").exists()


def test_a_fused_run(config: Path, tmp_path: Path, capsys: Any) -> None:
    for name in ("first", "second"):
        assert inside(capsys, "train", config, f"output={tmp_path / name}", f"seed={len(name)}")[0] == 0
    assert inside(capsys, "fuse", tmp_path / "first", tmp_path / "second", "--output", tmp_path / "both")[0] == 0
    code, _, err = inside(capsys, "export", tmp_path / "both", tmp_path / "out", "--type", "f32")
    assert code == 0, err
    assert "several runs combined (sum): `first`, `second`" in (tmp_path / "out/README.md").read_text()
