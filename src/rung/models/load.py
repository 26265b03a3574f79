"""From a model name to a `BaseModel`: catalog name, folder, GGUF file, hub id, or a finished run.

The only file that knows transformers' Auto classes, so dtype, attention function, dropout and refused code are set in
one place. A run with an adapter becomes a base by merging the adapter into a copy of its base: that costs a load in
float32, and afterwards the model trains like any other. `runs/load.py` and `runs/train.py` call `load_base`.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from rung.config.model import ModelConfig
from rung.config.model_catalog import CATALOG
from rung.console import print_status
from rung.errors import CheckpointError, ConfigError, PlanError, did_you_mean
from rung.files import check_safetensors, is_run_folder, read_safetensors_header, require_undamaged
from rung.models import attention
from rung.models.base_folder import TOKENIZER_FILES, check_base_folder, check_tokenizer, require_finite_weights
from rung.models.base_model import (
    NO_REMOTE_CODE,
    BaseModel,
    LoadedWeights,
    compute_dtype,
    fingerprint,
    prepare_config,
    quiet_transformers,
    require_all_weights,
)
from rung.models.bfloat16_storage import compute_in_float32, stored_dtype
from rung.models.download import convert_gguf_once, download_base, download_snapshot
from rung.models.fused_modules import install_fused_forwards
from rung.models.gguf_reader import gguf_tokenizer, load_gguf, message_of
from rung.models.layers import drop_layers
from rung.models.matmul_routine import settle_routine_once
from rung.models.streaming import LinearPlacement, leave_linears_stored
from rung.models.threads import adapt_threads
from rung.models.weight_files import ShardedLoading, leave_in_files, parameters_on_meta
from rung.planning.architecture import (
    adapter_base_name,
    adapter_config,
    is_adapter_folder,
)
from rung.planning.hub import hub_error, hub_options, is_hub_id

GENERATION_FILE = "generation_config.json"


def load_base(
    config: ModelConfig,
    *,
    device: torch.device | None = None,
    stream_linears: bool = False,
    heads: Collection[str] = (),
    sharded: ShardedLoading | None = None,
) -> BaseModel:
    """Load model and tokenizer with Rung's attention, in eval mode, with no trainable parameter.

    `stream_linears` leaves the linears of the layers in their file, for a method that quantizes all of them; until then
    the base cannot compute (`models/streaming.py`). `heads` are tensors that its files may have or lack. With `sharded`
    weights stay in their files until each process reads its rows (`models/weight_files.py`).
    Raises `ConfigError` for an unknown name and for tensors that are not those of the model, `PlanError` for an
    unsupported architecture and for a base that has no files of its own to read rows from.
    """
    attention.register()
    adapt_threads()
    compute = compute_dtype(config.dtype, device)
    if compute is torch.float32 and (device is None or device.type == "cpu"):
        settle_routine_once(config.matmul)
    if config.student_of is not None:
        full_model = {"name": config.student_of, "student_of": None, "layers": None}
        options: dict[str, Any] = {"device": device, "stream_linears": stream_linears, "sharded": sharded}
        teacher = load_base(config.model_copy(update=full_model), **options)
        student = drop_layers(teacher, config.layers or "every_other")
        _name_for_peft(student.model, f"student of {config.student_of}")
        return student
    source = _resolve_name(config.name, config.revision)
    load = _load_weights if sharded is None else _loader_of_rows(sharded, source, config.name, device)
    read_whole = _call if sharded is None else sharded.on_rank0
    if isinstance(source, Path) and is_run_folder(source):
        return _load_run_as_base(config, source, device, load, read_whole)
    if isinstance(source, Path) and is_adapter_folder(source):
        return _load_adapter_as_base(config, source, device)
    original, source = source, _converted(source)
    if sharded is not None and isinstance(source, str):
        source = download_snapshot(source, config.revision)
    if isinstance(source, Path) and source.is_dir():
        check_base_folder(source)
        check_tokenizer(source)
    stored = stored_dtype(source) if isinstance(source, Path) and source.is_dir() else None
    # Only the fused functions widen a bfloat16 weight; transformers' linear would refuse the mixed types.
    keep_bfloat16 = config.fused and compute is torch.float32 and stored is torch.bfloat16
    loaded = torch.bfloat16 if keep_bfloat16 else compute
    read_as = stored if stream_linears and stored is not None else loaded
    model, tokenizer = load(source, config.revision, read_as, heads)
    # Loading in 16 bits rounded a buffer that is not in the file (a scale, a frequency): load again in float32.
    if compute is torch.float32 and read_as is not compute and any(b.dtype is read_as for b in model.buffers()):
        read_as, loaded, keep_bfloat16 = compute, compute, False
        model, _ = load(source, config.revision, compute, heads)
    require_finite_weights(model, original)
    if keep_bfloat16:
        compute_in_float32(model)
    placement = LinearPlacement(device or torch.device("cpu"), loaded, compute) if stream_linears else None
    _set_known_template(tokenizer, config.name)
    weights_hash = read_whole(partial(fingerprint, original, model.config))
    return _prepare_base((model, tokenizer), config, weights_hash, compute, device, placement)


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerFast:
    """Load only the tokenizer, no weights."""
    source = _resolve_name(config.student_of or config.name, config.revision)
    if isinstance(source, Path) and is_run_folder(source):
        folder = next((source / name for name in ("model", "adapter") if (source / name).is_dir()), source)
        return _from_pretrained(AutoTokenizer, folder, None)
    if isinstance(source, Path) and is_adapter_folder(source):
        return _adapter_tokenizer(config, source)
    source = _converted(source)
    if isinstance(source, Path) and source.suffix.lower() == ".gguf":
        return gguf_tokenizer(source)
    if isinstance(source, Path):
        check_tokenizer(source)
    tokenizer = _from_pretrained(AutoTokenizer, source, config.revision)
    _set_known_template(tokenizer, config.student_of or config.name)
    return tokenizer


def load_end_ids(config: ModelConfig) -> tuple[int, ...]:
    """The tokens at which a model ends a text, by its generation config and its config, as `BaseModel.end_ids`.

    No weights are loaded. Empty for a GGUF file that was not converted, whose tokenizer knows its only end token.
    """
    source = _resolve_name(config.student_of or config.name, config.revision)
    if isinstance(source, Path) and is_run_folder(source):
        source = next((source / name for name in ("model", "adapter") if (source / name).is_dir()), source)
    source = _converted(source)
    if isinstance(source, Path) and source.suffix.lower() == ".gguf":
        return ()
    ids: list[int] = []
    for config_class in (GenerationConfig, AutoConfig):
        try:
            value = _from_pretrained(config_class, source, config.revision).eos_token_id
        except ConfigError:
            continue  # a folder may have only one of them, or neither
        ids += value if isinstance(value, list | tuple) else [] if value is None else [value]
    return tuple(dict.fromkeys(map(int, ids)))


def _set_known_template(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    """Give the tokenizer of a base of the catalog its template, where it comes without one."""
    if name in CATALOG and not tokenizer.chat_template:
        tokenizer.chat_template = CATALOG[name].template


def base_files(config: ModelConfig) -> Path | None:
    """The folder with a base's safetensors files; None for a hub id, a student or an adapter."""
    source = None if config.student_of is not None else _resolve_name(config.name)
    if not isinstance(source, Path) or (is_adapter_folder(source) and not is_run_folder(source)):
        return None
    converted = _converted(source)
    folder = source / "model" if is_run_folder(source) else Path(converted)
    return folder if any(folder.glob("*.safetensors")) else None


