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
from rung.models.base_model import Base
from rung.models.layers import computing_again, feeding, recording
from rung.models.logprobs import LogitMap, token_logprobs
from rung.models.tree_attention import KeysValues
from rung.types import Below, Example, LossTerm, PackedBatch, Segment, SharedPrefix

Virtual = Tensor | Mapping[int, KeysValues]
"""What stands before every document: embeddings [P, H] that pass through the model, or keys and values by layer."""


class Switchable(Protocol):
    """The part of a method that a policy needs."""

    @property
    def virtual_tokens(self) -> int:
        """How many positions stand before every document; 0 for most methods, and where the method is off."""
        ...

    def rows(self, task: str | None) -> Tensor:
        """What virtual tokens are made of for documents of this task, with the graph. Asked for once a step."""
        ...

    def virtual(self, rows: Tensor) -> Virtual:
        """Those that stand before a document. Asked for only when there are some."""
        ...

    @property
    def inserted_tokens(self) -> int:
        """How many ids beyond the vocabulary stand for something learned, wherever they occur; 0 for most methods."""
        ...

    def inserted(self, rows: Tensor) -> Tensor:
        """Their embeddings [P, H]. Asked for only when there are some."""
        ...

    def penalty(self, batch: PackedBatch) -> list[LossTerm]:
        """What the method itself adds to the loss of the batch just computed."""
        ...

    def disabled(self) -> AbstractContextManager[None]:
        """The base alone, inside the context."""
        ...


