"""Keys and values of prompts, from beginnings that earlier prompts left, several prompts in one pass.

A pass over a few tokens costs as much as reading all weights: on two cores 25 ms for SmolLM2-135M, beside 0.7 ms a
token. So prompts that come together are encoded together, where they begin alike; where one would repeat what another
leaves, it waits for it. `models/slot_batch.py` encodes the prompts of its rows here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray

from rung.models.decoding import encoded_together
from rung.models.policy import Policy
from rung.models.tree_attention import KeysValues, KVByLayer, concatenate_kv
from rung.types import Segment

MIN_KEPT_BEGINNING = 8
"""Tokens; encoding a shorter beginning again costs less than looking for it saves."""
PASS_TOKENS = 32
"""Tokens that cost as much as a pass of their own: a prompt gives up so many kept ones to be encoded with others."""
Ids = NDArray[np.int64]


@dataclass
class BeginningCache:
    """Keys and values of earlier prompts, by their tokens; the one that was used longest ago goes first."""

    limit_bytes: int
    entries: OrderedDict[bytes, tuple[Ids, KVByLayer]] = field(default_factory=OrderedDict)
    bytes_held: int = 0

    def longest(self, ids: Ids) -> tuple[int, KVByLayer | None]:
        """The longest beginning of these tokens that is kept: its length, and keys and values at least as long."""
        best, found = 0, None
        for key, (kept, _) in self.entries.items():
            common = common_length(kept, ids)
            if common > best:
                best, found = common, key
        if found is None or best < MIN_KEPT_BEGINNING:
            return 0, None
        self.entries.move_to_end(found)
        return best, self.entries[found][1]

    def add(self, ids: Ids, kv_by_layer: KVByLayer) -> None:
        """Keep a prompt, unless it alone is larger than the limit."""
        size = sum(part.nbytes for states in kv_by_layer.values() for part in states)
        if len(ids) < MIN_KEPT_BEGINNING or size > self.limit_bytes or ids.tobytes() in self.entries:
            return
        self.entries[ids.tobytes()] = (ids, kv_by_layer)
        self.bytes_held += size
        while self.bytes_held > self.limit_bytes:
            _, (_, oldest) = self.entries.popitem(last=False)
            self.bytes_held -= sum(part.nbytes for states in oldest.values() for part in states)


class PromptEncoder:
    """Encodes prompts behind a method's virtual tokens, and keeps what it encoded."""

    def __init__(self, policy: Policy, beginnings_bytes: int) -> None:
        self.policy = policy
        self.beginnings = BeginningCache(beginnings_bytes)
        self.encoded_tokens = self.shared_tokens = 0
        """Prompt tokens that were encoded, and those whose keys were kept from earlier prompts."""
        with torch.no_grad(), policy.autocast():
            self.virtual_kv = policy.virtual_kv()

    @torch.no_grad()
    def encode(self, prompts: Sequence[Ids]) -> list[KVByLayer]:
        """Keys and values [1, K, T, D] of each prompt; nothing for a prompt without tokens."""
        found: list[KVByLayer] = [{} for _ in prompts]
        waiting = [i for i, ids in enumerate(prompts) if len(ids)]
        while waiting:
            chosen, kept_tokens, kept = self._next([prompts[i] for i in waiting])
            numbers = [waiting[place] for place in chosen]
            encoded = self._pass([prompts[i] for i in numbers], kept_tokens, kept)
            for i, kv_by_layer in zip(numbers, encoded, strict=True):
                found[i] = kv_by_layer
            waiting = [i for i in waiting if i not in numbers]
        return found

    def one(self, ids: Ids) -> KVByLayer:
        """The keys and values of some tokens, which are not kept: for their shapes."""
        return self._packed([ids], 0, None)[0]

    def _next(self, prompts: Sequence[Ids]) -> tuple[Sequence[int], int, KVByLayer | None]:
        """Places of the prompts of the next pass, and the kept beginning that they share: its length and states.

        The first prompt and others that give up little of what is kept for them. One that would repeat what another
        of the pass leaves waits for it.
        """
        first, found = prompts[0], [self.beginnings.longest(ids) for ids in prompts]
        chosen, length = [0], found[0][0]
        for place, ids in enumerate(prompts[1:], start=1):
            shared = min(length, common_length(first, ids))
            shared = shared if shared >= MIN_KEPT_BEGINNING else 0
            gives_up = max(found[i][0] for i in (*chosen, place)) - shared
            repeats = max(common_length(prompts[i], ids) for i in chosen) - shared if self.beginnings.limit_bytes else 0
            if gives_up <= PASS_TOKENS and repeats <= PASS_TOKENS:
                chosen, length = [*chosen, place], shared
        together = next(encoded_together([len(prompts[place]) - length for place in chosen]))
        if len(chosen[together]) == 1:
            return [0], *found[0]
        return chosen[together], length, found[0][1] if length else None

    def _pass(self, prompts: Sequence[Ids], kept_tokens: int, kept: KVByLayer | None) -> list[KVByLayer]:
        self.shared_tokens += kept_tokens * len(prompts)
        self.encoded_tokens += sum(len(ids) - kept_tokens for ids in prompts)
        beginning = None
        if kept is not None:
            beginning = {layer: _part(states, 0, kept_tokens) for layer, states in kept.items()}
        found: list[KVByLayer] = []
        rests = self._packed([ids[kept_tokens:] for ids in prompts], kept_tokens, beginning)
        for ids, rest in zip(prompts, rests, strict=True):
            if not rest:  # a view of what is kept: keeping it too would hold the whole
                found.append(beginning or {})
                continue
            kv_by_layer = concatenate_kv(beginning, rest)
            self.beginnings.add(ids, kv_by_layer)
            found.append(kv_by_layer)
        return found

    def _packed(self, texts: Sequence[Ids], start: int, beginning: KVByLayer | None) -> Sequence[KVByLayer]:
        """Keys and values of each text behind the virtual tokens and a beginning, all as one packed row."""
        ends = list(accumulate(len(ids) for ids in texts))
        if not ends[-1]:
            return [{} for _ in texts]
        policy, device = self.policy, self.policy.device
        segments = [Segment(end - len(ids), end, None) for end, ids in zip(ends, texts, strict=True)]
        ids = torch.from_numpy(np.concatenate(texts)).to(device)
        positions = torch.cat([torch.arange(len(ids), device=device) for ids in texts])
        positions += start + policy.method.virtual_tokens
        context = self.virtual_kv if beginning is None else concatenate_kv(self.virtual_kv, beginning)
        filled = tuple(segment for segment in segments if segment.end > segment.start)
        with policy.autocast():
            kv_by_layer = policy.packed_kv(policy.embed(ids, None), positions, filled, context)
        if len(texts) == 1:
            return [kv_by_layer]
        return [
            {layer: _copy(states, s.start, s.end) for layer, states in kv_by_layer.items()} if s.end > s.start else {}
            for s in segments
        ]


def common_length(first: Ids, second: Ids) -> int:
    """Tokens that two texts begin with."""
    length = min(len(first), len(second))
    differences = np.flatnonzero(first[:length] != second[:length])
    return int(differences[0]) if len(differences) else length


def _part(states: KeysValues, start: int, end: int) -> KeysValues:
    key, value = (part[:, :, start:end] for part in states)
    return key, value


def _copy(states: KeysValues, start: int, end: int) -> KeysValues:
    # a view that is kept would hold the states of all prompts of its pass
    key, value = (part.clone() for part in _part(states, start, end))
    return key, value
