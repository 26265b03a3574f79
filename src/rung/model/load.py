"""From a name to a base: the only file that knows transformers' Auto classes."""

from __future__ import annotations

import copy
import hashlib
import json
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from rung.errors import CheckpointError, ConfigError, PlanError, RungError, did_you_mean
from rung.model import attention
from rung.model.fetch import fetch
from rung.model.fuse import fuse
from rung.model.resident import compute_in_float32, lost_precision, stored_in_bfloat16
from rung.model.student import student
from rung.plan.shape import Shape, shape_of
from rung.spec.catalog import CATALOG
from rung.spec.model import ModelSpec
from rung.spec.support import refusal_of_model
from rung.whole import check_whole


@dataclass(frozen=True)
class Base:
    """A loaded base and what must be known to load it again."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    name: str
    """As the user gave it."""
    fingerprint: str
    """Of the weights, independent of the dtype they are loaded in."""
    compute_dtype: torch.dtype

    def twin(self) -> Base:
        """The same weights in modules of its own: an adapter on one is not seen by the other. For a base as loaded."""
        held: dict[int, Tensor] = {id(t): t for t in self.model.buffers()}
        # parameters of its own over the same memory: whatever widens one of them leaves the others as they are
        held |= {id(p): nn.Parameter(p.data, requires_grad=p.requires_grad) for p in self.model.parameters()}
        return replace(self, model=copy.deepcopy(self.model, held))

    @property
    def shape(self) -> Shape:
        """Its numbers, that memory follows from."""
        return shape_of(self.model.config.to_dict())

    @property
    def context(self) -> int:
        """Longest document in tokens."""
        return int(getattr(self.model.config, "max_position_embeddings", None) or 2**20)


NO_CODE: dict[str, Any] = {"trust_remote_code": False}
"""Code that comes with a model never runs; unless this is said, transformers asks at the terminal."""


def load_base(spec: ModelSpec, *, device: torch.device | None = None) -> Base:
    """Load model and tokenizer, ready for segment trees, in eval mode, nothing trainable.

    Raises `ConfigError` for an unknown name, `PlanError` for an architecture Rung cannot take.
    """
    attention.register()
    logging.disable_progress_bar()  # a bar of half a second on stderr helps nobody
    if spec.student_of is not None:
        whole = {"name": spec.student_of, "student_of": None, "layers": None}
        return student(load_base(spec.model_copy(update=whole), device=device), spec.layers or "every_other")
    where = _resolve(spec.name)
    if isinstance(where, Path) and (where / "run.json").exists():
        return _load_run_as_base(spec, where, device)
    compute = compute_dtype(spec.dtype, device)
    narrow = spec.fused and compute is torch.float32 and isinstance(where, Path) and where.is_dir()
    narrow = narrow and stored_in_bfloat16(Path(where))
    model, tokenizer = _load(where, spec.revision, torch.bfloat16 if narrow else compute)
    if narrow and lost_precision(model):
        model, narrow = _load(where, spec.revision, compute)[0], False
    if narrow:
        compute_in_float32(model)
    return _finished(model, tokenizer, spec, fingerprint(where, model.config), compute, device)


def load_tokenizer(spec: ModelSpec) -> PreTrainedTokenizerFast:
    """The tokenizer alone, no weights."""
    where = _resolve(spec.student_of or spec.name)
    if isinstance(where, Path) and (where / "run.json").exists():
        inside = next((where / name for name in ("model", "adapter") if (where / name).is_dir()), where)
        return _from_pretrained(AutoTokenizer, inside, None)
    if isinstance(where, Path) and where.suffix.lower() == ".gguf":
        return _gguf_tokenizer(where)
    return _from_pretrained(AutoTokenizer, where, spec.revision)


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write a GGUF file as a transformers folder: safetensors in float32 and the tokenizer."""
    model, tokenizer = _load(gguf, None, torch.float32)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def base_files(spec: ModelSpec) -> Path | None:
    """The folder that holds a base as safetensors; None for a hub id, a GGUF file or a student."""
    where = None if spec.student_of is not None else _resolve(spec.name)
    if isinstance(where, Path) and (where / "run.json").exists():
        where = where / "model"
    found = isinstance(where, Path) and any(where.glob("*.safetensors"))
    return where if found and isinstance(where, Path) else None


