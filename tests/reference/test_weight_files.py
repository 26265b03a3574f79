"""A base whose weights stay in their files: what is read row by row is what transformers loads as a whole."""

from __future__ import annotations

import hashlib
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from models import SHAPES, tiny_model
from rung.config.model import ModelConfig
from rung.errors import ConfigError, PlanError
from rung.files import read_safetensors_header
from rung.models import load, weight_files
from rung.models.base_model import BaseModel
from rung.models.load import load_base
from rung.models.weight_files import ShardedLoading, read_rows, stored_tensor


def here(work: Callable[[], Any]) -> Any:
    return work()


def in_files(folder: Path, *, trains_base: bool = False, **settings: Any) -> BaseModel:
    return load_base(ModelConfig(name=str(folder), **settings), sharded=ShardedLoading(trains_base, here))


def read_all(model: nn.Module, parts: int) -> dict[str, torch.Tensor]:
    """All parameters by name; those in their files in so many parts, as so many ranks would read them."""
    values = {}
    for name, parameter in model.named_parameters():
        source = stored_tensor(parameter)
        values[name] = parameter
        if source is not None:
            values[name] = torch.empty(parameter.shape, dtype=parameter.dtype)
            step = -(-len(parameter) // parts)
            for start in range(0, len(parameter), step):
                rows = slice(start, min(start + step, len(parameter)))
                read_rows(source, rows, values[name][rows])
    return values


@pytest.fixture
def base(tmp_path: Path, tiny_tokenizer: Any) -> Callable[..., Path]:
    def save(shape: str, stored: torch.dtype = torch.float32, **changes: Any) -> Path:
        folder = tmp_path / f"{shape}-{str(stored).removeprefix('torch.')}"
        tiny_model(shape, dtype=stored, **changes).save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_rows_are_the_weights_of_a_whole_load_bit_for_bit(
    shape: str, stored: torch.dtype, base: Callable[..., Path]
) -> None:
    folder = base(shape, stored)
    whole = load_base(ModelConfig(name=str(folder), dtype="float32"))
    for trains_base in (False, True):
        parts = in_files(folder, trains_base=trains_base, dtype="float32")
        assert parts.fingerprint == whole.fingerprint
        expected, values = dict(whole.model.named_parameters()), read_all(parts.model, 3)
        assert values.keys() == expected.keys()  # tied weights once
        for name, value in expected.items():
            assert values[name].dtype is value.dtype and torch.equal(values[name], value), name
        buffers = dict(parts.model.named_buffers())
        assert buffers.keys() == dict(whole.model.named_buffers()).keys()
        for name, value in whole.model.named_buffers():
            assert not buffers[name].is_meta and buffers[name].dtype is value.dtype
            assert torch.equal(buffers[name], value), name
        on_meta = {name for name, parameter in parts.model.named_parameters() if parameter.is_meta}
        outside = {n for n, p in whole.model.named_parameters() if ".0." not in n and ".1." not in n}
        matrices = {name for name in outside if expected[name].dim() > 1} if trains_base else set()
        assert on_meta == (expected.keys() - outside) | matrices


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_16_bits_of_another_kind_are_rounded_as_a_whole_load_rounds_them(
    compute: str, base: Callable[..., Path]
) -> None:
    """From float16 and float32 files; trained weights are widened again, after they were rounded."""
    for stored in (torch.float16, torch.float32):
        folder = base("llama", stored)
        whole = load_base(ModelConfig(name=str(folder), dtype=compute)).model
        values = read_all(in_files(folder, dtype=compute).model, 2)
        assert all(torch.equal(values[n], p) and values[n].dtype is p.dtype for n, p in whole.named_parameters())
        widened = read_all(in_files(folder, trains_base=True, dtype=compute).model.float(), 2)
        assert all(torch.equal(widened[n], p.float()) for n, p in whole.named_parameters())


def test_only_the_rows_that_are_asked_for_are_read(base: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces of a bounded size; a mutation that reads from the wrong row gives other weights."""
    folder = base("llama", torch.bfloat16)
    parameter = in_files(folder).model.model.layers[1].mlp.down_proj.weight
    source = stored_tensor(parameter)
    assert source is not None
    pieces: list[int] = []
    read = weight_files._read_into

    def note(stream: Any, part: torch.Tensor, source: weight_files.StoredTensor) -> None:
        pieces.append(part.nbytes)
        read(stream, part, source)

    monkeypatch.setattr(weight_files, "_read_into", note)
    monkeypatch.setattr(weight_files, "READ_BYTES", 256)
    rows = torch.empty(5, 48, dtype=torch.float32)
    read_rows(source, slice(7, 12), rows)
    assert sum(pieces) == 5 * 48 * 2 and max(pieces) <= 256
    (file,) = folder.glob("*.safetensors")
    stored = load_file(file)["model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(rows, stored[7:12].float())
    read_rows(source._replace(start=source.start + 96), slice(7, 12), rows)
    assert not torch.equal(rows, stored[7:12].float())


def test_faults_of_files_are_named(base: Callable[..., Path]) -> None:
    folder = base("llama")
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    save_file({n: t for n, t in tensors.items() if n != "model.layers.1.mlp.up_proj.weight"}, file)
    with pytest.raises(ConfigError, match=r"weights are not those") as missing:
        in_files(folder)
    assert "1 missing in the file: model.layers.1.mlp.up_proj.weight" in str(missing.value)
    save_file({**tensors, "model.layers.1.mlp.up_proj.weight": torch.zeros(3, 4)}, file)
    with pytest.raises(ConfigError, match=r"another shape") as misshapen:
        in_files(folder)
    assert "up_proj.weight [3, 4], not [48, 32]" in str(misshapen.value) and "missing" not in str(misshapen.value)
    eight_bits = tensors["model.layers.1.mlp.up_proj.weight"].to(torch.float8_e4m3fn)
    save_file({**tensors, "model.layers.1.mlp.up_proj.weight": eight_bits}, file)
    with pytest.raises(PlanError, match=r"up_proj.weight has a dtype that a base in parts is not read from") as dtype:
        in_files(folder)
    assert "F8_E4M3" in str(dtype.value) and "missing" not in str(dtype.value)
    renamed = {n.replace("mlp.up_proj", "mlp.c_fc"): t for n, t in tensors.items()}
    save_file(renamed, file)
    with pytest.raises(PlanError, match=r"only a whole load converts"):
        in_files(folder)
    bad = {n: t.clone() for n, t in tensors.items()}
    bad["model.layers.1.mlp.up_proj.weight"][40, 3] = float("nan")
    save_file(bad, file)
    parameter = in_files(folder).model.model.layers[1].mlp.up_proj.weight
    source = stored_tensor(parameter)
    assert source is not None
    read_rows(source, slice(0, 40), torch.empty(40, 32))
    with pytest.raises(ConfigError, match=r"up_proj.weight holds a value that is not finite"):
        read_rows(source, slice(40, 48), torch.empty(8, 32))
    _, start = read_safetensors_header(file)
    source = source._replace(start=file.stat().st_size - 8)
    with pytest.raises(ConfigError, match="cut off"):
        read_rows(source, slice(0, 1), torch.empty(1, 32))


@pytest.mark.parametrize("shard_size", ["50GB", "20KB"])
def test_files_of_others_in_the_folder_are_left_alone(shard_size: str, base: Callable[..., Path]) -> None:
    """transformers reads `model.safetensors`, or the files of its index; a mutation reads all of them."""
    folder = base("llama")
    model = tiny_model("llama")
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size=shard_size)
    assert (folder / "model.safetensors").exists() == (shard_size == "50GB")
    stray = {name: torch.full_like(tensor, 3.0) for name, tensor in model.state_dict().items()}
    save_file({name: tensor.clone() for name, tensor in stray.items()}, folder / "z_old.safetensors")
    save_file({"exp_avg": torch.ones(3)}, folder / "optimizer.safetensors")
    expected = dict(load_base(ModelConfig(name=str(folder), dtype="float32")).model.named_parameters())
    values = read_all(in_files(folder, dtype="float32").model, 2)
    assert all(torch.equal(values[name], value) for name, value in expected.items())
    (folder / "optimizer.safetensors").unlink()
    every_file = [*weight_files.weight_files(folder), folder / "z_old.safetensors"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_files, "weight_files", lambda folder: every_file)
        values = read_all(in_files(folder, dtype="float32").model, 2)
    assert not any(torch.equal(values[name], value) for name, value in expected.items())


def test_a_folder_without_the_names_that_are_read_has_no_weights(base: Callable[..., Path]) -> None:
    folder = base("llama")
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    with pytest.raises(ConfigError, match="under the names that transformers reads"):
        in_files(folder)


def test_two_tensors_of_one_tied_parameter_have_to_be_the_same(
    base: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole load unties them where they differ."""
    folder = base("llama", tie_word_embeddings=True)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    head = tensors["model.embed_tokens.weight"].clone()
    save_file({**tensors, "lm_head.weight": head}, file)
    whole, parts = load_base(ModelConfig(name=str(folder))).model, in_files(folder).model
    assert parts.lm_head.weight is parts.model.embed_tokens.weight
    assert torch.equal(parts.lm_head.weight, whole.lm_head.weight)
    head[-1, -1] += 1.0  # in the last piece
    save_file({**tensors, "lm_head.weight": head}, file)
    assert torch.equal(load_base(ModelConfig(name=str(folder), dtype="float32")).model.lm_head.weight, head)
    monkeypatch.setattr(weight_files, "READ_BYTES", 256)
    with pytest.raises(PlanError, match="another value for each") as refusal:
        in_files(folder)
    assert "lm_head.weight, model.embed_tokens.weight" in str(refusal.value)
    assert "tie_word_embeddings" in str(refusal.value)


def test_bases_without_files_of_their_own_are_refused(
    base: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base("llama"))}))
    with pytest.raises(PlanError, match="with an adapter added to them"):
        in_files(adapter)
    run = tmp_path / "run"
    (run / "adapter").mkdir(parents=True)
    (run / "run.json").write_text("{}")
    with pytest.raises(PlanError, match="weights of this run are those of its base with an adapter"):
        in_files(run)
    gguf = tmp_path / "base.gguf"
    gguf.write_bytes(b"GGUF")
    monkeypatch.setattr(load, "convert_gguf_once", lambda file: None)
    with pytest.raises(PlanError, match="no room to convert"):
        in_files(gguf)