def stored_fingerprint(config: ModelConfig) -> str | None:
    """The fingerprint that loading a folder or GGUF file would give; None for bases that are made of others."""
    source = None if config.student_of is not None else _resolve_name(config.name)
    if not isinstance(source, Path) or is_run_folder(source) or is_adapter_folder(source):
        return None
    return fingerprint(source, None)


def load_model_config(folder: Path) -> Any:
    """The transformers config of a model folder, with the defaults of its architecture."""
    return _from_pretrained(AutoConfig, folder, None)


def _resolve_name(name: str, revision: str | None = None) -> Path | str:
    """Return a folder or GGUF file on disk, or a hub id.

    Raises `ConfigError` for anything else, and for a revision of what is not on the hub.
    """
    if name in CATALOG and CATALOG[name].hub_id is not None:
        return download_base(name, revision)
    if revision is not None and not is_hub_id(name):
        reason = "a revision is one of a hub id, and this base is a file here"
        raise ConfigError(reason, where="model.revision", given=revision, hint="leave model.revision out")
    if name in CATALOG:
        return download_base(name)
    path = Path(name).expanduser()
    if path.is_dir():
        if is_run_folder(path) or (path / "config.json").exists() or is_adapter_folder(path):
            return path
        reason = "this folder holds no model (config.json), adapter (adapter_config.json) or run (run.json)"
        raise ConfigError(reason, where="model.name", given=name)
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return path
        allowed = "a .gguf file or a folder"
        raise ConfigError("this file is not a model", where="model.name", given=name, allowed=allowed)
    if is_hub_id(name):
        return name
    suggestion = did_you_mean(name, list(CATALOG))
    hint = f"did you mean {suggestion}?" if suggestion else None
    allowed = f"{', '.join(CATALOG)}, a folder, a .gguf file, a run folder, or a hub id owner/name"
    raise ConfigError("no such model", where="model.name", given=name, allowed=allowed, hint=hint)