def compute_dtype(wanted: str, device: torch.device | None = None) -> torch.dtype:
    """The dtype products run in. `auto` takes bfloat16 only where hardware multiplies it."""
    if wanted != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[wanted]
    if device is not None and device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def fingerprint(where: Path | str, config: Any) -> str:
    """Names the weights, whatever dtype they are loaded in: SHA-256 over the files, or a hub id with its commit."""
    if isinstance(where, str):
        return f"{where}@{getattr(config, '_commit_hash', None)}"
    files = [where] if where.is_file() else sorted(where.glob("*.safetensors"))
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def _resolve(name: str) -> Path | str:
    """A folder or GGUF file on disk, or a hub id."""
    if name in CATALOG:
        return fetch(name)
    path = Path(name).expanduser()
    if path.is_dir():
        if (path / "run.json").exists() or (path / "config.json").exists():
            return path
        raise ConfigError(
            "this folder holds neither a model (config.json) nor a run (run.json)", where="model.name", given=name
        )
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return path
        raise ConfigError(
            "this file is not a model", where="model.name", given=name, allowed="a .gguf file or a folder"
        )
    looks_like_hub = name.count("/") == 1 and not name.startswith((".", "/", "~")) and not path.parent.exists()
    if looks_like_hub:
        return name
    near = did_you_mean(name, list(CATALOG))
    raise ConfigError(
        "no such model",
        where="model.name",
        given=name,
        allowed=f"{', '.join(CATALOG)}, a folder, a .gguf file, a run folder, or a hub id owner/name",
        hint=f"did you mean {near}?" if near else None,
    )


def _load(
    where: Path | str, revision: str | None, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    if isinstance(where, Path) and where.suffix.lower() == ".gguf":
        return _load_gguf(where, dtype)
    config = _from_pretrained(AutoConfig, where, revision)
    _refuse(config)
    _without_dropout(config)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            where,
            config=config,
            revision=revision,
            dtype=dtype,
            attn_implementation=attention.NAME,
            use_safetensors=True,
            **NO_CODE,
        )
        tokenizer = AutoTokenizer.from_pretrained(where, revision=revision, **NO_CODE)
    except (OSError, ValueError) as error:
        raise ConfigError(_first_line(error), where="model.name", given=str(where)) from error
    return model, tokenizer


