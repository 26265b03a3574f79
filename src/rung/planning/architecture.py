"""The shape of a model: layer counts and widths from its config, read without torch and without weights.

Memory and time follow from these numbers, so `rung plan` works for a model that is not downloaded. It costs code for
each family of architectures; `tests/unit/test_planning.py` compares the counts with transformers' own models.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rung.config.base import LinearRole
from rung.config.layers import student_layers
from rung.config.model import ModelConfig
from rung.config.model_catalog import CATALOG
from rung.config.support import model_refusal, quantization_refusal
from rung.errors import CheckpointError, ConfigError, PlanError, did_you_mean
from rung.files import check_safetensors, converted_gguf_folder, is_run_folder
from rung.planning.hub import hub_config_path, is_hub_id

ADAPTER_CONFIG = "adapter_config.json"
_QKV: tuple[LinearRole, ...] = ("q", "k", "v")
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_UNTIED_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3", "phi", "phi3", "gpt_neox", "olmo2", "granite"})
"""Architectures whose head is untied unless the config ties it to the embeddings."""

_GGUF_KEYS = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
}
"""transformers' name of each setting -> llama.cpp's key after the architecture prefix."""

_MULTI_HEAD_TYPES = frozenset({"opt", "gpt2", "gpt_neox"})
"""Architectures without grouped keys, whatever a config says."""


@dataclass(frozen=True, slots=True)
class LinearShape:
    """A linear of one layer."""

    roles: tuple[LinearRole, ...]
    """Several for a fused projection."""
    inputs: int
    outputs: int
    bias: bool = False

    @property
    def parameters(self) -> int:
        """Weights and biases."""
        return self.inputs * self.outputs + (self.outputs if self.bias else 0)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a decoder."""

    kind: str
    """`model_type` of its config."""
    layers: int
    width: int
    """Hidden size."""
    heads: int
    kv_heads: int
    head_width: int
    mlp: int
    """Width of the feed-forward block."""
    vocabulary: int
    tied: bool
    """Whether the head shares the embedding matrix."""
    matrices: tuple[LinearShape, ...]
    """Linears of one layer."""
    norm_parameters: int
    """Parameters of a layer's norms."""
    other_parameters: int
    """Parameters outside the layers except embeddings and head: positions, the last norm, a head's bias."""
    stored_dtype: str
    """Dtype of the weights in the file: float32, bfloat16 or float16."""
    context: int
    """Longest document in tokens."""

    @property
    def kv(self) -> int:
        """Width of the keys of a layer, and of its values."""
        return self.kv_heads * self.head_width

    @property
    def query(self) -> int:
        """Width of the queries of a layer."""
        return self.heads * self.head_width

    @property
    def linear_parameters(self) -> int:
        """Parameters of a layer's linears."""
        return sum(m.parameters for m in self.matrices)

    @property
    def matrix_parameters(self) -> int:
        """Parameters of the matrices of all layers, without biases."""
        return self.layers * sum(m.inputs * m.outputs for m in self.matrices)

    def other_bytes(self, width: int, vector_width: int) -> int:
        """Bytes of everything else: norms, biases, embeddings, positions and an untied head.

        Plain embeddings and the head have `width` bytes a number, as matrices have. Norms, biases and embeddings of a
        class of their own (Gemma's, OPT's positions) have `vector_width`: they are widened once (decision 0010).
        """
        plain_positions = self.context * self.width if self.kind == "gpt2" else 0
        biases = sum(m.outputs for m in self.matrices if m.bias)
        vectors = self.layers * (self.norm_parameters + biases) + self.other_parameters - plain_positions
        embeddings = (vector_width if self.kind.startswith("gemma") else width) * self.embedding_parameters
        head = 0 if self.tied else width * self.embedding_parameters
        return embeddings + head + width * plain_positions + vector_width * vectors

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the embeddings, and of an untied head."""
        return self.vocabulary * self.width

    @property
    def parameters(self) -> int:
        """All parameters of the model."""
        layer_parameters = self.layers * (self.linear_parameters + self.norm_parameters)
        return layer_parameters + self.embedding_parameters * (1 if self.tied else 2) + self.other_parameters


def read_shape(config: ModelConfig) -> ModelShape:
    """The shape of a run's base, from its config.

    Raises `ConfigError` for a name without a config, `PlanError` for an unsupported architecture.
    """
    if config.student_of is not None:
        teacher = read_shape(config.model_copy(update={"name": config.student_of, "student_of": None, "layers": None}))
        return replace(teacher, layers=len(student_layers(config.layers or "every_other", teacher.layers)))
    if config.name in CATALOG:
        return shape_from_config(CATALOG[config.name].config)
    file = Path(config.name).expanduser()
    if file.suffix.lower() == ".gguf" and file.is_file():
        converted = converted_gguf_folder(file)
        if not (converted / "config.json").exists():
            return read_gguf_shape(file)
        return shape_from_config(json.loads((converted / "config.json").read_text()), "float32")
    folder = _model_folder(config)
    if folder is not None and is_run_folder(folder):
        return _shape_from_run(folder)
    if folder is not None and is_adapter_folder(folder):
        return read_shape(config.model_copy(update={"name": adapter_base_name(folder)}))
    path = folder / "config.json" if folder is not None else hub_config_path(config)
    try:
        model_json = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"this config cannot be read: {error}", where=str(path)) from error
    return shape_from_config(model_json, stored_type(path.parent))


def shape_from_config(config: Mapping[str, Any], stored: str | None = None) -> ModelShape:
    """The shape that a transformers config describes.

    Raises `PlanError` for an unsupported architecture, `ConfigError` if a number is missing.
    """
    if not isinstance(config, Mapping):
        raise ConfigError("this config is no object", where="config.json", given=type(config).__name__)
    kind = str(config.get("model_type", "llama"))
    if reason := model_refusal(config):
        raise PlanError(reason, where="model.name", given=kind)
    if refusal := quantization_refusal(config):
        raise ConfigError(refusal[0], where="model.name", hint=refusal[1])
    try:
        return _shape(kind, config, stored or _declared_dtype(config))
    except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        reason = f"this config lacks a number that the size of the model follows from: {error}"
        raise ConfigError(reason, where="config.json", given=kind) from error


def _shape(kind: str, config: Mapping[str, Any], stored: str) -> ModelShape:
    def number(*names: str, default: int | None = None) -> int:
        value = next((config[name] for name in names if config.get(name) is not None), default)
        if value is None:
            raise KeyError(names[0])
        return int(value)

    width, layers = number("hidden_size", "n_embd"), number("num_hidden_layers", "n_layer")
    heads = number("num_attention_heads", "n_head")
    # Old architectures have no such setting, and a stray one in a config is ignored by transformers.
    kv_heads = heads if kind in _MULTI_HEAD_TYPES else number("num_key_value_heads", default=heads)
    head_width = number("head_dim", default=width // heads)
    # a model without layers has nothing to train, and zero heads no width
    for name, value in (("hidden_size", width), ("num_hidden_layers", layers), ("num_attention_heads", heads)):
        if value < 1:
            raise ValueError(f"{name} is {value}")
    mlp = number("intermediate_size", "ffn_dim", "n_inner", default=4 * width)
    vocabulary = number("vocab_size")
    context = number("max_position_embeddings", "n_positions", default=2**20)
    # The head width may be set apart from hidden size over heads (Qwen3, Gemma).
    query, kv = heads * head_width, kv_heads * head_width
    matrices, vectors, outside = _layer_linears(kind, config, width, query, kv, mlp)
    # Learned positions (OPT has two more), and the bias of Phi's head.
    outside += {"gpt2": context * width, "opt": (context + 2) * width, "phi": vocabulary}.get(kind, 0)
    tied = bool(config.get("tie_word_embeddings", kind not in _UNTIED_TYPES))
    # in the order of the fields
    sizes = (kind, layers, width, heads, kv_heads, head_width, mlp, vocabulary)
    return ModelShape(
        *sizes,
        tied=tied,
        matrices=tuple(matrices),
        norm_parameters=vectors,
        other_parameters=outside,
        stored_dtype=stored,
        context=context,
    )


def _layer_linears(
    kind: str, config: Mapping[str, Any], width: int, query: int, kv: int, mlp: int
) -> tuple[list[LinearShape], int, int]:
    """The linears of a layer, the parameters of its norms, and those of the last norm."""
    if kind in ("gpt2", "opt", "phi", "gpt_neox"):  # biases everywhere, LayerNorm, no gate
        linears = _qkv(width, query, kv, fused=kind in ("gpt2", "gpt_neox"), bias=True)
        linears += [LinearShape(("o",), query, width, True), LinearShape(("up",), width, mlp, True)]
        linears.append(LinearShape(("down",), mlp, width, True))
        # Phi has one norm for attention and feed-forward block, which run in parallel.
        return linears, (1 if kind == "phi" else 2) * 2 * width, 2 * width
    if kind == "phi3":
        linears = [*_qkv(width, query, kv, fused=True, bias=False), LinearShape(("o",), query, width)]
        linears += [LinearShape(("gate", "up"), width, 2 * mlp), LinearShape(("down",), mlp, width)]
        return linears, 2 * width, width
    # Qwen2 has biases on q, k and v without a setting for them, and none on o.
    has_bias, mlp_bias = bool(config.get("attention_bias", kind == "qwen2")), bool(config.get("mlp_bias", False))
    linears = _qkv(width, query, kv, fused=False, bias=has_bias)
    linears += [LinearShape(("o",), query, width, has_bias and kind != "qwen2")]
    linears += [LinearShape(("gate",), width, mlp, mlp_bias), LinearShape(("up",), width, mlp, mlp_bias)]
    # Gemma also normalizes the output of each block; Qwen3 and Gemma 3 normalize queries and keys.
    norms = (4 if kind in ("gemma2", "gemma3_text") else 2) * width
    if kind in ("qwen3", "gemma3_text"):
        norms += 2 * (query // int(config["num_attention_heads"]))
    return [*linears, LinearShape(("down",), mlp, width, mlp_bias)], norms, width


def _qkv(width: int, query: int, kv: int, *, fused: bool, bias: bool) -> list[LinearShape]:
    if fused:
        return [LinearShape(_QKV, width, query + 2 * kv, bias)]
    return [LinearShape((role,), width, n, bias) for role, n in zip(_QKV, (query, kv, kv), strict=True)]


def stored_type(folder: Path) -> str | None:
    """The dtype of most weights in a model folder's safetensors files; None without such files."""
    bytes_by_dtype = Counter[str]()
    for file in sorted(folder.glob("*.safetensors")):
        for entry in check_safetensors(file).values():
            # By bytes: a few float32 norms in a bfloat16 file do not decide.
            start, end = entry["data_offsets"]
            bytes_by_dtype[entry["dtype"]] += end - start
    names = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    return names.get(bytes_by_dtype.most_common(1)[0][0]) if bytes_by_dtype else None


