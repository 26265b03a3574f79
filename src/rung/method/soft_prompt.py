"""Virtual tokens: something learned stands before every document, and the model stays as it is.

Prompt tuning learns embeddings that pass through all layers (Lester et al. 2021). Prefix tuning learns keys and values
in every layer (Li and Liang 2021): as they are (Liu et al. 2022, P-tuning v2), or made by a network from learned
embeddings while training (Li and Liang 2021, section 4.3), of which only the output is saved.

Suffixes: P virtual tokens, H width, L layers, K key/value heads, D head width.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PrefixTuningConfig, PromptTuningConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from rung.errors import ConfigError, PlanError
from rung.method.base import Method, Sample, same_keys
from rung.model.policy import Virtual
from rung.spec.method import PrefixSpec, PromptSpec

WEIGHTS = "adapter_model.safetensors"
TENSOR = "prompt_embeddings"
"""peft's name, for prompts and for prefixes."""
FREQUENT = 5000
"""`vocabulary` draws from as many of the first tokens: vocabularies begin with what is frequent."""


class _VirtualTokens(Method):
    """What methods with virtual tokens have in common: they put something before a document and touch nothing."""

    artefact = "adapter"
    starts_as_base = False
    """Something stands before the document that was not there."""

    def __init__(self, model: PreTrainedModel, spec: PromptSpec | PrefixSpec) -> None:
        self.model = model
        self.seed = torch.initial_seed()  # what `attach` has just set
        self.count = spec.virtual_tokens
        self.on = True

    @property
    def virtual_tokens(self) -> int:
        """As many as the spec says; 0 inside `disabled`."""
        return self.count if self.on else 0

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base alone, inside the context: documents begin with their own first token."""
        before, self.on = self.on, False
        try:
            yield
        finally:
            self.on = before

    def merge(self) -> nn.Module:
        """Raises `PlanError`: there is no weight that it could be added to."""
        raise PlanError(
            "virtual tokens cannot be folded into the base: they stand in its input, not in its weights",
            hint="serve the base with the adapter (peft loads it), or train a lora",
        )

    def _write(self, folder: Path, rows: Tensor, config: PeftConfig) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({TENSOR: rows.detach().contiguous().cpu()}, folder / WEIGHTS, metadata={"format": "pt"})
        config.inference_mode = True
        (folder / "adapter_config.json").write_text(json.dumps(config.to_dict(), indent=2, default=str) + "\n")

    def _read(self, folder: Path) -> Tensor:
        state = load_file(folder / WEIGHTS)
        same_keys(state.keys(), {TENSOR}, str(folder))
        return state[TENSOR]


class Prompt(_VirtualTokens):
    """Embeddings [P, H] that pass through all layers before the document does."""

    kind = "prompt"

    def __init__(self, model: PreTrainedModel, spec: PromptSpec) -> None:
        super().__init__(model, spec)
        self.spec = spec
        self.sample_size = 0 if spec.init == "random" else 1  # it needs the tokenizer, not the documents
        weight: Tensor = model.get_input_embeddings().weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        start = torch.randn(self.count, weight.shape[1], dtype=dtype) * weight.detach().to(dtype).std().cpu()
        self.embeddings = nn.Parameter(start.to(weight.device))

    def trainable(self) -> dict[str, nn.Parameter]:
        """The embeddings."""
        return {TENSOR: self.embeddings}

    def declared_parameters(self) -> int:
        """P times H."""
        return self.count * int(self.model.get_input_embeddings().weight.shape[1])

    def virtual(self) -> Virtual:
        """The embeddings [P, H]."""
        return self.embeddings

    def calibrate(self, sample: Sample, start: Path | None = None) -> None:
        """Begin with the embeddings of real tokens."""
        if start is not None:
            self.load(start)
            return
        if self.spec.init_text is not None:
            ids = text_ids(sample.tokenizer, self.spec.init_text, self.count)
        else:
            ids = frequent_ids(sample.tokenizer, self.count, self.seed)
        with torch.no_grad():
            rows = self.model.get_input_embeddings()(torch.tensor(ids, device=self.embeddings.device))
            self.embeddings.copy_(rows)

    def save(self, folder: Path) -> None:
        """Write the two files of peft's prompt tuning."""
        config = PromptTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=self.count,
            token_dim=self.embeddings.shape[1],
            num_transformer_submodules=1,
            num_attention_heads=int(self.model.config.num_attention_heads),
            num_layers=int(self.model.config.num_hidden_layers),
        )
        self._write(folder, self.embeddings, config)

    def load(self, folder: Path) -> None:
        """Read them; keys missing or left over raise `CheckpointError`."""
        with torch.no_grad():
            self.embeddings.copy_(self._read(folder))