class Untouched:
    """What a policy holds when nothing is tuned: off and on are the same."""

    virtual_tokens = 0
    inserted_tokens = 0

    def rows(self, task: str | None) -> Tensor:
        """Nothing."""
        return torch.empty(0, 0)

    def virtual(self, rows: Tensor) -> Virtual:
        """Nothing."""
        return {}

    def inserted(self, rows: Tensor) -> Tensor:
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

    def __init__(self, base: Base, method: Switchable) -> None:
        self.base = base
        self.method = method
        self.model = base.model
        self.logit_map = LogitMap.of(base.model.config)
        self.layers_to_recompute: Callable[[int], range] = lambda tokens: range(0)
        """Which layers a document of so many tokens computes again in the backward pass, so that it fits."""
        self.reference: Policy | None = None
        """What log-probabilities are compared with, where that is not the base with the method off."""
        self.known: dict[int, float] | None = None
        """Sums of the reference's log-probabilities by document, where they are kept."""
        self._shared: SharedPrefix | None = None
        self._ahead: dict[bool, _Ahead] = {}
        """Of the prefix at hand, with the method on (False) or off."""
        self._virtual: dict[str | None, _Ahead] = {}
        """By task, while batches are run in turn."""
        self._rows: dict[str | None, tuple[Tensor, Tensor]] = {}
        """What virtual tokens are made of, by task, while batches are run in turn: as computed, and as a leaf."""
        self._in_turn = False
        self._off = False

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
        shared = self._before(batch.prefix, batch.task)
        positions = batch.positions + self.method.virtual_tokens
        with self._from(batch.below):
            entering = self.entering(batch.ids, batch.task)
            return self._trunk(entering, positions, batch.segments, alone=batch.indivisible, shared=shared)

    def entering(self, ids: Tensor, task: str | None) -> Tensor:
        """What the model takes for ids of any shape: the same, or embeddings [..., H] where some are inserted ones."""
        if not self.method.inserted_tokens:
            return ids
        first = self.first_inserted
        known = self.model.get_input_embeddings()(ids.clamp(max=first - 1))
        rows_PH = self.method.inserted(self._of(task))
        own = rows_PH[(ids - first).clamp(min=0)].to(known.dtype)
        return torch.where((ids >= first)[..., None], own, known)

    def _of(self, task: str | None) -> Tensor:
        """What a task's virtual tokens are made of: for batches in turn computed once, and cut off."""
        if task in self._rows:
            return self._rows[task][1]
        computed = self.method.rows(task)
        if not self._in_turn:
            return computed
        self._rows[task] = computed, _leaf(computed)
        return self._rows[task][1]

    @property
    def first_inserted(self) -> int:
        """The id of the first token beyond the vocabulary."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @torch.no_grad()
    def states_below(self, batch: PackedBatch, layer: int) -> Tensor:
        """Hidden states [T, H] that enter `layer`, counted from 0; the number of layers means the final norm."""
        with recording(self.model, layer) as states:  # virtual tokens move layer 0, so there are none here
            self._trunk(batch.ids, batch.positions, batch.segments, alone=False)
            return states()

    def _from(self, below: Below | None) -> AbstractContextManager[None]:
        return nullcontext() if below is None else feeding(self.model, below.layer, below.states)

    def _trunk(
        self, entering: Tensor, positions_T: Tensor, segments: Sequence[Segment], *, alone: bool, **attention: object
    ) -> Tensor:
        """Ids [T] or embeddings [T, H] through the layers.

        `alone`: the row cannot be cut into smaller ones; other rows are as large as the budget asks for.
        """
        trunk = getattr(self.model, self.model.base_model_prefix)
        again = self.layers_to_recompute(len(entering)) if alone and torch.is_grad_enabled() else range(0)
        with self.autocast(), computing_again(self.model, again) if again else nullcontext():
            out = trunk(
                **by_name(entering[None]),
                position_ids=positions_T[None],
                # A mask of four dimensions is passed through untouched: the segments say who sees whom.
                attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=entering.device),
                segments=segments,
                use_cache=False,
                **attention,
            )
        hidden: Tensor = out.last_hidden_state[0]
        return hidden

    def in_turn(self, batches: Iterable[PackedBatch]) -> Iterator[PackedBatch]:
        """The batches one by one, each with its prefix at hand: the way to run what `pack` made.

        After the last row of a prefix, the prefix receives their gradients; after the last of all, the virtual tokens
        receive theirs.
        """
        self._in_turn = True
        try:
            for prefix, rows in groupby(batches, key=lambda batch: batch.prefix):
                with self.sharing(prefix):
                    yield from rows
            for ahead in self._virtual.values():
                ahead.backward()
            for computed, leaf in self._rows.values():
                if leaf.grad is not None:
                    computed.backward(leaf.grad)  # type: ignore[no-untyped-call]
        finally:
            self._virtual.clear()
            self._rows.clear()
            self._in_turn = False

    @contextmanager
    def sharing(self, prefix: SharedPrefix | None) -> Iterator[None]:
        """Rows with this prefix run inside; on leaving, the prefix receives their gradients all at once.

        The prefix runs at the first need. Its keys and values are leaves for the rows, so each row's backward pass ends
        there; what they collected is then back-propagated once. The sum is the gradient of the unshared rows.
        """
        self._shared = prefix
        try:
            yield
            if (ahead := self._ahead.get(False)) is not None:
                ahead.backward()
        finally:
            self._shared = None
            self._ahead.clear()

    def virtual(self, task: str | None = None) -> Mapping[int, KeysValues] | None:
        """Keys and values of the method's virtual tokens, if it has any; computed once for batches in turn."""
        if not self.method.virtual_tokens:
            return None
        if task in self._virtual:
            return self._virtual[task].leaves
        computed = self.method.virtual(self._of(task))
        if isinstance(computed, Tensor):
            computed = self.captured(computed)
        if not self._in_turn:
            return computed
        self._virtual[task] = _Ahead(computed)
        return self._virtual[task].leaves

    def captured(
        self, entering: Tensor, start: int = 0, before: Mapping[int, KeysValues] | None = None
    ) -> dict[int, KeysValues]:
        """Keys and values, by layer, of ids [T] or embeddings [T, H] that stand from position `start` on."""
        captured: dict[int, KeysValues] = {}
        positions = torch.arange(start, start + len(entering), device=entering.device)
        own = (Segment(0, len(entering), None),)
        self._trunk(entering, positions, own, alone=True, shared=before, capture=captured)
        return captured

    def _before(self, prefix: SharedPrefix | None, task: str | None) -> Mapping[int, KeysValues] | None:
        """Keys and values that every root of a row comes after: virtual tokens, then the prefix."""
        virtual = self.virtual(task)
        if prefix is None:
            return virtual
        if prefix is not self._shared:  # kept any longer its keys and values would be those of older weights
            raise RuntimeError("rows with a shared prefix run inside Policy.in_turn or Policy.sharing")
        if self._off not in self._ahead:
            with self._from(prefix.below):
                entering = self.entering(prefix.ids, task)
                self._ahead[self._off] = _Ahead(self.captured(entering, self.method.virtual_tokens, virtual))
        own = self._ahead[self._off].leaves
        return own if virtual is None else {layer: joined(virtual[layer], own[layer]) for layer in own}

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
            alone = batch.of_another_model()
            with torch.no_grad(), self.reference.sharing(alone.prefix):
                return self.reference.logprobs(alone)
        return self.base_logprobs(batch)

    def reference_sums(self, batch: PackedBatch) -> Tensor:
        """The same summed over each document, [D]. Where `known` is set, a document is read once a run."""
        if self.known is None:
            return by_document(batch, self.reference_logprobs(batch))
        keys = [document_key(document) for document in batch.documents]
        if any(key not in self.known for key in keys):
            found = by_document(batch, self.reference_logprobs(batch)).tolist()
            for key, nats in zip(keys, found, strict=True):
                self.known.setdefault(key, nats)  # what was used once stays: another batch would round otherwise
        return torch.tensor([self.known[key] for key in keys], dtype=torch.float64, device=batch.ids.device)

    def base_logprobs(self, batch: PackedBatch) -> Tensor:
        """The same with the method off, without gradient.

        Raises `PlanError` for documents with inserted tokens: the base has nothing to put there.
        """
        if self.method.inserted_tokens and any((d.ids >= self.first_inserted).any() for d in batch.documents):
            raise PlanError(
                "the base alone cannot read documents with virtual tokens inside",
                where="method.positions",
                hint="put all of them in front, or name a run as the reference",
            )
        self._off = True
        try:
            with torch.no_grad(), self.method.disabled():
                return self.logprobs(batch)
        finally:
            self._off = False

    def logits(self, batch: PackedBatch) -> Tensor:
        """All logits [T, V]: for probes on short batches only."""
        hidden = self.hidden_states(batch)
        with self.autocast():
            return self.logit_map.apply_(self.head(hidden).clone())