def _declared_dtype(config: Mapping[str, Any]) -> str:
    """The dtype that a config states; without one bfloat16, as most models are published in it."""
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    # An unknown dtype is planned at four bytes, the cautious choice.
    return dtype if dtype in DTYPE_BYTES else "float32"


def _model_folder(config: ModelConfig) -> Path | None:
    """The model's folder on this disk; None for a hub id."""
    path = Path(config.name).expanduser()
    if path.is_dir() and (is_run_folder(path) or (path / "config.json").exists() or is_adapter_folder(path)):
        return path
    if path.exists():
        reason = "this holds no model (config.json), adapter (adapter_config.json) or run (run.json)"
        raise ConfigError(reason, where="model.name", given=config.name)
    if is_hub_id(config.name):
        return None
    suggestion = did_you_mean(config.name, list(CATALOG))
    hint = f"did you mean {suggestion}?" if suggestion else None
    raise ConfigError("no such model", where="model.name", given=config.name, hint=hint)


def is_adapter_folder(path: Path) -> bool:
    """Whether a folder holds an adapter as peft saves it, and no model."""
    return (path / ADAPTER_CONFIG).exists() and not (path / "config.json").exists()


def adapter_config(folder: Path) -> dict[str, Any]:
    """The content of an adapter's config. Raises `ConfigError` where it cannot be read."""
    try:
        content = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"this config cannot be read: {error}", where=str(folder / ADAPTER_CONFIG)) from error
    if not isinstance(content, dict):
        raise ConfigError("this config is no object", where=str(folder / ADAPTER_CONFIG))
    return content