class Prefix(_VirtualTokens):
    """Keys and values [P, L, 2, K, D]. They take part in no rotation: what is learned is what is attended to."""

    kind = "prefix"

    def __init__(self, model: PreTrainedModel, spec: PrefixSpec) -> None:
        super().__init__(model, spec)
        self.spec = spec
        config = model.config
        heads = int(config.num_attention_heads)
        self.kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
        self.head_width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
        self.layers = int(config.num_hidden_layers)
        like = next(model.parameters())
        dtype = torch.promote_types(like.dtype, torch.float32)
        place: dict[str, Any] = {"device": like.device, "dtype": dtype}
        self.width = 2 * self.layers * self.kv_heads * self.head_width
        self.flat: nn.Parameter | None = None
        self.network: nn.Sequential | None = None
        if spec.projection is None:
            self.sample_size = 1  # it needs the model and the tokenizer, not the documents
            self.flat = nn.Parameter(torch.randn(self.count, self.width, **place) * 0.02)
        else:
            features = int(config.hidden_size)
            self.network = nn.Sequential(
                nn.Embedding(self.count, features, **place),
                nn.Linear(features, spec.projection, **place),
                nn.Tanh(),
                nn.Linear(spec.projection, self.width, **place),
            )

    def trainable(self) -> dict[str, nn.Parameter]:
        """The keys and values, or the network that makes them."""
        if self.flat is not None:
            return {"prefix": self.flat}
        assert self.network is not None  # noqa: S101 -- for the type checker: one of them is there
        return {f"network.{name}": parameter for name, parameter in self.network.named_parameters()}

    def declared_parameters(self) -> int:
        """P times 2 L K D; with a network of width h, P H + H h + h + (h + 1) 2 L K D."""
        if (middle := self.spec.projection) is None:
            return self.count * self.width
        features = int(self.model.config.hidden_size)
        return self.count * features + features * middle + middle + (middle + 1) * self.width

    def virtual(self) -> Virtual:
        """Keys and values [1, K, P, D] by layer."""
        flat = self._flat()
        pairs = flat.view(self.count, self.layers, 2, self.kv_heads, self.head_width).permute(1, 2, 3, 0, 4)
        both = [pair.unbind(0) for pair in pairs.unbind(0)]
        return {layer: (key[None], value[None]) for layer, (key, value) in enumerate(both)}

    def calibrate(self, sample: Sample, start: Path | None = None) -> None:
        """Begin with the keys and values of real tokens, which the layers know how to read."""
        if start is not None:
            self.load(start)
            return
        assert self.flat is not None  # noqa: S101 -- for the type checker: sample_size is 0 otherwise
        ids = frequent_ids(sample.tokenizer, self.count, self.seed)
        found = sample.keys_values(ids)
        pairs = torch.stack([torch.cat(found[layer]) for layer in range(self.layers)])  # [L, 2, K, P, D]
        with torch.no_grad():
            self.flat.copy_(pairs.permute(3, 0, 1, 2, 4).reshape(self.count, self.width))

    def save(self, folder: Path) -> None:
        """Write the two files of peft's prefix tuning."""
        config = PrefixTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=self.count,
            token_dim=self.kv_heads * self.head_width,
            num_transformer_submodules=1,
            num_attention_heads=self.kv_heads,
            num_layers=self.layers,
        )
        self._write(folder, self._flat(), config)

    def load(self, folder: Path) -> None:
        """Read them; the network, if there was one, has done its work. Other keys raise `CheckpointError`."""
        rows = self._read(folder)
        like = next(iter(self.trainable().values()))
        self.flat, self.network = nn.Parameter(rows.to(like.device, like.dtype)), None

    def _flat(self) -> Tensor:
        if self.flat is not None:
            return self.flat
        assert self.network is not None  # noqa: S101 -- for the type checker: one of them is there
        made: Tensor = self.network(torch.arange(self.count, device=next(self.network.parameters()).device))
        return made


def frequent_ids(tokenizer: Any, count: int, seed: int) -> list[int]:
    """Different tokens drawn from the first of the vocabulary that are no special ones."""
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    known = [i for i in range(min(len(tokenizer), FREQUENT + len(special))) if i not in special][:FREQUENT]
    if len(known) < count:
        raise ConfigError(
            "the vocabulary has fewer tokens than the prompt",
            where="method.virtual_tokens",
            given=count,
            allowed=f"1 to {len(known)}",
        )
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(seed))[:count]
    return [known[int(i)] for i in order]


def text_ids(tokenizer: Any, text: str, count: int) -> list[int]:
    """The tokens of a text, repeated or cut to `count`."""
    ids: Sequence[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ConfigError("this text has no token", where="method.init_text", given=text)
    return [ids[i % len(ids)] for i in range(count)]
