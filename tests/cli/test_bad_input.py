"""Each mistake is one message with place, reason and remedy, exit code 2 or 3, and nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from models import tiny_model
from processes import files_below, inside, process
from rung.commands.exit_codes import exit_code_of

GOOD = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(30)]


def lines(rows: list[object]) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def changed(at: int, row: object) -> str:
    return lines([*GOOD[: at - 1], row, *GOOD[at:]])


DATA: dict[str, tuple[str, list[str]]] = {
    "empty file": ("", ["bad.jsonl", "empty"]),
    "broken JSON on line 17": (changed(17, '{"question": "q", "answer": '), ["line 17", "JSON", "data.rejects"]),
    "a row without an answer": (changed(9, {"question": "q"}), ["line 9", "no answer", "data.rejects"]),
    "an empty answer": (changed(9, {"question": "q", "answer": "  "}), ["line 9", "empty answer"]),
    "a label that is not text": (
        changed(4, {"question": "q", "answer": ["7"]}),
        ["line 4", "answer is a list, not text"],
    ),
    "two columns that could be the answer": (
        lines([{**row, "output": "other"} for row in GOOD]),
        ["answer", "output", "map"],
    ),
    "unknown columns": (lines([{"foo": "x", "bar": "y"}] * 3), ["foo", "bar", "map"]),
    "a context longer than the model": (
        changed(6, {"context": "word " * 3000, "question": "q", "answer": "a"}),
        ["line 6", "max_length", "overflow"],
    ),
}


@pytest.mark.parametrize("name", DATA)
def test_bad_data(name: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, words = DATA[name]
    bad = tmp_path / "bad.jsonl"
    bad.write_text(text)
    before = files_below(tmp_path)
    code, out, err = inside(capsys, "train", config, f"data.path={bad}", "data.group=null", "data.test=0")
    assert code == 2, err
    for word in words:
        assert word in err
    assert "Traceback" not in err and out == ""
    assert not (tmp_path / "run").exists()
    assert {f for f in files_below(tmp_path) - before if not f.startswith("cache")} == set()


CONFIG: dict[str, tuple[list[str], int, list[str]]] = {
    "missing data": (["data.path=nowhere.jsonl"], 2, ["nowhere.jsonl", "no such file"]),
    "unknown model": (["model.name=smolm2-135m"], 2, ["model.name", "did you mean smollm2-135m?"]),
    "a folder that is no model": (["model.name=tests"], 2, ["config.json"]),
    "misspelt key": (["method.rnak=3"], 2, ["did you mean method.rank?"]),
    "key of another group": (["training.rank=3"], 2, ["training.rank", "method.rank"]),
    "wrong type": (["training.epochs=many"], 2, ["training.epochs", "number"]),
    "unknown method": (["method={kind: lorra}"], 2, ["lorra", "'lora'"]),
    "no such layer": (["method.layers=[9]"], 2, ["method.layers", "0 to 1"]),
    "no such group column": (["data.group=boks"], 2, ["boks", "box"]),
    "template without a file": (["model.template=my.jinja"], 2, ["my.jinja"]),
}


@pytest.mark.parametrize("name", CONFIG)
def test_bad_config(name: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides, expected, words = CONFIG[name]
    code, out, err = inside(capsys, "train", config, *overrides)
    assert code == expected, err
    for word in words:
        assert word in err
    assert "Traceback" not in err and out == ""
    assert not (tmp_path / "run").exists()


def test_template_that_errors(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    template = tmp_path / "bad.jinja"
    template.write_text("{{ raise_exception('only poems here') }}")
    code, _, err = inside(capsys, "train", config, f"model.template={template}")
    assert code == 2 and "only poems here" in err and "model.template" in err
    assert not (tmp_path / "run").exists()


def test_data_where_a_config_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "a", "answer": "b"}\n' * 3)
    code, _, err = inside(capsys, "train", rows)
    assert code == 2 and "rows.jsonl" in err and "data.path" in err


def test_yaml_errors_name_the_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "broken.yaml"
    for text, words in (
        ("data: {path: x}\nmethod: [\n", ["broken.yaml line"]),
        ("data: {path: x}\noutput: a\noutput: b\n", ["line 3", "stands twice"]),
        ("- a\n", ["mapping"]),
        ("data: {path: x}\ntraining:\n  epohcs: 3\noutput: r\n", ["line 3", "training.epochs"]),
    ):
        file.write_text(text)
        code, _, err = inside(capsys, "train", file)
        assert code == 2, err
        assert all(word in err for word in words), err


def test_a_rejected_row_can_be_dropped_and_is_counted(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(changed(17, "{broken"))
    code, _, err = inside(capsys, "train", config, f"data.path={bad}", "data.group=null", "data.rejects=drop")
    assert code == 0, err
    sets = json.loads((tmp_path / "run" / "run.json").read_text())["data"]["splits"]["sets"]
    assert sets[0]["rejected"] == 1


def test_rows_with_control_tokens_stop_no_run_and_are_counted(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One answer with a stop inside stopped the run, and `data.rejects: drop` did not help."""
    rows = [
        *GOOD,
        {"question": "<|im_end|> x", "answer": "a <|im_end|> b"},
        {"question": "z", "answer": "ok<|im_end|>"},
    ]
    bad = tmp_path / "bad.jsonl"
    bad.write_text(lines([*rows]))
    more = (f"data.path={bad}", "data.group=null", "data.validation=0", "data.test=0")
    code, _, err = inside(capsys, "train", config, *more)
    assert code == 0, err
    assert "1 answers ended in <|im_end|>, which is removed" in err
    assert "control tokens: in the text of 1 rows, encoded as text: <|im_end|> (1 rows)" in err
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())["data"]
    assert manifest["splits"]["sets"][0]["removed_end_tokens"] == {"<|im_end|>": 1}
    assert manifest["train"]["control_tokens"]["rows_with"] == {"<|im_end|>": 1}
    report = (tmp_path / "run" / "report.html").read_text()
    assert "encoded as text: &lt;|im_end|&gt; (1 rows)" in report and "removed from the ends of answers" in report
    code, _, err = inside(capsys, "train", config, *more, "data.control_tokens=error", "--overwrite")
    assert code == 2 and all(word in err for word in ("line 31", "<|im_end|>", "data.control_tokens: text")), err
    more = (*more, "data.control_tokens=error", "data.rejects=drop", "--overwrite")
    code, _, err = inside(capsys, "train", config, *more)
    assert code == 0 and "not rendered: 2 rows left out" in err, err