def _load_weights(
    source: Path | str, revision: str | None, dtype: torch.dtype, heads: Collection[str] = ()
) -> LoadedWeights:
    if isinstance(source, Path) and source.suffix.lower() == ".gguf":
        return load_gguf(source, dtype)
    config = _from_pretrained(AutoConfig, source, revision)
    prepare_config(config)
    options = {"config": config, "dtype": dtype, "attn_implementation": attention.NAME, "use_safetensors": True}
    # mismatched shapes are reported below with the rest, by name
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    if isinstance(source, str):
        options |= hub_options()
    try:
        with quiet_transformers():
            model, report = AutoModelForCausalLM.from_pretrained(source, revision=revision, **options, **NO_REMOTE_CODE)
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        if isinstance(source, str):
            raise hub_error(source, error) from error
        raise ConfigError(message_of(error), where="model.name", given=str(source)) from error
    tokenizer = _from_pretrained(AutoTokenizer, source, revision)
    require_all_weights(report, source, heads)
    return model, tokenizer


_Load = Callable[[Path | str, str | None, torch.dtype, Collection[str]], LoadedWeights]


def _loader_of_rows(sharded: ShardedLoading, source: Path | str, name: str, device: torch.device | None) -> _Load:
    _require_own_files(source, name)
    return partial(_build_on_meta, sharded, device or torch.device("cpu"))


def _build_on_meta(
    sharded: ShardedLoading,
    device: torch.device,
    source: Path | str,
    revision: str | None,
    dtype: torch.dtype,
    heads: Collection[str] = (),
) -> LoadedWeights:
    """The model of a folder with its weights still in the files, and the tokenizer; arguments as `_load_weights`."""
    folder, config = Path(source), _from_pretrained(AutoConfig, source, revision)
    prepare_config(config)
    options = {"dtype": dtype, "attn_implementation": attention.NAME}
    with quiet_transformers(), parameters_on_meta():
        model = AutoModelForCausalLM.from_config(config, **options, **NO_REMOTE_CODE)
    config._commit_hash = (
        folder.name
    )  # the hub's cache names a snapshot by its commit; `fingerprint` reads it for hub ids
    if (folder / GENERATION_FILE).exists():
        model.generation_config = _from_pretrained(GenerationConfig, source, revision)
    leave_in_files(model, folder, dtype, device, trains_base=sharded.trains_base)
    return model, _from_pretrained(AutoTokenizer, source, revision)


def _require_own_files(source: Path | str, name: str) -> None:
    """Raise `PlanError` for a base in parts whose weights are not as they are in the files of one folder."""
    if not isinstance(source, Path):
        return
    reason, hint = None, "make files of them with rung merge, and take that folder"
    if is_adapter_folder(source):
        reason = "the weights of this base are those of a model with an adapter added to them"
    elif is_run_folder(source) and not (source / "model").is_dir():
        reason = "the weights of this run are those of its base with an adapter added to them"
    elif source.suffix.lower() == ".gguf" and _converted(source) == source:
        reason, hint = "the disk has no room to convert this file", "make room, or name another folder in RUNG_CACHE"
    if reason is not None:
        raise PlanError(f"a base in parts is read row by row: {reason}", where="model.name", given=name, hint=hint)


def _from_pretrained(auto_class: Any, source: Path | str, revision: str | None) -> Any:
    try:
        with quiet_transformers():
            options = hub_options() if isinstance(source, str) else {}
            return auto_class.from_pretrained(source, revision=revision, **options, **NO_REMOTE_CODE)
    except Exception as error:  # a damaged folder raises many types of exception
        hint = None
        if "trust_remote_code" in str(error):
            hint = "code that comes with a model never runs here: take a model that transformers knows"
        elif isinstance(source, str):
            raise hub_error(source, error) from error
        raise ConfigError(message_of(error), where="model.name", given=str(source), hint=hint) from error


def _converted(source: Path | str) -> Path | str:
    """The folder that a GGUF file was converted into, for a GGUF file that the disk has room for; else the source."""
    if isinstance(source, Path) and source.suffix.lower() == ".gguf":
        return convert_gguf_once(source) or source
    return source


