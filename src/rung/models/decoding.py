"""Decoding in one batch whose places are refilled: a prompt that waits takes the place of an answer that has ended.

A batch that is decoded until its longest answer ends computes ever fewer rows a call, and a call with few rows costs
nearly as much as one with many. Here all rows end at the same slot of the cache. A prompt that joins is encoded
without padding, as a packed row beside the others that join, and its keys are copied to the slots before that end;
whatever its place held before is masked. Its last token goes through the model with the next tokens of the other rows.
`models/generate.py` calls `Decoder`; on a card `models/static_decoding.py` decodes for it.

Suffixes: B places of the batch, S slots (masked ones and the row's tokens, without the prefix), V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rung.models.base_model import widest_float
from rung.models.kv_cache import new_cache, trim_cache, write_rows
from rung.models.policy import Policy, model_inputs
from rung.models.tree_attention import KVByLayer
from rung.planning.memory import PREFILL_TOKENS
from rung.types import Segment

OnToken = Callable[[Sequence[int]], bool]
"""Receives the tokens of an answer so far after each new one; returns whether the answer ends here."""
OnAnswered = Callable[[int], None]
"""Receives the number of prompts whose last answer has just ended."""
REFILL_SHARE = 8
"""Prompts join when one in eight places is free: encoding several at once costs less than one after another."""
DROP_SHARE = 4
"""Places that nobody takes are dropped when one in four is free: dropping copies the whole cache."""
ENCODE_TOKENS = 2_048
"""Tokens of prompts that are encoded at once: more are no faster on a processor, and take memory."""
SUM_BLOCK = 256
"""Tokens whose probabilities are added before a token is drawn; the square root of a vocabulary, more or less."""
TRIM_SLOTS = 64
"""Slots that no row sees any more are cut off when there are this many."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy."""

    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0
    answers_per_prompt: int = 1
    """Each prompt is encoded once for all its answers."""


@dataclass(frozen=True, slots=True)
class GeneratedAnswer:
    """Generated tokens, without the stop token."""

    ids: list[int]
    stop: int | None
    """The stop token that ended the answer; None if there was none."""
    logprobs: list[float]
    """Log-probability in nats of each generated token, including the stop token, under the distribution it was drawn
    from; for greedy answers under the model at temperature 1."""
    ended_by_caller: bool = False
    """Whether `OnToken` ended the answer."""

    @property
    def stopped(self) -> bool:
        """Whether the answer ended; False if it was truncated."""
        return self.stop is not None or self.ended_by_caller

    @property
    def all_tokens(self) -> list[int]:
        """All generated tokens, including the stop token."""
        return self.ids if self.stop is None else [*self.ids, self.stop]


class Request(NamedTuple):
    """A prompt that waits."""

    prompt: int
    """Its number."""
    suffix: Sequence[int]
    """Its tokens behind the common prefix, at least one."""
    limit: int
    """Maximum number of new tokens."""
    begun: Sequence[int] = ()
    """Last tokens of the suffix that are the beginning of the answer."""


@dataclass(eq=False)
class Row:
    """An answer that is being generated."""

    prompt: int
    limit: int
    prompt_slots: int
    """Slots of the cache that its prompt takes."""
    slots: int
    """Slots of the cache with keys of this row: the prompt and the tokens so far, without the last."""
    last_token: int
    """The token that predicts the next one."""
    tokens: list[int] = field(default_factory=list)
    begun: Sequence[int] = ()
    logprobs: list[float] = field(default_factory=list)
    stop: int | None = None
    ended_by_caller: bool = False

    def add(self, token: int, logprob: float, stop_ids: frozenset[int], on_token: OnToken | None) -> bool:
        """Add a token; return whether the answer goes on."""
        self.logprobs.append(logprob)
        if token in stop_ids:
            self.stop = token
            return False
        self.tokens.append(token)
        self.last_token = token
        self.ended_by_caller = on_token is not None and on_token([*self.begun, *self.tokens])
        return not self.ended_by_caller and len(self.tokens) < self.limit


