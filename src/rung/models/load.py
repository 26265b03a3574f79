"""From a name to a base: the only file that knows transformers' Auto classes."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from rung.config.catalog import CATALOG
from rung.config.model import ModelConfig
from rung.errors import CheckpointError, ConfigError, PlanError, did_you_mean
from rung.files import is_run_folder, require_undamaged
from rung.models import attention
from rung.models.base_model import (
    NO_CODE,
    BaseModel,
    compute_dtype,
    disable_dropout,
    fingerprint,
    first_line,
    refuse_unsupported,
)
from rung.models.bfloat16_weights import compute_in_float32, has_rounded_buffers, stored_in_bfloat16
from rung.models.download import download_base
from rung.models.fused_modules import install_fused_forwards
from rung.models.gguf import gguf_tokenizer, load_gguf
from rung.models.layers import drop_layers


def load_base(config: ModelConfig, *, device: torch.device | None = None) -> BaseModel:
    """Load model and tokenizer, ready for segment trees, in eval mode, nothing trainable.

    Raises `ConfigError` for an unknown name, `PlanError` for an architecture Rung cannot take.
    """
    attention.register()
    logging.disable_progress_bar()  # a bar of half a second on stderr helps nobody
    if config.student_of is not None:
        whole = {"name": config.student_of, "student_of": None, "layers": None}
        return drop_layers(load_base(config.model_copy(update=whole), device=device), config.layers or "every_other")
    where = _resolve_name(config.name)
    if isinstance(where, Path) and is_run_folder(where):
        return _load_run_as_base(config, where, device)
    compute = compute_dtype(config.dtype, device)
    narrow = config.fused and compute is torch.float32 and isinstance(where, Path) and where.is_dir()
    narrow = narrow and stored_in_bfloat16(Path(where))
    model, tokenizer = _load(where, config.revision, torch.bfloat16 if narrow else compute)
    if narrow and has_rounded_buffers(model):
        model, narrow = _load(where, config.revision, compute)[0], False
    if narrow:
        compute_in_float32(model)
    return _finished(model, tokenizer, config, fingerprint(where, model.config), compute, device)


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerFast:
    """The tokenizer alone, no weights."""
    where = _resolve_name(config.student_of or config.name)
    if isinstance(where, Path) and is_run_folder(where):
        inside = next((where / name for name in ("model", "adapter") if (where / name).is_dir()), where)
        return _from_pretrained(AutoTokenizer, inside, None)
    if isinstance(where, Path) and where.suffix.lower() == ".gguf":
        return gguf_tokenizer(where)
    return _from_pretrained(AutoTokenizer, where, config.revision)


def base_files(config: ModelConfig) -> Path | None:
    """The folder that holds a base as safetensors; None for a hub id, a GGUF file or a student."""
    where = None if config.student_of is not None else _resolve_name(config.name)
    if isinstance(where, Path) and is_run_folder(where):
        where = where / "model"
    found = isinstance(where, Path) and any(where.glob("*.safetensors"))
    return where if found and isinstance(where, Path) else None


def _resolve_name(name: str) -> Path | str:
    """A folder or GGUF file on disk, or a hub id."""
    if name in CATALOG:
        return download_base(name)
    path = Path(name).expanduser()
    if path.is_dir():
        if is_run_folder(path) or (path / "config.json").exists():
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
        return load_gguf(where, dtype)
    config = _from_pretrained(AutoConfig, where, revision)
    refuse_unsupported(config)
    disable_dropout(config)
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
        raise ConfigError(first_line(error), where="model.name", given=str(where)) from error
    return model, tokenizer


def _from_pretrained(auto: Any, where: Path | str, revision: str | None) -> Any:
    try:
        return auto.from_pretrained(where, revision=revision, **NO_CODE)
    except Exception as error:  # a folder that is not what it says fails in many ways
        hint = (
            "hub ids need a network; folders, GGUF files and `rung models` do not" if isinstance(where, str) else None
        )
        if "trust_remote_code" in str(error):
            hint = "code that comes with a model never runs here: take a model that transformers knows"
        raise ConfigError(first_line(error), where="model.name", given=str(where), hint=hint) from error


def _finished(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    config: ModelConfig,
    weights: str,
    compute: torch.dtype,
    device: torch.device | None,
) -> BaseModel:
    if len(tokenizer) < 2 or tokenizer.decode(tokenizer.encode("a b", add_special_tokens=False)).strip() != "a b":
        raise CheckpointError(
            "the tokenizer does not give text back", where=config.name, given=f"{len(tokenizer)} tokens"
        )
    model.set_attn_implementation(attention.NAME)
    model.requires_grad_(False)
    model.eval()
    if device is not None:
        model.to(device)
    if config.fused:
        install_fused_forwards(model)
    return BaseModel(model, tokenizer, config.name, weights, compute)


def _load_run_as_base(config: ModelConfig, run: Path, device: torch.device | None) -> BaseModel:
    """A finished run as a starting point: its full model, or its base with the adapter folded in."""
    manifest = json.loads((run / "run.json").read_text())
    compute = compute_dtype(config.dtype, device)
    if manifest["config"].get("objective", {}).get("kind") == "reward":
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
    require_undamaged(folder)
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError("this folder holds no safetensors, and a pickle is not read", where=str(folder))
    if (run / "model").is_dir():
        model, tokenizer = _load(run / "model", None, compute)
        return _finished(model, tokenizer, config, fingerprint(run / "model", model.config), compute, device)
    kind = json.loads((run / "adapter" / "adapter_config.json").read_text()).get("peft_type")
    if manifest["config"]["method"]["kind"] == "qlora":
        raise PlanError(
            "this run was trained on a quantized base, and the weights from before are another model",
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
    base = load_base(ModelConfig.model_validate({**manifest["config"]["model"], "dtype": config.dtype}), device=device)
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
    return _finished(model, load_tokenizer(config), config, weights, compute, device)


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


def check_fingerprint(manifest: dict[str, Any], base: BaseModel, run: Path) -> None:
    """An adapter on another base is a different model: refuse it."""
    expected = manifest["fingerprints"]["base"]
    if base.fingerprint != expected:
        raise CheckpointError(
            "this run was trained on another base",
            where=str(run),
            given=f"{base.name}: {base.fingerprint[:16]}",
            allowed=f"the base with fingerprint {expected[:16]}",
        )