def _prepare_base(
    weights: LoadedWeights,
    config: ModelConfig,
    weights_hash: str,
    compute: torch.dtype,
    device: torch.device | None,
    placement: LinearPlacement | None = None,
) -> BaseModel:
    model, tokenizer = weights
    # A tokenizer that does not decode what it encodes comes from a damaged or unsupported file.
    if len(tokenizer) < 2 or tokenizer.decode(tokenizer.encode("a b", add_special_tokens=False)).strip() != "a b":
        given = f"{len(tokenizer)} tokens"
        raise CheckpointError("the tokenizer does not give text back", where=config.name, given=given)
    # Also here: GGUF files and merged runs are loaded without it.
    model.set_attn_implementation(attention.NAME)
    model.requires_grad_(False).eval()
    if placement is not None:
        leave_linears_stored(model, placement)  # the method installs the fused functions when it is attached
        return BaseModel(model, tokenizer, config.name, weights_hash, compute)
    if device is not None:
        _move(model, device)
    if config.fused:
        install_fused_forwards(model)
    return BaseModel(model, tokenizer, config.name, weights_hash, compute)


def _move(model: nn.Module, device: torch.device) -> None:
    """Move a model to a device; parameters that are still in their files go there when they are read."""
    if not any(parameter.is_meta for parameter in model.parameters()):
        model.to(device)
        return
    for parameter in model.parameters():
        if not parameter.is_meta:
            parameter.data = parameter.data.to(device)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def _call(work: Callable[[], Any]) -> Any:
    return work()


def _load_run_as_base(
    config: ModelConfig,
    run: Path,
    device: torch.device | None,
    load: _Load,
    read_whole: Callable[[Callable[[], Any]], Any],
) -> BaseModel:
    """Load a finished run as a base: its full model by `load`, or its base with the adapter merged.

    `read_whole` calls what hashes the files, in one process for all that share the base.
    """
    manifest = json.loads((run / "run.json").read_text())
    compute = compute_dtype(config.dtype, device)
    if manifest["config"].get("objective", {}).get("kind") == "reward":
        reason = "this run is a reward model: it gives scores and writes nothing"
        hint = "train a policy with it: objective: {kind: ppo, reward: {kind: model, run: RUN}}"
        raise PlanError(reason, where="model.name", given=str(run), hint=hint)
    folder = run / ("model" if (run / "model").is_dir() else "adapter")
    if (state := manifest.get("status")) != "finished" or not folder.is_dir():
        raise CheckpointError(f"this run is not finished (status {state})", where=str(run), hint="rung train --resume")
    read_whole(partial(require_undamaged, folder))
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError("this folder holds no safetensors, and a pickle is not read", where=str(folder))
    if folder.name == "model":
        weights = load(folder, None, compute, ())
        weights_hash = read_whole(partial(fingerprint, folder, weights[0].config))
        return _prepare_base(weights, config, weights_hash, compute, device)
    peft_type = json.loads((folder / "adapter_config.json").read_text()).get("peft_type")
    if manifest["config"]["method"]["kind"] == "qlora":
        reason = "this run was trained on a quantized base, and the weights from before are another model"
        hint = "rung merge makes a model of the two that can be a base"
        raise PlanError(reason, where="model.name", given=str(run), hint=hint)
    if peft_type != "LORA":
        reason = "this run's adapter cannot be folded into its base, so the run is no base for another"
        allowed = "runs of full, head and lora"
        raise PlanError(reason, where="model.name", given=f"{run}, {peft_type}", allowed=allowed)
    settings = {**manifest["config"]["model"], "dtype": config.dtype, "matmul": config.matmul}
    base = load_base(ModelConfig.model_validate(settings), device=device)
    check_fingerprint(manifest, base, run)
    return _merge_into_base(config, base, folder, load_tokenizer(config), device)


def _load_adapter_as_base(config: ModelConfig, folder: Path, device: torch.device | None) -> BaseModel:
    """Load the adapter of another tool, as peft saves it, as a base: the model that it names, with it merged."""
    adapter_base = adapter_base_name(folder)
    if (peft_type := adapter_config(folder).get("peft_type")) != "LORA":
        reason = "this adapter cannot be folded into its base, so it is no base for another run"
        raise PlanError(reason, where="model.name", given=f"{folder}, {peft_type}", allowed="LORA")
    if not any(folder.glob("*.safetensors")):
        hint = "save it again with peft, whose save_pretrained writes adapter_model.safetensors"
        reason = "this adapter has no adapter_model.safetensors, and a pickle is not read"
        raise ConfigError(reason, where=str(folder), hint=hint)
    for file in folder.glob("*.safetensors"):
        check_safetensors(file)
    print_status(f"the base is {adapter_base} with the adapter in {folder}")
    base = load_base(config.model_copy(update={"name": adapter_base}), device=device)
    return _merge_into_base(config, base, folder, _adapter_tokenizer(config, folder), device)