@dataclass
class Decoder:
    """Answers requests in one batch. `start` is the position of the first suffix token."""

    policy: Policy
    prefix: KVByLayer | None
    start: int
    stop_ids: frozenset[int]
    sampling: Sampling
    generator: torch.Generator
    batch_size: int
    task: str | None = None
    on_token: OnToken | None = None
    on_answered: OnAnswered | None = None

    def run(self, requests: Sequence[Request]) -> dict[int, list[GeneratedAnswer]]:
        """Answers by the number of the prompt."""
        device = self.policy.device
        self._places: list[Row | None] = []
        self._cache = new_cache()
        self._mask_BS = torch.zeros(0, 0, dtype=torch.long, device=device)
        answers: dict[int, list[Row]] = {request.prompt: [] for request in requests}
        # long prompts first: the slots that they need are there for those that join later
        waiting = deque(sorted(requests, key=lambda request: len(request.suffix), reverse=True))
        while waiting or any(self._places):
            if count := self._joining(waiting):
                joining = [waiting.popleft() for _ in range(count)]
                self._join(joining[::-1], answers)
            else:
                self._drop_free_places()
            self._step()
        return {
            prompt: [GeneratedAnswer(row.tokens, row.stop, row.logprobs, row.ended_by_caller) for row in rows]
            for prompt, rows in answers.items()
        }

    def _joining(self, waiting: Sequence[Request]) -> int:
        """How many of the prompts that wait join the batch now."""
        if not waiting:
            return 0
        per_prompt, active = self.sampling.answers_per_prompt, sum(row is not None for row in self._places)
        # the prompts in the batch take no more slots than `PREFILL_TOKENS`, which the plan counts
        prompts = [row.prompt_slots for row in self._places if row is not None]
        slots = max([len(waiting[0].suffix), *prompts])
        places = max(1, min(self.batch_size // per_prompt, PREFILL_TOKENS // slots))
        free = min(places - -(-active // per_prompt), len(waiting))
        enough = min(len(waiting), max(1, places // REFILL_SHARE))
        return max(0, free) if not active or free >= enough else 0

    def _join(self, requests: Sequence[Request], answers: dict[int, list[Row]]) -> None:
        """Encode prompts up to their last token and give each of their answers a place."""
        per_prompt = self.sampling.answers_per_prompt
        rows = [
            Row(r.prompt, r.limit, len(r.suffix), len(r.suffix) - 1, r.suffix[-1], begun=r.begun)
            for r in requests
            for _ in range(per_prompt)
        ]
        for row in rows:
            answers[row.prompt].append(row)
        if not any(self._places):
            self._places, self._cache, self._mask_BS = [], new_cache(), self._mask_BS.new_zeros(0, 0)
        free = [place for place, row in enumerate(self._places) if row is None]
        added = max(0, len(rows) - len(free))
        places = [*free, *range(len(self._places), len(self._places) + added)][: len(rows)]
        self._places += [None] * added
        for place, row in zip(places, rows, strict=True):
            self._places[place] = row
        # longest prompts first, so that whoever joins a batch finds the slots that it needs
        slots = self._mask_BS.shape[1] if len(self._mask_BS) else max(row.slots for row in rows)
        mask_BS = self._mask_BS.new_zeros(len(self._places), slots)
        if len(self._mask_BS):
            mask_BS[: len(self._mask_BS)] = self._mask_BS
        for place, row in zip(places, rows, strict=True):
            mask_BS[place] = 0
            mask_BS[place, slots - row.slots :] = 1
        self._mask_BS = mask_BS
        suffixes = [request.suffix[:-1] for request in requests]
        for part in encoded_together([len(suffix) for suffix in suffixes]):
            segments, kv_by_layer = self.encode(suffixes[part])
            targets = [
                (place, segments[i // per_prompt])
                for i, place in enumerate(places[part.start * per_prompt : part.stop * per_prompt])
            ]
            write_rows(self._cache, kv_by_layer, targets, places=len(self._places), slots=slots)

    def encode(self, suffixes: Sequence[Sequence[int]]) -> tuple[list[Segment], KVByLayer]:
        """Keys and values of several texts as one packed row, each behind the prefix."""
        device, lengths = self.policy.device, [len(suffix) for suffix in suffixes]
        ends = list(accumulate(lengths))
        segments = [Segment(end - length, end, None) for end, length in zip(ends, lengths, strict=True)]
        if not ends[-1]:
            return segments, {}
        ids = torch.tensor([token for suffix in suffixes for token in suffix], device=device)
        positions = torch.cat([torch.arange(length, device=device) for length in lengths]) + self.start
        filled = tuple(segment for segment in segments if segment.end > segment.start)
        return segments, self.policy.packed_kv(self.policy.embed(ids, self.task), positions, filled, self.prefix)

    def _step(self) -> None:
        """Choose one token for every row."""
        device = self.policy.device
        rows = [row for row in self._places if row is not None]
        # a free place computes as well: token 0 at position 0, which every model has
        ids = [0 if row is None else row.last_token for row in self._places]
        positions = [0 if row is None else self.start + row.slots for row in self._places]
        for row in rows:
            row.slots += 1
        self._mask_BS = torch.cat([self._mask_BS, self._mask_BS.new_ones(len(self._places), 1)], dim=1)
        # embedded by the policy: the last token of a prompt may be a virtual one
        inputs = self.policy.embed(torch.tensor(ids, device=device)[:, None], self.task)
        out = self.policy.model(
            **model_inputs(inputs),
            position_ids=torch.tensor(positions, device=device)[:, None],
            past_key_values=self._cache,
            prefix=self.prefix,
            attention_mask=self._mask_BS,
            use_cache=True,
            logits_to_keep=1,
        )
        logits_BV = out.logits[:, -1]
        if len(rows) < len(self._places):
            is_active = torch.tensor([row is not None for row in self._places], device=device)
            logits_BV = logits_BV[is_active]
        tokens, logprobs = self.choose_tokens(logits_BV, self.uniforms(len(logits_BV)))
        self._record(rows, tokens.tolist(), logprobs.tolist())
        self._trim()

    def _record(self, rows: Sequence[Row], tokens: Sequence[int], logprobs: Sequence[float]) -> None:
        """Add one token to each row; a row that has ended leaves its place."""
        ended = set()
        for row, token, logprob in zip(rows, tokens, logprobs, strict=True):
            goes_on = row.add(token, logprob, self.stop_ids, self.on_token)
            if not goes_on:
                self._places[self._places.index(row)] = None
                ended.add(row.prompt)
        answered = ended - {row.prompt for row in self._places if row is not None}
        if answered and self.on_answered is not None:
            self.on_answered(len(answered))

    def _drop_free_places(self) -> None:
        """Drop free places where they are worth a copy of the cache."""
        kept = [place for place, row in enumerate(self._places) if row is not None]
        if (len(self._places) - len(kept)) * DROP_SHARE < len(self._places):
            return
        index = torch.tensor(kept, device=self._mask_BS.device)
        self._cache.batch_select_indices(index)
        self._mask_BS = self._mask_BS[index]
        self._places = [self._places[place] for place in kept]

    def _trim(self) -> None:
        """Cut off the first slots, which belonged to rows that have ended."""
        unused = self._mask_BS.shape[1] - max((row.slots for row in self._places if row is not None), default=0)
        if unused >= TRIM_SLOTS:
            self._mask_BS = self._mask_BS[:, unused:]
            trim_cache(self._cache, unused)

    def uniforms(self, rows: int, tokens: int = 1) -> Tensor | None:
        """A random number for each token to draw, [rows, tokens]; None for greedy answers."""
        if self.sampling.temperature == 0.0:
            return None
        # In float64: sums over a vocabulary in float32 lose the rare tokens.
        options: Any = {"generator": self.generator, "dtype": widest_float(self.policy.device)}
        return torch.rand(rows, tokens, device=self.policy.device, **options)

    def choose_tokens(self, logits_BV: Tensor, uniform_B1: Tensor | None) -> tuple[Tensor, Tensor]:
        """The next token of each row and its log-probability, [B] each.

        A token is drawn by inverting the cumulative distribution, which takes one random number a row; `multinomial`
        draws V of them.
        """
        logprobs = torch.log_softmax(logits_BV.float() / (self.sampling.temperature or 1.0), dim=-1)
        tokens = logprobs.argmax(dim=-1) if uniform_B1 is None else invert_distribution(logprobs.exp(), uniform_B1)
        return tokens, logprobs.gather(1, tokens[:, None])[:, 0]


def invert_distribution(weights_BV: Tensor, uniform_B1: Tensor) -> Tensor:
    """The first token of each row up to which the weights sum to more than this share of all, [B].

    Running sums in the type of `uniform_B1`: over blocks of the vocabulary, then within the block that holds the
    threshold. One running sum over the vocabulary takes ten times as long.
    """
    vocabulary, dtype = weights_BV.shape[1], uniform_B1.dtype
    whole = vocabulary // SUM_BLOCK * SUM_BLOCK
    sums = weights_BV[:, :whole].view(len(weights_BV), whole // SUM_BLOCK, SUM_BLOCK).sum(-1, dtype=dtype)
    sums = torch.cat([sums, weights_BV[:, whole:].sum(-1, keepdim=True, dtype=dtype)], dim=1)
    ends = sums.cumsum(dim=1)
    # The last sum is 1 only up to rounding, so the threshold is scaled by it.
    threshold_B1 = uniform_B1 * ends[:, -1:]
    block_B1 = torch.searchsorted(ends, threshold_B1, right=True).clamp(max=ends.shape[1] - 1)
    tokens = block_B1 * SUM_BLOCK + torch.arange(SUM_BLOCK, device=weights_BV.device)
    in_block = weights_BV.gather(1, tokens.clamp(max=vocabulary - 1)).to(dtype)
    before = (ends - sums).gather(1, block_B1)
    in_block = in_block.masked_fill(tokens >= vocabulary, 0.0)
    place_B1 = torch.searchsorted(in_block.cumsum(dim=1) + before, threshold_B1, right=True)
    # A block's sum and its running sum round differently: a threshold beyond the last takes the last token with weight.
    places = torch.arange(SUM_BLOCK, device=weights_BV.device)
    last_B1 = torch.where(in_block > 0.0, places, 0).amax(dim=1, keepdim=True)
    return (block_B1 * SUM_BLOCK + torch.minimum(place_B1, last_B1))[:, 0]


def encoded_together(lengths: Sequence[int]) -> Iterator[slice]:
    """Adjacent texts of together at most `ENCODE_TOKENS` tokens, at least one each."""
    start, total = 0, 0
    for i, length in enumerate(lengths):
        if i > start and total + length > ENCODE_TOKENS:
            yield slice(start, i)
            start, total = i, 0
        total += length
    yield slice(start, len(lengths))
