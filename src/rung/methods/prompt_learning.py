"""Virtual tokens: learned states precede every document, and the model stays frozen.

Prompt tuning learns embeddings that pass through all layers (Lester et al. 2021). Prefix tuning learns keys and values
in every layer (Li and Liang 2021): directly (Liu et al. 2022, P-tuning v2), or computed by a network from learned
embeddings. P-tuning computes either with an encoder shared by several tasks (Liu et al. 2021). The output of an encoder
is computed once a step, and only that output is saved. Nothing can be merged into weights; `models/policy.py` puts the
states before the rows (decisions 0014, 0016).

Suffixes: P virtual tokens, H width, L layers, K key/value heads, D head width.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PrefixTuningConfig, PromptTuningConfig
from torch import Tensor, nn
from transformers import PreTrainedModel

from rung.config.method import PrefixConfig, PromptConfig, PTuningConfig, encoder_parameter_count, front_virtual_tokens
from rung.errors import ConfigError, DataError
from rung.methods.adapter_files import CONFIG, read_state, write_peft_files
from rung.methods.protocol import CalibrationData, Method
from rung.models.policy import VirtualTokenStates

PROMPT_TENSOR = "prompt_embeddings"
"""peft's tensor name, for prompts and for prefixes."""
ALL_TASKS = ""
"""The task name of a method without tasks."""
FREQUENT_TOKENS = 5000
"""`init: vocabulary` samples from this many first tokens: vocabularies start with frequent tokens."""
KV_INIT_STD = 0.02
"""Initial standard deviation of keys and values, unless they are taken from real tokens."""
ENCODER_INPUT_STD = 1.0
"""Initial standard deviation of an encoder's inputs, as in torch's embeddings; with less, its biases dominate."""