class _Ahead:
    """Keys and values of a prefix by layer: as computed, and cut off as leaves."""

    def __init__(self, computed: Mapping[int, KeysValues]) -> None:
        self.computed = computed
        self.leaves = {layer: (_leaf(key), _leaf(value)) for layer, (key, value) in computed.items()}

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


def by_document(batch: PackedBatch, values_N: Tensor) -> Tensor:
    """Sums over the supervised tokens of each document, [D]."""
    return values_N.new_zeros(batch.sequences).index_add(0, batch.loss.owner, values_N)


def document_key(document: Example) -> int:
    """64 bits of what decides a document's log-probability: its ids, what of them counts, and its task."""
    digest = blake2b(document.ids.tobytes(), digest_size=8)
    digest.update(document.supervised.tobytes())
    digest.update((document.task or "").encode())
    return int.from_bytes(digest.digest(), "little", signed=True)


def by_name(entering: Tensor) -> dict[str, Tensor]:
    """Ids or embeddings as the argument that transformers' models take them by."""
    return {"inputs_embeds" if entering.is_floating_point() else "input_ids": entering}


def joined(first: KeysValues, second: KeysValues) -> KeysValues:
    """One after the other, along the positions."""
    return torch.cat([first[0], second[0]], dim=2), torch.cat([first[1], second[1]], dim=2)


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)