def adapter_base_name(folder: Path) -> str:
    """The model that an adapter was trained on, by its own config: a folder here or a hub id.

    Raises `ConfigError` where it names none, or a folder that is not here.
    """
    name = adapter_config(folder).get("base_model_name_or_path")
    hint = "set base_model_name_or_path in this file to the folder or hub id of its base"
    where = str(folder / ADAPTER_CONFIG)
    if not isinstance(name, str) or not name:
        raise ConfigError("this adapter does not say which model it belongs to", where=where, hint=hint)
    path = Path(name).expanduser()
    if not (path.is_dir() or path.is_file() or name in CATALOG or is_hub_id(name)):
        raise ConfigError("the base of this adapter is not here", where=where, given=name, hint=hint)
    if path.is_dir() and is_adapter_folder(path):
        summary = "the base of this adapter is an adapter itself"
        raise ConfigError(summary, where=where, given=name, hint="merge that one into its base first")
    return name


def _shape_from_run(folder: Path) -> ModelShape:
    """The shape of a run: of its own model if that was saved, else of its base."""
    if (folder / "model" / "config.json").exists():
        return read_shape(ModelConfig(name=str(folder / "model")))
    try:
        config = json.loads((folder / "run.json").read_text())["config"]["model"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"run.json is not the manifest of a run: {error}", where=str(folder)) from error
    model_config = ModelConfig.model_validate(config)
    # A manifest that names its own folder would recurse without end.
    if Path(model_config.student_of or model_config.name).resolve() == folder.resolve():
        raise CheckpointError("this run says that it stands on itself", where=str(folder))
    return read_shape(model_config)


def open_gguf(file: Path) -> tuple[Any, str]:
    """A `gguf.GGUFReader` of the file and its architecture. Raises `ConfigError` for a file that is not GGUF."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
        return reader, str(reader.fields["general.architecture"].contents())
    except Exception as error:  # the reader raises many types
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"this GGUF file cannot be read: {reason}", where=str(file)) from error


def read_gguf_shape(file: Path) -> ModelShape:
    """Shape from llama.cpp's keys; the loaded weights are float32."""
    reader, kind = open_gguf(file)
    keys = {name: f"{kind}.{key}" for name, key in _GGUF_KEYS.items()}
    settings = {name: reader.fields[key].contents() for name, key in keys.items() if key in reader.fields}
    tensors = {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}
    # The embedding tensor, because the key for the vocabulary size is optional.
    vocabulary = max(tensors.get("token_embd.weight", [0]))
    config = {"model_type": kind, "vocab_size": vocabulary, "tie_word_embeddings": "output.weight" not in tensors}
    return shape_from_config({**config, **settings}, "float32")