def _load_gguf(where: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    try:
        config = AutoConfig.from_pretrained(where.parent, gguf_file=where.name, **NO_CODE)
        _refuse(config)
        _without_dropout(config)
        model = AutoModelForCausalLM.from_pretrained(
            where.parent,
            config=config,
            gguf_file=where.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=dtype,
            **NO_CODE,
        )
        return model, _gguf_tokenizer(where)
    except RungError:
        raise
    except Exception as error:  # the reader fails in many ways on a file that is no GGUF
        raise ConfigError(
            f"this GGUF file cannot be read: {_first_line(error)}", where="model.name", given=str(where)
        ) from error


def _without_dropout(config: Any) -> None:
    """Dropout that a base ships with (GPT-2, Phi-2: 0.1) would make packed and unpacked runs differ."""
    for name in ("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "hidden_dropout", "dropout"):
        if isinstance(getattr(config, name, None), float):
            setattr(config, name, 0.0)


def _from_pretrained(auto: Any, where: Path | str, revision: str | None) -> Any:
    try:
        return auto.from_pretrained(where, revision=revision, **NO_CODE)
    except Exception as error:  # a folder that is not what it says fails in many ways
        hint = (
            "hub ids need a network; folders, GGUF files and `rung models` do not" if isinstance(where, str) else None
        )
        if "trust_remote_code" in str(error):
            hint = "code that comes with a model never runs here: take a model that transformers knows"
        raise ConfigError(_first_line(error), where="model.name", given=str(where), hint=hint) from error


def _refuse(config: Any) -> None:
    if reason := refusal_of_model(
        config.model_type, encoder_decoder=bool(getattr(config, "is_encoder_decoder", False))
    ):
        raise PlanError(reason, where="model.name", given=config.model_type)


def _finished(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    spec: ModelSpec,
    weights: str,
    compute: torch.dtype,
    device: torch.device | None,
) -> Base:
    if len(tokenizer) < 2 or tokenizer.decode(tokenizer.encode("a b", add_special_tokens=False)).strip() != "a b":
        raise CheckpointError(
            "the tokenizer does not give text back", where=spec.name, given=f"{len(tokenizer)} tokens"
        )
    model.set_attn_implementation(attention.NAME)
    model.requires_grad_(False)
    model.eval()
    if device is not None:
        model.to(device)
    if spec.fused:
        fuse(model)
    return Base(model, tokenizer, spec.name, weights, compute)


def _load_run_as_base(spec: ModelSpec, run: Path, device: torch.device | None) -> Base:
    """A finished run as a starting point: its full model, or its base with the adapter folded in."""
    manifest = json.loads((run / "run.json").read_text())
    compute = compute_dtype(spec.dtype, device)
    if manifest["spec"].get("objective", {}).get("kind") == "reward":
        raise PlanError(
            "this run is a reward model: it gives scores and writes nothing",
            where="model.name",
            given=str(run),
            hint="train a policy with it: objective: {kind: ppo, reward: {kind: model, run: RUN}}",
        )
    if manifest.get("status") != "finished" or not ((run / "model").is_dir() or (run / "adapter").is_dir()):
        raise CheckpointError(
            f"this run is not finished (status {manifest.get('status')})", where=str(run), hint="rung train --resume"
        )
    folder = run / ("model" if (run / "model").is_dir() else "adapter")
    check_whole(folder)
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError("this folder holds no safetensors, and a pickle is not read", where=str(folder))
    if (run / "model").is_dir():
        model, tokenizer = _load(run / "model", None, compute)
        return _finished(model, tokenizer, spec, fingerprint(run / "model", model.config), compute, device)
    kind = json.loads((run / "adapter" / "adapter_config.json").read_text()).get("peft_type")
    if manifest["spec"]["method"]["kind"] == "qlora":
        raise PlanError(
            "this run was trained on a quantised base, and the weights from before are another model",
            where="model.name",
            given=str(run),
            hint="rung merge makes a model of the two that can be a base",
        )
    if kind != "LORA":
        raise PlanError(
            "this run's adapter cannot be folded into its base, so the run is no base for another",
            where="model.name",
            given=f"{run}, {kind}",
            allowed="runs of full, head and lora",
        )
    base = load_base(ModelSpec.model_validate({**manifest["spec"]["model"], "dtype": spec.dtype}), device=device)
    check_fingerprint(manifest, base, run)
    base.model.float()  # bfloat16 would round B A away
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft calls a deprecated transformers name
        warnings.filterwarnings("error", "Found missing adapter keys")  # it would leave them at their start
        from peft import PeftModel

        try:
            model = PeftModel.from_pretrained(base.model, str(run / "adapter")).merge_and_unload().to(compute)
        except (UserWarning, RuntimeError) as error:
            raise CheckpointError(f"this adapter does not fit its base: {error}", where=str(run)) from error
    weights = hashlib.sha256(f"{base.fingerprint} {fingerprint(run / 'adapter', None)}".encode()).hexdigest()
    return _finished(model, load_tokenizer(spec), spec, weights, compute, device)


def classifier_keys(folder: Path) -> tuple[str, set[str]] | None:
    """Transformers' sequence classification of a model folder and its tensors' names, where it has a linear `score`."""
    config = AutoConfig.from_pretrained(folder, num_labels=1, **NO_CODE)
    try:
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config)
    except ValueError:
        return None
    keys = set(model.state_dict())
    return (type(model).__name__, keys) if "score.weight" in keys else None


def check_fingerprint(manifest: dict[str, Any], base: Base, run: Path) -> None:
    """An adapter on another base is a different model: refuse it."""
    expected = manifest["fingerprints"]["base"]
    if base.fingerprint != expected:
        raise CheckpointError(
            "this run was trained on another base",
            where=str(run),
            given=f"{base.name}: {base.fingerprint[:16]}",
            allowed=f"the base with fingerprint {expected[:16]}",
        )


def _gguf_tokenizer(gguf: Path) -> PreTrainedTokenizerFast:
    """A GGUF file's tokenizer, mended where transformers loses something.

    GGUF files of the SmolLM family say `pre = smollm`; transformers builds a plain byte-level pre-tokenizer from them
    and loses the splitting of digits, so numbers would reach the model in pieces it never saw. It also pads with the
    end of turn, which the family does not.
    """
    from gguf import GGUFReader

    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, **NO_CODE)
    field = GGUFReader(str(gguf)).fields.get("tokenizer.ggml.pre")
    if field is None or bytes(field.parts[field.data[0]]).decode() != "smollm":
        return tokenizer
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
    )
    tokenizer.pad_token = "<|endoftext|>"  # noqa: S105 - a token of text, not a secret
    return tokenizer


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