def test_a_run_as_base_is_hashed_by_the_first_process_alone(
    base: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    base("llama").rename(run / "model")
    sums = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in (run / "model").iterdir()}
    (run / "model" / "manifest.json").write_text(json.dumps({"files": sums}))
    (run / "run.json").write_text(json.dumps({"config": {"method": {"kind": "full"}}, "status": "finished"}))
    first = in_files(run)
    assert first.fingerprint == load_base(ModelConfig(name=str(run))).fingerprint

    def refuse(*_: Any) -> None:
        raise AssertionError("a process other than the first reads the files")

    monkeypatch.setattr(load, "require_undamaged", refuse)
    monkeypatch.setattr(load, "fingerprint", refuse)
    sharded = ShardedLoading(trains_base=False, on_rank0=lambda work: first.fingerprint)
    assert load_base(ModelConfig(name=str(run)), sharded=sharded).fingerprint == first.fingerprint
    with pytest.raises(AssertionError, match="other than the first"):
        in_files(run)


def test_a_hub_id_is_read_from_the_cache_of_the_hub(
    base: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its fingerprint is that of a whole load: the id and the commit."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--owner--tiny"
    shutil.copytree(base("llama"), repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("rung.planning.hub.hub_is_reachable", lambda: False)
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    parts = in_files(Path("owner/tiny"))
    assert parts.fingerprint == f"owner/tiny@{commit}"
    assert any(p.is_meta for p in parts.model.parameters())


def test_a_student_takes_the_files_of_its_layers(base: Callable[..., Path]) -> None:
    folder = base("qwen2", num_hidden_layers=3)
    config = ModelConfig(student_of=str(folder), layers=(0, 2))
    whole, parts = load_base(config), load_base(config, sharded=ShardedLoading(False, here))
    values = read_all(parts.model, 2)
    assert parts.fingerprint == whole.fingerprint
    assert all(torch.equal(values[n], p) for n, p in whole.model.named_parameters())


@pytest.mark.parametrize("shape", ["llama", "qwen2", "gpt2", "gemma"])
@pytest.mark.parametrize("shard_bytes", [5 * 10**9, 30_000])
def test_a_model_written_tensor_by_tensor_is_that_of_transformers(
    shape: str, shard_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files, config and index; and one gathered tensor is in memory at a time."""
    model = tiny_model(shape)
    model.save_pretrained(tmp_path / "theirs")
    monkeypatch.setattr(weight_files, "SHARD_BYTES", shard_bytes)
    gathered: list[weakref.ref[torch.Tensor]] = []

    def gather(tensor: torch.Tensor) -> torch.Tensor:
        assert not any(reference() is not None for reference in gathered)
        whole = tensor.detach().clone()
        gathered.append(weakref.ref(whole))
        return whole

    ours = tmp_path / "ours"
    ours.mkdir()
    weight_files.write_model(ours, model, gather)
    (file,) = (tmp_path / "theirs").glob("*.safetensors")
    expected = load_file(file)
    files = sorted(ours.glob("*.safetensors"))
    written = {name: tensor for part in files for name, tensor in load_file(part).items()}
    assert written.keys() == expected.keys() and len(gathered) == len(expected)
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())
    for name in ("config.json", "generation_config.json"):
        assert json.loads((ours / name).read_text()) == json.loads((tmp_path / "theirs" / name).read_text())
    assert (len(files) > 1) == (shard_bytes == 30_000) == (ours / "model.safetensors.index.json").exists()
    again = AutoModelForCausalLM.from_pretrained(ours)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_files_beside_the_model_are_not_read(base: Callable[..., Path]) -> None:
    """What transformers does not read: an optimizer's state with equal names, another tool's copy, an adapter."""
    folder = base("llama")
    expected = read_all(in_files(folder).model, 2)
    weights = load_file(folder / "model.safetensors")
    for name in ("optimizer", "z_old", "consolidated", "adapter_model"):
        save_file({k: v + 1.0 for k, v in weights.items()}, folder / f"{name}.safetensors")
    found = read_all(in_files(folder).model, 2)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("split", [False, True])
def test_tied_weights_that_differ_are_refused(split: bool, base: Callable[..., Path]) -> None:
    """transformers keeps them apart; in parts one of them would take the place of the other."""
    folder = base("llama", tie_word_embeddings=True)
    weights = load_file(folder / "model.safetensors")
    embeddings = weights["model.embed_tokens.weight"]
    for head, is_equal in ((embeddings.clone(), True), (embeddings + 1.0, False)):
        files = {"model.safetensors": {**weights, "lm_head.weight": head}}
        if split:
            (folder / "model.safetensors").unlink(missing_ok=True)
            files = {"model-1.safetensors": weights, "model-2.safetensors": {"lm_head.weight": head}}
            weight_map = {name: file for file, tensors in files.items() for name in tensors}
            index = {"metadata": {}, "weight_map": weight_map}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        for file, tensors in files.items():
            save_file(tensors, folder / file)
        if is_equal:
            found = read_all(in_files(folder, dtype="float32").model, 2)
            assert torch.equal(found["model.embed_tokens.weight"], embeddings)
        else:
            with pytest.raises(PlanError, match="the config ties"):
                in_files(folder, dtype="float32")