class VirtualTokens(Method):
    """Rows [P, width] for each task, learned directly or computed by an encoder."""

    starts_as_base = False
    """False: the virtual tokens change the model's input."""
    merge_refusal = "virtual tokens cannot be folded into the base: they stand in its input, not in its weights"

    def __init__(self, model: PreTrainedModel, config: PromptConfig | PrefixConfig | PTuningConfig) -> None:
        self.model, self.config, self.kind = model, config, config.kind
        self.seed = torch.initial_seed()  # set by `attach_method` just before
        self.count, self.front = config.virtual_tokens, front_virtual_tokens(config)
        self.tasks = config.tasks or (ALL_TASKS,)
        model_config = model.config
        self.features, self.layers = int(model_config.hidden_size), int(model_config.num_hidden_layers)
        heads = int(model_config.num_attention_heads)
        self.kv_heads = int(getattr(model_config, "num_key_value_heads", None) or heads)
        self.head_width = int(getattr(model_config, "head_dim", None) or self.features // heads)
        in_layers = isinstance(config, PTuningConfig) and config.layers == "all"
        self.every_layer = in_layers or isinstance(config, PrefixConfig)
        self.width = 2 * self.layers * self.kv_heads * self.head_width if self.every_layer else self.features
        weight: Tensor = model.get_input_embeddings().weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        # The encoder is built before the tables: the order of random draws is part of the result of a seed.
        self.encoder = make_encoder(config, self.features, self.width)
        if self.encoder is not None:
            self.encoder.to(weight.device, dtype)
        table_width = self.width if self.encoder is None else self.features
        std = KV_INIT_STD if self.every_layer else float(weight.float().std())
        if self.encoder is not None:
            std = ENCODER_INPUT_STD
        rows = {task: torch.randn(self.count, table_width, dtype=dtype) * std for task in self.tasks}
        self.tables = {task: nn.Parameter(table.to(weight.device)) for task, table in rows.items()}
        needs_tokens = self.encoder is None and not (isinstance(config, PromptConfig) and config.init == "random")
        self.sample_size = int(needs_tokens)  # only for the sample's tokenizer and model, not its documents

    @property
    def virtual_tokens(self) -> int:
        """Number of virtual tokens in front; 0 inside `disabled`."""
        return self.front if self.enabled else 0

    @property
    def inserted_tokens(self) -> int:
        """Number of virtual tokens inside documents, stored after those in front; 0 inside `disabled`."""
        return self.count - self.front if self.enabled else 0

    def task_rows(self, task: str | None) -> Tensor:
        """All rows of a task, [P, width], with the graph. Raises `DataError` for an unknown task."""
        return self._rows(self._task_key(task))

    def virtual_states(self, rows: Tensor) -> VirtualTokenStates:
        """Embeddings [P, H], or keys and values [1, K, P, D] by layer."""
        if not self.every_layer:
            return rows[: self.front]
        # peft's row layout: layers, then key and value, then heads.
        pairs = rows.view(self.count, self.layers, 2, self.kv_heads, self.head_width).permute(1, 2, 3, 0, 4)
        keys_values = [pair.unbind(0) for pair in pairs.unbind(0)]
        return {layer: (key[None], value[None]) for layer, (key, value) in enumerate(keys_values)}

    def inserted_embeddings(self, rows: Tensor) -> Tensor:
        """Embeddings of the virtual tokens inside documents."""
        return rows[self.front :]

    def trainable_for_tasks(self, tasks: Collection[str | None]) -> Collection[str] | None:
        """Names of the tables of these tasks and of the encoder; None (all) without tasks."""
        if self.tasks == (ALL_TASKS,):
            return None
        other_tables = {f"{PROMPT_TENSOR}.{task}" for task in self.tasks if task not in tasks}
        return self.trainable().keys() - other_tables

    def trainable(self) -> dict[str, nn.Parameter]:
        """The rows of each task or the encoder's inputs for them, and the encoder."""
        tables = {f"{PROMPT_TENSOR}.{task}" if task else PROMPT_TENSOR: table for task, table in self.tables.items()}
        encoder = {} if self.encoder is None else dict(self.encoder.named_parameters())
        return {**tables, **{f"encoder.{name}": parameter for name, parameter in encoder.items()}}

    def declared_parameters(self) -> int:
        """Tasks times P times the width of a row or of the encoder's input, plus the encoder."""
        rows = len(self.tasks) * self.count * (self.width if self.encoder is None else self.features)
        return rows + encoder_parameter_count(self.config, self.features, self.width)

    def calibrate(self, sample: CalibrationData, start: Path | None = None) -> None:
        """Initialize with the embeddings, or the keys and values, of real tokens."""
        if start is not None:
            self.load(start)
            return
        for number, table in enumerate(self.tables.values()):
            text = self.config.init_text if isinstance(self.config, PromptConfig) else None
            # Another seed for each task, so that tasks start at different tokens.
            tokenizer, count, seed = sample.tokenizer, self.count, self.seed + number
            ids = frequent_ids(tokenizer, count, seed) if text is None else text_ids(tokenizer, text, count)
            with torch.no_grad():
                table.copy_(self._rows_from_tokens(sample, ids))

    def save(self, folder: Path) -> None:
        """Write peft's two files; with several tasks, in one folder for each."""
        if self.tasks == (ALL_TASKS,):
            self._write(folder, self._rows(ALL_TASKS))
            return
        folder.mkdir(parents=True, exist_ok=True)
        index = {"peft_type": "RUNG_TASKS", "tasks": {task: _task_folder(i) for i, task in enumerate(self.tasks)}}
        (folder / CONFIG).write_text(json.dumps(index, indent=2) + "\n")
        for i, task in enumerate(self.tasks):
            self._write(folder / _task_folder(i), self._rows(task))

    def load(self, folder: Path) -> None:
        """Load what `save` wrote; an encoder is not saved and is dropped. Other keys raise `CheckpointError`."""
        rows_by_task = {}
        for i, task in enumerate(self.tasks):
            task_folder = folder if self.tasks == (ALL_TASKS,) else folder / _task_folder(i)
            # A tensor on the meta device: only its shape is compared.
            expected = {PROMPT_TENSOR: torch.empty(self.count, self.width, device="meta")}
            rows_by_task[task] = read_state(task_folder, expected)[PROMPT_TENSOR]
        for task, rows in rows_by_task.items():
            # The encoder's input had another width than the rows it computed.
            if self.encoder is not None:
                self.tables[task] = nn.Parameter(rows.to(self.tables[task]))
            self.tables[task].data.copy_(rows)
        self.encoder = None

    def _task_key(self, task: str | None) -> str:
        if self.tasks == (ALL_TASKS,):
            return ALL_TASKS
        if task not in self.tables:
            allowed, hint = ", ".join(self.tasks), "name the column in data.task, or, for rung chat, --task"
            raise DataError("nothing was learned for this task", given=task, allowed=allowed, hint=hint)
        return task

    def _rows(self, task: str) -> Tensor:
        return self.tables[task] if self.encoder is None else self.encoder(self.tables[task])

    def _rows_from_tokens(self, sample: CalibrationData, ids: Sequence[int]) -> Tensor:
        if not self.every_layer:
            return self.model.get_input_embeddings()(torch.tensor(list(ids), device=self.model.device))  # type: ignore[no-any-return]
        keys_values = sample.keys_values(ids)
        pairs = torch.stack([torch.cat(keys_values[layer]) for layer in range(self.layers)])  # [L, 2, K, P, D]
        return pairs.permute(3, 0, 1, 2, 4).reshape(self.count, self.width)

    def _write(self, folder: Path, rows: Tensor) -> None:
        # Stock peft would put all tokens in front without an error, so the file has a type that peft refuses.
        if self.front < self.count:
            settings = {"peft_type": "RUNG_P_TUNING", "task_type": "CAUSAL_LM"}
            write_peft_files(folder, {PROMPT_TENSOR: rows}, {**settings, "method_config": self.config.model_dump()})
            return
        heads, width = int(self.model.config.num_attention_heads), self.features
        if self.every_layer:
            heads, width = self.kv_heads, self.kv_heads * self.head_width
        sizes = {"token_dim": width, "num_attention_heads": heads, "num_layers": self.layers}
        config_class = PrefixTuningConfig if self.every_layer else PromptTuningConfig
        options = {"task_type": "CAUSAL_LM", "num_virtual_tokens": self.count, "num_transformer_submodules": 1}
        config: PeftConfig = config_class(**options, **sizes)
        write_peft_files(folder, {PROMPT_TENSOR: rows}, config.to_dict())


class _LstmEncoder(nn.Module):
    """Bidirectional LSTM of two layers, then linear, ReLU, linear (Liu et al. 2021, eq. 3)."""

    def __init__(self, features: int, hidden: int, width: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(features, hidden, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Sequential(nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, width))

    def forward(self, rows_PH: Tensor) -> Tensor:
        """[P, H] -> [P, width]."""
        return self.head(self.lstm(rows_PH[None])[0])[0]  # type: ignore[no-any-return]


def make_encoder(config: PromptConfig | PrefixConfig | PTuningConfig, features: int, width: int) -> nn.Module | None:
    """The network that computes rows of this width from embeddings; None if rows are learned directly."""
    if isinstance(config, PTuningConfig):
        hidden = config.hidden or features // 2
        if config.encoder == "lstm":
            return _LstmEncoder(features, hidden, width)
        first, second = nn.Linear(features, hidden), nn.Linear(hidden, hidden)
        return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Linear(hidden, width))
    if isinstance(config, PrefixConfig) and config.projection is not None:
        return nn.Sequential(nn.Linear(features, config.projection), nn.Tanh(), nn.Linear(config.projection, width))
    return None


def frequent_ids(tokenizer: Any, count: int, seed: int) -> list[int]:
    """Sample different tokens from the start of the vocabulary, without special tokens."""
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    candidates = list(islice((i for i in range(len(tokenizer)) if i not in special), FREQUENT_TOKENS))
    if len(candidates) < count:
        reason, allowed = "the vocabulary has fewer tokens than the prompt", f"1 to {len(candidates)}"
        raise ConfigError(reason, where="method.virtual_tokens", given=count, allowed=allowed)
    order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed))[:count]
    return [candidates[int(i)] for i in order]


def text_ids(tokenizer: Any, text: str, count: int) -> list[int]:
    """The tokens of a text, repeated or truncated to `count`."""
    ids: Sequence[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ConfigError("this text has no token", where="method.init_text", given=text)
    return [ids[i % len(ids)] for i in range(count)]


def _task_folder(number: int) -> str:
    return f"task-{number}"