def _adapter_tokenizer(config: ModelConfig, folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer that was saved with an adapter, else that of its base."""
    if any((folder / name).exists() for name in TOKENIZER_FILES):
        return _from_pretrained(AutoTokenizer, folder, None)
    return load_tokenizer(config.model_copy(update={"name": adapter_base_name(folder), "student_of": None}))


def _merge_into_base(
    config: ModelConfig,
    base: BaseModel,
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    device: torch.device | None,
) -> BaseModel:
    """The base with the LoRA adapter of `folder` merged. Raises `CheckpointError` where it does not fit."""
    compute = compute_dtype(config.dtype, device)
    _refuse_tied_embeddings(base, folder)
    base.model.float()  # in bfloat16 the sum would round B A away
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft calls a deprecated transformers name
        # Missing keys would leave those adapters at their initial values.
        warnings.filterwarnings("error", "Found missing adapter keys")
        from peft import PeftModel

        try:
            adapter = PeftModel.from_pretrained(base.model, str(folder))
            _require_adapter_tensors(adapter, folder)
            model = adapter.merge_and_unload().to(compute)
        except (UserWarning, RuntimeError, ValueError, KeyError, TypeError) as error:
            summary = f"this adapter does not fit its base: {message_of(error)}"
            raise CheckpointError(summary, where=str(folder), given=base.name) from error
    # The merged model has no file; base and adapter identify it.
    weights_hash = hashlib.sha256(f"{base.fingerprint} {fingerprint(folder, None)}".encode()).hexdigest()
    _name_for_peft(model, config.name)
    return _prepare_base((model, tokenizer), config, weights_hash, compute, device)


def _name_for_peft(model: Any, name: str) -> None:
    """What an adapter on this model says of its base: the files that it was made of are another model."""
    model.name_or_path = model.config._name_or_path = name


def _refuse_tied_embeddings(base: BaseModel, folder: Path) -> None:
    """Raise `PlanError` for an adapter on the embeddings or the head of a model that ties them.

    A merge would change both, and a file of the merged model has one matrix for two (peft issue 2018).
    """
    model: Any = base.model
    if model.get_input_embeddings().weight is not model.get_output_embeddings().weight:
        return
    tied_modules = (model.get_input_embeddings(), model.get_output_embeddings())
    tied_names = {name.rpartition(".")[2] for name, module in model.named_modules() if module in tied_modules}
    stored = {name for file in folder.glob("*.safetensors") for name in read_safetensors_header(file)[0]}
    if changed := sorted(name for name in stored if tied_names & set(name.split("."))):
        summary = "this adapter changes the embeddings or the head, which its base holds as one matrix"
        hint = "train it on linears of the layers alone (target_modules without lm_head and embed_tokens)"
        raise PlanError(summary, where=str(folder), given=changed[0], hint=hint)


def _require_adapter_tensors(adapter: Any, folder: Path) -> None:
    """Raise `CheckpointError` for tensors of an adapter file that peft did not load; it drops them without a word."""
    from peft import get_peft_model_state_dict

    stored = {name for file in folder.glob("*.safetensors") for name in read_safetensors_header(file)[0]}
    if left_over := sorted(stored - {"__metadata__"} - set(get_peft_model_state_dict(adapter))):
        summary = "this adapter has tensors that its config does not describe"
        raise CheckpointError(summary, where=str(folder), given=", ".join(left_over[:3]))


def classifier_keys(folder: Path) -> tuple[str, set[str]] | None:
    """Name and tensor names of transformers' sequence classifier for a model folder; None without a linear `score`."""
    config = AutoConfig.from_pretrained(folder, num_labels=1, **NO_REMOTE_CODE)
    try:
        # On the meta device: only the names are needed, no memory for the weights.
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config)
    except ValueError:
        return None
    keys = set(model.state_dict())
    return (type(model).__name__, keys) if "score.weight" in keys else None


def check_fingerprint(manifest: dict[str, Any], base: BaseModel, run: Path) -> None:
    """Raise `CheckpointError` if the base is not the one the run was trained on."""
    expected = manifest["fingerprints"]["base"]
    if base.fingerprint != expected:
        given, allowed = f"{base.name}: {base.fingerprint[:16]}", f"the base with fingerprint {expected[:16]}"
        raise CheckpointError("this run was trained on another base", where=str(run), given=given, allowed=allowed)
