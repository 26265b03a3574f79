"""Bases as other people and tools leave them: damaged, quantized, adapters, GGUF files, names of the hub."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from models import tiny_model
from processes import inside
from rung.config.model import ModelConfig
from rung.config.support import model_refusal
from rung.errors import CheckpointError, ConfigError, PlanError
from rung.models import download
from rung.models.base_folder import require_finite_weights
from rung.models.base_model import quiet_transformers
from rung.models.load import load_base
from rung.planning import hub
from rung.planning.architecture import read_shape

Edit = Callable[[Path], None]


def weights(folder: Path) -> Path:
    return folder / "model.safetensors"


def with_config(**changes: Any) -> Edit:
    def edit(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**content, **changes}))

    return edit


def with_weights(change: Callable[[str, torch.Tensor], torch.Tensor]) -> Edit:
    def edit(folder: Path) -> None:
        tensors = {name: change(name, value.clone()) for name, value in load_file(weights(folder)).items()}
        save_file(tensors, weights(folder), {"format": "pt"})

    return edit


def not_a_number(name: str, value: torch.Tensor) -> torch.Tensor:
    if "layers.1.mlp.up_proj" in name:
        value[3, 4] = torch.nan
    return value


def infinite(name: str, value: torch.Tensor) -> torch.Tensor:
    if "norm" in name:
        value[2] = -torch.inf
    return value


def cut(folder: Path) -> None:
    content = weights(folder).read_bytes()
    weights(folder).write_bytes(content[: len(content) // 2])


def too_long(folder: Path) -> None:
    weights(folder).write_bytes(weights(folder).read_bytes() + bytes(100))


def missing_shard(folder: Path) -> None:
    weights(folder).rename(folder / "model-00001-of-00002.safetensors")
    names = {"model.embed_tokens.weight": "model-00001-of-00002.safetensors", "x": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def pickled(folder: Path) -> None:
    weights(folder).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


FAULTS: dict[str, tuple[Edit, tuple[str, ...]]] = {
    "cut off": (cut, ("model.safetensors: this file is cut off", "by its header", "fetch the file again")),
    "too long": (too_long, ("model.safetensors: this file goes on behind its tensors", "fetch the file again")),
    "empty": (lambda f: weights(f).write_bytes(b""), ("model.safetensors: this is no safetensors file",)),
    "a web page": (lambda f: weights(f).write_text("<!doctype html>" * 9), ("web page", "fetch the file again")),
    "git lfs": (lambda f: weights(f).write_text("version https://git-lfs.github.com/spec/v1\n"), ("git lfs pull",)),
    "no weights": (lambda f: weights(f).unlink(), ("has no weights", "*.safetensors")),
    "a pickle": (pickled, ("pytorch_model.bin", "which can run code", "save_pretrained")),
    "a shard": (missing_shard, ("1 of the files that it names", "model-00002-of-00002.safetensors")),
    "gptq": (with_config(quantization_config={"quant_method": "gptq", "bits": 4}), ("quantized (gptq)", "qlora")),
    "bitsandbytes": (with_config(quantization_config={"quant_method": "bitsandbytes"}), ("(bitsandbytes)", "qlora")),
    "fp8": (with_config(quantization_config={"quant_method": "fp8"}), ("quantized (fp8)",)),
    "integers": (
        with_weights(lambda name, v: v.to(torch.int8) if v.dim() == 2 else v),
        ("holds integers (I8)", "quantized model"),
    ),
    "nan": (with_weights(not_a_number), ("layers.1.mlp.up_proj.weight", "not finite", "another copy")),
    "infinity": (with_weights(infinite), ("norm.weight", "not finite")),
    "shapes": (with_config(hidden_size=64), ("of another shape than the config says", "fetch both again")),
    "heads": (with_config(num_attention_heads=3), ("32", "3")),
    "tokenizer": (
        lambda f: (f / "tokenizer.json").write_text('{"version": "1.0", "trunc'),
        ("tokenizer.json: this file is damaged", "fetch tokenizer.json again"),
    ),
    "no tokenizer": (
        lambda f: [p.unlink() for p in f.glob("token*")],  # type: ignore[arg-type, return-value]
        ("has no tokenizer", "copy tokenizer.json"),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("command", ["train", "chat"])
def test_a_fault_of_a_base_is_named_with_its_file_and_remedy(
    command: str, fault: str, config: Path, tiny_base: Path, tmp_path: Path, capsys: Any
) -> None:
    """Several of these were reported as a bug in Rung, or passed and trained on nothing."""
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    edit, words = FAULTS[fault]
    edit(base)
    arguments = ("train", config, f"model.name={base}") if command == "train" else ("chat", base)
    code, _, err = inside(capsys, *arguments)
    assert code == 2, err
    assert "bug in Rung" not in err and "Traceback" not in err
    for word in words:
        assert word in err, err
    assert not (tmp_path / "run").exists()


def test_a_model_without_layers_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    with_config(num_hidden_layers=0)(folder)
    with pytest.raises(ConfigError, match="num_hidden_layers is 0"):
        read_shape(ModelConfig(name=str(folder)))


@pytest.mark.parametrize("kind", ["linear_attention", "conv", "mamba"])
def test_layers_that_carry_state_are_refused_whatever_the_architecture(
    kind: str, config: Path, tiny_base: Path, tmp_path: Path, capsys: Any
) -> None:
    """Hybrids (Qwen 3.5, LFM2) ended in an error of a library; their layers read tokens of other packed documents."""
    folder = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    with_config(layer_types=["full_attention", kind])(folder)
    code, _, err = inside(capsys, "train", config, f"model.name={folder}")
    assert code == 3 and "carry state from token to token" in err and f"layer_types: {kind}" in err, err
    assert model_refusal({"model_type": "llama", "layer_types": ["full_attention", "sliding_attention"]}) is None
    with_config(layer_types=["full_attention", "full_attention"])(folder)
    assert load_base(ModelConfig(name=str(folder), dtype="float32")).context == 512


@pytest.mark.parametrize("seed", [2**63 - 1, 2**64, 2**65, -1])
def test_a_seed_that_no_generator_takes_is_refused(seed: int, config: Path, tmp_path: Path, capsys: Any) -> None:
    code, _, err = inside(capsys, "train", config, f"seed={seed}")
    assert code == 2 and "seed: input should be" in err and str(seed) in err
    assert not (tmp_path / "run").exists()


def test_the_largest_seed_is_taken(config: Path, capsys: Any) -> None:
    assert inside(capsys, "train", config, f"seed={2**63 - 2}", "training.max_steps=2")[0] == 0


def test_a_sum_that_overflows_is_no_fault() -> None:
    """The values are looked at where the sum of a chunk is not finite; their sum alone may overflow."""
    model = torch.nn.Linear(4, 4)
    with torch.no_grad():
        model.weight.fill_(3e38)
    require_finite_weights(model, "here")
    with torch.no_grad():
        model.bias[1] = torch.inf
    with pytest.raises(ConfigError, match="bias"):
        require_finite_weights(model, "here")


@pytest.mark.parametrize("rows", [4, 8])
def test_a_rate_that_destroys_the_model_is_named(rows: int, config: Path, capsys: Any) -> None:
    """It was `14 of 28 tensors moved`, without a word of the rate; with more rows the gradient is NaN."""
    settings = ("training.learning_rate=1e6", f"training.examples_per_step={rows}", "training.schedule=constant")
    code, _, err = inside(capsys, "train", config, *settings)
    assert code == 3 and "the learning rate is 1e+06" in err and "lower training.learning_rate" in err, err


def test_an_error_of_several_settings_names_them_and_not_the_config(config: Path, capsys: Any) -> None:
    for settings in ("training.patience=2", "training.eval_every=2"):
        code, _, err = inside(capsys, "train", config, settings, "data.validation=0")
        assert code == 2 and "eval_every" in err and "given" not in err and len(err) < 300, err


# Adapters of other tools


@pytest.fixture
def adapter(tiny_base: Path, tmp_path: Path) -> Path:
    """A LoRA adapter as peft saves it, whose weights are not zero."""
    from peft import LoraConfig, get_peft_model

    model: Any = AutoModelForCausalLM.from_pretrained(tiny_base)
    tuned = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.1)
    tuned.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_of_peft_is_a_base(
    adapter: Path, config: Path, tiny_base: Path, tmp_path: Path, capsys: Any
) -> None:
    """The model that it names with it merged: the same logits, trained on and planned like any other."""
    from peft import PeftModel

    ids = torch.arange(5, 25).reshape(1, -1)
    plain: Any = AutoModelForCausalLM.from_pretrained(tiny_base)
    expected = PeftModel.from_pretrained(plain, str(adapter)).eval()(ids).logits
    base = load_base(ModelConfig(name=str(adapter), dtype="float32"))
    before = load_base(ModelConfig(name=str(tiny_base), dtype="float32"))
    logits = base.model(ids, position_ids=torch.arange(20)[None]).logits
    assert float((logits - expected).abs().max()) < 1e-5
    assert float((before.model(ids, position_ids=torch.arange(20)[None]).logits - expected).abs().max()) > 1e-2
    assert base.fingerprint != before.fingerprint
    assert read_shape(ModelConfig(name=str(adapter))) == read_shape(ModelConfig(name=str(tiny_base)))
    code, _, err = inside(capsys, "train", config, f"model.name={adapter}")
    assert code == 0 and f"the base is {tiny_base} with the adapter in {adapter}" in err, err
    assert inside(capsys, "eval", tmp_path / "run", "--limit", 3)[0] == 0
    assert inside(capsys, "merge", tmp_path / "run", tmp_path / "merged")[0] == 0


def adapter_with(folder: Path, **changes: Any) -> None:
    content = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**content, **changes}))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"base_model_name_or_path": "/home/someone/llama"}, ConfigError, "set base_model_name_or_path"),
        ({"base_model_name_or_path": None}, ConfigError, "does not say which model"),
        ({"peft_type": "IA3"}, PlanError, "cannot be folded"),
        ({"r": 8}, CheckpointError, "does not fit its base"),
    ],
)
def test_an_adapter_that_is_no_base_says_why(
    changes: dict[str, Any], error: type[Exception], words: str, adapter: Path
) -> None:
    adapter_with(adapter, **changes)
    with pytest.raises(error, match=words):
        load_base(ModelConfig(name=str(adapter), dtype="float32"))


@pytest.mark.parametrize("changes", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["embed_tokens"]}])
def test_an_adapter_on_tied_embeddings_is_refused(changes: dict[str, Any], tiny_base: Path, tmp_path: Path) -> None:
    """A merge into the head would change the embeddings as well, and the merged file has one matrix for both."""
    from peft import LoraConfig, get_peft_model

    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    with quiet_transformers():
        tiny_model(tie_word_embeddings=True).save_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft says itself that this leads to complications
        get_peft_model(model, LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **changes})).save_pretrained(
            tmp_path / "adapter"
        )
    with pytest.raises(PlanError, match="which its base holds as one matrix"):
        load_base(ModelConfig(name=str(tmp_path / "adapter"), dtype="float32"))


def test_an_adapter_whose_tensors_are_a_pickle_is_not_read(adapter: Path) -> None:
    for file in adapter.glob("*.safetensors"):
        file.rename(adapter / "adapter_model.bin")
    with pytest.raises(ConfigError, match="a pickle is not read"):
        load_base(ModelConfig(name=str(adapter), dtype="float32"))


# Names of the hub


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No network: the hub's host has no address, and nothing may be asked."""

    def refuse(*arguments: Any, **options: Any) -> Any:
        raise OSError("Name or service not known")

    monkeypatch.setattr(hub, "getproxies", dict)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    hub.hub_is_reachable.cache_clear()


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("command", ["train", "chat", "plan"])
def test_a_hub_id_beside_a_folder_of_its_owners_name(
    command: str, config: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was `no such model`; without a network it is said at once that the hub cannot be reached, by every command."""
    (tmp_path / "owner" / "llama-1b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.is_hub_id("owner/llama-1c") and not hub.is_hub_id("owner/llama-1b")
    name = "owner/llama-1c"
    arguments = ("chat", name) if command == "chat" else (command, config, f"model.name={name}")
    code, _, err = inside(capsys, *arguments)
    assert code == 2 and "the hub cannot be reached" in err and "did you mean owner/llama-1b?" in err, err
    assert "plan" not in err.replace(str(config), "")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("meta-llama/Llama-3.2-1B", True),
        ("Qwen/Qwen2.5-0.5B", True),
        ("owner/_x.y-z", True),
        ("./models/x", False),
        ("/models/x", False),
        ("models/", False),
        ("a/b/c", False),
        ("~/x", False),
        ("own er/x", False),
        ("http://x", False),
    ],
)
def test_what_has_the_form_of_a_hub_id(name: str, expected: bool) -> None:
    assert hub.is_hub_id(name) is expected


# GGUF files


def test_a_gguf_file_is_converted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_base: Path
) -> None:
    """Each command read it anew, 29 s for 135M parameters; a file that changes is another folder."""
    monkeypatch.setenv("RUNG_CACHE", str(tmp_path / "cache"))
    file, calls = tmp_path / "model.gguf", list[Path]()
    file.write_bytes(b"one")

    def convert(gguf: Path, folder: Path) -> None:
        calls.append(gguf)
        shutil.copytree(tiny_base, folder)

    monkeypatch.setattr("rung.models.gguf_reader.convert_gguf", convert)
    shape = read_shape(ModelConfig(name=str(tiny_base)))
    monkeypatch.setattr("rung.planning.architecture.read_gguf_shape", lambda path: shape)
    config = ModelConfig(name=str(file), dtype="float32")
    first = load_base(config)
    assert "converting model.gguf once" in capsys.readouterr().err
    assert load_base(config).fingerprint == first.fingerprint and len(calls) == 1
    assert read_shape(config) == shape
    file.write_bytes(b"three")
    assert load_base(config).fingerprint != first.fingerprint and len(calls) == 2
    # a disk without room: the file is read as it is
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10}))
    file.write_bytes(b"fourth")
    assert download.convert_gguf_once(file) is None and len(calls) == 2
    assert "is read anew by every command" in capsys.readouterr().err


def test_transformers_is_quiet_while_a_base_loads_and_loud_again_after(tiny_base: Path) -> None:
    """Its warnings and progress bars scrolled past on stderr; a program around Rung keeps its own settings."""
    code = (
        "from transformers.utils import logging\n"
        "logging.enable_progress_bar(); logging.set_verbosity_info()\n"
        "from rung.config.model import ModelConfig\nfrom rung.models.load import load_base\n"
        f"load_base(ModelConfig(name={str(tiny_base)!r}))\n"
        "assert logging.is_progress_bar_enabled() and logging.get_verbosity() == logging.INFO\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_a_model_saved_in_shards_is_read(tmp_path: Path, tiny_base: Path) -> None:
    folder = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    weights(folder).unlink()
    with quiet_transformers():
        tiny_model(max_position_embeddings=512).save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert load_base(ModelConfig(name=str(folder), dtype="float32")).context == 512


def test_what_a_killed_conversion_left_is_removed_after_a_day(tmp_path: Path) -> None:
    old, young = tmp_path / ".fetch-old", tmp_path / ".fetch-young"
    for folder in (old, young):
        folder.mkdir()
        (folder / "model.gguf").write_bytes(b"x")
    os.utime(old, (time.time() - 2 * download.ABANDONED_SECONDS,) * 2)
    download._remove_abandoned(tmp_path)
    assert not old.exists() and young.exists()
