"""Prefix tuning: keys and values before every document are learned, in every layer (Li and Liang 2021).

Learned as they are (Liu et al. 2022, P-tuning v2), or made by a network from learned embeddings while training
(Li and Liang 2021, section 4.3), of which only the output is saved.

Suffixes: P virtual tokens, L layers, K key/value heads, D head width.
"""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PrefixTuningConfig
from torch import Tensor, nn
from transformers import PreTrainedModel

from rung.method.base import Sample
from rung.method.soft_prompt import Before, frequent_ids
from rung.model.policy import Virtual
from rung.spec.method import PrefixSpec


class Prefix(Before):
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
        place = {"device": like.device, "dtype": dtype}
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
