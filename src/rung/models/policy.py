"""The model as objectives see it: log-probabilities of a packed batch, with the method on, or off for the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from hashlib import blake2b
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor, nn

from rung.errors import PlanError
from rung.models.base_model import BaseModel
from rung.models.layers import recompute_layers, record_layer_input, start_from_layer
from rung.models.logprobs import LogitTransform, token_logprobs
from rung.models.tree_attention import KeysValues
from rung.types import CachedHidden, Example, LossTerm, PackedBatch, Segment, SharedPrefix

VirtualTokenStates = Tensor | Mapping[int, KeysValues]
"""What stands before every document: embeddings [P, H] that pass through the model, or keys and values by layer."""


class PolicyMethod(Protocol):
    """The part of a method that a policy needs."""

    @property
    def virtual_tokens(self) -> int:
        """How many positions stand before every document; 0 for most methods, and where the method is off."""
        ...

    def task_rows(self, task: str | None) -> Tensor:
        """What virtual tokens are made of for documents of this task, with the graph. Asked for once a step."""
        ...

    def virtual_states(self, rows: Tensor) -> VirtualTokenStates:
        """Those that stand before a document. Asked for only when there are some."""
        ...

    @property
    def inserted_tokens(self) -> int:
        """How many ids beyond the vocabulary stand for something learned, wherever they occur; 0 for most methods."""
        ...

    def inserted_embeddings(self, rows: Tensor) -> Tensor:
        """Their embeddings [P, H]. Asked for only when there are some."""
        ...

    def penalty(self, batch: PackedBatch) -> list[LossTerm]:
        """What the method itself adds to the loss of the batch just computed."""
        ...

    def disabled(self) -> AbstractContextManager[None]:
        """The base alone, inside the context."""
        ...


class NoMethod:
    """What a policy holds when nothing is tuned: off and on are the same."""

    virtual_tokens = 0
    inserted_tokens = 0

    def task_rows(self, task: str | None) -> Tensor:
        """Nothing."""
        return torch.empty(0, 0)

    def virtual_states(self, rows: Tensor) -> VirtualTokenStates:
        """Nothing."""
        return {}

    def inserted_embeddings(self, rows: Tensor) -> Tensor:
        """Nothing."""
        return rows

    def penalty(self, batch: PackedBatch) -> list[LossTerm]:
        """Nothing."""
        return []

    def disabled(self) -> AbstractContextManager[None]:
        """Nothing to switch off."""
        return nullcontext()


class Policy:
    """A base with a method attached. Suffixes as in `rung.types`."""

    def __init__(self, base: BaseModel, method: PolicyMethod) -> None:
        self.base = base
        self.method = method
        self.model = base.model
        self.logit_map = LogitTransform.of(base.model.config)
        self.layers_to_recompute: Callable[[int], range] = lambda tokens: range(0)
        """Which layers a document of so many tokens computes again in the backward pass, so that it fits."""
        self.reference: Policy | None = None
        """What log-probabilities are compared with, where that is not the base with the method off."""
        self.reference_cache: dict[int, float] | None = None
        """Sums of the reference's log-probabilities by document, where they are kept."""
        self._active_prefix: SharedPrefix | None = None
        self._prefix_cache: dict[bool, PrefixCache] = {}
        """Of the prefix at hand, with the method on (False) or off."""
        self._virtual_cache: dict[str | None, PrefixCache] = {}
        """By task, while batches are run in turn."""
        self._rows_cache: dict[str | None, tuple[Tensor, Tensor]] = {}
        """What virtual tokens are made of, by task, while batches are run in turn: as computed, and as a leaf."""
        self._iterating = False
        self._method_off = False

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def head(self) -> nn.Module:
        """The model's output layer."""
        head: nn.Module | None = self.model.get_output_embeddings()
        if head is None:
            raise PlanError("this model has no output head", where="model.name", given=self.base.name)
        return head

    def autocast(self) -> AbstractContextManager[object]:
        """Products in bfloat16 where that is the base's compute type; parameters that move stay in float32."""
        low = self.base.compute_dtype is torch.bfloat16
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=low)

    def hidden_states(self, batch: PackedBatch) -> Tensor:
        """Last hidden state of every token, [T, H], after the final norm."""
        shared = self._context_kv(batch.prefix, batch.task)
        positions = batch.positions + self.method.virtual_tokens
        with self._starting_from(batch.cached_hidden):
            entering = self.embed(batch.ids, batch.task)
            return self._run_layers(entering, positions, batch.segments, alone=batch.is_single_row, shared=shared)

    def embed(self, ids: Tensor, task: str | None) -> Tensor:
        """What the model takes for ids of any shape: the same, or embeddings [..., H] where some are inserted ones."""
        if not self.method.inserted_tokens:
            return ids
        first = self.vocab_size
        known = self.model.get_input_embeddings()(ids.clamp(max=first - 1))
        rows_PH = self.method.inserted_embeddings(self._task_rows(task))
        own = rows_PH[(ids - first).clamp(min=0)].to(known.dtype)
        return torch.where((ids >= first)[..., None], own, known)

    def _task_rows(self, task: str | None) -> Tensor:
        """What a task's virtual tokens are made of: for batches in turn computed once, and cut off."""
        if task in self._rows_cache:
            return self._rows_cache[task][1]
        computed = self.method.task_rows(task)
        if not self._iterating:
            return computed
        self._rows_cache[task] = computed, _detached_leaf(computed)
        return self._rows_cache[task][1]

    @property
    def vocab_size(self) -> int:
        """The id of the first token beyond the vocabulary."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @torch.no_grad()
    def hidden_states_entering(self, batch: PackedBatch, layer: int) -> Tensor:
        """Hidden states [T, H] that enter `layer`, counted from 0; the number of layers means the final norm."""
        with record_layer_input(self.model, layer) as states:  # virtual tokens move layer 0, so there are none here
            self._run_layers(batch.ids, batch.positions, batch.segments, alone=False)
            return states()

    def _starting_from(self, below: CachedHidden | None) -> AbstractContextManager[None]:
        return nullcontext() if below is None else start_from_layer(self.model, below.layer, below.states)

    def _run_layers(
        self, entering: Tensor, positions_T: Tensor, segments: Sequence[Segment], *, alone: bool, **attention: object
    ) -> Tensor:
        """Ids [T] or embeddings [T, H] through the layers.

        `alone`: the row cannot be cut into smaller ones; other rows are as large as the budget asks for.
        """
        trunk = getattr(self.model, self.model.base_model_prefix)
        again = self.layers_to_recompute(len(entering)) if alone and torch.is_grad_enabled() else range(0)
        with self.autocast(), recompute_layers(self.model, again) if again else nullcontext():
            out = trunk(
                **model_inputs(entering[None]),
                position_ids=positions_T[None],
                # A mask of four dimensions is passed through untouched: the segments say who sees whom.
                attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=entering.device),
                segments=segments,
                use_cache=False,
                **attention,
            )
        hidden: Tensor = out.last_hidden_state[0]
        return hidden

    def iterate_batches(self, batches: Iterable[PackedBatch]) -> Iterator[PackedBatch]:
        """The batches one by one, each with its prefix at hand: the way to run what `pack` made.

        After the last row of a prefix, the prefix receives their gradients; after the last of all, the virtual tokens
        receive theirs.
        """
        self._iterating = True
        try:
            for prefix, rows in groupby(batches, key=lambda batch: batch.prefix):
                with self.shared_prefix(prefix):
                    yield from rows
            for ahead in self._virtual_cache.values():
                ahead.backward()
            for computed, leaf in self._rows_cache.values():
                if leaf.grad is not None:
                    computed.backward(leaf.grad)  # type: ignore[no-untyped-call]
        finally:
            self._virtual_cache.clear()
            self._rows_cache.clear()
            self._iterating = False

    @contextmanager
    def shared_prefix(self, prefix: SharedPrefix | None) -> Iterator[None]:
        """Rows with this prefix run inside; on leaving, the prefix receives their gradients all at once.

        The prefix runs at the first need. Its keys and values are leaves for the rows, so each row's backward pass ends
        there; what they collected is then back-propagated once. The sum is the gradient of the unshared rows.
        """
        self._active_prefix = prefix
        try:
            yield
            if (ahead := self._prefix_cache.get(False)) is not None:
                ahead.backward()
        finally:
            self._active_prefix = None
            self._prefix_cache.clear()

    def virtual_kv(self, task: str | None = None) -> Mapping[int, KeysValues] | None:
        """Keys and values of the method's virtual tokens, if it has any; computed once for batches in turn."""
        if not self.method.virtual_tokens:
            return None
        if task in self._virtual_cache:
            return self._virtual_cache[task].leaves
        computed = self.method.virtual_states(self._task_rows(task))
        if isinstance(computed, Tensor):
            computed = self.prefix_kv(computed)
        if not self._iterating:
            return computed
        self._virtual_cache[task] = PrefixCache(computed)
        return self._virtual_cache[task].leaves

    def prefix_kv(
        self, entering: Tensor, start: int = 0, before: Mapping[int, KeysValues] | None = None
    ) -> dict[int, KeysValues]:
        """Keys and values, by layer, of ids [T] or embeddings [T, H] that stand from position `start` on."""
        captured: dict[int, KeysValues] = {}
        positions = torch.arange(start, start + len(entering), device=entering.device)
        own = (Segment(0, len(entering), None),)
        self._run_layers(entering, positions, own, alone=True, shared=before, capture=captured)
        return captured

    def _context_kv(self, prefix: SharedPrefix | None, task: str | None) -> Mapping[int, KeysValues] | None:
        """Keys and values that every root of a row comes after: virtual tokens, then the prefix."""
        virtual = self.virtual_kv(task)
        if prefix is None:
            return virtual
        if prefix is not self._active_prefix:  # kept any longer its keys and values would be those of older weights
            raise RuntimeError("rows with a shared prefix run inside Policy.in_turn or Policy.sharing")
        if self._method_off not in self._prefix_cache:
            with self._starting_from(prefix.cached_hidden):
                entering = self.embed(prefix.ids, task)
                self._prefix_cache[self._method_off] = PrefixCache(
                    self.prefix_kv(entering, self.method.virtual_tokens, virtual)
                )
        own = self._prefix_cache[self._method_off].leaves
        return own if virtual is None else {layer: concatenate_kv(virtual[layer], own[layer]) for layer in own}

    def logprobs(self, batch: PackedBatch) -> Tensor:
        """Log-probability in nats of each entry of the loss index, [N]."""
        return self.logprobs_of(self.hidden_states(batch), batch)

    def logprobs_of(self, hidden: Tensor, batch: PackedBatch) -> Tensor:
        """The same from the last hidden states [T, H]."""
        with self.autocast():
            return token_logprobs(hidden[batch.loss.source], self.head, batch.loss.target, self.logit_map)

    def reference_logprobs(self, batch: PackedBatch) -> Tensor:
        """The same from the reference, which is the base alone unless another was set, without gradient."""
        if self.reference is not None:
            alone = batch.without_cached_hidden()
            with torch.no_grad(), self.reference.shared_prefix(alone.prefix):
                return self.reference.logprobs(alone)
        return self.base_logprobs(batch)

    def reference_sums(self, batch: PackedBatch) -> Tensor:
        """The same summed over each document, [D]. Where `known` is set, a document is read once a run."""
        if self.reference_cache is None:
            return sum_by_document(batch, self.reference_logprobs(batch))
        keys = [document_key(document) for document in batch.documents]
        if any(key not in self.reference_cache for key in keys):
            found = sum_by_document(batch, self.reference_logprobs(batch)).tolist()
            for key, nats in zip(keys, found, strict=True):
                self.reference_cache.setdefault(
                    key, nats
                )  # what was used once stays: another batch would round otherwise
        return torch.tensor([self.reference_cache[key] for key in keys], dtype=torch.float64, device=batch.ids.device)

    def base_logprobs(self, batch: PackedBatch) -> Tensor:
        """The same with the method off, without gradient.

        Raises `PlanError` for documents with inserted tokens: the base has nothing to put there.
        """
        if self.method.inserted_tokens and any((d.ids >= self.vocab_size).any() for d in batch.documents):
            raise PlanError(
                "the base alone cannot read documents with virtual tokens inside",
                where="method.positions",
                hint="put all of them in front, or name a run as the reference",
            )
        self._method_off = True
        try:
            with torch.no_grad(), self.method.disabled():
                return self.logprobs(batch)
        finally:
            self._method_off = False

    def logits(self, batch: PackedBatch) -> Tensor:
        """All logits [T, V]: for probes on short batches only."""
        hidden = self.hidden_states(batch)
        with self.autocast():
            return self.logit_map.apply_(self.head(hidden).clone())