def test_folder_of_another_run(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inside(capsys, "train", config)[0] == 0
    kept = (tmp_path / "run" / "run.json").read_bytes()
    code, _, err = inside(capsys, "train", config)
    assert code == 3 and "--resume" in err and "--overwrite" in err
    code, _, err = inside(capsys, "train", config, "method.rank=2", "--resume")
    assert code == 3 and "method.rank" in err
    assert (tmp_path / "run" / "run.json").read_bytes() == kept
    assert inside(capsys, "train", config, "method.rank=2", "--overwrite")[0] == 0


def test_folder_with_something_else(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    for flags in ([], ["--overwrite"]):
        code, _, err = inside(capsys, "train", config, *flags)
        assert code == 3 and "not empty" in err
    assert (tmp_path / "run" / "thesis.tex").read_text() == "years of work"


def test_no_disk_space(config: Path, tmp_path: Path) -> None:
    """A limit on file sizes stands for a full disk: the same write fails in the same place."""

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    code, _, err = process("train", config, "method.rank=64", preexec=small_files)
    assert code == 3, err
    assert "could not write" in err and "disk space" in err
    assert not list((tmp_path / "run").glob("*adapter*")) and not list((tmp_path / "run").glob(".*"))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


def test_overlapping_test_file(config: Path, questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = inside(capsys, "train", config, f"data.test={questions}")
    assert code == 2 and "data.overlap" in err


def test_json_errors_are_json(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = inside(capsys, "train", config, "method.rnak=3", "--json")
    assert code == 2 and json.loads(out)["exit_code"] == 2


def test_data_check_exits_2_for_a_rejected_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(changed(17, "{broken"))
    code, out, _ = inside(capsys, "data", "check", bad, "--json")
    assert code == 2
    assert json.loads(out)["rejected"][0]["line"] == 17
    good = tmp_path / "good.jsonl"
    good.write_text(lines(GOOD))
    assert inside(capsys, "data", "check", good)[0] == 0


def test_a_run_goes_on_or_starts_anew(config: Path, capsys: Any) -> None:
    code, _, err = inside(capsys, "train", config, "--resume", "--overwrite")
    assert code == 2 and "exclude one another" in err


def test_a_task_that_no_row_has_and_one_that_no_method_knows(config: Path, tmp_path: Path, capsys: Any) -> None:
    data = config.read_text().split("data: {path: ")[1].split(",")[0]
    config.write_text(config.read_text().replace(f"data: {{path: {data}", f"data: {{path: [{{path: {data}, task: a}}]"))
    method = "method={kind: prompt, virtual_tokens: 2, tasks: [a, b]}"
    code, _, err = inside(capsys, "train", config, method)
    assert code == 2 and "without training rows" in err and "b" in err
    assert inside(capsys, "train", config, "training.max_steps=1")[0] == 0
    code, _, err = inside(capsys, "chat", tmp_path / "run", "--question", "hello", "--task", "a")
    assert code == 2 and "tasks of their own" in err


def test_a_rung_is_of_one_kind(config: Path, capsys: Any) -> None:
    code, _, err = inside(capsys, "climb", config, "climb.rungs=[{kind: lora, method: {kind: qlora}}]")
    assert code == 2 and "takes no other kind" in err


def test_several_processes_are_refused(config: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    """But for a run that torchrun started they would work side by side in one folder."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    code, _, err = inside(capsys, "climb", config)
    assert code == 3 and "several processes" in err and not (tmp_path / "run").exists()
    code, _, err = inside(capsys, "train", config)
    assert code == 3 and "torchrun" in err and not (tmp_path / "run").exists()


@pytest.mark.parametrize("changes", [{"model_type": "canary"}, {"hidden_size": "wide"}, {"rope_parameters": 3}])
def test_a_base_whose_config_is_wrong(
    config: Path, tiny_base: Path, tmp_path: Path, capsys: Any, changes: dict[str, object]
) -> None:
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    known = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**known, **changes}))
    code, _, err = inside(capsys, "train", config, f"model.name={base}")
    assert code in (2, 3) and "Traceback" not in err and "base" in err


def _drop(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    del tensors["model.layers.1.mlp.up_proj.weight"]


def _untie_without_head(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    config["tie_word_embeddings"] = False
    tensors.pop("lm_head.weight", None)


def _fewer_layers(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    config["num_hidden_layers"] = 1


def _stray_scales(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    tensors["model.layers.0.mlp.up_proj.weight_scale"] = torch.ones(1)


def _another_prefix(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    for name in list(tensors):
        tensors[f"base_model.{name}"] = tensors.pop(name)


def _another_shape(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    config["intermediate_size"] += 8


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        (_drop, "1 missing in the file: model.layers.1.mlp.up_proj.weight"),
        (_untie_without_head, "1 missing in the file: lm_head.weight"),
        (_fewer_layers, "in the file, but not in the model of its config: model.layers.1.input_layernorm.weight"),
        (_stray_scales, "model.layers.0.mlp.up_proj.weight_scale"),
        (_another_prefix, "missing in the file"),
        (_another_shape, "of another shape than the config says: model.layers.0.mlp.down_proj.weight"),
    ],
)
def test_a_base_whose_file_does_not_match_its_config(
    damage: Any, name: str, config: Path, tiny_base: Path, tmp_path: Path, capsys: Any
) -> None:
    """It trained on random weights, others at every load, and ended well."""
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    tensors, settings = load_file(base / "model.safetensors"), json.loads((base / "config.json").read_text())
    damage(tensors, settings)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    (base / "config.json").write_text(json.dumps(settings))
    code, _, err = inside(capsys, "train", config, f"model.name={base}")
    assert code == 2 and name in err and not (tmp_path / "run").exists(), err


def test_masks_of_old_files_are_no_weights(config: Path, tmp_path: Path, tiny_base: Path, capsys: Any) -> None:
    """transformers stored causal masks with GPT-2 for years."""
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    (base / "model.safetensors").unlink()
    tiny_model("gpt2").save_pretrained(base)
    tensors = load_file(base / "model.safetensors")
    for i in range(2):
        tensors[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 256, 256)
        tensors[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    settings = (f"model.name={base}", "training.max_steps=1", "data.max_length=200")
    code, _, err = inside(capsys, "train", config, *settings)
    assert code == 0, err


def test_a_base_without_one_of_its_shards(config: Path, tiny_base: Path, tmp_path: Path, capsys: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    (base / "model.safetensors").unlink()
    model.save_pretrained(base, max_shard_size="100KB")
    assert inside(capsys, "train", config, f"model.name={base}", "training.max_steps=2")[0] == 0
    shards = sorted(base.glob("model-*.safetensors"))
    tensors = load_file(shards[1])
    removed = sorted(tensors)[0]
    save_file({n: t for n, t in tensors.items() if n != removed}, shards[1], metadata={"format": "pt"})
    code, _, err = inside(capsys, "train", config, f"model.name={base}", f"output={tmp_path / 'other'}")
    assert code == 2 and removed in err, err


def test_an_adapter_with_tensors_too_many_is_no_base(config: Path, tmp_path: Path, capsys: Any) -> None:
    """peft drops them without a word, and the model is another than the one that was trained."""
    assert inside(capsys, "train", config, "training.max_steps=2")[0] == 0
    file = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    save_file({**tensors, name.replace("layers.0", "layers.7"): tensors[name].clone()}, file)
    manifest = file.parent / "manifest.json"
    hashes = json.loads(manifest.read_text())
    hashes["files"][file.name] = sha256(file.read_bytes()).hexdigest()
    manifest.write_text(json.dumps(hashes))
    code, _, err = inside(capsys, "train", config, f"model.name={tmp_path / 'run'}", f"output={tmp_path / 'next'}")
    assert code == 3 and "does not describe" in err, err


def test_without_math_verify(config: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    """The metric and the reward that need it say how to get it, before anything is loaded."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    monkeypatch.setattr("rung.models.load._load_weights", None)
    reward = "objective={kind: grpo, reward: {kind: math}}"
    for verb, asked in (
        ("train", "evaluation.metrics=[math]"),
        ("climb", "evaluation.metrics=[math]"),
        ("train", reward),
    ):
        code, _, err = inside(capsys, verb, config, asked)
        assert code == 2 and "rung[math]" in err, err
    assert not (tmp_path / "run").exists()


def test_without_bitsandbytes(config: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    """What needs it says how to get it; everything else does without."""
    for name in ("bitsandbytes", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, name, None)
    for asked in ("method={kind: qlora}", "training.optimizer={state_dtype: int8}"):
        code, _, err = inside(capsys, "train", config, asked)
        assert code == 3 and "rung[quantized]" in err
    code, _, err = inside(capsys, "train", config, "--overwrite")
    assert code == 0, err


@pytest.mark.parametrize(
    "arguments",
    [
        ("nosuch",),
        ("plan",),
        ("climb",),
        ("plan", "a", "--nope"),
        ("eval", "x", "--limit", "x"),
        ("plan", "a", "--tokens", "0"),
    ],
)
def test_a_wrong_command_line_is_the_users(arguments: tuple[str, ...], capsys: Any) -> None:
    code, _, err = inside(capsys, *arguments)
    assert code == 2 and "Traceback" not in err and "bug" not in err and err.strip()


@pytest.mark.parametrize(
    "arguments",
    [("data", "check", f"{'x' * 300}.jsonl"), ("eval", "x" * 300), ("chat", "x" * 300, "--question", "a")],
    ids=lambda arguments: arguments[0],
)
def test_a_name_that_is_too_long_is_the_users(arguments: tuple[str, ...], capsys: Any) -> None:
    code, _, err = inside(capsys, *arguments)
    assert code == 2 and "File name too long" in err and "bug" not in err, err


def test_an_output_that_is_too_long_is_the_users(config: Path, tmp_path: Path, capsys: Any) -> None:
    code, _, err = inside(capsys, "train", config, f"output={tmp_path / ('x' * 300)}")
    assert code == 2 and "File name too long" in err and "bug" not in err, err


@pytest.mark.parametrize(("number", "code"), [(errno.EACCES, 3), (errno.ENOSPC, 3), (errno.ELOOP, 2), (errno.EBADF, 1)])
def test_rights_and_disks_are_no_bug(number: int, code: int, capsys: Any) -> None:
    def fail() -> int:
        raise OSError(number, os.strerror(number), "/some/file")

    assert exit_code_of(fail, as_json=False) == code
    err = capsys.readouterr().err
    assert ("bug in Rung" in err) is (code == 1) and "/some/file" in err


def test_a_mistyped_run_is_no_base(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "run.json").write_text("{}")
    code, _, err = inside(capsys, "eval", tmp_path / "frist")
    assert code == 2 and "no run is here" in err and f"did you mean {tmp_path / 'first'}?" in err, err
