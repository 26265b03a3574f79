"""The model as objectives see it: log-probabilities of a packed batch, with the method on, or off for the reference.

An objective never touches transformers: it gets hidden states, log-probabilities and reference values here. Prefixes
and virtual tokens run once a step, and their keys and values are leaves for the rows. That saves their repetition and
costs an order of calls: rows with a prefix must run inside `iterate_batches` or `shared_prefix`. The training step,
evaluation, gates and the decoder all use it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from hashlib import blake2b
from itertools import chain, compress, groupby
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from rung.errors import PlanError
from rung.models.base_model import BaseModel, widest_float
from rung.models.layers import recompute_layers, record_layer_input, start_from_layer
from rung.models.logprobs import LogitTransform, token_logprobs
from rung.models.rotary import follow_document_lengths, long_tokens
from rung.models.streaming import placement_of
from rung.models.tree_attention import KeysValues, KVByLayer, concatenate_kv
from rung.types import CachedHidden, Example, LossTerm, PackedBatch, Segment, SharedPrefix

VirtualTokenStates = Tensor | KVByLayer
"""What precedes every document: embeddings [P, H] that pass through the model, or keys and values by layer."""


class PolicyMethod(Protocol):
    """The part of a method that a policy needs; the defaults are those of a method without virtual tokens."""

    @property
    def virtual_tokens(self) -> int:
        """Number of positions before every document; 0 while the method is off."""
        return 0

    def task_rows(self, task: str | None) -> Tensor:
        """Source of the virtual tokens of a task, with the autograd graph. Called once a step."""
        return torch.empty(0, 0)

    def virtual_states(self, rows: Tensor) -> VirtualTokenStates:
        """States that precede a document: embeddings [P, H], or keys and values by layer."""
        return {}

    @property
    def inserted_tokens(self) -> int:
        """Number of ids beyond the vocabulary that stand for learned embeddings; 0 while the method is off."""
        return 0

    def inserted_embeddings(self, rows: Tensor) -> Tensor:
        """Embeddings [P, H] of the inserted tokens."""
        return rows

    def penalty(self, batch: PackedBatch) -> list[LossTerm]:
        """Terms that the method adds to the loss of the batch just computed; not part of a validation loss."""
        return []

    def disabled(self) -> AbstractContextManager[None]:
        """Within the context the model is the base without the method."""
        return nullcontext()

    def merged(self) -> AbstractContextManager[None]:
        """Within the context the method is part of the weights, where it can be: decoding multiplies less."""
        return nullcontext()


class NoMethod(PolicyMethod):
    """The method of a policy that is not tuned: off and on are the same."""


class Policy:
    """A base with a method attached.

    Suffixes: T tokens of a packed row, N entries of a loss index, D documents, P virtual tokens, H width, V vocabulary.
    """

    def __init__(self, base: BaseModel, method: PolicyMethod, reference: Policy | None = None) -> None:
        self.base, self.method, self.model = base, method, base.model
        self.logit_map = LogitTransform.of(base.model.config)
        if base.rope_boundary is not None:
            follow_document_lengths(base.model, base.rope_boundary)
        self.layers_to_recompute: Callable[[int], range] = lambda tokens: range(0)
        """Layers that a document of this many tokens recomputes in the backward pass, so that it fits in memory."""
        self.layers_to_offload: Callable[[int], range] = lambda tokens: range(0)
        """Those of them whose inputs wait in the memory of the host."""
        self.reference = reference
        """The reference policy, if it is not the base with the method off."""
        self.reference_cache: dict[int, float] | None = None
        """The reference's summed log-probability of each document, if cached for the run."""
        self._active_prefix: SharedPrefix | None = None
        self._prefix_cache: dict[bool, PrefixCache] = {}
        """Keys and values of the active prefix; the key says whether the method is off."""
        self._virtual_cache: dict[str | None, PrefixCache] = {}
        """Keys and values of virtual tokens by task, during `iterate_batches`."""
        self._task_rows_cache: dict[str | None, PrefixCache] = {}
        """Rows of virtual tokens by task, as the only entry, during `iterate_batches`."""
        self._iterating = self._method_off = False

    @property
    def device(self) -> torch.device:
        """Device of the model's parameters."""
        return next(self.model.parameters()).device  # type: ignore[no-any-return]

    @property
    def head(self) -> nn.Module:
        """The model's output layer."""
        if (head := self.model.get_output_embeddings()) is None:
            raise PlanError("this model has no output head", where="model.name", given=self.base.name)
        return head  # type: ignore[no-any-return]

    def autocast(self) -> AbstractContextManager[object]:
        """Products in bfloat16 if that is the base's compute dtype; trainable parameters stay in float32."""
        enabled = self.base.compute_dtype is torch.bfloat16
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)

    def hidden_states(self, batch: PackedBatch) -> Tensor:
        """Last hidden state of every token, [T, H], after the final norm."""
        context_kv = self._context_kv(batch.prefix, batch.task, batch)
        # Documents start after the virtual tokens, as they do in peft.
        positions = batch.positions + self.method.virtual_tokens
        with self._skip_cached_layers(batch.cached_hidden), self._long_tokens(batch):
            inputs, indivisible = self.embed(batch.ids, batch.task), batch.holds_one_data_row
            return self._run_layers(inputs, positions, batch.segments, indivisible=indivisible, shared=context_kv)

    def embed(self, ids: Tensor, task: str | None) -> Tensor:
        """Model inputs for ids of any shape: the ids, or embeddings [..., H] if the method inserts tokens."""
        if not self.method.inserted_tokens:
            return ids
        first_inserted = self.base.vocab_size
        # Ids beyond the vocabulary have no row in the table; the clamped lookup is replaced below.
        vocab_embeddings = self.model.get_input_embeddings()(ids.clamp(max=first_inserted - 1))
        rows_PH = self.method.inserted_embeddings(self._task_rows(task))
        inserted = rows_PH[(ids - first_inserted).clamp(min=0)].to(vocab_embeddings.dtype)
        return torch.where((ids >= first_inserted)[..., None], inserted, vocab_embeddings)

    def _task_rows(self, task: str | None) -> Tensor:
        """Rows of a task's virtual tokens; during `iterate_batches` computed once and detached from their graph."""
        if not self._iterating:
            return self.method.task_rows(task)
        if task not in self._task_rows_cache:
            self._task_rows_cache[task] = PrefixCache({0: (self.method.task_rows(task),)})
        (leaf,) = self._task_rows_cache[task].leaves[0]
        return leaf  # type: ignore[no-any-return]

    @torch.no_grad()
    def hidden_states_entering(self, batch: PackedBatch, layer: int) -> Tensor:
        """Hidden states [T, H] that enter `layer`, counted from 0; the number of layers means the final norm."""
        # A method with virtual tokens trains layer 0, so nothing below it is cached and none are added here.
        with record_layer_input(self.model, layer) as states, self._long_tokens(batch):
            self._run_layers(batch.ids, batch.positions, batch.segments, indivisible=False)
            return states()

    @property
    def rope_boundary(self) -> int | None:
        """Longest document in tokens before the model's rotary frequencies change; None for most models."""
        return self.base.rope_boundary

    def _long_tokens(self, batch: PackedBatch, *, of_prefix: bool = False) -> AbstractContextManager[None]:
        """Tell the rotary modules which tokens of a row, or of its prefix, belong to documents beyond the boundary."""
        if (boundary := self.rope_boundary) is None:
            return nullcontext()
        is_long = [len(document) + self.method.virtual_tokens > boundary for document in batch.documents]
        if of_prefix or len(set(is_long)) == 1:
            return long_tokens(self.model, is_long[0])
        mask = np.zeros(len(batch.ids), dtype=bool)
        for positions in compress(batch.rows, is_long):
            mask[positions] = True
        return long_tokens(self.model, torch.from_numpy(mask).to(batch.ids.device))

    def _skip_cached_layers(self, cached: CachedHidden | None) -> AbstractContextManager[None]:
        return nullcontext() if cached is None else start_from_layer(self.model, cached.layer, cached.states)

    def _run_layers(
        self, inputs: Tensor, positions_T: Tensor, segments: Sequence[Segment], *, indivisible: bool, **attention: Any
    ) -> Tensor:
        """Run ids [T] or embeddings [T, H] through the layers; return the last hidden states.

        `indivisible`: the row cannot be split, so some layers may recompute; other rows follow the token budget.
        """
        if placement_of(self.model) is not None:
            raise RuntimeError("the linears of this base are still in their file: a method has to quantize them first")
        # The trunk without the head: logits of a whole row are never made.
        trunk = getattr(self.model, self.model.base_model_prefix)
        recompute = self.layers_to_recompute(len(inputs)) if indivisible and torch.is_grad_enabled() else range(0)
        offload = self.layers_to_offload(len(inputs)) if recompute else range(0)
        with self.autocast(), recompute_layers(self.model, recompute, offload) if recompute else nullcontext():
            out = trunk(
                **model_inputs(inputs[None]),
                position_ids=positions_T[None],
                # transformers passes a mask of four dimensions on unchanged; the segments define the attention.
                attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=inputs.device),
                segments=segments,
                use_cache=False,
                **attention,
            )
        return out.last_hidden_state[0]  # type: ignore[no-any-return]

    def iterate_batches(self, batches: Iterable[PackedBatch]) -> Iterator[PackedBatch]:
        """Yield the batches of `pack` one by one, each with its prefix available.

        After the last row of a prefix, the prefix receives the gradients of its rows. After the last batch, the virtual
        tokens receive the gradients of all batches.
        """
        self._iterating = True
        try:
            # Rows of one prefix are adjacent: packing orders them so.
            for prefix, rows in groupby(batches, key=lambda batch: batch.prefix):
                with self.shared_prefix(prefix):
                    yield from rows
            # Keys and values first: their backward pass adds to the gradients of the rows they were computed from.
            for cache in (*self._virtual_cache.values(), *self._task_rows_cache.values()):
                cache.backward()
        finally:
            self._virtual_cache.clear()
            self._task_rows_cache.clear()
            self._iterating = False

    @contextmanager
    def shared_prefix(self, prefix: SharedPrefix | None) -> Iterator[None]:
        """Context for rows with this prefix; on exit, the prefix receives their summed gradients.

        The prefix runs when first needed. Its keys and values are leaves for the rows, so each row's backward pass ends
        there; the collected gradients are then back-propagated once. The sum equals the gradient of unshared rows.
        """
        self._active_prefix = prefix
        try:
            yield
            # Only the pass with the method on has a graph; the reference runs without gradient.
            if (cache := self._prefix_cache.get(False)) is not None:
                cache.backward()
        finally:
            self._active_prefix = None
            self._prefix_cache.clear()

    def virtual_kv(self, task: str | None = None) -> KVByLayer | None:
        """Keys and values of the method's virtual tokens, or None; computed once during `iterate_batches`."""
        if not self.method.virtual_tokens:
            return None
        if task not in self._virtual_cache:
            states = self.method.virtual_states(self._task_rows(task))
            kv_by_layer = self.prefix_kv(states) if isinstance(states, Tensor) else states
            if not self._iterating:
                return kv_by_layer
            self._virtual_cache[task] = PrefixCache(kv_by_layer)
        return self._virtual_cache[task].leaves

    def prefix_kv(self, inputs: Tensor, start: int = 0, context_kv: KVByLayer | None = None) -> dict[int, KeysValues]:
        """Keys and values by layer of ids [T] or embeddings [T, H] at positions from `start` on."""
        positions = torch.arange(start, start + len(inputs), device=inputs.device)
        return self.packed_kv(inputs, positions, (Segment(0, len(inputs), None),), context_kv)

    def packed_kv(
        self, inputs: Tensor, positions_T: Tensor, segments: Sequence[Segment], context_kv: KVByLayer | None
    ) -> dict[int, KeysValues]:
        """Keys and values by layer of a packed row, ids [T] or embeddings [T, H], whose roots follow `context_kv`."""
        kv_by_layer: dict[int, KeysValues] = {}
        self._run_layers(inputs, positions_T, segments, indivisible=True, shared=context_kv, capture=kv_by_layer)
        return kv_by_layer

    def _context_kv(self, prefix: SharedPrefix | None, task: str | None, batch: PackedBatch) -> KVByLayer | None:
        """Keys and values that precede every root of a row: virtual tokens, then the prefix."""
        virtual = self.virtual_kv(task)
        if prefix is None:
            return virtual
        # A cache that outlived its context would hold keys and values of older weights.
        if prefix is not self._active_prefix:
            raise RuntimeError("rows with a shared prefix run inside Policy.iterate_batches or Policy.shared_prefix")
        if self._method_off not in self._prefix_cache:
            # documents with one prefix are of one kind
            with self._skip_cached_layers(prefix.cached_hidden), self._long_tokens(batch, of_prefix=True):
                kv_by_layer = self.prefix_kv(self.embed(prefix.ids, task), self.method.virtual_tokens, virtual)
            self._prefix_cache[self._method_off] = PrefixCache(kv_by_layer)
        prefix_kv = self._prefix_cache[self._method_off].leaves
        return concatenate_kv(virtual, prefix_kv)

    def logprobs(self, batch: PackedBatch) -> Tensor:
        """Log-probability in nats of each entry of the loss index, [N]."""
        return self.logprobs_of(self.hidden_states(batch), batch)

    def logprobs_of(self, hidden: Tensor, batch: PackedBatch) -> Tensor:
        """Log-probability in nats of each entry of the loss index, [N], from the last hidden states [T, H]."""
        with self.autocast():
            return token_logprobs(hidden[batch.loss.source], self.head, batch.loss.target, self.logit_map)

    @torch.no_grad()
    def logits(self, hidden_NH: Tensor) -> Tensor:
        """Logits [N, V] of hidden states, float32 or wider; of a few rows at a time, they are large."""
        with self.autocast():
            logits_NV = self.head(hidden_NH)
        return self.logit_map.apply_(logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)))

    def reference_logprobs(self, batch: PackedBatch) -> Tensor:
        """Log-probabilities [N] under the reference, without gradient: the base, unless `reference` is set."""
        if self.reference is not None:
            # Cached hidden states belong to this policy's base; the reference may be another model.
            uncached_batch = batch.without_cached_hidden()
            with torch.no_grad(), self.reference.shared_prefix(uncached_batch.prefix):
                return self.reference.logprobs(uncached_batch)
        return self.base_logprobs(batch)

    def reference_sums(self, batch: PackedBatch) -> Tensor:
        """Reference log-probabilities summed over each document, [D]; with `reference_cache`, computed once a run."""
        if self.reference_cache is None:
            return sum_by_document(batch, self.reference_logprobs(batch))
        keys = [document_key(document) for document in batch.documents]
        if any(key not in self.reference_cache for key in keys):
            sums = sum_by_document(batch, self.reference_logprobs(batch)).tolist()
            for key, nats in zip(keys, sums, strict=True):
                # The first value stays: in another batch the same document rounds differently.
                self.reference_cache.setdefault(key, nats)
        # In float64, so that the cached float survives unchanged.
        cached, device = [self.reference_cache[key] for key in keys], batch.ids.device
        return torch.tensor(cached, dtype=widest_float(device), device=device)

    def base_logprobs(self, batch: PackedBatch) -> Tensor:
        """Log-probabilities [N] of the base with the method off, without gradient.

        Raises `PlanError` for documents with inserted tokens, for which the base has no embedding.
        """
        if self.method.inserted_tokens and any((d.ids >= self.base.vocab_size).any() for d in batch.documents):
            reason = "the base alone cannot read documents with virtual tokens inside"
            hint = "put all of them in front, or name a run as the reference"
            raise PlanError(reason, where="method.positions", hint=hint)
        self._method_off = True
        try:
            with torch.no_grad(), self.method.disabled():
                return self.logprobs(batch)
        finally:
            self._method_off = False