class PrefixCache:
    """Keys and values of a prefix by layer: as computed, and cut off as leaves."""

    def __init__(self, computed: Mapping[int, KeysValues]) -> None:
        self.computed = computed
        self.leaves = {layer: (_detached_leaf(key), _detached_leaf(value)) for layer, (key, value) in computed.items()}

    def backward(self) -> None:
        """Pass on what the leaves collected."""
        pairs = [
            (tensor, leaf.grad)
            for layer, leaves in self.leaves.items()
            for tensor, leaf in zip(self.computed[layer], leaves, strict=True)
        ]
        reached = [(tensor, gradient) for tensor, gradient in pairs if gradient is not None]
        if reached:
            torch.autograd.backward([t for t, _ in reached], [g for _, g in reached])


def sum_by_document(batch: PackedBatch, values_N: Tensor) -> Tensor:
    """Sums over the supervised tokens of each document, [D]."""
    return values_N.new_zeros(batch.sequences).index_add(0, batch.loss.owner, values_N)


def document_key(document: Example) -> int:
    """64 bits of what decides a document's log-probability: its ids, what of them counts, and its task."""
    digest = blake2b(document.ids.tobytes(), digest_size=8)
    digest.update(document.supervised.tobytes())
    digest.update((document.task or "").encode())
    return int.from_bytes(digest.digest(), "little", signed=True)


def model_inputs(entering: Tensor) -> dict[str, Tensor]:
    """Ids or embeddings as the argument that transformers' models take them by."""
    return {"inputs_embeds" if entering.is_floating_point() else "input_ids": entering}


def concatenate_kv(first: KeysValues, second: KeysValues) -> KeysValues:
    """One after the other, along the positions."""
    return torch.cat([first[0], second[0]], dim=2), torch.cat([first[1], second[1]], dim=2)


def _detached_leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)
