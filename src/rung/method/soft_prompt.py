"""Prompt tuning: embeddings in front of every document are learned, the model stays as it is (Lester et al. 2021)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PromptTuningConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from rung.errors import ConfigError, PlanError
from rung.method.base import Sample, Simple, same_keys
from rung.model.fuse import plain_part
from rung.model.fused import Part
from rung.model.policy import Virtual
from rung.spec.method import PrefixSpec, PromptSpec

WEIGHTS = "adapter_model.safetensors"
TENSOR = "prompt_embeddings"
"""peft's name, for prompts and for prefixes."""
FREQUENT = 5000
"""`vocabulary` draws from as many of the first tokens: vocabularies begin with what is frequent."""


class Before(Simple):
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
    def virtual_tokens(self) -> int:  # type: ignore[override]
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

    def part(self, module: nn.Module) -> Part | None:
        """A linear as it stands."""
        return plain_part(module)

    def shares_prefixes(self) -> bool:
        """Always: nothing is drawn at random."""
        return True

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


class Prompt(Before):
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