class PrefixCache:
    """Tensors that precede rows, such as keys and values by layer: with their graph, and as leaves for the rows."""

    def __init__(self, computed: Mapping[int, tuple[Tensor, ...]]) -> None:
        self.computed = computed
        self.leaves: dict[int, Any] = {layer: tuple(map(_detached_leaf, t)) for layer, t in computed.items()}

    def backward(self) -> None:
        """Back-propagate the gradients that the leaves collected."""
        computed, leaves = (list(chain(*by_layer.values())) for by_layer in (self.computed, self.leaves))
        both = zip(computed, leaves, strict=True)
        pairs = [(tensor, leaf.grad.to(tensor.dtype)) for tensor, leaf in both if leaf.grad is not None]
        # One call for all layers: their graph is shared and would be freed by the first call.
        if pairs:
            torch.autograd.backward([tensor for tensor, _ in pairs], [gradient for _, gradient in pairs])


def _detached_leaf(tensor: Tensor) -> Tensor:
    if not tensor.requires_grad:
        return tensor.detach()
    # Float32: a leaf adds up the gradients of all micro-batches of a step. Attention casts it to the type of its keys.
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32)).requires_grad_()


def sum_by_document(batch: PackedBatch, values_N: Tensor) -> Tensor:
    """Sums over the supervised tokens of each document, [D]."""
    return values_N.new_zeros(batch.sequences).index_add(0, batch.loss.owner, values_N)


def document_key(document: Example) -> int:
    """64-bit hash of what determines a document's log-probability: ids, supervised mask, and task."""
    content = document.ids.tobytes() + document.supervised.tobytes() + (document.task or "").encode()
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little", signed=True)


def model_inputs(inputs: Tensor) -> dict[str, Tensor]:
    """The keyword argument by which transformers' models take ids or embeddings."""
    return {"inputs_embeds" if inputs.is_floating_point() else "input_ids": inputs}
